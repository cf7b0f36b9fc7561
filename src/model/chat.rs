//! Chat messages to the text that the model was trained on, as the checkpoint's Jinja template says.
//!
//! A template is a small program from the hub, written for Python's Jinja2 as transformers sets it up. It runs here in
//! minijinja, made to look like that environment: `trim_blocks` and `lstrip_blocks`, Python's string and dict methods,
//! `raise_exception`, `strftime_now`, a `tojson` that writes as Python's `json.dumps` does, `break` and `continue`,
//! and the `generation` tag. It sees nothing but its arguments, and the steps that it may take are bounded.

mod python;

use std::{
    collections::BTreeMap,
    fmt::{self, Write as _},
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use minijinja::{Environment, Error, ErrorKind, Value, syntax::SyntaxConfig, value::Serde};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json};

/// Instructions that one rendering may execute. Templates take some ten for a message and some hundred for a tool; a
/// chat of a thousand messages stays far below this, and a template that loops for ever ends within a second or so.
const FUEL: u64 = 20_000_000;

/// The template that is meant when a checkpoint has several and nothing asks for another one.
pub(super) const DEFAULT: &str = "default";

/// The template for chats with tools, where a checkpoint has a separate one.
const TOOL_USE: &str = "tool_use";

/// One turn of a chat.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who speaks: `system`, `user` or `assistant`, as a rule.
    pub role: String,
    /// What is said.
    pub content: String,
}

impl Message {
    /// A message of `role` that says `content`.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self { role: role.into(), content: content.into() }
    }
}

/// Everything that a template may be told: what transformers' `apply_chat_template` takes.
#[derive(Debug, Clone, Default)]
pub struct Chat {
    /// The messages as JSON objects, with whatever fields the template knows (`tool_calls`, content in parts, …).
    pub messages: Vec<Json>,
    /// JSON schemas of the functions that the model may call.
    pub tools: Option<Vec<Json>>,
    /// Documents for retrieval-augmented answers.
    pub documents: Option<Vec<Json>>,
    /// Ends the text where the assistant's answer begins.
    pub add_generation_prompt: bool,
    /// The template's own switches, such as `enable_thinking`.
    pub arguments: Map<String, Json>,
    /// What `strftime_now` tells; the local time where absent.
    pub now: Option<chrono::NaiveDateTime>,
}

/// Why there is no template, or no text.
#[derive(Debug, thiserror::Error)]
pub enum ChatError {
    /// A file is there but can't be read.
    #[error("cannot read {}: {source}", .path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A file is not what it should be.
    #[error("{} holds no chat template that this version reads: {reason}", .path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The template itself refuses the chat, for instance because roles don't alternate.
    #[error("this model's chat template refuses the chat: {message}")]
    Refused {
        /// The template's own words.
        message: String,
    },
    /// The template could not be run.
    #[error("this model's chat template failed: {reason}")]
    Failed {
        /// What the template engine said, with the line.
        reason: String,
    },
}

/// A checkpoint's chat template. Clones share one copy.
#[derive(Clone)]
pub struct ChatTemplate {
    environment: Arc<Environment<'static>>,
    /// `bos_token`, `eos_token`, …
    special_tokens: Map<String, Json>,
}

impl fmt::Debug for ChatTemplate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChatTemplate").field("special_tokens", &self.special_tokens).finish_non_exhaustive()
    }
}

impl ChatTemplate {
    /// Opens the template in `dir`: `chat_template.jinja`, or else the `chat_template` of `tokenizer_config.json` (one
    /// text, or a list of named ones of which `default` and, for chats with tools, `tool_use` count). `None` where the
    /// checkpoint has none: it is no chat model.
    ///
    /// # Errors
    /// [`ChatError::Unreadable`] and [`ChatError::Malformed`].
    pub fn open(dir: &Path) -> Result<Option<Self>, ChatError> {
        let config_path = dir.join("tokenizer_config.json");
        let config = read_object(&config_path)?.unwrap_or_default();
        let jinja_path = dir.join("chat_template.jinja");
        let (path, templates) = match read(&jinja_path)? {
            Some(source) => (jinja_path, BTreeMap::from([(DEFAULT.to_owned(), source)])),
            None => {
                let templates = templates_of(config.get("chat_template"));
                let templates = templates
                    .map_err(|reason| ChatError::Malformed { path: config_path.clone(), reason: reason.to_owned() })?;
                (config_path, templates)
            }
        };
        // Checkpoints that were saved long ago keep the special tokens in a file of their own.
        let mut special_tokens =
            special_tokens_of(&read_object(&dir.join("special_tokens_map.json"))?.unwrap_or_default());
        special_tokens.extend(special_tokens_of(&config));
        Self::of(templates, special_tokens).map_err(|reason| ChatError::Malformed { path, reason })
    }

