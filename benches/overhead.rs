//! What the network costs: decode speed through 1, 2 and 4 node processes on loopback, against the same engine in this
//! process without any network, all in one run. Prints a table for the README.
//!
//! "Network, a hop" is what a token takes beside the hops' engines and the client's edges, over the number of hops: all the
//! way around the ring. With `--sessions N` it also runs N generations at once through each swarm. The rounds alternate between
//! the settings, so that a machine whose speed drifts hurts all of them alike; figures are medians.
//!
//! ```text
//! cargo bench --bench overhead -- [DIR] [--dtype bf16] [--nodes 1,2] [--sessions 8] [--tokens 32] [--rounds 3] [--json]
//! ```

#![allow(clippy::expect_used)] // a bench that can't go on stops, with the reason

mod nodes;

use std::{
    path::{Path, PathBuf},
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use clap::Parser as _;
use helion::{
    client::{
        Client,
        generation::{GenerationEvent, GenerationOptions},
        session::{Input, Step, Want},
    },
    engine::{DeviceChoice, Edges, EdgesOptions, Engine, EngineOptions, HiddenStates, Job, Keep, LaneRun},
    model::{Dtype, Quant, hub::HubOptions, source::ModelSource},
    swarm::ticket::SessionLimits,
};
use nodes::{NodeProcess, NodeSettings, connect};

const PROMPT: [u32; 8] = [1, 77, 101, 113, 80, 75, 103, 84];

#[derive(clap::Parser)]
struct Args {
    /// The checkpoint [default: the demo's].
    dir: Option<PathBuf>,
    /// What to compute in.
    #[arg(long, default_value = "f32")]
    dtype: Dtype,
    /// How many nodes share the blocks, in each swarm that is started.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 2, 4])]
    nodes: Vec<u32>,
    /// Generations at once, beside one alone.
    #[arg(long, default_value_t = 1)]
    sessions: usize,
    #[arg(long, default_value_t = 200)]
    tokens: usize,
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    json: bool,
    /// What `cargo bench` passes to every bench.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> anyhow::Result<()> {
    let mut args = Args::parse();
    let demo = || Path::new(env!("CARGO_MANIFEST_DIR")).join("src/cli/demo/helion-tiny");
    args.dir.get_or_insert_with(demo);
    let runtime = tokio::runtime::Runtime::new()?;
    // On a worker, as the command line runs its commands.
    runtime.block_on(async move { tokio::spawn(run(args)).await? })
}

/// A swarm and what was measured through it.
struct Setting {
    nodes: u32,
    client: Client,
    times: Vec<TokenTime>,
    /// Tokens a second of all sessions together, a round each.
    together: Vec<f64>,
    _swarm: LocalSwarm,
}

async fn run(args: Args) -> anyhow::Result<()> {
    let scratch = tempfile::tempdir()?;
    let model = args.dir.clone().expect("it has a default");
    let source = ModelSource::open(&model.display().to_string(), HubOptions::default()).await?;
    let checkpoint = source.fetch_edges().await?;
    let blocks = checkpoint.spec().num_blocks();
    let edges = Edges::load(
        &checkpoint,
        EdgesOptions { dtype: args.dtype, quant: Quant::Auto, device: DeviceChoice::Cpu, threads: None },
    )?;
    let alone = Engine::load(&checkpoint, EngineOptions::new(0..blocks, args.dtype), &mut |_, _| {})?;

    let mut settings = Vec::new();
    for nodes in args.nodes.iter().copied() {
        let swarm = LocalSwarm::start(&args, &model, scratch.path(), (blocks, nodes))?;
        let client = connect(&source, &swarm.address, Some(args.dtype)).await?;
        settings.push(Setting { nodes, client, times: Vec::new(), together: Vec::new(), _swarm: swarm });
    }
    let mut in_process = Vec::new();
    for round in 0..=args.rounds {
        let direct = decode_in_process(&alone, &edges, args.tokens);
        // The first round warms up.
        let counts = round > 0;
        if counts {
            in_process.extend(direct);
        }
        for setting in &mut settings {
            let measured = decode_through(&setting.client, args.tokens).await?;
            let together = if args.sessions > 1 { generate_together(&setting.client, &args).await? } else { 0.0 };
            if counts {
                setting.times.extend(measured);
                setting.together.push(together);
            }
        }
    }
    let base = median(in_process.iter().copied());
    if args.json {
        print_json(&args, base, &settings)
    } else {
        print_table(&args, (blocks, base), &settings)
    }
    Ok(())
}

fn print_json(args: &Args, base: f64, settings: &[Setting]) {
    let nodes = settings.iter().map(|setting| {
        let one = 1.0 / median(setting.times.iter().map(|token| token.all));
        let together = median(setting.together.iter().copied());
        serde_json::json!({"nodes": setting.nodes, "one_session": one, "sessions": args.sessions, "together": together})
    });
    let nodes: Vec<_> = nodes.collect();
    println!("{}", serde_json::json!({"in_process": 1.0 / base, "through": nodes}));
}

fn print_table(args: &Args, (blocks, base): (usize, f64), settings: &[Setting]) {
    println!(
        "| decode, {blocks} blocks, {}, one session | tokens/s | of the engine alone | a token | in the hops' engines | network, a hop | {} sessions, tokens/s |",
        args.dtype, args.sessions
    );
    println!("|---|---|---|---|---|---|---|");
    println!("| engine in this process, no network | {:.1} | 1.00 | {:.2} ms | | | |", 1.0 / base, base * 1e3);
    for Setting { nodes, times, together, .. } in settings {
        let time = median(times.iter().map(|token| token.all));
        let engines = median(times.iter().map(|token| token.engines));
        let network = median(times.iter().map(|token| token.all - token.engines - token.edges)) / f64::from(*nodes);
        println!(
            "| {nodes} node(s) on loopback | {:.1} | {:.2} | {:.2} ms | {:.2} ms | {:.2} ms | {:.1} |",
            1.0 / time,
            base / time,
            time * 1e3,
            engines * 1e3,
            network * 1e3,
            median(together.iter().copied())
        );
    }
}

/// Tokens a second of several generations that begin together.
async fn generate_together(client: &Client, args: &Args) -> anyhow::Result<f64> {
    let run = |session: usize| {
        let (client, max_tokens) = (client.clone(), args.tokens);
        async move {
            let prompt = PROMPT.map(|id| id + session as u32);
            let options =
                GenerationOptions { max_tokens, ignore_eos: true, tenant: None, ..GenerationOptions::default() };
            let mut first = None;
            let mut on_event = |event| {
                if matches!(event, GenerationEvent::Token { .. }) {
                    first.get_or_insert_with(Instant::now);
                }
            };
            client.generate(&prompt, &options, &mut on_event).await?;
            anyhow::Ok((first.expect("a token"), Instant::now()))
        }
    };
    let running: Vec<_> = (0..args.sessions).map(|session| tokio::spawn(run(session))).collect();
    let (mut first, mut last) = (None::<Instant>, Instant::now());
    for task in running {
        let (began, ended) = task.await??;
        first = Some(first.map_or(began, |first| first.min(began)));
        last = last.max(ended);
    }
    let tokens = args.sessions * (args.tokens - 1);
    Ok(tokens as f64 / last.duration_since(first.expect("a session")).as_secs_f64())
}

/// Where a token's time went, seconds.
struct TokenTime {
    all: f64,
    /// In the engines of the hops, as they say: waiting for their turn, and computing.
    engines: f64,
    /// In the client's embedding and head.
    edges: f64,
}

/// Seconds of every token after the first, in this process: embedding, blocks and head, as a client and its hops do it.
fn decode_in_process(engine: &Engine, edges: &Edges, tokens: usize) -> Vec<f64> {
    let wire = wire_dtype(engine.dtype());
    let mut cache = engine.cache(engine.span()).ok();
    let mut input = PROMPT.to_vec();
    let mut position = 0;
    let mut times = Vec::new();
    let mut last = Instant::now();
    for _ in 0..tokens {
        let (sender, receiver) = mpsc::sync_channel(1);
        let hidden: HiddenStates = edges.embed(&input, wire).expect("ids of the vocabulary");
        engine.submit(Job {
            cache: cache.take().expect("the cache comes back with every step"),
            lanes: vec![LaneRun { lane: 0, position, tokens: input.len() }],
            hidden,
            rope_length: None,
            keep: Keep::LastOfEachLane,
            deadline: Instant::now() + Duration::from_secs(60),
            cancelled: Arc::default(),
            done: Box::new(move |cache, result| sender.send((cache, result)).expect("the receiver waits")),
        });
        let (back, output) = receiver.recv().expect("every job is answered");
        cache = Some(back);
        let logits = edges.logits(&output.expect("the step fits").hidden).expect("rows of the model");
        position += input.len();
        input = vec![likeliest(&logits)];
        times.push(last.elapsed().as_secs_f64());
        last = Instant::now();
    }
    times.split_off(1)
}

/// The times of every token after the first, through a swarm.
async fn decode_through(client: &Client, tokens: usize) -> anyhow::Result<Vec<TokenTime>> {
    let limits = SessionLimits { max_lanes: 1, max_tokens: 1024, max_in_flight: 4, max_step_tokens: 64 };
    let (mut session, _) = client.open_session(limits, Duration::ZERO).await?;
    let edges = client.model().edges();
    let mut input = PROMPT.to_vec();
    let mut position = 0;
    let mut times = Vec::new();
    let mut last = Instant::now();
    for _ in 0..tokens {
        let begun = Instant::now();
        let hidden = edges.embed(&input, session.wire_dtype())?;
        let mut in_edges = begun.elapsed();
        session.send(Step {
            lanes: vec![LaneRun { lane: 0, position, tokens: input.len() }],
            input: Input::Rows(hidden),
            want: Want::Last,
            rope_length: None,
        })?;
        let answer = session.receive().await?;
        let answered = Instant::now();
        let logits = edges.logits(&answer.hidden.expect("the last row was wanted"))?;
        position += input.len();
        input = vec![likeliest(&logits)];
        in_edges += answered.elapsed();
        let engines: Duration = answer.times.iter().map(|(queued, computed)| *queued + *computed).sum();
        times.push(TokenTime {
            all: last.elapsed().as_secs_f64(),
            engines: engines.as_secs_f64(),
            edges: in_edges.as_secs_f64(),
        });
        last = Instant::now();
    }
    Ok(times.split_off(1))
}

/// How hidden states travel between hops that compute in `dtype`.
fn wire_dtype(dtype: Dtype) -> Dtype {
    if dtype == Dtype::F32 { Dtype::F32 } else { Dtype::Bf16 }
}

fn likeliest(logits: &[f32]) -> u32 {
    (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).expect("a vocabulary") as u32
}

fn median(times: impl Iterator<Item = f64>) -> f64 {
    let mut times: Vec<f64> = times.collect();
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Node processes that share a model's blocks evenly.
struct LocalSwarm {
    address: String,
    _nodes: Vec<NodeProcess>,
}

impl LocalSwarm {
    fn start(args: &Args, model: &Path, home: &Path, (blocks, count): (usize, u32)) -> anyhow::Result<Self> {
        let dtype = args.dtype.to_string();
        let mut nodes: Vec<NodeProcess> = Vec::new();
        for node in 0..count as usize {
            nodes.push(NodeProcess::start(&NodeSettings {
                model,
                home,
                name: format!("{count}-{node}"),
                blocks: (node * blocks / count as usize, (node + 1) * blocks / count as usize),
                peer: nodes.first().map(|first| first.address.as_str()),
                more: &["--dtype", &dtype],
            })?);
        }
        let address = nodes.first().map(|first| first.address.clone()).unwrap_or_default();
        Ok(Self { address, _nodes: nodes })
    }
}
