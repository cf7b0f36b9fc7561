//! The wire types, generated from `proto/`.
#![allow(missing_docs, unreachable_pub)] // the schema files document them

/// Announcements and what the DHT stores.
pub mod announcement {
    include!(concat!(env!("OUT_DIR"), "/helion.announcement.rs"));
}
/// `/helion/rpc/1`.
pub mod rpc {
    include!(concat!(env!("OUT_DIR"), "/helion.rpc.rs"));
}
/// `/helion/session/1`.
pub mod session {
    include!(concat!(env!("OUT_DIR"), "/helion.session.rs"));
}
