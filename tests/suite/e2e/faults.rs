//! Which hop is lost × how × when: the tokens are always the reference's, and only what was lost is computed again.
//!
//! The client is in this process, so that the fault comes at an exact moment; the nodes are processes of their own.

mod matrix;

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use helion::{
    client::{
        Client,
        generation::{Generation, GenerationEvent, GenerationOptions, RouteEntry},
        session::Patience,
    },
    swarm::proto::rpc::InfoResponse,
};

use serde_json::Value;

use super::{
    harness::{Place, Reference, Server, client, copy_fixture, fixture, reference},
    sessions::info,
};

/// Bytes of a token's hidden state in the fixtures, in f32.
const ROW_BYTES: u64 = 64 * 4;

/// A frozen hop is noticed sooner than a user's client would: the others answer at once here.
const PATIENCE: Duration = Duration::from_millis(700);

/// From the loss of a hop, or where it only falls silent from noticing that, to the next token.
const PAUSE: Duration = Duration::from_secs(1);

/// When something is done to the swarm.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Moment {
    /// The session is open, and nothing was sent.
    Opened,
    /// This many tokens are there.
    Token(usize),
    /// So many hops were replaced already.
    Recovered(usize),
}

/// One case: hops of the route are lost by a signal.
pub(super) struct Case {
    pub(super) family: &'static str,
    /// Changes to the family's configuration, JSON.
    pub(super) changes: Option<&'static str>,
    /// The blocks of all nodes.
    pub(super) nodes: &'static [&'static str],
    pub(super) node_args: &'static [&'static str],
    /// Which hop, by what signal, when.
    pub(super) losses: &'static [(usize, &'static str, Moment)],
}

const TWICE: &[&str] = &["0:2", "2:4", "4:6", "0:2", "2:4", "4:6"];

impl Default for Case {
    fn default() -> Self {
        Self { family: "llama", changes: None, nodes: TWICE, node_args: &[], losses: &[] }
    }
}

/// What a case came to.
pub(super) struct Outcome {
    pub(super) first_route: Vec<RouteEntry>,
    pub(super) generation: Generation,
    /// The peers that were given a signal.
    pub(super) lost: Vec<String>,
    /// Between two tokens, or before the first one.
    longest_gap: Duration,
    pub(super) events: Vec<GenerationEvent>,
    pub(super) nodes: Vec<Server>,
    /// Tokens that each of them had computed before.
    computed_before: Vec<u64>,
    client: Client,
    pub(super) reference: Reference,
    _place: Place,
}

pub(super) async fn run(case: Case) -> Outcome {
    let place = Place::new();
    let model = match case.changes {
        Some(changes) => changed(&place, case.family, changes),
        None => fixture(case.family),
    };
    let (bootstrap, nodes) = place.swarm(&model, case.nodes, case.node_args);
    let patience = Patience { overdue: PATIENCE, pong: PATIENCE, ..Patience::default() };
    let client = client(&model, &bootstrap, patience).await;
    let mut reference = reference(&model);
    let options = GenerationOptions {
        max_tokens: reference.output.len(),
        ignore_eos: true,
        prefill_chunk: 7,
        ..GenerationOptions::default()
    };
    if case.changes.is_some() {
        reference.prompt.truncate(21);
        reference.output = client.generate(&reference.prompt, &options, &mut |_| {}).await.unwrap().output_ids;
    }
    let mut computed_before = Vec::new();
    for node in &nodes {
        computed_before.push(info(&client, node).await.tokens);
    }
    let (mut events, mut lost, mut route, mut first_route) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let (mut tokens, mut recovered) = (0, 0);
    let (mut last_token, mut longest_gap) = (Instant::now(), Duration::ZERO);
    let find = |peer: &String| nodes.iter().find(|node| &node.peer_id == peer).unwrap();
    let generation = client
        .generate(&reference.prompt, &options, &mut |event| {
            let now = match &event {
                GenerationEvent::Route { route: first } => {
                    (route, first_route) = (first.clone(), first.clone());
                    last_token = Instant::now();
                    Moment::Opened
                }
                GenerationEvent::Recovery { route: repaired, .. } => {
                    route = repaired.clone();
                    recovered += 1;
                    // A frozen one wakes up while the others go on, and changes nothing. The others are dead.
                    lost.iter().map(find).for_each(|node| node.running.signal("CONT"));
                    Moment::Recovered(recovered)
                }
                GenerationEvent::Token { .. } => {
                    tokens += 1;
                    longest_gap = longest_gap.max(last_token.elapsed());
                    last_token = Instant::now();
                    Moment::Token(tokens)
                }
            };
            for (hop, signal, _) in case.losses.iter().filter(|(_, _, moment)| *moment == now) {
                let peer = &route[*hop].peer_id;
                find(peer).running.signal(signal);
                lost.push(peer.clone());
            }
            events.push(event);
        })
        .await
        .unwrap();
    assert_eq!(generation.output_ids, reference.output);
    assert!(generation.exact);
    Outcome {
        first_route,
        generation,
        lost,
        longest_gap,
        events,
        nodes,
        computed_before,
        client,
        reference,
        _place: place,
    }
}

