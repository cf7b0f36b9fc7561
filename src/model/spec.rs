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

mod packing;
mod tensors;

use serde::Serialize;

use super::{Dtype, KvDtype, Quant};
pub(crate) use packing::{AWQ_PER_WORD, WORD_BITS};
pub use packing::{Packing, PackingSpec};
pub(crate) use tensors::expert_name;
use tensors::without_repetitions;
pub use tensors::{MXFP4_GROUP, TensorSpec, Values};

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
    /// How the checkpoint's layers are packed; floating point numbers if `None`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub packing: Option<PackingSpec>,
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
    /// The norm that attention's output goes through before it is added.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub attention_output_norm: Option<NormSpec>,
    /// The norm that the feed-forward part reads through.
    pub ffn_norm: NormSpec,
    /// The feed-forward part.
    pub ffn: FfnSpec,
    /// The norm that the feed-forward part's output goes through before it is added.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ffn_output_norm: Option<NormSpec>,
}

/// How a block's parts are added to the residual stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ResidualOrder {
    /// `x += attention(norm(x)); x += ffn(norm(x))`.
    Sequential,
    /// `x += attention(norm(x)) + ffn(norm(x))`: both read the same `x` (Wang and Komatsuzaki 2021).
    Parallel,
    /// `y = norm(x); x = y + attention(y); z = norm(x); x = z + ffn(z)`: the normalised stream is what is added to, which
    /// the configurations call `apply_residual_connection_post_layernorm`.
    AfterNorm,
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
    /// Tensor of what is added at the end, `[width]`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bias: Option<String>,
}

impl NormSpec {
    /// A layer norm with a bias: tensors `<name>.weight` and `<name>.bias`.
    pub fn layer(name: &str, epsilon: f64) -> Self {
        let [weight, bias] = ["weight", "bias"].map(|tensor| format!("{name}.{tensor}"));
        Self { kind: NormKind::Layer, epsilon, weight, bias: Some(bias) }
    }
}

/// Formulas of normalisation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum NormKind {
    /// `x / sqrt(mean(x²) + ε) · weight` (Zhang and Sennrich 2019).
    Rms,
    /// Like [`NormKind::Rms`] with `1 + weight` for the weight, as Gemma's checkpoints store it.
    RmsPlusOne,
    /// `(x − mean(x)) / sqrt(variance(x) + ε) · weight + bias` (Ba et al. 2016).
    Layer,
}

/// A matrix `[outputs, inputs]` and perhaps a bias `[outputs]`: tensors of their own, or some rows of larger ones.
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
    /// Which rows of the tensors they are; all of them if `None`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rows: Option<RowsSpec>,
}

/// Rows of a tensor in which several matrices are stored as one: `run` of them in every `stride`, from `first` on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct RowsSpec {
    /// Rows that the tensor has.
    pub of: usize,
    /// The first row.
    pub first: usize,
    /// Rows that follow each other.
    pub run: usize,
    /// From the first row of one run to that of the next.
    pub stride: usize,
}

/// Grouped-query attention.
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
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rope: Option<RopeSpec>,
    /// Positions as a bias of the scores.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub alibi: Option<AlibiSpec>,
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

/// Attention with linear biases (Press et al. 2022): to the score of a key at position `p`, head `h` adds
/// `factor · slope(h) · p`. The softmax only sees differences, so that this is a penalty on distance.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct AlibiSpec {
    /// What the bias is multiplied by.
    pub factor: f64,
    /// What slopes, positions and their products are rounded to.
    pub rounding: Dtype,
}

