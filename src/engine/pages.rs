//! Bookkeeping of KV pages: how many refer to each, and how many are left. Plain data, no locks, no tensors.
//!
//! A page holds the keys and values of [`PAGE_TOKENS`] consecutive tokens of one lane, in every block of the span: one
//! page id is valid in all of the K and V planes. The pool is as large as it will ever be from the start.
//!
//! A page may be referred to by several lanes, of one session or of many, and by handles that keep a prefix for later
//! sessions. Whoever refers to a page holds one reference, and gives back exactly that one; with the last, the page is free.
//! A page that more than one refer to is never written to (`engine/lanes.rs` says how that is kept).
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
        Self { free: (0..total).rev().collect(), references: vec![0; total as usize], shared: 0 }
    }

    pub(super) fn total(&self) -> usize {
        self.references.len()
    }

    pub(super) fn free(&self) -> usize {
        self.free.len()
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
    fn reserve(&self, claim: Claim) -> usize {
        match claim {
            Claim::Running => 0,
            Claim::New => self.total() / WATERMARK_SHARE,
        }
    }

    /// Whether `count` pages can be had now.
    pub(super) fn has(&self, claim: Claim, count: usize) -> bool {
        // A step that needs no page can't hurt anyone.
        count == 0 || self.free.len().checked_sub(count).is_some_and(|left| left >= self.reserve(claim))
    }

    /// Hands out `count` pages with one reference each, or none.
    pub(super) fn take(&mut self, claim: Claim, count: usize) -> Option<Vec<PageId>> {
        if !self.has(claim, count) {
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
            self.shared += usize::from(*references == 2);
        }
    }

    /// Takes back one reference to each of `pages`.
    pub(super) fn give_back(&mut self, pages: impl IntoIterator<Item = PageId>) {
        for page in pages {
            let references = &mut self.references[page as usize];
            debug_assert!(*references > 0, "page {page} is free already");
            *references -= 1;
            match *references {
                0 => self.free.push(page),
                1 => self.shared -= 1,
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
}
