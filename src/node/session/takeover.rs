//! Taking over the session of a hop that leaves, where the ticket says from whom.
//!
//! The parts come from the leaving hop and nobody else, in order, and each is held against the ticket, the model and this node's
//! engine before anything is kept of it: the lanes and their pages, the size and the numbers of every piece, rows and
//! positions, the numbers of steps. The pages come out of the pool as any new session's do. When the end is in and nothing
//! is missing, the session stands exactly where the other hop's stood, and the client is told; until then, and for good where
//! something is wrong, it is of no use and says so ([`Opened`](proto::Opened)'s `filling`).

use std::{
    collections::{BTreeMap, VecDeque},
    ops::Range,
    sync::{Arc, MutexGuard, atomic::Ordering},
    time::{Duration, Instant},
};

use bytes::Bytes;
use libp2p::PeerId;

use super::{Cache, HopSession, Inner, NotTaken, Reply, Report, handover::PARTS_AHEAD, replay::Kept};
use crate::{
    engine::{HiddenStates, LaneLayout, PAGE_TOKENS, TransferError},
    model::{Dtype, Quant},
    node::{
        border::{self, Refusal},
        held::HeldPermit,
        log::LEAD,
    },
    swarm::{
        Frame, Link,
        history::{Entry, Place},
        proto::session as proto,
        ticket::{SessionLimits, Ticket},
    },
};

/// How often the client is told that parts are taken: it gives up where nothing goes on for some seconds.
const TELL_CLIENT_EVERY: Duration = Duration::from_millis(500);

/// A session that is being taken over.
#[derive(Debug)]
pub(super) struct Taking {
    from: PeerId,
    /// When the client was last told how far it is.
    told_at: Instant,
    next_index: u32,
    waiting: VecDeque<Arrived>,
    is_writing: bool,
    /// From the first part on.
    state: Option<State>,
    /// Pieces that are written.
    pieces: usize,
    replies: Vec<Reply>,
    bytes: u64,
}

/// A part that waits to be taken.
#[derive(Debug)]
struct Arrived {
    index: u32,
    part: proto::take_over::Part,
    payload: Bytes,
    permit: HeldPermit,
    link: Link,
}

/// Where the session stood.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct State {
    applied: u64,
    confirmed: u64,
}

/// A part with pieces, while they are written.
struct Written {
    payload: Bytes,
    permit: HeldPermit,
    link: Link,
    index: u32,
}

/// What became of a part.
enum Taken {
    /// It is kept.
    Kept,
    /// Pieces, which the engine has to write.
    Pieces { first: usize, count: usize, permit: HeldPermit },
    /// It was the last one, and nothing is missing.
    All,
}

impl Taking {
    /// A session that waits for `from` to hand it over.
    pub(super) fn new(from: PeerId) -> Self {
        Self {
            from,
            told_at: Instant::now(),
            next_index: 0,
            waiting: VecDeque::new(),
            is_writing: false,
            state: None,
            pieces: 0,
            replies: Vec::new(),
            bytes: 0,
        }
    }
}

impl HopSession {
    /// Takes a part of a session from the hop that leaves.
    pub(crate) fn take_over(
        self: &Arc<Self>,
        link: &Link,
        epoch: u64,
        arrived: (proto::TakeOver, Bytes),
    ) -> Result<(), NotTaken> {
        let (proto::TakeOver { index, part }, payload) = arrived;
        let mut inner = self.lock();
        let Some(taking) = inner.taking.as_ref().filter(|taking| taking.from == link.peer()) else {
            return Err(NotTaken::NotUpstream);
        };
        let is_awaited = index == taking.next_index && taking.waiting.len() <= PARTS_AHEAD as usize;
        if epoch != inner.log.epoch() || inner.log.is_failed() {
            return Ok(()); // of a hand-over that was given up
        }
        let Some(permit) = self.held.take(payload.len()) else { return Err(NotTaken::NoRoom) };
        inner.last_used = Instant::now();
        match (part, &mut inner.taking) {
            (Some(part), Some(taking)) if is_awaited => {
                taking.next_index += 1;
                taking.bytes += payload.len() as u64;
                taking.waiting.push_back(Arrived { index, part, payload, permit, link: link.clone() });
                self.take_parts(inner);
            }
            _ => {
                let refusal =
                    Refusal::new(proto::Code::WrongStep, format!("part {index} is not the one that is awaited"));
                self.take_over_failed(&mut inner, link, refusal);
            }
        }
        Ok(())
    }

