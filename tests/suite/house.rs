//! The rules of the house, held: who may import whom, how long a file may be, and what has no place here.
//!
//! Every rule looks at one source and returns what is wrong with it, and has a test that it would notice.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

/// What each part may import beside itself. From the top: cli → gateway, coordinator → client, node → engine, swarm →
/// model. Parts of one floor don't import each other. `config` stands apart: it works on any clap command, so it knows
/// nothing of the house, and only what reads a command line may use it.
const FLOORS: [(&str, &[&str]); 10] = [
    ("main", &["cli", "config"]),
    ("cli", &["config", "gateway", "coordinator", "client", "node", "engine", "swarm", "model"]),
    ("config", &[]),
    ("gateway", &["client", "node", "engine", "swarm", "model"]),
    ("coordinator", &["client", "node", "engine", "swarm", "model"]),
    ("client", &["engine", "swarm", "model"]),
    ("node", &["engine", "swarm", "model"]),
    ("engine", &["model"]),
    ("swarm", &["model"]),
    ("model", &[]),
];

/// A reader loses the thread in longer files.
const MAX_LINES: usize = 700;

/// Names that say nothing about what is inside.
const NO_MODULE_NAMES: [&str; 7] = ["util", "utils", "common", "helper", "helpers", "misc", "mod"];

/// What may stand in the repository's root.
const TOP_LEVEL: [&str; 22] = [
    "Cargo.toml",
    "Cargo.lock",
    "build.rs",
    "src",
    "proto",
    "compose",
    "identity",
    "tests",
    "benches",
    "README.md",
    "CHANGELOG.md",
    "LICENSE",
    "LICENSE-MIT",
    "LICENSE-APACHE",
    "clippy.toml",
    "rustfmt.toml",
    "rust-toolchain.toml",
    ".ci",
    ".config",
    ".dockerignore",
    ".git",
    ".gitignore",
];

/// Macros and attributes that stand for work that was not done.
const UNDONE: [&str; 5] = ["todo!", "unimplemented!", "dbg!", "#[ignore]", "#[ignore="];

/// Parts of names that say nothing; the second list is of words that the house has another word for, in the parts that
/// speak of blocks, hops and routes.
const EMPTY_WORDS: [&str; 4] = ["manager", "helper", "util", "utils"];
const OTHER_WORDS: [(&str, &str); 6] = [
    ("layer", "block"),
    ("layers", "blocks"),
    ("stage", "hop"),
    ("stages", "hops"),
    ("pipeline", "route"),
    ("pipelines", "routes"),
];

/// One source file.
struct Source {
    /// From the repository's root, with `/`.
    path: String,
    text: String,
    /// The text without comments, strings and character literals.
    code: String,
}

impl Source {
    fn new(path: &str, text: &str) -> Self {
        Self { path: path.to_owned(), text: text.to_owned(), code: code_only(text) }
    }

    /// The part of the house that the file belongs to: `client` for `src/client.rs` and `src/client/…`.
    fn part(&self) -> Option<&str> {
        let inside = self.path.strip_prefix("src/")?;
        let first = inside.split('/').next()?;
        Some(first.strip_suffix(".rs").unwrap_or(first)).filter(|part| *part != "lib")
    }

    /// How many modules the file's own is inside of, itself included: 2 for `src/client/sampling.rs`.
    fn depth(&self) -> usize {
        self.path.matches('/').count()
    }
}

/// Blanks out comments, strings and character literals; lines stay where they are.
fn code_only(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let at = |index: usize| chars.get(index).copied().unwrap_or('\0');
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let mut out = String::with_capacity(text.len());
    let mut index = 0;
    while index < chars.len() {
        let end = match (at(index), at(index + 1)) {
            ('/', '/') => (index..chars.len()).find(|&end| at(end) == '\n').unwrap_or(chars.len()),
            ('/', '*') => {
                let (mut end, mut open) = (index + 2, 1);
                while open > 0 && end < chars.len() {
                    match (at(end), at(end + 1)) {
                        ('/', '*') => (open, end) = (open + 1, end + 2),
                        ('*', '/') => (open, end) = (open - 1, end + 2),
                        _ => end += 1,
                    }
                }
                end
            }
            ('r', '"' | '#') if index == 0 || !is_word(at(index - 1)) || at(index - 1) == 'b' => {
                let hashes = (index + 1..).take_while(|&end| at(end) == '#').count();
                if at(index + 1 + hashes) == '"' {
                    let close: Vec<char> = std::iter::once('"').chain(std::iter::repeat_n('#', hashes)).collect();
                    let start = index + 2 + hashes;
                    let found = (start..chars.len()).find(|&end| chars[end..].starts_with(&close));
                    found.map_or(chars.len(), |end| end + close.len())
                } else {
                    index
                }
            }
            ('"', _) => {
                let mut end = index + 1;
                while end < chars.len() && at(end) != '"' {
                    end += if at(end) == '\\' { 2 } else { 1 };
                }
                end + 1
            }
            // A lifetime has no closing quote behind its first letter.
            ('\'', '\\') => (index + 3..chars.len()).find(|&end| at(end) == '\'').map_or(chars.len(), |end| end + 1),
            ('\'', _) if at(index + 2) == '\'' => index + 3,
            _ => index,
        };
        if end == index {
            out.push(at(index));
            index += 1;
        } else {
            out.extend(chars[index..end.min(chars.len())].iter().map(|&c| if c == '\n' { '\n' } else { ' ' }));
            index = end;
        }
    }
    out
}

