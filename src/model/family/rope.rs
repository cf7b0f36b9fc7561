//! Rotary positions, in both spellings.

use super::config::{Config, ConfigError};
use crate::model::spec::{RopeScaling, RopeSpec};

/// The base that transformers takes where a configuration names none.
const DEFAULT_THETA: f64 = 10_000.0;

/// Far above any context; keeps sizes from overflowing.
const MAX_CONTEXT: usize = 1 << 30;

/// Reads `rope_parameters`, or `rope_theta` and `rope_scaling`.
///
/// Where a file has both spellings the newer one counts, and a base that differs between them is an error.
pub(super) fn read(config: &Config) -> Result<RopeSpec, ConfigError> {
    if let Some(parameters) = config.part("rope_parameters")? {
        let theta = match parameters.optional::<f64>("rope_theta")? {
            Some(_) => parameters.positive("rope_theta")?,
            None => config.positive_or("rope_theta", DEFAULT_THETA)?,
        };
        if config.optional::<f64>("rope_theta")?.is_some_and(|older| older != theta) {
            return Err(config.invalid("rope_theta", format!("rope_parameters.rope_theta says {theta}")));
        }
        return Ok(RopeSpec { theta, scaling: scaling(&parameters)? });
    }
    let theta = config.positive_or("rope_theta", DEFAULT_THETA)?;
    let scaling = match config.part("rope_scaling")? {
        Some(part) => scaling(&part)?,
        None => RopeScaling::Default,
    };
    Ok(RopeSpec { theta, scaling })
}

fn scaling(part: &Config) -> Result<RopeScaling, ConfigError> {
    part.refuse_unless("partial_rotary_factor", &1.0.into(), "the whole head is rotated")?;
    // Old files say `type`.
    let field = if part.optional::<String>("rope_type")?.is_some() { "rope_type" } else { "type" };
    let Some(kind) = part.optional::<String>(field)? else {
        // Kept as it would be read by transformers, but a table of factors for other kinds mustn't pass for none.
        part.refuse_unless("factor", &1.0.into(), "a factor needs a rope_type: linear or llama3")?;
        part.refuse_unless("full_attention", &().into(), "positions that differ between blocks")?;
        part.refuse_unless("sliding_attention", &().into(), "positions that differ between blocks")?;
        return Ok(RopeScaling::Default);
    };
    match kind.as_str() {
        "default" => Ok(RopeScaling::Default),
        "linear" => Ok(RopeScaling::Linear { factor: part.positive("factor")? }),
        "llama3" => {
            let low_freq_factor = part.positive("low_freq_factor")?;
            let high_freq_factor = part.positive("high_freq_factor")?;
            if high_freq_factor <= low_freq_factor {
                return Err(
                    part.invalid("high_freq_factor", format!("must be above low_freq_factor, {low_freq_factor}"))
                );
            }
            Ok(RopeScaling::Llama3 {
                factor: part.positive("factor")?,
                low_freq_factor,
                high_freq_factor,
                original_context: part.size("original_max_position_embeddings", MAX_CONTEXT)?,
            })
        }
        _ => Err(part.unsupported(field, "the kinds of rotary scaling are default, linear and llama3")),
    }
}
