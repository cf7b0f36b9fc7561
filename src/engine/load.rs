//! Reading a span's weights.

use std::io;

use candle_core::Tensor;

use super::{mxfp4::Mxfp4, pages::PAGE_TOKENS, tensor};
use crate::model::{
    Dtype,
    checkpoint::{Checkpoint, CheckpointError, TensorData},
    spec::{LinearSpec, MXFP4_GROUP},
};

/// Why a span or the edges can't be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A tensor can't be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The model hasn't got these blocks.
    #[error("blocks {start}:{end} are not a span of this model, which has blocks 0:{blocks}")]
    Span {
        /// First block asked for.
        start: usize,
        /// Behind the last block asked for.
        end: usize,
        /// How many the model has.
        blocks: usize,
    },
    /// The device can't be used.
    #[error("{0}")]
    Device(String),
    /// The KV cache is too small or too large.
    #[error(
        "a cache of {tokens} tokens ({bytes} bytes) can't be allocated: it must hold at least {} tokens and fit into \
         memory",
        PAGE_TOKENS
    )]
    Cache {
        /// Tokens asked for.
        tokens: usize,
        /// What they would take, where it can be counted.
        bytes: usize,
    },
    /// No thread could be started.
    #[error("the engine's threads can't be started: {0}")]
    Threads(io::Error),
    /// A tensor has an impossible layout.
    #[error("tensor library: {0}")]
    Tensor(#[from] candle_core::Error),
}

/// Where weights come from, and how many bytes of memory they have taken.
pub(super) struct Source<'a> {
    checkpoint: &'a Checkpoint,
    dtype: Dtype,
    pub(super) loaded_bytes: u64,
}

impl<'a> Source<'a> {
    pub(super) fn new(checkpoint: &'a Checkpoint, dtype: Dtype) -> Self {
        Self { checkpoint, dtype, loaded_bytes: 0 }
    }

    /// A vector in f32.
    pub(super) fn vector(&mut self, name: &str, width: usize) -> Result<Vec<f32>, LoadError> {
        self.vector_of(name, &[width])
    }

    /// The numbers of a small tensor of any shape in f32.
    pub(super) fn vector_of(&mut self, name: &str, shape: &[usize]) -> Result<Vec<f32>, LoadError> {
        let values = tensor::to_f32(&self.checkpoint.read(name, shape)?);
        self.loaded_bytes += size_of_val(&values[..]) as u64;
        Ok(values)
    }

    /// The bias of a layer that has one, in f32; empty where it has none.
    pub(super) fn bias(&mut self, part: &LinearSpec) -> Result<Vec<f32>, LoadError> {
        let Some(name) = &part.bias else { return Ok(Vec::new()) };
        let values = tensor::to_f32(&self.rows(name, &[part.stored_rows()], part)?);
        self.loaded_bytes += size_of_val(&values[..]) as u64;
        Ok(values)
    }

    /// Matrices one below the other, in the engine's dtype.
    pub(super) fn matrix(&mut self, parts: &[&LinearSpec]) -> Result<Tensor, LoadError> {
        let read = |part: &&LinearSpec| self.rows(&part.weight, &[part.stored_rows(), part.inputs], part);
        let parts: Vec<_> = parts.iter().map(read).collect::<Result<_, _>>()?;
        self.keep(&parts)
    }

    /// The rows of a tensor that are `part`.
    fn rows(&self, name: &str, shape: &[usize], part: &LinearSpec) -> Result<TensorData, CheckpointError> {
        match &part.rows {
            Some(rows) => self.checkpoint.read_rows(name, shape, rows.runs(part.outputs)),
            None => self.checkpoint.read(name, shape),
        }
    }

    /// Matrix `index` of the tensor `name`, `[count, inputs, outputs]`, transposed, in the engine's dtype.
    pub(super) fn transposed(&mut self, name: &str, index: usize, shape: [usize; 3]) -> Result<Tensor, LoadError> {
        let data = self.checkpoint.read_rows(name, &shape, std::iter::once(index..index + 1))?;
        self.keep(&[tensor::transposed(&data, shape[1], shape[2])])
    }

    /// Blocks `[count, outputs, inputs / 32]` of the matrices `name`.
    pub(super) fn mxfp4(&mut self, name: &str, shape: [usize; 3]) -> Result<Vec<Mxfp4>, LoadError> {
        let [count, outputs, groups] = shape;
        let codes = [count, outputs, groups, MXFP4_GROUP / 2];
        let codes = self.checkpoint.read_bytes(&format!("{name}_blocks"), &codes)?;
        let scales = self.checkpoint.read_bytes(&format!("{name}_scales"), &shape)?;
        self.loaded_bytes += (codes.len() + scales.len()) as u64;
        Ok(Mxfp4::blocks(&codes, &scales))
    }

    fn keep(&mut self, parts: &[TensorData]) -> Result<Tensor, LoadError> {
        let matrix = tensor::stack(parts, self.dtype)?;
        self.loaded_bytes += tensor::size_in_bytes(&matrix);
        Ok(matrix)
    }
}