/// The words of the code, with `::`, braces and commas as words of their own.
fn tokens(code: &str) -> Vec<&str> {
    let mut tokens = Vec::new();
    let mut rest = code.trim_start();
    while let Some(first) = rest.chars().next() {
        let word = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
        let length = match word {
            0 if rest.starts_with("::") => 2,
            0 => first.len_utf8(),
            word => word,
        };
        tokens.push(&rest[..length]);
        rest = rest[length..].trim_start();
    }
    tokens
}

/// The first names of a path's end at `at`: one name, or those of a group in braces.
fn heads<'a>(tokens: &[&'a str], at: usize) -> Vec<&'a str> {
    if tokens.get(at) != Some(&"{") {
        return tokens.get(at).copied().into_iter().collect();
    }
    let (mut heads, mut depth, mut fresh) = (Vec::new(), 0, true);
    for &token in &tokens[at..] {
        match token {
            "{" => (depth, fresh) = (depth + 1, depth == 0),
            "}" => depth -= 1,
            "," => fresh = depth == 1,
            name if fresh && depth == 1 => {
                heads.push(name);
                fresh = false;
            }
            _ => {}
        }
        if depth == 0 {
            break;
        }
    }
    heads
}

/// Parts of the house that a source names.
fn imports(source: &Source) -> BTreeSet<String> {
    let tokens = tokens(&source.code);
    let mut found = BTreeSet::new();
    for (index, token) in tokens.iter().enumerate() {
        if tokens.get(index + 1) != Some(&"::") {
            continue;
        }
        let starts = index == 0 || tokens[index - 1] != "::";
        match *token {
            "crate" if starts => found.extend(heads(&tokens, index + 2)),
            "helion" if starts && source.part() == Some("main") => found.extend(heads(&tokens, index + 2)),
            // As many `super` as there are modules around lead to the crate's root.
            "super" if starts => {
                let ups = tokens[index..].chunks(2).take_while(|pair| *pair == ["super", "::"]).count();
                if ups >= source.depth() {
                    found.extend(heads(&tokens, index + 2 * ups));
                }
            }
            _ => {}
        }
    }
    found.into_iter().map(str::to_owned).filter(|name| FLOORS.iter().any(|(part, _)| part == name)).collect()
}

fn floors(source: &Source) -> Vec<String> {
    let Some(part) = source.part() else { return Vec::new() };
    let Some((_, allowed)) = FLOORS.iter().find(|(name, _)| *name == part) else {
        return vec![format!("{part} is no part of the house")];
    };
    let wrong = imports(source).into_iter().filter(|import| import != part && !allowed.contains(&import.as_str()));
    wrong.map(|import| format!("{part} must not import {import}")).collect()
}

fn length(source: &Source) -> Vec<String> {
    let lines = source.text.lines().count();
    if lines > MAX_LINES { vec![format!("{lines} lines, more than {MAX_LINES}")] } else { Vec::new() }
}

fn module_names(source: &Source) -> Vec<String> {
    let names = source.path.split('/').map(|name| name.strip_suffix(".rs").unwrap_or(name));
    names.filter(|name| NO_MODULE_NAMES.contains(name)).map(|name| format!("{name:?} says nothing")).collect()
}

fn no_unsafe(source: &Source) -> Vec<String> {
    if source.part() == Some("engine") || !tokens(&source.code).contains(&"unsafe") {
        return Vec::new();
    }
    vec!["unsafe code outside the engine".to_owned()]
}

fn nothing_undone(source: &Source) -> Vec<String> {
    let code: String = source.code.split_whitespace().collect();
    let macros = UNDONE.iter().filter(|undone| code.contains(*undone)).map(|undone| (*undone).to_owned());
    let notes = ["TODO", "FIXME", "XXX"].iter().filter(|note| {
        let is_word = |c: char| c.is_alphanumeric() || c == '_';
        source.text.split(|c| !is_word(c)).any(|word| word == **note)
    });
    // This file has to name what it looks for.
    let notes = notes.filter(|_| source.path != "tests/suite/house.rs").map(|note| format!("a note {note}"));
    macros.chain(notes).collect()
}

