//! Long links, out of loopback and a proxy that delays: what is sent along with what, and what waits for what.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use helion::{
    client::session::{Input, Patience, Session, Step, Want},
    engine::LaneRun,
    swarm::ticket::SessionLimits,
};

use super::harness::{HANG, Place, Server, client, fixture};
use crate::proxy::DelayingProxy;

const LIMITS: SessionLimits = SessionLimits { max_lanes: 1, max_tokens: 64, max_in_flight: 4, max_step_tokens: 40 };

/// A node that everybody else reaches over a long link.
struct FarNode {
    _proxy: DelayingProxy,
    _node: Server,
}

impl FarNode {
    async fn start(place: &Place, model: &Path, peer: &Server, blocks: &str, round_trip: Duration) -> Self {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let proxy = DelayingProxy::start(([127, 0, 0, 1], port).into(), round_trip).await;
        let (listen, announce) = (format!("/ip4/127.0.0.1/tcp/{port}"), format!("/ip4/127.0.0.1/tcp/{}", proxy.port()));
        let args = ["--blocks", blocks, "--host-maddrs", &listen, "--announce-maddrs", &announce];
        Self { _node: place.node(model, peer, &args), _proxy: proxy }
    }
}

fn step(ids: &[u32], position: usize) -> Step {
    Step {
        lanes: vec![LaneRun { lane: 0, position, tokens: ids.len() }],
        input: Input::Tokens(ids.to_vec()),
        want: Want::Last,
        rope_length: None,
    }
}

async fn take_step(session: &mut Session, position: usize) -> Duration {
    let begun = Instant::now();
    session.send(step(&[5], position)).unwrap();
    session.receive().await.unwrap();
    begun.elapsed()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_warm_clients_session_is_opened_by_its_first_step() {
    const ROUND_TRIP: Duration = Duration::from_millis(100);
    let (place, model) = (Place::new(), fixture("llama"));
    let bootstrap = place.bootstrap();
    let mut nodes = Vec::new();
    for blocks in ["0:2", "2:4", "4:6"] {
        nodes.push(FarNode::start(&place, &model, &bootstrap, blocks, ROUND_TRIP).await);
    }
    let client = client(&model, &bootstrap, Patience::default()).await;
    let (mut session, _) = client.open_session(LIMITS, HANG).await.unwrap();
    take_step(&mut session, 0).await;
    let mut added = Vec::new();
    for _ in 0..5 {
        let begun = Instant::now();
        let (mut session, _) = client.open_session(LIMITS, Duration::ZERO).await.unwrap();
        take_step(&mut session, 0).await;
        let first = begun.elapsed();
        let next = take_step(&mut session, 1).await;
        assert!(next >= 2 * ROUND_TRIP, "three hops are four links: {next:?}");
        added.push(first.saturating_sub(next));
    }
    added.sort();
    assert!(added[2] <= ROUND_TRIP.mul_f64(0.2), "opening adds {added:?} to the first step");
}

/// The client reaches the node over a link with a 40 ms round trip.
#[tokio::test(flavor = "multi_thread")]
async fn many_sessions_that_start_at_once_over_a_long_link_all_start() {
    const SESSIONS: usize = 256;
    let (place, model) = (Place::new(), fixture("llama"));
    let bootstrap = place.bootstrap();
    let _node = FarNode::start(&place, &model, &bootstrap, "0:6", Duration::from_millis(40)).await;
    let client = client(&model, &bootstrap, Patience::default()).await;
    let begun = Instant::now();
    let mut sessions = tokio::task::JoinSet::new();
    for _ in 0..SESSIONS {
        let client = client.clone();
        sessions.spawn(async move {
            let (mut session, _) = client.open_session(LIMITS, Duration::ZERO).await.unwrap();
            session.send(step(&[1, 2, 3], 0)).unwrap();
            let answer = session.receive().await.unwrap();
            client.model().edges().logits(&answer.hidden.unwrap()).unwrap()
        });
    }
    let logits = sessions.join_all().await;
    assert_eq!(logits.len(), SESSIONS);
    assert!(logits.windows(2).all(|pair| pair[0] == pair[1]), "the same prompt gives the same logits");
    assert!(begun.elapsed() < HANG);
}
