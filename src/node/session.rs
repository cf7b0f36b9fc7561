//! One session on one hop: takes steps from upstream, has them computed, passes the outputs on.
//!
//! The decisions are [`StepLog`]'s and [`border`](super::border)'s; this is the shell that moves bytes between the links and
//! the engine. A session's KV cache travels with the step that is being computed and comes back with its result, so two
//! steps of a session can't run at once. Where a hop is lost, its successor is told what it knew (`replay`); one that leaves on purpose
//! hands its sessions over (`handover`, `takeover`). Results come on the engine's thread and are sent on from there: a step crosses no
//! other task on its way through a hop.

mod handover;
mod lanes;
mod prefix;
mod replay;
mod takeover;

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use libp2p::PeerId;
use tokio::sync::Notify;

pub(crate) use self::replay::Counts;
use self::{
    handover::Handing,
    prefix::Prefix,
    replay::{Kept, Replaying, StepOfHistory},
    takeover::Taking,
};
use super::{
    border::{self, Refusal},
    held::{HeldBytes, HeldPermit},
    log::{Arrival, StepLog},
};
use crate::{
    engine::{Cache, Engine, HiddenStates, Job, LaneRun, Owner, Place, StepError, StepOutput},
    swarm::{
        Frame, Link, SendError, WireCodec, clean,
        lanes::LaneChanges,
        proto::{announcement, session as proto},
        ticket::{SessionId, Ticket},
    },
};

/// A step that waits for its turn, or is being computed.
#[derive(Debug)]
pub(crate) struct Pending {
    pub(crate) step: proto::Step,
    pub(crate) payload: Bytes,
    pub(crate) permit: HeldPermit,
}

/// An applied step and its output; kept for retries until the client confirms it. What it is sent on as is decided when it
/// is sent: a newer route may lead elsewhere.
#[derive(Debug, Clone)]
struct Reply {
    /// As it came, with this hop's time.
    step: proto::Step,
    output: HiddenStates,
    _permit: Arc<HeldPermit>,
}

/// One session may hold this part of what its client may.
const SESSIONS_PER_CLIENT_SHARE: usize = 4;

/// A session on this hop. Dropping the last handle gives its pages back.
pub(crate) struct HopSession {
    id: SessionId,
    client: PeerId,
    engine: Engine,
    step_deadline: Duration,
    held: HeldBytes,
    history_bytes: HeldBytes,
    counts: Arc<Counts>,
    cancelled: Arc<AtomicBool>,
    /// Something changed that a hand-over may be waiting for.
    changed: Notify,
    inner: Mutex<Inner>,
}

/// What a session needs of its node.
pub(crate) struct Means {
    pub(crate) engine: Engine,
    /// How long a step may wait for its turn and for KV pages.
    pub(crate) step_deadline: Duration,
    /// The client's share of the bytes that the node may hold.
    pub(crate) held: HeldBytes,
    /// What the node may keep of what its sessions sent on.
    pub(crate) history_bytes: HeldBytes,
    /// Of the node.
    pub(crate) counts: Arc<Counts>,
}

struct Inner {
    ticket: Ticket,
    log: StepLog<Pending, Reply>,
    replaying: Replaying,
    /// The client wants another peer to go on with the session.
    handing: Option<Handing>,
    /// The state of another hop's session is on its way here.
    taking: Option<Taking>,
    prefix: Prefix,
    /// The route has changed, and the client has not said yet what the next hop has: outputs are kept, and stay here.
    is_paused: bool,
    /// The epoch in which the client said it.
    resumed_at: Option<u64>,
    /// Away while a step is being computed.
    cache: Option<Cache>,
    control: Link,
    control_lost: Option<Instant>,
    /// `None` where the client itself is downstream.
    downstream: Option<Link>,
    last_used: Instant,
}

/// The links of a session: the client's, and the next hop's where that is not the client.
pub(crate) struct Links {
    pub(crate) control: Link,
    pub(crate) downstream: Option<Link>,
}

/// What the client is told of a fault.
struct Report {
    code: proto::Code,
    blame: proto::Blame,
    /// The step that it is about; 0 where it is about none.
    number: u64,
    maybe_applied: bool,
    /// The other peer that it is about.
    about: Option<PeerId>,
    message: String,
}

impl Report {
    /// About no step and no other peer, and nothing was applied.
    fn new(code: proto::Code, blame: proto::Blame, message: String) -> Self {
        Self { code, blame, number: 0, maybe_applied: false, about: None, message }
    }
}

