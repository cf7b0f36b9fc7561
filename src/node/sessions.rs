//! All sessions of a node, and what it does with every frame that arrives: the border of the node.
//!
//! Whatever a peer sends, the node goes on: what is not allowed is counted, answered where an answer helps an honest peer,
//! and changes nothing.

mod leaving;

use std::{
    collections::{HashMap, hash_map::Entry},
    pin::pin,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::future::BoxFuture;
use libp2p::PeerId;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

pub use super::settings::SessionSettings;
use super::{
    border::{Hosted, Refusal},
    early::Early,
    held::{HeldBytes, HeldPermit},
    session::{Counts, HopSession, Links, Means, NotTaken},
};
use crate::{
    engine::Engine,
    swarm::{
        Frame, Link, Service, WeakSwarm,
        announcement::{Announcement, unix_ms},
        drain,
        prefix::PrefixNames,
        proto::{rpc, session as proto},
        ticket::{SessionId, Ticket},
    },
};

/// Connecting to the next hop takes no longer than this, so that an opening is answered while the client still waits.
const NEXT_HOP_TIMEOUT: Duration = Duration::from_secs(10);

/// What the sessions need of the node; there once its blocks are loaded.
pub(crate) struct Host {
    pub(crate) engine: Engine,
    /// The swarm holds the sessions, as what it hands its frames to; they must not hold it.
    pub(crate) swarm: WeakSwarm,
    pub(crate) hosted: Hosted,
}

/// Why a node takes no new sessions, and wants to be rid of those it has.
const ASKED_TO_STOP: &str = "the node was asked to stop";

/// One client may hold this part of what the node may.
const CLIENTS_SHARE: usize = 2;

/// Steps that came before their tickets may hold this part of what the node may: nobody has vouched for them.
const EARLY_SHARE: usize = 8;

/// A session's place on the node. It is taken before the opening waits for anything, so that a close finds it, and so that
/// openings count.
struct Slot {
    client: PeerId,
    /// Of the client's share of what may be held.
    held: HeldBytes,
    /// Of the client's share of what may be kept of what was sent on.
    history_bytes: HeldBytes,
    /// `None` until the first opening is done.
    session: Option<Arc<HopSession>>,
    /// The epoch of the opening that is under way. One with a newer ticket takes its place.
    opening: Option<u64>,
}

/// A step that came before its session was open.
struct EarlyStep {
    link: Link,
    header: proto::Frame,
    step: proto::Step,
    payload: Bytes,
    _permit: HeldPermit,
}

/// The right to be handed over now, by session.
type Turns = HashMap<SessionId, OwnedSemaphorePermit>;

/// A node's sessions. See the module's docs.
pub struct Sessions {
    settings: SessionSettings,
    host: OnceLock<Host>,
    leaving: AtomicBool,
    held: HeldBytes,
    history_bytes: HeldBytes,
    early_bytes: HeldBytes,
    counts: Arc<Counts>,
    sessions: Mutex<HashMap<SessionId, Slot>>,
    /// Only looked at under the lock of the sessions, so that no step is missed when its session comes.
    early: Mutex<Early<EarlyStep>>,
    steps: AtomicU64,
    refused: AtomicU64,
    /// How many may be handed over beside those that are.
    handing: Arc<Semaphore>,
    /// Sessions whose turn to be handed over it is, and whose clients have not said yet to whom.
    turns: Mutex<Turns>,
    /// A session ended.
    ended: Notify,
    /// The node's owner asked it to leave.
    drain: CancellationToken,
}

impl Sessions {
    /// No sessions yet, and none accepted until its blocks are loaded.
    pub fn new(settings: SessionSettings) -> Arc<Self> {
        let held = HeldBytes::new(settings.held_bytes);
        Arc::new(Self {
            settings,
            host: OnceLock::new(),
            leaving: AtomicBool::new(false),
            early_bytes: held.share(EARLY_SHARE),
            early: Mutex::default(),
            held,
            history_bytes: HeldBytes::new(settings.history_bytes),
            counts: Arc::default(),
            sessions: Mutex::default(),
            steps: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            handing: Arc::new(Semaphore::new(leaving::HAND_OVER_AT_A_TIME)),
            turns: Mutex::default(),
            ended: Notify::new(),
            drain: CancellationToken::new(),
        })
    }

    /// Accepts sessions from now on.
    pub(crate) fn serve(&self, host: Host) {
        if self.host.set(host).is_err() {
            tracing::error!("a node's blocks were loaded twice; the first stay");
        }
    }

    /// How many sessions are open.
    pub fn count(&self) -> usize {
        self.lock().len()
    }

    /// Waits until the last session has ended.
    pub async fn all_ended(&self) {
        loop {
            let mut ended = pin!(self.ended.notified());
            // From here on no end is missed.
            ended.as_mut().enable();
            if self.count() == 0 {
                return;
            }
            ended.await;
        }
    }

    /// Waits until the node's owner asks it, from elsewhere, to leave.
    pub async fn drain_requested(&self) {
        self.drain.cancelled().await;
    }

    /// Whoever holds the node's key may ask it to leave.
    fn request_drain(&self, request: &rpc::DrainRequest) -> Result<rpc::DrainResponse, String> {
        let swarm = self.host.get().and_then(|host| host.swarm.upgrade());
        let swarm = swarm.ok_or_else(|| "this node is still loading its blocks".to_owned())?;
        drain::verify(request, &swarm.identity().keypair().public(), unix_ms()).map_err(|error| error.to_string())?;
        tracing::info!("this node was asked by its owner to leave");
        self.drain.cancel();
        Ok(rpc::DrainResponse { sessions: self.count() as u32 })
    }

    /// Ends the sessions that have outlived their clients.
    pub(crate) fn sweep(&self, now: Instant) {
        if let (Some(host), Some(before)) = (self.host.get(), now.checked_sub(self.settings.prefix_idle)) {
            host.engine.forget_prefixes(before);
        }
        let over: Vec<_> = self
            .lock()
            .iter()
            .filter_map(|(id, slot)| {
                let why = slot.session.as_ref()?.is_over(now, self.settings.reconnect_grace, self.settings.idle)?;
                Some((*id, why))
            })
            .collect();
        for (id, why) in over {
            if let Some(session) = self.lock().remove(&id).and_then(|slot| slot.session) {
                tracing::info!(session = %id, "closing a session: {why}");
                session.tell_leaving(proto::Code::UnknownSession, &format!("the session was closed: {why}"));
                session.close();
                self.ended.notify_waiters();
            }
        }
        let late = {
            let sessions = self.lock();
            let being_opened = |id| sessions.get(&id).is_some_and(|slot| slot.opening.is_some());
            self.early().expire(now, being_opened)
        };
        for EarlyStep { link, header, step, .. } in late {
            self.refuse(&link, &header, Refusal::unknown_session(), step.number);
        }
    }

    /// The map is changed in single operations, so a panic elsewhere can't leave it half changed.
    fn lock(&self) -> MutexGuard<'_, HashMap<SessionId, Slot>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Of the same kind.
    fn early(&self) -> MutexGuard<'_, Early<EarlyStep>> {
        self.early.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn all(&self) -> Vec<Arc<HopSession>> {
        self.lock().values().filter_map(|slot| slot.session.clone()).collect()
    }

    fn get(&self, id: SessionId) -> Option<Arc<HopSession>> {
        self.lock().get(&id)?.session.clone()
    }

    fn refuse(&self, link: &Link, frame: &proto::Frame, refusal: Refusal, number: u64) {
        self.refused.fetch_add(1, Ordering::Relaxed);
        tracing::debug!(peer = %link.peer(), %refusal, "refused a frame");
        let fault = proto::Fault {
            code: refusal.code.into(),
            blame: match refusal.code {
                proto::Code::Busy | proto::Code::Leaving | proto::Code::CacheFull => proto::Blame::Nobody,
                proto::Code::NextHopLost => proto::Blame::Downstream,
                _ => proto::Blame::Client,
            }
            .into(),
            maybe_applied: false,
            number,
            peer: refusal.about.map(|peer| peer.to_bytes().into()).unwrap_or_default(),
            message: refusal.message,
        };
        let header = proto::Frame {
            session: frame.session.clone(),
            epoch: frame.epoch,
            body: Some(proto::frame::Body::Fault(fault)),
        };
        if link.send(Frame { header, payload: Bytes::new() }).is_err() {
            tracing::debug!(peer = %link.peer(), "a refusal could not be sent");
        }
    }

    fn step(&self, link: &Link, header: proto::Frame, step: proto::Step, payload: Bytes) {
        let number = step.number;
        let Some(id) = SessionId::from_wire(&header.session) else {
            return self.refuse(link, &header, Refusal::unknown_session(), number);
        };
        let session = {
            let sessions = self.lock();
            match sessions.get(&id).and_then(|slot| slot.session.clone()) {
                Some(session) => session,
                // Its client has no answer yet, so its ticket may be on the way.
                None if step.confirmed == 0 => return self.hold_early(link, header, step, payload),
                None => return self.refuse(link, &header, Refusal::unknown_session(), number),
            }
        };
        self.step_of(&session, Origin { link, header: &header }, step, payload);
    }

    /// Keeps a step until its session is open. The caller holds the lock of the sessions.
    fn hold_early(&self, link: &Link, header: proto::Frame, step: proto::Step, payload: Bytes) {
        let Some(id) = SessionId::from_wire(&header.session) else { return };
        let number = step.number;
        let busy = "too many steps wait here for their sessions to be opened: send them later";
        let Some(permit) = self.early_bytes.take(payload.len()) else {
            return self.refuse(link, &header, Refusal::new(proto::Code::Busy, busy), number);
        };
        let early = EarlyStep { link: link.clone(), header, step, payload, _permit: permit };
        if let Err(early) = self.early().hold(id, link.peer(), early, Instant::now()) {
            self.refuse(link, &early.header, Refusal::new(proto::Code::Busy, busy), number);
        }
    }

    /// Hands a step to its session.
    fn step_of(&self, session: &Arc<HopSession>, from: Origin<'_>, step: proto::Step, payload: Bytes) {
        let Origin { link, header } = from;
        let number = step.number;
        match session.step(link, header.epoch, (step, payload), Instant::now()) {
            Ok(()) => {
                self.steps.fetch_add(1, Ordering::Relaxed);
            }
            // The answer is that for an unknown session: a stranger learns nothing.
            Err(NotTaken::NotUpstream) => self.refuse(link, header, Refusal::unknown_session(), number),
            Err(NotTaken::NoRoom) => {
                let message = "too many bytes of waiting steps are held here: send fewer or smaller ones at a time";
                self.refuse(link, header, Refusal::new(proto::Code::Busy, message), number);
            }
        }
    }

    /// The session that a frame is about.
    fn session_of(&self, link: &Link, header: &proto::Frame) -> Option<Arc<HopSession>> {
        let session = SessionId::from_wire(&header.session).and_then(|id| self.get(id));
        if session.is_none() {
            tracing::debug!(peer = %link.peer(), "a frame of an unknown session");
        }
        session
    }

    fn replay(&self, link: &Link, header: &proto::Frame, replay: proto::Replay, payload: Bytes) {
        let taken = match self.session_of(link, header) {
            Some(session) => session.replay(link, header.epoch, (replay, payload)),
            None => Err(NotTaken::NotUpstream),
        };
        self.answer_part(link, header, taken);
    }

    /// Refuses a part of a replay or of a hand-over that was not taken.
    fn answer_part(&self, link: &Link, header: &proto::Frame, taken: Result<(), NotTaken>) {
        match taken {
            Ok(()) => {}
            Err(NotTaken::NotUpstream) => self.refuse(link, header, Refusal::unknown_session(), 0),
            Err(NotTaken::NoRoom) => {
                let message = "too many bytes of waiting steps are held here";
                self.refuse(link, header, Refusal::new(proto::Code::Busy, message), 0);
            }
        }
    }

    fn close(&self, link: &Link, header: &proto::Frame, close: &proto::Close) {
        let Some(id) = SessionId::from_wire(&header.session) else { return };
        let mut sessions = self.lock();
        match sessions.get(&id) {
            Some(slot) if slot.client == link.peer() => {
                let session = slot.session.clone();
                sessions.remove(&id);
                self.early().take(id);
                drop(sessions);
                if let Some(session) = session {
                    tracing::debug!(session = %id, "session closed by its client");
                    session.keep_at_close(close);
                    session.close();
                }
                self.ended.notify_waiters();
            }
            Some(_) => {
                drop(sessions);
                let message = "no such session of this client";
                self.refuse(link, header, Refusal::new(proto::Code::UnknownSession, message), 0);
            }
            None => {} // closed already
        }
    }

    /// Everything about an opening that needs no waiting. Where it passes, the session has its slot.
    fn check_open(&self, link: &Link, header: &proto::Frame, open: &proto::Open) -> Result<Opening, Refusal> {
        use proto::Code;
        let Some(host) = self.host.get() else {
            return Err(Refusal::new(Code::Busy, "this node is still loading its blocks"));
        };
        let ticket =
            Ticket::verify(open, unix_ms()).map_err(|error| Refusal::new(Code::BadTicket, error.to_string()))?;
        // Those that it has go on until they are elsewhere.
        if self.leaving.load(Ordering::Relaxed) && self.get(ticket.session).is_none() {
            return Err(Refusal::new(Code::Leaving, ASKED_TO_STOP));
        }
        if Some(ticket.session) != SessionId::from_wire(&header.session) || ticket.epoch != header.epoch {
            return Err(Refusal::new(Code::BadTicket, "the ticket is for another session or epoch than its frame"));
        }
        let next = open
            .next
            .as_ref()
            .map(|next| Announcement::of_an_address(next, unix_ms()))
            .transpose()
            .map_err(|error| Refusal::new(Code::BadTicket, format!("the next hop's announcement: {error}")))?;
        host.hosted.check_ticket(&ticket, link.peer(), next.as_ref())?;
        let next = next.filter(|next| next.peer_id == ticket.downstream);
        let prefix = open.prefix.as_ref().map(PrefixNames::from_wire).transpose();
        let prefix = prefix.map_err(|error| Refusal::new(Code::BadTicket, error.to_string()))?;
        self.take_slot(&ticket)?;
        Ok(Opening { ticket, next, prefix, adopt_prefix: open.adopt_prefix })
    }

    fn take_slot(&self, ticket: &Ticket) -> Result<(), Refusal> {
        use proto::Code;
        let mut sessions = self.lock();
        if let Some(slot) = sessions.get_mut(&ticket.session) {
            if slot.client != ticket.client {
                return Err(Refusal::new(Code::NotAllowed, "the session belongs to another client"));
            }
            // A route may change while this node still tries to reach the next hop of the old one.
            if slot.opening.is_some_and(|epoch| epoch >= ticket.epoch) {
                return Err(Refusal::new(Code::Busy, "the session is being opened already"));
            }
            slot.opening = Some(ticket.epoch);
            return Ok(());
        }
        if sessions.len() >= self.settings.max_sessions {
            return Err(Refusal::new(
                Code::Busy,
                format!("this node has {} sessions, the most it may", sessions.len()),
            ));
        }
        let own: Vec<&Slot> = sessions.values().filter(|slot| slot.client == ticket.client).collect();
        if own.len() >= self.settings.max_sessions_per_client {
            return Err(Refusal::new(Code::Busy, format!("{} sessions of one client are the most here", own.len())));
        }
        let (held, history_bytes) = match own.first() {
            Some(slot) => (slot.held.clone(), slot.history_bytes.clone()),
            None => (self.held.share(CLIENTS_SHARE), self.history_bytes.share(CLIENTS_SHARE)),
        };
        let slot = Slot { client: ticket.client, held, history_bytes, session: None, opening: Some(ticket.epoch) };
        sessions.insert(ticket.session, slot);
        Ok(())
    }

    /// Goes on with an opening that has its slot: connects to the next hop, opens the session, answers.
    async fn open(self: Arc<Self>, link: Link, header: proto::Frame, opening: Opening) {
        let (id, epoch) = (opening.ticket.session, opening.ticket.epoch);
        match self.finish_open(&link, opening).await {
            Ok(None) => tracing::debug!(session = %id, epoch, "an opening was overtaken by a newer one"),
            Ok(Some(opened)) => {
                let header = proto::Frame { body: Some(proto::frame::Body::Opened(opened)), ..header };
                if link.send(Frame { header, payload: Bytes::new() }).is_err() {
                    tracing::debug!(peer = %link.peer(), "the client left while its session was opened");
                }
                // It was let in just before, or was away: it may not have been told with the others.
                if self.leaving.load(Ordering::Relaxed)
                    && let Some(session) = self.get(id)
                {
                    session.tell_leaving(proto::Code::Leaving, ASKED_TO_STOP);
                }
            }
            Err(refusal) => {
                if let Entry::Occupied(mut slot) = self.lock().entry(id) {
                    if slot.get().opening.is_some_and(|newest| newest > epoch) {
                        return;
                    }
                    slot.get_mut().opening = None;
                    if slot.get().session.is_none() {
                        slot.remove();
                        self.early().take(id);
                        self.ended.notify_waiters();
                    }
                }
                self.refuse(&link, &header, refusal, 0);
            }
        }
    }

    /// `None` where a newer ticket was shown meanwhile: its opening has the slot, and answers.
    async fn finish_open(&self, link: &Link, opening: Opening) -> Result<Option<proto::Opened>, Refusal> {
        use proto::Code;
        let Opening { ticket, next, prefix, adopt_prefix } = opening;
        let Some(host) = self.host.get() else {
            return Err(Refusal::new(Code::Busy, "this node is still loading its blocks"));
        };
        let downstream = match next {
            None => None,
            Some(next) => Some(connect_next(host, &next).await?),
        };
        let id = ticket.session;
        let links = Links { control: link.clone(), downstream };
        let (watched, now) = (links.downstream.clone(), Instant::now());
        let (session, early) = {
            let mut sessions = self.lock();
            let Some(slot) = sessions.get_mut(&ticket.session) else {
                return Err(Refusal::new(Code::UnknownSession, "the session was closed while it was opened"));
            };
            if slot.opening.is_some_and(|newest| newest > ticket.epoch) {
                return Ok(None);
            }
            slot.opening = None;
            let session = match slot.session.clone() {
                Some(session) => {
                    session.reopen(ticket, links, now)?;
                    session
                }
                None => {
                    let means = Means {
                        engine: host.engine.clone(),
                        step_deadline: self.settings.step_deadline,
                        held: slot.held.clone(),
                        history_bytes: slot.history_bytes.clone(),
                        counts: self.counts.clone(),
                    };
                    let session = HopSession::new(ticket, links, means, now)
                        .map_err(|error| Refusal::new(Code::WrongBlocks, error.to_string()))?;
                    if let Some(prefix) = &prefix {
                        session.begin_with(prefix, adopt_prefix);
                    }
                    tracing::debug!(session = %id, client = %slot.client, "session opened");
                    slot.session.insert(Arc::new(session)).clone()
                }
            };
            (session, self.early().take(id))
        };
        // A link that ended before the session was in the map was not noticed for it.
        for link in [Some(link), watched.as_ref()].into_iter().flatten().filter(|link| link.is_closed()) {
            session.link_closed(link, now);
        }
        for EarlyStep { link, header, step, payload, .. } in early {
            self.step_of(&session, Origin { link: &link, header: &header }, step, payload);
        }
        Ok(Some(session.opened()))
    }

    /// What the node says of itself when asked.
    pub(crate) fn info(&self) -> rpc::InfoResponse {
        let load = self.host.get().map(|host| host.engine.load_now());
        rpc::InfoResponse {
            cache_tokens_left: load.map_or(0, |load| load.cache_tokens_left as u64),
            cache_tokens_total: load.map_or(0, |load| load.cache_tokens_total as u64),
            sessions: self.count() as u32,
            steps: self.steps.load(Ordering::Relaxed),
            frames_refused: self.refused.load(Ordering::Relaxed),
            tokens: self.counts.tokens.load(Ordering::Relaxed),
            tokens_replayed: self.counts.tokens_replayed.load(Ordering::Relaxed),
            bytes_replayed: self.counts.bytes_replayed.load(Ordering::Relaxed),
            history_bytes: self.history_bytes.held() as u64,
            prefix_tokens_reused: self.counts.prefix_tokens_reused.load(Ordering::Relaxed),
            prefix_tokens_kept: load.map_or(0, |load| load.cache_tokens_kept as u64),
            prefix_bytes: load.map_or(0, |load| load.kept_bytes as u64),
            tokens_taken_over: self.counts.tokens_taken_over.load(Ordering::Relaxed),
            bytes_taken_over: self.counts.bytes_taken_over.load(Ordering::Relaxed),
        }
    }
}

/// Where a step came from.
struct Origin<'a> {
    link: &'a Link,
    header: &'a proto::Frame,
}

