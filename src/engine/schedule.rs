//! Which rows run in the next pass. Plain data: the steps that are ready go in, their shares come out; how long passes took
//! is told from outside.
//!
//! A pass takes at most a budget of rows. Short steps (decode tokens and speculative runs) want to be through soon; long
//! ones (prompts) are cut, since the results don't depend on where, and share what is left.
//!
//! # The decode gap
//!
//! A session that decodes doesn't wait longer for its next token than **two of its own steps and one chunk** of somebody's prompt:
//!
//! - While somebody decodes, a chunk is so small that its pass takes a stated time (see [`Pace`]). Somebody decodes if a
//!   short step is ready, and also while a session's last token is on its way round the swarm and the next one about to come.
//! - A short step that arrived while a chunk was being computed is not made to wait for a second one: prompts sit out the
//!   next pass. So it sees the rest of a pass with a chunk and one without; or, if it arrived during one without,
//!   the rest of that and one with a chunk. Prompts get every second pass at least.
//!
//! This holds while the short steps fit into half of the budget, which they get before prompts have more than the other half, and as
//! far as passes take the time that the last ones took: a chunk is cut by what rows cost until then, and has at least
//! a few rows, however slow the machine. What a step waits for pages is apart. The engine counts the steps for which it didn't hold
//! ([`EngineLoad`](super::EngineLoad)).
//!
//! # Waiting for company
//!
//! Where nothing but short steps is ready, the engine may wait for more of them ([`Gather`]). What a step waited so counts as a chunk:
//! prompts that come in the meantime sit out the next pass. So the rule above holds.
//!
//! # Owners
//!
//! Rows are shared between owners (peers), not between steps: whoever has had the fewest is next, and of one owner's steps the
//! oldest is. So one with twenty sessions gets no more than one with a single session, if both want more than there
//! is. An owner that got all it wanted has no claim to more later.

mod gather;
mod pace;

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

pub(super) use self::gather::{Gather, Here, Meeting, Took};
use self::pace::{MIN_CHUNK, Pace};
use super::job::Owner;

/// With less than a row for each kind one of them could wait for ever.
const MIN_BUDGET: usize = 2;

/// Rows that an owner gets before the next one's turn. A prompt in finer pieces would only cost more bookkeeping.
const TURN_ROWS: usize = 16;

/// A step that is ready.
#[derive(Debug, Clone, Copy)]
pub(super) struct Demand {
    /// Rows that it has to go.
    pub(super) rows: usize,
    pub(super) owner: Owner,
    /// A few tokens in each lane, not a prompt.
    pub(super) is_short: bool,
    pub(super) arrived: Instant,
}

/// Rows of one step that run in the next pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Share {
    /// Index of the step.
    pub(super) step: usize,
    /// Number of rows, at least 1.
    pub(super) rows: usize,
}

/// Rows of a pass by the kind of their steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct PassRows {
    pub(super) short: usize,
    pub(super) long: usize,
}

/// Divides passes. See the module's docs.
#[derive(Debug)]
pub(super) struct Schedule {
    /// Rows of one pass.
    budget: usize,
    pace: Pace,
    /// Rows that the owners had who wanted more.
    served: BTreeMap<Owner, u64>,
    /// When the last pass ended, if it had a part of a prompt.
    chunk_ended: Option<Instant>,
}

impl Schedule {
    pub(super) fn new(budget: usize) -> Self {
        let budget = budget.max(MIN_BUDGET);
        Self { budget, pace: Pace::default(), served: BTreeMap::new(), chunk_ended: None }
    }

