//! `quantization_config`: how the layers of a checkpoint are packed, whatever the family.
//!
//! Only the weights count here. What a file says about activations (`activation_scheme`, `input_activations`) tells GPU
//! kernels how to round a layer's input so that they can multiply small integers or FP8 numbers. Products are computed from
//! the unrounded activations instead, which is closer to the model that was quantized. A format of key-value caches, a
//! rotation or an adapter is another matter: those are refused.

use serde_json::{Map, Value, json};

use super::config::{Config, ConfigError};
use crate::model::spec::{Packing, PackingSpec};

/// The field of `config.json`.
pub(super) const FIELD: &str = "quantization_config";
/// Far above any group or tile; keeps products of sizes from overflowing.
const MAX_GROUP: usize = 1 << 24;
const METHODS: &str = "the methods are fp8, gptq, awq and compressed-tensors (float-quantized or pack-quantized); take \
                       one of those, a GGUF file, or the model's f32, bf16 or f16 weights";
const LAYOUT: &str = "this layout belongs to one GPU kernel; take the checkpoint in the format's own layout";
const BITS: &str =
    "integers of 4 and 8 bits can be loaded; take such a checkpoint, a GGUF file, or the model's own weights";

/// Reads how layers are packed; `None` if they aren't.
pub(super) fn read(config: &Config) -> Result<Option<PackingSpec>, ConfigError> {
    // A multimodal checkpoint may say it of its language model alone.
    let text = config.part("text_config").ok().flatten();
    let part = match (config.part(FIELD)?, text) {
        (Some(part), _) => part,
        (None, Some(text)) => match text.part(FIELD)? {
            Some(part) => part,
            None => return Ok(None),
        },
        (None, None) => return Ok(None),
    };
    let format = match part.required::<String>("quant_method")?.as_str() {
        "fp8" => fp8(&part)?,
        "gptq" => gptq(&part)?,
        "awq" => awq(&part)?,
        "compressed-tensors" => compressed(&part)?,
        _ => return Err(part.unsupported("quant_method", METHODS)),
    };
    let mut except: Vec<String> = Vec::new();
    for field in ["modules_to_not_convert", "ignored_layers", "ignore"] {
        except.extend(part.optional::<Vec<String>>(field)?.unwrap_or_default());
    }
    Ok(Some(PackingSpec { format, except }))
}

fn fp8(part: &Config) -> Result<Packing, ConfigError> {
    for (field, neutral) in [("fmt", json!("e4m3")), ("expert_dtype", json!("fp8"))] {
        part.refuse_unless(field, &neutral, "FP8 numbers must be E4M3, in the experts too")?;
    }
    part.refuse_unless("modules_to_convert", &Value::Null, "embeddings must be floating point numbers")?;
    if let Some(scheme) = part.optional::<String>("activation_scheme")?
        && !["dynamic", "static"].contains(&scheme.as_str())
    {
        return Err(part.unsupported("activation_scheme", "the schemes are dynamic and static"));
    }
    Ok(Packing::Fp8 { tile: tile(part, "weight_block_size")? })
}

/// The rows and columns that share a scale.
fn tile(part: &Config, field: &str) -> Result<Option<[usize; 2]>, ConfigError> {
    match part.optional::<[usize; 2]>(field)? {
        Some(tile) if tile.iter().any(|size| !(1..=MAX_GROUP).contains(size)) => {
            Err(part.invalid(field, format!("both numbers must be between 1 and {MAX_GROUP}")))
        }
        tile => Ok(tile),
    }
}

fn gptq(part: &Config) -> Result<Packing, ConfigError> {
    let bits = bits(part, "bits")?;
    let zeros_less_one = match spelled(part, &["checkpoint_format", "format"])?.as_deref() {
        None | Some("gptq") => true,
        Some("gptq_v2") => false,
        Some(_) => return Err(part.unsupported(present(part, ["checkpoint_format", "format"]), LAYOUT)),
    };
    part.refuse_unless("is_marlin_format", &json!(false), LAYOUT)?;
    part.refuse_unless("pack_dtype", &json!("int32"), "numbers must be packed in words of 32 bits")?;
    for field in ["adapter", "rotation"] {
        part.refuse_unless(field, &Value::Null, "take a checkpoint without it")?;
    }
    // Rules by layer; those with a minus leave the layers that they match as they were, and the tensors show that.
    let rules = part.optional::<Map<String, Value>>("dynamic")?.unwrap_or_default();
    if rules.keys().any(|rule| !rule.starts_with("-:")) {
        return Err(part.unsupported("dynamic", "all packed layers must have the same bits and group size"));
    }
    let act_order = part.optional("desc_act")?.unwrap_or(false);
    Ok(Packing::Gptq { bits, group: group(part, "group_size")?, act_order, zeros_less_one })
}

