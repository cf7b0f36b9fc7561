//! Requests and responses: what others ask this peer, and what it asked them.

use std::collections::HashMap;

use futures::future::FutureExt;
use libp2p::{
    PeerId,
    request_response::{self, Message, ResponseChannel},
};
use prost::Message as _;
use tokio::task::JoinError;

use super::Driver;
use crate::swarm::{
    announcement::{Verified, unix_ms},
    proto::rpc::{ExchangeResponse, ProbeResponse},
    rpc::{self, Response, request, response},
};

/// Requests that the service works on at a time; more are told to come back.
const MAX_ANSWERS: usize = 64;
/// Room for the frame of an exchange's answer besides its announcements.
const EXCHANGE_MARGIN_BYTES: usize = 64 * 1024;

impl Driver {
    pub(super) fn on_rpc(&mut self, event: request_response::Event<rpc::Request, Response>) {
        match event {
            request_response::Event::Message { peer, message: Message::Request { request, channel, .. }, .. } => {
                self.on_request(peer, request, channel);
            }
            request_response::Event::Message { message: Message::Response { request_id, response }, .. } => {
                if let Some(reply) = self.requests.remove(&request_id) {
                    let _ = reply.send(Ok(response));
                }
            }
            request_response::Event::OutboundFailure { request_id, error, .. } => {
                if let Some(reply) = self.requests.remove(&request_id) {
                    let _ = reply.send(Err(error));
                }
            }
            request_response::Event::InboundFailure { peer, error, .. } => {
                tracing::debug!(%peer, %error, "a request from a peer failed");
            }
            request_response::Event::ResponseSent { .. } => {}
        }
    }

    fn on_request(&mut self, from: PeerId, request: rpc::Request, channel: ResponseChannel<Response>) {
        let body = match &request.body {
            Some(request::Body::Exchange(exchange)) => Some(self.exchange(&exchange.dht_prefix)),
            Some(request::Body::Probe(probe)) => {
                Some(response::Body::Probe(ProbeResponse { payload: probe.payload.clone() }))
            }
            Some(request::Body::Info(_) | request::Body::Drain(_)) if self.answers.len() < MAX_ANSWERS => None,
            Some(request::Body::Info(_) | request::Body::Drain(_)) => {
                Response::failure("busy with other requests; ask again").body
            }
            None => Response::failure("this version of helion doesn't know the request").body,
        };
        match body {
            Some(_) => self.answer(channel, Response { body }),
            None => {
                let answer = self.service.request(from, request);
                self.answers.spawn(answer.map(|response| (channel, response)));
            }
        }
    }

    pub(super) fn on_answer(&mut self, answer: Result<(ResponseChannel<Response>, Response), JoinError>) {
        match answer {
            Ok((channel, response)) => self.answer(channel, response),
            // The channel is dropped, which resets the stream: the peer learns that there is no answer.
            Err(error) => tracing::error!(%error, "answering a request failed"),
        }
    }

    fn answer(&mut self, channel: ResponseChannel<Response>, response: Response) {
        if self.swarm.behaviour_mut().rpc.send_response(channel, response).is_err() {
            tracing::debug!("a peer was gone before its request was answered");
        }
    }

    /// The fresh announcements that this peer knows for a prefix: its part of the DHT, its own, and what it looked up.
    fn exchange(&mut self, dht_prefix: &str) -> response::Body {
        let now = unix_ms();
        let mut newest: HashMap<PeerId, Verified> = HashMap::new();
        let store = self.swarm.behaviour_mut().kad.store_mut();
        let known = self.shared.known();
        for verified in store.of_prefix(dht_prefix, now).into_iter().chain(known.fresh(dht_prefix, now)) {
            let is_news =
                newest.get(&verified.peer_id()).is_none_or(|held| held.body().sequence < verified.body().sequence);
            if is_news {
                newest.insert(verified.peer_id(), verified.clone());
            }
        }
        let mut room = rpc::MAX_RESPONSE_BYTES - EXCHANGE_MARGIN_BYTES;
        let announcements = newest
            .into_values()
            .map(|verified| verified.signed().clone())
            .take_while(|signed| {
                let bytes = signed.encoded_len() + 8;
                let fits = bytes <= room;
                room = room.saturating_sub(bytes);
                fits
            })
            .collect();
        response::Body::Exchange(ExchangeResponse { announcements })
    }
}
