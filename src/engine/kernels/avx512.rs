//! The kernels' operations on AVX-512 (F and BW): 16 lanes are one register.

use std::arch::x86_64::{__m512, __m512i, _mm512_dpbusd_epi32};

use pulp::{NullaryFnOnce, cast, x86::V4};

use super::{
    Isa, Kernel,
    avx2::{fetch, transpose},
    portable::Portable,
    tiles::TILE,
};

/// The machine has these instructions; with `VNNI` those of byte products (AVX-512 VNNI), too.
#[derive(Debug, Clone, Copy)]
pub(in crate::engine) struct Avx512<const VNNI: bool>(V4);

/// A kernel on its way to [`V4::vectorize`].
struct On<K>(Avx512<false>, K);

impl<K: Kernel> NullaryFnOnce for On<K> {
    type Output = K::Output;

    #[inline(always)]
    fn call(self) -> K::Output {
        self.1.on(self.0)
    }
}

impl Avx512<false> {
    pub(super) fn detect() -> Option<Self> {
        V4::try_new().map(Self)
    }

    pub(super) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        self.0.vectorize(On(self, kernel))
    }
}

impl Avx512<true> {
    pub(super) fn detect() -> Option<Self> {
        V4::try_new().filter(|_| is_x86_feature_detected!("avx512vnni")).map(Self)
    }

    /// The same without byte products.
    pub(super) fn without_vnni(self) -> Avx512<false> {
        Avx512(self.0)
    }

    #[allow(unsafe_code)]
    pub(super) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx2,fma,bmi1,bmi2,lzcnt,popcnt")]
        #[target_feature(enable = "avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512vnni")]
        fn on<K: Kernel>(isa: Avx512<true>, kernel: K) -> K::Output {
            kernel.on(isa)
        }
        // SAFETY: the machine has all of these, since there is an `Avx512<true>`, and only `detect` makes one.
        unsafe { on(self, kernel) }
    }
}

impl<const VNNI: bool> Avx512<VNNI> {
    #[inline(always)]
    fn splat_bits(self, bits: u32) -> __m512i {
        self.0.avx512f._mm512_set1_epi32(bits.cast_signed())
    }

    #[inline(always)]
    fn row(self, row: [i8; 4]) -> __m512i {
        self.0.avx512f._mm512_set1_epi32(cast(row))
    }

    /// Adds the products of four neighbouring bytes each, those of `bytes` without a sign.
    #[allow(unsafe_code)]
    #[inline(always)]
    fn dot_bytes(self, sum: __m512i, bytes: __m512i, row: [i8; 4]) -> __m512i {
        // SAFETY: the machine has AVX-512 VNNI, since there is an `Avx512<true>`, and only `detect` makes one.
        unsafe { _mm512_dpbusd_epi32(sum, bytes, self.row(row)) }
    }
}

impl<const VNNI: bool> Isa for Avx512<VNNI> {
    const IS_WIDE: bool = true;
    const OFFSET: i32 = if VNNI { 128 } else { 0 };
    type F = __m512;
    type I = __m512i;
    type B = __m512i;
    type S = __m512i;

    #[inline(always)]
    fn fetch(self, bytes: &[u8; 4 * TILE]) {
        fetch(bytes);
    }