/// Why a step was not even looked at.
pub(crate) enum NotTaken {
    /// The sender is not the one that the ticket names.
    NotUpstream,
    /// Too much is held already.
    NoRoom,
}

impl HopSession {
    pub(crate) fn new(ticket: Ticket, links: Links, means: Means, now: Instant) -> Result<Self, StepError> {
        let cache = means.engine.cache(ticket.blocks.clone())?.owned_by(Owner::of(&ticket.client));
        let mut log = StepLog::new(ticket.epoch, ticket.limits.max_in_flight);
        let taking = ticket.take_over_from.map(Taking::new);
        if taking.is_some() {
            log.await_take_over();
        }
        Ok(Self {
            id: ticket.session,
            client: ticket.client,
            engine: means.engine,
            step_deadline: means.step_deadline,
            held: means.held.share(SESSIONS_PER_CLIENT_SHARE),
            history_bytes: means.history_bytes,
            counts: means.counts,
            cancelled: Arc::default(),
            changed: Notify::new(),
            inner: Mutex::new(Inner {
                log,
                replaying: Replaying::default(),
                prefix: Prefix::default(),
                handing: None,
                // What was sent on before is sent again where the client says so.
                is_paused: taking.is_some(),
                taking,
                resumed_at: None,
                ticket,
                cache: Some(cache),
                control: links.control,
                control_lost: None,
                downstream: links.downstream,
                last_used: now,
            }),
        })
    }

    /// A panic elsewhere can't leave the state half changed: every change is made in one go, under the lock.
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The client showed another ticket for this session: a newer epoch changes the route and keeps the cache; the same
    /// ticket again is a client that came back on a new connection.
    pub(crate) fn reopen(&self, ticket: Ticket, links: Links, now: Instant) -> Result<(), Refusal> {
        let mut inner = self.lock();
        if ticket.epoch < inner.log.epoch() || (ticket.epoch == inner.log.epoch() && ticket != inner.ticket) {
            return Err(Refusal::new(
                proto::Code::BadTicket,
                format!("the session is open with epoch {}; a changed ticket needs a higher one", inner.log.epoch()),
            ));
        }
        let (old, new) = (&inner.ticket, &ticket);
        let agreed = |ticket: &Ticket| (ticket.blocks.clone(), ticket.wire_dtype, ticket.wire_codec, ticket.limits);
        if agreed(old) != agreed(new) {
            return Err(Refusal::new(
                proto::Code::BadTicket,
                "blocks, dtype and limits of a session can't change; open a new one",
            ));
        }
        if ticket.epoch > inner.log.epoch() {
            inner.log.reopen(ticket.epoch);
            inner.replaying.reroute();
            inner.prefix.stop();
            inner.is_paused = true;
            inner.handing = None;
            self.changed.notify_waiters();
        }
        inner.ticket = ticket;
        inner.control = links.control;
        inner.control_lost = None;
        inner.downstream = links.downstream;
        inner.last_used = now;
        Ok(())
    }

    /// Takes a step from `link`.
    pub(crate) fn step(
        self: &Arc<Self>,
        link: &Link,
        epoch: u64,
        arrived: (proto::Step, Bytes),
        now: Instant,
    ) -> Result<(), NotTaken> {
        let (step, payload) = arrived;
        let mut inner = self.lock();
        if link.peer() != inner.ticket.upstream {
            return Err(NotTaken::NotUpstream);
        }
        let number = step.number;
        if epoch == inner.log.epoch() {
            inner.log.confirm(step.confirmed);
        }
        // What is kept for retries goes before a new step is refused.
        let permit = loop {
            match self.held.take(payload.len()) {
                Some(permit) => break permit,
                None if inner.log.forget_oldest() => {}
                None => return Err(NotTaken::NoRoom),
            }
        };
        match inner.log.arrive(epoch, number, Pending { step, payload, permit }) {
            Arrival::Run(pending) => {
                inner.last_used = now;
                self.run(inner, pending);
            }
            Arrival::Held => inner.last_used = now,
            Arrival::Again(reply) => self.deliver(&mut inner, reply),
            Arrival::Ignored(why) => tracing::debug!(session = %self.id, number, ?why, "step ignored"),
            Arrival::Refused(why) => {
                inner.log.fail_epoch();
                let report = Report::new(proto::Code::WrongStep, self.blame_for_steps(&inner), why.to_string());
                self.fault(&inner, Report { number, ..report });
            }
        }
        Ok(())
    }

