//! A node that leaves, and one that takes its sessions over: what that means for all sessions of a node.

use std::{
    pin::pin,
    sync::{Arc, MutexGuard, PoisonError, atomic::Ordering},
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::future;
use tokio::sync::OwnedSemaphorePermit;

use super::{ASKED_TO_STOP, HopSession, Sessions, Turns, connect_next};
use crate::{
    node::{border::Refusal, session::NotTaken},
    swarm::{Link, proto::session as proto, ticket::SessionId},
};

/// Sessions that rest whose clients are told at a time that the node leaves.
const LEAVE_AT_A_TIME: usize = 16;

/// How often some more of them are told: a thousand sessions are told within 16 s.
const LEAVE_EVERY: Duration = Duration::from_millis(250);

/// A session that has had no step for so long rests: its client may not look before it has something to say, and misses nothing
/// while it waits for its turn.
const RESTS_AFTER: Duration = Duration::from_secs(5);

/// How long a client that was told because it is its session's turn has to say who takes over: it may have to look the swarm up.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);

/// How often a client whose session waits for its turn is told that it does.
const TELL_WAITING_EVERY: Duration = Duration::from_secs(1);

/// Sessions that are handed over at a time: the parts of all that are under way fit into the outbox to one peer.
pub(super) const HAND_OVER_AT_A_TIME: usize = 8;

impl Sessions {
    /// Takes no new sessions, and tells the clients of the open ones that the node is going. One that has steps to compute is told when
    /// it is its turn to be handed over, so that it goes on until then; those that rest are told a few at a time.
    pub async fn leave(self: &Arc<Self>) {
        self.leaving.store(true, Ordering::Relaxed);
        let now = Instant::now();
        let open: Vec<(SessionId, Arc<HopSession>)> =
            self.lock().iter().filter_map(|(id, slot)| Some((*id, slot.session.clone()?))).collect();
        let (resting, busy): (Vec<_>, Vec<_>) =
            open.into_iter().partition(|(_, session)| session.has_rested(now) >= RESTS_AFTER);
        let tell_resting = async {
            for (turn, sessions) in resting.chunks(LEAVE_AT_A_TIME).enumerate() {
                if turn > 0 {
                    tokio::time::sleep(LEAVE_EVERY).await;
                }
                sessions.iter().for_each(|(_, session)| session.tell_leaving(proto::Code::Leaving, ASKED_TO_STOP));
            }
        };
        let tell_busy = async {
            for (id, session) in busy {
                // Never closed.
                let Ok(turn) = self.handing.clone().acquire_owned().await else { return };
                self.turns().insert(id, turn);
                session.tell_leaving(proto::Code::Leaving, ASKED_TO_STOP);
                drop(session);
                let sessions = self.clone();
                tokio::spawn(async move {
                    // Where nobody can take it over, it is somebody else's turn.
                    let _ = tokio::time::timeout(ANSWER_WITHIN, sessions.ended(id)).await;
                    sessions.turns().remove(&id);
                });
            }
        };
        future::join(tell_resting, tell_busy).await;
    }

    /// Every change is one operation on a map.
    fn turns(&self) -> MutexGuard<'_, Turns> {
        self.turns.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until a session is not here any more.
    async fn ended(&self, id: SessionId) {
        loop {
            let mut ended = pin!(self.ended.notified());
            // From here on no end is missed.
            ended.as_mut().enable();
            if !self.lock().contains_key(&id) {
                return;
            }
            ended.await;
        }
    }

    /// A session's turn to be handed over: the one that it was told at, or the next that is free. Its client hears meanwhile that it waits.
    async fn turn(&self, session: &HopSession, given: Option<OwnedSemaphorePermit>) -> Option<OwnedSemaphorePermit> {
        if given.is_some() {
            return given;
        }
        let mut free = pin!(self.handing.clone().acquire_owned());
        loop {
            match tokio::time::timeout(TELL_WAITING_EVERY, free.as_mut()).await {
                Ok(turn) => return turn.ok(),
                Err(_) => session.tell_waiting(),
            }
        }
    }

    /// The client wants another peer to go on with a session.
    pub(super) fn hand_over(self: &Arc<Self>, link: &Link, header: &proto::Frame, order: proto::HandOver) {
        let session = self.session_of(link, header).filter(|session| session.begin_handing(link, header.epoch, &order));
        let Some(session) = session else { return self.refuse(link, header, Refusal::unknown_session(), 0) };
        let given = SessionId::from_wire(&header.session).and_then(|id| self.turns().remove(&id));
        let sessions = self.clone();
        tokio::spawn(async move {
            let Some(host) = sessions.host.get() else { return };
            let to = match host.hosted.check_receiver(&order, &session.blocks()) {
                Ok(to) => connect_next(host, &to).await,
                Err(refusal) => Err(refusal),
            };
            let _turn = sessions.turn(&session, given).await;
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
