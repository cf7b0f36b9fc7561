//! Rotary positions, in both spellings.

use serde_json::json;

use super::config::{Config, ConfigError};
use crate::model::spec::{RopeScaling, RopeSpec};

/// Far above any context; keeps sizes from overflowing.
const MAX_CONTEXT: usize = 1 << 30;

/// How many times its original context a model with dynamic scaling may go, whatever its factor. The base grows with the
/// length, and the formula knows no end; this far it has been measured to work.
const DYNAMIC_REACH: f64 = 8.0;

/// What a family's positions are like, where its configuration doesn't say it.
pub(super) struct Defaults {
    /// The base.
    pub(super) theta: f64,
    /// The part of a head that is rotated; `None` if the family always rotates all of it.
    pub(super) partial: Option<f64>,
    /// Names of kinds of scaling that mean LongRoPE here.
    pub(super) longrope: &'static [&'static str],
}

impl Default for Defaults {
    /// What transformers takes for most families.
    fn default() -> Self {
        Self { theta: 10_000.0, partial: None, longrope: &["longrope"] }
    }
}

/// Reads `rope_parameters`, or `rope_theta` and `rope_scaling`.
///
/// Where a file has both spellings the newer one counts, and a base that differs between them is an error.
pub(super) fn read(config: &Config, head_size: usize, defaults: &Defaults) -> Result<RopeSpec, ConfigError> {
    let Some(parameters) = config.part("rope_parameters")? else {
        let theta = config.positive_or("rope_theta", defaults.theta)?;
        return section(config, config.part("rope_scaling")?.as_ref(), theta, (head_size, defaults));
    };
    for kind in ["full_attention", "sliding_attention"] {
        parameters.refuse_unless(kind, &().into(), "this model type has the same positions in all blocks")?;
    }
    let theta = match parameters.optional::<f64>("rope_theta")? {
        Some(_) => parameters.positive("rope_theta")?,
        None => config.positive_or("rope_theta", defaults.theta)?,
    };
    if config.optional::<f64>("rope_theta")?.is_some_and(|older| older != theta) {
        return Err(config.invalid("rope_theta", format!("rope_parameters.rope_theta says {theta}")));
    }
    section(config, Some(&parameters), theta, (head_size, defaults))
}

/// Reads the part that says how positions are scaled, for heads of a width.
pub(super) fn section(
    config: &Config,
    part: Option<&Config>,
    theta: f64,
    (head_size, defaults): (usize, &Defaults),
) -> Result<RopeSpec, ConfigError> {
    let width = rotated(config, part, head_size, defaults)?;
    let scaling = match part {
        Some(part) => scaling(config, part, width.unwrap_or(head_size), defaults)?,
        None => RopeScaling::Default,
    };
    Ok(RopeSpec { theta, scaling, width })
}

/// How many numbers of a head are rotated, if not all.
fn rotated(
    config: &Config,
    part: Option<&Config>,
    head_size: usize,
    defaults: &Defaults,
) -> Result<Option<usize>, ConfigError> {
    const FIELD: &str = "partial_rotary_factor";
    let Some(default) = defaults.partial else {
        if let Some(part) = part {
            part.refuse_unless(FIELD, &json!(1.0), "this model type rotates whole heads")?;
        }
        return Ok(None);
    };
    let place = part.filter(|part| part.has(FIELD)).unwrap_or(config);
    let factor = place.positive_or(FIELD, default)?;
    let width = (head_size as f64 * factor) as usize;
    if factor > 1.0 || width < 2 || !width.is_multiple_of(2) {
        let reason =
            format!("of a head of {head_size} numbers it leaves {width}, which must be even and within the head");
        return Err(place.invalid(FIELD, reason));
    }
    Ok(Some(width).filter(|width| *width != head_size))
}

fn scaling(config: &Config, part: &Config, width: usize, defaults: &Defaults) -> Result<RopeScaling, ConfigError> {
    // Old files say `type`.
    let field = if part.has("rope_type") { "rope_type" } else { "type" };
    let Some(kind) = part.optional::<String>(field)? else {
        // Kept as it would be read by transformers, but a table of factors for other kinds mustn't pass for none.
        for field in ["factor", "short_factor", "long_factor"] {
            part.refuse_unless(field, &1.0.into(), "a factor needs a rope_type")?;
        }
        return Ok(RopeScaling::Default);
    };
    let kind = if defaults.longrope.contains(&kind.as_str()) { "longrope" } else { kind.as_str() };
    match kind {
        "default" => Ok(RopeScaling::Default),
        "linear" => Ok(RopeScaling::Linear { factor: part.positive("factor")? }),
        "llama3" => llama3(config, part),
        "dynamic" => {
            if width < 4 {
                return Err(part.unsupported(field, "dynamic scaling needs at least 4 numbers of a head to rotate"));
            }
            let original_context = config.size("max_position_embeddings", MAX_CONTEXT)?;
            Ok(RopeScaling::Dynamic { factor: part.positive("factor")?, original_context })
        }
        "yarn" => yarn(config, part),
        "longrope" => longrope(config, part, width),
        _ => Err(part.unsupported(field, "the kinds are default, linear, dynamic, llama3, yarn and longrope")),
    }
}

