//! Families of models: from `config.json` to a [`ModelSpec`].
//!
//! One short file a family, named after its `model_type`. A family reads the fields that its reference implementation
//! in Hugging Face transformers reads, with the same defaults. Both spellings are understood: the older one with
//! `rope_theta`, `rope_scaling` and `torch_dtype`, and the newer one with `rope_parameters` and `dtype`. An option that
//! would change the arithmetic and isn't supported is an error that names the field and its value; it is never ignored.

mod config;
mod decoder;
mod llama;
mod mistral;
mod qwen2;
mod qwen3;
mod rope;

use super::spec::ModelSpec;
use config::Config;
pub use config::ConfigError;

type Reader = fn(&Config) -> Result<ModelSpec, ConfigError>;

/// The families, in the order in which the message about an unknown one lists them.
const FAMILIES: &[(&str, Reader)] =
    &[("llama", llama::spec), ("mistral", mistral::spec), ("qwen2", qwen2::spec), ("qwen3", qwen3::spec)];

/// The supported values of `model_type`.
pub fn supported() -> impl Iterator<Item = &'static str> {
    FAMILIES.iter().map(|(name, _)| *name)
}

/// Reads the text of a `config.json`.
///
/// # Errors
/// The text is no JSON object, the family is unknown, or a field is missing, absurd or not supported.
pub fn read_config(text: &str) -> Result<ModelSpec, ConfigError> {
    let config = Config::parse(text)?;
    let model_type: String = config.required("model_type")?;
    let Some((_, read)) = FAMILIES.iter().find(|(name, _)| *name == model_type) else {
        return Err(ConfigError::UnknownFamily { model_type, supported: supported().collect::<Vec<_>>().join(", ") });
    };
    config.refuse_unsupported()?;
    read(&config)
}

#[cfg(test)]
mod tests;
