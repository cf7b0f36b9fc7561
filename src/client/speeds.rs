//! What a client has seen of its peers' speed. Plain data: time is an argument.
//!
//! A node announces how fast it computes and how many steps wait there; that is a prior. What counts more is what its steps took, as
//! the hops' answers tell, how long they waited there, and how long a probe took over the link. But a client that has gone elsewhere
//! sees nothing more of a peer, and what it saw last would keep it away for good: so what was seen loses half of its weight
//! against the prior in a time that goes with how fast such things change, and once it counts for nothing the peer has another
//! chance.

use std::time::{Duration, Instant};

/// How much of what was known a new observation takes the place of: single steps differ.
const NEW_SHARE: f64 = 0.25;
/// What a peer said of its load counts for so long.
const LOAD_LIFETIME: Duration = Duration::from_secs(30);
/// How much faster a row is computed among many than alone, where nobody has seen it.
const GAIN_OF_ROWS: f64 = 4.0;
/// A block's time where a peer doesn't know its speed, seconds.
const UNKNOWN_BLOCK_SECONDS: f64 = 1e-3;

/// How soon a wait that was seen counts half: a queue is over when those who fill it are.
const WAIT_HALF_LIFE: Duration = Duration::from_secs(10);
/// How soon computing times count half: others may share a machine for some minutes, and what it is does not change.
const COMPUTE_HALF_LIFE: Duration = Duration::from_secs(120);
/// A link's bandwidth is measured anew after so long: who else uses it changes.
const BANDWIDTH_LIFETIME: Duration = Duration::from_secs(300);
/// The same where the echo did not come: it may have been behind something large.
const GUESS_LIFETIME: Duration = Duration::from_secs(15);

/// What is known of one peer.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Speeds {
    /// One block, one row, alone.
    decode: Option<Seen>,
    /// One block, a row among many.
    prefill: Option<Seen>,
    /// How long a step waits there.
    wait: Option<Seen>,
    bandwidth: Option<Bandwidth>,
    load: Option<(Load, Instant)>,
}

/// Seconds, and when they were last seen.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Seen {
    seconds: f64,
    at: Instant,
}

#[derive(Debug, Clone, Copy, PartialEq)]
struct Bandwidth {
    bytes_per_second: f64,
    at: Instant,
    /// All that is known is that the echo did not come.
    is_guess: bool,
}

/// What a peer says of its load when it opens a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Load {
    /// Free tokens of its cache.
    pub(crate) cache_tokens_left: u64,
    /// Steps that wait there.
    pub(crate) queue: u32,
}

/// What a step took at a hop.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HopStep {
    pub(crate) rows: usize,
    pub(crate) blocks: usize,
    pub(crate) queued: Duration,
    pub(crate) computed: Duration,
}

impl Seen {
    /// What it counts beside what is said or supposed.
    fn weight(&self, now: Instant, half_life: Duration) -> f64 {
        0.5f64.powf(now.saturating_duration_since(self.at).as_secs_f64() / half_life.as_secs_f64())
    }
}

impl Speeds {
    /// A step was answered.
    pub(crate) fn learn_step(&mut self, step: HopStep, now: Instant) {
        let of_a_row = step.computed.as_secs_f64() / (step.blocks * step.rows).max(1) as f64;
        let place = if step.rows == 1 { &mut self.decode } else { &mut self.prefill };
        see(place, of_a_row, (now, COMPUTE_HALF_LIFE));
        see(&mut self.wait, step.queued.as_secs_f64(), (now, WAIT_HALF_LIFE));
    }

    /// The peer said how much room it has, and how much there is to do.
    pub(crate) fn learn_load(&mut self, load: Load, now: Instant) {
        self.load = Some((load, now));
    }

    /// A probe with a payload came back so much later than one without.
    pub(crate) fn learn_echo(&mut self, payload_bytes: usize, later: Duration, now: Instant) {
        /// Less can't be told from the noise of a link.
        const LEAST: f64 = 1e-4;
        let new = 2.0 * payload_bytes as f64 / later.as_secs_f64().max(LEAST);
        // Few are measured, so each counts as much as what was known.
        let known = self.bandwidth.filter(|known| !known.is_guess);
        let bytes_per_second = known.map_or(new, |known| (known.bytes_per_second + new) / 2.0);
        self.bandwidth = Some(Bandwidth { bytes_per_second, at: now, is_guess: false });
    }

    /// A probe with a payload has not come back in this time. Where more is known, it is only looked at again sooner.
    pub(crate) fn learn_no_echo(&mut self, payload_bytes: usize, within: Duration, now: Instant) {
        let most = 2.0 * payload_bytes as f64 / within.as_secs_f64();
        let bytes_per_second = self.bandwidth.map_or(most, |known| (known.bytes_per_second + most) / 2.0);
        self.bandwidth = Some(Bandwidth { bytes_per_second, at: now, is_guess: true });
    }

    /// Whether the link's bandwidth was measured lately.
    pub(crate) fn knows_bandwidth(&self, now: Instant) -> bool {
        self.bandwidth.is_some_and(|known| {
            let lifetime = if known.is_guess { GUESS_LIFETIME } else { BANDWIDTH_LIFETIME };
            now.saturating_duration_since(known.at) < lifetime
        })
    }

