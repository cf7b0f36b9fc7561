//! Reading a span's weights.

use std::io;

use candle_core::Tensor;

use super::{pages::PAGE_TOKENS, tensor};
use crate::model::{
    Dtype,
    checkpoint::{Checkpoint, CheckpointError},
    spec::LinearSpec,
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
        let values = tensor::to_f32(&self.checkpoint.read(name, &[width])?);
        self.loaded_bytes += size_of_val(&values[..]) as u64;
        Ok(values)
    }

    /// Matrices one below the other, in the engine's dtype.
    pub(super) fn matrix(&mut self, parts: &[&LinearSpec]) -> Result<Tensor, LoadError> {
        let read = |part: &&LinearSpec| self.checkpoint.read(&part.weight, &[part.outputs, part.inputs]);
        let parts: Vec<_> = parts.iter().map(read).collect::<Result<_, _>>()?;
        let matrix = tensor::stack(&parts, self.dtype)?;
        self.loaded_bytes += tensor::size_in_bytes(&matrix);
        Ok(matrix)
    }
}
