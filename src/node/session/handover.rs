//! Leaving: handing a session over to the peer that takes this hop's place.
//!
//! The client names the peer ([`HandOver`](proto::HandOver)). From then on nothing of the old route goes on here. When the step that is
//! being computed is done, all that the session has is sent over in parts: where it stands, the pages of its KV cache, the rows that
//! it sent on, the replies that may be asked for again. Nothing but counts leaves before the peer has shown, by taking the
//! first part, that it was given a ticket for it; after that a few parts are under way at a time, so that a long context never
//! fills an outbox.
//!
//! Until the client closes it, the session stays here as it was: where the hand-over fails, a ticket of a newer epoch lets it go on,
//! or another hop is told what it needs as after a loss. So nothing is lost and nothing is applied twice, whoever fails when.

use std::{
    ops::Range,
    pin::pin,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};
use tokio::sync::oneshot;

use super::{HopSession, Inner, Reply, replay::Kept, wire_tensor};
use crate::{
    engine::{LaneLayout, Snapshot, TransferError},
    model::Quant,
    node::border::Refusal,
    swarm::{
        Frame, Link, SendError, WireCodec, clean,
        history::{Entry, Place, Rows},
        proto::session as proto,
    },
};

/// Bytes of a part, unless a single piece, row or reply has more. Whoever waits sees that it goes on by the parts that are taken: also
/// where some sessions share 10 Mbit/s, one has a part in every few seconds.
const PART_BYTES: usize = 256 << 10;

/// Runs of rows in a part: of a session that decoded, each has one row, and a header has its limit.
const PART_RUNS: usize = 1024;

/// Parts that are sent before the first of them is taken: one is under way while another one is written.
pub(super) const PARTS_AHEAD: u32 = 4;

/// How soon a part is offered again to an outbox that was full.
const SEND_AGAIN: Duration = Duration::from_millis(20);

/// A hand-over that was begun.
#[derive(Debug)]
pub(super) struct Handing {
    /// Of the ticket that the other peer holds.
    epoch: u64,
    to: Option<Link>,
    /// How many parts the other peer has taken.
    taken: u32,
    refused: Option<(proto::Code, String)>,
}

