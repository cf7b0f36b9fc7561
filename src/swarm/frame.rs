//! Frames of `/helion/session/1`: a small protobuf header and the raw bytes of a tensor.
//!
//! On the wire: `u32` LE bytes of the header, `u32` LE bytes of the payload, the header, the payload. The payload never passes
//! through the protobuf codec; it is read into an allocation of its own, which the reader of the frame owns.
//!
//! A length is a claim, so nothing is allocated on its word: memory grows with what has arrived, at most twice that, and
//! beyond the first piece only as far as the reader's `Room` goes.

use std::{io, time::Duration};

use bytes::{Bytes, BytesMut};
use futures::{AsyncRead, AsyncReadExt};
use prost::Message;

use super::proto;

/// Bytes in front of the header: its length and the payload's.
pub const PREFIX_BYTES: usize = 8;
/// What is allocated for a payload before any of it has arrived. Frames of a decode step fit, so they are read in one piece.
const FIRST_STEP_BYTES: usize = 64 * 1024;

/// One message of a session.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Frame {
    /// Which session, which step, what shape.
    pub header: proto::session::Frame,
    /// The tensor's bytes, row-major and little-endian; empty where there is none. At the start of an allocation when it
    /// was received.
    pub payload: Bytes,
}

impl Frame {
    /// A frame without a payload.
    pub fn bare(header: proto::session::Frame) -> Self {
        Self { header, payload: Bytes::new() }
    }
}

/// The largest frame that is read or sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FrameLimits {
    /// Of the header.
    pub header_bytes: usize,
    /// Of the payload: a prefill chunk of 512 tokens of a model 16,384 wide in f32 has 32 MiB.
    pub payload_bytes: usize,
}

impl Default for FrameLimits {
    fn default() -> Self {
        Self { header_bytes: 64 * 1024, payload_bytes: 64 * 1024 * 1024 }
    }
}

/// Why a stream of frames cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The claimed header is too long.
    #[error("a frame's header of {bytes} bytes is over the limit of {limit}")]
    HeaderTooLarge {
        /// As claimed.
        bytes: usize,
        /// As allowed.
        limit: usize,
    },
    /// The claimed payload is too long.
    #[error("a frame's payload of {bytes} bytes is over the limit of {limit}")]
    PayloadTooLarge {
        /// As claimed.
        bytes: usize,
        /// As allowed.
        limit: usize,
    },
    /// The header is not a `session.Frame`.
    #[error("a frame's header is not one: {0}")]
    BadHeader(#[from] prost::DecodeError),
    /// The stream ended within a frame.
    #[error("the stream ended within a frame")]
    Truncated,
    /// The frame arrives too slowly.
    #[error("a frame with a payload of {bytes} bytes was not complete after {} s", .after.as_secs_f32())]
    Stalled {
        /// Of the payload, as claimed.
        bytes: usize,
        /// The time that it had.
        after: Duration,
    },
    /// The frames that arrive on other links take all the memory that there is for them.
    #[error("no room for a payload of {bytes} bytes within {} s: too much arrives on all links together", .after.as_secs_f32())]
    NoRoom {
        /// Of the payload, as claimed.
        bytes: usize,
        /// The time that it had.
        after: Duration,
    },
    /// The stream failed.
    #[error("the stream failed: {0}")]
    Io(io::Error),
}

impl From<io::Error> for FrameError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => Self::Truncated,
            _ => Self::Io(error),
        }
    }
}

/// Appends the prefix and the header of a frame to `out`; the payload follows on the wire.
pub fn encode_head(frame: &Frame, limits: FrameLimits, out: &mut BytesMut) -> Result<(), FrameError> {
    let (header, payload) = checked_lengths(frame.header.encoded_len(), frame.payload.len(), limits)?;
    out.reserve(PREFIX_BYTES + frame.header.encoded_len());
    out.extend_from_slice(&header.to_le_bytes());
    out.extend_from_slice(&payload.to_le_bytes());
    // Encoding into a buffer that grows cannot run out of room, and that is its only error.
    frame.header.encode(out).map_err(|error| FrameError::Io(error.into()))
}

