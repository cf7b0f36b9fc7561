//! Products of rounded rows with blocks of integers.
//!
//! A link of an output's chain is one block: the integer sum of its products, which no order changes, times the scales of the
//! weights and of the row. What integers are offset by (8 in q4_0, 32 in q6_k, 12 in mxfp4 after its table) is taken from
//! the sum with what the row's codes add up to; the minimum of q4_k is a link of its own.

#![allow(clippy::needless_range_loop, reason = "the loops count registers, which several arrays have a part of")]

use std::hint::black_box;

use super::{
    Isa, Kernel, TileProduct,
    fetching::ahead,
    rows::BlockRows,
    tiles::{Layout, Q4_K_BYTES, Q4_K_SCALES, Q6_K_BYTES, TILE, mxfp4_table, q4_k_scales},
};

/// Bytes of rows that all tiles pass by before the next rows are taken: a part of a usual level-2 cache.
const PANEL_BYTES: usize = 128 << 10;

pub(super) struct Product<'a>(pub(super) TileProduct<'a>);

impl Kernel for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn on<A: Isa>(self, isa: A) {
        match self.0.layout {
            Layout::Q8_0 => self.run::<A, Q8_0, 544>(isa),
            Layout::Q4_0 => self.run::<A, Q4_0, 288>(isa),
            Layout::Q4K => self.run::<A, Q4K, Q4_K_BYTES>(isa),
            Layout::Q6K => self.run::<A, Q6K, Q6_K_BYTES>(isa),
            Layout::Mxfp4 => self.run::<A, Mxfp4, 272>(isa),
            Layout::F32 | Layout::Bf16 | Layout::F16 => unreachable!("{:?} has no blocks", self.0.layout),
        }
    }
}

/// `R` rows at one block of a tile.
struct At<'a, const R: usize> {
    /// For each four inputs.
    codes: &'a [[[i8; 4]; R]],
    /// For each 32 inputs.
    scales: &'a [[f32; R]],
    /// For each 16 inputs.
    sums: &'a [[i32; R]],
}

/// A block of a tile, in `N` bytes: adds its links to the chains.
trait Block<const N: usize> {
    /// Inputs.
    const INPUTS: usize;
    fn add<A: Isa, const R: usize>(isa: A, block: &[u8; N], row: &At<'_, R>, y: &mut [A::F; R]);
}

impl Product<'_> {
    #[inline(always)]
    fn run<A: Isa, B: Block<N>, const N: usize>(self, isa: A) {
        let TileProduct { tiles, inputs, rows, y, .. } = self.0;
        let (tiles, rows) = (tiles.as_chunks().0, &rows.blocks);
        let mut tiles = Tiles::<N> { tiles, ahead: &[], inputs, blocks: inputs / B::INPUTS, rows, y };
        let tile_bytes = tiles.blocks * N;
        let groups = rows.groups;
        let count = tiles.y.len() / (groups.rows() * TILE);
        let row_bytes = inputs * groups.rows().div_ceil(groups.count().max(1));
        let panel = (PANEL_BYTES / row_bytes).max(1);
        for first in (0..groups.count()).step_by(panel) {
            let last = groups.count().min(first + panel);
            for tile in 0..count {
                for group in first..last {
                    let all = tiles.tiles.as_flattened();
                    tiles.ahead = ahead(all, tile * tile_bytes..(tile + 1) * tile_bytes, (group - first, last - first));
                    let rows = groups.get(group);
                    match (A::IS_WIDE, rows.len()) {
                        (_, 1) => tiles.tile::<A, B, 1>(isa, tile, rows.start),
                        (_, 2) => tiles.tile::<A, B, 2>(isa, tile, rows.start),
                        (_, 3) => tiles.tile::<A, B, 3>(isa, tile, rows.start),
                        (_, 4) => tiles.tile::<A, B, 4>(isa, tile, rows.start),
                        (true, 5) => tiles.tile::<A, B, 5>(isa, tile, rows.start),
                        (true, 6) => tiles.tile::<A, B, 6>(isa, tile, rows.start),
                        (true, 7) => tiles.tile::<A, B, 7>(isa, tile, rows.start),
                        (true, 8) => tiles.tile::<A, B, 8>(isa, tile, rows.start),
                        (_, count) => unreachable!("groups have no {count} rows"),
                    }
                }
            }
        }
    }
}

struct Tiles<'a, const N: usize> {
    tiles: &'a [[u8; N]],
    /// What the group is to fetch of the next tile.
    ahead: &'a [u8],
    inputs: usize,
    /// Blocks of a tile.
    blocks: usize,
    rows: &'a BlockRows,
    y: &'a mut [f32],
}

