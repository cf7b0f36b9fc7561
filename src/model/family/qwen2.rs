//! `qwen2`: Qwen 1.5 to 2.5, Llama's layout with biases on queries, keys and values.

use serde_json::{Value, json};

use super::{
    config::{Config, ConfigError},
    decoder::{self, Switches},
};
use crate::model::spec::ModelSpec;

pub(super) fn spec(config: &Config) -> Result<ModelSpec, ConfigError> {
    for field in ["attention_bias", "mlp_bias"] {
        // The reference has these biases and no others, whatever the file says.
        let as_built = json!(field == "attention_bias");
        config.refuse_unless(field, &as_built, "Qwen2 has biases on queries, keys and values, and nowhere else")?;
    }
    let config = &config.with_defaults(&defaults());
    decoder::spec(config, &Switches { qkv_bias: true, windows: windows(config)?, ..Switches::default() })
}

/// What the reference takes for Qwen 2 and 3 where the file doesn't say it.
pub(super) fn defaults() -> Value {
    json!({ "max_position_embeddings": 32_768, "num_key_value_heads": 32, "sliding_window": 4096 })
}

/// The sliding windows of Qwen 2 and 3: only with `use_sliding_window`, and then in the blocks that `layer_types` names
/// or, without it, from block `max_window_layers` on.
pub(super) fn windows(config: &Config) -> Result<Vec<Option<usize>>, ConfigError> {
    let in_use = config.optional("use_sliding_window")?.unwrap_or(false);
    let window = if in_use { decoder::sliding_window(config)? } else { None };
    let first = config.optional::<usize>("max_window_layers")?.unwrap_or(28);
    decoder::windows(config, decoder::num_blocks(config)?, window, |block| block >= first)
}
