//! The kernels' operations without vector instructions of any name: arrays of 16, which compilers turn into whatever vectors
//! there are. What the other paths compute is defined here.

use super::{Isa, tiles::TILE};
use crate::engine::floats::{widen_brain, widen_half};

#[derive(Debug, Clone, Copy)]
pub(super) struct Portable;

#[inline(always)]
fn each<T: Copy + Default>(value: impl Fn(usize) -> T) -> [T; TILE] {
    let mut values = [T::default(); TILE];
    for (lane, to) in values.iter_mut().enumerate() {
        *to = value(lane);
    }
    values
}

#[inline(always)]
fn each_byte(value: impl Fn(usize) -> u8) -> [u8; 4 * TILE] {
    let mut bytes = [0; 4 * TILE];
    for (at, to) in bytes.iter_mut().enumerate() {
        *to = value(at);
    }
    bytes
}

#[inline(always)]
fn pair(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[2 * at], bytes[2 * at + 1]])
}

impl Isa for Portable {
    const IS_WIDE: bool = false;
    const OFFSET: i32 = 0;
    type F = [f32; TILE];
    type I = [i32; TILE];
    type B = [u8; 4 * TILE];
    type S = [i32; TILE];

    #[inline(always)]
    fn fetch(self, _: &[u8; 4 * TILE]) {}

    #[inline(always)]
    fn splat(self, value: f32) -> Self::F {
        [value; TILE]
    }

    #[inline(always)]
    fn load(self, values: &[f32; TILE]) -> Self::F {
        *values
    }

    #[inline(always)]
    fn store(self, values: Self::F, to: &mut [f32; TILE]) {
        *to = values;
    }

    #[inline(always)]
    fn transpose(self, rows: [&[f32; 8]; 8], at: usize, to: &mut [[f32; TILE]; 8]) {
        for (lane, row) in rows.iter().enumerate() {
            for (to, value) in to.iter_mut().zip(*row) {
                to[at + lane] = *value;
            }
        }
    }

    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        each(|lane| a[lane] * b[lane])
    }

    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        each(|lane| a[lane].mul_add(b[lane], c[lane]))
    }

    #[inline(always)]
    fn brains(self, pairs: &[u8; 4 * TILE], which: usize) -> Self::F {
        each(|lane| widen_brain(pair(pairs, 2 * lane + which)))
    }

    #[inline(always)]
    fn halves(self, halves: &[u8; 2 * TILE]) -> Self::F {
        each(|lane| widen_half(pair(halves, lane)))
    }

    #[inline(always)]
    fn unsigned(self, bytes: &[u8; TILE]) -> Self::F {
        each(|lane| f32::from(bytes[lane]))
    }

    #[inline(always)]
    fn signed(self, bytes: &[u8; TILE]) -> Self::F {
        each(|lane| f32::from(bytes[lane] as i8))
    }

    #[inline(always)]
    fn powers(self, bytes: &[u8; TILE]) -> Self::F {
        // The lowest code is a subnormal number.
        each(|lane| f32::from_bits((u32::from(bytes[lane]) << 23).max(1 << 22)))
    }

    #[inline(always)]
    fn bytes(self, bytes: &[u8; 4 * TILE]) -> Self::B {
        *bytes
    }

    #[inline(always)]
    fn signed_bytes(self, bytes: &[u8; 4 * TILE]) -> Self::B {
        *bytes
    }

    #[inline(always)]
    fn low(self, bytes: Self::B) -> Self::B {
        each_byte(|at| bytes[at] & 15)
    }

    #[inline(always)]
    fn high(self, bytes: Self::B) -> Self::B {
        each_byte(|at| bytes[at] >> 4)
    }

    #[inline(always)]
    fn two_bits(self, bytes: Self::B, which: usize) -> Self::B {
        each_byte(|at| (bytes[at] >> (2 * which) & 3) << 4)
    }

    #[inline(always)]
    fn or(self, a: Self::B, b: Self::B) -> Self::B {
        each_byte(|at| a[at] | b[at])
    }

    #[inline(always)]
    fn look_up(self, table: &[u8; 16], bytes: Self::B) -> Self::B {
        each_byte(|at| table[usize::from(bytes[at] & 15)])
    }

    #[inline(always)]
    fn no_sum(self) -> Self::S {
        [0; TILE]
    }

    #[inline(always)]
    fn dot(self, sum: Self::S, bytes: Self::B, row: [i8; 4]) -> Self::S {
        each(|lane| {
            let product = |at: usize| i32::from(bytes[4 * lane + at]) * i32::from(row[at]);
            sum[lane] + product(0) + product(1) + product(2) + product(3)
        })
    }

    #[inline(always)]
    fn total(self, sum: Self::S) -> Self::I {
        sum
    }

    #[inline(always)]
    fn zeros(self) -> Self::I {
        [0; TILE]
    }

    #[inline(always)]
    fn splat_i(self, value: i32) -> Self::I {
        [value; TILE]
    }

    #[inline(always)]
    fn add_i(self, a: Self::I, b: Self::I) -> Self::I {
        each(|lane| a[lane].wrapping_add(b[lane]))
    }

    #[inline(always)]
    fn dot_signed(self, sum: Self::I, bytes: Self::B, row: [i8; 4]) -> Self::I {
        each(|lane| {
            let product = |at: usize| i32::from(bytes[4 * lane + at] as i8) * i32::from(row[at]);
            sum[lane] + product(0) + product(1) + product(2) + product(3)
        })
    }

    #[inline(always)]
    fn to_f32(self, values: Self::I) -> Self::F {
        each(|lane| values[lane] as f32)
    }
}
