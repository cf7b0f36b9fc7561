//! Settings: defaults < file < environment < flags.
//!
//! There is one list of settings, the command line's. A file given by `--config` names flags without their dashes
//! (`-` and `_` are the same) and gives them values:
//!
//! ```yaml
//! model: meta-llama/Llama-3.2-1B-Instruct
//! port: 31337
//! no_mdns: true
//! initial-peers: [/ip4/192.0.2.7/tcp/31337/p2p/12D3KooW…]
//! ```
//!
//! [`resolve`] turns those that neither the command line nor the environment sets into flags and parses again, so that
//! a file goes through the same checks as a command line and no setting has a second definition. Where two settings exclude
//! each other, the one from the stronger source stands; see `precedence`.

mod file;
mod precedence;

use std::{
    env,
    ffi::{OsStr, OsString},
    path::{Path, PathBuf},
};

use clap::{Arg, ArgAction, ArgMatches, Command, error::ContextKind, error::ContextValue};
use file::Setting;
use precedence::{Given, Source};

/// The argument that names the file, in every command that takes one.
const CONFIG: &str = "config";

/// How alike two names must be (Jaro-Winkler, 0 to 1) for one to be offered in place of the other.
const NEAR: f64 = 0.8;

/// Why there are no settings to run with.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The command line is wrong, or asks for help: clap's own words.
    #[error(transparent)]
    Usage(#[from] clap::Error),
    /// The file can't be read.
    #[error("cannot read the settings file {}: {source}", .path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file's name says neither YAML nor TOML.
    #[error("{}: a settings file ends in .yaml, .yml or .toml", .path.display())]
    Format {
        /// The file.
        path: PathBuf,
    },
    /// The file is not well-formed.
    #[error("{} is not well-formed: {reason}", .path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// What the parser said, with the line.
        reason: String,
    },
    /// The file sets something that the command doesn't have.
    #[error("{}: there is no setting {key:?} here{near}", .path.display())]
    UnknownKey {
        /// The file.
        path: PathBuf,
        /// The entry's name.
        key: String,
        /// Settings with a similar name, as the end of the sentence.
        near: String,
    },
    /// An entry's value is of a wrong kind.
    #[error("{}: {key:?} {reason}", .path.display())]
    Value {
        /// The file.
        path: PathBuf,
        /// The entry's name.
        key: String,
        /// What is wrong.
        reason: String,
    },
    /// The command line refuses a value that the file gave.
    #[error("in {}: {}", .path.display(), plain(&.source.to_string()))]
    Refused {
        /// The file.
        path: PathBuf,
        /// clap's own words.
        source: clap::Error,
    },
}

/// Parses `args` (with the program's name in front), completed from the environment and from the file that the
/// argument `config` of the innermost command names.
///
/// # Errors
/// [`ConfigError`]. Help and version count as [`ConfigError::Usage`], as they do in clap.
pub fn resolve(command: Command, args: Vec<OsString>) -> Result<ArgMatches, ConfigError> {
    // Where required arguments are still missing (the file may have them), this says what is there.
    let lenient = command.clone().ignore_errors(true);
    let Ok(partial) = lenient.clone().try_get_matches_from(&args) else {
        return Ok(command.try_get_matches_from(args)?);
    };
    let mut built = command.clone();
    built.build();
    let (leaf, leaf_matches) = innermost(&built, &partial);
    let given = precedence::given(leaf, leaf_matches);
    let command = precedence::without_environment(command, &precedence::silenced(leaf, &given));
    let Some(path) = config_path(leaf_matches) else { return Ok(command.try_get_matches_from(args)?) };
    let mut injected = Injected::default();
    for setting in file::read(&path)? {
        injected.add(leaf, &given, &path, setting)?;
    }
    let mut all = args;
    let place = leaf_position(&lenient, &all, &partial);
    all.splice(place..place, injected.args);
    command.try_get_matches_from(all).map_err(|source| {
        let blamed = match source.get(ContextKind::InvalidArg) {
            Some(ContextValue::String(arg)) => Some(arg.clone()),
            _ => None,
        };
        let of_file = |arg: String| injected.flags.iter().any(|flag| arg.split([' ', '=']).next() == Some(flag));
        if blamed.is_some_and(of_file) { ConfigError::Refused { path, source } } else { ConfigError::Usage(source) }
    })
}

/// Where Helion keeps its own files: `HELION_HOME`, else `$XDG_DATA_HOME/helion`, else `~/.local/share/helion`; in an
/// environment without any home, `.helion` in the working directory.
pub fn home() -> PathBuf {
    home_from(|name| env::var_os(name), env::home_dir())
}

fn home_from(variable: impl Fn(&str) -> Option<OsString>, user: Option<PathBuf>) -> PathBuf {
    let set = |name: &str| variable(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(home) = set("HELION_HOME") {
        return home;
    }
    // The XDG specification has relative paths ignored.
    if let Some(data) = set("XDG_DATA_HOME").filter(|data| data.is_absolute()) {
        return data.join("helion");
    }
    match user.filter(|user| !user.as_os_str().is_empty()) {
        Some(user) => user.join(".local/share/helion"),
        None => PathBuf::from(".helion"),
    }
}

/// The innermost subcommand that was asked for, and its part of the matches.
fn innermost<'a>(command: &'a Command, matches: &'a ArgMatches) -> (&'a Command, &'a ArgMatches) {
    match matches.subcommand() {
        Some((name, inner)) => match command.find_subcommand(name) {
            Some(subcommand) => innermost(subcommand, inner),
            None => (command, matches),
        },
        None => (command, matches),
    }
}

