//! What this peer keeps of the DHT: keys, and the store that merges where Kademlia would overwrite.
//!
//! A model's blocks are cut into segments of [`SEGMENT_BLOCKS`]; the key of a segment is a hash of the DHT prefix and the
//! segment's number, and its value the set of announcements whose spans touch it. One more key lists the models: a few
//! announcements of each prefix. Both are [`AnnouncementSet`]s; this module says which entries belong under which key, and
//! bounds the whole.
//!
//! kad forwards inbound records without storing them (`FilterBoth`), and the event loop hands them to
//! [`AnnouncementStore::accept`] together with who brought them from where. What goes in through kad itself
//! ([`RecordStore::put`]) is this peer's own. A stale or duplicate entry is never an error there: kad answers an error by
//! resetting the stream, on which the sender waits for 10 s.

use std::{borrow::Cow, collections::HashMap, iter, time::Instant};

use libp2p::{
    PeerId,
    kad::{
        ProviderRecord, Record, RecordKey,
        store::{Error as StoreError, RecordStore},
    },
};
use prost::Message;

use super::{
    announcement::{
        AnnouncementError, MAX_LIFETIME, Verified,
        set::{AnnouncementSet, Limits, Merged, Origin, Source},
        unix_ms, verify,
    },
    proto::announcement::Entries,
};

/// Blocks under one key: 80 blocks are 5 look-ups.
pub const SEGMENT_BLOCKS: usize = 16;

/// Keys held. Every peer of a large DHT is responsible for few; this bounds what strangers can make it hold.
const MAX_KEYS: usize = 2048;
/// Entries held over all keys: 64 MiB if every one is as large as it may be.
const MAX_ENTRIES: usize = 16 * 1024;
/// Signature checks for one inbound record (0.1 ms each). A peer that puts its own entry needs one.
const MAX_CHECKS_PER_RECORD: usize = 16;

/// The key under which the announcements of a segment are.
pub fn segment_key(dht_prefix: &str, segment: usize) -> RecordKey {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"helion/1\0segment\0");
    hasher.update(&(dht_prefix.len() as u64).to_le_bytes());
    hasher.update(dht_prefix.as_bytes());
    hasher.update(&(segment as u64).to_le_bytes());
    RecordKey::new(hasher.finalize().as_bytes())
}

/// The key under which a few announcements of each model are.
pub fn models_key() -> RecordKey {
    RecordKey::new(blake3::hash(b"helion/1\0models").as_bytes())
}

/// The segments that `blocks` touch.
pub fn segments(blocks: std::ops::Range<usize>) -> std::ops::Range<usize> {
    blocks.start / SEGMENT_BLOCKS..blocks.end.div_ceil(SEGMENT_BLOCKS)
}

/// Who brought a record.
#[derive(Debug, Clone, Copy)]
pub struct Bearer {
    /// Authenticated by the transport.
    pub peer: PeerId,
    /// Where its connection comes from.
    pub origin: Origin,
}

/// What became of an inbound record.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Accepted {
    /// So many of its entries were news.
    News(usize),
    /// It held an entry with a wrong signature, which no honest peer hands on. What came before that entry is kept.
    Forged,
    /// It is no set of announcements, or an oversized one.
    Malformed(String),
}

/// The announcements that this peer keeps for the DHT.
#[derive(Debug)]
pub struct AnnouncementStore {
    own: PeerId,
    salt: [u8; 32],
    slots: HashMap<RecordKey, Slot>,
    max_keys: usize,
}

#[derive(Debug)]
struct Slot {
    set: AnnouncementSet,
    /// The prefix of a segment's key; `None` for the models.
    dht_prefix: Option<String>,
    /// Who made this peer hold the key.
    opened_by: Origin,
}

impl AnnouncementStore {
    /// An empty store of the peer `own`.
    pub fn new(own: PeerId) -> Self {
        Self { own, salt: rand::random(), slots: HashMap::new(), max_keys: MAX_KEYS }
    }

