//! Repairing a session whose route is broken.
//!
//! Every attempt raises the epoch, so that whatever is still under way on the old route counts for nothing. The hops that are
//! left keep what they have; another peer, or several, take the lost one's blocks, or the same one where only its connection
//! was lost. All of them answer the new ticket with what they have, [`plan`](super::plan) says what follows from that, and each hop
//! is told what to send again. Where the others can't be kept, all hops start anew from the client's tokens.

use std::{
    collections::HashSet,
    ops::Range,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::future;
use libp2p::PeerId;
use rand::RngExt;

use super::{
    HopLink, Input, Route, RouteHop, Session, SessionError,
    opening::Openings,
    plan::{HopState, Plan, plan},
};
use crate::{
    client::{
        ClientError, Work, look_again,
        view::{Incomplete, SwarmView},
    },
    swarm::{announcement::Announcement, history::Cursor, proto::session as proto},
};

/// Attempts without an answer between them: more losses in a row are no accident, and the next peers would be lost as well.
const MOST_ATTEMPTS: u32 = 12;

/// How long a peer whose connection was lost has to be there again before another one takes its place.
const RECONNECT: Duration = Duration::from_millis(500);

/// The pause before the second attempt in a row; it doubles, and is drawn from its upper half.
const FIRST_PAUSE: Duration = Duration::from_millis(50);

/// No pause is longer: a peer that comes back should not wait for long.
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// Parts of a replay that are sent before the first of them is computed, as hops do it.
const PARTS_AHEAD: u32 = 4;

/// A hop that was lost, and who does its work now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Recovery {
    /// Which hop of the route it was, counted from 1.
    pub hop: usize,
    /// Who was lost.
    pub lost: PeerId,
    /// Who runs its blocks now: one peer or several, with the blocks of each.
    pub replacement: Vec<(PeerId, Range<usize>)>,
    /// From noticing the loss to the next answer.
    pub took: Duration,
    /// The whole route since then.
    pub route: Vec<(PeerId, Range<usize>)>,
    /// It left on purpose and handed over what it had: nothing was computed again.
    pub handed_over: bool,
}

/// The repairs of a session so far.
pub(super) struct Repairs {
    /// Without an answer between them.
    attempts: u32,
    /// When the first of these began.
    since: Option<Instant>,
    /// How much of the time since then does not count against the patience.
    spared: Duration,
    /// Peers of the route that are not to be used any more; until the next answer.
    lost: HashSet<PeerId>,
    /// Peers whose connection was lost once since the last answer.
    shaky: HashSet<PeerId>,
    /// The first hop that had not applied the oldest step without an answer when it was asked: lost, where that doesn't change.
    pub(super) suspect: Option<PeerId>,
    /// Replaced, but nothing was answered since.
    pending: Vec<Recovery>,
    done: Vec<Recovery>,
    is_exact: bool,
}

impl Repairs {
    pub(super) fn new(is_exact: bool) -> Self {
        Self {
            attempts: 0,
            since: None,
            spared: Duration::ZERO,
            lost: HashSet::new(),
            shaky: HashSet::new(),
            suspect: None,
            pending: Vec::new(),
            done: Vec::new(),
            is_exact,
        }
    }

    /// So much of the time of a repair was a hand-over's, which has bounds of its own.
    pub(super) fn spare(&mut self, took: Duration) {
        self.spared += took;
    }
}

/// What the first hop is told, where it took a lost one's place.
pub(super) struct Telling {
    applied: u64,
    hops: u32,
    cursor: Cursor,
    next_index: u32,
    computed: u32,
}

/// Why an attempt came to nothing.
enum Failed {
    /// There is nobody.
    Nobody(Box<Incomplete>),
    /// Somebody failed.
    Session(SessionError),
    /// The swarm can't be looked up.
    LookUp(ClientError),
    /// No peer of the swarm will ever have room.
    TooLarge(String),
}

impl From<SessionError> for Failed {
    fn from(error: SessionError) -> Self {
        Self::Session(error)
    }
}

impl Session {
    /// The hops that were replaced since this was last asked.
    pub fn take_recoveries(&mut self) -> Vec<Recovery> {
        std::mem::take(&mut self.repairs.done)
    }

    /// Whether all hops that the session has had compute alike, so that its tokens are those of one machine.
    pub fn is_exact(&self) -> bool {
        self.repairs.is_exact
    }

