//! Which peers a session runs through: the route that takes the least time for the work ahead, as far as is known.
//!
//! Work goes through a route in frames: a decode token is one, a long prompt is some tens of them that follow each other. The first
//! frame passes all hops one after the other, and each later one comes out as far behind it as the slowest hop is busy with one:
//! `time = Σ legs + Σ (wait + busy) + (frames − 1) · max busy`. One frame is the lowest latency, many are the highest throughput; the
//! procedure is the same.
//!
//! The legs are from the client to the first hop, from hop to hop, and back from the last one. What the client measures is how far
//! each peer is from itself, `d`; a leg between two peers is supposed to take `max(d₁, d₂)`, until steps have told what it takes. (By the
//! ways through the client it takes from `|d₁ − d₂|` to `d₁ + d₂`. Less than the larger one, and a far hop would look nearer by
//! going there through a near one.)
//!
//! It goes through the blocks from the last to the first and keeps, for every block, the ways to the end that no other way beats in
//! both sum and slowest hop, whoever comes in front. That alone could enter a peer twice, which a session can't; where the best way
//! does, it branches on where that peer runs (before, behind, or across the second entry) and takes the best of the branches. Time and
//! clock are arguments; nothing here waits or asks.

use std::{collections::HashMap, ops::Range};

use libp2p::PeerId;

/// A peer that could be a hop.
#[derive(Debug, Clone, PartialEq)]
pub struct Candidate {
    /// Who.
    pub peer: PeerId,
    /// The blocks it serves; a hop may run any part of them.
    pub span: Range<usize>,
    /// The one-way delay between the client and it, seconds.
    pub delay_seconds: f64,
    /// What passing a frame to it costs besides, however many follow, seconds: waiting for its turn.
    pub wait_seconds: f64,
    /// How long a frame keeps the link to it busy, seconds: its bytes over the bandwidth.
    pub transmission_seconds: f64,
    /// What one block costs it, seconds a frame.
    pub block_seconds: f64,
}

impl Candidate {
    /// How long a frame keeps it, or the link to it, busy when it runs so many blocks.
    fn busy_seconds(&self, blocks: usize) -> f64 {
        self.transmission_seconds.max(self.block_seconds * blocks as f64)
    }

    /// What the first frame takes there, without the legs to it and from it.
    pub(super) fn first_seconds(&self, blocks: usize) -> f64 {
        self.wait_seconds + self.transmission_seconds + self.block_seconds * blocks as f64
    }
}

/// What a route is wanted for. It begins and ends at the client; for a gap between other hops, these are supposed to be as far from the
/// candidates as the client is.
#[derive(Debug, Clone)]
pub struct Task<'a> {
    /// What it has to run.
    pub blocks: Range<usize>,
    /// Who could.
    pub candidates: &'a [Candidate],
    /// At least one.
    pub frames: usize,
    /// One-way delays between peers, seconds, where they are known; each pair once.
    pub legs: &'a HashMap<(PeerId, PeerId), f64>,
}

/// One hop of a route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hop {
    /// Who.
    pub peer: PeerId,
    /// The blocks that it runs in this route.
    pub blocks: Range<usize>,
}

/// A route and what it takes.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// In the order of their blocks.
    pub hops: Vec<Hop>,
    /// For all frames.
    pub seconds: f64,
    /// Ways that were weighed: a measure of the work that does not depend on the machine.
    pub weighed: usize,
}

/// Up to so many candidates, all are weighed, in all ways: the choice is the best there is. With more, only those that are among the
/// [`BEST_OF_A_BLOCK`] of some block: a route has a few hops, and the others differ by little.
const WEIGH_ALL: usize = 24;
const BEST_OF_A_BLOCK: usize = 6;

/// Ways to the end that are kept for a block, where not all are weighed.
const WAYS: usize = 6;

/// The same where all are weighed: whatever numbers peers announce, no more are worth their time.
const MOST_WAYS: usize = 256;

