//! A session: one KV cache across the hops of a route, as its client sees it.
//!
//! The client opens the session on every hop with a signed ticket, then sends numbered steps to the first hop and receives
//! each answer from the last one. It never waits in vain: a hop that answers with a fault, whose link ends, or that doesn't
//! answer a ping while a step is overdue ends the wait with an error that names the hop and its blocks.

use std::{
    collections::{HashSet, VecDeque},
    ops::Range,
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::future;
use libp2p::PeerId;

use super::{
    Client,
    inbox::{Event, Mailbox},
};
use crate::{
    engine::{HiddenStates, LaneRun},
    model::Dtype,
    swarm::{
        Frame, Link, LinkError, Swarm,
        announcement::{Announcement, unix_ms},
        clean,
        proto::{announcement, session as proto},
        ticket::{SessionId, SessionLimits, Ticket},
    },
};

/// How long a ticket may be used to open a session.
const TICKET_LIFETIME: Duration = Duration::from_secs(3600);

/// How long a client waits, and for what.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// For every hop to accept the session.
    pub opening: Duration,
    /// For a step's answer before the hops are asked whether they live.
    pub overdue: Duration,
    /// For a hop to answer that it lives.
    pub pong: Duration,
    /// For a step's answer where all hops live.
    pub step: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            opening: Duration::from_secs(15),
            overdue: Duration::from_secs(2),
            pong: Duration::from_secs(3),
            step: Duration::from_secs(120),
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
}

impl Route {
    /// A route of these hops.
    pub fn new(hops: Vec<RouteHop>) -> Self {
        let all_f32 = hops.iter().all(|hop| hop.announcement.dtype == Dtype::F32);
        Self { hops, wire_dtype: if all_f32 { Dtype::F32 } else { Dtype::Bf16 } }
    }

