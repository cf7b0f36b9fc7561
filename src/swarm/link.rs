//! Links: kept streams of frames between two peers, shared by all sessions that run between them.
//!
//! A link is one `/helion/session/1` stream. The peer that dials opens its own; what answers a frame goes back on the stream
//! that the frame came on. Two tasks serve it: one reads frames and hands them to the [`Service`], one writes what
//! [`Link::send`] put into the outbox. Sending never blocks and may be done from any thread: where the outbox is full, it says
//! so, and what to do then is the session's business. Bytes count against the outbox until the stream below has taken them.
//!
//! Strangers open links, so what they can make this process hold is bounded for each link and for all together, and a frame
//! that has begun to arrive has to go on arriving. A link is not closed for being idle or slow to take frames: whether its
//! peer still lives is for those who use it to decide, by [`Link::last_heard`] and [`Link::last_progress`].

mod memory;
mod outbox;

use std::{
    collections::HashMap,
    fmt, io,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use bytes::BytesMut;
use futures::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use libp2p::PeerId;
use tokio::sync::Notify;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use self::{
    memory::Memory,
    outbox::{Full, Outbox},
};
use super::{
    Service,
    frame::{self, Begun, Frame, FrameError, FrameLimits},
};

/// Payloads up to this size are copied behind their header, so that they leave in one write.
const COALESCE_BYTES: usize = 32 * 1024;
/// What is gathered from several small frames before it is written.
const BATCH_BYTES: usize = 64 * 1024;
/// How long the end of a stream may take, either way.
const ENDING_TIMEOUT: Duration = Duration::from_secs(1);
/// Streams that one peer may keep open to this one: it needs one, and another while the old one dies.
const MAX_INBOUND_PER_PEER: usize = 4;
/// What a payload's size adds to the time in which its frame has to arrive: it may come at 2 Mbit/s.
const SLOWEST_BYTES_PER_SECOND: u32 = 256 * 1024;

/// The bounds of a link.
#[derive(Debug, Clone, Copy)]
pub struct LinkLimits {
    /// Of one frame.
    pub frame: FrameLimits,
    /// Frames in the outbox: some per session of the hundreds that may share a link.
    pub outbox_frames: usize,
    /// Bytes in the outbox. One frame always fits, whatever its size.
    pub outbox_bytes: usize,
    /// Bytes in the outboxes of all links of the process.
    pub all_outbox_bytes: usize,
    /// Bytes that have arrived of incomplete payloads, on all links of the process. The first 64 KiB of each don't count, and
    /// one payload may arrive beside this, so that they never all wait for each other.
    pub all_arriving_bytes: usize,
    /// How long a frame of which the lengths have arrived may take: so long, and a second for each 256 KiB of its payload. Between
    /// frames there is no limit.
    pub frame_timeout: Duration,
}

impl Default for LinkLimits {
    fn default() -> Self {
        const MIB: usize = 1024 * 1024;
        Self {
            frame: FrameLimits::default(),
            outbox_frames: 4096,
            outbox_bytes: 64 * MIB,
            all_outbox_bytes: 1024 * MIB,
            all_arriving_bytes: 512 * MIB,
            frame_timeout: Duration::from_secs(60),
        }
    }
}

/// A link's number, unique in this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LinkId(u64);

/// Why a frame was not taken. In every case nothing was sent.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// The stream is gone; open another with [`Swarm::link`](super::Swarm::link).
    #[error("the link to {peer} is closed")]
    Closed {
        /// The other end.
        peer: PeerId,
    },
    /// The peer takes frames more slowly than they are sent, or all peers together do.
    #[error("the outbox to {peer} is full: {frames} frames, {bytes} bytes wait ({all_bytes} bytes for all peers)")]
    Full {
        /// The other end.
        peer: PeerId,
        /// Waiting.
        frames: usize,
        /// Waiting.
        bytes: usize,
        /// Waiting in the outboxes of all links.
        all_bytes: usize,
    },
    /// The peer would refuse the frame.
    #[error("the frame to {peer} is not sent: {source}")]
    TooLarge {
        /// The other end.
        peer: PeerId,
        /// Which limit.
        source: FrameError,
    },
}

/// One end of a kept stream; a cheap clone.
#[derive(Clone)]
pub struct Link(Arc<Shared>);

