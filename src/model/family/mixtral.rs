//! `mixtral`: Mistral's layout with a mixture of experts in every block.

use serde_json::json;

use super::{
    config::{Config, ConfigError},
    decoder::{self, Switches},
    rope,
};
use crate::model::spec::{ExpertTensors, ExpertsSpec, FfnSpec, Gating, LinearSpec, ModelSpec, Routing};

pub(super) fn spec(config: &Config) -> Result<ModelSpec, ConfigError> {
    for field in ["attention_bias", "mlp_bias"] {
        config.refuse_unless(field, &json!(false), "Mixtral's projections have no biases")?;
    }
    let config = &config.with_defaults(&json!({
        "max_position_embeddings": 131_072, "num_key_value_heads": 8, "rms_norm_eps": 1e-5,
    }));
    let (count, active) = decoder::experts(config, [8, 2])?;
    let switches = Switches {
        windows: vec![decoder::sliding_window(config)?; decoder::num_blocks(config)?],
        rope: rope::Defaults { theta: 1_000_000.0, ..rope::Defaults::default() },
        ..Switches::default()
    };
    let mut spec = decoder::spec(config, &switches)?;
    for (index, block) in spec.blocks.iter_mut().enumerate() {
        let FfnSpec::Gated { activation, gate, .. } = &block.ffn else { continue };
        let name = |part: &str| format!("model.layers.{index}.block_sparse_moe.{part}");
        block.ffn = FfnSpec::Experts(ExpertsSpec {
            router: LinearSpec::named(&name("gate"), count, spec.hidden_size, false),
            routing: Routing::Normalised,
            count,
            active,
            intermediate: gate.outputs,
            gating: Gating::Plain(*activation),
            tensors: ExpertTensors::Separate {
                gate: name("experts.{}.w1.weight"),
                up: name("experts.{}.w3.weight"),
                down: name("experts.{}.w2.weight"),
                biases: None,
            },
        });
    }
    Ok(spec)
}
