//! The CPU's matrix product, with results that don't depend on the batch.
//!
//! `y[r, o] = Σ x[r, i] · w[o, i]`: every sum is one chain of fused multiply-adds over `i`, one SIMD vector wide, whose
//! lanes are added up at the end. Rows and outputs are taken in tiles, to use each loaded vector several times, but a
//! tile only decides which sums run side by side and never the order within one. So a row's result is the same bit for
//! bit whatever other rows are in the batch, which a blocked library product doesn't promise. It does depend on the
//! width of the machine's vectors.

use half::{bf16, f16};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

/// Rows of a tile. With four outputs, 16 accumulators and their operands fit AVX-512's 32 registers; where there are 16,
/// three outputs do.
const TILE: usize = 4;
/// Outputs side by side when there is one row: enough independent chains to hide the latency of an addition.
const LONE_ROW_TILE: usize = 8;
/// Bytes of widened weights that are used for all rows before the next are widened: a part of a usual level-2 cache.
const PANEL_BYTES: usize = 256 << 10;
/// The same for a single tile of rows, which uses them once: a part of a level-1 cache.
const SMALL_PANEL_BYTES: usize = 16 << 10;
/// Multiplications below which a second thread costs more than it saves (some 30 µs of one core's work).
const MIN_PARALLEL: usize = 1 << 20;
/// Parts that a large product is cut into for each thread, so that an uneven split evens out.
const PARTS_PER_THREAD: usize = 4;

/// A format that weights are kept in.
pub(super) trait Packed: Copy + Send + Sync {
    /// Numbers that one element stands for. It divides the width of a matrix.
    const NUMBERS: usize = 1;
    /// Whether [`Packed::widen`] uses its scratch.
    const WIDENS: bool = true;
    /// `values` as f32: themselves, or widened into `scratch`, which has room for their numbers.
    fn widen<'a>(values: &'a [Self], scratch: &'a mut [f32]) -> &'a [f32];
}

/// A format that caches are kept in, too.
pub(super) trait Stored: Packed {
    /// Rounds to this format.
    fn narrow(value: f32) -> Self;
}

impl Packed for f32 {
    const WIDENS: bool = false;

    fn widen<'a>(values: &'a [Self], _scratch: &'a mut [f32]) -> &'a [f32] {
        values
    }
}

impl Stored for f32 {
    fn narrow(value: f32) -> Self {
        value
    }
}

impl Packed for bf16 {
    fn widen<'a>(values: &'a [Self], scratch: &'a mut [f32]) -> &'a [f32] {
        let scratch = &mut scratch[..values.len()];
        Arch::new().dispatch(|| {
            // A bf16 is the upper half of an f32. (The crate's conversion looks at NaNs one by one.)
            for (wide, value) in scratch.iter_mut().zip(values) {
                *wide = f32::from_bits(u32::from(value.to_bits()) << 16);
            }
        });
        scratch
    }
}

impl Stored for bf16 {
    fn narrow(value: f32) -> Self {
        bf16::from_f32(value)
    }
}

impl Packed for f16 {
    fn widen<'a>(values: &'a [Self], scratch: &'a mut [f32]) -> &'a [f32] {
        let scratch = &mut scratch[..values.len()];
        Arch::new().dispatch(|| {
            for (wide, value) in scratch.iter_mut().zip(values) {
                *wide = widen_half(value.to_bits());
            }
        });
        scratch
    }
}

impl Stored for f16 {
    fn narrow(value: f32) -> Self {
        f16::from_f32(value)
    }
}

/// An IEEE half as f32, without branches, so that the loop around it becomes vector instructions.
#[inline(always)]
fn widen_half(half: u16) -> f32 {
    const EXPONENT: u32 = 0x7C00 << 13;
    /// From the bias of a half's exponent, 15, to that of an f32.
    const REBIAS: u32 = (127 - 15) << 23;
    let magnitude = u32::from(half & 0x7FFF) << 13;
    let exponent = magnitude & EXPONENT;
    let normal = magnitude + REBIAS;
    // Infinities and NaNs have the highest exponent here as there.
    let special = normal + REBIAS;
    // Subnormals have no leading one: give them one and take it away as a number.
    let subnormal = f32::from_bits(normal + (1 << 23)) - f32::from_bits(REBIAS + (1 << 23));
    let bits = if exponent == EXPONENT { special } else { normal };
    let bits = if exponent == 0 { subnormal.to_bits() } else { bits };
    f32::from_bits(bits | u32::from(half & 0x8000) << 16)
}

