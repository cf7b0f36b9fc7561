//! Rotary positions: angles, and the rotation of heads.

use std::{borrow::Cow, f64::consts::PI, ops::Range};

use crate::model::spec::{RopeScaling, RopeSpec};

/// Turns a token per position, for each pair of a head's numbers.
///
/// They are computed in the precision and order that transformers uses (`modeling_rope_utils.py`), since at a position of
/// 100,000 an angle that is off in its last bit turns a head by hundredths of a radian. Powers, sines and cosines are those of
/// the `libm` crate, which are the same on every machine.
pub(super) struct Rope {
    frequencies: Frequencies,
    /// What cosines and sines are multiplied by.
    factor: f32,
}

enum Frequencies {
    /// The same for all lengths.
    Fixed(Vec<f32>),
    /// Of a base that grows with the length.
    Dynamic { theta: f32, width: usize, factor: f32, original: usize },
    /// One set up to a length, another one above it.
    Two { short: Vec<f32>, long: Vec<f32>, original: usize },
}

impl Rope {
    pub(super) fn new(spec: &RopeSpec, head_size: usize) -> Self {
        let width = spec.width.unwrap_or(head_size);
        let plain = || periods(spec.theta, width).map(|period| 1.0 / period).collect();
        let divided = |factors: &[f64]| {
            periods(spec.theta, width).zip(factors).map(|(period, factor)| 1.0 / (*factor as f32 * period)).collect()
        };
        let mut attention = 1.0;
        let frequencies = match &spec.scaling {
            RopeScaling::Default => Frequencies::Fixed(plain()),
            RopeScaling::Linear { factor } => {
                Frequencies::Fixed(plain().into_iter().map(|frequency| frequency / *factor as f32).collect())
            }
            RopeScaling::Divided { divisors } => Frequencies::Fixed(divided(divisors)),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
                let blend = Llama3 {
                    factor: *factor,
                    low: *low_freq_factor,
                    high: *high_freq_factor,
                    context: *original_context as f64,
                };
                Frequencies::Fixed(plain().into_iter().map(|frequency| blend.scaled(frequency)).collect())
            }
            RopeScaling::Dynamic { factor, original_context } => Frequencies::Dynamic {
                theta: spec.theta as f32,
                width,
                factor: *factor as f32,
                original: *original_context,
            },
            RopeScaling::Yarn { factor, beta_fast, beta_slow, original_context, attention_factor, truncate } => {
                attention = *attention_factor;
                let bound = |turns: f64| {
                    let context = *original_context as f64;
                    width as f64 * libm::log(context / (turns * 2.0 * PI)) / (2.0 * libm::log(spec.theta))
                };
                let (low, high) = (bound(*beta_fast), bound(*beta_slow));
                let (low, high) = if *truncate { (low.floor(), high.ceil()) } else { (low, high) };
                let blend = Yarn { factor: *factor as f32, low: low.max(0.0), high: high.min((width - 1) as f64) };
                Frequencies::Fixed(
                    periods(spec.theta, width).enumerate().map(|(pair, period)| blend.scaled(pair, period)).collect(),
                )
            }
            RopeScaling::Longrope { short_factor, long_factor, original_context, attention_factor } => {
                attention = *attention_factor;
                let (short, long) = (divided(short_factor), divided(long_factor));
                Frequencies::Two { short, long, original: *original_context }
            }
        };
        Self { frequencies, factor: attention as f32 }
    }

    /// Puts the cosines and sines of runs of positions, each with the length that the factors are taken for, into `angles`.
    pub(super) fn angles(&self, runs: impl Iterator<Item = (Range<usize>, usize)>, angles: &mut Angles) {
        angles.cos.clear();
        angles.sin.clear();
        for (positions, length) in runs {
            let frequencies = self.frequencies.at(length);
            angles.pairs = frequencies.len();
            for position in positions {
                for frequency in &*frequencies {
                    let (sin, cos) = libm::sincosf(position as f32 * frequency);
                    angles.cos.push(cos * self.factor);
                    angles.sin.push(sin * self.factor);
                }
            }
        }
    }
}

impl Frequencies {
    fn at(&self, length: usize) -> Cow<'_, [f32]> {
        match self {
            Self::Fixed(frequencies) => Cow::Borrowed(frequencies),
            Self::Two { short, long, original } => Cow::Borrowed(if length > *original { long } else { short }),
            Self::Dynamic { theta, width, factor, original } => {
                let length = length.max(*original);
                let growth = factor * length as f32 / *original as f32 - (factor - 1.0);
                let exponent = *width as f64 / (*width as f64 - 2.0);
                let theta = theta * libm::pow(f64::from(growth), exponent) as f32;
                Cow::Owned(periods(f64::from(theta), *width).map(|period| 1.0 / period).collect())
            }
        }
    }
}

