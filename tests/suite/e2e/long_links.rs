//! Long links, out of loopback and a proxy that delays: what is sent along with what, and what waits for what.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use helion::{
    client::{
        Client, RouteMode, Work,
        generation::{GenerationEvent, GenerationOptions},
        session::{Input, Patience, Session, Step, Want},
    },
    engine::LaneRun,
    swarm::ticket::SessionLimits,
};

use super::harness::{HANG, Place, Server, client, fixture, reference};
use crate::link::{LongLink, Profile};

const LIMITS: SessionLimits = SessionLimits { max_lanes: 1, max_tokens: 64, max_in_flight: 4, max_step_tokens: 40 };

/// A node that everybody else reaches over a long link.
pub(super) struct FarNode {
    pub(super) proxy: LongLink,
    pub(super) node: Server,
}

impl FarNode {
    pub(super) fn start(place: &Place, model: &Path, peer: &Server, blocks: &str, profile: Profile) -> Self {
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let proxy = LongLink::start(([127, 0, 0, 1], port).into(), profile);
        let (listen, announce) = (format!("/ip4/127.0.0.1/tcp/{port}"), format!("/ip4/127.0.0.1/tcp/{}", proxy.port()));
        let args = ["--blocks", blocks, "--host-maddrs", &listen, "--announce-maddrs", &announce];
        Self { node: place.node(model, peer, &args), proxy }
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
        nodes.push(FarNode::start(&place, &model, &bootstrap, blocks, Profile::round_trip(ROUND_TRIP)));
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
    let _node = FarNode::start(&place, &model, &bootstrap, "0:6", Profile::round_trip(Duration::from_millis(40)));
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

#[tokio::test(flavor = "multi_thread")]
async fn one_token_takes_the_short_link_and_a_long_prompt_the_wide_one() {
    let (place, model) = (Place::new(), fixture("llama"));
    let bootstrap = place.bootstrap();
    let ms = Duration::from_millis;
    let near = Profile { one_way: ms(5), bits_per_second: Some(3e5) };
    let wide = Profile { one_way: ms(60), bits_per_second: None };
    let near = FarNode::start(&place, &model, &bootstrap, "0:6", near);
    let wide = FarNode::start(&place, &model, &bootstrap, "0:6", wide);
    let client = client(&model, &bootstrap, Patience::default()).await;
    // Both are known before there is a choice.
    let mut view = client.observer().look_up().await.unwrap();
    client.observer().measure(&mut view, false).await;
    let through = async |client: &Client, work| {
        let (_, route) = client.open_session_for(work, LIMITS, HANG).await.unwrap();
        route.hops[0].announcement.peer_id.to_string()
    };
    assert_eq!(through(&client, Work::DECODE).await, near.node.peer_id);
    // How wide the links are is measured while the client has other things to do: nobody's first token waits for it.
    let long = Work::prompt(400, 16);
    let begun = Instant::now();
    through(&client, long).await;
    assert!(begun.elapsed() < ms(1000), "an echo over the narrow link takes longer: {:?}", begun.elapsed());
    while through(&client, long).await != wide.node.peer_id {
        assert!(begun.elapsed() < HANG, "the bandwidth is never known");
        tokio::time::sleep(ms(50)).await;
    }
    for (mode, work, expected) in [
        (RouteMode::Latency, long, &near),
        (RouteMode::Throughput, Work::DECODE, &wide),
        (RouteMode::Auto, long, &wide),
    ] {
        let client = client.clone().with_route_mode(mode);
        assert_eq!(through(&client, work).await, expected.node.peer_id, "{mode}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_moves_to_a_much_better_peer_that_joins() {
    const TOKENS: usize = 120;
    let (place, model) = (Place::new(), fixture("llama"));
    let bootstrap = place.bootstrap();
    let round_trip = Duration::from_millis(250);
    let far = FarNode::start(&place, &model, &bootstrap, "0:6", Profile::round_trip(round_trip));
    let client = client(&model, &bootstrap, Patience::default()).await;
    let prompt = reference(&model).prompt;
    let options = GenerationOptions { max_tokens: TOKENS, ignore_eos: true, wait: HANG, ..Default::default() };
    let (mut routes, mut tokens, mut near) = (Vec::new(), 0, None);
    let begun = Instant::now();
    let mut watch = |event| match event {
        GenerationEvent::Route { route } => routes.push(route[0].peer_id.clone()),
        GenerationEvent::Token { .. } => {
            tokens += 1;
            if tokens == 3 {
                near = Some(place.node(&model, &bootstrap, &["--blocks", "0:6"]));
            }
        }
        GenerationEvent::Recovery { .. } => panic!("nothing was lost"),
    };
    let moved = client.generate(&prompt, &options, &mut watch).await.unwrap();
    let near = near.unwrap();
    assert_eq!(routes, [far.node.peer_id.clone(), near.peer_id.clone()]);
    assert_eq!((moved.route[0].peer_id.as_str(), moved.recoveries, moved.exact), (near.peer_id.as_str(), 0, true));
    assert!(begun.elapsed() < (TOKENS as u32) * round_trip, "{:?}", begun.elapsed());
    let undisturbed = client.generate(&prompt, &options, &mut |_| {}).await.unwrap();
    assert_eq!(moved.output_ids, undisturbed.output_ids);
}
