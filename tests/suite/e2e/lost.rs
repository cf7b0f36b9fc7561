//! Lost hops: the generation goes on with the same tokens, and only what was lost is computed again. Where nobody can take a
//! lost hop's place, a clear error within seconds names the peer and its blocks.

use std::time::{Duration, Instant};

use serde_json::Value;

use super::harness::{HANG, Place, Running, Server, fixture, join, numbers};

/// What the README says: how long the command line's client takes to notice that a hop has fallen silent.
const SILENCE_IS_NOTICED: Duration = Duration::from_secs(5);

/// A prompt that takes a few chunks.
const PROMPT: [u32; 40] = [5; 40];

/// Arguments of an endless generation with 500 tokens, told token by token.
fn endless<'a>(peer: &'a Server, model: &'a str, ids: &'a str) -> Vec<&'a str> {
    let mut args = vec!["client", "generate", "--model", model, "--initial-peers", &peer.address, "--no-mdns"];
    args.extend(["--dtype", "f32", "--input-ids", ids, "--max-tokens", "400", "--ignore-eos", "--json-stream"]);
    args
}

/// A generation that runs, and the peers of its route.
struct Generating {
    running: Running,
    route: Vec<String>,
}

/// Starts an endless generation, and holds it when its first tokens are there: it may be over before a signal comes.
fn generating(place: &Place, family: &str, peer: &Server, more: &[&str]) -> Generating {
    let (model, ids) = (fixture(family).display().to_string(), join(&PROMPT));
    let running = place.start(&[&endless(peer, &model, &ids), more].concat());
    let route: Value = serde_json::from_str(&running.line_with("route")).unwrap();
    let hops = route["route"].as_array().unwrap();
    let route = hops.iter().map(|hop| hop["peer_id"].as_str().unwrap().to_owned()).collect();
    running.line_with("token_id");
    running.signal("STOP");
    Generating { running, route }
}

impl Generating {
    /// The node that is this hop.
    fn hop<'a>(&self, hop: usize, nodes: &'a [Server]) -> &'a Server {
        nodes.iter().find(|node| node.peer_id == self.route[hop]).unwrap()
    }

    /// Goes on to the end, which must be a good one. Returns the result and the recoveries.
    fn finish(self) -> (Value, Vec<Value>) {
        let (result, recoveries, _) = self.finish_timed();
        (result, recoveries)
    }

    /// And the longest time in which it printed nothing.
    fn finish_timed(self) -> (Value, Vec<Value>, Duration) {
        self.running.signal("CONT");
        let (mut recoveries, mut last_line, mut longest_gap) = (Vec::new(), Instant::now(), Duration::ZERO);
        let result = loop {
            let line = self.running.line_with("{");
            longest_gap = longest_gap.max(last_line.elapsed());
            last_line = Instant::now();
            let line: Value = serde_json::from_str(&line).unwrap();
            if line.get("output_ids").is_some() {
                break line;
            }
            recoveries.extend(Some(line).filter(|line| line.get("recovery").is_some()));
        };
        let ended = self.running.finish();
        assert!(ended.status.success(), "{ended:?}");
        (result, recoveries, longest_gap)
    }
}

/// What one node computes for the same prompt.
fn undisturbed(place: &Place, family: &str, peer: &Server) -> Vec<u32> {
    let model = fixture(family);
    let result = place.generate(&model, peer, &PROMPT, &["--max-tokens", "400", "--ignore-eos"]).json();
    assert_eq!(result["recoveries"], 0);
    numbers(&result["output_ids"])
}

/// One hop of three is lost by a signal while tokens are generated, and it was the only one of its blocks.
fn no_replacement(hop: usize, signal: &str, within: Duration) {
    let place = Place::new();
    let (bootstrap, nodes) = place.swarm(&fixture("llama"), &["0:2", "2:4", "4:6"], &[]);
    let generating = generating(&place, "llama", &bootstrap, &["--recovery-wait", "1"]);
    nodes[hop].running.signal(signal);
    let lost = Instant::now();
    generating.running.signal("CONT");
    let ended = generating.running.finish();
    assert!(lost.elapsed() < within, "the error came after {:?}", lost.elapsed());
    let blocks = ["0:2", "2:4", "4:6"][hop];
    ended.fails(1, &[&nodes[hop].peer_id, blocks, &format!("no peer serves blocks {blocks}")]);
    nodes[hop].running.signal("KILL");
}

#[test]
fn the_only_peer_of_the_first_blocks_is_killed() {
    no_replacement(0, "KILL", Duration::from_secs(12));
}

#[test]
fn the_only_peer_of_the_last_blocks_freezes() {
    no_replacement(2, "STOP", Duration::from_secs(20));
}

/// One of three hops is lost while there is another peer for its blocks: the tokens are those of an undisturbed run, and the pause is
/// as short as the README says.
fn replaced(family: &str, hop: usize, signal: &str) {
    let noticed = if signal == "STOP" { SILENCE_IS_NOTICED } else { Duration::ZERO };
    let mut gaps = Vec::new();
    while gaps.last().is_none_or(|gap| *gap >= noticed + Duration::from_secs(1)) {
        // The machine may be busy.
        assert!(gaps.len() < 3, "nothing came for {gaps:?}");
        gaps.push(gap_of_a_loss(family, hop, signal));
    }
}

