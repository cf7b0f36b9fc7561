//! When a question to the hub is worth putting again, and after what pause. Plain decisions: no clock, no chance.

use std::time::Duration;

use chrono::{DateTime, Utc};

use super::error::Refusal;

/// Failures in a row after which it is given up. Every bit of progress begins a new row.
const ATTEMPTS: u32 = 4;

/// The pause after the first failure; it doubles.
const FIRST_PAUSE: Duration = Duration::from_millis(250);

/// The longest time that the hub may ask for: who waits longer than this wants to be told rather than to wait.
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

/// Why there is no answer, or not all of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Failure {
    /// The hub answered with a status other than success.
    Refused(Refusal),
    /// There was no connection, or it broke.
    Connection(String),
}

/// The failures in a row so far.
#[derive(Debug, Default)]
pub(super) struct Retry {
    failures: u32,
}

impl Retry {
    /// Something came: the next failure is the first of its row.
    pub(super) fn progressed(&mut self) {
        self.failures = 0;
    }

    /// The pause before the next attempt; `None` where another one is of no use, or there were enough. `chance` is from 0
    /// to 1: it spreads out those who failed at the same moment.
    pub(super) fn pause_after(&mut self, failure: &Failure, chance: f64) -> Option<Duration> {
        self.failures += 1;
        if self.failures >= ATTEMPTS {
            return None;
        }
        let usual = FIRST_PAUSE * 2u32.pow(self.failures - 1);
        let spread = usual.mul_f64(0.5 + chance.clamp(0.0, 1.0) / 2.0);
        match failure {
            Failure::Connection(_) => Some(spread),
            Failure::Refused(Refusal { status: 408 | 429 | 500 | 502 | 503 | 504, retry_after, .. }) => {
                let pause = retry_after.map_or(spread, |asked| asked.max(Duration::from_millis(1)));
                (pause <= LONGEST_PAUSE).then_some(pause)
            }
            Failure::Refused(_) => None,
        }
    }
}

/// The time that an answer asks to wait: seconds or a date in `Retry-After`, else `t=` of `RateLimit`, which the hub sends.
pub(super) fn wait_of(retry_after: Option<&str>, rate_limit: Option<&str>, now: DateTime<Utc>) -> Option<Duration> {
    let asked = retry_after.and_then(|text| match text.trim().parse() {
        Ok(seconds) => Some(Duration::from_secs(seconds)),
        Err(_) => (DateTime::parse_from_rfc2822(text.trim()).ok()?.to_utc() - now).to_std().ok(),
    });
    asked.or_else(|| {
        let seconds = rate_limit?.split(';').find_map(|part| part.trim().strip_prefix("t="))?;
        seconds.parse().ok().map(Duration::from_secs)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(status: u16, retry_after_s: Option<u64>) -> Failure {
        Failure::Refused(Refusal { status, code: None, retry_after: retry_after_s.map(Duration::from_secs) })
    }

    fn pauses(failure: &Failure, chance: f64) -> Vec<u128> {
        let mut retry = Retry::default();
        let pauses = std::iter::from_fn(|| retry.pause_after(failure, chance));
        pauses.map(|pause| pause.as_millis()).collect()
    }

    #[test]
    fn pauses_grow_are_spread_and_end() {
        let cut = Failure::Connection("reset".to_owned());
        assert_eq!(pauses(&cut, 1.0), [250, 500, 1000]);
        assert_eq!(pauses(&cut, 0.0), [125, 250, 500]);
        assert_eq!(pauses(&refused(503, None), 1.0), [250, 500, 1000]);
    }

    #[test]
    fn the_hubs_own_wish_counts_within_bounds() {
        assert_eq!(pauses(&refused(429, Some(3)), 0.5), [3_000; 3]);
        assert_eq!(pauses(&refused(503, Some(0)), 0.5), [1; 3]);
        assert!(pauses(&refused(429, Some(61)), 0.5).is_empty(), "the user is told instead");
    }

    #[test]
    fn a_plain_no_is_a_no() {
        for status in [400, 401, 403, 404, 416, 501] {
            assert!(pauses(&refused(status, None), 1.0).is_empty(), "{status}");
        }
    }

    #[test]
    fn progress_begins_a_new_row() {
        let (mut retry, cut) = (Retry::default(), Failure::Connection(String::new()));
        for _ in 0..20 {
            assert!(retry.pause_after(&cut, 1.0).is_some());
            retry.progressed();
        }
    }

    #[test]
    fn waits_are_read_in_each_spelling() {
        let now = "2026-01-01T00:00:00Z".parse().unwrap();
        let seconds = |retry_after, rate_limit| wait_of(retry_after, rate_limit, now).map(|wait| wait.as_secs());
        assert_eq!(seconds(Some("7"), Some("\"api\";r=0;t=55")), Some(7));
        assert_eq!(seconds(Some("Thu, 01 Jan 2026 00:00:30 GMT"), None), Some(30));
        assert_eq!(seconds(Some("Thu, 01 Jan 2020 00:00:30 GMT"), None), None, "that is over");
        assert_eq!(seconds(None, Some("\"api\";r=0;t=55")), Some(55));
        assert_eq!(seconds(Some("soon"), Some("nonsense")), None);
        assert_eq!(seconds(Some("-1"), Some("t=x")), None);
    }
}
