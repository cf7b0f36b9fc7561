//! A session that rests, as between two turns of a chat: nobody awaits an answer, so nobody hears what its hops say.
//!
//! Whoever keeps one may look after it: [`Session::wants_attention`] waits until there is something to see to, and
//! [`Session::attend`] does that. A hop that leaves hands over as it does while steps are under way (`handing`). A connection that was cut is made
//! again: a hop gives a session up some seconds after its client has gone, and would have to be told everything in the next turn.
//! A hop that stays away is replaced when there is something to do again, since the next turn may never come.

use std::time::{Duration, Instant};

use super::{Session, SessionError};
use crate::swarm::proto::session as proto;

/// For how long a connection is tried to be made again. What a hop has of the session it keeps for about that long, unless its owner
/// has set another time.
const HOPS_WAIT: Duration = Duration::from_secs(15);

/// The pause after the first attempt; it doubles.
const FIRST_PAUSE: Duration = Duration::from_millis(250);

/// Connections were cut while the session rested.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cut {
    next: Instant,
    pause: Duration,
    until: Instant,
}

impl Cut {
    fn new(now: Instant) -> Self {
        Self { next: now, pause: FIRST_PAUSE, until: now + HOPS_WAIT }
    }

    /// When to try to connect again; `None` when that is of no use any more.
    fn next(&self) -> Option<Instant> {
        (self.next < self.until).then_some(self.next)
    }

    fn failed(&mut self, now: Instant) {
        (self.next, self.pause) = (now + self.pause, self.pause.saturating_mul(2));
    }
}

impl Session {
    /// Waits until something of a session that rests should be seen to: a hop is leaving, or its connection was cut. It may be
    /// dropped at any time; nothing is lost then.
    pub async fn wants_attention(&mut self) {
        loop {
            if self.broken.as_ref().is_some_and(SessionError::is_of_a_leaving_hop) {
                return;
            }
            if let Some(error) = self.hop_to_leave() {
                self.broken.get_or_insert(error);
                continue;
            }
            let now = Instant::now();
            let connect_at = self.connect_at(now);
            if connect_at.is_some_and(|at| at <= now) {
                return;
            }
            let event = match connect_at.into_iter().chain(self.handing.next()).min() {
                Some(when) => match tokio::time::timeout_at(when.into(), self.mailbox.next()).await {
                    Ok(event) => event,
                    Err(_) => continue,
                },
                None => self.mailbox.next().await,
            };
            let result = match self.sift(event) {
                Ok(Some((from, proto::frame::Body::Replayed(replayed), _))) => self.told(from, &replayed),
                Ok(_) => Ok(()),
                Err(error) => Err(error),
            };
            if let Err(error) = result {
                if error.is_of_a_leaving_hop() {
                    self.broken = Some(error);
                } else {
                    self.broken.get_or_insert(error);
                }
            }
        }
    }

    /// Sees to what a session that rests needs. Not to be dropped before its end. Where it fails, the session is repaired, or says so,
    /// when it is used again.
    pub async fn attend(&mut self) {
        match self.broken.take() {
            Some(error) if error.is_of_a_leaving_hop() => match self.repair(error).await {
                Ok(()) => self.went_on(),
                Err(error) => self.broken = Some(error),
            },
            Some(error) if self.cut.is_some() => self.come_back(error).await,
            other => self.broken = other,
        }
    }

    /// When to connect to the hops again; `None` where no connection was cut, or it stays so.
    fn connect_at(&mut self, now: Instant) -> Option<Instant> {
        // A hop that has closed the session is there: it is told everything when there is something to do again.
        let is_cut = self.broken.as_ref().is_some_and(SessionError::is_of_the_connection)
            && self.hops.iter().any(|hop| hop.link.is_closed());
        self.cut = is_cut.then(|| self.cut.unwrap_or_else(|| Cut::new(now)));
        self.cut?.next()
    }

    /// Connects again to the hops whose connection was cut, and goes on with all of them where they stand.
    async fn come_back(&mut self, cut: SessionError) {
        self.telling = None;
        let connected = self.connect_again().await.into_iter().try_for_each(|(_, result)| result);
        let result = match connected {
            Ok(()) => self.take_route(self.route().hops, None).await,
            Err(error) => Err(error),
        };
        match result {
            Ok(()) => {
                tracing::debug!(session = %self.id, "connected again: {cut}");
                self.cut = None;
                // Nothing was under way that one of them could be behind with.
                self.repairs.suspect = None;
            }
            Err(error) => {
                tracing::debug!(session = %self.id, %error, "not connected again");
                self.broken = Some(cut);
                if let Some(cut) = &mut self.cut {
                    cut.failed(Instant::now());
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cut_connection_is_tried_at_once_then_ever_less_and_not_for_ever() {
        let start = Instant::now();
        let mut cut = Cut::new(start);
        let mut tries = Vec::new();
        while let Some(next) = cut.next() {
            tries.push((next - start).as_millis());
            cut.failed(next);
        }
        assert_eq!(tries, [0, 250, 750, 1750, 3750, 7750]);
    }
}
