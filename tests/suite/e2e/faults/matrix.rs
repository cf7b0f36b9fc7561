//! Which hop is lost × by what × when, on every family: the tokens are the reference's, the other hops compute nothing again, what
//! is replayed is what the lost hop had, and the pause is as short as the README says.
//!
//! 3 hops, 7 faults and 4 moments make 84 cases, and since these numbers have no divisor in common, case `n` takes the `n`th of
//! each and all of them come up. Llama's tests run some of them, those of the other families some others. With
//! `HELION_TEST_MATRIX=all` every family runs all, and with `HELION_TEST_MATRIX=3,10` these.

use std::{
    collections::HashSet,
    ops::Range,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use helion::{
    client::{
        Client, PeerRules,
        local_model::LocalModel,
        session::{Input, Patience, Recovery, Session, Step, StepAnswer, Want},
    },
    engine::LaneRun,
    swarm::{PeerId, Swarm, ticket::SessionLimits},
};

use super::super::{
    evil::{Liar, Lie},
    harness::{HANG, Place, Reference, Server, connect, fixture, local_model, reference},
    sessions::info,
};
use crate::link::{Dialers, LongLink, Profile, Trouble};

const HOPS: usize = 3;
const CASES: usize = HOPS * FAULTS.len() * MOMENTS.len();

/// Tokens of the prompt in a step.
const CHUNK: usize = 7;

/// Of a frozen hop; the tests' nodes answer at once.
const NOTICED: Duration = Duration::from_millis(1400);

/// From the loss, or where the hop only falls silent from noticing it, to the next answer.
const PAUSE: Duration = Duration::from_secs(1);
/// What takes too long may take less when the machine has time for it; what is wrong is wrong at once.
const ATTEMPTS: usize = 3;

/// How a hop is lost.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Fault {
    Killed,
    /// It wakes up while the generation goes on without it.
    Frozen,
    /// It lives, and all its connections end. Later it can be reached again.
    CutOff,
    /// It lives, and nothing from it or to it arrives. Later all of that does.
    BlackHole,
    Lies(Lie),
}

const FAULTS: [Fault; 7] = [
    Fault::Killed,
    Fault::Frozen,
    Fault::CutOff,
    Fault::BlackHole,
    Fault::Lies(Lie::NonFinite),
    Fault::Lies(Lie::WrongRows),
    Fault::Lies(Lie::WrongBytes),
];

/// When it is lost.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Moment {
    /// The session is open, and nothing was sent.
    Opened,
    /// So many chunks of the prompt are answered, and others are under way.
    Chunk(usize),
    /// So many tokens are there, and nothing is under way.
    Token(usize),
}

const MOMENTS: [Moment; 4] = [Moment::Opened, Moment::Chunk(2), Moment::Token(1), Moment::Token(12)];

#[derive(Debug, Clone, Copy)]
struct Case {
    hop: usize,
    fault: Fault,
    moment: Moment,
}

impl Case {
    fn numbered(number: usize) -> Self {
        let (fault, moment) = (FAULTS[number % FAULTS.len()], MOMENTS[number % MOMENTS.len()]);
        Self { hop: number % HOPS, fault, moment }
    }

    /// Whether the lost hop says nothing, and nobody for it.
    fn is_silent(&self) -> bool {
        matches!(self.fault, Fault::Frozen | Fault::BlackHole)
    }
}

/// A node that everybody reaches through a link.
struct FarHop {
    node: Server,
    link: LongLink,
    /// Where it listens, and dials from.
    port: u16,
    /// How its process is started.
    args: Vec<String>,
}

