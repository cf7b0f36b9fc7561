//! The batcher: one thread that takes the steps of all sessions and runs them together.
//!
//! It goes round and round: fetch what arrived, drop what nobody wants, give pages to those that wait for them, wait for those that
//! are about to come if that pays, divide the budget among the steps that are ready, run a pass, answer the steps that are finished.

use std::{
    any::Any,
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use cpu_time::ThreadTime;

use super::{
    cache::{Cache, Desk, DeskState, Pending},
    hidden::{self, HiddenStates},
    job::{Job, Keep, Place, StepError, StepOutput},
    lanes::{LaneRun, PageCopy},
    pages::{Claim, PAGE_TOKENS},
    pass::{NonFinite, Outcome, Pass, Piece, Segment},
    schedule::{Demand, Here, PassRows, Schedule, Share, Took},
    snapshot::Transfer,
};

/// How often a step that waits for pages is asked whether it is still wanted; nobody rings when it isn't.
const CANCEL_CHECK: Duration = Duration::from_millis(100);

/// A step with no more tokens in each of its lanes is short: a decode token, or a speculative run.
const SHORT_TOKENS: usize = 8;

pub(super) struct Batcher {
    desk: Arc<Desk>,
    span: Box<dyn Pass>,
    schedule: Schedule,
    /// Steps that have no pages yet.
    waiting: VecDeque<Pending>,
    /// Steps that have all their pages.
    ready: Vec<Active>,
    /// Buffers that are kept from pass to pass, empty in between.
    buffers: Buffers,
}

#[derive(Default)]
struct Buffers {
    demands: Vec<Demand>,
    segments: Vec<Segment<'static>>,
    finished: Vec<(Active, Option<StepError>)>,
}

/// A step that has its pages.
struct Active {
    job: Job,
    submitted: Instant,
    /// From when on the schedule answers for its waiting: when it came, or, where pages were wanting, when it had them.
    since: Instant,
    /// To be made in the first pass.
    copies: Vec<PageCopy>,
    /// When its first pass began.
    began: Option<Instant>,
    /// Rows that have been through.
    done: usize,
    /// Rows that are wanted, encoded.
    output: Vec<u8>,
    computed: Duration,
    /// Passes with a part of a prompt that it was in, or waited for.
    chunks: u32,
}

impl Batcher {
    /// A batcher with passes of at most `budget` rows.
    pub(super) fn new(desk: Arc<Desk>, span: Box<dyn Pass>, budget: usize) -> Self {
        let (schedule, buffers) = (Schedule::new(budget), Buffers::default());
        Self { desk, span, schedule, waiting: VecDeque::new(), ready: Vec::new(), buffers }
    }

    /// Works until the engine is closed.
    pub(super) fn run(mut self) {
        while self.fetch() {
            self.turn();
        }
        for pending in self.waiting {
            refuse(pending.job, StepError::Cancelled);
        }
        for active in self.ready {
            active.give_up(StepError::Cancelled);
        }
        let transfers = std::mem::take(&mut self.desk.lock().transfers);
        transfers.into_iter().for_each(Transfer::refuse);
    }

    /// What there is to do once there is something.
    fn turn(&mut self) {
        self.transfer();
        self.discard();
        self.buffers.demands.clear();
        self.buffers.demands.extend(self.ready.iter().map(Active::demand));
        let others_decode = self.desk.lock().gather.expects_more(Instant::now());
        let shares = self.schedule.divide(&self.buffers.demands, others_decode);
        if !shares.is_empty() {
            self.pass(&shares);
        }
    }

    /// One of the sessions that come or go has some of its pages moved. No more than that between two passes: nobody's next token
    /// waits for a whole session's pages.
    fn transfer(&mut self) {
        let next = self.desk.lock().transfers.pop_front();
        if let Some(transfer) = next {
            let span = &mut *self.span;
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| transfer.run(span))) {
                tracing::error!(message = panic_message(&*panic), "moving a session's pages panicked");
            }
        }
    }

    /// Takes in new steps and gives out pages; waits while there is nothing to do. False once the engine is closed.
    fn fetch(&mut self) -> bool {
        let desk = self.desk.clone();
        let mut state = desk.lock();
        let mut has_waited = false;
        loop {
            let DeskState { arrivals, gather, .. } = &mut *state;
            for pending in arrivals.iter() {
                gather.came(pending.job.cache.number, is_short(&pending.job), pending.submitted);
            }
            self.waiting.append(arrivals);
            if state.closed {
                return false;
            }
            self.admit(&mut state);
            if self.ready.is_empty() {
                state.gather.gives_up(Instant::now());
            }
            let (now, moves) = (Instant::now(), !state.transfers.is_empty());
            if moves || !self.ready.is_empty() {
                let until = if moves { None } else { self.company(&mut state, now) };
                let Some(until) = until else {
                    // Whatever ended it, the steps have waited as if for a chunk.
                    if has_waited {
                        self.schedule.waited(now);
                    }
                    return true;
                };
                has_waited = true;
                state = desk.wait(state, Some(until));
                continue;
            }
            if self.waiting.iter().any(|pending| is_stale(&pending.job, now)) {
                return true;
            }
            let first_deadline = self.waiting.iter().map(|pending| pending.job.deadline).min();
            state = desk.wait(state, first_deadline.map(|deadline| deadline.min(now + CANCEL_CHECK)));
        }
    }

    /// Until when to wait for sessions that are about to come, if there is nothing but decoding to do.
    fn company(&self, state: &mut DeskState, now: Instant) -> Option<Instant> {
        let is_urgent = |active: &Active| !active.is_short() || active.began.is_some();
        if !self.waiting.is_empty() || self.ready.iter().any(is_urgent) {
            return None;
        }
        let here: Vec<Here> = self.ready.iter().map(Active::here).collect();
        let until = state.gather.wait(&here, self.schedule.longest_wait(), now)?;
        // A step that is too late for its deadline fails.
        self.ready.iter().all(|active| until < active.job.deadline).then_some(until)
    }

    /// Gives pages to the steps that wait for them: first of sessions that run, then of new ones, each kind in order.
    ///
    /// One that can't get its pages holds up all behind it that want some, or it might wait for ever. Those that want none
    /// go on: a full cache doesn't stop the decode steps that have room in the pages they hold.
    fn admit(&mut self, state: &mut DeskState) {
        let mut needs_wait = false;
        for claim in [Claim::Running, Claim::New] {
            let mut index = 0;
            while index < self.waiting.len() {
                let pending = &mut self.waiting[index];
                let (table, runs) = (&pending.job.cache.table, &pending.job.lanes);
                if table.claim() != claim {
                    index += 1;
                    continue;
                }
                let must_wait = needs_wait && table.needed(runs, &state.pages) > 0;
                let pages = if must_wait { None } else { state.pages_for(table, runs) };
                let Some(pages) = pages else {
                    pending.starved = true;
                    needs_wait = true;
                    index += 1;
                    continue;
                };
                if let Some(Pending { mut job, submitted, starved }) = self.waiting.remove(index) {
                    let since = if starved { Instant::now() } else { submitted };
                    // What it waited for until it had its pages isn't the schedule's to answer for.
                    let met_chunk = !starved && self.schedule.was_in_the_way(submitted);
                    let copies = job.cache.table.extend(&job.lanes, pages, &state.pages);
                    self.ready.push(Active {
                        job,
                        submitted,
                        since,
                        copies,
                        began: None,
                        done: 0,
                        output: Vec::new(),
                        computed: Duration::ZERO,
                        chunks: u32::from(met_chunk),
                    });
                }
            }
        }
    }

    /// Answers the steps that are cancelled or too late.
    fn discard(&mut self) {
        let now = Instant::now();
        let mut index = 0;
        while index < self.waiting.len() {
            if is_stale(&self.waiting[index].job, now)
                && let Some(pending) = self.waiting.remove(index)
            {
                let error = if is_cancelled(&pending.job) {
                    StepError::Cancelled
                } else if pending.starved {
                    cache_full(&self.desk.lock(), &pending.job)
                } else {
                    StepError::Deadline
                };
                self.desk.lock().leave(pending.job.cache.owner);
                refuse(pending.job, error);
            } else {
                index += 1;
            }
        }
        let stale =
            |active: &mut Active| is_cancelled(&active.job) || (active.began.is_none() && active.job.deadline <= now);
        for active in self.ready.extract_if(.., stale) {
            if active.began.is_none() {
                self.desk.lock().leave(active.job.cache.owner);
            }
            let error = if is_cancelled(&active.job) { StepError::Cancelled } else { StepError::Deadline };
            active.give_up(error);
        }
    }

    fn pass(&mut self, shares: &[Share]) {
        let began = Instant::now();
        let mut state = self.desk.lock();
        state.gather.begins(shares.len(), began);
        for share in shares {
            let active = &mut self.ready[share.step];
            if active.began.is_none() {
                active.began = Some(began);
                state.leave(active.job.cache.owner);
            }
        }
        drop(state);
        let mut segments = emptied(std::mem::take(&mut self.buffers.segments));
        segments.extend(shares.iter().map(|share| self.ready[share.step].segment(share.rows)));
        let span = &mut self.span;
        let processor = ThreadTime::try_now().ok().filter(|_| span.is_on_processor());
        let outcomes = catch_unwind(AssertUnwindSafe(|| span.run(&segments)));
        self.buffers.segments = emptied(segments);
        for share in shares {
            self.ready[share.step].copies.clear();
        }
        let ended = Instant::now();
        let took = ended - began;
        let processor = processor.and_then(|began| began.try_elapsed().ok()).unwrap_or(took);
        let rows = PassRows::of(shares.iter().map(|share| (self.ready[share.step].is_short(), share.rows)));
        self.schedule.ran(rows, took, ended);
        tracing::trace!(rows = rows.all(), ?took, ?processor, "a pass");
        for active in &mut self.ready {
            active.chunks += u32::from(rows.long > 0);
        }
        let mut state = self.desk.lock();
        state.counts.passes += 1;
        state.counts.rows += rows.all() as u64;
        state.counts.busy += took;
        if rows.long == 0 {
            state.gather.ran(rows.short, Took { time: took, processor }, ended);
        }
        drop(state);
        let results: Vec<Result<Outcome, String>> = match outcomes {
            Ok(Ok(outcomes)) => outcomes.into_iter().map(Ok).collect(),
            Ok(Err(error)) => shares.iter().map(|_| Err(error.to_string())).collect(),
            Err(panic) => {
                let message = panic_message(&*panic);
                tracing::error!(message, "a pass panicked; its steps fail and the engine goes on");
                shares.iter().map(|_| Err(message.clone())).collect()
            }
        };

        // From the back, so that a removal doesn't move the steps that are still to come.
        let mut finished = std::mem::take(&mut self.buffers.finished);
        for (share, result) in shares.iter().zip(results).rev() {
            let active = &mut self.ready[share.step];
            active.computed += took;
            match result {
                Ok(Ok(rows)) => {
                    active.take_output(share.rows, self.span.states(rows));
                    if active.rows_left() == 0 {
                        finished.push((self.ready.remove(share.step), None));
                    }
                }
                Ok(Err(NonFinite { row, block })) => {
                    let error = StepError::NonFinite { row: active.done + row, place: Place::Block(block) };
                    finished.push((self.ready.remove(share.step), Some(error)));
                }
                Err(message) => finished.push((self.ready.remove(share.step), Some(StepError::Internal(message)))),
            }
        }
        for (active, error) in finished.drain(..).rev() {
            self.finish(active, error);
        }
        self.buffers.finished = finished;
    }

    fn finish(&self, active: Active, error: Option<StepError>) {
        if let Some(error) = error {
            return active.give_up(error);
        }
        let (is_short, step) = (active.is_short(), active.here());
        let Active { mut job, submitted, since, began, output, computed, chunks, .. } = active;
        self.desk.give_back(job.cache.table.commit(&job.lanes));
        let mut state = self.desk.lock();
        state.counts.steps += 1;
        state.counts.tokens += job.hidden.rows as u64;
        let now = Instant::now();
        state.gather.stepped(step, is_short, now);
        if is_short {
            let is_slow = now.saturating_duration_since(since) > self.schedule.decode_gap();
            state.counts.decodes += 1;
            state.counts.late_decodes += u64::from(chunks > 1);
            state.counts.slow_decodes += u64::from(is_slow);
        }
        drop(state);
        let HiddenStates { dtype, hidden, .. } = job.hidden;
        let rows = output.len() / (hidden * dtype.size_in_bytes());
        let queued = began.map_or(Duration::ZERO, |began| began - submitted);
        let hidden = HiddenStates { dtype, rows, hidden, bytes: output.into() };
        answer(job.done, job.cache, Ok(StepOutput { hidden, queued, computed }));
    }
}

