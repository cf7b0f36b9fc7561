//! `qwen3`: Llama's layout with norms on the query and key heads.

use serde_json::json;

use super::{
    config::{Config, ConfigError},
    decoder::{self, Switches},
    qwen2,
};
use crate::model::spec::ModelSpec;

pub(super) fn spec(config: &Config) -> Result<ModelSpec, ConfigError> {
    config.refuse_unless("mlp_bias", &json!(false), "Qwen3's feed-forward part has no biases")?;
    let config = &config.with_defaults(&qwen2::defaults());
    let attention_bias = config.optional("attention_bias")?.unwrap_or(false);
    decoder::spec(
        config,
        &Switches {
            qkv_bias: attention_bias,
            output_bias: attention_bias,
            qk_norm: true,
            default_head_size: Some(128),
            windows: qwen2::windows(config)?,
            ..Switches::default()
        },
    )
}