    /// Takes in what a peer put under `key`.
    pub fn accept(&mut self, key: &RecordKey, value: &[u8], bearer: Bearer, now_unix_ms: u64) -> Accepted {
        let entries = match Entries::decode(value) {
            Ok(Entries { entries }) if entries.len() <= Limits::SEGMENT.entries => entries,
            Ok(Entries { entries }) => return Accepted::Malformed(format!("{} entries", entries.len())),
            Err(error) => return Accepted::Malformed(error.to_string()),
        };
        let mut news = 0;
        let mut checks = 0;
        for signed in entries {
            if self.slots.get(key).is_some_and(|slot| slot.set.holds(&signed))
                && !is_by(&signed.public_key, bearer.peer)
            {
                continue;
            }
            checks += 1;
            if checks > MAX_CHECKS_PER_RECORD {
                break;
            }
            match verify(&signed, now_unix_ms) {
                Ok(verified) => {
                    let source = match verified.peer_id() {
                        // This peer's own entries come from itself only: an old one of them must not come back.
                        peer if peer == self.own => continue,
                        peer if peer == bearer.peer => Source::Direct(bearer.origin),
                        _ => Source::Replicated(bearer.origin),
                    };
                    let merged = self.merge(key, verified, source, now_unix_ms);
                    news += usize::from(matches!(merged, Some(Merged::Added | Merged::Updated)));
                }
                Err(AnnouncementError::BadSignature) => return Accepted::Forged,
                Err(error) => tracing::debug!(bearer = %bearer.peer, %error, "left out an announcement"),
            }
        }
        Accepted::News(news)
    }

    /// The fresh announcements under a prefix, the newest of each peer.
    pub fn of_prefix(&self, dht_prefix: &str, now_unix_ms: u64) -> Vec<&Verified> {
        let mut newest: HashMap<PeerId, &Verified> = HashMap::new();
        let slots = self.slots.values().filter(|slot| slot.dht_prefix.as_deref() == Some(dht_prefix));
        for verified in slots.flat_map(|slot| slot.set.fresh(now_unix_ms)) {
            let entry = newest.entry(verified.peer_id()).or_insert(verified);
            if verified.body().sequence > entry.body().sequence {
                *entry = verified;
            }
        }
        newest.into_values().collect()
    }

    /// How many keys it holds.
    pub fn keys(&self) -> usize {
        self.slots.len()
    }

    /// Forgets what counts no more; to be called now and then.
    pub fn drop_expired(&mut self, now_unix_ms: u64) {
        self.slots.retain(|_, slot| {
            slot.set.drop_expired(now_unix_ms);
            !slot.set.is_empty()
        });
    }

    /// `None`: the entry doesn't belong under this key, or there is no room for the key.
    fn merge(&mut self, key: &RecordKey, verified: Verified, source: Source, now_unix_ms: u64) -> Option<Merged> {
        let kind = kind_of(key, &verified)?;
        let opened_by = source.origin();
        if !self.slots.contains_key(key) && source != Source::Own && !self.make_room(opened_by, now_unix_ms) {
            return None;
        }
        let salt = self.salt;
        let slot = self.slots.entry(key.clone()).or_insert_with(|| Slot {
            set: AnnouncementSet::new(kind, salt),
            dht_prefix: (kind.per_prefix == usize::MAX).then(|| verified.body().dht_prefix.clone()),
            opened_by,
        });
        Some(slot.set.merge(verified, source, now_unix_ms))
    }

    /// Room for one more key, if `newcomer` has made this peer hold fewer keys than somebody else has.
    fn make_room(&mut self, newcomer: Origin, now_unix_ms: u64) -> bool {
        let has_room = |store: &Self| {
            store.slots.len() < store.max_keys && store.slots.values().map(|s| s.set.len()).sum::<usize>() < MAX_ENTRIES
        };
        if has_room(self) {
            return true;
        }
        self.drop_expired(now_unix_ms);
        if has_room(self) {
            return true;
        }
        let mut opened: HashMap<Origin, usize> = HashMap::new();
        for slot in self.slots.values() {
            *opened.entry(slot.opened_by).or_default() += 1;
        }
        let of_newcomer = opened.get(&newcomer).copied().unwrap_or(0);
        let Some((&greediest, _)) =
            opened.iter().filter(|(_, keys)| **keys > of_newcomer + 1).max_by_key(|(_, keys)| **keys)
        else {
            return false;
        };
        // Any of its keys; which one is not for others to foresee.
        let victim = self
            .slots
            .iter()
            .filter(|(_, slot)| slot.opened_by == greediest)
            .min_by_key(|(key, _)| *blake3::keyed_hash(&self.salt, key.as_ref()).as_bytes())
            .map(|(key, _)| key.clone());
        victim.is_some_and(|key| self.slots.remove(&key).is_some())
    }
}