impl FarHop {
    fn start(scene: &Scene, blocks: Range<usize>) -> Self {
        let blocks = format!("{}:{}", blocks.start, blocks.end);
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let no_delay = Profile { one_way: Duration::ZERO, bits_per_second: None };
        let link = LongLink::start(([127, 0, 0, 1], port).into(), no_delay);
        let (listen, announce) = (format!("/ip4/127.0.0.1/tcp/{port}"), format!("/ip4/127.0.0.1/tcp/{}", link.port()));
        let key = scene.place.path().join(format!("{port}.key")).display().to_string();
        let args = ["--blocks", &blocks, "--host-maddrs", &listen, "--announce-maddrs", &announce];
        let args: Vec<String> = args.iter().chain(&["--identity-path", &key]).map(ToString::to_string).collect();
        Self { node: scene.node(&args), link, port, args }
    }

    fn peer(&self) -> PeerId {
        self.node.peer_id.parse().unwrap()
    }
}

/// What all nodes of a scene have in common.
struct Scene {
    place: Place,
    bootstrap: Server,
    path: PathBuf,
    model: Arc<LocalModel>,
    reference: Reference,
}

impl Scene {
    fn node(&self, args: &[String]) -> Server {
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        self.place.node(&self.path, &self.bootstrap, &args)
    }

    /// The blocks of a hop.
    fn blocks(&self, hop: usize) -> Range<usize> {
        let all = self.model.spec().num_blocks();
        hop * all / HOPS..(hop + 1) * all / HOPS
    }

    /// Rows that an undisturbed hop computes.
    fn rows(&self) -> u64 {
        (self.reference.prompt.len() + self.reference.output.len() - 1) as u64
    }
}

/// Three hops, of which one is lost at a time, and a node with all blocks that takes its place.
struct Stand {
    scene: Scene,
    hops: Vec<FarHop>,
    spare: FarHop,
}

/// What nodes have computed: rows of steps, rows of replays, and bytes that were replayed to others.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Counts {
    tokens: u64,
    replayed: u64,
    bytes: u64,
}

async fn counts(client: &Client, nodes: &[&Server]) -> Vec<Counts> {
    let mut counts = Vec::new();
    for node in nodes {
        let info = info(client, node).await;
        counts.push(Counts { tokens: info.tokens, replayed: info.tokens_replayed, bytes: info.bytes_replayed });
    }
    counts
}

/// Sessions, tokens and bytes of history that a node holds.
async fn held(client: &Client, node: &Server) -> [u64; 3] {
    let info = info(client, node).await;
    [info.sessions.into(), info.cache_tokens_total - info.cache_tokens_left, info.history_bytes]
}

/// What a disturbed generation came to.
struct Disturbed {
    output: Vec<u32>,
    recoveries: Vec<Recovery>,
    is_exact: bool,
    /// The longest time without an answer since the hop was lost.
    longest_pause: Duration,
}

/// A generation in steps, so that the hop is lost at an exact moment.
struct Generating<'a> {
    stand: &'a Stand,
    client: &'a Client,
    case: Case,
    session: Session,
    recoveries: Vec<Recovery>,
    longest_pause: Duration,
    /// When the hop was lost, or the last answer came since.
    quiet_since: Option<Instant>,
}