/// `x · wᵀ` for `x` of `[rows, inputs]` and `w` of `[outputs, inputs]`: `[rows, outputs]`.
pub(super) fn product<T: Packed>(x: &[f32], w: &[T], inputs: usize) -> Vec<f32> {
    let width = inputs / T::NUMBERS;
    let (rows, outputs) = (x.len() / inputs, w.len() / width);
    let mut y = vec![0.0; rows * outputs];
    let threads = rayon::current_num_threads();
    if threads < 2 || x.len() * outputs < MIN_PARALLEL {
        columns(x, w, inputs, &mut y);
        return y;
    }
    let part = outputs.div_ceil(threads * PARTS_PER_THREAD).next_multiple_of(LONE_ROW_TILE);
    if rows == 1 {
        y.par_chunks_mut(part).zip(w.par_chunks(part * width)).for_each(|(y, w)| columns(x, w, inputs, y));
        return y;
    }
    // Each part writes a matrix of its own, `[rows, part]`; they are then put side by side.
    let parts: Vec<Vec<f32>> = w
        .par_chunks(part * width)
        .map(|w| {
            let mut y = vec![0.0; rows * (w.len() / width)];
            columns(x, w, inputs, &mut y);
            y
        })
        .collect();
    y.par_chunks_mut(outputs).enumerate().for_each(|(row, y)| {
        let mut start = 0;
        for part in &parts {
            let width = part.len() / rows;
            y[start..start + width].copy_from_slice(&part[row * width..][..width]);
            start += width;
        }
    });
    y
}

/// The product on one thread.
fn columns<T: Packed>(x: &[f32], w: &[T], inputs: usize, y: &mut [f32]) {
    let width = inputs / T::NUMBERS;
    let outputs = w.len() / width;
    let bytes = if x.len() > TILE * inputs { PANEL_BYTES } else { SMALL_PANEL_BYTES };
    // A multiple of every tile's outputs, so that only the last panel has a remainder.
    let panel = (bytes / size_of::<f32>() / inputs).clamp(1, outputs.max(1)).next_multiple_of(3 * LONE_ROW_TILE);
    let mut scratch = vec![0.0; if T::WIDENS { panel.min(outputs) * inputs } else { 0 }];
    for (index, stored) in w.chunks(panel * width).enumerate() {
        let w = T::widen(stored, &mut scratch);
        product_f32(Matrices { x, w, inputs, y, stride: outputs, column: index * panel });
    }
}

/// The operands of a product on one thread, of which `y` may be wider than the product.
pub(super) struct Matrices<'a> {
    /// `[rows, inputs]`.
    pub(super) x: &'a [f32],
    /// `[outputs, inputs]`.
    pub(super) w: &'a [f32],
    /// Length of a sum.
    pub(super) inputs: usize,
    /// `[rows, stride]`.
    pub(super) y: &'a mut [f32],
    /// Width of `y`.
    pub(super) stride: usize,
    /// Where in a row of `y` the product begins.
    pub(super) column: usize,
}

/// `y[r, column + o] = Σ x[r, i] · w[o, i]`.
pub(super) fn product_f32(matrices: Matrices<'_>) {
    Arch::new().dispatch(matrices);
}

/// Which instruction set the products run on; see [`super::Engine::kernel_path`].
pub(super) fn path() -> &'static str {
    Arch::new().dispatch(PathName)
}

struct PathName;

impl WithSimd for PathName {
    type Output = &'static str;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> &'static str {
        // The width decides how a sum is split, and with it the last bits of a result.
        match S::F32_LANES {
            16 => "cpu-avx512",
            8 => "cpu-avx2",
            4 => "cpu-simd128",
            _ => "cpu-portable",
        }
    }
}

impl WithSimd for Matrices<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(mut self, simd: S) {
        let rows = self.x.len() / self.inputs;
        let outputs = self.w.len() / self.inputs;
        let mut row = 0;
        while row + TILE <= rows {
            if S::REGISTER_COUNT >= 32 {
                self.row_band::<S, TILE, 4>(simd, row, outputs);
            } else {
                self.row_band::<S, TILE, 3>(simd, row, outputs);
            }
            row += TILE;
        }
        match rows - row {
            1 => self.row_band::<S, 1, LONE_ROW_TILE>(simd, row, outputs),
            2 => self.row_band::<S, 2, 4>(simd, row, outputs),
            3 => self.row_band::<S, 3, 3>(simd, row, outputs),
            _ => {}
        }
    }
}

