//! Node processes and a client for the benches that measure whole swarms.
#![allow(dead_code, reason = "every bench uses a part of it")]

use std::{
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::Duration,
};

use helion::{
    client::{
        Client,
        local_model::{EdgesChoice, LocalModel, ModelIdentity},
        session::Patience,
    },
    engine::DeviceChoice,
    model::{Dtype, Quant, source::ModelSource},
    swarm::{Role, SwarmConfig, identity::Identity},
};

/// A node that serves, on a port of its own; killed when dropped.
pub(crate) struct NodeProcess {
    child: Child,
    /// With its peer id, as `--initial-peers` takes it.
    pub(crate) address: String,
}

/// What a node is started with.
pub(crate) struct NodeSettings<'a> {
    pub(crate) model: &'a Path,
    /// Where its state and its key lie.
    pub(crate) home: &'a Path,
    /// Nodes of one home have different names.
    pub(crate) name: String,
    /// Half-open.
    pub(crate) blocks: (usize, usize),
    /// `None` starts a swarm.
    pub(crate) peer: Option<&'a str>,
    pub(crate) more: &'a [&'a str],
}

impl NodeProcess {
    /// Starts a node and waits until it serves.
    pub(crate) fn start(settings: &NodeSettings<'_>) -> anyhow::Result<Self> {
        let NodeSettings { model, home, name, blocks: (start, end), peer, more } = settings;
        let blocks = format!("{start}:{end}");
        let model = model.display().to_string();
        let mut args = vec!["serve", "--model", &model, "--blocks", &blocks];
        match peer {
            Some(peer) => args.extend(["--initial-peers", peer]),
            None => args.push("--new-swarm"),
        }
        args.extend(*more);
        Self::spawn(home, name, &args)
    }

    /// Starts a node without blocks, by which others find each other.
    pub(crate) fn bootstrap(home: &Path) -> anyhow::Result<Self> {
        Self::spawn(home, "bootstrap", &["bootstrap", "--new-swarm"])
    }

    fn spawn(home: &Path, name: &str, args: &[&str]) -> anyhow::Result<Self> {
        let mut command = Command::new(env!("CARGO_BIN_EXE_helion"));
        command.arg("node").args(args).arg("--no-mdns");
        command.arg("--identity-path").arg(home.join(format!("{name}.key")));
        if !args.contains(&"--host-maddrs") {
            command.args(["--host-maddrs", "/ip4/127.0.0.1/tcp/0"]);
        }
        let mut child = command.env("HELION_HOME", home).env("RUST_LOG", "warn").stdout(Stdio::piped()).spawn()?;
        let stdout = child.stdout.take();
        let mut node = Self { child, address: String::new() };
        for line in stdout.into_iter().flat_map(|stdout| BufReader::new(stdout).lines()) {
            if let Some((_, address)) = line?.split_once("--initial-peers ") {
                address.trim().clone_into(&mut node.address);
                return Ok(node);
            }
        }
        anyhow::bail!("node {name} did not start")
    }
}

impl Drop for NodeProcess {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A client in this process. Without a dtype it takes the checkpoint's.
pub(crate) async fn connect(source: &ModelSource, address: &str, dtype: Option<Dtype>) -> anyhow::Result<Client> {
    let identity = ModelIdentity::of(source).await?;
    let choice = EdgesChoice { dtype, quant: Quant::Auto, device: DeviceChoice::Cpu, threads: None };
    let model = LocalModel::load(&source.fetch_edges().await?, identity, choice)?;
    let network = SwarmConfig {
        initial_peers: vec![address.parse()?],
        mdns: false,
        ..SwarmConfig::new(Identity::ephemeral(), Role::Client)
    };
    Ok(Client::connect(Arc::new(model), network, Patience::default(), Duration::from_secs(20)).await?)
}
