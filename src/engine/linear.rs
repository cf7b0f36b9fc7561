//! Linear layers: matrices that read the same rows, and a bias.

use std::sync::Arc;

use candle_core::{Error as TensorError, Tensor};

use super::{
    load::{LoadError, Source},
    matrix::Matrix,
    product::{Operands, products},
    tensor,
};
use crate::model::spec::LinearSpec;

/// One or several matrices that read the same rows, one below the other, each in a form of its own.
pub(super) struct Linear {
    parts: Vec<Part>,
    /// Orders of columns that parts are stored in, each once.
    orders: Vec<Vec<u32>>,
    /// `[outputs]`, always in f32.
    bias: Option<Vec<f32>>,
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
        let outputs = matrices.iter().map(|matrix| matrix.outputs()).sum();
        let parts = matrices.into_iter().map(|matrix| Part { order: order_of(&matrix), matrix }).collect();
        Self { parts, orders, bias, outputs }
    }

    /// `x · weightᵀ + bias`: from `[rows, inputs]` to `[rows, outputs]`.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor, TensorError> {
        let (_, inputs) = x.dims2()?;
        let mut y = tensor::with_f32(x, |x| {
            let gather = |order: &Vec<u32>| -> Vec<f32> {
                let row = |x: &[f32]| order.iter().map(|column| x[*column as usize]).collect::<Vec<f32>>();
                x.chunks_exact(inputs).flat_map(row).collect()
            };
            let gathered: Vec<Vec<f32>> = self.orders.iter().map(gather).collect();
            let operands = self
                .parts
                .iter()
                .map(|part| Operands { x: part.order.map_or(x, |order| &gathered[order]), w: &part.matrix });
            products(&operands.collect::<Vec<_>>())
        })?;
        if let Some(bias) = &self.bias {
            for row in y.chunks_exact_mut(self.outputs) {
                row.iter_mut().zip(bias).for_each(|(y, bias)| *y += bias);
            }
        }
        tensor::matrix(y, self.outputs)
    }
}
