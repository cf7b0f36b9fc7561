//! A session's KV cache, and the desk where sessions and the batcher meet.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt,
    ops::Range,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use super::{
    hidden::HiddenStates,
    job::{Job, Owner, StepError},
    kept::{KeptPages, NewPage, PageKey},
    lanes::{LaneRun, LaneTable},
    pages::{Claim, PAGE_TOKENS, PageId, PagePool},
    schedule::{Gather, Meeting},
    snapshot::Transfer,
};

/// The KV cache of one session, for some blocks of the span: its lanes and the pages that they hold.
///
/// It is empty at first, grows with the session's steps, and gives its pages back when it is dropped. Lanes that are
/// copied, and prefixes that are shared between sessions ([`Cache::keep_prefix`]), refer to the same pages until one of them is
/// written to: a copy costs nothing, and what several hold counts once in the pool.
pub struct Cache {
    pub(super) desk: Arc<Desk>,
    pub(super) table: LaneTable,
    pub(super) owner: Owner,
    /// Of the session.
    pub(super) number: u64,
    /// Pages of which the contents come from another engine; empty once they are there.
    pub(super) incoming: Vec<PageId>,
    blocks: Range<usize>,
}

impl Cache {
    pub(super) fn new(desk: Arc<Desk>, blocks: Range<usize>) -> Self {
        let number = desk.sessions.fetch_add(1, Ordering::Relaxed);
        Self { desk, table: LaneTable::default(), owner: Owner::default(), number, incoming: Vec::new(), blocks }
    }

    /// The same cache, of a session that belongs to `owner`.
    pub fn owned_by(mut self, owner: Owner) -> Self {
        self.owner = owner;
        self
    }

    /// The blocks that the session's steps run through.
    pub fn blocks(&self) -> Range<usize> {
        self.blocks.clone()
    }

    /// Tokens that `lane` holds.
    pub fn end(&self, lane: u32) -> usize {
        self.table.end(lane)
    }

    /// Tokens that the session's pages have room for; what it holds of the pool, together with others where it shares.
    pub fn reserved_tokens(&self) -> usize {
        self.table.references().len() * PAGE_TOKENS
    }

    /// Makes the second lane of each pair a copy of what the first one is now, and forget what it held: of all at once, so that
    /// a beam search can rearrange its lanes. The copy of an empty lane is empty. A lane that is second in two pairs
    /// becomes what the later one says.
    pub fn copy_lanes(&mut self, pairs: &[(u32, u32)]) {
        let superfluous = self.table.copy(pairs, &mut self.desk.lock().pages);
        self.desk.give_back(superfluous);
    }

    /// Forgets a lane.
    pub fn drop_lane(&mut self, lane: u32) {
        let superfluous = self.table.remove(lane);
        self.desk.give_back(superfluous);
    }

    /// Which of these pages nobody has kept yet.
    pub fn not_kept(&self, keys: &[PageKey]) -> Vec<bool> {
        let state = self.desk.lock();
        keys.iter().map(|key| !state.kept.contains(key)).collect()
    }

    /// Keeps the first pages of a lane for sessions to come, as far as they are full: page by page under these names, with the
    /// rows of some of them that the tokens came out as, where somebody may want them again. What is kept already stays as it is.
    ///
    /// Whether the names are right is for the caller to know, who makes them ([`PageKey`]). Pages that are kept are never in the
    /// way: they go, the least recently used of the owner that has most first, as soon as a step needs their room.
    pub fn keep_prefix(&self, lane: u32, keys: &[PageKey], rows: Vec<(usize, HiddenStates)>) {
        let full = self.end(lane) / PAGE_TOKENS;
        let mut state = self.desk.lock();
        let DeskState { pages, kept, .. } = &mut *state;
        let mut rows: BTreeMap<usize, HiddenStates> = rows.into_iter().collect();
        let named: Vec<(PageKey, NewPage)> = keys
            .iter()
            .zip(&self.table.pages(lane)[..full])
            .enumerate()
            .map(|(index, (key, page))| (*key, NewPage { page: *page, rows: rows.remove(&index) }))
            .collect();
        kept.keep(self.owner, named, Instant::now(), pages);
    }

    /// Makes `lane` hold as many of these pages, from the first on, as are kept, and nothing else. Returns the rows that were kept
    /// with each. New sessions' watermark holds: what is left for others may end the prefix early.
    ///
    /// Whether the prefix is right for this session is for the caller to know, who makes the names ([`PageKey`]).
    pub fn adopt_prefix(&mut self, lane: u32, keys: &[PageKey]) -> Vec<Option<HiddenStates>> {
        let mut state = self.desk.lock();
        let DeskState { pages, kept, .. } = &mut *state;
        let mut spare = pages.available().saturating_sub(pages.reserve(Claim::New));
        let found = kept.find(keys).take_while(|found| {
            let is_taken = pages.is_idle(found.page);
            let fits = !is_taken || spare > 0;
            spare -= usize::from(is_taken && fits);
            fits
        });
        let (ids, rows): (Vec<PageId>, Vec<_>) = found.map(|found| (found.page, found.rows.clone())).unzip();
        kept.used(&keys[..ids.len()], Instant::now());
        let superfluous = self.table.adopt(lane, &ids, pages);
        drop(state);
        self.desk.give_back(superfluous);
        rows
    }
}

impl fmt::Debug for Cache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cache").field("blocks", &self.blocks).field("table", &self.table).finish_non_exhaustive()
    }
}

impl Drop for Cache {
    fn drop(&mut self) {
        self.desk.lock().gather.forget(self.number);
        self.desk.give_back(self.table.clear());
    }
}