impl Active {
    fn rows_left(&self) -> usize {
        self.job.hidden.rows - self.done
    }

    fn is_short(&self) -> bool {
        is_short(&self.job)
    }

    fn here(&self) -> Here {
        Here { session: self.job.cache.number, rows: self.job.hidden.rows, arrived: self.submitted }
    }

    fn demand(&self) -> Demand {
        let (owner, arrived) = (self.job.cache.owner, self.submitted);
        Demand { rows: self.rows_left(), owner, is_short: self.is_short(), arrived }
    }

    /// Answers that the step failed.
    fn give_up(self, error: StepError) {
        let mut job = self.job;
        let table = &mut job.cache.table;
        // A step that hasn't begun has overwritten nothing: its lanes keep their ends.
        let superfluous = if self.began.is_some() { table.abandon(&job.lanes) } else { table.release() };
        job.cache.desk.give_back(superfluous);
        refuse(job, error);
    }

    /// The next `rows` rows.
    fn segment(&self, rows: usize) -> Segment<'_> {
        let pieces = pieces(&self.job.lanes, self.done, rows);
        let table = &self.job.cache.table;
        Segment {
            blocks: self.job.cache.blocks(),
            wire: self.job.hidden.dtype,
            pieces: pieces
                .map(|(run, piece)| Piece {
                    position: piece.position,
                    rows: piece.tokens,
                    // The whole step's: it mustn't depend on how the step is cut into passes.
                    rope_length: self.job.rope_length.unwrap_or(run.end()),
                    pages: table.pages(piece.lane),
                })
                .collect(),
            copies: &self.copies,
            hidden: &self.job.hidden,
            first: self.done,
        }
    }

    /// Keeps what is wanted of the output of the next `rows` rows.
    fn take_output(&mut self, rows: usize, values: &[f32]) {
        let HiddenStates { dtype, rows: all, hidden: width, .. } = self.job.hidden;
        let wanted = match self.job.keep {
            Keep::All => all,
            Keep::LastOfEachLane => self.job.lanes.len(),
            Keep::Nothing => 0,
        };
        // The message itself: one allocation, whatever the number of passes.
        self.output.reserve_exact(wanted * width * dtype.size_in_bytes() - self.output.len());
        match self.job.keep {
            Keep::All => hidden::encode(dtype, values, &mut self.output),
            Keep::Nothing => {}
            Keep::LastOfEachLane => {
                let mut end = 0;
                for run in &self.job.lanes {
                    end += run.tokens;
                    if (self.done + 1..=self.done + rows).contains(&end) {
                        let last = (end - 1 - self.done) * width;
                        hidden::encode(dtype, &values[last..last + width], &mut self.output);
                    }
                }
            }
        }
        self.done += rows;
    }
}

