//! A session: one KV cache across the hops of a route, as its client sees it.
//!
//! The client opens the session on every hop with a signed ticket (`opening`) and sends numbered steps to the first hop, the
//! first ones along with the tickets; it receives each answer from the last hop. It never waits in vain: a hop that answers with a fault, whose link ends, or that
//! doesn't answer a ping while a step is overdue is lost, and another one takes its place (`repair`): the hop before it
//! replays what it had sent on, the others keep what they have, and the steps under way go on. A hop that leaves on purpose
//! hands what it has over to another one (`handing`). Whoever uses the session sees a pause, and later what happened ([`Session::take_recoveries`]).

mod error;
mod handing;
mod lanes;
mod moving;
mod opening;
mod plan;
mod prefix;
mod repair;
mod resting;

use std::{
    collections::{HashSet, VecDeque},
    ops::Range,
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};
use libp2p::PeerId;

pub use self::{error::SessionError, prefix::Prompt, repair::Recovery};
use self::{
    handing::Handing,
    moving::Moves,
    opening::HopLink,
    prefix::Prefix,
    repair::{Repairs, Telling},
    resting::Cut,
};
use super::{
    Client,
    choice::room_soon,
    inbox::{Event, Mailbox},
    speeds::{HopStep, Load},
};
use crate::{
    engine::{HiddenStates, LaneRun},
    model::Dtype,
    swarm::{
        Frame, Link, WireCodec,
        announcement::{Announcement, arithmetic::compute_alike},
        clean,
        history::{History, Place, Rows},
        proto::{announcement, session as proto},
        ticket::{SessionId, SessionLimits},
    },
};

/// How long a client waits, and for what.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// For every hop to be reached, and then to accept the session.
    pub opening: Duration,
    /// For a step's answer before the hops are asked whether they live.
    pub overdue: Duration,
    /// For a hop to answer that it lives.
    pub pong: Duration,
    /// For a step's answer where all hops live; and for the next part of what a hop is told that took a lost one's place.
    pub step: Duration,
    /// For another hop to take a lost one's place, where nobody can at first.
    pub recovery: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            opening: Duration::from_secs(15),
            overdue: Duration::from_secs(2),
            pong: Duration::from_secs(3),
            step: Duration::from_secs(120),
            recovery: Duration::from_secs(30),
        }
    }
}

/// A hop of a route: a part of what a peer announced.
#[derive(Debug, Clone)]
pub struct RouteHop {
    /// The peer, as announced.
    pub announcement: Announcement,
    /// The blocks it runs in this route.
    pub blocks: Range<usize>,
}

/// A chain of hops that together run the model, and what is agreed among them.
#[derive(Debug, Clone)]
pub struct Route {
    /// In the order of their blocks.
    pub hops: Vec<RouteHop>,
    /// How hidden states travel: `f32` where all hops compute in it, `bf16` otherwise.
    pub wire_dtype: Dtype,
    /// How they are packed.
    pub wire_codec: WireCodec,
}

impl Route {
    /// A route of these hops.
    pub fn new(hops: Vec<RouteHop>) -> Self {
        let all_f32 = hops.iter().all(|hop| hop.announcement.dtype == Dtype::F32);
        Self { hops, wire_dtype: if all_f32 { Dtype::F32 } else { Dtype::Bf16 }, wire_codec: WireCodec::Raw }
    }

    /// Whether all hops compute alike, so that where the cuts lie can't change a token.
    pub fn is_uniform(&self) -> bool {
        compute_alike(self.hops.iter().map(|hop| &hop.announcement))
    }
}

/// What of a step's rows the client wants back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Want {
    /// The last row of every lane.
    Last,
    /// All rows.
    All,
    /// Only that it was done.
    Nothing,
}

/// What a step feeds into the first block.
#[derive(Debug, Clone)]
pub enum Input {
    /// Tokens, to be embedded. Where the first hop is lost they are embedded again, so keeping them costs next to nothing.
    Tokens(Vec<u32>),
    /// Rows that are no tokens' embeddings.
    Rows(HiddenStates),
}