/// Why a session stays here.
#[derive(Debug, thiserror::Error)]
enum HandOverError {
    #[error("the session ended, or its route changed again")]
    Overtaken,
    #[error("the session is in the middle of a replay")]
    Filling,
    #[error("nothing went on for {} s", .0.as_secs())]
    Deadline(Duration),
    #[error("{1}")]
    Refused(proto::Code, String),
    #[error(transparent)]
    Send(#[from] SendError),
    #[error(transparent)]
    Pages(#[from] TransferError),
}

impl HandOverError {
    fn code(&self) -> proto::Code {
        match self {
            Self::Overtaken => proto::Code::UnknownSession,
            Self::Filling => proto::Code::HistoryGone,
            Self::Deadline(_) => proto::Code::Deadline,
            Self::Refused(code, _) => *code,
            Self::Send(_) => proto::Code::NextHopLost,
            Self::Pages(_) => proto::Code::Internal,
        }
    }
}

/// All that a session has, at one moment.
struct Estate {
    state: proto::SessionState,
    snapshot: Arc<Snapshot>,
    rows: Vec<Entry<Kept>>,
    replies: Vec<Reply>,
}

impl HopSession {
    /// The client says that this hop's session goes to another peer: nothing of this epoch goes on. False where it isn't the client's
    /// word, or not about the present route.
    pub(crate) fn begin_handing(&self, link: &Link, epoch: u64, order: &proto::HandOver) -> bool {
        let mut inner = self.lock();
        if link.peer() != self.client || epoch != inner.log.epoch() || order.epoch <= epoch || inner.handing.is_some() {
            return false;
        }
        inner.log.fail_epoch();
        inner.handing = Some(Handing { epoch: order.epoch, to: None, taken: 0, refused: None });
        true
    }

    /// Tells the client that it is not the session's turn yet, and that this is no standstill.
    pub(crate) fn tell_waiting(&self) {
        let inner = self.lock();
        let waiting = proto::frame::Body::TakenOver(proto::TakenOver { index: 0 });
        if inner.control.send(Frame::bare(self.header(inner.log.epoch(), waiting))).is_err() {
            tracing::debug!(session = %self.id, "the client can't be told: its link is gone");
        }
    }

    /// The blocks that the session runs.
    pub(crate) fn blocks(&self) -> Range<usize> {
        self.lock().ticket.blocks.clone()
    }

    /// Hands the session over to a peer that has it in `epoch`, if it can be reached; tells the client where it can't.
    pub(crate) async fn hand_over(self: Arc<Self>, to: Result<Link, Refusal>, epoch: u64) {
        let result = match to {
            Ok(link) => self.send_all(link, epoch).await,
            Err(refusal) => Err(HandOverError::Refused(refusal.code, refusal.message)),
        };
        let Err(error) = result else {
            tracing::debug!(session = %self.id, "the session was handed over");
            return;
        };
        tracing::debug!(session = %self.id, %error, "the session was not handed over");
        if matches!(error, HandOverError::Overtaken) {
            return; // by the client, which knows
        }
        let inner = self.lock();
        let not = proto::NotHandedOver { code: error.code().into(), message: error.to_string() };
        let header = self.header(inner.log.epoch(), proto::frame::Body::NotHandedOver(not));
        if inner.control.send(Frame::bare(header)).is_err() {
            tracing::debug!(session = %self.id, "the client can't be told: its link is gone");
        }
    }

    async fn send_all(&self, to: Link, epoch: u64) -> Result<(), HandOverError> {
        let Estate { state, snapshot, rows, replies } = self
            .when(epoch, |inner| {
                if let Some(handing) = &mut inner.handing {
                    handing.to = Some(to.clone());
                }
                if inner.replaying.is_filling() || inner.taking.is_some() {
                    return Err(HandOverError::Filling);
                }
                if inner.log.is_running() { Ok(None) } else { self.estate(inner).map(Some) }
            })
            .await?;
        let mut parcel = Parcel { session: self, to, epoch, next_index: 0 };
        parcel.send(proto::take_over::Part::State(state), Bytes::new()).await?;
        // Whoever takes nothing is told nothing.
        parcel.taken(1).await?;

        let mut first = 0;
        while first < snapshot.pieces() {
            let pieces = self.engine.pieces_within(&snapshot, first, PART_BYTES);
            let (answer, answered) = oneshot::channel();
            let done = Box::new(move |bytes| {
                // Nobody waits for it any more where the session ended.
                let _ = answer.send(bytes);
            });
            self.engine.read_pieces(snapshot.clone(), pieces.clone(), done);
            let bytes = answered.await.map_err(|_| TransferError::Closed)??;
            let part = proto::Pieces { first: first as u64, count: pieces.len() as u32 };
            parcel.send(proto::take_over::Part::Pieces(part), bytes.into()).await?;
            first = pieces.end;
        }
        drop(snapshot);
        let row_bytes = self.engine.spec().hidden_size * self.lock().ticket.wire_dtype.size_in_bytes();
        for (rows, payload) in in_parts(rows, row_bytes) {
            parcel.send(proto::take_over::Part::Rows(rows), payload).await?;
        }
        for Reply { step, output, .. } in replies {
            let tensor = (output.rows > 0).then(|| wire_tensor(&output, WireCodec::Raw));
            parcel.send(proto::take_over::Part::Reply(proto::Step { tensor, ..step }), output.bytes).await?;
        }
        parcel.send(proto::take_over::Part::End(proto::TakeOverEnd {}), Bytes::new()).await?;
        parcel.taken(parcel.next_index).await
    }

    /// What there is to hand over. No step is being computed.
    fn estate(&self, inner: &Inner) -> Result<Estate, HandOverError> {
        let cache = inner.cache.as_ref().ok_or(HandOverError::Overtaken)?;
        let snapshot = cache.snapshot();
        let state = proto::SessionState {
            applied: inner.log.last_applied(),
            confirmed: inner.log.confirmed(),
            lanes: snapshot.lanes().iter().map(to_wire).collect(),
            pages: snapshot.pages() as u64,
            kernel_path: self.engine.kernel_path().to_owned(),
            kv_dtype: self.engine.kv_dtype().to_string(),
            whole: inner.replaying.history.is_whole(),
            quant_settings: self.engine.quant_settings().iter().map(Quant::to_string).collect(),
        };
        let rows = inner.replaying.history.entries().collect();
        let replies = inner.log.kept().cloned().collect();
        Ok(Estate { state, snapshot: Arc::new(snapshot), rows, replies })
    }

    /// Waits until `ready` finds what it looks for in a session that is being handed over, in this epoch and no newer one.
    async fn when<T>(
        &self,
        epoch: u64,
        mut ready: impl FnMut(&mut Inner) -> Result<Option<T>, HandOverError>,
    ) -> Result<T, HandOverError> {
        let deadline = Instant::now() + self.step_deadline;
        loop {
            let mut changed = pin!(self.changed.notified());
            // From here on no change is missed.
            changed.as_mut().enable();
            {
                let mut inner = self.lock();
                let handing = inner.handing.as_mut().filter(|handing| handing.epoch == epoch);
                let handing = handing.ok_or(HandOverError::Overtaken)?;
                if let Some((code, message)) = handing.refused.take() {
                    return Err(HandOverError::Refused(code, message));
                }
                if let Some(found) = ready(&mut inner)? {
                    return Ok(found);
                }
            }
            if tokio::time::timeout_at(deadline.into(), changed).await.is_err() {
                return Err(HandOverError::Deadline(self.step_deadline));
            }
        }
    }

    /// The other peer has taken a part.
    pub(crate) fn part_taken(&self, link: &Link, epoch: u64, taken: &proto::TakenOver) {
        let mut inner = self.lock();
        if let Some(handing) = inner.handing.as_mut().filter(|handing| handing.is_with(link, epoch)) {
            handing.taken = handing.taken.max(taken.index.saturating_add(1));
            inner.last_used = Instant::now();
            self.changed.notify_waiters();
        }
    }

    /// The other peer refuses, or is gone. Whether it was about a hand-over at all.
    pub(super) fn handing_refused(&self, inner: &mut Inner, link: &Link, why: (Option<u64>, &proto::Fault)) -> bool {
        let (epoch, fault) = why;
        let handing = inner.handing.as_mut();
        let Some(handing) = handing.filter(|handing| handing.is_with(link, epoch.unwrap_or(handing.epoch))) else {
            return false;
        };
        handing.refused = Some((fault.code(), clean(&fault.message)));
        self.changed.notify_waiters();
        true
    }
}

impl Handing {
    fn is_with(&self, link: &Link, epoch: u64) -> bool {
        self.epoch == epoch && self.to.as_ref().is_some_and(|to| to.id() == link.id())
    }
}

/// The parts on their way to the other peer.
struct Parcel<'a> {
    session: &'a HopSession,
    to: Link,
    epoch: u64,
    next_index: u32,
}

impl Parcel<'_> {
    async fn send(&mut self, part: proto::take_over::Part, payload: Bytes) -> Result<(), HandOverError> {
        self.taken((self.next_index + 1).saturating_sub(PARTS_AHEAD)).await?;
        let body = proto::frame::Body::TakeOver(proto::TakeOver { index: self.next_index, part: Some(part) });
        let frame = Frame { header: self.session.header(self.epoch, body), payload };
        let deadline = Instant::now() + self.session.step_deadline;
        while let Err(error) = self.to.send(frame.clone()) {
            // The steps of others go first, and take what room there is.
            if !matches!(error, SendError::Full { .. }) || Instant::now() > deadline {
                return Err(error.into());
            }
            tokio::time::sleep(SEND_AGAIN).await;
        }
        self.next_index += 1;
        Ok(())
    }

