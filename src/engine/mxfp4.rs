//! MXFP4: matrices in numbers of 4 bits, kept as the checkpoint has them and widened a panel at a time.
//!
//! Of the Open Compute Project's Microscaling Formats (2023): 32 numbers of a row share a scale that is a power of two (E8M0),
//! and each is a sign, two bits of exponent and one of mantissa (E2M1). That is 4.25 bits a number.

use pulp::Arch;

use super::product::Packed;
use crate::model::spec::MXFP4_GROUP;

/// What the 16 codes stand for, before the scale.
const NUMBERS: [f32; 16] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0];

/// Consecutive numbers of a row and their scale.
#[derive(Debug, Clone, Copy)]
pub(super) struct Mxfp4 {
    /// The number before the other is in the lower half of a byte.
    codes: [u8; MXFP4_GROUP / 2],
    scale: u8,
}

impl Mxfp4 {
    /// Puts the checkpoint's two tensors together: 16 bytes of `codes` for each of `scales`.
    pub(super) fn blocks(codes: &[u8], scales: &[u8]) -> Vec<Self> {
        let (codes, _) = codes.as_chunks();
        codes.iter().zip(scales).map(|(codes, scale)| Self { codes: *codes, scale: *scale }).collect()
    }
}

impl Packed for Mxfp4 {
    const NUMBERS: usize = MXFP4_GROUP;

    fn widen<'a>(values: &'a [Self], scratch: &'a mut [f32]) -> &'a [f32] {
        let scratch = &mut scratch[..values.len() * MXFP4_GROUP];
        Arch::new().dispatch(|| {
            for (numbers, block) in scratch.chunks_exact_mut(MXFP4_GROUP).zip(values) {
                let scale = scale(block.scale);
                for (pair, codes) in numbers.chunks_exact_mut(2).zip(block.codes) {
                    pair[0] = NUMBERS[usize::from(codes & 15)] * scale;
                    pair[1] = NUMBERS[usize::from(codes >> 4)] * scale;
                }
            }
        });
        scratch
    }
}

/// `2^(exponent - 127)`: an f32 with that exponent, except for the lowest, which is a subnormal one. The highest stands
/// for no number; it becomes an infinity, so that what it spoils is noticed.
#[inline(always)]
fn scale(exponent: u8) -> f32 {
    f32::from_bits(if exponent == 0 { 1 << 22 } else { u32::from(exponent) << 23 })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::product::product;

    #[test]
    fn codes_and_scales_are_read_as_the_format_says() {
        let codes: Vec<u8> = (0..16).map(|low| low | (15 - low) << 4).chain([0x21; 16]).collect();
        let blocks = Mxfp4::blocks(&codes, &[127, 130]);
        let mut scratch = vec![f32::NAN; 80];
        let numbers = Mxfp4::widen(&blocks, &mut scratch);
        assert_eq!(numbers.len(), 64);
        for (code, expected) in NUMBERS.iter().enumerate() {
            assert_eq!((numbers[2 * code], numbers[2 * code + 1]), (*expected, NUMBERS[15 - code]));
        }
        assert!(numbers[32..].chunks(2).all(|pair| pair == [4.0, 8.0]));
        assert_eq!([0, 1, 126, 254].map(scale), [2f32.powi(-127), 2f32.powi(-126), 0.5, 2f32.powi(127)]);
        assert_eq!(scale(255), f32::INFINITY);
    }

    #[test]
    fn a_product_equals_that_of_the_widened_matrix_bit_for_bit() {
        let (rows, outputs, inputs) = (7, 300, 96);
        let codes: Vec<u8> = (0..outputs * inputs / 2).map(|i| (i * 31 % 251) as u8).collect();
        let scales: Vec<u8> = (0..outputs * inputs / 32).map(|i| (120 + i % 9) as u8).collect();
        let x: Vec<f32> = (0..rows * inputs).map(|i| (i * 37 % 101) as f32 / 50.0 - 1.0).collect();
        let blocks = Mxfp4::blocks(&codes, &scales);
        let mut wide = vec![0.0; outputs * inputs];
        Mxfp4::widen(&blocks, &mut wide);
        assert_eq!(product(&x, &blocks, inputs), product(&x, &wide, inputs));
        assert_eq!(product(&x[inputs..2 * inputs], &blocks, inputs), product(&x, &wide, inputs)[outputs..2 * outputs]);
    }
}
