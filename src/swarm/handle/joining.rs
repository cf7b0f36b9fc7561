//! Joining: dial, make sure that it is a helion node, get to know the others.

use std::time::Duration;

use futures::{StreamExt, stream::FuturesUnordered};
use libp2p::{Multiaddr, PeerId};
use tokio::time::Instant;

use super::{Gone, Swarm, took_too_long};
use crate::swarm::{
    Role,
    addresses::split_peer,
    driver::Command,
    error::{JoinError, Unreachable},
};

/// Once one initial peer has answered, how long the others still have.
const GRACE: Duration = Duration::from_secs(1);

/// How long the local network is listened to: mDNS answers within a second or two.
const NEARBY: Duration = Duration::from_secs(3);

/// A swarm that was joined.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Joined {
    /// Initial peers that answered.
    pub peers: usize,
    /// DHT requests sent to get to know the others.
    pub requests: usize,
}

impl Swarm {
    /// Dials the initial peers of the configuration and joins their DHT. Succeeds if at least one of them answers.
    pub async fn join(&self, timeout: Duration) -> Result<Joined, JoinError> {
        self.join_through(&self.0.initial_peers, timeout).await
    }

    /// Joins through the initial peers; where none are configured, through the local network, and then through the peers
    /// that are remembered from before.
    ///
    /// # Errors
    /// Of the first of these ways that there is; [`JoinError::NoPeers`] where there is none.
    pub async fn search(&self, timeout: Duration) -> Result<Joined, JoinError> {
        if !self.0.initial_peers.is_empty() {
            return self.join(timeout).await;
        }
        let nearby = match self.0.mdns {
            true => self.join_nearby(timeout.min(NEARBY)).await,
            false => Err(JoinError::NoPeers),
        };
        match (nearby, self.remembered()) {
            (Err(_), remembered) if !remembered.is_empty() => self.join_through(&remembered, timeout).await,
            (nearby, _) => nearby,
        }
    }

    /// Dials these peers, each address ending in `/p2p/<peer id>`, and joins their DHT.
    pub async fn join_through(&self, peers: &[Multiaddr], timeout: Duration) -> Result<Joined, JoinError> {
        let deadline = Instant::now() + timeout;
        let mut failures: Vec<(Multiaddr, String)> = Vec::new();
        let mut by_peer: Vec<(PeerId, Vec<Multiaddr>)> = Vec::new();
        for address in peers {
            match split_peer(address) {
                Some((peer, rest)) => match by_peer.iter_mut().find(|(other, _)| *other == peer) {
                    Some((_, addresses)) => addresses.push(rest),
                    None => by_peer.push((peer, vec![rest])),
                },
                None => failures.push((address.clone(), "it does not end in /p2p/<peer id>".to_owned())),
            }
        }
        if by_peer.is_empty() && failures.is_empty() {
            return Err(JoinError::NoPeers);
        }
        let mut attempts: FuturesUnordered<_> = by_peer
            .into_iter()
            .map(|(peer, addresses)| async move {
                let reached = tokio::time::timeout_at(deadline, self.reach(peer, &addresses)).await;
                (peer, addresses, reached.unwrap_or(Ok(Err(took_too_long(timeout)))))
            })
            .collect();
        let mut reached = 0;
        let mut patience = deadline;
        while let Ok(Some((peer, addresses, outcome))) = tokio::time::timeout_at(patience, attempts.next()).await {
            match outcome {
                Ok(Ok(())) => {
                    reached += 1;
                    patience = patience.min(Instant::now() + GRACE);
                }
                Ok(Err(reason)) => {
                    tracing::debug!(%peer, reason, "an initial peer could not be reached");
                    let named = addresses.first().cloned().unwrap_or_else(Multiaddr::empty);
                    failures.push((named.clone().with_p2p(peer).unwrap_or(named), reason));
                }
                Err(Gone) => return Err(JoinError::Stopped),
            }
        }
        if reached == 0 {
            return Err(JoinError::Unreachable(Unreachable(failures)));
        }
        if !failures.is_empty() {
            tracing::warn!("some of the initial peers could not be reached ({})", Unreachable(failures));
        }
        let requests = self.get_to_know(deadline).await?;
        Ok(Joined { peers: reached, requests })
    }

    /// Waits for a peer of the local network (which mDNS finds and dials by itself), or any other that comes first.
    pub async fn join_nearby(&self, timeout: Duration) -> Result<Joined, JoinError> {
        let deadline = Instant::now() + timeout;
        let anybody = self.command(|reply| Command::Confirm { peer: None, reply });
        match tokio::time::timeout_at(deadline, anybody).await {
            Ok(Ok(Ok(_peer))) => Ok(Joined { peers: 1, requests: self.get_to_know(deadline).await? }),
            Ok(Err(Gone)) => Err(JoinError::Stopped),
            Ok(Ok(Err(_))) | Err(_) => Err(JoinError::NobodyNear(timeout)),
        }
    }

    async fn reach(&self, peer: PeerId, addresses: &[Multiaddr]) -> Result<Result<(), String>, Gone> {
        if let Err(reason) = self.connect(peer, addresses).await? {
            return Ok(Err(reason));
        }
        let confirmed = self.command(|reply| Command::Confirm { peer: Some(peer), reply }).await?;
        Ok(confirmed.map(|_| ()))
    }

    /// A server fills its routing table. A client's look-ups do that on their way; what else its initial peers could tell it
    /// beforehand would come from the same mouths.
    async fn get_to_know(&self, deadline: Instant) -> Result<usize, JoinError> {
        if self.0.shared.role == Role::Client {
            return Ok(0);
        }
        let bootstrap = self.command(|reply| Command::Bootstrap { reply });
        let requests = match tokio::time::timeout_at(deadline, bootstrap).await {
            Ok(Ok(requests)) => requests,
            Ok(Err(Gone)) => return Err(JoinError::Stopped),
            // It goes on in the background, and is good enough meanwhile.
            Err(_) => 0,
        };
        // What was announced before is put again, now that there are others to put it to.
        self.renew().await;
        Ok(requests)
    }
}
