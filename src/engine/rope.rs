//! Rotary positions: angles, and the rotation of heads.

use std::f64::consts::PI;

use crate::model::spec::{RopeScaling, RopeSpec};

/// Turns a token per position, for each pair of a head's numbers.
///
/// They are computed in the precision and order that transformers uses, since at a position of 100,000 an angle that
/// is off in its last bit turns a head by hundredths of a radian.
pub(super) struct Rope {
    frequencies: Vec<f32>,
}

impl Rope {
    pub(super) fn new(spec: &RopeSpec, head_size: usize) -> Self {
        let exponents = (0..head_size / 2).map(|pair| (2 * pair) as f32 / head_size as f32);
        let frequencies = exponents.map(|exponent| 1.0 / spec.theta.powf(f64::from(exponent)) as f32);
        Self { frequencies: frequencies.map(|frequency| scaled(&spec.scaling, frequency)).collect() }
    }

    /// Cosines and sines for `positions`, `[positions, head_size / 2]` each.
    pub(super) fn angles(&self, positions: impl Iterator<Item = usize>) -> Angles {
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        for position in positions {
            for frequency in &self.frequencies {
                let (s, c) = (position as f32 * frequency).sin_cos();
                cos.push(c);
                sin.push(s);
            }
        }
        Angles { half: self.frequencies.len(), cos, sin }
    }
}

/// The frequency after scaling (transformers, `modeling_rope_utils.py`).
fn scaled(scaling: &RopeScaling, frequency: f32) -> f32 {
    match *scaling {
        RopeScaling::Default => frequency,
        RopeScaling::Linear { factor } => frequency / factor as f32,
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context } => {
            let wavelength = 2.0 * PI / f64::from(frequency);
            let context = original_context as f64;
            if wavelength > context / low_freq_factor {
                frequency / factor as f32
            } else if wavelength < context / high_freq_factor {
                frequency
            } else {
                let smooth = (context / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                let frequency = f64::from(frequency);
                ((1.0 - smooth) * frequency / factor + smooth * frequency) as f32
            }
        }
    }
}

/// Cosines and sines of the rows of a pass.
pub(super) struct Angles {
    half: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl Angles {
    /// Rotates one head of row `row` in place: number `i` against number `i + head_size / 2`.
    pub(super) fn rotate(&self, row: usize, head: &mut [f32]) {
        let cos = &self.cos[row * self.half..][..self.half];
        let sin = &self.sin[row * self.half..][..self.half];
        let (low, high) = head.split_at_mut(self.half);
        for (((a, b), cos), sin) in low.iter_mut().zip(high).zip(cos).zip(sin) {
            (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frequencies(scaling: RopeScaling) -> Vec<f32> {
        Rope::new(&RopeSpec { theta: 10_000.0, scaling }, 8).frequencies
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
        let rope = Rope::new(&RopeSpec { theta: 10_000.0, scaling: RopeScaling::Default }, 4);
        let angles = rope.angles([0, 3].into_iter());
        let mut head = [1.0, 2.0, 0.0, 0.5];
        angles.rotate(0, &mut head);
        assert_eq!(head, [1.0, 2.0, 0.0, 0.5]);
        angles.rotate(1, &mut head);
        assert!((head[0] - 3f32.cos()).abs() < 1e-6 && (head[2] - 3f32.sin()).abs() < 1e-6);
        assert!((head[1].hypot(head[3]) - 2f32.hypot(0.5)).abs() < 1e-6);
    }
}
