//! What all links of a process hold together: with a bound for each alone, a thousand of them could take all there is.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use tokio::sync::{Mutex, MutexGuard, Semaphore, SemaphorePermit};

use super::LinkLimits;
use crate::swarm::frame::Room;

/// The budgets of the frames that arrive and of those that leave.
#[derive(Debug)]
pub(super) struct Memory {
    /// Bytes left for what has arrived of payloads that are not complete.
    arriving: Semaphore,
    /// Held by the one payload that may arrive beside the budget.
    turn: Mutex<()>,
    /// Bytes in all outboxes.
    leaving: AtomicUsize,
    leaving_limit: usize,
}

impl Memory {
    pub(super) fn new(limits: &LinkLimits) -> Self {
        Self {
            arriving: Semaphore::new(limits.all_arriving_bytes.min(Semaphore::MAX_PERMITS)),
            turn: Mutex::new(()),
            leaving: AtomicUsize::new(0),
            leaving_limit: limits.all_outbox_bytes,
        }
    }

    /// Bytes in all outboxes.
    pub(super) fn leaving(&self) -> usize {
        self.leaving.load(Ordering::Relaxed)
    }

    /// Counts bytes of an outbox, if there is room for them; one frame always fits, whatever its size.
    pub(super) fn take_leaving(&self, bytes: usize) -> bool {
        let fits = |held: usize| (held == 0 || held + bytes <= self.leaving_limit).then_some(held + bytes);
        self.leaving.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits).is_ok()
    }

    /// Counts bytes of an outbox whether or not there is room.
    pub(super) fn force_leaving(&self, bytes: usize) {
        self.leaving.fetch_add(bytes, Ordering::Relaxed);
    }

    /// These bytes have left.
    pub(super) fn give_back_leaving(&self, bytes: usize) {
        self.leaving.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Room for one payload to arrive in; given back when it is dropped.
    pub(super) fn room(&self) -> PayloadRoom<'_> {
        PayloadRoom { memory: self, held: None, turn: None, is_waiting: AtomicBool::new(false) }
    }
}

/// What one payload has taken of the budget.
///
/// It is taken piece by piece as the payload arrives, since a whole length is a claim that costs its sender nothing. Pieces
/// alone could leave all payloads half-way with nothing left for any; so one at a time may arrive beside the budget, to its
/// end, and the bound is the budget and one payload.
pub(super) struct PayloadRoom<'a> {
    memory: &'a Memory,
    held: Option<SemaphorePermit<'a>>,
    turn: Option<MutexGuard<'a, ()>>,
    is_waiting: AtomicBool,
}

impl PayloadRoom<'_> {
    /// Whether it waits for others to give room back.
    pub(super) fn is_waiting(&self) -> bool {
        self.is_waiting.load(Ordering::Relaxed)
    }
}

impl Room for PayloadRoom<'_> {
    async fn take(&mut self, bytes: usize) {
        if self.turn.is_some() {
            return;
        }
        self.is_waiting.store(true, Ordering::Relaxed);
        let permits = u32::try_from(bytes).unwrap_or(u32::MAX);
        tokio::select! {
            biased;
            // The semaphore is never closed, which would be its only error.
            Ok(more) = self.memory.arriving.acquire_many(permits) => match &mut self.held {
                Some(held) => held.merge(more),
                held => *held = Some(more),
            },
            turn = self.memory.turn.lock() => self.turn = Some(turn),
        }
        self.is_waiting.store(false, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    fn memory(arriving: usize, leaving: usize) -> Memory {
        Memory::new(&LinkLimits { all_arriving_bytes: arriving, all_outbox_bytes: leaving, ..LinkLimits::default() })
    }

    #[test]
    fn one_payload_always_goes_on_and_the_others_wait_for_room() {
        let memory = memory(100, 0);
        let (mut a, mut b, mut c) = (memory.room(), memory.room(), memory.room());
        assert!(a.take(60).now_or_never().is_some());
        assert!(b.take(30).now_or_never().is_some());
        // None of them fits any more: the first that asks gets the turn.
        assert!(b.take(30).now_or_never().is_some() && !b.is_waiting());
        assert!(a.take(60).now_or_never().is_none() && a.is_waiting());
        assert!(c.take(11).now_or_never().is_none());
        assert!(c.take(10).now_or_never().is_some());
        // Whoever has the turn takes what it likes, until it is done.
        assert!(b.take(1 << 40).now_or_never().is_some());
        drop(b);
        assert!(c.take(30).now_or_never().is_some());
        assert!(a.take(1).now_or_never().is_some(), "the turn is free again");
        drop((a, c));
        assert_eq!(memory.arriving.available_permits(), 100);
    }

    #[test]
    fn outboxes_share_a_budget_in_which_one_frame_always_fits() {
        let memory = memory(0, 100);
        assert!(memory.take_leaving(1000));
        assert!(!memory.take_leaving(1));
        memory.give_back_leaving(1000);
        assert!(memory.take_leaving(60) && !memory.take_leaving(41) && memory.take_leaving(40));
        assert_eq!(memory.leaving(), 100);
    }
}
