//! Repairing a session whose route is broken.
//!
//! Every attempt raises the epoch, so that whatever is still under way on the old route counts for nothing. The hops that are
//! left keep what they have; another peer, or several, take the lost one's blocks, or the same one where only its connection
//! was lost. All of them answer the new ticket with what they have, [`plan`](super::plan) says what follows from that, and each hop
//! is told what to send again. Where the others can't be kept, all hops start anew from the client's tokens.

use std::{
    collections::{HashMap, HashSet},
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

/// How long a peer whose connection was lost has to be there again before another one takes its place: a moment, and the round
/// trips that a connection takes.
const RECONNECT: Duration = Duration::from_millis(500);

/// One for TCP, four for agreeing on the encryption and the multiplexing, two for the stream, one that is lost.
const RECONNECT_ROUND_TRIPS: u32 = 8;

/// However long the link: a peer that doesn't answer is not waited for any longer when its death is looked for either.
const LONGEST_RECONNECT: Duration = Duration::from_secs(5);

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
    /// Since when there has been no route on which the session could go on.
    since: Option<Instant>,
    /// How much of the time since then does not count against the patience.
    spared: Duration,
    /// Peers of the route that are not to be used any more; until the next answer.
    lost: HashSet<PeerId>,
    /// Peers whose connection was lost once since the last answer.
    shaky: HashSet<PeerId>,
    /// Those of them that this client has connected to again.
    back: HashSet<PeerId>,
    /// Hops that are being told everything, and the next part that each of them has to compute.
    filling: HashMap<PeerId, u32>,
    /// The first hop that had not applied the oldest step without an answer when it was asked: lost, where that doesn't change.
    pub(super) suspect: Option<PeerId>,
    /// Steps that have no answer may have been applied, by what was noticed since the last one.
    maybe_applied: bool,
    /// Replaced, but nothing was answered since; and when that was noticed.
    pending: Vec<(Instant, Recovery)>,
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
            back: HashSet::new(),
            filling: HashMap::new(),
            suspect: None,
            maybe_applied: false,
            pending: Vec::new(),
            done: Vec::new(),
            is_exact,
        }
    }

    /// So much of the time of a repair was a hand-over's, which has bounds of its own.
    pub(super) fn spare(&mut self, took: Duration) {
        self.spared += took;
    }

    /// There is a route again. Telling its hops what they need may take long, and whoever is lost meanwhile is another loss with a time of
    /// its own; the attempts are counted on. But where there was no room, the hops that take the session in may have none either: the
    /// time for that is not given twice.
    fn worked(&mut self, first: &SessionError) {
        if !first.is_for_want_of_room() {
            (self.since, self.spared) = (None, Duration::ZERO);
        }
    }

    /// Whether a hop that has computed part `index` out of `parts` at the most has come further in what it is told.
    fn goes_on(&mut self, hop: PeerId, index: u32, parts: u32) -> bool {
        let Some(next) = self.filling.get_mut(&hop).filter(|next| **next <= index && index < parts) else {
            return false;
        };
        *next = index + 1;
        true
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
        for (noticed, mut recovery) in std::mem::take(&mut self.repairs.pending) {
            let took = noticed.elapsed();
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
        self.repairs.back.clear();
        self.repairs.suspect = None;
        self.repairs.maybe_applied = false;
        for hop in &self.hops {
            self.client.succeeded(hop.peer);
        }
    }

    /// Finds a route on which the session can go on, and tells its hops what they need for that.
    pub(super) async fn repair(&mut self, error: SessionError) -> Result<(), SessionError> {
        let patience = self.client.patience();
        let since = *self.repairs.since.get_or_insert_with(Instant::now);
        self.repairs.maybe_applied |= error.maybe_applied();
        if self.repairs.attempts >= MOST_ATTEMPTS {
            let why = format!("{MOST_ATTEMPTS} routes in a row gave no answer");
            return Err(self.not_repaired(error, why, None));
        }
        let (lost, mut latest) = (error, None);
        let mut is_looked_up = false;
        loop {
            let cause = latest.as_ref().unwrap_or(&lost);
            tracing::debug!(session = %self.id, error = %cause, "repairing the session");
            self.repairs.attempts += 1;
            let (why, incomplete) = match self.attempt(cause, is_looked_up).await {
                Ok(()) => {
                    self.repairs.worked(&lost);
                    return Ok(());
                }
                Err(Failed::Session(error)) if error.is_repairable() => (self.meanwhile(error, &mut latest), None),
                Err(Failed::Session(error)) => return Err(error),
                Err(Failed::TooLarge(why)) => return Err(self.not_repaired(lost, why, None)),
                Err(Failed::LookUp(error)) => (error.to_string(), None),
                Err(Failed::Nobody(_)) if is_looked_up && cause.is_of_a_leaving_hop() => {
                    // It serves on for as long as it can wait.
                    tracing::info!("a hop is leaving, and no other peer has its blocks: {cause}");
                    if let Some(peer) = cause.peer_to_avoid() {
                        self.repairs.lost.remove(&peer);
                        self.handing.try_later(peer);
                    }
                    // Unless a hand-over had begun, nothing was changed yet.
                    let stays = match self.handing.is_adrift() {
                        true => self.take_route(self.route().hops, None).await,
                        false => Ok(()),
                    };
                    match stays {
                        Ok(()) => {
                            self.repairs.worked(&lost);
                            return Ok(());
                        }
                        Err(error) if error.is_repairable() => (self.meanwhile(error, &mut latest), None),
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
                return Err(self.not_repaired(lost, why, incomplete));
            }
            tokio::time::sleep(pause).await;
        }
    }

    /// An attempt failed for a reason of its own: the next one is about that. Returns it in words.
    fn meanwhile(&mut self, error: SessionError, latest: &mut Option<SessionError>) -> String {
        self.repairs.maybe_applied |= error.maybe_applied();
        latest.insert(error).to_string()
    }

    /// It is given up. What is told is the loss that it began with; what was tried after that is only why nothing came of it.
    fn not_repaired(&self, lost: SessionError, why: String, incomplete: Option<Box<Incomplete>>) -> SessionError {
        let waited = self.repairs.since.map_or(Duration::ZERO, |since| since.elapsed());
        let maybe_applied = self.repairs.maybe_applied;
        SessionError::NotRepaired { lost: Box::new(lost), why, incomplete, waited, maybe_applied }
    }

    /// One attempt. `look` up the swarm first, rather than take what is known of it.
    async fn attempt(&mut self, cause: &SessionError, look: bool) -> Result<(), Failed> {
        self.broken = None;
        if let Some(peer) = cause.peer_to_avoid() {
            // One cut is noticed at both ends of several connections, and told more than once.
            let is_cut = self.hops.iter().any(|hop| hop.peer == peer && hop.link.is_closed());
            let is_old_news = is_cut && !self.repairs.back.contains(&peer);
            let may_come_back = cause.is_of_the_connection() && (self.repairs.shaky.insert(peer) || is_old_news);
            if !may_come_back {
                self.give_up_on(peer);
            }
        }
        if let (SessionError::Overdue { .. }, Some(peer)) = (cause, self.repairs.suspect.take()) {
            self.give_up_on(peer);
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
        self.telling = None;
        for hop in &mut self.hops {
            hop.learn(self.client.observer().announcement(hop.peer));
        }
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
        for (peer, connected) in self.connect_again().await {
            match connected {
                Ok(()) => drop(self.repairs.back.insert(peer)),
                Err(_) => self.give_up_on(peer),
            }
        }
    }

    /// Connects again to hops whose connection was lost. Returns what came of it for each of them.
    pub(super) async fn connect_again(&self) -> Vec<(PeerId, Result<(), SessionError>)> {
        let again = self.hops.iter().filter(|hop| hop.link.is_closed() && !self.repairs.lost.contains(&hop.peer));
        let attempts = again.map(|hop| {
            let within = reconnect_within(self.client.observer().rtt(hop.peer));
            let connecting = HopLink::connect(self.client.swarm().clone(), hop.route_hop(), within);
            async { (hop.peer, connecting.await.map(drop)) }
        });
        future::join_all(attempts).await
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
            // One that failed may have come back: it has just answered. The more often in vain, the later it is tried.
            if let Some(found) = self.patch(&view, &|_| true).or_else(|| anew(&|_| true)) {
                tokio::time::sleep(pause(self.repairs.attempts)).await;
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
            let recovery = Recovery {
                hop: index + 1,
                lost,
                replacement,
                took: Duration::ZERO,
                route: Vec::new(),
                handed_over: self.handing.handed_over() == Some(lost),
            };
            self.repairs.pending.push((self.repairs.since.unwrap_or_else(Instant::now), recovery));
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
        self.last_answer = Instant::now();
        let fresh = self.hops.iter().enumerate().filter(|(index, _)| plan.is_fresh(*index));
        self.repairs.filling = fresh.map(|(_, hop)| (hop.peer, 0)).collect();
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

    /// A hop has computed a part of a replay: what follows it may take as long again.
    pub(super) fn told(&mut self, from: PeerId, replayed: &proto::Replayed) -> Result<(), SessionError> {
        // Each part has a row at least, so nobody has more of them to tell of.
        let parts = u32::try_from(self.limits.max_tokens).unwrap_or(u32::MAX);
        if self.repairs.goes_on(from, replayed.index, parts) {
            self.last_answer = Instant::now();
        }
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

/// How long a peer may take to be there again, over a link with this round trip.
fn reconnect_within(round_trip: Option<Duration>) -> Duration {
    let round_trips = round_trip.unwrap_or_default().saturating_mul(RECONNECT_ROUND_TRIPS);
    RECONNECT.saturating_add(round_trips).min(LONGEST_RECONNECT)
}

/// A random pause that grows with the attempts, so that many clients that lost the same hop don't come back all at once.
fn pause(attempts: u32) -> Duration {
    let longest = FIRST_PAUSE.saturating_mul(1 << attempts.min(16)).min(LONGEST_PAUSE);
    longest.mul_f64(rand::rng().random_range(0.5..=1.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lost(silent: bool) -> SessionError {
        SessionError::HopLost { peer: PeerId::random(), blocks: 0..2, why: "it is gone".to_owned(), silent }
    }

    #[test]
    fn a_hop_goes_on_where_it_computes_what_it_had_not() {
        let (hop, other) = (PeerId::random(), PeerId::random());
        let mut repairs = Repairs::new(true);
        repairs.filling.insert(hop, 0);
        let mut goes_on = |peer: PeerId, index: u32| repairs.goes_on(peer, index, 3);
        assert!(goes_on(hop, 0) && goes_on(hop, 2), "some may have been told of at once");
        for (peer, index, why) in [
            (hop, 2, "the same again"),
            (hop, 0, "an old one"),
            (hop, 3, "more than there are"),
            (other, 0, "of nobody"),
        ] {
            assert!(!goes_on(peer, index), "{why}");
        }
    }

    #[test]
    fn a_repair_that_worked_leaves_the_next_loss_its_own_time_but_no_more_attempts() {
        let full = SessionError::Fault {
            peer: PeerId::random(),
            blocks: 0..2,
            code: proto::Code::CacheFull,
            blame: proto::Blame::Nobody,
            maybe_applied: false,
            message: "full".to_owned(),
        };
        for (first, is_over) in [(lost(false), true), (lost(true), true), (full, false)] {
            let mut repairs = Repairs { attempts: 3, since: Some(Instant::now()), ..Repairs::new(true) };
            repairs.worked(&first);
            assert_eq!((repairs.attempts, repairs.since.is_none()), (3, is_over), "{first}");
        }
    }

    #[test]
    fn a_long_link_has_the_time_that_its_round_trips_take() {
        let ms = Duration::from_millis;
        assert_eq!(reconnect_within(None), ms(500));
        assert_eq!(reconnect_within(Some(ms(1))), ms(508));
        assert_eq!(reconnect_within(Some(ms(150))), ms(1700));
        assert_eq!(reconnect_within(Some(Duration::MAX)), LONGEST_RECONNECT);
    }
}
