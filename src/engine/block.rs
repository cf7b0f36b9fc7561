//! The one block: runs whatever a [`BlockSpec`] says.

use candle_core::{Error as TensorError, Tensor};
use rayon::prelude::*;

use super::{
    attention::{Attention, RowRun},
    hidden,
    linear::Linear,
    load::{LoadError, Source},
    norm::Norm,
    planes::KvPlanes,
    rope::Angles,
    tensor,
};
use crate::model::{
    Dtype,
    spec::{Activation, BlockSpec, FfnSpec, ResidualOrder},
};

/// Numbers below which a second thread costs more than it saves.
const MIN_PARALLEL: usize = 1 << 14;

/// A loaded block.
pub(super) struct Block {
    residual: ResidualOrder,
    attention_norm: Norm,
    attention: Attention,
    ffn_norm: Norm,
    ffn: Ffn,
}

/// The rows of a pass at one block.
pub(super) struct Batch<'a> {
    /// The rows by lane.
    pub(super) runs: &'a [RowRun<'a>],
    /// Rotary angles of the rows.
    pub(super) angles: &'a Angles,
    /// What the rows are rounded to, in order: so many rows to such a format.
    pub(super) wires: &'a [(usize, Dtype)],
}

impl Block {
    pub(super) fn load(spec: &BlockSpec, hidden: usize, source: &mut Source<'_>) -> Result<Self, LoadError> {
        Ok(Self {
            residual: spec.residual,
            attention_norm: Norm::load(&spec.attention_norm, hidden, source)?,
            attention: Attention::load(&spec.attention, source)?,
            ffn_norm: Norm::load(&spec.ffn_norm, hidden, source)?,
            ffn: Ffn::load(&spec.ffn, source)?,
        })
    }

    /// Runs the rows `x`, `[rows, hidden]`, through the block.
    ///
    /// The sums are in f32; what leaves the block is rounded to each row's wire format, whether or not it travels, so
    /// that the place of a cut between two nodes can't change a bit.
    pub(super) fn forward(&self, x: &Tensor, batch: &Batch<'_>, cache: &mut KvPlanes) -> Result<Tensor, TensorError> {
        match self.residual {
            ResidualOrder::Sequential => {
                let normed = self.attention_norm.forward(x)?;
                let x = tensor::add(x, &self.attention.forward(&normed, batch.runs, batch.angles, cache)?)?;
                let normed = self.ffn_norm.forward(&x)?;
                round(tensor::add(&x, &self.ffn.forward(&normed)?)?, batch.wires)
            }
        }
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

enum Ffn {
    Gated { activation: Activation, gate_up: Linear, down: Linear, intermediate: usize },
}

impl Ffn {
    fn load(spec: &FfnSpec, source: &mut Source<'_>) -> Result<Self, LoadError> {
        match spec {
            FfnSpec::Gated { activation, gate, up, down } => Ok(Self::Gated {
                activation: *activation,
                gate_up: Linear::load(&[gate, up], source)?,
                down: Linear::load(&[down], source)?,
                intermediate: gate.outputs,
            }),
        }
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor, TensorError> {
        match self {
            Self::Gated { activation, gate_up, down, intermediate } => {
                let both = gate_up.forward(x)?;
                let gated = tensor::with_f32(&both, |both| gated(both, *intermediate, *activation))?;
                down.forward(&tensor::matrix(gated, *intermediate)?)
            }
        }
    }
}

/// `activation(gate) · up`, from `[rows, gate and up]` to `[rows, width]`.
fn gated(both: &[f32], width: usize, activation: Activation) -> Vec<f32> {
    let mut product = vec![0.0; both.len() / 2];
    let row = |(product, both): (&mut [f32], &[f32])| {
        let (gate, up) = both.split_at(width);
        for ((product, gate), up) in product.iter_mut().zip(gate).zip(up) {
            *product = activate(activation, *gate) * up;
        }
    };
    if product.len() < MIN_PARALLEL {
        product.chunks_exact_mut(width).zip(both.chunks_exact(2 * width)).for_each(row);
    } else {
        product.par_chunks_exact_mut(width).zip(both.par_chunks_exact(2 * width)).for_each(row);
    }
    product
}

fn activate(activation: Activation, x: f32) -> f32 {
    match activation {
        Activation::Silu => x / (1.0 + (-x).exp()),
    }
}