/// What a pair's position is divided by: `theta^(2 · pair / width)`.
fn periods(theta: f64, width: usize) -> impl Iterator<Item = f32> {
    let exponents = (0..width / 2).map(move |pair| (2 * pair) as f32 / width as f32);
    exponents.map(move |exponent| libm::pow(theta, f64::from(exponent)) as f32)
}

struct Llama3 {
    factor: f64,
    low: f64,
    high: f64,
    context: f64,
}

impl Llama3 {
    fn scaled(&self, frequency: f32) -> f32 {
        let Self { factor, low, high, context } = *self;
        let wavelength = 2.0 * PI / f64::from(frequency);
        if wavelength > context / low {
            frequency / factor as f32
        } else if wavelength < context / high {
            frequency
        } else {
            let smooth = (context / wavelength - low) / (high - low);
            let frequency = f64::from(frequency);
            ((1.0 - smooth) * frequency / factor + smooth * frequency) as f32
        }
    }
}

/// Pairs before `low` keep their frequency, those after `high` have it divided.
struct Yarn {
    factor: f32,
    low: f64,
    high: f64,
}

impl Yarn {
    fn scaled(&self, pair: usize, period: f32) -> f32 {
        // Equal bounds would divide by zero.
        let high = if self.low == self.high { self.high + 0.001 } else { self.high };
        let ramp = (pair as f32 - self.low as f32) / (high - self.low) as f32;
        let kept = 1.0 - ramp.clamp(0.0, 1.0);
        1.0 / (self.factor * period) * (1.0 - kept) + 1.0 / period * kept
    }
}