fn gap_of_a_loss(family: &str, hop: usize, signal: &str) -> Duration {
    let spans = ["0:2", "2:4", "4:6"];
    let place = Place::new();
    let (bootstrap, nodes) = place.swarm(&fixture(family), &[&spans[..], &spans[hop..=hop]].concat(), &[]);
    let expected = undisturbed(&place, family, &bootstrap);
    let generating = generating(&place, family, &bootstrap, &[]);
    let lost = generating.hop(hop, &nodes);
    let spare = nodes.iter().find(|node| !generating.route.contains(&node.peer_id)).unwrap();
    lost.running.signal(signal);
    let (result, recoveries, longest_gap) = generating.finish_timed();
    assert_eq!(numbers(&result["output_ids"]), expected);
    assert_eq!((&result["recoveries"], &result["exact"]), (&1.into(), &true.into()));
    let recovery = &recoveries[0]["recovery"];
    assert_eq!((&recovery["hop"], &recovery["lost"]), (&(hop + 1).into(), &lost.peer_id.as_str().into()));
    assert_eq!(recovery["replacement"][0]["peer_id"], spare.peer_id);
    assert_eq!(recoveries[0]["route"][hop]["peer_id"], spare.peer_id);
    lost.running.signal("KILL");
    longest_gap
}

#[test]
fn the_first_hop_is_killed() {
    replaced("llama", 0, "KILL");
}

#[test]
fn the_middle_hop_is_killed() {
    replaced("qwen3", 1, "KILL");
}

#[test]
fn the_last_hop_is_killed() {
    replaced("mistral", 2, "KILL");
}

#[test]
fn a_hop_freezes_and_is_noticed_in_the_stated_time() {
    replaced("qwen2", 1, "STOP");
}

#[test]
fn a_hop_that_leaves_waits_until_its_sessions_are_elsewhere() {
    let place = Place::new();
    let (bootstrap, nodes) = place.swarm(&fixture("llama"), &["0:3", "3:6", "0:3"], &[]);
    let expected = undisturbed(&place, "llama", &bootstrap);
    let generating = generating(&place, "llama", &bootstrap, &[]);
    let leaving = generating.route[0].clone();
    let (mut leaving, others): (Vec<_>, Vec<_>) = nodes.into_iter().partition(|node| node.peer_id == leaving);
    // Not by a signal, but by whoever holds its key.
    let leaving = leaving.pop().unwrap();
    let asked = place.run(&["node", "drain", &leaving.address, "--identity-path", &leaving.key]);
    assert!(asked.status.success() && asked.stdout.contains("elsewhere: 1"), "{asked:?}");
    let (result, recoveries) = generating.finish();
    assert_eq!(numbers(&result["output_ids"]), expected);
    assert_eq!(recoveries.len(), 1);
    leaving.ends_well();
    drop(others);
}

#[test]
fn a_hop_that_leaves_serves_on_where_there_is_no_other() {
    let place = Place::new();
    let (bootstrap, nodes) = place.swarm(&fixture("llama"), &["0:3", "3:6"], &[]);
    let generating = generating(&place, "llama", &bootstrap, &[]);
    let mut nodes = nodes.into_iter();
    let leaving = nodes.next().unwrap();
    leaving.running.signal("TERM");
    let (result, recoveries) = generating.finish();
    assert_eq!((numbers(&result["output_ids"]).len(), recoveries.len()), (400, 0));
    leaving.ends_well();
    // It is gone from the swarm at once, not when its announcement expires.
    let status = place.status(&fixture("llama"), &bootstrap);
    assert_eq!(status["missing"], serde_json::json!([[0, 3]]));
}

#[test]
fn only_the_owner_may_ask_a_node_to_leave() {
    let place = Place::new();
    let (bootstrap, nodes) = place.swarm(&fixture("llama"), &["0:6"], &[]);
    let other = place.path().join("other.key").display().to_string();
    assert!(place.run(&["identity", "new", &other]).status.success());
    place.run(&["node", "drain", &nodes[0].address, "--identity-path", &other]).fails(2, &["is the key of"]);
    let result = place.generate(&fixture("llama"), &bootstrap, &[1, 2], &["--max-tokens", "3"]);
    assert!(result.status.success(), "{result:?}");
}

#[test]
fn a_dead_peer_that_is_still_announced_is_not_used() {
    let place = Place::new();
    let (bootstrap, nodes) = place.swarm(&fixture("llama"), &["0:6"], &[]);
    nodes[0].running.signal("KILL");
    let started = Instant::now();
    place.generate(&fixture("llama"), &bootstrap, &[1, 2], &[]).fails(1, &["no peer serves blocks 0:6"]);
    assert!(started.elapsed() < HANG / 3);
    let _replacement = place.node(&fixture("llama"), &bootstrap, &["--blocks", "0:6"]);
    let result = place.generate(&fixture("llama"), &bootstrap, &[1, 2], &["--max-tokens", "3"]);
    assert!(result.status.success(), "{result:?}");
}