/// The words that a name is made of: `KvPool` and `kv_pool` are `kv`, `pool`.
fn words(name: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut after_lower = false;
    for c in name.chars() {
        if c == '_' || (c.is_uppercase() && after_lower) {
            words.push(String::new());
        }
        if c != '_' {
            words.last_mut().unwrap().extend(c.to_lowercase());
        }
        after_lower = c.is_lowercase();
    }
    words
}

fn known_words(source: &Source) -> Vec<String> {
    let mut wrong = BTreeSet::new();
    let speaks_of_blocks = matches!(source.part(), Some("client" | "node" | "swarm"));
    // Others' crates are called what they are called.
    for token in tokens(&source.code).into_iter().filter(|token| *token != "tokio_util") {
        for word in words(token) {
            if EMPTY_WORDS.contains(&word.as_str()) {
                wrong.insert(format!("{token}: {word:?} says nothing"));
            }
            if let Some((_, ours)) = OTHER_WORDS.iter().find(|(other, _)| speaks_of_blocks && *other == word) {
                wrong.insert(format!("{token}: the word is {ours:?}, not {word:?}"));
            }
        }
    }
    wrong.into_iter().collect()
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn collect(dir: &Path, extension: &str, into: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for path in entries.map(|entry| entry.unwrap().path()) {
        if path.is_dir() {
            collect(&path, extension, into);
        } else if path.extension().is_some_and(|found| found == extension) {
            into.push(path);
        }
    }
}

/// Every source of the repository.
fn sources(extension: &str) -> Vec<Source> {
    let mut paths = Vec::new();
    ["src", "tests", "benches", "proto"].iter().for_each(|dir| collect(&root().join(dir), extension, &mut paths));
    paths.sort();
    let source = |path: PathBuf| {
        let name = path.strip_prefix(root()).unwrap().to_str().unwrap().replace('\\', "/");
        Source::new(&name, &fs::read_to_string(path).unwrap())
    };
    paths.into_iter().map(source).collect()
}

fn check(rule: fn(&Source) -> Vec<String>) {
    let sources = sources("rs");
    assert!(sources.len() > 20, "the sources are found");
    let wrong =
        sources.iter().flat_map(|source| rule(source).into_iter().map(|what| format!("{}: {what}", source.path)));
    let wrong: Vec<String> = wrong.collect();
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

/// The rule finds something in `text` at `path`, and nothing in the others.
fn notices(rule: fn(&Source) -> Vec<String>, bad: &[(&str, &str)], good: &[(&str, &str)]) {
    for (path, text) in bad {
        assert!(!rule(&Source::new(path, text)).is_empty(), "{path}: nothing found in {text}");
    }
    for (path, text) in good {
        assert_eq!(rule(&Source::new(path, text)), Vec::<String>::new(), "{path}: {text}");
    }
}

#[test]
fn nothing_imports_upwards() {
    check(floors);
    let bad = [
        ("src/model/hub.rs", "use crate::config::home;"),
        ("src/model.rs", "fn f() { crate::engine::run() }"),
        ("src/engine/block.rs", "use crate::{model::Dtype, swarm::frame::Frame};"),
        ("src/engine/block.rs", "use crate::{\n    model::{Dtype, spec},\n    node,\n};"),
        ("src/swarm.rs", "use super::engine::Block;"),
        ("src/swarm/dht.rs", "use super::super::client::Route;"),
        ("src/swarm/dht.rs", "use super::super::{model::Dtype, node::Session};"),
        ("src/client/route.rs", "use crate::node::placement;"),
        ("src/node/admission.rs", "#[cfg(test)] mod tests { use crate::client::Sampler; }"),
        ("src/gateway.rs", "use crate::coordinator::Receipt;"),
        ("src/gateway.rs", "use crate::cli::Args;"),
        ("src/config.rs", "use crate::model::Dtype;"),
        ("src/main.rs", "use helion::engine::Block;"),
        ("src/other.rs", ""),
    ];
    let good = [
        ("src/model/hub.rs", "// use crate::config::home;\nconst A: &str = \"crate::config::home\";"),
        ("src/model/hub.rs", "use super::fingerprint; use crate::model::Dtype; use self::node::x;"),
        ("src/engine/block.rs", "use crate::{model::{Dtype, client}, engine::pages};"),
        ("src/swarm/dht/record.rs", "use super::super::node::Entry;"),
        ("src/cli/demo.rs", "use crate::{client::Sampler, config, node::Node};"),
        ("src/main.rs", "fn main() { helion::cli::run() }"),
        ("src/lib.rs", "pub mod client;"),
    ];
    notices(floors, &bad, &good);
}

#[test]
fn files_are_short_enough_to_read() {
    check(length);
    let long = "// line\n".repeat(MAX_LINES + 1);
    notices(length, &[("src/a.rs", &long)], &[("src/a.rs", &long[8..])]);
    let long: Vec<String> =
        sources("proto").into_iter().filter(|file| !length(file).is_empty()).map(|file| file.path).collect();
    assert!(long.is_empty(), "{long:?}");
}

#[test]
fn modules_have_names_that_say_something() {
    check(module_names);
    let bad = [("src/util.rs", ""), ("src/client/helpers.rs", ""), ("src/common/x.rs", ""), ("src/client/mod.rs", "")];
    notices(module_names, &bad, &[("src/client/route.rs", ""), ("src/model.rs", "")]);
}

#[test]
fn unsafe_code_is_the_engines_alone() {
    check(no_unsafe);
    let bad = [("src/node.rs", "unsafe { x() }"), ("tests/suite/a.rs", "unsafe fn f() {}")];
    let good = [
        ("src/engine/tile.rs", "unsafe { x() }"),
        ("src/node.rs", "// unsafe\nlet a = \"unsafe\"; let b = r#\"unsafe \" {\"#; #![deny(unsafe_code)]"),
    ];
    notices(no_unsafe, &bad, &good);
}

#[test]
fn nothing_is_left_undone() {
    check(nothing_undone);
    let bad = [
        ("src/a.rs", "fn f() { todo!() }"),
        ("src/a.rs", "fn f() { unimplemented ! (\"later\") }"),
        ("tests/suite/a.rs", "#[ignore]\n#[test] fn f() {}"),
        ("tests/suite/a.rs", "#[ignore = \"slow\"] fn f() {}"),
        ("src/a.rs", "dbg!(x);"),
        ("src/a.rs", "// TODO: more"),
    ];
    notices(nothing_undone, &bad, &[("src/a.rs", "let s = \"todo!\"; // nothing to do")]);
}

#[test]
fn names_use_the_words_of_the_house() {
    check(known_words);
    let bad = [
        ("src/node/session.rs", "struct SessionManager;"),
        ("src/model/a.rs", "fn path_helper() {}"),
        ("src/client/route.rs", "let layers = 3;"),
        ("src/swarm/frame.rs", "struct StageId;"),
        ("src/node.rs", "fn run_pipeline() {}"),
    ];
    let good = [
        ("src/client/route.rs", "let blocks = 3; // a layer is a block\nstruct Player; let utility = 1;"),
        ("src/model/family/llama.rs", "num_hidden_layers: usize"),
    ];
    notices(known_words, &bad, &good);
}

/// Entries of the root that are neither agreed on nor ignored by git.
fn strangers<'a>(entries: impl Iterator<Item = &'a str>, ignored: &str) -> Vec<&'a str> {
    let ignored: BTreeSet<&str> = ignored.lines().map(|line| line.trim().trim_matches('/')).collect();
    entries.filter(|entry| !TOP_LEVEL.contains(entry) && !ignored.contains(entry)).collect()
}

