//! How fast a span runs on this machine: prompts, tokens one by one, and the memory bus that limits them.
//!
//! Decoding reads every weight once a step, so its speed has a limit that can be stated: steps a second are at most
//! [`memory_bandwidth`] over [`Engine::loaded_bytes`], whatever the number of lanes.

use std::{
    cell::Cell,
    hint::black_box,
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use super::{Cache, Edges, Engine, HiddenStates, Job, Keep, LaneRun, PAGE_TOKENS, Seat};
use crate::model::Dtype;

/// How long one step may take before the measurement is given up.
const PATIENCE: Duration = Duration::from_secs(600);

/// Bytes that the memory bus is measured with: far more than any cache holds.
const BUS_BYTES: usize = 256 << 20;

/// Tokens of a step that fills a lane before it is measured.
const CONTEXT_AT_ONCE: usize = 512;

/// Why a speed can't be measured.
#[derive(Debug, thiserror::Error)]
#[error("the speed can't be measured: {0}")]
pub struct SpeedError(String);

/// A span to be measured, alone or with the edges.
pub struct Speed<'a> {
    engine: &'a Engine,
    /// With the one place at their head that is taken.
    edges: Option<(&'a Edges, Seat)>,
    /// The memory of the last step's logits.
    logits: Cell<Vec<f32>>,
}

/// What is measured of decoding: in each step every lane gets one token.
#[derive(Debug, Clone, Copy)]
pub struct Decode {
    /// Lanes.
    pub lanes: usize,
    /// Tokens that each lane has before the first step.
    pub context: usize,
    /// Steps that count.
    pub steps: usize,
    /// When to stop with the steps that there are.
    pub limit: Option<Duration>,
}

impl Decode {
    /// From empty lanes, with no limit.
    pub fn new(lanes: usize, steps: usize) -> Self {
        Self { lanes, context: 0, steps, limit: None }
    }

    /// Tokens of KV cache that it takes.
    pub fn cache_tokens(&self) -> usize {
        let a_lane = self.context.saturating_add(self.steps).saturating_add(1);
        a_lane.checked_next_multiple_of(PAGE_TOKENS).unwrap_or(usize::MAX).saturating_mul(self.lanes)
    }
}

impl<'a> Speed<'a> {
    /// Of the blocks alone, on hidden states that mean nothing.
    pub fn of_blocks(engine: &'a Engine) -> Self {
        Self { engine, edges: None, logits: Cell::default() }
    }

    /// Of the blocks and the edges: token ids in, logits of each lane's last token out.
    pub fn of_model(engine: &'a Engine, edges: &'a Edges) -> Self {
        Self { engine, edges: Some((edges, edges.seat())), logits: Cell::default() }
    }

    /// Tokens a second through a prompt of `tokens` tokens, once.
    ///
    /// # Errors
    /// The cache has no room for so many tokens, or the engine refuses them.
    pub fn prefill(&self, tokens: usize) -> Result<f64, SpeedError> {
        let (_, time) = self.step(self.cache()?, vec![LaneRun { lane: 0, position: 0, tokens }], tokens)?;
        Ok(tokens as f64 / time)
    }

    /// Tokens a second of all lanes together; the median of the steps, after one that doesn't count.
    ///
    /// # Errors
    /// The cache has no room for so many lanes, or the engine refuses them.
    pub fn decode(&self, decode: &Decode) -> Result<f64, SpeedError> {
        let Decode { lanes, context, steps, limit } = *decode;
        let started = Instant::now();
        let mut cache = self.cache()?;
        for lane in 0..lanes as u32 {
            for position in (0..context).step_by(CONTEXT_AT_ONCE) {
                let tokens = CONTEXT_AT_ONCE.min(context - position);
                (cache, _) = self.step(cache, vec![LaneRun { lane, position, tokens }], context)?;
            }
        }
        let mut times = Vec::new();
        for position in context..=context + steps {
            let runs = (0..lanes as u32).map(|lane| LaneRun { lane, position, tokens: 1 }).collect();
            let (back, time) = self.step(cache, runs, position + 1)?;
            cache = back;
            times.push(time);
            if limit.is_some_and(|limit| started.elapsed() > limit) {
                break;
            }
        }
        // The only one counts, if there is but one.
        let first = usize::from(times.len() > 1);
        Ok(lanes as f64 / median(&mut times[first..]))
    }

    fn cache(&self) -> Result<Cache, SpeedError> {
        self.engine.cache(self.engine.span()).map_err(|error| SpeedError(error.to_string()))
    }

    /// Runs one step, and says how long it took, in seconds.
    fn step(&self, cache: Cache, lanes: Vec<LaneRun>, rope_length: usize) -> Result<(Cache, f64), SpeedError> {
        let failed = |error: &dyn std::fmt::Display| SpeedError(error.to_string());
        let rows = lanes.iter().map(|run| run.tokens).sum::<usize>();
        let started = Instant::now();
        let hidden = self.input(rows)?;
        let (sender, receiver) = mpsc::sync_channel(1);
        self.engine.submit(Job {
            cache,
            lanes,
            hidden,
            rope_length: Some(rope_length),
            keep: Keep::LastOfEachLane,
            deadline: Instant::now() + PATIENCE,
            cancelled: Arc::default(),
            done: Box::new(move |cache, result| {
                // The receiver waits right below.
                let _ = sender.send((cache, result));
            }),
        });
        let (cache, output) = receiver.recv().map_err(|_| SpeedError("the engine ended".to_owned()))?;
        let output = output.map_err(|error| failed(&error))?;
        if let Some((edges, seat)) = &self.edges {
            let logits = edges.logits_at(seat, &output.hidden, self.logits.take()).map_err(|error| failed(&error))?;
            self.logits.set(black_box(logits));
        }
        Ok((cache, started.elapsed().as_secs_f64()))
    }

    fn input(&self, rows: usize) -> Result<HiddenStates, SpeedError> {
        let dtype = if self.engine.dtype() == Dtype::F32 { Dtype::F32 } else { Dtype::Bf16 };
        match &self.edges {
            Some((edges, _)) => {
                let ids: Vec<u32> = (0..rows).map(|row| (row * 7919 % edges.vocab()) as u32).collect();
                edges.embed(&ids, dtype).map_err(|error| SpeedError(error.to_string()))
            }
            None => {
                let width = self.engine.spec().hidden_size;
                let values: Vec<f32> = (0..rows * width).map(|i| (i * 31 % 101) as f32 / 50.0 - 1.0).collect();
                Ok(HiddenStates::from_f32(dtype, width, &values))
            }
        }
    }
}

/// Bytes a second that `threads` threads can read from memory together; the best of a few rounds, because what disturbs
/// only makes it slower.
pub fn memory_bandwidth(threads: usize) -> f64 {
    let words = vec![1u64; BUS_BYTES / size_of::<u64>()];
    let part = words.len().div_ceil(threads.max(1));
    let mut best = f64::INFINITY;
    for _ in 0..5 {
        let started = Instant::now();
        std::thread::scope(|scope| {
            for words in words.chunks(part) {
                // Several sums, so that an addition doesn't wait for the one before.
                scope.spawn(move || {
                    let mut sums = [0u64; 32];
                    for words in words.chunks_exact(32) {
                        sums.iter_mut().zip(words).for_each(|(sum, word)| *sum = sum.wrapping_add(*word));
                    }
                    black_box(sums)
                });
            }
        });
        best = best.min(started.elapsed().as_secs_f64());
    }
    BUS_BYTES as f64 / best
}

/// The middle one; infinite where there is none.
pub fn median(times: &mut [f64]) -> f64 {
    times.sort_unstable_by(f64::total_cmp);
    times.get(times.len() / 2).copied().unwrap_or(f64::INFINITY)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median(&mut [3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&mut [5.0]), 5.0);
        assert!(median(&mut []).is_infinite());
    }

    #[test]
    fn memory_has_a_bandwidth() {
        let bandwidth = memory_bandwidth(1);
        assert!(bandwidth.is_finite() && bandwidth > 1e6, "{bandwidth}");
    }
}
