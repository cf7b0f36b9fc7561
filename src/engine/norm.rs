//! Normalisation of rows.
//!
//! Sums over a row are taken in 16 parts, number `i` in part `i mod 16`, and the parts are added up as a tree: part `i` and
//! part `i + 8`, of these `i` and `i + 4`, and so on. A vector of any width up to 16 holds whole parts, so that the sum is the
//! same bit for bit on every instruction set.

use pulp::{Simd, WithSimd};

use super::{
    kernels::on_vectors,
    load::{LoadError, Source},
};
use crate::model::spec::{NormKind, NormSpec};

/// Partial sums of a row: as many as the widest vectors have lanes.
const PARTS: usize = 16;

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

    /// Normalises rows, `[rows, width]`, in place.
    pub(super) fn normalise(&self, rows: &mut [f32]) {
        on_vectors(Normalise { norm: self, rows });
    }

    /// Normalises one row in place.
    #[inline(always)]
    pub(super) fn normalise_row<S: Simd>(&self, simd: S, row: &mut [f32]) {
        let width = row.len() as f32;
        match self.kind {
            NormKind::Rms | NormKind::RmsPlusOne => {}
            NormKind::Layer => {
                let mean = sum::<S, false>(simd, row) / width;
                row.iter_mut().for_each(|x| *x -= mean);
            }
        }
        // What is left of layer normalisation once the mean is zero.
        let squares = sum::<S, true>(simd, row);
        let scale = 1.0 / (squares / width + self.epsilon).sqrt();
        match &self.bias {
            None => row.iter_mut().zip(&self.weight).for_each(|(x, weight)| *x = *x * scale * weight),
            Some(bias) => {
                let factors = self.weight.iter().zip(bias);
                row.iter_mut().zip(factors).for_each(|(x, (weight, bias))| *x = *x * scale * weight + bias);
            }
        }
    }
}

struct Normalise<'a> {
    norm: &'a Norm,
    rows: &'a mut [f32],
}

impl WithSimd for Normalise<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        for row in self.rows.chunks_exact_mut(self.norm.weight.len()) {
            self.norm.normalise_row(simd, row);
        }
    }
}

/// The sum of a row's numbers, or of their squares, in the order that the module's docs state.
#[inline(always)]
fn sum<S: Simd, const SQUARES: bool>(simd: S, row: &[f32]) -> f32 {
    let vectors = PARTS / S::F32_LANES;
    let mut parts = [simd.splat_f32s(0.0); PARTS];
    let (whole, rest) = row.as_chunks::<PARTS>();
    // Zeros change neither sum.
    let mut last = [0.0; PARTS];
    last[..rest.len()].copy_from_slice(rest);
    for chunk in whole.iter().chain([&last]) {
        let x = S::as_simd_f32s(chunk).0;
        for i in 0..vectors {
            parts[i] = if SQUARES { simd.mul_add_f32s(x[i], x[i], parts[i]) } else { simd.add_f32s(parts[i], x[i]) };
        }
    }
    let mut sums = [0.0; PARTS];
    S::as_mut_simd_f32s(&mut sums).0.copy_from_slice(&parts[..vectors]);
    let mut half = PARTS / 2;
    while half > 0 {
        for i in 0..half {
            sums[i] += sums[i + half];
        }
        half /= 2;
    }
    sums[0]
}

#[cfg(test)]
mod tests {
    use pulp::{Arch, Scalar, Scalar128b, Scalar256b, Scalar512b};

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

    /// The definition, number by number.
    fn defined(norm: &Norm, row: &mut [f32]) {
        let tree = |parts: [f32; 16]| {
            let eight: [f32; 8] = std::array::from_fn(|i| parts[i] + parts[i + 8]);
            let four: [f32; 4] = std::array::from_fn(|i| eight[i] + eight[i + 4]);
            (four[0] + four[2]) + (four[1] + four[3])
        };
        let width = row.len() as f32;
        if norm.kind == NormKind::Layer {
            let mut parts = [0.0; 16];
            row.iter().enumerate().for_each(|(i, x)| parts[i % 16] += x);
            let mean = tree(parts) / width;
            row.iter_mut().for_each(|x| *x -= mean);
        }
        let mut parts = [0.0_f32; 16];
        row.iter().enumerate().for_each(|(i, x)| parts[i % 16] = x.mul_add(*x, parts[i % 16]));
        let scale = 1.0 / (tree(parts) / width + norm.epsilon).sqrt();
        for (i, x) in row.iter_mut().enumerate() {
            *x = *x * scale * norm.weight[i];
            if let Some(bias) = &norm.bias {
                *x += bias[i];
            }
        }
    }

    #[test]
    fn sums_are_taken_in_the_stated_order_on_every_path() {
        for width in [1, 7, 16, 17, 63, 64, 100, 1024, 1031] {
            let number = |i: usize, seed: usize| ((i * 2_654_435 + seed * 977) % 10_007) as f32 / 3000.0 - 1.6;
            let rows: Vec<f32> = (0..3 * width).map(|i| number(i, 1)).collect();
            let weight: Vec<f32> = (0..width).map(|i| number(i, 2)).collect();
            for (kind, bias) in [(NormKind::Rms, false), (NormKind::Layer, false), (NormKind::Layer, true)] {
                let bias = bias.then(|| (0..width).map(|i| number(i, 3)).collect());
                let norm = Norm { kind, epsilon: 1e-5, weight: weight.clone(), bias };
                let mut expected = rows.clone();
                expected.chunks_exact_mut(width).for_each(|row| defined(&norm, row));
                let bits = |rows: &[f32]| rows.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                let on = |run: &dyn Fn(Normalise<'_>)| {
                    let mut rows = rows.clone();
                    run(Normalise { norm: &norm, rows: &mut rows });
                    assert_eq!(bits(&rows), bits(&expected), "{kind:?} {width}");
                };
                on(&|rows| Arch::new().dispatch(rows));
                on(&|rows| rows.with_simd(Scalar));
                on(&|rows| rows.with_simd(Scalar128b));
                on(&|rows| rows.with_simd(Scalar256b));
                on(&|rows| rows.with_simd(Scalar512b));
            }
        }
    }
}
