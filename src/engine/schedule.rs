//! Which rows run in the next pass. Plain data: the steps that are ready go in, their shares come out.
//!
//! A pass takes at most a budget of rows. Steps are served in the order in which they came, with two exceptions that
//! keep short and long ones from waiting for each other: a long step (a prompt) is cut, since the results don't
//! depend on where, and while long and short steps are both waiting, each kind may take half of the budget before the
//! other gets what is left.

/// Steps with at most this share of the budget left are short: `budget / 8`, decode tokens and speculative runs.
const SHORT_SHARE: usize = 8;

/// With less than a row for each kind one of them could wait for ever.
const MIN_BUDGET: usize = 2;

/// Rows of one step that run in the next pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Share {
    /// Index of the step.
    pub(super) step: usize,
    /// Number of rows, at least 1.
    pub(super) rows: usize,
}

/// Divides `budget` rows among steps that have `left[i]` rows to go, in the order in which they came.
///
/// Each step appears at most once, and the shares are in that order, too.
pub(super) fn divide(left: &[usize], budget: usize) -> Vec<Share> {
    let budget = budget.max(MIN_BUDGET);
    let is_short = |rows: usize| rows <= (budget / SHORT_SHARE).max(1);
    let demand = |short: bool| left.iter().filter(|rows| is_short(**rows) == short).sum::<usize>();
    let (short_demand, long_demand) = (demand(true), demand(false));
    // Half each; what one kind doesn't want, the other may have.
    let short_budget = short_demand.min((budget / 2).max(budget.saturating_sub(long_demand)));
    let mut budgets = [budget - short_budget, short_budget];
    let mut shares = Vec::new();
    for (step, rows) in left.iter().enumerate() {
        let budget = &mut budgets[usize::from(is_short(*rows))];
        let rows = (*rows).min(*budget);
        if rows > 0 {
            *budget -= rows;
            shares.push(Share { step, rows });
        }
    }
    shares
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn shares(left: &[usize], budget: usize) -> Vec<(usize, usize)> {
        divide(left, budget).into_iter().map(|share| (share.step, share.rows)).collect()
    }

    #[test]
    fn decode_steps_all_fit_and_a_prompt_gets_the_rest() {
        assert_eq!(shares(&[1, 4096, 1, 1], 512), [(0, 1), (1, 509), (2, 1), (3, 1)]);
    }

    #[test]
    fn prompts_are_served_in_order() {
        assert_eq!(shares(&[300, 300, 300], 512), [(0, 300), (1, 212)]);
    }

    #[test]
    fn many_short_steps_leave_half_to_a_prompt() {
        let mut left = vec![1; 1000];
        left.push(4096);
        let shares = shares(&left, 512);
        assert_eq!(shares.last(), Some(&(1000, 256)));
        assert_eq!(shares.len(), 257);
    }

    #[test]
    fn nothing_waits_for_nothing() {
        assert!(shares(&[], 512).is_empty());
        assert_eq!(shares(&[5], 0), [(0, 2)]);
    }

    proptest! {
        #[test]
        fn the_budget_is_used_up_and_kept(left in prop::collection::vec(1..900usize, 1..40), budget in 2..600usize) {
            let shares = divide(&left, budget);
            let total: usize = shares.iter().map(|share| share.rows).sum();
            prop_assert_eq!(total, budget.min(left.iter().sum()));
            prop_assert!(shares.iter().all(|share| share.rows > 0 && share.rows <= left[share.step]));
            prop_assert!(shares.windows(2).all(|pair| pair[0].step < pair[1].step));
        }

        #[test]
        fn every_step_gets_its_turn(left in prop::collection::vec(1..900usize, 1..40), budget in 2..600usize) {
            let mut left = left;
            let rounds = left.iter().sum::<usize>().div_ceil(budget);
            for _ in 0..rounds {
                let shares = divide(&left, budget);
                for share in shares {
                    left[share.step] -= share.rows;
                }
                left.retain(|rows| *rows > 0);
            }
            prop_assert!(left.is_empty());
        }

        #[test]
        fn the_oldest_short_and_the_oldest_long_step_always_move(
            left in prop::collection::vec(1..900usize, 1..40),
            budget in 16..600usize,
        ) {
            let shares = divide(&left, budget);
            let limit = (budget / SHORT_SHARE).max(1);
            for short in [true, false] {
                if let Some(oldest) = left.iter().position(|rows| (*rows <= limit) == short) {
                    prop_assert!(shares.iter().any(|share| share.step == oldest));
                }
            }
        }
    }
}
