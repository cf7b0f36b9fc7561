//! The libp2p stack: transports, protocols and their limits.
//!
//! TCP (Noise or TLS, Yamux) and QUIC, DNS names in addresses; Kademlia under a protocol name of its own, identify, ping, mDNS
//! on the local network, and the two protocols of Helion. Yamux tunes its windows itself (256 KiB at first, up to twice the
//! bandwidth-delay product), which is what lets megabyte frames flow on long links once a stream has been used; kept streams
//! have been.

use std::{io, num::NonZeroUsize, time::Duration};

use libp2p::{
    StreamProtocol, SwarmBuilder,
    core::upgrade::Version,
    dns, identify, kad, mdns, noise, ping, request_response,
    swarm::{NetworkBehaviour, behaviour::toggle::Toggle},
    tcp, tls, yamux,
};
use libp2p_connection_limits::{self as limits, ConnectionLimits};

use super::{Role, SwarmConfig, Tuning, records::AnnouncementStore, rpc, streams};

/// Peers that keep each record. Announcements are renewed every minute, so they need not survive much churn.
pub(super) const REPLICAS: NonZeroUsize = NonZeroUsize::new(16).unwrap();
/// Its own name, so that other libp2p networks don't mix in.
pub(super) const KAD_PROTOCOL: StreamProtocol = StreamProtocol::new("/helion/kad/1");
const IDENTIFY_PROTOCOL: &str = "/helion/id/1";

/// A set of announcements is at most 48 KiB; kad's own limit of 16 KiB would cut it off.
const MAX_KAD_PACKET_BYTES: usize = 64 * 1024;
/// A connection that nothing uses is closed. Kept streams use theirs.
const IDLE_TIMEOUT: Duration = Duration::from_secs(60);
const PING_INTERVAL: Duration = Duration::from_secs(10);
/// Behind a full send queue of a slow link a ping waits long without anything being wrong.
const PING_TIMEOUT: Duration = Duration::from_secs(15);
/// Above what any caller of [`Swarm::request`](super::Swarm::request) waits for; it has its own timeout.
const RPC_TIMEOUT: Duration = Duration::from_secs(120);
/// Connections in the making, either way: each costs a handshake.
const MAX_PENDING: u32 = 256;
/// Both ends may dial at once, over several transports; more is somebody's mistake or attack.
const MAX_PER_PEER: u32 = 8;

#[derive(NetworkBehaviour)]
pub(super) struct Behaviour {
    pub(super) limits: limits::Behaviour,
    pub(super) kad: kad::Behaviour<AnnouncementStore>,
    pub(super) identify: identify::Behaviour,
    pub(super) ping: ping::Behaviour,
    pub(super) rpc: request_response::Behaviour<rpc::Codec>,
    pub(super) streams: streams::Behaviour,
    pub(super) mdns: Toggle<mdns::tokio::Behaviour>,
}

impl Behaviour {
    fn new(config: &SwarmConfig) -> Self {
        let peer = config.identity.peer_id();
        let serves = config.role == Role::Server;
        let support = match config.role {
            Role::Server => request_response::ProtocolSupport::Full,
            Role::Client => request_response::ProtocolSupport::Outbound,
        };
        let rpc_config = request_response::Config::default().with_request_timeout(RPC_TIMEOUT);
        Self {
            limits: limits::Behaviour::new(connection_limits(&config.tuning)),
            kad: kademlia(config),
            identify: identify::Behaviour::new(
                identify::Config::new(IDENTIFY_PROTOCOL.to_owned(), config.identity.public_key())
                    .with_agent_version(concat!("helion/", env!("CARGO_PKG_VERSION")).to_owned())
                    .with_push_listen_addr_updates(true)
                    // Where the operator says which addresses to use, the others are left unsaid.
                    .with_hide_listen_addrs(!config.announce.is_empty()),
            ),
            ping: ping::Behaviour::new(ping::Config::new().with_interval(PING_INTERVAL).with_timeout(PING_TIMEOUT)),
            rpc: request_response::Behaviour::new([(rpc::PROTOCOL, support)], rpc_config),
            streams: streams::Behaviour::new(serves),
            mdns: config.mdns.then(|| local_discovery(peer)).flatten().into(),
        }
    }
}

