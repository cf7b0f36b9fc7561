//! Products of rows with keys, with lanes along a sum.

use pulp::{Arch, Simd, WithSimd};

const TILE: usize = 4;
const LONE_ROW_TILE: usize = 8;

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
