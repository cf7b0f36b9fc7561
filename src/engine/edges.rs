//! The edges of a model: what turns token ids into hidden states in front of the first block, and hidden states into
//! logits behind the last. A client holds them; nodes don't need them.

use std::sync::Arc;

use super::{
    DeviceChoice,
    hidden::{self, HiddenStates},
    linear::Linear,
    load::{LoadError, Source},
    matrix::Matrix,
    norm::Norm,
    tensor,
};
use crate::model::{
    Dtype, Quant,
    checkpoint::Checkpoint,
    spec::{HeadSpec, LinearSpec},
};

/// How to load the edges.
#[derive(Debug, Clone)]
pub struct EdgesOptions {
    /// What the embedding and the head are kept in where they aren't quantized, and what embeddings are rounded to where
    /// the model scales them.
    pub dtype: Dtype,
    /// How the embedding and the head are quantized.
    pub quant: Quant,
    /// Where they run.
    pub device: DeviceChoice,
}

/// Embedding, final norm and head.
pub struct Edges {
    /// `[vocab, hidden]`.
    embedding: Arc<Matrix>,
    /// What embeddings are multiplied by.
    scale: Option<f32>,
    /// What embeddings and scaled embeddings are kept in.
    dtype: Dtype,
    embedding_norm: Option<Norm>,
    final_norm: Norm,
    head: Linear,
    soft_cap: Option<f32>,
    hidden: usize,
    vocab: usize,
    loaded_bytes: u64,
}

/// Why the edges refuse.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EdgeError {
    /// The model has no such token.
    #[error("token id {id} is outside the vocabulary of {vocab}")]
    UnknownToken {
        /// The id.
        id: u32,
        /// Ids are below this.
        vocab: usize,
    },
    /// The hidden states are of another model.
    #[error("hidden states are {found} wide, and the model's are {expected}")]
    WrongWidth {
        /// Their width.
        found: usize,
        /// The model's.
        expected: usize,
    },
    /// The hidden states don't have the length that their shape says.
    #[error("hidden states of {rows} rows have the wrong number of bytes")]
    WrongLength {
        /// Their rows.
        rows: usize,
    },
    /// The tensor library failed.
    #[error("tensor library: {0}")]
    Tensor(String),
}

impl From<candle_core::Error> for EdgeError {
    fn from(error: candle_core::Error) -> Self {
        Self::Tensor(error.to_string())
    }
}

impl Edges {
    /// Loads the edges and nothing else of the checkpoint.
    ///
    /// # Errors
    /// A tensor can't be read, or the device can't be used.
    pub fn load(checkpoint: &Checkpoint, options: EdgesOptions) -> Result<Self, LoadError> {
        options.device.check()?;
        let spec = checkpoint.spec();
        let (width, vocab) = (spec.hidden_size, spec.vocab_size);
        let mut source = Source::new(checkpoint, options.dtype, options.quant);
        let table =
            LinearSpec { weight: spec.edges.embedding.clone(), bias: None, outputs: vocab, inputs: width, rows: None };
        let embedding = Arc::new(source.large_matrix(&table)?);
        let head = match checkpoint.head()? {
            HeadSpec::Tied => Linear::new(vec![embedding.clone()], None),
            HeadSpec::Separate(head) => {
                Linear::new(vec![Arc::new(source.large_matrix(&head)?)], source.biases(&[&head])?)
            }
        };
        let scale = spec.edges.embedding_scale.map(|scale| {
            let mut scale = [scale as f32];
            hidden::round(options.dtype, &mut scale);
            scale[0]
        });
        let embedding_norm = spec.edges.embedding_norm.as_ref();
        let embedding_norm = embedding_norm.map(|norm| Norm::load(norm, width, &mut source)).transpose()?;
        let final_norm = Norm::load(&spec.edges.final_norm, width, &mut source)?;
        Ok(Self {
            embedding,
            scale,
            dtype: options.dtype,
            embedding_norm,
            final_norm,
            head,
            soft_cap: spec.edges.logit_soft_cap.map(|cap| cap as f32),
            hidden: width,
            vocab,
            loaded_bytes: source.finish().bytes,
        })
    }

    /// Size of the vocabulary.
    pub fn vocab(&self) -> usize {
        self.vocab
    }

    /// Bytes that the edges take in memory.
    pub fn loaded_bytes(&self) -> u64 {
        self.loaded_bytes
    }

    /// Hidden states in front of the first block, one row an id, rounded to `wire`.
    ///
    /// # Errors
    /// An id is outside the vocabulary.
    pub fn embed(&self, ids: &[u32], wire: Dtype) -> Result<HiddenStates, EdgeError> {
        if let Some(id) = ids.iter().copied().find(|id| *id as usize >= self.vocab) {
            return Err(EdgeError::UnknownToken { id, vocab: self.vocab });
        }
        let width = self.hidden;
        let mut scratch = vec![0.0; width];
        let mut values = Vec::with_capacity(ids.len() * width);
        for id in ids.iter().map(|id| *id as usize) {
            values.extend_from_slice(self.embedding.widen(id..id + 1, &mut scratch));
        }
        if let Some(scale) = self.scale {
            values.iter_mut().for_each(|value| *value *= scale);
            hidden::round(self.dtype, &mut values);
        }
        if let Some(norm) = &self.embedding_norm {
            values.chunks_exact_mut(width).for_each(|row| norm.normalise(row));
        }
        Ok(HiddenStates::from_f32(wire, width, &values))
    }

    /// Logits behind the last block, `[rows, vocab]`, row-major.
    ///
    /// # Errors
    /// The hidden states have another width than the model's, or not the length that their shape says.
    pub fn logits(&self, hidden: &HiddenStates) -> Result<Vec<f32>, EdgeError> {
        if hidden.hidden != self.hidden {
            return Err(EdgeError::WrongWidth { found: hidden.hidden, expected: self.hidden });
        }
        if !hidden.has_right_length() {
            return Err(EdgeError::WrongLength { rows: hidden.rows });
        }
        if hidden.rows == 0 {
            return Ok(Vec::new());
        }
        let normed = self.final_norm.forward(&tensor::matrix(hidden.to_f32(), self.hidden)?)?;
        let mut logits = tensor::with_f32(&self.head.forward(&normed)?, <[f32]>::to_vec)?;
        if let Some(cap) = self.soft_cap {
            logits.iter_mut().for_each(|logit| *logit = cap * (*logit / cap).tanh());
        }
        Ok(logits)
    }
}
