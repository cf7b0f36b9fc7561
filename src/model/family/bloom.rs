//! `bloom`: BLOOM and BLOOMZ. Layer norms, linear biases for positions, one matrix for queries, keys and values, and a norm
//! behind the embedding.

use super::{
    config::{Config, ConfigError},
    decoder::{self, Heads},
};
use crate::model::{
    Dtype,
    spec::{
        Activation, AlibiSpec, AttentionSpec, BlockSpec, EdgesSpec, FfnSpec, LinearSpec, ModelSpec, NormSpec,
        ResidualOrder,
    },
};

/// The length that BLOOM was trained with, which not all of its configurations say.
const TRAINED_CONTEXT: usize = 2048;

pub(super) fn spec(config: &Config) -> Result<ModelSpec, ConfigError> {
    // Old files have old names.
    let first_of = |fields: [&'static str; 2]| fields.into_iter().find(|field| config.has(field)).unwrap_or(fields[1]);
    let hidden = config.size(first_of(["n_embed", "hidden_size"]), decoder::MAX_HIDDEN)?;
    let blocks = config.size(first_of(["n_layer", "num_hidden_layers"]), decoder::MAX_BLOCKS)?;
    let heads = config.size(first_of(["n_head", "num_attention_heads"]), decoder::MAX_HEADS)?;
    let vocab = config.size("vocab_size", decoder::MAX_VOCAB)?;
    if !hidden.is_multiple_of(heads) {
        return Err(config.invalid(first_of(["n_head", "num_attention_heads"]), format!("must divide {hidden}")));
    }
    let head_size = hidden / heads;
    let epsilon = config.positive_or("layer_norm_epsilon", 1e-5)?;
    // Split as it was in training, the reference multiplies without these two biases.
    let exact = config.optional("slow_but_exact")?.unwrap_or(false);
    let split = exact && config.optional::<usize>("pretraining_tp")?.is_some_and(|parts| parts > 1);
    let after_norm = config.optional("apply_residual_connection_post_layernorm")?.unwrap_or(false);

    let norm = |name: &str| NormSpec::layer(name, epsilon);
    let block = |index: usize| {
        let name = |part: &str| format!("transformer.h.{index}.{part}");
        let biased = |part: &str, outputs: usize, inputs: usize, bias: bool| {
            LinearSpec::named(&name(part), outputs, inputs, bias)
        };
        let linear = |part: &str, outputs: usize, inputs: usize| biased(part, outputs, inputs, true);
        let fused = linear("self_attention.query_key_value", 3 * hidden, hidden);
        let [q, k, v] = by_group(&fused, &Heads { heads, kv_heads: heads, head_size });
        BlockSpec {
            residual: if after_norm { ResidualOrder::AfterNorm } else { ResidualOrder::Sequential },
            attention_norm: norm(&name("input_layernorm")),
            attention: AttentionSpec {
                heads,
                kv_heads: heads,
                head_size,
                scale: 1.0 / (head_size as f64).sqrt(),
                q,
                k,
                v,
                o: biased("self_attention.dense", hidden, hidden, !split),
                qk_norm: None,
                rope: None,
                alibi: Some(AlibiSpec { factor: 1.0, rounding: Dtype::F32 }),
                window: None,
                soft_cap: None,
                sinks: None,
            },
            attention_output_norm: None,
            ffn_norm: norm(&name("post_attention_layernorm")),
            ffn: FfnSpec::Plain {
                activation: Activation::GeluTanh,
                up: linear("mlp.dense_h_to_4h", 4 * hidden, hidden),
                down: biased("mlp.dense_4h_to_h", hidden, 4 * hidden, !split),
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
        max_context: config.optional_size("seq_length", decoder::MAX_CONTEXT)?.unwrap_or(TRAINED_CONTEXT),
        blocks: (0..blocks).map(block).collect(),
        edges: EdgesSpec {
            embedding: "transformer.word_embeddings.weight".into(),
            final_norm: norm("transformer.ln_f"),
            head: decoder::head(tied, vocab, hidden),
            embedding_scale: None,
            embedding_norm: Some(norm("transformer.word_embeddings_layernorm")),
            logit_soft_cap: None,
        },
        packing: None,
    })
}

/// Queries, keys and values out of one matrix in which each key head follows the query heads that it serves, and its
/// value head follows it.
pub(super) fn by_group(fused: &LinearSpec, heads: &Heads) -> [LinearSpec; 3] {
    let Heads { heads, kv_heads, head_size } = *heads;
    let queries = heads / kv_heads * head_size;
    let stride = queries + 2 * head_size;
    [
        fused.rows(0, queries, stride, heads * head_size),
        fused.rows(queries, head_size, stride, kv_heads * head_size),
        fused.rows(queries + head_size, head_size, stride, kv_heads * head_size),
    ]
}
