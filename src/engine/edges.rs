//! The edges of a model: what turns token ids into hidden states in front of the first block, and hidden states into
//! logits behind the last. A client holds them; nodes don't need them.

use std::{cell::RefCell, sync::Arc};

use super::{
    DeviceChoice,
    head::{Desk, Head, Seat},
    hidden::{self, HiddenStates},
    linear::Linear,
    load::{LoadError, Source},
    matrix::Matrix,
    norm::Norm,
    threads,
};
use crate::model::{
    Dtype, Quant,
    checkpoint::Checkpoint,
    spec::{HeadSpec, LinearSpec},
};

thread_local! {
    /// A row of an embedding, and room to widen it.
    static ROW: RefCell<(Vec<f32>, Vec<f32>)> = const { RefCell::new((Vec::new(), Vec::new())) };
}

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
    /// Threads of the head, from 1 to [`MAX_THREADS`](super::MAX_THREADS); `None`: one a core.
    pub threads: Option<usize>,
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
    head: Head,
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
    /// The seat is at another head.
    #[error("the seat is at the head of other edges: take one at these")]
    OtherSeat,
    /// The head is at fault.
    #[error("the output head panicked; the log says where")]
    Panicked,
}

impl Edges {
    /// Loads the edges and nothing else of the checkpoint.
    ///
    /// # Errors
    /// A tensor can't be read, the device can't be used, or there can't be so many threads.
    pub fn load(checkpoint: &Checkpoint, options: EdgesOptions) -> Result<Self, LoadError> {
        if let DeviceChoice::Cuda(index) = options.device {
            return Err(LoadError::Device(format!(
                "device cuda:{index} was asked for, and the edges run on the CPU only: use --device cpu or auto"
            )));
        }
        let threads = options.threads.map(|count| threads::pool("head", Some(count))).transpose()?;
        let spec = checkpoint.spec();
        let (width, vocab) = (spec.hidden_size, spec.vocab_size);
        let mut source = Source::new(checkpoint, options.dtype, options.quant, threads.as_ref());
        let table =
            LinearSpec { weight: spec.edges.embedding.clone(), bias: None, outputs: vocab, inputs: width, rows: None };
        let embedding = Arc::new(source.large_matrix(&table)?);
        let linear = match checkpoint.head()? {
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
        let norm = Norm::load(&spec.edges.final_norm, width, &mut source)?;
        let soft_cap = spec.edges.logit_soft_cap.map(|cap| cap as f32);
        let loaded_bytes = source.finish().bytes;
        Ok(Self {
            embedding,
            scale,
            dtype: options.dtype,
            embedding_norm,
            head: Head { norm, linear, soft_cap, hidden: width, vocab, threads, desk: Arc::new(Desk::default()) },
            loaded_bytes,
        })
    }

    /// Size of the vocabulary.
    pub fn vocab(&self) -> usize {
        self.head.vocab
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
        if let Some(id) = ids.iter().copied().find(|id| *id as usize >= self.vocab()) {
            return Err(EdgeError::UnknownToken { id, vocab: self.vocab() });
        }
        let width = self.head.hidden;
        // What the states travel in: one allocation, which is the message itself.
        let mut bytes = Vec::with_capacity(ids.len() * width * wire.size_in_bytes());
        ROW.with_borrow_mut(|(row, scratch)| {
            row.resize(width, 0.0);
            scratch.resize(width, 0.0);
            for id in ids.iter().map(|id| *id as usize) {
                row.copy_from_slice(self.embedding.widen(id..id + 1, scratch));
                if let Some(scale) = self.scale {
                    row.iter_mut().for_each(|value| *value *= scale);
                    hidden::round(self.dtype, row);
                }
                if let Some(norm) = &self.embedding_norm {
                    norm.normalise(row);
                }
                hidden::encode(wire, row, &mut bytes);
            }
        });
        Ok(HiddenStates { dtype: wire, rows: ids.len(), hidden: width, bytes: bytes.into() })
    }

    /// Logits behind the last block, `[rows, vocab]`, row-major. Calls of several threads that meet here are computed together,
    /// which changes no bit.
    ///
    /// # Errors
    /// The hidden states have another width than the model's, or not the length that their shape says.
    pub fn logits(&self, hidden: &HiddenStates) -> Result<Vec<f32>, EdgeError> {
        self.on_head(hidden, Vec::new(), None)
    }

    /// A place at the head for a generation that begins.
    pub fn seat(&self) -> Seat {
        Seat::new(&self.head.desk)
    }

    /// [`Edges::logits`] for the generation in `seat`, which may wait a moment for others that decode: their rows are computed
    /// together. The logits go into the memory of `logits`, whose numbers are dropped: a vocabulary's logits are large, and a
    /// generation needs them for every token.
    ///
    /// # Errors
    /// Likewise, or the seat is at other edges; `logits` is gone then.
    pub fn logits_at(&self, seat: &Seat, hidden: &HiddenStates, logits: Vec<f32>) -> Result<Vec<f32>, EdgeError> {
        if !seat.is_at(&self.head.desk) {
            return Err(EdgeError::OtherSeat);
        }
        self.on_head(hidden, logits, Some(seat))
    }

    fn on_head(&self, hidden: &HiddenStates, mut logits: Vec<f32>, seat: Option<&Seat>) -> Result<Vec<f32>, EdgeError> {
        if hidden.hidden != self.head.hidden {
            return Err(EdgeError::WrongWidth { found: hidden.hidden, expected: self.head.hidden });
        }
        if !hidden.has_right_length() {
            return Err(EdgeError::WrongLength { rows: hidden.rows });
        }
        if hidden.rows == 0 {
            logits.clear();
            return Ok(logits);
        }
        self.head.logits(hidden.clone(), logits, seat)
    }
}
