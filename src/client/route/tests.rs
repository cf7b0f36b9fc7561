//! Tests of the choice of routes: against exhaustive search, and how much work a large swarm makes.

use libp2p::identity::Keypair;
use proptest::prelude::*;

use super::*;

fn candidate(span: Range<usize>, link_seconds: f64, block_seconds: f64) -> Candidate {
    let peer = Keypair::generate_ed25519().public().to_peer_id();
    Candidate { peer, span, link_seconds, transmission_seconds: 0.0, block_seconds }
}

fn spans(blocks: Range<usize>, candidates: &[Candidate], frames: usize) -> Option<Vec<Range<usize>>> {
    Some(choose(blocks, candidates, frames)?.hops.into_iter().map(|hop| hop.blocks).collect())
}

#[test]
fn one_peer_that_serves_all_beats_two_on_equal_links() {
    let candidates = [candidate(0..4, 0.01, 0.001), candidate(4..8, 0.01, 0.001), candidate(0..8, 0.01, 0.001)];
    let choice = choose(0..8, &candidates, 1).unwrap();
    assert_eq!(choice.hops, [Hop { peer: candidates[2].peer, blocks: 0..8 }]);
    assert!((choice.seconds - 0.018).abs() < 1e-12);
    assert_eq!(seconds(&choice.hops, &candidates, 1), choice.seconds);
}

#[test]
fn a_gap_has_no_route() {
    assert_eq!(choose(0..8, &[candidate(0..4, 0.0, 0.1), candidate(5..8, 0.0, 0.1)], 1), None);
    assert_eq!(choose(0..8, &[], 9), None);
}

#[test]
fn a_slow_peer_runs_only_what_nobody_else_serves() {
    let candidates = [candidate(0..8, 0.0, 1.0), candidate(0..3, 0.001, 0.001), candidate(5..8, 0.001, 0.001)];
    assert_eq!(spans(0..8, &candidates, 1).unwrap(), [0..3, 3..5, 5..8]);
}

#[test]
fn a_gap_in_a_route_may_be_filled_by_parts_of_spans() {
    let candidates = [candidate(0..6, 0.0, 0.1), candidate(5..12, 0.0, 0.1)];
    let found = spans(4..8, &candidates, 1).unwrap();
    assert!(found == [4..6, 6..8] || found == [4..5, 5..8], "{found:?}");
    assert_eq!(spans(4..13, &candidates, 1), None);
}

#[test]
fn many_frames_are_shared_evenly_among_equals_and_one_frame_is_not() {
    let candidates = [candidate(0..8, 0.01, 0.01), candidate(0..8, 0.01, 0.01)];
    let whole = spans(0..8, &candidates, 1).unwrap();
    assert!(matches!(&whole[..], [span] if *span == (0..8)), "{whole:?}");
    assert_eq!(spans(0..8, &candidates, 50).unwrap(), [0..4, 4..8]);
}

#[test]
fn many_frames_take_the_wide_link_and_one_takes_the_short_one() {
    let near = Candidate { transmission_seconds: 0.2, ..candidate(0..8, 0.005, 0.001) };
    let wide = Candidate { transmission_seconds: 0.01, ..candidate(0..8, 0.3, 0.001) };
    let through = |frames| choose(0..8, &[near.clone(), wide.clone()], frames).unwrap().hops[0].peer;
    assert_eq!((through(1), through(40)), (near.peer, wide.peer));
}

/// Every route there is, by trying all ends of every hop, each peer once.
fn exhaustive(
    blocks: usize,
    from: usize,
    used: &mut Vec<(usize, usize)>,
    candidates: &[Candidate],
    frames: usize,
) -> Option<f64> {
    if from == blocks {
        let hops: Vec<Hop> = used
            .iter()
            .scan(0, |start, &(index, end)| {
                let hop = Hop { peer: candidates[index].peer, blocks: *start..end };
                *start = end;
                Some(hop)
            })
            .collect();
        return Some(seconds(&hops, candidates, frames));
    }
    let mut best: Option<f64> = None;
    for (index, candidate) in candidates.iter().enumerate() {
        if !candidate.span.contains(&from) || used.iter().any(|(other, _)| *other == index) {
            continue;
        }
        for to in from + 1..=candidate.span.end.min(blocks) {
            used.push((index, to));
            let found = exhaustive(blocks, to, used, candidates, frames);
            used.pop();
            best = match (best, found) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            };
        }
    }
    best
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn as_good_as_exhaustive_search(
        peers in proptest::collection::vec((0usize..4, 2usize..8, 0.0..0.1f64, 0.001..0.1f64, 0.0..0.2f64), 1..6),
        frames in prop_oneof![Just(1usize), 2usize..40],
    ) {
        let candidates: Vec<_> = peers.iter()
            .map(|&(start, length, link, block, transmission_seconds)| {
                Candidate { transmission_seconds, ..candidate(start..(start + length).min(6), link, block) }
            })
            .collect();
        match (choose(0..6, &candidates, frames), exhaustive(6, 0, &mut Vec::new(), &candidates, frames)) {
            (None, None) => {}
            (Some(choice), Some(best)) => {
                let hops = &choice.hops;
                prop_assert_eq!(hops.first().unwrap().blocks.start, 0);
                prop_assert!(hops.windows(2).all(|pair| pair[0].blocks.end == pair[1].blocks.start));
                prop_assert_eq!(hops.last().unwrap().blocks.end, 6);
                let peers: std::collections::HashSet<_> = hops.iter().map(|hop| hop.peer).collect();
                prop_assert_eq!(peers.len(), hops.len());
                prop_assert!((choice.seconds - seconds(hops, &candidates, frames)).abs() < 1e-9);
                prop_assert!((choice.seconds - best).abs() < 1e-9, "found {}, and the best takes {}", choice.seconds, best);
            }
            (found, best) => prop_assert!(false, "found {found:?}, and the best takes {best:?}"),
        }
    }
}

/// A thousand peers of all speeds and distances, on 128 blocks.
fn large_swarm() -> Vec<Candidate> {
    let mut state = 7u32;
    let mut next = |below: usize| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as usize % below
    };
    let peers = (0..1000).map(|_| {
        let length = 4 + next(29);
        let start = next(128 - length + 1);
        let link_seconds = 0.001 + next(1000) as f64 * 1e-4;
        let block_seconds = 1e-4 * (1 + next(100)) as f64;
        let transmission_seconds = 1e-3 * (1 + next(100)) as f64;
        Candidate { transmission_seconds, ..candidate(start..start + length, link_seconds, block_seconds) }
    });
    peers.collect()
}

/// A way is weighed in some nanoseconds: 5 ms are about a million of them.
#[test]
fn a_large_swarm_takes_bounded_work() {
    let candidates = large_swarm();
    for frames in [1, 32] {
        let started = std::time::Instant::now();
        let choice = choose(0..128, &candidates, frames).unwrap();
        eprintln!(
            "{frames} frames: {} hops, {} ways weighed, {:?}",
            choice.hops.len(),
            choice.weighed,
            started.elapsed()
        );
        assert!(choice.weighed < 1_000_000, "{}", choice.weighed);
    }
}