impl Generating<'_> {
    /// What happens now.
    fn at(&mut self, moment: Moment) {
        if moment != self.case.moment {
            return;
        }
        let hop = &self.stand.hops[self.case.hop];
        match self.case.fault {
            Fault::Killed => hop.node.running.signal("KILL"),
            Fault::Frozen => hop.node.running.signal("STOP"),
            Fault::CutOff => self.stand.cut_off(self.case.hop, Trouble::Cut),
            Fault::BlackHole => self.stand.cut_off(self.case.hop, Trouble::BlackHole),
            Fault::Lies(_) => {}
        }
        self.quiet_since = Some(Instant::now());
    }

    /// Sends the tokens from `position` on, of a sequence that is `length` long with them.
    fn send(&mut self, ids: &[u32], position: usize, (length, want): (usize, Want)) {
        let lanes = vec![LaneRun { lane: 0, position, tokens: ids.len() }];
        let input = Input::Tokens(ids.to_vec());
        self.session.send(Step { lanes, input, want, rope_length: Some(length) }).unwrap();
    }

    async fn receive(&mut self) -> StepAnswer {
        let answer = self.session.receive().await.unwrap_or_else(|error| panic!("{:?}: {error}", self.case));
        if let Some(since) = &mut self.quiet_since {
            self.longest_pause = self.longest_pause.max(since.elapsed());
            *since = Instant::now();
        }
        let recoveries = self.session.take_recoveries();
        if !recoveries.is_empty() {
            self.recoveries.extend(recoveries);
            self.wake().await;
        }
        answer
    }

    /// What was frozen or out of reach is there again, and the generation is not over.
    async fn wake(&mut self) {
        let node = &self.stand.hops[self.case.hop].node;
        match self.case.fault {
            Fault::Killed | Fault::Lies(_) => return,
            Fault::Frozen => node.running.signal("CONT"),
            Fault::CutOff | Fault::BlackHole => self.stand.all().for_each(|other| other.link.restore()),
        }
        // What had come before it was lost, it has taken when it answers.
        info(self.client, node).await;
        self.quiet_since = Some(Instant::now());
    }

    /// Generates as many tokens as the reference has.
    async fn run(mut self) -> Disturbed {
        let Reference { prompt, output: expected } = &self.stand.scene.reference;
        self.at(Moment::Opened);
        let (mut chunks, mut position, mut answered) = (prompt.chunks(CHUNK).peekable(), 0, 0);
        let mut answer = loop {
            while self.session.credit() > 0
                && let Some(chunk) = chunks.next()
            {
                let want = if chunks.peek().is_some() { Want::Nothing } else { Want::Last };
                self.send(chunk, position, (prompt.len(), want));
                position += chunk.len();
            }
            let answer = self.receive().await;
            answered += 1;
            self.at(Moment::Chunk(answered));
            if self.session.in_flight() == 0 {
                break answer;
            }
        };
        let mut output = Vec::new();
        loop {
            let logits = self.client.model().edges().logits(&answer.hidden.unwrap()).unwrap();
            output.push((0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap() as u32);
            self.at(Moment::Token(output.len()));
            if output.len() == expected.len() {
                break;
            }
            self.send(&output[output.len() - 1..], position, (position + 1, Want::Last));
            position += 1;
            answer = self.receive().await;
        }
        let is_exact = self.session.is_exact();
        Disturbed { output, recoveries: self.recoveries, is_exact, longest_pause: self.longest_pause }
    }
}

impl Stand {
    async fn start(family: &str) -> Self {
        let (place, path) = (Place::new(), fixture(family));
        let bootstrap = place.bootstrap();
        let (model, reference) = (local_model(&path).await, reference(&path));
        let scene = Scene { place, bootstrap, path, model, reference };
        assert_eq!(scene.model.spec().position_boundary(), None, "all positions would change at some length");
        let hops = (0..HOPS).map(|hop| FarHop::start(&scene, scene.blocks(hop))).collect();
        let spare = FarHop::start(&scene, 0..scene.model.spec().num_blocks());
        Self { scene, hops, spare }
    }

    fn all(&self) -> impl Iterator<Item = &FarHop> {
        self.hops.iter().chain([&self.spare])
    }

    /// The nodes that are not lost; the last one is the spare.
    fn stay(&self, case: &Case) -> Vec<&Server> {
        self.all().enumerate().filter(|(hop, _)| *hop != case.hop).map(|(_, other)| &other.node).collect()
    }

    /// Takes a hop away from all others.
    fn cut_off(&self, hop: usize, trouble: Trouble) {
        for (index, other) in self.all().enumerate() {
            let dialers = if index == hop { Dialers::All } else { Dialers::Port(self.hops[hop].port) };
            other.link.disturb(dialers, trouble);
        }
    }

