//! Where the frames of a client's sessions arrive: one queue a session, found by its id.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use futures::future::BoxFuture;
use libp2p::PeerId;
use tokio::sync::mpsc;

use crate::swarm::{
    Frame, Link, Service,
    proto::{rpc, session as proto},
    ticket::SessionId,
};

/// Frames that a session may leave waiting. An honest route sends no more than the session's credit, an answer to each ping
/// and a fault a hop; what is more than this comes from a hop that floods, and is dropped.
const QUEUE: usize = 256;

/// What happened to a session.
#[derive(Debug)]
#[expect(clippy::large_enum_variant, reason = "nearly all are frames")]
pub(crate) enum Event {
    /// A hop sent this.
    Frame { from: PeerId, epoch: u64, body: proto::frame::Body, payload: Bytes },
    /// The link to a hop ended.
    LinkClosed(PeerId),
}

/// What a client has received, and told again to hops that took a lost first one's place; in all its sessions.
#[derive(Debug, Default)]
pub struct Traffic {
    outputs: AtomicU64,
    payload_bytes: AtomicU64,
    bytes_replayed: AtomicU64,
}

impl Traffic {
    /// Outputs: answers to steps, with or without a tensor.
    pub fn outputs(&self) -> u64 {
        self.outputs.load(Ordering::Relaxed)
    }

    /// Bytes of hidden states.
    pub fn payload_bytes(&self) -> u64 {
        self.payload_bytes.load(Ordering::Relaxed)
    }

    /// Bytes of hidden states that it replayed, as nodes count theirs.
    pub fn bytes_replayed(&self) -> u64 {
        self.bytes_replayed.load(Ordering::Relaxed)
    }

    /// It replays so many bytes.
    pub(crate) fn replays(&self, bytes: usize) {
        self.bytes_replayed.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

/// The queues of a client's sessions.
#[derive(Debug, Default)]
pub(crate) struct Inbox {
    sessions: Mutex<HashMap<SessionId, mpsc::Sender<Event>>>,
    pub(crate) traffic: Traffic,
}

/// One session's place in the inbox; dropping it gives it up.
pub(crate) struct Mailbox {
    id: SessionId,
    inbox: Arc<Inbox>,
    events: mpsc::Receiver<Event>,
}

impl Inbox {
    /// A place for a new session.
    pub(crate) fn register(self: &Arc<Self>, id: SessionId) -> Mailbox {
        let (sender, events) = mpsc::channel(QUEUE);
        self.lock().insert(id, sender);
        Mailbox { id, inbox: self.clone(), events }
    }

    /// The map is changed in single operations, so a panic elsewhere can't leave it half changed.
    fn lock(&self) -> MutexGuard<'_, HashMap<SessionId, mpsc::Sender<Event>>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Mailbox {
    /// The next event. Its sender lives as long as the mailbox, so there always will be one, or nothing comes.
    pub(crate) async fn next(&mut self) -> Event {
        match self.events.recv().await {
            Some(event) => event,
            None => std::future::pending().await,
        }
    }
}

impl Drop for Mailbox {
    fn drop(&mut self) {
        self.inbox.lock().remove(&self.id);
    }
}

impl Service for Inbox {
    fn frame(&self, link: &Link, frame: Frame) {
        let Frame { header, payload } = frame;
        let Some(body) = header.body else { return };
        if matches!(body, proto::frame::Body::Output(_)) {
            self.traffic.outputs.fetch_add(1, Ordering::Relaxed);
        }
        self.traffic.payload_bytes.fetch_add(payload.len() as u64, Ordering::Relaxed);
        let Some(queue) = SessionId::from_wire(&header.session).and_then(|id| self.lock().get(&id).cloned()) else {
            return; // of a session that has ended
        };
        let event = Event::Frame { from: link.peer(), epoch: header.epoch, body, payload };
        if queue.try_send(event).is_err() {
            tracing::warn!(peer = %link.peer(), "dropped a frame: the peer sends more than it was asked for");
        }
    }

    fn link_closed(&self, link: &Link) {
        let queues: Vec<_> = self.lock().values().cloned().collect();
        for queue in queues {
            if queue.try_send(Event::LinkClosed(link.peer())).is_err() {
                tracing::debug!(peer = %link.peer(), "a session that is flooded was not told of a lost link");
            }
        }
    }

    fn request(&self, _from: PeerId, _request: rpc::Request) -> BoxFuture<'static, rpc::Response> {
        let message = "this peer is a client and serves nothing".to_owned();
        let response = rpc::Response { body: Some(rpc::response::Body::Failure(rpc::Failure { message })) };
        Box::pin(std::future::ready(response))
    }
}