    /// An answer has come: whatever was wrong is over.
    pub(super) fn went_on(&mut self) {
        if self.repairs.attempts == 0 {
            return;
        }
        let route: Vec<_> = self.hops.iter().map(|hop| (hop.peer, hop.blocks.clone())).collect();
        let took = self.repairs.since.map_or(Duration::ZERO, |since| since.elapsed());
        for mut recovery in std::mem::take(&mut self.repairs.pending) {
            let (hop, lost) = (recovery.hop, recovery.lost);
            let names: Vec<_> = recovery
                .replacement
                .iter()
                .map(|(peer, blocks)| format!("{peer} ({}:{})", blocks.start, blocks.end))
                .collect();
            let (ms, names) = (took.as_millis(), names.join(", "));
            if recovery.handed_over {
                tracing::info!("hop {hop}, {lost}, left and handed over; went on after {ms} ms with {names}");
            } else {
                tracing::warn!("lost hop {hop}, {lost}; went on after {ms} ms with {names}");
            }
            recovery.took = took;
            recovery.route.clone_from(&route);
            self.repairs.done.push(recovery);
        }
        self.repairs.attempts = 0;
        (self.repairs.since, self.repairs.spared) = (None, Duration::ZERO);
        self.repairs.lost.clear();
        self.repairs.shaky.clear();
        self.repairs.suspect = None;
        for hop in &self.hops {
            self.client.succeeded(hop.peer);
        }
    }

    /// Finds a route on which the session can go on, and tells its hops what they need for that.
    pub(super) async fn repair(&mut self, error: SessionError) -> Result<(), SessionError> {
        let patience = self.client.patience();
        let since = *self.repairs.since.get_or_insert_with(Instant::now);
        let mut cause = error;
        let mut is_looked_up = false;
        loop {
            tracing::debug!(session = %self.id, error = %cause, "repairing the session");
            self.repairs.attempts += 1;
            let (why, incomplete) = match self.attempt(&cause, is_looked_up).await {
                Ok(()) => return Ok(()),
                Err(Failed::Session(error)) if error.is_repairable() => {
                    let why = error.to_string();
                    cause = error;
                    (why, None)
                }
                Err(Failed::Session(error)) => return Err(error),
                Err(Failed::TooLarge(why)) => {
                    let waited = since.elapsed();
                    return Err(SessionError::NotRepaired { lost: Box::new(cause), why, incomplete: None, waited });
                }
                Err(Failed::LookUp(error)) => (error.to_string(), None),
                Err(Failed::Nobody(_)) if is_looked_up && cause.is_of_a_leaving_hop() => {
                    // It serves on for as long as it can wait.
                    tracing::info!("a hop is leaving, and no other peer has its blocks: {cause}");
                    if let Some(peer) = cause.peer_to_avoid() {
                        self.repairs.lost.remove(&peer);
                        self.handing.try_later(peer);
                    }
                    if !self.handing.is_adrift() {
                        return Ok(()); // nothing was changed yet
                    }
                    match self.take_route(self.route().hops, None).await {
                        Ok(()) => return Ok(()),
                        Err(error) if error.is_repairable() => {
                            let why = error.to_string();
                            cause = error;
                            (why, None)
                        }
                        Err(error) => return Err(error),
                    }
                }
                Err(Failed::Nobody(incomplete)) => (incomplete.to_string(), Some(incomplete)),
            };
            let pause = match &incomplete {
                // What is known of the swarm was not enough: it is looked up at once.
                Some(_) if !is_looked_up => Duration::ZERO,
                Some(_) => look_again(),
                None if self.repairs.attempts == 1 => Duration::ZERO,
                None => pause(self.repairs.attempts),
            };
            // Waiting for a peer is nobody's failure.
            self.repairs.attempts -= u32::from(incomplete.is_some());
            is_looked_up = true;
            let counted = since.elapsed().saturating_sub(self.repairs.spared);
            if counted + pause >= patience.recovery || self.repairs.attempts >= MOST_ATTEMPTS {
                let waited = since.elapsed();
                return Err(SessionError::NotRepaired { lost: Box::new(cause), why, incomplete, waited });
            }
            tokio::time::sleep(pause).await;
        }
    }

