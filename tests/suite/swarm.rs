//! The swarm layer: several peers in one process, over real sockets on loopback.

mod discovery;
mod hostile;
mod links;
mod starting;
mod wire;

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use futures::future::BoxFuture;
use helion::{
    model::Dtype,
    swarm::{
        Announcement, Frame, Identity, Link, Multiaddr, PeerId, Role, Service, State, Swarm, SwarmConfig,
        proto::{
            rpc::{InfoResponse, response},
            session,
        },
        rpc,
    },
};
use tokio::sync::Notify;

/// Nothing in these tests takes so long unless it hangs.
const PATIENCE: Duration = Duration::from_secs(30);

/// Answers every frame with itself, and keeps what came.
#[derive(Default)]
struct Echo {
    /// Of links that others opened.
    asked: Mutex<Vec<Frame>>,
    /// Of links that this peer opened.
    answered: Mutex<Vec<Frame>>,
    closed: Mutex<Vec<Link>>,
    changed: Notify,
}

impl Service for Echo {
    fn frame(&self, link: &Link, frame: Frame) {
        let kept = if link.opened_by_us() { &self.answered } else { &self.asked };
        kept.lock().unwrap().push(frame.clone());
        if !link.opened_by_us() {
            // A closed link has nobody to answer.
            let _ = link.send(frame);
        }
        self.changed.notify_waiters();
    }

    fn link_closed(&self, link: &Link) {
        self.closed.lock().unwrap().push(link.clone());
        self.changed.notify_waiters();
    }

    fn request(&self, _: PeerId, _: rpc::Request) -> BoxFuture<'static, rpc::Response> {
        let info = InfoResponse { sessions: 7, ..InfoResponse::default() };
        Box::pin(async move { rpc::Response { body: Some(response::Body::Info(info)) } })
    }
}

impl Echo {
    /// Waits until something holds; panics if it doesn't in time.
    async fn until(&self, what: &str, holds: impl Fn(&Self) -> bool) {
        let waiting = async {
            loop {
                let changed = self.changed.notified();
                tokio::pin!(changed);
                changed.as_mut().enable();
                if holds(self) {
                    return;
                }
                changed.await;
            }
        };
        tokio::time::timeout(PATIENCE, waiting).await.unwrap_or_else(|_| panic!("waited in vain until {what}"));
    }
}

/// A peer in this process.
struct Peer {
    swarm: Swarm,
    service: Arc<Echo>,
}

impl Peer {
    async fn start(change: impl FnOnce(&mut SwarmConfig)) -> Self {
        Self::start_as(Identity::ephemeral(), change).await
    }

    async fn start_as(identity: Identity, change: impl FnOnce(&mut SwarmConfig)) -> Self {
        let mut config = SwarmConfig::new(identity, Role::Server);
        config.listen = vec!["/ip4/127.0.0.1/tcp/0".parse().unwrap()];
        change(&mut config);
        let service = Arc::new(Echo::default());
        let swarm = Swarm::start(config, service.clone()).await.unwrap();
        Self { swarm, service }
    }

    /// A server that knows `other`.
    async fn joined(other: &Self) -> Self {
        let peer = Self::start(|config| config.initial_peers = vec![other.address()]).await;
        peer.swarm.join(PATIENCE).await.unwrap();
        peer
    }

    /// A client that knows `other`.
    async fn client(other: &Self) -> Self {
        let peer = Self::start(|config| {
            config.role = Role::Client;
            config.listen.clear();
            config.initial_peers = vec![other.address()];
        })
        .await;
        peer.swarm.join(PATIENCE).await.unwrap();
        peer
    }

    fn id(&self) -> PeerId {
        self.swarm.peer_id()
    }

    fn addresses(&self) -> Vec<Multiaddr> {
        self.swarm.addresses()
    }

    /// With `/p2p`.
    fn address(&self) -> Multiaddr {
        self.addresses().remove(0).with_p2p(self.id()).unwrap()
    }
}

fn announcement(peer: &Peer, prefix: &str, span: std::ops::Range<usize>) -> Announcement {
    Announcement {
        dht_prefix: prefix.to_owned(),
        model: prefix.to_owned(),
        fingerprint: [1; 32],
        model_blocks: 80,
        span,
        state: State::Online,
        dtype: Dtype::F32,
        ..Announcement::blank(peer.id())
    }
}

fn numbered(number: u64, payload: impl Into<bytes::Bytes>) -> Frame {
    let step = session::Step { number, ..session::Step::default() };
    let header = session::Frame { body: Some(session::frame::Body::Step(step)), ..session::Frame::default() };
    Frame { header, payload: payload.into() }
}

fn number_of(frame: &Frame) -> u64 {
    match &frame.header.body {
        Some(session::frame::Body::Step(step)) => step.number,
        other => panic!("not a step: {other:?}"),
    }
}

/// Runs what may take a few attempts until it gives something: what the network settles by itself in a while.
async fn eventually<T, F: Future<Output = Option<T>>>(what: &str, mut attempt: impl FnMut() -> F) -> T {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    let mut pause = tokio::time::interval(Duration::from_millis(50));
    loop {
        pause.tick().await;
        if let Some(outcome) = attempt().await {
            return outcome;
        }
        assert!(tokio::time::Instant::now() < deadline, "waited in vain until {what}");
    }
}
