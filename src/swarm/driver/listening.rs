//! Listening: every address or an error that says what to do, except that IPv6 trouble doesn't stop a peer that has IPv4.

use std::{
    collections::HashSet,
    io,
    net::{SocketAddr, TcpListener},
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

/// libp2p binds TCP sockets with `SO_REUSEPORT`, so that two nodes of one user would share a port without a word, and each get
/// half of the connections. A socket without it shows whether the port is free.
fn check_port(address: &Multiaddr) -> Result<(), StartError> {
    let port = address.iter().find_map(|part| match part {
        Protocol::Tcp(port) if port != 0 => Some(port),
        _ => None,
    });
    let (Some(ip), Some(port)) = (ip_of(address), port) else { return Ok(()) };
    TcpListener::bind(SocketAddr::new(ip, port)).map(drop).map_err(|error| socket_error(address, &error))
}

fn socket_error(address: &Multiaddr, error: &io::Error) -> StartError {
    let address = address.clone();
    match error.kind() {
        io::ErrorKind::AddrInUse => StartError::PortInUse { address },
        io::ErrorKind::AddrNotAvailable => {
            StartError::Listen { address, reason: "this machine has no such address".to_owned() }
        }
        io::ErrorKind::PermissionDenied => {
            StartError::Listen { address, reason: "not allowed; ports below 1024 need privileges".to_owned() }
        }
        _ => StartError::Listen { address, reason: error.to_string() },
    }
}

fn listen_error(address: &Multiaddr, error: TransportError<io::Error>) -> StartError {
    match error {
        TransportError::MultiaddrNotSupported(_) => StartError::BadListenAddress { address: address.clone() },
        TransportError::Other(error) => {
            // The kind is in an inner error: libp2p wraps one transport's error in the next one's.
            let mut inner: Option<&(dyn std::error::Error + 'static)> = Some(&error);
            while let Some(cause) = inner {
                if let Some(io) = cause.downcast_ref::<io::Error>().filter(|io| io.raw_os_error().is_some()) {
                    return socket_error(address, io);
                }
                inner = cause.source();
            }
            if error.to_string().contains("in use") {
                return StartError::PortInUse { address: address.clone() };
            }
            socket_error(address, &error)
        }
    }
}
