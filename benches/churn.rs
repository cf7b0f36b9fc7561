//! What nodes that are killed cost: tokens a second of a few generations at a time, undisturbed, and while every so often one of
//! eight nodes is killed (`kill -9`) and started again, in one run.
//!
//! ```text
//! cargo bench --bench churn -- [--every 20] [--seconds 300] [--generations 4] [--json]
//! ```
//!
//! Every answer is compared with the undisturbed one; a wrong token or a generation that fails ends the bench with an error.

mod nodes;

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use clap::Parser as _;
use helion::{
    client::{
        Client,
        generation::{GenerationEvent, GenerationOptions},
    },
    model::{hub::HubOptions, source::ModelSource},
};
use nodes::{NodeProcess, NodeSettings, connect};
use rand::RngExt as _;
use tokio::task::JoinSet;

/// Every block is on two nodes.
const SPANS: [(usize, usize); 8] = [(0, 2), (2, 4), (4, 6), (6, 8), (0, 2), (2, 4), (4, 6), (6, 8)];
const PROMPT: [u32; 8] = [1, 77, 101, 113, 80, 75, 103, 84];
const TOKENS: usize = 500;

#[derive(clap::Parser)]
struct Args {
    /// Seconds between two kills.
    #[arg(long, default_value_t = 20.0)]
    every: f64,
    /// Seconds of each half: undisturbed, then with kills.
    #[arg(long, default_value_t = 300.0)]
    seconds: f64,
    /// Generations at a time.
    #[arg(long, default_value_t = 4)]
    generations: u32,
    /// Print one JSON object instead of text.
    #[arg(long)]
    json: bool,
    /// What `cargo bench` passes to every bench.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    let runtime = tokio::runtime::Runtime::new()?;
    // On a worker, as the command line runs its commands.
    runtime.block_on(async move { tokio::spawn(run(args)).await? })
}

async fn run(args: Args) -> anyhow::Result<()> {
    let scratch = tempfile::tempdir()?;
    let place = Arc::new(Place {
        model: Path::new(env!("CARGO_MANIFEST_DIR")).join("src/cli/demo/helion-tiny"),
        home: scratch.path().to_owned(),
    });
    let bootstrap = NodeProcess::bootstrap(&place.home)?;
    let mut nodes = Vec::new();
    for (index, span) in SPANS.iter().enumerate() {
        nodes.push(place.start(index, *span, &bootstrap.address)?);
    }
    let source = ModelSource::open(&place.model.display().to_string(), HubOptions::default()).await?;
    let client = connect(&source, &bootstrap.address, None).await?;

    let mut expected = Vec::new();
    for worker in 0..args.generations {
        expected.push(client.generate(&prompt(worker), &options(), &mut |_| {}).await?.output_ids);
    }
    let load = Load { client, expected: Arc::new(expected), time: Duration::from_secs_f64(args.seconds) };
    let quiet = load.run(args.generations).await?;
    let over = Arc::new(AtomicBool::new(false));
    let killer = tokio::task::spawn_blocking({
        let (place, over, every) = (place.clone(), over.clone(), Duration::from_secs_f64(args.every));
        let address = bootstrap.address.clone();
        move || kill_now_and_then((nodes, address), &place, every, &over)
    });
    let disturbed = load.run(args.generations).await?;
    over.store(true, Ordering::Relaxed);
    let killed = killer.await??;

    let kept = disturbed.tokens_per_second / quiet.tokens_per_second;
    if args.json {
        let object = serde_json::json!({
            "undisturbed_tokens_per_second": quiet.tokens_per_second,
            "tokens_per_second": disturbed.tokens_per_second, "kept": kept, "killed": killed,
            "generations": disturbed.generations, "recoveries": disturbed.recoveries,
            "longest_gap_ms": disturbed.longest_gap.as_secs_f64() * 1e3,
        });
        println!("{object}");
    } else {
        println!("undisturbed: {:.0} tokens/s, longest gap {:?}", quiet.tokens_per_second, quiet.longest_gap);
        println!(
            "{killed} nodes killed: {:.0} tokens/s ({:.0} %), longest gap {:?}, {} hops replaced in {} generations, no wrong token",
            disturbed.tokens_per_second,
            kept * 100.0,
            disturbed.longest_gap,
            disturbed.recoveries,
            disturbed.generations
        );
    }
    Ok(())
}

