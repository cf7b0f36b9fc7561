//! A session is a numbered log: which step a hop applies, holds, answers again, ignores or refuses.
//!
//! The client numbers steps 1, 2, 3 … and never reuses a number; a hop applies step *n* only after *n* − 1. A number that
//! was applied already is a retry: it is answered from what is kept, and nothing changes. Every change of route raises the
//! epoch; frames of older epochs are dropped, and after an error so is the rest of that epoch. This module decides that,
//! without sockets, clocks or tensors: `S` is a step that waits for its turn, `R` a reply that is kept.

use std::collections::BTreeMap;

/// What to do with a step that arrived.
#[derive(Debug, PartialEq, Eq)]
pub enum Arrival<S, R> {
    /// It is its turn: run it, then call [`StepLog::applied`] or [`StepLog::failed`].
    Run(S),
    /// It is kept until its turn comes.
    Held,
    /// A retry of a step that was applied: send this again.
    Again(R),
    /// Nothing to do.
    Ignored(Ignored),
    /// The client broke the rules.
    Refused(Refused),
}

/// How many times its credit a client may be ahead of a hop. A hop that takes a lost one's place begins behind the others: while it is
/// told what it lacks, these answer what they had applied, as much as the credit, and the client sends as much again.
pub(super) const LEAD: u64 = 2;

/// Why a step needs nothing done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ignored {
    /// It belongs to an older route.
    OldEpoch,
    /// The route failed; only a new epoch goes on.
    EpochFailed,
    /// The same step is running or held.
    UnderWay,
    /// The client said itself that it holds the reply.
    Confirmed,
}

/// Which rule a step broke.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// No ticket was shown for this epoch.
    #[error("step {number} names epoch {epoch}, and the session was opened for epoch {opened}")]
    UnknownEpoch {
        /// The step.
        number: u64,
        /// What it names.
        epoch: u64,
        /// What the ticket names.
        opened: u64,
    },
    /// Steps count from 1.
    #[error("steps are numbered from 1; this one is 0")]
    Zero,
    /// More steps under way than the ticket allows.
    #[error("step {number} is more than {most} ahead of the last applied one, {applied}")]
    BeyondCredit {
        /// The step.
        number: u64,
        /// The last applied one.
        applied: u64,
        /// Twice the ticket's `max_in_flight`.
        most: u64,
    },
}

/// A session's log on one hop. See the module's docs.
#[derive(Debug)]
pub struct StepLog<S, R> {
    epoch: u64,
    failed: bool,
    credit: u64,
    applied: u64,
    /// As the client says.
    confirmed: u64,
    /// The epoch in which the step that is being computed arrived.
    running: Option<u64>,
    /// A replay is under way: no step may run.
    filling: bool,
    held: BTreeMap<u64, S>,
    kept: BTreeMap<u64, R>,
}

impl<S, R: Clone> StepLog<S, R> {
    /// An empty log of a session opened with `epoch`, that may have `credit` steps under way.
    pub fn new(epoch: u64, credit: u32) -> Self {
        Self {
            epoch,
            failed: false,
            credit: u64::from(credit),
            applied: 0,
            confirmed: 0,
            running: None,
            filling: false,
            held: BTreeMap::new(),
            kept: BTreeMap::new(),
        }
    }

    /// The epoch whose frames count.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// The last step that was applied; 0 before the first.
    pub fn last_applied(&self) -> u64 {
        self.applied
    }

    /// Whether a step or a replay is being computed.
    pub fn is_running(&self) -> bool {
        self.running.is_some() || self.filling
    }

    /// Whether the step that is being computed came by a route that was given up since.
    pub fn is_of_old_route(&self) -> bool {
        self.running.is_some_and(|epoch| epoch < self.epoch)
    }