/// A family's fixture with a changed configuration.
pub(super) fn changed(place: &Place, family: &str, changes: &str) -> PathBuf {
    let model = place.path().join("changed");
    copy_fixture(family, &model);
    let path = model.join("config.json");
    let mut config: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    let changes: Value = serde_json::from_str(changes).unwrap();
    for (field, value) in changes.as_object().unwrap() {
        config[field] = value.clone();
    }
    std::fs::write(path, config.to_string()).unwrap();
    model
}

impl Outcome {
    /// What a node says of itself, but that it had computed nothing before.
    pub(super) async fn info(&self, peer: &str) -> InfoResponse {
        let index = self.nodes.iter().position(|node| node.peer_id == peer).unwrap();
        let info = info(&self.client, &self.nodes[index]).await;
        InfoResponse { tokens: info.tokens - self.computed_before[index], ..info }
    }

    /// Rows of steps and of replays that a node has computed, and bytes that it replayed to others.
    async fn counts(&self, peer: &str) -> (u64, u64, u64) {
        let info = self.info(peer).await;
        (info.tokens, info.tokens_replayed, info.bytes_replayed)
    }

    /// Checks that the hops that were there from first to last computed every token once, and that what was replayed was computed
    /// once, too, and told in as many bytes. Returns how many rows that were.
    async fn only_what_was_lost_is_computed_again(&self) -> u64 {
        let rows = (self.reference.prompt.len() + self.reference.output.len() - 1) as u64;
        // The client tells the first hop.
        let (mut replayed, mut sent) = (0, self.client.traffic().bytes_replayed());
        for hop in &self.generation.route {
            let (tokens, again, bytes) = self.counts(&hop.peer_id).await;
            (replayed, sent) = (replayed + again, sent + bytes);
            if self.first_route.contains(hop) {
                assert_eq!((tokens, again), (rows, 0), "{hop:?}");
            } else {
                assert_eq!(tokens + again, rows, "{hop:?}");
            }
        }
        assert_eq!(sent, replayed * ROW_BYTES);
        replayed
    }

    pub(super) fn recoveries(&self) -> usize {
        let told = self.events.iter().filter(|event| matches!(event, GenerationEvent::Recovery { .. })).count();
        assert_eq!(told, self.generation.recoveries);
        told
    }
}

/// One hop is lost once. (`matrix` has many more of these, in steps; here it is as a user generates.)
async fn one_loss(hop: usize, signal: &'static str, token: usize, family: &'static str) {
    let losses: &'static [_] = Box::leak(Box::new([(hop, signal, Moment::Token(token))]));
    let longest = PAUSE + if signal == "STOP" { 2 * PATIENCE } else { Duration::ZERO };
    // The machine may be busy.
    let mut gaps = Vec::new();
    while gaps.last().is_none_or(|gap| *gap >= longest) {
        assert!(gaps.len() < 3, "no token for {gaps:?}");
        let outcome = run(Case { family, losses, ..Case::default() }).await;
        let recoveries = outcome.events.iter().filter(|event| matches!(event, GenerationEvent::Recovery { .. }));
        assert_eq!(outcome.recoveries(), 1, "{:?}", recoveries.collect::<Vec<_>>());
        assert!(outcome.generation.route.iter().all(|hop| !outcome.lost.contains(&hop.peer_id)));
        // What the lost hop had: the prompt, and the tokens before the last one.
        let replayed = outcome.only_what_was_lost_is_computed_again().await;
        assert_eq!(replayed, (outcome.reference.prompt.len() + token - 1) as u64);
        gaps.push(outcome.longest_gap);
    }
}

