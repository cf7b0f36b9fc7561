//! Experts in floating point: the same matrix of all of them is one tensor.

use candle_core::{D, Result as TensorResult, Tensor};

use super::super::{linear::product, upload::Upload};
use crate::{
    engine::load::LoadError,
    model::spec::{LinearSpec, MXFP4_GROUP, StackedFormat, expert_name},
};

/// The same matrix of all experts.
pub(super) struct Stack {
    /// `[experts, outputs, inputs]`, or `[experts, inputs, outputs]`.
    pub(super) weights: Tensor,
    /// Which of the two.
    pub(super) inputs_first: bool,
    /// `[experts, 1, outputs]` in f32.
    pub(super) bias: Option<Tensor>,
}

impl Stack {
    pub(super) fn outputs(&self) -> TensorResult<usize> {
        self.weights.dim(if self.inputs_first { 2 } else { 1 })
    }

    /// The matrices `ids` in their order.
    pub(super) fn select(&self, ids: &Tensor) -> TensorResult<Self> {
        let bias = self.bias.as_ref().map(|bias| bias.index_select(ids, 0)).transpose()?;
        Ok(Self { weights: self.weights.index_select(ids, 0)?, inputs_first: self.inputs_first, bias })
    }

    /// From `[experts, rows, inputs]` to `[experts, rows, outputs]`.
    pub(super) fn forward(&self, x: &Tensor) -> TensorResult<Tensor> {
        let y = if self.inputs_first {
            product(x, &self.weights)?
        } else {
            product(x, &self.weights.transpose(D::Minus1, D::Minus2)?)?
        };
        match &self.bias {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        }
    }
}

/// A stack that is stored as matrices of their own. Several parts lie one below the other.
pub(super) struct Separate<'a> {
    /// Of each part, its name and its bias's.
    pub(super) names: &'a [(&'a String, Option<&'a String>)],
    pub(super) count: usize,
}

impl Separate<'_> {
    /// `part` is the shape of one of the parts.
    pub(super) fn load(&self, part: [usize; 2], upload: &mut Upload<'_, '_>) -> Result<Stack, LoadError> {
        let [outputs, inputs] = part;
        let shape = (self.count, self.names.len() * outputs, inputs);
        let weights = Tensor::zeros(shape, upload.dtype(), upload.device())?;
        let mut biases = Vec::new();
        for expert in 0..self.count {
            for (index, (name, bias)) in self.names.iter().enumerate() {
                let weight = expert_name(name, expert);
                let linear = LinearSpec { weight, bias: None, outputs, inputs, rows: None };
                let stored = upload.stored(&linear)?;
                let matrix = upload.floats(&linear.weight, stored, upload.dtype())?;
                weights.narrow(0, expert, 1)?.slice_set(&matrix.unsqueeze(0)?, 1, index * outputs)?;
                if let Some(bias) = bias {
                    biases.push(upload.vector(&expert_name(bias, expert), outputs)?);
                }
            }
        }
        let bias = match &biases[..] {
            [] => None,
            biases => Some(Tensor::cat(biases, 0)?.reshape((self.count, 1, self.names.len() * outputs))?),
        };
        Ok(Stack { weights, inputs_first: false, bias })
    }
}

/// A stack that is stored as one.
pub(super) struct Stacked<'a> {
    pub(super) name: &'a str,
    pub(super) bias: &'a str,
    /// Experts, outputs, inputs.
    pub(super) shape: [usize; 3],
}

impl Stacked<'_> {
    pub(super) fn load(&self, format: StackedFormat, upload: &mut Upload<'_, '_>) -> Result<Stack, LoadError> {
        let [count, outputs, inputs] = self.shape;
        let bias = Some(upload.vector_of(self.bias, &[count, outputs])?.unsqueeze(1)?);
        match format {
            StackedFormat::Transposed => {
                let weights = upload.stack(self.name, &[count, inputs, outputs])?;
                Ok(Stack { weights, inputs_first: true, bias })
            }
            StackedFormat::Mxfp4 => {
                let weights = Tensor::zeros((count, outputs, inputs), upload.dtype(), upload.device())?;
                let stored = upload.mxfp4(self.name, [count, outputs, inputs / MXFP4_GROUP])?;
                for (expert, stored) in stored.into_iter().enumerate() {
                    let matrix = upload.floats(self.name, stored, upload.dtype())?;
                    weights.slice_set(&matrix.unsqueeze(0)?, 0, expert)?;
                }
                Ok(Stack { weights, inputs_first: false, bias })
            }
        }
    }
}
