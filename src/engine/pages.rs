//! Bookkeeping of KV pages: how many refer to each, and how many are left. Plain data, no locks, no tensors.
//!
//! A page holds the keys and values of [`PAGE_TOKENS`] consecutive tokens of one lane, in every block of the span: one
//! page id is valid in all of the K and V planes. The pool is as large as it will ever be from the start.
//!
//! A page may be referred to by several lanes, of one session or of many, and by handles that keep a prefix for later
//! sessions. Whoever refers to a page holds one reference, and gives back exactly that one; with the last, the page is free.
//! A page that more than one refer to is never written to (`engine/lanes.rs` says how that is kept).
//!
//! A page may also be *kept* for sessions to come (`engine/kept.rs`), with a reference of its own. One that nobody else refers to
//! is idle: it counts as one that can be had, and is given up as soon as somebody needs a page.
//!
//! Sessions that run get pages before those that begin, and those that begin leave a share of the pool
//! free ([`WATERMARK_SHARE`]), so that a session which has been let in can usually grow.

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

/// All pages, and how many refer to each.
#[derive(Debug)]
pub(super) struct PagePool {
    free: Vec<PageId>,
    /// Of each page; 0 if it is free. A reference takes four bytes of some table, so that 2^32 of them don't fit in memory.
    references: Vec<u32>,
    /// Pages that more than one refer to.
    shared: usize,
    /// Of each page, whether one of its references is there to keep it.
    kept: Vec<bool>,
    /// Pages whose only reference is that one.
    idle: usize,
}

/// Who asks for pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Claim {
    /// A session that has run, and holds pages.
    Running,
    /// A session's first step.
    New,
}

impl PagePool {
    pub(super) fn new(total: u32) -> Self {
        // The last id is at the front, so that pages are first handed out in ascending order.
        Self {
            free: (0..total).rev().collect(),
            references: vec![0; total as usize],
            shared: 0,
            kept: vec![false; total as usize],
            idle: 0,
        }
    }

    pub(super) fn total(&self) -> usize {
        self.references.len()
    }

    pub(super) fn free(&self) -> usize {
        self.free.len()
    }

    /// Pages that can be had: free ones, and those that are only kept.
    pub(super) fn available(&self) -> usize {
        self.free.len() + self.idle
    }

    /// Whether a page is kept.
    #[cfg(test)]
    pub(super) fn is_kept(&self, page: PageId) -> bool {
        self.kept[page as usize]
    }

    /// Whether nobody needs a page that is kept.
    pub(super) fn is_idle(&self, page: PageId) -> bool {
        self.kept[page as usize] && self.references[page as usize] == 1
    }

    /// Pages that more than one refer to.
    pub(super) fn shared(&self) -> usize {
        self.shared
    }

    /// How many refer to a page.
    pub(super) fn references(&self, page: PageId) -> u32 {
        self.references[page as usize]
    }

    /// The most pages that a session with this claim may hold.
    pub(super) fn limit(&self, claim: Claim) -> usize {
        self.total() - self.reserve(claim)
    }

    /// Pages that `claim` must leave.
    pub(super) fn reserve(&self, claim: Claim) -> usize {
        match claim {
            Claim::Running => 0,
            Claim::New => self.total() / WATERMARK_SHARE,
        }
    }

    /// Whether `count` pages can be had now, where idle ones are given up for them.
    pub(super) fn has(&self, claim: Claim, count: usize) -> bool {
        // A step that needs no page can't hurt anyone.
        count == 0 || self.available().checked_sub(count).is_some_and(|left| left >= self.reserve(claim))
    }

    /// Hands out `count` free pages with one reference each, or none.
    pub(super) fn take(&mut self, claim: Claim, count: usize) -> Option<Vec<PageId>> {
        if !self.has(claim, count) || self.free.len() < count {
            return None;
        }
        let pages: Vec<PageId> = self.free.split_off(self.free.len() - count).into_iter().rev().collect();
        for page in &pages {
            self.references[*page as usize] = 1;
        }
        Some(pages)
    }