    /// Takes the parts that wait, up to one that the engine has to write.
    fn take_parts(self: &Arc<Self>, mut inner: MutexGuard<'_, Inner>) {
        loop {
            let Some(taking) = inner.taking.as_mut().filter(|taking| !taking.is_writing) else { return };
            let Some(arrived) = taking.waiting.pop_front() else { return };
            let (index, link) = (arrived.index, arrived.link.clone());
            let payload = arrived.payload.clone();
            match self.take_part(&mut inner, arrived) {
                Ok(Taken::Kept) => self.tell_taken(&mut inner, &link, index),
                Ok(Taken::Pieces { first, count, permit }) => {
                    let pieces = first..first.saturating_add(count);
                    return self.write(inner, pieces, Written { payload, permit, link, index });
                }
                Ok(Taken::All) => {
                    self.tell_taken(&mut inner, &link, index);
                    return self.taken_over(inner);
                }
                Err(refusal) => return self.take_over_failed(&mut inner, &link, refusal),
            }
        }
    }

    fn take_part(&self, inner: &mut Inner, arrived: Arrived) -> Result<Taken, Refusal> {
        use proto::take_over::Part;
        let bad = |message: &str| Err(Refusal::new(proto::Code::WrongStep, message));
        let Arrived { part, payload, permit, .. } = arrived;
        let Some(taking) = &mut inner.taking else { return bad("nothing is being taken over") };
        let Some(state) = taking.state else {
            let Part::State(wire) = part else { return bad("the first part is not the session's state") };
            let (state, lanes) = self.check_state(&inner.ticket, &wire)?;
            taking.state = Some(state);
            let Some(cache) = &mut inner.cache else { return bad("the session's KV cache is away") };
            cache.rebuild(&lanes, usize::try_from(wire.pages).unwrap_or(usize::MAX)).map_err(of_pages)?;
            if !wire.whole {
                inner.replaying.history.forget();
            }
            return Ok(Taken::Kept);
        };
        let ticket = &inner.ticket;
        match part {
            Part::State(_) => return bad("the session's state came twice"),
            Part::Pieces(pieces) => {
                let pieces = (usize::try_from(pieces.first).unwrap_or(usize::MAX), pieces.count as usize);
                if pieces.0 != taking.pieces || pieces.1 == 0 {
                    return bad("pieces of pages come in order, and none is left out");
                }
                taking.is_writing = true;
                return Ok(Taken::Pieces { first: pieces.0, count: pieces.1, permit });
            }
            Part::Rows(rows) => {
                let (runs, states) = check_rows(ticket, self.engine.spec().hidden_size, (&rows, state), payload)?;
                let history = &mut inner.replaying.history;
                match self.history_bytes.take(states.bytes.len()) {
                    Some(permit) => {
                        let permit = Arc::new(permit);
                        let mut row = 0;
                        for Run { before, place, count } in runs {
                            let kept = (count > 0).then(|| Kept::new(states.slice(row..row + count), permit.clone()));
                            history.restore(Entry { before, place, rows: kept });
                            row += count;
                        }
                    }
                    None => history.forget(),
                }
            }
            Part::Reply(step) => {
                let output = check_reply(ticket, self.engine.spec().hidden_size, &step, payload)?;
                let expected = taking.replies.last().map_or(state.confirmed, |reply| reply.step.number);
                let follows = taking.replies.is_empty() || step.number == expected.saturating_add(1);
                let is_kept = step.number > state.confirmed && step.number <= state.applied && follows;
                if !is_kept || taking.replies.len() >= ticket.limits.max_in_flight as usize {
                    return bad("the replies are not those to the last steps, in order");
                }
                taking.replies.push(Reply { step, output, _permit: Arc::new(permit) });
            }
            Part::End(_) => {
                let last = taking.replies.last().map_or(state.applied, |reply| reply.step.number);
                let expected = inner.cache.as_ref().map(Cache::incoming_pieces);
                if Some(taking.pieces) != expected || last != state.applied {
                    return bad("the session ends before all pages and replies are there");
                }
                return Ok(Taken::All);
            }
        }
        Ok(Taken::Kept)
    }

