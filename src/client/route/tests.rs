//! Tests of the choice of routes: against exhaustive search, and how much work a large swarm makes.

use libp2p::identity::Keypair;
use proptest::prelude::*;

use super::*;

fn candidate(span: Range<usize>, delay_seconds: f64, block_seconds: f64) -> Candidate {
    let peer = Keypair::generate_ed25519().public().to_peer_id();
    Candidate { peer, span, delay_seconds, wait_seconds: 0.0, transmission_seconds: 0.0, block_seconds }
}

type Legs = HashMap<(PeerId, PeerId), f64>;

fn task<'a>(blocks: Range<usize>, candidates: &'a [Candidate], frames: usize, legs: &'a Legs) -> Task<'a> {
    Task { blocks, candidates, frames, legs }
}

fn choose(blocks: Range<usize>, candidates: &[Candidate], frames: usize) -> Option<Choice> {
    super::choose(&task(blocks, candidates, frames, &Legs::new()))
}

fn seconds(hops: &[Hop], candidates: &[Candidate], frames: usize) -> f64 {
    super::seconds(&task(0..0, candidates, frames, &Legs::new()), hops)
}

fn spans(blocks: Range<usize>, candidates: &[Candidate], frames: usize) -> Option<Vec<Range<usize>>> {
    Some(choose(blocks, candidates, frames)?.hops.into_iter().map(|hop| hop.blocks).collect())
}

