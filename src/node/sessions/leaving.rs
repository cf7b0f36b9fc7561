//! A node that leaves, and one that takes its sessions over: what that means for all sessions of a node.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use bytes::Bytes;

use super::{ASKED_TO_STOP, Sessions, connect_next};
use crate::{
    node::{border::Refusal, session::NotTaken},
    swarm::{Link, proto::session as proto},
};

/// Sessions whose clients are told at a time that the node leaves.
const LEAVE_AT_A_TIME: usize = 16;

/// How often some more are told: a session of some thousand tokens is handed over in less, and a thousand sessions are told within
/// 16 s.
const LEAVE_EVERY: Duration = Duration::from_millis(250);

/// Sessions that are handed over at a time: the parts of all that are under way fit into the outbox to one peer.
pub(super) const HAND_OVER_AT_A_TIME: usize = 8;

impl Sessions {
    /// Takes no new sessions, and tells the clients of the open ones that the node is going: a few at a time, so that the others
    /// go on until it is their turn to be handed over.
    pub async fn leave(&self) {
        self.leaving.store(true, Ordering::Relaxed);
        for (turn, sessions) in self.all().chunks(LEAVE_AT_A_TIME).enumerate() {
            if turn > 0 {
                tokio::time::sleep(LEAVE_EVERY).await;
            }
            sessions.iter().for_each(|session| session.tell_leaving(proto::Code::Leaving, ASKED_TO_STOP));
        }
    }

    /// The client wants another peer to go on with a session.
    pub(super) fn hand_over(self: &Arc<Self>, link: &Link, header: &proto::Frame, order: proto::HandOver) {
        let session = self.session_of(link, header).filter(|session| session.begin_handing(link, header.epoch, &order));
        let Some(session) = session else { return self.refuse(link, header, Refusal::unknown_session(), 0) };
        let sessions = self.clone();
        tokio::spawn(async move {
            let Some(host) = sessions.host.get() else { return };
            let to = match host.hosted.check_receiver(&order, &session.blocks()) {
                Ok(to) => connect_next(host, &to).await,
                Err(refusal) => Err(refusal),
            };
            let _turn = sessions.handing.acquire().await;
            session.hand_over(to, order.epoch).await;
        });
    }

    pub(super) fn take_over(&self, link: &Link, header: &proto::Frame, part: proto::TakeOver, payload: Bytes) {
        let taken = match self.session_of(link, header) {
            Some(session) => session.take_over(link, header.epoch, (part, payload)),
            None => Err(NotTaken::NotUpstream),
        };
        self.answer_part(link, header, taken);
    }
}
