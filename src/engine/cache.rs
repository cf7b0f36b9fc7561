//! A session's KV cache, and the desk where sessions and the batcher meet.

use std::{
    collections::VecDeque,
    fmt,
    ops::Range,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use super::{
    job::Job,
    pages::{LaneTable, PAGE_TOKENS, PageId, PagePool},
};

/// The KV cache of one session, for some blocks of the span: its lanes and the pages that they hold.
///
/// It is empty at first, grows with the session's steps, and gives its pages back when it is dropped.
pub struct Cache {
    pub(super) desk: Arc<Desk>,
    pub(super) table: LaneTable,
    blocks: Range<usize>,
}

impl Cache {
    pub(super) fn new(desk: Arc<Desk>, blocks: Range<usize>) -> Self {
        Self { desk, table: LaneTable::default(), blocks }
    }

    /// The blocks that the session's steps run through.
    pub fn blocks(&self) -> Range<usize> {
        self.blocks.clone()
    }

    /// Tokens that `lane` holds.
    pub fn end(&self, lane: u32) -> usize {
        self.table.end(lane)
    }

    /// Tokens that the session's pages have room for; what it holds of the pool.
    pub fn reserved_tokens(&self) -> usize {
        self.table.held() * PAGE_TOKENS
    }
}

impl fmt::Debug for Cache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Cache").field("blocks", &self.blocks).field("table", &self.table).finish_non_exhaustive()
    }
}

impl Drop for Cache {
    fn drop(&mut self) {
        self.desk.give_back(self.table.clear());
    }
}

/// Where steps are handed in, and where the pages are kept.
pub(super) struct Desk {
    state: Mutex<DeskState>,
    /// Something changed that the batcher may be waiting for.
    changed: Condvar,
    /// Steps that were computed.
    pub(super) steps: AtomicU64,
    /// Rows of these.
    pub(super) tokens: AtomicU64,
}

pub(super) struct DeskState {
    /// Steps that the batcher hasn't seen yet.
    pub(super) arrivals: VecDeque<Pending>,
    pub(super) pages: PagePool,
    /// Steps that haven't begun; never more than the engine's limit, which bounds `arrivals`, too.
    pub(super) queued: usize,
    /// The last handle of the engine is gone.
    pub(super) closed: bool,
}

/// A step that hasn't begun.
pub(super) struct Pending {
    pub(super) job: Job,
    pub(super) submitted: Instant,
    /// It has asked for pages and got none.
    pub(super) starved: bool,
}

impl Desk {
    pub(super) fn new(pages: u32) -> Self {
        let state = DeskState { arrivals: VecDeque::new(), pages: PagePool::new(pages), queued: 0, closed: false };
        Self { state: Mutex::new(state), changed: Condvar::new(), steps: AtomicU64::new(0), tokens: AtomicU64::new(0) }
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

    pub(super) fn give_back(&self, pages: impl IntoIterator<Item = PageId>) {
        self.lock().pages.give_back(pages);
        self.notify();
    }

    pub(super) fn count(&self, rows: usize) {
        self.steps.fetch_add(1, Ordering::Relaxed);
        self.tokens.fetch_add(rows as u64, Ordering::Relaxed);
    }
}
