//! Normalisation of rows.

use candle_core::{Error as TensorError, Tensor};
use pulp::{Arch, Simd, WithSimd};

use super::{
    load::{LoadError, Source},
    tensor,
};
use crate::model::spec::{NormKind, NormSpec};

/// A loaded norm.
pub(super) struct Norm {
    kind: NormKind,
    epsilon: f32,
    /// `[width]`, always in f32: it is small, and rounding it would gain nothing. It is what rows are multiplied by,
    /// whatever the checkpoint stores.
    weight: Vec<f32>,
    /// `[width]`.
    bias: Option<Vec<f32>>,
}

impl Norm {
    pub(super) fn load(spec: &NormSpec, width: usize, source: &mut Source<'_>) -> Result<Self, LoadError> {
        let mut weight = source.vector(&spec.weight, width)?;
        if spec.kind == NormKind::RmsPlusOne {
            weight.iter_mut().for_each(|weight| *weight += 1.0);
        }
        let bias = spec.bias.as_ref().map(|name| source.vector(name, width)).transpose()?;
        Ok(Self { kind: spec.kind, epsilon: spec.epsilon as f32, weight, bias })
    }

    /// Normalises every row of `x`, `[rows, width]`.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor, TensorError> {
        let width = self.weight.len();
        let y = tensor::with_f32(x, |x| {
            let mut y = x.to_vec();
            y.chunks_exact_mut(width).for_each(|row| self.normalise(row));
            y
        })?;
        tensor::matrix(y, width)
    }

    /// Normalises one row in place.
    pub(super) fn normalise(&self, row: &mut [f32]) {
        match self.kind {
            NormKind::Rms | NormKind::RmsPlusOne => {}
            NormKind::Layer => Arch::new().dispatch(Centre { row }),
        }
        // What is left of layer normalisation once the mean is zero.
        Arch::new().dispatch(Rms { row, weight: &self.weight, epsilon: self.epsilon });
        if let Some(bias) = &self.bias {
            row.iter_mut().zip(bias).for_each(|(x, bias)| *x += bias);
        }
    }
}

/// Takes the mean away.
struct Centre<'a> {
    row: &'a mut [f32],
}

impl WithSimd for Centre<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (vectors, rest) = S::as_simd_f32s(self.row);
        let mut sums = simd.splat_f32s(0.0);
        for x in vectors {
            sums = simd.add_f32s(*x, sums);
        }
        let mean = (simd.reduce_sum_f32s(sums) + rest.iter().sum::<f32>()) / self.row.len() as f32;
        for x in self.row {
            *x -= mean;
        }
    }
}

struct Rms<'a> {
    row: &'a mut [f32],
    weight: &'a [f32],
    epsilon: f32,
}

impl WithSimd for Rms<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (vectors, rest) = S::as_simd_f32s(self.row);
        let mut squares = simd.splat_f32s(0.0);
        for x in vectors {
            squares = simd.mul_add_e_f32s(*x, *x, squares);
        }
        let rest: f32 = rest.iter().map(|x| x * x).sum();
        let mean = (simd.reduce_sum_f32s(squares) + rest) / self.row.len() as f32;
        let scale = 1.0 / (mean + self.epsilon).sqrt();
        for (x, weight) in self.row.iter_mut().zip(self.weight) {
            *x = *x * scale * weight;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rms_divides_by_the_root_of_the_mean_square() {
        let norm = Norm { kind: NormKind::Rms, epsilon: 1e-6, weight: vec![2.0; 37], bias: None };
        let mut row: Vec<f32> = (0..37).map(|i| i as f32 - 10.0).collect();
        let mean = row.iter().map(|x| x * x).sum::<f32>() / 37.0;
        let expected: Vec<f32> = row.iter().map(|x| 2.0 * x / (mean + 1e-6).sqrt()).collect();
        norm.normalise(&mut row);
        for (found, expected) in row.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-5);
        }
    }
    #[test]
    fn a_layer_norm_takes_the_mean_away_and_adds_a_bias() {
        let norm = Norm { kind: NormKind::Layer, epsilon: 1e-5, weight: vec![2.0; 37], bias: Some(vec![0.5; 37]) };
        let mut row: Vec<f32> = (0..37).map(|i| (i * i) as f32 / 10.0 + 100.0).collect();
        let mean = row.iter().sum::<f32>() / 37.0;
        let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / 37.0;
        let expected: Vec<f32> = row.iter().map(|x| 2.0 * (x - mean) / (variance + 1e-5).sqrt() + 0.5).collect();
        norm.normalise(&mut row);
        for (found, expected) in row.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-5);
        }
    }
}