fn awq(part: &Config) -> Result<Packing, ConfigError> {
    let field = present(part, ["w_bit", "bits"]);
    if part.required::<usize>(field)? != 4 {
        return Err(part.unsupported(field, "AWQ of 4 bits can be loaded"));
    }
    match spelled(part, &["version", "format"])?.as_deref() {
        None | Some("gemm") => {}
        Some(_) => {
            let field = present(part, ["version", "format"]);
            return Err(part.unsupported(field, "the version gemm can be loaded; take such a checkpoint"));
        }
    }
    Ok(Packing::Awq { group: group(part, present(part, ["q_group_size", "group_size"]))? })
}

/// What compressed-tensors writes: one scheme for all packed layers, of FP8 numbers or of integers in words.
fn compressed(part: &Config) -> Result<Packing, ConfigError> {
    for field in ["kv_cache_scheme", "sparsity_config", "transform_config"] {
        if !part.optional::<Map<String, Value>>(field)?.unwrap_or_default().is_empty() {
            return Err(part.unsupported(field, "take a checkpoint without it"));
        }
    }
    let groups = part.part("config_groups")?.ok_or_else(|| part.missing("config_groups"))?;
    let mut names = groups.names();
    let (Some(name), None) = (names.next(), names.next()) else {
        return Err(part.unsupported("config_groups", "there must be one group: a single scheme for all packed layers"));
    };
    let scheme = groups.part(name)?.ok_or_else(|| groups.missing(name))?;
    let weights = scheme.part("weights")?.ok_or_else(|| scheme.missing("weights"))?;
    let format: String = match scheme.optional("format")? {
        Some(format) => format,
        None => part.required("format")?,
    };
    let kind = weights.optional::<String>("type")?.unwrap_or_else(|| "int".into());
    let strategy = weights.optional::<String>("strategy")?;
    match (format.as_str(), kind.as_str()) {
        ("float-quantized" | "naive-quantized", "float") => {
            if weights.size("num_bits", 8)? != 8 {
                return Err(weights.unsupported("num_bits", "floating point numbers must have 8 bits"));
            }
            match strategy.as_deref() {
                None | Some("tensor" | "channel") => Ok(Packing::Fp8 { tile: None }),
                Some("block") => match tile(&weights, "block_structure")? {
                    Some(tile) => Ok(Packing::Fp8 { tile: Some(tile) }),
                    None => Err(weights.missing("block_structure")),
                },
                Some(_) => Err(weights.unsupported("strategy", "the strategies are tensor, channel and block")),
            }
        }
        ("pack-quantized", "int") => {
            let group = match strategy.as_deref() {
                Some("group") => group(&weights, "group_size")?,
                Some("channel") => None,
                _ => return Err(weights.unsupported("strategy", "the strategies are group and channel")),
            };
            let act_order = match weights.optional::<Value>("actorder")? {
                None | Some(Value::Bool(false)) => false,
                Some(Value::Bool(true)) => true,
                Some(Value::String(order)) if ["weight", "static"].contains(&order.as_str()) => false,
                Some(Value::String(order)) if ["group", "dynamic"].contains(&order.as_str()) => true,
                Some(_) => return Err(weights.unsupported("actorder", "the orders are weight and group")),
            };
            let zeros = !weights.optional("symmetric")?.unwrap_or(true);
            Ok(Packing::RowWords { bits: bits(&weights, "num_bits")?, group, zeros, act_order })
        }
        _ => Err(part.unsupported("format", METHODS)),
    }
}

fn bits(part: &Config, field: &str) -> Result<usize, ConfigError> {
    match part.required(field)? {
        bits @ (4 | 8) => Ok(bits),
        _ => Err(part.unsupported(field, BITS)),
    }
}

/// The inputs that share a scale; `None` for −1, which stands for all.
fn group(part: &Config, field: &str) -> Result<Option<usize>, ConfigError> {
    match part.required::<i64>(field)? {
        -1 => Ok(None),
        _ => part.size(field, MAX_GROUP).map(Some),
    }
}

/// The first of the fields that is there, in lower case.
fn spelled(part: &Config, fields: &[&str]) -> Result<Option<String>, ConfigError> {
    for field in fields {
        if let Some(text) = part.optional::<String>(field)? {
            return Ok(Some(text.to_lowercase()));
        }
    }
    Ok(None)
}

/// Which of two spellings of a field's name is there; the second if neither is.
fn present<'a>(part: &Config, [older, newer]: [&'a str; 2]) -> &'a str {
    if part.has(older) { older } else { newer }
}