/// Rotary position embedding, halves rotated against each other (Su et al. 2021, in the order of the Hugging Face
/// checkpoints).
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct RopeSpec {
    /// The base: pair `i` of `n` turns by `theta^(-i/n)` a token.
    pub theta: f64,
    /// How the frequencies are stretched for longer contexts.
    pub scaling: RopeScaling,
    /// So many numbers of a head, from its first, are rotated; all of them if `None`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub width: Option<usize>,
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
    /// Each frequency divided by a number of its own, which is how GGUF files keep Llama 3's scaling.
    Divided {
        /// The divisors, one for each pair of numbers.
        divisors: Vec<f64>,
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
    /// The base grows with the length of the sequence, once that is above the original context (dynamic NTK).
    Dynamic {
        /// How much faster than the length.
        factor: f64,
        /// The context that the model was trained with.
        original_context: usize,
    },
    /// YaRN (Peng et al. 2023): low frequencies divided by `factor`, high ones kept, those between blended.
    Yarn {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Frequencies that turn more often than this within the original context are kept.
        beta_fast: f64,
        /// Those that turn less often than this are divided.
        beta_slow: f64,
        /// The context that the model was first trained with.
        original_context: usize,
        /// What rotated queries and keys are multiplied by.
        attention_factor: f64,
        /// Whether the bounds of the blend are rounded outwards to whole pairs.
        truncate: bool,
    },
    /// LongRoPE (Ding et al. 2024): each frequency has a divisor of its own, and there is a second set of them for
    /// sequences that are longer than the original context.
    Longrope {
        /// Divisors up to the original context.
        short_factor: Vec<f64>,
        /// Divisors above it.
        long_factor: Vec<f64>,
        /// The context that the model was first trained with.
        original_context: usize,
        /// What rotated queries and keys are multiplied by.
        attention_factor: f64,
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
    /// `down(activation(up(x)))`.
    Plain {
        /// Between the two.
        activation: Activation,
        /// `[intermediate, hidden]`.
        up: LinearSpec,
        /// `[hidden, intermediate]`.
        down: LinearSpec,
    },
    /// Several gated parts, of which a router chooses some for each token.
    Experts(ExpertsSpec),
}

/// Activation functions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `x · sigmoid(x)`.
    Silu,
    /// `x · Φ(x)` with the normal distribution's Φ (Hendrycks and Gimpel 2016).
    Gelu,
    /// `x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³)))`.
    GeluTanh,
    /// `x · sigmoid(1.702 x)`.
    GeluQuick,
    /// `max(x, 0)`.
    Relu,
    /// `max(x, 0)²` (So et al. 2021).
    ReluSquared,
}

/// A mixture of experts (Shazeer et al. 2017): `Σ weight(e) · expert(e, x)` over the experts that the router chooses.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ExpertsSpec {
    /// Scores the experts, `[count, hidden]`.
    pub router: LinearSpec,
    /// How scores become weights.
    pub routing: Routing,
    /// How many experts there are.
    pub count: usize,
    /// How many of them see a token.
    pub active: usize,
    /// Width of an expert's inner layer.
    pub intermediate: usize,
    /// How an expert's gate works.
    pub gating: Gating,
    /// Where the experts' matrices are.
    pub tensors: ExpertTensors,
}

/// How a router's scores become the chosen experts' weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Routing {
    /// A softmax over all experts; the weights are the probabilities of those chosen.
    Probabilities,
    /// The same, divided by their sum; which is a softmax over the scores of those chosen.
    Normalised,
}

/// How an expert's gate and up projections become the input of its down projection.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Gating {
    /// `activation(gate) · up`.
    Plain(Activation),
    /// `g · sigmoid(alpha · g) · (u + 1)` with `g = min(gate, limit)` and `u = clamp(up, −limit, limit)`, as in gpt-oss.
    Clamped {
        /// The sigmoid's gain.
        alpha: f64,
        /// Where gate and up projection are cut off.
        limit: f64,
    },
}

/// How the experts of a block are stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ExpertTensors {
    /// Three matrices an expert. Names have `{}` where the expert's number belongs.
    Separate {
        /// `[intermediate, hidden]`.
        gate: String,
        /// `[intermediate, hidden]`.
        up: String,
        /// `[hidden, intermediate]`.
        down: String,
        /// Biases of the three, `[intermediate]`, `[intermediate]` and `[hidden]`, where there are any.
        #[serde(skip_serializing_if = "Option::is_none")]
        biases: Option<[String; 3]>,
    },
    /// The experts of a block in tensors of three dimensions, each expert's gate and up projection in alternate rows.
    Stacked {
        /// `[count, 2 · intermediate, hidden]`; the name without what the format appends.
        gate_up: String,
        /// `[count, 2 · intermediate]`.
        gate_up_bias: String,
        /// `[count, hidden, intermediate]`; the name without what the format appends.
        down: String,
        /// `[count, hidden]`.
        down_bias: String,
        /// How the matrices are stored.
        format: StackedFormat,
    },
}

