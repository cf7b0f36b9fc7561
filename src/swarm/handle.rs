//! [`Swarm`]: what the rest of the program uses. Each operation is plain async code over the event loop's primitive steps.

mod announcing;
mod joining;

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use futures::future::join_all;
use libp2p::{Multiaddr, PeerId, kad::RecordKey, request_response::OutboundFailure};
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};
use tokio_util::sync::{CancellationToken, DropGuard};

use self::announcing::Announcing;
pub use self::joining::Joined;
use super::{
    Service, SwarmConfig,
    addresses::split_peer,
    announcement::{Announcement, MAX_MODEL_BLOCKS, State, Verified, check_prefix, unix_ms},
    driver::{Command, Driver, Lookup, MAX_COMMANDS, Shared},
    error::{DiscoverError, LinkError, RpcError, StartError, clean},
    identity::Identity,
    known::Union,
    link::Link,
    network,
    proto::announcement::SignedAnnouncement,
    records::{models_key, segment_key, segments},
    remembered::RememberedPeers,
    rpc::{self, response},
};

/// How long frames that were sent may take to leave when the swarm stops.
const FINISH_TIMEOUT: Duration = Duration::from_secs(2);
/// How long an exchange with a peer may take.
const EXCHANGE_TIMEOUT: Duration = Duration::from_secs(10);

/// This process's place in the network; a cheap clone. It runs until [`Swarm::stop`], or until the last clone is gone.
#[derive(Clone)]
pub struct Swarm(Arc<Inner>);

/// A [`Swarm`] for those who use it while others keep it running, such as its own [`Service`].
#[derive(Clone, Default)]
pub struct WeakSwarm(Weak<Inner>);

struct Inner {
    identity: Identity,
    shared: Arc<Shared>,
    commands: mpsc::Sender<Command>,
    initial_peers: Vec<Multiaddr>,
    mdns: bool,
    remember: Option<PathBuf>,
    /// As it is in the file.
    saved: Mutex<RememberedPeers>,
    announcing: Mutex<Announcing>,
    stop: CancellationToken,
    _stop_with_the_last_clone: DropGuard,
}

/// The event loop is gone.
struct Gone;

/// What a look-up of a swarm found.
#[derive(Debug, Clone)]
pub struct Discovery {
    /// Verified and unexpired, the newest of each peer, in all states but [`State::Offline`].
    pub announcements: Vec<Announcement>,
    /// DHT requests sent.
    pub requests: usize,
}

/// A model that somebody serves in this DHT.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelListing {
    /// The swarm's prefix.
    pub dht_prefix: String,
    /// The model's hub id or name.
    pub model: String,
    /// Which weights and arithmetic.
    pub fingerprint: [u8; 32],
    /// The hub's revision, empty where there is none.
    pub revision: String,
    /// How many blocks the whole model has.
    pub model_blocks: usize,
    /// How many of its nodes are listed here, which is not all of them.
    pub listed_peers: usize,
}

impl Swarm {
    /// Starts the network; listens on all addresses when it returns. Has to be called within a tokio runtime.
    pub async fn start(config: SwarmConfig, service: Arc<dyn Service>) -> Result<Self, StartError> {
        if let Some(address) = config.initial_peers.iter().find(|address| split_peer(address).is_none()) {
            return Err(StartError::BadPeer { address: address.clone() });
        }
        let mut stack = network::build(&config)?;
        for address in &config.announce {
            stack.add_external_address(address.clone());
        }
        let remembered = match config.remember.clone() {
            Some(path) => {
                let now = unix_ms() / 1000;
                tokio::task::spawn_blocking(move || RememberedPeers::load(&path, now)).await.unwrap_or_default()
            }
            None => RememberedPeers::default(),
        };
        let shared = Arc::new(Shared::new(&config, remembered));
        let (commands, inbox) = mpsc::channel(MAX_COMMANDS);
        let stop = CancellationToken::new();
        let mut driver = Driver::new(stack, shared.clone(), service, inbox, stop.clone());
        driver.listen(&config.listen).await?;
        tokio::spawn(driver.run());
        let inner = Arc::new(Inner {
            identity: config.identity,
            shared,
            commands,
            initial_peers: config.initial_peers,
            mdns: config.mdns,
            remember: config.remember,
            saved: Mutex::default(),
            announcing: Mutex::default(),
            _stop_with_the_last_clone: stop.clone().drop_guard(),
            stop,
        });
        tokio::spawn(upkeep(Arc::downgrade(&inner), inner.stop.clone(), config.tuning.renew_every));
        Ok(Self(inner))
    }