fn is_by(public_key: &[u8], peer: PeerId) -> bool {
    libp2p::identity::PublicKey::try_decode_protobuf(public_key).is_ok_and(|key| key.to_peer_id() == peer)
}

/// The limits of `key` if the announcement belongs under it.
fn kind_of(key: &RecordKey, verified: &Verified) -> Option<Limits> {
    if *key == models_key() {
        return Some(Limits::MODELS);
    }
    let body = verified.body();
    segments(body.start as usize..body.end as usize)
        .any(|segment| segment_key(&body.dht_prefix, segment) == *key)
        .then_some(Limits::SEGMENT)
}

impl RecordStore for AnnouncementStore {
    // Nothing is replicated or republished by kad: announcers renew every minute, to those who are closest then.
    type RecordsIter<'a> = iter::Empty<Cow<'a, Record>>;
    type ProvidedIter<'a> = iter::Empty<Cow<'a, ProviderRecord>>;

    fn get(&self, key: &RecordKey) -> Option<Cow<'_, Record>> {
        let now = unix_ms();
        let set = &self.slots.get(key)?.set;
        set.fresh(now).next()?;
        Some(Cow::Owned(Record {
            key: key.clone(),
            value: set.encode(now),
            publisher: None,
            expires: Some(Instant::now() + MAX_LIFETIME),
        }))
    }

    fn put(&mut self, record: Record) -> Result<(), StoreError> {
        let now = unix_ms();
        for signed in Entries::decode(record.value.as_slice()).unwrap_or_default().entries {
            match verify(&signed, now) {
                Ok(verified) if verified.peer_id() == self.own => {
                    self.merge(&record.key, verified, Source::Own, now);
                }
                other => tracing::warn!(?other, "an entry that is not this peer's own was put locally"),
            }
        }
        Ok(())
    }

    fn remove(&mut self, key: &RecordKey) {
        self.slots.remove(key);
    }

    fn records(&self) -> Self::RecordsIter<'_> {
        iter::empty()
    }

    fn add_provider(&mut self, _: ProviderRecord) -> Result<(), StoreError> {
        Err(StoreError::MaxProvidedKeys)
    }

    fn providers(&self, _: &RecordKey) -> Vec<ProviderRecord> {
        Vec::new()
    }

    fn provided(&self) -> Self::ProvidedIter<'_> {
        iter::empty()
    }

    fn remove_provider(&mut self, _: &RecordKey, _: &PeerId) {}
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use libp2p::identity::Keypair;

    use super::*;
    use crate::swarm::{
        announcement::{Announcement, next_sequence, tests::sample},
        proto::announcement::SignedAnnouncement,
    };

    fn signed(keypair: &Keypair, change: impl FnOnce(&mut Announcement)) -> SignedAnnouncement {
        let now = unix_ms();
        let mut announcement =
            Announcement { sequence: next_sequence(0, now), expires_unix_ms: now + 60_000, ..sample(keypair) };
        change(&mut announcement);
        announcement.sign(keypair, now).unwrap()
    }

    fn value(entries: &[SignedAnnouncement]) -> Vec<u8> {
        Entries { entries: entries.to_vec() }.encode_to_vec()
    }

    fn bearer(keypair: &Keypair, last: u8) -> Bearer {
        Bearer { peer: keypair.public().to_peer_id(), origin: Origin::V4(Ipv4Addr::new(192, 0, 2, last)) }
    }

    fn store() -> AnnouncementStore {
        AnnouncementStore::new(PeerId::random())
    }

    #[test]
    fn segments_cover_the_span() {
        assert_eq!(segments(0..16), 0..1);
        assert_eq!(segments(0..17), 0..2);
        assert_eq!(segments(15..16), 0..1);
        assert_eq!(segments(16..80), 1..5);
        assert_eq!(segments(79..80), 4..5);
    }

    #[test]
    fn entries_belong_under_the_keys_they_touch() {
        let key = Keypair::generate_ed25519();
        let entry = value(&[signed(&key, |a| a.span = 10..20)]);
        let mut store = store();
        let mut put = |key_: RecordKey| store.accept(&key_, &entry, bearer(&key, 1), unix_ms());
        assert_eq!(put(segment_key("tests/Tiny-1B", 0)), Accepted::News(1));
        assert_eq!(put(segment_key("tests/Tiny-1B", 1)), Accepted::News(1));
        assert_eq!(put(models_key()), Accepted::News(1));
        assert_eq!(put(segment_key("tests/Tiny-1B", 2)), Accepted::News(0));
        assert_eq!(put(segment_key("tests/Other", 0)), Accepted::News(0));
        assert_eq!(put(RecordKey::new(&[0; 32])), Accepted::News(0));
        assert_eq!(store.keys(), 3);
        assert_eq!(store.of_prefix("tests/Tiny-1B", unix_ms()).len(), 1);
        assert_eq!(store.of_prefix("tests/Other", unix_ms()).len(), 0);
    }

    #[test]
    fn puts_are_merged_not_overwritten() {
        let (a, b) = (Keypair::generate_ed25519(), Keypair::generate_ed25519());
        let key = segment_key("tests/Tiny-1B", 0);
        let mut store = store();
        for keypair in [&a, &b] {
            store.accept(&key, &value(&[signed(keypair, |_| ())]), bearer(keypair, 1), unix_ms());
        }
        let record = store.get(&key).unwrap().into_owned();
        assert_eq!(Entries::decode(record.value.as_slice()).unwrap().entries.len(), 2);
    }

    #[test]
    fn an_older_entry_does_not_come_back() {
        let key = Keypair::generate_ed25519();
        let record = segment_key("tests/Tiny-1B", 0);
        let now = unix_ms();
        let old = signed(&key, |a| a.sequence = now);
        let new = signed(&key, |a| a.sequence = now + 1);
        let mut store = store();
        assert_eq!(store.accept(&record, &value(std::slice::from_ref(&new)), bearer(&key, 1), now), Accepted::News(1));
        assert_eq!(store.accept(&record, &value(&[old]), bearer(&key, 1), now), Accepted::News(0));
        assert_eq!(store.of_prefix("tests/Tiny-1B", now)[0].signed(), &new);
    }

    #[test]
    fn forged_expired_and_malformed_entries_are_refused() {
        let key = Keypair::generate_ed25519();
        let record = segment_key("tests/Tiny-1B", 0);
        let mut store = store();
        let mut forged = signed(&key, |_| ());
        forged.signature = vec![0; 64].into();
        let expired = signed(&key, |_| ());
        let mut accept = |value: &[u8], now| store.accept(&record, value, bearer(&key, 1), now);
        assert_eq!(accept(&value(&[forged]), unix_ms()), Accepted::Forged);
        assert_eq!(accept(&value(&[expired]), unix_ms() + 120_000), Accepted::News(0));
        assert!(matches!(accept(b"\xff\xff\xff", unix_ms()), Accepted::Malformed(_)));
        let many = value(&vec![SignedAnnouncement::default(); 65]);
        assert!(matches!(accept(&many, unix_ms()), Accepted::Malformed(_)));
        assert_eq!(store.keys(), 0);
    }

    #[test]
    fn own_entries_come_from_nobody_else() {
        let key = Keypair::generate_ed25519();
        let mut store = AnnouncementStore::new(key.public().to_peer_id());
        let record = segment_key("tests/Tiny-1B", 0);
        let entry = value(&[signed(&key, |_| ())]);
        let stranger = Keypair::generate_ed25519();
        assert_eq!(store.accept(&record, &entry, bearer(&stranger, 1), unix_ms()), Accepted::News(0));
        store.put(Record::new(record.clone(), entry)).unwrap();
        assert!(store.get(&record).is_some());
    }

    #[test]
    fn keys_are_bounded_and_shared_fairly() {
        let attacker = Keypair::generate_ed25519();
        let honest = Keypair::generate_ed25519();
        let mut store = AnnouncementStore { max_keys: 8, ..store() };
        for i in 0..20 {
            let prefix = format!("attack/{i}");
            let entry = value(&[signed(&attacker, |a| a.dht_prefix.clone_from(&prefix))]);
            store.accept(&segment_key(&prefix, 0), &entry, bearer(&attacker, 66), unix_ms());
        }
        assert_eq!(store.keys(), 8);
        let entry = value(&[signed(&honest, |_| ())]);
        let accepted = store.accept(&segment_key("tests/Tiny-1B", 0), &entry, bearer(&honest, 1), unix_ms());
        assert_eq!(accepted, Accepted::News(1));
        assert_eq!(store.keys(), 8);
    }
}
