//! Steps that came before their session was open.
//!
//! A client sends the first steps along with the tickets. A ticket comes straight from the client and a step by way of the hops
//! before, so the ticket is here first as a rule; but a hop may still be connecting to the next one, and ways differ. Such steps
//! wait here, a short while and not many: anybody may send them.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use libp2p::PeerId;

use crate::swarm::ticket::SessionId;

/// As long as a lost packet or a busy machine may delay a ticket. Connecting to the next hop has a time limit of its own, during which
/// its steps stay.
const WAIT_FOR_TICKET: Duration = Duration::from_secs(5);
/// Steps of one session: the most credit that a ticket may give.
const MOST_OF_A_SESSION: usize = 16;
/// Steps that came from one peer: some sessions' that begin at once.
const MOST_OF_A_PEER: usize = 1024;
/// Steps in all.
const MOST: usize = 4096;

/// Steps that wait for their session; `S` is one with all that belongs to it.
#[derive(Debug)]
pub(crate) struct Early<S> {
    sessions: HashMap<SessionId, Vec<Waiting<S>>>,
    by_peer: HashMap<PeerId, usize>,
    count: usize,
}

#[derive(Debug)]
struct Waiting<S> {
    from: PeerId,
    since: Instant,
    step: S,
}

impl<S> Default for Early<S> {
    fn default() -> Self {
        Self { sessions: HashMap::new(), by_peer: HashMap::new(), count: 0 }
    }
}

impl<S> Early<S> {
    /// Keeps a step, or gives it back where there are too many.
    pub(crate) fn hold(&mut self, session: SessionId, from: PeerId, step: S, now: Instant) -> Result<(), S> {
        let of_peer = self.by_peer.get(&from).copied().unwrap_or(0);
        let of_session = self.sessions.get(&session).map_or(0, Vec::len);
        if self.count >= MOST || of_peer >= MOST_OF_A_PEER || of_session >= MOST_OF_A_SESSION {
            return Err(step);
        }
        self.count += 1;
        *self.by_peer.entry(from).or_default() += 1;
        self.sessions.entry(session).or_default().push(Waiting { from, since: now, step });
        Ok(())
    }

    /// The steps of a session, in the order in which they came.
    pub(crate) fn take(&mut self, session: SessionId) -> Vec<S> {
        let waiting = self.sessions.remove(&session).unwrap_or_default();
        self.forget(waiting)
    }

    /// The steps whose ticket never came; those of sessions that are `being_opened` go on waiting.
    pub(crate) fn expire(&mut self, now: Instant, being_opened: impl Fn(SessionId) -> bool) -> Vec<S> {
        let is_late = |waiting: &Waiting<S>| now.duration_since(waiting.since) > WAIT_FOR_TICKET;
        let late = self.sessions.extract_if(|id, waiting| waiting.iter().any(is_late) && !being_opened(*id));
        let late = late.flat_map(|(_, waiting)| waiting).collect();
        self.forget(late)
    }

    fn forget(&mut self, waiting: Vec<Waiting<S>>) -> Vec<S> {
        self.count -= waiting.len();
        for Waiting { from, .. } in &waiting {
            if let Some(count) = self.by_peer.get_mut(from) {
                *count -= 1;
                if *count == 0 {
                    self.by_peer.remove(from);
                }
            }
        }
        waiting.into_iter().map(|waiting| waiting.step).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_wait_for_their_session_in_order() {
        let (mut early, peer, now) = (Early::default(), PeerId::random(), Instant::now());
        let (one, other) = (SessionId::random(), SessionId::random());
        for (session, step) in [(one, 1), (other, 7), (one, 2)] {
            early.hold(session, peer, step, now).unwrap();
        }
        assert_eq!(early.take(one), [1, 2]);
        assert_eq!(early.take(one), [0; 0]);
        assert_eq!((early.count, early.by_peer[&peer]), (1, 1));
    }

    #[test]
    fn they_do_not_wait_for_ever_unless_the_session_is_being_opened() {
        let (mut early, peer, now) = (Early::default(), PeerId::random(), Instant::now());
        let (lost, opening) = (SessionId::random(), SessionId::random());
        early.hold(lost, peer, 1, now).unwrap();
        early.hold(opening, peer, 2, now).unwrap();
        assert_eq!(early.expire(now + WAIT_FOR_TICKET, |_| false), [0; 0]);
        let late = now + WAIT_FOR_TICKET + Duration::from_millis(1);
        assert_eq!(early.expire(late, |id| id == opening), [1]);
        assert_eq!(early.expire(late, |_| false), [2]);
        assert!(early.count == 0 && early.by_peer.is_empty() && early.sessions.is_empty());
    }

    #[test]
    fn a_stranger_cannot_fill_it_for_others() {
        let (mut early, now) = (Early::default(), Instant::now());
        let (stranger, honest) = (PeerId::random(), PeerId::random());
        let session = SessionId::random();
        let taken = (0..100).filter(|step| early.hold(session, stranger, *step, now).is_ok()).count();
        assert_eq!(taken, MOST_OF_A_SESSION);
        let more = (0..10_000).filter(|step| early.hold(SessionId::random(), stranger, *step, now).is_ok()).count();
        assert_eq!(taken + more, MOST_OF_A_PEER);
        early.hold(SessionId::random(), honest, 1, now).unwrap();
        for _ in 0..10 {
            let peer = PeerId::random();
            for step in 0..MOST_OF_A_PEER {
                let _ = early.hold(SessionId::random(), peer, step, now);
            }
        }
        assert_eq!(early.count, MOST);
    }
}