    /// One attempt. `look` up the swarm first, rather than take what is known of it.
    async fn attempt(&mut self, cause: &SessionError, look: bool) -> Result<(), Failed> {
        self.broken = None;
        self.telling = None;
        if let Some(peer) = cause.peer_to_avoid() {
            let is_shaky = cause.is_of_the_connection() && self.repairs.shaky.insert(peer);
            if !is_shaky {
                self.client.failed(peer);
                self.repairs.lost.insert(peer);
            }
        }
        if let (SessionError::Overdue { .. }, Some(peer)) = (cause, self.repairs.suspect.take()) {
            self.client.failed(peer);
            self.repairs.lost.insert(peer);
        }
        if let (true, Some(peer)) = (cause.is_of_a_leaving_hop(), cause.peer_to_avoid())
            && self.hand_over(peer, look).await?
        {
            return Ok(());
        }
        self.reconnect().await;
        let old: Vec<RouteHop> = self.route().hops;
        let hops = self.replacements(cause, look).await?;
        self.take_route(hops, Some(&old)).await?;
        Ok(())
    }

    /// Goes over to a route: tells its hops, asks what they have, and has those told that lack something. Of `lost` hops it is
    /// noted who took their places.
    pub(super) async fn take_route(
        &mut self,
        hops: Vec<RouteHop>,
        lost: Option<&[RouteHop]>,
    ) -> Result<(), SessionError> {
        let within = self.client.patience().overdue + self.client.patience().pong;
        let links = HopLink::connect_all(&self.client, &hops, within).await?;

        self.close_what_is_left(&hops);
        self.hops = links;
        self.next_epoch();
        if let Some(old) = lost {
            self.note(old);
        }
        let all: Vec<usize> = (0..self.hops.len()).collect();
        self.show_tickets(&all)?;
        let opened = self.wait_until_open(&all, within).await?;
        self.settle(opened, within).await
    }

    /// The route changes, in a new epoch.
    pub(super) fn next_epoch(&mut self) {
        self.epoch += 1;
        self.prefix.follow(&self.hops);
        self.moves.rest(Instant::now());
        self.unopened = self.hops.iter().map(|hop| hop.peer).collect();
    }

    /// Has the hops of a new route told what they lack, and go on, by what they have `opened` with.
    pub(super) async fn settle(&mut self, opened: Openings, within: Duration) -> Result<(), SessionError> {
        let all = 0..self.hops.len();
        let states: Vec<HopState> = self
            .hops
            .iter()
            .map(|hop| {
                let opened = opened.get(&hop.peer).copied().unwrap_or_default();
                let lacks_prefix = opened.applied == 0 && (opened.prefix_tokens as usize) < self.prefix.held();
                HopState { applied: opened.applied, lacks_prefix, is_whole: opened.whole, is_filling: opened.filling }
            })
            .collect();
        let awaited = self.confirmed + 1;
        let behind = states.iter().position(|state| state.applied < awaited);
        self.repairs.suspect = behind.map(|hop| self.hops[hop].peer);
        let plan = plan(&states, self.confirmed, self.prefix.held() > 0);
        // Whoever has something and yet must start anew is closed and opened again.
        let has_something = |hop: usize| {
            let held = opened.get(&self.hops[hop].peer).map_or(0, |opened| opened.prefix_tokens);
            states[hop].applied > 0 || states[hop].is_filling || held > 0
        };
        let again: Vec<usize> = all.into_iter().filter(|hop| plan.is_fresh(*hop) && has_something(*hop)).collect();
        for hop in &again {
            self.send_to(&self.hops[*hop], proto::frame::Body::Close(proto::Close::default()), Bytes::new())?;
        }
        self.show_tickets(&again)?;
        self.wait_until_open(&again, within).await?;
        self.resume(&plan)?;
        self.handing.settled();
        Ok(())
    }

    /// A peer is not to be used any more until the next answer.
    pub(super) fn give_up_on(&mut self, peer: PeerId) {
        self.client.failed(peer);
        self.repairs.lost.insert(peer);
    }

    /// Whether a peer is not to be used any more.
    pub(super) fn is_given_up(&self, peer: PeerId) -> bool {
        self.repairs.lost.contains(&peer)
    }

    /// Connects again to hops whose connection was lost; those that don't answer are lost.
    async fn reconnect(&mut self) {
        let again = self.hops.iter().filter(|hop| hop.link.is_closed() && !self.repairs.lost.contains(&hop.peer));
        let attempts = again.map(|hop| {
            let connecting = HopLink::connect(self.client.swarm().clone(), hop.route_hop(), RECONNECT);
            async { (hop.peer, connecting.await.is_ok()) }
        });
        for (peer, is_there) in future::join_all(attempts).await {
            if !is_there {
                self.client.failed(peer);
                self.repairs.lost.insert(peer);
            }
        }
    }

