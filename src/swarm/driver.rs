//! The event loop: the one task that owns the libp2p swarm.
//!
//! [`Swarm`](super::Swarm) sends it [`Command`]s, each one primitive step (connect, look up a key, open a stream) with a channel
//! for its outcome; whatever takes several steps is written as plain async code in the handle. The loop keeps who waits for
//! what, and answers each exactly once. What others read often (who is connected, addresses, links) is in [`Shared`].

mod dialing;
mod listening;
mod lookups;
mod requests;

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use futures::StreamExt;
use libp2p::{
    Multiaddr, PeerId, identify, kad, mdns, ping,
    request_response::{OutboundFailure, OutboundRequestId, ResponseChannel},
    swarm::{ConnectionId, SwarmEvent},
};
use tokio::{
    sync::{mpsc, oneshot},
    task::JoinSet,
    time::{Instant, MissedTickBehavior},
};
use tokio_util::sync::CancellationToken;

pub(super) use self::lookups::Lookup;
use self::{
    dialing::{Confirmation, Dial, Opening},
    lookups::Query,
};
use super::{
    Role, Service, Tuning,
    addresses::{Observed, of_peer, usable, without_peer},
    announcement::unix_ms,
    clean,
    known::Known,
    link::{Link, Links},
    network::{Behaviour, BehaviourEvent, KAD_PROTOCOL},
    remembered::RememberedPeers,
    rpc,
};

/// Commands that wait for the loop; each belongs to an async call that waits too.
pub(super) const MAX_COMMANDS: usize = 256;
/// How often expired announcements are dropped from the store.
const SWEEP_EVERY: Duration = Duration::from_secs(30);
/// How often look-ups are checked for having gone quiet.
const QUIET_CHECK_EVERY: Duration = Duration::from_millis(200);
/// Pings in a row that may fail before a connection counts as dead.
const MAX_FAILED_PINGS: u32 = 3;
/// Addresses in the routing table for one peer.
const MAX_ROUTING_ADDRESSES: usize = 16;
/// How long connections may take to close in good order.
const CLOSING_TIMEOUT: Duration = Duration::from_secs(1);

/// A step for the event loop. Outcomes that are text are reasons for people.
pub(super) enum Command {
    /// Make sure that there is a connection.
    Connect { peer: PeerId, addresses: Vec<Multiaddr>, reply: oneshot::Sender<Result<(), String>> },
    /// Wait until a peer (or any) has said that it speaks the DHT's protocol, and is in the routing table.
    Confirm { peer: Option<PeerId>, reply: oneshot::Sender<Result<PeerId, String>> },
    /// Fill the routing table; the outcome is how many requests it took.
    Bootstrap { reply: oneshot::Sender<usize> },
    /// Store a record; the outcome is how many other peers took it.
    Put { key: kad::RecordKey, value: Vec<u8>, reply: oneshot::Sender<usize> },
    /// Look a key up at all replicas.
    Get { key: kad::RecordKey, reply: oneshot::Sender<Lookup> },
    /// Ask a connected peer.
    Request { peer: PeerId, request: rpc::Request, reply: oneshot::Sender<Result<rpc::Response, OutboundFailure>> },
    /// Open a link to a connected peer, or share the one that is there.
    Link { peer: PeerId, reply: oneshot::Sender<Result<Link, String>> },
    /// Close everything and end.
    Stop { reply: oneshot::Sender<()> },
}

/// What the loop and the handle both see.
pub(super) struct Shared {
    pub(super) peer_id: PeerId,
    pub(super) role: Role,
    pub(super) tuning: Tuning,
    /// What the operator wants others to be told, if anything.
    pub(super) announce: Vec<Multiaddr>,
    pub(super) links: Arc<Links>,
    addresses: Mutex<Vec<Multiaddr>>,
    peers: Mutex<HashMap<PeerId, Peer>>,
    known: Mutex<Known>,
    remembered: Mutex<RememberedPeers>,
}

/// A connected peer.
#[derive(Default)]
pub(super) struct Peer {
    connections: Vec<Connection>,
    rtt: Option<Duration>,
    /// It said that it speaks the DHT's protocol.
    confirmed: bool,
    /// It said that it doesn't: for people, what it is instead.
    foreign: Option<String>,
}

