//! The CPU's matrix product, with results that don't depend on the batch.
//!
//! `y[r, o] = Σ x[r, i] · w[o, i]`: every sum is one chain of fused multiply-adds over `i`, one SIMD vector wide, whose
//! lanes are added up at the end. Rows and outputs are taken in tiles, to use each loaded vector several times, but a
//! tile only decides which sums run side by side and never the order within one. So a row's result is the same bit for
//! bit whatever other rows are in the batch, which a blocked library product doesn't promise. It does depend on the
//! width of the machine's vectors.

use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::matrix::Matrix;

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

/// The operands of a product.
#[derive(Clone, Copy)]
pub(super) struct Operands<'a> {
    /// `[rows, inputs]`.
    pub(super) x: &'a [f32],
    /// `[outputs, inputs]`.
    pub(super) w: &'a Matrix,
}

/// Buffers of products, which are kept from one to the next.
#[derive(Default)]
pub(super) struct Room {
    /// Rows with their columns in the orders of matrices, one buffer an order.
    pub(super) gathered: Vec<Vec<f32>>,
}

/// `y = x · wᵀ` for several matrices, side by side: `[rows, Σ outputs]`. All have the same number of rows in `x`, at least one.
pub(super) fn products(operands: &[Operands<'_>], y: &mut Vec<f32>) {
    let outputs: usize = operands.iter().map(|each| each.w.outputs()).sum();
    let rows = operands.first().map_or(0, |each| each.x.len() / each.w.inputs());
    y.resize(rows * outputs, 0.0);
    let work: usize = operands.iter().map(|each| each.x.len() * each.w.outputs()).sum();
    let threads = rayon::current_num_threads();
    if threads < 2 || work < MIN_PARALLEL {
        for (part, column) in parts(operands, outputs.max(1)) {
            part.run(y, outputs, column);
        }
        return;
    }
    let size = outputs.div_ceil(threads * PARTS_PER_THREAD).next_multiple_of(LONE_ROW_TILE);
    if rows == 1 {
        let mut rest = &mut y[..];
        let mut each = Vec::new();
        for (part, _) in parts(operands, size) {
            let (own, others) = std::mem::take(&mut rest).split_at_mut(part.outputs.len());
            rest = others;
            each.push((part, own));
        }
        each.into_par_iter().for_each(|(part, y)| part.run(y, y.len(), 0));
        return;
    }
    // Each part writes a matrix of its own, `[rows, part]`; they are then put side by side.
    let each: Vec<_> = parts(operands, size).collect();
    let each: Vec<(usize, Vec<f32>)> = each
        .into_par_iter()
        .map(|(part, column)| {
            let width = part.outputs.len();
            let mut y = vec![0.0; rows * width];
            part.run(&mut y, width, 0);
            (column, y)
        })
        .collect();
    y.par_chunks_mut(outputs).enumerate().for_each(|(row, y)| {
        for (column, part) in &each {
            let width = part.len() / rows;
            y[*column..column + width].copy_from_slice(&part[row * width..][..width]);
        }
    });
}

/// Some outputs of one matrix.
struct Part<'a> {
    of: Operands<'a>,
    outputs: Range<usize>,
}

/// The outputs of all matrices, at most `size` of one at a time, and the column that each part begins at.
fn parts<'a>(operands: &[Operands<'a>], size: usize) -> impl Iterator<Item = (Part<'a>, usize)> {
    let cut = move |of: &Operands<'a>| {
        let (of, outputs) = (*of, of.w.outputs());
        (0..outputs).step_by(size).map(move |start| Part { of, outputs: start..outputs.min(start + size) })
    };
    operands.iter().flat_map(cut).scan(0, |column, part| {
        let start = *column;
        *column += part.outputs.len();
        Some((part, start))
    })
}

impl Part<'_> {
    /// The part's product on one thread, to the columns of `y`, `[rows, stride]`, that begin at `column`.
    fn run(&self, y: &mut [f32], stride: usize, column: usize) {
        let Operands { x, w } = self.of;
        let inputs = w.inputs();
        let bytes = if x.len() > TILE * inputs { PANEL_BYTES } else { SMALL_PANEL_BYTES };
        // A multiple of every tile's outputs, so that only the last panel has a remainder.
        let panel =
            (bytes / size_of::<f32>() / inputs).clamp(1, self.outputs.len()).next_multiple_of(3 * LONE_ROW_TILE);
        let mut scratch = vec![0.0; if w.widens() { panel.min(self.outputs.len()) * inputs } else { 0 }];
        for start in self.outputs.clone().step_by(panel) {
            let wide = w.widen(start..self.outputs.end.min(start + panel), &mut scratch);
            let column = column + start - self.outputs.start;
            product_f32(Matrices { x, w: wide, inputs, y, stride, column });
        }
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

    fn product(x: &[f32], w: &[f32], inputs: usize) -> Vec<f32> {
        Matrix::from_f32(w.to_vec(), inputs).product(x)
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

    #[test]
    fn a_row_is_the_same_in_every_batch_and_beside_every_matrix() {
        // Large enough that several threads share the work.
        let (rows, outputs, inputs) = (11, 515, 419);
        let x = values(rows * inputs, 3);
        let w = values(outputs * inputs, 4);
        let all = product(&x, &w, inputs);
        for first in 0..rows {
            for count in 1..=rows - first {
                let some = product(&x[first * inputs..][..count * inputs], &w, inputs);
                assert_eq!(some, all[first * outputs..][..count * outputs], "rows {first}..{}", first + count);
            }
        }
        for cut in [1, 7, 100, 514] {
            let (above, below) = w.split_at(cut * inputs);
            let [above, below] = [above, below].map(|w| Matrix::from_f32(w.to_vec(), inputs));
            for rows in [1, 2, 11] {
                let x = &x[..rows * inputs];
                let mut both = Vec::new();
                products(&[Operands { x, w: &above }, Operands { x, w: &below }], &mut both);
                assert_eq!(both, all[..rows * outputs], "{cut} {rows}");
            }
        }
    }
}
