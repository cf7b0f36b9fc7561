//! Choosing routes in a swarm that is not as it was: peers that died together, look-ups that fail, a peer that failed and is the only
//! one.

use std::time::{Duration, Instant};

use helion::{
    client::{
        ClientError,
        generation::GenerationOptions,
        session::{Input, Patience, Step, Want},
    },
    engine::LaneRun,
    swarm::ticket::SessionLimits,
};

use super::harness::{HANG, Place, client, fixture, join, reference};

fn options(max_tokens: usize) -> GenerationOptions {
    GenerationOptions { max_tokens, ignore_eos: true, tenant: None, ..GenerationOptions::default() }
}

const LIMITS: SessionLimits = SessionLimits { max_lanes: 1, max_tokens: 64, max_in_flight: 4, max_step_tokens: 40 };

/// More hops than routes are tried, each with a replica: what the client knows is out of date, and costs it a retry.
#[tokio::test(flavor = "multi_thread")]
async fn hops_that_died_together_are_found_out_about_together() {
    let (place, model) = (Place::new(), fixture("llama"));
    let spans = ["0:1", "1:2", "2:3", "3:4", "4:6"];
    let (bootstrap, nodes) = place.swarm(&model, &[spans, spans].concat(), &[]);
    let client = client(&model, &bootstrap, Patience::default()).await;
    let reference = reference(&model);
    let first = client.generate(&reference.prompt, &options(4), &mut |_| {}).await.unwrap();
    assert_eq!(first.route.len(), spans.len());
    for hop in &first.route {
        nodes.iter().find(|node| node.peer_id == hop.peer_id).unwrap().running.signal("KILL");
    }
    let second = client.generate(&reference.prompt, &options(4), &mut |_| {}).await.unwrap();
    assert_eq!(second.output_ids, reference.output[..4]);
    assert!(second.route.iter().all(|hop| !first.route.contains(hop)));
}

/// Whoever waits for a swarm waits for those who could tell of it as well.
#[tokio::test(flavor = "multi_thread")]
async fn a_look_up_that_fails_does_not_end_the_wait() {
    const WAIT: Duration = Duration::from_secs(2);
    let (place, model) = (Place::new(), fixture("llama"));
    let bootstrap = place.bootstrap();
    let client = client(&model, &bootstrap, Patience::default()).await;
    bootstrap.running.signal("KILL");
    let begun = Instant::now();
    let error = client.open_session(LIMITS, WAIT).await.err().unwrap();
    assert!(begun.elapsed() >= WAIT, "{error} after {:?}", begun.elapsed());
    assert!(matches!(error, ClientError::Discover(_) | ClientError::Incomplete(_)), "{error}");
}

/// A peer that failed is avoided where there are others. The only one that there is serves as soon as it is back.
#[tokio::test(flavor = "multi_thread")]
async fn the_only_peer_of_a_block_is_used_however_often_it_failed() {
    let (place, model) = (Place::new(), fixture("llama"));
    let bootstrap = place.bootstrap();
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let key = place.path().join("kept.key").display().to_string();
    let listen = format!("/ip4/127.0.0.1/tcp/{port}");
    let args = ["--blocks", "0:6", "--host-maddrs", &listen, "--identity-path", &key];
    let node = place.node(&model, &bootstrap, &args);
    let client = client(&model, &bootstrap, Patience::default()).await;
    client.generate(&[1, 2, 3], &options(2), &mut |_| {}).await.unwrap();
    node.running.signal("KILL");
    drop(node);
    for _ in 0..3 {
        assert!(client.generate(&[1, 2, 3], &options(2), &mut |_| {}).await.is_err());
    }
    let _back = place.node(&model, &bootstrap, &args);
    let begun = Instant::now();
    let options = GenerationOptions { wait: HANG, ..options(2) };
    client.generate(&[1, 2, 3], &options, &mut |_| {}).await.unwrap();
    // Three failures are worth 14 s.
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
}

/// The step was the client's mistake: the hop that said so is the one to take again.
#[tokio::test(flavor = "multi_thread")]
async fn a_refused_step_is_not_held_against_the_hop() {
    let (place, model) = (Place::new(), fixture("llama"));
    let (bootstrap, _nodes) = place.swarm(&model, &["0:6", "0:3", "3:6"], &[]);
    let client = client(&model, &bootstrap, Patience::default()).await;
    let step = |position| Step {
        lanes: vec![LaneRun { lane: 0, position, tokens: 2 }],
        input: Input::Tokens(vec![1, 2]),
        want: Want::Last,
        rope_length: None,
    };
    let (mut session, route) = client.open_session(LIMITS, HANG).await.unwrap();
    assert_eq!(route.hops.len(), 1, "the single hop is the nearest route");
    session.send(step(7)).unwrap();
    let error = session.receive().await.unwrap_err();
    assert!(!error.is_repairable(), "{error}");
    drop(session);
    let (mut session, again) = client.open_session(LIMITS, HANG).await.unwrap();
    assert_eq!(again.hops[0].announcement.peer_id, route.hops[0].announcement.peer_id);
    session.send(step(0)).unwrap();
    session.receive().await.unwrap();
}

#[test]
fn a_route_mode_that_there_is_not_is_a_wrong_usage() {
    let (place, model) = (Place::new(), fixture("llama"));
    let bootstrap = place.bootstrap();
    place.generate(&model, &bootstrap, &[1], &["--route-mode", "fastest"]).fails(2, &["auto, latency and throughput"]);
    let _node = place.node(&model, &bootstrap, &["--blocks", "0:6"]);
    let name = model.display().to_string();
    let ids = join(&[1, 2, 3]);
    let base = ["client", "generate", "--model", &name, "--initial-peers", &bootstrap.address, "--no-mdns", "--dtype"];
    let more = ["f32", "--input-ids", &ids, "--max-tokens", "2", "--json", "--route-mode", "throughput"];
    assert!(place.run(&[&base[..], &more].concat()).status.success());
}
