//! Taking a lost hop's place, and telling the one that does what the lost one knew.
//!
//! What a session sends on is kept as its [`History`] (the states themselves, in wire dtype). When the route changes, the client
//! says how much the next hop has ([`Resume`](proto::Resume)): later steps are sent again, and where it has nothing, the history is
//! replayed to it in parts. It computes them, keeps what they give as history of its own, and passes that on where hops
//! behind it have nothing either. The last one that needs them paces the parts, so that a long context never fills an outbox. The
//! client hears of every part from every hop that computes it: a replay may take long, and is not to be taken for a hop that is stuck.

use std::{
    collections::VecDeque,
    sync::{Arc, MutexGuard, atomic::Ordering},
    time::Instant,
};

use bytes::{Bytes, BytesMut};

use super::{Cache, HopSession, Inner, NotTaken, Reply, Report, cache_away, wire_tensor};
use crate::{
    engine::{HiddenStates, Job, Keep, StepError, StepOutput},
    node::{border, held::HeldPermit},
    swarm::{
        Frame, Link,
        history::{Cursor, History, Place, Rows},
        proto::session as proto,
    },
};

/// Parts of a replay that are sent before the first of them is computed: one is under way while another one is computed.
const PARTS_AHEAD: u32 = 4;

/// Rows that were sent on.
#[derive(Debug, Clone)]
pub(super) struct Kept {
    states: HiddenStates,
    _permit: Arc<HeldPermit>,
}

impl Kept {
    pub(super) fn new(states: HiddenStates, permit: Arc<HeldPermit>) -> Self {
        Self { states, _permit: permit }
    }

    pub(super) fn states(&self) -> &HiddenStates {
        &self.states
    }
}

impl Rows for Kept {
    fn count(&self) -> usize {
        self.states.rows
    }

    fn slice(&self, rows: std::ops::Range<usize>) -> Self {
        Self { states: self.states.slice(rows), _permit: self._permit.clone() }
    }
}

/// What a session knows about replays.
#[derive(Debug, Default)]
pub(super) struct Replaying {
    pub(super) history: History<Kept>,
    /// To the next hop.
    sending: Option<Sending>,
    /// From upstream.
    filling: Option<Filling>,
}

/// A replay to the next hop.
#[derive(Debug)]
struct Sending {
    applied: u64,
    hops: u32,
    cursor: Cursor,
    next_index: u32,
    /// How many parts the next hop has computed.
    computed: u32,
}

/// A replay from upstream.
#[derive(Debug)]
struct Filling {
    /// Whose replay it is. In a later one it goes nowhere, until the client opens the session anew.
    epoch: u64,
    applied: u64,
    next_index: u32,
    waiting: VecDeque<(proto::Replay, Bytes, HeldPermit)>,
    is_computing: bool,
    /// Where it comes from.
    upstream: Link,
    /// How many hops behind this one need it as well.
    hops_behind: u32,
}

impl Replaying {
    pub(super) fn is_filling(&self) -> bool {
        self.filling.is_some()
    }

    /// The route has changed: what was being sent on is of no use. A replay that had not come to its end never will.
    pub(super) fn reroute(&mut self) {
        self.sending = None;
    }
}

impl HopSession {
    /// Keeps what a step sends on, as far as there is room.
    pub(super) fn remember(&self, inner: &mut Inner, number: u64, step: &StepOfHistory<'_>, output: &HiddenStates) {
        let history = &mut inner.replaying.history;
        if inner.downstream.is_none() || !history.is_whole() {
            return;
        }
        let Some(permit) = self.history_bytes.take(output.bytes.len()) else {
            tracing::info!(session = %self.id, "no room for what this session sent on: if the next hop is lost, more than it is computed again");
            history.forget();
            return;
        };
        let permit = Arc::new(permit);
        let mut row = 0;
        for run in step.lanes {
            let (position, count) = (run.position as usize, run.tokens as usize);
            let length = if step.rope_length > 0 { step.rope_length as usize } else { position + count };
            let length_class = self.engine.spec().length_class(length);
            let rows = Kept::new(output.slice(row..row + count), permit.clone());
            history.keep(Place { step: number, lane: run.lane, position, length_class }, rows);
            row += count;
        }
    }

