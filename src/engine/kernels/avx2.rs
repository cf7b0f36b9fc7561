//! The kernels' operations on AVX2 with fused multiply-add and F16C: 16 lanes are two registers.

use std::arch::x86_64::{
    __m128i, __m256, __m256i, _MM_HINT_T1, _mm_prefetch, _mm256_cvtph_ps, _mm256_dpbusd_avx_epi32,
};

use pulp::{Simd, WithSimd, cast, x86::V3};

use super::{Isa, Kernel, tiles::TILE};

/// The machine has these instructions; with `VNNI` those of byte products (AVX-VNNI), too.
#[derive(Debug, Clone, Copy)]
pub(in crate::engine) struct Avx2<const VNNI: bool>(V3);

/// Both halves of something.
#[inline(always)]
fn halves<const N: usize, const H: usize>(bytes: &[u8; N]) -> [&[u8; H]; 2] {
    const { assert!(2 * H == N) };
    let halves = bytes.as_chunks::<H>().0;
    [&halves[0], &halves[1]]
}

impl Avx2<false> {
    pub(super) fn detect() -> Option<Self> {
        // The token has all but one of the instruction sets.
        V3::try_new().filter(|_| is_x86_feature_detected!("f16c")).map(Self)
    }

    #[allow(unsafe_code)]
    pub(super) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx,avx2,fma,f16c,bmi1,bmi2,lzcnt,popcnt")]
        fn on<K: Kernel>(isa: Avx2<false>, kernel: K) -> K::Output {
            kernel.on(isa)
        }
        // SAFETY: the machine has all of these, since there is an `Avx2`, and only `detect` makes one.
        unsafe { on(self, kernel) }
    }

    pub(super) fn vectors<W: WithSimd>(self, work: W) -> W::Output {
        Simd::vectorize(self.0, work)
    }
}

impl Avx2<true> {
    pub(super) fn detect() -> Option<Self> {
        Avx2::<false>::detect().filter(|_| is_x86_feature_detected!("avxvnni")).map(|avx2| Self(avx2.0))
    }

    /// The same without byte products.
    pub(super) fn without_vnni(self) -> Avx2<false> {
        Avx2(self.0)
    }

    #[allow(unsafe_code)]
    pub(super) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        #[target_feature(enable = "avx,avx2,fma,f16c,bmi1,bmi2,lzcnt,popcnt,avxvnni")]
        fn on<K: Kernel>(isa: Avx2<true>, kernel: K) -> K::Output {
            kernel.on(isa)
        }
        // SAFETY: the machine has all of these, since there is an `Avx2<true>`, and only `detect` makes one.
        unsafe { on(self, kernel) }
    }
}

impl<const VNNI: bool> Avx2<VNNI> {
    #[allow(unsafe_code)]
    #[inline(always)]
    fn widen(self, halves: __m128i) -> __m256 {
        // SAFETY: the machine has F16C, since there is an `Avx2`, and only `detect` makes one.
        unsafe { _mm256_cvtph_ps(halves) }
    }

    #[inline(always)]
    fn words(self, bytes: &[u8; 4 * TILE]) -> [__m256i; 2] {
        let [a, b] = halves::<64, 32>(bytes);
        [cast(*a), cast(*b)]
    }

    #[inline(always)]
    fn row(self, row: [i8; 4]) -> __m256i {
        self.0.avx._mm256_set1_epi32(cast(row))
    }

    /// Adds the products of four neighbouring bytes each, those of `bytes` without a sign.
    #[allow(unsafe_code)]
    #[inline(always)]
    fn dot_bytes(self, sum: [__m256i; 2], bytes: [__m256i; 2], row: __m256i) -> [__m256i; 2] {
        // SAFETY: the machine has AVX-VNNI, since there is an `Avx2<true>`, and only `detect` makes one.
        unsafe { [_mm256_dpbusd_avx_epi32(sum[0], bytes[0], row), _mm256_dpbusd_avx_epi32(sum[1], bytes[1], row)] }
    }
}

impl<const VNNI: bool> Isa for Avx2<VNNI> {
    const IS_WIDE: bool = false;
    const OFFSET: i32 = if VNNI { 128 } else { 0 };
    type F = [__m256; 2];
    type I = [__m256i; 2];
    type B = [__m256i; 2];
    type S = [__m256i; 2];

    #[inline(always)]
    fn fetch(self, bytes: &[u8; 4 * TILE]) {
        fetch(bytes);
    }

    #[inline(always)]
    fn splat(self, value: f32) -> Self::F {
        [self.0.avx._mm256_set1_ps(value); 2]
    }

    #[inline(always)]
    fn load(self, values: &[f32; TILE]) -> Self::F {
        let [a, b] = *values.as_chunks::<8>().0 else { unreachable!("16 are twice 8") };
        [cast(a), cast(b)]
    }

    #[inline(always)]
    fn store(self, values: Self::F, to: &mut [f32; TILE]) {
        let to = to.as_chunks_mut::<8>().0;
        to[0] = cast(values[0]);
        to[1] = cast(values[1]);
    }

