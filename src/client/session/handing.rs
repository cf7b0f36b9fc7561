//! A hop that leaves hands its session over: nothing is computed again, on any hop.
//!
//! A hop that is going says so. Where another peer hosts all of its blocks and computes alike, the session goes over to a route with
//! that peer in its place: the peer is opened with a ticket that says from whom it may take the session over, and waits; the leaving hop
//! is told to whom, and sends what it has; the peer says when it stands where the other one stood. Then the steps under way go
//! on, and the leaving hop is closed. All other hops keep what they have.
//!
//! Until that last moment the leaving hop has all it had, so a hand-over may fail at any point: what follows is what follows a
//! loss (`repair`), and where nobody else has the blocks the session goes on with the hop that leaves, for as long as it waits, and
//! tries again now and then. A session that rests hands over as well, where somebody looks after it (`resting`).

use std::{
    mem,
    time::{Duration, Instant},
};

use bytes::Bytes;
use libp2p::PeerId;

use super::{HopLink, RouteHop, Session, SessionError, shows_life};
use crate::{
    client::{Work, inbox::Event, view::SwarmView},
    swarm::{Frame, proto::session as proto},
};

/// How long a hop that could not be left is stayed with before that is tried again: a look at the swarm costs a moment.
const TRY_AGAIN: Duration = Duration::from_secs(10);

/// However well it goes on: the leaving hop goes in the end, and a route that is told anew takes less than this.
const LONGEST: Duration = Duration::from_secs(600);

/// How far a hand-over is. What counts is that it goes on: a long context takes its time on a narrow link, and would take as long
/// again if it were computed anew.
struct Progress {
    begun: Instant,
    moved: Instant,
    /// Parts that the replacement has taken; `None` before the first.
    taken: Option<u32>,
    /// For so long nothing need happen.
    within: Duration,
}

impl Progress {
    fn new(now: Instant, within: Duration) -> Self {
        Self { begun: now, moved: now, taken: None, within }
    }

    /// The replacement has a part. One that says the same again says nothing.
    fn has_taken(&mut self, part: u32, now: Instant) {
        if self.taken.is_none_or(|taken| part > taken) {
            (self.taken, self.moved) = (Some(part), now);
        }
    }

    /// The hop that leaves has others to hand over first.
    fn is_waiting(&mut self, now: Instant) {
        if self.taken.is_none() {
            self.moved = now;
        }
    }

    fn has_stopped(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.moved) >= self.within || now.saturating_duration_since(self.begun) >= LONGEST
    }
}

/// What a session knows of hops that leave.
#[derive(Default)]
pub(super) struct Handing {
    /// The one that hands over now, and who takes over.
    under_way: Option<(HopLink, PeerId)>,
    /// Others, and when they are to be left.
    later: Vec<(PeerId, Instant)>,
    /// The one that handed over, while that is noted.
    handed_over: Option<PeerId>,
    /// A hand-over failed, and its epoch was begun: no hop stands where it could go on.
    is_adrift: bool,
}

impl Handing {
    /// From whom a hop may take the session over.
    pub(super) fn taken_over_by(&self, hop: PeerId) -> Option<PeerId> {
        self.under_way.as_ref().filter(|(_, replacement)| *replacement == hop).map(|(leaving, _)| leaving.peer)
    }

    /// The hop that hands over now.
    pub(super) fn leaving(&self) -> Option<&HopLink> {
        self.under_way.as_ref().map(|(leaving, _)| leaving)
    }

    /// The one that handed over just now.
    pub(super) fn handed_over(&self) -> Option<PeerId> {
        self.handed_over
    }

    /// The hops are told where they stand.
    pub(super) fn settled(&mut self) {
        self.is_adrift = false;
    }

    pub(super) fn is_adrift(&self) -> bool {
        self.is_adrift
    }

    /// Whether it is known already that this one leaves.
    pub(super) fn is_to_be_left(&self, peer: PeerId) -> bool {
        self.later.iter().any(|(other, _)| *other == peer)
    }