    /// Hands out one more reference to each of `pages`, which somebody holds.
    pub(super) fn share(&mut self, pages: &[PageId]) {
        for page in pages {
            let references = &mut self.references[*page as usize];
            debug_assert!(*references > 0, "page {page} is free");
            *references += 1;
            if *references == 2 {
                self.shared += 1;
                self.idle -= usize::from(self.kept[*page as usize]);
            }
        }
    }

    /// Keeps a page that somebody holds. False where it is kept already: it can be so once.
    pub(super) fn keep(&mut self, page: PageId) -> bool {
        if self.kept[page as usize] {
            return false;
        }
        self.share(&[page]);
        self.kept[page as usize] = true;
        true
    }

    /// A page that is kept need not be any more.
    pub(super) fn give_up(&mut self, page: PageId) {
        debug_assert!(self.kept[page as usize], "page {page} is not kept");
        self.idle -= usize::from(self.is_idle(page));
        self.kept[page as usize] = false;
        self.give_back([page]);
    }

    /// Takes back one reference to each of `pages`.
    pub(super) fn give_back(&mut self, pages: impl IntoIterator<Item = PageId>) {
        for page in pages {
            let references = &mut self.references[page as usize];
            debug_assert!(*references > 0, "page {page} is free already");
            *references -= 1;
            match *references {
                0 => self.free.push(page),
                1 => {
                    self.shared -= 1;
                    self.idle += usize::from(self.kept[page as usize]);
                }
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_session_leaves_the_watermark_and_a_running_one_may_use_it() {
        let mut pool = PagePool::new(32);
        assert_eq!((pool.limit(Claim::New), pool.limit(Claim::Running)), (30, 32));
        assert!(pool.take(Claim::New, 31).is_none());
        assert_eq!(pool.take(Claim::New, 30).unwrap().len(), 30);
        assert!(pool.take(Claim::New, 1).is_none());
        assert!(pool.take(Claim::New, 0).unwrap().is_empty());
        assert_eq!(pool.take(Claim::Running, 2).unwrap(), [30, 31]);
        assert!(pool.take(Claim::Running, 1).is_none());
    }

    #[test]
    fn a_page_is_free_when_the_last_reference_is_given_back() {
        let mut pool = PagePool::new(4);
        let pages = pool.take(Claim::Running, 2).unwrap();
        pool.share(&pages);
        pool.share(&pages[..1]);
        assert_eq!((pool.free(), pool.shared(), pool.references(pages[0])), (2, 2, 3));
        pool.give_back(pages.clone());
        assert_eq!((pool.free(), pool.shared()), (2, 1));
        pool.give_back(pages.clone());
        assert_eq!((pool.free(), pool.shared()), (3, 0));
        pool.give_back([pages[0]]);
        assert_eq!((pool.free(), pool.references(pages[0])), (4, 0));
    }

    #[test]
    fn a_page_that_is_only_kept_can_be_had() {
        let mut pool = PagePool::new(4);
        let pages = pool.take(Claim::Running, 3).unwrap();
        assert!(pool.keep(pages[0]) && pool.keep(pages[1]) && !pool.keep(pages[0]));
        assert_eq!((pool.available(), pool.shared()), (1, 2));
        pool.give_back(pages.clone());
        assert_eq!((pool.free(), pool.available(), pool.shared()), (2, 4, 0));
        pool.share(&pages[..1]);
        assert_eq!((pool.available(), pool.is_idle(pages[0]), pool.is_idle(pages[1])), (3, false, true));
        assert!(pool.has(Claim::Running, 3) && pool.take(Claim::Running, 3).is_none(), "one has to be given up first");
        pool.give_up(pages[1]);
        pool.give_up(pages[0]);
        assert_eq!((pool.free(), pool.available()), (3, 3));
        pool.give_back([pages[0]]);
        assert_eq!((pool.free(), pool.available()), (4, 4));
    }
}