impl Input {
    /// Joins what a replay takes from several steps.
    fn embed(parts: &[Self], client: &Client, dtype: Dtype) -> Result<HiddenStates, SessionError> {
        if let [Self::Rows(rows)] = parts {
            return Ok(rows.clone());
        }
        let edges = client.model().edges();
        if let [Self::Tokens(ids)] = parts {
            return Ok(edges.embed(ids, dtype)?);
        }
        let mut bytes = BytesMut::new();
        let mut rows = 0;
        for part in parts {
            let states = Self::embed(std::slice::from_ref(part), client, dtype)?;
            rows += states.rows;
            bytes.extend_from_slice(&states.bytes);
        }
        Ok(HiddenStates { dtype, rows, hidden: client.model().spec().hidden_size, bytes: bytes.freeze() })
    }
}

impl Rows for Input {
    fn count(&self) -> usize {
        match self {
            Self::Tokens(ids) => ids.len(),
            Self::Rows(states) => states.rows,
        }
    }

    fn slice(&self, rows: Range<usize>) -> Self {
        match self {
            Self::Tokens(ids) => {
                let end = rows.end.min(ids.len());
                Self::Tokens(ids[rows.start.min(end)..end].to_vec())
            }
            Self::Rows(states) => Self::Rows(states.slice(rows)),
        }
    }
}

/// One step.
#[derive(Debug)]
pub struct Step {
    /// What of `input` belongs to which lane.
    pub lanes: Vec<LaneRun>,
    /// The rows of all lanes, end to end.
    pub input: Input,
    /// What to answer.
    pub want: Want,
    /// The length that length-dependent RoPE factors are taken for, where the model has some.
    pub rope_length: Option<usize>,
}

/// The answer to a step.
#[derive(Debug)]
pub struct StepAnswer {
    /// Which step.
    pub number: u64,
    /// The rows that were wanted; `None` for [`Want::Nothing`].
    pub hidden: Option<HiddenStates>,
    /// What every hop spent: waiting, and computing.
    pub times: Vec<(Duration, Duration)>,
}

/// A step that was sent and not answered.
struct Sent {
    header: proto::Step,
    input: Input,
    rows_wanted: usize,
    at: Instant,
}

/// An open session. Dropping it closes it on every hop.
pub struct Session {
    client: Client,
    id: SessionId,
    epoch: u64,
    hops: Vec<HopLink>,
    /// Hops that have not said yet that they hold the session.
    unopened: HashSet<PeerId>,
    mailbox: Mailbox,
    limits: SessionLimits,
    wire_dtype: Dtype,
    wire_codec: WireCodec,
    next_number: u64,
    confirmed: u64,
    sent: VecDeque<Sent>,
    last_answer: Instant,
    history: History<Input>,
    repairs: Repairs,
    moves: Moves,
    handing: Handing,
    /// Connections that are to be made again while the session rests.
    cut: Option<Cut>,
    /// What the first hop is being told, where it took a lost one's place: steps wait behind that.
    telling: Option<Telling>,
    /// Something went wrong where nobody could wait for a repair.
    broken: Option<SessionError>,
    prefix: Prefix,
}

impl Session {
    /// Its name, which only its peers know.
    pub fn id(&self) -> SessionId {
        self.id
    }

    /// How many more steps may be sent before an answer is received.
    pub fn credit(&self) -> usize {
        (self.limits.max_in_flight as usize).saturating_sub(self.sent.len())
    }

    /// How many steps are under way.
    pub fn in_flight(&self) -> usize {
        self.sent.len()
    }

    /// How hidden states travel in this session.
    pub fn wire_dtype(&self) -> Dtype {
        self.wire_dtype
    }

    /// How they are packed.
    pub fn wire_codec(&self) -> WireCodec {
        self.wire_codec
    }

    /// What the session may use on every hop.
    pub fn limits(&self) -> SessionLimits {
        self.limits
    }

    /// The route that it takes now.
    pub fn route(&self) -> Route {
        Route {
            hops: self.hops.iter().map(HopLink::route_hop).collect(),
            wire_dtype: self.wire_dtype,
            wire_codec: self.wire_codec,
        }
    }