    /// The hops of the repaired route: those that are left, and others in place of the lost ones. Where that can't be, a
    /// wholly different route.
    async fn replacements(&self, cause: &SessionError, look: bool) -> Result<Vec<RouteHop>, Failed> {
        let client = &self.client;
        let mut view = client.view(look).await.map_err(Failed::LookUp)?;
        let room = self.room_soon();
        let (now, tokens) = (Instant::now(), self.history.count() as u64);
        let lost = |peer: PeerId| self.repairs.lost.contains(&peer);
        // Some nodes don't say how much they hold.
        let holds = |said: &Announcement| said.cache_tokens_total == 0 || said.cache_tokens_total >= tokens;
        view.peers.retain(|peer| client.rules().allows(peer.announcement.peer_id) && holds(&peer.announcement));
        let is_good = |peer: PeerId| !lost(peer) && !client.avoids(peer, now);
        let anew = |may_be: &dyn Fn(PeerId) -> bool| {
            client.chooser(&view, Work::DECODE, room).fastest(0..view.blocks, |peer| may_be(peer.announcement.peer_id))
        };
        let patched = self.patch(&view, &is_good).or_else(|| self.patch(&view, &|peer| !lost(peer)));
        if let Some(found) = patched.or_else(|| anew(&is_good)) {
            return Ok(found);
        }
        if cause.is_for_want_of_room() {
            // Others may have room later, if this session does not hold on to what it has elsewhere.
            self.close_all();
            if let Some(found) = look.then(|| anew(&|_| true)).flatten() {
                return Ok(found);
            }
            if look && view.peers.is_empty() {
                return Err(Failed::TooLarge(format!("no peer's cache holds the {tokens} tokens of this session")));
            }
        } else if look && !cause.is_of_a_leaving_hop() {
            // One that failed may have come back: it has just answered.
            if let Some(found) = self.patch(&view, &|_| true).or_else(|| anew(&|_| true)) {
                return Ok(found);
            }
        }
        view.peers.retain(|peer| !lost(peer.announcement.peer_id));
        Err(Failed::Nobody(Box::new(view.incomplete())))
    }

    /// The present route with others in place of the lost hops, where some are found that `may_be`.
    fn patch(&self, view: &SwarmView, may_be: &dyn Fn(PeerId) -> bool) -> Option<Vec<RouteHop>> {
        let stays = |hop: &HopLink| !self.repairs.lost.contains(&hop.peer);
        // A session has one place on a peer.
        let mut taken: HashSet<PeerId> = self.hops.iter().filter(|hop| stays(hop)).map(|hop| hop.peer).collect();
        let mut hops: Vec<RouteHop> = Vec::new();
        for run in self.hops.chunk_by(|one, next| stays(one) == stays(next)) {
            if stays(&run[0]) {
                hops.extend(run.iter().map(HopLink::route_hop));
                continue;
            }
            let gap = run[0].blocks.start..run[run.len() - 1].blocks.end;
            let chooser = self.client.chooser(view, Work::DECODE, self.room_soon());
            let found = chooser.fastest(gap, |peer| {
                let peer = peer.announcement.peer_id;
                !taken.contains(&peer) && may_be(peer)
            })?;
            taken.extend(found.iter().map(|hop| hop.announcement.peer_id));
            hops.extend(found);
        }
        Some(hops)
    }

    /// Ends the session where it is not needed any more, or is to begin anew with other blocks.
    fn close_what_is_left(&self, hops: &[RouteHop]) {
        let stays =
            |old: &HopLink| hops.iter().any(|hop| hop.announcement.peer_id == old.peer && hop.blocks == old.blocks);
        for hop in self.hops.iter().filter(|hop| !stays(hop)) {
            // Where it is lost, there is nobody to be told.
            let _ = self.send_to(hop, proto::frame::Body::Close(proto::Close::default()), Bytes::new());
        }
    }

    /// Gives up what all hops hold.
    fn close_all(&self) {
        for hop in &self.hops {
            let _ = self.send_to(hop, proto::frame::Body::Close(proto::Close::default()), Bytes::new());
        }
    }

