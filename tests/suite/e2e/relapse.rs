//! Losses while a loss is being repaired: the replacement dies, falls silent or fails at what it is told; the hop that tells it
//! dies; nobody is left. The tokens are right, or the error comes soon and says what is missing.

use std::{
    process::Command,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use futures::future::BoxFuture;
use helion::{
    client::{
        Client, ClientError, PeerRules,
        generation::{Generation, GenerationEvent, GenerationOptions},
        session::{Patience, SessionError},
    },
    swarm::{
        Frame, Link, PeerId, Service, Swarm, WeakSwarm,
        proto::{rpc, session as proto},
    },
};

use super::{
    faults::changed,
    harness::{HANG, Place, Reference, Server, client},
    long_links::FarNode,
    sessions::info,
    strangers::{pass_for_honest, server},
};
use crate::link::{LongLink, Profile};

/// Three hops, and what they generate where nobody is lost.
struct Scene {
    place: Place,
    model: std::path::PathBuf,
    bootstrap: Server,
    nodes: Vec<Server>,
    /// To the first hop: a peer that dialled it is told everything over this one.
    first: Arc<LongLink>,
    client: Client,
    reference: Reference,
}

/// A generation in a task of its own.
type Generating = tokio::task::JoinHandle<Result<Generation, ClientError>>;

/// A part of a replay takes a sixth of a second.
const NARROW: Profile = Profile { one_way: Duration::ZERO, bits_per_second: Some(1e5) };

const SPANS: [&str; 3] = ["0:2", "2:4", "4:6"];

/// A hop that hangs is found sooner than a user's client would.
fn patience() -> Patience {
    Patience { step: Duration::from_secs(3), recovery: Duration::from_secs(10), ..Patience::default() }
}

impl Scene {
    /// Other nodes with these blocks may take a hop's place.
    async fn new(others: &[&str], prompt: usize, patience: Patience) -> Self {
        let place = Place::new();
        let model = changed(&place, "llama", r#"{"max_position_embeddings": 2048}"#);
        let wide = Profile { one_way: Duration::ZERO, bits_per_second: None };
        let bootstrap = place.bootstrap();
        let FarNode { proxy, node } = FarNode::start(&place, &model, &bootstrap, SPANS[0], wide);
        let spans = SPANS[1..].iter().chain(others);
        let others = spans.map(|span| place.node(&model, &bootstrap, &["--blocks", span]));
        let nodes: Vec<Server> = std::iter::once(node).chain(others).collect();
        let route = nodes[..3].iter().map(|node| node.peer_id.parse().unwrap()).collect();
        let client = client(&model, &bootstrap, patience).await.with_rules(PeerRules { route, ..PeerRules::default() });
        let prompt: Vec<u32> = (0..prompt as u32).map(|i| i * 37 % 511 + 1).collect();
        let mut scene = Self {
            place,
            model,
            bootstrap,
            nodes,
            first: Arc::new(proxy),
            client,
            reference: Reference { prompt, output: Vec::new() },
        };
        scene.reference.output = scene.generate(&[]).await.unwrap().unwrap().output_ids;
        scene
    }

    /// Generates in a task of its own. These nodes are killed when some tokens are there.
    fn generate(&self, killed: &[usize]) -> Generating {
        // In small chunks, so that a replay has some parts; nothing is left for the next one, so that every hop computes all of it.
        let options = GenerationOptions {
            max_tokens: 12,
            ignore_eos: true,
            prefill_chunk: 16,
            tenant: None,
            wait: HANG,
            ..GenerationOptions::default()
        };
        let processes: Vec<u32> = killed.iter().map(|node| self.nodes[*node].running.child.id()).collect();
        let (client, prompt, first) = (self.client.clone(), self.reference.prompt.clone(), self.first.clone());
        tokio::spawn(async move {
            let mut tokens = 0;
            let mut watch = |event| {
                tokens += u32::from(matches!(event, GenerationEvent::Token { .. }));
                if tokens == 4 && matches!(event, GenerationEvent::Token { .. }) {
                    first.set(NARROW);
                    processes.iter().copied().for_each(kill);
                }
            };
            client.generate(&prompt, &options, &mut watch).await
        })
    }

    /// A peer with these blocks that is told everything slowly, whoever dialled whom.
    async fn far(&self, blocks: &str) -> FarNode {
        let far = FarNode::start(&self.place, &self.model, &self.bootstrap, blocks, NARROW);
        self.look_around().await;
        far
    }

    /// The client gets to know who is there.
    async fn look_around(&self) {
        let mut view = self.client.observer().look_up().await.unwrap();
        self.client.observer().measure(&mut view, false).await;
    }

    /// Waits until a node has computed so much of what it is told.
    async fn is_told(&self, generation: &Generating, node: &Server, tokens: u64) {
        while info(&self.client, node).await.tokens_replayed < tokens {
            assert!(!generation.is_finished(), "it was not told");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Checks the tokens, and who went on with the blocks.
    fn goes_on(&self, generation: &Generation, peers: &[&str]) {
        assert_eq!(generation.output_ids, self.reference.output);
        let route: Vec<&str> = generation.route.iter().map(|hop| hop.peer_id.as_str()).collect();
        assert_eq!(route, peers);
        assert!(generation.recoveries > 0);
    }

    fn peer(&self, node: usize) -> &str {
        &self.nodes[node].peer_id
    }
}

fn kill(process: u32) {
    Command::new("kill").args(["-KILL", &process.to_string()]).status().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replay_may_take_longer_than_a_step() {
    let scene = Scene::new(&[], 500, patience()).await;
    let far = scene.far("2:4").await;
    let generation = scene.generate(&[1]).await.unwrap().unwrap();
    scene.goes_on(&generation, &[scene.peer(0), &far.node.peer_id, scene.peer(2)]);
    assert_eq!(generation.recoveries, 1);
    assert!(generation.timing.total_ms > 1.5 * patience().step.as_secs_f64() * 1e3, "{:?}", generation.timing);
    assert_eq!(info(&scene.client, &scene.nodes[2]).await.tokens_replayed, 0);
}

/// Its time is not over with that of the first loss.
#[tokio::test(flavor = "multi_thread")]
async fn a_replacement_that_is_lost_late_is_replaced() {
    let recovery = Duration::from_secs(1);
    let scene = Scene::new(&[], 300, Patience { recovery, step: HANG, ..patience() }).await;
    let far = scene.far("2:4").await;
    // It doesn't answer, so that the client can't choose it before it wakes.
    let spare = scene.place.node(&scene.model, &scene.bootstrap, &["--blocks", "2:4"]);
    spare.running.signal("STOP");
    let generation = scene.generate(&[1]);
    // By then it has been told for longer than a loss is waited for.
    scene.is_told(&generation, &far.node, 160).await;
    spare.running.signal("CONT");
    far.node.running.signal("KILL");
    let generation = generation.await.unwrap().unwrap();
    scene.goes_on(&generation, &[scene.peer(0), &spare.peer_id, scene.peer(2)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_hop_that_replays_is_killed() {
    let scene = Scene::new(&["0:2"], 200, patience()).await;
    let far = scene.far("2:4").await;
    let generation = scene.generate(&[1]);
    scene.is_told(&generation, &far.node, 16).await;
    scene.nodes[0].running.signal("KILL");
    let generation = generation.await.unwrap().unwrap();
    scene.goes_on(&generation, &[scene.peer(3), &far.node.peer_id, scene.peer(2)]);
    assert_eq!(info(&scene.client, &scene.nodes[2]).await.tokens_replayed, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn all_peers_of_some_blocks_are_killed_at_once() {
    let recovery = Duration::from_secs(1);
    let scene = Scene::new(&["2:4"], 40, Patience { recovery, ..patience() }).await;
    let begun = Instant::now();
    let error = scene.generate(&[1, 3]).await.unwrap().unwrap_err();
    assert!(begun.elapsed() < HANG / 4, "{:?}", begun.elapsed());
    assert_eq!(error.maybe_applied(), Some(true), "{error}");
    // What is told is the loss that it began with.
    assert!(error.to_string().contains("no peer serves blocks 2:4"), "{error}");
    let first: PeerId = scene.peer(1).parse().unwrap();
    match error {
        ClientError::Session(SessionError::NotRepaired { lost, .. }) => {
            assert!(matches!(&*lost, SessionError::HopLost { peer, .. } if *peer == first), "{lost}");
        }
        other => panic!("{other}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_only_peer_of_some_blocks_is_started_again() {
    let scene = Scene::new(&[], 40, patience()).await;
    let generation = scene.generate(&[1]);
    let process = format!("/proc/{}/status", scene.nodes[1].running.child.id());
    // One that has ended holds no memory.
    while std::fs::read_to_string(&process).unwrap().contains("VmRSS") {
        assert!(!generation.is_finished());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let key = &scene.nodes[1].key;
    let again = scene.place.node(&scene.model, &scene.bootstrap, &["--blocks", "2:4", "--identity-path", key]);
    assert_eq!(again.peer_id, scene.peer(1));
    let generation = generation.await.unwrap().unwrap();
    assert_eq!(generation.output_ids, scene.reference.output);
    for node in [&scene.nodes[0], &scene.nodes[2]] {
        assert_eq!(info(&scene.client, node).await.tokens_replayed, 0);
    }
}

/// What becomes of a peer when it is told the first part of what it missed.
#[derive(Clone, Copy)]
enum Fate {
    Dies,
    SaysNothing,
    Fails,
    /// It says that the client is to blame.
    Accuses,
    /// It says so of a step, and that there is no such session.
    Denies,
}

/// A peer that passes for a hop.
struct FalseReplacement {
    fate: Fate,
    swarm: OnceLock<WeakSwarm>,
    /// To the client.
    control: Mutex<Option<Link>>,
    parts: AtomicU32,
}

impl Service for FalseReplacement {
    fn frame(&self, link: &Link, frame: Frame) {
        use proto::frame::Body;
        let Frame { header, .. } = frame;
        // The other end may be gone by now.
        let answer = |body| drop(link.send(Frame::bare(proto::Frame { body: Some(body), ..header.clone() })));
        match header.body.clone() {
            Some(Body::Open(_)) => {
                *self.control.lock().unwrap() = Some(link.clone());
                answer(Body::Opened(proto::Opened { whole: true, ..Default::default() }));
            }
            Some(Body::Ping(ping)) => answer(Body::Pong(proto::Pong { nonce: ping.nonce })),
            Some(Body::Replay(_)) => {
                self.parts.fetch_add(1, Ordering::Relaxed);
                let (blame, code, number) = match self.fate {
                    Fate::SaysNothing => return,
                    Fate::Dies => {
                        let swarm = self.swarm.get().unwrap().upgrade();
                        tokio::spawn(async move { swarm.unwrap().stop().await });
                        return;
                    }
                    Fate::Fails => (proto::Blame::Hop, proto::Code::Internal, 0),
                    Fate::Accuses => (proto::Blame::Client, proto::Code::Internal, 0),
                    Fate::Denies => (proto::Blame::Client, proto::Code::UnknownSession, 5),
                };
                let (code, blame) = (code.into(), blame.into());
                let fault = Body::Fault(proto::Fault { code, blame, number, ..Default::default() });
                let control = self.control.lock().unwrap().clone().unwrap();
                let _ = control.send(Frame::bare(proto::Frame { body: Some(fault), ..header }));
            }
            _ => {}
        }
    }

    fn link_closed(&self, _link: &Link) {}

    fn request(&self, _from: PeerId, _request: rpc::Request) -> BoxFuture<'static, rpc::Response> {
        Box::pin(std::future::ready(rpc::Response::default()))
    }
}

impl FalseReplacement {
    /// Joins with blocks 2:4.
    async fn start(scene: &Scene, fate: Fate) -> (Arc<Self>, Swarm) {
        let service =
            Arc::new(Self { fate, swarm: OnceLock::new(), control: Mutex::default(), parts: AtomicU32::new(0) });
        let swarm = server(&scene.bootstrap, service.clone()).await;
        service.swarm.set(swarm.downgrade()).unwrap_or_else(|_| panic!("set once"));
        pass_for_honest(&swarm, &scene.client, 2..4).await;
        scene.look_around().await;
        (service, swarm)
    }
}

/// The false one is the only peer with the lost hop's blocks; an honest one comes when it has shown what it is.
async fn the_replacement(fate: Fate) {
    let scene = Scene::new(&[], 60, Patience { recovery: HANG / 2, ..patience() }).await;
    let (replacement, _swarm) = FalseReplacement::start(&scene, fate).await;
    let generation = scene.generate(&[1]);
    while replacement.parts.load(Ordering::Relaxed) == 0 {
        assert!(!generation.is_finished(), "it was not chosen");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let honest = scene.place.node(&scene.model, &scene.bootstrap, &["--blocks", "2:4"]);
    let generation = generation.await.unwrap().unwrap();
    scene.goes_on(&generation, &[scene.peer(0), &honest.peer_id, scene.peer(2)]);
    assert_eq!(info(&scene.client, &scene.nodes[2]).await.tokens_replayed, 0);
}

macro_rules! the_replacement {
    ($($name:ident: $fate:expr;)*) => {$(
        #[tokio::test(flavor = "multi_thread")]
        async fn $name() {
            the_replacement($fate).await;
        }
    )*};
}

the_replacement! {
    the_replacement_dies_when_it_is_told: Fate::Dies;
    the_replacement_says_nothing: Fate::SaysNothing;
    the_replacement_fails: Fate::Fails;
    the_replacement_blames_the_client: Fate::Accuses;
    the_replacement_denies_that_it_has_the_session: Fate::Denies;
}
