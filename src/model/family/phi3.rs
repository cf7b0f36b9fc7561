//! `phi3`: Phi 3, 3.5 and 4. Llama's layout with queries, keys and values in one matrix, and gate and up projection in
//! another.

use serde_json::json;

use super::{
    config::{Config, ConfigError},
    decoder::{self, Switches},
    rope,
};
use crate::model::spec::{FfnSpec, LinearSpec, ModelSpec};

/// The context of the first Phi 3, which its configurations needn't repeat.
const ORIGINAL_CONTEXT: usize = 4096;

pub(super) fn spec(config: &Config) -> Result<ModelSpec, ConfigError> {
    for field in ["attention_bias", "mlp_bias"] {
        config.refuse_unless(field, &json!(false), "Phi 3's projections have no biases")?;
    }
    let config = &config.with_defaults(&json!({
        "max_position_embeddings": ORIGINAL_CONTEXT, "original_max_position_embeddings": ORIGINAL_CONTEXT,
        "rms_norm_eps": 1e-5,
    }));
    let window = decoder::sliding_window(config)?;
    let switches = Switches {
        windows: vec![window; decoder::num_blocks(config)?],
        rope: rope::Defaults { partial: Some(1.0), longrope: &["longrope", "su", "yarn"], ..rope::Defaults::default() },
        ..Switches::default()
    };
    let mut spec = decoder::spec(config, &switches)?;
    for (index, block) in spec.blocks.iter_mut().enumerate() {
        let name = |part: &str| format!("model.layers.{index}.{part}");
        let attention = &mut block.attention;
        one_below_the_other(&name("self_attn.qkv_proj"), [&mut attention.q, &mut attention.k, &mut attention.v]);
        if let FfnSpec::Gated { gate, up, .. } = &mut block.ffn {
            one_below_the_other(&name("mlp.gate_up_proj"), [gate, up]);
        }
    }
    Ok(spec)
}

/// Makes the matrices parts of the matrix `name`.
fn one_below_the_other<const N: usize>(name: &str, parts: [&mut LinearSpec; N]) {
    let rows = parts.iter().map(|part| part.outputs).sum();
    let mut first = 0;
    for part in parts {
        let outputs = part.outputs;
        *part = LinearSpec::named(name, rows, part.inputs, false).rows(first, outputs, outputs, outputs);
        first += outputs;
    }
}