/// Runs of blocks that a single search may look at: where peers with long spans have more, cuts lie on a grid, and the best may be missed.
const MOST_RUNS: usize = 20_000;

/// Once so many ways are weighed, no more branches are looked into where a peer would be entered twice: its entries are joined.
const MOST_WEIGHED: usize = 300_000;

/// The fastest route for a task, or `None` where the candidates don't cover its blocks.
///
/// A single frame enters and leaves spans only where some span starts or ends: a cut elsewhere never pays, as block times are
/// linear. With several, a cut anywhere may even out the hops; and where legs are known, a hop between two others may be worth a block
/// of its own. Few candidates with spans of usual length are weighed exactly; a swarm that is too large for that in all that matters.
pub fn choose(task: &Task<'_>) -> Option<Choice> {
    let later_frames = task.frames.saturating_sub(1) as f64;
    let promising = promising(&task.blocks, task.candidates, later_frames);
    let legs = KnownLegs::among(&promising, task.legs);
    let all: Vec<Runner<'_>> = promising.into_iter().map(Runner::of).collect();
    // With several frames, or known legs, a cut anywhere may pay; with these more ways are kept as well.
    let cuts_anywhere = later_frames > 0.0 || legs.are_there;
    let runs: usize =
        all.iter().map(|runner| runner.span.len().pow(2) / 2).sum::<usize>() * (1 + 3 * usize::from(legs.are_there));
    let grid = match (cuts_anywhere, runs.div_ceil(MOST_RUNS).max(1)) {
        (false, _) => None,
        (true, 1) => Some(1),
        (true, _) if later_frames == 0.0 => None,
        (true, times) => Some((times as f64).sqrt().ceil() as usize),
    };
    let is_rough = task.candidates.len() > WEIGH_ALL || grid.is_some_and(|grid| grid > 1);
    let search = Search { task, later_frames, is_rough, legs, grid };
    let mut weighed = 0;
    let mut best: Option<(f64, Vec<Hop>)> = None;
    // Branches with the best that their ways may come to: none that is entered twice is as good as that.
    let mut open: Vec<(Found, Vec<Runner<'_>>)> = Vec::new();
    open.extend(search.fastest(&all, &mut weighed).map(|way| (way, all)));
    while let Some(least) = (0..open.len()).min_by(|a, b| open[*a].0.seconds.total_cmp(&open[*b].0.seconds)) {
        let (way, runners) = open.swap_remove(least);
        if best.as_ref().is_some_and(|(seconds, _)| *seconds <= way.seconds) {
            break;
        }
        let Some((peer, second_entry)) = entered_twice(&way.hops) else {
            best = Some((way.seconds, way.hops));
            break;
        };
        let joined = join(way.hops);
        let seconds = seconds(task, &joined);
        if best.as_ref().is_none_or(|(known, _)| seconds < *known) {
            best = Some((seconds, joined));
        }
        if weighed > MOST_WEIGHED {
            break;
        }
        for place in Place::ALL {
            let mut runners = runners.clone();
            for runner in runners.iter_mut().filter(|runner| runner.candidate.peer == peer) {
                runner.restrict(place, second_entry);
            }
            open.extend(search.fastest(&runners, &mut weighed).map(|way| (way, runners)));
        }
    }
    best.map(|(seconds, hops)| Choice { hops, seconds, weighed })
}

/// What a route takes, its hops being among the task's candidates; infinity where one is not.
pub fn seconds(task: &Task<'_>, hops: &[Hop]) -> f64 {
    let (mut sum, mut slowest) = (0.0, 0f64);
    let mut before: Option<&Candidate> = None;
    for hop in hops {
        let Some(candidate) = task.candidates.iter().find(|candidate| candidate.peer == hop.peer) else {
            return f64::INFINITY;
        };
        sum += before.map_or(candidate.delay_seconds, |before| leg_seconds(before, candidate, task.legs));
        sum += candidate.first_seconds(hop.blocks.len());
        slowest = slowest.max(candidate.busy_seconds(hop.blocks.len()));
        before = Some(candidate);
    }
    sum += before.map_or(0.0, |last| last.delay_seconds);
    sum + task.frames.saturating_sub(1) as f64 * slowest
}

/// A leg between two peers: as it is known, or supposed.
fn leg_seconds(one: &Candidate, other: &Candidate, legs: &HashMap<(PeerId, PeerId), f64>) -> f64 {
    let known = legs.get(&(one.peer, other.peer)).or_else(|| legs.get(&(other.peer, one.peer)));
    known.copied().unwrap_or_else(|| supposed_leg_seconds(one.delay_seconds, other.delay_seconds))
}

/// What a leg is supposed to take between two peers that are so far from the client, seconds.
pub(super) fn supposed_leg_seconds(one: f64, other: f64) -> f64 {
    one.max(other)
}

/// The legs that are known between candidates, by their numbers.
#[derive(Default)]
struct KnownLegs {
    /// Of each candidate: to whom, and how many seconds more than is supposed.
    of: Vec<Vec<(usize, f64)>>,
    /// The least and the most of these, and of none.
    bounds: Vec<(f64, f64)>,
    are_there: bool,
}

impl KnownLegs {
    fn among(candidates: &[&Candidate], legs: &HashMap<(PeerId, PeerId), f64>) -> Self {
        let mut known = Self {
            of: vec![Vec::new(); candidates.len()],
            bounds: vec![(0.0, 0.0); candidates.len()],
            are_there: false,
        };
        if legs.is_empty() {
            return known;
        }
        let numbers: HashMap<PeerId, usize> =
            candidates.iter().enumerate().map(|(number, candidate)| (candidate.peer, number)).collect();
        for (pair, seconds) in legs {
            let (Some(&one), Some(&other)) = (numbers.get(&pair.0), numbers.get(&pair.1)) else { continue };
            let supposed = supposed_leg_seconds(candidates[one].delay_seconds, candidates[other].delay_seconds);
            for (from, to) in [(one, other), (other, one)] {
                known.of[from].push((to, seconds - supposed));
                let (least, most) = &mut known.bounds[from];
                (*least, *most) = (least.min(seconds - supposed), most.max(seconds - supposed));
            }
            known.are_there = true;
        }
        known
    }

    fn difference(&self, from: usize, to: usize) -> f64 {
        self.of[from].iter().find(|(other, _)| *other == to).map_or(0.0, |(_, difference)| *difference)
    }
}

/// The candidates that are worth weighing, in their order.
fn promising<'a>(blocks: &Range<usize>, candidates: &'a [Candidate], later_frames: f64) -> Vec<&'a Candidate> {
    if candidates.len() <= WEIGH_ALL {
        return candidates.iter().collect();
    }
    // What a block would take if all were run by such a peer, over its whole span.
    let merit = |candidate: &Candidate| {
        let length = candidate.span.len().max(1);
        (candidate.delay_seconds
            + candidate.first_seconds(length)
            + later_frames * (candidate.block_seconds * length as f64 + candidate.transmission_seconds))
            / length as f64
    };
    let mut by_merit: Vec<(f64, usize)> = candidates.iter().map(merit).zip(0..).collect();
    by_merit.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut better = vec![0; blocks.len()];
    let mut chosen: Vec<usize> = Vec::new();
    for (_, index) in by_merit {
        let span = &candidates[index].span;
        let (start, end) = (span.start.max(blocks.start), span.end.min(blocks.end));
        if start < end && better[start - blocks.start..end - blocks.start].iter().any(|count| *count < BEST_OF_A_BLOCK)
        {
            better[start - blocks.start..end - blocks.start].iter_mut().for_each(|count| *count += 1);
            chosen.push(index);
        }
    }
    chosen.sort_unstable();
    chosen.into_iter().map(|index| &candidates[index]).collect()
}

