//! Which announcements one DHT key keeps: a set with a merge, and no clock or IO of its own.
//!
//! One entry a peer: the highest sequence wins, and expired ones drop. Identities are free, so room is given out by where an
//! entry came from: each source address may bring so many, and when the set is full the source that has most gives way, not
//! the newcomer and not the oldest. Within a source the order is by a keyed hash of the peer id with a salt that never leaves
//! this process, so that nobody can choose a key pair that outranks a given peer's. An entry that its own peer brought over
//! its own connection (direct) goes before one that somebody else handed on (replicated), and a copy from somebody else never
//! moves a peer out of the place that its own put gave it.
//!
//! What is kept is the best prefix of one total order, and adding entries only ever pushes others back in it. So the outcome
//! doesn't depend on the order of arrival, as long as each peer keeps coming from one source.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use libp2p::{Multiaddr, PeerId, multiaddr::Protocol};
use prost::Message;

use super::Verified;
use crate::swarm::proto::announcement::{Entries, SignedAnnouncement};

/// Who shares a quota: the addresses that one party is likely to control.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Origin {
    /// This machine. Whoever puts from here owns the machine, so there is nothing to ration.
    Loopback,
    /// One IPv4 address.
    V4(Ipv4Addr),
    /// An IPv6 /48: what a provider hands to one customer.
    V6([u16; 3]),
    /// Anything without an IP address.
    Other,
}

impl Origin {
    /// The origin of what arrives over a connection from `address`.
    pub fn of(address: &Multiaddr) -> Self {
        let ip = address.iter().find_map(|part| match part {
            Protocol::Ip4(ip) => Some(IpAddr::V4(ip)),
            Protocol::Ip6(ip) => Some(ip.to_canonical()),
            _ => None,
        });
        match ip {
            Some(ip) if ip.is_loopback() => Self::Loopback,
            Some(IpAddr::V4(ip)) => Self::V4(ip),
            Some(IpAddr::V6(ip)) => Self::V6(network_of(ip)),
            None => Self::Other,
        }
    }
}

fn network_of(ip: Ipv6Addr) -> [u16; 3] {
    let [a, b, c, ..] = ip.segments();
    [a, b, c]
}

/// How an entry came here. The smaller, the better its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Source {
    /// This peer's own entry.
    Own,
    /// Its peer put it, over its own connection.
    Direct(Origin),
    /// Somebody else did.
    Replicated(Origin),
}

impl Source {
    /// Who answers for it.
    pub fn origin(self) -> Origin {
        match self {
            Self::Own => Origin::Loopback,
            Self::Direct(origin) | Self::Replicated(origin) => origin,
        }
    }

    fn tier(self) -> u8 {
        match self {
            Self::Own => 0,
            Self::Direct(_) => 1,
            Self::Replicated(_) => 2,
        }
    }
}

/// The bounds of a set.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Entries in all.
    pub entries: usize,
    /// Bytes of the encoded set.
    pub encoded_bytes: usize,
    /// Entries that one origin may bring for itself.
    pub direct_per_origin: usize,
    /// Entries of others that one origin may bring.
    pub replicated_per_origin: usize,
    /// Entries under one DHT prefix, where a key holds several.
    pub per_prefix: usize,
}

impl Limits {
    /// Of a segment's key: 64 entries and 48 KiB. A site behind one address may have half of it to itself.
    pub const SEGMENT: Self = Self {
        entries: 64,
        encoded_bytes: 48 * 1024,
        direct_per_origin: 32,
        replicated_per_origin: 8,
        per_prefix: usize::MAX,
    };
    /// Of the key that lists the models: a few nodes stand for each, so that a popular model doesn't hide the others.
    pub const MODELS: Self = Self { per_prefix: 3, ..Self::SEGMENT };
}

/// What became of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Merged {
    /// It is the peer's first here.
    Added,
    /// It replaced an older one of its peer.
    Updated,
    /// The set has this one or a newer one.
    Known,
    /// There was no room for it.
    NoRoom,
    /// It counts no more.
    Expired,
}

/// The announcements of one DHT key.
#[derive(Debug)]
pub struct AnnouncementSet {
    limits: Limits,
    salt: [u8; 32],
    entries: HashMap<PeerId, Held>,
}

#[derive(Debug)]
struct Held {
    verified: Verified,
    source: Source,
    /// The place among the entries of one source.
    rank: [u8; 8],
}

