//! Reading `config.json` field by field, with errors that name the field and its value.

use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use crate::model::Dtype;

/// Why a `config.json` can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The text is no JSON object.
    #[error("config.json is not a JSON object: {0}")]
    NotJson(String),
    /// No family has that name.
    #[error("model_type {model_type:?} is not supported: the supported ones are {supported}")]
    UnknownFamily {
        /// What the configuration says.
        model_type: String,
        /// The names of the families.
        supported: String,
    },
    /// A field that the family needs isn't there.
    #[error("config.json has no field {field:?}, which this model type needs")]
    Missing {
        /// Its name.
        field: String,
    },
    /// A field has a value that makes no sense.
    #[error("config.json: {field} = {value}: {reason}")]
    Invalid {
        /// Its name.
        field: String,
        /// Its value, as JSON.
        value: String,
        /// What it should be.
        reason: String,
    },
    /// A field asks for something that changes the arithmetic and that Helion can't do.
    #[error("config.json: {field} = {value} is not supported: {supported}")]
    Unsupported {
        /// Its name.
        field: String,
        /// Its value, as JSON.
        value: String,
        /// What is supported.
        supported: String,
    },
}

/// A parsed `config.json`, or a part of one.
pub(super) struct Config {
    fields: Map<String, Value>,
    /// Where the part lies, for messages: `rope_parameters.` or nothing.
    path: String,
}

impl Config {
    pub(super) fn parse(text: &str) -> Result<Self, ConfigError> {
        match serde_json::from_str(text) {
            Ok(Value::Object(fields)) => Ok(Self { fields, path: String::new() }),
            Ok(other) => Err(ConfigError::NotJson(format!("it is {}", short(&other)))),
            Err(error) => Err(ConfigError::NotJson(error.to_string())),
        }
    }

    fn value(&self, field: &str) -> Option<&Value> {
        self.fields.get(field).filter(|value| !value.is_null())
    }

    /// The fields with these names.
    pub(super) fn only(&self, names: &[&str]) -> Value {
        let fields = self.fields.iter().filter(|(field, _)| names.contains(&field.as_str()));
        Value::Object(fields.map(|(field, value)| (field.clone(), value.clone())).collect())
    }

    /// The same without the fields with these names.
    pub(super) fn without(&self, names: &[&str]) -> Self {
        let fields = self.fields.iter().filter(|(field, _)| !names.contains(&field.as_str()));
        Self { fields: fields.map(|(field, value)| (field.clone(), value.clone())).collect(), path: self.path.clone() }
    }