/// Where a peer may run, against a block that it would enter a second time.
#[derive(Debug, Clone, Copy)]
enum Place {
    Before,
    Behind,
    Across,
}

impl Place {
    const ALL: [Self; 3] = [Self::Before, Self::Behind, Self::Across];
}

/// A candidate, and where it may run in this branch.
#[derive(Debug, Clone)]
struct Runner<'a> {
    candidate: &'a Candidate,
    span: Range<usize>,
    /// Blocks that a run of it has to hold together with the one before each.
    across: Vec<usize>,
}

impl<'a> Runner<'a> {
    fn of(candidate: &'a Candidate) -> Self {
        Self { candidate, span: candidate.span.clone(), across: Vec::new() }
    }

    fn restrict(&mut self, place: Place, block: usize) {
        match place {
            Place::Before => self.span.end = self.span.end.min(block),
            Place::Behind => self.span.start = self.span.start.max(block),
            Place::Across => self.across.push(block),
        }
    }

    fn may_run(&self, blocks: &Range<usize>) -> bool {
        self.across.iter().all(|block| blocks.start < *block && *block < blocks.end)
    }
}

/// A way from a block to the end.
#[derive(Debug, Clone, Copy)]
struct Way {
    /// Without the leg to its first hop.
    sum: f64,
    /// How far its first hop is from the client, seconds.
    delay: f64,
    slowest: f64,
    /// Who runs its first blocks, up to which boundary, and which of the ways from there it goes on with; none at the end.
    first: Option<(usize, usize, usize)>,
}

