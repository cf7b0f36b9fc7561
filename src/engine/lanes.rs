//! The lanes of a session and the pages that they refer to. Plain data, no locks, no tensors.
//!
//! # Copy on write
//!
//! A lane that is copied, and a prefix that another session takes over, refer to the same pages. A step that is about to
//! write to a page which others refer to as well gets a fresh one instead, and what it keeps of the old page (the tokens
//! in front of the step's first) is copied in front of the step's first pass. The table holds on to the old page until
//! the step is over: one that fails or never begins puts it back, so that it doesn't matter whether the copy was made.
//!
//! Lanes of one step may share a page that nobody else refers to. Then all but one get a copy, and the one whose run begins
//! last writes to the page itself: if the step fails, the others have lost nothing, since all of them end in front of
//! what was overwritten.

use std::collections::BTreeMap;

use super::pages::{Claim, PAGE_TOKENS, PageId, PagePool, pages_for};

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

/// A lane of a session that moves to another engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LaneLayout {
    /// The lane, chosen by the client.
    pub lane: u32,
    /// Tokens that it holds.
    pub tokens: usize,
    /// Its pages in the order of positions, as places among all pages of the session: lanes may share some.
    pub pages: Vec<u32>,
}

/// A page whose contents must be in another one before a step's rows are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PageCopy {
    pub(super) from: PageId,
    pub(super) to: PageId,
}

#[derive(Debug, Default, Clone)]
struct Lane {
    pages: Vec<PageId>,
    end: usize,
}

/// A page of a lane that a step writes to though others refer to it.
#[derive(Debug)]
struct Replaced {
    lane: u32,
    /// Among the lane's pages.
    index: usize,
    /// The one that others refer to as well.
    page: PageId,
    /// Some of its tokens are in front of the step's first.
    is_kept_in_part: bool,
}

/// The lanes of one session, and their pages in the order of positions. Each mention of a page is a reference of the pool's.
#[derive(Debug, Default)]
pub(super) struct LaneTable {
    lanes: BTreeMap<u32, Lane>,
    /// What the step under way writes to copies of.
    replaced: Vec<Replaced>,
    /// A step was computed since the table was last empty.
    has_run: bool,
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

    /// What the session is entitled to. One that has only taken over a prefix is as new as one that has nothing.
    pub(super) fn claim(&self) -> Claim {
        if self.has_run { Claim::Running } else { Claim::New }
    }

    /// The pages that the table refers to, and how often it does.
    pub(super) fn references(&self) -> BTreeMap<PageId, u32> {
        let mut references = BTreeMap::new();
        let pages = self.lanes.values().flat_map(|lane| &lane.pages);
        for page in pages.chain(self.replaced.iter().map(|replaced| &replaced.page)) {
            *references.entry(*page).or_default() += 1;
        }
        references
    }

    /// Pages that `runs` need besides those that their lanes hold and may write to.
    pub(super) fn needed(&self, runs: &[LaneRun], pool: &PagePool) -> usize {
        self.needed_with(runs, |page| pool.references(page))
    }

    /// The pages that `runs` get copies of, because others refer to them.
    pub(super) fn copied(&self, runs: &[LaneRun], pool: &PagePool) -> Vec<PageId> {
        self.to_replace(runs, |page| pool.references(page)).into_iter().map(|replaced| replaced.page).collect()
    }

    /// Whether `runs` could get their pages if the session had the pool for itself.
    pub(super) fn could_ever(&self, runs: &[LaneRun], pool: &PagePool) -> bool {
        if pool.has(self.claim(), self.needed(runs, pool)) {
            return true;
        }
        let own = self.references();
        let needed = self.needed_with(runs, |page| own.get(&page).copied().unwrap_or(0));
        own.len().saturating_add(needed) <= pool.limit(self.claim())
    }

    fn needed_with(&self, runs: &[LaneRun], references: impl Fn(PageId) -> u32) -> usize {
        let missing = |run: &LaneRun| pages_for(run.end()).saturating_sub(self.pages(run.lane).len());
        runs.iter().map(missing).sum::<usize>() + self.to_replace(runs, references).len()
    }