    /// Rows that the lost hop has been answered for when it is lost.
    fn had(&self, case: &Case) -> usize {
        match case.moment {
            Moment::Opened => 0,
            Moment::Chunk(chunks) => chunks * CHUNK,
            Moment::Token(tokens) => self.scene.reference.prompt.len() + tokens - 1,
        }
    }

    /// Starts the hop that lies from its moment on, in place of an honest one.
    async fn liar(&self, case: &Case, lie: Lie, client: &Client) -> Swarm {
        let (prompt, had) = (self.scene.reference.prompt.len(), self.had(case));
        let steps = had.min(prompt).div_ceil(CHUNK) + had.saturating_sub(prompt);
        let liar = Liar { lie, honest: steps as u64, blocks: self.scene.blocks(case.hop) };
        liar.start(&self.scene.path, &self.scene.bootstrap, client).await
    }

    /// Runs one case. The next one finds everything as it was. Returns the longest time without an answer.
    async fn run(&mut self, case: Case) -> Duration {
        let patience = Patience { overdue: NOTICED / 2, pong: NOTICED / 2, ..Patience::default() };
        let client = connect(self.scene.model.clone(), &self.scene.bootstrap, patience).await;
        let mut route: Vec<PeerId> = self.hops.iter().map(FarHop::peer).collect();
        let mut liar = None;
        if let Fault::Lies(lie) = case.fault {
            let swarm = self.liar(&case, lie, &client).await;
            route[case.hop] = swarm.peer_id();
            liar = Some(swarm);
        }
        let lost = route[case.hop];
        let allow: HashSet<PeerId> = route.iter().copied().chain([self.spare.peer()]).collect();
        let client = client.with_rules(PeerRules { route, allow, ..PeerRules::default() });

        let before = counts(&client, &self.stay(&case)).await;
        // One that was cut off waits for its client to come back, and for longer than its case lasts.
        let woken = case.is_silent().then_some(&self.hops[case.hop].node);
        let checked: Vec<&Server> = self.stay(&case).into_iter().chain(woken).collect();
        let mut held_before = Vec::new();
        for node in &checked {
            held_before.push(held(&client, node).await);
        }
        let Reference { prompt, output: expected } = &self.scene.reference;
        let limits = SessionLimits {
            max_lanes: 1,
            max_tokens: (prompt.len() + expected.len()) as u64,
            max_in_flight: 4,
            max_step_tokens: CHUNK as u32,
        };
        let (session, _) = client.open_session(limits, HANG / 2).await.unwrap();
        let (recoveries, longest_pause, quiet_since) = (Vec::new(), Duration::ZERO, None);
        let generating =
            Generating { stand: self, client: &client, case, session, recoveries, longest_pause, quiet_since };
        let disturbed = generating.run().await;

        assert_eq!(disturbed.output, *expected, "{case:?}");
        assert!(disturbed.is_exact, "{case:?}");
        let recovered: Vec<_> =
            disturbed.recoveries.iter().map(|one| (one.hop, one.lost, one.replacement.clone())).collect();
        let replacement = vec![(self.spare.peer(), self.scene.blocks(case.hop))];
        assert_eq!(recovered, [(case.hop + 1, lost, replacement)], "{case:?}");
        self.only_what_was_lost_is_computed_again(&case, &client, &before).await;
        for (node, before) in checked.iter().zip(&held_before) {
            let deadline = Instant::now() + HANG / 2;
            while held(&client, node).await.iter().zip(before).any(|(is, was)| is > was) {
                assert!(Instant::now() < deadline, "{case:?}: something leaked: {before:?}");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
        client.stop().await;
        if let Some(liar) = liar {
            liar.stop().await;
        }
        if case.fault == Fault::Killed {
            let hop = &mut self.hops[case.hop];
            hop.node = self.scene.node(&hop.args);
        }
        disturbed.longest_pause
    }

    /// Checks that the other hops computed every row once, and that the spare was told what the lost hop had, and nothing more.
    async fn only_what_was_lost_is_computed_again(&self, case: &Case, client: &Client, before: &[Counts]) {
        let mut since = counts(client, &self.stay(case)).await;
        for (now, before) in since.iter_mut().zip(before) {
            now.tokens -= before.tokens;
            now.replayed -= before.replayed;
            now.bytes -= before.bytes;
        }
        let Some((spare, others)) = since.split_last() else { unreachable!("there is a spare") };
        for other in others {
            assert_eq!((other.tokens, other.replayed), (self.scene.rows(), 0), "{case:?}: {since:?}");
        }
        assert_eq!(spare.tokens + spare.replayed, self.scene.rows(), "{case:?}: {since:?}");
        // Of the chunks that are under way when a node is lost some may have been answered for as well.
        let is_sharp = matches!(case.fault, Fault::Lies(_)) || !matches!(case.moment, Moment::Chunk(_));
        let had = self.had(case);
        let most = if is_sharp { had } else { self.scene.reference.prompt.len() };
        assert!((had..=most).contains(&(spare.replayed as usize)), "{case:?}: it had {had} rows: {since:?}");
        // The client tells a new first hop, and the hop in front any other.
        let bytes: u64 = client.traffic().bytes_replayed() + since.iter().map(|counts| counts.bytes).sum::<u64>();
        let row_bytes = 4 * self.scene.model.spec().hidden_size as u64;
        assert_eq!(bytes, spare.replayed * row_bytes, "{case:?}: {since:?}");
    }
}

/// Runs some of the cases on a family, or all of them.
async fn cases(family: &str, numbers: impl IntoIterator<Item = usize>) {
    let numbers: Vec<usize> = match std::env::var("HELION_TEST_MATRIX") {
        Ok(all) if all == "all" => (0..CASES).collect(),
        Ok(asked) => asked.split(',').map(|number| number.parse().unwrap()).collect(),
        Err(_) => numbers.into_iter().collect(),
    };
    let mut stand = Stand::start(family).await;
    for number in numbers {
        let case = Case::numbered(number);
        let longest = PAUSE + if case.is_silent() { NOTICED } else { Duration::ZERO };
        let mut pauses = Vec::new();
        while pauses.last().is_none_or(|pause| *pause >= longest) {
            assert!(pauses.len() < ATTEMPTS, "{family}, case {number}: {case:?}: nothing came for {pauses:?}");
            pauses.push(stand.run(case).await);
        }
        eprintln!("{family}, case {number}: {case:?}: nothing came for {pauses:.1?}");
    }
}

#[test]
fn every_case_comes_up_once() {
    let cases: HashSet<String> = (0..CASES).map(|number| format!("{:?}", Case::numbered(number))).collect();
    assert_eq!((CASES, cases.len()), (84, 84));
}

/// Every hop by every fault, at one moment each.
#[tokio::test(flavor = "multi_thread")]
async fn llama() {
    cases("llama", 0..21).await;
}

macro_rules! every_other_family {
    ($($name:ident: $family:literal, $first:literal;)*) => {$(
        /// Every hop once.
        #[tokio::test(flavor = "multi_thread")]
        async fn $name() {
            cases($family, $first..$first + HOPS).await;
        }
    )*};
}

every_other_family! {
    bloom: "bloom", 21;
    falcon_new: "falcon-40b-style", 24;
    falcon_old: "falcon-7b-style", 27;
    falcon_alibi: "falcon-rw-style", 30;
    gemma3: "gemma3", 33;
    gemma3_text: "gemma3_text", 36;
    gpt_oss: "gpt_oss", 39;
    mistral: "mistral", 42;
    mixtral: "mixtral", 45;
    phi: "phi", 48;
    phi3: "phi3", 51;
    qwen2: "qwen2", 54;
    qwen3: "qwen3", 57;
    qwen3_moe: "qwen3_moe", 60;
}