/// How stacked experts' matrices are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum StackedFormat {
    /// Floating point numbers, each matrix transposed.
    Transposed,
    /// Numbers of 4 bits (E2M1) in blocks of 32 with a scale of 8 bits (E8M0), of the Open Compute Project's Microscaling
    /// Formats: tensors `<name>_blocks`, `[…, inputs / 32, 16]`, and `<name>_scales`, `[…, inputs / 32]`, of bytes.
    Mxfp4,
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
    /// What embeddings are multiplied by, rounded to the dtype that they are kept in, as the product is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub embedding_scale: Option<f64>,
    /// The norm in front of the first block.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub embedding_norm: Option<NormSpec>,
    /// Logits become `cap · tanh(logit / cap)`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub logit_soft_cap: Option<f64>,
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
        self.blocks.get(index).map(|block| block.tensors(self.hidden_size, self.packing.as_ref())).unwrap_or_default()
    }

    /// The length above which the positions of all tokens change, where there is one (longrope): a sequence that grows past it
    /// is computed anew from its start, as transformers does for Phi 3. For other families its cache keeps the keys with the
    /// positions that they had; computed anew they are what a model without a cache has, so that is what all get here.
    pub fn position_boundary(&self) -> Option<usize> {
        self.blocks.iter().find_map(|block| match &block.attention.rope.as_ref()?.scaling {
            RopeScaling::Longrope { original_context, .. } => Some(*original_context),
            _ => None,
        })
    }

    /// What of a sequence's length its positions depend on: lengths of one class give the same ones, and a class is itself a
    /// length of it. 0 where no length matters.
    pub fn length_class(&self, length: usize) -> usize {
        let class = |block: &BlockSpec| match block.attention.rope.as_ref()?.scaling {
            RopeScaling::Dynamic { original_context, .. } => Some(length.max(original_context)),
            RopeScaling::Longrope { original_context, .. } => {
                Some(original_context + usize::from(length > original_context))
            }
            _ => None,
        };
        self.blocks.iter().find_map(class).unwrap_or(0)
    }

    /// Bytes of the largest block: its weights, packed as they are or as `quant` says or in `dtype`, and its part of a KV
    /// cache, of such a format and so many tokens.
    pub fn largest_block_bytes(&self, dtype: Dtype, quant: Quant, cache: (KvDtype, usize)) -> u64 {
        let (kv_dtype, cache_tokens) = cache;
        let size = |tensor: &TensorSpec| match tensor.values {
            Values::Floats => tensor.elements() * dtype.size_in_bytes(),
            Values::Bytes => tensor.elements(),
            Values::Packed { bytes } => tensor.elements() * bytes,
            Values::Otherwise => 0,
        };
        let kept = |[rows, columns]: [usize; 2]| match quant.format_for(columns) {
            Some(format) => rows * columns / format.numbers() * format.bytes(),
            None => rows * columns * dtype.size_in_bytes(),
        };
        let bytes = |(index, block): (usize, &BlockSpec)| {
            let weights: usize = match quant {
                Quant::Auto => self.block_tensors(index).iter().map(size).sum(),
                _ => block.matrices(self.hidden_size).map(kept).sum(),
            };
            let head = kv_dtype.head_bytes(block.attention.head_size);
            let cache = 2 * block.attention.kv_heads * head * cache_tokens;
            weights as u64 + cache as u64
        };
        self.blocks.iter().enumerate().map(bytes).max().unwrap_or(0)
    }

    /// The tensors of the edges.
    pub fn edge_tensors(&self) -> Vec<TensorSpec> {
        let mut tensors = vec![TensorSpec::floats(&self.edges.embedding, &[self.vocab_size, self.hidden_size])];
        for norm in [Some(&self.edges.final_norm), self.edges.embedding_norm.as_ref()].into_iter().flatten() {
            norm.push_tensors(self.hidden_size, &mut tensors);
        }
        if let HeadSpec::Separate(head) = &self.edges.head {
            head.push_tensors(self.packing.as_ref(), &mut tensors);
        }
        without_repetitions(tensors)
    }
}
