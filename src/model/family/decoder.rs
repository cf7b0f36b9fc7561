//! The layout that Llama began and that many share: pre-norm blocks, separate projections, a gated feed-forward part. A
//! family says in which of the few switches it differs, and changes in the result what is its own.

use serde_json::json;

use super::{
    config::{Config, ConfigError},
    rope,
};
use crate::model::spec::{
    Activation, AttentionSpec, BlockSpec, EdgesSpec, FfnSpec, HeadSpec, LinearSpec, ModelSpec, NormKind, NormSpec,
    QkNorm, ResidualOrder,
};

// Limits far above any model that exists: they keep products of sizes from overflowing and garbage from passing.
pub(super) const MAX_BLOCKS: usize = 4096;
pub(super) const MAX_HIDDEN: usize = 1 << 20;
pub(super) const MAX_HEADS: usize = 1 << 14;
const MAX_HEAD_SIZE: usize = 1 << 14;
pub(super) const MAX_INTERMEDIATE: usize = 1 << 24;
pub(super) const MAX_VOCAB: usize = 1 << 26;
pub(super) const MAX_EXPERTS: usize = 1 << 14;
pub(super) const MAX_CONTEXT: usize = 1 << 30;

/// Where a family differs from the others.
#[derive(Default)]
pub(super) struct Switches {
    /// Biases on the query, key and value projections.
    pub(super) qkv_bias: bool,
    /// A bias on the attention's output projection.
    pub(super) output_bias: bool,
    /// Biases in the feed-forward part.
    pub(super) ffn_bias: bool,
    /// Norms on the query and key heads.
    pub(super) qk_norm: bool,
    /// Width of a head where the configuration doesn't say it; `hidden / heads` if `None`.
    pub(super) default_head_size: Option<usize>,
    /// Whether the head is the embedding where the configuration doesn't say it.
    pub(super) tied_by_default: bool,
    /// The sliding window of every block; empty if none has one.
    pub(super) windows: Vec<Option<usize>>,
    /// The field that names the activation, if it isn't `hidden_act`.
    pub(super) activation_field: Option<&'static str>,
    /// What positions are like.
    pub(super) rope: rope::Defaults,
}

/// The number of blocks, which a family needs before it knows its windows.
pub(super) fn num_blocks(config: &Config) -> Result<usize, ConfigError> {
    config.size("num_hidden_layers", MAX_BLOCKS)
}

/// The length of the sliding window, if there is one.
pub(super) fn sliding_window(config: &Config) -> Result<Option<usize>, ConfigError> {
    config.optional_size("sliding_window", MAX_CONTEXT)
}

/// The window of every block from `layer_types`, where the file has it, or from `by_default` (whether block `i`
/// slides).
pub(super) fn windows(
    config: &Config,
    blocks: usize,
    window: Option<usize>,
    by_default: impl Fn(usize) -> bool,
) -> Result<Vec<Option<usize>>, ConfigError> {
    let Some(types) = config.optional::<Vec<String>>("layer_types")? else {
        return Ok((0..blocks).map(|block| window.filter(|_| by_default(block))).collect());
    };
    if types.len() != blocks {
        return Err(config.invalid("layer_types", format!("has {} entries for {blocks} blocks", types.len())));
    }
    let read = |kind: &String| match (kind.as_str(), window) {
        ("full_attention", _) => Ok(None),
        ("sliding_attention", Some(window)) => Ok(Some(window)),
        ("sliding_attention", None) => {
            Err(config.invalid("layer_types", "names sliding_attention, but no sliding_window is in use".into()))
        }
        _ => Err(config.unsupported("layer_types", "the kinds are full_attention and sliding_attention")),
    };
    types.iter().map(read).collect()
}

/// The activation that a field names, as transformers calls them.
pub(super) fn activation(config: &Config, field: &str) -> Result<Activation, ConfigError> {
    match config.required::<String>(field)?.as_str() {
        "silu" | "swish" => Ok(Activation::Silu),
        "gelu" | "gelu_python" => Ok(Activation::Gelu),
        "gelu_new" | "gelu_fast" | "gelu_accurate" | "gelu_pytorch_tanh" | "gelu_python_tanh" => {
            Ok(Activation::GeluTanh)
        }
        "quick_gelu" => Ok(Activation::GeluQuick),
        "relu" => Ok(Activation::Relu),
        "relu2" => Ok(Activation::ReluSquared),
        _ => {
            let known = "the activations are silu, gelu, gelu_pytorch_tanh, quick_gelu, relu and relu2";
            Err(config.unsupported(field, known))
        }
    }
}

/// The number of experts and how many of them see a token.
pub(super) fn experts(config: &Config, default: [usize; 2]) -> Result<(usize, usize), ConfigError> {
    let field = if config.has("num_experts") { "num_experts" } else { "num_local_experts" };
    let count = config.optional_size(field, MAX_EXPERTS)?.unwrap_or(default[0]);
    let active = config.optional_size("num_experts_per_tok", MAX_EXPERTS)?.unwrap_or(default[1]);
    if active > count {
        return Err(config.invalid("num_experts_per_tok", format!("there are {count} experts")));
    }
    Ok((count, active))
}

