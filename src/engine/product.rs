//! Products of rows with matrices, shared among threads: what stands between a layer and the kernels.
//!
//! `y[r, o] = Σ x[r, i] · w[o, i]`. A packed matrix goes to the kernels as it is (`engine/kernels.rs`). Of others, some tiles at
//! a time are widened to f32 and multiplied then; that is slower, and gives bit for bit what the widened matrix gives. Threads
//! share the tiles, never a sum.

use std::{cell::RefCell, ops::Range};

use rayon::prelude::*;

use super::{
    kernels::{Path, Rows, TILE, TileProduct, WideProduct, grown, transpose},
    matrix::Matrix,
    threads,
};

/// Multiplications below which a second thread costs more than it saves (some 20 µs of one core's work).
const MIN_PARALLEL: usize = 1 << 19;
/// Parts that a large product is cut into for each thread, so that an uneven split evens out. Who is done early and has long to wait
/// goes to sleep, and wakes up late for the next product: the last part has to be short.
const PARTS_PER_THREAD: usize = 16;
/// Tiles that a part has at least: as many as a lone row takes at a time.
const MIN_TILES: usize = 4;
/// Rows that are taken out of tiles at a time: they are neighbours there.
const COLLECTED_ROWS: usize = 8;
/// Tiles that are widened at a time: enough for the chains of a lone row, and with 4096 inputs still in a level-2 cache.
const WIDENED_TILES: usize = 2;

/// The operands of a product.
#[derive(Clone, Copy)]
pub(super) struct Operands<'a> {
    /// `[rows, inputs]`.
    pub(super) x: &'a [f32],
    /// `[outputs, inputs]`.
    pub(super) w: &'a Matrix,
}

/// Buffers of products, which are kept from one to the next.
#[derive(Default)]
pub(super) struct Room {
    /// Rows with their columns in the orders of matrices, one buffer an order.
    pub(super) gathered: Vec<Vec<f32>>,
    /// Rows as kernels read them: those of the first operand, of the first operand with other rows, and so on.
    pub(super) rows: Vec<Rows>,
    /// The result of a product whose reader takes it from here.
    pub(super) tiles: Tiles,
}

/// The result of a product as kernels leave it. Who reads it takes out rows: it has more to do with them, and does it while they are
/// near.
#[derive(Default)]
pub(super) struct Tiles {
    /// `[tiles, rows, TILE]`.
    values: Vec<f32>,
    rows: usize,
}

impl Tiles {
    /// Computes a product, whose rows have been prepared.
    pub(super) fn fill(&mut self, product: &Product<'_>, prepared: &[Rows]) {
        self.rows = product.rows;
        product.run(prepared, grown(&mut self.values, product.tiles() * product.rows * TILE));
    }

    /// Rows of the result.
    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    /// Takes out some rows, `[rows, Σ widths]`: of each matrix in turn so many outputs.
    pub(super) fn collect(&self, widths: impl Iterator<Item = usize>, rows: Range<usize>, y: &mut [f32]) {
        let outputs = y.len() / rows.len().max(1);
        let (mut tile, mut column) = (0, 0);
        for width in widths {
            for first in (0..width).step_by(TILE) {
                let count = TILE.min(width - first);
                let from = &self.values[(tile * self.rows + rows.start) * TILE..][..rows.len() * TILE];
                for (row, from) in from.as_chunks::<TILE>().0.iter().enumerate() {
                    let to = &mut y[row * outputs + column..][..count];
                    match to.as_chunks_mut() {
                        ([to], _) => *to = *from,
                        _ => to.copy_from_slice(&from[..count]),
                    }
                }
                tile += 1;
                column += count;
            }
        }
    }
}

