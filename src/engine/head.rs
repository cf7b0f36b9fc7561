//! The output head, which the generations of a client share.
//!
//! Each asks for the logits of its own rows, often one row, and reading the head's matrix for it takes as long as for many.
//! So they meet at a desk: who finds nobody computing computes for all that wait, and those that come in the meantime wait
//! for the next round. A generation that is alone never waits, and there is no thread to wake.

use std::{
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
};

use pulp::{Simd, WithSimd};
use rayon::ThreadPool;

use super::{
    edges::EdgeError, exp::tanh, hidden::HiddenStates, kernels::on_vectors, linear::Linear, norm::Norm, product::Room,
};

/// Rows of one round, unless one generation alone has more: as many as a product takes about as long for as for one, and a bound
/// on the logits that are held twice.
const ROUND_ROWS: usize = 32;

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
    pub(super) desk: Desk,
}

/// Where the generations meet.
#[derive(Default)]
pub(super) struct Desk {
    state: Mutex<State>,
    /// A round has ended.
    ended: Condvar,
}

#[derive(Default)]
struct State {
    /// The number of the next request.
    next: u64,
    /// In the order in which they came; at most one a thread.
    waiting: Vec<Request>,
    /// What has been computed and not been fetched.
    done: BTreeMap<u64, Answer>,
    /// Whether somebody computes.
    busy: bool,
    /// The buffers, while nobody computes.
    buffers: Buffers,
}

type Answer = Result<Vec<f32>, EdgeError>;

struct Request {
    number: u64,
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
    pub(super) fn logits(&self, rows: HiddenStates, logits: Vec<f32>) -> Answer {
        let mut state = self.desk.lock();
        let number = state.next;
        state.next += 1;
        state.waiting.push(Request { number, rows, logits });
        loop {
            if let Some(answer) = state.done.remove(&number) {
                return answer;
            }
            if state.busy {
                state = self.desk.ended.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            state.busy = true;
            let round = state.round();
            let mut buffers = std::mem::take(&mut state.buffers);
            drop(state);
            let numbers: Vec<u64> = round.iter().map(|request| request.number).collect();
            let answers = catch_unwind(AssertUnwindSafe(|| self.on_threads(round, &mut buffers)));
            state = self.desk.lock();
            state.busy = false;
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
        Request { number, rows, logits: Vec::new() }
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
