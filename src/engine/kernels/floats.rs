//! Products of f32 rows with f32, bf16 and f16 weights: a chain of fused multiply-adds over the inputs.
//!
//! A tile of weights is `[inputs, 16]` in f32 and f16, and in bf16 `[inputs / 2, 16, 2]`: a register of its pairs is widened to two
//! registers by a shift and a mask, where f16 has instructions that take numbers side by side.

#![allow(clippy::needless_range_loop, reason = "the loops count registers, which several arrays have a part of")]

use pulp::{bytemuck, cast};

use super::{
    Isa, Kernel, TileProduct, WideProduct,
    fetching::{Fetching, ahead},
    rows::FloatRows,
    tiles::{Layout, TILE},
};

/// Bytes of rows that all tiles pass by before the next rows are taken: a part of a usual level-2 cache.
const PANEL_BYTES: usize = 256 << 10;
/// Bytes of tiles that stay near while the groups of a panel pass by: of what the rows leave.
const TILES_BYTES: usize = 128 << 10;
/// Bytes of a tile's weights that one step takes.
const STEP_BYTES: usize = 4 * TILE;

pub(super) struct Product<'a>(pub(super) TileProduct<'a>);
pub(super) struct Wide<'a>(pub(super) WideProduct<'a>);

impl Kernel for Product<'_> {
    type Output = ();

    #[inline(always)]
    fn on<A: Isa>(self, isa: A) {
        let TileProduct { layout, tiles, inputs, rows, y } = self.0;
        let rows = &rows.floats;
        match layout {
            Layout::F32 => Tiles { tiles, ahead: &[], inputs, rows, y }.run::<A, F32, 1>(isa),
            Layout::Bf16 => Tiles { tiles, ahead: &[], inputs, rows, y }.run::<A, Bf16, 2>(isa),
            Layout::F16 => Tiles { tiles, ahead: &[], inputs, rows, y }.run::<A, F16, 2>(isa),
            _ => unreachable!("{layout:?} is a layout of blocks"),
        }
    }
}

impl Kernel for Wide<'_> {
    type Output = ();

    #[inline(always)]
    fn on<A: Isa>(self, isa: A) {
        let WideProduct { tiles, inputs, rows, y } = self.0;
        Tiles { tiles: bytemuck::cast_slice(tiles), ahead: &[], inputs, rows, y }.run::<A, F32, 1>(isa);
    }
}

/// See [`super::transpose`].
pub(super) struct Transposition<'a> {
    pub(super) rows: &'a [f32],
    pub(super) inputs: usize,
    pub(super) tiles: &'a mut [f32],
}

impl Kernel for Transposition<'_> {
    type Output = ();

    #[inline(always)]
    fn on<A: Isa>(self, isa: A) {
        let Self { rows, inputs, tiles } = self;
        for (rows, tile) in rows.chunks(TILE * inputs).zip(tiles.chunks_exact_mut(TILE * inputs)) {
            let (tile, outputs) = (tile.as_chunks_mut::<TILE>().0, rows.len() / inputs);
            let squares = if outputs == TILE { inputs / 8 } else { 0 };
            for (square, tile) in tile.as_chunks_mut::<8>().0[..squares].iter_mut().enumerate() {
                for half in 0..2 {
                    let mut eight: [&[f32; 8]; 8] = [&[0.0; 8]; 8];
                    for (row, eight) in eight.iter_mut().enumerate() {
                        *eight = &rows[(8 * half + row) * inputs + 8 * square..][..8].as_chunks().0[0];
                    }
                    isa.transpose(eight, 8 * half, tile);
                }
            }
            for input in 8 * squares..inputs {
                for (output, to) in tile[input].iter_mut().enumerate() {
                    *to = if output < outputs { rows[output * inputs + input] } else { 0.0 };
                }
            }
        }
    }
}

/// Weights of a tile for one input, or for two in the formats of 16 bits.
trait Weights {
    fn widen<A: Isa>(isa: A, weights: &[u8; STEP_BYTES], which: usize) -> A::F;
}

struct F32;
struct Bf16;
struct F16;

impl Weights for F32 {
    #[inline(always)]
    fn widen<A: Isa>(isa: A, weights: &[u8; STEP_BYTES], _: usize) -> A::F {
        isa.load(&cast(*weights))
    }
}

impl Weights for Bf16 {
    #[inline(always)]
    fn widen<A: Isa>(isa: A, weights: &[u8; STEP_BYTES], which: usize) -> A::F {
        isa.brains(weights, which)
    }
}

impl Weights for F16 {
    #[inline(always)]
    fn widen<A: Isa>(isa: A, weights: &[u8; STEP_BYTES], which: usize) -> A::F {
        isa.halves(&weights.as_chunks().0[which])
    }
}

struct Tiles<'a> {
    tiles: &'a [u8],
    /// What the next group of rows is to fetch of the tiles that come next.
    ahead: &'a [u8],
    inputs: usize,
    rows: &'a FloatRows,
    y: &'a mut [f32],
}

