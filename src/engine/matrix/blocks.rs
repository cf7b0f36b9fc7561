//! Blocks of 32 numbers, and what all blocks have in common.
//!
//! The layouts are GGML's (`ggml-common.h` and `ggml-quants.c` of llama.cpp, `quants.py` of its `gguf` package), except
//! that MXFP4 is the Open Compute Project's (Microscaling Formats, 2023) in the order of Hugging Face's checkpoints: the
//! scale behind the numbers, neighbours in one byte. Scales are multiplied in the order of the references, without
//! fusing, so that the results are equal (but for the sign of a zero). Each layout first makes bytes of its codes and then
//! numbers of the bytes, in loops of fixed length without tables: the shape that compilers turn into vector instructions. [`black_box`] keeps them
//! from working on several blocks at once instead, whose parts they would have to gather one by one (measured: three times
//! as slow), and what is a loop here and not a closure stays inlined.

use std::hint::black_box;

use candle_core::{
    Device, Result, Tensor, bail,
    quantized::{GgmlDType, QTensor},
};
use pulp::{Arch, Simd, WithSimd};

use super::k_blocks::{Iq4Xs, Q2K, Q3K, Q4K, Q5K, Q6K};
use crate::{engine::floats::widen_half, model::checkpoint::BlockFormat};

/// What the codes of IQ4_NL and IQ4_XS stand for, before the scale: finer near zero.
const IQ4_NUMBERS: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// Widens whole blocks: as many numbers as `numbers` has room for.
pub(super) fn widen(format: BlockFormat, bytes: &[u8], numbers: &mut [f32]) {
    Arch::new().dispatch(Widening { format, bytes, numbers });
}

struct Widening<'a> {
    format: BlockFormat,
    bytes: &'a [u8],
    numbers: &'a mut [f32],
}

impl WithSimd for Widening<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let Self { format, bytes, numbers } = self;
        match format {
            BlockFormat::Q4_0 => each::<Q4_0, _, _>(bytes, numbers),
            BlockFormat::Q4_1 => each::<Q4_1, _, _>(bytes, numbers),
            BlockFormat::Q5_0 => each::<Q5_0, _, _>(bytes, numbers),
            BlockFormat::Q5_1 => each::<Q5_1, _, _>(bytes, numbers),
            BlockFormat::Q8_0 => each::<Q8_0, _, _>(bytes, numbers),
            BlockFormat::Q2K => each::<Q2K, _, _>(bytes, numbers),
            BlockFormat::Q3K => each::<Q3K, _, _>(bytes, numbers),
            BlockFormat::Q4K => each::<Q4K, _, _>(bytes, numbers),
            BlockFormat::Q5K => each::<Q5K, _, _>(bytes, numbers),
            BlockFormat::Q6K => each::<Q6K, _, _>(bytes, numbers),
            BlockFormat::Iq4Nl => each::<Iq4Nl, _, _>(bytes, numbers),
            BlockFormat::Iq4Xs => each::<Iq4Xs, _, _>(bytes, numbers),
            BlockFormat::Mxfp4 => each::<Mxfp4, _, _>(bytes, numbers),
        }
    }
}

/// A layout of blocks. (A trait rather than a function to be passed, so that every call is inlined into the code for the
/// machine's vectors.)
pub(super) trait Block<const BYTES: usize, const NUMBERS: usize> {
    fn widen(block: &[u8; BYTES], numbers: &mut [f32; NUMBERS]);
}

#[inline(always)]
fn each<B: Block<BYTES, NUMBERS>, const BYTES: usize, const NUMBERS: usize>(bytes: &[u8], numbers: &mut [f32]) {
    for (block, numbers) in bytes.as_chunks().0.iter().zip(numbers.as_chunks_mut().0) {
        B::widen(black_box(block), numbers);
    }
}

/// The f16 at `at`.
#[inline(always)]
pub(super) fn half_at(block: &[u8], at: usize) -> f32 {
    widen_half(u16::from_le_bytes([block[at], block[at + 1]]))
}

/// `codes` as signed integers, times a scale.
#[inline(always)]
pub(super) fn scaled<const N: usize>(codes: &[u8; N], numbers: &mut [f32], scale: f32) {
    for (number, code) in numbers[..N].iter_mut().zip(codes) {
        *number = f32::from(*code as i8) * scale;
    }
}

