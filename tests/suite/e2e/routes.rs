//! Choosing routes in a swarm that is not as it was: peers that died together, look-ups that fail, a peer that failed and is the only
//! one.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use futures::future::BoxFuture;
use helion::{
    client::{
        ClientError,
        generation::{GenerationEvent, GenerationOptions},
        session::{Input, Patience, Step, Want},
    },
    engine::LaneRun,
    swarm::{
        Frame, Link, PeerId, Service,
        proto::{rpc, session as proto},
        ticket::SessionLimits,
    },
};

use super::{
    harness::{HANG, Place, client, fixture, join, reference},
    long_links::FarNode,
    sessions::info,
    strangers::{pass_for_honest, server},
};
use crate::link::Profile;

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
    let (bootstrap, nodes) = place.swarm(&model, &["0:6"], &[]);
    // Whoever avoids the near one goes there.
    let _far = FarNode::start(&place, &model, &bootstrap, "0:6", Profile::round_trip(Duration::from_secs(1)));
    let client = client(&model, &bootstrap, Patience::default()).await;
    let step = |position| Step {
        lanes: vec![LaneRun { lane: 0, position, tokens: 2 }],
        input: Input::Tokens(vec![1, 2]),
        want: Want::Last,
        rope_length: None,
    };
    let (mut session, route) = client.open_session(LIMITS, HANG).await.unwrap();
    assert_eq!(route.hops[0].announcement.peer_id.to_string(), nodes[0].peer_id);
    session.send(step(7)).unwrap();
    let error = session.receive().await.unwrap_err();
    assert!(!error.is_repairable(), "{error}");
    drop(session);
    let (mut session, again) = client.open_session(LIMITS, HANG).await.unwrap();
    assert_eq!(again.hops[0].announcement.peer_id, route.hops[0].announcement.peer_id);
    session.send(step(0)).unwrap();
    session.receive().await.unwrap();
}

/// A peer that looks well, and takes no session.
struct Refusing(AtomicU32);

impl Service for Refusing {
    fn frame(&self, link: &Link, frame: Frame) {
        use proto::frame::Body;
        let header = frame.header;
        let body = match header.body {
            Some(Body::Open(_)) => {
                self.0.fetch_add(1, Ordering::Relaxed);
                let (code, blame) = (proto::Code::Busy.into(), proto::Blame::Nobody.into());
                Body::Fault(proto::Fault { code, blame, ..Default::default() })
            }
            Some(Body::Ping(ping)) => Body::Pong(proto::Pong { nonce: ping.nonce }),
            _ => return,
        };
        // The other end may be gone by now.
        let _ = link.send(Frame::bare(proto::Frame { body: Some(body), ..header }));
    }

    fn link_closed(&self, _link: &Link) {}

    fn request(&self, _from: PeerId, _request: rpc::Request) -> BoxFuture<'static, rpc::Response> {
        Box::pin(std::future::ready(rpc::Response::default()))
    }
}

/// What the old hop holds is given up when the new one has taken the session, and not before.
#[tokio::test(flavor = "multi_thread")]
async fn a_better_peer_that_refuses_costs_a_session_nothing() {
    let (place, model) = (Place::new(), fixture("llama"));
    let bootstrap = place.bootstrap();
    let far = FarNode::start(&place, &model, &bootstrap, "0:6", Profile::round_trip(Duration::from_millis(300)));
    let client = client(&model, &bootstrap, Patience::default()).await;
    let reference = reference(&model);
    let options = GenerationOptions { wait: HANG, ..options(reference.output.len()) };
    let refusing = Arc::new(Refusing(AtomicU32::new(0)));
    let (asked, joined) = (refusing.clone(), server(&bootstrap, refusing).await);
    let mut joining = None;
    let mut join = |event| {
        if let (GenerationEvent::Token { .. }, None) = (event, &joining) {
            let (client, swarm) = (client.clone(), joined.clone());
            joining = Some(tokio::spawn(async move {
                pass_for_honest(&swarm, &client, 0..6).await;
                let mut view = client.observer().look_up().await.unwrap();
                client.observer().measure(&mut view, false).await;
            }));
        }
    };
    let generation = client.generate(&reference.prompt, &options, &mut join).await.unwrap();
    assert_eq!((generation.output_ids, generation.recoveries), (reference.output.clone(), 0));
    assert_eq!(generation.route[0].peer_id, far.node.peer_id);
    assert!(asked.0.load(Ordering::Relaxed) > 0, "it was never tried");
    let info = info(&client, &far.node).await;
    let rows = reference.prompt.len() + reference.output.len() - 1;
    assert_eq!((info.tokens as usize, info.tokens_replayed), (rows, 0));
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