impl<const N: usize> Tiles<'_, N> {
    #[inline(always)]
    fn tile<A: Isa, B: Block<N>, const R: usize>(&mut self, isa: A, tile: usize, first: usize) {
        let Self { inputs, blocks, rows, .. } = *self;
        let tile_blocks = &self.tiles[tile * blocks..][..blocks];
        let codes = rows.codes[first * inputs / 4..][..R * inputs / 4].as_chunks::<R>().0;
        let scales = rows.scales[first * inputs / 32..][..R * inputs / 32].as_chunks::<R>().0;
        let sums = rows.sums[first * inputs / 16..][..R * inputs / 16].as_chunks::<R>().0;
        let mut y = [isa.splat(0.0); R];
        let each = codes.chunks_exact(B::INPUTS / 4).zip(scales.chunks_exact(B::INPUTS / 32));
        let each = each.zip(sums.chunks_exact(B::INPUTS / 16));
        // Several lines at once, since a block is many.
        let lines = self.ahead.as_chunks().0;
        let mut fetched = lines.chunks(lines.len().div_ceil(blocks).max(1));
        for (block, ((codes, scales), sums)) in tile_blocks.iter().zip(each) {
            for line in fetched.next().unwrap_or_default() {
                isa.fetch(line);
            }
            B::add(isa, block, &At { codes, scales, sums }, &mut y);
        }
        let to = &mut self.y[(tile * rows.groups.rows() + first) * TILE..][..R * TILE];
        for (to, y) in to.as_chunks_mut().0.iter_mut().zip(y) {
            isa.store(y, to);
        }
    }
}

/// The whole slice. With several rows the compiler mustn't know how long it is: it would unroll the loop over it, load the
/// weights of a whole block, and have no registers left for the sums.
#[inline(always)]
fn each<const R: usize, T>(slice: &[T]) -> &[T] {
    if R > 1 { &slice[..black_box(slice.len())] } else { slice }
}

/// Groups of 64 bytes from `at` on, `count` of them.
#[inline(always)]
fn groups(bytes: &[u8], at: usize, count: usize) -> &[[u8; 64]] {
    &bytes[at..at + 64 * count].as_chunks().0[..count]
}

/// The sums of rows' codes with eights, whose codes are the weights.
#[inline(always)]
fn dots_of_eights<A: Isa, const R: usize>(isa: A, eights: &[[u8; 64]], codes: &[[[i8; 4]; R]]) -> [A::S; R] {
    let mut dots = [isa.no_sum(); R];
    for (both, [first, second]) in each::<R, _>(eights).iter().zip(codes.as_chunks().0) {
        let both = isa.bytes(both);
        let weights = isa.low(both);
        for r in 0..R {
            dots[r] = isa.dot(dots[r], weights, first[r]);
        }
        let weights = isa.high(both);
        for r in 0..R {
            dots[r] = isa.dot(dots[r], weights, second[r]);
        }
    }
    dots
}

/// The `N` bytes from `at` on.
#[inline(always)]
fn part<const N: usize>(bytes: &[u8], at: usize) -> &[u8; N] {
    &bytes[at..at + N].as_chunks().0[0]
}

struct Q8_0;

impl Block<544> for Q8_0 {
    const INPUTS: usize = 32;

    #[inline(always)]
    fn add<A: Isa, const R: usize>(isa: A, block: &[u8; 544], row: &At<'_, R>, y: &mut [A::F; R]) {
        let mut dots = [isa.zeros(); R];
        for (weights, codes) in each::<R, _>(groups(block, 32, 8)).iter().zip(row.codes) {
            let weights = isa.signed_bytes(weights);
            for r in 0..R {
                dots[r] = isa.dot_signed(dots[r], weights, codes[r]);
            }
        }
        let scales = isa.halves(part(block, 0));
        for r in 0..R {
            let scale = isa.mul(scales, isa.splat(row.scales[0][r]));
            let offset = isa.splat_i(-A::OFFSET * (row.sums[0][r] + row.sums[1][r]));
            let dot = if A::OFFSET == 0 { dots[r] } else { isa.add_i(dots[r], offset) };
            y[r] = isa.fma(isa.to_f32(dot), scale, y[r]);
        }
    }
}

struct Q4_0;

impl Block<288> for Q4_0 {
    const INPUTS: usize = 32;

    #[inline(always)]
    fn add<A: Isa, const R: usize>(isa: A, block: &[u8; 288], row: &At<'_, R>, y: &mut [A::F; R]) {
        // 8 sums of at most 15.
        let dots = dots_of_eights(isa, groups(block, 32, 4), row.codes);
        let scales = isa.halves(part(block, 0));
        for r in 0..R {
            let offset = isa.splat_i(-8 * (row.sums[0][r] + row.sums[1][r]));
            let dot = isa.to_f32(isa.add_i(isa.total(dots[r]), offset));
            y[r] = isa.fma(dot, isa.mul(scales, isa.splat(row.scales[0][r])), y[r]);
        }
    }
}

