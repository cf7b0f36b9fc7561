//! Rows as products read them: a few rows interleaved, so that what one step of the chains needs is in one place.

use std::ops::Range;

use rayon::prelude::*;

use super::{Isa, Kernel, Path};

/// Numbers of a row that share a scale.
const BLOCK: usize = 32;
/// Numbers of a row whose codes are added up.
const HALF_BLOCK: usize = 16;
/// The largest code.
const LARGEST: f32 = 127.0;
/// Blocks without a larger number are zero: the inverse of their scale might not be finite.
const SMALLEST: f32 = 1e-30;
/// Numbers below which a second thread costs more than it saves.
const MIN_PARALLEL: usize = 1 << 16;

/// Rows in one of the forms that products read, or in both.
#[derive(Debug, Default)]
pub(in crate::engine) struct Rows {
    pub(super) floats: FloatRows,
    pub(super) blocks: BlockRows,
}

impl Rows {
    /// Takes `x`, `[rows, inputs]`, for products with floating point numbers.
    pub(in crate::engine) fn fill_floats(&mut self, x: &[f32], inputs: usize, path: Path) {
        self.floats.fill(x, inputs, path);
    }

    /// Takes `x`, `[rows, inputs]`, for products with blocks; `inputs` is a multiple of 32.
    pub(in crate::engine) fn fill_blocks(&mut self, x: &[f32], inputs: usize, path: Path) {
        self.blocks.fill(x, inputs, path);
    }

    pub(in crate::engine) fn floats(&self) -> &FloatRows {
        &self.floats
    }
}

/// How rows are divided into groups of about the same size, at most `most` each.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Groups {
    rows: usize,
    count: usize,
}

impl Groups {
    fn new(rows: usize, most: usize) -> Self {
        Self { rows, count: rows.div_ceil(most) }
    }

    pub(super) fn rows(self) -> usize {
        self.rows
    }

    pub(super) fn count(self) -> usize {
        self.count
    }

    /// The rows of a group.
    pub(super) fn get(self, group: usize) -> Range<usize> {
        // The first ones have one more, where the rows can't be divided evenly.
        let (size, larger) = (self.rows / self.count, self.rows % self.count);
        let start = |group: usize| group * size + group.min(larger);
        start(group)..start(group + 1)
    }

    /// Cuts `values`, so many for each row, at the groups.
    fn cut<T>(self, mut values: &mut [T], each: usize) -> Vec<(Range<usize>, &mut [T])> {
        let mut cut = Vec::with_capacity(self.count);
        for group in 0..self.count {
            let rows = self.get(group);
            let (own, others) = std::mem::take(&mut values).split_at_mut(rows.len() * each);
            cut.push((rows, own));
            values = others;
        }
        cut
    }
}

/// Rows of f32: of each group `[inputs, rows of the group]`.
#[derive(Debug, Default)]
pub(in crate::engine) struct FloatRows {
    pub(super) groups: Groups,
    pub(super) values: Vec<f32>,
}

impl FloatRows {
    fn fill(&mut self, x: &[f32], inputs: usize, path: Path) {
        let rows = x.len() / inputs;
        self.groups = Groups::new(rows, path.float_rows());
        if rows == 1 {
            self.values.clear();
            self.values.extend_from_slice(x);
            return;
        }
        self.values.resize(x.len(), 0.0);
        let interleave = |(rows, to): (Range<usize>, &mut [f32])| {
            let from = &x[rows.start * inputs..rows.end * inputs];
            match rows.len() {
                2 => interleave::<2>(from, to),
                3 => interleave::<3>(from, to),
                4 => interleave::<4>(from, to),
                5 => interleave::<5>(from, to),
                6 => interleave::<6>(from, to),
                count => {
                    for (input, to) in to.chunks_exact_mut(count).enumerate() {
                        to.iter_mut().enumerate().for_each(|(row, to)| *to = from[row * inputs + input]);
                    }
                }
            }
        };
        let groups = self.groups.cut(&mut self.values, inputs);
        if x.len() < MIN_PARALLEL {
            groups.into_iter().for_each(interleave);
        } else {
            groups.into_par_iter().for_each(interleave);
        }
    }
}

