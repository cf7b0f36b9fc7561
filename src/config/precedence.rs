//! Which of two settings stands where only one of them can be: the one from the stronger source.
//!
//! clap counts a value from the environment as much as one from the command line, so `--new-swarm` would be refused wherever
//! `INITIAL_PEERS` is exported. Here the weaker of two that exclude each other is left out before clap sees it; two of the
//! same source still are a conflict, and clap says so.

use std::ffi::OsString;

use clap::{
    Arg, ArgAction, ArgMatches, Command, Id,
    builder::{OsStr, Resettable},
    parser::ValueSource,
};

/// Where a setting comes from, weakest first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Source {
    File,
    Environment,
    CommandLine,
}

/// An argument that the command line or the environment sets.
pub(super) struct Given<'a> {
    pub(super) arg: &'a Arg,
    source: Source,
    /// A switch that is set to off: it wins over the file, and excludes nothing.
    off: bool,
}

/// What the command line and the environment set. An empty variable sets nothing.
pub(super) fn given<'a>(command: &'a Command, matches: &ArgMatches) -> Vec<Given<'a>> {
    let of = |arg: &'a Arg| {
        let id = arg.get_id().as_str();
        let found = matches.value_source(id);
        if found == Some(ValueSource::CommandLine) {
            return Some(Given { arg, source: Source::CommandLine, off: false });
        }
        // Asked of the environment itself: a value that clap refuses is there, too.
        environment(arg).filter(|value| !value.is_empty())?;
        let off = found == Some(ValueSource::EnvVariable)
            && matches!(arg.get_action(), ArgAction::SetTrue)
            && !matches.get_flag(id);
        Some(Given { arg, source: Source::Environment, off })
    };
    command.get_arguments().filter_map(of).collect()
}

/// The arguments whose environment variable must not reach clap: it is empty, switches something off that is off anyway, or
/// is excluded by the command line.
pub(super) fn silenced(command: &Command, given: &[Given<'_>]) -> Vec<Id> {
    let silent = |arg: &Arg| match given.iter().find(|given| given.arg.get_id() == arg.get_id()) {
        Some(it) => it.off || is_excluded(command, arg, Source::Environment, given),
        None => true,
    };
    let with_variable = command.get_arguments().filter(|arg| environment(arg).is_some());
    with_variable.filter(|arg| silent(arg)).map(|arg| arg.get_id().clone()).collect()
}

/// Whether an argument that `source` sets can't be used together with one that a stronger source sets.
pub(super) fn is_excluded(command: &Command, arg: &Arg, source: Source, given: &[Given<'_>]) -> bool {
    given.iter().any(|other| !other.off && other.source > source && exclude_each_other(command, arg, other.arg))
}

/// The command, its subcommands included, without the environment variables of these arguments.
pub(super) fn without_environment(command: Command, ids: &[Id]) -> Command {
    let names: Vec<String> = command.get_subcommands().map(|sub| sub.get_name().to_owned()).collect();
    let command =
        command.mut_args(|arg| if ids.contains(arg.get_id()) { arg.env(Resettable::<OsStr>::Reset) } else { arg });
    names.into_iter().fold(command, |command, name| command.mut_subcommand(name, |sub| without_environment(sub, ids)))
}

fn environment(arg: &Arg) -> Option<OsString> {
    std::env::var_os(arg.get_env()?)
}

fn exclude_each_other(command: &Command, one: &Arg, other: &Arg) -> bool {
    let refuses = |one: &Arg, other: &Arg| {
        command.get_arg_conflicts_with(one).into_iter().any(|conflict| conflict.get_id() == other.get_id())
    };
    let one_of_group = || {
        command.get_groups().any(|group| {
            let holds = |arg: &Arg| group.get_args().any(|id| id == arg.get_id());
            holds(one) && holds(other) && !group.clone().is_multiple()
        })
    };
    one.get_id() != other.get_id() && (refuses(one, other) || refuses(other, one) || one_of_group())
}
