//! Bookkeeping of KV pages: who holds which, and how many are left. Plain data, no locks, no tensors.
//!
//! A page holds the keys and values of [`PAGE_TOKENS`] consecutive tokens of one lane, in every block of the span: one
//! page id is valid in all of the K and V planes. The pool is as large as it will ever be from the start.
//!
//! Sessions that run get pages before those that begin, and those that begin leave a share of the pool
//! free ([`WATERMARK_SHARE`]), so that a session which has been let in can usually grow.

use std::collections::BTreeMap;

/// Tokens of one page. Small enough that a short lane wastes little, large enough that a page's keys fill a product.
pub const PAGE_TOKENS: usize = 16;

/// A session's first step must leave one part in this many of the pool free.
pub const WATERMARK_SHARE: usize = 16;

/// Number of a page.
pub(super) type PageId = u32;

/// Pages that `tokens` tokens of one lane take.
pub(super) fn pages_for(tokens: usize) -> usize {
    tokens.div_ceil(PAGE_TOKENS)
}

/// The pages that nobody holds.
#[derive(Debug)]
pub(super) struct PagePool {
    free: Vec<PageId>,
    total: usize,
}

/// Who asks for pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Claim {
    /// A session that holds pages.
    Running,
    /// A session's first step.
    New,
}

impl PagePool {
    pub(super) fn new(total: u32) -> Self {
        // The last id is at the front, so that pages are first handed out in ascending order.
        Self { free: (0..total).rev().collect(), total: total as usize }
    }

    pub(super) fn total(&self) -> usize {
        self.total
    }

    pub(super) fn free(&self) -> usize {
        self.free.len()
    }

    /// Pages that `claim` must leave.
    fn reserve(&self, claim: Claim) -> usize {
        match claim {
            Claim::Running => 0,
            Claim::New => self.total / WATERMARK_SHARE,
        }
    }

    /// Whether a session that holds `held` pages could get `count` more if it had the pool for itself.
    pub(super) fn could_ever(&self, claim: Claim, held: usize, count: usize) -> bool {
        held.saturating_add(count) <= self.total - self.reserve(claim)
    }

    /// Hands out `count` pages, or none.
    pub(super) fn take(&mut self, claim: Claim, count: usize) -> Option<Vec<PageId>> {
        let left = self.free.len().checked_sub(count)?;
        // A step that needs no page can't hurt anyone.
        if count > 0 && left < self.reserve(claim) {
            return None;
        }
        Some(self.free.split_off(left).into_iter().rev().collect())
    }

    pub(super) fn give_back(&mut self, pages: impl IntoIterator<Item = PageId>) {
        self.free.extend(pages);
    }
}

/// Consecutive tokens of one lane in a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LaneRun {
    /// The lane, chosen by the client.
    pub lane: u32,
    /// Position of the first token. Before the lane's end is a rollback: what comes after it is forgotten.
    pub position: usize,
    /// Number of tokens.
    pub tokens: usize,
}

impl LaneRun {
    /// Behind the last token.
    pub(super) fn end(&self) -> usize {
        self.position.saturating_add(self.tokens)
    }
}

#[derive(Debug, Default)]
struct Lane {
    pages: Vec<PageId>,
    end: usize,
}

/// The lanes of one session, and their pages in the order of positions.
#[derive(Debug, Default)]
pub(super) struct LaneTable {
    lanes: BTreeMap<u32, Lane>,
}

impl LaneTable {
    /// Tokens that the lane holds.
    pub(super) fn end(&self, lane: u32) -> usize {
        self.lanes.get(&lane).map_or(0, |lane| lane.end)
    }

    /// The lane's pages: token `p` lies in slot `p % PAGE_TOKENS` of page `p / PAGE_TOKENS`.
    pub(super) fn pages(&self, lane: u32) -> &[PageId] {
        self.lanes.get(&lane).map_or(&[], |lane| &lane.pages)
    }

    /// Pages of all lanes.
    pub(super) fn held(&self) -> usize {
        self.lanes.values().map(|lane| lane.pages.len()).sum()
    }

    /// Pages that `runs` need besides those that their lanes hold.
    pub(super) fn needed(&self, runs: &[LaneRun]) -> usize {
        runs.iter().map(|run| pages_for(run.end()).saturating_sub(self.pages(run.lane).len())).sum()
    }

    /// Gives the lanes of `runs` the pages that they need, out of [`LaneTable::needed`] many.
    pub(super) fn extend(&mut self, runs: &[LaneRun], pages: Vec<PageId>) {
        let mut pages = pages.into_iter();
        for run in runs {
            let lane = self.lanes.entry(run.lane).or_default();
            let missing = pages_for(run.end()).saturating_sub(lane.pages.len());
            lane.pages.extend(pages.by_ref().take(missing));
        }
    }

    /// `runs` were computed: the lanes end behind them. Returns the pages that a rollback made superfluous.
    pub(super) fn commit(&mut self, runs: &[LaneRun]) -> Vec<PageId> {
        self.set_ends(runs, |_, run| run.end())
    }

    /// `runs` were given up. A lane that was rolled back ends where the run began, since what came after may have been
    /// overwritten; the others end where they did. Returns the pages that are superfluous.
    pub(super) fn abandon(&mut self, runs: &[LaneRun]) -> Vec<PageId> {
        self.set_ends(runs, |end, run| end.min(run.position))
    }

