use clap::{arg, value_parser};

use super::*;

/// A command with every kind of argument; `PATH` stands for an environment variable that is surely set.
fn command() -> Command {
    let serve = Command::new("serve")
        .arg(arg!(--config <FILE>).value_parser(value_parser!(PathBuf)))
        .arg(arg!(--model <MODEL>).required(true))
        .arg(arg!(--port <PORT>).value_parser(value_parser!(u16)).default_value("31337"))
        .arg(arg!(--blocks <RANGE>).conflicts_with("num-blocks"))
        .arg(Arg::new("num-blocks").long("num-blocks").value_parser(value_parser!(usize)))
        .arg(arg!(--alone).conflicts_with("from-env"))
        .arg(Arg::new("either").long("either").env("PATH"))
        .arg(Arg::new("or").long("or"))
        .group(clap::ArgGroup::new("one-of-two").args(["either", "or"]))
        .arg(Arg::new("no_mdns").long("no-mdns").action(ArgAction::SetTrue))
        .arg(Arg::new("peers").long("initial-peers").alias("peers").value_delimiter(',').action(ArgAction::Append))
        .arg(Arg::new("hosts").long("hosts").value_delimiter(',').num_args(1..))
        .arg(Arg::new("verbose").long("verbose").short('v').action(ArgAction::Count))
        .arg(Arg::new("temperature").long("temperature").value_parser(value_parser!(f32)))
        .arg(Arg::new("from-env").long("from-env").env("PATH"))
        .arg(arg!([WORDS]...).allow_hyphen_values(true).trailing_var_arg(true));
    Command::new("helion")
        .arg(Arg::new("log-format").long("log-format").global(true))
        .subcommand_required(true)
        .subcommand(Command::new("node").subcommand_required(true).subcommand(serve))
        .subcommand(Command::new("plain"))
}

struct Case {
    dir: tempfile::TempDir,
    file: &'static str,
}

impl Case {
    fn yaml(text: &str) -> Self {
        Self::file("settings.yaml", text)
    }

    fn file(file: &'static str, text: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(file), text).unwrap();
        Self { dir, file }
    }

    /// `helion node serve --config FILE …`, and what `serve` was given.
    fn serve(&self, args: &[&str]) -> Result<ArgMatches, ConfigError> {
        let mut all: Vec<OsString> = ["helion", "node", "serve", "--config"].map(OsString::from).to_vec();
        all.push(self.dir.path().join(self.file).into());
        all.extend(args.iter().map(OsString::from));
        resolve(command(), all).map(innermost_owned)
    }

    fn error(&self, args: &[&str]) -> String {
        self.serve(args).unwrap_err().to_string()
    }
}

fn innermost_owned(mut matches: ArgMatches) -> ArgMatches {
    while let Some((_, inner)) = matches.remove_subcommand() {
        matches = inner;
    }
    matches
}

fn text(matches: &ArgMatches, id: &str) -> Option<String> {
    matches.get_one::<String>(id).cloned()
}

fn texts(matches: &ArgMatches, id: &str) -> Vec<String> {
    matches.get_many::<String>(id).into_iter().flatten().cloned().collect()
}

#[test]
fn the_file_fills_what_is_not_given() {
    let case = Case::yaml("model: org/name\nport: 4000\nno_mdns: true\ntemperature: 0.7\nverbose: 2\nblocks: 0:4\n");
    let matches = case.serve(&[]).unwrap();
    assert_eq!(text(&matches, "model").as_deref(), Some("org/name"));
    assert_eq!(matches.get_one::<u16>("port"), Some(&4000));
    assert!(matches.get_flag("no_mdns"));
    assert_eq!(matches.get_one::<f32>("temperature"), Some(&0.7));
    assert_eq!(matches.get_count("verbose"), 2);
    assert_eq!(text(&matches, "blocks").as_deref(), Some("0:4"), "a range is no number in base 60");
}

#[test]
fn flags_beat_the_environment_beats_the_file_beats_defaults() {
    let case = Case::yaml("model: from-file\nfrom_env: from-file\nno-mdns: false\n");
    let matches = case.serve(&["--model", "from-flag"]).unwrap();
    assert_eq!(text(&matches, "model").as_deref(), Some("from-flag"));
    assert_eq!(text(&matches, "from-env"), env::var("PATH").ok());
    assert_eq!(matches.get_one::<u16>("port"), Some(&31337));
    assert!(!matches.get_flag("no_mdns"));
    let matches = case.serve(&["--from-env=from-flag", "--no-mdns"]).unwrap();
    assert_eq!(text(&matches, "from-env").as_deref(), Some("from-flag"));
    assert!(matches.get_flag("no_mdns"));
}

