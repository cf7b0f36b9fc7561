//! `gemma3_text` and `gemma3`: Gemma 3 and MedGemma. Norms in front of and behind both parts of a block, local and global
//! attention with positions of their own, scaled embeddings.
//!
//! `gemma3` is the multimodal checkpoint. Its language model is read, and its vision tower never: prompts are text.

use serde_json::json;

use super::{
    GEMMA,
    config::{Config, ConfigError},
    decoder::{self, Switches},
    rope,
};
use crate::model::spec::{ModelSpec, NormKind, NormSpec, RopeSpec};

/// The language model of a multimodal configuration.
pub(super) fn multimodal(config: &Config) -> Result<ModelSpec, ConfigError> {
    let text = config.part("text_config")?.ok_or_else(|| config.missing("text_config"))?;
    let inherited = config.only(&["dtype", "torch_dtype"]);
    // What the whole model says about the head counts, and not what its part says.
    let tied = json!({ "tie_word_embeddings": config.optional("tie_word_embeddings")?.unwrap_or(true) });
    let text = text.with_defaults(&inherited).without(&["tie_word_embeddings"]).with_defaults(&tied);
    text.refuse_unsupported(GEMMA)?;
    let mut spec = spec(&text)?;
    spec.model_type = config.required("model_type")?;
    // The reference caps the logits of the text model only.
    spec.edges.logit_soft_cap = None;
    Ok(spec)
}

pub(super) fn spec(config: &Config) -> Result<ModelSpec, ConfigError> {
    // The configurations on the hub leave out what is as in the smallest of the models that were first published.
    let config = &config.with_defaults(&json!({
        "model_type": "gemma3_text", "vocab_size": 262_208, "hidden_size": 2304, "intermediate_size": 9216,
        "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 131_072, "query_pre_attn_scalar": 256,
        "sliding_window": 4096, "sliding_window_pattern": 6, "attention_bias": false, "tie_word_embeddings": true,
    }));
    // `attn_logit_softcapping` is a leftover of Gemma 2: the reference never reads it.
    let pattern = config.size("sliding_window_pattern", decoder::MAX_BLOCKS)?;
    let slides = |block: usize| !(block + 1).is_multiple_of(pattern);
    let window = decoder::sliding_window(config)?;
    let windows = decoder::windows(config, decoder::num_blocks(config)?, window, slides)?;
    let attention_bias = config.required("attention_bias")?;
    let local: Vec<bool> = windows.iter().map(Option::is_some).collect();
    let switches = Switches {
        qkv_bias: attention_bias,
        output_bias: attention_bias,
        qk_norm: true,
        windows,
        activation_field: Some("hidden_activation"),
        ..Switches::default()
    };
    // Which positions a block has is this family's own.
    let mut spec = decoder::spec(&config.without(&["rope_parameters", "rope_scaling", "rope_theta"]), &switches)?;
    let head_size = spec.blocks.first().map_or(0, |block| block.attention.head_size);
    let (global_rope, local_rope) = ropes(config, head_size)?;
    let scale = 1.0 / config.positive("query_pre_attn_scalar")?.sqrt();
    spec.max_context = spec.max_context.max(rope::max_context(config, &global_rope)?);

    for (index, block) in spec.blocks.iter_mut().enumerate() {
        let norm = |part: &str| NormSpec {
            kind: NormKind::RmsPlusOne,
            weight: format!("model.layers.{index}.{part}.weight"),
            ..block.attention_norm.clone()
        };
        block.attention_output_norm = Some(norm("post_attention_layernorm"));
        block.ffn_norm = norm("pre_feedforward_layernorm");
        block.ffn_output_norm = Some(norm("post_feedforward_layernorm"));
        block.attention_norm.kind = NormKind::RmsPlusOne;
        if let Some(norms) = &mut block.attention.qk_norm {
            norms.q.kind = NormKind::RmsPlusOne;
            norms.k.kind = NormKind::RmsPlusOne;
        }
        block.attention.scale = scale;
        block.attention.rope = Some(if local[index] { &local_rope } else { &global_rope }.clone());
    }
    spec.edges.final_norm.kind = NormKind::RmsPlusOne;
    spec.edges.embedding_scale = Some((spec.hidden_size as f64).sqrt());
    spec.edges.logit_soft_cap =
        config.has("final_logit_softcapping").then(|| config.positive("final_logit_softcapping")).transpose()?;
    Ok(spec)
}

/// The positions of global and of local blocks.
fn ropes(config: &Config, head_size: usize) -> Result<(RopeSpec, RopeSpec), ConfigError> {
    let defaults = rope::Defaults::default();
    let parameters = config.part("rope_parameters")?;
    let read = |kind: &str, older: Option<Config>, base: &str, default: f64| {
        let part = match &parameters {
            Some(parameters) => parameters.part(kind)?,
            None => None,
        };
        // Here the reference looks for `truncate` beside the parts, where no file has it.
        let part = part.or(older).map(|part| part.without(&["truncate"]));
        let theta = match &part {
            Some(part) if part.has("rope_theta") => part.positive("rope_theta")?,
            _ => config.positive_or(base, default)?,
        };
        rope::section(config, part.as_ref(), theta, (head_size, &defaults))
    };
    if let Some(parameters) = &parameters {
        for field in ["rope_type", "type", "rope_theta", "factor"] {
            let nested = "Gemma 3 has a part each for full_attention and sliding_attention";
            parameters.refuse_unless(field, &().into(), nested)?;
        }
    }
    // In the older spelling there is a scaling for global blocks only.
    let global = read("full_attention", config.part("rope_scaling")?, "rope_theta", 1_000_000.0)?;
    let local = read("sliding_attention", None, "rope_local_base_freq", 10_000.0)?;
    Ok((global, local))
}
