//! Which peers a session runs through: the route that a decode token passes fastest, as far as is known.

use std::ops::Range;

use libp2p::PeerId;

/// A peer that could be a hop.
#[derive(Debug, Clone, PartialEq)]
pub struct Candidate {
    /// Who.
    pub peer: PeerId,
    /// The blocks it serves; a hop may run any part of them.
    pub span: Range<usize>,
    /// What passing a token to it costs, seconds: about one one-way delay.
    pub link_seconds: f64,
    /// What one block costs it, seconds a token.
    pub block_seconds: f64,
}

/// One hop of a route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hop {
    /// Who.
    pub peer: PeerId,
    /// The blocks that it runs in this route.
    pub blocks: Range<usize>,
}

/// The route with the lowest time a token through `blocks`, or `None` where the candidates don't cover them.
///
/// A route may enter and leave a span only where some span starts or ends; a cut anywhere else never pays, since block times
/// are linear. No peer appears twice. Ties go to the earlier candidate. Time: boundaries × candidates.
pub fn choose(blocks: Range<usize>, candidates: &[Candidate]) -> Option<Vec<Hop>> {
    /// The best way from a boundary to the end: its time, and the hop that it starts with.
    struct Best {
        seconds: f64,
        hop: Option<(usize, usize)>,
    }

    let mut boundaries: Vec<usize> = candidates.iter().flat_map(|c| [c.span.start, c.span.end]).collect();
    boundaries.extend([blocks.start, blocks.end]);
    boundaries.retain(|boundary| (blocks.start..=blocks.end).contains(boundary));
    boundaries.sort_unstable();
    boundaries.dedup();

    let mut best: Vec<Option<Best>> = boundaries.iter().map(|_| None).collect();
    let last = boundaries.len() - 1;
    best[last] = Some(Best { seconds: 0.0, hop: None });
    for from in (0..last).rev() {
        for (index, candidate) in candidates.iter().enumerate() {
            if !candidate.span.contains(&boundaries[from]) {
                continue;
            }
            for to in from + 1..=last {
                if boundaries[to] > candidate.span.end {
                    break;
                }
                let Some(rest) = &best[to] else { continue };
                let length = (boundaries[to] - boundaries[from]) as f64;
                let seconds = candidate.link_seconds + length * candidate.block_seconds + rest.seconds;
                if best[from].as_ref().is_none_or(|known| seconds < known.seconds) {
                    best[from] = Some(Best { seconds, hop: Some((index, to)) });
                }
            }
        }
    }

    let mut hops: Vec<Hop> = Vec::new();
    let mut at = 0;
    while let Some((index, to)) = best[at].as_ref()?.hop {
        let (peer, blocks) = (candidates[index].peer, boundaries[at]..boundaries[to]);
        // A session has one place on a peer. One that is entered twice runs what lies between as well: its span covers it.
        match hops.iter().position(|hop| hop.peer == peer) {
            Some(first) => {
                hops.truncate(first + 1);
                hops[first].blocks.end = blocks.end;
            }
            None => hops.push(Hop { peer, blocks }),
        }
        at = to;
    }
    Some(hops)
}

#[cfg(test)]
mod tests {
    use libp2p::identity::Keypair;
    use proptest::prelude::*;

    use super::*;

    fn candidate(span: Range<usize>, link_seconds: f64, block_seconds: f64) -> Candidate {
        let peer = Keypair::generate_ed25519().public().to_peer_id();
        Candidate { peer, span, link_seconds, block_seconds }
    }

    fn seconds(route: &[Hop], candidates: &[Candidate]) -> f64 {
        route
            .iter()
            .map(|hop| {
                let candidate = candidates.iter().find(|c| c.peer == hop.peer).unwrap();
                candidate.link_seconds + hop.blocks.len() as f64 * candidate.block_seconds
            })
            .sum()
    }

