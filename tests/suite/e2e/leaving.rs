//! Hops that leave on purpose: what they hold moves to another peer, nothing is computed again anywhere, and whoever fails in the
//! middle of it, the tokens are right.

use std::{
    process::Command,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use futures::future::BoxFuture;
use helion::{
    client::{
        Client, PeerRules,
        generation::{Generation, GenerationEvent, GenerationOptions},
        session::{Input, Patience, Step, Want},
    },
    engine::LaneRun,
    swarm::{
        Frame, Link, PeerId, Service, WeakSwarm, WireCodec,
        proto::{rpc, session as proto},
        ticket::SessionLimits,
    },
};

use crate::link::Profile;

use super::{
    faults::{Case, Moment, Outcome, changed, run},
    harness::{Place, Reference, Server, client, fixture, reference},
    long_links::FarNode,
    sessions::info,
    strangers::{pass_for_honest, server},
};

/// One hop leaves, at one moment: it hands over, and what the others and its successor did adds up to every token once.
async fn leaves(hop: usize, moment: Moment, case: Case) {
    let losses: &'static [_] = Box::leak(Box::new([(hop, "TERM", moment)]));
    let outcome = run(Case { losses, ..case }).await;
    nothing_was_computed_again(&outcome).await;
    for node in outcome.nodes {
        if outcome.lost.contains(&node.peer_id) {
            node.ends_well();
        }
    }
}

async fn nothing_was_computed_again(outcome: &Outcome) {
    assert_eq!(outcome.recoveries(), 1);
    for event in &outcome.events {
        if let GenerationEvent::Recovery { recovery, .. } = event {
            assert!(recovery.handed_over, "{recovery:?}");
        }
    }
    let rows = (outcome.reference.prompt.len() + outcome.reference.output.len() - 1) as u64;
    for hop in &outcome.generation.route {
        let info = outcome.info(&hop.peer_id).await;
        assert_eq!((info.tokens_replayed, info.bytes_replayed), (0, 0), "{hop:?}");
        assert_eq!(info.tokens + info.tokens_taken_over, rows, "{hop:?}");
        assert_eq!(info.tokens_taken_over > 0, !outcome.first_route.contains(hop), "{hop:?}");
    }
}

macro_rules! leaves {
    ($($name:ident: $hop:literal, $moment:expr, $case:expr;)*) => {$(
        #[tokio::test(flavor = "multi_thread")]
        async fn $name() {
            leaves($hop, $moment, $case).await;
        }
    )*};
}

fn family(family: &'static str) -> Case {
    Case { family, ..Case::default() }
}

/// A family of four blocks.
fn four_blocks(family: &'static str) -> Case {
    Case { family, nodes: &["0:1", "1:3", "3:4", "0:1", "1:3", "3:4"], ..Case::default() }
}

leaves! {
    the_first_hop: 0, Moment::Token(5), family("llama");
    the_middle_hop: 1, Moment::Token(1), family("qwen2");
    the_last_hop: 2, Moment::Token(22), family("qwen3");
    a_hop_with_sinks_and_windows: 1, Moment::Token(9), four_blocks("gpt_oss");
    a_hop_with_experts: 2, Moment::Token(3), four_blocks("mixtral");
    a_hop_without_positions: 1, Moment::Token(7), family("bloom");
    a_hop_with_a_cache_in_eight_bits: 1, Moment::Token(8), Case {
        changes: Some("{}"),
        node_args: &["--kv-dtype", "q8"],
        ..Case::default()
    };
    a_hop_with_a_cache_in_bf16: 0, Moment::Token(8), Case {
        changes: Some("{}"),
        node_args: &["--kv-dtype", "bf16"],
        ..Case::default()
    };
}

/// While the prompt's chunks are under way; before the first of them, there is nothing to hand over.
#[tokio::test(flavor = "multi_thread")]
async fn a_hop_that_leaves_during_the_prompt() {
    for hop in 0..3 {
        let losses: &'static [_] = Box::leak(Box::new([(hop, "TERM", Moment::Opened)]));
        let outcome = run(Case { losses, ..Case::default() }).await;
        let rows = (outcome.reference.prompt.len() + outcome.reference.output.len() - 1) as u64;
        for hop in &outcome.generation.route {
            let info = outcome.info(&hop.peer_id).await;
            assert_eq!((info.tokens + info.tokens_taken_over, info.tokens_replayed), (rows, 0), "{hop:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn all_hops_leave_one_after_the_other() {
    let losses = &[(0, "TERM", Moment::Token(3)), (1, "TERM", Moment::Token(9)), (2, "TERM", Moment::Token(15))];
    let outcome = run(Case { losses, ..Case::default() }).await;
    assert_eq!(outcome.recoveries(), 3);
    for hop in &outcome.generation.route {
        assert_eq!(outcome.info(&hop.peer_id).await.tokens_replayed, 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn neighbours_leave_at_once() {
    let losses = &[(0, "TERM", Moment::Token(4)), (1, "TERM", Moment::Token(4)), (2, "TERM", Moment::Token(4))];
    let outcome = run(Case { losses, ..Case::default() }).await;
    assert_eq!(outcome.recoveries(), 3);
    for hop in &outcome.generation.route {
        assert_eq!(outcome.info(&hop.peer_id).await.tokens_replayed, 0);
    }
    for node in outcome.nodes {
        if outcome.lost.contains(&node.peer_id) {
            node.ends_well();
        }
    }
}

/// A swarm in this test's hands, and what an undisturbed generation gives.
struct Scene {
    place: Place,
    bootstrap: Server,
    nodes: Vec<Server>,
    client: Client,
    reference: Reference,
}

const PATIENCE: Duration = Duration::from_millis(700);

impl Scene {
    async fn new(spans: &[&str], prompt: usize, output: usize) -> Self {
        let place = Place::new();
        let model = changed(&place, "llama", r#"{"max_position_embeddings": 2048}"#);
        let (bootstrap, nodes) = place.swarm(&model, spans, &[]);
        let patience = Patience { overdue: PATIENCE, pong: PATIENCE, ..Patience::default() };
        // A long prompt might else go through all peers, and none would be left to take a hop's place.
        let route = nodes[..3].iter().map(|node| node.peer_id.parse().unwrap()).collect();
        let client = client(&model, &bootstrap, patience).await.with_rules(PeerRules { route, ..PeerRules::default() });
        let prompt: Vec<u32> = (0..prompt as u32).map(|i| i * 37 % 511 + 1).collect();
        let mut scene = Self { place, bootstrap, nodes, client, reference: Reference { prompt, output: Vec::new() } };
        scene.reference.output = scene.generate(output, &mut |_| {}).await.output_ids;
        scene
    }

    async fn generate(&self, count: usize, on_event: &mut (dyn FnMut(GenerationEvent) + Send)) -> Generation {
        // Nothing is left for the next one: every hop computes all of it.
        let options =
            GenerationOptions { max_tokens: count, ignore_eos: true, tenant: None, ..GenerationOptions::default() };
        self.client.generate(&self.reference.prompt, &options, on_event).await.unwrap()
    }

    fn node(&self, peer: &str) -> &Server {
        self.nodes.iter().find(|node| node.peer_id == peer).unwrap()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_tokens_move_and_a_later_loss_of_the_next_hop_is_repaired_from_them() {
    let scene = Scene::new(&["0:2", "2:4", "4:6", "0:2", "2:4", "4:6"], 1000, 24).await;
    let mut before = Vec::new();
    for node in &scene.nodes {
        before.push(info(&scene.client, node).await);
    }
    let (mut tokens, mut route, mut lost, mut events) = (0, Vec::new(), Vec::new(), Vec::new());
    let generation = scene
        .generate(24, &mut |event| {
            match &event {
                GenerationEvent::Route { route: first } => route = first.clone(),
                GenerationEvent::Recovery { route: repaired, .. } => route = repaired.clone(),
                GenerationEvent::Token { .. } => {
                    tokens += 1;
                    let (hop, signal) = match tokens {
                        5 => (1, "TERM"),
                        14 => (2, "KILL"),
                        _ => return,
                    };
                    scene.node(&route[hop].peer_id).running.signal(signal);
                    lost.push(route[hop].peer_id.clone());
                }
            }
            events.push(event);
        })
        .await;
    assert_eq!(generation.output_ids, scene.reference.output);
    assert_eq!((generation.recoveries, lost.len()), (2, 2));
    for event in &events {
        if let GenerationEvent::Recovery { recovery, .. } = event {
            eprintln!("1,000 tokens, handed over: {}, pause {:.1} ms", recovery.handed_over, recovery.ms);
        }
    }
    let rows = 1000 + 24 - 1;
    for (hop, entry) in generation.route.iter().enumerate() {
        let index = scene.nodes.iter().position(|node| node.peer_id == entry.peer_id).unwrap();
        let (old, now) = (&before[index], info(&scene.client, &scene.nodes[index]).await);
        let computed = now.tokens - old.tokens;
        let again = now.tokens_replayed - old.tokens_replayed;
        match hop {
            0 => assert_eq!((computed, again, now.tokens_taken_over), (rows, 0, 0)),
            // Handed over: the pages moved, and nothing was computed again.
            1 => {
                assert!(now.tokens_taken_over >= 1000, "{}", now.tokens_taken_over);
                assert_eq!((computed + now.tokens_taken_over, again), (rows, 0));
                // Keys and values of two blocks in f32, two heads of 16, and what was sent on.
                let least = now.tokens_taken_over * (2 * 2 * 2 * 16 * 4 + 64 * 4);
                assert!(now.bytes_taken_over >= least, "{} {least}", now.bytes_taken_over);
                // What the next hop's replacement was told came out of the history that had been handed over.
                assert!(now.bytes_replayed > old.bytes_replayed);
            }
            // Killed: its successor computes what the lost one had.
            _ => assert!(again >= 1000 && computed + again == rows, "{computed} {again}"),
        }
    }
}

/// What counts is that it goes on: it takes more than the time in which nothing may happen, and the successor is far from being at
/// fault.
#[tokio::test(flavor = "multi_thread")]
async fn a_hand_over_may_take_its_time_on_a_narrow_link() {
    let place = Place::new();
    let model = changed(&place, "llama", r#"{"max_position_embeddings": 2048}"#);
    let bootstrap = place.bootstrap();
    // 1.5 MB take 3 s, whoever of the two has dialled the other.
    let narrow = Profile { one_way: Duration::from_millis(1), bits_per_second: Some(4e6) };
    let leaving = FarNode::start(&place, &model, &bootstrap, "0:6", narrow);
    let successor = FarNode::start(&place, &model, &bootstrap, "0:6", narrow);
    let patience = Patience { recovery: Duration::from_secs(3), ..Patience::default() };
    let route = vec![leaving.node.peer_id.parse().unwrap()];
    let client = client(&model, &bootstrap, patience).await.with_rules(PeerRules { route, ..PeerRules::default() });
    let prompt: Vec<u32> = (0..1000).map(|i| i * 37 % 511 + 1).collect();
    let options = GenerationOptions { max_tokens: 8, ignore_eos: true, tenant: None, ..Default::default() };
    let reference = client.generate(&prompt, &options, &mut |_| {}).await.unwrap();
    let (mut tokens, mut handed_over) = (0, None);
    let generation = client
        .generate(&prompt, &options, &mut |event| match event {
            GenerationEvent::Token { .. } => {
                tokens += 1;
                if tokens == 3 {
                    leaving.node.running.signal("TERM");
                }
            }
            GenerationEvent::Recovery { recovery, .. } => handed_over = Some((recovery.handed_over, recovery.ms)),
            GenerationEvent::Route { .. } => {}
        })
        .await
        .unwrap();
    assert_eq!((generation.output_ids, generation.recoveries), (reference.output_ids, 1));
    let (handed_over, took_ms) = handed_over.unwrap();
    assert!(handed_over && took_ms > 1500.0, "handed over: {handed_over}, {took_ms} ms");
    assert_eq!(info(&client, &successor.node).await.tokens_replayed, 0);
    leaving.node.ends_well();
}

/// More than are handed over at a time: each goes on where it is until it is its turn.
#[tokio::test(flavor = "multi_thread")]
async fn many_sessions_are_handed_over_in_turns() {
    const SESSIONS: usize = 24;
    let place = Place::new();
    let model = changed(&place, "llama", r#"{"max_position_embeddings": 2048}"#);
    let (bootstrap, mut nodes) = place.swarm(&model, &["0:6", "0:6"], &[]);
    let client = client(&model, &bootstrap, Patience::default()).await;
    let route = vec![nodes[0].peer_id.parse().unwrap()];
    let client = client.with_rules(PeerRules { route, ..PeerRules::default() });
    let options = GenerationOptions { max_tokens: 60, ignore_eos: true, tenant: None, ..Default::default() };
    let prompt = |session: u32| (0..20).map(|i| (session * 20 + i) * 37 % 511 + 1).collect::<Vec<u32>>();
    let first = client.generate(&prompt(0), &options, &mut |_| {}).await.unwrap();
    let before = info(&client, &nodes[0]).await.tokens;
    let begun = Arc::new(AtomicU32::new(0));
    let mut generations = tokio::task::JoinSet::new();
    for session in 0..SESSIONS as u32 {
        let (client, options, begun, prompt) = (client.clone(), options.clone(), begun.clone(), prompt(session));
        generations.spawn(async move {
            let mut tokens = 0;
            let mut count = |event| {
                tokens += u32::from(matches!(event, GenerationEvent::Token { .. }));
                if tokens == 5 {
                    begun.fetch_add(1, Ordering::Relaxed);
                }
            };
            (session, client.generate(&prompt, &options, &mut count).await.unwrap())
        });
    }
    while (begun.load(Ordering::Relaxed) as usize) < SESSIONS {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    nodes[0].running.signal("TERM");
    let done = generations.join_all().await;
    let recoveries: usize = done.iter().map(|(_, generation)| generation.recoveries).sum();
    assert!(recoveries > 8 && done.iter().all(|(_, generation)| generation.recoveries <= 1), "{recoveries}");
    let of_first = done.iter().find(|(session, _)| *session == 0).unwrap();
    assert_eq!(of_first.1.output_ids, first.output_ids);
    nodes.remove(0).ends_well();
    let taken = info(&client, &nodes[0]).await;
    assert_eq!(taken.tokens_replayed, 0, "nothing is computed again");
    assert!(taken.tokens_taken_over > 0 && taken.tokens < before * SESSIONS as u64);
}

/// Several lanes, and hidden states that are packed on the wire: bit for bit what comes where nobody leaves.
#[tokio::test(flavor = "multi_thread")]
async fn lanes_move_together() {
    let (place, model) = (Place::new(), fixture("llama"));
    let (bootstrap, nodes) = place.swarm(&model, &["0:2", "2:4", "4:6", "2:4"], &[]);
    let client = client(&model, &bootstrap, Patience::default()).await.with_wire_codec(WireCodec::Q8);
    let limits = SessionLimits { max_lanes: 3, max_tokens: 200, max_in_flight: 4, max_step_tokens: 64 };
    let mut answers = Vec::new();
    for is_disturbed in [false, true] {
        let (mut session, route) = client.open_session(limits, Duration::ZERO).await.unwrap();
        let mut said = Vec::new();
        for round in 0..4usize {
            // Lane 2 goes back to its beginning in the third round, and lane 1 is left alone.
            let lanes: Vec<LaneRun> = [(0, round * 20, 20), (1, round * 20, 20), (2, round % 2 * 9, 9)]
                .into_iter()
                .filter(|(lane, ..)| round < 2 || *lane != 1)
                .map(|(lane, position, tokens)| LaneRun { lane, position, tokens })
                .collect();
            let rows = lanes.iter().map(|run| run.tokens as u32).sum::<u32>();
            let tokens = Input::Tokens((0..rows).map(|i| (i * 31 + round as u32) % 511 + 1).collect());
            session.send(Step { lanes, input: tokens, want: Want::Last, rope_length: None }).unwrap();
            said.push(session.receive().await.unwrap().hidden.unwrap().bytes);
            if is_disturbed && round == 1 {
                let leaving = route.hops[1].announcement.peer_id.to_string();
                nodes.iter().find(|node| node.peer_id == leaving).unwrap().running.signal("TERM");
                session.wants_attention().await;
                session.attend().await;
                let recoveries = session.take_recoveries();
                assert!(recoveries.len() == 1 && recoveries[0].handed_over, "{recoveries:?}");
            }
        }
        answers.push(said);
    }
    assert!(answers[0] == answers[1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_successor_without_room_is_no_successor() {
    // Its cache holds a part of the context. With the small spans there is another way, without them the leaving hop serves on.
    for others in [&["2:3", "3:4"][..], &[]] {
        let mut scene = Scene::new(&["0:2", "2:4", "4:6"], 300, 12).await;
        let model = scene.place.path().join("changed");
        let small = ["--blocks", "2:4", "--attn-cache-tokens", "64"];
        let mut more = vec![scene.place.node(&model, &scene.bootstrap, &small)];
        more.extend(others.iter().map(|span| scene.place.node(&model, &scene.bootstrap, &["--blocks", span])));
        let leaving = scene.nodes[1].peer_id.clone();
        let mut tokens = 0;
        let generation = scene
            .generate(12, &mut |event| {
                if let GenerationEvent::Token { .. } = event {
                    tokens += 1;
                    if tokens == 4 {
                        scene.nodes[1].running.signal("TERM");
                    }
                }
            })
            .await;
        assert_eq!(generation.output_ids, scene.reference.output);
        assert_eq!(generation.recoveries, usize::from(!others.is_empty()));
        let stayed = generation.route.iter().any(|hop| hop.peer_id == leaving);
        assert_eq!(stayed, others.is_empty());
        scene.nodes.remove(1).ends_well();
        // What it had taken before it refused is given back.
        super::sessions::holds_nothing(&scene.client, &more[0]).await;
    }
}

/// What becomes of a peer that is to take a session over, once it holds the ticket.
#[derive(Clone, Copy, PartialEq)]
enum Fate {
    Refuses,
    Dies,
    SaysNothing,
    /// The leaving hop is killed when its pages begin to come.
    SeesTheOtherOneDie,
}

/// A peer that passes for a hop.
struct FalseSuccessor {
    fate: Fate,
    swarm: OnceLock<WeakSwarm>,
    /// Of the leaving hop.
    process: AtomicU32,
    parts: Mutex<Vec<u32>>,
}

impl Service for FalseSuccessor {
    fn frame(&self, link: &Link, frame: Frame) {
        use proto::frame::Body;
        let Frame { header, .. } = frame;
        // The other end may be gone by now.
        let answer = |body| drop(link.send(Frame::bare(proto::Frame { body: Some(body), ..header.clone() })));
        let fault = |code: proto::Code| {
            Body::Fault(proto::Fault { code: code.into(), blame: proto::Blame::Hop.into(), ..Default::default() })
        };
        match header.body.clone() {
            Some(Body::Open(_)) => answer(Body::Opened(proto::Opened { filling: true, ..Default::default() })),
            Some(Body::Ping(ping)) => answer(Body::Pong(proto::Pong { nonce: ping.nonce })),
            Some(Body::TakeOver(part)) => {
                self.parts.lock().unwrap().push(part.index);
                match self.fate {
                    Fate::Refuses => answer(fault(proto::Code::CacheFull)),
                    Fate::SaysNothing => {}
                    Fate::Dies => {
                        let swarm = self.swarm.get().unwrap().upgrade().unwrap();
                        tokio::spawn(async move { swarm.stop().await });
                    }
                    Fate::SeesTheOtherOneDie if part.index == 0 => {
                        answer(Body::TakenOver(proto::TakenOver { index: 0 }));
                    }
                    Fate::SeesTheOtherOneDie => {
                        let process = self.process.load(Ordering::Relaxed).to_string();
                        Command::new("kill").args(["-KILL", &process]).status().unwrap();
                    }
                }
            }
            Some(Body::Step(_) | Body::Replay(_)) => answer(fault(proto::Code::Internal)),
            _ => {}
        }
    }

    fn link_closed(&self, _link: &Link) {}

    fn request(&self, _from: PeerId, _request: rpc::Request) -> BoxFuture<'static, rpc::Response> {
        Box::pin(std::future::ready(rpc::Response::default()))
    }
}

async fn a_hand_over_fails(fate: Fate) {
    let (place, model) = (Place::new(), fixture("llama"));
    // Only the false one could take over all of 2:4; the small ones can be told everything.
    let (bootstrap, nodes) = place.swarm(&model, &["0:2", "2:4", "4:6", "2:3", "3:4"], &[]);
    let patience = Patience {
        overdue: Duration::from_millis(500),
        pong: Duration::from_millis(500),
        step: Duration::from_secs(3),
        recovery: Duration::from_secs(10),
        ..Patience::default()
    };
    let client = client(&model, &bootstrap, patience).await;
    let process = AtomicU32::new(nodes[1].running.child.id());
    let successor = Arc::new(FalseSuccessor { fate, swarm: OnceLock::new(), process, parts: Mutex::default() });
    let swarm = server(&bootstrap, successor.clone()).await;
    successor.swarm.set(swarm.downgrade()).unwrap_or_else(|_| panic!("set once"));
    pass_for_honest(&swarm, &client, 2..4).await;

    let reference = reference(&model);
    let options = GenerationOptions {
        max_tokens: reference.output.len(),
        ignore_eos: true,
        wait: Duration::from_secs(10),
        ..GenerationOptions::default()
    };
    let route = nodes[..3].iter().map(|node| node.peer_id.parse().unwrap()).collect();
    let client = client.with_rules(PeerRules { route, ..PeerRules::default() });
    let mut tokens = 0;
    let mut leave = |event| {
        if let GenerationEvent::Token { .. } = event {
            tokens += 1;
            if tokens == 6 {
                nodes[1].running.signal("TERM");
            }
        }
    };
    let generation = client.generate(&reference.prompt, &options, &mut leave).await.unwrap();
    assert_eq!(generation.output_ids, reference.output);
    assert!(generation.recoveries > 0);
    let peers: Vec<&str> = generation.route.iter().map(|hop| hop.peer_id.as_str()).collect();
    assert_eq!(peers, [0, 3, 4, 2].map(|node: usize| nodes[node].peer_id.as_str()));
    let parts = successor.parts.lock().unwrap().clone();
    let is_told_the_state_alone = parts == [0];
    assert_eq!(is_told_the_state_alone, fate != Fate::SeesTheOtherOneDie, "{parts:?}");
    for (index, node) in nodes.into_iter().enumerate() {
        if index == 1 && fate != Fate::SeesTheOtherOneDie {
            node.ends_well();
        } else if index != 1 {
            super::sessions::holds_nothing(&client, &node).await;
        }
    }
}

macro_rules! hand_overs_fail {
    ($($name:ident: $fate:expr;)*) => {$(
        #[tokio::test(flavor = "multi_thread")]
        async fn $name() {
            a_hand_over_fails($fate).await;
        }
    )*};
}

hand_overs_fail! {
    the_successor_refuses: Fate::Refuses;
    the_successor_dies: Fate::Dies;
    the_successor_says_nothing: Fate::SaysNothing;
    the_leaving_hop_dies: Fate::SeesTheOtherOneDie;
}

/// Between two turns somebody looks after the session: the hop need not wait for the next one.
#[tokio::test(flavor = "multi_thread")]
async fn a_conversation_that_rests_moves_as_well() {
    let (place, model) = (Place::new(), fixture("qwen3"));
    let (bootstrap, nodes) = place.swarm(&model, &["0:3", "3:6", "0:3", "3:6"], &[]);
    let client = client(&model, &bootstrap, Patience::default()).await;
    let reference = reference(&model);
    let options = |max_tokens| GenerationOptions { max_tokens, ignore_eos: true, ..GenerationOptions::default() };
    let mut kept = None;
    let first = client.generate_on(&mut kept, &reference.prompt, &options(10), &mut |_| {}).await.unwrap();
    let (leaving, nodes): (Vec<_>, Vec<_>) =
        nodes.into_iter().partition(|node| first.route.iter().any(|hop| hop.peer_id == node.peer_id));
    let conversation = kept.as_mut().unwrap();
    for node in &leaving {
        node.running.signal("TERM");
    }
    for _ in &leaving {
        conversation.wants_attention().await;
        conversation.attend().await;
    }
    leaving.into_iter().for_each(Server::ends_well);
    let prompt = [&reference.prompt[..], &reference.output[..10]].concat();
    let second = client.generate_on(&mut kept, &prompt, &options(14), &mut |_| {}).await.unwrap();
    assert_eq!(second.output_ids, reference.output[10..]);
    for node in &nodes {
        let info = info(&client, node).await;
        assert_eq!((info.tokens, info.tokens_replayed), (1 + 13, 0));
        assert_eq!(info.tokens_taken_over as usize, prompt.len() - 1);
    }
}

/// A hop that froze was replaced; it wakes up in the middle of what follows, and what it says counts for nothing.
#[tokio::test(flavor = "multi_thread")]
async fn a_hop_that_froze_and_wakes_changes_nothing() {
    for hop in 0..3 {
        let scene = Scene::new(&["0:2", "2:4", "4:6", "0:2", "2:4", "4:6"], 60, 30).await;
        let (mut tokens, mut route, mut frozen, mut woken_at) = (0, Vec::new(), String::new(), 0);
        let generation = scene
            .generate(30, &mut |event| match event {
                GenerationEvent::Route { route: first } => route = first,
                GenerationEvent::Recovery { .. } => {
                    scene.node(&frozen).running.signal("CONT");
                    woken_at = tokens;
                }
                GenerationEvent::Token { .. } => {
                    tokens += 1;
                    if tokens == 5 {
                        frozen.clone_from(&route[hop].peer_id);
                        scene.node(&frozen).running.signal("STOP");
                    }
                }
            })
            .await;
        assert_eq!((generation.output_ids, generation.recoveries), (scene.reference.output.clone(), 1));
        assert!(woken_at > 0 && woken_at < 10, "{woken_at}");
        for node in &scene.nodes {
            super::sessions::holds_nothing(&scene.client, node).await;
        }
    }
}

/// It says that it leaves, and freezes before it could.
#[tokio::test(flavor = "multi_thread")]
async fn a_hop_that_freezes_while_it_leaves() {
    let losses = &[(1, "TERM", Moment::Token(5)), (1, "STOP", Moment::Token(5))];
    let outcome = run(Case { losses, ..Case::default() }).await;
    for node in &outcome.nodes {
        node.running.signal("CONT");
    }
}
