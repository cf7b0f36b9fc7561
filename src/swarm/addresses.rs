//! Which multiaddresses others can use.
//!
//! Plain decisions, without IO: what to hand out of what this peer listens on, what to keep of what a peer says of itself,
//! and when to believe what others say they see.

use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
};

use libp2p::{Multiaddr, PeerId, multiaddr::Protocol};

use super::announcement::{MAX_ADDRESSES, set::Origin};

/// Peers at this many places must agree before an observed address counts: one could say anything.
const OBSERVERS_NEEDED: usize = 2;
/// Observed addresses that are being counted.
const MAX_CANDIDATES: usize = 32;

/// The address of the peer behind `/p2p`, and the rest. `None` where there is no peer id at the end.
pub fn split_peer(address: &Multiaddr) -> Option<(PeerId, Multiaddr)> {
    let mut rest = address.clone();
    match rest.pop() {
        Some(Protocol::P2p(peer)) if !rest.is_empty() => Some((peer, rest)),
        _ => None,
    }
}

/// The address without a peer id at its end.
pub(super) fn without_peer(address: &Multiaddr) -> Multiaddr {
    split_peer(address).map_or_else(|| address.clone(), |(_, rest)| rest)
}

pub(super) fn ip_of(address: &Multiaddr) -> Option<IpAddr> {
    match address.iter().next()? {
        Protocol::Ip4(ip) => Some(ip.into()),
        Protocol::Ip6(ip) => Some(ip.into()),
        _ => None,
    }
}

fn is_loopback(address: &Multiaddr) -> bool {
    ip_of(address).is_some_and(|ip| ip.is_loopback())
}

fn is_unspecified(address: &Multiaddr) -> bool {
    ip_of(address).is_some_and(|ip| ip.is_unspecified())
}

/// IPv6 addresses that mean something on one link only, where the receiver can't tell which.
fn is_link_local(address: &Multiaddr) -> bool {
    matches!(ip_of(address), Some(IpAddr::V6(ip)) if ip.is_unicast_link_local())
}

/// Reachable from anywhere, as far as the number tells.
fn is_public(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => {
            let [a, b, ..] = ip.octets();
            let is_shared = a == 100 && (64..128).contains(&b);
            !(ip.is_private()
                || ip.is_loopback()
                || ip.is_link_local()
                || ip.is_unspecified()
                || ip.is_multicast()
                || is_shared)
        }
        IpAddr::V6(ip) => {
            !(ip.is_loopback()
                || ip.is_unspecified()
                || ip.is_multicast()
                || ip.is_unicast_link_local()
                || ip.is_unique_local())
        }
    }
}

/// What to hand out: the listening and the believed observed addresses, public ones first, without unspecified and link-local
/// ones, and without loopback unless there is nothing else.
pub(super) fn usable<'a>(addresses: impl IntoIterator<Item = &'a Multiaddr>) -> Vec<Multiaddr> {
    let mut usable: Vec<Multiaddr> = Vec::new();
    for address in addresses.into_iter().map(without_peer) {
        if !is_unspecified(&address) && !is_link_local(&address) && !usable.contains(&address) {
            usable.push(address);
        }
    }
    if usable.iter().any(|address| !is_loopback(address)) {
        usable.retain(|address| !is_loopback(address));
    }
    usable.sort_by_key(|address| !ip_of(address).is_none_or(is_public));
    usable.truncate(MAX_ADDRESSES);
    usable
}

/// Of what a peer says it listens on, what is worth dialling: its loopback addresses only if it is on this machine.
pub(super) fn of_peer<'a>(
    said: impl IntoIterator<Item = &'a Multiaddr>,
    connected_from: Option<&Multiaddr>,
) -> Vec<Multiaddr> {
    let is_local = connected_from.is_none_or(is_loopback);
    let mut addresses: Vec<Multiaddr> = said
        .into_iter()
        .map(without_peer)
        .filter(|address| !is_unspecified(address) && !is_link_local(address) && (is_local || !is_loopback(address)))
        .collect();
    addresses.truncate(MAX_ADDRESSES);
    addresses
}

/// Addresses at which others say they see this peer.
#[derive(Debug, Default)]
pub(super) struct Observed {
    candidates: HashMap<Multiaddr, HashSet<Origin>>,
}

