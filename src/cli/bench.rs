//! `helion bench`: how fast the engine is on this machine, without any network.
//!
//! What is measured is what `llama-bench` measures, so that the two can be set side by side: a prompt from an empty cache, with
//! the logits of its last token, and tokens one by one; here in several lanes, too. Rounds go through all of it, and every figure
//! is the median of its rounds, so that a machine whose speed drifts hurts all of them alike.

use std::{collections::BTreeMap, ops::Range};

use clap::{Args, builder::RangedU64ValueParser};
use serde::Serialize;

use super::{
    arguments::{DtypeArg, KvDtypeArg, ModelArgs, Usage, block_range, count, device, threads},
    output::{print, print_json},
    progress::Progress,
    signals::Signals,
};
use crate::{
    engine::{
        DeviceChoice, Edges, EdgesOptions, Engine, EngineOptions, WATERMARK_SHARE,
        speed::{Decode, Speed, SpeedError, median, memory_bandwidth},
    },
    model::{
        Dtype, Quant,
        checkpoint::Checkpoint,
        inspect::WeightBytes,
        source::{ModelSource, Part},
    },
};

#[derive(Debug, Args)]
pub(super) struct BenchArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// Measure these blocks alone, half-open: 0:4 is blocks 0, 1, 2 and 3 [default: the whole model, embedding and head
    /// included].
    #[arg(long, value_name = "START:END", value_parser = block_range)]
    blocks: Option<Range<usize>>,
    /// Make up the weights: of the model only its configuration is read, so that no weights have to be downloaded.
    #[arg(long)]
    random_weights: bool,
    /// What to compute in, and keep weights and KV cache in: auto is as the checkpoint is stored.
    #[arg(long, value_enum, default_value_t = DtypeArg::Auto)]
    dtype: DtypeArg,
    /// How matrices are quantized: auto (as stored), none, q8_0, q4_0, q4_k or q6_k.
    #[arg(long, env = "HELION_QUANT", value_name = "QUANT", default_value_t = Quant::Auto)]
    quant: Quant,
    /// What to keep keys and values in: auto is as --dtype, q8 codes of 8 bits.
    #[arg(long, value_enum, default_value_t = KvDtypeArg::Auto)]
    kv_dtype: KvDtypeArg,
    /// Threads that compute [default: one a core].
    #[arg(long, value_name = "N", value_parser = threads())]
    threads: Option<usize>,
    /// Where to compute: auto, cpu or cuda:N.
    #[arg(long, default_value = "auto", value_parser = device)]
    device: DeviceChoice,
    /// Lengths of the prompts, tokens.
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_values_t = [128, 512], value_parser = count())]
    prefill: Vec<usize>,
    /// Numbers of lanes that get a token each in a step.
    #[arg(long, value_name = "N,…", value_delimiter = ',', default_values_t = [1, 2, 4, 8, 16, 32], value_parser = lanes())]
    lanes: Vec<usize>,
    /// Tokens that each lane has before it is measured.
    #[arg(long, value_name = "N", default_value_t = 0)]
    context: usize,
    /// Steps of each number of lanes in a round.
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = count())]
    steps: usize,
    /// Rounds.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = count())]
    rounds: usize,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// A batch of more lanes is no decoding any more.
fn lanes() -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(1..=4096)
}

/// What was measured; the object that `--json` prints.
#[derive(Debug, Serialize)]
struct Report {
    model: String,
    dtype: Dtype,
    /// What the matrices are packed in, or `none`.
    quant: &'static str,
    threads: usize,
    device: String,
    prefill: Vec<PrefillSpeed>,
    decode: Vec<DecodeSpeed>,
    /// What the weights take in their formats, by themselves.
    weights_bytes: u64,
    /// What they take in memory.
    loaded_bytes: u64,
    memory_bandwidth_bytes_per_second: f64,
}