impl Held {
    /// Higher wins: the sequence, then (a peer that signs two bodies with one number) the bytes, so that all agree.
    fn version(&self) -> (u64, &[u8]) {
        version(&self.verified)
    }
}

fn version(verified: &Verified) -> (u64, &[u8]) {
    (verified.body().sequence, verified.signed().body.as_ref())
}

impl AnnouncementSet {
    /// An empty set. `salt` is this process's own secret.
    pub fn new(limits: Limits, salt: [u8; 32]) -> Self {
        Self { limits, salt, entries: HashMap::new() }
    }

    /// How many entries it holds.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether it holds none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Whether exactly this entry is held already: a check that saves verifying it again.
    pub fn holds(&self, signed: &SignedAnnouncement) -> bool {
        self.entries.values().any(|held| held.verified.signed() == signed)
    }

    /// The entry of a peer.
    pub fn get(&self, peer: &PeerId) -> Option<&Verified> {
        self.entries.get(peer).map(|held| &held.verified)
    }

    /// Takes an entry in, if it is news and there is room.
    pub fn merge(&mut self, verified: Verified, source: Source, now_unix_ms: u64) -> Merged {
        self.drop_expired(now_unix_ms);
        if verified.body().expires_unix_ms <= now_unix_ms {
            return Merged::Expired;
        }
        let peer = verified.peer_id();
        let outcome = match self.entries.get_mut(&peer) {
            Some(held) => {
                let newer = version(&verified) > held.version();
                // Only the peer itself can put directly, so its better place is kept whoever brings the next entry.
                let better_place = source < held.source;
                if newer && source.tier() <= held.source.tier() || better_place {
                    held.source = source;
                }
                if newer {
                    held.verified = verified;
                }
                if newer { Merged::Updated } else { Merged::Known }
            }
            None => {
                let rank = self.rank(&peer);
                self.entries.insert(peer, Held { verified, source, rank });
                Merged::Added
            }
        };
        self.trim();
        if self.entries.contains_key(&peer) { outcome } else { Merged::NoRoom }
    }

    /// Forgets what counts no more.
    pub fn drop_expired(&mut self, now_unix_ms: u64) {
        self.entries.retain(|_, held| held.verified.body().expires_unix_ms > now_unix_ms);
    }

    /// The entries that count at `now_unix_ms`, best places first.
    pub fn fresh(&self, now_unix_ms: u64) -> impl Iterator<Item = &Verified> {
        self.in_order()
            .into_iter()
            .map(|held| &held.verified)
            .filter(move |verified| verified.body().expires_unix_ms > now_unix_ms)
    }

    /// The DHT record's value: the fresh entries, best places first, as many as fit.
    pub fn encode(&self, now_unix_ms: u64) -> Vec<u8> {
        let mut bytes = 0;
        let entries = self
            .fresh(now_unix_ms)
            .map(|verified| verified.signed().clone())
            .take_while(|signed| {
                let length = signed.encoded_len();
                bytes += 1 + prost::length_delimiter_len(length) + length;
                bytes <= self.limits.encoded_bytes
            })
            .collect();
        Entries { entries }.encode_to_vec()
    }

    fn rank(&self, peer: &PeerId) -> [u8; 8] {
        let mut rank = [0; 8];
        rank.copy_from_slice(&blake3::keyed_hash(&self.salt, &peer.to_bytes()).as_bytes()[..8]);
        rank
    }

    fn quota(&self, source: Source) -> usize {
        match source {
            Source::Own | Source::Direct(Origin::Loopback) => usize::MAX,
            Source::Direct(_) => self.limits.direct_per_origin,
            Source::Replicated(_) => self.limits.replicated_per_origin,
        }
    }

    /// All entries, those within their quotas first and in fair rounds: the first of every source, then the second of every
    /// source, and so on; direct ones before replicated ones. Entries over a quota are left out.
    fn in_order(&self) -> Vec<&Held> {
        let mut by_rank: Vec<&Held> = self.entries.values().collect();
        by_rank.sort_unstable_by_key(|held| (held.source.tier(), held.rank));
        let mut of_prefix: HashMap<&str, usize> = HashMap::new();
        let mut of_source: HashMap<Source, usize> = HashMap::new();
        let mut placed = Vec::with_capacity(by_rank.len());
        for held in by_rank {
            let prefix = of_prefix.entry(&held.verified.body().dht_prefix).or_default();
            let round = of_source.entry(held.source).or_default();
            if *prefix < self.limits.per_prefix && *round < self.quota(held.source) {
                placed.push(((held.source.tier(), *round, held.rank), held));
                *prefix += 1;
                *round += 1;
            }
        }
        placed.sort_unstable_by_key(|(place, _)| *place);
        placed.into_iter().map(|(_, held)| held).collect()
    }