    /// When the next hop is to be left.
    pub(super) fn next(&self) -> Option<Instant> {
        self.later.iter().map(|(_, when)| *when).min()
    }

    /// Nobody can take this one's place now.
    pub(super) fn try_later(&mut self, peer: PeerId) {
        self.leave_at(peer, Instant::now() + TRY_AGAIN);
    }

    /// A hop has one place here, however often it says that it leaves.
    pub(super) fn leave_at(&mut self, peer: PeerId, when: Instant) {
        self.later.retain(|(other, _)| *other != peer);
        self.later.push((peer, when));
    }
}

impl Session {
    /// The next hop that is to be left.
    pub(super) fn hop_to_leave(&mut self) -> Option<SessionError> {
        if self.handing.later.is_empty() {
            return None;
        }
        let now = Instant::now();
        let (due, later) = mem::take(&mut self.handing.later).into_iter().partition(|(_, when)| *when <= now);
        self.handing.later = later;
        let due: Vec<(PeerId, Instant)> = due;
        let mut hops = due.iter().filter_map(|(peer, _)| self.hops.iter().find(|hop| hop.peer == *peer));
        let first = hops.next()?;
        let error = SessionError::Fault {
            peer: first.peer,
            blocks: first.blocks.clone(),
            code: proto::Code::Leaving,
            blame: proto::Blame::Nobody,
            maybe_applied: false,
            message: "the node was asked to stop".to_owned(),
        };
        let others: Vec<_> = hops.map(|hop| (hop.peer, now)).collect();
        self.handing.later.extend(others);
        Some(error)
    }

    /// As [`Session::sift`]; but while a hop hands over, another one that leaves waits for its turn.
    pub(super) fn sift_in_turn(
        &mut self,
        event: Event,
    ) -> Result<Option<(PeerId, proto::frame::Body, Bytes)>, SessionError> {
        match (self.sift(event), &self.handing.under_way) {
            (Err(error), Some((_, replacement))) if error.is_of_a_leaving_hop() => match error.peer_to_avoid() {
                Some(peer) if peer != *replacement => {
                    self.handing.leave_at(peer, Instant::now());
                    Ok(None)
                }
                _ => Err(error),
            },
            (sifted, _) => sifted,
        }
    }

    /// Has a hop that leaves hand the session over to a peer that computes alike. False where there is none, or nothing came of it:
    /// then the hop is one that is lost.
    ///
    /// # Errors
    /// Another hop failed meanwhile.
    pub(super) async fn hand_over(&mut self, leaving: PeerId, look: bool) -> Result<bool, SessionError> {
        let Some(index) = self.hops.iter().position(|hop| hop.peer == leaving && !hop.link.is_closed()) else {
            return Ok(false);
        };
        let Some(to) = self.successor(index, look).await else { return Ok(false) };
        let (replacement, old) = (to.announcement.peer_id, self.route().hops);
        let begun = Instant::now();
        let error = match self.change_hop(index, to).await {
            Ok(opened) => {
                self.handing.handed_over = Some(leaving);
                self.note(&old);
                self.handing.handed_over = None;
                let within = self.client.patience().overdue + self.client.patience().pong;
                self.settle(opened, within).await?;
                return Ok(true);
            }
            Err(error) => error,
        };
        tracing::info!(session = %self.id, "{leaving} could not hand the session over to {replacement}: {error}");
        self.repairs.spare(begun.elapsed());
        if let Some((hop, _)) = self.handing.under_way.take() {
            let replacement = mem::replace(&mut self.hops[index], hop);
            // Where it is lost, there is nobody to be told.
            let _ = self.send_to(&replacement, proto::frame::Body::Close(proto::Close::default()), Bytes::new());
            self.handing.is_adrift = true;
        }
        let has_no_room =
            error.is_for_want_of_room() || matches!(error, SessionError::Fault { code: proto::Code::Busy, .. });
        let about = error.peer_to_avoid();
        let is_gone = matches!(error, SessionError::Unreachable { .. } | SessionError::HopLost { .. })
            || error.is_of_a_leaving_hop();
        if has_no_room || (is_gone && about == Some(replacement)) {
            self.give_up_on(replacement);
        }
        if has_no_room || about == Some(replacement) || about == Some(leaving) { Ok(false) } else { Err(error) }
    }

