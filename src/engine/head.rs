//! The output head, which the generations of a client share.
//!
//! Each asks for the logits of its own rows, often one row, and reading the head's matrix for it takes as long as for many.
//! So they meet at a desk: who finds nobody computing computes for all that wait, and those that come in the meantime wait
//! for the next round. Whoever could compute waits a moment for the others that are about to come ([`Gather`]); a generation that is
//! alone never waits, and there is no thread to wake.

use std::{
    collections::BTreeMap,
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use pulp::{Simd, WithSimd};
use rayon::ThreadPool;

use super::{
    edges::EdgeError,
    exp::tanh,
    hidden::HiddenStates,
    kernels::on_vectors,
    linear::Linear,
    norm::Norm,
    product::Room,
    schedule::{Gather, Here, Meeting, Took},
};

/// Rows of one round, unless one generation alone has more: as many as a product takes about as long for as for one, and a bound
/// on the logits that are held twice.
const ROUND_ROWS: usize = 32;

/// With no more rows a request is one of a generation that decodes: a token, or a speculative run.
const SHORT_ROWS: usize = 8;

/// Final norm and head.
pub(super) struct Head {
    pub(super) norm: Norm,
    pub(super) linear: Linear,
    pub(super) soft_cap: Option<f32>,
    /// Width of a row.
    pub(super) hidden: usize,
    /// Logits of a row.
    pub(super) vocab: usize,
    /// The threads that compute; those of the process where there are none.
    pub(super) threads: Option<ThreadPool>,
    pub(super) desk: Arc<Desk>,
}

/// Where the generations meet.
#[derive(Default)]
pub(super) struct Desk {
    state: Mutex<State>,
    /// A round has ended.
    ended: Condvar,
}

struct State {
    /// The number of the next request, and of the next seat.
    next: u64,
    /// How the seated ones come and go.
    gather: Gather,
    /// In the order in which they came; at most one a thread.
    waiting: Vec<Request>,
    /// What has been computed and not been fetched.
    done: BTreeMap<u64, Answer>,
    /// Whether somebody computes.
    busy: bool,
    /// The buffers, while nobody computes.
    buffers: Buffers,
}

/// A generation's place at the head. The head knows by it who decodes, and waits a moment for those that are about to come. A
/// generation that is over gives it up by dropping it.
pub struct Seat {
    desk: Arc<Desk>,
    number: u64,
}

type Answer = Result<Vec<f32>, EdgeError>;

struct Request {
    number: u64,
    seat: Option<u64>,
    arrived: Instant,
    rows: HiddenStates,
    /// Where the logits go.
    logits: Vec<f32>,
}

#[derive(Default)]
struct Buffers {
    /// `[rows, hidden]`.
    normed: Vec<f32>,
    /// Of a round with several requests, `[rows, vocab]`.
    logits: Vec<f32>,
    room: Room,
}

impl Desk {
    /// The state. A panic can't leave it half changed: what may panic runs outside the lock.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Head {
    /// The logits of `rows`, which have the head's width, `[rows, vocab]`. They go into `logits`, whose memory is used again.
    pub(super) fn logits(&self, rows: HiddenStates, logits: Vec<f32>, seat: Option<&Seat>) -> Answer {
        let seat = seat.map(|seat| seat.number);
        let arrived = Instant::now();
        let mut state = self.desk.lock();
        let number = state.next;
        state.next += 1;
        if let Some(seat) = seat {
            state.gather.came(seat, rows.rows <= SHORT_ROWS, arrived);
        }
        state.waiting.push(Request { number, seat, arrived, rows, logits });
        loop {
            if let Some(answer) = state.done.remove(&number) {
                return answer;
            }
            if state.busy {
                state = self.desk.ended.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let began = Instant::now();
            if let Some(until) = state.company(began) {
                let ended = self.desk.ended.wait_timeout(state, until - began);
                state = ended.unwrap_or_else(PoisonError::into_inner).0;
                continue;
            }
            state.busy = true;
            let round = state.round();
            state.gather.begins(round.len(), began);
            let mut buffers = std::mem::take(&mut state.buffers);
            drop(state);
            let numbers: Vec<u64> = round.iter().map(|request| request.number).collect();
            let steps: Vec<Here> = round.iter().filter_map(Request::here).collect();
            let rows: usize = round.iter().map(|request| request.rows.rows).sum();
            let answers = catch_unwind(AssertUnwindSafe(|| self.on_threads(round, &mut buffers)));
            let now = Instant::now();
            state = self.desk.lock();
            state.busy = false;
            // Only first hops have to know who else uses the processor.
            state.gather.ran(rows, Took { time: now - began, processor: now - began }, now);
            for step in steps {
                state.gather.stepped(step, step.rows <= SHORT_ROWS, now);
            }
            match answers {
                Ok(answers) => {
                    state.buffers = buffers;
                    state.done.extend(numbers.into_iter().zip(answers.into_iter().map(Ok)));
                }
                Err(_) => state.done.extend(numbers.into_iter().map(|number| (number, Err(EdgeError::Panicked)))),
            }
            self.desk.ended.notify_all();
        }
    }

    fn on_threads(&self, round: Vec<Request>, buffers: &mut Buffers) -> Vec<Vec<f32>> {
        match &self.threads {
            Some(threads) => threads.install(|| self.compute(round, buffers)),
            None => self.compute(round, buffers),
        }
    }

    fn compute(&self, mut round: Vec<Request>, buffers: &mut Buffers) -> Vec<Vec<f32>> {
        let Buffers { normed, logits, room } = buffers;
        let count: usize = round.iter().map(|request| request.rows.rows).sum();
        normed.resize(count * self.hidden, 0.0);
        let mut rest = &mut normed[..];
        for request in &round {
            let (own, others) = rest.split_at_mut(request.rows.rows * self.hidden);
            request.rows.decode_rows(0, own);
            rest = others;
        }
        self.norm.normalise(normed);
        if let [alone] = &mut round[..] {
            self.linear.forward(normed, &mut alone.logits, room);
            self.cap(&mut alone.logits);
        } else {
            self.linear.forward(normed, logits, room);
            self.cap(logits);
            let mut rest = &logits[..];
            for request in &mut round {
                let (own, others) = rest.split_at(request.rows.rows * self.vocab);
                request.logits.clear();
                request.logits.extend_from_slice(own);
                rest = others;
            }
        }
        round.into_iter().map(|request| request.logits).collect()
    }

    fn cap(&self, logits: &mut [f32]) {
        if let Some(cap) = self.soft_cap {
            on_vectors(SoftCap { cap, logits });
        }
    }
}

impl State {
    /// Until when to wait for those that are about to come, if all that wait decode.
    fn company(&mut self, now: Instant) -> Option<Instant> {
        let is_short = |request: &Request| request.rows.rows <= SHORT_ROWS;
        let here: Option<Vec<Here>> =
            self.waiting.iter().map(|request| request.here().filter(|_| is_short(request))).collect();
        // At a head nothing is formed, which takes long.
        self.gather.wait(&here?, Duration::ZERO, now)
    }

    /// Takes the requests of the next round out of the queue: the first, and more while they fit.
    fn round(&mut self) -> Vec<Request> {
        let mut rows = 0;
        let fits = |request: &&Request| {
            let is_first = rows == 0;
            rows += request.rows.rows;
            is_first || rows <= ROUND_ROWS
        };
        let count = self.waiting.iter().take_while(fits).count();
        self.waiting.drain(..count).collect()
    }
}

impl Request {
    fn here(&self) -> Option<Here> {
        Some(Here { session: self.seat?, rows: self.rows.rows, arrived: self.arrived })
    }
}

impl Default for State {
    fn default() -> Self {
        Self {
            next: 0,
            gather: Gather::new(Meeting::Head),
            waiting: Vec::new(),
            done: BTreeMap::new(),
            busy: false,
            buffers: Buffers::default(),
        }
    }
}

impl Seat {
    pub(super) fn new(desk: &Arc<Desk>) -> Self {
        let mut state = desk.lock();
        let number = state.next;
        state.next += 1;
        Self { desk: desk.clone(), number }
    }

    pub(super) fn is_at(&self, desk: &Arc<Desk>) -> bool {
        Arc::ptr_eq(&self.desk, desk)
    }
}

impl fmt::Debug for Seat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Seat").field("number", &self.number).finish_non_exhaustive()
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.desk.lock().gather.forget(self.number);
    }
}

