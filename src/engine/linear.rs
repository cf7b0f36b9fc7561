//! Linear layers: the one place that knows how weights are stored and multiplied.

use candle_core::{Error as TensorError, Tensor};

use super::{
    load::{LoadError, Source},
    product::product,
    tensor::{self, Slice},
};
use crate::model::spec::LinearSpec;

/// One or several matrices that read the same rows, one below the other, in the engine's dtype.
///
/// A product widens the weights to f32 a panel at a time and sums in f32.
pub(super) struct Linear {
    /// `[outputs, inputs]`.
    weight: Tensor,
    /// `[outputs]`, always in f32.
    bias: Option<Vec<f32>>,
    inputs: usize,
    outputs: usize,
}

impl Linear {
    /// Loads `parts`, which have the same number of inputs, as one matrix.
    pub(super) fn load(parts: &[&LinearSpec], source: &mut Source<'_>) -> Result<Self, LoadError> {
        let weight = source.matrix(parts)?;
        let bias = if parts.iter().any(|part| part.bias.is_some()) {
            let mut bias = Vec::new();
            for part in parts {
                match &part.bias {
                    Some(name) => bias.extend(source.vector(name, part.outputs)?),
                    None => bias.resize(bias.len() + part.outputs, 0.0),
                }
            }
            Some(bias)
        } else {
            None
        };
        Ok(Self::new(weight, bias)?)
    }

    /// Takes `weight`, `[outputs, inputs]`, without copying it.
    pub(super) fn new(weight: Tensor, bias: Option<Vec<f32>>) -> Result<Self, TensorError> {
        let (outputs, inputs) = weight.dims2()?;
        Ok(Self { weight, bias, inputs, outputs })
    }

    /// `x · weightᵀ + bias`: from `[rows, inputs]` to `[rows, outputs]`.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor, TensorError> {
        let mut y = tensor::with_f32(x, |x| {
            tensor::with_slice(&self.weight, |weight| match weight {
                Slice::F32(weight) => product(x, weight, self.inputs),
                Slice::Bf16(weight) => product(x, weight, self.inputs),
                Slice::F16(weight) => product(x, weight, self.inputs),
            })
        })??;
        if let Some(bias) = &self.bias {
            for row in y.chunks_exact_mut(self.outputs) {
                row.iter_mut().zip(bias).for_each(|(y, bias)| *y += bias);
            }
        }
        tensor::matrix(y, self.outputs)
    }
}