    /// Holds a session's state against its ticket and this node's engine.
    fn check_state(&self, ticket: &Ticket, state: &proto::SessionState) -> Result<(State, Vec<LaneLayout>), Refusal> {
        let own = (self.engine.kernel_path(), self.engine.kv_dtype().to_string());
        if (state.kernel_path.as_str(), &state.kv_dtype) != (own.0, &own.1) {
            let message = format!(
                "keys and values by {} in {}, and here they are by {} in {}",
                crate::swarm::clean(&state.kernel_path),
                crate::swarm::clean(&state.kv_dtype),
                own.0,
                own.1
            );
            return Err(Refusal::new(proto::Code::Unsupported, message));
        }
        let own = self.engine.quant_settings();
        if !state.quant_settings.iter().any(|setting| own.iter().any(|own| own.to_string() == *setting)) {
            let theirs = crate::swarm::clean(&state.quant_settings.join(" or "));
            let own: Vec<String> = own.iter().map(Quant::to_string).collect();
            let message = format!("its matrices are those of --quant {theirs}, and here of {}", own.join(" or "));
            return Err(Refusal::new(proto::Code::Unsupported, message));
        }
        if state.confirmed > state.applied {
            return Err(Refusal::new(proto::Code::WrongStep, "more steps confirmed than applied"));
        }
        let lanes = check_lanes(ticket, self.engine.spec().max_context, &state.lanes)?;
        Ok((State { applied: state.applied, confirmed: state.confirmed }, lanes))
    }

    /// Has the engine write pieces of pages.
    fn write(self: &Arc<Self>, mut inner: MutexGuard<'_, Inner>, pieces: Range<usize>, part: Written) {
        let Written { payload, permit, link, index } = part;
        let count = pieces.len();
        let Some(cache) = inner.cache.take() else { return };
        drop(inner); // the engine may refuse at once, on this thread
        let session = self.clone();
        let done = move |cache: Cache, result: Result<(), TransferError>| {
            drop(permit);
            let mut inner = session.lock();
            if session.cancelled.load(Ordering::Relaxed) {
                return; // closed meanwhile: the pages go back with `cache`
            }
            inner.cache = Some(cache);
            let Some(taking) = &mut inner.taking else { return };
            taking.is_writing = false;
            match result {
                Ok(()) => {
                    taking.pieces += count;
                    session.tell_taken(&mut inner, &link, index);
                    session.take_parts(inner);
                }
                Err(error) => session.take_over_failed(&mut inner, &link, of_pages(error)),
            }
        };
        self.engine.write_pieces(cache, pieces, (payload, Box::new(done)));
    }

    /// The session stands where the other hop's stood.
    fn taken_over(self: &Arc<Self>, mut inner: MutexGuard<'_, Inner>) {
        let Some(Taking { state: Some(state), replies, bytes, .. }) = inner.taking.take() else { return };
        let most = inner.ticket.limits.max_lanes;
        if let Some(cache) = &mut inner.cache {
            cache.finish_rebuilding();
            let tokens: usize = (0..most).map(|lane| cache.end(lane)).sum();
            self.counts.tokens_taken_over.fetch_add(tokens as u64, Ordering::Relaxed);
            self.counts.bytes_taken_over.fetch_add(bytes, Ordering::Relaxed);
        }
        if state.applied == 0 {
            let held = inner.cache.as_ref().map_or(0, |cache| cache.end(0));
            inner.prefix.was_told(held);
        }
        let next = inner.log.take_over(state.applied, state.confirmed, replies);
        let opened = proto::frame::Body::Opened(self.what_it_has(&inner));
        if inner.control.send(Frame::bare(self.header(inner.log.epoch(), opened))).is_err() {
            tracing::debug!(session = %self.id, "the client can't be told: its link is gone");
        }
        if let Some(next) = next {
            self.run(inner, next);
        }
    }

    /// Tells the leaving hop that a part is taken, and now and then the client, which has no other way to see that it goes on.
    fn tell_taken(&self, inner: &mut Inner, link: &Link, index: u32) {
        let body = proto::frame::Body::TakenOver(proto::TakenOver { index });
        let frame = Frame::bare(self.header(inner.log.epoch(), body));
        if link.send(frame.clone()).is_err() {
            tracing::debug!(session = %self.id, "the leaving peer is gone");
        }
        let now = Instant::now();
        if let Some(taking) = &mut inner.taking
            && now.duration_since(taking.told_at) >= TELL_CLIENT_EVERY
        {
            taking.told_at = now;
            if inner.control.send(frame).is_err() {
                tracing::debug!(session = %self.id, "the client can't be told: its link is gone");
            }
        }
    }