    /// A peer that can go on exactly where a hop stands. Where none is known, the swarm is looked up: that takes less than computing
    /// everything again.
    async fn successor(&self, index: usize, look: bool) -> Option<RouteHop> {
        let known = self.successor_in(&self.client.view(look).await.ok()?, index);
        if known.is_some() || look {
            return known;
        }
        self.successor_in(&self.client.view(true).await.ok()?, index)
    }

    fn successor_in(&self, view: &SwarmView, index: usize) -> Option<RouteHop> {
        let hop = &self.hops[index];
        let chooser = self.client.chooser(view, Work::DECODE, self.room_soon());
        let now = Instant::now();
        let found = chooser.fastest(hop.blocks.clone(), |peer| {
            let said = &peer.announcement;
            let is_free = !self.hops.iter().any(|hop| hop.peer == said.peer_id) && !self.is_given_up(said.peer_id);
            let has_all = said.span.start <= hop.blocks.start && hop.blocks.end <= said.span.end;
            let is_alike = said.computes_like(&hop.announcement) && said.signed.is_some();
            let is_good = self.client.rules().allows(said.peer_id) && !self.client.avoids(said.peer_id, now);
            is_free && has_all && is_alike && is_good
        })?;
        let announcement = found.into_iter().next()?.announcement;
        Some(RouteHop { announcement, blocks: hop.blocks.clone() })
    }

    /// Puts a peer in a hop's place and has the session handed over to it. Returns what all hops have then.
    async fn change_hop(&mut self, index: usize, to: RouteHop) -> Result<super::opening::Openings, SessionError> {
        let within = self.client.patience().overdue + self.client.patience().pong;
        let order = proto::HandOver { epoch: self.epoch + 1, to: to.announcement.signed.clone() };
        let link = HopLink::connect(self.client.swarm().clone(), to, within).await?;
        let replacement = link.peer;
        let left_epoch = self.epoch;
        let leaving = mem::replace(&mut self.hops[index], link);
        self.handing.under_way = Some((leaving, replacement));
        self.next_epoch();
        let all: Vec<usize> = (0..self.hops.len()).collect();
        self.show_tickets(&all)?;
        let mut opened = self.wait_until_open(&all, within).await?;
        if let Some(leaving) = self.handing.leaving() {
            let body = Some(proto::frame::Body::HandOver(order));
            let header = proto::Frame { session: self.id.to_wire(), epoch: left_epoch, body };
            leaving.link.send(Frame::bare(header)).map_err(|error| lost(leaving, error.to_string(), false))?;
        }
        let taken = self.wait_for_take_over(replacement).await?;
        opened.insert(replacement, taken);
        if let Some((leaving, _)) = self.handing.under_way.take() {
            // One that has gone already has closed it.
            let _ = self.send_to(&leaving, proto::frame::Body::Close(proto::Close::default()), Bytes::new());
        }
        Ok(opened)
    }