fn kademlia(config: &SwarmConfig) -> kad::Behaviour<AnnouncementStore> {
    let peer = config.identity.peer_id();
    let mut kad = kad::Config::new(KAD_PROTOCOL);
    kad.set_query_timeout(config.tuning.lookup_timeout)
        .set_replication_factor(REPLICAS)
        .disjoint_query_paths(true)
        .set_max_packet_size(MAX_KAD_PACKET_BYTES)
        .set_caching(kad::Caching::Disabled)
        // Inbound records are merged by the event loop, which knows where they come from.
        .set_record_filtering(kad::StoreInserts::FilterBoth)
        // Announcers renew; nobody else needs to.
        .set_replication_interval(None)
        .set_publication_interval(None)
        .set_provider_publication_interval(None);
    if config.role == Role::Client {
        // A client's routing table is for its own look-ups, which refresh it.
        kad.set_periodic_bootstrap_interval(None);
    }
    let mut behaviour = kad::Behaviour::with_config(peer, AnnouncementStore::new(peer), kad);
    behaviour.set_mode(Some(match config.role {
        Role::Server => kad::Mode::Server,
        Role::Client => kad::Mode::Client,
    }));
    behaviour
}

fn connection_limits(tuning: &Tuning) -> ConnectionLimits {
    let most = tuning.max_connections;
    ConnectionLimits::default()
        .with_max_pending_incoming(Some(MAX_PENDING))
        .with_max_pending_outgoing(Some(MAX_PENDING))
        // A quarter stays for connections of this peer's own choice, however many strangers come.
        .with_max_established_incoming(Some(most - most / 4))
        .with_max_established(Some(most))
        .with_max_established_per_peer(Some(MAX_PER_PEER))
}

/// mDNS is a convenience: a machine without multicast still has a node.
fn local_discovery(peer: libp2p::PeerId) -> Option<mdns::tokio::Behaviour> {
    match mdns::tokio::Behaviour::new(mdns::Config::default(), peer) {
        Ok(behaviour) => Some(behaviour),
        Err(error) => {
            tracing::warn!(%error, "cannot look for peers on the local network (mDNS); going on without");
            None
        }
    }
}

/// Builds the stack. It listens on nothing yet.
pub(super) fn build(config: &SwarmConfig) -> io::Result<libp2p::Swarm<Behaviour>> {
    // Noise is the first choice: a small frame takes half as long as over TLS, and a large one no longer.
    let transport = || {
        SwarmBuilder::with_existing_identity(config.identity.keypair().clone())
            .with_tokio()
            .with_tcp(tcp::Config::new().nodelay(true), (noise::Config::new, tls::Config::new), yamux::Config::default)
            .map(|builder| builder.with_quic())
            .map_err(io::Error::other)
    };
    // Lazy negotiation saves a round trip a stream: the first message goes along with the protocol's name.
    let tune = |config: libp2p::swarm::Config| {
        config.with_idle_connection_timeout(IDLE_TIMEOUT).with_substream_upgrade_protocol_override(Version::V1Lazy)
    };
    match transport()?.with_dns() {
        Ok(builder) => {
            let Ok(builder) = builder.with_behaviour(|_| Behaviour::new(config));
            Ok(builder.with_swarm_config(tune).build())
        }
        Err(error) => {
            tracing::warn!(%error, "cannot read this system's DNS settings; addresses with host names won't be found");
            let nowhere = dns::ResolverConfig::from_parts(None, Vec::new(), Vec::new());
            let builder = transport()?.with_dns_config(nowhere, dns::ResolverOpts::default());
            let Ok(builder) = builder.with_behaviour(|_| Behaviour::new(config));
            Ok(builder.with_swarm_config(tune).build())
        }
    }
}
