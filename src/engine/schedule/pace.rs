//! How many rows a pass may have that others' decoding waits for.

use std::time::Duration;

use super::PassRows;

/// How long a pass with a chunk of a prompt may take while others decode, if two of their steps don't take longer: an
/// interruption that a reader of the text doesn't mind.
const TARGET: Duration = Duration::from_millis(100);

/// Rows of a chunk, however slow the machine: with fewer, a prompt would read all weights for hardly any work.
pub(super) const MIN_CHUNK: usize = 16;

/// What passes took of late: each new one counts as much as all before it, so that one that was disturbed is soon forgotten.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// Seconds a row, in passes with prompts.
    row: Option<f64>,
    /// Seconds of a pass without them.
    step: Option<f64>,
}

impl Pace {
    /// A pass with these rows took so long.
    pub(super) fn ran(&mut self, rows: PassRows, took: Duration) {
        let took = took.as_secs_f64();
        let average = |old: Option<f64>, new: f64| Some(old.map_or(new, |old| (old + new) / 2.0));
        if rows.long > 0 {
            self.row = average(self.row, took / rows.all() as f64);
        } else if rows.short > 0 {
            self.step = average(self.step, took);
        }
    }

    /// Rows with which a pass takes [`TARGET`], or as long as two decode steps if that is more: then prompts get about half of
    /// the machine.
    ///
    /// A row costs less in a large pass, because the weights are read once for all of them. With the cost of rows taken from
    /// the last passes, a pass that took too long is followed by a smaller one, and so on until they take what they should.
    pub(super) fn pass_rows(&self) -> usize {
        // What isn't known yet is found out with a small one. (A conversion to an integer saturates.)
        self.row.map_or(MIN_CHUNK, |row| (self.chunk_seconds() / row) as usize)
    }

    /// How long such a pass takes.
    pub(super) fn chunk_seconds(&self) -> f64 {
        (2.0 * self.step_seconds()).max(TARGET.as_secs_f64())
    }

    /// How long a pass without prompts takes; 0 while that isn't known.
    pub(super) fn step_seconds(&self) -> f64 {
        self.step.unwrap_or(0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Runs passes of `short` rows and as many of a prompt as fit, on a machine that takes `base` and `row` seconds.
    fn settle(pace: &mut Pace, short: usize, base: f64, row: f64) -> f64 {
        let took = |rows: PassRows| base + row * rows.all() as f64;
        let mut last = 0.0;
        for _ in 0..12 {
            let alone = PassRows { short, long: 0 };
            pace.ran(alone, Duration::from_secs_f64(took(alone)));
            let mixed = PassRows { short, long: pace.pass_rows().saturating_sub(short).clamp(MIN_CHUNK, 512) };
            last = took(mixed);
            pace.ran(mixed, Duration::from_secs_f64(last));
        }
        last
    }

    #[test]
    fn a_pass_takes_the_target_or_two_steps_or_the_fewest_rows() {
        let mut pace = Pace::default();
        for (base, row, expected) in [
            (0.010, 0.001, 0.1),    // 89 rows
            (0.050, 0.001, 0.104),  // two steps of 52 ms
            (0.300, 0.010, 0.620),  // two steps of 310 ms
            (0.010, 0.050, 0.860),  // 16 rows of a prompt and one
            (0.0, 0.000_01, 0.005), // the whole budget
        ] {
            let took = settle(&mut pace, 1, base, row);
            assert!((took / expected - 1.0).abs() < 0.1, "{base} s and {row} s a row: {took} s, not {expected} s");
        }
    }

    #[test]
    fn one_pass_that_was_disturbed_does_not_matter_for_long() {
        let mut pace = Pace::default();
        settle(&mut pace, 4, 0.01, 0.001);
        let rows = pace.pass_rows();
        pace.ran(PassRows { short: 4, long: rows - 4 }, Duration::from_secs(2));
        assert!(pace.pass_rows() < rows / 5);
        settle(&mut pace, 4, 0.01, 0.001);
        assert!(pace.pass_rows() > rows * 9 / 10);
    }

    #[test]
    fn no_time_at_all_is_no_reason_to_divide_by_it() {
        let mut pace = Pace::default();
        assert_eq!(pace.pass_rows(), MIN_CHUNK);
        pace.ran(PassRows { short: 0, long: 4 }, Duration::ZERO);
        pace.ran(PassRows::default(), Duration::ZERO);
        assert_eq!(pace.pass_rows(), usize::MAX);
    }
}