/// `codes` times a scale, and something added.
#[inline(always)]
pub(super) fn scaled_from<const N: usize>(codes: &[u8; N], numbers: &mut [f32], scale: f32, added: f32) {
    for (numbers, codes) in numbers.as_chunks_mut::<8>().0.iter_mut().zip(codes.as_chunks::<8>().0) {
        let mut wide = [0.0; 8];
        for i in 0..8 {
            wide[i] = f32::from(codes[i] as i8);
        }
        for wide in &mut wide {
            *wide *= scale;
        }
        for wide in &mut wide {
            *wide += added;
        }
        *numbers = wide;
    }
}

/// Numbers of 4 bits: the first half of a block in the lower halves of the bytes, the second in the upper ones.
#[inline(always)]
pub(super) fn nibbles(bytes: &[u8; 16]) -> [u8; 32] {
    let mut codes = [0; 32];
    for i in 0..16 {
        codes[i] = bytes[i] & 15;
    }
    for i in 0..16 {
        codes[i + 16] = bytes[i] >> 4;
    }
    codes
}

/// Numbers of 4 bits, neighbours in one byte, the first in its lower half.
#[inline(always)]
fn pairs(bytes: &[u8; 16]) -> [u8; 32] {
    let mut codes = [0; 32];
    for i in 0..16 {
        codes[2 * i] = bytes[i] & 15;
        codes[2 * i + 1] = bytes[i] >> 4;
    }
    codes
}

/// Numbers of 5 bits: the lower four as in [`nibbles`], the highest of number `i` in bit `i` of `bits`.
#[inline(always)]
fn fives(bits: [u8; 4], bytes: &[u8; 16]) -> [u8; 32] {
    let mut highest = [[0; 8]; 4];
    for (highest, bits) in highest.iter_mut().zip(bits) {
        // The byte eight times, in each of which one bit is kept; whatever is not zero then carries to the highest bit.
        let kept = (u64::from(black_box(bits)) * 0x0101_0101_0101_0101) & 0x8040_2010_0804_0201;
        *highest = (((kept + 0x7F7F_7F7F_7F7F_7F7F) & 0x8080_8080_8080_8080) >> 3).to_le_bytes();
    }
    let mut codes = nibbles(bytes);
    for (code, highest) in codes.iter_mut().zip(black_box(&highest).as_flattened()) {
        *code |= highest;
    }
    codes
}

/// Every code less `by`.
#[inline(always)]
pub(super) fn less<const N: usize>(mut codes: [u8; N], by: u8) -> [u8; N] {
    for code in &mut codes {
        *code = code.wrapping_sub(by);
    }
    codes
}

/// The `N` bytes at `at`.
#[inline(always)]
pub(super) fn bytes_at<const N: usize>(block: &[u8], at: usize) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&block[at..at + N]);
    bytes
}

struct Q4_0;
struct Q4_1;
struct Q5_0;
struct Q5_1;
struct Q8_0;
struct Iq4Nl;
struct Mxfp4;

impl Block<18, 32> for Q4_0 {
    #[inline(always)]
    fn widen(block: &[u8; 18], numbers: &mut [f32; 32]) {
        scaled(&less(nibbles(&bytes_at(block, 2)), 8), numbers, half_at(block, 0));
    }
}

impl Block<20, 32> for Q4_1 {
    #[inline(always)]
    fn widen(block: &[u8; 20], numbers: &mut [f32; 32]) {
        scaled_from(&nibbles(&bytes_at(block, 4)), numbers, half_at(block, 0), half_at(block, 2));
    }
}

impl Block<22, 32> for Q5_0 {
    #[inline(always)]
    fn widen(block: &[u8; 22], numbers: &mut [f32; 32]) {
        scaled(&less(fives(bytes_at(block, 2), &bytes_at(block, 6)), 16), numbers, half_at(block, 0));
    }
}

impl Block<24, 32> for Q5_1 {
    #[inline(always)]
    fn widen(block: &[u8; 24], numbers: &mut [f32; 32]) {
        let codes = fives(bytes_at(block, 4), &bytes_at(block, 8));
        scaled_from(&codes, numbers, half_at(block, 0), half_at(block, 2));
    }
}

impl Block<34, 32> for Q8_0 {
    #[inline(always)]
    fn widen(block: &[u8; 34], numbers: &mut [f32; 32]) {
        scaled(&bytes_at::<32>(block, 2), numbers, half_at(block, 0));
    }
}

impl Block<18, 32> for Iq4Nl {
    #[inline(always)]
    fn widen(block: &[u8; 18], numbers: &mut [f32; 32]) {
        scaled(&from_table(nibbles(&bytes_at(block, 2))), numbers, half_at(block, 0));
    }
}

