//! A lost hop is a clear error within seconds that names the peer and its blocks, and never a hang.

use std::time::{Duration, Instant};

use super::harness::{HANG, Place, Running, Server, fixture, join};

/// Starts an endless generation and returns when its first tokens are there.
fn generating(place: &Place, peer: &Server) -> Running {
    let model = fixture("llama").display().to_string();
    let ids = join(&[5; 8]);
    let running = place.start(&[
        "client",
        "generate",
        "--model",
        &model,
        "--initial-peers",
        &peer.address,
        "--no-mdns",
        "--dtype",
        "f32",
        "--input-ids",
        &ids,
        "--max-tokens",
        "500",
        "--ignore-eos",
        "--json-stream",
    ]);
    running.line_with("token_id");
    running
}

/// One hop of three is lost by a signal while tokens are generated. A generation of 500 tokens may be over before the signal
/// comes, so the client is held back for that moment.
fn lose(hop: usize, signal: &str, within: Duration) {
    let place = Place::new();
    let (bootstrap, nodes) = place.swarm(&fixture("llama"), &["0:2", "2:4", "4:6"], &[]);
    let generating = generating(&place, &bootstrap);
    generating.signal("STOP");
    nodes[hop].running.signal(signal);
    let lost = Instant::now();
    generating.signal("CONT");
    let ended = generating.finish();
    assert!(lost.elapsed() < within, "the error came after {:?}", lost.elapsed());
    let blocks = ["0:2", "2:4", "4:6"][hop];
    ended.fails(1, &[&nodes[hop].peer_id, blocks]);
    nodes[hop].running.signal("KILL");
}

#[test]
fn the_first_hop_is_killed() {
    lose(0, "KILL", Duration::from_secs(10));
}

#[test]
fn the_middle_hop_is_killed() {
    lose(1, "KILL", Duration::from_secs(10));
}

#[test]
fn the_last_hop_is_killed() {
    lose(2, "KILL", Duration::from_secs(10));
}

#[test]
fn the_first_hop_freezes() {
    lose(0, "STOP", Duration::from_secs(15));
}

#[test]
fn the_middle_hop_freezes() {
    lose(1, "STOP", Duration::from_secs(15));
}

#[test]
fn the_last_hop_freezes() {
    lose(2, "STOP", Duration::from_secs(15));
}

#[test]
fn a_hop_that_leaves_tells_its_sessions() {
    let place = Place::new();
    let (bootstrap, nodes) = place.swarm(&fixture("llama"), &["0:3", "3:6"], &[]);
    let generating = generating(&place, &bootstrap);
    generating.signal("STOP");
    let mut nodes = nodes.into_iter();
    let leaving = nodes.next().unwrap();
    let peer = leaving.peer_id.clone();
    leaving.terminate();
    generating.signal("CONT");
    generating.finish().fails(1, &[&peer, "0:3"]);
    // It is gone from the swarm at once, not when its announcement expires.
    let status = place.status(&fixture("llama"), &bootstrap);
    assert_eq!(status["missing"], serde_json::json!([[0, 3]]));
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
