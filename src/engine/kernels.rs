//! The CPU's kernels: products of rows with packed matrices.
//!
//! # Tiles
//!
//! A matrix is packed at load into tiles of [`TILE`] outputs (`kernels/tiles.rs`), in which the weights of the 16 outputs for one
//! input, or for a few, lie side by side. So an output is a lane of a vector, and its sum is **one chain over the inputs, from
//! first to last**, whatever the width of the machine's vectors, the number of rows beside it, the number of threads, or
//! the place of the output in its matrix. A result is the same bit for bit in every batch and on every instruction set.
//!
//! # Two kinds of products
//!
//! | weights | rows | a link of the chain |
//! |---|---|---|
//! | f32, bf16, f16 (`kernels/floats.rs`) | f32 | one fused multiply-add for each input |
//! | q8_0, q4_0, q4_k, q6_k, mxfp4 (`kernels/blocks.rs`) | 8-bit codes and an f32 scale for each 32 numbers (`kernels/rows.rs`) | the integer sum of a block of 32 inputs (16 in q6_k), which is exact, scaled by one fused multiply-add |
//!
//! The second kind rounds the rows, as llama.cpp does. It runs only in engines whose dtype is bf16 or f16; in an f32 engine packed
//! matrices are widened, and rows stay what they are.
//!
//! # Instruction sets
//!
//! The bodies are written once, over [`Isa`]: some twenty operations on 16 lanes, which are two registers of AVX2, one of
//! AVX-512, four of NEON, or an array that the compiler makes the best of ([`Portable`]). They hold next to no `unsafe`: pulp's
//! tokens prove that the instructions are there.
//!
//! | path | processors | products of bytes |
//! |---|---|---|
//! | `portable` | all | one by one |
//! | `avx2` | AMD's and Intel's since 2013–15 | `vpmaddubsw` in pairs of 16 bits |
//! | `avx2-vnni` | Intel's without AVX-512 since 2021 | `vpdpbusd` |
//! | `avx512` | Intel's servers since 2017 | `vpmaddubsw` |
//! | `avx512-vnni` | Intel's servers since 2019, AMD's since 2022 | `vpdpbusd` |
//! | `neon` | Arm's with 64 bits | `smull`, in pairs of 16 bits |
//! | `neon-dot` | most of these since 2018 | `sdot` |
//!
//! Pairs in 16 bits are why [`Isa::dot`] has a limit: `vpmaddubsw` saturates. `vpdpbusd` (not `vpdpbusds`) and `sdot` add in 32 bits, and nothing
//! here comes near their end. Not used are dot products of bf16, which round rows and would make results depend on the machine.
//!
//! The tests run every path that the machine has, and take the others on emulators: Miri interprets AVX2, AVX-512 and VNNI, and
//! QEMU runs NEON (`tests/kernels.sh`). `HELION_KERNELS=portable`, or another name, chooses a path other than the best one.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod blocks;
mod fetching;
mod floats;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;
mod rows;
mod tiles;

use std::sync::OnceLock;

#[cfg(target_arch = "x86_64")]
use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
use avx512::Avx512;
#[cfg(target_arch = "aarch64")]
use neon::Neon;
use portable::Portable;
use pulp::{Arch, Scalar, WithSimd};
pub(super) use rows::{FloatRows, Rows, Slot, cut, fill_all, grown};
pub(super) use tiles::{Layout, TILE};

/// What the environment variable that chooses a path is called.
const PATH_VARIABLE: &str = "HELION_KERNELS";