fn interleave<const R: usize>(from: &[f32], to: &mut [f32]) {
    let inputs = from.len() / R;
    let from: [&[f32]; R] = std::array::from_fn(|row| &from[row * inputs..][..inputs]);
    for (input, to) in to.as_chunks_mut::<R>().0.iter_mut().enumerate() {
        for row in 0..R {
            to[row] = from[row][input];
        }
    }
}

/// Rows as codes of 8 bits with a scale for each block: the nearest multiples of a 127th of the block's largest number.
#[derive(Debug, Default)]
pub(in crate::engine) struct BlockRows {
    pub(super) groups: Groups,
    /// Of each group `[inputs / 4, rows of the group]`.
    pub(super) codes: Vec<[i8; 4]>,
    /// Of each group `[inputs / 32, rows of the group]`.
    pub(super) scales: Vec<f32>,
    /// What 16 codes add up to; of each group `[inputs / 16, rows of the group]`.
    pub(super) sums: Vec<i32>,
}

impl BlockRows {
    fn fill(&mut self, x: &[f32], inputs: usize, path: Path) {
        let rows = x.len() / inputs;
        self.groups = Groups::new(rows, path.block_rows());
        self.codes.resize(x.len() / 4, [0; 4]);
        self.scales.resize(x.len() / BLOCK, 0.0);
        self.sums.resize(x.len() / HALF_BLOCK, 0);
        let codes = self.groups.cut(&mut self.codes, inputs / 4);
        let scales = self.groups.cut(&mut self.scales, inputs / BLOCK);
        let sums = self.groups.cut(&mut self.sums, inputs / HALF_BLOCK);
        let parts = codes.into_iter().zip(scales).zip(sums).map(|(((rows, codes), (_, scales)), (_, sums))| {
            let x = &x[rows.start * inputs..rows.end * inputs];
            Rounding { x, rows: rows.len(), codes, scales, sums }
        });
        if x.len() < MIN_PARALLEL {
            parts.for_each(|part| path.run(part));
        } else {
            parts.collect::<Vec<_>>().into_par_iter().for_each(|part| path.run(part));
        }
    }
}

/// Rounds the rows of one group.
struct Rounding<'a> {
    x: &'a [f32],
    rows: usize,
    codes: &'a mut [[i8; 4]],
    scales: &'a mut [f32],
    sums: &'a mut [i32],
}

impl Kernel for Rounding<'_> {
    type Output = ();

    #[inline(always)]
    fn on<A: Isa>(self, _: A) {
        let Self { x, rows, codes, scales, sums } = self;
        let blocks = scales.len() / rows;
        for row in 0..rows {
            for block in 0..blocks {
                let x = &x[(row * blocks + block) * BLOCK..][..BLOCK];
                // As integers magnitudes have the same order, with NaN above all: it must not get lost.
                let mut bits = 0;
                for x in x {
                    bits = bits.max(x.to_bits() & 0x7FFF_FFFF);
                }
                let largest = f32::from_bits(bits);
                let is_zero = largest < SMALLEST;
                let scale = if is_zero { 0.0 } else { largest / LARGEST };
                let inverse = if is_zero { 0.0 } else { 1.0 / scale };
                scales[block * rows + row] = scale;
                let mut rounded = [0i8; BLOCK];
                for (code, x) in rounded.iter_mut().zip(x) {
                    // Where a unit in the last place is one, an addition rounds to integers, and the lowest byte is the code.
                    const ONE: f32 = 12_582_912.0;
                    *code = (x * inverse + ONE).to_bits() as i8;
                }
                for (index, four) in rounded.as_chunks::<4>().0.iter().enumerate() {
                    codes[(block * (BLOCK / 4) + index) * rows + row] = *four;
                }
                for (index, half) in rounded.as_chunks::<HALF_BLOCK>().0.iter().enumerate() {
                    let mut sum = 0;
                    for code in half {
                        sum += i32::from(*code);
                    }
                    sums[(block * 2 + index) * rows + row] = sum;
                }
            }
        }
    }
}