/// An opening that passed the checks.
struct Opening {
    ticket: Ticket,
    next: Option<Announcement>,
    /// What a new session begins with.
    prefix: Option<PrefixNames>,
    adopt_prefix: bool,
}

/// The link to the next hop. Why it can't be had is for this node's log: a stranger could ask about any address by it.
async fn connect_next(host: &Host, next: &Announcement) -> Result<Link, Refusal> {
    let Some(swarm) = host.swarm.upgrade() else {
        return Err(Refusal::new(proto::Code::Leaving, "this node was asked to stop"));
    };
    let link = tokio::time::timeout(NEXT_HOP_TIMEOUT, swarm.link(next.peer_id, &next.addresses)).await;
    let why = match link {
        Ok(Ok(link)) => return Ok(link),
        Ok(Err(error)) => error.to_string(),
        Err(_) => format!("no answer in {} s", NEXT_HOP_TIMEOUT.as_secs()),
    };
    tracing::info!(peer = %next.peer_id, why, "a next hop can't be reached");
    let message = format!(
        "the next hop {} (blocks {}:{}) can't be reached from here",
        next.peer_id, next.span.start, next.span.end
    );
    Err(Refusal { about: Some(next.peer_id), ..Refusal::new(proto::Code::NextHopLost, message) })
}

