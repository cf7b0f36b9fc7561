//! Announcing: sign, put under every key that the span touches, renew, and leave with a signed word.

use std::{collections::HashSet, time::Duration};

use futures::future::join_all;
use libp2p::kad::RecordKey;
use prost::Message;

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
#[derive(Default)]
pub(super) struct Announcing {
    /// As the caller gave it.
    current: Option<Announcement>,
    /// The last one used.
    sequence: u64,
}

fn keys_of(announcement: &Announcement) -> HashSet<RecordKey> {
    let segments = segments(announcement.span.clone()).map(|segment| segment_key(&announcement.dht_prefix, segment));
    segments.chain([models_key()]).collect()
}

impl Swarm {
    /// Announces what this peer serves, in place of what it announced before, and renews it until the next one or
    /// [`Swarm::withdraw`]. The swarm fills in peer id, addresses, sequence and expiry, and signs.
    ///
    /// Returns when the replicas have it (or after 5 s). Nobody having taken it is no error: a peer that is alone keeps it, and
    /// it is put again at the next renewal.
    pub async fn announce(&self, announcement: Announcement) -> Result<(), AnnounceError> {
        let mut announcing = self.0.announcing.lock().await;
        let keys = keys_of(&announcement);
        let left: HashSet<RecordKey> = match &announcing.current {
            Some(previous) => keys_of(previous).difference(&keys).cloned().collect(),
            None => HashSet::new(),
        };
        // Where the new span doesn't reach, the old entry would stand until it expires.
        let farewell = match &announcing.current {
            Some(previous) if !left.is_empty() => {
                let offline = Announcement { state: State::Offline, ..previous.clone() };
                Some(self.sign(offline, &mut announcing.sequence)?)
            }
            _ => None,
        };
        let signed = self.sign(announcement.clone(), &mut announcing.sequence)?;
        announcing.current = Some(announcement);
        if let Some(farewell) = farewell {
            self.put(left, &farewell, PUT_TIMEOUT).await.map_err(|Gone| AnnounceError::Stopped)?;
        }
        self.put(keys, &signed, PUT_TIMEOUT).await.map_err(|Gone| AnnounceError::Stopped)
    }

    /// Says that this peer leaves; bounded by three seconds. The signed entry is kept by others until it expires, so that no
    /// older one comes back.
    pub async fn withdraw(&self) {
        let mut announcing = self.0.announcing.lock().await;
        let Some(current) = announcing.current.take() else { return };
        let keys = keys_of(&current);
        let offline = Announcement { state: State::Offline, ..current };
        match self.sign(offline, &mut announcing.sequence) {
            Ok(signed) => drop(self.put(keys, &signed, WITHDRAW_TIMEOUT).await),
            Err(error) => tracing::warn!(%error, "cannot announce that this node leaves"),
        }
    }

    pub(super) async fn renew(&self) {
        let mut announcing = self.0.announcing.lock().await;
        let Some(current) = announcing.current.clone() else { return };
        let keys = keys_of(&current);
        match self.sign(current, &mut announcing.sequence) {
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
