//! Peers: identity, transports, the DHT, announcements, frames and RPC.
//!
//! A peer has an [`Identity`], a key pair whose hash is its [`PeerId`]; every connection is authenticated by it. Peers find each
//! other through a Kademlia DHT in which nodes put signed [`Announcement`]s of the blocks they host ([`records`] says under
//! which keys, [`announcement::set`] which of them are kept). A client asks the DHT ([`Swarm::discover`]) or any node it knows
//! ([`Swarm::exchange`]), and gets the same statements either way, since they are signed.
//!
//! Two protocols carry the work. [`rpc`] is one request and one response, for questions ([`Swarm::request`]). Steps run on
//! [`Link`]s: kept streams of [`Frame`]s, one a direction between two peers and shared by all sessions, opened when a route is
//! chosen ([`Swarm::link`]). What arrives goes to the [`Service`] that the process gave to [`Swarm::start`].
//!
//! [`Swarm`] is a handle on one task that owns the libp2p swarm (`driver`); everything that decides something (which entries
//! to keep, which addresses to hand out) is plain code without IO beside it. `swarm` knows of tensors only bytes.
//!
//! Nothing is trusted for being in the swarm: sizes, counts and signatures are checked where bytes come in, and everything
//! that strangers can fill has a bound with its reason next to it.

pub mod addresses;
pub mod announcement;
pub mod codec;
pub mod drain;
mod driver;
mod error;
pub mod frame;
mod handle;
pub mod history;
pub mod identity;
mod known;
pub mod lanes;
mod link;
mod network;
pub mod prefix;
pub mod proto;
pub mod records;
pub mod remembered;
pub mod rpc;
mod streams;
pub mod ticket;

use std::{path::PathBuf, time::Duration};

use futures::future::BoxFuture;

pub use announcement::{Announcement, AnnouncementError, State};
pub use codec::WireCodec;
pub use error::{AnnounceError, DiscoverError, JoinError, LinkError, RpcError, StartError, clean};
pub use frame::{Frame, FrameLimits};
pub use handle::{Discovery, Joined, ModelListing, Swarm, WeakSwarm};
pub use identity::{Identity, IdentityError};
pub use libp2p::{Multiaddr, PeerId};
pub use link::{Link, LinkId, LinkLimits, SendError};

/// What a peer is to others.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Nodes and bootstrap nodes: keeps a part of the DHT, accepts requests and links.
    Server,
    /// Asks only, and is in nobody's routing table.
    Client,
}

/// How to take part in the network.
#[derive(Debug)]
pub struct SwarmConfig {
    /// Who this peer is.
    pub identity: Identity,
    /// What it is to others.
    pub role: Role,
    /// Where to listen; nowhere for clients. Port 0 takes a free one.
    pub listen: Vec<Multiaddr>,
    /// If not empty: what to tell others instead of the listening and observed addresses.
    pub announce: Vec<Multiaddr>,
    /// Whom [`Swarm::join`] dials. Each ends in `/p2p/<peer id>`.
    pub initial_peers: Vec<Multiaddr>,
    /// Find peers on the local network.
    pub mdns: bool,
    /// Where to keep the addresses of good peers ([`remembered`]).
    pub remember: Option<PathBuf>,
    /// Times and bounds.
    pub tuning: Tuning,
}

impl SwarmConfig {
    /// A peer that listens nowhere, knows nobody and looks for nobody.
    pub fn new(identity: Identity, role: Role) -> Self {
        Self {
            identity,
            role,
            listen: Vec::new(),
            announce: Vec::new(),
            initial_peers: Vec::new(),
            mdns: false,
            remember: None,
            tuning: Tuning::default(),
        }
    }
}

/// Times and bounds, with defaults that fit the open internet.
#[derive(Debug, Clone)]
pub struct Tuning {
    /// How often an announcement is renewed.
    pub renew_every: Duration,
    /// How long an announcement counts: some renewals may fail, and the clocks of two peers may differ by as much.
    pub announcement_lifetime: Duration,
    /// The longest look-up. Dead peers in the routing table each cost some seconds.
    pub lookup_timeout: Duration,
    /// A look-up that has found something ends when nothing more came for so long.
    pub lookup_quiet: Duration,
    /// How long dialling and opening a stream may take together.
    pub link_timeout: Duration,
    /// Of every link.
    pub link: LinkLimits,
    /// Connections in all.
    pub max_connections: u32,
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            renew_every: Duration::from_secs(60),
            announcement_lifetime: Duration::from_secs(5 * 60),
            lookup_timeout: Duration::from_secs(15),
            lookup_quiet: Duration::from_secs(2),
            link_timeout: Duration::from_secs(15),
            link: LinkLimits::default(),
            max_connections: 2048,
        }
    }
}

/// What this process does with what arrives. Called on tasks that read, so nothing here may block.
///
/// The swarm keeps its service. A service that keeps its [`Swarm`] in turn keeps it running until [`Swarm::stop`]; one that
/// keeps a [`WeakSwarm`] doesn't.
pub trait Service: Send + Sync + 'static {
    /// A frame from [`Link::peer`], authenticated by the transport. Frames of one link come in order, one at a time.
    fn frame(&self, link: &Link, frame: Frame);

    /// The link's stream ended, for whatever reason; the last call about it, exactly once.
    fn link_closed(&self, link: &Link);

    /// An `info` or `drain` request. Exchange and probe are answered by the swarm itself.
    fn request(&self, from: PeerId, request: rpc::Request) -> BoxFuture<'static, rpc::Response>;
}