/// `cap · tanh(logit / cap)`.
struct SoftCap<'a> {
    cap: f32,
    logits: &'a mut [f32],
}

impl WithSimd for SoftCap<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let cap = simd.splat_f32s(self.cap);
        let (vectors, last) = S::as_mut_simd_f32s(self.logits);
        for x in vectors {
            *x = simd.mul_f32s(cap, tanh(simd, simd.div_f32s(*x, cap)));
        }
        if !last.is_empty() {
            let x = simd.div_f32s(simd.partial_load_f32s(last), cap);
            simd.partial_store_f32s(last, simd.mul_f32s(cap, tanh(simd, x)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Dtype;

    fn request(number: u64, rows: usize) -> Request {
        let rows = HiddenStates::from_f32(Dtype::F32, 2, &vec![0.5; 2 * rows]);
        Request { number, seat: None, arrived: Instant::now(), rows, logits: Vec::new() }
    }

    #[test]
    fn a_round_takes_what_fits_in_order_and_always_the_first() {
        let rows = [100, 1, 20, 11, 1, 40, 1];
        let waiting = (0..).zip(rows).map(|(number, rows)| request(number, rows)).collect();
        let mut state = State { waiting, ..State::default() };
        let mut rounds = Vec::new();
        while !state.waiting.is_empty() {
            rounds.push(state.round().iter().map(|request| request.number).collect::<Vec<_>>());
        }
        assert_eq!(rounds, [vec![0], vec![1, 2, 3], vec![4], vec![5], vec![6]]);
    }
}
