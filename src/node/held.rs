//! A bound on the memory that waiting steps and kept replies may take, over all sessions of a node.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

/// How many bytes may be held, and how many are.
#[derive(Debug, Clone)]
pub(crate) struct HeldBytes {
    held: Arc<AtomicUsize>,
    most: usize,
}

/// The right to hold some bytes; dropping it gives them back.
#[derive(Debug)]
pub(crate) struct HeldPermit {
    held: Arc<AtomicUsize>,
    bytes: usize,
}

impl HeldBytes {
    pub(crate) fn new(most: usize) -> Self {
        Self { held: Arc::default(), most }
    }

    /// Room for `bytes`, or `None` where they would be too many.
    pub(crate) fn take(&self, bytes: usize) -> Option<HeldPermit> {
        self.held
            .try_update(Ordering::Relaxed, Ordering::Relaxed, |held| {
                held.checked_add(bytes).filter(|sum| *sum <= self.most)
            })
            .ok()?;
        Some(HeldPermit { held: self.held.clone(), bytes })
    }
}

impl Drop for HeldPermit {
    fn drop(&mut self) {
        self.held.fetch_sub(self.bytes, Ordering::Relaxed);
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
}