struct Connection {
    id: ConnectionId,
    remote: Multiaddr,
    dialled: bool,
    failed_pings: u32,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // No critical section here leaves its value half-made, so a poisoned one is as good as another.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(super) fn new(config: &super::SwarmConfig, remembered: RememberedPeers) -> Self {
        Self {
            peer_id: config.identity.peer_id(),
            role: config.role,
            tuning: config.tuning.clone(),
            announce: usable(&config.announce),
            links: Arc::new(Links::new(&config.tuning.link)),
            addresses: Mutex::default(),
            peers: Mutex::default(),
            known: Mutex::default(),
            remembered: Mutex::new(remembered),
        }
    }

    pub(super) fn addresses(&self) -> Vec<Multiaddr> {
        if self.announce.is_empty() { usable(lock(&self.addresses).iter()) } else { self.announce.clone() }
    }

    pub(super) fn rtt(&self, peer: &PeerId) -> Option<Duration> {
        lock(&self.peers).get(peer)?.rtt
    }

    pub(super) fn connected(&self) -> Vec<PeerId> {
        lock(&self.peers).keys().copied().collect()
    }

    pub(super) fn is_connected(&self, peer: &PeerId) -> bool {
        lock(&self.peers).contains_key(peer)
    }

    pub(super) fn known(&self) -> MutexGuard<'_, Known> {
        lock(&self.known)
    }

    pub(super) fn remembered(&self) -> MutexGuard<'_, RememberedPeers> {
        lock(&self.remembered)
    }

    fn peers(&self) -> MutexGuard<'_, HashMap<PeerId, Peer>> {
        lock(&self.peers)
    }
}

/// The event loop's state.
pub(super) struct Driver {
    swarm: libp2p::Swarm<Behaviour>,
    shared: Arc<Shared>,
    service: Arc<dyn Service>,
    commands: mpsc::Receiver<Command>,
    stop: CancellationToken,
    dials: HashMap<PeerId, Dial>,
    openings: HashMap<PeerId, Opening>,
    confirmations: Vec<Confirmation>,
    queries: HashMap<kad::QueryId, Query>,
    requests: HashMap<OutboundRequestId, oneshot::Sender<Result<rpc::Response, OutboundFailure>>>,
    /// Answers that the service is working on.
    answers: JoinSet<(ResponseChannel<rpc::Response>, rpc::Response)>,
    listening: Vec<Multiaddr>,
    observed: Observed,
}

impl Driver {
    pub(super) fn new(
        swarm: libp2p::Swarm<Behaviour>,
        shared: Arc<Shared>,
        service: Arc<dyn Service>,
        commands: mpsc::Receiver<Command>,
        stop: CancellationToken,
    ) -> Self {
        Self {
            swarm,
            shared,
            service,
            commands,
            stop,
            dials: HashMap::new(),
            openings: HashMap::new(),
            confirmations: Vec::new(),
            queries: HashMap::new(),
            requests: HashMap::new(),
            answers: JoinSet::new(),
            listening: Vec::new(),
            observed: Observed::default(),
        }
    }

    /// Runs until it is told to stop, or the last handle is gone.
    pub(super) async fn run(mut self) {
        let stop = self.stop.clone();
        let mut sweep = tokio::time::interval(SWEEP_EVERY);
        let mut quiet_check = tokio::time::interval(QUIET_CHECK_EVERY);
        quiet_check.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let stopped = loop {
            tokio::select! {
                event = self.swarm.select_next_some() => self.on_event(event),
                command = self.commands.recv() => match command {
                    Some(Command::Stop { reply }) => break Some(reply),
                    Some(command) => self.on_command(command),
                    None => break None,
                },
                Some(answer) = self.answers.join_next() => self.on_answer(answer),
                _ = quiet_check.tick(), if !self.queries.is_empty() => self.end_quiet_lookups(Instant::now()),
                _ = sweep.tick() => self.swarm.behaviour_mut().kad.store_mut().drop_expired(unix_ms()),
                () = stop.cancelled() => break None,
            }
        };
        self.close().await;
        if let Some(reply) = stopped {
            let _ = reply.send(());
        }
    }