    /// The pages that `runs` write to and mustn't, because others refer to them.
    fn to_replace(&self, runs: &[LaneRun], references: impl Fn(PageId) -> u32) -> Vec<Replaced> {
        let mut order: Vec<&LaneRun> = runs.iter().collect();
        order.sort_by_key(|run| run.position);
        // How many refer to a page besides the lanes that get a copy of it.
        let mut left: BTreeMap<PageId, u32> = BTreeMap::new();
        let mut replaced = Vec::new();
        for run in order {
            let first = run.position / PAGE_TOKENS;
            let written = self.pages(run.lane).iter().enumerate().take(pages_for(run.end())).skip(first);
            for (index, &page) in written {
                let left = left.entry(page).or_insert_with(|| references(page));
                if *left > 1 {
                    *left -= 1;
                    let is_kept_in_part = index * PAGE_TOKENS < run.position;
                    replaced.push(Replaced { lane: run.lane, index, page, is_kept_in_part });
                }
            }
        }
        replaced
    }

    /// Gives the lanes of `runs` the pages that they need, out of [`LaneTable::needed`] many. Returns the copies that must be
    /// made before anything is written.
    pub(super) fn extend(&mut self, runs: &[LaneRun], pages: Vec<PageId>, pool: &PagePool) -> Vec<PageCopy> {
        let replaced = self.to_replace(runs, |page| pool.references(page));
        let mut pages = pages.into_iter();
        let mut copies = Vec::new();
        for (replaced, to) in replaced.iter().zip(pages.by_ref()) {
            if let Some(lane) = self.lanes.get_mut(&replaced.lane) {
                lane.pages[replaced.index] = to;
            }
            if replaced.is_kept_in_part {
                copies.push(PageCopy { from: replaced.page, to });
            }
        }
        self.replaced = replaced;
        for run in runs {
            let lane = self.lanes.entry(run.lane).or_default();
            let missing = pages_for(run.end()).saturating_sub(lane.pages.len());
            lane.pages.extend(pages.by_ref().take(missing));
        }
        copies
    }

    /// `runs` were computed: the lanes end behind them. Returns the references that aren't needed any more.
    pub(super) fn commit(&mut self, runs: &[LaneRun]) -> Vec<PageId> {
        let mut superfluous: Vec<PageId> = self.replaced.drain(..).map(|replaced| replaced.page).collect();
        for run in runs {
            if let Some(lane) = self.lanes.get_mut(&run.lane) {
                lane.end = run.end();
            }
        }
        self.has_run = true;
        self.trim(&mut superfluous);
        superfluous
    }

    /// `runs` were begun and given up. A lane that was rolled back ends where the run began, since what came after may have
    /// been overwritten; the others end where they did. Returns the references that aren't needed any more.
    pub(super) fn abandon(&mut self, runs: &[LaneRun]) -> Vec<PageId> {
        for run in runs {
            if let Some(lane) = self.lanes.get_mut(&run.lane) {
                lane.end = lane.end.min(run.position);
            }
        }
        self.release()
    }

    /// Takes back the pages of a step that never began. Returns the references that aren't needed any more.
    pub(super) fn release(&mut self) -> Vec<PageId> {
        let mut superfluous = Vec::new();
        for Replaced { lane, index, page, .. } in self.replaced.drain(..) {
            let copy = self.lanes.get_mut(&lane).map(|lane| std::mem::replace(&mut lane.pages[index], page));
            superfluous.extend(copy);
        }
        self.trim(&mut superfluous);
        superfluous
    }

    /// Moves the pages that no lane's tokens need to `superfluous`.
    fn trim(&mut self, superfluous: &mut Vec<PageId>) {
        for lane in self.lanes.values_mut() {
            superfluous.extend(lane.pages.split_off(pages_for(lane.end).min(lane.pages.len())));
        }
        self.lanes.retain(|_, lane| lane.end > 0);
        self.has_run &= !self.lanes.is_empty();
    }

    /// Makes each second lane what the first one of its pair is now, with a reference of its own to every page. Returns the
    /// references of what these lanes held before.
    pub(super) fn copy(&mut self, pairs: &[(u32, u32)], pool: &mut PagePool) -> Vec<PageId> {
        let copies: Vec<Lane> =
            pairs.iter().map(|(from, _)| self.lanes.get(from).cloned().unwrap_or_default()).collect();
        let mut superfluous = Vec::new();
        for ((_, to), lane) in pairs.iter().zip(copies) {
            pool.share(&lane.pages);
            superfluous.extend(self.replace(*to, lane));
        }
        superfluous
    }

