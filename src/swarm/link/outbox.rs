//! What waits to be written to a link. Plain data: the clock is an argument, and the lock is the link's.

use std::{collections::VecDeque, sync::Arc, time::Instant};

use super::{LinkLimits, memory::Memory};
use crate::swarm::{Frame, proto::session::frame::Body};

/// Urgent frames that may wait: a peer is asked about its life every few seconds, by each of some sessions.
const MAX_URGENT: usize = 256;
/// Larger ones are not urgent, whatever they say: the bounds in bytes don't hold for urgent frames.
const MAX_URGENT_BYTES: usize = 256;

/// The frames that wait, in two queues: the urgent ones go first.
#[derive(Debug)]
pub(super) struct Outbox {
    urgent: VecDeque<Frame>,
    frames: VecDeque<Frame>,
    /// Of the frames, and of those being written.
    bytes: usize,
    moved_at: Instant,
    memory: Arc<Memory>,
}

/// Whether a frame may overtake others. Ping and Pong ask and say that a peer lives, which is wanted most where large frames
/// wait; they belong to no step.
fn is_urgent(frame: &Frame, wire_bytes: usize) -> bool {
    wire_bytes <= MAX_URGENT_BYTES && matches!(frame.header.body, Some(Body::Ping(_) | Body::Pong(_)))
}

impl Outbox {
    pub(super) fn new(memory: Arc<Memory>, now: Instant) -> Self {
        Self { urgent: VecDeque::new(), frames: VecDeque::new(), bytes: 0, moved_at: now, memory }
    }

    /// Takes a frame that has `bytes` on the wire, if there is room for it.
    pub(super) fn push(&mut self, frame: Frame, bytes: usize, limits: &LinkLimits, now: Instant) -> Result<(), Full> {
        let is_urgent = is_urgent(&frame, bytes);
        let has_room = if is_urgent {
            self.urgent.len() < MAX_URGENT
        } else {
            self.frames.len() < limits.outbox_frames
                && (self.bytes == 0 || self.bytes + bytes <= limits.outbox_bytes)
                && self.memory.take_leaving(bytes)
        };
        if !has_room {
            return Err(Full { frames: self.len(), bytes: self.bytes, all_bytes: self.memory.leaving() });
        }
        if self.bytes == 0 {
            self.moved_at = now;
        }
        self.bytes += bytes;
        if is_urgent {
            self.memory.force_leaving(bytes);
            self.urgent.push_back(frame);
        } else {
            self.frames.push_back(frame);
        }
        Ok(())
    }

    /// The next frame to write. It counts until [`Outbox::written`].
    pub(super) fn pop(&mut self) -> Option<Frame> {
        self.urgent.pop_front().or_else(|| self.frames.pop_front())
    }

    /// The stream has taken some bytes.
    pub(super) fn moved(&mut self, now: Instant) {
        self.moved_at = now;
    }

    /// The stream has taken whole frames of `bytes` together.
    pub(super) fn written(&mut self, bytes: usize) {
        // Less than that where the outbox was cleared meanwhile.
        let bytes = bytes.min(self.bytes);
        self.bytes -= bytes;
        self.memory.give_back_leaving(bytes);
    }

    /// Drops all that waits.
    pub(super) fn clear(&mut self) {
        self.urgent.clear();
        self.frames.clear();
        self.written(self.bytes);
    }

    /// Frames that wait.
    pub(super) fn len(&self) -> usize {
        self.urgent.len() + self.frames.len()
    }

    /// Bytes that wait or are being written.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// When the stream last took bytes, or (if that is later) the outbox was last empty.
    pub(super) fn moved_at(&self) -> Instant {
        self.moved_at
    }
}

impl Drop for Outbox {
    fn drop(&mut self) {
        self.clear();
    }
}

/// A frame that was not taken.
#[derive(Debug)]
pub(super) struct Full {
    pub(super) frames: usize,
    pub(super) bytes: usize,
    pub(super) all_bytes: usize,
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::swarm::proto::session;

    fn frame(body: Body) -> Frame {
        Frame::bare(session::Frame { body: Some(body), ..session::Frame::default() })
    }

    fn step(number: u64) -> Frame {
        frame(Body::Step(session::Step { number, ..session::Step::default() }))
    }

    fn ping(nonce: u64) -> Frame {
        frame(Body::Ping(session::Ping { nonce }))
    }

    fn limits() -> LinkLimits {
        LinkLimits { outbox_bytes: 100, all_outbox_bytes: 150, ..LinkLimits::default() }
    }

    #[test]
    fn pings_overtake_steps_and_fit_into_a_full_outbox() {
        let now = Instant::now();
        let mut outbox = Outbox::new(Arc::new(Memory::new(&limits())), now);
        for number in [1, 2] {
            outbox.push(step(number), 50, &limits(), now).unwrap();
        }
        let full = outbox.push(step(3), 1, &limits(), now).unwrap_err();
        assert_eq!((full.frames, full.bytes), (2, 100));
        outbox.push(ping(1), 12, &limits(), now).unwrap();
        outbox.push(frame(Body::Pong(session::Pong { nonce: 2 })), 12, &limits(), now).unwrap();
        assert!(outbox.push(ping(3), MAX_URGENT_BYTES + 1, &limits(), now).is_err(), "a ping that is no small thing");
        let order: Vec<Option<Body>> = std::iter::from_fn(|| outbox.pop()).map(|frame| frame.header.body).collect();
        let expected = [ping(1), frame(Body::Pong(session::Pong { nonce: 2 })), step(1), step(2)];
        assert_eq!(order, expected.map(|frame| frame.header.body));
    }

    #[test]
    fn urgent_frames_are_few() {
        let now = Instant::now();
        let mut outbox = Outbox::new(Arc::new(Memory::new(&limits())), now);
        let taken = (0..10_000).take_while(|nonce| outbox.push(ping(*nonce), 12, &limits(), now).is_ok()).count();
        assert_eq!(taken, MAX_URGENT);
    }

    #[test]
    fn what_is_written_cleared_or_dropped_is_given_back_once() {
        let now = Instant::now();
        let memory = Arc::new(Memory::new(&limits()));
        let (mut a, mut b) = (Outbox::new(memory.clone(), now), Outbox::new(memory.clone(), now));
        a.push(step(1), 80, &limits(), now).unwrap();
        b.push(step(1), 70, &limits(), now).unwrap();
        let full = b.push(step(2), 1, &limits(), now).unwrap_err();
        assert_eq!((full.bytes, full.all_bytes), (70, 150), "all outboxes together are full, this one is not");
        a.pop();
        assert_eq!(a.bytes(), 80, "it is being written");
        a.clear();
        a.written(80);
        assert_eq!((a.bytes(), memory.leaving()), (0, 70));
        drop(b);
        assert_eq!(memory.leaving(), 0);
    }

    #[test]
    fn it_moves_when_bytes_leave_and_stands_still_only_while_some_wait() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut outbox = Outbox::new(Arc::new(Memory::new(&limits())), start);
        outbox.push(step(1), 40, &limits(), at(10)).unwrap();
        outbox.push(step(2), 40, &limits(), at(20)).unwrap();
        assert_eq!(outbox.moved_at(), at(10), "an outbox that was empty did not stand still before");
        outbox.moved(at(30));
        assert_eq!(outbox.moved_at(), at(30));
    }
}
