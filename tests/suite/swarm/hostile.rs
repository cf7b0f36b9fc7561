//! Peers that do wrong: the node refuses, and goes on serving the others.

use std::{slice, sync::Arc, time::Duration};

use futures::{AsyncReadExt, AsyncWriteExt, StreamExt, future::BoxFuture};
use helion::swarm::{
    Announcement, Frame, Identity, Link, Multiaddr, PeerId, Role, Service, Swarm, SwarmConfig,
    announcement::unix_ms,
    proto::announcement::{Entries, SignedAnnouncement},
    records::segment_key,
    rpc,
};
use libp2p::{
    StreamProtocol, SwarmBuilder, kad, noise,
    swarm::{NetworkBehaviour, SwarmEvent},
    tcp, yamux,
};
use prost::Message;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::{PATIENCE, Peer, announcement, eventually, number_of, numbered};

const MODEL: &str = "tests/Eighty-Blocks";

fn socket(peer: &Peer) -> std::net::SocketAddr {
    let text = peer.addresses()[0].to_string();
    let port = text.rsplit('/').next().unwrap().parse().unwrap();
    ([127, 0, 0, 1], port).into()
}

/// The node still answers somebody new.
async fn still_serves(node: &Peer) {
    let client = Peer::client(node).await;
    let link = client.swarm.link(node.id(), &node.addresses()).await.unwrap();
    link.send(numbered(42, vec![1, 2, 3])).unwrap();
    client.service.until("it answers", |echo| !echo.answered.lock().unwrap().is_empty()).await;
    assert_eq!(number_of(&client.service.answered.lock().unwrap()[0]), 42);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_on_the_port_changes_nothing() {
    let node = Peer::start(|_| ()).await;
    for garbage in [&b""[..], b"GET / HTTP/1.1\r\n\r\n", &[0xff; 100_000], b"\x13/multistream/1.0.0\n\xff\xff\xff\xff"]
    {
        let mut stream = tokio::net::TcpStream::connect(socket(&node)).await.unwrap();
        // The node may hang up half-way.
        let _ = stream.write_all(garbage).await;
        let _ = stream.shutdown().await;
        let mut answer = Vec::new();
        let _ = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut answer)).await.expect("the node hangs up");
    }
    still_serves(&node).await;
}

/// A stranger with bare libp2p: what helion itself would never send.
#[derive(NetworkBehaviour)]
struct Bare {
    streams: libp2p_stream::Behaviour,
    kad: kad::Behaviour<kad::store::MemoryStore>,
}

struct Stranger {
    identity: Identity,
    streams: libp2p_stream::Control,
    puts: tokio::sync::mpsc::Sender<kad::Record>,
    driving: tokio::task::JoinHandle<()>,
}

impl Drop for Stranger {
    fn drop(&mut self) {
        self.driving.abort();
    }
}

impl Stranger {
    async fn connect(node: &Peer) -> Self {
        let identity = Identity::ephemeral();
        let mut config = kad::Config::new(StreamProtocol::new("/helion/kad/1"));
        config.set_max_packet_size(1 << 20).set_query_timeout(Duration::from_secs(5));
        let store = kad::store::MemoryStore::with_config(
            identity.peer_id(),
            kad::store::MemoryStoreConfig { max_value_bytes: 1 << 20, ..Default::default() },
        );
        let behaviour = Bare {
            streams: libp2p_stream::Behaviour::new(),
            kad: kad::Behaviour::with_config(identity.peer_id(), store, config),
        };
        let mut swarm = SwarmBuilder::with_existing_identity(identity.keypair().clone())
            .with_tokio()
            .with_tcp(tcp::Config::new(), noise::Config::new, yamux::Config::default)
            .unwrap()
            .with_behaviour(|_| behaviour)
            .unwrap()
            .with_swarm_config(|config| config.with_idle_connection_timeout(PATIENCE))
            .build();
        swarm.behaviour_mut().kad.add_address(&node.id(), node.addresses()[0].clone());
        swarm.dial(node.address()).unwrap();
        while !matches!(swarm.select_next_some().await, SwarmEvent::ConnectionEstablished { .. }) {}
        let streams = swarm.behaviour().streams.new_control();
        let (puts, mut inbox) = tokio::sync::mpsc::channel::<kad::Record>(8);
        let driving = tokio::spawn(async move {
            loop {
                tokio::select! {
                    _ = swarm.select_next_some() => {}
                    Some(record) = inbox.recv() => {
                        swarm.behaviour_mut().kad.put_record(record, kad::Quorum::One).unwrap();
                    }
                }
            }
        });
        Self { identity, streams, puts, driving }
    }

