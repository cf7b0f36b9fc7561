//! What chat templates get from Python: JSON as its `json.dumps` writes it, for `tojson`, and its notions of kinds of
//! values.
//!
//! Models were trained on exactly these bytes, so separators, escapes and the spelling of numbers are Python's.

use minijinja::{
    Error, ErrorKind, Value,
    value::{Kwargs, ValueKind},
};
use serde_json::Value as Json;

/// How the text is laid out.
struct Layout {
    ensure_ascii: bool,
    /// What a level is indented by; everything is on one line where absent.
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
    sort_keys: bool,
}

/// The filter `tojson`, with the arguments that transformers gives it.
pub(super) fn tojson(
    value: &Value,
    ensure_ascii: Option<bool>,
    indent: Option<Value>,
    arguments: Kwargs,
) -> Result<String, Error> {
    if value.is_undefined() {
        return Err(invalid("tojson can't write an undefined value"));
    }
    let indent = match indent {
        Some(indent) => Some(indent),
        None => arguments.get::<Option<Value>>("indent")?,
    };
    let indent = indent.filter(|indent| !indent.is_none()).map(|indent| indent_of(&indent)).transpose()?;
    let separators = arguments.get::<Option<Vec<String>>>("separators")?;
    let (item_separator, key_separator) = match separators.as_deref() {
        None if indent.is_some() => (",".to_owned(), ": ".to_owned()),
        None => (", ".to_owned(), ": ".to_owned()),
        Some([item, key]) => (item.clone(), key.clone()),
        Some(_) => return Err(invalid("the separators of tojson are two texts")),
    };
    let layout = Layout {
        ensure_ascii: ensure_ascii.or(arguments.get("ensure_ascii")?).unwrap_or(false),
        indent,
        item_separator,
        key_separator,
        sort_keys: arguments.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    arguments.assert_all_used()?;
    let json = serde_json::to_value(value).map_err(|error| invalid(&format!("tojson: {error}")))?;
    Ok(layout.text_of(&json, 0))
}

/// The test `iterable`: unlike minijinja's, not true of none. Templates ask it of what may be no list of tools.
pub(super) fn is_iterable(value: &Value) -> bool {
    !value.is_none() && value.try_iter().is_ok()
}

/// The test `sequence`: whatever has a length and items, which in Python texts and dicts have, too.
pub(super) fn is_sequence(value: &Value) -> bool {
    let kinds = [ValueKind::Seq, ValueKind::String, ValueKind::Map, ValueKind::Undefined];
    kinds.contains(&value.kind())
}

fn invalid(message: &str) -> Error {
    Error::new(ErrorKind::InvalidOperation, message.to_owned())
}

/// Python takes a number of spaces or the text itself.
fn indent_of(indent: &Value) -> Result<String, Error> {
    /// Deeper than any template indents, and shallow enough that nobody can ask for gigabytes of spaces.
    const MAX_SPACES: usize = 64;
    if let Some(text) = indent.as_str() {
        return Ok(text.to_owned());
    }
    let spaces = indent.as_usize().filter(|&spaces| spaces <= MAX_SPACES);
    spaces.map(|spaces| " ".repeat(spaces)).ok_or_else(|| invalid("the indent of tojson is a text or 0 to 64"))
}

impl Layout {
    fn text_of(&self, json: &Json, depth: usize) -> String {
        match json {
            Json::Null => "null".to_owned(),
            Json::Bool(value) => value.to_string(),
            Json::Number(number) => match number.as_f64() {
                Some(float) if number.is_f64() => float_text(float),
                _ => number.to_string(),
            },
            Json::String(text) => self.quoted(text),
            Json::Array(items) => {
                let items = items.iter().map(|item| self.text_of(item, depth + 1)).collect();
                self.enclosed(('[', ']'), items, depth)
            }
            Json::Object(object) => {
                let mut entries: Vec<(&String, &Json)> = object.iter().collect();
                if self.sort_keys {
                    entries.sort_by_key(|(key, _)| *key);
                }
                let entry = |(key, item): (&String, &Json)| {
                    format!("{}{}{}", self.quoted(key), self.key_separator, self.text_of(item, depth + 1))
                };
                self.enclosed(('{', '}'), entries.into_iter().map(entry).collect(), depth)
            }
        }
    }

    fn enclosed(&self, (open, close): (char, char), items: Vec<String>, depth: usize) -> String {
        if items.is_empty() {
            return format!("{open}{close}");
        }
        let (inner, outer) = (self.new_line(depth + 1), self.new_line(depth));
        let items = items.join(&format!("{}{inner}", self.item_separator));
        format!("{open}{inner}{items}{outer}{close}")
    }

    /// A line break and the indent of a level; nothing where everything is on one line.
    fn new_line(&self, depth: usize) -> String {
        self.indent.as_ref().map(|indent| format!("\n{}", indent.repeat(depth))).unwrap_or_default()
    }

    fn quoted(&self, text: &str) -> String {
        let mut out = String::with_capacity(text.len() + 2);
        out.push('"');
        for character in text.chars() {
            match character {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                // Python escapes DEL only together with everything beyond ASCII.
                '\0'..'\u{20}' => out.push_str(&format!("\\u{:04x}", u32::from(character))),
                _ if self.ensure_ascii && !(' '..='~').contains(&character) => {
                    for unit in character.encode_utf16(&mut [0; 2]) {
                        out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                _ => out.push(character),
            }
        }
        out.push('"');
        out
    }
}

/// A float as Python's `repr` spells it: the shortest digits that read back the same, with an exponent below 1e-4 and
/// from 1e16 on.
fn float_text(float: f64) -> String {
    let magnitude = float.abs();
    if magnitude != 0.0 && !(1e-4..1e16).contains(&magnitude) {
        let text = format!("{float:e}");
        return match text.split_once('e') {
            Some((digits, exponent)) => {
                let (sign, exponent) = exponent.strip_prefix('-').map_or(('+', exponent), |exponent| ('-', exponent));
                format!("{digits}e{sign}{exponent:0>2}")
            }
            None => text,
        };
    }
    format!("{float:?}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(source: &str) -> String {
        let mut environment = minijinja::Environment::new();
        environment.add_filter("tojson", tojson);
        let tool = serde_json::json!({"name": "f", "b": [1, 2.5, true, null], "a": {}, "e": []});
        environment
            .render_str(
                source,
                minijinja::context! { tool => minijinja::value::Serde(tool), text => "é \"\\\n\u{1}\u{7f}<&>'😀" },
            )
            .unwrap()
    }

    // The expected texts are what Python 3.11's json.dumps gives.
    #[test]
    fn the_default_is_one_line_with_spaces() {
        assert_eq!(render("{{ tool | tojson }}"), r#"{"name": "f", "b": [1, 2.5, true, null], "a": {}, "e": []}"#);
    }

    #[test]
    fn indented() {
        let expected = "{\n  \"name\": \"f\",\n  \"b\": [\n    1,\n    2.5,\n    true,\n    null\n  ],\n  \"a\": {},\n  \"e\": []\n}";
        assert_eq!(render("{{ tool | tojson(indent=2) }}"), expected);
        assert_eq!(render("{{ [1] | tojson(indent='\t') }}"), "[\n\t1\n]");
    }

    #[test]
    fn separators_and_order() {
        let source = "{{ tool | tojson(separators=(',', ':'), sort_keys=true) }}";
        assert_eq!(render(source), r#"{"a":{},"b":[1,2.5,true,null],"e":[],"name":"f"}"#);
    }

    #[test]
    fn texts_are_escaped_as_python_escapes_them() {
        assert_eq!(render("{{ text | tojson }}"), "\"é \\\"\\\\\\n\\u0001\u{7f}<&>'😀\"");
        assert_eq!(render("{{ text | tojson(ensure_ascii=true) }}"), r#""\u00e9 \"\\\n\u0001\u007f<&>'\ud83d\ude00""#);
    }

    #[test]
    fn floats_are_spelled_as_python_spells_them() {
        for (float, text) in [
            (1.0, "1.0"),
            (0.1, "0.1"),
            (-0.0, "-0.0"),
            (1e-4, "0.0001"),
            (1e-5, "1e-05"),
            (1.5e-7, "1.5e-07"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (1.25e100, "1.25e+100"),
        ] {
            assert_eq!(float_text(float), text);
        }
    }
}