/// Through a prompt.
#[derive(Debug, Serialize)]
struct PrefillSpeed {
    tokens: usize,
    tokens_per_second: f64,
}

/// Of all lanes together.
#[derive(Debug, Serialize)]
struct DecodeSpeed {
    lanes: usize,
    tokens_per_second: f64,
}

/// What is measured.
struct Measured {
    engine: Engine,
    edges: Option<Edges>,
}

pub(super) async fn run(args: BenchArgs) -> anyhow::Result<()> {
    let mut signals = Signals::new()?;
    signals.guard(bench(args)).await
}

async fn bench(args: BenchArgs) -> anyhow::Result<()> {
    let source = ModelSource::open(&args.model.model, args.model.hub.options()).await?;
    let all = source.spec().num_blocks();
    let span = args.blocks.clone().unwrap_or(0..all);
    if span.end > all {
        let message = format!("--blocks {}:{} is not in the model, which has blocks 0:{all}", span.start, span.end);
        return Err(Usage(message).into());
    }
    args.check(source.spec().max_context)?;
    let dtype = args.dtype.dtype().unwrap_or(source.spec().stored_dtype);
    let edges = args.blocks.is_none();
    let (checkpoint, stored) = if args.random_weights {
        (Checkpoint::random(source.spec().clone()), BTreeMap::new())
    } else {
        let part = if edges { Part::All } else { Part::Blocks(span.clone()) };
        (source.open_part(&part).await?, source.stored_tensors().await?)
    };
    let weights = WeightBytes::of(checkpoint.spec(), (span.clone(), edges), (dtype, args.quant), &stored);
    let name = source.name().to_owned();
    let json = args.json;
    // Measuring keeps a thread busy for long.
    let report = tokio::task::spawn_blocking(move || {
        let measured = load(&checkpoint, &args, (span, dtype))?;
        let kernels = measured.engine.kernel_path().to_owned();
        anyhow::Ok((measure(&measured, &args, name, weights)?, kernels))
    });
    let (report, kernels) = report.await??;
    if json { Ok(print_json(&report)?) } else { Ok(print(format_args!("{}", table(&report, &kernels, weights)))?) }
}

fn load(checkpoint: &Checkpoint, args: &BenchArgs, (span, dtype): (Range<usize>, Dtype)) -> anyhow::Result<Measured> {
    let decode = args.lanes.iter().map(|lanes| args.decode(*lanes).cache_tokens());
    let most = decode.chain(args.prefill.iter().copied()).max().unwrap_or(0);
    // New sessions leave a part of the pool free.
    let cache_tokens = most.saturating_add(most / (WATERMARK_SHARE - 1)).saturating_add(WATERMARK_SHARE * 16);
    let options = EngineOptions {
        device: args.device,
        quant: args.quant,
        cache_tokens,
        threads: args.threads,
        kv_dtype: args.kv_dtype.dtype(),
        ..EngineOptions::new(span, dtype)
    };
    let progress = Progress::new("loading blocks");
    let engine = Engine::load(checkpoint, options, &mut |done, of| progress.update(done as u64, of as u64))?;
    let options = EdgesOptions { dtype, quant: args.quant, device: args.device, threads: args.threads };
    let edges = args.blocks.is_none().then(|| Edges::load(checkpoint, options));
    Ok(Measured { engine, edges: edges.transpose()? })
}

impl BenchArgs {
    /// Fails where a sequence would be longer than the model's context.
    fn check(&self, max_context: usize) -> Result<(), Usage> {
        let longest = self.prefill.iter().copied().max().unwrap_or(0);
        if longest > max_context {
            return Err(Usage(format!(
                "--prefill {longest} is longer than the model's context of {max_context} tokens"
            )));
        }
        let tokens = self.context.saturating_add(self.steps).saturating_add(1);
        if tokens > max_context {
            let message = format!(
                "--context {} and --steps {} make {tokens} tokens with the first step, and the model's context holds {max_context}",
                self.context, self.steps
            );
            return Err(Usage(message));
        }
        Ok(())
    }

