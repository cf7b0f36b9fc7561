//! Connections and links on demand: one attempt a peer, shared by all who wait for it.

use std::error::Error;

use libp2p::{
    Multiaddr, PeerId, TransportError,
    multiaddr::Protocol,
    swarm::{
        ConnectionId, DialError,
        dial_opts::{DialOpts, PeerCondition},
    },
};
use tokio::sync::oneshot;

use super::Driver;
use crate::swarm::{
    addresses::without_peer,
    link::{self, Link, NewLink},
    streams,
};

/// Peers of the local network that are dialled for having been seen there.
const MAX_NEARBY: usize = 64;

/// A dial that was started for somebody.
pub(super) struct Dial {
    connection: ConnectionId,
    waiting: Vec<oneshot::Sender<Result<(), String>>>,
}

/// A stream that is being opened.
pub(super) struct Opening {
    pub(super) connection: ConnectionId,
    waiting: Vec<oneshot::Sender<Result<Link, String>>>,
}

impl Opening {
    pub(super) fn fail(self, reason: &str) {
        for reply in self.waiting {
            let _ = reply.send(Err(reason.to_owned()));
        }
    }
}

/// Somebody who waits for a peer, or any, to say that it speaks the DHT's protocol.
pub(super) struct Confirmation {
    peer: Option<PeerId>,
    reply: oneshot::Sender<Result<PeerId, String>>,
}

impl Driver {
    pub(super) fn connect(
        &mut self,
        peer: PeerId,
        addresses: Vec<Multiaddr>,
        reply: oneshot::Sender<Result<(), String>>,
    ) {
        if peer == self.shared.peer_id {
            let _ = reply.send(Err("that is this peer itself".to_owned()));
            return;
        }
        if self.shared.is_connected(&peer) {
            let _ = reply.send(Ok(()));
            return;
        }
        if let Some(dial) = self.dials.get_mut(&peer) {
            dial.waiting.push(reply);
            return;
        }
        // Another dial of kad's may be under way with fewer addresses, so this one doesn't wait for that.
        let options = DialOpts::peer_id(peer)
            .condition(PeerCondition::Disconnected)
            .addresses(addresses.iter().map(without_peer).collect())
            .extend_addresses_through_behaviour()
            .build();
        let connection = options.connection_id();
        match self.swarm.dial(options) {
            Ok(()) => {
                self.dials.insert(peer, Dial { connection, waiting: vec![reply] });
            }
            Err(error) => {
                let _ = reply.send(Err(describe(&error)));
            }
        }
    }

    pub(super) fn dial_succeeded(&mut self, peer: &PeerId) {
        for reply in self.dials.remove(peer).map(|dial| dial.waiting).unwrap_or_default() {
            let _ = reply.send(Ok(()));
        }
    }

    pub(super) fn dial_failed(&mut self, peer: PeerId, connection: ConnectionId, error: &DialError) {
        let reason = describe(error);
        tracing::debug!(%peer, reason, "could not connect");
        if self.dials.get(&peer).is_some_and(|dial| dial.connection == connection) {
            for reply in self.dials.remove(&peer).map(|dial| dial.waiting).unwrap_or_default() {
                let _ = reply.send(Err(reason.clone()));
            }
        }
    }

    pub(super) fn confirm(&mut self, peer: Option<PeerId>, reply: oneshot::Sender<Result<PeerId, String>>) {
        let outcome = {
            let peers = self.shared.peers();
            let confirmed =
                peers.iter().find(|(other, known)| known.confirmed && peer.is_none_or(|peer| peer == **other));
            // It says what it is once a connection, which may have been before anybody asked.
            let foreign = || peers.get(&peer?)?.foreign.clone().map(Err);
            confirmed.map(|(peer, _)| Ok(*peer)).or_else(foreign)
        };
        match outcome {
            Some(outcome) => {
                let _ = reply.send(outcome);
            }
            None => {
                self.confirmations.retain(|waiting| !waiting.reply.is_closed());
                self.confirmations.push(Confirmation { peer, reply });
            }
        }
    }

    pub(super) fn succeed_confirmations(&mut self, peer: PeerId) {
        for waiting in self.confirmations.extract_if(.., |waiting| waiting.peer.is_none_or(|other| other == peer)) {
            let _ = waiting.reply.send(Ok(peer));
        }
    }

