//! What a client has seen of its peers' speed. Plain data: time is an argument.
//!
//! A node announces how fast it computes; that is a prior. What counts more is what its steps took, as the hops' answers tell, how
//! long they waited there, and how long a probe took over the link.

use std::time::{Duration, Instant};

/// How much of what was known a new observation takes the place of: single steps differ.
const NEW_SHARE: f64 = 0.25;
/// What a peer said of its load counts for so long.
const LOAD_LIFETIME: Duration = Duration::from_secs(30);
/// How much faster a row is computed among many than alone, where nobody has seen it.
const GAIN_OF_ROWS: f64 = 4.0;
/// A block's time where a peer doesn't know its speed, seconds.
const UNKNOWN_BLOCK_SECONDS: f64 = 1e-3;

/// What is known of one peer.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Speeds {
    /// One block, one row, alone.
    decode: Option<f64>,
    /// One block, a row among many.
    prefill: Option<f64>,
    /// How long a step waits there.
    queue: Option<f64>,
    bytes_per_second: Option<f64>,
    /// Free tokens of its cache, and when it said so.
    cache_tokens_left: Option<(u64, Instant)>,
}

/// What a step took at a hop.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HopStep {
    pub(crate) rows: usize,
    pub(crate) blocks: usize,
    pub(crate) queued: Duration,
    pub(crate) computed: Duration,
}

impl Speeds {
    /// A step was answered.
    pub(crate) fn learn_step(&mut self, step: HopStep) {
        let of_a_row = step.computed.as_secs_f64() / (step.blocks * step.rows).max(1) as f64;
        let place = if step.rows == 1 { &mut self.decode } else { &mut self.prefill };
        blend(place, of_a_row);
        blend(&mut self.queue, step.queued.as_secs_f64());
    }

    /// The peer said how much room it has.
    pub(crate) fn learn_load(&mut self, cache_tokens_left: u64, now: Instant) {
        self.cache_tokens_left = Some((cache_tokens_left, now));
    }

    /// A probe with a payload came back so much later than one without.
    pub(crate) fn learn_echo(&mut self, payload_bytes: usize, later: Duration) {
        /// Less can't be told from the noise of a link.
        const LEAST: f64 = 1e-4;
        let seconds = later.as_secs_f64().max(LEAST);
        blend(&mut self.bytes_per_second, 2.0 * payload_bytes as f64 / seconds);
    }

    /// As if its bandwidth had never been measured.
    pub(crate) fn without_bandwidth(self) -> Self {
        Self { bytes_per_second: None, ..self }
    }

    /// Whether the link's bandwidth was measured.
    pub(crate) fn knows_bandwidth(&self) -> bool {
        self.bytes_per_second.is_some()
    }

    /// One block's time for a frame of so many rows, seconds; `announced` is what the peer says of one row.
    pub(crate) fn block_seconds(&self, rows: usize, announced: Option<f64>) -> f64 {
        let alone = self.decode.or(announced).unwrap_or(UNKNOWN_BLOCK_SECONDS);
        if rows <= 1 {
            return alone;
        }
        rows as f64 * self.prefill.unwrap_or(alone / GAIN_OF_ROWS)
    }

    /// How long a frame waits for its turn, seconds, where steps were seen to.
    pub(crate) fn queue_seconds(&self) -> Option<f64> {
        self.queue
    }

    /// How long so many bytes keep the link busy, seconds; nothing where its bandwidth is not known.
    pub(crate) fn transmission_seconds(&self, bytes: usize) -> f64 {
        self.bytes_per_second.map_or(0.0, |rate| bytes as f64 / rate)
    }

    /// Free tokens of its cache, where it said so lately.
    pub(crate) fn cache_tokens_left(&self, now: Instant) -> Option<u64> {
        let (tokens, at) = self.cache_tokens_left?;
        (now.duration_since(at) < LOAD_LIFETIME).then_some(tokens)
    }
}

fn blend(known: &mut Option<f64>, new: f64) {
    *known = Some(known.map_or(new, |known| known + NEW_SHARE * (new - known)));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(rows: usize, queued_ms: u64, computed_ms: u64) -> HopStep {
        let ms = Duration::from_millis;
        HopStep { rows, blocks: 4, queued: ms(queued_ms), computed: ms(computed_ms) }
    }

    #[test]
    fn what_was_seen_counts_more_than_what_is_announced() {
        let mut speeds = Speeds::default();
        assert_eq!(speeds.block_seconds(1, Some(0.5)), 0.5);
        assert_eq!(speeds.block_seconds(8, Some(0.5)), 1.0);
        speeds.learn_step(step(1, 0, 40));
        assert!((speeds.block_seconds(1, Some(0.5)) - 0.01).abs() < 1e-12);
        speeds.learn_step(step(1, 0, 80));
        let blended = speeds.block_seconds(1, None);
        assert!(0.01 < blended && blended < 0.02, "{blended}");
        speeds.learn_step(step(10, 8, 80));
        assert!((speeds.block_seconds(10, None) - 0.02).abs() < 1e-12);
        assert!(speeds.queue_seconds().unwrap() > 0.0);
    }

    #[test]
    fn what_a_peer_said_of_its_room_grows_old() {
        let (mut speeds, now) = (Speeds::default(), Instant::now());
        speeds.learn_load(7, now);
        assert_eq!(speeds.cache_tokens_left(now), Some(7));
        assert_eq!(speeds.cache_tokens_left(now + LOAD_LIFETIME), None);
    }

    #[test]
    fn a_probe_tells_the_bandwidth() {
        let mut speeds = Speeds::default();
        assert_eq!(speeds.transmission_seconds(1 << 20), 0.0);
        speeds.learn_echo(50_000, Duration::from_millis(100));
        assert!((speeds.transmission_seconds(1_000_000) - 1.0).abs() < 1e-9);
    }
}
