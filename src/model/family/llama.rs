//! `llama`: Llama 1 to 3 and the many checkpoints in their layout.

use serde_json::json;

use super::{
    config::{Config, ConfigError},
    decoder::{self, Switches},
};
use crate::model::spec::ModelSpec;

pub(super) fn spec(config: &Config) -> Result<ModelSpec, ConfigError> {
    let config = &config.with_defaults(&json!({ "max_position_embeddings": 2048 }));
    // `sliding_window` in a Llama file is a leftover of a conversion: the reference never reads it. `layer_types` may
    // only say what is the case.
    let windows = decoder::windows(config, decoder::num_blocks(config)?, None, |_| false)?;
    let attention_bias = config.optional("attention_bias")?.unwrap_or(false);
    decoder::spec(
        config,
        &Switches {
            qkv_bias: attention_bias,
            output_bias: attention_bias,
            ffn_bias: config.optional("mlp_bias")?.unwrap_or(false),
            windows,
            ..Switches::default()
        },
    )
}