    /// Takes back the pages that no lane's tokens need: those of a step that never began.
    pub(super) fn release(&mut self) -> Vec<PageId> {
        let mut superfluous = Vec::new();
        for lane in self.lanes.values_mut() {
            superfluous.extend(lane.pages.split_off(pages_for(lane.end).min(lane.pages.len())));
        }
        self.lanes.retain(|_, lane| lane.end > 0);
        superfluous
    }

    fn set_ends(&mut self, runs: &[LaneRun], new_end: impl Fn(usize, &LaneRun) -> usize) -> Vec<PageId> {
        for run in runs {
            let Some(lane) = self.lanes.get_mut(&run.lane) else { continue };
            lane.end = new_end(lane.end, run);
        }
        self.release()
    }

    /// Takes all pages out.
    pub(super) fn clear(&mut self) -> impl Iterator<Item = PageId> + use<> {
        std::mem::take(&mut self.lanes).into_values().flat_map(|lane| lane.pages)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn run(lane: u32, position: usize, tokens: usize) -> LaneRun {
        LaneRun { lane, position, tokens }
    }

    #[test]
    fn a_new_session_leaves_the_watermark_and_a_running_one_may_use_it() {
        let mut pool = PagePool::new(32);
        assert!(!pool.could_ever(Claim::New, 0, 31) && pool.could_ever(Claim::New, 0, 30));
        assert!(pool.could_ever(Claim::Running, 2, 30) && !pool.could_ever(Claim::Running, 3, 30));
        assert!(pool.take(Claim::New, 31).is_none());
        assert_eq!(pool.take(Claim::New, 30).unwrap().len(), 30);
        assert!(pool.take(Claim::New, 1).is_none());
        assert!(pool.take(Claim::New, 0).unwrap().is_empty());
        assert_eq!(pool.take(Claim::Running, 2).unwrap(), [30, 31]);
        assert!(pool.take(Claim::Running, 1).is_none());
    }

    #[test]
    fn a_rollback_gives_pages_back_and_an_abandoned_one_cuts_the_lane() {
        let mut pool = PagePool::new(8);
        let mut table = LaneTable::default();
        let first = [run(0, 0, 40), run(7, 0, 1)];
        assert_eq!(table.needed(&first), 4);
        table.extend(&first, pool.take(Claim::New, 4).unwrap());
        assert!(table.commit(&first).is_empty());
        assert_eq!((table.end(0), table.end(7), table.end(1)), (40, 1, 0));

        let back = [run(0, 15, 2)];
        assert_eq!(table.needed(&back), 0);
        assert_eq!(table.commit(&back), [2]);
        assert_eq!(table.end(0), 17);

        let failed = [run(0, 17, 20), run(7, 0, 1)];
        table.extend(&failed, pool.take(Claim::Running, table.needed(&failed)).unwrap());
        assert_eq!(table.abandon(&failed).len(), 2); // one that was taken for lane 0, and lane 7's only one
        assert_eq!((table.end(0), table.end(7), table.held()), (17, 0, 2));
    }

    #[derive(Debug, Clone)]
    enum Action {
        Step { session: usize, runs: Vec<(u32, usize, usize)>, fails: bool },
        Drop { session: usize },
    }

    fn action() -> impl Strategy<Value = Action> {
        let runs = prop::collection::vec((0..3u32, 0..50usize, 1..40usize), 1..3);
        prop_oneof![
            6 => (0..4usize, runs, any::<bool>()).prop_map(|(session, runs, fails)| Action::Step { session, runs, fails }),
            1 => (0..4usize).prop_map(|session| Action::Drop { session }),
        ]
    }

    proptest! {
        #[test]
        fn no_page_is_lost_or_held_twice(actions in prop::collection::vec(action(), 1..60)) {
            let mut pool = PagePool::new(20);
            let mut sessions: Vec<LaneTable> = (0..4).map(|_| LaneTable::default()).collect();
            for action in actions {
                match action {
                    Action::Drop { session } => pool.give_back(sessions[session].clear()),
                    Action::Step { session, runs, fails } => {
                        let table = &mut sessions[session];
                        let mut seen = BTreeSet::new();
                        let runs: Vec<LaneRun> = runs
                            .into_iter()
                            .filter(|(lane, ..)| seen.insert(*lane))
                            .map(|(lane, back, tokens)| run(lane, table.end(lane).saturating_sub(back), tokens))
                            .collect();
                        let claim = if table.held() > 0 { Claim::Running } else { Claim::New };
                        let needed = table.needed(&runs);
                        let Some(pages) = pool.take(claim, needed) else {
                            prop_assert!(needed > pool.free() || claim == Claim::New);
                            continue;
                        };
                        prop_assert!(claim == Claim::Running || pool.free() >= 1);
                        table.extend(&runs, pages);
                        for run in &runs {
                            prop_assert!(table.pages(run.lane).len() * PAGE_TOKENS >= run.end());
                        }
                        let superfluous = if fails { table.abandon(&runs) } else { table.commit(&runs) };
                        pool.give_back(superfluous);
                        for run in &runs {
                            prop_assert_eq!(table.pages(run.lane).len(), pages_for(table.end(run.lane)));
                            prop_assert!(fails || table.end(run.lane) == run.end());
                        }
                    }
                }
                let mut all: Vec<PageId> = pool.free.clone();
                all.extend(sessions.iter().flat_map(|table| table.lanes.values().flat_map(|lane| lane.pages.clone())));
                all.sort_unstable();
                prop_assert_eq!(all, (0..20).collect::<Vec<_>>());
            }
        }
    }
}
