//! The command line: one file a subcommand. Reads arguments, prints; computes nothing.
//!
//! Results go to stdout, everything else to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage. Every flag can also be set by
//! the environment (`HELION_` and its name in capitals) and, where there is a `--config`, by a file; see
//! [`config`].

// They panic where the stream is closed, as a pager or `head` does; see `output`.
#![warn(clippy::print_stdout, clippy::print_stderr)]

mod arguments;
mod bench;
mod chat;
mod demo;
mod generate;
mod identity;
mod model;
mod models;
mod node;
mod output;
mod progress;
mod score;
mod signals;
mod status;

use std::{ffi::OsString, process::ExitCode};

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};

use self::output::{PrintError, say};
use crate::{client::ClientError, config, engine};

/// Run a language model together: many machines, each holding a part of it.
#[derive(Debug, Parser)]
#[command(name = "helion", version, propagate_version = true)]
struct Cli {
    /// How log lines on stderr look. RUST_LOG sets what is logged (for example `RUST_LOG=helion=debug`).
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Pretty)]
    log_format: LogFormat,
    #[command(subcommand)]
    command: Command,
}

/// What commands log where RUST_LOG doesn't say. That a new swarm's DHT knows nobody yet is no news, nor that a connection
/// which is being closed was closed by the other side first.
const QUIET_LOG: &str = "warn,libp2p_kad=error,yamux=error";

/// How log lines look.
#[derive(Debug, Clone, Copy, ValueEnum)]
enum LogFormat {
    /// For people.
    Pretty,
    /// One JSON object a line.
    Json,
}

#[derive(Debug, Subcommand)]
#[expect(clippy::large_enum_variant, reason = "there is one, made once")]
enum Command {
    /// Try it: a small swarm on this machine, with a small chat model that is built in.
    Demo(demo::DemoArgs),
    /// Serve a swarm.
    #[command(subcommand)]
    Node(node::NodeCommand),
    /// Use a swarm.
    #[command(subcommand)]
    Client(ClientCommand),
    /// Look at models, and keep their files.
    #[command(subcommand)]
    Model(model::ModelCommand),
    /// Measure the engine on this machine, without any network: prompts, tokens one by one, and the memory bus.
    Bench(bench::BenchArgs),
    /// Make or look at the key that a node is known by.
    #[command(subcommand)]
    Identity(identity::IdentityCommand),
}

#[derive(Debug, Subcommand)]
enum ClientCommand {
    /// Continue a prompt.
    Generate(generate::GenerateArgs),
    /// Talk to a chat model.
    Chat(chat::ChatArgs),
    /// Write the logits of every position of a sequence to a file.
    Score(score::ScoreArgs),
    /// Which models are served.
    Models(models::ModelsArgs),
    /// Who serves which blocks, and whether the swarm is complete.
    Status(status::StatusArgs),
}

impl Command {
    /// What is logged where RUST_LOG doesn't say: servers tell what they do, commands only what goes wrong.
    fn default_log(&self) -> &'static str {
        match self {
            Self::Node(_) => "helion=info,warn,libp2p_kad=error,yamux=error",
            // Downloads take long, and tell how they get on.
            Self::Model(_) => "helion=info,warn",
            _ => QUIET_LOG,
        }
    }

    async fn run(self, log_format: LogFormat) -> anyhow::Result<()> {
        match self {
            Self::Demo(args) => demo::run(args, log_format).await,
            Self::Node(node::NodeCommand::Serve(args)) => node::serve(*args).await,
            Self::Node(node::NodeCommand::Bootstrap(args)) => node::bootstrap(args).await,
            Self::Node(node::NodeCommand::Drain(args)) => node::drain(args).await,
            Self::Client(ClientCommand::Generate(args)) => generate::run(args).await,
            Self::Client(ClientCommand::Chat(args)) => chat::run(args).await,
            Self::Client(ClientCommand::Score(args)) => score::run(args).await,
            Self::Client(ClientCommand::Models(args)) => models::run(args).await,
            Self::Client(ClientCommand::Status(args)) => status::run(args).await,
            Self::Model(command) => model::run(command).await,
            Self::Bench(args) => bench::run(args).await,
            Self::Identity(command) => identity::run(command),
        }
    }
}