    async fn open(&mut self, node: PeerId) -> libp2p::Stream {
        self.streams.open_stream(node, StreamProtocol::new("/helion/session/1")).await.unwrap()
    }

    fn announcement(&self, change: impl FnOnce(&mut Announcement)) -> SignedAnnouncement {
        let now = unix_ms();
        let mut announcement = Announcement {
            dht_prefix: MODEL.into(),
            model_blocks: 80,
            span: 0..80,
            state: helion::swarm::State::Online,
            sequence: now,
            expires_unix_ms: now + 60_000,
            ..Announcement::blank(self.identity.peer_id())
        };
        change(&mut announcement);
        announcement.sign(self.identity.keypair(), now).unwrap()
    }

    async fn put(&self, value: Vec<u8>) {
        self.puts.send(kad::Record::new(segment_key(MODEL, 0), value)).await.unwrap();
    }
}

fn entries(entries: &[SignedAnnouncement]) -> Vec<u8> {
    Entries { entries: entries.to_vec() }.encode_to_vec()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn malformed_frames_close_their_stream_and_nothing_else() {
    let node = Peer::start(|_| ()).await;
    let mut stranger = Stranger::connect(&node).await;
    let length = |header: u32, payload: u32| [header.to_le_bytes(), payload.to_le_bytes()].concat();
    let too_large = [length(5, u32::MAX), length(u32::MAX, 0), length(64 * 1024 + 1, 0), length(0, (64 << 20) + 1)];
    let bad_header = [length(4, 0), vec![0xff; 4]].concat();
    for (i, garbage) in too_large.iter().chain([&bad_header]).enumerate() {
        let mut stream = stranger.open(node.id()).await;
        stream.write_all(garbage).await.unwrap();
        stream.flush().await.unwrap();
        let mut rest = Vec::new();
        let ended = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut rest)).await;
        assert!(ended.is_ok(), "case {i}: the node keeps the stream");
        node.service.until("the link is closed", |echo| echo.closed.lock().unwrap().len() == i + 1).await;
    }
    assert!(node.service.asked.lock().unwrap().is_empty());
    // The same connection is still good for well-formed frames; a truncated one at its end is dropped.
    let mut stream = stranger.open(node.id()).await;
    stream.write_all(&length(0, 3)).await.unwrap();
    stream.write_all(&[7, 8, 9]).await.unwrap();
    stream.write_all(&length(0, 100)[..5]).await.unwrap();
    stream.close().await.unwrap();
    node.service.until("the good one arrived", |echo| echo.asked.lock().unwrap().len() == 1).await;
    assert_eq!(node.service.asked.lock().unwrap()[0].payload.as_ref(), [7, 8, 9]);
    still_serves(&node).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_frame_that_stops_half_way_closes_its_stream_and_frees_its_room() {
    const LARGE: usize = 300_000;
    let node = Peer::start(|config| {
        config.tuning.link.all_arriving_bytes = 100_000;
        config.tuning.link.frame_timeout = Duration::from_millis(500);
    })
    .await;
    // Two take what there is: one the budget's greater part, the other the one place beside it. They stop half-way.
    let mut stranger = Stranger::connect(&node).await;
    let mut kept = Vec::new();
    for _ in 0..2 {
        let mut stream = stranger.open(node.id()).await;
        stream.write_all(&[0_u32.to_le_bytes(), (LARGE as u32).to_le_bytes()].concat()).await.unwrap();
        stream.write_all(&vec![0; LARGE / 2]).await.unwrap();
        stream.flush().await.unwrap();
        kept.push(stream);
    }
    // A decode step needs no room, and an idle link has all the time of the world.
    still_serves(&node).await;
    let idle = Peer::client(&node).await;
    let link = idle.swarm.link(node.id(), &node.addresses()).await.unwrap();
    node.service.until("both are closed", |echo| echo.closed.lock().unwrap().len() >= 3).await;
    for mut stream in kept {
        let mut rest = Vec::new();
        let _ = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut rest)).await.expect("the node closes it");
    }
    link.send(numbered(1, vec![7; LARGE])).unwrap();
    idle.service.until("it comes back", |echo| !echo.answered.lock().unwrap().is_empty()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_peer_keeps_few_streams_open() {
    let node = Peer::start(|_| ()).await;
    let mut stranger = Stranger::connect(&node).await;
    let mut kept = Vec::new();
    let mut refused = 0;
    for _ in 0..8 {
        let mut stream = stranger.open(node.id()).await;
        let echo = async {
            stream.write_all(&[0; 8]).await?;
            stream.flush().await?;
            stream.read_exact(&mut [0; 8]).await
        };
        match echo.await {
            Ok(()) => kept.push(stream),
            Err(_) => refused += 1,
        }
    }
    assert_eq!((kept.len(), refused), (4, 4));
    still_serves(&node).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn forged_and_oversized_records_are_not_stored() {
    let node = Peer::start(|_| ()).await;
    let honest = Peer::joined(&node).await;
    honest.swarm.announce(announcement(&honest, MODEL, 0..80)).await.unwrap();
    let client = Peer::client(&node).await;
    let seen = || async {
        let mut seen: Vec<PeerId> =
            client.swarm.discover(MODEL, 16).await.unwrap().announcements.iter().map(|a| a.peer_id).collect();
        seen.sort();
        seen
    };
    assert_eq!(seen().await, [honest.id()]);

    let mut forger = Stranger::connect(&node).await;
    let mut forged = forger.announcement(|_| ());
    forged.signature = vec![1; 64].into();
    forger.put(entries(&[forged])).await;
    // The node hangs up on it.
    eventually("the forger is gone", || async {
        (!node.swarm.connected().contains(&forger.identity.peer_id())).then_some(())
    })
    .await;

    let stranger = Stranger::connect(&node).await;
    stranger.put(vec![0xff; 1000]).await;
    stranger.put(vec![0; 100 * 1024]).await;
    stranger.put(entries(&vec![SignedAnnouncement::default(); 200])).await;
    // An honest one of the same peer afterwards, on the same connection or a new one, is taken.
    let good = stranger.announcement(|_| ());
    stranger.put(entries(&[good])).await;
    let mut both = vec![honest.id(), stranger.identity.peer_id()];
    both.sort();
    eventually("the good one is seen", || async { (seen().await == both).then_some(()) }).await;
    let _ = forger.streams.open_stream(node.id(), StreamProtocol::new("/nothing")).await;
    still_serves(&node).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_foreign_network_is_named() {
    // A libp2p node that speaks nothing of helion.
    let mut foreign = SwarmBuilder::with_new_identity()
        .with_tokio()
        .with_tcp(tcp::Config::new(), noise::Config::new, yamux::Config::default)
        .unwrap()
        .with_behaviour(|key| {
            libp2p::identify::Behaviour::new(
                libp2p::identify::Config::new("/other/1".into(), key.public()).with_agent_version("other/1.0".into()),
            )
        })
        .unwrap()
        .build();
    foreign.listen_on("/ip4/127.0.0.1/tcp/0".parse().unwrap()).unwrap();
    let address: Multiaddr = loop {
        if let SwarmEvent::NewListenAddr { address, .. } = foreign.select_next_some().await {
            break address.with_p2p(*foreign.local_peer_id()).unwrap();
        }
    };
    let driving = tokio::spawn(async move {
        loop {
            foreign.select_next_some().await;
        }
    });
    let peer = Peer::start(|_| ()).await;
    // The second time it has said long ago what it is, and doesn't say so again on the same connection.
    for _ in 0..2 {
        let message = peer.swarm.join_through(slice::from_ref(&address), PATIENCE).await.unwrap_err().to_string();
        assert!(message.contains("no helion node") && message.contains("other/1.0"), "{message}");
    }
    driving.abort();
}

/// Answers every request with text that would take a terminal over, and has no end.
struct Rude;

impl Service for Rude {
    fn frame(&self, _: &Link, _: Frame) {}

    fn link_closed(&self, _: &Link) {}

    fn request(&self, _: PeerId, _: rpc::Request) -> BoxFuture<'static, rpc::Response> {
        Box::pin(async { rpc::Response::failure("\u{1b}]0;mine\u{7}".to_owned() + &"a".repeat(100_000)) })
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refusal_in_rude_words_is_fit_to_be_shown() {
    let mut config = SwarmConfig::new(Identity::ephemeral(), Role::Server);
    config.listen = vec!["/ip4/127.0.0.1/tcp/0".parse().unwrap()];
    let rude = Swarm::start(config, Arc::new(Rude)).await.unwrap();
    let peer = Peer::start(|_| ()).await;
    let answer = peer.swarm.request(rude.peer_id(), &rude.addresses(), rpc::Request::info(), PATIENCE).await.unwrap();
    let Some(rpc::response::Body::Failure(failure)) = answer.body else { panic!("{answer:?}") };
    assert_eq!(failure.message, "]0;mine".to_owned() + &"a".repeat(492) + "…");
}