/// Cosines and sines of the rows of a pass, `[rows, pairs]`.
#[derive(Default)]
pub(super) struct Angles {
    pairs: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Angles {
    /// Cosines and sines as tables `[rows, pairs]`, and the number of pairs.
    #[cfg(any(test, feature = "cuda"))]
    pub(super) fn into_tables(self) -> (Vec<f32>, Vec<f32>, usize) {
        (self.cos, self.sin, self.pairs)
    }

    /// Rotates one head of row `row` in place: number `i` against number `i + pairs`. What follows stays as it is.
    #[inline(always)]
    pub(super) fn rotate(&self, row: usize, head: &mut [f32]) {
        let cos = &self.cos[row * self.pairs..][..self.pairs];
        let sin = &self.sin[row * self.pairs..][..self.pairs];
        let (low, high) = head.split_at_mut(self.pairs);
        for (((a, b), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
            (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rope(scaling: RopeScaling) -> Rope {
        Rope::new(&RopeSpec { theta: 10_000.0, scaling, width: None }, 8)
    }

    fn angles(rope: &Rope, runs: &[(Range<usize>, usize)]) -> Angles {
        let mut angles = Angles::default();
        rope.angles(runs.iter().cloned(), &mut angles);
        angles
    }

    fn frequencies(scaling: RopeScaling) -> Vec<f32> {
        rope(scaling).frequencies.at(1).to_vec()
    }

    fn close(found: &[f32], expected: &[f64]) {
        assert_eq!(found.len(), expected.len());
        for (found, expected) in found.iter().zip(expected) {
            assert!((f64::from(*found) / expected - 1.0).abs() < 1e-6, "{found} for {expected}");
        }
    }

    #[test]
    fn frequencies_fall_geometrically_and_scaling_stretches_them() {
        assert_eq!(frequencies(RopeScaling::Default), [1.0, 0.1, 0.01, 0.001]);
        assert_eq!(frequencies(RopeScaling::Linear { factor: 4.0 }), [0.25, 0.025, 0.0025, 0.00025]);
        let llama3 =
            RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 400 };
        let scaled = frequencies(llama3);
        // Wavelengths 6.3 and 63 are short (below 100), 6283 is long (above 400), and 628, too.
        assert_eq!(scaled, [1.0, 0.1, 0.01 / 8.0, 0.001 / 8.0]);
        let between =
            RopeScaling::Llama3 { factor: 8.0, low_freq_factor: 1.0, high_freq_factor: 4.0, original_context: 1000 };
        let smooth = (1000.0 / (2.0 * PI / 0.01) - 1.0) / 3.0;
        let expected = (1.0 - smooth) * 0.01 / 8.0 + smooth * 0.01;
        assert!((f64::from(frequencies(between)[2]) - expected).abs() < 1e-8);
    }

    #[test]
    fn a_rotation_keeps_lengths_and_turns_by_the_position() {
        let rope = Rope::new(&RopeSpec { theta: 10_000.0, scaling: RopeScaling::Default, width: None }, 4);
        let angles = angles(&rope, &[(0..1, 1), (3..4, 4)]);
        let mut head = [1.0, 2.0, 0.0, 0.5];
        angles.rotate(0, &mut head);
        assert_eq!(head, [1.0, 2.0, 0.0, 0.5]);
        angles.rotate(1, &mut head);
        assert!((head[0] - 3f32.cos()).abs() < 1e-6 && (head[2] - 3f32.sin()).abs() < 1e-6);
        assert!((head[1].hypot(head[3]) - 2f32.hypot(0.5)).abs() < 1e-6);
    }

    #[test]
    fn only_the_first_numbers_of_a_head_are_rotated() {
        let rope = Rope::new(&RopeSpec { theta: 10_000.0, scaling: RopeScaling::Default, width: Some(4) }, 6);
        let mut head = [1.0, 2.0, 0.0, 0.5, 7.0, 8.0];
        angles(&rope, &[(3..4, 4)]).rotate(0, &mut head);
        assert!((head[0] - 3f32.cos()).abs() < 1e-6 && (head[2] - 3f32.sin()).abs() < 1e-6);
        assert_eq!(head[4..], [7.0, 8.0]);
    }

    #[test]
    fn the_base_of_dynamic_scaling_grows_with_the_length() {
        let rope = rope(RopeScaling::Dynamic { factor: 4.0, original_context: 100 });
        let at = |length: usize| rope.frequencies.at(length).to_vec();
        for length in [1, 100] {
            assert_eq!(at(length), frequencies(RopeScaling::Default));
        }
        // Twice the context: the base grows by (4 · 2 - 3)^(8/6).
        let theta = 10_000.0 * 5f64.powf(8.0 / 6.0);
        close(&at(200), &[0.0, 0.25, 0.5, 0.75].map(|exponent| theta.powf(-exponent)));
        // One step states the length for all of its tokens.
        let angles = angles(&rope, &[(0..2, 200), (1..2, 50)]);
        close(&angles.cos[4..8], &[0.0, 0.25, 0.5, 0.75].map(|exponent| theta.powf(-exponent).cos()));
        close(&angles.cos[8..12], &[1.0, 0.1, 0.01, 0.001].map(f64::cos));
    }

    #[test]
    fn yarn_keeps_fast_frequencies_and_divides_slow_ones() {
        let yarn = |truncate| RopeScaling::Yarn {
            factor: 32.0,
            beta_fast: 8.0,
            beta_slow: 1.0,
            original_context: 4096,
            attention_factor: 1.25,
            truncate,
        };
        // Bounds: 8 ln(4096 / 16π) / (2 ln 10000) = 1.911 and 8 ln(4096 / 2π) / (2 ln 10000) = 2.814.
        let exact = frequencies(yarn(false));
        let ramp = (2.0 - 1.911_090_1) / (2.814_180_1 - 1.911_090_1);
        close(&exact[..2], &[1.0, 0.1]);
        close(&exact[3..], &[0.001 / 32.0]);
        assert!((f64::from(exact[2]) / (0.01 * (1.0 - ramp) + 0.01 / 32.0 * ramp) - 1.0).abs() < 1e-5, "{}", exact[2]);
        // Rounded outwards the bounds are 1 and 3.
        close(&frequencies(yarn(true)), &[1.0, 0.1, 0.01 * 0.5 + 0.01 / 32.0 * 0.5, 0.001 / 32.0]);
        let angles = angles(&rope(yarn(true)), &[(0..1, 1)]);
        assert_eq!((angles.cos[0], angles.sin[0]), (1.25, 0.0));
    }

    #[test]
    fn longrope_has_two_sets_of_divisors() {
        let rope = rope(RopeScaling::Longrope {
            short_factor: vec![1.0, 1.0, 2.0, 2.0],
            long_factor: vec![1.0, 2.0, 4.0, 8.0],
            original_context: 64,
            attention_factor: 1.5,
        });
        for (length, expected) in [(64, [1.0, 0.1, 0.005, 0.0005]), (65, [1.0, 0.05, 0.0025, 0.000_125])] {
            close(&rope.frequencies.at(length), &expected);
            let angles = angles(&rope, &[(1..2, length)]);
            close(&angles.cos, &expected.map(|frequency: f64| 1.5 * frequency.cos()));
        }
    }
}