    pub(super) fn fail_confirmations(&mut self, peer: PeerId, reason: &str) {
        for waiting in self.confirmations.extract_if(.., |waiting| waiting.peer == Some(peer)) {
            let _ = waiting.reply.send(Err(reason.to_owned()));
        }
    }

    pub(super) fn on_discovered_nearby(&mut self, found: Vec<(PeerId, Multiaddr)>) {
        for (peer, address) in found.into_iter().take(MAX_NEARBY) {
            if peer == self.shared.peer_id || self.shared.is_connected(&peer) || self.dials.len() >= MAX_NEARBY {
                continue;
            }
            tracing::info!(%peer, %address, "found a peer on the local network");
            let options = DialOpts::peer_id(peer)
                .condition(PeerCondition::DisconnectedAndNotDialing)
                .addresses(vec![without_peer(&address)])
                .build();
            if let Err(error) = self.swarm.dial(options) {
                tracing::debug!(%peer, reason = describe(&error), "not dialled");
            }
        }
    }

    pub(super) fn open_link(&mut self, peer: PeerId, reply: oneshot::Sender<Result<Link, String>>) {
        if let Some(link) = self.shared.links.outbound(&peer) {
            let _ = reply.send(Ok(link));
            return;
        }
        if let Some(opening) = self.openings.get_mut(&peer) {
            opening.waiting.push(reply);
            return;
        }
        let best = self.shared.peers().get(&peer).and_then(|known| {
            let best = known.connections.iter().min_by_key(|connection| cost_of(&connection.remote));
            best.map(|connection| connection.id)
        });
        match best {
            Some(connection) => {
                self.swarm.behaviour_mut().streams.open(peer, connection);
                self.openings.insert(peer, Opening { connection, waiting: vec![reply] });
            }
            None => {
                let _ = reply.send(Err("the connection was lost".to_owned()));
            }
        }
    }

    pub(super) fn on_stream(&mut self, event: streams::Event) {
        let new = |peer, opened_by_us, stream, limits| NewLink { peer, opened_by_us, stream, limits };
        let limits = self.shared.tuning.link;
        match event {
            streams::Event::Inbound { peer, connection, stream } => {
                tracing::debug!(%peer, %connection, "a peer opened a link");
                link::start(new(peer, false, stream, limits), &self.shared.links, self.service.clone());
            }
            streams::Event::Outbound { peer, connection, result } => {
                let Some(opening) = self.openings.remove(&peer) else { return };
                if opening.connection != connection {
                    self.openings.insert(peer, opening);
                    return;
                }
                let opened = result.and_then(|stream| {
                    link::start(new(peer, true, stream, limits), &self.shared.links, self.service.clone())
                        .ok_or_else(|| "too many links".to_owned())
                });
                for reply in opening.waiting {
                    let _ = reply.send(opened.clone());
                }
            }
        }
    }
}

/// Direct before relayed, and TCP before QUIC, whose packets are all made in user space: it has half the throughput.
fn cost_of(address: &Multiaddr) -> (bool, bool) {
    let has = |wanted: fn(&Protocol<'_>) -> bool| address.iter().any(|part| wanted(&part));
    (has(|part| matches!(part, Protocol::P2pCircuit)), has(|part| matches!(part, Protocol::QuicV1)))
}

/// The error for people: what was tried, and the innermost reason.
pub(super) fn describe(error: &DialError) -> String {
    match error {
        DialError::LocalPeerId { .. } => "that is this peer itself".to_owned(),
        DialError::NoAddresses => "no address of it is known".to_owned(),
        DialError::WrongPeerId { obtained, address } => {
            format!("the peer at {} is {obtained}, not the one that was named", without_peer(address))
        }
        DialError::Aborted => "the attempt was given up".to_owned(),
        DialError::DialPeerConditionFalse(_) => "there is a connection already".to_owned(),
        DialError::Denied { cause } => innermost(cause),
        DialError::Transport(attempts) => attempts
            .iter()
            .map(|(address, error)| match error {
                TransportError::MultiaddrNotSupported(_) => {
                    format!("{}: no transport for such an address", without_peer(address))
                }
                TransportError::Other(error) => format!("{}: {}", without_peer(address), innermost(error)),
            })
            .collect::<Vec<_>>()
            .join(", "),
    }
}

fn innermost(error: &dyn Error) -> String {
    let mut error = error;
    while let Some(source) = error.source() {
        error = source;
    }
    error.to_string()
}
