//! What the network costs: decode speed through 1, 2 and 4 node processes on loopback, against the same engine in this
//! process without any network, all in one run. Prints a table for the README.
//!
//! "Network, a hop" is what a token takes beside the hops' engines and
//! the client's edges, over the number of hops: all the way around the ring. `cargo bench --bench overhead`; with `-- DIR` on another checkpoint than the demo's. The rounds alternate between the
//! settings, so that a machine whose speed drifts hurts all of them alike; figures are medians.

#![allow(clippy::expect_used)] // a bench that can't go on stops, with the reason

use std::{
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use helion::{
    client::{
        Client,
        local_model::{EdgesChoice, LocalModel, ModelIdentity},
        session::{Input, Patience, Step, Want},
    },
    engine::{DeviceChoice, Edges, Engine, EngineOptions, HiddenStates, Job, Keep, LaneRun},
    model::{Dtype, Quant, hub::HubOptions, source::ModelSource},
    swarm::{Role, SwarmConfig, identity::Identity, ticket::SessionLimits},
};

const ROUNDS: usize = 7;
const TOKENS: usize = 200;
const PROMPT: [u32; 8] = [1, 277, 201, 313, 280, 275, 303, 284];

fn main() -> anyhow::Result<()> {
    let model = std::env::args()
        .skip(1)
        .find(|arg| !arg.starts_with('-'))
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("src/cli/demo/helion-tiny"), PathBuf::from);
    let runtime = tokio::runtime::Runtime::new()?;
    // On a worker, as the command line runs its commands.
    runtime.block_on(async move { tokio::spawn(async move { run(&model).await }).await? })
}

