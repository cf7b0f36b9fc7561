//! The kernels' operations on NEON: 16 lanes are four of 32 registers. Every 64-bit processor of Arm's has it; most since 2018 also have
//! dot products of bytes.

use std::arch::{
    aarch64::{
        float32x4_t, int8x16_t, int32x4_t, uint8x16_t, uint16x8_t, uint32x4_t, vcvt_f32_f16, vcvt_high_f32_f16,
        vget_low_f16, vreinterpretq_f16_u16,
    },
    asm,
};

use pulp::{cast, core_arch::aarch64};

use super::{Isa, Kernel, tiles::TILE};

/// The machine has these instructions; with `DOT` those of byte products (`dotprod`), too.
#[derive(Debug, Clone, Copy)]
pub(in crate::engine) struct Neon<const DOT: bool>(aarch64::Neon);

impl Neon<false> {
    pub(super) fn detect() -> Option<Self> {
        aarch64::Neon::try_new().map(Self)
    }

    /// Needs no function of its own: programs for these processors may use NEON everywhere.
    #[inline(always)]
    pub(super) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        kernel.on(self)
    }
}

impl Neon<true> {
    pub(super) fn detect() -> Option<Self> {
        aarch64::Neon::try_new().filter(|_| std::arch::is_aarch64_feature_detected!("dotprod")).map(Self)
    }

    /// The same without byte products.
    pub(super) fn without_dot(self) -> Neon<false> {
        Neon(self.0)
    }

    #[allow(unsafe_code)]
    pub(super) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "neon,dotprod")]
        fn on<K: Kernel>(isa: Neon<true>, kernel: K) -> K::Output {
            kernel.on(isa)
        }
        // SAFETY: the machine has both, since there is a `Neon<true>`, and only `detect` makes one.
        unsafe { on(self, kernel) }
    }
}

/// Calls a function for each of four registers.
#[inline(always)]
fn four<T: Copy, U: Copy>(of: [T; 4], each: impl Fn(T) -> U) -> [U; 4] {
    let [a, b, c, d] = of;
    [each(a), each(b), each(c), each(d)]
}

#[inline(always)]
fn pairs<T: Copy, U: Copy, V: Copy>(a: [T; 4], b: [U; 4], each: impl Fn(T, U) -> V) -> [V; 4] {
    [each(a[0], b[0]), each(a[1], b[1]), each(a[2], b[2]), each(a[3], b[3])]
}

/// Adds the products of four neighbouring bytes each. (The standard library's function is not stable yet.)
#[allow(unsafe_code)]
#[target_feature(enable = "neon,dotprod")]
#[inline]
fn dot_product(mut sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
    // SAFETY: registers in, a register out.
    unsafe {
        asm!("sdot {0:v}.4s, {1:v}.16b, {2:v}.16b", inout(vreg) sum, in(vreg) a, in(vreg) b,
            options(pure, nomem, nostack, preserves_flags));
    }
    sum
}

impl<const DOT: bool> Neon<DOT> {
    #[inline(always)]
    fn words(self, bytes: &[u8; 4 * TILE]) -> [uint32x4_t; 4] {
        cast(*bytes)
    }

    #[inline(always)]
    fn widen_bytes(self, bytes: &[u8; TILE]) -> [uint32x4_t; 4] {
        let bytes: uint8x16_t = cast(*bytes);
        let (low, high) = (self.0.vmovl_u8(self.0.vget_low_u8(bytes)), self.0.vmovl_high_u8(bytes));
        let wide = |half: uint16x8_t| [self.0.vmovl_u16(self.0.vget_low_u16(half)), self.0.vmovl_high_u16(half)];
        let ([a, b], [c, d]) = (wide(low), wide(high));
        [a, b, c, d]
    }

    #[inline(always)]
    fn row(self, row: [i8; 4]) -> int8x16_t {
        cast(self.0.vdupq_n_s32(cast(row)))
    }

