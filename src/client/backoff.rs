//! Whom to avoid, and for how long: peers that failed, for a time that doubles with every failure and ends on success.
//!
//! This is only advice: whoever chooses asks without it where a block would have nobody left.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use libp2p::PeerId;

/// After the first failure.
const FIRST: Duration = Duration::from_secs(2);
/// However often it fails: a machine that was repaired should not wait for an hour.
const LONGEST: Duration = Duration::from_secs(300);
/// A peer that fails is remembered for so long after its time is over, so that the next failure counts as one more.
const MEMORY: Duration = Duration::from_secs(600);
/// More peers than a client deals with in that time; the one whose time is over first makes room.
const MOST_PEERS: usize = 1024;

/// The peers that failed of late.
#[derive(Debug, Default)]
pub(crate) struct Backoff {
    peers: HashMap<PeerId, Failing>,
}

#[derive(Debug)]
struct Failing {
    failures: u32,
    until: Instant,
}

impl Backoff {
    /// A peer failed.
    pub(crate) fn failed(&mut self, peer: PeerId, now: Instant) {
        self.peers.retain(|_, failing| failing.until + MEMORY > now);
        if self.peers.len() >= MOST_PEERS
            && !self.peers.contains_key(&peer)
            && let Some(first) = self.peers.iter().min_by_key(|(_, failing)| failing.until).map(|(peer, _)| *peer)
        {
            self.peers.remove(&first);
        }
        let failing = self.peers.entry(peer).or_insert(Failing { failures: 0, until: now });
        let pause = FIRST.saturating_mul(1 << failing.failures.min(16)).min(LONGEST);
        failing.failures += 1;
        failing.until = now + pause;
    }

    /// A peer did what it was asked.
    pub(crate) fn succeeded(&mut self, peer: PeerId) {
        self.peers.remove(&peer);
    }

    /// Whether to choose another one.
    pub(crate) fn avoids(&self, peer: PeerId, now: Instant) -> bool {
        self.peers.get(&peer).is_some_and(|failing| failing.until > now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_doubles_and_ends_on_success() {
        let (mut backoff, peer, mut now) = (Backoff::default(), PeerId::random(), Instant::now());
        for pause in [2, 4, 8, 16, 32, 64, 128, 256, 300, 300] {
            backoff.failed(peer, now);
            assert!(backoff.avoids(peer, now + Duration::from_secs(pause - 1)), "{pause}");
            now += Duration::from_secs(pause);
            assert!(!backoff.avoids(peer, now), "{pause}");
        }
        backoff.failed(peer, now);
        backoff.succeeded(peer);
        assert!(!backoff.avoids(peer, now));
        backoff.failed(peer, now);
        assert!(!backoff.avoids(peer, now + Duration::from_secs(2)), "it begins anew");
    }

    #[test]
    fn it_is_forgotten_in_the_end_and_bounded() {
        let (mut backoff, now) = (Backoff::default(), Instant::now());
        for _ in 0..MOST_PEERS + 10 {
            backoff.failed(PeerId::random(), now);
        }
        assert_eq!(backoff.peers.len(), MOST_PEERS);
        backoff.failed(PeerId::random(), now + FIRST + MEMORY);
        assert_eq!(backoff.peers.len(), 1);
    }
}