    /// The session is of no use until the client opens it anew: `taking` stays, and says so. What it took is given back.
    fn take_over_failed(&self, inner: &mut Inner, link: &Link, refusal: Refusal) {
        inner.log.fail_epoch();
        inner.cache = None;
        inner.replaying.history.forget();
        if let Some(taking) = &mut inner.taking {
            *taking = Taking::new(taking.from);
        }
        let fault = proto::Fault {
            code: refusal.code.into(),
            blame: proto::Blame::Nobody.into(),
            message: refusal.message.clone(),
            ..proto::Fault::default()
        };
        let header = self.header(inner.log.epoch(), proto::frame::Body::Fault(fault));
        if link.send(Frame::bare(header)).is_err() {
            tracing::debug!(session = %self.id, "the leaving peer is gone");
        }
        let message = format!("the session can't be taken over: {}", refusal.message);
        self.fault(inner, Report::new(refusal.code, proto::Blame::Nobody, message));
    }
}

/// What the engine finds wrong.
fn of_pages(error: TransferError) -> Refusal {
    let code = match error {
        TransferError::CacheFull { .. } => proto::Code::CacheFull,
        TransferError::BadLanes(_) => proto::Code::WrongPosition,
        TransferError::BadPage(_) => proto::Code::BadTensor,
        TransferError::Device(_) | TransferError::Closed => proto::Code::Internal,
    };
    Refusal::new(code, error.to_string())
}

/// The lanes of a session, within its limits. That they fit their pages is for the engine to check.
fn check_lanes(ticket: &Ticket, max_context: usize, wire: &[proto::LaneState]) -> Result<Vec<LaneLayout>, Refusal> {
    let limits = &ticket.limits;
    let large = |message: String| Err(Refusal::new(proto::Code::TooLarge, message));
    let (mut lanes, mut all) = (BTreeMap::new(), 0u64);
    for lane in wire {
        let most = (max_context as u64).min(limits.max_tokens);
        all = all.saturating_add(lane.tokens);
        if lane.lane >= limits.max_lanes || lane.tokens > most || all > limits.max_tokens {
            return large(format!("lane {} with {} tokens is over the session's limits", lane.lane, lane.tokens));
        }
        // What is claimed is counted before anything is made of it.
        let most_pages = lane.tokens.div_ceil(PAGE_TOKENS as u64);
        let mut pages = Vec::new();
        for run in &lane.pages {
            if u64::from(run.count) > most_pages.saturating_sub(pages.len() as u64)
                || run.first.checked_add(run.count).is_none()
            {
                return large(format!("lane {} with {} tokens has more pages", lane.lane, lane.tokens));
            }
            pages.extend(run.first..run.first + run.count);
        }
        let layout = LaneLayout { lane: lane.lane, tokens: lane.tokens as usize, pages };
        if lanes.insert(lane.lane, layout).is_some() {
            return Err(Refusal::new(proto::Code::WrongPosition, format!("lane {} is described twice", lane.lane)));
        }
    }
    Ok(lanes.into_values().collect())
}

/// Hidden states that are not packed, in the session's dtype and the model's size.
fn check_states(
    ticket: &Ticket,
    hidden: usize,
    tensor: Option<&proto::Tensor>,
    payload: Bytes,
) -> Result<HiddenStates, Refusal> {
    let bad = |message: String| Refusal::new(proto::Code::BadTensor, message);
    let Some(tensor) = tensor else {
        let none = HiddenStates { dtype: ticket.wire_dtype, rows: 0, hidden, bytes: Bytes::new() };
        return if payload.is_empty() { Ok(none) } else { Err(bad("rows that nothing describes".to_owned())) };
    };
    let dtype: Dtype = tensor.dtype().try_into().map_err(|error| bad(format!("{error}")))?;
    if (dtype, tensor.hidden as usize, tensor.codec) != (ticket.wire_dtype, hidden, 0) {
        return Err(bad(format!(
            "rows of {} in {dtype} (codec {}), and the session's are of {hidden} in {}",
            tensor.hidden, tensor.codec, ticket.wire_dtype
        )));
    }
    let states = HiddenStates::new(dtype, tensor.rows as usize, hidden, payload).map_err(|e| bad(e.to_string()))?;
    match states.first_non_finite() {
        Some(row) => Err(Refusal::new(proto::Code::NonFinite, format!("row {row} is not finite"))),
        None => Ok(states),
    }
}

/// Consecutive rows of a part.
struct Run {
    /// As in [`Entry`].
    before: u64,
    place: Place,
    count: usize,
}

