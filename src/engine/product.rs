//! Products of rows with matrices, shared among threads: what stands between a layer and the kernels.
//!
//! `y[r, o] = Σ x[r, i] · w[o, i]`. A packed matrix goes to the kernels as it is (`engine/kernels.rs`). Of others, some tiles at
//! a time are widened to f32 and multiplied then; that is slower, and gives bit for bit what the widened matrix gives. Threads
//! share the tiles, never a sum.

use std::{cell::RefCell, ops::Range};

use rayon::prelude::*;

use super::{
    kernels::{Path, Rows, TILE, TileProduct, WideProduct, transpose},
    matrix::Matrix,
};

/// Multiplications below which a second thread costs more than it saves (some 20 µs of one core's work).
const MIN_PARALLEL: usize = 1 << 19;
/// Parts that a large product is cut into for each thread, so that an uneven split evens out.
const PARTS_PER_THREAD: usize = 4;
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
    rows: Vec<Rows>,
    /// The result, `[tiles, rows, TILE]`.
    tiles: Vec<f32>,
}

/// `y = x · wᵀ` for several matrices, side by side: `[rows, Σ outputs]`. All have the same number of rows in `x`, at least one.
pub(super) fn products(operands: &[Operands<'_>], y: &mut Vec<f32>, room: &mut Room) {
    products_on(Path::chosen(), operands, y, room);
}

/// The same on a certain path.
pub(super) fn products_on(path: Path, operands: &[Operands<'_>], y: &mut Vec<f32>, room: &mut Room) {
    let outputs: usize = operands.iter().map(|each| each.w.outputs()).sum();
    let rows = operands.first().map_or(0, |each| each.x.len() / each.w.inputs());
    let Room { rows: prepared, tiles: in_tiles, .. } = room;
    let parts = prepare(operands, prepared, path);
    let prepared = &prepared[..];
    let count = parts.last().map_or(0, |part| part.tiles.end);
    let each = rows * TILE;

    // The tiles of a lone row are the row itself, if none is cut.
    let is_row = rows == 1 && operands.iter().all(|each| each.w.outputs().is_multiple_of(TILE));
    let to = if is_row { &mut *y } else { &mut *in_tiles };
    to.resize(count * each, 0.0);
    let work: usize = operands.iter().map(|each| each.x.len() * each.w.outputs()).sum();
    let threads = rayon::current_num_threads();
    let run = |first: usize, to: &mut [f32]| {
        let tiles = first..first + to.len() / each;
        for part in &parts {
            let own = part.tiles.start.max(tiles.start)..part.tiles.end.min(tiles.end);
            if own.start < own.end {
                let to = &mut to[(own.start - first) * each..(own.end - first) * each];
                let tiles = own.start - part.tiles.start..own.end - part.tiles.start;
                part.run(path, &prepared[part.rows], tiles, to);
            }
        }
    };
    if threads < 2 || work < MIN_PARALLEL {
        run(0, to);
    } else {
        let tiles = count.div_ceil(threads * PARTS_PER_THREAD).max(1);
        to.par_chunks_mut(tiles * each).enumerate().for_each(|(index, to)| run(index * tiles, to));
    }
    if is_row {
        return;
    }

    y.resize(rows * outputs, 0.0);
    let tiles = &in_tiles[..];
    let collect = |(row, y): (usize, &mut [f32])| {
        let mut y = &mut y[..];
        for part in &parts {
            let (own, others) = std::mem::take(&mut y).split_at_mut(part.w.outputs());
            y = others;
            for (tile, own) in part.tiles.clone().zip(own.chunks_mut(TILE)) {
                own.copy_from_slice(&tiles[(tile * rows + row) * TILE..][..own.len()]);
            }
        }
    };
    if work < MIN_PARALLEL {
        y.chunks_exact_mut(outputs).enumerate().for_each(collect);
    } else {
        y.par_chunks_exact_mut(outputs).enumerate().for_each(collect);
    }
}

/// One matrix of a product.
struct Part<'a> {
    w: &'a Matrix,
    /// Which of the prepared rows it is multiplied with.
    rows: usize,
    /// Which tiles of the result are its own.
    tiles: Range<usize>,
}

/// Puts rows into the forms that their matrices want, and counts tiles.
fn prepare<'a>(operands: &[Operands<'a>], prepared: &mut Vec<Rows>, path: Path) -> Vec<Part<'a>> {
    let mut parts: Vec<Part<'a>> = Vec::with_capacity(operands.len());
    let mut known: Vec<(*const f32, bool)> = Vec::with_capacity(operands.len());
    for Operands { x, w } in operands {
        let is_rounded = w.layout().is_some_and(|layout| layout.has_blocks());
        let key = (x.as_ptr(), is_rounded);
        let rows = known.iter().position(|known| *known == key).unwrap_or_else(|| {
            known.push(key);
            let index = known.len() - 1;
            if prepared.len() <= index {
                prepared.push(Rows::default());
            }
            if is_rounded {
                prepared[index].fill_blocks(x, w.inputs(), path);
            } else {
                prepared[index].fill_floats(x, w.inputs(), path);
            }
            index
        });
        let start = parts.last().map_or(0, |part| part.tiles.end);
        parts.push(Part { w, rows, tiles: start..start + w.outputs().div_ceil(TILE) });
    }
    parts
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
            return TileProduct { layout, tiles: self.w.tiles(tiles), inputs, rows, y }.run(path);
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