    /// Sends a step to the first hop and returns its number. Doesn't wait: where the hop is lost, [`Session::receive`] notices.
    ///
    /// # Errors
    /// Where the credit is used up, or the tokens can't be embedded.
    pub fn send(&mut self, step: Step) -> Result<u64, SessionError> {
        self.check_credit()?;
        let Step { lanes, input, want, rope_length } = step;
        let hidden = self.embed(&input)?;
        let number = self.next_number;
        let header = proto::Step {
            number,
            confirmed: 0, // as it is when it leaves
            lanes: lanes
                .iter()
                .map(|run| proto::LaneRun { lane: run.lane, position: run.position as u64, tokens: run.tokens as u32 })
                .collect(),
            tensor: Some(self.wire_tensor(&hidden)),
            want: match want {
                Want::Last => proto::Want::Last,
                Want::All => proto::Want::All,
                Want::Nothing => proto::Want::None,
            }
            .into(),
            rope_length: rope_length.unwrap_or(0) as u64,
            ..proto::Step::default()
        };
        let mut row = 0;
        for run in &lanes {
            let length_class =
                self.client.model().spec().length_class(rope_length.unwrap_or(run.position + run.tokens));
            let place = Place { step: number, lane: run.lane, position: run.position, length_class };
            self.history.keep(place, input.slice(row..row + run.tokens));
            row += run.tokens;
        }
        Ok(self.dispatch(header, input, hidden))
    }

    fn check_credit(&self) -> Result<(), SessionError> {
        if self.credit() > 0 {
            return Ok(());
        }
        let most = self.sent.len();
        Err(SessionError::Misuse(format!("{most} steps are under way, the most that this session may have")))
    }

    /// What the first hop is sent for an input.
    fn embed(&self, input: &Input) -> Result<HiddenStates, SessionError> {
        Input::embed(std::slice::from_ref(input), &self.client, self.wire_dtype)
    }

    /// Gives the next step its place among those under way, and sends it unless a repair will.
    fn dispatch(&mut self, header: proto::Step, input: Input, hidden: HiddenStates) -> u64 {
        let number = header.number;
        let rows_wanted = match header.want() {
            proto::Want::Last => header.lanes.len(),
            proto::Want::All => hidden.rows,
            proto::Want::None | proto::Want::Unspecified => 0,
        };
        self.next_number += 1;
        self.sent.push_back(Sent { header: header.clone(), input, rows_wanted, at: Instant::now() });
        if self.telling.is_none() && self.broken.is_none() {
            let payload = self.pack(hidden);
            self.transmit(header, payload);
        }
        number
    }

    /// Hands a step to the first hop's link.
    fn transmit(&mut self, header: proto::Step, payload: Bytes) {
        let header = proto::Step { confirmed: self.confirmed, ..header };
        if let Err(error) = self.send_to(&self.hops[0], proto::frame::Body::Step(header), payload) {
            self.broken.get_or_insert(error);
        }
    }

    /// Waits for the answer to the oldest step that has none. Hops that are lost meanwhile are replaced.
    ///
    /// Where the wait is given up (dropped), the session may be in the middle of a repair and is best dropped, too.
    ///
    /// # Errors
    /// See [`SessionError`]; never waits longer than [`Patience`] says.
    pub async fn receive(&mut self) -> Result<StepAnswer, SessionError> {
        if self.sent.is_empty() {
            return Err(SessionError::Misuse("no step is under way".to_owned()));
        }
        loop {
            let error = match self.broken.take().or_else(|| self.hop_to_leave()) {
                Some(error) => error,
                None => match self.await_answer().await {
                    Ok(answer) => {
                        self.went_on();
                        return Ok(answer);
                    }
                    Err(error) => error,
                },
            };
            if !error.is_repairable() {
                return Err(error);
            }
            self.distrust_liars(&error);
            self.repair(error).await?;
        }
    }

    async fn await_answer(&mut self) -> Result<StepAnswer, SessionError> {
        let mut watch = Watch { next_look: self.waits_since() + self.client.patience().overdue, asked: None };
        loop {
            let look = tokio::time::Instant::from_std(watch.next_look);
            match tokio::time::timeout_at(look, self.mailbox.next()).await {
                Ok(event) => match self.sift(event)? {
                    Some((from, proto::frame::Body::Output(output), payload)) => {
                        if let Some(answer) = self.take_output(from, output, payload)? {
                            return Ok(answer);
                        }
                    }
                    Some((from, proto::frame::Body::Replayed(replayed), _)) => self.told(from, &replayed)?,
                    Some((from, proto::frame::Body::Opened(opened), _)) => {
                        self.unopened.remove(&from);
                        self.learn_load(from, &opened);
                    }
                    Some((from, proto::frame::Body::Pong(_), _)) => {
                        if let Some((_, silent)) = &mut watch.asked {
                            silent.remove(&from);
                        }
                    }
                    _ => {}
                },
                Err(_) => self.look_after_hops(&mut watch)?,
            }
        }
    }