    async fn close(mut self) {
        self.shared.links.all().iter().for_each(Link::close);
        for peer in self.shared.connected() {
            let _ = self.swarm.disconnect_peer_id(peer);
        }
        let closing = async {
            while self.swarm.connected_peers().next().is_some() {
                let event = self.swarm.select_next_some().await;
                self.on_event(event);
            }
        };
        if tokio::time::timeout(CLOSING_TIMEOUT, closing).await.is_err() {
            tracing::debug!("some connections did not close in time");
        }
        let left: Vec<PeerId> = self.shared.peers().drain().map(|(peer, _)| peer).collect();
        left.iter().for_each(|peer| self.shared.links.close_peer(peer));
    }

    fn on_command(&mut self, command: Command) {
        match command {
            Command::Connect { peer, addresses, reply } => self.connect(peer, addresses, reply),
            Command::Confirm { peer, reply } => self.confirm(peer, reply),
            Command::Bootstrap { reply } => self.bootstrap(reply),
            Command::Put { key, value, reply } => self.put(key, value, reply),
            Command::Get { key, reply } => self.get(key, reply),
            Command::Request { peer, request, reply } => {
                let id = self.swarm.behaviour_mut().rpc.send_request(&peer, request);
                self.requests.insert(id, reply);
            }
            Command::Link { peer, reply } => self.open_link(peer, reply),
            // `run` has taken it.
            Command::Stop { .. } => {}
        }
    }

    fn on_event(&mut self, event: SwarmEvent<BehaviourEvent>) {
        match event {
            SwarmEvent::Behaviour(event) => self.on_behaviour(event),
            SwarmEvent::ConnectionEstablished { peer_id, connection_id, endpoint, .. } => {
                let connection = Connection {
                    id: connection_id,
                    remote: endpoint.get_remote_address().clone(),
                    dialled: endpoint.is_dialer(),
                    failed_pings: 0,
                };
                tracing::debug!(peer = %peer_id, address = %connection.remote, dialled = connection.dialled, "connected");
                self.shared.peers().entry(peer_id).or_default().connections.push(connection);
                self.dial_succeeded(&peer_id);
            }
            SwarmEvent::ConnectionClosed { peer_id, connection_id, cause, num_established, .. } => {
                let cause = cause.map_or_else(|| "closed".to_owned(), |cause| cause.to_string());
                tracing::debug!(peer = %peer_id, left = num_established, cause, "connection closed");
                self.connection_closed(peer_id, connection_id, &cause);
            }
            SwarmEvent::OutgoingConnectionError { peer_id: Some(peer), connection_id, error } => {
                self.dial_failed(peer, connection_id, &error);
            }
            SwarmEvent::IncomingConnectionError { send_back_addr, error, .. } => {
                tracing::debug!(from = %send_back_addr, %error, "an inbound connection failed");
            }
            SwarmEvent::NewListenAddr { address, .. } => {
                tracing::info!(%address, "listening");
                self.listening.push(address);
                self.publish_addresses();
            }
            SwarmEvent::ExpiredListenAddr { address, .. } => {
                self.listening.retain(|other| *other != address);
                self.publish_addresses();
            }
            SwarmEvent::ListenerClosed { addresses, reason, .. } => {
                self.listening.retain(|address| !addresses.contains(address));
                self.publish_addresses();
                if let Err(error) = reason {
                    tracing::warn!(?addresses, %error, "no longer listening");
                }
            }
            SwarmEvent::ListenerError { error, .. } => tracing::debug!(%error, "a listener had trouble"),
            _ => {}
        }
    }

    fn on_behaviour(&mut self, event: BehaviourEvent) {
        match event {
            BehaviourEvent::Kad(event) => self.on_kad(event),
            BehaviourEvent::Identify(identify::Event::Received { connection_id, peer_id, info }) => {
                self.on_identified(peer_id, connection_id, &info);
            }
            BehaviourEvent::Identify(_) => {}
            BehaviourEvent::Ping(event) => self.on_ping(event),
            BehaviourEvent::Rpc(event) => self.on_rpc(event),
            BehaviourEvent::Streams(event) => self.on_stream(event),
            BehaviourEvent::Mdns(mdns::Event::Discovered(found)) => self.on_discovered_nearby(found),
            BehaviourEvent::Mdns(mdns::Event::Expired(_)) => {}
        }
    }

