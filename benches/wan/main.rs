//! What long links cost: nodes that everybody reaches over links of some delay and bandwidth, against what these links cost at
//! the least.
//!
//! `cargo bench --bench wan`, with `-- quick` for a part of it. The least that a token can take is the one-way delays around the
//! ring and what the same token takes without any; for a prompt, the transmission of its hidden states over one link comes on
//! top, since the links work side by side. Beside it stands a client in the middle, that sends each hop's output to the next one
//! itself, as systems without a ring do. Prints tables for the README.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod link;
#[path = "../../tests/suite/made.rs"]
#[allow(dead_code)]
mod made;
#[path = "../nodes.rs"]
mod nodes;

use std::{
    path::Path,
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, Instant},
};

use helion::{
    client::{
        Client,
        generation::GenerationOptions,
        session::{Input, Route, Session, Step, Want},
    },
    engine::{HiddenStates, LaneRun},
    model::{hub::HubOptions, source::ModelSource},
    swarm::ticket::SessionLimits,
};
use link::{LongLink, Profile};
use made::Shape;
use nodes::{NodeProcess, NodeSettings, connect};

/// Wide enough that a prompt's hidden states are half a megabyte, and so little to compute that the links are what is measured.
const SHAPE: Shape = Shape { hidden: 512, intermediate: 128, blocks: 4, heads: 8, kv_heads: 2, vocab: 1024, shards: 1 };
const PROMPT: usize = 512;
/// How hidden states travel in this model: bf16.
const ROW_BYTES: usize = 2 * SHAPE.hidden;
const LIMITS: SessionLimits = SessionLimits { max_lanes: 1, max_tokens: 512, max_in_flight: 4, max_step_tokens: 64 };
const NO_LINK: Profile = Profile { one_way: Duration::ZERO, bits_per_second: None };

/// How much is measured.
struct Effort {
    /// With and without links in turn: the machine's speed drifts, and both should see it.
    rounds: usize,
    /// In a round; besides one prompt.
    tokens: usize,
    tokens_in_the_middle: usize,
    hops: &'static [usize],
    delays_ms: &'static [u64],
    bandwidths: &'static [f64],
}

fn main() {
    let effort = if std::env::args().any(|arg| arg == "quick") {
        Effort { rounds: 3, tokens: 10, tokens_in_the_middle: 5, hops: &[4], delays_ms: &[25], bandwidths: &[1e8] }
    } else {
        Effort {
            rounds: 9,
            tokens: 10,
            tokens_in_the_middle: 20,
            hops: &[1, 2, 3, 4],
            delays_ms: &[0, 25, 50],
            bandwidths: &[1e8, 1e9],
        }
    };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    // On a worker, as the command line runs its commands.
    runtime.block_on(async move { tokio::spawn(async move { run(&effort).await }).await.unwrap() });
}