#[test]
fn the_root_holds_what_was_agreed_on() {
    let entries = fs::read_dir(root()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let entries: Vec<String> = entries.collect();
    let ignored = fs::read_to_string(root().join(".gitignore")).unwrap_or_default();
    assert_eq!(strangers(entries.iter().map(String::as_str), &ignored), Vec::<&str>::new());
    assert_eq!(strangers(["src", "scripts", "target"].into_iter(), "/target\n"), ["scripts"]);
}

#[test]
fn the_parts_of_the_house_are_there_once() {
    let parts = sources("rs").into_iter().filter_map(|source| source.part().map(str::to_owned));
    let parts: BTreeSet<String> = parts.collect();
    let known: BTreeSet<String> = FLOORS.iter().map(|(part, _)| (*part).to_owned()).collect();
    assert!(parts.is_subset(&known), "{parts:?}");
}

#[test]
fn comments_and_strings_are_no_code() {
    let text = "a /* b /* c */ d */ e // f\n\"g \\\" h\" i 'j' '\\'' 'k: &'static l r\"m\" n br#\"o\"p\"# q '\"' r";
    let left: Vec<String> = code_only(text).split_whitespace().map(str::to_owned).collect();
    assert_eq!(left, ["a", "e", "i", "'k:", "&'static", "l", "n", "b", "q", "r"]);
    assert_eq!(code_only("\"a\nb\"\nc").lines().count(), 3);
}