    /// The client says what the next hop has: goes on from there.
    pub(crate) fn resume(self: &Arc<Self>, link: &Link, epoch: u64, resume: proto::Resume) {
        let mut inner = self.lock();
        if link.peer() != self.client || epoch != inner.log.epoch() || inner.resumed_at == Some(epoch) {
            return;
        }
        inner.resumed_at = Some(epoch);
        let is_whole = inner.replaying.history.is_whole() || resume.replay_hops == 0;
        if !is_whole || inner.log.replies_after(resume.applied).is_none() {
            let message = "what this hop sent on before is gone: rebuild the session".to_owned();
            return self.fault(&inner, Report::new(proto::Code::HistoryGone, proto::Blame::Nobody, message));
        }
        if resume.replay_hops > 0 && inner.downstream.is_some() {
            self.replay_to_next(&mut inner, resume.applied, resume.replay_hops);
        } else {
            self.send_again(&mut inner, resume.applied);
        }
    }

    /// Sends the replies to steps after `number` again; from now on outputs leave as they are made.
    fn send_again(&self, inner: &mut Inner, number: u64) {
        inner.is_paused = false;
        for reply in inner.log.replies_after(number).unwrap_or_default() {
            self.deliver(inner, reply);
        }
    }

    fn replay_to_next(&self, inner: &mut Inner, applied: u64, hops: u32) {
        inner.is_paused = true;
        inner.replaying.sending =
            Some(Sending { applied, hops, cursor: Cursor::default(), next_index: 0, computed: 0 });
        self.send_parts(inner);
    }

    /// Sends as many parts as the next hop takes, and what comes after them when they are over.
    fn send_parts(&self, inner: &mut Inner) {
        let most = inner.ticket.limits.max_step_tokens as usize;
        while let Some(sending) = &mut inner.replaying.sending
            && sending.next_index < sending.computed.saturating_add(PARTS_AHEAD)
        {
            let applied = sending.applied;
            let part = inner.replaying.history.next(&mut sending.cursor, applied, most);
            let head = proto::Replay { applied, hops: sending.hops, index: sending.next_index, ..Default::default() };
            sending.next_index += 1;
            let Some(part) = part else {
                inner.replaying.sending = None;
                self.send_replay(inner, proto::Replay { last: true, ..head }, Bytes::new());
                return self.send_again(inner, applied);
            };
            let mut payload = BytesMut::new();
            let states: Vec<HiddenStates> = part.rows.into_iter().map(|kept| kept.states).collect();
            let Some(first) = states.first() else { return };
            let tensor = proto::Tensor { rows: part.count as u32, ..wire_tensor(first, inner.ticket.wire_codec) };
            states.iter().for_each(|states| payload.extend_from_slice(&states.bytes));
            let replay = proto::Replay {
                lanes: vec![proto::LaneRun {
                    lane: part.lane,
                    position: part.position as u64,
                    tokens: part.count as u32,
                }],
                tensor: Some(tensor),
                rope_length: part.length_class as u64,
                ..head
            };
            let payload = inner.ticket.wire_codec.encode(first.dtype, first.hidden, payload.freeze());
            self.send_replay(inner, replay, payload);
        }
    }

    fn send_replay(&self, inner: &mut Inner, replay: proto::Replay, payload: Bytes) {
        let Some(next) = inner.downstream.clone() else { return };
        self.counts.bytes_replayed.fetch_add(payload.len() as u64, Ordering::Relaxed);
        let frame = Frame { header: self.header(inner.log.epoch(), proto::frame::Body::Replay(replay)), payload };
        if let Err(error) = next.send(frame) {
            inner.replaying.sending = None;
            let message = format!("the session can't be replayed to it: {error}");
            self.downstream_lost(inner, proto::Code::NextHopLost, next.peer(), message);
        }
    }

    /// The next hop has computed a part.
    pub(crate) fn replayed(&self, link: &Link, epoch: u64, replayed: &proto::Replayed) {
        let mut inner = self.lock();
        let is_next = inner.downstream.as_ref().is_some_and(|next| next.id() == link.id());
        if !is_next || epoch != inner.log.epoch() {
            return;
        }
        if let Some(sending) = &mut inner.replaying.sending {
            if replayed.index < sending.next_index {
                sending.computed = sending.computed.max(replayed.index + 1);
                self.send_parts(&mut inner);
            }
        } else if let Some(filling) = inner.replaying.filling.as_ref().filter(|filling| filling.hops_behind > 0) {
            self.tell_replayed(&inner, &filling.upstream, replayed.index);
        }
    }