    #[inline(always)]
    fn transpose(self, rows: [&[f32; 8]; 8], at: usize, to: &mut [[f32; TILE]; 8]) {
        transpose(self.0, rows, at, to);
    }

    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        [self.0.avx._mm256_mul_ps(a[0], b[0]), self.0.avx._mm256_mul_ps(a[1], b[1])]
    }

    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        [self.0.fma._mm256_fmadd_ps(a[0], b[0], c[0]), self.0.fma._mm256_fmadd_ps(a[1], b[1], c[1])]
    }

    #[inline(always)]
    fn brains(self, pairs: &[u8; 4 * TILE], which: usize) -> Self::F {
        let [a, b] = self.words(pairs);
        let avx2 = self.0.avx2;
        if which == 0 {
            [cast(avx2._mm256_slli_epi32::<16>(a)), cast(avx2._mm256_slli_epi32::<16>(b))]
        } else {
            let upper = self.0.avx._mm256_set1_epi32(0xFFFF_0000_u32.cast_signed());
            [cast(avx2._mm256_and_si256(a, upper)), cast(avx2._mm256_and_si256(b, upper))]
        }
    }

    #[inline(always)]
    fn halves(self, bytes: &[u8; 2 * TILE]) -> Self::F {
        let [a, b] = halves::<32, 16>(bytes);
        [self.widen(cast(*a)), self.widen(cast(*b))]
    }

    #[inline(always)]
    fn unsigned(self, bytes: &[u8; TILE]) -> Self::F {
        let (a, b) = eights(bytes);
        let avx2 = self.0.avx2;
        self.to_f32([avx2._mm256_cvtepu8_epi32(a), avx2._mm256_cvtepu8_epi32(b)])
    }

    #[inline(always)]
    fn signed(self, bytes: &[u8; TILE]) -> Self::F {
        let (a, b) = eights(bytes);
        let avx2 = self.0.avx2;
        self.to_f32([avx2._mm256_cvtepi8_epi32(a), avx2._mm256_cvtepi8_epi32(b)])
    }

    #[inline(always)]
    fn powers(self, bytes: &[u8; TILE]) -> Self::F {
        let (a, b) = eights(bytes);
        let avx2 = self.0.avx2;
        let lowest = self.0.avx._mm256_set1_epi32(1 << 22);
        let a = avx2._mm256_slli_epi32::<23>(avx2._mm256_cvtepu8_epi32(a));
        let b = avx2._mm256_slli_epi32::<23>(avx2._mm256_cvtepu8_epi32(b));
        [cast(avx2._mm256_max_epi32(a, lowest)), cast(avx2._mm256_max_epi32(b, lowest))]
    }

    #[inline(always)]
    fn bytes(self, bytes: &[u8; 4 * TILE]) -> Self::B {
        self.words(bytes)
    }

    #[inline(always)]
    fn signed_bytes(self, bytes: &[u8; 4 * TILE]) -> Self::B {
        let [a, b] = self.words(bytes);
        if !VNNI {
            return [a, b];
        }
        let offset = self.0.avx._mm256_set1_epi8(i8::MIN);
        [self.0.avx2._mm256_xor_si256(a, offset), self.0.avx2._mm256_xor_si256(b, offset)]
    }

    #[inline(always)]
    fn low(self, bytes: Self::B) -> Self::B {
        let mask = self.0.avx._mm256_set1_epi8(15);
        [self.0.avx2._mm256_and_si256(bytes[0], mask), self.0.avx2._mm256_and_si256(bytes[1], mask)]
    }

    #[inline(always)]
    fn high(self, bytes: Self::B) -> Self::B {
        let avx2 = self.0.avx2;
        self.low([avx2._mm256_srli_epi16::<4>(bytes[0]), avx2._mm256_srli_epi16::<4>(bytes[1])])
    }

    #[inline(always)]
    fn two_bits(self, bytes: Self::B, which: usize) -> Self::B {
        let avx2 = self.0.avx2;
        let mask = self.0.avx._mm256_set1_epi8(0x30);
        let [a, b] = bytes;
        let [a, b] = match which {
            0 => [avx2._mm256_slli_epi16::<4>(a), avx2._mm256_slli_epi16::<4>(b)],
            1 => [avx2._mm256_slli_epi16::<2>(a), avx2._mm256_slli_epi16::<2>(b)],
            2 => [a, b],
            _ => [avx2._mm256_srli_epi16::<2>(a), avx2._mm256_srli_epi16::<2>(b)],
        };
        [avx2._mm256_and_si256(a, mask), avx2._mm256_and_si256(b, mask)]
    }

    #[inline(always)]
    fn or(self, a: Self::B, b: Self::B) -> Self::B {
        [self.0.avx2._mm256_or_si256(a[0], b[0]), self.0.avx2._mm256_or_si256(a[1], b[1])]
    }

    #[inline(always)]
    fn look_up(self, table: &[u8; 16], bytes: Self::B) -> Self::B {
        let avx2 = self.0.avx2;
        let table = avx2._mm256_broadcastsi128_si256(cast(*table));
        [avx2._mm256_shuffle_epi8(table, bytes[0]), avx2._mm256_shuffle_epi8(table, bytes[1])]
    }

    #[inline(always)]
    fn no_sum(self) -> Self::S {
        self.zeros()
    }

    #[inline(always)]
    fn dot(self, sum: Self::S, bytes: Self::B, row: [i8; 4]) -> Self::S {
        let avx2 = self.0.avx2;
        let row = self.row(row);
        if VNNI {
            return self.dot_bytes(sum, bytes, row);
        }
        [
            avx2._mm256_add_epi16(sum[0], avx2._mm256_maddubs_epi16(bytes[0], row)),
            avx2._mm256_add_epi16(sum[1], avx2._mm256_maddubs_epi16(bytes[1], row)),
        ]
    }

    #[inline(always)]
    fn total(self, sum: Self::S) -> Self::I {
        if VNNI {
            return sum;
        }
        let avx2 = self.0.avx2;
        let ones = self.0.avx._mm256_set1_epi16(1);
        [avx2._mm256_madd_epi16(sum[0], ones), avx2._mm256_madd_epi16(sum[1], ones)]
    }

    #[inline(always)]
    fn zeros(self) -> Self::I {
        self.splat_i(0)
    }

    #[inline(always)]
    fn splat_i(self, value: i32) -> Self::I {
        [self.0.avx._mm256_set1_epi32(value); 2]
    }

    #[inline(always)]
    fn add_i(self, a: Self::I, b: Self::I) -> Self::I {
        [self.0.avx2._mm256_add_epi32(a[0], b[0]), self.0.avx2._mm256_add_epi32(a[1], b[1])]
    }

    #[inline(always)]
    fn dot_signed(self, sum: Self::I, bytes: Self::B, row: [i8; 4]) -> Self::I {
        let avx2 = self.0.avx2;
        let row = self.row(row);
        if VNNI {
            return self.dot_bytes(sum, bytes, row);
        }
        // |w| · (x · sign w): the instruction wants one factor without a sign. A pair is at most 2 · 128 · 127 < 2^15.
        let a = avx2._mm256_maddubs_epi16(avx2._mm256_abs_epi8(bytes[0]), avx2._mm256_sign_epi8(row, bytes[0]));
        let b = avx2._mm256_maddubs_epi16(avx2._mm256_abs_epi8(bytes[1]), avx2._mm256_sign_epi8(row, bytes[1]));
        self.add_i(sum, self.total([a, b]))
    }

    #[inline(always)]
    fn to_f32(self, values: Self::I) -> Self::F {
        [self.0.avx._mm256_cvtepi32_ps(values[0]), self.0.avx._mm256_cvtepi32_ps(values[1])]
    }
}

