//! What a model computes, as plain data.
//!
//! A [`ModelSpec`] says everything that the arithmetic of a model depends on: per block the norms, the attention and the
//! feed-forward part, in which order they are added to the residual stream, and at the edges the embedding, the final
//! norm and the head. It also names the tensors, so that whoever loads a span knows what to read and in which shape.
//! [`family`](super::family) makes one from a `config.json`; the engine has one block that runs any of them.
//!
//! ```text
//! ids ─ embedding ─► x ─┬──── norm ─ attention ──┐ ┌──── norm ─ feed-forward ──┐   final norm ─ head ─► logits
//!                       └────────────────────────⊕─┴───────────────────────────⊕ … (the next block)
//! ```
//!
//! A family that needs a part which isn't here adds a variant or an optional field, and a few lines in the one block.
//! Optional fields are left out of [`ModelSpec::canonical`] while they are `None`, so that a new one doesn't change the
//! fingerprint of the models that don't use it.

use serde::Serialize;

use super::Dtype;

/// Everything that the arithmetic of a model depends on, but for the weights.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ModelSpec {
    /// The family's name in `config.json`.
    #[serde(skip)]
    pub model_type: String,
    /// How the checkpoint says that its weights are stored.
    #[serde(skip)]
    pub stored_dtype: Dtype,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Rows of the embedding: ids are below it.
    pub vocab_size: usize,
    /// The longest sequence that the positions are made for, in tokens.
    pub max_context: usize,
    /// The blocks, from 0.
    pub blocks: Vec<BlockSpec>,
    /// What is in front of the first block and behind the last.
    pub edges: EdgesSpec,
}

/// One transformer block.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct BlockSpec {
    /// How the two parts are added to the residual stream.
    pub residual: ResidualOrder,
    /// The norm that attention reads through.
    pub attention_norm: NormSpec,
    /// Attention.
    pub attention: AttentionSpec,
    /// The norm that the feed-forward part reads through.
    pub ffn_norm: NormSpec,
    /// The feed-forward part.
    pub ffn: FfnSpec,
}

/// How a block's parts are added to the residual stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ResidualOrder {
    /// `x += attention(norm(x)); x += ffn(norm(x))`.
    Sequential,
}

/// A normalisation over the last dimension.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct NormSpec {
    /// The formula.
    pub kind: NormKind,
    /// Added to the mean square (or variance) before the root.
    pub epsilon: f64,
    /// Tensor of the scale, `[width]`.
    pub weight: String,
}

/// Formulas of normalisation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum NormKind {
    /// `x / sqrt(mean(x²) + ε) · weight` (Zhang and Sennrich 2019).
    Rms,
}

/// A matrix `[outputs, inputs]` and perhaps a bias `[outputs]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LinearSpec {
    /// Tensor of the matrix.
    pub weight: String,
    /// Tensor of the bias.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bias: Option<String>,
    /// Rows of the matrix.
    pub outputs: usize,
    /// Columns of the matrix.
    pub inputs: usize,
}

/// Grouped-query attention with rotary positions.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AttentionSpec {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; each serves `heads / kv_heads` query heads.
    pub kv_heads: usize,
    /// Width of one head.
    pub head_size: usize,
    /// What `q · k` is multiplied by.
    pub scale: f64,
    /// `[heads · head_size, hidden]`.
    pub q: LinearSpec,
    /// `[kv_heads · head_size, hidden]`.
    pub k: LinearSpec,
    /// `[kv_heads · head_size, hidden]`.
    pub v: LinearSpec,
    /// `[hidden, heads · head_size]`.
    pub o: LinearSpec,
    /// Norms of every query and key head, before the rotation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub qk_norm: Option<QkNorm>,
    /// Rotary positions.
    pub rope: RopeSpec,
    /// A token sees this many tokens, itself included; all that precede it if `None`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub window: Option<usize>,
    /// Scores become `cap · tanh(score / cap)`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub soft_cap: Option<f64>,
    /// Tensor `[heads]` of scores that take part in the softmax and stand for no token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sinks: Option<String>,
}

/// Norms `[head_size]` of the query and key heads.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct QkNorm {
    /// Of the queries.
    pub q: NormSpec,
    /// Of the keys.
    pub k: NormSpec,
}

/// Rotary position embedding over the whole head, halves rotated against each other (Su et al. 2021, in the order
/// of the Hugging Face checkpoints).
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RopeSpec {
    /// The base: pair `i` of `n` turns by `theta^(-i/n)` a token.
    pub theta: f64,
    /// How the frequencies are stretched for longer contexts.
    pub scaling: RopeScaling,
}

