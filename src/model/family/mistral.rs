//! `mistral`: Llama's layout with a sliding window in every block.

use serde_json::json;

use super::{
    config::{Config, ConfigError},
    decoder::{self, Switches},
};
use crate::model::spec::ModelSpec;

pub(super) fn spec(config: &Config) -> Result<ModelSpec, ConfigError> {
    for field in ["attention_bias", "mlp_bias"] {
        config.refuse_unless(field, &json!(false), "Mistral's projections have no biases")?;
    }
    let config = &config.with_defaults(&json!({
        "max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096,
    }));
    // All blocks slide or none: the reference reads no `layer_types` here.
    let windows = vec![decoder::sliding_window(config)?; decoder::num_blocks(config)?];
    decoder::spec(config, &Switches { windows, ..Switches::default() })
}