    fn trim(&mut self) {
        let keep: Vec<PeerId> =
            self.in_order().into_iter().take(self.limits.entries).map(|held| held.verified.peer_id()).collect();
        if keep.len() < self.entries.len() {
            self.entries.retain(|peer, _| keep.contains(peer));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::OnceLock;

    use libp2p::identity::Keypair;
    use proptest::prelude::*;

    use super::*;
    use crate::swarm::announcement::{
        Announcement,
        tests::{NOW, sample},
        verify,
    };

    const PEERS: usize = 100;
    const VERSIONS: u64 = 3;

    /// Signed once, for all cases: `[peer][version]`.
    fn pool() -> &'static Vec<Vec<Verified>> {
        static POOL: OnceLock<Vec<Vec<Verified>>> = OnceLock::new();
        POOL.get_or_init(|| {
            (0..PEERS)
                .map(|_| Keypair::generate_ed25519())
                .map(|key| (0..VERSIONS).map(|v| entry(&key, v)).collect())
                .collect()
        })
    }

    fn entry(keypair: &Keypair, version: u64) -> Verified {
        let announcement = Announcement {
            sequence: NOW + version,
            public_name: "n".repeat(version as usize * 40),
            expires_unix_ms: NOW + 60_000 + version,
            ..sample(keypair)
        };
        verify(&announcement.sign(keypair, NOW).unwrap(), NOW).unwrap()
    }

    /// Each peer has one source; a few addresses have many peers.
    fn source(peer: usize) -> Source {
        match peer % 10 {
            0..5 => Source::Direct(Origin::V4(Ipv4Addr::new(10, 0, 0, 1))),
            5 => Source::Replicated(Origin::V4(Ipv4Addr::new(10, 0, 0, 2))),
            6 => Source::Direct(Origin::Loopback),
            _ => Source::Direct(Origin::V4(Ipv4Addr::new(10, 0, 1, peer as u8))),
        }
    }

    fn merged(order: &[(usize, u64)]) -> AnnouncementSet {
        let mut set = AnnouncementSet::new(Limits::SEGMENT, [3; 32]);
        for &(peer, version) in order {
            set.merge(pool()[peer][version as usize].clone(), source(peer), NOW);
        }
        set
    }

    fn content(set: &AnnouncementSet) -> Vec<(PeerId, u64)> {
        set.fresh(NOW).map(|verified| (verified.peer_id(), verified.body().sequence)).collect()
    }

    fn arrivals() -> impl Strategy<Value = Vec<(usize, u64)>> {
        prop::collection::vec((0..PEERS, 0..VERSIONS), 0..300)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn the_order_of_arrival_does_not_matter(order in arrivals(), seed: u64) {
            let mut shuffled = order.clone();
            shuffled.sort_by_key(|arrival| {
                let bytes: Vec<u8> = [seed, arrival.0 as u64, arrival.1].iter().flat_map(|n| n.to_le_bytes()).collect();
                *blake3::hash(&bytes).as_bytes()
            });
            prop_assert_eq!(content(&merged(&order)), content(&merged(&shuffled)));
        }

        #[test]
        fn merging_again_changes_nothing(order in arrivals()) {
            let twice = [order.clone(), order.clone()].concat();
            prop_assert_eq!(content(&merged(&order)), content(&merged(&twice)));
        }

        #[test]
        fn a_set_is_bounded(order in arrivals()) {
            let set = merged(&order);
            prop_assert!(set.len() <= 64);
            prop_assert!(set.encode(NOW).len() <= 48 * 1024);
            let from_one = set.entries.values().filter(|h| h.source == source(0)).count();
            prop_assert!(from_one <= 32, "{} entries of one address", from_one);
        }

        #[test]
        fn the_newest_is_kept(order in arrivals()) {
            let set = merged(&order);
            for verified in set.fresh(NOW) {
                let newest = order.iter().filter(|(p, _)| pool()[*p][0].peer_id() == verified.peer_id()).map(|(_, v)| *v);
                prop_assert_eq!(Some(verified.body().sequence - NOW), newest.max());
            }
        }
    }

    #[test]
    fn expired_entries_drop() {
        let mut set = merged(&[(0, 0), (1, 2)]);
        assert_eq!(set.fresh(NOW + 60_001).count(), 1);
        set.drop_expired(NOW + 60_001);
        assert_eq!(set.len(), 1);
        assert_eq!(set.merge(pool()[2][0].clone(), source(2), NOW + 60_000), Merged::Expired);
    }

    #[test]
    fn one_address_cannot_push_the_others_out() {
        let address = |last| Source::Direct(Origin::V4(Ipv4Addr::new(192, 0, 2, last)));
        let mut set = AnnouncementSet::new(Limits::SEGMENT, [3; 32]);
        // 40 honest peers at addresses of their own, then 60 of one attacker.
        for peer in 0..40 {
            assert_eq!(set.merge(pool()[peer][0].clone(), address(peer as u8), NOW), Merged::Added);
        }
        for peer in 40..PEERS {
            set.merge(pool()[peer][0].clone(), address(250), NOW);
        }
        assert!((0..40).all(|peer| set.get(&pool()[peer][0].peer_id()).is_some()));
        assert_eq!(set.len(), 64);
        // A newcomer at an address of its own takes a place from the attacker.
        let newcomer = Keypair::generate_ed25519();
        assert_eq!(set.merge(entry(&newcomer, 0), address(99), NOW), Merged::Added);
        assert!((0..40).all(|peer| set.get(&pool()[peer][0].peer_id()).is_some()));
    }

    #[test]
    fn a_copy_from_somebody_else_does_not_move_a_peer() {
        let direct = Source::Direct(Origin::V4(Ipv4Addr::new(192, 0, 2, 1)));
        let copied = Source::Replicated(Origin::V4(Ipv4Addr::new(192, 0, 2, 250)));
        let mut set = AnnouncementSet::new(Limits::SEGMENT, [3; 32]);
        let peer = pool()[0][0].peer_id();
        set.merge(pool()[0][0].clone(), direct, NOW);
        assert_eq!(set.merge(pool()[0][1].clone(), copied, NOW), Merged::Updated);
        assert_eq!(set.entries[&peer].source, direct);
        // And one that came as a copy first gets its place with its own put.
        set.merge(pool()[1][1].clone(), copied, NOW);
        assert_eq!(set.merge(pool()[1][1].clone(), direct, NOW), Merged::Known);
        assert_eq!(set.entries[&pool()[1][0].peer_id()].source, direct);
    }

    #[test]
    fn a_popular_model_does_not_hide_the_others() {
        let mut set = AnnouncementSet::new(Limits::MODELS, [3; 32]);
        for (i, versions) in pool().iter().enumerate() {
            set.merge(versions[0].clone(), source(i), NOW);
        }
        assert_eq!(set.len(), 3);
        let key = Keypair::generate_ed25519();
        let rare = Announcement { dht_prefix: "tests/rare".into(), ..sample(&key) };
        let rare = verify(&rare.sign(&key, NOW).unwrap(), NOW).unwrap();
        assert_eq!(set.merge(rare, source(0), NOW), Merged::Added);
    }

    #[test]
    fn origins_group_addresses() {
        let origin = |text: &str| Origin::of(&text.parse().unwrap());
        assert_eq!(origin("/ip4/192.0.2.1/tcp/1"), Origin::V4(Ipv4Addr::new(192, 0, 2, 1)));
        assert_eq!(origin("/ip4/127.0.0.1/tcp/1"), Origin::Loopback);
        assert_eq!(origin("/ip6/::1/tcp/1"), Origin::Loopback);
        assert_eq!(origin("/ip6/::ffff:192.0.2.1/tcp/1"), Origin::V4(Ipv4Addr::new(192, 0, 2, 1)));
        assert_eq!(origin("/ip6/2001:db8:1:2::1/tcp/1"), origin("/ip6/2001:db8:1:3::2/udp/1/quic-v1"));
        assert_eq!(origin("/memory/1"), Origin::Other);
    }
}