struct Place {
    model: PathBuf,
    home: PathBuf,
}

impl Place {
    fn start(&self, index: usize, blocks: (usize, usize), peer: &str) -> anyhow::Result<NodeProcess> {
        let (model, home) = (self.model.as_path(), self.home.as_path());
        NodeProcess::start(&NodeSettings { model, home, name: index.to_string(), blocks, peer: Some(peer), more: &[] })
    }
}

/// Kills a node that is drawn, and starts it again with the same key. Returns how often.
fn kill_now_and_then(
    (mut nodes, address): (Vec<NodeProcess>, String),
    place: &Place,
    every: Duration,
    over: &AtomicBool,
) -> anyhow::Result<usize> {
    let mut killed = 0;
    let mut next = Instant::now() + every / 2;
    while !over.load(Ordering::Relaxed) {
        std::thread::sleep(Duration::from_millis(50));
        if Instant::now() >= next {
            let index = rand::rng().random_range(0..nodes.len());
            // Killed and waited for: until then its key file is in use.
            drop(nodes.remove(index));
            nodes.insert(index, place.start(index, SPANS[index], &address)?);
            killed += 1;
            next += every;
        }
    }
    Ok(killed)
}

fn options() -> GenerationOptions {
    let wait = Duration::from_secs(30);
    GenerationOptions { max_tokens: TOKENS, ignore_eos: true, wait, ..GenerationOptions::default() }
}

fn prompt(worker: u32) -> Vec<u32> {
    PROMPT.map(|id| id + worker).to_vec()
}

/// Generations, one after the other in every worker, for some time.
struct Load {
    client: Client,
    expected: Arc<Vec<Vec<u32>>>,
    time: Duration,
}

/// What a load came to.
#[derive(Default)]
struct Measured {
    tokens_per_second: f64,
    generations: usize,
    recoveries: usize,
    longest_gap: Duration,
}

impl Load {
    async fn run(&self, workers: u32) -> anyhow::Result<Measured> {
        let (began, time) = (Instant::now(), self.time);
        let tokens = Arc::new(AtomicU64::new(0));
        let mut running = JoinSet::new();
        for worker in 0..workers {
            let (client, expected, tokens) = (self.client.clone(), self.expected.clone(), tokens.clone());
            running.spawn(async move {
                let mut measured = Measured::default();
                while began.elapsed() < time {
                    let mut last = Instant::now();
                    let mut on_event = |event| {
                        if matches!(event, GenerationEvent::Token { .. }) {
                            measured.longest_gap = measured.longest_gap.max(last.elapsed());
                            last = Instant::now();
                            // What is made behind the end of the time is not counted.
                            tokens.fetch_add(u64::from(began.elapsed() < time), Ordering::Relaxed);
                        }
                    };
                    let generation = client.generate(&prompt(worker), &options(), &mut on_event).await?;
                    anyhow::ensure!(generation.output_ids == expected[worker as usize], "a wrong token");
                    measured.generations += 1;
                    measured.recoveries += generation.recoveries;
                }
                anyhow::Ok(measured)
            });
        }
        let mut all = Measured::default();
        while let Some(done) = running.join_next().await {
            let done = done??;
            all.generations += done.generations;
            all.recoveries += done.recoveries;
            all.longest_gap = all.longest_gap.max(done.longest_gap);
        }
        all.tokens_per_second = tokens.load(Ordering::Relaxed) as f64 / time.as_secs_f64();
        Ok(all)
    }
}
