//! `gpt_oss`: gpt-oss. Alternating windows, attention sinks, YaRN, and a mixture of experts whose matrices are stored in
//! MXFP4, or in one of the floating point formats where somebody has converted them.

use serde_json::json;

use super::{
    config::{Config, ConfigError},
    decoder::{self, Switches},
    rope,
};
use crate::model::spec::{
    ExpertTensors, ExpertsSpec, FfnSpec, Gating, LinearSpec, MXFP4_GROUP, ModelSpec, Routing, StackedFormat,
};

pub(super) fn spec(config: &Config) -> Result<ModelSpec, ConfigError> {
    let mut defaults = json!({
        "num_key_value_heads": 8, "sliding_window": 128, "attention_bias": true, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131_072, "swiglu_alpha": 1.702, "swiglu_limit": 7.0, "head_dim": 64,
    });
    if !config.has("rope_parameters") && !config.has("rope_scaling") {
        defaults["rope_parameters"] = json!({
            "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": false,
            "original_max_position_embeddings": 4096,
        });
    }
    config.refuse_unless("hidden_act", &json!("silu"), "gpt-oss has a gate of its own in place of an activation")?;
    let config = &config.with_defaults(&defaults);
    let window = decoder::sliding_window(config)?;
    let attention_bias = config.required("attention_bias")?;
    let switches = Switches {
        qkv_bias: attention_bias,
        output_bias: attention_bias,
        windows: decoder::windows(config, decoder::num_blocks(config)?, window, |block| block % 2 == 0)?,
        rope: rope::Defaults { theta: 150_000.0, ..rope::Defaults::default() },
        ..Switches::default()
    };
    let mut spec = decoder::spec(config, &switches)?;

    let (count, active) = decoder::experts(config, [128, 4])?;
    let gating = Gating::Clamped { alpha: config.positive("swiglu_alpha")?, limit: config.positive("swiglu_limit")? };
    let format = format(config, spec.hidden_size)?;
    for (index, block) in spec.blocks.iter_mut().enumerate() {
        let FfnSpec::Gated { gate, .. } = &block.ffn else { continue };
        let name = |part: &str| format!("model.layers.{index}.{part}");
        block.ffn = FfnSpec::Experts(ExpertsSpec {
            router: LinearSpec::named(&name("mlp.router"), count, spec.hidden_size, true),
            // The reference takes a softmax over the chosen experts' scores, which is the same.
            routing: Routing::Normalised,
            count,
            active,
            intermediate: gate.outputs,
            gating,
            tensors: ExpertTensors::Stacked {
                gate_up: name("mlp.experts.gate_up_proj"),
                gate_up_bias: name("mlp.experts.gate_up_proj_bias"),
                down: name("mlp.experts.down_proj"),
                down_bias: name("mlp.experts.down_proj_bias"),
                format,
            },
        });
        block.attention.sinks = Some(name("self_attn.sinks"));
    }
    Ok(spec)
}

/// How the experts are stored.
fn format(config: &Config, hidden: usize) -> Result<StackedFormat, ConfigError> {
    let Some(quantization) = config.part("quantization_config")? else { return Ok(StackedFormat::Transposed) };
    if quantization.required::<String>("quant_method")? != "mxfp4" {
        return Err(quantization.unsupported("quant_method", "experts may be in mxfp4, f32, bf16 or f16"));
    }
    for (field, width) in
        [("hidden_size", hidden), ("intermediate_size", config.size("intermediate_size", decoder::MAX_INTERMEDIATE)?)]
    {
        if !width.is_multiple_of(MXFP4_GROUP) {
            return Err(
                config.invalid(field, format!("must be a multiple of {MXFP4_GROUP} where experts are in mxfp4"))
            );
        }
    }
    Ok(StackedFormat::Mxfp4)
}
