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
    let window = decoder::sliding_window(config)?;
    let windows = decoder::windows(config, decoder::num_blocks(config)?, window, |_| true)?;
    decoder::spec(config, &Switches { windows, ..Switches::default() })
}
