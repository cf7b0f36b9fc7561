//! A bound on the memory that waiting steps and kept replies may take, over all sessions of a node.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

/// How many bytes may be held, and how many are: of a node, of one of its clients, or of one session. What is held counts in
/// all that contain it.
#[derive(Debug, Clone)]
pub(crate) struct HeldBytes(Arc<Budget>);

#[derive(Debug)]
struct Budget {
    held: AtomicUsize,
    most: usize,
    within: Option<HeldBytes>,
}

/// The right to hold some bytes; dropping it gives them back.
#[derive(Debug)]
pub(crate) struct HeldPermit {
    budget: HeldBytes,
    bytes: usize,
    _within: Option<Box<HeldPermit>>,
}

impl HeldBytes {
    pub(crate) fn new(most: usize) -> Self {
        Self(Arc::new(Budget { held: AtomicUsize::new(0), most, within: None }))
    }

    /// How many bytes are held.
    pub(crate) fn held(&self) -> usize {
        self.0.held.load(Ordering::Relaxed)
    }

    /// A part of this one that may be used up by `1 / parts` of it.
    pub(crate) fn share(&self, parts: usize) -> Self {
        let most = self.0.most / parts;
        Self(Arc::new(Budget { held: AtomicUsize::new(0), most, within: Some(self.clone()) }))
    }

    /// Room for `bytes`, or `None` where they would be too many.
    pub(crate) fn take(&self, bytes: usize) -> Option<HeldPermit> {
        let within = match &self.0.within {
            Some(outer) => Some(Box::new(outer.take(bytes)?)),
            None => None,
        };
        self.0
            .held
            .try_update(Ordering::Relaxed, Ordering::Relaxed, |held| {
                held.checked_add(bytes).filter(|sum| *sum <= self.0.most)
            })
            .ok()?;
        Some(HeldPermit { budget: self.clone(), bytes, _within: within })
    }
}

impl Drop for HeldPermit {
    fn drop(&mut self) {
        self.budget.0.held.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_dropped_can_be_taken_again() {
        let held = HeldBytes::new(10);
        let first = held.take(6).unwrap();
        assert!(held.take(5).is_none());
        assert!(held.take(usize::MAX).is_none());
        drop(first);
        assert!(held.take(10).is_some());
    }

    #[test]
    fn a_share_is_a_part_and_counts_in_the_whole() {
        let node = HeldBytes::new(8);
        let (one, other) = (node.share(2), node.share(2));
        assert!(one.take(5).is_none());
        let held = one.take(4).unwrap();
        assert!(one.take(1).is_none(), "the share is used up");
        let rest = other.take(4).unwrap();
        assert!(node.take(1).is_none(), "the whole is used up");
        drop((held, rest));
        assert!(node.take(8).is_some(), "a refused share leaves nothing behind");
    }
}
