//! Norms on a device.

use candle_core::{D, Result as TensorResult, Tensor};
use candle_nn::ops::rms_norm;

use super::upload::Upload;
use crate::{
    engine::load::LoadError,
    model::spec::{NormKind, NormSpec},
};

/// A loaded norm. All of it is in f32, as what it reads and gives.
pub(super) struct Norm {
    kind: NormKind,
    epsilon: f32,
    /// `[width]`.
    weight: Tensor,
    /// `[width]`.
    bias: Option<Tensor>,
}

impl Norm {
    pub(super) fn load(spec: &NormSpec, width: usize, upload: &mut Upload<'_, '_>) -> Result<Self, LoadError> {
        let weight = upload.vector(&spec.weight, width)?;
        Ok(Self {
            kind: spec.kind,
            epsilon: spec.epsilon as f32,
            weight: if spec.kind == NormKind::RmsPlusOne { (weight + 1.0)? } else { weight },
            bias: spec.bias.as_ref().map(|name| upload.vector(name, width)).transpose()?,
        })
    }

    /// Normalises the last dimension of `x`, `[…, width]`.
    pub(super) fn forward(&self, x: &Tensor) -> TensorResult<Tensor> {
        let centred = match self.kind {
            NormKind::Rms | NormKind::RmsPlusOne => x.contiguous()?,
            // What is left of layer normalisation once the mean is zero is the other kind.
            NormKind::Layer => x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?,
        };
        let y = rms_norm(&centred, &self.weight, self.epsilon)?;
        match &self.bias {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        }
    }
}