/// The same memory for other segments.
fn emptied<'a>(mut segments: Vec<Segment<'_>>) -> Vec<Segment<'a>> {
    segments.clear();
    // The standard library collects into the memory that it collects from.
    segments.into_iter().map(|_| unreachable!("nothing is left in it")).collect()
}

/// The runs of `lanes` that have a part in rows `first..first + count` of the step, and these parts.
fn pieces(lanes: &[LaneRun], first: usize, count: usize) -> impl Iterator<Item = (&LaneRun, LaneRun)> {
    let mut start = 0;
    lanes.iter().filter_map(move |run| {
        let (from, to) = (first.max(start), (first + count).min(start + run.tokens));
        let position = run.position + from.saturating_sub(start);
        start += run.tokens;
        (from < to).then(|| (run, LaneRun { lane: run.lane, position, tokens: to - from }))
    })
}

/// Says that `job` can't get its pages.
pub(super) fn cache_full(state: &DeskState, job: &Job) -> StepError {
    StepError::CacheFull {
        needed_tokens: job.cache.table.needed(&job.lanes, &state.pages).saturating_mul(PAGE_TOKENS),
        free_tokens: state.pages.available() * PAGE_TOKENS,
        total_tokens: state.pages.total() * PAGE_TOKENS,
    }
}

pub(super) fn is_cancelled(job: &Job) -> bool {
    job.cancelled.load(Ordering::Relaxed)
}

fn is_short(job: &Job) -> bool {
    job.lanes.iter().all(|run| run.tokens <= SHORT_TOKENS)
}

fn is_stale(job: &Job, now: Instant) -> bool {
    is_cancelled(job) || job.deadline <= now
}

/// Answers a step that can't be done.
pub(super) fn refuse(job: Job, error: StepError) {
    answer(job.done, job.cache, Err(error));
}

type Done = Box<dyn FnOnce(Cache, Result<StepOutput, StepError>) + Send>;

/// Calls `done`. A panic in it is somebody else's fault, and mustn't end the engine's thread.
fn answer(done: Done, cache: Cache, result: Result<StepOutput, StepError>) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| done(cache, result))) {
        tracing::error!(message = panic_message(&*panic), "the receiver of a step's result panicked");
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "a panic without a message".to_owned())
}

#[cfg(test)]
mod tests;
