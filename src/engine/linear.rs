//! Linear layers: matrices that read the same rows, and a bias.

use std::sync::Arc;

use super::{
    load::{LoadError, Source},
    matrix::Matrix,
    product::{Operands, Room, products},
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

    /// `y = x · weightᵀ + bias`: from `[rows, inputs]` to `[rows, outputs]`.
    pub(super) fn forward(&self, x: &[f32], y: &mut Vec<f32>, room: &mut Room) {
        let mut gathered = std::mem::take(&mut room.gathered);
        gathered.resize_with(self.orders.len().max(gathered.len()), Vec::new);
        for (order, gathered) in self.orders.iter().zip(&mut gathered) {
            gathered.clear();
            for row in x.chunks_exact(self.inputs) {
                gathered.extend(order.iter().map(|column| row[*column as usize]));
            }
        }
        let rows_of = |part: &Part| part.order.map_or(x, |order| &gathered[order]);
        let operands: Vec<_> = self.parts.iter().map(|part| Operands { x: rows_of(part), w: &part.matrix }).collect();
        products(&operands, y, room);
        room.gathered = gathered;
        if let Some(bias) = &self.bias {
            for row in y.chunks_exact_mut(self.outputs) {
                row.iter_mut().zip(bias).for_each(|(y, bias)| *y += bias);
            }
        }
    }
}