/// The operations of an instruction set on 16 lanes, one for each output of a tile.
pub(super) trait Isa: Copy + Send + Sync + 'static {
    /// Has 32 vector registers that hold 16 lanes each, rather than 16 that hold 8.
    const IS_WIDE: bool;
    /// What [`Isa::signed_bytes`] adds to each byte.
    const OFFSET: i32;
    /// 16 numbers.
    type F: Copy;
    /// 16 integers of 32 bits.
    type I: Copy;
    /// 64 bytes, four for each output.
    type B: Copy;
    /// Sums of products of bytes, narrower than 32 bits where that is faster.
    type S: Copy;

    /// Fetches bytes that will be read soon, where that can be asked for.
    fn fetch(self, bytes: &[u8; 4 * TILE]);

    fn splat(self, value: f32) -> Self::F;
    fn load(self, values: &[f32; TILE]) -> Self::F;
    fn store(self, values: Self::F, to: &mut [f32; TILE]);
    /// Rows and columns of a square of eight, the first of which go to `to[_][at..at + 8]`.
    fn transpose(self, rows: [&[f32; 8]; 8], at: usize, to: &mut [[f32; TILE]; 8]);
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a · b + c`, rounded once.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;

    /// bf16 numbers for two inputs, next to each other: those of input `which`.
    fn brains(self, pairs: &[u8; 4 * TILE], which: usize) -> Self::F;
    /// f16 numbers.
    fn halves(self, halves: &[u8; 2 * TILE]) -> Self::F;
    /// Integers from 0 to 255.
    fn unsigned(self, bytes: &[u8; TILE]) -> Self::F;
    /// Integers from -128 to 127.
    fn signed(self, bytes: &[u8; TILE]) -> Self::F;
    /// Powers of two as E8M0 codes: `2^(code - 127)`.
    fn powers(self, bytes: &[u8; TILE]) -> Self::F;

    fn bytes(self, bytes: &[u8; 4 * TILE]) -> Self::B;
    /// Signed bytes, as [`Isa::dot_signed`] takes them: more by [`Isa::OFFSET`], where it has instructions for unsigned ones only.
    fn signed_bytes(self, bytes: &[u8; 4 * TILE]) -> Self::B;
    /// The lower four bits of each byte.
    fn low(self, bytes: Self::B) -> Self::B;
    /// The upper four bits of each byte.
    fn high(self, bytes: Self::B) -> Self::B;
    /// Bits `2 · which` and the next of each byte, in the places of bits 4 and 5.
    fn two_bits(self, bytes: Self::B, which: usize) -> Self::B;
    fn or(self, a: Self::B, b: Self::B) -> Self::B;
    /// What the table holds at each byte, which are below 16.
    fn look_up(self, table: &[u8; 16], bytes: Self::B) -> Self::B;

    fn no_sum(self) -> Self::S;
    /// Adds the products of unsigned bytes with four signed ones, which are the same for all outputs.
    ///
    /// A path may keep a sum of pairs in 16 bits: between [`Isa::no_sum`] and [`Isa::total`], the largest byte times the number of calls is at
    /// most 128 (as `128 · 127 · 2 < 2^15`).
    fn dot(self, sum: Self::S, bytes: Self::B, row: [i8; 4]) -> Self::S;
    /// The sums in full.
    fn total(self, sum: Self::S) -> Self::I;

    fn zeros(self) -> Self::I;
    fn splat_i(self, value: i32) -> Self::I;
    fn add_i(self, a: Self::I, b: Self::I) -> Self::I;
    /// Adds the products of what [`Isa::signed_bytes`] made with four signed ones from -127 on, which are the same for all outputs.
    fn dot_signed(self, sum: Self::I, bytes: Self::B, row: [i8; 4]) -> Self::I;
    fn to_f32(self, values: Self::I) -> Self::F;
}

/// Something to be done on an instruction set. Implementations are `#[inline(always)]`, down to the last function that
/// takes an [`Isa`]: what isn't inlined would be compiled for the oldest processors.
pub(super) trait Kernel {
    type Output;
    fn on<A: Isa>(self, isa: A) -> Self::Output;
}

/// An instruction set that this machine has.
#[derive(Debug, Clone, Copy)]
pub(super) enum Path {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2<false>),
    #[cfg(target_arch = "x86_64")]
    Avx2Vnni(Avx2<true>),
    #[cfg(target_arch = "x86_64")]
    Avx512(Avx512<false>),
    #[cfg(target_arch = "x86_64")]
    Avx512Vnni(Avx512<true>),
    #[cfg(target_arch = "aarch64")]
    Neon(Neon<false>),
    #[cfg(target_arch = "aarch64")]
    NeonDot(Neon<true>),
}

/// The environment asks for kernels that this machine hasn't got.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{PATH_VARIABLE}={asked} is not a path of this machine: it has {}; unset it for the best one", known.join(", "))]
pub struct UnknownKernels {
    asked: String,
    known: Vec<&'static str>,
}

impl Path {
    /// The one that kernels run on: the best, unless the environment says otherwise.
    pub(super) fn chosen() -> Self {
        static CHOSEN: OnceLock<Path> = OnceLock::new();
        *CHOSEN.get_or_init(|| {
            let asked = Self::asked().unwrap_or_else(|error| {
                tracing::error!("{error}; the best one is used");
                None
            });
            asked.or_else(|| Self::all().last().copied()).unwrap_or(Self::Portable)
        })
    }

    /// The one that the environment asks for.
    pub(super) fn asked() -> Result<Option<Self>, UnknownKernels> {
        let asked = std::env::var(PATH_VARIABLE).unwrap_or_default();
        if asked.is_empty() || asked == "auto" {
            return Ok(None);
        }
        let all = Self::all();
        let found = all.iter().copied().find(|path| path.name() == asked);
        found.map(Some).ok_or_else(|| UnknownKernels { asked, known: all.iter().map(Self::name).collect() })
    }

