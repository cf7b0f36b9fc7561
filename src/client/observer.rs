//! Looking at a swarm without using it: who serves what, and how far away.

use std::{
    collections::{HashMap, HashSet},
    pin::pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use futures::{
    StreamExt,
    future::{self, join_all},
    stream::FuturesUnordered,
};
use libp2p::PeerId;

use super::{
    ClientError, choice, inbox::Inbox, legs::Legs, local_model::ModelIdentity, speeds::Speeds, view::SwarmView,
};
use crate::swarm::{
    RpcError, Swarm, SwarmConfig, WireCodec,
    announcement::{Announcement, unix_ms},
    proto::rpc,
};

/// How long a peer has to answer a probe. One that is slower is not considered while others are there.
const PROBE_TIMEOUT: Duration = Duration::from_secs(2);

/// Once the peers that answered cover the model, how much longer the others have: a near one answers in this time, and a far
/// one would not be chosen.
const PROBE_GRACE: Duration = Duration::from_millis(150);

/// Probes under way at a time: each may have to dial.
const PROBES_AT_A_TIME: usize = 128;

/// How long a measured round trip counts where a view is looked up.
const RTT_LIFETIME: Duration = Duration::from_secs(30);

/// What is known of the swarm is used for so long, as announcements count for minutes. A peer that died meanwhile is noticed
/// when it is dialled, and costs a retry.
const VIEW_LIFETIME: Duration = Duration::from_secs(600);

/// What is older than this when it is used is renewed meanwhile, for the next time: so long, and a little for each peer, since all
/// of them are told about each time.
const REFRESH_AFTER: Duration = Duration::from_secs(3);
const REFRESH_AFTER_A_PEER: Duration = Duration::from_millis(20);

/// How long a look-up in the DHT is waited for where peers have told what they know.
const QUICK_LOOK_UP: Duration = Duration::from_secs(3);

/// Probes that show a link's bandwidth; a request may have 64 KiB. The large one is sent only where the small one came back soon: on
/// a narrow link it would keep somebody's steps waiting for seconds.
const SMALL_ECHO_BYTES: usize = 4 * 1024;
const ECHO_BYTES: usize = 48 * 1024;

/// How much later than an empty probe the small echo may come: it was some 80 KB/s both ways then, and the large one takes half a second more.
const SOON: Duration = Duration::from_millis(100);

/// Peers to which the bandwidth is measured at a time.
const ECHOES: usize = 32;

/// Peers whose speed is remembered; a larger swarm's are chosen by what they announce.
const MOST_SPEEDS: usize = 4096;

/// Peers that are asked for what they know, where the view is renewed. One knows nearly all; the others make up for one that lags.
const EXCHANGE_WITH: usize = 3;

impl Known {
    /// The newest of each peer counts.
    fn learn(&mut self, announcements: impl IntoIterator<Item = Announcement>) {
        for heard in announcements {
            match self.announcements.get(&heard.peer_id) {
                Some(known) if known.sequence >= heard.sequence => {}
                _ => {
                    self.announcements.insert(heard.peer_id, heard);
                }
            }
        }
        let now = unix_ms();
        self.announcements.retain(|_, known| known.expires_unix_ms > now);
        self.renewed = Some(Instant::now());
    }
}

/// Starts the network and joins the DHT. What arrives goes to `inbox`.
pub(crate) async fn join(config: SwarmConfig, inbox: Arc<Inbox>, join_timeout: Duration) -> Result<Swarm, ClientError> {
    let swarm = Swarm::start(config, inbox).await?;
    swarm.search(join_timeout).await?;
    Ok(swarm)
}

/// A look at one model's swarm. Cheap to clone.
#[derive(Clone)]
pub struct Observer {
    swarm: Swarm,
    identity: Arc<ModelIdentity>,
    blocks: usize,
    /// What peers have to speak to be of use.
    codec: WireCodec,
    measured: Arc<Mutex<HashMap<PeerId, (Duration, Instant)>>>,
    speeds: Arc<Mutex<HashMap<PeerId, Speeds>>>,
    legs: Arc<Mutex<Legs>>,
    known: Arc<Mutex<Known>>,
}

/// What is known of the swarm.
#[derive(Default)]
struct Known {
    announcements: HashMap<PeerId, Announcement>,
    /// When they were last renewed.
    renewed: Option<Instant>,
    is_renewing: bool,
    is_measuring_bandwidth: bool,
}

impl Observer {
    /// Starts the network and joins the swarm of a model with this many blocks.
    ///
    /// # Errors
    /// Where the network can't be started, or no initial peer can be reached.
    pub async fn connect(
        identity: ModelIdentity,
        blocks: usize,
        config: SwarmConfig,
        join_timeout: Duration,
    ) -> Result<Self, ClientError> {
        let swarm = join(config, Arc::new(Inbox::default()), join_timeout).await?;
        Ok(Self::of(swarm, identity, blocks))
    }

    /// Looks through a network that was joined already.
    pub(crate) fn of(swarm: Swarm, identity: ModelIdentity, blocks: usize) -> Self {
        let codec = WireCodec::Raw;
        Self {
            swarm,
            identity: Arc::new(identity),
            blocks,
            codec,
            measured: Arc::default(),
            speeds: Arc::default(),
            legs: Arc::default(),
            known: Arc::default(),
        }
    }

    /// Leaves out peers that don't speak a codec.
    pub(crate) fn require_codec(&mut self, codec: WireCodec) {
        self.codec = codec;
    }

    fn empty_view(&self) -> SwarmView {
        SwarmView { codec: self.codec, ..SwarmView::new((*self.identity).clone(), self.blocks) }
    }

    /// The network.
    pub fn swarm(&self) -> &Swarm {
        &self.swarm
    }

    /// The model whose swarm it is.
    pub fn identity(&self) -> &ModelIdentity {
        &self.identity
    }

    /// Looks the swarm up in the DHT.
    ///
    /// # Errors
    /// Where the look-up fails.
    pub async fn look_up(&self) -> Result<SwarmView, ClientError> {
        let discovery = self.swarm.discover(&self.identity.dht_prefix, self.blocks).await?;
        let mut view = self.empty_view();
        view.add(discovery.announcements.clone());
        if !discovery.announcements.is_empty() {
            // Whoever has left is not in it.
            let mut known = self.known();
            known.announcements.clear();
            known.learn(discovery.announcements);
        }
        Ok(view)
    }

    /// Looks the swarm up in the DHT and asks peers that are known for what they know, both at once. Where these answer, a DHT
    /// that is slow, for the peers in it that are gone, is not waited for.
    pub(crate) async fn look_around(&self) -> Result<SwarmView, ClientError> {
        let mut looking = pin!(self.look_up());
        let (heard, found) =
            future::join(self.ask_around(), tokio::time::timeout(QUICK_LOOK_UP, looking.as_mut())).await;
        match found {
            Ok(found) if heard.is_empty() => return found,
            Err(_) if heard.is_empty() => return looking.await,
            _ => {}
        }
        let mut known = self.known();
        known.learn(heard);
        let mut view = self.empty_view();
        view.add(known.announcements.values().cloned());
        Ok(view)
    }

    /// What some peers of the swarm know of it.
    async fn ask_around(&self) -> Vec<Announcement> {
        let connected = self.swarm.connected();
        let mut asked: Vec<PeerId> = self.known().announcements.keys().copied().collect();
        asked.retain(|peer| connected.contains(peer));
        asked.truncate(EXCHANGE_WITH);
        let ask = |peer| tokio::time::timeout(PROBE_TIMEOUT, self.swarm.exchange(peer, &self.identity.dht_prefix));
        let answers = join_all(asked.into_iter().map(ask)).await;
        answers.into_iter().filter_map(|answer| answer.ok()?.ok()).flatten().collect()
    }

    /// The newest that is known of a peer.
    pub(crate) fn announcement(&self, peer: PeerId) -> Option<Announcement> {
        self.known().announcements.get(&peer).cloned()
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        // Every change is one operation on a map.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The swarm as it was known a while ago, with the round trips of then: costs nothing. `None` where nothing is known, or too
    /// long ago. Renews itself meanwhile, for the next time.
    pub(crate) fn recent(&self) -> Option<SwarmView> {
        let mut view = self.empty_view();
        {
            let mut known = self.known();
            let age = known.renewed?.elapsed();
            if age > VIEW_LIFETIME {
                return None;
            }
            let now = unix_ms();
            view.add(known.announcements.values().filter(|known| known.expires_unix_ms > now).cloned());
            let refresh_after = REFRESH_AFTER + REFRESH_AFTER_A_PEER * known.announcements.len() as u32;
            if age > refresh_after && !known.is_renewing {
                known.is_renewing = true;
                tokio::spawn(self.clone().renew());
            }
        }
        let measured = self.measured.lock().unwrap_or_else(PoisonError::into_inner);
        for peer in &mut view.peers {
            peer.rtt = measured.get(&peer.announcement.peer_id).map(|(rtt, _)| *rtt);
        }
        drop(measured);
        view.leave_out_silent();
        self.fill_in_speeds(&mut view);
        Some(view)
    }

    fn speeds(&self) -> MutexGuard<'_, HashMap<PeerId, Speeds>> {
        // Every change is one operation on a map.
        self.speeds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds what was seen of the peers' speeds.
    pub(crate) fn fill_in_speeds(&self, view: &mut SwarmView) {
        let speeds = self.speeds();
        for peer in &mut view.peers {
            peer.speeds = speeds.get(&peer.announcement.peer_id).copied().unwrap_or_default();
        }
    }

    /// Something was seen of a peer's speed.
    pub(crate) fn learn(&self, peer: PeerId, learn: impl FnOnce(&mut Speeds, Instant)) {
        let now = Instant::now();
        let mut speeds = self.speeds();
        if speeds.len() >= MOST_SPEEDS && !speeds.contains_key(&peer) {
            speeds.retain(|_, known| known.counts(now));
        }
        if speeds.len() < MOST_SPEEDS || speeds.contains_key(&peer) {
            learn(speeds.entry(peer).or_default(), now);
        }
    }

    fn legs(&self) -> MutexGuard<'_, Legs> {
        // Every change is one operation on a map.
        self.legs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is known of the delays between peers, as [`route::Task`](super::route::Task) has it.
    pub(crate) fn known_legs(&self) -> HashMap<(PeerId, PeerId), f64> {
        self.legs().known(Instant::now())
    }

    /// A step that was alone on its route took so long, and the hops `spent` so much of it.
    pub(crate) fn learn_legs(&self, hops: &[PeerId], step: Duration, spent: Duration) {
        if hops.len() < 2 {
            return;
        }
        let rtts: Vec<Option<Duration>> = hops.iter().map(|peer| self.rtt(*peer)).collect();
        let Some(together) = choice::between_hops_seconds(step, spent, &rtts) else { return };
        let rtt = |peer: PeerId| hops.iter().zip(&rtts).find(|(hop, _)| **hop == peer).and_then(|(_, rtt)| *rtt);
        let suppose = |one, other| choice::supposed_leg_seconds(rtt(one), rtt(other));
        self.legs().learn(hops, together, suppose, Instant::now());
    }

    /// Measures the bandwidth to the peers of the view to which it is not known, or to some of them: those that are near.
    pub(crate) async fn measure_bandwidth(&self, view: &mut SwarmView) {
        let unknown = unknown_bandwidths(view);
        join_all(unknown.into_iter().map(|(rtt, peer)| self.measure_echo(rtt, peer))).await;
        self.fill_in_speeds(view);
    }

    /// The same for the next time, without waiting for it: what is waited for is somebody's first token.
    pub(crate) fn measure_bandwidth_meanwhile(&self, view: &SwarmView) {
        let unknown = unknown_bandwidths(view);
        if unknown.is_empty() || std::mem::replace(&mut self.known().is_measuring_bandwidth, true) {
            return;
        }
        let observer = self.clone();
        tokio::spawn(async move {
            join_all(unknown.into_iter().map(|(rtt, peer)| observer.measure_echo(rtt, peer))).await;
            observer.known().is_measuring_bandwidth = false;
        });
    }

    async fn measure_echo(&self, rtt: Duration, peer: Announcement) {
        for bytes in [SMALL_ECHO_BYTES, ECHO_BYTES] {
            let probe = rpc::ProbeRequest { payload: vec![0; bytes].into() };
            let request = rpc::Request { body: Some(rpc::request::Body::Probe(probe)) };
            let started = Instant::now();
            let answer = self.swarm.request(peer.peer_id, &peer.addresses, request, PROBE_TIMEOUT).await;
            let took = started.elapsed();
            match answer {
                Ok(_) => {
                    let later = took.saturating_sub(rtt);
                    if bytes == SMALL_ECHO_BYTES && later <= SOON {
                        continue;
                    }
                    self.learn(peer.peer_id, |speeds, now| speeds.learn_echo(bytes, later, now));
                }
                // Whoever takes longer than that has a narrow link, or one on which something else is under way.
                Err(RpcError::Timeout { .. }) => {
                    self.learn(peer.peer_id, |speeds, now| speeds.learn_no_echo(bytes, took, now));
                }
                Err(error) => tracing::debug!(peer = %peer.peer_id, %error, "the bandwidth can't be measured"),
            }
            return;
        }
    }

    /// Asks some peers of the swarm for what they know of it, and measures those that are new.
    async fn renew(self) {
        let heard = self.ask_around().await;
        if heard.is_empty() {
            // Those who were known are gone.
            if let Err(error) = self.look_up().await {
                tracing::debug!(%error, "the view of the swarm is not renewed");
            }
        } else {
            self.known().learn(heard);
        }
        let mut view = self.empty_view();
        view.add(self.known().announcements.values().cloned());
        self.measure(&mut view, true).await;
        view.leave_out_silent();
        self.fill_in_speeds(&mut view);
        self.known().is_renewing = false;
        self.measure_bandwidth_meanwhile(&view);
    }

    /// Measures the round trip to every peer of the view, unless that was done a moment ago and it is still connected. With `impatient`, only until those
    /// that answered cover the model, and a moment longer.
    pub async fn measure(&self, view: &mut SwarmView, impatient: bool) {
        let now = Instant::now();
        let connected: HashSet<PeerId> = self.swarm.connected().into_iter().collect();
        let mut unknown = Vec::new();
        for peer in &mut view.peers {
            let id = peer.announcement.peer_id;
            let known = self.measured.lock().unwrap_or_else(PoisonError::into_inner);
            match known.get(&id) {
                Some((rtt, at)) if impatient && now.duration_since(*at) < RTT_LIFETIME && connected.contains(&id) => {
                    peer.rtt = Some(*rtt);
                }
                _ => unknown.push(peer.announcement.clone()),
            }
        }
        let mut unknown = unknown.into_iter();
        let mut probes: FuturesUnordered<_> =
            unknown.by_ref().take(PROBES_AT_A_TIME).map(|peer| self.clone().probe(peer)).collect();
        let mut patience = None;
        loop {
            if impatient && patience.is_none() && view.answering_cover_the_model() {
                patience = Some(tokio::time::Instant::now() + PROBE_GRACE);
            }
            let next = match patience {
                Some(patience) => tokio::time::timeout_at(patience, probes.next()).await.unwrap_or(None),
                None => probes.next().await,
            };
            let Some((peer_id, rtt)) = next else { break };
            if let (Some(peer), Some(rtt)) = (view.peer_mut(peer_id), rtt) {
                peer.rtt = Some(rtt);
                self.measured.lock().unwrap_or_else(PoisonError::into_inner).insert(peer_id, (rtt, Instant::now()));
            }
            probes.extend(unknown.next().map(|peer| self.clone().probe(peer)));
        }
        // As many as a view has: what is older than that is of peers long gone.
        let mut known = self.measured.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|_, (_, at)| at.elapsed() < VIEW_LIFETIME);
    }

    /// The round trip to a peer, as it was last measured.
    pub(crate) fn rtt(&self, peer: PeerId) -> Option<Duration> {
        self.measured.lock().unwrap_or_else(PoisonError::into_inner).get(&peer).map(|(rtt, _)| *rtt)
    }

    /// Forgets what was measured of a peer, so that it is asked again.
    pub(crate) fn forget(&self, peer: PeerId) {
        self.measured.lock().unwrap_or_else(PoisonError::into_inner).remove(&peer);
    }

    /// The round trip to a peer; `None` where it does not answer.
    async fn probe(self, announcement: Announcement) -> (PeerId, Option<Duration>) {
        let request = || rpc::Request {
            body: Some(rpc::request::Body::Probe(rpc::ProbeRequest { payload: Default::default() })),
        };
        let (peer, addresses) = (announcement.peer_id, &announcement.addresses);
        let ask = || self.swarm.request(peer, addresses, request(), PROBE_TIMEOUT);
        // The first one pays for the connection.
        if ask().await.is_err() {
            return (peer, None);
        }
        let started = Instant::now();
        (peer, ask().await.ok().map(|_| started.elapsed()))
    }
}

/// The peers of a view to which the bandwidth is not known, the nearest first; no more than are measured at a time.
fn unknown_bandwidths(view: &SwarmView) -> Vec<(Duration, Announcement)> {
    let now = Instant::now();
    let mut unknown: Vec<(Duration, Announcement)> = view
        .peers
        .iter()
        .filter(|peer| !peer.speeds.knows_bandwidth(now))
        .filter_map(|peer| Some((peer.rtt?, peer.announcement.clone())))
        .collect();
    unknown.sort_by_key(|(rtt, _)| *rtt);
    unknown.truncate(ECHOES);
    unknown
}