impl Matrices<'_> {
    /// `R` rows from `row` on, all outputs, `O` at a time.
    #[inline(always)]
    fn row_band<S: Simd, const R: usize, const O: usize>(&mut self, simd: S, row: usize, outputs: usize) {
        let mut output = 0;
        while output + O <= outputs {
            self.tile::<S, R, O>(simd, row, output);
            output += O;
        }
        while output < outputs {
            self.tile::<S, R, 1>(simd, row, output);
            output += 1;
        }
    }

    #[inline(always)]
    fn tile<S: Simd, const R: usize, const O: usize>(&mut self, simd: S, row: usize, output: usize) {
        let inputs = self.inputs;
        let vectors = inputs / S::F32_LANES;
        // Loops rather than `map`: a closure that isn't inlined would be compiled for the oldest processors.
        let (mut xs, mut ws): ([&[f32]; R], [&[f32]; O]) = ([&[]; R], [&[]; O]);
        let mut x: [&[S::f32s]; R] = [&[]; R];
        let mut w: [&[S::f32s]; O] = [&[]; O];
        for r in 0..R {
            xs[r] = &self.x[(row + r) * inputs..][..inputs];
            x[r] = &S::as_simd_f32s(xs[r]).0[..vectors];
        }
        for o in 0..O {
            ws[o] = &self.w[(output + o) * inputs..][..inputs];
            w[o] = &S::as_simd_f32s(ws[o]).0[..vectors];
        }
        let mut sums = [[simd.splat_f32s(0.0); O]; R];
        for i in 0..vectors {
            let mut weights = [simd.splat_f32s(0.0); O];
            for o in 0..O {
                weights[o] = w[o][i];
            }
            for r in 0..R {
                let x = x[r][i];
                for o in 0..O {
                    sums[r][o] = simd.mul_add_e_f32s(x, weights[o], sums[r][o]);
                }
            }
        }
        let rest = vectors * S::F32_LANES;
        if rest < inputs {
            for o in 0..O {
                let weight = simd.partial_load_f32s(&ws[o][rest..]);
                for r in 0..R {
                    sums[r][o] = simd.mul_add_e_f32s(simd.partial_load_f32s(&xs[r][rest..]), weight, sums[r][o]);
                }
            }
        }
        for (r, sums) in sums.iter().enumerate() {
            let y = &mut self.y[(row + r) * self.stride + self.column + output..][..O];
            for (y, sum) in y.iter_mut().zip(sums) {
                *y = simd.reduce_sum_f32s(*sum);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(count: usize, seed: u32) -> Vec<f32> {
        let mut state = seed;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 - 0.5
        };
        (0..count).map(|_| next()).collect()
    }

    #[test]
    fn it_is_a_matrix_product() {
        for (rows, outputs, inputs) in [(1, 1, 1), (1, 9, 7), (2, 17, 64), (3, 5, 100), (9, 130, 33), (5, 64, 4096)] {
            let (x, w) = (values(rows * inputs, 1), values(outputs * inputs, 2));
            let y = product(&x, &w, inputs);
            for r in 0..rows {
                for o in 0..outputs {
                    let pairs = x[r * inputs..][..inputs].iter().zip(&w[o * inputs..][..inputs]);
                    let exact: f64 = pairs.map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
                    let error = (f64::from(y[r * outputs + o]) - exact).abs();
                    assert!(error < 1e-6 * (inputs as f64).sqrt(), "{rows} {outputs} {inputs}: off by {error}");
                }
            }
        }
    }

    #[test]
    fn every_half_is_widened_as_it_should_be() {
        let halves: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).collect();
        let brains: Vec<bf16> = (0..=u16::MAX).map(bf16::from_bits).collect();
        let mut scratch = vec![0.0; halves.len()];
        for (wide, half) in f16::widen(&halves, &mut scratch).iter().zip(&halves) {
            assert!(wide.to_bits() == half.to_f32().to_bits() || wide.is_nan() && half.is_nan(), "{half:?}");
        }
        for (wide, brain) in bf16::widen(&brains, &mut scratch).iter().zip(&brains) {
            assert!(wide.to_bits() == brain.to_f32().to_bits() || wide.is_nan() && brain.is_nan(), "{brain:?}");
        }
    }

    /// Sums of a row are taken in as many parts as the path's vectors have lanes, which shows in the rounding.
    #[test]
    fn the_path_is_the_one_that_products_run_on() {
        let lanes = match path() {
            "cpu-avx512" => 16,
            "cpu-avx2" => 8,
            "cpu-simd128" => 4,
            "cpu-portable" => 1,
            other => panic!("{other}"),
        };
        // Two ones are lost in 2^24 if each is added to it, and not if they are added up first.
        let are_lost = |ones: [usize; 2]| {
            let mut x = vec![0.0; 64];
            x[0] = 16_777_216.0;
            ones.into_iter().for_each(|index| x[index] = 1.0);
            product(&x, &[1.0_f32; 64], 64)[0] == 16_777_216.0
        };
        assert!(are_lost([lanes, 3 * lanes]), "vectors are wider than {lanes}");
        assert!(lanes == 1 || !are_lost([lanes / 2, lanes + lanes / 2]), "vectors are narrower than {lanes}");
    }

    fn a_row_is_the_same_in_every_batch<T: Stored>() {
        // Large enough that several threads share the work.
        let (rows, outputs, inputs) = (11, 515, 419);
        let x = values(rows * inputs, 3);
        let w: Vec<T> = values(outputs * inputs, 4).into_iter().map(T::narrow).collect();
        let all = product(&x, &w, inputs);
        for first in 0..rows {
            for count in 1..=rows - first {
                let some = product(&x[first * inputs..][..count * inputs], &w, inputs);
                assert_eq!(some, all[first * outputs..][..count * outputs], "rows {first}..{}", first + count);
            }
        }
    }

    #[test]
    fn a_row_is_the_same_in_every_batch_f32() {
        a_row_is_the_same_in_every_batch::<f32>();
    }

    #[test]
    fn a_row_is_the_same_in_every_batch_bf16() {
        a_row_is_the_same_in_every_batch::<bf16>();
    }

    #[test]
    fn a_row_is_the_same_in_every_batch_f16() {
        a_row_is_the_same_in_every_batch::<f16>();
    }
}
