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
//! AVX-512, or an array that the compiler makes the best of ([`Portable`]; on NEON that is vector code). They hold next to no `unsafe`: pulp's
//! tokens prove that the instructions are there. Not used are AVX-512's and NEON's dot products of bf16, which round rows and
//! would make results depend on the machine, and those of bytes (VNNI), which would change no bit and come when there is a
//! machine to test them on. The tests run every path that the machine has; portable code has given the same bits on an emulated NEON.
//! `HELION_KERNELS=portable|avx2|avx512` chooses a path other than the best
//! one, to compare them.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod blocks;
mod fetching;
mod floats;
mod portable;
mod rows;
mod tiles;

use std::sync::OnceLock;

#[cfg(target_arch = "x86_64")]
use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
use avx512::Avx512;
use portable::Portable;
#[cfg(target_arch = "x86_64")]
use pulp::Scalar;
use pulp::{Arch, WithSimd};
pub(super) use rows::{FloatRows, Rows, Slot, cut, fill_all, grown};
pub(super) use tiles::{Layout, TILE};

/// What the environment variable that chooses a path is called.
const PATH_VARIABLE: &str = "HELION_KERNELS";

/// The operations of an instruction set on 16 lanes, one for each output of a tile.
pub(super) trait Isa: Copy + Send + Sync + 'static {
    /// Has 32 vector registers that hold 16 lanes each, rather than 16 that hold 8.
    const IS_WIDE: bool;
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
    /// f16 numbers for two inputs, next to each other: those of input `which`.
    fn halves(self, pairs: &[u8; 4 * TILE], which: usize) -> Self::F;
    /// f16 numbers.
    fn scales(self, halves: &[u8; 2 * TILE]) -> Self::F;
    /// Integers from 0 to 255.
    fn unsigned(self, bytes: &[u8; TILE]) -> Self::F;
    /// Integers from -128 to 127.
    fn signed(self, bytes: &[u8; TILE]) -> Self::F;
    /// Powers of two as E8M0 codes: `2^(code - 127)`.
    fn powers(self, bytes: &[u8; TILE]) -> Self::F;

    fn bytes(self, bytes: &[u8; 4 * TILE]) -> Self::B;
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
    /// Adds the products of signed bytes with four signed ones from -127 on, which are the same for all outputs.
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
    Avx2(Avx2),
    #[cfg(target_arch = "x86_64")]
    Avx512(pulp::x86::V4),
}

impl Path {
    /// The one that kernels run on: the best, unless the environment says otherwise.
    pub(super) fn chosen() -> Self {
        static CHOSEN: OnceLock<Path> = OnceLock::new();
        *CHOSEN.get_or_init(|| {
            let all = Self::all();
            let asked = std::env::var(PATH_VARIABLE).ok();
            let best = all.last().copied().unwrap_or(Self::Portable);
            let Some(asked) = asked.filter(|asked| !asked.is_empty() && asked != "auto") else { return best };
            all.iter().copied().find(|path| path.name() == asked).unwrap_or_else(|| {
                let known: Vec<&str> = all.iter().map(Self::name).collect();
                tracing::warn!(
                    "{PATH_VARIABLE}={asked} is not a path of this machine, which has {}: {} is used",
                    known.join(", "),
                    best.name()
                );
                best
            })
        })
    }

    /// All that this machine has, the best one last.
    pub(super) fn all() -> Vec<Self> {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = Avx2::detect().map(Self::Avx2);
            let avx512 = pulp::x86::V4::try_new().map(Self::Avx512);
            [Some(Self::Portable), avx2, avx512].into_iter().flatten().collect()
        }
        #[cfg(not(target_arch = "x86_64"))]
        vec![Self::Portable]
    }

    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Portable => "portable",
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(_) => "avx2",
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(_) => "avx512",
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
        if matches!(self, Self::Avx512(_)) {
            return true;
        }
        false
    }

    #[inline(always)]
    fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            Self::Portable => kernel.on(Portable),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2(avx2) => avx2.run(kernel),
            #[cfg(target_arch = "x86_64")]
            Self::Avx512(v4) => v4.vectorize(On { isa: Avx512(v4), kernel }),
        }
    }
}

/// Runs what is written for vectors of any width on the path that kernels run on.
pub(super) fn on_vectors<W: WithSimd>(work: W) -> W::Output {
    match Path::chosen() {
        // Without AVX2 there are no wider ones.
        #[cfg(target_arch = "x86_64")]
        Path::Portable => work.with_simd(Scalar),
        #[cfg(target_arch = "x86_64")]
        Path::Avx2(avx2) => avx2.vectors(work),
        // The widest that there are, which on other machines have no path of their own.
        _ => Arch::new().dispatch(work),
    }
}

#[cfg(target_arch = "x86_64")]
struct On<A, K> {
    isa: A,
    kernel: K,
}

#[cfg(target_arch = "x86_64")]
impl<A: Isa, K: Kernel> pulp::NullaryFnOnce for On<A, K> {
    type Output = K::Output;

    #[inline(always)]
    fn call(self) -> K::Output {
        self.kernel.on(self.isa)
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
            _ => path.run(blocks::Product(self)),
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