    /// Adds the products of four neighbouring bytes each; pairs of them are below 2^15.
    #[allow(unsafe_code)]
    #[inline(always)]
    fn dot_bytes(self, sum: int32x4_t, a: int8x16_t, b: int8x16_t) -> int32x4_t {
        if DOT {
            // SAFETY: the machine has `dotprod`, since there is a `Neon<true>`, and only `detect` makes one.
            return unsafe { dot_product(sum, a, b) };
        }
        let low = self.0.vmull_s8(self.0.vget_low_s8(a), self.0.vget_low_s8(b));
        self.0.vpadalq_s16(sum, self.0.vpaddq_s16(low, self.0.vmull_high_s8(a, b)))
    }

    /// Rows and columns of a square of four.
    #[inline(always)]
    fn transpose_four(self, rows: [float32x4_t; 4]) -> [float32x4_t; 4] {
        let [a, b, c, d] = rows;
        let ab = [cast(self.0.vtrn1q_f32(a, b)), cast(self.0.vtrn2q_f32(a, b))];
        let cd = [cast(self.0.vtrn1q_f32(c, d)), cast(self.0.vtrn2q_f32(c, d))];
        [
            cast(self.0.vtrn1q_f64(ab[0], cd[0])),
            cast(self.0.vtrn1q_f64(ab[1], cd[1])),
            cast(self.0.vtrn2q_f64(ab[0], cd[0])),
            cast(self.0.vtrn2q_f64(ab[1], cd[1])),
        ]
    }
}

impl<const DOT: bool> Isa for Neon<DOT> {
    const IS_WIDE: bool = false;
    const OFFSET: i32 = 0;
    type F = [float32x4_t; 4];
    type I = [int32x4_t; 4];
    type B = [uint8x16_t; 4];
    type S = [int32x4_t; 4];

    #[allow(unsafe_code)]
    #[inline(always)]
    fn fetch(self, bytes: &[u8; 4 * TILE]) {
        // SAFETY: a hint reads nothing.
        unsafe { asm!("prfm pldl2keep, [{}]", in(reg) bytes, options(readonly, nostack, preserves_flags)) }
    }

    #[inline(always)]
    fn splat(self, value: f32) -> Self::F {
        [self.0.vdupq_n_f32(value); 4]
    }

    #[inline(always)]
    fn load(self, values: &[f32; TILE]) -> Self::F {
        cast(*values)
    }

    #[inline(always)]
    fn store(self, values: Self::F, to: &mut [f32; TILE]) {
        *to = cast(values);
    }

