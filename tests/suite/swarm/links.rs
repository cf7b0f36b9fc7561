//! Links: kept streams, shared by all who use them.

use std::{sync::Arc, time::Duration};

use helion::swarm::{Frame, LinkError, Multiaddr, SendError, proto::session, rpc};

use super::{PATIENCE, Peer, eventually, number_of, numbered};
use crate::link::{LongLink, Profile};

async fn echo_over(listen: &str) {
    let a = Peer::start(|config| config.listen = vec![listen.parse().unwrap()]).await;
    let b = Peer::start(|config| config.listen.clear()).await;
    let link = b.swarm.link(a.id(), &a.addresses()).await.unwrap();
    assert!(link.opened_by_us());
    let payloads = [0, 1, 8 * 1024, 100_000, 5 << 20, 3];
    for (i, bytes) in payloads.iter().enumerate() {
        link.send(numbered(i as u64, vec![i as u8; *bytes])).unwrap();
    }
    b.service.until("all come back", |echo| echo.answered.lock().unwrap().len() == payloads.len()).await;
    for (i, frame) in b.service.answered.lock().unwrap().iter().enumerate() {
        assert_eq!(number_of(frame), i as u64);
        assert_eq!(frame.payload, vec![i as u8; payloads[i]]);
    }
    b.swarm.stop().await;
    a.service.until("its link is closed", |echo| echo.closed.lock().unwrap().len() == 1).await;
    let closed = a.service.closed.lock().unwrap()[0].clone();
    assert_eq!((closed.peer(), closed.opened_by_us(), closed.is_closed()), (b.id(), false, true));
    assert!(matches!(closed.send(numbered(0, vec![])), Err(SendError::Closed { .. })));
    assert!(b.service.closed.lock().unwrap().len() == 1 && link.is_closed());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn frames_travel_over_tcp() {
    echo_over("/ip4/127.0.0.1/tcp/0").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn frames_travel_over_quic() {
    echo_over("/ip4/127.0.0.1/udp/0/quic-v1").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sessions_that_start_at_once_over_a_long_link_all_start() {
    const SESSIONS: u64 = 256;
    let node = Peer::start(|_| ()).await;
    let target = std::net::SocketAddr::from(([127, 0, 0, 1], port(&node.addresses()[0])));
    let proxy = LongLink::start(target, Profile::round_trip(Duration::from_millis(40)));
    let through: Multiaddr = format!("/ip4/127.0.0.1/tcp/{}", proxy.port()).parse().unwrap();
    let client = Arc::new(Peer::start(|config| config.listen.clear()).await);
    let starts = (0..SESSIONS).map(|session| {
        let (client, through, node) = (client.clone(), through.clone(), node.id());
        tokio::spawn(async move {
            let link = client.swarm.link(node, &[through]).await.unwrap();
            link.send(numbered(session, vec![session as u8; 8 * 1024])).unwrap();
            link.id()
        })
    });
    let links: std::collections::HashSet<_> =
        futures::future::join_all(starts).await.into_iter().map(Result::unwrap).collect();
    assert_eq!(links.len(), 1, "they share one link");
    client.service.until("all are answered", |echo| echo.answered.lock().unwrap().len() == SESSIONS as usize).await;
    let mut numbers: Vec<u64> = client.service.answered.lock().unwrap().iter().map(number_of).collect();
    numbers.sort_unstable();
    assert_eq!(numbers, (0..SESSIONS).collect::<Vec<_>>());
}

fn port(address: &Multiaddr) -> u16 {
    address
        .iter()
        .find_map(|part| match part {
            libp2p::multiaddr::Protocol::Tcp(port) => Some(port),
            _ => None,
        })
        .unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_slow_reader_fills_the_outbox_and_nothing_blocks() {
    let node = Peer::start(|_| ()).await;
    let target = std::net::SocketAddr::from(([127, 0, 0, 1], port(&node.addresses()[0])));
    // A round trip so long that nothing is acknowledged while the test runs.
    let proxy = LongLink::start(target, Profile::round_trip(Duration::from_millis(600)));
    let through: Multiaddr = format!("/ip4/127.0.0.1/tcp/{}", proxy.port()).parse().unwrap();
    let client = Peer::start(|config| {
        config.listen.clear();
        config.tuning.link.outbox_bytes = 4 << 20;
    })
    .await;
    let link = client.swarm.link(node.id(), &[through]).await.unwrap();
    let mut sent = 0;
    let full = loop {
        match link.send(numbered(sent, vec![0; 1 << 20])) {
            Ok(()) => sent += 1,
            Err(error) => break error,
        }
        assert!(sent < 100, "the outbox has no bound");
    };
    assert!(matches!(full, SendError::Full { .. }), "{full}");
    assert!(link.waiting_bytes() > 3 << 20, "{}", link.waiting_bytes());
    // A ping finds room all the same, and its echo comes before those of the last steps.
    let ping = session::frame::Body::Ping(session::Ping { nonce: 5 });
    link.send(Frame::bare(session::Frame { body: Some(ping.clone()), ..session::Frame::default() })).unwrap();
    let is_ping = |frame: &Frame| frame.header.body.as_ref() == Some(&ping);
    client.service.until("the ping comes back", |echo| echo.answered.lock().unwrap().iter().any(is_ping)).await;
    let mut answered = std::mem::take(&mut *client.service.answered.lock().unwrap());
    assert!(answered.len() <= sent as usize, "it overtook some");
    answered.retain(|frame| !is_ping(frame));
    client.service.answered.lock().unwrap().append(&mut answered);
    // What was taken arrives all the same.
    client.service.until("all come back", |echo| echo.answered.lock().unwrap().len() == sent as usize).await;
    assert!(link.send(numbered(sent, vec![0; 1 << 20])).is_ok());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_frame_on_a_slow_way_is_heard_and_moves_before_it_is_there() {
    const LARGE: usize = 8 << 20;
    let node = Peer::start(|_| ()).await;
    let target = std::net::SocketAddr::from(([127, 0, 0, 1], port(&node.addresses()[0])));
    let proxy = LongLink::start(target, Profile::round_trip(Duration::from_millis(50)));
    let through: Multiaddr = format!("/ip4/127.0.0.1/tcp/{}", proxy.port()).parse().unwrap();
    let client = Peer::start(|config| config.listen.clear()).await;
    let link = client.swarm.link(node.id(), &[through]).await.unwrap();
    let (heard, moved) = (link.last_heard(), link.last_progress());
    assert_eq!(link.waiting_bytes(), 0);
    link.send(numbered(1, vec![0; LARGE])).unwrap();
    assert!(link.waiting_bytes() > LARGE && link.last_progress() > moved);
    // Seen while the frame is under way: some bytes were taken, and then some of the answer came.
    let put = link.last_progress();
    eventually("some of it is taken", || async { (link.last_progress() > put).then_some(()) }).await;
    eventually("something is heard", || async { (link.last_heard() > heard).then_some(()) }).await;
    client.service.until("it comes back", |echo| echo.answered.lock().unwrap().len() == 1).await;
    assert_eq!(link.waiting_bytes(), 0);
    assert!(link.last_heard() > put);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn frames_over_the_limit_are_not_sent() {
    let node = Peer::start(|_| ()).await;
    let client = Peer::start(|config| {
        config.listen.clear();
        config.tuning.link.frame.payload_bytes = 1000;
    })
    .await;
    let link = client.swarm.link(node.id(), &node.addresses()).await.unwrap();
    assert!(matches!(link.send(numbered(0, vec![0; 1001])), Err(SendError::TooLarge { .. })));
    link.send(numbered(1, vec![0; 1000])).unwrap();
    client.service.until("it comes back", |echo| !echo.answered.lock().unwrap().is_empty()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_sent_before_stopping_arrives() {
    let node = Peer::start(|_| ()).await;
    let client = Peer::start(|config| config.listen.clear()).await;
    let link = client.swarm.link(node.id(), &node.addresses()).await.unwrap();
    for number in 0..50 {
        link.send(numbered(number, vec![0; 100_000])).unwrap();
    }
    client.swarm.stop().await;
    node.service.until("all have arrived", |echo| echo.asked.lock().unwrap().len() == 50).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_that_was_lost_is_opened_anew() {
    let node = Peer::start(|_| ()).await;
    let client = Peer::start(|config| config.listen.clear()).await;
    let first = client.swarm.link(node.id(), &node.addresses()).await.unwrap();
    first.close();
    client.service.until("the service knows", |echo| echo.closed.lock().unwrap().len() == 1).await;
    let second = client.swarm.link(node.id(), &node.addresses()).await.unwrap();
    assert_ne!(first.id(), second.id());
    second.send(numbered(1, vec![1])).unwrap();
    client.service.until("it comes back", |echo| !echo.answered.lock().unwrap().is_empty()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_peer_opens_its_own_stream_over_one_connection() {
    let (a, b) = (Peer::start(|_| ()).await, Peer::start(|_| ()).await);
    let to_b = a.swarm.link(b.id(), &b.addresses()).await.unwrap();
    // No address is needed: they are connected.
    let to_a = b.swarm.link(a.id(), &[]).await.unwrap();
    to_b.send(numbered(1, vec![1])).unwrap();
    to_a.send(numbered(2, vec![2])).unwrap();
    for (peer, own, others) in [(&a, 1, 2), (&b, 2, 1)] {
        peer.service
            .until("both have come", |echo| {
                !echo.asked.lock().unwrap().is_empty() && !echo.answered.lock().unwrap().is_empty()
            })
            .await;
        assert_eq!(number_of(&peer.service.answered.lock().unwrap()[0]), own);
        assert_eq!(number_of(&peer.service.asked.lock().unwrap()[0]), others);
    }
    assert_eq!(a.swarm.link(b.id(), &[]).await.unwrap().id(), to_b.id());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cut_connection_closes_the_links_on_both_sides() {
    let node = Peer::start(|_| ()).await;
    let target = std::net::SocketAddr::from(([127, 0, 0, 1], port(&node.addresses()[0])));
    let proxy = LongLink::start(target, Profile::round_trip(Duration::ZERO));
    let through: Multiaddr = format!("/ip4/127.0.0.1/tcp/{}", proxy.port()).parse().unwrap();
    let client = Peer::start(|config| config.listen.clear()).await;
    let link = client.swarm.link(node.id(), &[through]).await.unwrap();
    link.send(numbered(1, vec![1])).unwrap();
    client.service.until("it comes back", |echo| !echo.answered.lock().unwrap().is_empty()).await;
    drop(proxy);
    for peer in [&node, &client] {
        peer.service.until("it knows", |echo| echo.closed.lock().unwrap().len() == 1).await;
    }
    assert!(link.is_closed());
    super::eventually("nobody is connected", || async { client.swarm.connected().is_empty().then_some(()) }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn links_and_requests_to_nobody_fail_with_the_reason() {
    let gone = Peer::start(|_| ()).await;
    let (id, addresses) = (gone.id(), gone.addresses());
    gone.swarm.stop().await;
    let client = Peer::start(|config| config.listen.clear()).await;
    let error = client.swarm.link(id, &addresses).await.unwrap_err();
    assert!(matches!(error, LinkError::NotConnected { .. }));
    assert!(error.to_string().contains("refused"), "{error}");
    let error = client.swarm.request(id, &addresses, rpc::Request::info(), PATIENCE).await.unwrap_err();
    assert!(!error.maybe_applied() && error.to_string().contains("refused"), "{error}");
    let error = client.swarm.link(client.id(), &[]).await.unwrap_err();
    assert!(error.to_string().contains("itself"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_opens_links_to_a_client() {
    let node = Peer::start(|_| ()).await;
    let client = Peer::client(&node).await;
    let opened = node.swarm.link(client.id(), &[]).await;
    // Negotiation is lazy, so the refusal may come with the first frame.
    if let Ok(link) = opened {
        let _ = link.send(numbered(0, vec![]));
        node.service.until("it is refused", |_| link.is_closed()).await;
    }
    assert!(client.service.asked.lock().unwrap().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_are_answered() {
    use helion::swarm::proto::rpc::response::Body;
    let node = Peer::start(|_| ()).await;
    let client = Peer::start(|config| config.listen.clear()).await;
    let ask = |request| client.swarm.request(node.id(), &[], request, PATIENCE);
    client.swarm.request(node.id(), &node.addresses(), rpc::Request::info(), PATIENCE).await.unwrap();
    match ask(rpc::Request::info()).await.unwrap().body {
        Some(Body::Info(info)) => assert_eq!(info.sessions, 7),
        other => panic!("{other:?}"),
    }
    match ask(rpc::Request::probe(vec![5; 1000])).await.unwrap().body {
        Some(Body::Probe(probe)) => assert_eq!(probe.payload, vec![5; 1000]),
        other => panic!("{other:?}"),
    }
    match ask(rpc::Request { body: None }).await.unwrap().body {
        Some(Body::Failure(failure)) => assert!(failure.message.contains("doesn't know")),
        other => panic!("{other:?}"),
    }
    super::eventually("a ping was measured", || async { client.swarm.rtt(node.id()) }).await;
    assert_eq!(client.swarm.connected(), [node.id()]);
}
