//! Blocks of 32 numbers, and what all blocks have in common.
//!
//! The layouts are GGML's (`ggml-common.h` and `ggml-quants.c` of llama.cpp, `quants.py` of its `gguf` package), except
//! that MXFP4 is the Open Compute Project's (Microscaling Formats, 2023) in the order of Hugging Face's checkpoints: the
//! scale behind the numbers, neighbours in one byte. Scales are multiplied in the order of the references, without
//! fusing, so that the results are equal bit for bit. Lower and upper halves of bytes are taken by arithmetic on whole
//! vectors rather than from tables, which compilers don't vectorise.

use candle_core::{
    Device, Result, Tensor, bail,
    quantized::{GgmlDType, QTensor},
};
use pulp::{Arch, Simd, WithSimd};

use super::k_blocks::{Iq4Xs, Q2K, Q3K, Q4K, Q5K, Q6K};
use crate::{engine::floats::widen_half, model::checkpoint::BlockFormat};

/// What the codes of IQ4_NL and IQ4_XS stand for, before the scale: finer near zero.
pub(super) const IQ4_NUMBERS: [f32; 16] =
    [-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0];

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
        B::widen(block, numbers);
    }
}

/// The f16 at `at`.
#[inline(always)]
pub(super) fn half_at(block: &[u8], at: usize) -> f32 {
    widen_half(u16::from_le_bytes([block[at], block[at + 1]]))
}

/// Numbers of 4 bits: the first half of a block in the lower halves of the bytes, the second in the upper ones.
#[inline(always)]
fn nibbles<const SHIFT: i32>(codes: &[u8; 16], numbers: &mut [f32; 32], scale: f32, minimum: f32) {
    let (low, high) = numbers.split_at_mut(16);
    for i in 0..16 {
        low[i] = (i32::from(codes[i] & 15) - SHIFT) as f32 * scale + minimum;
        high[i] = (i32::from(codes[i] >> 4) - SHIFT) as f32 * scale + minimum;
    }
}

/// Numbers of 5 bits: the lower four as in [`nibbles`], the highest of number `i` in bit `i` of `bits`.
#[inline(always)]
fn fives<const SHIFT: i32>(bits: u32, codes: &[u8; 16], numbers: &mut [f32; 32], scale: f32, minimum: f32) {
    let (low, high) = numbers.split_at_mut(16);
    for i in 0..16 {
        let fifth = [(bits >> i & 1) << 4, (bits >> (i + 16) & 1) << 4];
        low[i] = ((u32::from(codes[i] & 15) | fifth[0]) as i32 - SHIFT) as f32 * scale + minimum;
        high[i] = ((u32::from(codes[i] >> 4) | fifth[1]) as i32 - SHIFT) as f32 * scale + minimum;
    }
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

// What is added where a format has no minimum: the one zero that changes no number, not even a zero's sign.
const NOTHING: f32 = -0.0;

impl Block<18, 32> for Q4_0 {
    #[inline(always)]
    fn widen(block: &[u8; 18], numbers: &mut [f32; 32]) {
        nibbles::<8>(&bytes_at(block, 2), numbers, half_at(block, 0), NOTHING);
    }
}

impl Block<20, 32> for Q4_1 {
    #[inline(always)]
    fn widen(block: &[u8; 20], numbers: &mut [f32; 32]) {
        nibbles::<0>(&bytes_at(block, 4), numbers, half_at(block, 0), half_at(block, 2));
    }
}

impl Block<22, 32> for Q5_0 {
    #[inline(always)]
    fn widen(block: &[u8; 22], numbers: &mut [f32; 32]) {
        let bits = u32::from_le_bytes(bytes_at(block, 2));
        fives::<16>(bits, &bytes_at(block, 6), numbers, half_at(block, 0), NOTHING);
    }
}

impl Block<24, 32> for Q5_1 {
    #[inline(always)]
    fn widen(block: &[u8; 24], numbers: &mut [f32; 32]) {
        let bits = u32::from_le_bytes(bytes_at(block, 4));
        fives::<0>(bits, &bytes_at(block, 8), numbers, half_at(block, 0), half_at(block, 2));
    }
}

impl Block<34, 32> for Q8_0 {
    #[inline(always)]
    fn widen(block: &[u8; 34], numbers: &mut [f32; 32]) {
        let scale = half_at(block, 0);
        let codes: [u8; 32] = bytes_at(block, 2);
        for i in 0..32 {
            numbers[i] = f32::from(codes[i] as i8) * scale;
        }
    }
}

impl Block<18, 32> for Iq4Nl {
    #[inline(always)]
    fn widen(block: &[u8; 18], numbers: &mut [f32; 32]) {
        from_table(&bytes_at(block, 2), numbers, half_at(block, 0));
    }
}

/// Numbers of 4 bits that index [`IQ4_NUMBERS`].
#[inline(always)]
pub(super) fn from_table(codes: &[u8; 16], numbers: &mut [f32; 32], scale: f32) {
    for i in 0..16 {
        numbers[i] = IQ4_NUMBERS[usize::from(codes[i] & 15)] * scale;
        numbers[i + 16] = IQ4_NUMBERS[usize::from(codes[i] >> 4)] * scale;
    }
}

impl Block<17, 32> for Mxfp4 {
    #[inline(always)]
    fn widen(block: &[u8; 17], numbers: &mut [f32; 32]) {
        let scale = e8m0(block[16]);
        let codes: [u8; 16] = bytes_at(block, 0);
        for i in 0..16 {
            numbers[2 * i] = e2m1(u32::from(codes[i] & 15)) * scale;
            numbers[2 * i + 1] = e2m1(u32::from(codes[i] >> 4)) * scale;
        }
    }
}

/// A sign, two bits of exponent and one of mantissa: 0, 0.5, 1, 1.5, 2, 3, 4 or 6, with a sign.
#[inline(always)]
fn e2m1(code: u32) -> f32 {
    let magnitude = (code & 7) << 22;
    let normal = f32::from_bits(magnitude + (126 << 23));
    // The two lowest have no leading one: give them one and take it away as a number.
    let subnormal = f32::from_bits(magnitude + (127 << 23)) - 1.0;
    let value = if code & 6 == 0 { subnormal } else { normal };
    f32::from_bits(value.to_bits() | (code & 8) << 28)
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
        const NUMBERS: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
        for (code, expected) in NUMBERS.into_iter().enumerate() {
            assert_eq!(e2m1(code as u32).to_bits(), expected.to_bits());
            assert_eq!(e2m1(code as u32 + 8).to_bits(), (-expected).to_bits());
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
