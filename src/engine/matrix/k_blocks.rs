//! Blocks of 256 numbers: GGML's "K" formats and IQ4_XS.
//!
//! Each has sub-blocks of 16 or 32 numbers whose scales are small integers themselves, times an f16 for the block.

use super::blocks::{Block, bytes_at, from_table, half_at};

pub(super) struct Q2K;
pub(super) struct Q3K;
pub(super) struct Q4K;
pub(super) struct Q5K;
pub(super) struct Q6K;
pub(super) struct Iq4Xs;

impl Block<84, 256> for Q2K {
    /// 16 bytes of scales (lower half) and minima (upper half), 64 of numbers, and the two f16 that they are times.
    #[inline(always)]
    fn widen(block: &[u8; 84], numbers: &mut [f32; 256]) {
        let scales: [u8; 16] = bytes_at(block, 0);
        let (scale, minimum) = (half_at(block, 80), half_at(block, 82));
        for (index, numbers) in numbers.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            let (run, pair, side) = (index / 8, index % 8 / 2, index % 2);
            let codes: [u8; 16] = bytes_at(block, 16 + 32 * run + 16 * side);
            let both = scales[index];
            let (scale, minimum) = (scale * f32::from(both & 15), minimum * f32::from(both >> 4));
            for i in 0..16 {
                numbers[i] = scale * f32::from(codes[i] >> (2 * pair) & 3) - minimum;
            }
        }
    }
}

impl Block<110, 256> for Q3K {
    /// 32 bytes of the numbers' highest bits, 64 of their lower two, 12 of scales of 6 bits, and an f16.
    #[inline(always)]
    fn widen(block: &[u8; 110], numbers: &mut [f32; 256]) {
        let packed: [u8; 12] = bytes_at(block, 96);
        let scale = half_at(block, 108);
        for (index, numbers) in numbers.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            let (run, pair, side) = (index / 8, index % 8 / 2, index % 2);
            let low = packed[index % 8] >> (4 * (index / 8)) & 15;
            let high = packed[8 + index % 4] >> (2 * (index / 4)) & 3;
            let scale = scale * f32::from((low | high << 4) as i8 - 32);
            let codes: [u8; 16] = bytes_at(block, 32 + 32 * run + 16 * side);
            let highest: [u8; 16] = bytes_at(block, 16 * side);
            for i in 0..16 {
                let code = codes[i] >> (2 * pair) & 3 | (highest[i] >> (4 * run + pair) & 1) << 2;
                numbers[i] = scale * f32::from(code as i8 - 4);
            }
        }
    }
}

/// Scale and minimum `index` of the eight of each that 12 bytes hold, 6 bits each.
#[inline(always)]
fn scale_and_minimum(packed: &[u8; 12], index: usize) -> (f32, f32) {
    let (scale, minimum) = if index < 4 {
        (packed[index] & 63, packed[index + 4] & 63)
    } else {
        let (first, second) = (packed[index - 4], packed[index]);
        let both = packed[index + 4];
        (both & 15 | (first >> 6) << 4, both >> 4 | (second >> 6) << 4)
    };
    (f32::from(scale), f32::from(minimum))
}

impl Block<144, 256> for Q4K {
    /// Two f16, 12 bytes of scales and minima, 128 of numbers: 32 in the lower halves of 32 bytes, 32 in the upper ones.
    #[inline(always)]
    fn widen(block: &[u8; 144], numbers: &mut [f32; 256]) {
        let (scale, minimum) = (half_at(block, 0), half_at(block, 2));
        let packed = bytes_at(block, 4);
        for (index, numbers) in numbers.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            let codes: [u8; 32] = bytes_at(block, 16 + index / 2 * 32);
            let (own_scale, own_minimum) = scale_and_minimum(&packed, index);
            let (scale, minimum) = (scale * own_scale, minimum * own_minimum);
            let shift = index % 2 * 4;
            for i in 0..32 {
                numbers[i] = scale * f32::from(codes[i] >> shift & 15) - minimum;
            }
        }
    }
}

impl Block<176, 256> for Q5K {
    /// As [`Q4K`], with 32 bytes of the numbers' highest bits between scales and numbers.
    #[inline(always)]
    fn widen(block: &[u8; 176], numbers: &mut [f32; 256]) {
        let (scale, minimum) = (half_at(block, 0), half_at(block, 2));
        let packed = bytes_at(block, 4);
        let highest: [u8; 32] = bytes_at(block, 16);
        for (index, numbers) in numbers.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            let codes: [u8; 32] = bytes_at(block, 48 + index / 2 * 32);
            let (own_scale, own_minimum) = scale_and_minimum(&packed, index);
            let (scale, minimum) = (scale * own_scale, minimum * own_minimum);
            let shift = index % 2 * 4;
            for i in 0..32 {
                let code = codes[i] >> shift & 15 | (highest[i] >> index & 1) << 4;
                numbers[i] = scale * f32::from(code) - minimum;
            }
        }
    }
}

impl Block<210, 256> for Q6K {
    /// 128 bytes of the numbers' lower four bits, 64 of their upper two, 16 scales of 8 bits, and an f16.
    #[inline(always)]
    fn widen(block: &[u8; 210], numbers: &mut [f32; 256]) {
        let scales: [u8; 16] = bytes_at(block, 192);
        let scale = half_at(block, 208);
        for (index, numbers) in numbers.as_chunks_mut::<16>().0.iter_mut().enumerate() {
            let (run, quarter, side) = (index / 8, index % 8 / 2, index % 2);
            let low: [u8; 16] = bytes_at(block, 64 * run + 32 * (quarter % 2) + 16 * side);
            let high: [u8; 16] = bytes_at(block, 128 + 32 * run + 16 * side);
            let scale = scale * f32::from(scales[index] as i8);
            for i in 0..16 {
                let code = low[i] >> (4 * (quarter / 2)) & 15 | (high[i] >> (2 * quarter) & 3) << 4;
                numbers[i] = scale * f32::from(code as i8 - 32);
            }
        }
    }
}

impl Block<136, 256> for Iq4Xs {
    /// An f16, the scales' upper two bits, their lower four, and 128 bytes of numbers.
    #[inline(always)]
    fn widen(block: &[u8; 136], numbers: &mut [f32; 256]) {
        let scale = half_at(block, 0);
        let high = u16::from_le_bytes(bytes_at(block, 2));
        let low: [u8; 4] = bytes_at(block, 4);
        for (index, numbers) in numbers.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            let own = low[index / 2] >> (4 * (index % 2)) & 15 | ((high >> (2 * index) & 3) as u8) << 4;
            from_table(&bytes_at(block, 8 + 16 * index), numbers, scale * f32::from(own as i8 - 32));
        }
    }
}