/// Reads what the families share, and puts the specification together.
pub(super) fn spec(config: &Config, switches: &Switches) -> Result<ModelSpec, ConfigError> {
    let config = &config.with_defaults(&json!({ "hidden_act": "silu" }));
    let activation = activation(config, switches.activation_field.unwrap_or("hidden_act"))?;
    let blocks = num_blocks(config)?;
    let hidden = config.size("hidden_size", MAX_HIDDEN)?;
    let vocab = config.size("vocab_size", MAX_VOCAB)?;
    let Heads { heads, kv_heads, head_size } = heads(config, hidden, switches.default_head_size)?;
    let rope = rope::read(config, head_size, &switches.rope)?;
    let intermediate = config.size("intermediate_size", MAX_INTERMEDIATE)?;
    let epsilon = config.positive_or("rms_norm_eps", 1e-6)?;

    let norm = |weight: String| NormSpec { kind: NormKind::Rms, epsilon, weight, bias: None };
    let linear =
        |name: String, outputs: usize, inputs: usize, bias: bool| LinearSpec::named(&name, outputs, inputs, bias);
    let block = |index: usize| {
        let at = |part: &str| format!("model.layers.{index}.{part}");
        let (q_width, kv_width) = (heads * head_size, kv_heads * head_size);
        BlockSpec {
            residual: ResidualOrder::Sequential,
            attention_norm: norm(at("input_layernorm.weight")),
            attention: AttentionSpec {
                heads,
                kv_heads,
                head_size,
                // A root and a division give the same bits on every machine, which a power need not.
                scale: 1.0 / (head_size as f64).sqrt(),
                q: linear(at("self_attn.q_proj"), q_width, hidden, switches.qkv_bias),
                k: linear(at("self_attn.k_proj"), kv_width, hidden, switches.qkv_bias),
                v: linear(at("self_attn.v_proj"), kv_width, hidden, switches.qkv_bias),
                o: linear(at("self_attn.o_proj"), hidden, q_width, switches.output_bias),
                qk_norm: switches
                    .qk_norm
                    .then(|| QkNorm { q: norm(at("self_attn.q_norm.weight")), k: norm(at("self_attn.k_norm.weight")) }),
                rope: Some(rope.clone()),
                alibi: None,
                window: switches.windows.get(index).copied().flatten(),
                soft_cap: None,
                sinks: None,
            },
            attention_output_norm: None,
            ffn_norm: norm(at("post_attention_layernorm.weight")),
            ffn: FfnSpec::Gated {
                activation,
                gate: linear(at("mlp.gate_proj"), intermediate, hidden, switches.ffn_bias),
                up: linear(at("mlp.up_proj"), intermediate, hidden, switches.ffn_bias),
                down: linear(at("mlp.down_proj"), hidden, intermediate, switches.ffn_bias),
            },
            ffn_output_norm: None,
        }
    };

    let tied = config.optional("tie_word_embeddings")?.unwrap_or(switches.tied_by_default);
    Ok(ModelSpec {
        model_type: config.required("model_type")?,
        stored_dtype: config.dtype()?,
        hidden_size: hidden,
        vocab_size: vocab,
        max_context: rope::max_context(config, &rope)?,
        blocks: (0..blocks).map(block).collect(),
        edges: EdgesSpec {
            embedding: "model.embed_tokens.weight".into(),
            final_norm: norm("model.norm.weight".into()),
            head: head(tied, vocab, hidden),
            embedding_scale: None,
            embedding_norm: None,
            logit_soft_cap: None,
        },
        packing: None,
    })
}

/// The output head: the embedding's matrix, or one of its own without a bias.
pub(super) fn head(tied: bool, vocab: usize, hidden: usize) -> HeadSpec {
    if tied { HeadSpec::Tied } else { HeadSpec::Separate(LinearSpec::named("lm_head", vocab, hidden, false)) }
}

/// The heads of attention.
pub(super) struct Heads {
    /// Query heads.
    pub(super) heads: usize,
    /// Key and value heads.
    pub(super) kv_heads: usize,
    /// Numbers of a head.
    pub(super) head_size: usize,
}

/// Reads how many heads there are, and how wide one is: `head_dim`, or `default`, or what the hidden size leaves.
pub(super) fn heads(config: &Config, hidden: usize, default: Option<usize>) -> Result<Heads, ConfigError> {
    let heads = config.size("num_attention_heads", MAX_HEADS)?;
    // Without the field every query head has its own key and value head.
    let kv_heads = config.optional_size("num_key_value_heads", MAX_HEADS)?.unwrap_or(heads);
    if !heads.is_multiple_of(kv_heads) {
        return Err(config.invalid("num_key_value_heads", format!("must divide num_attention_heads, {heads}")));
    }
    let head_size = match (config.optional_size("head_dim", MAX_HEAD_SIZE)?, default) {
        (Some(size), _) | (None, Some(size)) => size,
        (None, None) if hidden.is_multiple_of(heads) => hidden / heads,
        (None, None) => {
            return Err(config.invalid("hidden_size", format!("must be a multiple of num_attention_heads, {heads}")));
        }
    };
    if !head_size.is_multiple_of(2) {
        return Err(
            config.invalid("head_dim", format!("a head is {head_size} wide, and rotary positions need an even width"))
        );
    }
    Ok(Heads { heads, kv_heads, head_size })
}