struct Shared {
    id: LinkId,
    peer: PeerId,
    opened_by_us: bool,
    limits: LinkLimits,
    memory: Arc<Memory>,
    opened_at: Instant,
    /// Microseconds from the opening until bytes last came.
    heard: AtomicU64,
    outbox: Mutex<Outbox>,
    /// The outbox got its first frame.
    filled: Notify,
    /// No more frames are taken; those in the outbox still leave.
    finishing: CancellationToken,
    closed: CancellationToken,
}

impl Link {
    fn new(peer: PeerId, opened_by_us: bool, limits: LinkLimits, memory: Arc<Memory>) -> Self {
        let opened_at = Instant::now();
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self(Arc::new(Shared {
            id: LinkId(NEXT.fetch_add(1, Ordering::Relaxed)),
            peer,
            opened_by_us,
            limits,
            opened_at,
            heard: AtomicU64::new(0),
            outbox: Mutex::new(Outbox::new(memory.clone(), opened_at)),
            memory,
            filled: Notify::new(),
            finishing: CancellationToken::new(),
            closed: CancellationToken::new(),
        }))
    }

    /// The other end, authenticated by the transport.
    pub fn peer(&self) -> PeerId {
        self.0.peer
    }

    /// This link's number.
    pub fn id(&self) -> LinkId {
        self.0.id
    }

    /// Whether this peer opened the stream: then this one asks and the other one answers.
    pub fn opened_by_us(&self) -> bool {
        self.0.opened_by_us
    }

    /// Whether the stream is gone. It doesn't come back; a new link does.
    pub fn is_closed(&self) -> bool {
        self.0.closed.is_cancelled()
    }

    /// Gives the stream up. What is in the outbox is dropped.
    pub fn close(&self) {
        self.0.closed.cancel();
    }

    /// When bytes last came on this stream; at first, when it was opened. A peer that is sending one large frame is heard all
    /// the time, long before the frame is there.
    pub fn last_heard(&self) -> Instant {
        self.0.opened_at + Duration::from_micros(self.0.heard.load(Ordering::Relaxed))
    }

    /// When the stream last took bytes out of the outbox, or the first frame was put into an empty one if that was later. While
    /// [`Link::waiting_bytes`] is not 0, a peer that lives and takes what is sent moves this on, however slow the way is.
    pub fn last_progress(&self) -> Instant {
        self.0.lock_outbox().moved_at()
    }

    /// Bytes in the outbox, of which a frame that is being written counts until all of it is taken.
    pub fn waiting_bytes(&self) -> usize {
        self.0.lock_outbox().bytes()
    }

    /// Puts a frame into the outbox. Frames arrive in the order in which they were sent, but for Ping and Pong: they go before
    /// all frames that have not begun to be written, and are taken where the outbox has no room for others.
    pub fn send(&self, frame: Frame) -> Result<(), SendError> {
        let peer = self.0.peer;
        let limits = &self.0.limits;
        let length = frame::wire_bytes(&frame, limits.frame).map_err(|source| SendError::TooLarge { peer, source })?;
        let mut outbox = self.0.lock_outbox();
        if self.is_closed() || self.0.finishing.is_cancelled() {
            return Err(SendError::Closed { peer });
        }
        let is_first = outbox.len() == 0;
        outbox
            .push(frame, length, limits, Instant::now())
            .map_err(|Full { frames, bytes, all_bytes }| SendError::Full { peer, frames, bytes, all_bytes })?;
        drop(outbox);
        if is_first {
            self.0.filled.notify_one();
        }
        Ok(())
    }

    /// Sends what is in the outbox, says that no more comes, and waits until the peer has seen that and closes the stream.
    ///
    /// Closing a connection at once would lose what was sent before: with unread bytes from the peer in the socket, the
    /// system resets it, and the peer's system drops what it has not read yet.
    pub(super) async fn finish(&self) {
        self.0.finishing.cancel();
        self.0.closed.cancelled().await;
    }
}

impl fmt::Debug for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Link")
            .field("id", &self.0.id)
            .field("peer", &self.0.peer)
            .field("opened_by_us", &self.0.opened_by_us)
            .finish_non_exhaustive()
    }
}

impl Shared {
    fn lock_outbox(&self) -> MutexGuard<'_, Outbox> {
        // Nothing in the critical sections panics half-way, so a poisoned outbox is as good as another.
        self.outbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn next_frame(&self) -> Option<Frame> {
        self.lock_outbox().pop()
    }