    /// Who makes the steps that arrive: the first hop hears the client; behind it a wrong one is the work of the hop before.
    fn blame_for_steps(&self, inner: &Inner) -> proto::Blame {
        if inner.ticket.upstream == self.client { proto::Blame::Client } else { proto::Blame::Upstream }
    }

    /// Hands the step whose turn it is to the engine.
    fn run(self: &Arc<Self>, mut inner: MutexGuard<'_, Inner>, pending: Pending) {
        if let Some(changes) = LaneChanges::of(&pending.step) {
            return self.change_lanes(inner, &changes, pending);
        }
        let Pending { step, payload, permit } = pending;
        let hidden = self.engine.spec().hidden_size;
        let checked = match border::check_step(&inner.ticket, hidden, &step, payload) {
            Ok(checked) => checked,
            Err(refusal) => {
                let report = Report::new(refusal.code, self.blame_for_steps(&inner), refusal.message);
                let report = Report { number: step.number, ..report };
                return self.step_failed(inner, report);
            }
        };
        let Some(cache) = inner.cache.take() else {
            return self.step_failed(inner, Report { number: step.number, ..cache_away() });
        };
        let tokens = tokens_after(&inner.ticket, &cache, &checked.lanes);
        if tokens > inner.ticket.limits.max_tokens {
            let most = inner.ticket.limits.max_tokens;
            let message = format!("the session would grow to {tokens} tokens, and the ticket allows {most}");
            let report = Report::new(proto::Code::TooLarge, self.blame_for_steps(&inner), message);
            inner.cache = Some(cache);
            return self.step_failed(inner, Report { number: step.number, ..report });
        }
        let last_hop = inner.downstream.is_none();
        drop(inner); // the engine may refuse at once, on this thread
        let session = self.clone();
        self.engine.submit(Job {
            cache,
            lanes: checked.lanes,
            hidden: checked.hidden,
            rope_length: checked.rope_length,
            keep: if last_hop { checked.keep } else { crate::engine::Keep::All },
            deadline: Instant::now() + self.step_deadline,
            cancelled: self.cancelled.clone(),
            done: Box::new(move |cache, result| session.computed(cache, result, step, permit)),
        });
    }

    /// Takes a step's result from the engine, on the engine's thread.
    fn computed(
        self: &Arc<Self>,
        cache: Cache,
        result: Result<StepOutput, StepError>,
        step: proto::Step,
        permit: HeldPermit,
    ) {
        let mut inner = self.lock();
        if self.cancelled.load(Ordering::Relaxed) {
            return; // closed meanwhile: the pages go back with `cache`
        }
        inner.cache = Some(cache);
        inner.last_used = Instant::now();
        let number = step.number;
        match result {
            Ok(output) => {
                let mut step = step;
                step.times
                    .push(proto::HopTime { queue_us: micros(output.queued), compute_us: micros(output.computed) });
                let reply = Reply { step, output: output.hidden, _permit: Arc::new(permit) };
                let rows: u64 = reply.step.lanes.iter().map(|run| u64::from(run.tokens)).sum();
                self.counts.tokens.fetch_add(rows, Ordering::Relaxed);
                self.remember(&mut inner, number, &reply.of_history(), &reply.output);
                self.keep_what_is_full(&mut inner, &reply.of_history());
                self.applied(inner, reply);
            }
            Err(error) => {
                let (code, blame) = classify(&error, self.blame_for_steps(&inner));
                tracing::debug!(session = %self.id, number, %error, "step failed");
                let report = Report::new(code, blame, error.to_string());
                self.step_failed(inner, Report { number, maybe_applied: error.maybe_applied(), ..report });
            }
        }
    }

    /// The running step was applied: keeps its output, sends it on, and goes on with the next step.
    fn applied(self: &Arc<Self>, mut inner: MutexGuard<'_, Inner>, reply: Reply) {
        // A client that never confirms has no more under way than its credit.
        let credit = u64::from(inner.ticket.limits.max_in_flight);
        let settled = reply.step.confirmed.max(reply.step.number.saturating_sub(credit));
        inner.replaying.history.confirm(settled);
        let next = inner.log.applied(reply.clone());
        self.changed.notify_waiters();
        self.deliver(&mut inner, reply);
        if let Some(next) = next {
            self.run(inner, next);
        }
    }

    /// The running step failed. Its client is told, unless the step was of a route that is given up already.
    fn step_failed(self: &Arc<Self>, mut inner: MutexGuard<'_, Inner>, report: Report) {
        let of_old_route = inner.log.is_of_old_route();
        let next = inner.log.failed();
        self.changed.notify_waiters();
        if !of_old_route {
            self.fault(&inner, report);
        }
        if let Some(next) = next {
            self.run(inner, next);
        }
    }