    /// All that this machine has, the best one last.
    pub(super) fn all() -> Vec<Self> {
        #[cfg(target_arch = "x86_64")]
        let others = [
            Avx2::<false>::detect().map(Self::Avx2),
            Avx2::<true>::detect().map(Self::Avx2Vnni),
            Avx512::<false>::detect().map(Self::Avx512),
            Avx512::<true>::detect().map(Self::Avx512Vnni),
        ];
        #[cfg(target_arch = "aarch64")]
        let others = [Neon::<false>::detect().map(Self::Neon), Neon::<true>::detect().map(Self::NeonDot)];
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        let others: [Option<Self>; 0] = [];
        [Self::Portable].into_iter().chain(others.into_iter().flatten()).collect()
    }

    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2Vnni(_) => "avx2-vnni",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(_) => "avx512",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni(_) => "avx512-vnni",
            #[cfg(target_arch = "aarch64")]
            Self::Neon(_) => "neon",
            #[cfg(target_arch = "aarch64")]
            Self::NeonDot(_) => "neon-dot",
        }
    }

    /// Rows that the products of floating point numbers take at a time.
    fn float_rows(self) -> usize {
        if self.is_wide() { 12 } else { 6 }
    }

    /// Rows that the products of blocks take at a time.
    fn block_rows(self) -> usize {
        if self.is_wide() { 8 } else { 4 }
    }

    fn is_wide(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        if matches!(self, Self::Avx512(_) | Self::Avx512Vnni(_)) {
            return true;
        }
        false
    }

    /// Runs what has no products of bytes.
    #[inline(always)]
    fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            Self::Portable => kernel.on(Portable),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(avx2) => avx2.run(kernel),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2Vnni(avx2) => avx2.without_vnni().run(kernel),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(avx512) => avx512.run(kernel),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni(avx512) => avx512.without_vnni().run(kernel),
            #[cfg(target_arch = "aarch64")]
            Self::Neon(neon) => neon.run(kernel),
            #[cfg(target_arch = "aarch64")]
            Self::NeonDot(neon) => neon.without_dot().run(kernel),
        }
    }

    /// Runs what has products of bytes, with the instructions for them.
    #[inline(always)]
    fn run_on_bytes<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx2Vnni(avx2) => avx2.run(kernel),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Vnni(avx512) => avx512.run(kernel),
            #[cfg(target_arch = "aarch64")]
            Self::NeonDot(neon) => neon.run(kernel),
            _ => self.run(kernel),
        }
    }
}

/// Runs what is written for vectors of any width on the path that kernels run on.
pub(super) fn on_vectors<W: WithSimd>(work: W) -> W::Output {
    match Path::chosen() {
        Path::Portable => work.with_simd(Scalar),
        #[cfg(target_arch = "x86_64")]
        Path::Avx2(avx2) => avx2.vectors(work),
        #[cfg(target_arch = "x86_64")]
        Path::Avx2Vnni(avx2) => avx2.without_vnni().vectors(work),
        // The widest that there are.
        #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
        _ => Arch::new().dispatch(work),
    }
}

/// The product of some rows with consecutive tiles of one matrix, on one thread.
pub(super) struct TileProduct<'a> {
    pub(super) layout: Layout,
    /// The tiles, one behind the other. There may be more than `y` has room for: what comes next, to be fetched.
    pub(super) tiles: &'a [u8],
    /// Length of a sum.
    pub(super) inputs: usize,
    pub(super) rows: &'a Rows,
    /// `[tiles, rows, TILE]`, of as many tiles as are wanted.
    pub(super) y: &'a mut [f32],
}

impl TileProduct<'_> {
    pub(super) fn run(self, path: Path) {
        match self.layout {
            Layout::F32 | Layout::Bf16 | Layout::F16 => path.run(floats::Product(self)),
            _ => path.run_on_bytes(blocks::Product(self)),
        }
    }
}

/// Puts rows, `[outputs, inputs]`, into tiles of f32, `[tiles, inputs, TILE]`; outputs that the last tile lacks become zeros.
pub(super) fn transpose(path: Path, rows: &[f32], inputs: usize, tiles: &mut [f32]) {
    path.run(floats::Transposition { rows, inputs, tiles });
}

/// The product of rows with tiles of f32 that were just made of another form.
pub(super) struct WideProduct<'a> {
    /// `[tiles, inputs, TILE]`.
    pub(super) tiles: &'a [f32],
    pub(super) inputs: usize,
    pub(super) rows: &'a FloatRows,
    /// `[tiles, rows, TILE]`.
    pub(super) y: &'a mut [f32],
}

impl WideProduct<'_> {
    pub(super) fn run(self, path: Path) {
        path.run(floats::Wide(self));
    }
}

#[cfg(test)]
pub(super) mod tests;