    /// The lanes, as whoever is to rebuild them needs them, and the pages that they refer to, each once: with the number of
    /// its tokens that some lane needs.
    pub(super) fn layout(&self) -> (Vec<LaneLayout>, Vec<(PageId, usize)>) {
        let mut places: BTreeMap<PageId, u32> = BTreeMap::new();
        let mut pages: Vec<(PageId, usize)> = Vec::new();
        let mut lanes = Vec::with_capacity(self.lanes.len());
        for (&lane, Lane { pages: held, end }) in &self.lanes {
            let mut own = Vec::with_capacity(held.len());
            for (index, &page) in held.iter().enumerate() {
                let place = *places.entry(page).or_insert_with(|| {
                    pages.push((page, 0));
                    pages.len() as u32 - 1
                });
                let tokens = end.saturating_sub(index * PAGE_TOKENS).min(PAGE_TOKENS);
                let needed = &mut pages[place as usize].1;
                *needed = tokens.max(*needed);
                own.push(place);
            }
            lanes.push(LaneLayout { lane, tokens: *end, pages: own });
        }
        (lanes, pages)
    }

    /// Makes an empty table what [`LaneTable::layout`] described, out of fresh pages, of which each lane names some. Every page
    /// is named at least once.
    pub(super) fn rebuild(&mut self, layout: &[LaneLayout], pages: &[PageId], pool: &mut PagePool) {
        for LaneLayout { lane, tokens, pages: own } in layout {
            let own: Vec<PageId> = own.iter().map(|place| pages[*place as usize]).collect();
            pool.share(&own);
            self.replace(*lane, Lane { pages: own, end: *tokens });
        }
        // The lanes have references of their own now.
        pool.give_back(pages.iter().copied());
    }

    /// What was rebuilt counts as computed.
    pub(super) fn mark_run(&mut self) {
        self.has_run = !self.lanes.is_empty();
    }

    /// Makes a lane one that holds whole pages, with a reference of its own to each. Returns those of what it held before.
    pub(super) fn adopt(&mut self, lane: u32, pages: &[PageId], pool: &mut PagePool) -> Vec<PageId> {
        pool.share(pages);
        self.replace(lane, Lane { pages: pages.to_vec(), end: pages.len() * PAGE_TOKENS })
    }

    /// Forgets a lane. Returns its references.
    pub(super) fn remove(&mut self, lane: u32) -> Vec<PageId> {
        self.replace(lane, Lane::default())
    }

    fn replace(&mut self, lane: u32, new: Lane) -> Vec<PageId> {
        let old = if new.end > 0 { self.lanes.insert(lane, new) } else { self.lanes.remove(&lane) };
        self.has_run &= !self.lanes.is_empty();
        old.map(|lane| lane.pages).unwrap_or_default()
    }

