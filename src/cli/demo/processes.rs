//! The demo's nodes: processes of this same binary, on free loopback ports.

use std::{path::PathBuf, process::Stdio, time::Duration};

use anyhow::Context;
use clap::ValueEnum;
use libp2p::Multiaddr;
use tokio::{
    io::{AsyncBufReadExt, BufReader, Lines},
    process::{Child, ChildStdout, Command},
    time::Instant,
};

use crate::{
    cli::{
        LogFormat, QUIET_LOG,
        arguments::{DtypeArg, SwarmArgs},
    },
    config,
};

/// A node of a small model is up in well under a second; a slow disk or a large model takes longer.
const START_TIMEOUT: Duration = Duration::from_secs(300);

/// How long all nodes together have to leave the swarm before they are killed.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// Processes that end with this value: they stop when their standard input ends, even if this process is killed.
pub(super) struct Processes {
    binary: PathBuf,
    scratch: PathBuf,
    log_format: LogFormat,
    children: Vec<Started>,
}

struct Started {
    name: String,
    child: Child,
    /// Kept open, so that the node is never stopped by a closed pipe.
    lines: Lines<BufReader<ChildStdout>>,
}

impl Processes {
    /// None yet. Their keys go to `scratch`.
    pub(super) fn new(scratch: PathBuf, log_format: LogFormat) -> anyhow::Result<Self> {
        let binary = std::env::current_exe().context("this program's own file can't be found")?;
        Ok(Self { binary, scratch, log_format, children: Vec::new() })
    }

    /// Starts a bootstrap node and returns its address.
    pub(super) async fn start_bootstrap(&mut self) -> anyhow::Result<Multiaddr> {
        self.start("bootstrap", &["node", "bootstrap", "--new-swarm"].map(str::to_owned), None)?;
        self.last_address().await
    }

    /// Starts `nodes` nodes at once that share the model's blocks evenly, and returns when all serve.
    pub(super) async fn start_nodes(&mut self, swarm: &SwarmArgs, blocks: usize, nodes: usize) -> anyhow::Result<()> {
        let first = self.children.len();
        let initial_peers: Vec<String> = swarm.peers.initial_peers.iter().map(ToString::to_string).collect();
        for index in 0..nodes {
            let (start, end) = (index * blocks / nodes, (index + 1) * blocks / nodes);
            let mut args: Vec<String> = vec![
                "node".into(),
                "serve".into(),
                "--model".into(),
                swarm.model.model.clone(),
                "--blocks".into(),
                format!("{start}:{end}"),
                "--initial-peers".into(),
                initial_peers.join(","),
                "--public-name".into(),
                format!("demo {}", index + 1),
            ];
            if swarm.dtype == DtypeArg::F32 {
                args.extend(["--dtype".into(), "f32".into()]);
            }
            if let Some(revision) = &swarm.model.hub.revision {
                args.extend(["--revision".into(), revision.clone()]);
            }
            if let Some(directory) = &swarm.model.hub.cache_dir {
                args.extend(["--cache-dir".into(), directory.display().to_string()]);
            }
            if swarm.model.hub.offline {
                args.push("--offline".into());
            }
            if let Some(bytes) = swarm.model.hub.max_disk_space {
                args.extend(["--max-disk-space".into(), bytes.to_string()]);
            }
            self.start(&format!("node {}", index + 1), &args, swarm.model.hub.token.as_deref())?;
        }
        for started in &mut self.children[first..] {
            started.wait_for("--initial-peers ").await?;
        }
        Ok(())
    }

    fn start(&mut self, name: &str, args: &[String], token: Option<&str>) -> anyhow::Result<()> {
        let key = self.scratch.join(format!("{}.key", name.replace(' ', "-")));
        let mut command = Command::new(&self.binary);
        // Settings that were meant for this process would set something else in a node.
        for (variable, _) in std::env::vars_os() {
            if variable == "INITIAL_PEERS" || variable.as_encoded_bytes().starts_with(b"HELION_") {
                command.env_remove(variable);
            }
        }
        if let Some(token) = token {
            // Others can read a command line.
            command.env("HELION_TOKEN", token);
        }
        if let Some(format) = self.log_format.to_possible_value() {
            command.args(["--log-format", format.get_name()]);
        }
        // Ctrl-C in a terminal goes to a whole group of processes, and here it only stops an answer.
        #[cfg(unix)]
        command.process_group(0);
        let mut child = command
            .args(args)
            .args(["--host-maddrs", "/ip4/127.0.0.1/tcp/0", "--no-mdns", "--no-remember", "--stop-with-stdin"])
            .arg("--identity-path")
            .arg(key)
            // Shared, so that the hashes of a large checkpoint are computed once.
            .env("HELION_HOME", config::home())
            .env("RUST_LOG", std::env::var("RUST_LOG").unwrap_or_else(|_| QUIET_LOG.to_owned()))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("{name} can't be started"))?;
        let stdout = child.stdout.take().context("a child without standard output")?;
        self.children.push(Started { name: name.to_owned(), child, lines: BufReader::new(stdout).lines() });
        Ok(())
    }

    async fn last_address(&mut self) -> anyhow::Result<Multiaddr> {
        let started = self.children.last_mut().context("no process was started")?;
        let address = started.wait_for("--initial-peers ").await?;
        address.parse().with_context(|| format!("{} printed no address: {address:?}", started.name))
    }

    /// Asks all to leave, and returns when they are gone.
    pub(super) async fn stop(mut self) {
        for started in &mut self.children {
            drop(started.child.stdin.take());
        }
        let deadline = Instant::now() + STOP_TIMEOUT;
        for mut started in self.children.drain(..) {
            if tokio::time::timeout_at(deadline, started.child.wait()).await.is_err() {
                tracing::warn!("{} did not stop in {} s and is killed", started.name, STOP_TIMEOUT.as_secs());
                if let Err(error) = started.child.kill().await {
                    tracing::warn!("{} can't be killed: {error}", started.name);
                }
            }
        }
    }
}

impl Started {
    /// Reads standard output until a line holds `mark`, and returns what follows it.
    async fn wait_for(&mut self, mark: &str) -> anyhow::Result<String> {
        let found = async {
            while let Some(line) = self.lines.next_line().await? {
                if let Some((_, rest)) = line.split_once(mark) {
                    return Ok(rest.trim().to_owned());
                }
            }
            let status = self.child.wait().await?;
            anyhow::bail!("{} ended before it was ready: {status}; what it said is above", self.name)
        };
        tokio::time::timeout(START_TIMEOUT, found)
            .await
            .with_context(|| format!("{} was not ready in {} s", self.name, START_TIMEOUT.as_secs()))?
    }
}