    /// Takes a part of a replay from upstream.
    pub(crate) fn replay(
        self: &Arc<Self>,
        link: &Link,
        epoch: u64,
        arrived: (proto::Replay, Bytes),
    ) -> Result<(), NotTaken> {
        let (replay, payload) = arrived;
        let mut inner = self.lock();
        if link.peer() != inner.ticket.upstream {
            return Err(NotTaken::NotUpstream);
        }
        if epoch != inner.log.epoch() || inner.log.is_failed() {
            return Ok(()); // of a route that was given up
        }
        let permit = self.held.take(payload.len()).ok_or(NotTaken::NoRoom)?;
        inner.last_used = Instant::now();
        if replay.index == 0 && !inner.replaying.is_filling() && inner.log.fill(replay.applied) {
            let hops_behind = if inner.downstream.is_some() { replay.hops.saturating_sub(1) } else { 0 };
            // Those behind that have nothing either hear it from here, and nothing else before that.
            inner.is_paused = hops_behind > 0;
            inner.replaying.filling = Some(Filling {
                epoch,
                applied: replay.applied,
                next_index: 0,
                waiting: VecDeque::new(),
                is_computing: false,
                upstream: link.clone(),
                hops_behind,
            });
        }
        let fits = |filling: &Filling| {
            (filling.next_index, filling.applied) == (replay.index, replay.applied)
                && filling.waiting.len() <= PARTS_AHEAD as usize
        };
        match &mut inner.replaying.filling {
            Some(filling) if fits(filling) => {
                filling.next_index += 1;
                filling.waiting.push_back((replay, payload, permit));
                self.fill(inner);
            }
            _ => {
                let message = format!("part {} of a replay is not the one that is awaited", replay.index);
                inner.log.fail_epoch();
                self.fault(&inner, Report::new(proto::Code::WrongStep, self.blame_for_steps(&inner), message));
            }
        }
        Ok(())
    }

    /// Computes the next part, where none is being computed.
    fn fill(self: &Arc<Self>, mut inner: MutexGuard<'_, Inner>) {
        let now = inner.log.epoch();
        let Some(filling) = inner.replaying.filling.as_mut().filter(|filling| filling.epoch == now) else { return };
        if filling.is_computing {
            return;
        }
        let Some((replay, payload, permit)) = filling.waiting.pop_front() else { return };
        if replay.last {
            let (applied, hops_behind) = (filling.applied, filling.hops_behind);
            inner.replaying.filling = None;
            if applied == 0 {
                let held = inner.cache.as_ref().map_or(0, |cache| cache.end(0));
                inner.prefix.was_told(held);
            }
            if hops_behind > 0 {
                self.send_replay(&mut inner, proto::Replay { hops: hops_behind, ..replay }, Bytes::new());
                self.send_again(&mut inner, applied);
            }
            if let Some(next) = inner.log.filled() {
                self.run(inner, next);
            }
            return;
        }
        filling.is_computing = true;
        let step = proto::Step {
            lanes: replay.lanes,
            tensor: replay.tensor,
            want: proto::Want::None.into(),
            rope_length: replay.rope_length,
            ..proto::Step::default()
        };
        let hidden = self.engine.spec().hidden_size;
        let checked = match border::check_step(&inner.ticket, hidden, &step, payload) {
            Ok(checked) => checked,
            Err(refusal) => {
                let report = Report::new(refusal.code, self.blame_for_steps(&inner), refusal.message);
                return self.fill_failed(&mut inner, report);
            }
        };
        let Some(cache) = inner.cache.take() else {
            return self.fill_failed(&mut inner, cache_away());
        };
        let keep = if inner.downstream.is_some() { Keep::All } else { Keep::Nothing };
        drop(inner); // the engine may refuse at once, on this thread
        let (session, index) = (self.clone(), replay.index);
        self.engine.submit(Job {
            cache,
            lanes: checked.lanes,
            hidden: checked.hidden,
            rope_length: checked.rope_length,
            keep,
            deadline: Instant::now() + self.step_deadline,
            cancelled: self.cancelled.clone(),
            done: Box::new(move |cache, result| {
                session.part_computed(cache, result, (index, step));
                drop(permit);
            }),
        });
    }