impl Tiles<'_> {
    #[inline(always)]
    fn run<A: Isa, W: Weights, const STEP: usize>(mut self, isa: A) {
        let tile_bytes = self.inputs / STEP * STEP_BYTES;
        let groups = self.rows.groups;
        let tiles = self.y.len() / (groups.rows() * TILE);
        let row_bytes = self.inputs * size_of::<f32>() * groups.rows().div_ceil(groups.count().max(1));
        let panel = (PANEL_BYTES / row_bytes).max(1);
        // As many tiles as one row takes at a time, or as stay near while several groups pass by.
        let most = if A::IS_WIDE { 8 } else { 4 };
        let most = if groups.count() > 1 { (TILES_BYTES / tile_bytes).clamp(1, most) } else { most };
        for first in (0..groups.count()).step_by(panel) {
            let last = groups.count().min(first + panel);
            for start in (0..tiles).step_by(most) {
                let end = tiles.min(start + most);
                for group in first..last {
                    let now = start * tile_bytes..end * tile_bytes;
                    self.ahead = ahead(self.tiles, now, (group - first, last - first));
                    let rows = groups.get(group);
                    let from = rows.start;
                    let each = (start, end, from);
                    match (A::IS_WIDE, rows.len()) {
                        (false, 1) => self.group::<A, W, STEP, 4, 1>(isa, each),
                        (false, 2) => self.group::<A, W, STEP, 2, 2>(isa, each),
                        (false, 3) => self.group::<A, W, STEP, 2, 3>(isa, each),
                        (false, 4) => self.group::<A, W, STEP, 1, 4>(isa, each),
                        (false, 5) => self.group::<A, W, STEP, 1, 5>(isa, each),
                        (false, 6) => self.group::<A, W, STEP, 1, 6>(isa, each),
                        (true, 1) => self.group::<A, W, STEP, 8, 1>(isa, each),
                        (true, 2) => self.group::<A, W, STEP, 4, 2>(isa, each),
                        (true, 3) => self.group::<A, W, STEP, 4, 3>(isa, each),
                        (true, 4) => self.group::<A, W, STEP, 4, 4>(isa, each),
                        (true, 5) => self.group::<A, W, STEP, 4, 5>(isa, each),
                        (true, 6) => self.group::<A, W, STEP, 4, 6>(isa, each),
                        (true, 7) => self.group::<A, W, STEP, 2, 7>(isa, each),
                        (true, 8) => self.group::<A, W, STEP, 2, 8>(isa, each),
                        (true, 9) => self.group::<A, W, STEP, 2, 9>(isa, each),
                        (true, 10) => self.group::<A, W, STEP, 2, 10>(isa, each),
                        (true, 11) => self.group::<A, W, STEP, 2, 11>(isa, each),
                        (true, 12) => self.group::<A, W, STEP, 2, 12>(isa, each),
                        (_, count) => unreachable!("groups have no {count} rows"),
                    }
                }
            }
        }
    }

    /// Tiles `start..end` for the `R` rows from `first` on, `T` tiles at a time.
    #[inline(always)]
    fn group<A: Isa, W: Weights, const STEP: usize, const T: usize, const R: usize>(
        &mut self,
        isa: A,
        (start, end, first): (usize, usize, usize),
    ) {
        let mut tile = start;
        while tile + T <= end {
            self.tiles::<A, W, STEP, T, R>(isa, (tile, end), first);
            tile += T;
        }
        while tile < end {
            self.tiles::<A, W, STEP, 1, R>(isa, (tile, end), first);
            tile += 1;
        }
    }

    #[inline(always)]
    fn tiles<A: Isa, W: Weights, const STEP: usize, const T: usize, const R: usize>(
        &mut self,
        isa: A,
        (tile, end): (usize, usize),
        first: usize,
    ) {
        let steps = self.inputs / STEP;
        let mut weights: [&[[u8; STEP_BYTES]]; T] = [&[]; T];
        for t in 0..T {
            weights[t] = &self.tiles[(tile + t) * steps * STEP_BYTES..][..steps * STEP_BYTES].as_chunks().0[..steps];
        }
        let x = &self.rows.values[first * self.inputs..][..R * self.inputs];
        let x: &[[[f32; R]; STEP]] = &x.as_chunks::<R>().0.as_chunks::<STEP>().0[..steps];
        let mut sums = [[isa.splat(0.0); R]; T];
        let mut fetching = Fetching::new(&mut self.ahead, steps, end - tile, T);
        for step in 0..steps {
            fetching.step(isa);
            for which in 0..STEP {
                let x = &x[step][which];
                let mut widened = [isa.splat(0.0); T];
                for t in 0..T {
                    widened[t] = W::widen(isa, &weights[t][step], which);
                }
                for r in 0..R {
                    let x = isa.splat(x[r]);
                    for t in 0..T {
                        sums[t][r] = isa.fma(x, widened[t], sums[t][r]);
                    }
                }
            }
        }
        let rows = self.rows.groups.rows();
        for t in 0..T {
            let y = &mut self.y[((tile + t) * rows + first) * TILE..][..R * TILE];
            for (y, sum) in y.as_chunks_mut().0.iter_mut().zip(sums[t]) {
                isa.store(sum, y);
            }
        }
    }
}
