//! What choosing a route costs: 1,000 peers, 128 blocks, against a bar of 5 ms.
//!
//! `cargo bench --bench route`. One frame is a decode token; 32 are a long prompt. In `alike` all peers serve spans that start
//! and end at the same blocks, as they do where nodes choose their own; in `any` no two need to.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::collections::HashMap;

use helion::{
    client::route::{Candidate, Choice, Task},
    swarm::{PeerId, identity::Identity},
};

const PEERS: usize = 1000;
const BLOCKS: usize = 128;

fn main() {
    divan::main();
}

/// Peers of all speeds and distances; spans of up to 32 blocks that start at multiples of `grid`.
fn swarm(grid: usize) -> Vec<Candidate> {
    let mut state = 7u32;
    let mut next = |below: usize| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as usize % below
    };
    let peers = (0..PEERS).map(|_| {
        let length = (4 + next(29)).next_multiple_of(grid);
        let start = next((BLOCKS - length) / grid + 1) * grid;
        Candidate {
            peer: Identity::ephemeral().peer_id(),
            span: start..start + length,
            delay_seconds: 0.001 + next(1000) as f64 * 1e-4,
            wait_seconds: 0.0,
            transmission_seconds: 1e-3 * (1 + next(100)) as f64,
            block_seconds: 1e-4 * (1 + next(100)) as f64,
        }
    });
    peers.collect()
}

fn choose(candidates: &[Candidate], frames: usize, legs: &HashMap<(PeerId, PeerId), f64>) -> Option<Choice> {
    let task = Task { blocks: 0..BLOCKS, candidates, frames, legs };
    helion::client::route::choose(&task)
}

#[divan::bench(args = [1, 4, 32])]
fn alike(bencher: divan::Bencher<'_, '_>, frames: usize) {
    let peers = swarm(8);
    bencher.bench_local(|| choose(&peers, frames, &HashMap::new()).unwrap());
}

#[divan::bench(args = [1, 4, 32])]
fn any(bencher: divan::Bencher<'_, '_>, frames: usize) {
    let peers = swarm(1);
    bencher.bench_local(|| choose(&peers, frames, &HashMap::new()).unwrap());
}

/// As few as are weighed in all ways.
#[divan::bench(args = [1, 32])]
fn two_dozen_peers(bencher: divan::Bencher<'_, '_>, frames: usize) {
    let peers = swarm(8)[..24].to_vec();
    bencher.bench_local(|| choose(&peers, frames, &HashMap::new()));
}

/// Steps have told what lies between two hundred pairs of them.
#[divan::bench(args = [1, 32])]
fn known_legs(bencher: divan::Bencher<'_, '_>, frames: usize) {
    let peers = swarm(8);
    let legs = peers.windows(2).step_by(5).map(|pair| ((pair[0].peer, pair[1].peer), 0.01)).collect();
    bencher.bench_local(|| choose(&peers, frames, &legs).unwrap());
}
