//! `falcon`: Falcon in its four layouts.
//!
//! | | norms | parts of a block | key heads | positions |
//! |---|---|---|---|---|
//! | 7B | one | side by side | one | rotary |
//! | 40B, 180B | one for each part | side by side | several | rotary |
//! | 11B | one | side by side | several | rotary |
//! | RW | one for each part | one after the other | one a query head | linear biases |

use serde_json::json;

use super::{
    bloom,
    config::{Config, ConfigError},
    decoder::{self, Heads},
    rope,
};
use crate::model::{
    Dtype,
    spec::{AlibiSpec, AttentionSpec, BlockSpec, EdgesSpec, FfnSpec, LinearSpec, ModelSpec, NormSpec, ResidualOrder},
};

/// How often the linear biases are added, scaled as the scores are.
///
/// The reference outputs were made with the eager attention of transformers 5.23 (`attn_implementation="eager"`), which
/// finds the biases in the mask and adds them to the scores once more. Its `sdpa` attention, which is what `from_pretrained`
/// takes unless told otherwise, adds them once, as the code that came with the models did. There is no telling from a
/// checkpoint which one it wants, so this follows the reference.
const ALIBI_COUNTS: f64 = 2.0;

pub(super) fn spec(config: &Config) -> Result<ModelSpec, ConfigError> {
    let config = &config.with_defaults(&json!({ "max_position_embeddings": 2048, "activation": "gelu" }));
    let hidden = if config.has("n_embed") { "n_embed" } else { "hidden_size" };
    let hidden = config.size(hidden, decoder::MAX_HIDDEN)?;
    let vocab = config.size("vocab_size", decoder::MAX_VOCAB)?;
    let intermediate = config.optional_size("ffn_hidden_size", decoder::MAX_INTERMEDIATE)?.unwrap_or(4 * hidden);
    let layout = Layout::read(config)?;
    let heads = heads(config, hidden, &layout)?;
    let Heads { head_size, kv_heads, .. } = heads;
    let scale = 1.0 / (head_size as f64).sqrt();
    let alibi = config.optional("alibi")?.unwrap_or(false);
    if !alibi && !head_size.is_multiple_of(2) {
        let reason = format!("leaves heads of {head_size}, and rotary positions need an even width");
        return Err(config.invalid("num_attention_heads", reason));
    }
    let rope = rope::read(config, head_size, &rope::Defaults::default())?;
    let activation = decoder::activation(config, "activation")?;
    let epsilon = config.positive_or("layer_norm_epsilon", 1e-5)?;
    let bias = config.optional("bias")?.unwrap_or(false);

    let norm = |name: &str| NormSpec::layer(name, epsilon);
    let block = |index: usize| {
        let name = |part: &str| format!("transformer.h.{index}.{part}");
        let linear = |part: &str, outputs: usize, inputs: usize| LinearSpec::named(&name(part), outputs, inputs, bias);
        let (q_width, kv_width) = (heads.heads * head_size, kv_heads * head_size);
        let fused = linear("self_attention.query_key_value", q_width + 2 * kv_width, hidden);
        let [q, k, v] = bloom::by_group(&fused, &heads);
        let [attention_norm, ffn_norm] = layout.norms.map(|part| norm(&name(part)));
        BlockSpec {
            residual: layout.residual,
            attention_norm,
            attention: AttentionSpec {
                heads: heads.heads,
                kv_heads,
                head_size,
                scale,
                q,
                k,
                v,
                o: linear("self_attention.dense", hidden, q_width),
                qk_norm: None,
                rope: (!alibi).then(|| rope.clone()),
                alibi: alibi.then_some(AlibiSpec { factor: ALIBI_COUNTS * scale, rounding: Dtype::Bf16 }),
                window: None,
                soft_cap: None,
                sinks: None,
            },
            attention_output_norm: None,
            ffn_norm,
            ffn: FfnSpec::Plain {
                activation,
                up: linear("mlp.dense_h_to_4h", intermediate, hidden),
                down: linear("mlp.dense_4h_to_h", hidden, intermediate),
            },
            ffn_output_norm: None,
        }
    };
    let tied = config.optional("tie_word_embeddings")?.unwrap_or(true);
    Ok(ModelSpec {
        model_type: config.required("model_type")?,
        stored_dtype: config.dtype()?,
        hidden_size: hidden,
        vocab_size: vocab,
        max_context: rope::max_context(config, &rope)?,
        blocks: (0..decoder::num_blocks(config)?).map(block).collect(),
        edges: EdgesSpec {
            embedding: "transformer.word_embeddings.weight".into(),
            final_norm: norm("transformer.ln_f"),
            head: decoder::head(tied, vocab, hidden),
            embedding_scale: None,
            embedding_norm: None,
            logit_soft_cap: None,
        },
        packing: None,
    })
}

/// How the parts of a block lie to each other.
struct Layout {
    /// The decoder of 40B and its followers.
    new: bool,
    residual: ResidualOrder,
    /// Attention's norm and that of the feed-forward part.
    norms: [&'static str; 2],
}

impl Layout {
    fn read(config: &Config) -> Result<Self, ConfigError> {
        let new = config.optional("new_decoder_architecture")?.unwrap_or(false);
        let parallel = config.optional("parallel_attn")?.unwrap_or(true);
        let norms = config.optional::<usize>("num_ln_in_parallel_attn")?.unwrap_or(if new { 2 } else { 1 });
        let (residual, norms) = match (new, parallel, norms) {
            (true, true, 2) => (ResidualOrder::Parallel, ["ln_attn", "ln_mlp"]),
            (_, true, 1) => (ResidualOrder::Parallel, ["input_layernorm"; 2]),
            (false, false, _) => (ResidualOrder::Sequential, ["input_layernorm", "post_attention_layernorm"]),
            (true, false, _) => {
                return Err(config.unsupported("parallel_attn", "with new_decoder_architecture the parts are parallel"));
            }
            _ => {
                let known = "it may be 1, or with new_decoder_architecture 2";
                return Err(config.unsupported("num_ln_in_parallel_attn", known));
            }
        };
        Ok(Self { new, residual, norms })
    }
}

fn heads(config: &Config, hidden: usize, layout: &Layout) -> Result<Heads, ConfigError> {
    let heads = config.size("num_attention_heads", decoder::MAX_HEADS)?;
    if !hidden.is_multiple_of(heads) {
        return Err(config.invalid("num_attention_heads", format!("must divide {hidden}")));
    }
    let kv_heads = if layout.new {
        config.optional_size("num_kv_heads", decoder::MAX_HEADS)?.unwrap_or(heads)
    } else if config.optional("multi_query")?.unwrap_or(true) {
        1
    } else {
        heads
    };
    if !heads.is_multiple_of(kv_heads) {
        return Err(config.invalid("num_kv_heads", format!("must divide num_attention_heads, {heads}")));
    }
    Ok(Heads { heads, kv_heads, head_size: hidden / heads })
}
