//! From a view of the swarm to hops: who may be one, and what is known of its speed.

use std::{
    collections::{HashMap, HashSet},
    ops::Range,
    time::{Duration, Instant},
};

use libp2p::PeerId;

use super::{
    route::{self, Candidate, Task},
    session::RouteHop,
    view::{PeerView, SwarmView},
};
use crate::swarm::{announcement::Announcement, ticket::SessionLimits};

/// A one-way delay that was not measured, seconds.
const UNKNOWN_LINK_SECONDS: f64 = 1.0;

/// What passing a frame costs a hop besides the link's delay, seconds.
const HOP_SECONDS: f64 = 3e-4;

/// What a peer costs whose cache has no room for what the session needs soon: it may have when it is needed, so it is used where there
/// is nobody else, or all others are far worse.
const FULL_CACHE_SECONDS: f64 = 5.0;

/// What a peer costs whose cache would just be filled; one with more room costs less, by the square: among equals, the one with more.
const CROWDED_CACHE_SECONDS: f64 = 0.02;

/// Tokens of each lane that have to find room soon, behind those that are there already. How long a session will get in the end nobody
/// knows: a chat may, and seldom does, fill the model's context.
const SOON_TOKENS: u64 = 512;

/// Frames that a route for throughput is chosen for, and the rows of one, where the work has fewer.
const MANY_FRAMES: usize = 32;
const USUAL_CHUNK: usize = 128;

/// From so many frames on a prompt is long enough for the links' bandwidth to be worth a measurement.
const LONG_FRAMES: usize = 4;

/// What a route is chosen for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RouteMode {
    /// What the work is: a long prompt goes by throughput, token after token by latency, and both together by what they take.
    #[default]
    Auto,
    /// One token as soon as possible, whatever the prompt takes.
    Latency,
    /// As many tokens a second as possible, of a long prompt, whatever a single one takes.
    Throughput,
}

impl RouteMode {
    /// As the command line names them.
    pub const NAMES: [(&str, Self); 3] =
        [("auto", Self::Auto), ("latency", Self::Latency), ("throughput", Self::Throughput)];
}

impl std::str::FromStr for RouteMode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::NAMES.into_iter().find(|(name, _)| *name == text);
        found.map(|(_, mode)| mode).ok_or_else(|| "the choices are auto, latency and throughput".to_owned())
    }
}

impl std::fmt::Display for RouteMode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let name = Self::NAMES.into_iter().find(|(_, mode)| mode == self).map_or("auto", |(name, _)| name);
        f.pad(name)
    }
}

/// Which peers the user wants as hops.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PeerRules {
    /// These, in this order; empty: whichever are best. Where one is lost, another peer may take its place.
    pub route: Vec<PeerId>,
    /// Only these; empty: all.
    pub allow: HashSet<PeerId>,
    /// Not these.
    pub block: HashSet<PeerId>,
}

/// The user's route can't be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadRoute {
    /// A peer is not in the swarm, does not answer, or is excluded by another rule.
    #[error("--route names {0}, which does not serve this model now")]
    Absent(PeerId),
    /// The spans don't join.
    #[error("--route names {peer}, which serves blocks {}:{}, and block {needed} is needed there", span.start, span.end)]
    DoesNotJoin {
        /// Who.
        peer: PeerId,
        /// What it serves.
        span: Range<usize>,
        /// What is needed.
        needed: usize,
    },
    /// The route ends early.
    #[error("--route ends at block {0}: name peers for the rest, too")]
    EndsEarly(usize),
}

impl PeerRules {
    /// Whether a peer may be a hop at all.
    pub fn allows(&self, peer: PeerId) -> bool {
        !self.block.contains(&peer) && (self.allow.is_empty() || self.allow.contains(&peer))
    }

    /// The hops of the user's own route; `None` where there is none.
    ///
    /// # Errors
    /// [`BadRoute`] where it does not cover the model.
    pub fn given(&self, view: &SwarmView) -> Result<Option<Vec<RouteHop>>, BadRoute> {
        if self.route.is_empty() {
            return Ok(None);
        }
        let mut hops: Vec<RouteHop> = Vec::new();
        let mut start = 0;
        for &peer in &self.route {
            let found = view.online().find(|view| view.announcement.peer_id == peer && self.allows(peer));
            let announcement = found.ok_or(BadRoute::Absent(peer))?.announcement.clone();
            let span = announcement.span.clone();
            if !span.contains(&start) {
                return Err(BadRoute::DoesNotJoin { peer, span, needed: start });
            }
            hops.push(RouteHop { announcement, blocks: start..span.end });
            start = span.end;
        }
        if start < view.blocks { Err(BadRoute::EndsEarly(start)) } else { Ok(Some(hops)) }
    }
}