/// Rows that were sent on in steps up to `applied`, and where they belong.
fn check_rows(
    ticket: &Ticket,
    hidden: usize,
    (rows, state): (&proto::KeptRows, State),
    payload: Bytes,
) -> Result<(Vec<Run>, HiddenStates), Refusal> {
    let states = check_states(ticket, hidden, rows.tensor.as_ref(), payload)?;
    let bad = |message: String| Refusal::new(proto::Code::WrongPosition, message);
    let mut runs = Vec::with_capacity(rows.runs.len());
    let mut count = 0u64;
    for run in &rows.runs {
        let proto::LaneRun { lane, position, tokens } = run.rows.unwrap_or_default();
        let end = position.saturating_add(u64::from(tokens));
        let is_within = lane < ticket.limits.max_lanes && end <= ticket.limits.max_tokens;
        // What the session began with is of a step 0.
        let is_of_a_step = run.step <= state.applied;
        // A hop forgets what was before steps that are further back than the client may have under way.
        let settled = state.applied.saturating_sub(LEAD * u64::from(ticket.limits.max_in_flight));
        let is_past = state.confirmed.max(settled) < run.before && run.before <= state.applied;
        let is_known = if tokens > 0 { is_of_a_step && (is_past || run.before == 0) } else { is_past && position == 0 };
        if !is_within || !is_known {
            return Err(bad(format!("step {} sent on {tokens} rows of lane {lane} from {position}", run.step)));
        }
        let length_class = usize::try_from(run.length_class).unwrap_or(usize::MAX);
        let place = Place { step: run.step, lane, position: position as usize, length_class };
        runs.push(Run { before: run.before, place, count: tokens as usize });
        count += u64::from(tokens);
    }
    if count != states.rows as u64 {
        return Err(bad(format!("{} rows, and the runs name {count}", states.rows)));
    }
    Ok((runs, states))
}

/// A reply that may have to be sent again: its step as it came, and its output.
fn check_reply(ticket: &Ticket, hidden: usize, step: &proto::Step, payload: Bytes) -> Result<HiddenStates, Refusal> {
    let output = check_states(ticket, hidden, step.tensor.as_ref(), payload)?;
    let rows: u64 = step.lanes.iter().map(|run| u64::from(run.tokens)).sum();
    let most = SessionLimits::LARGEST.max_lanes.min(ticket.limits.max_lanes) as usize;
    let is_within = rows <= u64::from(ticket.limits.max_step_tokens) && step.lanes.len() <= most;
    if !is_within || output.rows as u64 > rows || step.times.len() > border::MOST_TIMES {
        let message = format!("a reply of {} rows to a step of {rows} rows", output.rows);
        return Err(Refusal::new(proto::Code::BadTensor, message));
    }
    Ok(output)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::node::{border::tests::hosted_and_ticket, session::handover::to_wire};

    fn lane_state() -> impl Strategy<Value = proto::LaneState> {
        let small = || prop_oneof![3 => 0u32..4, 1 => any::<u32>()];
        let tokens = prop_oneof![3 => 0u64..50, 1 => any::<u64>()];
        let pages = prop::collection::vec((small(), small()), 0..4);
        (small(), tokens, pages).prop_map(|(lane, tokens, pages)| proto::LaneState {
            lane,
            tokens,
            pages: pages.into_iter().map(|(first, count)| proto::PageRun { first, count }).collect(),
        })
    }

    proptest! {
        /// Whatever is claimed: no more is made of it than the ticket allows.
        #[test]
        fn lanes_are_within_the_tickets_limits(wire in prop::collection::vec(lane_state(), 0..5)) {
            let (_, mut ticket) = hosted_and_ticket();
            (ticket.limits.max_tokens, ticket.limits.max_lanes) = (40, 3);
            if let Ok(lanes) = check_lanes(&ticket, 64, &wire) {
                prop_assert!(lanes.iter().map(|lane| lane.tokens).sum::<usize>() <= 40);
                for lane in &lanes {
                    prop_assert!(lane.lane < 3 && lane.pages.len() <= lane.tokens.div_ceil(PAGE_TOKENS));
                }
            }
        }

        #[test]
        fn lanes_are_read_as_they_were_written(
            lanes in prop::collection::btree_map(0u32..3, prop::collection::vec(any::<u16>(), 1..9), 0..3),
        ) {
            let (_, mut ticket) = hosted_and_ticket();
            (ticket.limits.max_tokens, ticket.limits.max_lanes) = (1000, 3);
            let lanes: Vec<LaneLayout> = lanes
                .into_iter()
                .map(|(lane, pages)| LaneLayout {
                    lane,
                    tokens: pages.len() * PAGE_TOKENS,
                    pages: pages.into_iter().map(u32::from).collect(),
                })
                .collect();
            let wire: Vec<_> = lanes.iter().map(to_wire).collect();
            prop_assert_eq!(check_lanes(&ticket, 1000, &wire), Ok(lanes));
        }
    }
}
