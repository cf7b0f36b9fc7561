//! Families of models: from `config.json` to a [`ModelSpec`].
//!
//! One short file a family, named after its `model_type`. A family reads the fields that its reference implementation
//! in Hugging Face transformers reads, with the same defaults. Both spellings are understood: the older one with
//! `rope_theta`, `rope_scaling` and `torch_dtype`, and the newer one with `rope_parameters` and `dtype`. An option that
//! would change the arithmetic and isn't supported is an error that names the field and its value; it is never ignored.
//! How the layers are packed is read for all families in one place, but for gpt-oss, whose experts have a format of their own.

mod bloom;
mod config;
mod decoder;
mod falcon;
mod gemma3;
mod gpt_oss;
mod llama;
mod mistral;
mod mixtral;
mod phi;
mod phi3;
mod quantization;
mod qwen2;
mod qwen3;
mod qwen3_moe;
mod rope;

use super::spec::ModelSpec;
use config::Config;
pub use config::ConfigError;

struct Family {
    model_type: &'static str,
    /// Options that change the arithmetic and that few families read; in the others' files they are errors.
    reads: &'static [&'static str],
    spec: fn(&Config) -> Result<ModelSpec, ConfigError>,
}

const EXPERTS: &[&str] = &["num_local_experts", "num_experts"];
const GEMMA: &[&str] = &["query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"];

/// The families, in the order in which the message about an unknown one lists them.
const FAMILIES: &[Family] = &[
    Family { model_type: "llama", reads: &[], spec: llama::spec },
    Family { model_type: "mistral", reads: &[], spec: mistral::spec },
    Family { model_type: "qwen2", reads: &[], spec: qwen2::spec },
    Family { model_type: "qwen3", reads: &[], spec: qwen3::spec },
    Family { model_type: "mixtral", reads: EXPERTS, spec: mixtral::spec },
    Family { model_type: "qwen3_moe", reads: EXPERTS, spec: qwen3_moe::spec },
    Family { model_type: "phi", reads: &["partial_rotary_factor", "qk_layernorm"], spec: phi::spec },
    Family { model_type: "phi3", reads: &["partial_rotary_factor"], spec: phi3::spec },
    Family { model_type: "gemma3", reads: GEMMA, spec: gemma3::multimodal },
    Family { model_type: "gemma3_text", reads: GEMMA, spec: gemma3::spec },
    Family {
        model_type: "gpt_oss",
        reads: &["num_local_experts", "num_experts", quantization::FIELD],
        spec: gpt_oss::spec,
    },
    Family { model_type: "falcon", reads: &["alibi"], spec: falcon::spec },
    Family { model_type: "bloom", reads: &[], spec: bloom::spec },
];

/// The supported values of `model_type`.
pub fn supported() -> impl Iterator<Item = &'static str> {
    FAMILIES.iter().map(|family| family.model_type)
}

/// Reads the text of a `config.json`.
///
/// # Errors
/// The text is no JSON object, the family is unknown, or a field is missing, absurd or not supported.
pub fn read_config(text: &str) -> Result<ModelSpec, ConfigError> {
    let config = Config::parse(text)?;
    let model_type: String = config.required("model_type")?;
    let Some(family) = FAMILIES.iter().find(|family| family.model_type == model_type) else {
        return Err(ConfigError::UnknownFamily { model_type, supported: supported().collect::<Vec<_>>().join(", ") });
    };
    config.refuse_unsupported(family.reads)?;
    let mut spec = (family.spec)(&config)?;
    if !family.reads.contains(&quantization::FIELD) {
        spec.packing = quantization::read(&config)?;
    }
    Ok(spec)
}

#[cfg(test)]
mod tests;