    /// Since when nothing has come of the oldest step that has no answer. One behind others only begins when those are answered,
    /// and none does before a hop that took a lost one's place was told everything.
    fn waits_since(&self) -> Instant {
        self.sent.front().map_or(self.last_answer, |sent| sent.at.max(self.last_answer))
    }

    /// A step is overdue: asks the hops whether they live, or finds the one that didn't say so.
    fn look_after_hops(&self, watch: &mut Watch) -> Result<(), SessionError> {
        let now = Instant::now();
        if let Some((asked_at, silent)) = &watch.asked
            && let Some(hop) =
                self.hops.iter().find(|hop| silent.contains(&hop.peer) && !shows_life(&hop.link, *asked_at))
        {
            let why = format!("it does not answer ({:.1} s)", now.duration_since(*asked_at).as_secs_f64());
            return Err(self.silent(hop.peer, why));
        }
        let waited = now.duration_since(self.waits_since());
        if waited >= self.client.patience().opening
            && let Some(hop) = self.hops.iter().find(|hop| self.unopened.contains(&hop.peer))
        {
            let why = format!("it did not open the session within {:.0} s", waited.as_secs_f64());
            return Err(self.silent(hop.peer, why));
        }
        if waited >= self.client.patience().step {
            let number = self.sent.front().map_or(0, |sent| sent.header.number);
            return Err(SessionError::Overdue { number, waited });
        }
        for hop in &self.hops {
            self.send_to(hop, proto::frame::Body::Ping(proto::Ping { nonce: 0 }), Bytes::new())?;
        }
        watch.asked = Some((now, self.hops.iter().map(|hop| hop.peer).collect()));
        watch.next_look = now + self.client.patience().pong;
        Ok(())
    }

    /// Checks an output against what was asked. `None` for one that is not awaited (a retry's second answer).
    fn take_output(
        &mut self,
        from: PeerId,
        output: proto::Output,
        payload: Bytes,
    ) -> Result<Option<StepAnswer>, SessionError> {
        let width = self.client.model().spec().hidden_size;
        let last = &self.hops[self.hops.len() - 1];
        let Some(sent) = self.sent.front() else { return Ok(None) };
        if from != last.peer || output.number != sent.header.number {
            tracing::debug!(peer = %from, number = output.number, "ignored an output that is not awaited");
            return Ok(None);
        }
        let bad = |why: String| SessionError::BadAnswer { peer: last.peer, blocks: last.blocks.clone(), why };
        let hidden = match output.tensor {
            None if sent.rows_wanted == 0 && payload.is_empty() => None,
            None => return Err(bad(format!("no rows, and {} were wanted", sent.rows_wanted))),
            Some(tensor) => {
                let dtype: Dtype = tensor.dtype().try_into().map_err(|error| bad(format!("{error}")))?;
                let shape = (dtype, tensor.rows as usize, tensor.hidden as usize);
                if shape != (self.wire_dtype, sent.rows_wanted, width) {
                    return Err(bad(format!(
                        "{} rows of {} in {}, and {} of {} in {} were wanted",
                        shape.1, shape.2, shape.0, sent.rows_wanted, width, self.wire_dtype
                    )));
                }
                if tensor.codec != announcement::WireCodec::from(self.wire_codec) as i32 {
                    return Err(bad(format!(
                        "packed as codec {}, and {} was agreed on",
                        tensor.codec, self.wire_codec
                    )));
                }
                let bytes =
                    self.wire_codec.decode(dtype, (shape.1, shape.2), payload).map_err(|e| bad(e.to_string()))?;
                let hidden = HiddenStates::new(dtype, shape.1, shape.2, bytes).map_err(|e| bad(e.to_string()))?;
                if let Some(row) = hidden.first_non_finite() {
                    return Err(bad(format!("row {row} holds a number that is not finite")));
                }
                Some(hidden)
            }
        };
        let number = sent.header.number;
        let rows = sent.input.count();
        // One that shared the route with others, or was sent again, says nothing of the links.
        let alone = (self.sent.len() == 1 && sent.at >= self.last_answer).then(|| sent.at.elapsed());
        if let Some(run) = sent.header.lanes.iter().find(|run| run.lane == 0) {
            self.prefix.is_filled(&self.client, &self.hops, (run.position + u64::from(run.tokens)) as usize);
        }
        self.sent.pop_front();
        if self.confirmed == 0 {
            self.hops.iter().for_each(|hop| self.client.succeeded(hop.peer));
        }
        self.confirmed = number;
        self.history.confirm(number);
        self.last_answer = Instant::now();
        let micros = |us: u32| Duration::from_micros(u64::from(us));
        let times: Vec<_> = output.times.iter().map(|time| (micros(time.queue_us), micros(time.compute_us))).collect();
        self.learn_times((rows, alone), &times);
        Ok(Some(StepAnswer { number, hidden, times }))
    }

