//! Numbers of 8 bits with a scale for each tile, as DeepSeek's checkpoints have them.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use crate::model::checkpoint::Fp8Matrix;

/// Rows of a matrix and where they go, `[rows, columns]`.
pub(super) struct Widening<'a> {
    pub(super) matrix: &'a Fp8Matrix,
    pub(super) rows: Range<usize>,
    pub(super) numbers: &'a mut [f32],
}

impl WithSimd for Widening<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Fp8Matrix { columns, codes, tile: [high, wide], scales, .. } = self.matrix;
        for (row, numbers) in self.rows.zip(self.numbers.chunks_exact_mut(*columns)) {
            let codes = &codes[row * columns..][..*columns];
            let scales = &scales[row / high * columns.div_ceil(*wide)..];
            for ((numbers, codes), scale) in numbers.chunks_mut(*wide).zip(codes.chunks(*wide)).zip(scales) {
                for (number, code) in numbers.iter_mut().zip(codes) {
                    *number = e4m3(*code) * scale;
                }
            }
        }
    }
}

/// A sign, four bits of exponent with a bias of 7 and three of mantissa (Micikevicius et al. 2022): no infinities, and
/// one NaN with either sign.
#[inline(always)]
fn e4m3(code: u8) -> f32 {
    /// From that bias to an f32's.
    const REBIAS: f32 = f32::from_bits((127 + 127 - 7) << 23);
    // An f32 has the same parts, further up; also of subnormals, which are rare: numbers are scaled to use the whole range.
    let bits = i32::from(code as i8) << 20 & (0x87F0_0000_u32 as i32);
    let number = f32::from_bits(bits as u32) * REBIAS;
    if bits & 0x07F0_0000 == 0x07F0_0000 { f32::NAN } else { number }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_is_what_the_format_says() {
        for code in 0..=255u8 {
            let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
            let magnitude = match exponent {
                0 => mantissa / 8.0 * 2f32.powi(-6),
                _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent - 7),
            };
            let expected = if code & 0x80 == 0 { magnitude } else { -magnitude };
            let found = e4m3(code);
            if code & 0x7F == 0x7F {
                assert!(found.is_nan());
            } else {
                assert_eq!(found.to_bits(), expected.to_bits(), "{code:#x}");
            }
        }
    }
}