    /// Takes a step that arrived from the peer whose steps count.
    pub fn arrive(&mut self, epoch: u64, number: u64, step: S) -> Arrival<S, R> {
        if epoch < self.epoch {
            return Arrival::Ignored(Ignored::OldEpoch);
        }
        if epoch > self.epoch {
            return Arrival::Refused(Refused::UnknownEpoch { number, epoch, opened: self.epoch });
        }
        if self.failed {
            return Arrival::Ignored(Ignored::EpochFailed);
        }
        if number == 0 {
            return Arrival::Refused(Refused::Zero);
        }
        if number <= self.applied {
            return match self.kept.get(&number) {
                Some(reply) => Arrival::Again(reply.clone()),
                None => Arrival::Ignored(Ignored::Confirmed),
            };
        }
        let ahead = number - self.applied;
        let most = LEAD * self.credit;
        if ahead > most {
            return Arrival::Refused(Refused::BeyondCredit { number, applied: self.applied, most });
        }
        if self.held.contains_key(&number) || (self.running == Some(epoch) && ahead == 1) {
            return Arrival::Ignored(Ignored::UnderWay);
        }
        if ahead == 1 && !self.is_running() {
            self.running = Some(epoch);
            return Arrival::Run(step);
        }
        // Its turn may come: behind another step, or because the same step of the old route fails.
        self.held.insert(number, step);
        Arrival::Held
    }

    /// The running step was applied; keeps its reply for retries. Returns the next step to run, if it is there.
    ///
    /// A step of an older epoch counts as well: its number says that it is the same one.
    pub fn applied(&mut self, reply: R) -> Option<S> {
        self.applied += 1;
        self.held.remove(&self.applied);
        self.kept.insert(self.applied, reply);
        // A client that never confirms keeps no more than its credit.
        while self.kept.len() as u64 > self.credit {
            self.kept.pop_first();
        }
        self.start_next()
    }

    /// The running step failed and was not applied: the rest of its epoch is ignored. Returns the step to run instead, where
    /// the session has a newer route since.
    pub fn failed(&mut self) -> Option<S> {
        if self.running.take() == Some(self.epoch) {
            self.fail_epoch();
        }
        self.start_next()
    }

    /// A replay begins that puts the session after step `applied`; steps wait until [`StepLog::filled`]. False where the
    /// session has steps of its own already.
    pub fn fill(&mut self, applied: u64) -> bool {
        let is_new = self.applied == 0 && !self.is_running() && self.held.is_empty() && !self.failed;
        if is_new {
            self.applied = applied;
            self.filling = true;
        }
        is_new
    }

    /// The replay is over. Returns the next step to run, if it is there.
    pub fn filled(&mut self) -> Option<S> {
        self.filling = false;
        self.start_next()
    }

    /// Another hop's state is on its way here; steps wait until [`StepLog::take_over`].
    pub fn await_take_over(&mut self) {
        self.filling = true;
    }

    /// The log stands where another hop's stood: after step `applied`, of which the client confirmed those up to `confirmed`, with
    /// the replies to the last steps, in order. Returns the next step to run, if it is there.
    pub fn take_over(&mut self, applied: u64, confirmed: u64, replies: Vec<R>) -> Option<S> {
        let first = applied.saturating_add(1).saturating_sub(replies.len() as u64);
        (self.applied, self.confirmed) = (applied, confirmed);
        self.kept = (first..).zip(replies).collect();
        self.held = self.held.split_off(&applied.saturating_add(1));
        self.filled()
    }

    /// The replies that are kept, in order: to the last steps.
    pub fn kept(&self) -> impl Iterator<Item = &R> {
        self.kept.values()
    }

    /// Up to which step the client has the answers.
    pub fn confirmed(&self) -> u64 {
        self.confirmed
    }

    /// The replies to all steps after `number`, in order; `None` where one of them is not kept any more.
    pub fn replies_after(&self, number: u64) -> Option<Vec<R>> {
        let kept: Vec<R> = self.kept.range(number.saturating_add(1)..).map(|(_, reply)| reply.clone()).collect();
        (kept.len() as u64 == self.applied.saturating_sub(number)).then_some(kept)
    }

    /// Whether the replies to all steps that the client has not confirmed are kept.
    pub fn keeps_unconfirmed(&self) -> bool {
        self.replies_after(self.confirmed).is_some()
    }

    fn start_next(&mut self) -> Option<S> {
        let next = self.held.remove(&self.applied.saturating_add(1));
        self.running = next.is_some().then_some(self.epoch);
        next
    }

