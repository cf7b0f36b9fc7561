//! The one block on a device: runs whatever a [`BlockSpec`] says.

use candle_core::{Result as TensorResult, Tensor};

use super::{
    attention::{Attention, Rows},
    ffn::Ffn,
    norm::Norm,
    upload::Upload,
};
use crate::{
    engine::load::LoadError,
    model::spec::{BlockSpec, NormSpec, ResidualOrder},
};

/// A loaded block.
pub(super) struct Block {
    residual: ResidualOrder,
    attention_norm: Norm,
    pub(super) attention: Attention,
    attention_output_norm: Option<Norm>,
    /// `None` if both parts read through the same norm.
    ffn_norm: Option<Norm>,
    ffn: Ffn,
    ffn_output_norm: Option<Norm>,
}

impl Block {
    /// `pages` is the size of its part of the KV cache.
    pub(super) fn load(
        spec: &BlockSpec,
        hidden: usize,
        pages: usize,
        upload: &mut Upload<'_, '_>,
    ) -> Result<Self, LoadError> {
        let shared = spec.residual == ResidualOrder::Parallel && spec.attention_norm == spec.ffn_norm;
        let ffn_norm = Some(&spec.ffn_norm).filter(|_| !shared);
        let mut norm = |spec: Option<&NormSpec>| spec.map(|spec| Norm::load(spec, hidden, upload)).transpose();
        Ok(Self {
            residual: spec.residual,
            ffn_norm: norm(ffn_norm)?,
            attention_output_norm: norm(spec.attention_output_norm.as_ref())?,
            ffn_output_norm: norm(spec.ffn_output_norm.as_ref())?,
            attention_norm: Norm::load(&spec.attention_norm, hidden, upload)?,
            attention: Attention::load(&spec.attention, pages, upload)?,
            ffn: Ffn::load(&spec.ffn, hidden, upload)?,
        })
    }

    /// Runs the rows `x`, `[rows, hidden]` in f32, through the block; the result is not rounded to any wire format yet.
    pub(super) fn forward(&self, x: &Tensor, rows: &Rows<'_>) -> TensorResult<Tensor> {
        let normed = self.attention_norm.forward(x)?;
        let mixed = through(self.attention_output_norm.as_ref(), self.attention.forward(&normed, rows)?)?;
        match self.residual {
            ResidualOrder::Sequential => {
                let x = (x + mixed)?;
                &x + self.ffn(&through(self.ffn_norm.as_ref(), x.clone())?)?
            }
            ResidualOrder::Parallel => {
                let read = match &self.ffn_norm {
                    Some(norm) => norm.forward(x)?,
                    None => normed,
                };
                x + (mixed + self.ffn(&read)?)?
            }
            ResidualOrder::AfterNorm => {
                let x = through(self.ffn_norm.as_ref(), (normed + mixed)?)?;
                &x + self.ffn(&x)?
            }
        }
    }

    fn ffn(&self, x: &Tensor) -> TensorResult<Tensor> {
        through(self.ffn_output_norm.as_ref(), self.ffn.forward(x)?)
    }
}

/// `x`, normalised where there is a norm.
fn through(norm: Option<&Norm>, x: Tensor) -> TensorResult<Tensor> {
    match norm {
        Some(norm) => norm.forward(&x),
        None => Ok(x),
    }
}