/// The whole command, with an environment variable for every flag.
fn command() -> clap::Command {
    with_environment(Cli::command())
}

fn with_environment(command: clap::Command) -> clap::Command {
    let names: Vec<String> = command.get_subcommands().map(|sub| sub.get_name().to_owned()).collect();
    let command = command.mut_args(|arg| match arg.get_long() {
        Some(long) if arg.get_env().is_none() && !matches!(long, "help" | "version") => {
            let name = format!("HELION_{}", long.replace('-', "_").to_uppercase());
            arg.env(name)
        }
        _ => arg,
    });
    names.into_iter().fold(command, |command, name| command.mut_subcommand(name, with_environment))
}

/// Runs the command line and says how the process should exit.
pub fn main(args: Vec<OsString>) -> ExitCode {
    let matches = match config::resolve(command(), args) {
        Ok(matches) => matches,
        Err(config::ConfigError::Usage(error)) => {
            // Help and version are "errors" that exit with 0.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { 2 } else { 0 });
        }
        Err(error) => {
            say(format_args!("error: {error}"));
            return ExitCode::from(2);
        }
    };
    let cli = match Cli::from_arg_matches(&matches) {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(2);
        }
    };
    start_log(cli.log_format, cli.command.default_log());
    if let Err(error) = engine::check_kernels() {
        say(format_args!("error: {error}"));
        return ExitCode::from(2);
    }
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => {
            say(format_args!("error: the async runtime can't be started: {error}"));
            return ExitCode::FAILURE;
        }
    };
    // On a worker, so that a token that arrives there goes on without waking another thread.
    let result = runtime.block_on(async {
        match tokio::spawn(cli.command.run(cli.log_format)).await {
            Ok(result) => result,
            Err(died) => Err(anyhow::anyhow!("a fault of this program: {died}")),
        }
    });
    // Nobody waits for tasks that hang in a look-up.
    runtime.shutdown_background();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // It got what it wanted.
        Err(error) if matches!(error.downcast_ref(), Some(PrintError::ReaderGone)) => ExitCode::SUCCESS,
        Err(error) => {
            say(format_args!("error: {error:#}{}", fate_of_steps(&error)));
            if error.is::<arguments::Usage>() { ExitCode::from(2) } else { ExitCode::FAILURE }
        }
    }
}

/// Whether steps that have no answer were done all the same, where the error is about some: whoever tries again wants to know.
fn fate_of_steps(error: &anyhow::Error) -> &'static str {
    let about = error.chain().find_map(|cause| cause.downcast_ref::<ClientError>());
    match about.and_then(ClientError::maybe_applied) {
        Some(true) => " (some hops may have applied the steps that were under way)",
        Some(false) => " (no hop has applied the steps that were under way)",
        None => "",
    }
}

fn start_log(format: LogFormat, default: &str) {
    use tracing_subscriber::EnvFilter;
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(default));
    // A line that can't be written is lost; telling so on the same stream would panic where that is closed.
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).log_internal_errors(false);
    let colours = std::io::IsTerminal::is_terminal(&std::io::stderr());
    match format {
        LogFormat::Pretty => log.with_target(false).with_ansi(colours).init(),
        LogFormat::Json => log.json().init(),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_command_line_is_consistent_and_every_flag_has_help() {
        fn check(command: &clap::Command) {
            for argument in command.get_arguments() {
                assert!(argument.get_help().is_some(), "{} {} has no help", command.get_name(), argument.get_id());
            }
            command.get_subcommands().for_each(check);
        }
        let mut command = super::command();
        command.build();
        command.clone().debug_assert();
        check(&command);
    }
}
