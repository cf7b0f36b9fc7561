//! Moving a running session to a much better route: a peer that joined, a link that recovered.
//!
//! Between two steps, and now and then only, the session compares what a token takes on its route with the best route there is, both
//! by what is known: nobody is asked for it. It moves where that is worth it, looked at twice, and pays for what the new hops have to be
//! told; what the old ones know is told by those in front of them, as after a loss. A move never makes a session inexact.
//!
//! The old hops are closed when the new ones hold the session. Where one of these refuses it, the session goes on where it was.

use std::{
    mem,
    time::{Duration, Instant},
};

use bytes::Bytes;

use super::{HopLink, Route, RouteHop, Session, SessionError};
use crate::{client::Work, swarm::proto::session as proto};

/// How often it is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How long a session stays on a new route, however it came there: what is known of it is only beginning to be.
const REST: Duration = Duration::from_secs(30);
/// A route is much better if a token takes so much less of the time: what is known is off by some tens of per cent.
const MUCH_BETTER: f64 = 0.7;
/// What is won in the rest of the generation has to be so many times what moving costs.
const WORTH: f64 = 2.0;
/// Routes that have to be found better one after the other.
const LOOKS: u32 = 2;

/// What a session knows of better routes.
#[derive(Debug)]
pub(super) struct Moves {
    next_look: Instant,
    /// Looks in a row at which another route was much better.
    better: u32,
}

impl Moves {
    pub(super) fn new(now: Instant) -> Self {
        Self { next_look: now + LOOK_EVERY, better: 0 }
    }

    /// The route has changed.
    pub(super) fn rest(&mut self, now: Instant) {
        (self.next_look, self.better) = (now + REST, 0);
    }

    /// Whether another route's time for a token is worth a move: hysteresis.
    fn is_worth(&mut self, offer: &Offer, tokens_left: usize) -> bool {
        let won = (offer.now_seconds - offer.then_seconds) * tokens_left as f64;
        let is_better = offer.then_seconds < MUCH_BETTER * offer.now_seconds && won > WORTH * offer.moving_seconds;
        self.better = if is_better { self.better + 1 } else { 0 };
        self.better >= LOOKS
    }
}

/// Another route, in numbers: seconds a token here and there, and what the move takes.
#[derive(Debug, Clone, Copy)]
struct Offer {
    now_seconds: f64,
    then_seconds: f64,
    moving_seconds: f64,
}

impl Session {
    /// Goes over to a much better route, where there is one by now, no step is under way, and the user has not named the hops. Whether
    /// it did. Where the old route fails meanwhile, the session repairs itself as the next answer is awaited.
    pub async fn move_if_better(&mut self, tokens_left: usize) -> bool {
        let now = Instant::now();
        let is_busy = !self.sent.is_empty() || self.telling.is_some() || self.broken.is_some();
        if is_busy || now < self.moves.next_look || !self.client.rules().route.is_empty() {
            return false;
        }
        self.moves.next_look = now + LOOK_EVERY;
        let Some((hops, offer)) = self.best_route(now) else { return false };
        if !self.moves.is_worth(&offer, tokens_left) {
            return false;
        }
        tracing::info!(
            session = %self.id,
            "moving to a better route: {:.1} ms a token instead of {:.1}",
            offer.then_seconds * 1e3,
            offer.now_seconds * 1e3
        );
        let moved = self.move_to(hops).await.unwrap_or_else(|error| {
            self.broken = Some(error);
            true
        });
        // Nothing was under way that one of them could be behind with.
        self.repairs.suspect = None;
        moved
    }

    /// Goes over to another route, or stays where that can't be had. Whether the route is another one now.
    ///
    /// # Errors
    /// A hop failed without which the session can't go on.
    async fn move_to(&mut self, hops: Vec<RouteHop>) -> Result<bool, SessionError> {
        let within = self.client.patience().overdue + self.client.patience().pong;
        let links = match HopLink::connect_all(&self.client, &hops, within).await {
            Ok(links) => links,
            Err(error) => {
                self.stays(&error);
                return Ok(false);
            }
        };
        // A hop that is to run other blocks begins anew.
        let is_of_both = |one: &HopLink, hops: &[HopLink]| {
            hops.iter().any(|other| (other.peer, &other.blocks) == (one.peer, &one.blocks))
        };
        let changes = |hop: &&HopLink| links.iter().any(|new| new.peer == hop.peer && new.blocks != hop.blocks);
        self.hops.iter().filter(changes).for_each(|hop| self.close_hop(hop));
        let old = mem::replace(&mut self.hops, links);
        self.next_epoch();
        let error = match self.open_all(within).await {
            Ok(opened) => {
                let left = old.iter().filter(|hop| !self.hops.iter().any(|new| new.peer == hop.peer));
                left.for_each(|hop| self.close_hop(hop));
                self.settle(opened, within).await?;
                return Ok(true);
            }
            Err(error) => error,
        };
        self.stays(&error);
        let tried = mem::replace(&mut self.hops, old);
        tried.iter().filter(|hop| !is_of_both(hop, &self.hops)).for_each(|hop| self.close_hop(hop));
        self.next_epoch();
        let opened = self.open_all(within).await?;
        self.settle(opened, within).await?;
        Ok(false)
    }