#[test]
fn of_two_that_exclude_each_other_the_stronger_source_stands() {
    // Flag against file, whichever of the two names the conflict.
    let matches = Case::yaml("model: m\nnum-blocks: 2\n").serve(&["--blocks", "0:4"]).unwrap();
    assert_eq!((text(&matches, "blocks").as_deref(), matches.get_one::<usize>("num-blocks")), (Some("0:4"), None));
    let matches = Case::yaml("model: m\nblocks: 0:4\n").serve(&["--num-blocks", "2"]).unwrap();
    assert_eq!((text(&matches, "blocks"), matches.get_one::<usize>("num-blocks")), (None, Some(&2)));
    // Flag against environment, by a conflict and by a group.
    let matches = Case::yaml("model: m\n").serve(&["--alone", "--or", "x"]).unwrap();
    assert!(matches.get_flag("alone"));
    assert_eq!((text(&matches, "from-env"), text(&matches, "either")), (None, None));
    // The same without any file.
    let args = ["helion", "node", "serve", "--model", "m", "--alone"].map(OsString::from).to_vec();
    assert!(innermost_owned(resolve(command(), args).unwrap()).get_flag("alone"));
    // Environment against file.
    let matches = Case::yaml("model: m\nalone: true\nor: x\n").serve(&[]).unwrap();
    assert!(!matches.get_flag("alone") && text(&matches, "from-env").is_some() && text(&matches, "or").is_none());
    // Two of the same source are a conflict.
    let error = Case::yaml("model: m\n").error(&["--blocks", "0:4", "--num-blocks", "2"]);
    assert!(error.contains("cannot be used with"), "{error}");
    let error = Case::yaml("model: m\n").error(&["--alone", "--from-env", "x"]);
    assert!(error.contains("cannot be used with"), "{error}");
}

#[test]
fn lists_are_repeated_flags() {
    let case = Case::yaml("model: m\ninitial-peers:\n  - /ip4/1.2.3.4\n  - /ip4/5.6.7.8\nhosts: [a, b]\n");
    let matches = case.serve(&[]).unwrap();
    assert_eq!(texts(&matches, "peers"), ["/ip4/1.2.3.4", "/ip4/5.6.7.8"]);
    assert_eq!(texts(&matches, "hosts"), ["a", "b"]);
    // A flag replaces the list, it doesn't add to it.
    assert_eq!(texts(&case.serve(&["--initial-peers", "x,y"]).unwrap(), "peers"), ["x", "y"]);
    assert_eq!(texts(&Case::yaml("model: m\npeers: z\n").serve(&[]).unwrap(), "peers"), ["z"]);
    assert!(Case::yaml("model: [a, b]\n").error(&[]).contains("one value"));
}

#[test]
fn toml_says_the_same() {
    let case = Case::file("settings.toml", "model = 'm'\nport = 4000\nno-mdns = true\ninitial_peers = ['a', 'b']\n");
    let matches = case.serve(&[]).unwrap();
    assert_eq!(matches.get_one::<u16>("port"), Some(&4000));
    assert!(matches.get_flag("no_mdns"));
    assert_eq!(texts(&matches, "peers"), ["a", "b"]);
}

#[test]
fn trailing_words_are_left_alone() {
    let case = Case::yaml("model: m\nport: 4000\n");
    let matches = case.serve(&["one", "--two", "--", "three"]).unwrap();
    assert_eq!(matches.get_one::<u16>("port"), Some(&4000));
    assert_eq!(texts(&matches, "WORDS")[..2], ["one", "--two"]);
}

#[test]
fn a_value_that_is_spelled_like_a_command_misleads_nobody() {
    let case = Case::yaml("model: m\nport: 4000\nlog_format: json\n");
    let path = case.dir.path().join(case.file);
    let args = ["helion", "--log-format", "serve", "node", "serve", "--config"];
    let mut args: Vec<OsString> = args.map(OsString::from).to_vec();
    args.push(path.into());
    let matches = innermost_owned(resolve(command(), args).unwrap());
    assert_eq!(matches.get_one::<u16>("port"), Some(&4000));
    assert_eq!(text(&matches, "log-format").as_deref(), Some("serve"), "given on the command line");
    assert_eq!(text(&case.serve(&[]).unwrap(), "log-format").as_deref(), Some("json"));
}

#[test]
fn unknown_names_are_named_with_the_nearest() {
    let error = Case::yaml("modle: m\n").error(&[]);
    assert!(error.contains("\"modle\"") && error.contains("\"model\"") && error.contains("settings.yaml"), "{error}");
    let error = Case::yaml("xyz: 1\n").error(&["--model", "m"]);
    assert!(error.contains("\"xyz\"") && error.contains("serve --help"), "{error}");
    for key in ["config", "help", "WORDS"] {
        assert!(Case::yaml(&format!("{key}: x\n")).error(&[]).contains("no setting"), "{key}");
    }
}

