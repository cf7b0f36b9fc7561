//! Rows as products read them: a few rows interleaved, so that what one step of the chains needs is in one place.

use std::ops::Range;

use super::{Isa, Kernel, Path};
use crate::engine::threads;

/// Numbers of a row that share a scale.
const BLOCK: usize = 32;
/// Numbers of a row whose codes are added up.
const HALF_BLOCK: usize = 16;
/// The largest code.
const LARGEST: f32 = 127.0;
/// Blocks without a larger number are zero: the inverse of their scale might not be finite.
const SMALLEST: f32 = 1e-30;
/// Numbers below which a second thread costs more than it saves.
const MIN_PARALLEL: usize = 1 << 14;

/// Rows in one of the forms that products read, or in both.
#[derive(Debug, Default)]
pub(in crate::engine) struct Rows {
    pub(super) floats: FloatRows,
    pub(super) blocks: BlockRows,
}

impl Rows {
    /// Takes `x`, `[rows, inputs]`, for products with floating point numbers.
    pub(in crate::engine) fn fill_floats(&mut self, x: &[f32], inputs: usize, path: Path) {
        fill_all(self.float_slots(x.len() / inputs, inputs, path), x, path);
    }

    /// Takes `x`, `[rows, inputs]`, for products with blocks; `inputs` is a multiple of 32.
    pub(in crate::engine) fn fill_blocks(&mut self, x: &[f32], inputs: usize, path: Path) {
        fill_all(self.block_slots(x.len() / inputs, inputs, path), x, path);
    }

    /// Places for `rows` rows for products with floating point numbers, group by group. All of them are to be filled.
    pub(in crate::engine) fn float_slots(&mut self, rows: usize, inputs: usize, path: Path) -> Vec<Slot<'_>> {
        let FloatRows { groups, values } = &mut self.floats;
        *groups = Groups::new(rows, path.float_rows());
        let mut values = grown(values, rows * inputs);
        let slot = |rows: Range<usize>| Slot { form: Form::Floats(cut(&mut values, rows.len() * inputs)), rows };
        (0..groups.count()).map(|group| groups.get(group)).map(slot).collect()
    }

    /// The same for products with blocks; `inputs` is a multiple of 32.
    pub(in crate::engine) fn block_slots(&mut self, rows: usize, inputs: usize, path: Path) -> Vec<Slot<'_>> {
        let BlockRows { groups, codes, scales, sums } = &mut self.blocks;
        *groups = Groups::new(rows, path.block_rows());
        let numbers = rows * inputs;
        let mut codes = grown(codes, numbers / 4);
        let mut scales = grown(scales, numbers / BLOCK);
        let mut sums = grown(sums, numbers / HALF_BLOCK);
        let slot = |rows: Range<usize>| {
            let numbers = rows.len() * inputs;
            let codes = cut(&mut codes, numbers / 4);
            let scales = cut(&mut scales, numbers / BLOCK);
            Slot { form: Form::Blocks { codes, scales, sums: cut(&mut sums, numbers / HALF_BLOCK) }, rows }
        };
        (0..groups.count()).map(|group| groups.get(group)).map(slot).collect()
    }

    pub(in crate::engine) fn floats(&self) -> &FloatRows {
        &self.floats
    }
}

/// The first `count` of a buffer that only grows; they hold whatever was there.
pub(in crate::engine) fn grown<T: Clone + Default>(buffer: &mut Vec<T>, count: usize) -> &mut [T] {
    if buffer.len() < count {
        buffer.resize(count, T::default());
    }
    &mut buffer[..count]
}

/// Takes the first `count` of `rest` away.
pub(in crate::engine) fn cut<'a, T>(rest: &mut &'a mut [T], count: usize) -> &'a mut [T] {
    let (own, others) = std::mem::take(rest).split_at_mut(count);
    *rest = others;
    own
}

/// A place for the rows of one group, for whoever has them at hand.
pub(in crate::engine) struct Slot<'a> {
    rows: Range<usize>,
    form: Form<'a>,
}

enum Form<'a> {
    /// Rows stay where they are.
    None,
    Floats(&'a mut [f32]),
    Blocks {
        codes: &'a mut [[i8; 4]],
        scales: &'a mut [f32],
        sums: &'a mut [i32],
    },
}

impl Slot<'_> {
    /// A place where nothing is put: the rows are wanted in other forms, later.
    pub(in crate::engine) fn none(rows: Range<usize>) -> Self {
        Self { rows, form: Form::None }
    }

    /// The rows of the group.
    pub(in crate::engine) fn rows(&self) -> Range<usize> {
        self.rows.clone()
    }

    /// Puts the group's rows here, `[rows, inputs]`.
    pub(in crate::engine) fn fill(self, x: &[f32], path: Path) {
        let rows = self.rows.len();
        match self.form {
            Form::None => {}
            Form::Floats(values) => interleave(x, rows, values),
            Form::Blocks { codes, scales, sums } => path.run(Rounding { x, rows, codes, scales, sums }),
        }
    }
}

/// Fills slots from all rows, `[rows, inputs]`.
pub(in crate::engine) fn fill_all(slots: Vec<Slot<'_>>, x: &[f32], path: Path) {
    let rows = slots.last().map_or(1, |slot| slot.rows.end);
    let inputs = x.len() / rows;
    let fill = |slot: Slot<'_>| {
        let x = &x[slot.rows.start * inputs..slot.rows.end * inputs];
        slot.fill(x, path);
    };
    threads::each(slots, x.len() >= MIN_PARALLEL, fill);
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
}

/// Rows of f32: of each group `[inputs, rows of the group]`.
#[derive(Debug, Default)]
pub(in crate::engine) struct FloatRows {
    pub(super) groups: Groups,
    pub(super) values: Vec<f32>,
}

/// Puts `rows` rows, `[rows, inputs]`, side by side: `[inputs, rows]`.
fn interleave(from: &[f32], rows: usize, to: &mut [f32]) {
    match rows {
        1 => to.copy_from_slice(from),
        2 => interleave_few::<2>(from, to),
        3 => interleave_few::<3>(from, to),
        4 => interleave_few::<4>(from, to),
        5 => interleave_few::<5>(from, to),
        6 => interleave_few::<6>(from, to),
        _ => {
            let inputs = from.len() / rows;
            for (input, to) in to.chunks_exact_mut(rows).enumerate() {
                to.iter_mut().enumerate().for_each(|(row, to)| *to = from[row * inputs + input]);
            }
        }
    }
}

fn interleave_few<const R: usize>(from: &[f32], to: &mut [f32]) {
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