    /// Takes a part's result from the engine, on the engine's thread.
    fn part_computed(self: &Arc<Self>, cache: Cache, result: Result<StepOutput, StepError>, part: (u32, proto::Step)) {
        let (index, step) = part;
        let mut inner = self.lock();
        if self.cancelled.load(Ordering::Relaxed) {
            return; // closed meanwhile: the pages go back with `cache`
        }
        inner.cache = Some(cache);
        inner.last_used = Instant::now();
        let now = inner.log.epoch();
        let Some(filling) = &mut inner.replaying.filling else { return };
        filling.is_computing = false;
        if filling.epoch != now {
            return; // whoever is behind this hop now has not heard the parts before it
        }
        let (applied, hops_behind, upstream) = (filling.applied, filling.hops_behind, filling.upstream.clone());
        let output = match result {
            Ok(output) => output,
            Err(error) => {
                let (code, blame) = super::classify(&error, self.blame_for_steps(&inner));
                return self.fill_failed(&mut inner, Report::new(code, blame, error.to_string()));
            }
        };
        let rows: u64 = step.lanes.iter().map(|run| u64::from(run.tokens)).sum();
        self.counts.tokens_replayed.fetch_add(rows, Ordering::Relaxed);
        let of_history = StepOfHistory { lanes: &step.lanes, rope_length: step.rope_length };
        self.remember(&mut inner, applied, &of_history, &output.hidden);
        if hops_behind > 0 {
            let (hops, rope_length) = (hops_behind, step.rope_length);
            let codec = inner.ticket.wire_codec;
            let (lanes, tensor) = (step.lanes, Some(wire_tensor(&output.hidden, codec)));
            let part = proto::Replay { applied, hops, index, last: false, lanes, tensor, rope_length };
            let HiddenStates { dtype, hidden, bytes, .. } = output.hidden;
            self.send_replay(&mut inner, part, codec.encode(dtype, hidden, bytes));
        } else {
            self.tell_replayed(&inner, &upstream, index);
        }
        // A client that replays itself is told above, when all that need the part have it: that paces it.
        if upstream.peer() != self.client {
            self.tell_replayed(&inner, &inner.control, index);
        }
        self.fill(inner);
    }

    fn tell_replayed(&self, inner: &Inner, to: &Link, index: u32) {
        let body = proto::frame::Body::Replayed(proto::Replayed { index });
        if to.send(Frame::bare(self.header(inner.log.epoch(), body))).is_err() {
            tracing::debug!(session = %self.id, peer = %to.peer(), "a peer that waits for a replay is gone");
        }
    }

    /// The session is of no use until the client opens it anew: `filling` stays, and says so.
    fn fill_failed(&self, inner: &mut Inner, report: Report) {
        inner.log.fail_epoch();
        inner.replaying.sending = None;
        self.fault(inner, report);
    }
}

/// What of a step's header says where its rows belong.
pub(super) struct StepOfHistory<'a> {
    pub(super) lanes: &'a [proto::LaneRun],
    pub(super) rope_length: u64,
}

/// What all sessions of a node did, since it started.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    /// Tokens that sessions began with and that were not computed.
    pub(crate) prefix_tokens_reused: std::sync::atomic::AtomicU64,
    /// Rows of steps.
    pub(crate) tokens: std::sync::atomic::AtomicU64,
    /// Rows of replays.
    pub(crate) tokens_replayed: std::sync::atomic::AtomicU64,
    /// Sent to hops that took a lost one's place.
    pub(crate) bytes_replayed: std::sync::atomic::AtomicU64,
    /// Tokens of sessions that hops which left handed over.
    pub(crate) tokens_taken_over: std::sync::atomic::AtomicU64,
    /// Of these sessions.
    pub(crate) bytes_taken_over: std::sync::atomic::AtomicU64,
}

impl Reply {
    pub(super) fn of_history(&self) -> StepOfHistory<'_> {
        StepOfHistory { lanes: &self.step.lanes, rope_length: self.step.rope_length }
    }
}