async fn run(effort: &Effort) {
    let scratch = tempfile::tempdir().unwrap();
    let model = scratch.path().join("model");
    std::fs::create_dir(&model).unwrap();
    SHAPE.write(&model);
    // Any tokenizer will do: the tokens are numbers here.
    let tiny = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/cli/demo/helion-tiny/tokenizer.json");
    std::fs::copy(tiny, model.join("tokenizer.json")).unwrap();
    let source = ModelSource::open(&model.display().to_string(), HubOptions::default()).await.unwrap();

    println!(
        "| hops | one way, ms | Mbit/s | token without links, ms | token, ms | ÷ least, p50 | p95 | client in the middle, ms | {PROMPT}-token prompt without links, ms | prompt, ms | ÷ least |"
    );
    println!("|---|---|---|---|---|---|---|---|---|---|---|");
    for &hops in effort.hops {
        let swarm = FarSwarm::start(&model, scratch.path(), hops);
        let client = connect(&source, swarm.address(), None).await.unwrap();
        // The first ones warm up: connections, windows, caches.
        decode(&client, 20).await;
        prefill(&client, 2).await;
        for &bits_per_second in effort.bandwidths {
            for &delay in effort.delays_ms {
                let profile = Profile { one_way: Duration::from_millis(delay), bits_per_second: Some(bits_per_second) };
                // Windows grow with what the first prompts over a long link send.
                swarm.set(profile);
                prefill(&client, 2).await;
                let in_the_middle = median(&decode_in_the_middle(&client, effort.tokens_in_the_middle).await);
                let (mut alone, mut prompts_alone) = (Vec::new(), Vec::new());
                let (mut tokens, mut prompts) = (Vec::new(), Vec::new());
                for _ in 0..effort.rounds {
                    swarm.set(NO_LINK);
                    alone.extend(decode(&client, effort.tokens).await);
                    prompts_alone.extend(prefill(&client, 1).await);
                    swarm.set(profile);
                    tokens.extend(decode(&client, effort.tokens).await);
                    prompts.extend(prefill(&client, 1).await);
                }
                swarm.set(NO_LINK);
                let (alone, prompt_alone) = (median(&alone), median(&prompts_alone));
                let ring = (hops + 1) as u32 * profile.one_way;
                let least = (alone + ring).as_secs_f64();
                let least_prompt = (prompt_alone + ring + profile.transmission(PROMPT * ROW_BYTES)).as_secs_f64();
                let (token, prompt) = (median(&tokens), median(&prompts));
                println!(
                    "| {hops} | {delay} | {:.0} | {:.2} | {:.1} | {:.2} | {:.2} | {:.1} | {:.0} | {:.0} | {:.2} |",
                    bits_per_second / 1e6,
                    ms(alone),
                    ms(token),
                    token.as_secs_f64() / least,
                    quantile(&tokens, 0.95).as_secs_f64() / least,
                    ms(in_the_middle),
                    ms(prompt_alone),
                    ms(prompt),
                    prompt.as_secs_f64() / least_prompt,
                );
            }
        }
    }
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn quantile(times: &[Duration], share: f64) -> Duration {
    let mut times = times.to_vec();
    times.sort();
    times[((times.len() - 1) as f64 * share).round() as usize]
}

fn median(times: &[Duration]) -> Duration {
    quantile(times, 0.5)
}

/// The times of so many tokens, each chosen from the one before it.
async fn decode(client: &Client, tokens: usize) -> Vec<Duration> {
    let (mut session, _) = client.open_session(LIMITS, Duration::from_secs(20)).await.unwrap();
    let mut id = 1;
    let mut times = Vec::new();
    for position in 0..=tokens {
        let begun = Instant::now();
        session.send(step(Input::Tokens(vec![id]), position)).unwrap();
        let answer = session.receive().await.unwrap();
        id = likeliest(client, &answer.hidden.unwrap());
        times.push(begun.elapsed());
    }
    times.split_off(1)
}

/// The same where the client itself carries what each hop computed to the next one.
async fn decode_in_the_middle(client: &Client, tokens: usize) -> Vec<Duration> {
    let (_, route) = client.open_session(LIMITS, Duration::ZERO).await.unwrap();
    let mut sessions = Vec::new();
    for hop in &route.hops {
        let alone = Route { hops: vec![hop.clone()], ..route.clone() };
        sessions.push(Session::open(client, &alone, LIMITS, None).await.unwrap());
    }
    let mut id = 1;
    let mut times = Vec::new();
    for position in 0..=tokens {
        let begun = Instant::now();
        let mut input = Input::Tokens(vec![id]);
        for session in &mut sessions {
            session.send(step(input, position)).unwrap();
            input = Input::Rows(session.receive().await.unwrap().hidden.unwrap());
        }
        let Input::Rows(hidden) = input else { unreachable!("a route has hops") };
        id = likeliest(client, &hidden);
        times.push(begun.elapsed());
    }
    times.split_off(1)
}

fn step(input: Input, position: usize) -> Step {
    Step { lanes: vec![LaneRun { lane: 0, position, tokens: 1 }], input, want: Want::Last, rope_length: None }
}

fn likeliest(client: &Client, hidden: &HiddenStates) -> u32 {
    let logits = client.model().edges().logits(hidden).unwrap();
    (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap() as u32
}

/// The times to the first token after a long prompt, the opening of the session included.
async fn prefill(client: &Client, prompts: usize) -> Vec<Duration> {
    /// No two prompts begin alike, so that none finds what another one left behind.
    static PROMPTS: AtomicUsize = AtomicUsize::new(0);
    let options = GenerationOptions { max_tokens: 1, ignore_eos: true, tenant: None, ..GenerationOptions::default() };
    let mut times = Vec::new();
    for _ in 0..prompts {
        let prompt = PROMPTS.fetch_add(1, Ordering::Relaxed);
        let ids: Vec<u32> = (0..PROMPT).map(|token| ((token * 7 + prompt) % SHAPE.vocab) as u32).collect();
        let generation = client.generate(&ids, &options, &mut |_| {}).await.unwrap();
        times.push(Duration::from_secs_f64(generation.timing.time_to_first_token_ms / 1e3));
    }
    times
}

/// Nodes that share the model's blocks evenly, each behind a link of its own.
struct FarSwarm {
    nodes: Vec<NodeProcess>,
    links: Vec<LongLink>,
}

impl FarSwarm {
    fn start(model: &Path, home: &Path, count: usize) -> Self {
        let mut swarm = Self { nodes: Vec::new(), links: Vec::new() };
        for node in 0..count {
            let blocks = (node * SHAPE.blocks / count, (node + 1) * SHAPE.blocks / count);
            let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
            let link = LongLink::start(([127, 0, 0, 1], port).into(), NO_LINK);
            let (own, announced) =
                (format!("/ip4/127.0.0.1/tcp/{port}"), format!("/ip4/127.0.0.1/tcp/{}", link.port()));
            let more = ["--host-maddrs", &own, "--announce-maddrs", &announced];
            let peer = swarm.nodes.first().map(|node| node.address.as_str());
            let settings = NodeSettings { model, home, name: format!("{count}-{node}"), blocks, peer, more: &more };
            let process = NodeProcess::start(&settings).unwrap();
            swarm.nodes.push(process);
            swarm.links.push(link);
        }
        swarm
    }

    fn address(&self) -> &str {
        &self.nodes[0].address
    }

    fn set(&self, profile: Profile) {
        self.links.iter().for_each(|link| link.set(profile));
    }
}