    /// Waits until the other peer has taken so many.
    async fn taken(&self, parts: u32) -> Result<(), HandOverError> {
        let is_taken = |inner: &mut Inner| {
            let taken = inner.handing.as_ref().map_or(0, |handing| handing.taken);
            Ok((taken >= parts).then_some(()))
        };
        self.session.when(self.epoch, is_taken).await
    }
}

/// A lane with the runs of its pages.
pub(super) fn to_wire(lane: &LaneLayout) -> proto::LaneState {
    let mut pages: Vec<proto::PageRun> = Vec::new();
    for &page in &lane.pages {
        match pages.last_mut() {
            Some(run) if run.first + run.count == page => run.count += 1,
            _ => pages.push(proto::PageRun { first: page, count: 1 }),
        }
    }
    proto::LaneState { lane: lane.lane, tokens: lane.tokens as u64, pages }
}

/// Rows of `row_bytes` that were sent on, in parts that are not too large.
fn in_parts(entries: Vec<Entry<Kept>>, row_bytes: usize) -> impl Iterator<Item = (proto::KeptRows, Bytes)> {
    let most = (PART_BYTES / row_bytes.max(1)).max(1);
    let pieces = entries.into_iter().flat_map(move |entry| {
        let count = entry.rows.as_ref().map_or(0, Kept::count);
        (0..count.max(1)).step_by(most).map(move |first| {
            let rows = entry.rows.as_ref().map(|kept| kept.slice(first..(first + most).min(count)));
            Entry { place: Place { position: entry.place.position + first, ..entry.place }, before: entry.before, rows }
        })
    });
    let mut pieces = pieces.peekable();
    std::iter::from_fn(move || {
        pieces.peek()?;
        let (mut runs, mut payload, mut tensor) = (Vec::new(), BytesMut::new(), None);
        let bytes = |piece: &Entry<Kept>| piece.rows.as_ref().map_or(0, |kept| kept.states().bytes.len());
        while let Some(Entry { before, place, rows }) = pieces
            .next_if(|piece| runs.is_empty() || (payload.len() + bytes(piece) <= PART_BYTES && runs.len() < PART_RUNS))
        {
            let tokens = rows.as_ref().map_or(0, |kept| kept.count() as u32);
            if let Some(kept) = rows {
                payload.extend_from_slice(&kept.states().bytes);
                tensor = Some(wire_tensor(kept.states(), WireCodec::Raw));
            }
            let Place { step, lane, position, length_class } = place;
            let rows = proto::LaneRun { lane, position: position as u64, tokens };
            runs.push(proto::KeptRun { step, rows: Some(rows), length_class: length_class as u64, before });
        }
        let rows = (payload.len() / row_bytes.max(1)) as u32;
        let tensor = tensor.map(|tensor| proto::Tensor { rows, ..tensor });
        Some((proto::KeptRows { runs, tensor }, payload.freeze()))
    })
}