struct Mxfp4;

impl Block<272> for Mxfp4 {
    const INPUTS: usize = 32;

    #[inline(always)]
    fn add<A: Isa, const R: usize>(isa: A, block: &[u8; 272], row: &At<'_, R>, y: &mut [A::F; R]) {
        let mut dots = [isa.zeros(); R];
        for sixteen in 0..2 {
            // 4 sums of at most 24.
            let mut part_dots = [isa.no_sum(); R];
            let codes = row.codes[4 * sixteen..].as_chunks().0;
            for (both, [first, second]) in each::<R, _>(groups(block, 16 + 128 * sixteen, 2)).iter().zip(codes) {
                let both = isa.bytes(both);
                let weights = isa.look_up(&mxfp4_table(), isa.low(both));
                for r in 0..R {
                    part_dots[r] = isa.dot(part_dots[r], weights, first[r]);
                }
                let weights = isa.look_up(&mxfp4_table(), isa.high(both));
                for r in 0..R {
                    part_dots[r] = isa.dot(part_dots[r], weights, second[r]);
                }
            }
            for r in 0..R {
                dots[r] = isa.add_i(dots[r], isa.total(part_dots[r]));
            }
        }
        // The table holds twice the numbers.
        let scales = isa.mul(isa.powers(part(block, 0)), isa.splat(0.5));
        for r in 0..R {
            let offset = isa.splat_i(-12 * (row.sums[0][r] + row.sums[1][r]));
            let dot = isa.to_f32(isa.add_i(dots[r], offset));
            y[r] = isa.fma(dot, isa.mul(scales, isa.splat(row.scales[0][r])), y[r]);
        }
    }
}

struct Q4K;

impl Block<Q4_K_BYTES> for Q4K {
    const INPUTS: usize = 256;

    #[inline(always)]
    fn add<A: Isa, const R: usize>(isa: A, block: &[u8; Q4_K_BYTES], row: &At<'_, R>, y: &mut [A::F; R]) {
        let (scale_of_scales, scale_of_minima) = (isa.halves(part(block, 0)), isa.halves(part(block, 32)));
        let (scales, minima) = q4_k_scales(part(block, 64));
        for sub in 0..8 {
            // 8 sums of at most 15.
            let eights = groups(block, 64 + Q4_K_SCALES + 256 * sub, 4);
            let dots = dots_of_eights(isa, eights, &row.codes[8 * sub..]);
            let scales = isa.mul(scale_of_scales, isa.unsigned(&scales[sub]));
            let minima = isa.mul(scale_of_minima, isa.unsigned(&minima[sub]));
            for r in 0..R {
                let (scale, sum) = (row.scales[sub][r], row.sums[2 * sub][r] + row.sums[2 * sub + 1][r]);
                y[r] = isa.fma(isa.to_f32(isa.total(dots[r])), isa.mul(scales, isa.splat(scale)), y[r]);
                y[r] = isa.fma(isa.splat(-(scale * sum as f32)), minima, y[r]);
            }
        }
    }
}

struct Q6K;

impl Block<Q6_K_BYTES> for Q6K {
    const INPUTS: usize = 256;

    #[inline(always)]
    fn add<A: Isa, const R: usize>(isa: A, block: &[u8; Q6_K_BYTES], row: &At<'_, R>, y: &mut [A::F; R]) {
        let scale_of_scales = isa.halves(part(block, 0));
        for sub in 0..16 {
            let bytes: &[u8; 192] = part(block, 32 + 256 + 192 * sub);
            let upper = isa.bytes(part(bytes, 128));
            let mut dots = [isa.zeros(); R];
            for eight in 0..2 {
                let both = isa.bytes(part(bytes, 64 * eight));
                // 2 sums of at most 63.
                let mut part_dots = [isa.no_sum(); R];
                let weights = isa.or(isa.low(both), isa.two_bits(upper, 2 * eight));
                for r in 0..R {
                    part_dots[r] = isa.dot(part_dots[r], weights, row.codes[4 * sub + 2 * eight][r]);
                }
                let weights = isa.or(isa.high(both), isa.two_bits(upper, 2 * eight + 1));
                for r in 0..R {
                    part_dots[r] = isa.dot(part_dots[r], weights, row.codes[4 * sub + 2 * eight + 1][r]);
                }
                for r in 0..R {
                    dots[r] = isa.add_i(dots[r], isa.total(part_dots[r]));
                }
            }
            let scales = isa.mul(scale_of_scales, isa.signed(part(block, 32 + 16 * sub)));
            for r in 0..R {
                let offset = isa.splat_i(-32 * row.sums[sub][r]);
                let dot = isa.to_f32(isa.add_i(dots[r], offset));
                y[r] = isa.fma(dot, isa.mul(scales, isa.splat(row.scales[sub / 2][r])), y[r]);
            }
        }
    }
}
