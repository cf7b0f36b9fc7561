//! Linear layers: matrices that read the same rows, and a bias.
//!
//! A layer is one call, [`Linear::forward`], or three, which its neighbours in a block do their part of: who makes its rows puts them
//! where the product reads them ([`Linear::slots`]), the product is computed ([`Linear::multiply`]), and who needs the result takes rows
//! of it ([`Linear::collect`]). So rows are rearranged while they are in the nearest cache, on the thread that has them there.

use std::{ops::Range, sync::Arc};

use super::{
    kernels::{Path, Rows, Slot},
    load::{LoadError, Source},
    matrix::Matrix,
    product::{Operands, Product, Room, Tiles, products, reads_blocks},
};
use crate::model::spec::LinearSpec;

/// One or several matrices that read the same rows, one below the other, each in a form of its own.
pub(super) struct Linear {
    parts: Vec<Part>,
    /// Orders of columns that parts are stored in, each once.
    orders: Vec<Vec<u32>>,
    /// `[outputs]`, always in f32.
    bias: Option<Vec<f32>>,
    inputs: usize,
    outputs: usize,
}

struct Part {
    matrix: Arc<Matrix>,
    /// Which of the orders its columns are in, where they aren't in their own.
    order: Option<usize>,
}

impl Linear {
    /// Loads `parts`, which have the same number of inputs, as one matrix.
    pub(super) fn load(parts: &[&LinearSpec], source: &mut Source<'_>) -> Result<Self, LoadError> {
        let matrices = parts.iter().map(|part| source.matrix(part).map(Arc::new)).collect::<Result<_, _>>()?;
        Ok(Self::new(matrices, source.biases(parts)?))
    }

    /// Loads a matrix that is never quantized.
    pub(super) fn load_plain(part: &LinearSpec, source: &mut Source<'_>) -> Result<Self, LoadError> {
        Ok(Self::new(vec![Arc::new(source.plain_matrix(part)?)], source.biases(&[part])?))
    }

    /// Takes `matrices`, which have the same number of inputs, without copying them.
    pub(super) fn new(matrices: Vec<Arc<Matrix>>, bias: Option<Vec<f32>>) -> Self {
        let mut orders: Vec<Vec<u32>> = Vec::new();
        let mut order_of = |matrix: &Matrix| {
            let order = matrix.order()?;
            Some(orders.iter().position(|known| known == order).unwrap_or_else(|| {
                orders.push(order.to_vec());
                orders.len() - 1
            }))
        };
        let inputs = matrices.first().map_or(0, |matrix| matrix.inputs());
        let outputs = matrices.iter().map(|matrix| matrix.outputs()).sum();
        let parts = matrices.into_iter().map(|matrix| Part { order: order_of(&matrix), matrix }).collect();
        Self { parts, orders, bias, inputs, outputs }
    }

    /// Width of the rows that it reads.
    pub(super) fn inputs(&self) -> usize {
        self.inputs
    }

    /// `y = x · weightᵀ + bias`: from `[rows, inputs]` to `[rows, outputs]`.
    pub(super) fn forward(&self, x: &[f32], y: &mut Vec<f32>, room: &mut Room) {
        let mut gathered = std::mem::take(&mut room.gathered);
        products(&self.operands(x, &mut gathered), y, room);
        room.gathered = gathered;
        self.add_bias(y);
    }

    /// Places for the rows that [`Linear::multiply`] is to read, group by group, for whoever makes them: to be filled with
    /// `[rows, inputs]`, and these to be kept.
    pub(super) fn slots<'a>(&self, rows: usize, prepared: &'a mut Vec<Rows>) -> Vec<Slot<'a>> {
        let Some(are_blocks) = self.form() else { return plain_slots(rows) };
        prepared.resize_with(prepared.len().max(1), Rows::default);
        let (prepared, path) = (&mut prepared[0], Path::chosen());
        if are_blocks {
            prepared.block_slots(rows, self.inputs, path)
        } else {
            prepared.float_slots(rows, self.inputs, path)
        }
    }

    /// The product without the bias, left in `room.tiles` for [`Linear::collect`]. The rows `x`, `[rows, inputs]`, are in the places that
    /// [`Linear::slots`] gave.
    pub(super) fn multiply(&self, x: &[f32], room: &mut Room) {
        let path = Path::chosen();
        if self.form().is_some() {
            let matrices = self.parts.iter().map(|part| &*part.matrix);
            let product = Product::prepared(path, matrices, x.len() / self.inputs);
            return room.tiles.fill(&product, &room.rows);
        }
        let Room { gathered, rows, tiles } = room;
        let product = Product::preparing(path, &self.operands(x, gathered), rows);
        tiles.fill(&product, rows);
    }

    /// Takes some rows of the result out of the tiles, and adds the bias: `[rows, outputs]`.
    pub(super) fn collect(&self, tiles: &Tiles, rows: Range<usize>, y: &mut [f32]) {
        tiles.collect(self.parts.iter().map(|part| part.matrix.outputs()), rows, y);
        self.add_bias(y);
    }

    fn add_bias(&self, y: &mut [f32]) {
        if let Some(bias) = &self.bias {
            for row in y.chunks_exact_mut(self.outputs) {
                row.iter_mut().zip(bias).for_each(|(y, bias)| *y += bias);
            }
        }
    }

    /// Whether the matrices read rounded rows; `None` if they read different things.
    fn form(&self) -> Option<bool> {
        let (first, others) = self.parts.split_first()?;
        let are_blocks = reads_blocks(&first.matrix);
        let is_alike = |part: &Part| part.order.is_none() && reads_blocks(&part.matrix) == are_blocks;
        (first.order.is_none() && others.iter().all(is_alike)).then_some(are_blocks)
    }

    /// What is multiplied with what, with columns in the orders of the matrices.
    fn operands<'a>(&'a self, x: &'a [f32], gathered: &'a mut Vec<Vec<f32>>) -> Vec<Operands<'a>> {
        gathered.resize_with(self.orders.len().max(gathered.len()), Vec::new);
        for (order, gathered) in self.orders.iter().zip(&mut *gathered) {
            gathered.clear();
            for row in x.chunks_exact(self.inputs) {
                gathered.extend(order.iter().map(|column| row[*column as usize]));
            }
        }
        let rows_of = |part: &Part| part.order.map_or(x, |order| &gathered[order]);
        self.parts.iter().map(|part| Operands { x: rows_of(part), w: &part.matrix }).collect()
    }
}

/// Rows of a group whose matrices read different things, or whose readers want them as they are.
const PLAIN_ROWS: usize = 4;

/// Groups of rows that stay where they are.
pub(super) fn plain_slots<'a>(rows: usize) -> Vec<Slot<'a>> {
    (0..rows).step_by(PLAIN_ROWS).map(|first| Slot::none(first..rows.min(first + PLAIN_ROWS))).collect()
}