async fn run(model: &Path) -> anyhow::Result<()> {
    let scratch = tempfile::tempdir()?;
    let source = ModelSource::open(&model.display().to_string(), HubOptions::default()).await?;
    let checkpoint = source.fetch_edges().await?;
    let blocks = checkpoint.spec().num_blocks();
    let edges = Edges::load(
        &checkpoint,
        helion::engine::EdgesOptions {
            dtype: Dtype::F32,
            quant: Quant::Auto,
            device: DeviceChoice::Cpu,
            threads: None,
        },
    )?;
    let alone = Engine::load(&checkpoint, EngineOptions::new(0..blocks, Dtype::F32), &mut |_, _| {})?;

    let mut swarms = Vec::new();
    for nodes in [1, 2, 4] {
        let swarm = LocalSwarm::start(model, scratch.path(), blocks, nodes)?;
        let client = connect(&source, &swarm.address).await?;
        swarms.push((nodes, swarm, client, Vec::new()));
    }
    let mut in_process = Vec::new();
    for round in 0..=ROUNDS {
        let direct = decode_in_process(&alone, &edges);
        for (_, _, client, times) in &mut swarms {
            let measured = decode_through(client).await?;
            if round > 0 {
                times.extend(measured); // the first round warms up
            }
        }
        if round > 0 {
            in_process.extend(direct);
        }
    }

    let base = median(in_process.iter().copied());
    println!(
        "| decode, {blocks} blocks, f32, one session | tokens/s | of the engine alone | a token | in the hops' engines | network, a hop |"
    );
    println!("|---|---|---|---|---|---|");
    println!("| engine in this process, no network | {:.0} | 1.00 | {:.2} ms | | |", 1.0 / base, base * 1e3);
    for (nodes, _, _, times) in &swarms {
        let time = median(times.iter().map(|token| token.all));
        let engines = median(times.iter().map(|token| token.engines));
        let network = median(times.iter().map(|token| token.all - token.engines - token.edges)) / f64::from(*nodes);
        println!(
            "| {nodes} node(s) on loopback | {:.0} | {:.2} | {:.2} ms | {:.2} ms | {:.2} ms |",
            1.0 / time,
            base / time,
            time * 1e3,
            engines * 1e3,
            network * 1e3
        );
    }
    Ok(())
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
fn decode_in_process(engine: &Engine, edges: &Edges) -> Vec<f64> {
    let mut cache = engine.cache(engine.span()).ok();
    let mut input = PROMPT.to_vec();
    let mut position = 0;
    let mut times = Vec::new();
    let mut last = Instant::now();
    for _ in 0..TOKENS {
        let (sender, receiver) = mpsc::sync_channel(1);
        let hidden: HiddenStates = edges.embed(&input, Dtype::F32).expect("ids of the vocabulary");
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
async fn decode_through(client: &Client) -> anyhow::Result<Vec<TokenTime>> {
    let limits = SessionLimits { max_lanes: 1, max_tokens: 1024, max_in_flight: 4, max_step_tokens: 64 };
    let (mut session, _) = client.open_session(limits, Duration::ZERO).await?;
    let edges = client.model().edges();
    let mut input = PROMPT.to_vec();
    let mut position = 0;
    let mut times = Vec::new();
    let mut last = Instant::now();
    for _ in 0..TOKENS {
        let begun = Instant::now();
        let hidden = edges.embed(&input, Dtype::F32)?;
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

fn likeliest(logits: &[f32]) -> u32 {
    (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).expect("a vocabulary") as u32
}

fn median(times: impl Iterator<Item = f64>) -> f64 {
    let mut times: Vec<f64> = times.collect();
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

async fn connect(source: &ModelSource, address: &str) -> anyhow::Result<Client> {
    let identity = ModelIdentity::of(source).await?;
    let choice = EdgesChoice { dtype: Some(Dtype::F32), quant: Quant::Auto, device: DeviceChoice::Cpu, threads: None };
    let model = LocalModel::load(&source.fetch_edges().await?, identity, choice)?;
    let network = SwarmConfig {
        initial_peers: vec![address.parse()?],
        mdns: false,
        ..SwarmConfig::new(Identity::ephemeral(), Role::Client)
    };
    Ok(Client::connect(Arc::new(model), network, Patience::default(), Duration::from_secs(20)).await?)
}

/// Node processes that share a model's blocks evenly; killed when dropped.
struct LocalSwarm {
    address: String,
    children: Vec<Child>,
}

impl LocalSwarm {
    fn start(model: &Path, home: &Path, blocks: usize, nodes: u32) -> anyhow::Result<Self> {
        let mut swarm = Self { address: String::new(), children: Vec::new() };
        for node in 0..nodes as usize {
            let (start, end) = (node * blocks / nodes as usize, (node + 1) * blocks / nodes as usize);
            let mut command = Command::new(env!("CARGO_BIN_EXE_helion"));
            command.args(["node", "serve", "--dtype", "f32", "--no-mdns", "--host-maddrs", "/ip4/127.0.0.1/tcp/0"]);
            command.arg("--model").arg(model).args(["--blocks", &format!("{start}:{end}")]);
            command.arg("--identity-path").arg(home.join(format!("{nodes}-{node}.key")));
            if node == 0 {
                command.arg("--new-swarm");
            } else {
                command.args(["--initial-peers", &swarm.address]);
            }
            let mut child = command.env("HELION_HOME", home).env("RUST_LOG", "warn").stdout(Stdio::piped()).spawn()?;
            let stdout = child.stdout.take().ok_or_else(|| anyhow::anyhow!("a child without standard output"))?;
            swarm.children.push(child);
            let mut address = None;
            for line in BufReader::new(stdout).lines() {
                if let Some((_, found)) = line?.split_once("--initial-peers ") {
                    address = Some(found.trim().to_owned());
                    break;
                }
            }
            let address = address.ok_or_else(|| anyhow::anyhow!("node {node} did not start"))?;
            if node == 0 {
                swarm.address = address;
            }
        }
        Ok(swarm)
    }
}

impl Drop for LocalSwarm {
    fn drop(&mut self) {
        for child in &mut self.children {
            // It may have ended already.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
