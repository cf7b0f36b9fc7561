//! `qwen3_moe`: Qwen 3 with a mixture of experts in all blocks or in some.

use serde_json::json;

use super::{
    config::{Config, ConfigError},
    decoder::{self, Switches},
};
use crate::model::spec::{ExpertTensors, ExpertsSpec, FfnSpec, Gating, LinearSpec, ModelSpec, Routing};

pub(super) fn spec(config: &Config) -> Result<ModelSpec, ConfigError> {
    config.refuse_unless("mlp_bias", &json!(false), "Qwen3's feed-forward part has no biases")?;
    let config = &config.with_defaults(&json!({
        "max_position_embeddings": 32_768, "num_key_value_heads": 4, "sliding_window": 4096,
    }));
    let attention_bias = config.optional("attention_bias")?.unwrap_or(false);
    let slides = config.optional("use_sliding_window")?.unwrap_or(false);
    let window = if slides { decoder::sliding_window(config)? } else { None };
    let switches = Switches {
        qkv_bias: attention_bias,
        output_bias: attention_bias,
        qk_norm: true,
        // All blocks slide or none: the reference reads no `layer_types` here.
        windows: vec![window; decoder::num_blocks(config)?],
        ..Switches::default()
    };
    let mut spec = decoder::spec(config, &switches)?;

    let (count, active) = decoder::experts(config, [128, 8])?;
    let intermediate = config.optional_size("moe_intermediate_size", decoder::MAX_INTERMEDIATE)?.unwrap_or(768);
    let normalised = config.optional("norm_topk_prob")?.unwrap_or(false);
    let step = config.optional_size("decoder_sparse_step", decoder::MAX_BLOCKS)?.unwrap_or(1);
    let dense: Vec<usize> = config.optional("mlp_only_layers")?.unwrap_or_default();
    for (index, block) in spec.blocks.iter_mut().enumerate() {
        let FfnSpec::Gated { activation, .. } = &block.ffn else { continue };
        if dense.contains(&index) || !(index + 1).is_multiple_of(step) {
            continue;
        }
        let name = |part: &str| format!("model.layers.{index}.mlp.{part}");
        block.ffn = FfnSpec::Experts(ExpertsSpec {
            router: LinearSpec::named(&name("gate"), count, spec.hidden_size, false),
            routing: if normalised { Routing::Normalised } else { Routing::Probabilities },
            count,
            active,
            intermediate,
            gating: Gating::Plain(*activation),
            tensors: ExpertTensors::Separate {
                gate: name("experts.{}.gate_proj.weight"),
                up: name("experts.{}.up_proj.weight"),
                down: name("experts.{}.down_proj.weight"),
                biases: None,
            },
        });
    }
    Ok(spec)
}