#[test]
fn values_of_a_wrong_kind_are_named() {
    for (yaml, word) in [
        ("no-mdns: maybe\n", "switch"),
        ("verbose: lots\n", "number"),
        ("model: {a: 1}\n", "flat"),
        ("model:\n", "no plain value"),
        ("model: a\nno_mdns: true\nno-mdns: true\n", "twice"),
    ] {
        let error = Case::yaml(yaml).error(&[]);
        assert!(error.contains(word) && error.contains("settings.yaml"), "{yaml}: {error}");
    }
}

#[test]
fn the_command_lines_own_checks_hold_for_the_file() {
    let error = Case::yaml("model: m\nport: 70000\n").error(&[]);
    assert!(error.contains("settings.yaml: invalid value") && error.contains("--port"), "{error}");
    let error = Case::yaml("model: m\nblocks: '0:2'\nnum-blocks: 2\n").error(&[]);
    assert!(error.contains("cannot be used with"), "{error}");
    // What the command line itself gets wrong isn't blamed on the file.
    let error = Case::yaml("model: m\n").serve(&["--port", "x"]).unwrap_err();
    assert!(matches!(error, ConfigError::Usage(_)), "{error}");
    assert!(matches!(Case::yaml("port: 1\n").serve(&[]).unwrap_err(), ConfigError::Usage(_)), "no model anywhere");
}

#[test]
fn bad_files_are_named_with_the_line() {
    let error = Case::yaml("model: m\nport: [1, 2\n").error(&[]);
    assert!(error.contains("settings.yaml is not well-formed: line"), "{error}");
    let error = Case::file("settings.toml", "model = 'm'\nport = = 2\n").error(&[]);
    assert!(error.contains("settings.toml") && error.contains("line 2"), "{error}");
    assert!(Case::yaml("model: a\nmodel: b\n").error(&[]).contains("well-formed"), "a name that is there twice");
    assert!(Case::yaml("- a\n- b\n").serve(&[]).is_err());
    assert!(Case::file("settings.ini", "a=b").error(&[]).contains(".yaml"));
    let mut gone = Case::yaml("");
    gone.file = "gone.yaml";
    assert!(gone.error(&[]).contains("gone.yaml"));
}

#[test]
fn empty_files_and_no_files_change_nothing() {
    for yaml in ["", "\n", "# nothing\n"] {
        assert!(Case::yaml(yaml).serve(&["--model", "m"]).is_ok(), "{yaml:?}");
    }
    let plain = resolve(command(), vec!["helion".into(), "plain".into()]).unwrap();
    assert_eq!(plain.subcommand_name(), Some("plain"));
    let none = resolve(command(), ["helion", "node", "serve"].map(OsString::from).to_vec());
    assert!(matches!(none, Err(ConfigError::Usage(_))));
    let help = resolve(command(), vec!["helion".into(), "--help".into()]).unwrap_err();
    assert!(matches!(help, ConfigError::Usage(error) if error.kind() == clap::error::ErrorKind::DisplayHelp));
}

#[test]
fn a_command_without_subcommands_has_settings_too() {
    let case = Case::yaml("port: 7\n");
    let command = Command::new("tool")
        .arg(Arg::new("config").long("config"))
        .arg(arg!(--port <PORT>).value_parser(value_parser!(u16)));
    let file = format!("--config={}", case.dir.path().join(case.file).display());
    let matches = resolve(command, vec!["tool".into(), file.into()]).unwrap();
    assert_eq!(matches.get_one::<u16>("port"), Some(&7));
}

#[test]
fn home_follows_the_environment() {
    let home = |set: &'static [(&'static str, &'static str)], user: &str| {
        let variable = move |name: &str| set.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).into());
        home_from(variable, Some(user.into()))
    };
    assert_eq!(home(&[("HELION_HOME", "/h"), ("XDG_DATA_HOME", "/x")], "/u"), Path::new("/h"));
    assert_eq!(home(&[("HELION_HOME", ""), ("XDG_DATA_HOME", "/x")], "/u"), Path::new("/x/helion"));
    assert_eq!(home(&[("XDG_DATA_HOME", "relative")], "/u"), Path::new("/u/.local/share/helion"));
    assert_eq!(home(&[], "/u"), Path::new("/u/.local/share/helion"));
    assert_eq!(home(&[], ""), Path::new(".helion"));
}