    fn decode(&self, lanes: usize) -> Decode {
        Decode { context: self.context, ..Decode::new(lanes, self.steps) }
    }
}

fn measure(measured: &Measured, args: &BenchArgs, model: String, weights: WeightBytes) -> Result<Report, SpeedError> {
    let Measured { engine, edges } = measured;
    let speed = match edges {
        Some(edges) => Speed::of_model(engine, edges),
        None => Speed::of_blocks(engine),
    };
    let threads = engine.threads();
    let progress = Progress::new("measuring");
    let of = (args.rounds * (args.prefill.len() + args.lanes.len() + 1)) as u64;
    let mut done = 0;
    let mut tell = || {
        done += 1;
        progress.update(done, of);
    };
    // Touches every weight once before anything counts.
    speed.decode(&Decode::new(1, 1))?;
    let mut prefill = vec![Vec::new(); args.prefill.len()];
    let mut decode = vec![Vec::new(); args.lanes.len()];
    let mut bus = Vec::new();
    for _ in 0..args.rounds {
        bus.push(memory_bandwidth(threads));
        tell();
        for (tokens, speeds) in args.prefill.iter().zip(&mut prefill) {
            speeds.push(speed.prefill(*tokens)?);
            tell();
        }
        for (lanes, speeds) in args.lanes.iter().zip(&mut decode) {
            speeds.push(speed.decode(&args.decode(*lanes))?);
            tell();
        }
    }
    let prefill = args.prefill.iter().zip(&mut prefill);
    let decode = args.lanes.iter().zip(&mut decode);
    Ok(Report {
        model,
        dtype: engine.dtype(),
        quant: engine.quantization(),
        threads,
        // `cpu-kv-q8` is a kernel path of the device `cpu`.
        device: engine.kernel_path().split('-').next().unwrap_or_default().to_owned(),
        prefill: prefill
            .map(|(tokens, speeds)| PrefillSpeed { tokens: *tokens, tokens_per_second: median(speeds) })
            .collect(),
        decode: decode
            .map(|(lanes, speeds)| DecodeSpeed { lanes: *lanes, tokens_per_second: median(speeds) })
            .collect(),
        weights_bytes: weights.all,
        loaded_bytes: engine.loaded_bytes() + edges.as_ref().map_or(0, Edges::loaded_bytes),
        memory_bandwidth_bytes_per_second: median(&mut bus),
    })
}

/// The report for people: tokens a second, and how much of the memory bus reading the weights takes.
fn table(report: &Report, kernels: &str, weights: WeightBytes) -> String {
    use std::fmt::Write as _;
    let Report { model, dtype, quant, threads, loaded_bytes, memory_bandwidth_bytes_per_second: bus, .. } = report;
    let mut text = format!(
        "{model}: {dtype}, quantized: {quant}, {threads} threads, {kernels}\nweights {} of {} in memory, the bus reads {}/s\n\n",
        gigabytes(weights.all as f64),
        gigabytes(*loaded_bytes as f64),
        gigabytes(*bus)
    );
    text += "               tokens/s   of the bus\n";
    // Writing to a string can't fail.
    for PrefillSpeed { tokens, tokens_per_second } in &report.prefill {
        let _ = writeln!(text, "prefill {tokens:>5} {tokens_per_second:>9.1}");
    }
    for DecodeSpeed { lanes, tokens_per_second } in &report.decode {
        let share = weights.a_step.map(|bytes| tokens_per_second / *lanes as f64 * bytes as f64 / bus);
        let share = share.map_or("-".to_owned(), |share| format!("{:.0}%", 100.0 * share));
        let _ = writeln!(text, "decode {lanes:>3} × 1 {tokens_per_second:>8.1} {share:>12}");
    }
    text
}

fn gigabytes(bytes: f64) -> String {
    format!("{:.2} GB", bytes / 1e9)
}
