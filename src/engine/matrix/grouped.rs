//! Integers of 4 or 8 bits with a scale and a zero for each group of a row, as GPTQ and AWQ make them.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use crate::{
    engine::floats::{widen_brain, widen_half},
    model::{Dtype, checkpoint::GroupedMatrix},
};

/// Rows of a matrix and where they go, `[rows, columns]`, the columns as they are stored.
pub(super) struct Widening<'a> {
    pub(super) matrix: &'a GroupedMatrix,
    pub(super) rows: Range<usize>,
    pub(super) numbers: &'a mut [f32],
}

impl WithSimd for Widening<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let GroupedMatrix { columns, bits, group, codes, scales, scale_dtype, zeros, .. } = self.matrix;
        let first = self.rows.start * (columns / group);
        let bytes = group * *bits as usize / 8;
        let scales = scales[first..].iter().zip(&zeros[first..]);
        let codes = codes[first * bytes..].chunks_exact(bytes);
        for ((numbers, codes), (scale, zero)) in self.numbers.chunks_exact_mut(*group).zip(codes).zip(scales) {
            let scale = match scale_dtype {
                Dtype::Bf16 => widen_brain(*scale),
                _ => widen_half(*scale),
            };
            let zero = f32::from(*zero);
            if *bits == 4 {
                for (pair, code) in numbers.as_chunks_mut::<2>().0.iter_mut().zip(codes) {
                    *pair = [(f32::from(code & 15) - zero) * scale, (f32::from(code >> 4) - zero) * scale];
                }
            } else {
                for (number, code) in numbers.iter_mut().zip(codes) {
                    *number = (f32::from(*code) - zero) * scale;
                }
            }
        }
    }
}
