//! `phi`: Phi 1, 1.5 and 2. Layer norms, attention and an ungated feed-forward part side by side, partly rotated heads,
//! biases everywhere.

use serde_json::json;

use super::{
    config::{Config, ConfigError},
    decoder, rope,
};
use crate::model::spec::{
    AttentionSpec, BlockSpec, EdgesSpec, FfnSpec, HeadSpec, LinearSpec, ModelSpec, NormSpec, QkNorm, ResidualOrder,
};

pub(super) fn spec(config: &Config) -> Result<ModelSpec, ConfigError> {
    let config = &config.with_defaults(&json!({ "hidden_act": "gelu_new", "max_position_embeddings": 2048 }));
    let hidden = config.size("hidden_size", decoder::MAX_HIDDEN)?;
    let vocab = config.size("vocab_size", decoder::MAX_VOCAB)?;
    let intermediate = config.size("intermediate_size", decoder::MAX_INTERMEDIATE)?;
    let decoder::Heads { heads, kv_heads, head_size } = decoder::heads(config, hidden, None)?;
    let activation = decoder::activation(config, "hidden_act")?;
    let epsilon = config.positive_or("layer_norm_eps", 1e-5)?;
    let qk_norm = config.optional("qk_layernorm")?.unwrap_or(false);
    let defaults = rope::Defaults { partial: Some(0.5), ..rope::Defaults::default() };
    let rope = rope::read(config, head_size, &defaults)?;

    let norm = |name: &str| NormSpec::layer(name, epsilon);
    let block = |index: usize| {
        let name = |part: &str| format!("model.layers.{index}.{part}");
        let linear = |part: &str, outputs: usize, inputs: usize| LinearSpec::named(&name(part), outputs, inputs, true);
        BlockSpec {
            residual: ResidualOrder::Parallel,
            attention_norm: norm(&name("input_layernorm")),
            attention: AttentionSpec {
                heads,
                kv_heads,
                head_size,
                scale: 1.0 / (head_size as f64).sqrt(),
                q: linear("self_attn.q_proj", heads * head_size, hidden),
                k: linear("self_attn.k_proj", kv_heads * head_size, hidden),
                v: linear("self_attn.v_proj", kv_heads * head_size, hidden),
                o: linear("self_attn.dense", hidden, heads * head_size),
                qk_norm: qk_norm.then(|| QkNorm {
                    q: norm(&name("self_attn.q_layernorm")),
                    k: norm(&name("self_attn.k_layernorm")),
                }),
                rope: Some(rope.clone()),
                alibi: None,
                window: None,
                soft_cap: None,
                sinks: None,
            },
            attention_output_norm: None,
            ffn_norm: norm(&name("input_layernorm")),
            ffn: FfnSpec::Plain {
                activation,
                up: linear("mlp.fc1", intermediate, hidden),
                down: linear("mlp.fc2", hidden, intermediate),
            },
            ffn_output_norm: None,
        }
    };

    let embedding = "model.embed_tokens.weight".to_owned();
    let mut head = LinearSpec::named("lm_head", vocab, hidden, true);
    if config.optional("tie_word_embeddings")?.unwrap_or(false) {
        // The matrix is shared, and the bias is the head's own.
        head.weight.clone_from(&embedding);
    }
    Ok(ModelSpec {
        model_type: config.required("model_type")?,
        stored_dtype: config.dtype()?,
        hidden_size: hidden,
        vocab_size: vocab,
        max_context: rope::max_context(config, &rope)?,
        blocks: (0..decoder::num_blocks(config)?).map(block).collect(),
        edges: EdgesSpec {
            embedding,
            final_norm: norm("model.final_layernorm"),
            head: HeadSpec::Separate(head),
            embedding_scale: None,
            embedding_norm: None,
            logit_soft_cap: None,
        },
        packing: None,
    })
}