    /// One block's time for a frame of so many rows, seconds; `announced` is what the peer says of one row.
    pub(crate) fn block_seconds(&self, rows: usize, announced: Option<f64>, now: Instant) -> f64 {
        let blend = |seen: Option<Seen>, prior: f64| {
            seen.map_or(prior, |seen| prior + seen.weight(now, COMPUTE_HALF_LIFE) * (seen.seconds - prior))
        };
        let alone = blend(self.decode, announced.unwrap_or(UNKNOWN_BLOCK_SECONDS));
        if rows <= 1 {
            return alone;
        }
        rows as f64 * blend(self.prefill, alone / GAIN_OF_ROWS)
    }

    /// How long a frame waits for its turn, seconds; `said` is what follows from what the peer says of its queue.
    pub(crate) fn wait_seconds(&self, said: f64, now: Instant) -> f64 {
        self.wait.map_or(said, |seen| said + seen.weight(now, WAIT_HALF_LIFE) * (seen.seconds - said))
    }

    /// How long so many bytes keep the link busy, seconds; nothing where its bandwidth is not known.
    pub(crate) fn transmission_seconds(&self, bytes: usize) -> f64 {
        self.bandwidth.map_or(0.0, |known| bytes as f64 / known.bytes_per_second)
    }

    /// What it said of its load, where that was lately.
    pub(crate) fn load(&self, now: Instant) -> Option<Load> {
        let (load, at) = self.load?;
        (now.saturating_duration_since(at) < LOAD_LIFETIME).then_some(load)
    }

    /// Whether anything of it still makes a difference.
    pub(crate) fn counts(&self, now: Instant) -> bool {
        const LEAST_WEIGHT: f64 = 0.05;
        let of_steps = [self.decode, self.prefill].into_iter().flatten();
        of_steps.into_iter().any(|seen| seen.weight(now, COMPUTE_HALF_LIFE) > LEAST_WEIGHT)
            || self.knows_bandwidth(now)
            || self.load(now).is_some()
    }
}

/// What was known counts less, the longer ago it was seen.
fn see(known: &mut Option<Seen>, new: f64, (now, half_life): (Instant, Duration)) {
    let seconds = known.map_or(new, |known| {
        let old_share = (1.0 - NEW_SHARE) * known.weight(now, half_life);
        new + old_share * (known.seconds - new)
    });
    *known = Some(Seen { seconds, at: now });
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
        let (mut speeds, now) = (Speeds::default(), Instant::now());
        assert_eq!(speeds.block_seconds(1, Some(0.5), now), 0.5);
        assert_eq!(speeds.block_seconds(8, Some(0.5), now), 1.0);
        speeds.learn_step(step(1, 0, 40), now);
        assert!((speeds.block_seconds(1, Some(0.5), now) - 0.01).abs() < 1e-12);
        speeds.learn_step(step(1, 0, 80), now);
        let blended = speeds.block_seconds(1, None, now);
        assert!(0.01 < blended && blended < 0.02, "{blended}");
        speeds.learn_step(step(10, 8, 80), now);
        assert!((speeds.block_seconds(10, None, now) - 0.02).abs() < 1e-12);
        assert!(speeds.wait_seconds(0.0, now) > 0.0);
    }

    #[test]
    fn a_burst_is_forgotten_by_whoever_has_gone_elsewhere() {
        let (mut speeds, now) = (Speeds::default(), Instant::now());
        speeds.learn_step(step(1, 1000, 4000), now);
        assert!((speeds.wait_seconds(0.0, now) - 1.0).abs() < 1e-9);
        assert!((speeds.block_seconds(1, Some(0.001), now) - 1.0).abs() < 1e-9);
        let soon = now + Duration::from_secs(60);
        assert!(speeds.wait_seconds(0.002, soon) < 0.02, "{}", speeds.wait_seconds(0.002, soon));
        let later = now + Duration::from_secs(1800);
        assert!(speeds.block_seconds(1, Some(0.001), later) < 0.002);
        assert!(speeds.counts(soon) && !speeds.counts(later));
        // What is seen after a long pause takes the place of what was known.
        speeds.learn_step(step(1, 0, 8), later);
        assert!(speeds.block_seconds(1, None, later) < 0.003);
    }

    #[test]
    fn what_a_peer_said_of_its_load_grows_old() {
        let (mut speeds, now) = (Speeds::default(), Instant::now());
        let load = Load { cache_tokens_left: 7, queue: 2 };
        speeds.learn_load(load, now);
        assert_eq!(speeds.load(now), Some(load));
        assert_eq!(speeds.load(now + LOAD_LIFETIME), None);
    }

    #[test]
    fn a_probe_tells_the_bandwidth() {
        let (mut speeds, now) = (Speeds::default(), Instant::now());
        assert_eq!(speeds.transmission_seconds(1 << 20), 0.0);
        speeds.learn_echo(50_000, Duration::from_millis(100), now);
        assert!((speeds.transmission_seconds(1_000_000) - 1.0).abs() < 1e-9);
        assert!(speeds.knows_bandwidth(now) && !speeds.knows_bandwidth(now + BANDWIDTH_LIFETIME));
    }

    #[test]
    fn an_echo_that_got_lost_under_load_is_asked_for_again_soon() {
        let (mut speeds, now) = (Speeds::default(), Instant::now());
        speeds.learn_no_echo(50_000, Duration::from_secs(2), now);
        assert!((speeds.transmission_seconds(50_000) - 1.0).abs() < 1e-9);
        let again = now + GUESS_LIFETIME;
        assert!(speeds.knows_bandwidth(now) && !speeds.knows_bandwidth(again));
        speeds.learn_echo(50_000, Duration::from_millis(10), again);
        assert!((speeds.transmission_seconds(1_000_000) - 0.1).abs() < 1e-9, "a guess is no measurement");
    }
}