    /// Forgets the oldest kept reply, to make room. False where none is kept.
    pub fn forget_oldest(&mut self) -> bool {
        self.kept.pop_first().is_some()
    }

    /// Whether the rest of this epoch is ignored.
    pub fn is_failed(&self) -> bool {
        self.failed
    }

    /// The route failed: the rest of this epoch is ignored.
    pub fn fail_epoch(&mut self) {
        self.failed = true;
        self.held.clear();
    }

    /// The client holds the replies up to `number`, so they need not be kept.
    pub fn confirm(&mut self, number: u64) {
        self.confirmed = self.confirmed.max(number);
        self.kept = self.kept.split_off(&number.saturating_add(1));
    }

    /// A ticket for a newer epoch was shown: what was held of the old one is forgotten, what was applied stays.
    pub fn reopen(&mut self, epoch: u64) {
        debug_assert!(epoch > self.epoch, "the caller compares epochs first");
        self.epoch = epoch;
        self.failed = false;
        self.held.clear();
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    type Log = StepLog<u64, u64>;

    fn run(log: &mut Log, number: u64) {
        assert_eq!(log.arrive(1, number, number), Arrival::Run(number));
    }

    #[test]
    fn steps_run_in_order_even_if_they_arrive_out_of_it() {
        let mut log = Log::new(1, 4);
        assert_eq!(log.arrive(1, 3, 3), Arrival::Held);
        run(&mut log, 1);
        assert_eq!(log.arrive(1, 2, 2), Arrival::Held);
        assert_eq!(log.applied(10), Some(2));
        assert_eq!(log.applied(20), Some(3));
        assert_eq!(log.applied(30), None);
        assert_eq!(log.last_applied(), 3);
    }

    #[test]
    fn a_retry_is_answered_from_what_is_kept_and_changes_nothing() {
        let mut log = Log::new(1, 2);
        run(&mut log, 1);
        assert_eq!(log.arrive(1, 1, 1), Arrival::Ignored(Ignored::UnderWay));
        log.applied(10);
        assert_eq!(log.arrive(1, 1, 1), Arrival::Again(10));
        assert_eq!(log.last_applied(), 1);
        log.confirm(1);
        assert_eq!(log.arrive(1, 1, 1), Arrival::Ignored(Ignored::Confirmed));
    }

    #[test]
    fn older_epochs_are_dropped_and_unknown_ones_refused() {
        let mut log = Log::new(5, 2);
        assert_eq!(log.arrive(4, 1, 1), Arrival::Ignored(Ignored::OldEpoch));
        assert!(matches!(log.arrive(6, 1, 1), Arrival::Refused(Refused::UnknownEpoch { .. })));
        log.reopen(6);
        assert_eq!(log.arrive(6, 1, 1), Arrival::Run(1));
        assert_eq!(log.arrive(5, 2, 2), Arrival::Ignored(Ignored::OldEpoch));
    }

    #[test]
    fn after_an_error_the_rest_of_the_epoch_is_ignored() {
        let mut log = Log::new(1, 3);
        run(&mut log, 1);
        assert_eq!(log.arrive(1, 2, 2), Arrival::Held);
        assert_eq!(log.failed(), None);
        assert_eq!(log.arrive(1, 1, 1), Arrival::Ignored(Ignored::EpochFailed));
        assert_eq!(log.last_applied(), 0);
        log.reopen(2);
        assert_eq!(log.arrive(2, 1, 1), Arrival::Run(1));
    }

    #[test]
    fn a_step_of_an_old_route_does_not_fail_the_new_one() {
        for old_one_fails in [true, false] {
            let mut log = Log::new(1, 3);
            run(&mut log, 1);
            log.reopen(2);
            assert_eq!(log.arrive(2, 1, 100), Arrival::Held);
            assert_eq!(log.arrive(2, 1, 100), Arrival::Ignored(Ignored::UnderWay));
            assert_eq!(log.arrive(2, 2, 200), Arrival::Held);
            if old_one_fails {
                assert_eq!(log.failed(), Some(100));
                assert_eq!(log.applied(10), Some(200));
            } else {
                assert_eq!(log.applied(10), Some(200));
            }
        }
    }

    #[test]
    fn steps_wait_until_a_replay_is_over() {
        let mut log = Log::new(3, 2);
        assert!(log.fill(40));
        assert_eq!(log.arrive(3, 41, 41), Arrival::Held);
        assert_eq!(log.arrive(3, 42, 42), Arrival::Held);
        assert_eq!(log.filled(), Some(41));
        assert_eq!(log.applied(410), Some(42));
        assert!(!log.fill(50), "the session has steps of its own");
        assert_eq!(log.replies_after(40), Some(vec![410]));
        assert_eq!(log.replies_after(41), Some(vec![]));
        assert_eq!(log.replies_after(39), None, "those before the replay are elsewhere");
    }

    #[test]
    fn a_client_whose_answers_come_from_the_hops_behind_is_ahead_of_a_replay() {
        let mut log = Log::new(2, 4);
        // Step 1 was answered; 2 to 5 are under way, and the hops behind have them already.
        assert!(log.fill(1));
        for number in 2..=9 {
            // With each answer from there the client sends one more.
            assert_eq!(log.arrive(2, number, number), Arrival::Held);
        }
        assert!(matches!(log.arrive(2, 10, 10), Arrival::Refused(Refused::BeyondCredit { .. })));
        assert_eq!(log.filled(), Some(2));
    }

    #[test]
    fn a_log_that_takes_over_stands_where_the_other_one_stood() {
        let (mut left, mut log) = (Log::new(1, 3), Log::new(2, 3));
        for number in 1..=5 {
            run(&mut left, number);
            left.applied(number * 10);
        }
        left.confirm(3);
        log.await_take_over();
        assert_eq!(log.arrive(2, 1, 1), Arrival::Held);
        assert!(!log.fill(9), "a replay has no place here");
        let kept = left.kept().copied().collect();
        assert_eq!(log.take_over(left.last_applied(), left.confirmed(), kept), None);
        assert_eq!(log.arrive(2, 6, 6), Arrival::Run(6));
        assert_eq!((log.last_applied(), log.replies_after(3)), (5, Some(vec![40, 50])));
        assert!(log.keeps_unconfirmed());
        assert_eq!(log.arrive(2, 5, 5), Arrival::Again(50));
        assert_eq!(log.arrive(2, 3, 3), Arrival::Ignored(Ignored::Confirmed));
        assert_eq!(log.applied(60), None);
    }

    #[test]
    fn credit_bounds_what_is_held() {
        let mut log = Log::new(1, 2);
        assert_eq!(log.arrive(1, 4, 4), Arrival::Held);
        assert!(matches!(log.arrive(1, 5, 5), Arrival::Refused(Refused::BeyondCredit { most: 4, .. })));
        assert!(matches!(log.arrive(1, u64::MAX, 3), Arrival::Refused(Refused::BeyondCredit { .. })));
    }

    proptest! {
        /// Whatever arrives, in whatever order and however often: each number is applied once, in order, and no more is
        /// kept than the credit, or held than the client may be ahead.
        #[test]
        fn applied_once_in_order_and_bounded(
            arrivals in proptest::collection::vec((0u64..3, 0u64..12, any::<bool>()), 1..200),
            credit in 1u32..6,
        ) {
            let mut log = Log::new(1, credit);
            let mut ran = Vec::new();
            let mut in_hand = None;
            for (epoch, number, finish) in arrivals {
                if let Arrival::Run(step) = log.arrive(epoch, number, number) {
                    prop_assert!(in_hand.is_none());
                    in_hand = Some(step);
                }
                if finish && let Some(step) = in_hand.take() {
                    ran.push(step);
                    in_hand = log.applied(step * 10);
                }
                let credit = credit as usize;
                prop_assert!(log.held.len() <= LEAD as usize * credit && log.kept.len() <= credit);
                prop_assert_eq!(log.is_running(), in_hand.is_some());
            }
            let expected: Vec<u64> = (1..=ran.len() as u64).collect();
            prop_assert_eq!(ran, expected);
        }
    }
}