    #[inline(always)]
    fn transpose(self, rows: [&[f32; 8]; 8], at: usize, to: &mut [[f32; TILE]; 8]) {
        let row = |row: usize, half: usize| cast(rows[row].as_chunks::<4>().0[half]);
        for half in 0..2 {
            for first in [0, 4] {
                let square = [row(first, half), row(first + 1, half), row(first + 2, half), row(first + 3, half)];
                for (to, column) in to[4 * half..].iter_mut().zip(self.transpose_four(square)) {
                    to.as_chunks_mut::<4>().0[(at + first) / 4] = cast(column);
                }
            }
        }
    }

    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        pairs(a, b, |a, b| self.0.vmulq_f32(a, b))
    }

    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        let fma = |at: usize| self.0.vfmaq_f32(c[at], a[at], b[at]);
        [fma(0), fma(1), fma(2), fma(3)]
    }

    #[inline(always)]
    fn brains(self, pairs: &[u8; 4 * TILE], which: usize) -> Self::F {
        let upper = self.0.vdupq_n_u32(0xFFFF_0000);
        four(self.words(pairs), |pairs| {
            cast(if which == 0 { self.0.vshlq_n_u32::<16>(pairs) } else { self.0.vandq_u32(pairs, upper) })
        })
    }

    #[allow(unsafe_code)]
    #[inline(always)]
    fn halves(self, halves: &[u8; 2 * TILE]) -> Self::F {
        let [a, b]: [uint16x8_t; 2] = cast(*halves);
        // SAFETY: the machine has NEON, since there is a `Neon`, and only `detect` makes one.
        unsafe {
            let (a, b) = (vreinterpretq_f16_u16(a), vreinterpretq_f16_u16(b));
            [vcvt_f32_f16(vget_low_f16(a)), vcvt_high_f32_f16(a), vcvt_f32_f16(vget_low_f16(b)), vcvt_high_f32_f16(b)]
        }
    }

    #[inline(always)]
    fn unsigned(self, bytes: &[u8; TILE]) -> Self::F {
        four(self.widen_bytes(bytes), |bytes| self.0.vcvtq_f32_u32(bytes))
    }

    #[inline(always)]
    fn signed(self, bytes: &[u8; TILE]) -> Self::F {
        // The sign is the highest bit of a byte's place in its 32 bits, and comes down with it.
        four(self.widen_bytes(bytes), |bytes| {
            let high: int32x4_t = cast(self.0.vshlq_n_u32::<24>(bytes));
            self.0.vcvtq_f32_s32(self.0.vshrq_n_s32::<24>(high))
        })
    }

    #[inline(always)]
    fn powers(self, bytes: &[u8; TILE]) -> Self::F {
        let lowest = self.0.vdupq_n_u32(1 << 22);
        four(self.widen_bytes(bytes), |bytes| cast(self.0.vmaxq_u32(self.0.vshlq_n_u32::<23>(bytes), lowest)))
    }

    #[inline(always)]
    fn bytes(self, bytes: &[u8; 4 * TILE]) -> Self::B {
        cast(*bytes)
    }

    #[inline(always)]
    fn signed_bytes(self, bytes: &[u8; 4 * TILE]) -> Self::B {
        cast(*bytes)
    }

    #[inline(always)]
    fn low(self, bytes: Self::B) -> Self::B {
        let mask = self.0.vdupq_n_u8(15);
        four(bytes, |bytes| self.0.vandq_u8(bytes, mask))
    }

    #[inline(always)]
    fn high(self, bytes: Self::B) -> Self::B {
        four(bytes, |bytes| self.0.vshrq_n_u8::<4>(bytes))
    }

    #[inline(always)]
    fn two_bits(self, bytes: Self::B, which: usize) -> Self::B {
        let mask = self.0.vdupq_n_u8(0x30);
        four(bytes, |bytes| {
            let moved = match which {
                0 => self.0.vshlq_n_u8::<4>(bytes),
                1 => self.0.vshlq_n_u8::<2>(bytes),
                2 => bytes,
                _ => self.0.vshrq_n_u8::<2>(bytes),
            };
            self.0.vandq_u8(moved, mask)
        })
    }

    #[inline(always)]
    fn or(self, a: Self::B, b: Self::B) -> Self::B {
        pairs(a, b, |a, b| self.0.vorrq_u8(a, b))
    }

    #[inline(always)]
    fn look_up(self, table: &[u8; 16], bytes: Self::B) -> Self::B {
        let table = cast(*table);
        four(bytes, |bytes| self.0.vqtbl1q_u8(table, bytes))
    }

    #[inline(always)]
    fn no_sum(self) -> Self::S {
        self.zeros()
    }

    #[inline(always)]
    fn dot(self, sum: Self::S, bytes: Self::B, row: [i8; 4]) -> Self::S {
        // So small that they have no sign either way.
        self.dot_signed(sum, bytes, row)
    }

    #[inline(always)]
    fn total(self, sum: Self::S) -> Self::I {
        sum
    }

    #[inline(always)]
    fn zeros(self) -> Self::I {
        self.splat_i(0)
    }

    #[inline(always)]
    fn splat_i(self, value: i32) -> Self::I {
        [self.0.vdupq_n_s32(value); 4]
    }

    #[inline(always)]
    fn add_i(self, a: Self::I, b: Self::I) -> Self::I {
        pairs(a, b, |a, b| self.0.vaddq_s32(a, b))
    }

    #[inline(always)]
    fn dot_signed(self, sum: Self::I, bytes: Self::B, row: [i8; 4]) -> Self::I {
        let row = self.row(row);
        pairs(sum, four(bytes, cast), |sum, bytes| self.dot_bytes(sum, bytes, row))
    }

    #[inline(always)]
    fn to_f32(self, values: Self::I) -> Self::F {
        four(values, |values| self.0.vcvtq_f32_s32(values))
    }
}