    #[test]
    fn one_peer_that_serves_all_beats_two_on_equal_links() {
        let candidates = [candidate(0..4, 0.01, 0.001), candidate(4..8, 0.01, 0.001), candidate(0..8, 0.01, 0.001)];
        let route = choose(0..8, &candidates).unwrap();
        assert_eq!(route, [Hop { peer: candidates[2].peer, blocks: 0..8 }]);
    }

    #[test]
    fn a_gap_has_no_route() {
        assert_eq!(choose(0..8, &[candidate(0..4, 0.0, 0.1), candidate(5..8, 0.0, 0.1)]), None);
        assert_eq!(choose(0..8, &[]), None);
    }

    #[test]
    fn a_slow_peer_runs_only_what_nobody_else_serves() {
        let candidates = [candidate(0..8, 0.0, 1.0), candidate(0..3, 0.001, 0.001), candidate(5..8, 0.001, 0.001)];
        let route = choose(0..8, &candidates).unwrap();
        let spans: Vec<_> = route.iter().map(|hop| hop.blocks.clone()).collect();
        assert_eq!(spans, [0..3, 3..5, 5..8]);
    }

    #[test]
    fn a_gap_in_a_route_may_be_filled_by_parts_of_spans() {
        let candidates = [candidate(0..6, 0.0, 0.1), candidate(5..12, 0.0, 0.1)];
        let spans: Vec<_> = choose(4..8, &candidates).unwrap().into_iter().map(|hop| hop.blocks).collect();
        assert!(spans == [4..6, 6..8] || spans == [4..5, 5..8], "{spans:?}");
        assert_eq!(choose(4..13, &candidates), None);
    }

    /// Every route there is, by trying all ends of every hop; `once` leaves out those that enter a peer twice.
    fn exhaustive(blocks: usize, from: usize, candidates: &[Candidate], once: bool) -> Option<f64> {
        if from == blocks {
            return Some(0.0);
        }
        let mut best: Option<f64> = None;
        for candidate in candidates.iter().filter(|c| c.span.contains(&from)) {
            let others: Vec<_> = candidates.iter().filter(|c| !once || c.peer != candidate.peer).cloned().collect();
            for to in from + 1..=candidate.span.end.min(blocks) {
                if let Some(rest) = exhaustive(blocks, to, &others, once) {
                    let total = candidate.link_seconds + (to - from) as f64 * candidate.block_seconds + rest;
                    best = Some(best.map_or(total, |known| known.min(total)));
                }
            }
        }
        best
    }

    proptest! {
        #[test]
        fn as_good_as_exhaustive_search(
            spans in proptest::collection::vec((0usize..6, 1usize..5, 0.0..0.1f64, 0.001..0.1f64), 1..6),
        ) {
            let candidates: Vec<_> = spans.iter()
                .map(|&(start, length, link, block)| candidate(start..(start + length).min(6), link, block))
                .collect();
            match (choose(0..6, &candidates), exhaustive(6, 0, &candidates, true)) {
                (None, None) => {}
                (Some(route), Some(best)) => {
                    prop_assert_eq!(route.first().unwrap().blocks.start, 0);
                    prop_assert!(route.windows(2).all(|pair| pair[0].blocks.end == pair[1].blocks.start));
                    prop_assert_eq!(route.last().unwrap().blocks.end, 6);
                    let found = seconds(&route, &candidates);
                    prop_assert!(found > best - 1e-9);
                    // Where entering a peer twice would not have been faster, the route is the fastest.
                    if exhaustive(6, 0, &candidates, false).unwrap() > best - 1e-9 {
                        prop_assert!(found < best + 1e-9);
                    }
                    let peers: std::collections::HashSet<_> = route.iter().map(|hop| hop.peer).collect();
                    prop_assert_eq!(peers.len(), route.len());
                }
                (found, best) => prop_assert!(false, "found {found:?}, and the best takes {best:?}"),
            }
        }
    }
}