    /// A handle that doesn't keep the network running.
    pub fn downgrade(&self) -> WeakSwarm {
        WeakSwarm(Arc::downgrade(&self.0))
    }

    /// This peer's id.
    pub fn peer_id(&self) -> PeerId {
        self.0.shared.peer_id
    }

    /// This peer's identity, to sign with.
    pub fn identity(&self) -> &Identity {
        &self.0.identity
    }

    /// What others can dial, without `/p2p`: the operator's choice, else what this peer listens on or is seen at.
    pub fn addresses(&self) -> Vec<Multiaddr> {
        self.0.shared.addresses()
    }

    /// The round trip time of the last ping to a connected peer.
    pub fn rtt(&self, peer: PeerId) -> Option<Duration> {
        self.0.shared.rtt(&peer)
    }

    /// Who is connected.
    pub fn connected(&self) -> Vec<PeerId> {
        self.0.shared.connected()
    }

    /// Addresses of peers that were good recently, from this run and (if there is a file) earlier ones, newest first.
    pub fn remembered(&self) -> Vec<Multiaddr> {
        self.0.shared.remembered().addresses()
    }

    /// Looks up who serves a model: one look-up for every 16 blocks, in parallel, all replicas united.
    pub async fn discover(&self, dht_prefix: &str, model_blocks: usize) -> Result<Discovery, DiscoverError> {
        check_prefix(dht_prefix)?;
        let keys = segments(0..model_blocks.min(MAX_MODEL_BLOCKS)).map(|segment| segment_key(dht_prefix, segment));
        let lookups = join_all(keys.map(|key| self.look_up(key))).await;
        let lookups = lookups.into_iter().collect::<Result<Vec<_>, Gone>>().map_err(|Gone| DiscoverError::Stopped)?;
        let requests = lookups.iter().map(|lookup| lookup.requests).sum();
        let values: Vec<Vec<u8>> = lookups.into_iter().flat_map(|lookup| lookup.values).collect();
        if values.is_empty() && requests == 0 {
            return Err(DiscoverError::Alone);
        }
        let found = self.unite(values, Vec::new(), Some(dht_prefix)).await;
        Ok(Discovery { announcements: in_service(found), requests })
    }

    /// Asks one peer for the announcements that it knows under a prefix. They are signed, so it matters little whom.
    pub async fn exchange(&self, peer: PeerId, dht_prefix: &str) -> Result<Vec<Announcement>, RpcError> {
        let response = self.request(peer, &[], rpc::Request::exchange(dht_prefix), EXCHANGE_TIMEOUT).await?;
        match response.body {
            Some(response::Body::Exchange(exchange)) => {
                let found = self.unite(Vec::new(), exchange.announcements, Some(dht_prefix)).await;
                Ok(in_service(found))
            }
            Some(response::Body::Failure(failure)) => Err(RpcError::Refused { peer, message: failure.message }),
            _ => Err(RpcError::Malformed { peer, reason: "it is no answer to an exchange".to_owned() }),
        }
    }

    /// Lists the models that are served in this DHT.
    pub async fn models(&self) -> Result<Vec<ModelListing>, DiscoverError> {
        let lookup = self.look_up(models_key()).await.map_err(|Gone| DiscoverError::Stopped)?;
        if lookup.values.is_empty() && lookup.requests == 0 {
            return Err(DiscoverError::Alone);
        }
        let mut listings: BTreeMap<(String, [u8; 32]), ModelListing> = BTreeMap::new();
        for announcement in in_service(self.unite(lookup.values, Vec::new(), None).await) {
            let key = (announcement.dht_prefix.clone(), announcement.fingerprint);
            let listing = listings.entry(key).or_insert_with(|| ModelListing {
                dht_prefix: announcement.dht_prefix,
                model: announcement.model,
                fingerprint: announcement.fingerprint,
                revision: announcement.revision,
                model_blocks: announcement.model_blocks,
                listed_peers: 0,
            });
            listing.listed_peers += 1;
        }
        Ok(listings.into_values().collect())
    }