    /// Notes who took whose place.
    pub(super) fn note(&mut self, old: &[RouteHop]) {
        let new = self.route();
        let together = Route { hops: old.iter().chain(&new.hops).cloned().collect(), ..new.clone() };
        self.repairs.is_exact &= together.is_uniform();
        for (index, hop) in old.iter().enumerate() {
            let lost = hop.announcement.peer_id;
            let stays = new.hops.iter().any(|new| new.announcement.peer_id == lost && new.blocks == hop.blocks);
            if stays {
                continue;
            }
            let overlaps = |new: &&RouteHop| new.blocks.start < hop.blocks.end && hop.blocks.start < new.blocks.end;
            let replacement =
                new.hops.iter().filter(overlaps).map(|hop| (hop.announcement.peer_id, hop.blocks.clone())).collect();
            self.repairs.pending.push(Recovery {
                hop: index + 1,
                lost,
                replacement,
                took: Duration::ZERO,
                route: Vec::new(),
                handed_over: self.handing.handed_over() == Some(lost),
            });
        }
    }

    /// Tells every hop what the one behind it has, and does the same for the first one.
    fn resume(&mut self, plan: &Plan) -> Result<(), SessionError> {
        for (index, hop) in self.hops.iter().enumerate().filter(|(index, _)| !plan.is_fresh(*index)) {
            let applied = plan.behind[index + 1];
            let replay_hops = if self.has_begun(applied) { plan.fresh_from(index + 1) } else { 0 };
            let resume = proto::Resume { applied, replay_hops };
            self.send_to(hop, proto::frame::Body::Resume(resume), Bytes::new())?;
        }
        let now = Instant::now();
        self.last_answer = now;
        let (applied, hops) = (plan.behind[0], plan.fresh_from(0));
        if hops > 0 && self.has_begun(applied) {
            self.telling = Some(Telling { applied, hops, cursor: Cursor::default(), next_index: 0, computed: 0 });
            self.tell()
        } else {
            self.send_again(applied)
        }
    }

    /// Sends the steps after `number` that have no answer again.
    fn send_again(&mut self, number: u64) -> Result<(), SessionError> {
        for sent in self.sent.iter().filter(|sent| sent.header.number > number) {
            let hidden = self.embed(&sent.input)?;
            let header = proto::Step { confirmed: self.confirmed, ..sent.header.clone() };
            self.send_to(&self.hops[0], proto::frame::Body::Step(header), self.pack(hidden))?;
        }
        Ok(())
    }

    /// Sends the first hop as much of the history as it takes, and the steps under way behind it.
    fn tell(&mut self) -> Result<(), SessionError> {
        let most = self.limits.max_step_tokens as usize;
        while let Some(telling) = &mut self.telling
            && telling.next_index < telling.computed.saturating_add(PARTS_AHEAD)
        {
            let applied = telling.applied;
            let part = self.history.next(&mut telling.cursor, applied, most);
            let head = proto::Replay { applied, hops: telling.hops, index: telling.next_index, ..Default::default() };
            telling.next_index += 1;
            let Some(part) = part else {
                self.telling = None;
                let replay = proto::Replay { last: true, ..head };
                self.send_to(&self.hops[0], proto::frame::Body::Replay(replay), Bytes::new())?;
                return self.send_again(applied);
            };
            let hidden = Input::embed(&part.rows, &self.client, self.wire_dtype)?;
            let lane = proto::LaneRun { lane: part.lane, position: part.position as u64, tokens: part.count as u32 };
            let replay = proto::Replay {
                lanes: vec![lane],
                tensor: Some(self.wire_tensor(&hidden)),
                rope_length: part.length_class as u64,
                ..head
            };
            let payload = self.pack(hidden);
            self.client.traffic().replays(payload.len());
            self.send_to(&self.hops[0], proto::frame::Body::Replay(replay), payload)?;
        }
        Ok(())
    }

    /// A hop has computed a part of a replay.
    pub(super) fn told(&mut self, from: PeerId, replayed: &proto::Replayed) -> Result<(), SessionError> {
        self.last_answer = Instant::now();
        if from != self.hops[0].peer {
            return Ok(());
        }
        match &mut self.telling {
            Some(telling) if replayed.index < telling.next_index => {
                telling.computed = telling.computed.max(replayed.index + 1);
                self.tell()
            }
            _ => Ok(()),
        }
    }
}

/// A random pause that grows with the attempts, so that many clients that lost the same hop don't come back all at once.
fn pause(attempts: u32) -> Duration {
    let longest = FIRST_PAUSE.saturating_mul(1 << attempts.min(16)).min(LONGEST_PAUSE);
    longest.mul_f64(rand::rng().random_range(0.5..=1.0))
}