/// A [`Sessions`] as the swarm calls it.
pub struct NodeService(pub Arc<Sessions>);

impl Service for NodeService {
    fn frame(&self, link: &Link, frame: Frame) {
        use proto::frame::Body;
        let sessions = &self.0;
        let Frame { mut header, payload } = frame;
        match header.body.take() {
            Some(Body::Step(step)) => sessions.step(link, header, step, payload),
            Some(Body::Open(open)) => match sessions.check_open(link, &header, &open) {
                Ok(opening) => {
                    tokio::spawn(sessions.clone().open(link.clone(), header, opening));
                }
                Err(refusal) => sessions.refuse(link, &header, refusal, 0),
            },
            Some(Body::Close(close)) => sessions.close(link, &header, &close),
            Some(Body::Ping(ping)) => {
                let body = Some(Body::Pong(proto::Pong { nonce: ping.nonce }));
                if link.send(Frame { header: proto::Frame { body, ..header }, payload: Bytes::new() }).is_err() {
                    tracing::debug!(peer = %link.peer(), "a ping could not be answered");
                }
            }
            Some(Body::Resume(resume)) => {
                if let Some(session) = sessions.session_of(link, &header) {
                    session.resume(link, header.epoch, resume);
                }
            }
            Some(Body::Replay(replay)) => sessions.replay(link, &header, replay, payload),
            Some(Body::HandOver(order)) => sessions.hand_over(link, &header, order),
            Some(Body::TakeOver(part)) => sessions.take_over(link, &header, part, payload),
            Some(Body::TakenOver(taken)) => {
                if let Some(session) = sessions.session_of(link, &header) {
                    session.part_taken(link, header.epoch, &taken);
                }
            }
            Some(Body::Replayed(replayed)) => {
                if let Some(session) = sessions.session_of(link, &header) {
                    session.replayed(link, header.epoch, &replayed);
                }
            }
            Some(Body::Fault(fault)) => {
                if let Some(session) = sessions.session_of(link, &header) {
                    session.downstream_fault(link, header.epoch, &fault);
                }
            }
            Some(Body::Opened(_) | Body::Output(_) | Body::Pong(_) | Body::NotHandedOver(_)) | None => {
                tracing::debug!(peer = %link.peer(), "ignored a frame that a node has no use for");
            }
        }
    }

    fn link_closed(&self, link: &Link) {
        for session in self.0.all() {
            session.link_closed(link, Instant::now());
        }
    }

    fn request(&self, from: PeerId, request: rpc::Request) -> BoxFuture<'static, rpc::Response> {
        let body = match request.body {
            Some(rpc::request::Body::Info(_)) => rpc::response::Body::Info(self.0.info()),
            Some(rpc::request::Body::Drain(request)) => match self.0.request_drain(&request) {
                Ok(response) => rpc::response::Body::Drain(response),
                Err(message) => rpc::response::Body::Failure(rpc::Failure { message }),
            },
            _ => {
                tracing::debug!(%from, "a request that this version doesn't know");
                let message = "this node doesn't know that request".to_owned();
                rpc::response::Body::Failure(rpc::Failure { message })
            }
        };
        Box::pin(async move { rpc::Response { body: Some(body) } })
    }
}