impl Observed {
    /// Notes that a peer at `observer` sees this one, which listens on `listening`, at `seen`. Returns addresses that are
    /// believed from now on. Where this peer dialled, the port seen is of that connection, so the listening port takes its
    /// place: right for hosts with a public address behind a plain port forward.
    pub(super) fn note(&mut self, seen: &Multiaddr, observer: &Multiaddr, listening: &[Multiaddr]) -> Vec<Multiaddr> {
        let Some(ip) = ip_of(seen).filter(|ip| is_public(*ip)) else { return Vec::new() };
        let observer = Origin::of(observer);
        let mut believed = Vec::new();
        for address in listening.iter().filter(|address| is_quic(address) == is_quic(seen)) {
            let Some(candidate) = with_ip(address, ip).filter(|candidate| !listening.contains(candidate)) else {
                continue;
            };
            if self.candidates.len() >= MAX_CANDIDATES && !self.candidates.contains_key(&candidate) {
                continue;
            }
            let observers = self.candidates.entry(candidate.clone()).or_default();
            if observers.len() < OBSERVERS_NEEDED && observers.insert(observer) && observers.len() == OBSERVERS_NEEDED {
                believed.push(candidate);
            }
        }
        believed
    }
}

fn is_quic(address: &Multiaddr) -> bool {
    address.iter().any(|part| matches!(part, Protocol::QuicV1))
}

/// The address with another IP of the same version; `None` if it has none, or one of this machine alone.
fn with_ip(address: &Multiaddr, ip: IpAddr) -> Option<Multiaddr> {
    match (ip_of(address)?, ip) {
        (IpAddr::V4(old), IpAddr::V4(new)) if !old.is_loopback() => address.replace(0, |_| Some(Protocol::Ip4(new))),
        (IpAddr::V6(old), IpAddr::V6(new)) if !old.is_loopback() => address.replace(0, |_| Some(Protocol::Ip6(new))),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(texts: &[&str]) -> Vec<Multiaddr> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn what_is_handed_out() {
        let cases: &[(&[&str], &[&str])] = &[
            (&["/ip4/0.0.0.0/tcp/1", "/ip4/127.0.0.1/tcp/1"], &["/ip4/127.0.0.1/tcp/1"]),
            (&["/ip4/127.0.0.1/tcp/1", "/ip4/10.0.0.5/tcp/1"], &["/ip4/10.0.0.5/tcp/1"]),
            (&["/ip6/fe80::1/tcp/1", "/ip6/::1/tcp/1"], &["/ip6/::1/tcp/1"]),
            (&["/ip4/10.0.0.5/tcp/1", "/ip4/8.8.8.8/tcp/1"], &["/ip4/8.8.8.8/tcp/1", "/ip4/10.0.0.5/tcp/1"]),
            (&["/dns4/example.org/tcp/1"], &["/dns4/example.org/tcp/1"]),
        ];
        for (addresses, expected) in cases {
            assert_eq!(usable(&all(addresses)), all(expected));
        }
    }

    #[test]
    fn a_peers_loopback_counts_on_its_own_machine_only() {
        let said = all(&["/ip4/127.0.0.1/tcp/1", "/ip4/10.0.0.5/tcp/1", "/ip4/0.0.0.0/tcp/1"]);
        let here = "/ip4/127.0.0.1/tcp/9".parse().unwrap();
        let there = "/ip4/10.0.0.9/tcp/9".parse().unwrap();
        assert_eq!(of_peer(&said, Some(&here)), all(&["/ip4/127.0.0.1/tcp/1", "/ip4/10.0.0.5/tcp/1"]));
        assert_eq!(of_peer(&said, Some(&there)), all(&["/ip4/10.0.0.5/tcp/1"]));
    }

    #[test]
    fn one_observer_is_not_enough() {
        let listening = all(&["/ip4/10.0.0.5/tcp/31337", "/ip4/10.0.0.5/udp/31337/quic-v1"]);
        let seen: Multiaddr = "/ip4/203.0.113.7/tcp/50000".parse().unwrap();
        let observer = |last: u8| -> Multiaddr { format!("/ip4/198.51.100.{last}/tcp/1").parse().unwrap() };
        let mut observed = Observed::default();
        assert!(observed.note(&seen, &observer(1), &listening).is_empty());
        assert!(observed.note(&seen, &observer(1), &listening).is_empty());
        assert_eq!(observed.note(&seen, &observer(2), &listening), all(&["/ip4/203.0.113.7/tcp/31337"]));
        assert!(observed.note(&seen, &observer(3), &listening).is_empty());
        let private = "/ip4/192.168.1.2/tcp/1".parse().unwrap();
        assert!(observed.note(&private, &observer(1), &listening).is_empty());
    }

    #[test]
    fn peers_are_split_off() {
        let peer = PeerId::random();
        let address: Multiaddr = format!("/ip4/1.2.3.4/tcp/5/p2p/{peer}").parse().unwrap();
        assert_eq!(split_peer(&address), Some((peer, "/ip4/1.2.3.4/tcp/5".parse().unwrap())));
        assert_eq!(split_peer(&"/ip4/1.2.3.4/tcp/5".parse().unwrap()), None);
        assert_eq!(split_peer(&format!("/p2p/{peer}").parse().unwrap()), None);
    }
}
