//! Linear layers on a device.

use std::sync::Arc;

use candle_core::{DType, Result as TensorResult, Tensor, quantized::QTensor};

/// A matrix on a device.
pub(super) enum Weight {
    /// `[outputs, inputs]` in the engine's dtype, or in f32.
    Floats(Tensor),
    /// `[outputs, inputs]` in GGML's blocks. Their products round activations to 8 bits, in blocks of 32 on CUDA.
    Blocks(Arc<QTensor>),
}

/// One or several matrices that read the same rows, one below the other.
pub(super) struct Linear {
    weights: Vec<Weight>,
    /// `[outputs]` in f32.
    bias: Option<Tensor>,
}

impl Linear {
    /// Takes matrices that have the same number of inputs; at least one.
    pub(super) fn new(weights: Vec<Weight>, bias: Option<Tensor>) -> Self {
        Self { weights, bias }
    }

    /// `x · weightᵀ + bias`, from `[rows, inputs]` to `[rows, outputs]`, both in f32.
    pub(super) fn forward(&self, x: &Tensor) -> TensorResult<Tensor> {
        let products = self.weights.iter().map(|weight| weight.product(x)).collect::<TensorResult<Vec<_>>>()?;
        let y = match &products[..] {
            [only] => only.clone(),
            several => Tensor::cat(several, 1)?,
        };
        match &self.bias {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        }
    }
}

impl Weight {
    fn product(&self, x: &Tensor) -> TensorResult<Tensor> {
        match self {
            Self::Floats(weight) => product(x, &weight.t()?),
            Self::Blocks(weight) => x.contiguous()?.apply_op1_no_bwd(weight.as_ref()),
        }
    }
}

/// `x · weight` in f32, both with the same dimensions in front. Numbers are multiplied in the weight's dtype, and added up
/// in f32 whatever the dtype, on every device.
pub(super) fn product(x: &Tensor, weight: &Tensor) -> TensorResult<Tensor> {
    x.to_dtype(weight.dtype())?.matmul(weight)?.to_dtype(DType::F32)
}