fn checked_lengths(header: usize, payload: usize, limits: FrameLimits) -> Result<(u32, u32), FrameError> {
    let header_error = FrameError::HeaderTooLarge { bytes: header, limit: limits.header_bytes };
    let payload_error = FrameError::PayloadTooLarge { bytes: payload, limit: limits.payload_bytes };
    if header > limits.header_bytes {
        return Err(header_error);
    }
    if payload > limits.payload_bytes {
        return Err(payload_error);
    }
    Ok((u32::try_from(header).map_err(|_| header_error)?, u32::try_from(payload).map_err(|_| payload_error)?))
}

/// The bytes that a frame takes on the wire, if its receiver will take it.
pub fn wire_bytes(frame: &Frame, limits: FrameLimits) -> Result<usize, FrameError> {
    let header = frame.header.encoded_len();
    checked_lengths(header, frame.payload.len(), limits)?;
    Ok(PREFIX_BYTES + header + frame.payload.len())
}

/// A frame of which the lengths have arrived, and are within the limits.
#[derive(Debug, Clone, Copy)]
pub(super) struct Begun {
    header_bytes: usize,
    payload_bytes: usize,
}

/// Where the memory for a payload comes from.
pub(super) trait Room {
    /// Waits until there is room for so many bytes more.
    fn take(&mut self, bytes: usize) -> impl Future<Output = ()> + Send;
}

/// Room without end, for messages that are small.
impl Room for () {
    async fn take(&mut self, _: usize) {}
}

/// Waits for the next frame; `None` where the stream ended between two.
pub(super) async fn begin<S>(stream: &mut S, limits: FrameLimits) -> Result<Option<Begun>, FrameError>
where
    S: AsyncRead + Unpin,
{
    let mut prefix = [0; PREFIX_BYTES];
    // The one place where the end of the stream is no error is before a frame's first byte.
    let first = stream.read(&mut prefix).await?;
    if first == 0 {
        return Ok(None);
    }
    stream.read_exact(&mut prefix[first..]).await?;
    let [a, b, c, d, e, f, g, h] = prefix;
    let header_bytes = u32::from_le_bytes([a, b, c, d]) as usize;
    let payload_bytes = u32::from_le_bytes([e, f, g, h]) as usize;
    checked_lengths(header_bytes, payload_bytes, limits)?;
    Ok(Some(Begun { header_bytes, payload_bytes }))
}

impl Begun {
    /// As claimed.
    pub(super) fn payload_bytes(self) -> usize {
        self.payload_bytes
    }

    /// Reads the rest of the frame. `scratch` is reused from frame to frame.
    pub(super) async fn finish<S>(
        self,
        stream: &mut S,
        scratch: &mut Vec<u8>,
        room: &mut impl Room,
    ) -> Result<Frame, FrameError>
    where
        S: AsyncRead + Unpin,
    {
        scratch.clear();
        read_growing(stream, self.header_bytes, scratch, &mut ()).await?;
        let header = proto::session::Frame::decode(scratch.as_slice())?;
        let mut payload = Vec::new();
        read_growing(stream, self.payload_bytes, &mut payload, room).await?;
        Ok(Frame { header, payload: payload.into() })
    }
}

