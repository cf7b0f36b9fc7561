//! Settings files: a flat map of names to values or lists of values, in YAML or TOML.

use std::path::Path;

use serde_json::{Map, Value};

use super::{ConfigError, extension, plain};

/// Bytes that a settings file may have. There are some hundred settings; more than this is another file by mistake.
const MAX_BYTES: u64 = 1 << 20;

/// The top of a file; `None` for one of nothing but comments.
type Entries = Option<Map<String, Value>>;

/// One entry of a file.
#[derive(Debug, PartialEq)]
pub(super) struct Setting {
    /// The name as it is written.
    pub(super) key: String,
    /// The value as a command line would spell it; several for a list.
    pub(super) values: Vec<String>,
}

/// Reads the entries of a file, in its order.
pub(super) fn read(path: &Path) -> Result<Vec<Setting>, ConfigError> {
    let unreadable = |source| ConfigError::Unreadable { path: path.to_owned(), source };
    let syntax = |reason: String| ConfigError::Syntax { path: path.to_owned(), reason: plain(&reason).to_owned() };
    let parse: fn(&str) -> Result<Entries, String> = match extension(path).as_str() {
        "yaml" | "yml" => |text| serde_saphyr::from_str(text).map_err(|error| error.to_string()),
        "toml" => |text| toml::from_str(text).map(Some).map_err(|error| error.to_string()),
        _ => return Err(ConfigError::Format { path: path.to_owned() }),
    };
    if std::fs::metadata(path).map_err(unreadable)?.len() > MAX_BYTES {
        return Err(syntax(format!("it has more than {MAX_BYTES} bytes, so it is no settings file")));
    }
    let text = std::fs::read_to_string(path).map_err(unreadable)?;
    // A YAML file of nothing but comments is null.
    let entries = if text.trim().is_empty() { None } else { parse(&text).map_err(syntax)? };
    let settings = entries.unwrap_or_default().into_iter().map(|(key, value)| {
        let values = match value {
            Value::Array(items) => items.into_iter().map(|item| scalar(&item)).collect(),
            value => scalar(&value).map(|value| vec![value]),
        };
        let reason = "has no plain value; a settings file is flat: names, and for each a value or a list of values";
        let wrong = || ConfigError::Value { path: path.to_owned(), key: key.clone(), reason: reason.to_owned() };
        values.ok_or_else(wrong).map(|values| Setting { key: key.clone(), values })
    });
    settings.collect()
}

fn scalar(value: &Value) -> Option<String> {
    match value {
        Value::String(text) => Some(text.clone()),
        Value::Bool(value) => Some(value.to_string()),
        Value::Number(number) => Some(number.to_string()),
        Value::Null | Value::Array(_) | Value::Object(_) => None,
    }
}