    /// What a step took at each hop, and on its way if it was alone there, is what the next route is chosen by.
    fn learn_times(&self, (rows, alone): (usize, Option<Duration>), times: &[(Duration, Duration)]) {
        // A step without rows says nothing of a hop's speed.
        if times.len() != self.hops.len() || rows == 0 {
            return;
        }
        let observer = self.client.observer();
        for (hop, &(queued, computed)) in self.hops.iter().zip(times) {
            let step = HopStep { rows, blocks: hop.blocks.len(), queued, computed };
            observer.learn(hop.peer, |speeds, now| speeds.learn_step(step, now));
        }
        // A larger frame takes time that is not the links' delay.
        if let (1, Some(took)) = (rows, alone) {
            let hops: Vec<PeerId> = self.hops.iter().map(|hop| hop.peer).collect();
            observer.learn_legs(&hops, took, times.iter().map(|(queued, computed)| *queued + *computed).sum());
        }
    }

    fn learn_load(&self, peer: PeerId, opened: &proto::Opened) {
        let load = Load { cache_tokens_left: opened.cache_tokens_left, queue: opened.queue };
        self.client.observer().learn(peer, |speeds, now| speeds.learn_load(load, now));
    }

    /// Tokens that a hop of this session needs room for soon.
    fn room_soon(&self) -> u64 {
        room_soon(self.history.count(), &self.limits)
    }

    /// Turns faults and lost links of this session's hops into errors; lets their other frames through.
    fn sift(&self, event: Event) -> Result<Option<(PeerId, proto::frame::Body, Bytes)>, SessionError> {
        match event {
            Event::LinkClosed(peer) if self.hops.iter().any(|hop| hop.peer == peer && hop.link.is_closed()) => {
                Err(self.lost(peer, "the connection was closed".to_owned()))
            }
            Event::LinkClosed(_) => Ok(None),
            Event::Frame { from, epoch, body, payload } => {
                let hop = self.hops.iter().find(|hop| hop.peer == from);
                // A hop that leaves does so in any epoch.
                let is_leaving = |body: &proto::frame::Body| matches!(body, proto::frame::Body::Fault(fault) if fault.code() == proto::Code::Leaving);
                let (Some(hop), true) = (hop, epoch == self.epoch || is_leaving(&body)) else {
                    tracing::debug!(peer = %from, epoch, "ignored a frame that is not of this route");
                    return Ok(None);
                };
                let proto::frame::Body::Fault(fault) = body else { return Ok(Some((from, body, payload))) };
                // One that leaves says so whenever it has opened; before that, it refuses.
                let is_known = self.handing.is_to_be_left(from) && !self.unopened.contains(&from);
                if fault.code() == proto::Code::Leaving && is_known {
                    return Ok(None);
                }
                Err(self.fault(hop, fault))
            }
        }
    }