    /// Sends an output to where the ticket says: as a step to the next hop, as an output to the client.
    fn deliver(&self, inner: &mut Inner, reply: Reply) {
        if inner.is_paused {
            return; // it is kept, and leaves when the client says what the next hop has
        }
        let Reply { step, output, .. } = reply;
        let number = step.number;
        let codec = inner.ticket.wire_codec;
        let tensor = (output.rows > 0).then(|| wire_tensor(&output, codec));
        let (link, body) = match &inner.downstream {
            Some(next) => (next, proto::frame::Body::Step(proto::Step { tensor, ..step })),
            None => (&inner.control, proto::frame::Body::Output(proto::Output { number, tensor, times: step.times })),
        };
        let payload = codec.encode(output.dtype, output.hidden, output.bytes);
        let frame = Frame { header: self.header(inner.log.epoch(), body), payload };
        let Err(error) = link.send(frame) else { return };
        let peer = link.peer();
        if peer == self.client {
            return; // it comes back and asks again, or the session ends
        }
        let code = match error {
            SendError::Closed { .. } => proto::Code::NextHopLost,
            SendError::Full { .. } => proto::Code::Busy,
            SendError::TooLarge { .. } => proto::Code::TooLarge,
        };
        self.downstream_lost(inner, code, peer, format!("step {number} can't be passed on: {error}"));
    }

    /// A link ended; it may be one of this session's.
    pub(crate) fn link_closed(&self, link: &Link, now: Instant) {
        let mut inner = self.lock();
        if inner.control.id() == link.id() {
            inner.control_lost = Some(now);
        }
        let message = "the connection was lost".to_owned();
        let lost = proto::Fault { code: proto::Code::NextHopLost.into(), message, ..proto::Fault::default() };
        self.handing_refused(&mut inner, link, (None, &lost));
        if inner.downstream.as_ref().is_some_and(|downstream| downstream.id() == link.id()) {
            let message = "the connection to the next hop was lost".to_owned();
            self.downstream_lost(&mut inner, proto::Code::NextHopLost, link.peer(), message);
        }
        // A hop that is gone without a word: the one before it may be gone as well, so this one tells, too.
        let upstream = inner.ticket.upstream;
        if link.peer() == upstream && upstream != self.client && !link.opened_by_us() {
            let message = "the connection from the hop before was lost".to_owned();
            let report = Report::new(proto::Code::UpstreamLost, proto::Blame::Upstream, message);
            self.fault(&inner, Report { about: Some(upstream), ..report });
        }
    }

    /// What the session has, for a client that repairs its route.
    pub(crate) fn opened(&self) -> proto::Opened {
        self.what_it_has(&self.lock())
    }

    fn what_it_has(&self, inner: &Inner) -> proto::Opened {
        let load = self.engine.load_now();
        proto::Opened {
            cache_tokens_left: load.cache_tokens_left as u64,
            queue: load.queue as u32,
            applied: inner.log.last_applied(),
            whole: inner.replaying.history.is_whole() && inner.log.keeps_unconfirmed(),
            filling: inner.replaying.is_filling() || inner.taking.is_some(),
            prefix_tokens: inner.prefix.held() as u64,
        }
    }

    /// The next hop answered with an error of its own (it doesn't know the client): passes it to the client.
    pub(crate) fn downstream_fault(&self, link: &Link, epoch: u64, fault: &proto::Fault) {
        let mut inner = self.lock();
        if self.handing_refused(&mut inner, link, (Some(epoch), fault)) {
            return;
        }
        let is_next = inner.downstream.as_ref().is_some_and(|downstream| downstream.id() == link.id());
        if !is_next || epoch != inner.log.epoch() {
            return;
        }
        let message = format!("the next hop refuses: {}", clean(&fault.message));
        self.downstream_lost(&mut inner, proto::Code::NextHopLost, link.peer(), message);
    }