#[test]
fn one_peer_that_serves_all_beats_two_on_equal_links() {
    let candidates = [candidate(0..4, 0.01, 0.001), candidate(4..8, 0.01, 0.001), candidate(0..8, 0.01, 0.001)];
    let choice = choose(0..8, &candidates, 1).unwrap();
    assert_eq!(choice.hops, [Hop { peer: candidates[2].peer, blocks: 0..8 }]);
    assert!((choice.seconds - 0.028).abs() < 1e-12, "there and back: {}", choice.seconds);
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
fn a_far_hop_is_as_far_at_the_end_as_at_the_beginning() {
    let (near, far) = (candidate(0..4, 0.001, 0.0), candidate(4..8, 0.05, 0.0));
    let (far_first, near_last) = (Candidate { span: 0..4, ..far.clone() }, Candidate { span: 4..8, ..near.clone() });
    let (one, other) = ([near, far], [far_first, near_last]);
    let (ends_far, begins_far) = (choose(0..8, &one, 1).unwrap().seconds, choose(0..8, &other, 1).unwrap().seconds);
    assert!((ends_far - begins_far).abs() < 1e-12, "{ends_far} {begins_far}");
    // A middling peer that serves all is nearer than both together, and than itself behind the near one.
    let all = candidate(0..8, 0.03, 0.0);
    let found = spans(0..8, &[one[0].clone(), one[1].clone(), all], 1).unwrap();
    assert!(matches!(&found[..], [span] if *span == (0..8)), "{found:?}");
}

#[test]
fn what_steps_have_told_of_a_leg_counts() {
    let candidates = [candidate(0..4, 0.05, 0.0), candidate(4..8, 0.05, 0.0), candidate(4..8, 0.045, 0.0)];
    let supposed = choose(0..8, &candidates, 1).unwrap();
    assert_eq!(supposed.hops[1].peer, candidates[2].peer);
    // Two of them stand side by side; given in either order.
    for (one, other) in [(0, 1), (1, 0)] {
        let legs = Legs::from([((candidates[one].peer, candidates[other].peer), 0.001)]);
        let told = super::choose(&task(0..8, &candidates, 1, &legs)).unwrap();
        assert_eq!(told.hops[1].peer, candidates[1].peer);
        assert!((told.seconds - 0.101).abs() < 1e-12, "{}", told.seconds);
    }
}

#[test]
fn many_frames_take_the_wide_link_and_one_takes_the_short_one() {
    let near = Candidate { transmission_seconds: 0.2, ..candidate(0..8, 0.005, 0.001) };
    let wide = Candidate { transmission_seconds: 0.01, ..candidate(0..8, 0.3, 0.001) };
    let through = |frames| choose(0..8, &[near.clone(), wide.clone()], frames).unwrap().hops[0].peer;
    assert_eq!((through(1), through(40)), (near.peer, wide.peer));
}

/// Every route there is, by trying all ends of every hop, each peer once.
fn exhaustive(task: &Task<'_>, from: usize, used: &mut Vec<(usize, usize)>) -> Option<f64> {
    if from == task.blocks.end {
        let hops: Vec<Hop> = used
            .iter()
            .scan(0, |start, &(index, end)| {
                let hop = Hop { peer: task.candidates[index].peer, blocks: *start..end };
                *start = end;
                Some(hop)
            })
            .collect();
        return Some(super::seconds(task, &hops));
    }
    let mut best: Option<f64> = None;
    for (index, candidate) in task.candidates.iter().enumerate() {
        if !candidate.span.contains(&from) || used.iter().any(|(other, _)| *other == index) {
            continue;
        }
        for to in from + 1..=candidate.span.end.min(task.blocks.end) {
            used.push((index, to));
            let found = exhaustive(task, to, used);
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
    #![proptest_config(ProptestConfig::with_cases(500))]
    #[test]
    fn as_good_as_exhaustive_search(
        peers in proptest::collection::vec((0usize..4, 2usize..8, 0.0..0.1f64, 0.001..0.1f64, 0.0..0.2f64), 1..6),
        told in proptest::collection::vec((0usize..6, 0usize..6, 0.0..0.2f64), 0..6),
        frames in prop_oneof![Just(1usize), 2usize..40],
    ) {
        let candidates: Vec<_> = peers.iter()
            .map(|&(start, length, delay, block, transmission_seconds)| {
                Candidate { transmission_seconds, ..candidate(start..(start + length).min(6), delay, block) }
            })
            .collect();
        // Some legs are known; each pair once.
        let legs: Legs = told.iter()
            .filter(|(one, other, _)| one < other && *other < candidates.len())
            .map(|&(one, other, seconds)| ((candidates[one].peer, candidates[other].peer), seconds))
            .collect();
        let task = task(0..6, &candidates, frames, &legs);
        match (super::choose(&task), exhaustive(&task, 0, &mut Vec::new())) {
            (None, None) => {}
            (Some(choice), Some(best)) => {
                let hops = &choice.hops;
                prop_assert_eq!(hops.first().unwrap().blocks.start, 0);
                prop_assert!(hops.windows(2).all(|pair| pair[0].blocks.end == pair[1].blocks.start));
                prop_assert_eq!(hops.last().unwrap().blocks.end, 6);
                let peers: std::collections::HashSet<_> = hops.iter().map(|hop| hop.peer).collect();
                prop_assert_eq!(peers.len(), hops.len());
                prop_assert!((choice.seconds - super::seconds(&task, hops)).abs() < 1e-9);
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
        let delay_seconds = 0.001 + next(1000) as f64 * 1e-4;
        let block_seconds = 1e-4 * (1 + next(100)) as f64;
        let transmission_seconds = 1e-3 * (1 + next(100)) as f64;
        Candidate { transmission_seconds, ..candidate(start..start + length, delay_seconds, block_seconds) }
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
        let legs: Legs = candidates.windows(2).map(|pair| ((pair[0].peer, pair[1].peer), 0.001)).collect();
        let told = super::choose(&task(0..128, &candidates, frames, &legs)).unwrap();
        assert!(told.weighed < 1_000_000, "{}", told.weighed);
    }
}

/// Two dozen peers that all serve everything are as much work as there can be with few.
#[test]
fn peers_that_serve_everything_take_bounded_work() {
    let candidates: Vec<Candidate> =
        large_swarm().into_iter().take(WEIGH_ALL).map(|candidate| Candidate { span: 0..128, ..candidate }).collect();
    let legs: Legs = candidates.windows(2).map(|pair| ((pair[0].peer, pair[1].peer), 0.001)).collect();
    for frames in [1, 32] {
        for legs in [&Legs::new(), &legs] {
            let choice = super::choose(&task(0..128, &candidates, frames, legs)).unwrap();
            assert!(choice.weighed < 1_000_000, "{frames} frames: {}", choice.weighed);
        }
    }
}