/// What a session is for: what a route is chosen by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Work {
    /// Rows of the prompt, sent in frames that follow each other.
    pub prompt: usize,
    /// Rows of one such frame.
    pub chunk: usize,
    /// Tokens after the prompt, each of which waits for the one before.
    pub tokens: usize,
}

impl Work {
    /// Token after token: the route with the lowest latency.
    pub const DECODE: Self = Self { prompt: 0, chunk: 1, tokens: 1 };

    /// A long prompt and nothing else: the route with the highest throughput.
    pub fn prompt(rows: usize, chunk: usize) -> Self {
        Self { prompt: rows, chunk, tokens: 0 }
    }

    /// As the user wants it looked at.
    pub(crate) fn seen_as(self, mode: RouteMode) -> Self {
        match mode {
            RouteMode::Auto => self,
            RouteMode::Latency => Self::DECODE,
            RouteMode::Throughput => {
                let chunk = if self.prompt > 0 { self.chunk.max(1) } else { USUAL_CHUNK };
                Self::prompt(self.prompt.max(MANY_FRAMES * chunk), chunk)
            }
        }
    }

    fn frames(&self) -> usize {
        self.prompt.div_ceil(self.chunk.max(1))
    }

    /// Whether bandwidth matters.
    pub(crate) fn is_long(&self) -> bool {
        self.frames() >= LONG_FRAMES
    }
}

/// The room that a session needs soon which holds, or is going to hold, so many tokens.
pub(crate) fn room_soon(tokens: usize, limits: &SessionLimits) -> u64 {
    (tokens as u64).saturating_add(u64::from(limits.max_lanes).saturating_mul(SOON_TOKENS)).min(limits.max_tokens)
}

/// A choice among the peers of a view, for some work.
pub(crate) struct Chooser<'a> {
    pub(crate) view: &'a SwarmView,
    pub(crate) work: Work,
    /// Bytes of a row on the wire.
    pub(crate) row_bytes: usize,
    /// Tokens that the session needs room for soon.
    pub(crate) room: u64,
    /// What is known of the delays between peers, as [`route::Task`] has it.
    pub(crate) legs: HashMap<(PeerId, PeerId), f64>,
}