/// How rotary frequencies are stretched.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RopeScaling {
    /// Not at all.
    Default,
    /// All frequencies divided by `factor` (position interpolation).
    Linear {
        /// How many times longer the context gets.
        factor: f64,
    },
    /// Llama 3's: low frequencies divided by `factor`, high ones kept, those between blended.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Wavelengths longer than `original_context / low_freq_factor` are low frequencies.
        low_freq_factor: f64,
        /// Wavelengths shorter than `original_context / high_freq_factor` are high frequencies.
        high_freq_factor: f64,
        /// The context that the model was first trained with.
        original_context: usize,
    },
}

/// The feed-forward part.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FfnSpec {
    /// `down(activation(gate(x)) · up(x))` (Shazeer 2020).
    Gated {
        /// Of the gate.
        activation: Activation,
        /// `[intermediate, hidden]`.
        gate: LinearSpec,
        /// `[intermediate, hidden]`.
        up: LinearSpec,
        /// `[hidden, intermediate]`.
        down: LinearSpec,
    },
}

/// Activation functions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `x · sigmoid(x)`.
    Silu,
}

/// What is in front of the first block and behind the last.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct EdgesSpec {
    /// Tensor `[vocab, hidden]`.
    pub embedding: String,
    /// The norm behind the last block.
    pub final_norm: NormSpec,
    /// What turns hidden states into logits.
    pub head: HeadSpec,
}

/// The output head.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum HeadSpec {
    /// The embedding, used a second time.
    Tied,
    /// A matrix of its own.
    Separate(LinearSpec),
}

/// A tensor that a part of the model is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Its name, with the `model.` prefix where Hugging Face's causal models have one.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
}

impl TensorSpec {
    /// Number of values.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

impl ModelSpec {
    /// Number of blocks.
    pub fn num_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Bytes that are equal exactly if the arithmetic is: the input of the model's fingerprint besides the weights.
    ///
    /// They stay the same from one version of the program to the next; a test pins them.
    pub fn canonical(&self) -> Vec<u8> {
        let mut bytes = b"helion-spec-1\n".to_vec();
        // Serialising plain structs with string keys into memory has no way to fail; an empty body would be caught by
        // the test that pins the bytes.
        if let Ok(body) = serde_json::to_vec(self) {
            bytes.extend_from_slice(&body);
        }
        bytes
    }

    /// The tensors of block `index`, or none if there is no such block.
    pub fn block_tensors(&self, index: usize) -> Vec<TensorSpec> {
        self.blocks.get(index).map(|block| block.tensors(self.hidden_size)).unwrap_or_default()
    }

    /// Bytes of the largest block: its weights in `dtype` and its part of a KV cache of `cache_tokens` tokens.
    pub fn largest_block_bytes(&self, dtype: Dtype, cache_tokens: usize) -> u64 {
        let numbers = |index: usize| {
            let weights: usize = self.block_tensors(index).iter().map(TensorSpec::elements).sum();
            let attention = &self.blocks[index].attention;
            weights as u64 + 2 * (attention.kv_heads * attention.head_size * cache_tokens) as u64
        };
        (0..self.num_blocks()).map(numbers).max().unwrap_or(0) * dtype.size_in_bytes() as u64
    }

    /// The tensors of the edges.
    pub fn edge_tensors(&self) -> Vec<TensorSpec> {
        let mut tensors = vec![
            TensorSpec { name: self.edges.embedding.clone(), shape: vec![self.vocab_size, self.hidden_size] },
            self.edges.final_norm.tensor(self.hidden_size),
        ];
        if let HeadSpec::Separate(head) = &self.edges.head {
            head.push_tensors(&mut tensors);
        }
        tensors
    }
}

impl BlockSpec {
    fn tensors(&self, hidden_size: usize) -> Vec<TensorSpec> {
        let attention = &self.attention;
        let mut tensors = vec![self.attention_norm.tensor(hidden_size), self.ffn_norm.tensor(hidden_size)];
        for linear in [&attention.q, &attention.k, &attention.v, &attention.o] {
            linear.push_tensors(&mut tensors);
        }
        if let Some(norm) = &attention.qk_norm {
            tensors.extend([norm.q.tensor(attention.head_size), norm.k.tensor(attention.head_size)]);
        }
        if let Some(sinks) = &attention.sinks {
            tensors.push(TensorSpec { name: sinks.clone(), shape: vec![attention.heads] });
        }
        match &self.ffn {
            FfnSpec::Gated { gate, up, down, .. } => {
                for linear in [gate, up, down] {
                    linear.push_tensors(&mut tensors);
                }
            }
        }
        tensors
    }
}

impl NormSpec {
    fn tensor(&self, width: usize) -> TensorSpec {
        TensorSpec { name: self.weight.clone(), shape: vec![width] }
    }
}

impl LinearSpec {
    fn push_tensors(&self, tensors: &mut Vec<TensorSpec>) {
        tensors.push(TensorSpec { name: self.weight.clone(), shape: vec![self.outputs, self.inputs] });
        if let Some(bias) = &self.bias {
            tensors.push(TensorSpec { name: bias.clone(), shape: vec![self.outputs] });
        }
    }
}