    /// Asks a peer, dialling it at `addresses` (or where the DHT knows it) if need be. Where it answers that it failed, its
    /// message is fit to be shown ([`clean`]).
    pub async fn request(
        &self,
        peer: PeerId,
        addresses: &[Multiaddr],
        request: rpc::Request,
        timeout: Duration,
    ) -> Result<rpc::Response, RpcError> {
        let deadline = Instant::now() + timeout;
        match tokio::time::timeout_at(deadline, self.connect(peer, addresses)).await {
            Ok(Ok(Ok(()))) => {}
            Ok(Ok(Err(reason))) => return Err(RpcError::NotConnected { peer, reason }),
            Ok(Err(Gone)) => return Err(RpcError::Stopped),
            Err(_) => return Err(RpcError::NotConnected { peer, reason: took_too_long(timeout) }),
        }
        let sent = self.command(|reply| Command::Request { peer, request, reply });
        let lost = |reason: &str| RpcError::Lost { peer, reason: reason.to_owned() };
        match tokio::time::timeout_at(deadline, sent).await {
            Err(_) => Err(RpcError::Timeout { peer, after: timeout }),
            Ok(Err(Gone)) => Err(RpcError::Stopped),
            Ok(Ok(Ok(mut response))) => {
                if let Some(response::Body::Failure(failure)) = &mut response.body {
                    failure.message = clean(&failure.message);
                }
                Ok(response)
            }
            Ok(Ok(Err(failure))) => Err(match failure {
                OutboundFailure::DialFailure => {
                    RpcError::NotConnected { peer, reason: "the connection was lost".to_owned() }
                }
                OutboundFailure::UnsupportedProtocols => RpcError::Unsupported { peer },
                OutboundFailure::Timeout => RpcError::Timeout { peer, after: timeout },
                OutboundFailure::ConnectionClosed => lost("it was closed"),
                OutboundFailure::Io(error) => lost(&error.to_string()),
            }),
        }
    }

    /// The kept stream to a peer: opened on first use (dialling if need be), shared by all who ask after that.
    pub async fn link(&self, peer: PeerId, addresses: &[Multiaddr]) -> Result<Link, LinkError> {
        if let Some(link) = self.0.shared.links.outbound(&peer) {
            return Ok(link);
        }
        let opening = async {
            match self.connect(peer, addresses).await {
                Ok(Ok(())) => {}
                Ok(Err(reason)) => return Err(LinkError::NotConnected { peer, reason }),
                Err(Gone) => return Err(LinkError::Stopped),
            }
            match self.command(|reply| Command::Link { peer, reply }).await {
                Ok(Ok(link)) => Ok(link),
                Ok(Err(reason)) => Err(LinkError::NoStream { peer, reason }),
                Err(Gone) => Err(LinkError::Stopped),
            }
        };
        let after = self.0.shared.tuning.link_timeout;
        tokio::time::timeout(after, opening).await.unwrap_or(Err(LinkError::Timeout { peer, after }))
    }

    /// Ends: what was sent on links leaves first (for two seconds at most), then everything is closed. An announcement stands
    /// until it expires unless [`Swarm::withdraw`] was called before.
    pub async fn stop(&self) {
        let links = self.0.shared.links.all();
        let finished = join_all(links.iter().map(Link::finish));
        if tokio::time::timeout(FINISH_TIMEOUT, finished).await.is_err() {
            tracing::warn!("some peers did not take all frames in time");
        }
        let _ = self.command(|reply| Command::Stop { reply }).await;
        self.0.stop.cancel();
        // A service that blocks is not waited for any longer than that.
        let _ = tokio::time::timeout(FINISH_TIMEOUT, self.0.shared.links.ended()).await;
        self.0.save_remembered().await;
    }