    /// Takes templates by name, and special tokens by theirs. `None` where there is no template; what is wrong with them is
    /// the error.
    pub(super) fn of(
        templates: BTreeMap<String, String>,
        special_tokens: Map<String, Json>,
    ) -> Result<Option<Self>, String> {
        if templates.is_empty() {
            return Ok(None);
        }
        if !templates.contains_key(DEFAULT) {
            let names: Vec<&str> = templates.keys().map(String::as_str).collect();
            return Err(format!("none of its templates ({}) is named {DEFAULT:?}", names.join(", ")));
        }
        let environment = environment(templates).map_err(|error| describe(&error))?;
        Ok(Some(Self { environment: Arc::new(environment), special_tokens }))
    }

    /// The text of a plain chat; [`render_chat`](Self::render_chat) takes tools and the template's own switches too.
    ///
    /// # Errors
    /// [`ChatError::Refused`] and [`ChatError::Failed`].
    pub fn render(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String, ChatError> {
        let messages = messages.iter().map(|message| {
            let fields = [("role", message.role.as_str()), ("content", message.content.as_str())];
            Json::Object(fields.into_iter().map(|(name, text)| (name.to_owned(), Json::from(text))).collect())
        });
        self.render_chat(&Chat { messages: messages.collect(), add_generation_prompt, ..Chat::default() })
    }

    /// The text of a chat. It holds the special tokens already, so it is encoded without adding any.
    ///
    /// # Errors
    /// [`ChatError::Refused`] and [`ChatError::Failed`].
    pub fn render_chat(&self, chat: &Chat) -> Result<String, ChatError> {
        let with_tools = chat.tools.is_some();
        let template = match self.environment.get_template(TOOL_USE) {
            Ok(template) if with_tools => Ok(template),
            _ => self.environment.get_template(DEFAULT),
        };
        let template = template.map_err(|error| failure(&error))?;
        let mut variables = self.special_tokens.clone();
        variables.extend(chat.arguments.clone());
        variables.insert("messages".to_owned(), Json::Array(chat.messages.clone()));
        variables.insert("tools".to_owned(), chat.tools.clone().map_or(Json::Null, Json::Array));
        variables.insert("documents".to_owned(), chat.documents.clone().map_or(Json::Null, Json::Array));
        variables.insert("add_generation_prompt".to_owned(), chat.add_generation_prompt.into());
        let now = chat.now.unwrap_or_else(|| chrono::Local::now().naive_local());
        let context = minijinja::context! {
            strftime_now => Value::from_function(move |format: &str| strftime(now, format)),
            ..Value::from(Serde(&variables))
        };
        template.render(context).map_err(|error| failure(&error))
    }

    /// The text of a special token by its name in `tokenizer_config.json`, such as `bos_token`.
    pub fn special_token(&self, name: &str) -> Option<&str> {
        self.special_tokens.get(name)?.as_str()
    }
}

fn read(path: &Path) -> Result<Option<String>, ChatError> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(ChatError::Unreadable { path: path.to_owned(), source }),
    }
}

fn read_object(path: &Path) -> Result<Option<Map<String, Json>>, ChatError> {
    let Some(text) = read(path)? else { return Ok(None) };
    let object = serde_json::from_str(&text);
    object.map(Some).map_err(|error| ChatError::Malformed { path: path.to_owned(), reason: error.to_string() })
}

