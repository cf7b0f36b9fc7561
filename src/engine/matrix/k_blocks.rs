//! Blocks of 256 numbers: GGML's "K" formats and IQ4_XS.
//!
//! Each has sub-blocks of 16 or 32 numbers whose scales are small integers themselves, times an f16 for the block.

use std::hint::black_box;

use super::blocks::{Block, bytes_at, from_table, half_at, less, nibbles, scaled, scaled_from};

pub(super) struct Q2K;
pub(super) struct Q3K;
pub(super) struct Q4K;
pub(super) struct Q5K;
pub(super) struct Q6K;
pub(super) struct Iq4Xs;

/// Some bits of every byte. (A loop: what closures of the standard library's functions do isn't always inlined here.)
#[inline(always)]
fn bits<const SHIFT: u32, const MASK: u8, const N: usize>(bytes: &[u8; N]) -> [u8; N] {
    let mut found = [0; N];
    for i in 0..N {
        found[i] = bytes[i] >> SHIFT & MASK;
    }
    found
}

/// Lower bits of codes together with the upper ones, which are `SHIFT` further up.
#[inline(always)]
fn with_upper<const SHIFT: u32, const N: usize>(mut lower: [u8; N], upper: [u8; N]) -> [u8; N] {
    for i in 0..N {
        lower[i] |= upper[i] << SHIFT;
    }
    lower
}

impl Block<84, 256> for Q2K {
    /// 16 bytes of scales (lower half) and minima (upper half), 64 of numbers, and the two f16 that they are times.
    #[inline(always)]
    fn widen(block: &[u8; 84], numbers: &mut [f32; 256]) {
        let (scale, minimum) = (half_at(block, 80), half_at(block, 82));
        for (run, numbers) in numbers.as_chunks_mut::<128>().0.iter_mut().enumerate() {
            let block = black_box(block);
            let codes: [u8; 32] = bytes_at(block, 16 + 32 * run);
            let each = [
                bits::<0, 3, 32>(&codes),
                bits::<2, 3, 32>(&codes),
                bits::<4, 3, 32>(&codes),
                bits::<6, 3, 32>(&codes),
            ];
            for (index, (codes, numbers)) in
                each.as_flattened().as_chunks().0.iter().zip(numbers.as_chunks_mut::<16>().0).enumerate()
            {
                let both = black_box(block)[8 * run + index];
                scaled_from::<16>(codes, numbers, scale * f32::from(both & 15), -(minimum * f32::from(both >> 4)));
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
        let highest: [u8; 32] = bytes_at(block, 0);
        for (run, numbers) in numbers.as_chunks_mut::<128>().0.iter_mut().enumerate() {
            let block = black_box(block);
            let codes: [u8; 32] = bytes_at(block, 32 + 32 * run);
            let mut highest = highest;
            for bits in &mut highest {
                *bits >>= 4 * run;
            }
            let each = [
                with_upper::<2, 32>(bits::<0, 3, 32>(&codes), bits::<0, 1, 32>(&highest)),
                with_upper::<2, 32>(bits::<2, 3, 32>(&codes), bits::<1, 1, 32>(&highest)),
                with_upper::<2, 32>(bits::<4, 3, 32>(&codes), bits::<2, 1, 32>(&highest)),
                with_upper::<2, 32>(bits::<6, 3, 32>(&codes), bits::<3, 1, 32>(&highest)),
            ];
            for (index, (codes, numbers)) in
                each.as_flattened().as_chunks().0.iter().zip(numbers.as_chunks_mut::<16>().0).enumerate()
            {
                let packed = black_box(&packed);
                let (low, high) =
                    (packed[index] >> (4 * run) & 15, packed[8 + index % 4] >> (4 * run + index / 4 * 2) & 3);
                scaled::<16>(&less(*codes, 4), numbers, scale * f32::from((low | high << 4) as i8 - 32));
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
        for (run, numbers) in numbers.as_chunks_mut::<64>().0.iter_mut().enumerate() {
            let codes: [u8; 32] = bytes_at(black_box(block), 16 + 32 * run);
            let each = [bits::<0, 15, 32>(&codes), bits::<4, 15, 32>(&codes)];
            for (index, (codes, numbers)) in each.iter().zip(numbers.as_chunks_mut::<32>().0).enumerate() {
                let (own_scale, own_minimum) = scale_and_minimum(black_box(&packed), 2 * run + index);
                scaled_from(codes, numbers, scale * own_scale, -(minimum * own_minimum));
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
        let mut highest: [u8; 32] = bytes_at(block, 16);
        for (run, numbers) in numbers.as_chunks_mut::<64>().0.iter_mut().enumerate() {
            let codes: [u8; 32] = bytes_at(black_box(block), 48 + 32 * run);
            let each = [
                with_upper::<4, 32>(bits::<0, 15, 32>(&codes), bits::<0, 1, 32>(&highest)),
                with_upper::<4, 32>(bits::<4, 15, 32>(&codes), bits::<1, 1, 32>(&highest)),
            ];
            highest = bits::<2, 63, 32>(&highest);
            for (index, (codes, numbers)) in each.iter().zip(numbers.as_chunks_mut::<32>().0).enumerate() {
                let (own_scale, own_minimum) = scale_and_minimum(black_box(&packed), 2 * run + index);
                scaled_from(codes, numbers, scale * own_scale, -(minimum * own_minimum));
            }
        }
    }
}

impl Block<210, 256> for Q6K {
    /// 128 bytes of the numbers' lower four bits, 64 of their upper two, 16 scales of 8 bits, and an f16.
    #[inline(always)]
    fn widen(block: &[u8; 210], numbers: &mut [f32; 256]) {
        let scale = half_at(block, 208);
        for (run, numbers) in numbers.as_chunks_mut::<128>().0.iter_mut().enumerate() {
            let block = black_box(block);
            let (low, more): ([u8; 32], [u8; 32]) = (bytes_at(block, 64 * run), bytes_at(block, 64 * run + 32));
            let high: [u8; 32] = bytes_at(block, 128 + 32 * run);
            let each = [
                with_upper::<4, 32>(bits::<0, 15, 32>(&low), bits::<0, 3, 32>(&high)),
                with_upper::<4, 32>(bits::<0, 15, 32>(&more), bits::<2, 3, 32>(&high)),
                with_upper::<4, 32>(bits::<4, 15, 32>(&low), bits::<4, 3, 32>(&high)),
                with_upper::<4, 32>(bits::<4, 15, 32>(&more), bits::<6, 3, 32>(&high)),
            ];
            for (index, (codes, numbers)) in
                each.as_flattened().as_chunks().0.iter().zip(numbers.as_chunks_mut::<16>().0).enumerate()
            {
                let own = black_box(block)[192 + 8 * run + index] as i8;
                scaled::<16>(&less(*codes, 32), numbers, scale * f32::from(own));
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
            let scale = scale * f32::from(own as i8 - 32);
            scaled(&from_table(nibbles(&bytes_at(black_box(block), 8 + 16 * index))), numbers, scale);
        }
    }
}