    /// Whether the session has outlived its client: it went `grace` ago, or has been silent for `idle`.
    pub(crate) fn is_over(&self, now: Instant, grace: Duration, idle: Duration) -> Option<&'static str> {
        let inner = self.lock();
        if inner.control_lost.is_some_and(|lost| now.duration_since(lost) > grace) {
            return Some("its client is gone");
        }
        let is_busy = inner.log.is_running() && inner.taking.is_none();
        (!is_busy && now.duration_since(inner.last_used) > idle).then_some("it was idle for too long")
    }

    /// How long nothing was computed.
    pub(crate) fn has_rested(&self, now: Instant) -> Duration {
        let inner = self.lock();
        if inner.log.is_running() { Duration::ZERO } else { now.saturating_duration_since(inner.last_used) }
    }

    /// Ends the session: a step under way is thrown away.
    pub(crate) fn close(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
        let mut inner = self.lock();
        inner.cache = None;
        inner.replaying = Replaying::default();
        (inner.handing, inner.taking) = (None, None);
        self.changed.notify_waiters();
    }

    /// Tells the client why the session ends here.
    pub(crate) fn tell_leaving(&self, code: proto::Code, message: &str) {
        let inner = self.lock();
        self.fault(&inner, Report::new(code, proto::Blame::Nobody, message.to_owned()));
    }

    fn fault(&self, inner: &Inner, report: Report) {
        tracing::debug!(session = %self.id, message = report.message, "telling the client of a fault");
        let fault = proto::Fault {
            code: report.code.into(),
            blame: report.blame.into(),
            maybe_applied: report.maybe_applied,
            number: report.number,
            peer: report.about.map(|peer| peer.to_bytes().into()).unwrap_or_default(),
            message: report.message,
        };
        let header = self.header(inner.log.epoch(), proto::frame::Body::Fault(fault));
        if inner.control.send(Frame { header, payload: Bytes::new() }).is_err() {
            tracing::debug!(session = %self.id, "the client can't be told: its link is gone");
        }
    }

    /// The route behind this hop is broken: nothing of this epoch goes on.
    fn downstream_lost(&self, inner: &mut Inner, code: proto::Code, peer: PeerId, message: String) {
        inner.log.fail_epoch();
        let report = Report::new(code, proto::Blame::Downstream, message);
        // What was sent on may have arrived.
        let maybe_applied = inner.log.last_applied() > 0;
        self.fault(inner, Report { maybe_applied, about: Some(peer), ..report });
    }

    fn header(&self, epoch: u64, body: proto::frame::Body) -> proto::Frame {
        proto::Frame { session: self.id.to_wire(), epoch, body: Some(body) }
    }
}

/// What a frame says of the rows in its payload.
fn wire_tensor(states: &HiddenStates, codec: WireCodec) -> proto::Tensor {
    proto::Tensor {
        dtype: announcement::Dtype::from(states.dtype).into(),
        rows: states.rows as u32,
        hidden: states.hidden as u32,
        codec: announcement::WireCodec::from(codec).into(),
    }
}

/// The log runs one step at a time and the cache comes back before the log hears of it, so this can't happen; if it does, the
/// session fails instead of the node.
fn cache_away() -> Report {
    Report::new(proto::Code::Internal, proto::Blame::Hop, "the session's KV cache is away".to_owned())
}

/// Tokens of all lanes after a step.
fn tokens_after(ticket: &Ticket, cache: &Cache, runs: &[LaneRun]) -> u64 {
    let end = |lane: u32| match runs.iter().find(|run| run.lane == lane) {
        Some(run) => run.position + run.tokens,
        None => cache.end(lane),
    };
    (0..ticket.limits.max_lanes).map(|lane| end(lane) as u64).sum()
}

fn micros(time: Duration) -> u32 {
    u32::try_from(time.as_micros()).unwrap_or(u32::MAX)
}

/// What the client is told of an engine's error, and whose fault it is. What is wrong with the step itself is the fault of whoever `made`
/// it.
fn classify(error: &StepError, made: proto::Blame) -> (proto::Code, proto::Blame) {
    use proto::{Blame, Code};
    match error {
        StepError::CacheFull { .. } => (Code::CacheFull, Blame::Nobody),
        StepError::QueueFull { .. } => (Code::Busy, Blame::Nobody),
        StepError::Deadline => (Code::Deadline, Blame::Nobody),
        StepError::Cancelled => (Code::UnknownSession, Blame::Nobody),
        StepError::WrongPosition { .. } => (Code::WrongPosition, made),
        StepError::BadShape(_) => (Code::BadTensor, made),
        StepError::WrongBlocks { .. } => (Code::WrongBlocks, Blame::Client), // its ticket names them
        StepError::ContextExceeded { .. } => (Code::TooLarge, made),
        StepError::NonFinite { place: Place::Input, .. } => (Code::NonFinite, made),
        StepError::NonFinite { place: Place::Block(_), .. } => (Code::NonFinite, Blame::Hop),
        StepError::Internal(_) => (Code::Internal, Blame::Hop),
    }
}