    /// The better route can't be had.
    fn stays(&self, error: &SessionError) {
        tracing::info!(session = %self.id, %error, "not moving to a better route");
        error.peer_to_avoid().into_iter().for_each(|peer| self.client.failed(peer));
    }

    fn close_hop(&self, hop: &HopLink) {
        // Where it is lost, there is nobody to be told.
        let _ = self.send_to(hop, proto::frame::Body::Close(proto::Close::default()), Bytes::new());
    }

    /// Shows all hops their tickets and waits until they hold the session.
    async fn open_all(&mut self, within: Duration) -> Result<super::opening::Openings, SessionError> {
        let all: Vec<usize> = (0..self.hops.len()).collect();
        self.show_tickets(&all)?;
        self.wait_until_open(&all, within).await
    }

    /// The best route by what is known, where it is another one and computes alike.
    fn best_route(&self, now: Instant) -> Option<(Vec<RouteHop>, Offer)> {
        let client = &self.client;
        let view = client.observer().recent()?;
        let chooser = client.chooser(&view, Work::DECODE, self.room_soon());
        let here: Vec<RouteHop> = self.route().hops;
        let is_here = |hop: &RouteHop| {
            here.iter().any(|old| (old.announcement.peer_id, &old.blocks) == (hop.announcement.peer_id, &hop.blocks))
        };
        let hops = chooser.fastest(0..view.blocks, |peer| {
            let peer = peer.announcement.peer_id;
            client.rules().allows(peer) && !client.avoids(peer, now)
        })?;
        if hops.iter().all(is_here) {
            return None;
        }
        let together = Route { hops: here.iter().chain(&hops).cloned().collect(), ..self.route() };
        if self.is_exact() && !together.is_uniform() {
            return None;
        }
        let rows = self.history.count();
        let (now_seconds, _) = chooser.token_and_replay_seconds(&here, rows, |_| false);
        let (then_seconds, moving_seconds) = chooser.token_and_replay_seconds(&hops, rows, |hop| !is_here(hop));
        // A hop of this route that is not known any more is for the repairs, once it is gone.
        now_seconds.is_finite().then_some((hops, Offer { now_seconds, then_seconds, moving_seconds }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer(now_ms: f64, then_ms: f64, moving_ms: f64) -> Offer {
        let seconds = |ms: f64| ms / 1e3;
        Offer { now_seconds: seconds(now_ms), then_seconds: seconds(then_ms), moving_seconds: seconds(moving_ms) }
    }

    #[test]
    fn only_a_much_better_route_that_stays_so_is_worth_a_move() {
        let mut moves = Moves::new(Instant::now());
        for _ in 0..5 {
            assert!(!moves.is_worth(&offer(100.0, 75.0, 1.0), 1000), "a little better");
            assert!(!moves.is_worth(&offer(100.0, 10.0, 500.0), 10), "not worth it for ten tokens");
        }
        assert!(!moves.is_worth(&offer(100.0, 10.0, 500.0), 1000), "once is no proof");
        assert!(!moves.is_worth(&offer(100.0, 95.0, 500.0), 1000));
        assert!(!moves.is_worth(&offer(100.0, 10.0, 500.0), 1000));
        assert!(moves.is_worth(&offer(100.0, 10.0, 500.0), 1000));
    }

    #[test]
    fn routes_that_take_turns_at_being_a_little_better_move_nothing() {
        let mut moves = Moves::new(Instant::now());
        for look in 0..100 {
            let then = if look % 2 == 0 { 60.0 } else { 90.0 };
            assert!(!moves.is_worth(&offer(100.0, then, 1.0), 1000));
        }
    }
}
