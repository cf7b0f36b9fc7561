//! The DHT: who serves what, as a fresh client sees it.

use std::{collections::HashSet, time::Duration};

use futures::{StreamExt, stream};
use helion::swarm::{DiscoverError, PeerId, Role, State};

use super::{PATIENCE, Peer, announcement, eventually};

const MODEL: &str = "tests/Eighty-Blocks";

/// The spans of 48 nodes over 80 blocks, of different lengths, all starting somewhere else.
fn span(node: usize) -> std::ops::Range<usize> {
    let start = (node * 7) % 70;
    start..(start + 4 + node % 13).min(80)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_fresh_client_sees_a_swarm_of_48_with_at_most_150_requests() {
    let first = Peer::start(|_| ()).await;
    let mut nodes: Vec<Peer> = stream::iter(1..48).map(|_| Peer::joined(&first)).buffer_unordered(4).collect().await;
    nodes.push(first);
    stream::iter(nodes.iter().enumerate())
        .for_each_concurrent(8, |(i, node)| async move {
            node.swarm.announce(announcement(node, MODEL, span(i))).await.unwrap();
        })
        .await;
    let started = std::time::Instant::now();
    let client = Peer::start(|config| {
        config.role = Role::Client;
        config.listen.clear();
        config.initial_peers = vec![nodes[47].address()];
    })
    .await;
    let joined = client.swarm.join(PATIENCE).await.unwrap();
    let joining = started.elapsed();
    let discovery = client.swarm.discover(MODEL, 80).await.unwrap();
    let looking = started.elapsed() - joining;
    println!("{} + {} requests, {joining:?} + {looking:?}", joined.requests, discovery.requests);
    let seen: HashSet<PeerId> = discovery.announcements.iter().map(|a| a.peer_id).collect();
    let missing: Vec<usize> = (0..48).filter(|i| !seen.contains(&nodes[*i].id())).collect();
    assert!(missing.is_empty(), "not seen: {missing:?}");
    for announcement in &discovery.announcements {
        let node = nodes.iter().position(|node| node.id() == announcement.peer_id).unwrap();
        assert_eq!(announcement.span, span(node));
        assert_eq!(announcement.addresses, nodes[node].addresses());
    }
    let requests = joined.requests + discovery.requests;
    assert!(requests <= 150, "{} + {} requests", joined.requests, discovery.requests);
    // A warm client asks one peer that it knows.
    let exchanged = client.swarm.exchange(nodes[47].id(), MODEL).await.unwrap();
    assert!(!exchanged.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changes_and_leaving_are_seen() {
    let a = Peer::start(|_| ()).await;
    let b = Peer::joined(&a).await;
    b.swarm.announce(announcement(&b, MODEL, 0..20)).await.unwrap();
    let client = Peer::client(&a).await;
    let seen = client.swarm.discover(MODEL, 80).await.unwrap().announcements;
    assert_eq!((seen.len(), seen[0].span.clone(), seen[0].state), (1, 0..20, State::Online));

    // Another span, touching none of the old segments, and another state.
    let mut moved = announcement(&b, MODEL, 60..80);
    moved.state = State::Draining;
    b.swarm.announce(moved).await.unwrap();
    let seen = client.swarm.discover(MODEL, 80).await.unwrap().announcements;
    assert_eq!((seen.len(), seen[0].span.clone(), seen[0].state), (1, 60..80, State::Draining));
    // A look-up of the old segments alone doesn't find the old entry either.
    assert!(client.swarm.discover(MODEL, 32).await.unwrap().announcements.is_empty());

    b.swarm.withdraw().await;
    assert!(client.swarm.discover(MODEL, 80).await.unwrap().announcements.is_empty());
    // And back again, at once.
    b.swarm.announce(announcement(&b, MODEL, 0..80)).await.unwrap();
    assert_eq!(client.swarm.discover(MODEL, 80).await.unwrap().announcements.len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn prefixes_do_not_mix_and_models_are_listed() {
    let a = Peer::start(|_| ()).await;
    let b = Peer::joined(&a).await;
    a.swarm.announce(announcement(&a, "tests/one", 0..80)).await.unwrap();
    b.swarm.announce(announcement(&b, "tests/two", 0..40)).await.unwrap();
    let client = Peer::client(&a).await;
    for (prefix, node) in [("tests/one", &a), ("tests/two", &b)] {
        let seen = client.swarm.discover(prefix, 80).await.unwrap().announcements;
        assert_eq!(seen.iter().map(|a| a.peer_id).collect::<Vec<_>>(), [node.id()]);
        let exchanged = client.swarm.exchange(a.id(), prefix).await.unwrap();
        assert!(exchanged.iter().all(|announcement| announcement.dht_prefix == prefix));
    }
    assert!(client.swarm.discover("tests/three", 80).await.unwrap().announcements.is_empty());
    let models = client.swarm.models().await.unwrap();
    let listed: Vec<(&str, usize)> = models.iter().map(|m| (m.dht_prefix.as_str(), m.model_blocks)).collect();
    assert_eq!(listed, [("tests/one", 80), ("tests/two", 80)]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn announcements_are_renewed_and_expire_without() {
    let a = Peer::start(|_| ()).await;
    let b = Peer::start(|config| {
        config.initial_peers = vec![a.address()];
        config.tuning.renew_every = Duration::from_millis(100);
        config.tuning.announcement_lifetime = Duration::from_millis(1500);
    })
    .await;
    b.swarm.join(PATIENCE).await.unwrap();
    b.swarm.announce(announcement(&b, MODEL, 0..80)).await.unwrap();
    let client = Peer::client(&a).await;
    let see = || async { client.swarm.discover(MODEL, 80).await.unwrap().announcements.pop() };
    let first = see().await.unwrap().sequence;
    eventually("a renewal is seen", || async { see().await.filter(|seen| seen.sequence > first) }).await;
    // Gone without a word: nothing is renewed any more.
    b.swarm.stop().await;
    eventually("it expires", || async { see().await.is_none().then_some(()) }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_is_alone_sees_itself_and_a_client_says_so() {
    let alone = Peer::start(|_| ()).await;
    alone.swarm.announce(announcement(&alone, MODEL, 0..80)).await.unwrap();
    assert_eq!(alone.swarm.discover(MODEL, 80).await.unwrap().announcements.len(), 1);
    let client = Peer::start(|config| {
        config.role = Role::Client;
        config.listen.clear();
    })
    .await;
    assert!(matches!(client.swarm.discover(MODEL, 80).await, Err(DiscoverError::Alone)));
    assert!(matches!(client.swarm.models().await, Err(DiscoverError::Alone)));
    assert!(matches!(client.swarm.discover("", 80).await, Err(DiscoverError::Prefix(_))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_comes_back_is_seen_as_it_is_now() {
    let dir = tempfile::tempdir().unwrap();
    let key = dir.path().join("node.key");
    let a = Peer::start(|_| ()).await;
    let client = Peer::client(&a).await;
    let initial = a.address();
    for span in [0..16, 16..32] {
        let identity = helion::swarm::Identity::load_or_create(&key).unwrap();
        let b = Peer::start_as(identity, |config| config.initial_peers = vec![initial.clone()]).await;
        b.swarm.join(PATIENCE).await.unwrap();
        // Dropped without leaving: the old entry stands, and the new one has a higher sequence.
        b.swarm.announce(announcement(&b, MODEL, span.clone())).await.unwrap();
        let seen = client.swarm.discover(MODEL, 80).await.unwrap().announcements;
        assert_eq!(seen.iter().map(|a| a.span.clone()).collect::<Vec<_>>(), std::slice::from_ref(&span));
        b.swarm.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leaving_does_not_wait_for_an_announcement_that_hangs() {
    let a = Peer::start(|_| ()).await;
    let b = Peer::joined(&a).await;
    let mut hanging = Box::pin(b.swarm.announce(announcement(&b, MODEL, 0..80)));
    // It has begun, and nothing drives it any further.
    assert!(futures::poll!(&mut hanging).is_pending());
    tokio::time::timeout(PATIENCE, b.swarm.withdraw()).await.expect("leaving ends");
    hanging.await.unwrap();
    let client = Peer::client(&a).await;
    assert!(client.swarm.discover(MODEL, 80).await.unwrap().announcements.is_empty());
}