/// `y = x · wᵀ` for several matrices, side by side: `[rows, Σ outputs]`. All have the same number of rows in `x`, at least one.
pub(super) fn products(operands: &[Operands<'_>], y: &mut Vec<f32>, room: &mut Room) {
    products_on(Path::chosen(), operands, y, room);
}

/// The same on a certain path.
pub(super) fn products_on(path: Path, operands: &[Operands<'_>], y: &mut Vec<f32>, room: &mut Room) {
    let outputs: usize = operands.iter().map(|each| each.w.outputs()).sum();
    let Room { rows: prepared, tiles, .. } = room;
    let product = Product::preparing(path, operands, prepared);
    let rows = product.rows;
    y.resize(rows * outputs, 0.0);
    // The tiles of a lone row are the row itself, if none is cut.
    if rows == 1 && operands.iter().all(|each| each.w.outputs().is_multiple_of(TILE)) {
        return product.run(prepared, y);
    }
    tiles.fill(&product, prepared);
    let tiles = &*tiles;
    let at_once = rows.div_ceil(2 * rayon::current_num_threads()).min(COLLECTED_ROWS);
    let parts: Vec<_> = (0..).step_by(at_once).zip(y.chunks_mut(at_once * outputs)).collect();
    threads::each(parts, product.work() >= MIN_PARALLEL, |(first, y)| {
        let widths = operands.iter().map(|each| each.w.outputs());
        tiles.collect(widths, first..first + y.len() / outputs, y);
    });
}

/// Matrices side by side, and which rows they are multiplied with.
pub(super) struct Product<'a> {
    path: Path,
    parts: Vec<Part<'a>>,
    rows: usize,
}

/// One matrix of a product.
struct Part<'a> {
    w: &'a Matrix,
    /// Which of the prepared rows it is multiplied with.
    rows: usize,
    /// Which tiles of the result are its own.
    tiles: Range<usize>,
}

