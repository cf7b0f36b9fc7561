//! `helion client score`: the logits of every position of a sequence.

use std::path::PathBuf;

use clap::Args;
use safetensors::tensor::TensorView;

use super::{
    arguments::{SwarmArgs, seconds},
    generate::{RuleArgs, connect, use_client},
    output::say,
    signals::Signals,
};
use crate::client::{Client, generation::GenerationOptions, session::Patience};

#[derive(Debug, Args)]
pub(super) struct ScoreArgs {
    #[command(flatten)]
    swarm: SwarmArgs,
    #[command(flatten)]
    rules: RuleArgs,
    /// The token ids, separated by commas.
    #[arg(long, value_name = "ID,…", value_delimiter = ',', required = true)]
    input_ids: Vec<u32>,
    /// Where to write the logits: a safetensors file with the tensor `logits`, [ids, vocabulary] in f32.
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Tokens in one step.
    #[arg(long, value_name = "N", default_value_t = 128, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=4096))]
    prefill_chunk: usize,
    /// How long to wait for a swarm that does not have all blocks yet, seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 0, value_parser = seconds(0))]
    wait: u64,
}

pub(super) async fn run(args: ScoreArgs) -> anyhow::Result<()> {
    let mut signals = Signals::new()?;
    if let Some(directory) = args.out.parent().filter(|directory| !directory.as_os_str().is_empty()) {
        // Better now than when all is computed.
        anyhow::ensure!(directory.is_dir(), "{} can't be written: there is no such directory", args.out.display());
    }
    let client = args.rules.apply(signals.guard(connect(&args.swarm, Patience::default())).await?);
    use_client(&client, &mut signals, score(&client, &args)).await
}

async fn score(client: &Client, args: &ScoreArgs) -> anyhow::Result<()> {
    let options = GenerationOptions {
        prefill_chunk: args.prefill_chunk,
        wait: std::time::Duration::from_secs(args.wait),
        ..GenerationOptions::default()
    };
    let logits = client.score(&args.input_ids, &options).await?;
    let vocabulary = client.model().spec().vocab_size;
    let bytes: Vec<u8> = logits.iter().flat_map(|logit| logit.to_le_bytes()).collect();
    let view = TensorView::new(safetensors::Dtype::F32, vec![args.input_ids.len(), vocabulary], &bytes)?;
    safetensors::serialize_to_file([("logits", view)], None, &args.out)
        .map_err(|error| anyhow::anyhow!("the logits can't be written to {}: {error}", args.out.display()))?;
    say(format_args!("wrote logits [{}, {vocabulary}] to {}", args.input_ids.len(), args.out.display()));
    Ok(())
}