    /// Whether all hops compute alike, so that where the cuts lie can't change a token.
    pub fn is_uniform(&self) -> bool {
        let kind = |hop: &RouteHop| {
            let said = &hop.announcement;
            (said.dtype, said.quant.clone(), said.kernel_path.clone())
        };
        self.hops.windows(2).all(|pair| kind(&pair[0]) == kind(&pair[1]))
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

/// One step.
#[derive(Debug)]
pub struct Step {
    /// What of `hidden` belongs to which lane.
    pub lanes: Vec<LaneRun>,
    /// The embedded tokens.
    pub hidden: HiddenStates,
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

/// Why a session could not be opened, or ended.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// A hop can't be reached.
    #[error("peer {peer} (blocks {}:{}) can't be reached: {source}", blocks.start, blocks.end)]
    Unreachable {
        /// Who.
        peer: PeerId,
        /// What it was to run.
        blocks: Range<usize>,
        /// Why.
        source: LinkError,
    },
    /// A hop went away, or stopped answering.
    #[error("lost peer {peer} (blocks {}:{}): {why}", blocks.start, blocks.end)]
    HopLost {
        /// Who.
        peer: PeerId,
        /// What it ran.
        blocks: Range<usize>,
        /// How that was noticed.
        why: String,
    },
    /// A hop refused, or failed.
    #[error("peer {peer} (blocks {}:{}): {message}", blocks.start, blocks.end)]
    Fault {
        /// Who says so.
        peer: PeerId,
        /// What it runs.
        blocks: Range<usize>,
        /// What kind of fault.
        code: proto::Code,
        /// Whose fault it says it is.
        blame: proto::Blame,
        /// Whether the step may have been applied there.
        maybe_applied: bool,
        /// What it says.
        message: String,
    },
    /// The last hop's answer is not what was asked for.
    #[error("peer {peer} (blocks {}:{}) answered nonsense: {why}", blocks.start, blocks.end)]
    BadAnswer {
        /// Who.
        peer: PeerId,
        /// What it ran.
        blocks: Range<usize>,
        /// What is wrong.
        why: String,
    },
    /// All hops live, and yet there is no answer.
    #[error("no answer to step {number} after {} s, though all hops are alive: the swarm is overloaded; try again later", waited.as_secs())]
    Overdue {
        /// Which step.
        number: u64,
        /// How long.
        waited: Duration,
    },
    /// The client's own mistake.
    #[error("{0}")]
    Misuse(String),
}

impl SessionError {
    /// The peer to avoid when another route is tried, where the error names one that is at fault or has no room.
    pub fn peer_to_avoid(&self) -> Option<PeerId> {
        match self {
            Self::Unreachable { peer, .. } | Self::HopLost { peer, .. } | Self::BadAnswer { peer, .. } => Some(*peer),
            // A node that serves something else by now is not what the client looked up.
            Self::Fault { peer, code: proto::Code::WrongModel | proto::Code::WrongBlocks, .. } => Some(*peer),
            Self::Fault { blame: proto::Blame::Client, .. } | Self::Overdue { .. } | Self::Misuse(_) => None,
            Self::Fault { peer, .. } => Some(*peer),
        }
    }
}

struct HopLink {
    peer: PeerId,
    blocks: Range<usize>,
    link: Link,
}

impl HopLink {
    async fn connect(swarm: Swarm, hop: RouteHop) -> Result<Self, SessionError> {
        let RouteHop { announcement, blocks } = hop;
        let peer = announcement.peer_id;
        match swarm.link(peer, &announcement.addresses).await {
            Ok(link) => Ok(Self { peer, blocks, link }),
            Err(source) => Err(SessionError::Unreachable { peer, blocks, source }),
        }
    }
}

/// A step that was sent and not answered.
struct Sent {
    number: u64,
    rows_wanted: usize,
    at: Instant,
}

/// An open session. Dropping it closes it on every hop.
pub struct Session {
    id: SessionId,
    epoch: u64,
    hops: Vec<HopLink>,
    mailbox: Mailbox,
    limits: SessionLimits,
    patience: Patience,
    wire_dtype: Dtype,
    hidden: usize,
    next_number: u64,
    confirmed: u64,
    sent: VecDeque<Sent>,
    last_answer: Instant,
}

impl Session {
    /// Opens a session on every hop of the route, at once, and returns when all of them hold it.
    ///
    /// # Errors
    /// The first hop's refusal or loss that is noticed; the others are closed again.
    pub async fn open(client: &Client, route: &Route, limits: SessionLimits) -> Result<Self, SessionError> {
        let links: Vec<_> =
            route.hops.iter().map(|hop| HopLink::connect(client.swarm().clone(), hop.clone())).collect();
        let links = future::try_join_all(links).await?;

        let id = SessionId::random();
        let mut session = Self {
            id,
            epoch: 1,
            hops: links,
            mailbox: client.inbox().register(id),
            limits,
            patience: client.patience(),
            wire_dtype: route.wire_dtype,
            hidden: client.model().spec().hidden_size,
            next_number: 1,
            confirmed: 0,
            sent: VecDeque::new(),
            last_answer: Instant::now(),
        };
        session.send_tickets(client, route)?;
        session.wait_until_open().await?;
        Ok(session)
    }

    fn send_tickets(&self, client: &Client, route: &Route) -> Result<(), SessionError> {
        let own = client.swarm().peer_id();
        let expires = unix_ms() + TICKET_LIFETIME.as_millis() as u64;
        for (index, hop) in self.hops.iter().enumerate() {
            let next = route.hops.get(index + 1);
            let ticket = Ticket {
                session: self.id,
                epoch: self.epoch,
                client: own,
                hop: hop.peer,
                upstream: if index == 0 { own } else { self.hops[index - 1].peer },
                downstream: next.map_or(own, |next| next.announcement.peer_id),
                dht_prefix: client.model().identity().dht_prefix.clone(),
                fingerprint: client.model().identity().fingerprint,
                blocks: hop.blocks.clone(),
                wire_dtype: self.wire_dtype,
                limits: self.limits,
                expires_unix_ms: expires,
            };
            let mut open = ticket
                .sign(client.swarm().identity().keypair())
                .map_err(|error| SessionError::Misuse(format!("the session's ticket can't be signed: {error}")))?;
            open.next = next.and_then(|next| next.announcement.signed.clone());
            self.send_to(hop, proto::frame::Body::Open(open), Bytes::new())?;
        }
        Ok(())
    }

    async fn wait_until_open(&mut self) -> Result<(), SessionError> {
        let deadline = tokio::time::Instant::now() + self.patience.opening;
        let mut waiting: HashSet<PeerId> = self.hops.iter().map(|hop| hop.peer).collect();
        while !waiting.is_empty() {
            let Ok(event) = tokio::time::timeout_at(deadline, self.mailbox.next()).await else {
                let silent = self.hops.iter().find(|hop| waiting.contains(&hop.peer)).map(|hop| hop.peer);
                let why = format!("it did not open the session within {} s", self.patience.opening.as_secs());
                return Err(self.lost(silent.unwrap_or(self.hops[0].peer), why));
            };
            if let Some((from, proto::frame::Body::Opened(_), _)) = self.sift(event)? {
                waiting.remove(&from);
            }
        }
        Ok(())
    }

    /// Its name, which only its peers know.
    pub fn id(&self) -> SessionId {
        self.id
    }

    /// How many more steps may be sent before an answer is received.
    pub fn credit(&self) -> usize {
        (self.limits.max_in_flight as usize).saturating_sub(self.sent.len())
    }

    /// How hidden states travel in this session.
    pub fn wire_dtype(&self) -> Dtype {
        self.wire_dtype
    }

    /// Sends a step to the first hop and returns its number. Doesn't wait.
    ///
    /// # Errors
    /// Where the credit is used up, or the first hop is lost.
    pub fn send(&mut self, step: Step) -> Result<u64, SessionError> {
        if self.credit() == 0 {
            return Err(SessionError::Misuse(format!(
                "{} steps are under way, the most that this session may have",
                self.sent.len()
            )));
        }
        let Step { lanes, hidden, want, rope_length } = step;
        let number = self.next_number;
        let body = proto::Step {
            number,
            confirmed: self.confirmed,
            lanes: lanes
                .iter()
                .map(|run| proto::LaneRun { lane: run.lane, position: run.position as u64, tokens: run.tokens as u32 })
                .collect(),
            tensor: Some(proto::Tensor {
                dtype: announcement::Dtype::from(hidden.dtype).into(),
                rows: hidden.rows as u32,
                hidden: hidden.hidden as u32,
            }),
            want: match want {
                Want::Last => proto::Want::Last,
                Want::All => proto::Want::All,
                Want::Nothing => proto::Want::None,
            }
            .into(),
            rope_length: rope_length.unwrap_or(0) as u64,
            times: Vec::new(),
        };
        let rows_wanted = match want {
            Want::Last => lanes.len(),
            Want::All => hidden.rows,
            Want::Nothing => 0,
        };
        self.send_to(&self.hops[0], proto::frame::Body::Step(body), hidden.bytes)?;
        self.next_number += 1;
        self.sent.push_back(Sent { number, rows_wanted, at: Instant::now() });
        Ok(number)
    }

    /// Waits for the answer to the oldest step that has none.
    ///
    /// # Errors
    /// See [`SessionError`]; never waits longer than [`Patience`] says.
    pub async fn receive(&mut self) -> Result<StepAnswer, SessionError> {
        let Some(sent) = self.sent.front() else {
            return Err(SessionError::Misuse("no step is under way".to_owned()));
        };
        // A step behind others only begins when those are answered.
        let since = sent.at.max(self.last_answer);
        let mut watch = Watch { next_look: since + self.patience.overdue, asked: None };
        loop {
            let look = tokio::time::Instant::from_std(watch.next_look);
            match tokio::time::timeout_at(look, self.mailbox.next()).await {
                Ok(event) => match self.sift(event)? {
                    Some((from, proto::frame::Body::Output(output), payload)) => {
                        if let Some(answer) = self.take_output(from, output, payload)? {
                            return Ok(answer);
                        }
                    }
                    Some((from, proto::frame::Body::Pong(_), _)) => {
                        if let Some((_, silent)) = &mut watch.asked {
                            silent.remove(&from);
                        }
                    }
                    _ => {}
                },
                Err(_) => self.look_after_hops(&mut watch, since)?,
            }
        }
    }

    /// A step is overdue: asks the hops whether they live, or finds the one that didn't say so.
    fn look_after_hops(&self, watch: &mut Watch, since: Instant) -> Result<(), SessionError> {
        let now = Instant::now();
        if let Some((asked_at, silent)) = &watch.asked
            && let Some(hop) =
                self.hops.iter().find(|hop| silent.contains(&hop.peer) && !shows_life(&hop.link, *asked_at))
        {
            let why = format!("it does not answer ({:.1} s)", now.duration_since(*asked_at).as_secs_f64());
            return Err(self.lost(hop.peer, why));
        }
        let waited = now.duration_since(since);
        if waited >= self.patience.step {
            let number = self.sent.front().map_or(0, |sent| sent.number);
            return Err(SessionError::Overdue { number, waited });
        }
        for hop in &self.hops {
            self.send_to(hop, proto::frame::Body::Ping(proto::Ping { nonce: 0 }), Bytes::new())?;
        }
        watch.asked = Some((now, self.hops.iter().map(|hop| hop.peer).collect()));
        watch.next_look = now + self.patience.pong;
        Ok(())
    }

    /// Checks an output against what was asked. `None` for one that is not awaited (a retry's second answer).
    fn take_output(
        &mut self,
        from: PeerId,
        output: proto::Output,
        payload: Bytes,
    ) -> Result<Option<StepAnswer>, SessionError> {
        let last = &self.hops[self.hops.len() - 1];
        let Some(sent) = self.sent.front() else { return Ok(None) };
        if from != last.peer || output.number != sent.number {
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
                if shape != (self.wire_dtype, sent.rows_wanted, self.hidden) {
                    return Err(bad(format!(
                        "{} rows of {} in {}, and {} of {} in {} were wanted",
                        shape.1, shape.2, shape.0, sent.rows_wanted, self.hidden, self.wire_dtype
                    )));
                }
                let hidden = HiddenStates::new(dtype, shape.1, shape.2, payload).map_err(|e| bad(e.to_string()))?;
                if let Some(row) = hidden.first_non_finite() {
                    return Err(bad(format!("row {row} holds a number that is not finite")));
                }
                Some(hidden)
            }
        };
        let number = sent.number;
        self.sent.pop_front();
        self.confirmed = number;
        self.last_answer = Instant::now();
        let micros = |us: u32| Duration::from_micros(u64::from(us));
        let times = output.times.iter().map(|time| (micros(time.queue_us), micros(time.compute_us))).collect();
        Ok(Some(StepAnswer { number, hidden, times }))
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
                let (Some(hop), true) = (hop, epoch == self.epoch) else {
                    tracing::debug!(peer = %from, epoch, "ignored a frame that is not of this route");
                    return Ok(None);
                };
                let proto::frame::Body::Fault(fault) = body else { return Ok(Some((from, body, payload))) };
                Err(self.fault(hop, fault))
            }
        }
    }

    fn fault(&self, hop: &HopLink, fault: proto::Fault) -> SessionError {
        let message = clean(&fault.message);
        // A hop that can't go on because of the one behind it: that one is the news.
        if fault.blame() == proto::Blame::Downstream
            && let Ok(about) = PeerId::from_bytes(&fault.peer)
            && let Some(lost) = self.hops.iter().find(|hop| hop.peer == about)
        {
            let why = format!("{message} (reported by {})", hop.peer);
            return SessionError::HopLost { peer: lost.peer, blocks: lost.blocks.clone(), why };
        }
        // What a hop received wrong, the hop before it made.
        let index = self.hops.iter().position(|other| other.peer == hop.peer).unwrap_or(0);
        let hop = match fault.blame() {
            proto::Blame::Upstream if index > 0 => &self.hops[index - 1],
            _ => hop,
        };
        SessionError::Fault {
            peer: hop.peer,
            blocks: hop.blocks.clone(),
            code: fault.code(),
            blame: fault.blame(),
            maybe_applied: fault.maybe_applied,
            message,
        }
    }

    fn lost(&self, peer: PeerId, why: String) -> SessionError {
        let blocks = self.hops.iter().find(|hop| hop.peer == peer).map_or(0..0, |hop| hop.blocks.clone());
        SessionError::HopLost { peer, blocks, why }
    }

    fn send_to(&self, hop: &HopLink, body: proto::frame::Body, payload: Bytes) -> Result<(), SessionError> {
        let header = proto::Frame { session: self.id.to_wire(), epoch: self.epoch, body: Some(body) };
        hop.link.send(Frame { header, payload }).map_err(|error| self.lost(hop.peer, error.to_string()))
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        for hop in &self.hops {
            // A hop that is gone has closed it already.
            let _ = self.send_to(hop, proto::frame::Body::Close(proto::Close {}), Bytes::new());
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