macro_rules! one_loss {
    ($($name:ident: $hop:literal, $signal:literal, $token:literal, $family:literal;)*) => {$(
        #[tokio::test(flavor = "multi_thread")]
        async fn $name() {
            one_loss($hop, $signal, $token, $family).await;
        }
    )*};
}

one_loss! {
    the_first_hop_is_killed: 0, "KILL", 9, "qwen3";
    the_last_hop_is_killed: 2, "KILL", 22, "mistral";
    the_middle_hop_freezes: 1, "STOP", 5, "llama";
}

#[tokio::test(flavor = "multi_thread")]
async fn two_neighbours_are_killed_at_once() {
    let losses = &[(0, "KILL", Moment::Token(4)), (1, "KILL", Moment::Token(4))];
    let outcome = run(Case { losses, ..Case::default() }).await;
    assert_eq!(outcome.recoveries(), 2);
    outcome.only_what_was_lost_is_computed_again().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn hops_are_lost_one_after_the_other() {
    let losses = &[(1, "KILL", Moment::Token(4)), (2, "STOP", Moment::Token(8)), (0, "KILL", Moment::Token(12))];
    let outcome = run(Case { losses, ..Case::default() }).await;
    assert_eq!(outcome.recoveries(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_replacement_is_lost_as_soon_as_it_works() {
    let nodes = &["0:2", "2:4", "4:6", "2:4", "2:4"];
    let losses = &[(1, "KILL", Moment::Token(4)), (1, "KILL", Moment::Recovered(1))];
    let outcome = run(Case { nodes, losses, ..Case::default() }).await;
    assert_eq!(outcome.recoveries(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn spans_need_not_match() {
    // 0:1 and 5:6 are hosted apart, so that the wide span is the only way at first.
    let nodes = &["0:1", "1:5", "5:6", "1:3", "2:5"];
    let outcome = run(Case { nodes, losses: &[(1, "KILL", Moment::Token(7))], ..Case::default() }).await;
    assert_eq!(outcome.recoveries(), 1);
    assert_eq!(outcome.generation.route.len(), 4);
    outcome.only_what_was_lost_is_computed_again().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_forgotten_is_computed_from_the_tokens() {
    let losses = &[(2, "KILL", Moment::Token(7))];
    let outcome = run(Case { node_args: &["--history-bytes", "0"], losses, ..Case::default() }).await;
    assert_eq!(outcome.recoveries(), 1);
    let (_, replayed, bytes) = outcome.counts(&outcome.generation.route[0].peer_id).await;
    // The hops keep nothing, so the first one begins anew, and passes on what it computes.
    assert!(replayed > 0 && bytes == replayed * ROW_BYTES, "{replayed} {bytes}");
}

#[tokio::test(flavor = "multi_thread")]
async fn positions_that_depend_on_the_length_are_replayed_as_they_were() {
    let dynamic = r#"{"max_position_embeddings": 24, "rope_scaling": {"type": "dynamic", "factor": 2.0}}"#;
    let longrope = r#"{"original_max_position_embeddings": 24, "partial_rotary_factor": 0.75, "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0, 1.05, 1.1, 1.2, 1.3, 1.5], "long_factor": [1.0, 1.5, 2.5, 4.0, 8.0, 16.0]}}"#;
    for (family, changes) in [("llama", dynamic), ("phi3", longrope)] {
        // Past the 24 tokens above which lengths matter.
        let losses = &[(1, "KILL", Moment::Token(9))];
        let outcome = run(Case { family, changes: Some(changes), losses, ..Case::default() }).await;
        assert_eq!(outcome.recoveries(), 1);
    }
}
