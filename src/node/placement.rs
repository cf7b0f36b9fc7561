//! Which span a joining node should host: the one that the swarm needs most.

use std::ops::Range;

use crate::swarm::announcement::{Announcement, State};

/// How well each block is served: the sum of its peers' compute speeds, tokens a second. A peer that doesn't know its speed
/// yet counts as one token a second, so that it still counts as a peer.
pub fn coverage<'a>(blocks: usize, announcements: impl IntoIterator<Item = &'a Announcement>) -> Vec<f64> {
    let mut coverage = vec![0.0; blocks];
    for peer in announcements {
        if !matches!(peer.state, State::Joining | State::Online) {
            continue;
        }
        for served in coverage.iter_mut().take(peer.span.end).skip(peer.span.start) {
            *served += peer.compute_tokens_per_second.max(1.0);
        }
    }
    coverage
}

/// The span of `length` blocks that leaves the swarm best off: it covers the most blocks that nobody serves, then the worst
/// served ones (compared from the worst upwards), then it is the first.
///
/// `length` is cut to the number of blocks; `None` where either is 0.
pub fn choose_span(coverage: &[f64], length: usize) -> Option<Range<usize>> {
    let length = length.min(coverage.len());
    if length == 0 {
        return None;
    }
    let need = |start: usize| {
        let mut served = coverage[start..start + length].to_vec();
        served.sort_by(f64::total_cmp);
        served
    };
    let start = (0..=coverage.len() - length).min_by(|&a, &b| {
        let (a, b) = (need(a), need(b));
        a.iter().zip(&b).map(|(a, b)| a.total_cmp(b)).find(|order| order.is_ne()).unwrap_or(std::cmp::Ordering::Equal)
    })?;
    Some(start..start + length)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_empty_swarm_is_filled_from_the_front() {
        assert_eq!(choose_span(&[0.0; 8], 3), Some(0..3));
        assert_eq!(choose_span(&[0.0; 8], 99), Some(0..8));
        assert_eq!(choose_span(&[], 3), None);
        assert_eq!(choose_span(&[0.0; 8], 0), None);
    }

    #[test]
    fn blocks_that_nobody_serves_come_first_then_the_weakest() {
        assert_eq!(choose_span(&[1.0, 1.0, 1.0, 0.0, 0.0, 1.0], 2), Some(3..5));
        assert_eq!(choose_span(&[9.0, 9.0, 0.0, 0.0, 0.0, 9.0], 2), Some(2..4));
        assert_eq!(choose_span(&[9.0, 9.0, 3.0, 2.0, 5.0, 9.0], 1), Some(3..4));
        assert_eq!(choose_span(&[5.0, 1.0, 9.0, 2.0, 1.0, 9.0], 2), Some(3..5));
    }

    proptest! {
        #[test]
        fn no_other_span_covers_more_unserved_blocks(
            served in proptest::collection::vec(prop_oneof![Just(0.0), 0.5..20.0f64], 1..24), length in 1usize..10,
        ) {
            let chosen = choose_span(&served, length).unwrap();
            let unserved = |span: Range<usize>| served[span].iter().filter(|s| **s == 0.0).count();
            for start in 0..=served.len() - chosen.len() {
                prop_assert!(unserved(start..start + chosen.len()) <= unserved(chosen.clone()));
            }
        }
    }
}
