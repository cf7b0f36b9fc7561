//! `helion identity`: the key that a node is known by.

use std::path::PathBuf;

use clap::Subcommand;

use crate::swarm::identity::Identity;

#[derive(Debug, Subcommand)]
pub(super) enum IdentityCommand {
    /// Make a new key file and print its peer id.
    New {
        /// The file to make; it must not exist.
        path: PathBuf,
    },
    /// Print the peer id of a key file.
    Show {
        /// The key file.
        path: PathBuf,
    },
}

pub(super) fn run(command: IdentityCommand) -> anyhow::Result<()> {
    let peer_id = match command {
        IdentityCommand::New { path } => Identity::create_new(&path)?.peer_id(),
        IdentityCommand::Show { path } => Identity::read(&path)?.peer_id(),
    };
    Ok(super::output::print(format_args!("peer id: {peer_id}\n"))?)
}