/// The templates by name of the entry `chat_template` of `tokenizer_config.json`.
fn templates_of(entry: Option<&Json>) -> Result<BTreeMap<String, String>, &'static str> {
    match entry {
        None | Some(Json::Null) => Ok(BTreeMap::new()),
        Some(Json::String(source)) => Ok(BTreeMap::from([(DEFAULT.to_owned(), source.clone())])),
        Some(Json::Array(list)) => list
            .iter()
            .map(|item| match (item.get("name").and_then(Json::as_str), item.get("template").and_then(Json::as_str)) {
                (Some(name), Some(source)) => Ok((name.to_owned(), source.to_owned())),
                _ => Err("an entry of the list `chat_template` has no text `name` or no text `template`"),
            })
            .collect(),
        Some(_) => Err("`chat_template` is neither a text nor a list of named texts"),
    }
}

/// The entries of `tokenizer_config.json` that name special tokens: texts, or objects with a `content`.
fn special_tokens_of(config: &Map<String, Json>) -> Map<String, Json> {
    let tokens = config.iter().filter(|(name, _)| name.ends_with("_token")).filter_map(|(name, token)| {
        let text = token.as_str().or_else(|| token.get("content")?.as_str())?;
        Some((name.clone(), Json::from(text)))
    });
    tokens.collect()
}

/// An environment that looks to a template as transformers' does.
fn environment(templates: BTreeMap<String, String>) -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.set_fuel(Some(FUEL));
    environment.add_filter("tojson", python::tojson);
    environment.add_test("iterable", python::is_iterable);
    environment.add_test("sequence", python::is_sequence);
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raised(message)))
    });
    for (name, source) in templates {
        environment.add_template_owned(name, without_generation_tags(&source))?;
    }
    Ok(environment)
}

/// What the template itself raised, to tell it from what went wrong in it.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

fn strftime(now: chrono::NaiveDateTime, format: &str) -> Result<String, Error> {
    let mut text = String::new();
    // chrono reports a directive that it doesn't know as an error of the formatter.
    let written = write!(text, "{}", now.format(format));
    written.map_err(|_| Error::new(ErrorKind::InvalidOperation, format!("strftime_now can't read {format:?}")))?;
    Ok(text)
}

/// Turns the `generation` tags of transformers (they mark the assistant's words for training) into ones that every
/// Jinja knows and that render the same text.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest[start..].find("%}") else { break };
        let tag = &rest[start..start + length];
        let word = tag[2..].trim_matches(|c: char| c == '-' || c == '+' || c.is_whitespace());
        out.push_str(&rest[..start]);
        match word {
            "generation" => out.push_str(&tag.replace("generation", "if true")),
            "endgeneration" => out.push_str(&tag.replace("endgeneration", "endif")),
            _ => out.push_str(tag),
        }
        rest = &rest[start + length..];
    }
    out.push_str(rest);
    out
}

fn failure(error: &Error) -> ChatError {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(current) = source {
        if let Some(Raised(message)) = current.downcast_ref() {
            return ChatError::Refused { message: message.clone() };
        }
        source = current.source();
    }
    let reason = match error.kind() {
        ErrorKind::OutOfFuel => format!("it did not end within {FUEL} instructions"),
        _ => describe(error),
    };
    ChatError::Failed { reason }
}

