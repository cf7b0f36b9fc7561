//! Announcements as a reader gathers them: united over replicas and segments, and kept for peer exchange.

use std::collections::{HashMap, HashSet};

use libp2p::PeerId;
use prost::Message;

use super::{
    announcement::{AnnouncementError, Verified, verify},
    proto::announcement::{Entries, SignedAnnouncement},
};

/// Peers of one swarm that a reader looks at; it would have to be a very large one to have more.
const MAX_PEERS: usize = 4096;
/// Signature checks for one look-up (0.1 ms each).
const MAX_CHECKS: usize = 2 * MAX_PEERS;
/// Swarms whose announcements are kept.
const MAX_PREFIXES: usize = 8;

/// The newest verified announcement of each peer, from any number of replicas.
#[derive(Debug, Default)]
pub(super) struct Union {
    newest: HashMap<PeerId, Verified>,
    /// Hashes of the entries seen, so that each is checked once, however many replicas hold it.
    seen: HashSet<[u8; 32]>,
    checks: usize,
}

impl Union {
    /// Takes in a DHT record's value. Honest peers hold no forged entries, so the rest of a value with one in it is left out.
    pub(super) fn add_record(&mut self, value: &[u8], now_unix_ms: u64) {
        match Entries::decode(value) {
            Ok(Entries { entries }) => self.add_all(&entries, now_unix_ms),
            Err(error) => tracing::debug!(%error, "a replica holds something that is no set of announcements"),
        }
    }

    /// Takes in entries from one source.
    pub(super) fn add_all(&mut self, entries: &[SignedAnnouncement], now_unix_ms: u64) {
        for signed in entries {
            if !self.seen.insert(hash(signed)) || self.checks >= MAX_CHECKS {
                continue;
            }
            self.checks += 1;
            match verify(signed, now_unix_ms) {
                Ok(verified) => self.add(verified),
                Err(AnnouncementError::BadSignature) => {
                    tracing::debug!("a replica hands out a forged announcement; the rest of its answer is left out");
                    return;
                }
                Err(error) => tracing::debug!(%error, "left out an announcement"),
            }
        }
    }

    /// Takes in one that was verified before.
    pub(super) fn add(&mut self, verified: Verified) {
        let peer = verified.peer_id();
        match self.newest.get(&peer) {
            Some(held) if held.body().sequence >= verified.body().sequence => {}
            None if self.newest.len() >= MAX_PEERS => {}
            _ => {
                self.newest.insert(peer, verified);
            }
        }
    }

    pub(super) fn into_verified(self) -> impl Iterator<Item = Verified> {
        self.newest.into_values()
    }
}

fn hash(signed: &SignedAnnouncement) -> [u8; 32] {
    *blake3::hash(&signed.encode_to_vec()).as_bytes()
}

/// What look-ups found, for the peers that ask this one.
#[derive(Debug, Default)]
pub(super) struct Known {
    /// The least recently used first.
    prefixes: Vec<(String, HashMap<PeerId, Verified>)>,
}

impl Known {
    /// Keeps what a look-up of `dht_prefix` found, newest of each peer.
    pub(super) fn keep(&mut self, dht_prefix: &str, found: &[Verified], now_unix_ms: u64) {
        let mut of_prefix = match self.prefixes.iter().position(|(prefix, _)| prefix == dht_prefix) {
            Some(place) => self.prefixes.remove(place).1,
            None => HashMap::new(),
        };
        of_prefix.retain(|_, held| held.body().expires_unix_ms > now_unix_ms);
        for verified in found.iter().filter(|verified| verified.body().dht_prefix == dht_prefix) {
            let peer = verified.peer_id();
            let is_news = of_prefix.get(&peer).is_none_or(|held| held.body().sequence < verified.body().sequence);
            if is_news && (of_prefix.len() < MAX_PEERS || of_prefix.contains_key(&peer)) {
                of_prefix.insert(peer, verified.clone());
            }
        }
        self.prefixes.push((dht_prefix.to_owned(), of_prefix));
        if self.prefixes.len() > MAX_PREFIXES {
            self.prefixes.remove(0);
        }
    }

    /// The fresh ones.
    pub(super) fn fresh(&self, dht_prefix: &str, now_unix_ms: u64) -> impl Iterator<Item = &Verified> {
        self.prefixes
            .iter()
            .filter(move |(prefix, _)| prefix == dht_prefix)
            .flat_map(|(_, of_prefix)| of_prefix.values())
            .filter(move |held| held.body().expires_unix_ms > now_unix_ms)
    }
}

#[cfg(test)]
mod tests {
    use libp2p::identity::Keypair;

    use super::*;
    use crate::swarm::announcement::{
        Announcement,
        tests::{NOW, sample},
    };

    fn signed(keypair: &Keypair, sequence: u64) -> SignedAnnouncement {
        Announcement { sequence, ..sample(keypair) }.sign(keypair, NOW).unwrap()
    }

    #[test]
    fn replicas_are_united_and_the_newest_counts() {
        let (a, b) = (Keypair::generate_ed25519(), Keypair::generate_ed25519());
        let mut union = Union::default();
        union.add_all(&[signed(&a, 1), signed(&b, 5)], NOW);
        union.add_all(&[signed(&a, 2), signed(&b, 5)], NOW);
        union.add_all(&[signed(&a, 1)], NOW);
        assert_eq!(union.checks, 3);
        let mut sequences: Vec<_> = union.into_verified().map(|v| v.body().sequence).collect();
        sequences.sort_unstable();
        assert_eq!(sequences, [2, 5]);
    }

    #[test]
    fn a_forged_entry_ends_an_answer_but_not_the_others() {
        let (a, b) = (Keypair::generate_ed25519(), Keypair::generate_ed25519());
        let mut forged = signed(&a, 9);
        forged.signature = vec![0; 64].into();
        let mut union = Union::default();
        union.add_record(&Entries { entries: vec![forged, signed(&a, 1)] }.encode_to_vec(), NOW);
        union.add_record(b"\xff\xff", NOW);
        union.add_record(&Entries { entries: vec![signed(&b, 1)] }.encode_to_vec(), NOW);
        assert_eq!(union.into_verified().map(|v| v.peer_id()).collect::<Vec<_>>(), [b.public().to_peer_id()]);
    }

    #[test]
    fn known_announcements_are_kept_by_prefix_until_they_expire() {
        let key = Keypair::generate_ed25519();
        let found = [verify(&signed(&key, 1), NOW).unwrap()];
        let mut known = Known::default();
        known.keep("tests/Tiny-1B", &found, NOW);
        known.keep("tests/Other", &found, NOW);
        assert_eq!(known.fresh("tests/Tiny-1B", NOW).count(), 1);
        assert_eq!(known.fresh("tests/Other", NOW).count(), 0);
        assert_eq!(known.fresh("tests/Tiny-1B", NOW + 60_000).count(), 0);
        (0..MAX_PREFIXES).for_each(|i| known.keep(&format!("more/{i}"), &[], NOW));
        assert_eq!(known.fresh("tests/Tiny-1B", NOW).count(), 0);
    }
}
