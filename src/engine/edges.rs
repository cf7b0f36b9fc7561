//! The edges of a model: what turns token ids into hidden states in front of the first block, and hidden states into
//! logits behind the last. A client holds them; nodes don't need them.

use candle_core::Tensor;

use super::{
    DeviceChoice,
    hidden::{self, HiddenStates},
    linear::Linear,
    load::{LoadError, Source},
    norm::Norm,
    tensor::{self, Slice},
};
use crate::model::{
    Dtype,
    checkpoint::Checkpoint,
    spec::{HeadSpec, LinearSpec},
};

/// How to load the edges.
#[derive(Debug, Clone)]
pub struct EdgesOptions {
    /// What the embedding and the head are kept in.
    pub dtype: Dtype,
    /// Where they run.
    pub device: DeviceChoice,
}

/// Embedding, final norm and head.
pub struct Edges {
    /// `[vocab, hidden]`.
    embedding: Tensor,
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
        let mut source = Source::new(checkpoint, options.dtype);
        let table =
            LinearSpec { weight: spec.edges.embedding.clone(), bias: None, outputs: vocab, inputs: width, rows: None };
        let embedding = source.matrix(&[&table])?;
        let head = match &spec.edges.head {
            HeadSpec::Tied => Linear::new(embedding.clone(), None)?,
            HeadSpec::Separate(head) => Linear::load(&[head], &mut source)?,
        };
        let scale = spec.edges.embedding_scale.map(|scale| {
            let mut scale = [scale as f32];
            hidden::round(options.dtype, &mut scale);
            scale[0]
        });
        let embedding_norm = spec.edges.embedding_norm.as_ref();
        Ok(Self {
            embedding,
            scale,
            dtype: options.dtype,
            embedding_norm: embedding_norm.map(|norm| Norm::load(norm, width, &mut source)).transpose()?,
            final_norm: Norm::load(&spec.edges.final_norm, width, &mut source)?,
            head,
            soft_cap: spec.edges.logit_soft_cap.map(|cap| cap as f32),
            hidden: width,
            vocab,
        })
    }

    /// Size of the vocabulary.
    pub fn vocab(&self) -> usize {
        self.vocab
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
        let rows = || ids.iter().map(|id| *id as usize * width);
        let mut values: Vec<f32> = tensor::with_slice(&self.embedding, |table| match table {
            Slice::F32(table) => rows().flat_map(|at| &table[at..at + width]).copied().collect(),
            Slice::Bf16(table) => rows().flat_map(|at| &table[at..at + width]).map(|value| value.to_f32()).collect(),
            Slice::F16(table) => rows().flat_map(|at| &table[at..at + width]).map(|value| value.to_f32()).collect(),
        })?;
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