/// Reads exactly `length` bytes, and never allocates much more than has arrived. The first piece of 64 KiB is free, so that
/// decode steps never wait for room.
pub(super) async fn read_growing<S>(
    stream: &mut S,
    length: usize,
    buffer: &mut Vec<u8>,
    room: &mut impl Room,
) -> io::Result<()>
where
    S: AsyncRead + Unpin,
{
    let mut filled = 0;
    while filled < length {
        let goal = length.min(FIRST_STEP_BYTES.max(2 * filled));
        if filled > 0 {
            room.take(goal - filled).await;
        }
        buffer.reserve_exact(goal - filled);
        buffer.resize(goal, 0);
        stream.read_exact(&mut buffer[filled..]).await?;
        filled = goal;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use futures::{executor::block_on, io::Cursor};
    use proptest::prelude::*;

    use super::*;
    use crate::swarm::proto::session::{Fault, LaneRun, Ping, Step, Tensor, frame::Body};

    fn encode(frames: &[Frame]) -> Vec<u8> {
        let mut out = BytesMut::new();
        for frame in frames {
            encode_head(frame, FrameLimits::default(), &mut out).unwrap();
            out.extend_from_slice(&frame.payload);
        }
        out.to_vec()
    }

    fn decode(bytes: &[u8], limits: FrameLimits) -> Result<Vec<Frame>, FrameError> {
        let mut stream = Cursor::new(bytes);
        let mut scratch = Vec::new();
        let mut frames = Vec::new();
        while let Some(begun) = block_on(begin(&mut stream, limits))? {
            frames.push(block_on(begun.finish(&mut stream, &mut scratch, &mut ()))?);
        }
        Ok(frames)
    }

    fn body() -> impl Strategy<Value = Option<Body>> {
        let lane = (any::<u32>(), any::<u64>(), any::<u32>()).prop_map(|(lane, position, tokens)| LaneRun {
            lane,
            position,
            tokens,
        });
        let step = (any::<u64>(), prop::collection::vec(lane, 0..20), any::<(u32, u32)>()).prop_map(
            |(number, lanes, (rows, hidden))| {
                let tensor = Some(Tensor { dtype: 1, rows, hidden, codec: 0 });
                Body::Step(Step { number, lanes, tensor, ..Step::default() })
            },
        );
        let fault = (any::<i32>(), ".{0,100}")
            .prop_map(|(code, message)| Body::Fault(Fault { code, message, ..Fault::default() }));
        let ping = any::<u64>().prop_map(|nonce| Body::Ping(Ping { nonce }));
        prop::option::of(prop_oneof![step, fault, ping])
    }

    fn frame() -> impl Strategy<Value = Frame> {
        let bytes = |max| prop::collection::vec(any::<u8>(), 0..max);
        (bytes(17), any::<u64>(), body(), bytes(300_000)).prop_map(|(session, epoch, body, payload)| Frame {
            header: proto::session::Frame { session: session.into(), epoch, body },
            payload: payload.into(),
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn frames_are_read_as_they_were_written(frames in prop::collection::vec(frame(), 0..4)) {
            prop_assert_eq!(decode(&encode(&frames), FrameLimits::default()).unwrap(), frames);
        }

        #[test]
        fn a_cut_stream_is_truncated(frame in frame(), cut in 0.0..1.0) {
            let bytes = encode(&[frame]);
            let end = 1 + ((bytes.len() - 1) as f64 * cut) as usize;
            if end < bytes.len() {
                let result = decode(&bytes[..end], FrameLimits::default());
                prop_assert!(matches!(result, Err(FrameError::Truncated)), "{:?}", result);
            }
        }

        #[test]
        fn garbage_is_an_error_or_a_frame_but_no_panic(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
            let _ = decode(&bytes, FrameLimits { header_bytes: 1000, payload_bytes: 1000 });
        }
    }

    #[test]
    fn lengths_over_the_limits_are_refused_before_anything_is_read() {
        let limits = FrameLimits { header_bytes: 10, payload_bytes: 20 };
        let prefix = |header: u32, payload: u32| [header.to_le_bytes(), payload.to_le_bytes()].concat();
        assert!(matches!(decode(&prefix(11, 0), limits), Err(FrameError::HeaderTooLarge { bytes: 11, limit: 10 })));
        assert!(matches!(decode(&prefix(10, 21), limits), Err(FrameError::PayloadTooLarge { bytes: 21, limit: 20 })));
        assert!(matches!(decode(&prefix(u32::MAX, u32::MAX), limits), Err(FrameError::HeaderTooLarge { .. })));
        let frame = Frame { payload: vec![0; 21].into(), ..Frame::default() };
        assert!(matches!(encode_head(&frame, limits, &mut BytesMut::new()), Err(FrameError::PayloadTooLarge { .. })));
    }

    #[test]
    fn a_claim_costs_no_memory() {
        let mut buffer = Vec::new();
        let mut stream = Cursor::new(vec![1u8; 100_000]);
        let result = block_on(read_growing(&mut stream, 64 << 20, &mut buffer, &mut ()));
        assert_eq!(result.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        assert!(buffer.capacity() <= 256 * 1024, "{}", buffer.capacity());
    }
}