    fn publish_addresses(&self) {
        let mut addresses = self.listening.clone();
        addresses.extend(self.swarm.external_addresses().cloned());
        *lock(&self.shared.addresses) = addresses;
    }

    fn connection_closed(&mut self, peer: PeerId, connection: ConnectionId, cause: &str) {
        if let Some(opening) = self.openings.remove(&peer) {
            if opening.connection == connection {
                opening.fail(&format!("the connection was lost: {cause}"));
            } else {
                self.openings.insert(peer, opening);
            }
        }
        let is_gone = {
            let mut peers = self.shared.peers();
            let Some(known) = peers.get_mut(&peer) else { return };
            known.connections.retain(|other| other.id != connection);
            let is_gone = known.connections.is_empty();
            if is_gone {
                peers.remove(&peer);
            }
            is_gone
        };
        if is_gone {
            self.shared.links.close_peer(&peer);
            self.fail_confirmations(peer, &format!("the connection was lost: {cause}"));
        }
    }

    fn on_ping(&mut self, ping::Event { peer, connection, result }: ping::Event) {
        let is_dead = {
            let mut peers = self.shared.peers();
            let Some(known) = peers.get_mut(&peer) else { return };
            let Some(of_connection) = known.connections.iter_mut().find(|other| other.id == connection) else { return };
            match result {
                Ok(rtt) => {
                    of_connection.failed_pings = 0;
                    known.rtt = Some(rtt);
                    false
                }
                Err(ping::Failure::Unsupported) => false,
                Err(_) => {
                    of_connection.failed_pings += 1;
                    of_connection.failed_pings >= MAX_FAILED_PINGS
                }
            }
        };
        if is_dead {
            tracing::info!(%peer, "closed a connection on which {MAX_FAILED_PINGS} pings went unanswered");
            self.swarm.close_connection(connection);
        }
    }

    fn on_identified(&mut self, peer: PeerId, connection: ConnectionId, info: &identify::Info) {
        let (remote, dialled) = {
            let peers = self.shared.peers();
            let of_connection =
                peers.get(&peer).and_then(|known| known.connections.iter().find(|other| other.id == connection));
            match of_connection {
                Some(of_connection) => (of_connection.remote.clone(), of_connection.dialled),
                None => return,
            }
        };
        if dialled && self.shared.announce.is_empty() {
            for address in self.observed.note(&info.observed_addr, &remote, &self.listening) {
                tracing::info!(%address, "others see this peer at an address of its own");
                self.swarm.add_external_address(address);
            }
            self.publish_addresses();
        }
        if !info.protocols.contains(&KAD_PROTOCOL) {
            let agent: String = clean(&info.agent_version).chars().take(64).collect();
            let reason = format!("it is no helion node (it calls itself {agent:?})");
            self.fail_confirmations(peer, &reason);
            if let Some(known) = self.shared.peers().get_mut(&peer) {
                known.foreign = Some(reason);
            }
            return;
        }
        let mut addresses = of_peer(&info.listen_addrs, Some(&remote));
        if dialled {
            // Where it was reached comes first, whatever it says.
            addresses.insert(0, without_peer(&remote));
            if let Ok(address) = without_peer(&remote).with_p2p(peer) {
                self.shared.remembered().note(address, unix_ms() / 1000);
            }
        }
        self.add_to_routing_table(peer, &addresses);
        if let Some(known) = self.shared.peers().get_mut(&peer) {
            known.confirmed = true;
            known.foreign = None;
        }
        self.succeed_confirmations(peer);
    }

    fn add_to_routing_table(&mut self, peer: PeerId, addresses: &[Multiaddr]) {
        let kad = &mut self.swarm.behaviour_mut().kad;
        let key = kad::KBucketKey::from(peer);
        let held = kad.kbucket(peer).map_or(0, |bucket| {
            bucket.iter().find(|entry| *entry.node.key == key).map_or(0, |entry| entry.node.value.len())
        });
        for address in addresses.iter().take(MAX_ROUTING_ADDRESSES.saturating_sub(held)) {
            kad.add_address(&peer, address.clone());
        }
    }
}
