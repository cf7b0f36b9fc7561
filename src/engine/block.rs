//! The one block: runs whatever a [`BlockSpec`] says.

use candle_core::{Error as TensorError, Tensor};

use super::{
    attention::{Attention, RowRun},
    ffn::Ffn,
    hidden,
    load::{LoadError, Source},
    norm::Norm,
    planes::KvPlanes,
    rope::Angles,
    tensor,
};
use crate::model::{
    Dtype,
    spec::{BlockSpec, NormSpec, ResidualOrder},
};

/// A loaded block.
pub(super) struct Block {
    residual: ResidualOrder,
    attention_norm: Norm,
    attention: Attention,
    attention_output_norm: Option<Norm>,
    /// `None` if both parts read through the same norm.
    ffn_norm: Option<Norm>,
    ffn: Ffn,
    ffn_output_norm: Option<Norm>,
}

/// The rows of a pass at one block.
pub(super) struct Batch<'a> {
    /// The rows by lane.
    pub(super) runs: &'a [RowRun<'a>],
    /// Rotary angles of the rows, where the block has them.
    pub(super) angles: Option<&'a Angles>,
    /// What the rows are rounded to, in order: so many rows to such a format.
    pub(super) wires: &'a [(usize, Dtype)],
}

impl Block {
    pub(super) fn load(spec: &BlockSpec, hidden: usize, source: &mut Source<'_>) -> Result<Self, LoadError> {
        let shared = spec.residual == ResidualOrder::Parallel && spec.attention_norm == spec.ffn_norm;
        let ffn_norm = Some(&spec.ffn_norm).filter(|_| !shared);
        let mut norm = |spec: Option<&NormSpec>| spec.map(|spec| Norm::load(spec, hidden, source)).transpose();
        Ok(Self {
            residual: spec.residual,
            ffn_norm: norm(ffn_norm)?,
            attention_output_norm: norm(spec.attention_output_norm.as_ref())?,
            ffn_output_norm: norm(spec.ffn_output_norm.as_ref())?,
            attention_norm: Norm::load(&spec.attention_norm, hidden, source)?,
            attention: Attention::load(&spec.attention, source)?,
            ffn: Ffn::load(&spec.ffn, hidden, source)?,
        })
    }

    /// Runs the rows `x`, `[rows, hidden]`, through the block.
    ///
    /// The sums are in f32; what leaves the block is rounded to each row's wire format, whether or not it travels, so
    /// that the place of a cut between two nodes can't change a bit.
    pub(super) fn forward(&self, x: &Tensor, batch: &Batch<'_>, cache: &mut KvPlanes) -> Result<Tensor, TensorError> {
        let normed = self.attention_norm.forward(x)?;
        let mixed = self.attention.forward(&normed, batch, cache)?;
        let mixed = through(self.attention_output_norm.as_ref(), mixed)?;
        let sum = match self.residual {
            ResidualOrder::Sequential => {
                let x = tensor::add(x, &mixed)?;
                tensor::add(&x, &self.ffn(&through(self.ffn_norm.as_ref(), x.clone())?)?)?
            }
            ResidualOrder::Parallel => {
                let read = match &self.ffn_norm {
                    Some(norm) => norm.forward(x)?,
                    None => normed,
                };
                tensor::add(x, &tensor::add(&mixed, &self.ffn(&read)?)?)?
            }
            ResidualOrder::AfterNorm => {
                let x = through(self.ffn_norm.as_ref(), tensor::add(&normed, &mixed)?)?;
                tensor::add(&x, &self.ffn(&x)?)?
            }
        };
        round(sum, batch.wires)
    }

    fn ffn(&self, x: &Tensor) -> Result<Tensor, TensorError> {
        through(self.ffn_output_norm.as_ref(), self.ffn.forward(x)?)
    }
}

/// `x`, normalised where there is a norm.
fn through(norm: Option<&Norm>, x: Tensor) -> Result<Tensor, TensorError> {
    match norm {
        Some(norm) => norm.forward(&x),
        None => Ok(x),
    }
}

/// Rounds each row to its wire format.
fn round(x: Tensor, wires: &[(usize, Dtype)]) -> Result<Tensor, TensorError> {
    if wires.iter().all(|(_, dtype)| *dtype == Dtype::F32) {
        return Ok(x);
    }
    let (_, width) = x.dims2()?;
    let mut values = tensor::with_f32(&x, <[f32]>::to_vec)?;
    let mut rest = &mut values[..];
    for (rows, dtype) in wires {
        let (these, others) = rest.split_at_mut(rows * width);
        hidden::round(*dtype, these);
        rest = others;
    }
    tensor::matrix(values, width)
}
