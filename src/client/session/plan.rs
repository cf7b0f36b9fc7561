//! What a repaired route needs: who starts anew, who sends what again. A pure decision, from what the hops answered.

use std::ops::Range;

/// What a hop has of the session, as it says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct HopState {
    /// The last step that it applied; 0 in a new session.
    pub(super) applied: u64,
    /// It does not hold what the session began with, before its first step.
    pub(super) lacks_prefix: bool,
    /// It still has all that it sent on.
    pub(super) is_whole: bool,
    /// It is in the middle of a replay that will not end.
    pub(super) is_filling: bool,
}

/// What to do with each hop.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Plan {
    /// Hops that have to be told everything, as runs of neighbours.
    pub(super) fresh: Vec<Range<usize>>,
    /// Of each hop, the client's included in front: the last step that what comes behind it has, or is told by a replay.
    pub(super) behind: Vec<u64>,
}

impl Plan {
    /// Whether a hop has to be told everything.
    pub(super) fn is_fresh(&self, hop: usize) -> bool {
        self.fresh.iter().any(|run| run.contains(&hop))
    }

    /// How many hops from `hop` on have to be told everything.
    pub(super) fn fresh_from(&self, hop: usize) -> u32 {
        self.fresh.iter().find(|run| run.start == hop).map_or(0, |run| run.len() as u32)
    }
}

/// Decides from the last hop forwards. `has_prefix`: the session began with pages that the hops held, as if they had been filled by
/// a step 0.
///
/// A hop must have applied at least what the one behind it has (behind the last one: the answers that the client holds), or
/// it starts anew and is told the state after that very step. Whoever is in front of such a hop has to know all that it ever
/// sent on; where it has forgotten, it starts anew as well, and so on up to the client, which knows its tokens.
pub(super) fn plan(hops: &[HopState], confirmed: u64, has_prefix: bool) -> Plan {
    let mut behind = vec![confirmed; hops.len() + 1];
    let mut is_fresh = vec![false; hops.len()];
    for (index, hop) in hops.iter().enumerate().rev() {
        let needed = behind[index + 1];
        let next_is_fresh = is_fresh.get(index + 1).copied().unwrap_or(false);
        let must_tell = next_is_fresh && (needed > 0 || has_prefix);
        let is_lacking = hop.is_filling || hop.lacks_prefix || hop.applied < needed || (must_tell && !hop.is_whole);
        is_fresh[index] = is_lacking;
        behind[index] = if is_lacking { needed } else { hop.applied };
    }
    let mut fresh: Vec<Range<usize>> = Vec::new();
    for (index, _) in is_fresh.iter().enumerate().filter(|(_, fresh)| **fresh) {
        match fresh.last_mut() {
            Some(run) if run.end == index => run.end += 1,
            _ => fresh.push(index..index + 1),
        }
    }
    // In front of the client's place stands what hop 1 has.
    Plan { fresh, behind }
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "they are ranges of hops")]
mod tests {
    use super::*;

    fn hop(applied: u64) -> HopState {
        HopState { applied, lacks_prefix: false, is_whole: true, is_filling: false }
    }

    fn plan(hops: &[HopState], confirmed: u64) -> Plan {
        super::plan(hops, confirmed, false)
    }

    #[test]
    fn a_new_hop_is_told_what_the_session_began_with() {
        let new = HopState { lacks_prefix: true, ..hop(0) };
        let forgetful = HopState { is_whole: false, ..hop(1) };
        let told = |hops: &[HopState]| super::plan(hops, 0, true);
        assert_eq!(told(&[hop(1), new, hop(0)]), Plan { fresh: vec![1..2], behind: vec![1, 0, 0, 0] });
        assert_eq!(told(&[forgetful, new, hop(0)]).fresh, [0..2]);
        assert!(told(&[forgetful, hop(0), hop(0)]).fresh.is_empty(), "all have it");
    }

    #[test]
    fn a_route_that_lost_nothing_starts_nothing_anew() {
        let plan = plan(&[hop(5), hop(5), hop(4)], 4);
        assert_eq!(plan, Plan { fresh: vec![], behind: vec![5, 5, 4, 4] });
    }

    #[test]
    fn a_new_hop_is_told_what_the_one_behind_it_has() {
        let plan = plan(&[hop(7), hop(0), hop(5)], 4);
        assert_eq!(plan, Plan { fresh: vec![1..2], behind: vec![7, 5, 5, 4] });
        assert_eq!((plan.fresh_from(1), plan.fresh_from(0), plan.is_fresh(1)), (1, 0, true));
    }

    #[test]
    fn a_new_last_hop_is_told_what_the_client_has_answers_to() {
        assert_eq!(plan(&[hop(7), hop(0), hop(0)], 6), Plan { fresh: vec![1..3], behind: vec![7, 6, 6, 6] });
        assert!(plan(&[hop(7), hop(0)], 0).fresh.is_empty(), "nothing was answered, so there is nothing to tell");
    }

    #[test]
    fn whoever_has_forgotten_starts_anew_up_to_the_client() {
        let forgetful = HopState { is_whole: false, ..hop(7) };
        assert_eq!(plan(&[hop(7), forgetful, hop(0)], 6).fresh, [1..3]);
        assert_eq!(plan(&[forgetful, forgetful, hop(0), hop(6)], 6).fresh, [0..3]);
        assert!(plan(&[forgetful, forgetful], 6).fresh.is_empty(), "nobody asks");
    }

    #[test]
    fn a_replay_that_was_cut_short_begins_again() {
        let cut = HopState { is_filling: true, ..hop(6) };
        assert_eq!(plan(&[hop(7), cut, hop(6)], 6), Plan { fresh: vec![1..2], behind: vec![7, 6, 6, 6] });
    }
}