fn llama3(config: &Config, part: &Config) -> Result<RopeScaling, ConfigError> {
    let low_freq_factor = part.positive("low_freq_factor")?;
    let high_freq_factor = part.positive("high_freq_factor")?;
    if high_freq_factor <= low_freq_factor {
        return Err(part.invalid("high_freq_factor", format!("must be above low_freq_factor, {low_freq_factor}")));
    }
    let original_context = original_context(config, part)?;
    Ok(RopeScaling::Llama3 { factor: part.positive("factor")?, low_freq_factor, high_freq_factor, original_context })
}

fn yarn(config: &Config, part: &Config) -> Result<RopeScaling, ConfigError> {
    let original_context = original_context(config, part)?;
    let factor = factor(config, part, original_context)?;
    // A factor of the temperature (equation 22 of the paper, as in transformers).
    let scale = |weight: f64| if factor <= 1.0 { 1.0 } else { 0.1 * weight * factor.ln() + 1.0 };
    let weights = (part.optional::<f64>("mscale")?, part.optional::<f64>("mscale_all_dim")?);
    let attention_factor = match (part.has("attention_factor"), weights) {
        (true, _) => part.positive("attention_factor")?,
        (false, (Some(one), Some(all))) if one != 0.0 && all != 0.0 => scale(one) / scale(all),
        (false, _) => scale(1.0),
    };
    // Zero stands for the default, too.
    let turns = |field: &str, default: f64| match part.optional::<f64>(field)? {
        None | Some(0.0) => Ok(default),
        Some(_) => part.positive(field),
    };
    let (beta_fast, beta_slow) = (turns("beta_fast", 32.0)?, turns("beta_slow", 1.0)?);
    if beta_fast < beta_slow {
        return Err(part.invalid("beta_fast", format!("must not be below beta_slow, {beta_slow}")));
    }
    let truncate = part.optional("truncate")?.unwrap_or(true);
    Ok(RopeScaling::Yarn { factor, beta_fast, beta_slow, original_context, attention_factor, truncate })
}

fn longrope(config: &Config, part: &Config, width: usize) -> Result<RopeScaling, ConfigError> {
    let original_context = original_context(config, part)?;
    let factor = factor(config, part, original_context)?;
    let attention_factor = if part.has("attention_factor") {
        part.positive("attention_factor")?
    } else if factor <= 1.0 {
        1.0
    } else {
        (1.0 + factor.ln() / (original_context as f64).ln()).sqrt()
    };
    for field in ["short_mscale", "long_mscale"] {
        part.refuse_unless(field, &().into(), "one attention_factor counts for all lengths")?;
    }
    let divisors = |field: &str| {
        let divisors: Vec<f64> = part.required(field)?;
        if divisors.len() != width / 2 || divisors.iter().any(|divisor| !(divisor.is_finite() && *divisor > 0.0)) {
            return Err(part.invalid(field, format!("must be {} finite numbers above 0", width / 2)));
        }
        Ok(divisors)
    };
    let (short_factor, long_factor) = (divisors("short_factor")?, divisors("long_factor")?);
    Ok(RopeScaling::Longrope { short_factor, long_factor, original_context, attention_factor })
}

/// The context that scaling starts from. Phi 3 has the field beside the part, and there it comes first.
fn original_context(config: &Config, part: &Config) -> Result<usize, ConfigError> {
    const FIELD: &str = "original_max_position_embeddings";
    for place in [config, part] {
        if let Some(context) = place.optional_size(FIELD, MAX_CONTEXT)? {
            return Ok(context);
        }
    }
    config.size("max_position_embeddings", MAX_CONTEXT)
}

/// How much longer the context gets; if it isn't said, what both lengths say.
fn factor(config: &Config, part: &Config, original_context: usize) -> Result<f64, ConfigError> {
    if part.has("factor") {
        return part.positive("factor");
    }
    Ok(config.size("max_position_embeddings", MAX_CONTEXT)? as f64 / original_context as f64)
}

fn stretched(stated: usize, factor: f64, original_context: usize) -> usize {
    stated.max((factor * original_context as f64).min(MAX_CONTEXT as f64) as usize)
}

/// The longest sequence: what the configuration says, or what the scaling stretches it to where the convention is to
/// leave the field as it was.
pub(super) fn max_context(config: &Config, rope: &RopeSpec) -> Result<usize, ConfigError> {
    let stated = config.size("max_position_embeddings", MAX_CONTEXT)?;
    Ok(match rope.scaling {
        RopeScaling::Yarn { factor, original_context, .. } => stretched(stated, factor, original_context),
        RopeScaling::Dynamic { factor, original_context } => {
            stretched(stated, factor.max(DYNAMIC_REACH), original_context)
        }
        _ => stated,
    })
}