    fn fault(&self, hop: &HopLink, fault: proto::Fault) -> SessionError {
        let message = clean(&fault.message);
        let index = self.hops.iter().position(|other| other.peer == hop.peer).unwrap_or(0);
        // A hop that can't go on because of a neighbour: that one is the news.
        if matches!(fault.blame(), proto::Blame::Downstream | proto::Blame::Upstream)
            && let Ok(about) = PeerId::from_bytes(&fault.peer)
            && let Some(lost) = self.hops.iter().find(|hop| hop.peer == about)
        {
            let why = format!("{message} (reported by {})", hop.peer);
            let silent = !matches!(fault.code(), proto::Code::NextHopLost | proto::Code::UpstreamLost);
            return SessionError::HopLost { peer: lost.peer, blocks: lost.blocks.clone(), why, silent };
        }
        // It was restarted, or took the client for gone: it is told everything again.
        if fault.code() == proto::Code::UnknownSession && (index == 0 || fault.number == 0) {
            return self.lost(hop.peer, message);
        }
        let (at_fault, blame) = match fault.blame() {
            // What a hop received wrong, the one before it made.
            proto::Blame::Upstream if index > 0 => (&self.hops[index - 1], proto::Blame::Hop),
            proto::Blame::Upstream => (hop, proto::Blame::Client),
            // A hop behind another one can't know what it gets to be the client's mistake, nor can one that comes late to a
            // session that works: their word is no reason to end it.
            proto::Blame::Client if index > 0 => (hop, proto::Blame::Hop),
            proto::Blame::Client if fault.number == 0 && self.confirmed > 0 => (hop, proto::Blame::Hop),
            blame => (hop, blame),
        };
        SessionError::Fault {
            peer: at_fault.peer,
            blocks: at_fault.blocks.clone(),
            code: fault.code(),
            blame,
            maybe_applied: fault.maybe_applied || self.is_applied_elsewhere(index, fault.number),
            message: if at_fault.peer == hop.peer { message } else { format!("{message} (reported by {})", hop.peer) },
        }
    }

    /// Whether a step that has no answer may have been applied although this hop did not apply step `number` (0: it speaks of none).
    fn is_applied_elsewhere(&self, hop: usize, number: u64) -> bool {
        let Some(oldest) = self.sent.front().map(|sent| sent.header.number) else { return false };
        // The first hop that never opened the session has no step of it, and so has nobody else.
        let never_began = self.epoch == 1 && self.unopened.contains(&self.hops[0].peer);
        hop > 0 || if number > 0 { oldest < number } else { !never_began }
    }

    /// The connection to a hop is lost, which says nothing of the hop itself.
    fn lost(&self, peer: PeerId, why: String) -> SessionError {
        let blocks = self.hops.iter().find(|hop| hop.peer == peer).map_or(0..0, |hop| hop.blocks.clone());
        SessionError::HopLost { peer, blocks, why, silent: false }
    }

    /// A hop does not answer.
    fn silent(&self, peer: PeerId, why: String) -> SessionError {
        let blocks = self.hops.iter().find(|hop| hop.peer == peer).map_or(0..0, |hop| hop.blocks.clone());
        SessionError::HopLost { peer, blocks, why, silent: true }
    }

    /// What a frame says of the rows in its payload.
    fn wire_tensor(&self, hidden: &HiddenStates) -> proto::Tensor {
        proto::Tensor {
            dtype: announcement::Dtype::from(hidden.dtype).into(),
            rows: hidden.rows as u32,
            hidden: hidden.hidden as u32,
            codec: announcement::WireCodec::from(self.wire_codec).into(),
        }
    }

    /// Rows as a frame carries them.
    fn pack(&self, hidden: HiddenStates) -> Bytes {
        self.wire_codec.encode(hidden.dtype, hidden.hidden, hidden.bytes)
    }

    fn send_to(&self, hop: &HopLink, body: proto::frame::Body, payload: Bytes) -> Result<(), SessionError> {
        let header = proto::Frame { session: self.id.to_wire(), epoch: self.epoch, body: Some(body) };
        hop.link.send(Frame { header, payload }).map_err(|error| self.lost(hop.peer, error.to_string()))
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let keys = self.keys_at_close();
        let leaving = self.handing.leaving().map(|hop| (hop, proto::Close::default()));
        let hops = self.hops.iter().enumerate().map(|(index, hop)| (hop, self.closing(index, &keys)));
        for (hop, close) in hops.chain(leaving) {
            // A hop that is gone has closed it already.
            let _ = self.send_to(hop, proto::frame::Body::Close(close), Bytes::new());
        }
    }
}

/// Whether a peer that doesn't answer a ping lives all the same: it sends something, or takes what waits in front of the ping.
/// Over a slow link a prompt's chunks take a while.
fn shows_life(link: &Link, since: Instant) -> bool {
    link.last_heard() > since || (link.waiting_bytes() > 0 && link.last_progress() > since)
}

/// What [`Session::receive`] knows of the hops while a step is overdue.
struct Watch {
    next_look: Instant,
    /// When they were asked, and who has not answered yet.
    asked: Option<(Instant, HashSet<PeerId>)>,
}