    fn heard_now(&self) {
        let micros = self.opened_at.elapsed().as_micros();
        self.heard.store(u64::try_from(micros).unwrap_or(u64::MAX), Ordering::Relaxed);
    }
}

/// The links of this process, by peer.
pub(super) struct Links {
    peers: Mutex<HashMap<PeerId, OfPeer>>,
    reading: TaskTracker,
    memory: Arc<Memory>,
}

#[derive(Default)]
struct OfPeer {
    outbound: Option<Link>,
    inbound: Vec<Link>,
}

impl Links {
    pub(super) fn new(limits: &LinkLimits) -> Self {
        Self { peers: Mutex::default(), reading: TaskTracker::new(), memory: Arc::new(Memory::new(limits)) }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<PeerId, OfPeer>> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The open link that this peer opened to `peer`, if there is one.
    pub(super) fn outbound(&self, peer: &PeerId) -> Option<Link> {
        self.lock().get(peer)?.outbound.clone().filter(|link| !link.is_closed())
    }

    /// Closes all links to a peer.
    pub(super) fn close_peer(&self, peer: &PeerId) {
        if let Some(of_peer) = self.lock().remove(peer) {
            of_peer.outbound.iter().chain(&of_peer.inbound).for_each(Link::close);
        }
    }

    /// Waits until the service has been told of the end of every link. No new one may start.
    pub(super) async fn ended(&self) {
        self.reading.close();
        self.reading.wait().await;
    }

    /// All links there are.
    pub(super) fn all(&self) -> Vec<Link> {
        self.lock().values().flat_map(|of_peer| of_peer.outbound.iter().chain(&of_peer.inbound)).cloned().collect()
    }

    /// Whether there is room for it; an outbound one takes the place of a closed one.
    fn insert(&self, link: &Link) -> bool {
        let mut peers = self.lock();
        let of_peer = peers.entry(link.peer()).or_default();
        if link.opened_by_us() {
            of_peer.outbound = Some(link.clone());
            return true;
        }
        let room = of_peer.inbound.len() < MAX_INBOUND_PER_PEER;
        if room {
            of_peer.inbound.push(link.clone());
        }
        room
    }

    fn remove(&self, link: &Link) {
        let mut peers = self.lock();
        if let Some(of_peer) = peers.get_mut(&link.peer()) {
            of_peer.inbound.retain(|other| other.id() != link.id());
            of_peer.outbound.take_if(|other| other.id() == link.id());
            if of_peer.inbound.is_empty() && of_peer.outbound.is_none() {
                peers.remove(&link.peer());
            }
        }
    }
}

/// What a new link needs.
pub(super) struct NewLink<S> {
    pub(super) peer: PeerId,
    pub(super) opened_by_us: bool,
    pub(super) stream: S,
    pub(super) limits: LinkLimits,
}

/// Starts serving a stream. `None` if the peer has too many open already; the stream is dropped then.
pub(super) fn start<S>(new: NewLink<S>, links: &Arc<Links>, service: Arc<dyn Service>) -> Option<Link>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let link = Link::new(new.peer, new.opened_by_us, new.limits, links.memory.clone());
    if !links.insert(&link) {
        tracing::warn!(peer = %new.peer, "refused a stream: the peer has {MAX_INBOUND_PER_PEER} open already");
        return None;
    }
    let (reader, writer) = new.stream.split();
    tokio::spawn(write_frames(link.clone(), writer));
    links.reading.spawn(read_frames(link.clone(), reader, Arc::downgrade(links), service));
    Some(link)
}

/// Tells the service when reading ends, however it ends.
struct Ended {
    link: Link,
    links: Weak<Links>,
    service: Arc<dyn Service>,
}

impl Drop for Ended {
    fn drop(&mut self) {
        self.link.close();
        // Nobody will send what waits, and clones of the link may stay around.
        self.link.0.lock_outbox().clear();
        if let Some(links) = self.links.upgrade() {
            links.remove(&self.link);
        }
        self.service.link_closed(&self.link);
    }
}

/// A stream that notes when it was heard.
struct Heard<S> {
    stream: S,
    link: Link,
}

impl<S: AsyncRead + Unpin> AsyncRead for Heard<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        let read = ready!(Pin::new(&mut self.stream).poll_read(cx, buffer))?;
        if read > 0 {
            self.link.0.heard_now();
        }
        Poll::Ready(Ok(read))
    }
}

