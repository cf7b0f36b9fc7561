//! Peers: identity, transports, the DHT, announcements, frames and RPC.

pub mod proto;
