//! Linear layers: the one place that knows how weights are stored and multiplied.

use candle_core::{Error as TensorError, Tensor};

use super::{
    load::{LoadError, Source},
    mxfp4::Mxfp4,
    product::product,
    tensor::{self, Slice},
};
use crate::model::spec::LinearSpec;

/// A matrix `[outputs, inputs]` in memory.
enum Weight {
    /// In the engine's dtype.
    Dense(Tensor),
    /// As the checkpoint has it.
    Mxfp4(Vec<Mxfp4>),
}

/// One or several matrices that read the same rows, one below the other.
///
/// A product widens the weights to f32 a panel at a time and sums in f32.
pub(super) struct Linear {
    weight: Weight,
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
                    Some(_) => bias.extend(source.bias(part)?),
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
        Ok(Self { weight: Weight::Dense(weight), bias, inputs, outputs })
    }

    /// Takes the rows of a matrix of `inputs` columns, which are a multiple of a block's.
    pub(super) fn mxfp4(weight: Vec<Mxfp4>, bias: Vec<f32>, inputs: usize) -> Self {
        Self { weight: Weight::Mxfp4(weight), outputs: bias.len(), bias: Some(bias), inputs }
    }

    /// `x · weightᵀ + bias`: from `[rows, inputs]` to `[rows, outputs]`.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor, TensorError> {
        let mut y = tensor::with_f32(x, |x| match &self.weight {
            Weight::Dense(weight) => tensor::with_slice(weight, |weight| match weight {
                Slice::F32(weight) => product(x, weight, self.inputs),
                Slice::Bf16(weight) => product(x, weight, self.inputs),
                Slice::F16(weight) => product(x, weight, self.inputs),
            }),
            Weight::Mxfp4(weight) => Ok(product(x, weight, self.inputs)),
        })??;
        if let Some(bias) = &self.bias {
            for row in y.chunks_exact_mut(self.outputs) {
                row.iter_mut().zip(bias).for_each(|(y, bias)| *y += bias);
            }
        }
        tensor::matrix(y, self.outputs)
    }
}