impl<'a> Product<'a> {
    /// Puts rows into the forms that their matrices want.
    pub(super) fn preparing(path: Path, operands: &[Operands<'a>], prepared: &mut Vec<Rows>) -> Self {
        let rows = operands.first().map_or(0, |each| each.x.len() / each.w.inputs());
        let mut product = Self { path, parts: Vec::with_capacity(operands.len()), rows };
        let mut known: Vec<(*const f32, bool)> = Vec::with_capacity(operands.len());
        for Operands { x, w } in operands {
            let key = (x.as_ptr(), reads_blocks(w));
            let rows = known.iter().position(|known| *known == key).unwrap_or_else(|| {
                known.push(key);
                let index = known.len() - 1;
                if prepared.len() <= index {
                    prepared.push(Rows::default());
                }
                if reads_blocks(w) {
                    prepared[index].fill_blocks(x, w.inputs(), path);
                } else {
                    prepared[index].fill_floats(x, w.inputs(), path);
                }
                index
            });
            product.push(w, rows);
        }
        product
    }

    /// Of so many rows, which are prepared already, and the same for all matrices.
    pub(super) fn prepared(path: Path, matrices: impl Iterator<Item = &'a Matrix>, rows: usize) -> Self {
        let mut product = Self { path, parts: Vec::with_capacity(matrices.size_hint().0), rows };
        matrices.for_each(|w| product.push(w, 0));
        product
    }

    fn push(&mut self, w: &'a Matrix, rows: usize) {
        let start = self.tiles();
        self.parts.push(Part { w, rows, tiles: start..start + w.outputs().div_ceil(TILE) });
    }

    fn tiles(&self) -> usize {
        self.parts.last().map_or(0, |part| part.tiles.end)
    }

    /// Multiplications.
    fn work(&self) -> usize {
        self.parts.iter().map(|part| self.rows * part.w.inputs() * part.w.outputs()).sum()
    }

    /// To `y`, `[tiles, rows, TILE]`.
    fn run(&self, prepared: &[Rows], y: &mut [f32]) {
        let each = self.rows * TILE;
        let run = |first: usize, y: &mut [f32]| {
            let tiles = first..first + y.len() / each;
            for part in &self.parts {
                let own = part.tiles.start.max(tiles.start)..part.tiles.end.min(tiles.end);
                if own.start < own.end {
                    let y = &mut y[(own.start - first) * each..(own.end - first) * each];
                    let tiles = own.start - part.tiles.start..own.end - part.tiles.start;
                    part.run(self.path, &prepared[part.rows], tiles, y);
                }
            }
        };
        let threads = rayon::current_num_threads();
        if threads < 2 || self.work() < MIN_PARALLEL {
            run(0, y);
        } else {
            let tiles = self.tiles().div_ceil(threads * PARTS_PER_THREAD).max(MIN_TILES);
            let parts = y.par_chunks_mut(tiles * each).enumerate().with_max_len(1);
            parts.for_each(|(index, y)| run(index * tiles, y));
        }
    }
}

/// Whether rows are rounded for the matrix.
pub(super) fn reads_blocks(w: &Matrix) -> bool {
    w.layout().is_some_and(|layout| layout.has_blocks())
}

thread_local! {
    /// Where tiles of matrices that aren't packed are widened: rows, and tiles.
    static WIDENED: RefCell<(Vec<f32>, Vec<f32>)> = const { RefCell::new((Vec::new(), Vec::new())) };
}

impl Part<'_> {
    /// The product with some tiles of the matrix on one thread, to `y`, `[tiles, rows, TILE]`.
    fn run(&self, path: Path, rows: &Rows, tiles: Range<usize>, y: &mut [f32]) {
        let inputs = self.w.inputs();
        if let Some(layout) = self.w.layout() {
            let all = self.tiles.len();
            return TileProduct { layout, tiles: self.w.tiles(tiles.start..all), inputs, rows, y }.run(path);
        }
        WIDENED.with_borrow_mut(|(wide, packed)| {
            wide.resize(WIDENED_TILES * TILE * inputs, 0.0);
            packed.resize(WIDENED_TILES * TILE * inputs, 0.0);
            let each = y.len() / tiles.len();
            for (first, y) in tiles.clone().step_by(WIDENED_TILES).zip(y.chunks_mut(WIDENED_TILES * each)) {
                let some = first..tiles.end.min(first + WIDENED_TILES);
                let outputs = some.start * TILE..self.w.outputs().min(some.end * TILE);
                let count = outputs.len();
                let wide = self.w.widen(outputs, wide);
                transpose(path, &wide[..count * inputs], inputs, packed);
                let tiles = &packed[..some.len() * TILE * inputs];
                WideProduct { tiles, inputs, rows: rows.floats(), y }.run(path);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::kernels::tests::random;

    fn product(x: &[f32], w: &[f32], inputs: usize) -> Vec<f32> {
        Matrix::from_f32(w.to_vec(), inputs).product(x)
    }

    #[test]
    fn it_is_a_matrix_product() {
        for (rows, outputs, inputs) in [(1, 1, 1), (1, 9, 7), (2, 17, 64), (3, 5, 100), (9, 130, 33), (5, 64, 4096)] {
            let (x, w) = (random(rows * inputs, 1), random(outputs * inputs, 2));
            let y = product(&x, &w, inputs);
            for r in 0..rows {
                for o in 0..outputs {
                    let pairs = x[r * inputs..][..inputs].iter().zip(&w[o * inputs..][..inputs]);
                    let exact: f64 = pairs.map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
                    let error = (f64::from(y[r * outputs + o]) - exact).abs();
                    assert!(error < 1e-6 * (inputs as f64).sqrt(), "{rows} {outputs} {inputs}: off by {error}");
                }
            }
        }
    }

    #[test]
    fn a_sum_is_one_chain_over_the_inputs_on_every_path() {
        for (rows, outputs, inputs) in [(1, 1, 1), (1, 70, 31), (4, 17, 64), (7, 33, 40), (13, 16, 129)] {
            let (x, w) = (random(rows * inputs, 1), random(outputs * inputs, 2));
            let mut expected = Vec::new();
            for x in x.chunks(inputs) {
                let chain = |w: &[f32]| x.iter().zip(w).fold(0.0, |sum: f32, (x, w)| x.mul_add(*w, sum));
                expected.extend(w.chunks(inputs).map(chain));
            }
            for path in Path::all() {
                let mut matrix = Matrix::from_f32(w.clone(), inputs);
                for packed in [false, true] {
                    let mut y = Vec::new();
                    products_on(path, &[Operands { x: &x, w: &matrix }], &mut y, &mut Room::default());
                    assert_eq!(y, expected, "{} {packed}: {rows} {outputs} {inputs}", path.name());
                    matrix.pack(true);
                }
            }
        }
    }

    #[test]
    fn a_row_is_the_same_in_every_batch_and_beside_every_matrix() {
        // Large enough that several threads share the work.
        let (rows, outputs, inputs) = (11, 515, 419);
        let x = random(rows * inputs, 3);
        let w = random(outputs * inputs, 4);
        let all = product(&x, &w, inputs);
        for first in 0..rows {
            for count in 1..=rows - first {
                let some = product(&x[first * inputs..][..count * inputs], &w, inputs);
                assert_eq!(some, all[first * outputs..][..count * outputs], "rows {first}..{}", first + count);
            }
        }
        for cut in [1, 7, 100, 514] {
            let (above, below) = w.split_at(cut * inputs);
            let [above, below] = [above, below].map(|w| Matrix::from_f32(w.to_vec(), inputs));
            for rows in [1, 2, 11] {
                let x = &x[..rows * inputs];
                let mut both = Vec::new();
                products(&[Operands { x, w: &above }, Operands { x, w: &below }], &mut both, &mut Room::default());
                assert_eq!(both, all[..rows * outputs], "{cut} {rows}");
            }
        }
    }
}