fn config_path(matches: &ArgMatches) -> Option<PathBuf> {
    let mut values = matches.try_get_raw(CONFIG).ok()??;
    values.next().map(PathBuf::from)
}

/// Where the arguments of the innermost command begin: behind the word that selects it.
fn leaf_position(lenient: &Command, args: &[OsString], partial: &ArgMatches) -> usize {
    let depth = |matches: &ArgMatches| {
        let (mut depth, mut at) = (0, matches);
        while let Some((_, inner)) = at.subcommand() {
            (depth, at) = (depth + 1, inner);
        }
        depth
    };
    // The shortest front part that gets there; a word that happens to be spelled like a command can't mislead this.
    let reaches = |end: &usize| {
        let matches = lenient.clone().try_get_matches_from(&args[..*end]);
        matches.is_ok_and(|matches| depth(&matches) == depth(partial))
    };
    (1..=args.len()).find(reaches).unwrap_or(args.len())
}

/// The file's settings as arguments.
#[derive(Default)]
struct Injected {
    args: Vec<OsString>,
    /// `--name` of each, to tell whose fault an error is.
    flags: Vec<String>,
}

impl Injected {
    /// Adds a setting, unless the command line or the environment has it, or one that excludes it.
    fn add(
        &mut self,
        command: &Command,
        given: &[Given<'_>],
        path: &Path,
        setting: Setting,
    ) -> Result<(), ConfigError> {
        let name = setting.key.replace('_', "-");
        let found = command.get_arguments().find(|arg| has_name(arg, &name));
        let Some(arg) = found.filter(|arg| arg.get_id() != CONFIG && !is_display(arg)) else {
            let near = near(command, &name);
            return Err(ConfigError::UnknownKey { path: path.to_owned(), key: setting.key, near });
        };
        let flag = format!("--{name}");
        let wrong = |reason: &str| {
            Err(ConfigError::Value { path: path.to_owned(), key: setting.key.clone(), reason: reason.to_owned() })
        };
        if self.flags.contains(&flag) {
            return wrong("is there twice (`-` and `_` are the same)");
        }
        let args: Vec<OsString> = match (arg.get_action(), setting.values.as_slice()) {
            (ArgAction::SetTrue | ArgAction::SetFalse, [value]) if value == "true" => vec![flag.clone().into()],
            (ArgAction::SetTrue | ArgAction::SetFalse, [value]) if value == "false" => Vec::new(),
            (ArgAction::SetTrue | ArgAction::SetFalse, _) => return wrong("is a switch: true or false"),
            (ArgAction::Count, [value]) => match value.parse::<u8>() {
                Ok(times) => vec![flag.clone().into(); times.into()],
                Err(_) => return wrong("is a number from 0 to 255"),
            },
            (ArgAction::Set, [value]) => vec![format!("{flag}={value}").into()],
            (ArgAction::Append, values) => values.iter().map(|value| format!("{flag}={value}").into()).collect(),
            (ArgAction::Set, values) if arg.get_value_delimiter().is_some() && !values.is_empty() => {
                let delimiter = arg.get_value_delimiter().unwrap_or(',').to_string();
                vec![format!("{flag}={}", values.join(&delimiter)).into()]
            }
            _ => return wrong("takes one value, not a list"),
        };
        let is_given = given.iter().any(|other| other.arg.get_id() == arg.get_id());
        if !is_given && !precedence::is_excluded(command, arg, Source::File, given) {
            self.args.extend(args);
        }
        self.flags.push(flag);
        Ok(())
    }
}

fn has_name(arg: &Arg, name: &str) -> bool {
    let same = |long: &str| long.replace('_', "-") == name;
    arg.get_long().is_some_and(same) || arg.get_all_aliases().is_some_and(|aliases| aliases.into_iter().any(same))
}

/// Whether the argument only prints something.
fn is_display(arg: &Arg) -> bool {
    matches!(arg.get_action(), ArgAction::Help | ArgAction::HelpShort | ArgAction::HelpLong | ArgAction::Version)
}

/// The settings whose names are like `name`, nearest first, as the end of a sentence.
fn near(command: &Command, name: &str) -> String {
    let longs =
        command.get_arguments().filter(|arg| arg.get_id() != CONFIG && !is_display(arg)).filter_map(Arg::get_long);
    let mut scored: Vec<(f64, &str)> = longs.map(|long| (strsim::jaro_winkler(long, name), long)).collect();
    scored.retain(|(score, _)| *score >= NEAR);
    scored.sort_by(|a, b| b.0.total_cmp(&a.0));
    match scored.as_slice() {
        [] => format!("; `{} --help` lists them", command.get_bin_name().unwrap_or(command.get_name())),
        [(_, first)] => format!("; did you mean {first:?}?"),
        [(_, first), (_, second), ..] => format!("; did you mean {first:?} or {second:?}?"),
    }
}

/// A parser's words without the "error:" that stands in front of the whole message already.
fn plain(text: &str) -> &str {
    text.trim_start_matches("error: ").trim_end()
}

/// The extension of a file's name, in lower case.
fn extension(path: &Path) -> String {
    path.extension().map(OsStr::to_string_lossy).map(|extension| extension.to_lowercase()).unwrap_or_default()
}

#[cfg(test)]
mod tests;
