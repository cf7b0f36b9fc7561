//! Starting and joining: what works, and what the errors say.

use std::{
    sync::{Arc, OnceLock},
    time::Duration,
};

use futures::future::BoxFuture;
use helion::swarm::{
    Frame, Identity, JoinError, Link, Multiaddr, PeerId, Role, Service, StartError, Swarm, SwarmConfig, WeakSwarm, rpc,
};

use super::{Echo, PATIENCE, Peer, eventually};

async fn start_error(listen: &[Multiaddr]) -> StartError {
    let mut config = SwarmConfig::new(Identity::ephemeral(), Role::Server);
    config.listen = listen.to_vec();
    Swarm::start(config, Arc::new(Echo::default())).await.unwrap_err()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_port_in_use_is_named() {
    for listen in ["/ip4/127.0.0.1/tcp/0", "/ip4/127.0.0.1/udp/0/quic-v1"] {
        let first = Peer::start(|config| config.listen = vec![listen.parse().unwrap()]).await;
        let taken = first.addresses();
        let error = start_error(&taken).await;
        assert!(matches!(error, StartError::PortInUse { .. }), "{error}");
        let message = error.to_string();
        assert!(message.contains(&taken[0].to_string()) && message.contains("--port"), "{message}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn addresses_that_nothing_listens_on_are_named() {
    let error = start_error(&["/ip4/127.0.0.1/sctp/5".parse().unwrap()]).await;
    assert!(matches!(error, StartError::BadListenAddress { .. }), "{error}");
    let error = start_error(&["/ip4/192.0.2.1/tcp/0".parse().unwrap()]).await;
    assert!(error.to_string().contains("no such address"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ipv6_trouble_does_not_stop_who_has_ipv4() {
    let listen = ["/ip4/127.0.0.1/tcp/0", "/ip6/2001:db8::1/tcp/0", "/ip6/2001:db8::1/udp/0/quic-v1"];
    let peer = Peer::start(|config| config.listen = listen.iter().map(|a| a.parse().unwrap()).collect()).await;
    assert_eq!(peer.addresses().len(), 1);
    assert!(matches!(start_error(&[listen[1].parse().unwrap()]).await, StartError::Listen { .. }));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wildcards_are_never_handed_out() {
    let listen = ["/ip4/0.0.0.0/tcp/0", "/ip4/0.0.0.0/udp/0/quic-v1"];
    let peer = Peer::start(|config| config.listen = listen.iter().map(|a| a.parse().unwrap()).collect()).await;
    let addresses = peer.addresses();
    assert!(!addresses.is_empty());
    assert!(addresses.iter().all(|address| !address.to_string().contains("0.0.0.0")), "{addresses:?}");
    let announced: Vec<Multiaddr> = vec!["/dns4/node.example.org/tcp/31337".parse().unwrap()];
    let peer = Peer::start(|config| config.announce = announced.clone()).await;
    assert_eq!(peer.addresses(), announced);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn joining_names_every_peer_that_is_not_there_and_why() {
    let gone = Peer::start(|_| ()).await;
    let gone_at = gone.address();
    gone.swarm.stop().await;
    let there = Peer::start(|_| ()).await;
    let wrong: Multiaddr = there.addresses()[0].clone().with_p2p(PeerId::random()).unwrap();
    let peer = Peer::start(|config| config.initial_peers = vec![gone_at.clone(), wrong.clone()]).await;
    let message = peer.swarm.join(PATIENCE).await.unwrap_err().to_string();
    assert!(message.contains(&gone_at.to_string()) && message.contains("refused"), "{message}");
    assert!(message.contains(&wrong.to_string()) && message.contains(&there.id().to_string()), "{message}");

    // One that is there is enough.
    let peer = Peer::start(|config| config.initial_peers = vec![gone_at, wrong, there.address()]).await;
    assert_eq!(peer.swarm.join(PATIENCE).await.unwrap().peers, 1);

    let peer = Peer::start(|_| ()).await;
    assert!(matches!(peer.swarm.join(PATIENCE).await, Err(JoinError::NoPeers)));
    let own = peer.address();
    let message = peer.swarm.join_through(&[own], PATIENCE).await.unwrap_err().to_string();
    assert!(message.contains("itself"), "{message}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_port_that_says_nothing_times_out() {
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = silent.local_addr().unwrap().port();
    let address: Multiaddr = format!("/ip4/127.0.0.1/tcp/{port}/p2p/{}", PeerId::random()).parse().unwrap();
    let peer = Peer::start(|config| config.initial_peers = vec![address.clone()]).await;
    let message = peer.swarm.join(Duration::from_millis(300)).await.unwrap_err().to_string();
    assert!(message.contains(&address.to_string()) && message.contains("no answer within 0.3 s"), "{message}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn incomplete_peers_are_named() {
    let mut config = SwarmConfig::new(Identity::ephemeral(), Role::Client);
    config.initial_peers = vec!["/ip4/127.0.0.1/tcp/31337".parse().unwrap()];
    let error = Swarm::start(config, Arc::new(Echo::default())).await.unwrap_err();
    assert!(error.to_string().contains("/ip4/127.0.0.1/tcp/31337"), "{error}");
    assert!(error.to_string().contains("/p2p/"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn good_peers_are_remembered() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("peers");
    let there = Peer::start(|_| ()).await;
    let peer = Peer::start(|config| {
        config.initial_peers = vec![there.address()];
        config.remember = Some(file.clone());
    })
    .await;
    peer.swarm.join(PATIENCE).await.unwrap();
    peer.swarm.stop().await;
    let back = Peer::start(|config| config.remember = Some(file.clone())).await;
    assert_eq!(back.swarm.remembered(), [there.address()]);
    back.swarm.join_through(&back.swarm.remembered(), PATIENCE).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_swarm_says_so() {
    let peer = Peer::start(|_| ()).await;
    let other = Peer::start(|_| ()).await;
    peer.swarm.stop().await;
    peer.swarm.stop().await;
    assert!(matches!(peer.swarm.join_through(&[other.address()], PATIENCE).await, Err(JoinError::Stopped)));
    assert!(peer.swarm.link(other.id(), &other.addresses()).await.is_err());
    assert!(peer.swarm.models().await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn peers_of_the_local_network_find_each_other() {
    let on_all_interfaces = |config: &mut SwarmConfig| {
        config.mdns = true;
        config.listen = vec!["/ip4/0.0.0.0/tcp/0".parse().unwrap()];
    };
    let _there = Peer::start(on_all_interfaces).await;
    let peer = Peer::start(on_all_interfaces).await;
    match peer.swarm.join_nearby(Duration::from_secs(5)).await {
        // Not only with the one above, if other tests run on this machine.
        Ok(_) => assert!(!peer.swarm.connected().is_empty()),
        Err(JoinError::NobodyNear(_)) => println!("no multicast on this machine: nothing was tested"),
        Err(other) => panic!("{other}"),
    }
}

/// A service that knows its own swarm.
#[derive(Default)]
struct Owned(OnceLock<WeakSwarm>);

impl Service for Owned {
    fn frame(&self, _: &Link, _: Frame) {}

    fn link_closed(&self, _: &Link) {}

    fn request(&self, _: PeerId, _: rpc::Request) -> BoxFuture<'static, rpc::Response> {
        let known = self.0.get().and_then(WeakSwarm::upgrade).map(|swarm| swarm.peer_id().to_string());
        Box::pin(async move { rpc::Response::failure(known.unwrap_or_default()) })
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_may_know_its_swarm_without_keeping_it_running() {
    let service = Arc::new(Owned::default());
    let mut config = SwarmConfig::new(Identity::ephemeral(), Role::Server);
    config.listen = vec!["/ip4/127.0.0.1/tcp/0".parse().unwrap()];
    let swarm = Swarm::start(config, service.clone()).await.unwrap();
    service.0.set(swarm.downgrade()).unwrap();
    let (id, addresses) = (swarm.peer_id(), swarm.addresses());
    let peer = Peer::start(|_| ()).await;
    let answer = peer.swarm.request(id, &addresses, rpc::Request::info(), PATIENCE).await.unwrap();
    assert_eq!(answer, rpc::Response::failure(id.to_string()));

    let (weak, kept) = (swarm.downgrade(), Arc::downgrade(&service));
    drop((swarm, service));
    eventually("the swarm lets its service go", || async { kept.upgrade().is_none().then_some(()) }).await;
    assert!(weak.upgrade().is_none());
    eventually("its connections are closed", || async { peer.swarm.connected().is_empty().then_some(()) }).await;
}