async fn read_frames<S>(link: Link, stream: S, links: Weak<Links>, service: Arc<dyn Service>)
where
    S: AsyncRead + Send + Unpin,
{
    let ended = Ended { link: link.clone(), links, service };
    let limits = link.0.limits.frame;
    let mut stream = Heard { stream, link: link.clone() };
    let mut scratch = Vec::new();
    let reading = async {
        while let Some(begun) = frame::begin(&mut stream, limits).await? {
            let frame = read_begun(&link, begun, &mut stream, &mut scratch).await?;
            ended.service.frame(&link, frame);
        }
        Ok(())
    };
    let result: Result<(), FrameError> = tokio::select! {
        biased;
        () = link.0.closed.cancelled() => Ok(()),
        result = reading => result,
    };
    match result {
        Ok(()) => tracing::debug!(peer = %link.peer(), "link closed"),
        Err(FrameError::Io(error)) => tracing::debug!(peer = %link.peer(), %error, "link lost"),
        Err(error) => tracing::warn!(peer = %link.peer(), %error, "closed a stream that cannot go on"),
    }
}

/// Reads the rest of a frame, in the time and the memory that there is for it.
async fn read_begun<S>(
    link: &Link,
    begun: Begun,
    stream: &mut Heard<S>,
    scratch: &mut Vec<u8>,
) -> Result<Frame, FrameError>
where
    S: AsyncRead + Send + Unpin,
{
    let bytes = begun.payload_bytes();
    let after = link.0.limits.frame_timeout + Duration::from_secs(bytes as u64) / SLOWEST_BYTES_PER_SECOND;
    let mut room = link.0.memory.room();
    match tokio::time::timeout(after, begun.finish(stream, scratch, &mut room)).await {
        Ok(result) => result,
        Err(_) if room.is_waiting() => Err(FrameError::NoRoom { bytes, after }),
        Err(_) => Err(FrameError::Stalled { bytes, after }),
    }
}

async fn write_frames<S>(link: Link, mut stream: S)
where
    S: AsyncWrite + Unpin,
{
    let writing = async {
        let mut batch = BytesMut::new();
        loop {
            let is_last = tokio::select! {
                () = link.0.filled.notified() => false,
                () = link.0.finishing.cancelled() => true,
            };
            while let Some(frame) = link.0.next_frame() {
                write_batch(&link, &mut stream, &mut batch, frame).await?;
            }
            stream.flush().await?;
            if is_last {
                stream.close().await?;
                link.0.closed.cancelled().await;
                return Ok(());
            }
        }
    };
    let result: Result<(), FrameError> = tokio::select! {
        biased;
        () = link.0.closed.cancelled() => Ok(()),
        result = writing => result,
    };
    if let Err(error) = result {
        tracing::debug!(peer = %link.peer(), %error, "cannot write to a link");
        // What the peer sent before it went is still read.
        let _ = tokio::time::timeout(ENDING_TIMEOUT, link.0.closed.cancelled()).await;
        link.close();
    }
    // Tells the peer that no more comes.
    let _ = tokio::time::timeout(ENDING_TIMEOUT, stream.close()).await;
}

/// Writes `frame`, together with the small ones that wait behind it.
async fn write_batch<S>(link: &Link, stream: &mut S, batch: &mut BytesMut, frame: Frame) -> Result<(), FrameError>
where
    S: AsyncWrite + Unpin,
{
    batch.clear();
    let mut written = 0;
    let mut next = Some(frame);
    while let Some(frame) = next.take() {
        let before = batch.len();
        frame::encode_head(&frame, link.0.limits.frame, batch)?;
        written += batch.len() - before + frame.payload.len();
        if frame.payload.len() > COALESCE_BYTES {
            write_noting(link, stream, batch).await?;
            write_noting(link, stream, &frame.payload).await?;
            batch.clear();
            break;
        }
        batch.extend_from_slice(&frame.payload);
        if batch.len() < BATCH_BYTES {
            next = link.0.next_frame();
        }
    }
    write_noting(link, stream, batch).await?;
    link.0.lock_outbox().written(written);
    Ok(())
}

/// Writes all of `bytes`, and notes when some were taken.
async fn write_noting<S>(link: &Link, stream: &mut S, mut bytes: &[u8]) -> io::Result<()>
where
    S: AsyncWrite + Unpin,
{
    while !bytes.is_empty() {
        match stream.write(bytes).await? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            taken => bytes = &bytes[taken..],
        }
        link.0.lock_outbox().moved(Instant::now());
    }
    Ok(())
}