/// Where steps are handed in, and where the pages are kept.
pub(super) struct Desk {
    state: Mutex<DeskState>,
    /// Something changed that the batcher may be waiting for.
    changed: Condvar,
    /// How many there were.
    sessions: AtomicU64,
}

/// One owner may have this part of the steps that may wait.
const OWNERS_SHARE: usize = 2;

pub(super) struct DeskState {
    /// Steps that the batcher hasn't seen yet.
    pub(super) arrivals: VecDeque<Pending>,
    /// Pages to be read or written between passes; a session has no more than one such job at a time.
    pub(super) transfers: VecDeque<Transfer>,
    pub(super) pages: PagePool,
    pub(super) kept: KeptPages,
    /// Steps that haven't begun; never more than the engine's limit, which bounds `arrivals`, too.
    pub(super) queued: usize,
    /// Of each owner that has any.
    queued_by: BTreeMap<Owner, usize>,
    /// How the open sessions come and go.
    pub(super) gather: Gather,
    pub(super) counts: Counts,
    /// The last handle of the engine is gone.
    pub(super) closed: bool,
}

/// What was done since the start.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Counts {
    /// Steps that were computed.
    pub(super) steps: u64,
    /// Rows of these.
    pub(super) tokens: u64,
    pub(super) passes: u64,
    /// Of all passes, those of steps that failed later, too.
    pub(super) rows: u64,
    /// In passes.
    pub(super) busy: Duration,
    /// See [`EngineLoad`](super::EngineLoad), likewise the next two.
    pub(super) decodes: u64,
    pub(super) late_decodes: u64,
    pub(super) slow_decodes: u64,
}

impl DeskState {
    /// Pages for a step, [`LaneTable::needed`] many, or none. What is kept for sessions to come makes room for them.
    pub(super) fn pages_for(&mut self, table: &LaneTable, runs: &[LaneRun]) -> Option<Vec<PageId>> {
        let found = self.take_pages(table.claim(), table.needed(runs, &self.pages));
        if found.is_some() {
            return found;
        }
        // A page that is kept and not idle is copied before it is written to. That, too, mustn't be in anybody's way.
        let copied = table.copied(runs, &self.pages);
        let was_kept = copied.into_iter().filter(|page| self.kept.give_up(*page, &mut self.pages)).count() > 0;
        if was_kept { self.take_pages(table.claim(), table.needed(runs, &self.pages)) } else { None }
    }

    /// So many pages, or none; what is kept for sessions to come makes room for them.
    pub(super) fn take_pages(&mut self, claim: Claim, count: usize) -> Option<Vec<PageId>> {
        if self.pages.has(claim, count) {
            self.kept.make_room(count, &mut self.pages);
        }
        self.pages.take(claim, count)
    }

    /// Counts a step that waits, where `limit` may.
    pub(super) fn enter(&mut self, owner: Owner, limit: usize) -> Result<(), StepError> {
        let of_owner = self.queued_by.get(&owner).copied().unwrap_or(0);
        let share = limit.div_ceil(OWNERS_SHARE);
        if self.queued >= limit {
            return Err(StepError::QueueFull { limit });
        }
        if of_owner >= share {
            return Err(StepError::QueueFull { limit: share });
        }
        self.queued += 1;
        self.queued_by.insert(owner, of_owner + 1);
        Ok(())
    }

    /// A step that waited was begun, or is given up.
    pub(super) fn leave(&mut self, owner: Owner) {
        self.queued -= 1;
        if let Some(count) = self.queued_by.get_mut(&owner) {
            *count -= 1;
            if *count == 0 {
                self.queued_by.remove(&owner);
            }
        }
    }
}

/// A step that hasn't begun.
pub(super) struct Pending {
    pub(super) job: Job,
    pub(super) submitted: Instant,
    /// It has asked for pages and got none.
    pub(super) starved: bool,
}

impl Desk {
    /// With so many pages, and room for so many bytes of rows of those that are kept, for sessions that meet where `meeting` says.
    pub(super) fn new(pages: u32, kept_bytes: usize, meeting: Meeting) -> Self {
        let state = DeskState {
            arrivals: VecDeque::new(),
            transfers: VecDeque::new(),
            pages: PagePool::new(pages),
            kept: KeptPages::new(kept_bytes),
            queued: 0,
            queued_by: BTreeMap::new(),
            gather: Gather::new(meeting),
            counts: Counts::default(),
            closed: false,
        };
        Self { state: Mutex::new(state), changed: Condvar::new(), sessions: AtomicU64::new(0) }
    }

    /// The state. Nothing that holds the lock can panic half-way through a change, so a poisoned one is as good.
    pub(super) fn lock(&self) -> MutexGuard<'_, DeskState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn notify(&self) {
        self.changed.notify_all();
    }

    /// Waits for a change, at most until `until`.
    pub(super) fn wait<'a>(
        &self,
        state: MutexGuard<'a, DeskState>,
        until: Option<Instant>,
    ) -> MutexGuard<'a, DeskState> {
        match until {
            None => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            Some(until) => {
                let timeout = until.saturating_duration_since(Instant::now());
                self.changed.wait_timeout(state, timeout).unwrap_or_else(PoisonError::into_inner).0
            }
        }
    }

    /// Takes back one reference to each of `pages`.
    pub(super) fn give_back(&self, pages: impl IntoIterator<Item = PageId>) {
        let mut pages = pages.into_iter().peekable();
        if pages.peek().is_some() {
            self.lock().pages.give_back(pages);
            self.notify();
        }
    }
}

#[cfg(test)]
mod tests;
