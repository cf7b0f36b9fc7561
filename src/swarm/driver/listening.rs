//! Listening: every address or an error that says what to do, except that IPv6 trouble doesn't stop a peer that has IPv4.

use std::{
    collections::HashSet,
    io,
    net::{SocketAddr, TcpListener, UdpSocket},
    time::Duration,
};

use futures::StreamExt;
use libp2p::{Multiaddr, TransportError, core::transport::ListenerId, multiaddr::Protocol, swarm::SwarmEvent};

use super::Driver;
use crate::swarm::{StartError, addresses::ip_of};

/// Sockets are bound at once; their addresses come with the next events.
const LISTENING_TIMEOUT: Duration = Duration::from_secs(5);

impl Driver {
    /// Listens on all of `addresses`, and returns when their final addresses are known.
    pub(in crate::swarm) async fn listen(&mut self, addresses: &[Multiaddr]) -> Result<(), StartError> {
        let has_ipv4 = addresses.iter().any(|address| !is_ipv6(address));
        let tolerate = |address: &Multiaddr, error: StartError| {
            if is_ipv6(address) && has_ipv4 {
                tracing::warn!(%error, "going on with IPv4 alone");
                Ok(())
            } else {
                Err(error)
            }
        };
        // All of them before the first: a dual-stack check would trip over this peer's own IPv4 socket.
        for address in addresses {
            check_port(address).or_else(|error| tolerate(address, error))?;
        }
        let mut pending: HashSet<ListenerId> = HashSet::new();
        for address in addresses {
            match self.swarm.listen_on(address.clone()) {
                Ok(id) => {
                    pending.insert(id);
                }
                Err(error) => tolerate(address, listen_error(address, error))?,
            }
        }
        let deadline = tokio::time::Instant::now() + LISTENING_TIMEOUT;
        while !pending.is_empty() {
            let Ok(event) = tokio::time::timeout_at(deadline, self.swarm.select_next_some()).await else { break };
            match &event {
                SwarmEvent::NewListenAddr { listener_id, .. } | SwarmEvent::ListenerClosed { listener_id, .. } => {
                    pending.remove(listener_id);
                }
                _ => {}
            }
            self.on_event(event);
        }
        match addresses.first() {
            Some(address) if self.listening.is_empty() => {
                Err(StartError::Listen { address: address.clone(), reason: "no network interface came up".to_owned() })
            }
            _ => Ok(()),
        }
    }
}

fn is_ipv6(address: &Multiaddr) -> bool {
    ip_of(address).is_some_and(|ip| ip.is_ipv6())
}

/// Binds the address once before libp2p does. libp2p binds TCP sockets with `SO_REUSEPORT`, so that two nodes of one user would
/// share a port without a word, and each get half of the connections; and its errors don't say of what kind they are.
fn check_port(address: &Multiaddr) -> Result<(), StartError> {
    let port = address.iter().find_map(|part| match part {
        Protocol::Tcp(port) => Some((true, port)),
        Protocol::Udp(port) => Some((false, port)),
        _ => None,
    });
    let (Some(ip), Some((is_tcp, port))) = (ip_of(address), port) else { return Ok(()) };
    let socket = SocketAddr::new(ip, port);
    let bound = if is_tcp { TcpListener::bind(socket).map(drop) } else { UdpSocket::bind(socket).map(drop) };
    let reason = |text: &str| StartError::Listen { address: address.clone(), reason: text.to_owned() };
    bound.map_err(|error| match error.kind() {
        io::ErrorKind::AddrInUse => StartError::PortInUse { address: address.clone() },
        io::ErrorKind::AddrNotAvailable => reason("this machine has no such address"),
        io::ErrorKind::PermissionDenied => reason("not allowed; ports below 1024 need privileges"),
        _ => reason(&error.to_string()),
    })
}

fn listen_error(address: &Multiaddr, error: TransportError<io::Error>) -> StartError {
    match error {
        TransportError::MultiaddrNotSupported(_) => StartError::BadListenAddress { address: address.clone() },
        TransportError::Other(error) => StartError::Listen { address: address.clone(), reason: error.to_string() },
    }
}