/// What codes of 4 bits stand for in [`IQ4_NUMBERS`]: chosen bit by bit, which vectors can do and looking up they can't.
#[inline(always)]
pub(super) fn from_table(mut codes: [u8; 32]) -> [u8; 32] {
    for code in &mut codes {
        let mask = |bit: u8| (*code >> bit & 1).wrapping_neg();
        let choose = |zero: u8, one: u8, mask: u8| zero ^ (zero ^ one) & mask;
        let masks = [mask(0), mask(1), mask(2), mask(3)];
        let pair = |at: usize| choose(IQ4_NUMBERS[at] as u8, IQ4_NUMBERS[at + 1] as u8, masks[0]);
        let four = |at: usize| choose(pair(at), pair(at + 2), masks[1]);
        let eight = |at: usize| choose(four(at), four(at + 4), masks[2]);
        *code = choose(eight(0), eight(8), masks[3]);
    }
    codes
}

impl Block<17, 32> for Mxfp4 {
    #[inline(always)]
    fn widen(block: &[u8; 17], numbers: &mut [f32; 32]) {
        let mut codes = pairs(&bytes_at(block, 0));
        for code in &mut codes {
            *code = twice_e2m1(*code);
        }
        scaled(&codes, numbers, e8m0(block[16]) * 0.5);
    }
}

/// Twice what a code of a sign, two bits of exponent and one of mantissa stands for: 0, 1, 2, 3, 4, 6, 8 or 12, with a sign.
#[inline(always)]
fn twice_e2m1(code: u8) -> u8 {
    let all_if = |bit: u8| (code >> bit & 1).wrapping_neg();
    let low = code & 3;
    // The upper four are 4, 6, 8 and 12: themselves and 0, 1, 2 or 5 more.
    let more = low + (low & low << 1 & 2);
    let value = (code & 7) + (more & all_if(2));
    (value ^ all_if(3)).wrapping_sub(all_if(3))
}

/// `2^(exponent - 127)`: an f32 with that exponent, except for the lowest, which is a subnormal one. The highest stands
/// for no number; it becomes an infinity, so that what it spoils is noticed.
#[inline(always)]
fn e8m0(exponent: u8) -> f32 {
    f32::from_bits(if exponent == 0 { 1 << 22 } else { u32::from(exponent) << 23 })
}

/// Rounds whole rows to blocks, with the roundings that llama.cpp searches for.
pub(super) fn quantize(format: BlockFormat, numbers: &[f32], bytes: &mut [u8]) -> Result<()> {
    let dtype = match format {
        BlockFormat::Q8_0 => GgmlDType::Q8_0,
        BlockFormat::Q4_0 => GgmlDType::Q4_0,
        BlockFormat::Q4K => GgmlDType::Q4K,
        BlockFormat::Q6K => GgmlDType::Q6K,
        other => bail!("matrices can't be put into {}: use q8_0, q4_0, q4_k or q6_k", other.name()),
    };
    let packed = QTensor::quantize(&Tensor::from_slice(numbers, numbers.len(), &Device::Cpu)?, dtype)?;
    bytes.copy_from_slice(&packed.data()?);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mxfp4_is_read_as_the_standard_says() {
        for (code, expected) in [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0].into_iter().enumerate() {
            assert_eq!(f32::from(twice_e2m1(code as u8) as i8) / 2.0, expected);
            assert_eq!(f32::from(twice_e2m1(code as u8 + 8) as i8) / 2.0, -expected);
        }
        assert_eq!([0, 1, 126, 254].map(e8m0), [2f32.powi(-127), 2f32.powi(-126), 0.5, 2f32.powi(127)]);
        assert_eq!(e8m0(255), f32::INFINITY);
        let mut numbers = [0.0; 32];
        let block: [u8; 17] = std::array::from_fn(|at| if at == 16 { 130 } else { 0x21 });
        Mxfp4::widen(&block, &mut numbers);
        assert!(numbers.chunks(2).all(|pair| pair == [4.0, 8.0]));
    }

    #[test]
    fn nothing_is_put_into_a_format_that_cannot_be_made() {
        let error = quantize(BlockFormat::Iq4Xs, &[0.0; 256], &mut [0; 136]).unwrap_err().to_string();
        assert!(error.contains("iq4_xs") && error.contains("q4_k"), "{error}");
    }
}