    #[inline(always)]
    fn splat(self, value: f32) -> Self::F {
        self.0.avx512f._mm512_set1_ps(value)
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
        transpose(*self.0, rows, at, to);
    }

    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        self.0.avx512f._mm512_mul_ps(a, b)
    }

    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        self.0.avx512f._mm512_fmadd_ps(a, b, c)
    }

    #[inline(always)]
    fn brains(self, pairs: &[u8; 4 * TILE], which: usize) -> Self::F {
        let f = self.0.avx512f;
        let pairs: __m512i = cast(*pairs);
        cast(if which == 0 {
            f._mm512_slli_epi32::<16>(pairs)
        } else {
            f._mm512_and_si512(pairs, self.splat_bits(0xFFFF_0000))
        })
    }

    #[inline(always)]
    fn halves(self, halves: &[u8; 2 * TILE]) -> Self::F {
        // Miri hasn't got the instruction.
        if cfg!(miri) { cast(Portable.halves(halves)) } else { self.0.avx512f._mm512_cvtph_ps(cast(*halves)) }
    }

    #[inline(always)]
    fn unsigned(self, bytes: &[u8; TILE]) -> Self::F {
        self.to_f32(self.0.avx512f._mm512_cvtepu8_epi32(cast(*bytes)))
    }

    #[inline(always)]
    fn signed(self, bytes: &[u8; TILE]) -> Self::F {
        self.to_f32(self.0.avx512f._mm512_cvtepi8_epi32(cast(*bytes)))
    }

    #[inline(always)]
    fn powers(self, bytes: &[u8; TILE]) -> Self::F {
        let f = self.0.avx512f;
        let codes = f._mm512_slli_epi32::<23>(f._mm512_cvtepu8_epi32(cast(*bytes)));
        cast(f._mm512_max_epi32(codes, self.splat_bits(1 << 22)))
    }

    #[inline(always)]
    fn bytes(self, bytes: &[u8; 4 * TILE]) -> Self::B {
        cast(*bytes)
    }

    #[inline(always)]
    fn signed_bytes(self, bytes: &[u8; 4 * TILE]) -> Self::B {
        let bytes = cast(*bytes);
        if VNNI { self.0.avx512f._mm512_xor_si512(bytes, self.splat_bits(0x8080_8080)) } else { bytes }
    }

    #[inline(always)]
    fn low(self, bytes: Self::B) -> Self::B {
        self.0.avx512f._mm512_and_si512(bytes, self.splat_bits(0x0F0F_0F0F))
    }

    #[inline(always)]
    fn high(self, bytes: Self::B) -> Self::B {
        self.low(self.0.avx512bw._mm512_srli_epi16::<4>(bytes))
    }

    #[inline(always)]
    fn two_bits(self, bytes: Self::B, which: usize) -> Self::B {
        let bw = self.0.avx512bw;
        let moved = match which {
            0 => bw._mm512_slli_epi16::<4>(bytes),
            1 => bw._mm512_slli_epi16::<2>(bytes),
            2 => bytes,
            _ => bw._mm512_srli_epi16::<2>(bytes),
        };
        self.0.avx512f._mm512_and_si512(moved, self.splat_bits(0x3030_3030))
    }

    #[inline(always)]
    fn or(self, a: Self::B, b: Self::B) -> Self::B {
        self.0.avx512f._mm512_or_si512(a, b)
    }

    #[inline(always)]
    fn look_up(self, table: &[u8; 16], bytes: Self::B) -> Self::B {
        let table = self.0.avx512f._mm512_broadcast_i32x4(cast(*table));
        self.0.avx512bw._mm512_shuffle_epi8(table, bytes)
    }

    #[inline(always)]
    fn no_sum(self) -> Self::S {
        self.zeros()
    }

    #[inline(always)]
    fn dot(self, sum: Self::S, bytes: Self::B, row: [i8; 4]) -> Self::S {
        if VNNI {
            return self.dot_bytes(sum, bytes, row);
        }
        let bw = self.0.avx512bw;
        bw._mm512_add_epi16(sum, bw._mm512_maddubs_epi16(bytes, self.row(row)))
    }

    #[inline(always)]
    fn total(self, sum: Self::S) -> Self::I {
        if VNNI {
            return sum;
        }
        let bw = self.0.avx512bw;
        bw._mm512_madd_epi16(sum, self.splat_bits(0x0001_0001))
    }

    #[inline(always)]
    fn zeros(self) -> Self::I {
        self.splat_bits(0)
    }

    #[inline(always)]
    fn splat_i(self, value: i32) -> Self::I {
        self.0.avx512f._mm512_set1_epi32(value)
    }

    #[inline(always)]
    fn add_i(self, a: Self::I, b: Self::I) -> Self::I {
        self.0.avx512f._mm512_add_epi32(a, b)
    }

    #[inline(always)]
    fn dot_signed(self, sum: Self::I, bytes: Self::B, row: [i8; 4]) -> Self::I {
        if VNNI {
            return self.dot_bytes(sum, bytes, row);
        }
        let bw = self.0.avx512bw;
        let row = self.row(row);
        // |w| · (x · sign w); what the sign is of a zero doesn't matter.
        let negative = bw._mm512_movepi8_mask(bytes);
        let signed = bw._mm512_mask_sub_epi8(row, negative, self.zeros(), row);
        self.add_i(sum, self.total(bw._mm512_maddubs_epi16(bw._mm512_abs_epi8(bytes), signed)))
    }

    #[inline(always)]
    fn to_f32(self, values: Self::I) -> Self::F {
        self.0.avx512f._mm512_cvtepi32_ps(values)
    }
}
