//! Announcing: sign, put under every key that the span touches, renew, and leave with a signed word.

use std::{collections::HashSet, time::Duration};

use futures::future::join_all;
use libp2p::kad::RecordKey;
use prost::Message;
use tokio::time::Instant;

use super::{Gone, Swarm};
use crate::swarm::{
    announcement::{Announcement, AnnouncementError, State, next_sequence, unix_ms},
    driver::Command,
    error::AnnounceError,
    proto::announcement::{Entries, SignedAnnouncement},
    records::{models_key, segment_key, segments},
};

/// How long an announcement waits for the replicas. Slow ones are still served after that.
const PUT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long leaving may take.
const WITHDRAW_TIMEOUT: Duration = Duration::from_secs(3);

/// What this peer says of itself at present.
///
/// It is locked to sign and not while the network works: of two puts that overtake each other the higher sequence wins
/// everywhere, so leaving need not wait for an announcement that hangs.
#[derive(Default)]
pub(super) struct Announcing {
    /// As the caller gave it.
    current: Option<Announcement>,
    /// The last one used.
    sequence: u64,
    /// When it was last put, or that was tried.
    put_at: Option<Instant>,
}

impl Announcing {
    /// How long what was put is fresh: until `every` has passed. Where nothing is announced, `every`.
    pub(super) fn fresh_for(&self, now: Instant, every: Duration) -> Duration {
        match (&self.current, self.put_at) {
            (Some(_), Some(put_at)) => (put_at + every).saturating_duration_since(now),
            _ => every,
        }
    }
}

fn keys_of(announcement: &Announcement) -> HashSet<RecordKey> {
    let segments = segments(announcement.span.clone()).map(|segment| segment_key(&announcement.dht_prefix, segment));
    segments.chain([models_key()]).collect()
}

impl Swarm {
    /// Announces what this peer serves, in place of what it announced before, and renews it (whenever it is as old as
    /// [`Tuning::renew_every`](crate::swarm::Tuning::renew_every)) until the next one or [`Swarm::withdraw`]. The swarm fills in peer id, addresses, sequence and expiry, and signs.
    ///
    /// Returns when the replicas have it (or after 5 s). Nobody having taken it is no error: a peer that is alone keeps it, and
    /// it is put again at the next renewal.
    pub async fn announce(&self, announcement: Announcement) -> Result<(), AnnounceError> {
        let keys = keys_of(&announcement);
        let (farewell, signed) = {
            let mut announcing = self.0.announcing();
            let farewell = match &announcing.current {
                // Where the new span doesn't reach, the old entry would stand until it expires.
                Some(previous) if !keys_of(previous).is_subset(&keys) => {
                    let left: HashSet<RecordKey> = keys_of(previous).difference(&keys).cloned().collect();
                    let offline = Announcement { state: State::Offline, ..previous.clone() };
                    Some((left, self.sign(offline, &mut announcing.sequence)?))
                }
                _ => None,
            };
            let signed = self.sign(announcement.clone(), &mut announcing.sequence)?;
            announcing.current = Some(announcement);
            announcing.put_at = Some(Instant::now());
            (farewell, signed)
        };
        if let Some((left, farewell)) = farewell {
            self.put(left, &farewell, PUT_TIMEOUT).await.map_err(|Gone| AnnounceError::Stopped)?;
        }
        self.put(keys, &signed, PUT_TIMEOUT).await.map_err(|Gone| AnnounceError::Stopped)
    }

    /// Says that this peer leaves; bounded by three seconds. The signed entry is kept by others until it expires, so that no
    /// older one comes back.
    pub async fn withdraw(&self) {
        let (keys, signed) = {
            let mut announcing = self.0.announcing();
            let Some(current) = announcing.current.take() else { return };
            let keys = keys_of(&current);
            let offline = Announcement { state: State::Offline, ..current };
            (keys, self.sign(offline, &mut announcing.sequence))
        };
        match signed {
            Ok(signed) => drop(self.put(keys, &signed, WITHDRAW_TIMEOUT).await),
            Err(error) => tracing::warn!(%error, "cannot announce that this node leaves"),
        }
    }

    /// Puts the announcement again, with new expiry, addresses and sequence.
    pub(super) async fn renew(&self) {
        let (keys, signed) = {
            let mut announcing = self.0.announcing();
            let Some(current) = announcing.current.clone() else { return };
            announcing.put_at = Some(Instant::now());
            (keys_of(&current), self.sign(current, &mut announcing.sequence))
        };
        match signed {
            Ok(signed) => drop(self.put(keys, &signed, PUT_TIMEOUT).await),
            Err(error) => tracing::error!(%error, "cannot renew the announcement"),
        }
    }

    fn sign(
        &self,
        announcement: Announcement,
        last_sequence: &mut u64,
    ) -> Result<SignedAnnouncement, AnnouncementError> {
        let now = unix_ms();
        let lifetime = u64::try_from(self.0.shared.tuning.announcement_lifetime.as_millis()).unwrap_or(u64::MAX);
        let sequence = next_sequence(*last_sequence, now);
        let complete = Announcement {
            peer_id: self.peer_id(),
            addresses: self.addresses(),
            sequence,
            expires_unix_ms: now.saturating_add(lifetime),
            signed: None,
            ..announcement
        };
        let signed = complete.sign(self.identity().keypair(), now)?;
        *last_sequence = sequence;
        Ok(signed)
    }

    async fn put(&self, keys: HashSet<RecordKey>, signed: &SignedAnnouncement, timeout: Duration) -> Result<(), Gone> {
        let value = Entries { entries: vec![signed.clone()] }.encode_to_vec();
        let puts = keys.into_iter().map(|key| {
            let value = value.clone();
            self.command(|reply| Command::Put { key, value, reply })
        });
        match tokio::time::timeout(timeout, join_all(puts)).await {
            Ok(stored) => {
                let stored = stored.into_iter().collect::<Result<Vec<usize>, Gone>>()?;
                tracing::debug!(?stored, "announced: replicas by key");
            }
            Err(_) => tracing::debug!("announced, though some replicas are slow"),
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::swarm::Identity;

    #[test]
    fn what_was_put_a_moment_ago_needs_no_renewal() {
        const EVERY: Duration = Duration::from_secs(60);
        let now = Instant::now();
        let mut announcing = Announcing::default();
        assert_eq!(announcing.fresh_for(now, EVERY), EVERY, "nothing is announced");
        announcing.current = Some(Announcement::blank(Identity::ephemeral().peer_id()));
        announcing.put_at = Some(now);
        assert_eq!(announcing.fresh_for(now, EVERY), EVERY);
        assert_eq!(announcing.fresh_for(now + EVERY / 2, EVERY), EVERY / 2);
        assert_eq!(announcing.fresh_for(now + EVERY, EVERY), Duration::ZERO);
        assert_eq!(announcing.fresh_for(now + 2 * EVERY, EVERY), Duration::ZERO);
    }
}