    async fn connect(&self, peer: PeerId, addresses: &[Multiaddr]) -> Result<Result<(), String>, Gone> {
        if self.0.shared.is_connected(&peer) {
            return Ok(Ok(()));
        }
        let addresses = addresses.to_vec();
        self.command(|reply| Command::Connect { peer, addresses, reply }).await
    }

    async fn look_up(&self, key: RecordKey) -> Result<Lookup, Gone> {
        self.command(|reply| Command::Get { key, reply }).await
    }

    async fn command<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, Gone> {
        let (reply, outcome) = oneshot::channel();
        self.0.commands.send(command(reply)).await.map_err(|_| Gone)?;
        outcome.await.map_err(|_| Gone)
    }

    /// The newest announcement of each peer in all this, with its signature checked, under one prefix or all; and keeps them
    /// for peer exchange. Checking takes 0.1 ms an announcement, so it is not done on the async threads.
    async fn unite(
        &self,
        values: Vec<Vec<u8>>,
        entries: Vec<SignedAnnouncement>,
        dht_prefix: Option<&str>,
    ) -> Vec<Verified> {
        let now = unix_ms();
        let united = tokio::task::spawn_blocking(move || {
            let mut union = Union::default();
            values.iter().for_each(|value| union.add_record(value, now));
            union.add_all(&entries, now);
            union.into_verified().collect::<Vec<_>>()
        });
        let mut found = united.await.unwrap_or_default();
        if let Some(dht_prefix) = dht_prefix {
            found.retain(|verified| verified.body().dht_prefix == dht_prefix);
            self.0.shared.known().keep(dht_prefix, &found, now);
        }
        found
    }
}

impl std::fmt::Debug for Swarm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Swarm").field("peer_id", &self.peer_id()).finish_non_exhaustive()
    }
}

impl WeakSwarm {
    /// The swarm, if somebody still keeps it running. It may have been stopped all the same, and says so then.
    pub fn upgrade(&self) -> Option<Swarm> {
        self.0.upgrade().map(Swarm)
    }
}

impl std::fmt::Debug for WeakSwarm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("WeakSwarm").field(&self.upgrade()).finish()
    }
}

impl Inner {
    fn announcing(&self) -> MutexGuard<'_, Announcing> {
        // Nothing in the critical sections panics half-way, so a poisoned one is as good as another.
        self.announcing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn save_remembered(&self) {
        let Some(path) = self.remember.clone() else { return };
        let remembered = self.shared.remembered().clone();
        {
            let mut saved = self.saved.lock().unwrap_or_else(PoisonError::into_inner);
            if *saved == remembered {
                return;
            }
            saved.clone_from(&remembered);
        }
        let saving = tokio::task::spawn_blocking(move || remembered.save(&path));
        if let Ok(Err(error)) = saving.await {
            tracing::warn!(%error, "this node may not find its peers again after a restart");
        }
    }
}

fn took_too_long(timeout: Duration) -> String {
    format!("no answer within {} s", timeout.as_secs_f32())
}

/// The typed form of those who are there; values of newer versions are left out.
fn in_service(found: Vec<Verified>) -> Vec<Announcement> {
    let typed = found.into_iter().filter_map(|verified| {
        let peer = verified.peer_id();
        Announcement::try_from(verified)
            .inspect_err(|error| tracing::debug!(%peer, %error, "left out an announcement"))
            .ok()
    });
    typed.filter(|announcement| announcement.state != State::Offline).collect()
}

/// Renews the announcement and saves the remembered peers, until the swarm stops or its last handle is gone.
async fn upkeep(inner: Weak<Inner>, stop: CancellationToken, every: Duration) {
    let upkeep = async {
        let mut pause = every;
        loop {
            tokio::time::sleep(pause).await;
            let Some(inner) = inner.upgrade() else { return };
            let swarm = Swarm(inner);
            let fresh_for = swarm.0.announcing().fresh_for(Instant::now(), every);
            if fresh_for.is_zero() {
                swarm.renew().await;
            }
            swarm.0.save_remembered().await;
            pause = swarm.0.announcing().fresh_for(Instant::now(), every);
        }
    };
    tokio::select! {
        () = stop.cancelled() => {}
        () = upkeep => {}
    }
}
