//! A bootstrap node: the DHT alone, so that others find each other. It hosts no blocks.

use bytes::Bytes;
use futures::future::BoxFuture;
use libp2p::PeerId;

use crate::swarm::{
    Frame, Link, Service,
    proto::{rpc, session as proto},
};

/// Refuses sessions; the DHT is the swarm's own work.
pub struct BootstrapService;

impl Service for BootstrapService {
    fn frame(&self, link: &Link, frame: Frame) {
        let body = match frame.header.body {
            Some(proto::frame::Body::Ping(ping)) => proto::frame::Body::Pong(proto::Pong { nonce: ping.nonce }),
            _ => proto::frame::Body::Fault(proto::Fault {
                code: proto::Code::WrongBlocks.into(),
                blame: proto::Blame::Client.into(),
                message: "this is a bootstrap node: it hosts no blocks".to_owned(),
                ..Default::default()
            }),
        };
        let header = proto::Frame { body: Some(body), ..frame.header };
        if link.send(Frame { header, payload: Bytes::new() }).is_err() {
            tracing::debug!(peer = %link.peer(), "a refusal could not be sent");
        }
    }

    fn link_closed(&self, _link: &Link) {}

    fn request(&self, _from: PeerId, request: rpc::Request) -> BoxFuture<'static, rpc::Response> {
        let body = match request.body {
            Some(rpc::request::Body::Info(_)) => rpc::response::Body::Info(rpc::InfoResponse::default()),
            _ => {
                let message = "a bootstrap node doesn't know that request".to_owned();
                rpc::response::Body::Failure(rpc::Failure { message })
            }
        };
        Box::pin(std::future::ready(rpc::Response { body: Some(body) }))
    }
}
