//! From a view of the swarm to hops: who may be one, and what is known of its speed.

use std::{
    collections::{HashMap, HashSet},
    ops::Range,
};

use libp2p::PeerId;

use super::{
    route::{self, Candidate},
    session::RouteHop,
    view::{PeerView, SwarmView},
};
use crate::swarm::announcement::Announcement;

/// A block's time where a peer doesn't know its speed, seconds.
const UNKNOWN_BLOCK_SECONDS: f64 = 1e-3;

/// A one-way delay that was not measured, seconds.
const UNKNOWN_LINK_SECONDS: f64 = 1.0;

/// What passing a frame costs a hop besides the link's delay, seconds.
const HOP_SECONDS: f64 = 3e-4;

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

/// The fastest hops for `blocks` among the online peers that `may_be` a hop; `None` where they don't cover them.
pub(crate) fn fastest(
    view: &SwarmView,
    blocks: Range<usize>,
    may_be: impl Fn(&PeerView) -> bool,
) -> Option<Vec<RouteHop>> {
    let usable: Vec<&PeerView> = view.online().filter(|peer| may_be(peer)).collect();
    let candidates: Vec<Candidate> = usable
        .iter()
        .map(|peer| {
            let said = &peer.announcement;
            let speed = said.compute_tokens_per_second * said.span.len() as f64;
            Candidate {
                peer: said.peer_id,
                span: said.span.clone(),
                link_seconds: peer.rtt.map_or(UNKNOWN_LINK_SECONDS, |rtt| rtt.as_secs_f64() / 2.0) + HOP_SECONDS,
                block_seconds: if speed > 0.0 { 1.0 / speed } else { UNKNOWN_BLOCK_SECONDS },
            }
        })
        .collect();
    let announced: HashMap<PeerId, &Announcement> =
        usable.iter().map(|peer| (peer.announcement.peer_id, &peer.announcement)).collect();
    route::choose(blocks, &candidates)?
        .into_iter()
        .map(|hop| Some(RouteHop { announcement: (*announced.get(&hop.peer)?).clone(), blocks: hop.blocks }))
        .collect()
}
