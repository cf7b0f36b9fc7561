//! From a view of the swarm to hops: who may be one, and what is known of its speed.

use std::{
    collections::{HashMap, HashSet},
    ops::Range,
    time::Instant,
};

use libp2p::PeerId;

use super::{
    route::{self, Candidate},
    session::RouteHop,
    view::{PeerView, SwarmView},
};
use crate::swarm::announcement::Announcement;

/// A one-way delay that was not measured, seconds.
const UNKNOWN_LINK_SECONDS: f64 = 1.0;

/// What passing a frame costs a hop besides the link's delay, seconds.
const HOP_SECONDS: f64 = 3e-4;

/// What a peer costs whose cache has no room for the whole session: it may have when it is needed, so it is used where there is
/// nobody else, or all others are far worse.
const FULL_CACHE_SECONDS: f64 = 5.0;

/// From so many frames on a prompt is long enough for the links' bandwidth to be worth a measurement.
const LONG_FRAMES: usize = 4;

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

    fn frames(&self) -> usize {
        self.prompt.div_ceil(self.chunk.max(1))
    }

    /// Whether bandwidth matters.
    pub(crate) fn is_long(&self) -> bool {
        self.frames() >= LONG_FRAMES
    }
}

/// A choice among the peers of a view, for some work.
pub(crate) struct Chooser<'a> {
    pub(crate) view: &'a SwarmView,
    pub(crate) work: Work,
    /// Bytes of a row on the wire.
    pub(crate) row_bytes: usize,
    /// Tokens that the session may come to hold.
    pub(crate) room: u64,
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
        let for_tokens = route::choose(blocks.clone(), &of_tokens, 1)?;
        let frames = self.work.frames();
        let mut hops = for_tokens.hops;
        if frames > 1 {
            let rows = self.work.chunk.min(self.work.prompt);
            let of_frames: Vec<Candidate> = usable.iter().map(|peer| self.candidate(peer, rows, now)).collect();
            let for_frames = route::choose(blocks, &of_frames, frames)?.hops;
            let whole = |hops: &[route::Hop]| {
                route::seconds(hops, &of_frames, frames) + self.work.tokens as f64 * route::seconds(hops, &of_tokens, 1)
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
        let (mut token, mut replay) = (0.0, 0.0);
        for hop in hops {
            let Some(peer) = self.view.peers.iter().find(|peer| peer.announcement.peer_id == hop.announcement.peer_id)
            else {
                return (f64::INFINITY, f64::INFINITY);
            };
            let (one, all) = (self.candidate(peer, 1, now), self.candidate(peer, rows.max(1), now));
            let seconds =
                |of: &Candidate| of.link_seconds + of.transmission_seconds + of.block_seconds * hop.blocks.len() as f64;
            token += seconds(&one);
            if are_new(hop) {
                replay += seconds(&all);
            }
        }
        (token, replay)
    }

    /// What is known of a peer, for frames of so many rows.
    fn candidate(&self, peer: &PeerView, rows: usize, now: Instant) -> Candidate {
        let said = &peer.announcement;
        let speed = said.compute_tokens_per_second * said.span.len() as f64;
        let announced = (speed > 0.0).then(|| 1.0 / speed);
        let delay = peer.rtt.map_or(UNKNOWN_LINK_SECONDS, |rtt| rtt.as_secs_f64() / 2.0);
        // Each of the steps that wait there runs through its span.
        let queue = peer.speeds.queue_seconds().unwrap_or_else(|| {
            f64::from(said.queue) * said.span.len() as f64 * peer.speeds.block_seconds(1, announced)
        });
        let room = peer.speeds.cache_tokens_left(now).unwrap_or(said.cache_tokens_left);
        // Some nodes don't say how much they hold.
        let is_full = said.cache_tokens_total > 0 && room < self.room;
        Candidate {
            peer: said.peer_id,
            span: said.span.clone(),
            link_seconds: delay + HOP_SECONDS + queue + if is_full { FULL_CACHE_SECONDS } else { 0.0 },
            transmission_seconds: peer.speeds.transmission_seconds(rows * self.row_bytes),
            block_seconds: peer.speeds.block_seconds(rows, announced),
        }
    }
}