    /// Divides the next pass among `demands`, which are in the order in which they came. `others_decode` says that a session that
    /// isn't among them will want to decode soon.
    ///
    /// Each step appears at most once, and the shares are in that order, too. There is none only if there is no demand.
    pub(super) fn divide(&mut self, demands: &[Demand], others_decode: bool) -> Vec<Share> {
        let wanted = PassRows::of(demands.iter().map(|demand| (demand.is_short, demand.rows)));
        let waited = demands.iter().any(|demand| demand.is_short && self.was_in_the_way(demand.arrived));
        let long_wanted = if waited { 0 } else { wanted.long };
        // Half each; what one kind doesn't want, the other may have.
        let short = wanted.short.min((self.budget / 2).max(self.budget.saturating_sub(long_wanted)));
        let mut long = long_wanted.min(self.budget - short);
        if wanted.short > 0 || others_decode {
            long = long.min(self.pace.pass_rows().saturating_sub(short).max(MIN_CHUNK));
        }

        let first = self.served.values().min().copied().unwrap_or(0);
        for demand in demands {
            self.served.entry(demand.owner).or_insert(first);
        }
        let mut given = vec![0; demands.len()];
        self.give(demands, true, short, &mut given);
        self.give(demands, false, long, &mut given);
        let unserved: Vec<Owner> =
            demands.iter().zip(&given).filter(|(demand, given)| demand.rows > **given).map(|(d, _)| d.owner).collect();
        self.served.retain(|owner, _| unserved.contains(owner));
        let shares = given.into_iter().enumerate().map(|(step, rows)| Share { step, rows });
        shares.filter(|share| share.rows > 0).collect()
    }

    /// Gives `rows` rows to steps of one kind.
    fn give(&mut self, demands: &[Demand], is_short: bool, mut rows: usize, given: &mut [usize]) {
        // Of each owner, the steps that want more, the oldest last.
        let mut steps: BTreeMap<Owner, Vec<usize>> = BTreeMap::new();
        for (step, demand) in demands.iter().enumerate().rev().filter(|(_, demand)| demand.is_short == is_short) {
            steps.entry(demand.owner).or_default().push(step);
        }
        while rows > 0 {
            // The one that had the fewest rows; among equals the one whose step is the oldest.
            let turn = |(owner, steps): (&Owner, &Vec<usize>)| Some((*self.served.get(owner)?, *steps.last()?, *owner));
            let Some((_, step, owner)) = steps.iter().filter_map(turn).min() else { return };
            let count = rows.min(TURN_ROWS).min(demands[step].rows - given[step]);
            given[step] += count;
            rows -= count;
            *self.served.entry(owner).or_default() += count as u64;
            if given[step] == demands[step].rows
                && let Some(steps) = steps.get_mut(&owner)
            {
                steps.pop();
            }
        }
    }

    /// Whether a part of a prompt was being computed when a step arrived, in the last pass.
    pub(super) fn was_in_the_way(&self, arrived: Instant) -> bool {
        self.chunk_ended.is_some_and(|ended| arrived < ended)
    }

    /// How long a short step may wait for company: as long as it would for a chunk.
    pub(super) fn longest_wait(&self) -> Duration {
        Duration::from_secs_f64(self.pace.chunk_seconds())
    }

    /// How long a short step may take as things are: two decode steps and one chunk.
    pub(super) fn decode_gap(&self) -> Duration {
        Duration::from_secs_f64(2.0 * self.pace.step_seconds() + self.pace.chunk_seconds())
    }

    /// Short steps waited for company, until `ended`.
    pub(super) fn waited(&mut self, ended: Instant) {
        self.chunk_ended = Some(ended);
    }

    /// A pass with these rows took so long, until `ended`.
    pub(super) fn ran(&mut self, rows: PassRows, took: Duration, ended: Instant) {
        self.pace.ran(rows, took);
        self.chunk_ended = (rows.long > 0).then_some(ended);
    }
}

impl PassRows {
    /// Adds up rows of short steps and of others.
    pub(super) fn of(rows: impl Iterator<Item = (bool, usize)>) -> Self {
        rows.fold(Self::default(), |mut sum, (is_short, rows)| {
            *(if is_short { &mut sum.short } else { &mut sum.long }) += rows;
            sum
        })
    }

    pub(super) fn all(self) -> usize {
        self.short + self.long
    }
}

#[cfg(test)]
mod tests;