    /// The names of the fields that are not null.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.fields.iter().filter(|(_, value)| !value.is_null()).map(|(name, _)| name.as_str())
    }

    /// Whether the field is there and not null.
    pub(super) fn has(&self, field: &str) -> bool {
        self.value(field).is_some()
    }

    /// The same with the fields of `defaults` that it lacks. One that is null is there.
    pub(super) fn with_defaults(&self, defaults: &Value) -> Self {
        let mut fields = self.fields.clone();
        for (field, value) in defaults.as_object().into_iter().flatten() {
            fields.entry(field).or_insert_with(|| value.clone());
        }
        Self { fields, path: self.path.clone() }
    }

    fn name(&self, field: &str) -> String {
        format!("{}{field}", self.path)
    }

    /// The field's value; `None` if it is absent or null.
    pub(super) fn optional<T: DeserializeOwned>(&self, field: &str) -> Result<Option<T>, ConfigError> {
        let Some(value) = self.value(field) else { return Ok(None) };
        match T::deserialize(value) {
            Ok(read) => Ok(Some(read)),
            Err(error) => Err(self.invalid(field, error.to_string())),
        }
    }

    pub(super) fn required<T: DeserializeOwned>(&self, field: &str) -> Result<T, ConfigError> {
        self.optional(field)?.ok_or_else(|| self.missing(field))
    }

    pub(super) fn missing(&self, field: &str) -> ConfigError {
        ConfigError::Missing { field: self.name(field) }
    }

    /// The object in `field`, if it is there and not null.
    pub(super) fn part(&self, field: &str) -> Result<Option<Self>, ConfigError> {
        let Some(fields) = self.optional(field)? else { return Ok(None) };
        Ok(Some(Self { fields, path: format!("{}{field}.", self.path) }))
    }

    /// An integer of `1..=limit`.
    pub(super) fn size(&self, field: &str, limit: usize) -> Result<usize, ConfigError> {
        let value = self.required(field)?;
        self.check_size(field, value, limit)
    }

    /// Like [`Config::size`], for a field that may be absent.
    pub(super) fn optional_size(&self, field: &str, limit: usize) -> Result<Option<usize>, ConfigError> {
        self.optional(field)?.map(|value| self.check_size(field, value, limit)).transpose()
    }

    fn check_size(&self, field: &str, value: usize, limit: usize) -> Result<usize, ConfigError> {
        if (1..=limit).contains(&value) {
            Ok(value)
        } else {
            Err(self.invalid(field, format!("must be between 1 and {limit}")))
        }
    }

    /// A finite number above 0.
    pub(super) fn positive(&self, field: &str) -> Result<f64, ConfigError> {
        let value = self.required(field)?;
        self.check_positive(field, value)
    }

    /// A finite number above 0, or `default` where the field is absent.
    pub(super) fn positive_or(&self, field: &str, default: f64) -> Result<f64, ConfigError> {
        let value = self.optional(field)?.unwrap_or(default);
        self.check_positive(field, value)
    }

    fn check_positive(&self, field: &str, value: f64) -> Result<f64, ConfigError> {
        if value.is_finite() && value > 0.0 {
            Ok(value)
        } else {
            Err(self.invalid(field, "must be a finite number above 0".into()))
        }
    }

    /// How the weights are stored: `dtype` or, in the older spelling, `torch_dtype`; f32 if neither is there, which is
    /// what transformers takes.
    pub(super) fn dtype(&self) -> Result<Dtype, ConfigError> {
        for field in ["dtype", "torch_dtype"] {
            if let Some(text) = self.optional::<String>(field)? {
                return text
                    .parse()
                    .map_err(|_| self.unsupported(field, "the weights must be float32, bfloat16 or float16"));
            }
        }
        Ok(Dtype::F32)
    }

    /// Fails unless the field is absent, null or `neutral`.
    pub(super) fn refuse_unless(&self, field: &str, neutral: &Value, supported: &str) -> Result<(), ConfigError> {
        match self.value(field) {
            Some(value) if value != neutral && value.as_f64().is_none_or(|n| Some(n) != neutral.as_f64()) => {
                Err(self.unsupported(field, supported))
            }
            _ => Ok(()),
        }
    }

    /// Refuses options that change the arithmetic and that the family hasn't got: those that some model type reads, but
    /// for the ones that this one `reads`.
    pub(super) fn refuse_unsupported(&self, reads: &[&str]) -> Result<(), ConfigError> {
        // The value beside each name is the one that changes nothing.
        let neutral = [
            ("partial_rotary_factor", json!(1.0)),
            ("attn_logit_softcapping", Value::Null),
            ("final_logit_softcapping", Value::Null),
            ("use_bidirectional_attention", json!(false)),
            ("add_cross_attention", json!(false)),
            ("is_encoder_decoder", json!(false)),
            ("alibi", json!(false)),
            ("qk_layernorm", json!(false)),
            ("use_qk_norm", json!(false)),
            ("query_pre_attn_scalar", Value::Null),
            ("attention_multiplier", json!(1.0)),
            ("embedding_multiplier", json!(1.0)),
            ("residual_multiplier", json!(1.0)),
            ("logits_scaling", json!(1.0)),
            ("logit_scale", json!(1.0)),
            ("attention_chunk_size", Value::Null),
            ("compression_config", Value::Null),
            ("no_rope_layers", json!([])),
            ("num_local_experts", json!(0)),
            ("num_experts", json!(0)),
        ];
        for (field, value) in neutral.iter().filter(|(field, _)| !reads.contains(field)) {
            self.refuse_unless(field, value, "this model type has no such part")?;
        }
        Ok(())
    }

    pub(super) fn invalid(&self, field: &str, reason: String) -> ConfigError {
        ConfigError::Invalid { field: self.name(field), value: self.shown(field), reason }
    }

    pub(super) fn unsupported(&self, field: &str, supported: &str) -> ConfigError {
        ConfigError::Unsupported { field: self.name(field), value: self.shown(field), supported: supported.to_owned() }
    }

    fn shown(&self, field: &str) -> String {
        self.fields.get(field).map_or_else(|| "nothing".to_owned(), short)
    }
}

/// The value as JSON, cut where a message would get too long.
fn short(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(120) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}