impl Chooser<'_> {
    /// The hops for `blocks` among the online peers that `may_be` one, through which the work takes the least time; `None` where they
    /// don't cover them.
    ///
    /// The fastest route for one token and the one for the prompt's frames are compared by the whole work. Where it is nearly all
    /// tokens or nearly all prompt, that is the best there is.
    pub(crate) fn fastest(&self, blocks: Range<usize>, may_be: impl Fn(&PeerView) -> bool) -> Option<Vec<RouteHop>> {
        let usable: Vec<&PeerView> = self.view.online().filter(|peer| may_be(peer)).collect();
        let now = Instant::now();
        let of_tokens: Vec<Candidate> = usable.iter().map(|peer| self.candidate(peer, 1, now)).collect();
        let token = self.task(blocks.clone(), &of_tokens, 1);
        let mut hops = route::choose(&token)?.hops;
        let frames = self.work.frames();
        if frames > 1 {
            let rows = self.work.chunk.min(self.work.prompt);
            let of_frames: Vec<Candidate> = usable.iter().map(|peer| self.candidate(peer, rows, now)).collect();
            let prompt = self.task(blocks, &of_frames, frames);
            let for_frames = route::choose(&prompt)?.hops;
            let whole = |hops: &[route::Hop]| {
                route::seconds(&prompt, hops) + self.work.tokens as f64 * route::seconds(&token, hops)
            };
            if whole(&for_frames) < whole(&hops) {
                hops = for_frames;
            }
        }
        let announced: HashMap<PeerId, &Announcement> =
            usable.iter().map(|peer| (peer.announcement.peer_id, &peer.announcement)).collect();
        hops.into_iter()
            .map(|hop| Some(RouteHop { announcement: (*announced.get(&hop.peer)?).clone(), blocks: hop.blocks }))
            .collect()
    }

    /// What a token takes through these hops, and what `rows` take that are told again to the ones that `are_new`, seconds.
    pub(crate) fn token_and_replay_seconds(
        &self,
        hops: &[RouteHop],
        rows: usize,
        are_new: impl Fn(&RouteHop) -> bool,
    ) -> (f64, f64) {
        let now = Instant::now();
        let find =
            |hop: &RouteHop| self.view.peers.iter().find(|peer| peer.announcement.peer_id == hop.announcement.peer_id);
        let Some(peers) = hops.iter().map(find).collect::<Option<Vec<&PeerView>>>() else {
            return (f64::INFINITY, f64::INFINITY);
        };
        let candidates: Vec<Candidate> = peers.iter().map(|peer| self.candidate(peer, 1, now)).collect();
        let run: Vec<route::Hop> =
            hops.iter().map(|hop| route::Hop { peer: hop.announcement.peer_id, blocks: hop.blocks.clone() }).collect();
        let token = route::seconds(&self.task(0..self.view.blocks, &candidates, 1), &run);
        let new = hops.iter().zip(peers).filter(|(hop, _)| are_new(hop));
        let replay = new.map(|(hop, peer)| {
            let candidate = self.candidate(peer, rows.max(1), now);
            candidate.delay_seconds + candidate.first_seconds(hop.blocks.len())
        });
        (token, replay.sum())
    }

    fn task<'b>(&'b self, blocks: Range<usize>, candidates: &'b [Candidate], frames: usize) -> Task<'b> {
        Task { blocks, candidates, frames, legs: &self.legs }
    }

    /// What is known of a peer, for frames of so many rows.
    fn candidate(&self, peer: &PeerView, rows: usize, now: Instant) -> Candidate {
        let (said, speeds) = (&peer.announcement, &peer.speeds);
        let speed = said.compute_tokens_per_second * said.span.len() as f64;
        let announced = (speed > 0.0).then(|| 1.0 / speed);
        let load = speeds.load(now);
        // Each of the steps that wait there runs through its span.
        let queue = f64::from(load.map_or(said.queue, |load| load.queue));
        let queue_seconds = queue * said.span.len() as f64 * speeds.block_seconds(1, announced, now);
        let room = load.map_or(said.cache_tokens_left, |load| load.cache_tokens_left);
        // Some nodes don't say how much they hold.
        let cache_seconds = if said.cache_tokens_total == 0 {
            0.0
        } else if room < self.room {
            FULL_CACHE_SECONDS
        } else {
            CROWDED_CACHE_SECONDS * (self.room as f64 / room.max(1) as f64).powi(2)
        };
        Candidate {
            peer: said.peer_id,
            span: said.span.clone(),
            delay_seconds: delay_seconds(peer.rtt),
            wait_seconds: HOP_SECONDS + speeds.wait_seconds(queue_seconds, now) + cache_seconds,
            transmission_seconds: speeds.transmission_seconds(rows * self.row_bytes),
            block_seconds: speeds.block_seconds(rows, announced, now),
        }
    }
}

/// The one-way delay to a peer, by its round trip.
fn delay_seconds(rtt: Option<Duration>) -> f64 {
    rtt.map_or(UNKNOWN_LINK_SECONDS, |rtt| rtt.as_secs_f64() / 2.0)
}

/// What the legs between the hops of a route took together, seconds, where a step alone in it took `step` and the hops `spent` of that;
/// `None` where the legs of the client are not known.
pub(crate) fn between_hops_seconds(step: Duration, spent: Duration, rtts: &[Option<Duration>]) -> Option<f64> {
    let (Some(Some(first)), Some(Some(last))) = (rtts.first(), rtts.last()) else { return None };
    let ends = (first.as_secs_f64() + last.as_secs_f64()) / 2.0;
    Some((step.as_secs_f64() - spent.as_secs_f64() - ends - HOP_SECONDS * rtts.len() as f64).max(0.0))
}

/// What is supposed of the leg between two peers, seconds, by the round trips to them.
pub(crate) fn supposed_leg_seconds(one: Option<Duration>, other: Option<Duration>) -> f64 {
    route::supposed_leg_seconds(delay_seconds(one), delay_seconds(other))
}

#[cfg(test)]
mod tests;