struct Found {
    hops: Vec<Hop>,
    seconds: f64,
}

struct Search<'a> {
    task: &'a Task<'a>,
    later_frames: f64,
    /// Keeps only [`WAYS`] ways, none of which enters a peer twice: nothing is left to branch on, and the best may be missed.
    is_rough: bool,
    legs: KnownLegs,
    /// Cuts may lie at multiples of this many blocks; everywhere they may lie where spans start and end.
    grid: Option<usize>,
}

impl Search<'_> {
    /// The fastest way, which may enter a peer twice.
    fn fastest(&self, runners: &[Runner<'_>], weighed: &mut usize) -> Option<Found> {
        let boundaries = self.boundaries(runners);
        let last = boundaries.len() - 1;
        let mut ways: Vec<Vec<Way>> = vec![Vec::new(); boundaries.len()];
        ways[last].push(Way { sum: 0.0, delay: 0.0, slowest: 0.0, first: None });
        for from in (0..last).rev() {
            let mut found = Vec::new();
            for (index, runner) in runners.iter().enumerate() {
                if !runner.span.contains(&boundaries[from]) {
                    continue;
                }
                for to in from + 1..=last {
                    if boundaries[to] > runner.span.end {
                        break;
                    }
                    let run = boundaries[from]..boundaries[to];
                    if ways[to].is_empty() || !runner.may_run(&run) {
                        continue;
                    }
                    let delay = runner.candidate.delay_seconds;
                    let first = runner.candidate.first_seconds(run.len());
                    let busy = runner.candidate.busy_seconds(run.len());
                    *weighed += ways[to].len();
                    for (rest, way) in ways[to].iter().enumerate() {
                        if self.is_rough && runs_in(&ways, way, index) {
                            continue;
                        }
                        let leg = way.first.map_or(delay, |(next, ..)| {
                            supposed_leg_seconds(delay, way.delay) + self.legs.difference(index, next)
                        });
                        let (sum, slowest) = (first + leg + way.sum, busy.max(way.slowest));
                        self.keep(&mut found, Way { sum, delay, slowest, first: Some((index, to, rest)) });
                    }
                }
            }
            ways[from] = found;
        }
        let total = |way: &Way| way.delay + way.sum + self.later_frames * way.slowest;
        let mut way = *ways[0].iter().min_by(|a, b| total(a).total_cmp(&total(b)))?;
        let seconds = total(&way);
        let (mut hops, mut at): (Vec<Hop>, usize) = (Vec::new(), 0);
        while let Some((index, to, rest)) = way.first {
            hops.push(Hop { peer: runners[index].candidate.peer, blocks: boundaries[at]..boundaries[to] });
            (at, way) = (to, ways[to][rest]);
        }
        Some(Found { hops, seconds })
    }

    fn boundaries(&self, runners: &[Runner<'_>]) -> Vec<usize> {
        let blocks = &self.task.blocks;
        if self.grid == Some(1) {
            return (blocks.start..=blocks.end).collect();
        }
        let of = |runner: &Runner<'_>| [runner.span.start, runner.span.end].into_iter().chain(runner.across.clone());
        let mut boundaries: Vec<usize> = runners.iter().flat_map(of).collect();
        boundaries.extend([blocks.start, blocks.end]);
        boundaries.extend(self.grid.into_iter().flat_map(|grid| blocks.clone().step_by(grid)));
        boundaries.retain(|boundary| (blocks.start..=blocks.end).contains(boundary));
        boundaries.sort_unstable();
        boundaries.dedup();
        boundaries
    }

    /// Keeps a way, unless another one is as good in both respects; where there are many, those with the least in all.
    fn keep(&self, ways: &mut Vec<Way>, new: Way) {
        // Whoever comes in front may be nearer to the one than to the other: by what their delays differ, or by what is known of legs.
        let number = |way: &Way| way.first.map(|(runner, ..)| runner);
        let bounds = |way: &Way| number(way).map_or((0.0, 0.0), |runner| self.legs.bounds[runner]);
        let is_as_near = |a: &Way, b: &Way| {
            let farther = (a.delay - b.delay).max(0.0);
            let known = if number(a) == number(b) { 0.0 } else { bounds(a).1 - bounds(b).0 };
            a.sum + farther + known <= b.sum
        };
        let is_as_good = |a: &Way, b: &Way| is_as_near(a, b) && (self.later_frames == 0.0 || a.slowest <= b.slowest);
        if ways.iter().any(|way| is_as_good(way, &new)) {
            return;
        }
        ways.retain(|way| !is_as_good(&new, way));
        ways.push(new);
        if ways.len() > if self.is_rough { WAYS } else { MOST_WAYS } {
            let total = |way: &Way| way.delay + way.sum + self.later_frames * way.slowest;
            let worst = (0..ways.len()).max_by(|a, b| total(&ways[*a]).total_cmp(&total(&ways[*b])));
            worst.map(|worst| ways.swap_remove(worst));
        }
    }
}

/// Whether a runner has a place in a way already.
fn runs_in(ways: &[Vec<Way>], way: &Way, runner: usize) -> bool {
    let mut next = way.first;
    while let Some((index, to, rest)) = next {
        if index == runner {
            return true;
        }
        next = ways[to][rest].first;
    }
    false
}

/// A peer that has two places, and the block where the second begins.
fn entered_twice(hops: &[Hop]) -> Option<(PeerId, usize)> {
    let again = |(index, hop): (usize, &Hop)| {
        hops[..index].iter().any(|before| before.peer == hop.peer).then_some((hop.peer, hop.blocks.start))
    };
    hops.iter().enumerate().find_map(again)
}

/// Whoever is entered twice runs what lies between as well: its span covers it.
fn join(way: Vec<Hop>) -> Vec<Hop> {
    let mut hops: Vec<Hop> = Vec::new();
    for hop in way {
        match hops.iter().position(|before| before.peer == hop.peer) {
            Some(first) => {
                hops.truncate(first + 1);
                hops[first].blocks.end = hop.blocks.end;
            }
            None => hops.push(hop),
        }
    }
    hops
}

#[cfg(test)]
mod tests;