    /// Takes all references out.
    pub(super) fn clear(&mut self) -> impl Iterator<Item = PageId> + use<> {
        let Self { lanes, replaced, .. } = std::mem::take(self);
        lanes.into_values().flat_map(|lane| lane.pages).chain(replaced.into_iter().map(|replaced| replaced.page))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(lane: u32, position: usize, tokens: usize) -> LaneRun {
        LaneRun { lane, position, tokens }
    }

    fn extend(table: &mut LaneTable, runs: &[LaneRun], pool: &mut PagePool) -> Vec<PageCopy> {
        let pages = pool.take(Claim::Running, table.needed(runs, pool)).unwrap();
        table.extend(runs, pages, pool)
    }

    /// A table with lane 0 of `tokens` tokens, in a pool of 8 pages.
    fn table(tokens: usize) -> (LaneTable, PagePool) {
        let (mut table, mut pool) = (LaneTable::default(), PagePool::new(8));
        assert!(extend(&mut table, &[run(0, 0, tokens)], &mut pool).is_empty());
        assert!(table.commit(&[run(0, 0, tokens)]).is_empty());
        (table, pool)
    }

    #[test]
    fn a_rollback_gives_pages_back_and_an_abandoned_one_cuts_the_lane() {
        let (mut table, mut pool) = table(40);
        extend(&mut table, &[run(7, 0, 1)], &mut pool);
        table.commit(&[run(7, 0, 1)]);
        assert_eq!((table.end(0), table.end(7), table.end(1)), (40, 1, 0));

        let back = [run(0, 15, 2)];
        assert_eq!(table.needed(&back, &pool), 0);
        assert_eq!(table.commit(&back), [2]);
        pool.give_back([2]);
        assert_eq!(table.end(0), 17);

        let failed = [run(0, 17, 20), run(7, 0, 1)];
        extend(&mut table, &failed, &mut pool);
        assert_eq!(table.abandon(&failed).len(), 2); // one that was taken for lane 0, and lane 7's only one
        assert_eq!((table.end(0), table.end(7), table.references().len()), (17, 0, 2));
    }

    #[test]
    fn a_copy_costs_no_page_until_one_of_the_lanes_is_written_to() {
        let (mut table, mut pool) = table(40);
        assert!(table.copy(&[(0, 1)], &mut pool).is_empty());
        assert_eq!((pool.free(), pool.shared(), table.end(1)), (5, 3, 40));
        assert_eq!(table.needed(&[run(1, 40, 1)], &pool), 1);
        assert_eq!(extend(&mut table, &[run(1, 40, 1)], &mut pool), [PageCopy { from: 2, to: 3 }]);
        pool.give_back(table.commit(&[run(1, 40, 1)]));
        assert_eq!((table.pages(0), table.pages(1), pool.shared()), (&[0, 1, 2][..], &[0, 1, 3][..], 2));
        // The other one has the page for itself now.
        assert_eq!(table.needed(&[run(0, 40, 8)], &pool), 0);
    }

    #[test]
    fn of_lanes_that_share_a_page_the_last_one_to_begin_keeps_it() {
        let (mut table, mut pool) = table(20);
        table.copy(&[(0, 1), (0, 2)], &mut pool);
        let runs = [run(0, 20, 1), run(1, 18, 1), run(2, 19, 1)];
        assert_eq!(table.needed(&runs, &pool), 2);
        let copies = extend(&mut table, &runs, &mut pool);
        assert_eq!(copies, [PageCopy { from: 1, to: 2 }, PageCopy { from: 1, to: 3 }]);
        assert_eq!((table.pages(0)[1], table.pages(1)[1], table.pages(2)[1]), (1, 2, 3));
        pool.give_back(table.abandon(&runs));
        assert_eq!((table.pages(1)[1], table.pages(2)[1], pool.free()), (1, 1, 6));
        assert_eq!([0, 1, 2].map(|lane| table.end(lane)), [20, 18, 19]);
    }

    #[test]
    fn pages_behind_a_rollback_are_replaced_and_not_copied() {
        let (mut table, mut pool) = table(48);
        table.copy(&[(0, 1)], &mut pool);
        let back = [run(1, 16, 20)];
        assert_eq!(extend(&mut table, &back, &mut pool), []);
        assert_eq!((table.pages(1), pool.free()), (&[0, 3, 4][..], 3));
        pool.give_back(table.release());
        assert_eq!((table.pages(1), pool.free()), (&[0, 1, 2][..], 5));
    }

    #[test]
    fn lanes_are_copied_all_at_once() {
        let (mut table, mut pool) = table(16);
        extend(&mut table, &[run(1, 0, 32)], &mut pool);
        table.commit(&[run(1, 0, 32)]);
        // Two lanes change places, and one is a copy of nothing.
        let superfluous = table.copy(&[(0, 1), (1, 0), (5, 2)], &mut pool);
        pool.give_back(superfluous);
        assert_eq!((table.end(0), table.end(1), table.end(2)), (32, 16, 0));
        assert_eq!((pool.free(), pool.shared()), (5, 0));
        pool.give_back(table.remove(0));
        pool.give_back(table.clear());
        assert_eq!(pool.free(), 8);
    }

    #[test]
    fn a_session_alone_could_write_to_what_others_share_with_it_now() {
        let (table, mut pool) = table(8 * PAGE_TOKENS - 1);
        let mut other = LaneTable::default();
        other.adopt(0, table.pages(0), &mut pool);
        assert_eq!((table.claim(), other.claim()), (Claim::Running, Claim::New));
        let next = [run(0, 8 * PAGE_TOKENS - 1, 1)];
        assert_eq!((table.needed(&next, &pool), pool.free()), (1, 0));
        assert!(table.could_ever(&next, &pool));
        pool.give_back(other.clear());
        assert_eq!(table.needed(&next, &pool), 0);
        assert!(!table.could_ever(&[run(1, 0, 1)], &pool));
    }
}