/// Eight bytes each, with zeros behind them.
#[inline(always)]
fn eights(bytes: &[u8; TILE]) -> (__m128i, __m128i) {
    let whole = u128::from_le_bytes(*bytes);
    (cast(whole as u64 as u128), cast(whole >> 64))
}

/// Fetches a line of memory towards the level-2 cache.
#[allow(unsafe_code)]
#[inline(always)]
pub(super) fn fetch(bytes: &[u8; 4 * TILE]) {
    // SAFETY: a hint reads nothing, and every x86-64 processor takes it.
    unsafe { _mm_prefetch::<_MM_HINT_T1>(bytes.as_ptr().cast()) }
}

/// Rows and columns of eight vectors: pairs, then fours, then halves change places.
#[inline(always)]
pub(super) fn transpose(v3: V3, rows: [&[f32; 8]; 8], at: usize, to: &mut [[f32; TILE]; 8]) {
    let avx = v3.avx;
    let mut r: [__m256; 8] = [cast([0.0f32; 8]); 8];
    for (r, row) in r.iter_mut().zip(rows) {
        *r = cast(*row);
    }
    let mut pairs = r;
    for i in 0..4 {
        pairs[2 * i] = avx._mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        pairs[2 * i + 1] = avx._mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    let mut fours = pairs;
    for i in 0..2 {
        for j in 0..2 {
            let (a, b) = (pairs[4 * i + j], pairs[4 * i + j + 2]);
            fours[4 * i + 2 * j] = avx._mm256_shuffle_ps::<0b01_00_01_00>(a, b);
            fours[4 * i + 2 * j + 1] = avx._mm256_shuffle_ps::<0b11_10_11_10>(a, b);
        }
    }
    for i in 0..4 {
        let low = avx._mm256_permute2f128_ps::<0x20>(fours[i], fours[i + 4]);
        let high = avx._mm256_permute2f128_ps::<0x31>(fours[i], fours[i + 4]);
        to[i].as_chunks_mut::<8>().0[at / 8] = cast(low);
        to[i + 4].as_chunks_mut::<8>().0[at / 8] = cast(high);
    }
}