    /// Waits until the replacement has the session. Both have to live all the while, and something has to go on: nothing may take
    /// half of the time after which a repair is given up.
    async fn wait_for_take_over(&mut self, replacement: PeerId) -> Result<proto::Opened, SessionError> {
        let patience = self.client.patience();
        let mut progress = Progress::new(Instant::now(), patience.recovery / 2);
        let mut asked = None;
        let mut next_look = progress.begun + patience.overdue;
        loop {
            let event = tokio::time::timeout_at(next_look.into(), self.mailbox.next()).await;
            let Some(leaving) = self.handing.leaving() else {
                return Err(SessionError::Misuse("no hop is handing over".to_owned()));
            };
            match event {
                Ok(Event::LinkClosed(peer)) if peer == leaving.peer && leaving.link.is_closed() => {
                    return Err(lost(leaving, "the connection was closed".to_owned(), false));
                }
                Ok(Event::Frame { from, epoch, body: proto::frame::Body::NotHandedOver(not), .. })
                    if from == leaving.peer && epoch.checked_add(1) == Some(self.epoch) =>
                {
                    return Err(refused(leaving, not.code(), &not.message));
                }
                Ok(Event::Frame { from, epoch, body: proto::frame::Body::TakenOver(_), .. })
                    if from == leaving.peer && epoch.checked_add(1) == Some(self.epoch) =>
                {
                    progress.is_waiting(Instant::now());
                }
                // Faults of other kinds are of the route that was left; but this one says that it doesn't know the session.
                Ok(Event::Frame { from, body: proto::frame::Body::Fault(fault), .. })
                    if from == leaving.peer && fault.code() == proto::Code::UnknownSession =>
                {
                    return Err(refused(leaving, fault.code(), &fault.message));
                }
                Ok(event) => match self.sift_in_turn(event)? {
                    Some((from, proto::frame::Body::Opened(opened), _)) if from == replacement && !opened.filling => {
                        return Ok(opened);
                    }
                    Some((from, proto::frame::Body::TakenOver(taken), _)) if from == replacement => {
                        progress.has_taken(taken.index, Instant::now());
                    }
                    _ => {}
                },
                Err(_) => {
                    let both = [Some(leaving), self.hops.iter().find(|hop| hop.peer == replacement)];
                    let both: Vec<&HopLink> = both.into_iter().flatten().collect();
                    let silent = asked.and_then(|asked| both.iter().find(|hop| !shows_life(&hop.link, asked)));
                    if let Some(hop) = silent {
                        return Err(lost(hop, "it does not answer".to_owned(), true));
                    }
                    if progress.has_stopped(Instant::now()) {
                        let took = progress.begun.elapsed().as_secs_f64();
                        let why = format!("the hand-over did not go on, and not end within {took:.1} s");
                        // Of one that never took anything nothing good is known; else only the one that stays could be chosen again.
                        let blamed = if progress.taken.is_none() { both.last() } else { both.first() };
                        if let Some(hop) = blamed {
                            return Err(lost(hop, why, true));
                        }
                    }
                    for hop in both {
                        self.send_to(hop, proto::frame::Body::Ping(proto::Ping { nonce: 0 }), Bytes::new())?;
                    }
                    (asked, next_look) = (Some(Instant::now()), Instant::now() + patience.pong);
                }
            }
        }
    }
}

fn lost(hop: &HopLink, why: String, silent: bool) -> SessionError {
    SessionError::HopLost { peer: hop.peer, blocks: hop.blocks.clone(), why, silent }
}

/// The hop that leaves says that the other one doesn't have the session.
fn refused(hop: &HopLink, code: proto::Code, message: &str) -> SessionError {
    SessionError::Fault {
        peer: hop.peer,
        blocks: hop.blocks.clone(),
        code,
        blame: proto::Blame::Nobody,
        maybe_applied: false,
        message: crate::swarm::clean(message),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hand_over_may_take_its_time_as_long_as_it_goes_on() {
        let (begun, second) = (Instant::now(), Duration::from_secs(1));
        let mut progress = Progress::new(begun, 15 * second);
        assert!(!progress.has_stopped(begun + 14 * second) && progress.has_stopped(begun + 15 * second));
        // First it waits for its turn, then its parts come slowly.
        for at in 1..=20 {
            progress.is_waiting(begun + at * second);
        }
        for part in 0..10 {
            progress.has_taken(part, begun + (30 + 10 * part) * second);
        }
        let last = begun + 120 * second;
        assert!(!progress.has_stopped(last + 14 * second) && progress.has_stopped(last + 15 * second));
        // Nothing new is no progress, and nobody waits for a turn that it had.
        progress.has_taken(9, last + 10 * second);
        progress.is_waiting(last + 10 * second);
        assert!(progress.has_stopped(last + 15 * second));
        for part in 10..100 {
            progress.has_taken(part, begun + (120 + 5 * part) * second);
        }
        assert!(progress.has_stopped(begun + LONGEST), "there is an end to it");
    }
}