fn describe(error: &Error) -> String {
    let mut reason = error.kind().to_string();
    if let Some(detail) = error.detail() {
        reason.push_str(": ");
        reason.push_str(detail);
    }
    if let Some(line) = error.line() {
        reason.push_str(&format!(" (line {line})"));
    }
    reason
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(source: &str) -> ChatTemplate {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("chat_template.jinja"), source).unwrap();
        ChatTemplate::open(dir.path()).unwrap().unwrap()
    }

    fn render(source: &str) -> Result<String, ChatError> {
        template(source).render(&[Message::new("user", "Hi")], true)
    }

    fn with_config(config: &Json) -> Result<Option<ChatTemplate>, ChatError> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("tokenizer_config.json"), config.to_string()).unwrap();
        ChatTemplate::open(dir.path())
    }

    #[test]
    fn the_config_may_hold_one_template_or_a_list() {
        assert!(with_config(&serde_json::json!({"bos_token": "<s>"})).unwrap().is_none());
        let one = with_config(&serde_json::json!({
            "bos_token": {"content": "<s>", "lstrip": false, "__type": "AddedToken"}, "eos_token": "</s>",
            "chat_template": "{{ bos_token }}{{ messages[0].content }}{{ eos_token }}{{ pad_token }}"}));
        let one = one.unwrap().unwrap();
        assert_eq!(one.render(&[Message::new("user", "Hi")], false).unwrap(), "<s>Hi</s>");
        assert_eq!(one.special_token("bos_token"), Some("<s>"));
        let list = with_config(&serde_json::json!({"chat_template": [
            {"name": "default", "template": "plain"},
            {"name": "tool_use", "template": "{{ tools | length }} tools"}]}));
        let list = list.unwrap().unwrap();
        assert_eq!(list.render(&[], false).unwrap(), "plain");
        let chat = Chat { tools: Some(vec![Json::Null, Json::Null]), ..Chat::default() };
        assert_eq!(list.render_chat(&chat).unwrap(), "2 tools");
    }

    #[test]
    fn a_broken_template_says_where() {
        for (config, word) in [
            (serde_json::json!({"chat_template": 3}), "neither"),
            (serde_json::json!({"chat_template": [{"name": "default"}]}), "no text `name`"),
            (serde_json::json!({"chat_template": [{"name": "rag", "template": "x"}]}), "rag"),
            (serde_json::json!({"chat_template": "one\n{% if %}"}), "line 2"),
        ] {
            let error = with_config(&config).unwrap_err().to_string();
            assert!(error.contains(word) && error.contains("tokenizer_config.json"), "{error}");
        }
    }

    #[test]
    fn a_template_may_refuse() {
        let error = render("{{ raise_exception('Roles must alternate') }}").unwrap_err();
        assert!(matches!(&error, ChatError::Refused { message } if message == "Roles must alternate"), "{error}");
        let nested = render("{% macro check() %}{{ raise_exception('no') }}{% endmacro %}{{ check() }}").unwrap_err();
        assert!(matches!(nested, ChatError::Refused { .. }), "{nested}");
        let error = render("{{ messages[0].content.nothing() }}").unwrap_err();
        assert!(matches!(error, ChatError::Failed { .. }), "{error}");
    }

    #[test]
    fn a_template_cannot_run_for_ever() {
        let nested = "{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}";
        assert!(render(nested).unwrap_err().to_string().contains("did not end"));
    }

    #[test]
    fn time_is_the_callers() {
        let now = chrono::NaiveDate::from_ymd_opt(2024, 7, 4).unwrap().and_hms_opt(5, 6, 7).unwrap();
        let chat = Chat { now: Some(now), ..Chat::default() };
        let text = template("{{ strftime_now('%d %b %Y') }} {{ strftime_now('%-d/%m %H:%M') }}").render_chat(&chat);
        assert_eq!(text.unwrap(), "04 Jul 2024 4/07 05:06");
        assert!(template("{{ strftime_now('%Q') }}").render_chat(&chat).is_err());
    }

    #[test]
    fn generation_tags_are_transparent() {
        let source = "a {%- generation -%} {{ messages[0].content }} {% endgeneration %}\nb";
        assert_eq!(render(source).unwrap(), "aHi b");
        assert_eq!(without_generation_tags("{% if generation %}{% broken"), "{% if generation %}{% broken");
    }

    #[test]
    fn arguments_reach_the_template() {
        let arguments = Map::from_iter([("enable_thinking".to_owned(), Json::Bool(false))]);
        let chat = Chat { arguments, ..Chat::default() };
        let source = "{% if enable_thinking is defined and enable_thinking is false %}no{% endif %}";
        assert_eq!(template(source).render_chat(&chat).unwrap(), "no");
        assert_eq!(render(source).unwrap(), "");
    }

    #[test]
    fn python_is_printed_as_python_prints_it() {
        assert_eq!(
            render("{{ none }} {{ true }} {{ [1, 'a', none] }} {{ {'a': 1.0} }}").unwrap(),
            "None True [1, 'a', None] {'a': 1.0}"
        );
        assert_eq!(render("{{ messages[::-1][0]['content'][1:] }}|{{ 'a,b'.split(',')[-1] }}").unwrap(), "i|b");
        let kinds =
            "{% for x in [none, 'a', [1], {'a': 1}, 1, y] %}{{ x is iterable }} {{ x is sequence }} {% endfor %}";
        assert_eq!(render(kinds).unwrap(), "False False True True True True True True False False True True ");
        assert_eq!(
            render("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}x{% endfor %}").unwrap(),
            ""
        );
    }
}
