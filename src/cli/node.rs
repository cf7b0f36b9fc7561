//! `helion node`: serve a swarm.

use std::{future::Future, net::Ipv4Addr, ops::Range, path::PathBuf, pin::pin, sync::Arc, time::Duration};

use clap::{Args, Subcommand};
use libp2p::Multiaddr;

use super::{
    arguments::{DtypeArg, KvDtypeArg, ModelArgs, PeerArgs, Usage, block_range, count, device, seconds, threads},
    output::print,
    progress::Progress,
    signals::Signals,
};
use crate::{
    config,
    engine::DeviceChoice,
    model::{Quant, source::ModelSource},
    node::{
        Beginning, BlockChoice, Node, NodeEvent, NodeOptions, bootstrap::BootstrapService, join,
        sessions::SessionSettings,
    },
    swarm::{Role, Swarm, SwarmConfig, announcement::unix_ms, drain, identity::Identity, rpc},
};

/// How long a node may take to answer that it will leave.
const DRAIN_ANSWER: Duration = Duration::from_secs(10);

#[derive(Debug, Subcommand)]
pub(super) enum NodeCommand {
    /// Host a part of a model's blocks and compute them for others.
    Serve(Box<ServeArgs>),
    /// Only help others to find each other: the DHT alone, without blocks.
    Bootstrap(BootstrapArgs),
    /// Ask a node, from elsewhere, to leave: its sessions go on with other peers, then it ends.
    Drain(DrainArgs),
}

/// Who the node is and where it listens.
#[derive(Debug, Args)]
struct ListenArgs {
    /// The port to listen on, TCP and UDP (QUIC); 0 takes free ones.
    #[arg(long, default_value_t = 31337)]
    port: u16,
    /// What to listen on instead: multiaddrs, separated by commas [default: all interfaces, TCP and QUIC, at --port].
    #[arg(long, value_name = "MADDR,…", value_delimiter = ',')]
    host_maddrs: Vec<Multiaddr>,
    /// The addresses to tell others instead of those listened on, for a node behind a port forwarding or a proxy.
    #[arg(long, value_name = "MADDR,…", value_delimiter = ',')]
    announce_maddrs: Vec<Multiaddr>,
    /// The node's key file; made if it is not there [default: identity.key in the state directory, HELION_HOME].
    #[arg(long, value_name = "FILE")]
    identity_path: Option<PathBuf>,
    #[command(flatten)]
    peers: PeerArgs,
    /// Be the first node of a new swarm: look for nobody.
    #[arg(long, conflicts_with = "initial_peers")]
    new_swarm: bool,
    /// How long to look for the first peer, seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 20, value_parser = seconds(1))]
    join_timeout: u64,
    /// Stop when standard input ends: for programs that start a node and must not leave it behind.
    #[arg(long, hide = true)]
    stop_with_stdin: bool,
    /// Settings from a YAML or TOML file: the long names of these flags. The environment and flags win over it.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(super) struct ServeArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// The blocks to host, half-open: 0:4 is blocks 0, 1, 2 and 3 [default: those that the swarm needs most].
    #[arg(long, value_name = "START:END", value_parser = block_range, conflicts_with = "num_blocks")]
    blocks: Option<Range<usize>>,
    /// How many blocks to host, where the swarm needs them most [default: as many as memory holds].
    #[arg(long, value_name = "N", value_parser = count())]
    num_blocks: Option<usize>,
    #[command(flatten)]
    listen: ListenArgs,
    /// The name that the model's peers meet under [default: from the model's name].
    #[arg(long, value_name = "PREFIX")]
    dht_prefix: Option<String>,
    /// Where to compute: auto, cpu or cuda:N.
    #[arg(long, default_value = "auto", value_parser = device)]
    device: DeviceChoice,
    /// What to compute in, and keep weights and KV cache in: auto is as the checkpoint is stored.
    #[arg(long, value_enum, default_value_t = DtypeArg::Auto)]
    dtype: DtypeArg,
    /// What to keep the KV cache in: auto is as --dtype, q8 are codes of 8 bits with a scale for each token and head.
    #[arg(long, value_enum, default_value_t = KvDtypeArg::Auto)]
    kv_dtype: KvDtypeArg,
    /// How the blocks' matrices are quantized: auto (as stored), none, q8_0, q4_0, q4_k or q6_k.
    #[arg(long, env = "HELION_QUANT", value_name = "QUANT", default_value_t = Quant::Auto)]
    quant: Quant,
    /// Threads that compute [default: one a core].
    #[arg(long, value_name = "N", value_parser = threads())]
    threads: Option<usize>,
    /// Tokens in the KV cache, over all sessions.
    #[arg(long, value_name = "N", default_value_t = 16384, value_parser = count())]
    attn_cache_tokens: usize,
    /// Sessions at a time.
    #[arg(long, value_name = "N", default_value_t = SessionSettings::default().max_sessions, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=65_536))]
    max_sessions: usize,
    /// How long a step may wait for its turn and for cache, seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = SessionSettings::default().step_deadline.as_secs(), value_parser = seconds(1))]
    step_deadline: u64,
    /// How long a session may be without a step, seconds: what it holds is given back then. A chat whose user thinks for longer computes
    /// it again.
    #[arg(long, value_name = "SECONDS", default_value_t = SessionSettings::default().idle.as_secs(), value_parser = seconds(1))]
    session_idle: u64,
    /// How long a session outlives the connection to its client, seconds: one that comes back in time goes on where it was.
    #[arg(long, value_name = "SECONDS", default_value_t = SessionSettings::default().reconnect_grace.as_secs(), value_parser = seconds(0))]
    reconnect_grace: u64,
    /// What to keep in memory of what sessions sent on, bytes: it is told to the peer that takes a lost next hop's place.
    #[arg(long, value_name = "BYTES", default_value_t = SessionSettings::default().history_bytes)]
    history_bytes: usize,
    /// How long to keep what sessions have left for others of the same client that start with the same tokens, seconds: where sessions
    /// need the room, it goes sooner.
    #[arg(long, value_name = "SECONDS", default_value_t = SessionSettings::default().prefix_idle.as_secs(), value_parser = seconds(1))]
    prefix_idle: u64,
    /// How long to serve sessions that find no other peer when the node is asked to stop, seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = seconds(0))]
    drain_timeout: u64,
    /// A name that others see in `helion client status`.
    #[arg(long, value_name = "NAME", default_value = "")]
    public_name: String,
}

#[derive(Debug, Args)]
pub(super) struct DrainArgs {
    /// The node's address, ending in /p2p/<peer id>, as it prints it.
    #[arg(value_name = "MADDR")]
    node: Multiaddr,
    /// The node's key file: whoever holds it is the node's owner [default: identity.key in the state directory, HELION_HOME].
    #[arg(long, value_name = "FILE")]
    identity_path: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(super) struct BootstrapArgs {
    #[command(flatten)]
    listen: ListenArgs,
}

impl ListenArgs {
    fn beginning(&self) -> Beginning {
        match (self.new_swarm, self.peers.initial_peers.is_empty()) {
            (true, _) => Beginning::NewSwarm,
            (false, false) => Beginning::InitialPeers,
            (false, true) => Beginning::Search,
        }
    }

    fn network(&self) -> anyhow::Result<SwarmConfig> {
        let default_path = || config::home().join("identity.key");
        let identity = Identity::load_or_create(&self.identity_path.clone().unwrap_or_else(default_path))?;
        tracing::info!(version = env!("CARGO_PKG_VERSION"), peer_id = %identity.peer_id(), "starting");
        let listen = if self.host_maddrs.is_empty() { everywhere(self.port) } else { self.host_maddrs.clone() };
        Ok(SwarmConfig {
            listen,
            announce: self.announce_maddrs.clone(),
            initial_peers: self.peers.initial_peers.clone(),
            remember: self.peers.remember(),
            mdns: !self.peers.no_mdns,
            ..SwarmConfig::new(identity, Role::Server)
        })
    }

    /// Waits for SIGTERM, Ctrl-C, or the end of standard input where that counts.
    async fn stop_requested(&self, mut signals: Signals) {
        let stdin_ends = async {
            if !self.stop_with_stdin {
                std::future::pending::<()>().await;
            }
            let mut stdin = tokio::io::stdin();
            // Whatever comes, only the end counts.
            let _ = tokio::io::copy(&mut stdin, &mut tokio::io::sink()).await;
        };
        tokio::select! {
            _ = signals.received() => {}
            () = stdin_ends => {}
        }
    }
}

/// All interfaces, TCP and QUIC.
fn everywhere(port: u16) -> Vec<Multiaddr> {
    use libp2p::multiaddr::Protocol;
    let any4 = Multiaddr::from(Ipv4Addr::UNSPECIFIED);
    let any6 = Multiaddr::from(std::net::Ipv6Addr::UNSPECIFIED);
    [any4, any6]
        .into_iter()
        .flat_map(|any| [any.clone().with(Protocol::Tcp(port)), any.with(Protocol::Udp(port)).with(Protocol::QuicV1)])
        .collect()
}

/// Prints who this is and the addresses that others start from, one a line, on stdout.
fn introduce(who: &str, swarm: &Swarm) {
    let mut text = format!("{who} {}\nothers join with one of:\n", swarm.peer_id());
    for address in swarm.addresses() {
        text += &format!("  --initial-peers {address}/p2p/{}\n", swarm.peer_id());
    }
    // A node serves its peers, also where whoever started it has read enough.
    if let Err(error) = print(format_args!("{text}")) {
        tracing::warn!(%error, "the addresses of this node were not printed");
    }
}

/// Takes leave, or goes at once where it is asked to stop again.
async fn leave(leaving: impl Future<Output = ()>) -> anyhow::Result<()> {
    let mut again = Signals::new()?;
    tokio::select! {
        () = leaving => {}
        _ = again.received() => tracing::warn!("stopped before it had left the swarm"),
    }
    Ok(())
}

pub(super) async fn serve(args: ServeArgs) -> anyhow::Result<()> {
    let mut stop = pin!(args.listen.stop_requested(Signals::new()?));
    let prepared = tokio::select! {
        prepared = prepare(&args) => Some(prepared?),
        () = &mut stop => None,
    };
    let node = match prepared {
        Some((source, options, network)) => {
            let on_event = Arc::new(report(&args.listen));
            Node::start(source, options, network, on_event, stop.as_mut()).await?
        }
        None => None,
    };
    let Some(node) = node else {
        tracing::info!("stopped before it served");
        return Ok(());
    };
    let span = node.span();
    introduce(&format!("serving blocks {}:{} of {} as", span.start, span.end, node.model()), node.swarm());
    tokio::select! {
        () = stop => {}
        () = node.drain_requested() => {}
    }
    tracing::info!(sessions = node.sessions().count(), "leaving");
    leave(node.leave(Duration::from_secs(args.drain_timeout))).await
}

pub(super) async fn drain(args: DrainArgs) -> anyhow::Result<()> {
    let path = args.identity_path.unwrap_or_else(|| config::home().join("identity.key"));
    let owner = Identity::read(&path)?;
    let mut address = args.node.clone();
    let Some(libp2p::multiaddr::Protocol::P2p(peer)) = address.pop() else {
        return Err(Usage(format!("{} does not end in /p2p/<peer id>", args.node)).into());
    };
    if peer != owner.peer_id() {
        let message = format!("{} is the key of {}, and the address is {peer}'s", path.display(), owner.peer_id());
        return Err(Usage(message).into());
    }
    let request = drain::sign(owner.keypair(), unix_ms())?;
    let swarm = Swarm::start(SwarmConfig::new(Identity::ephemeral(), Role::Client), Arc::new(BootstrapService)).await?;
    let mut signals = Signals::new()?;
    let asking = async { Ok(swarm.request(peer, &[address], rpc::Request::drain(request), DRAIN_ANSWER).await?) };
    let answer = signals.guard(asking).await;
    swarm.stop().await;
    match answer?.body {
        Some(rpc::response::Body::Drain(answer)) => {
            Ok(print(format_args!("{peer} is leaving; sessions that go elsewhere: {}\n", answer.sessions))?)
        }
        Some(rpc::response::Body::Failure(failure)) => anyhow::bail!("{peer} refuses: {}", failure.message),
        _ => anyhow::bail!("{peer} does not know how to be asked that: send its process SIGTERM instead"),
    }
}

/// What a node needs to start.
async fn prepare(args: &ServeArgs) -> anyhow::Result<(ModelSource, NodeOptions, SwarmConfig)> {
    let source = ModelSource::open(&args.model.model, args.model.hub.options()).await?;
    let fingerprint = source.fingerprint().await?;
    let network = args.listen.network()?;
    let options = NodeOptions {
        model: source.name().to_owned(),
        revision: source.revision().unwrap_or_default().to_owned(),
        fingerprint,
        dht_prefix: prefix(args.dht_prefix.as_deref(), &source)?,
        public_name: args.public_name.clone(),
        blocks: match (&args.blocks, args.num_blocks) {
            (Some(blocks), _) => BlockChoice::Exactly(blocks.clone()),
            (None, Some(count)) => BlockChoice::Count(count),
            (None, None) => BlockChoice::Auto,
        },
        device: args.device,
        dtype: args.dtype.dtype(),
        kv_dtype: args.kv_dtype.dtype(),
        quant: args.quant,
        threads: args.threads,
        cache_tokens: args.attn_cache_tokens,
        sessions: SessionSettings {
            max_sessions: args.max_sessions,
            step_deadline: Duration::from_secs(args.step_deadline),
            history_bytes: args.history_bytes,
            idle: Duration::from_secs(args.session_idle),
            reconnect_grace: Duration::from_secs(args.reconnect_grace),
            prefix_idle: Duration::from_secs(args.prefix_idle),
            ..SessionSettings::default()
        },
        beginning: args.listen.beginning(),
        join_timeout: Duration::from_secs(args.listen.join_timeout),
    };
    Ok((source, options, network))
}

/// Writes a node's way to serving to the log.
fn report(listen: &ListenArgs) -> impl Fn(NodeEvent) + Send + Sync + use<> {
    let first = listen.new_swarm;
    // Who starts a node from a program may start several.
    let new_progress = if listen.stop_with_stdin { Progress::in_log } else { Progress::new };
    let progress = new_progress("loading blocks");
    move |event| match event {
        NodeEvent::Joined { peers } => tracing::info!(peers, "joined the swarm"),
        NodeEvent::NewSwarm if first => tracing::info!("this node starts a new swarm"),
        NodeEvent::NewSwarm => tracing::info!("no peer was found: this node starts a new swarm"),
        NodeEvent::Chose { span, of } => tracing::info!("hosting blocks {}:{} of {of}", span.start, span.end),
        NodeEvent::Loading { done, of } => progress.update(done as u64, of as u64),
        NodeEvent::Online { loaded_bytes, tokens_per_second } => tracing::info!(
            "online: {:.1} MiB of weights, {tokens_per_second:.0} tokens a second",
            loaded_bytes as f64 / f64::from(1 << 20)
        ),
    }
}

pub(super) async fn bootstrap(args: BootstrapArgs) -> anyhow::Result<()> {
    let mut stop = pin!(args.listen.stop_requested(Signals::new()?));
    let swarm = tokio::select! {
        swarm = start_bootstrap(&args.listen) => swarm?,
        () = &mut stop => {
            tracing::info!("stopped before it had joined");
            return Ok(());
        }
    };
    introduce("bootstrap node", &swarm);
    stop.await;
    tracing::info!("leaving");
    leave(swarm.stop()).await
}

async fn start_bootstrap(listen: &ListenArgs) -> anyhow::Result<Swarm> {
    let swarm = Swarm::start(listen.network()?, Arc::new(BootstrapService)).await?;
    match join(&swarm, listen.beginning(), Duration::from_secs(listen.join_timeout)).await? {
        0 if listen.new_swarm => tracing::info!("this node starts a new DHT"),
        0 => tracing::info!("no peer was found: this node starts a new DHT"),
        peers => tracing::info!(peers, "joined the DHT"),
    }
    Ok(swarm)
}

/// The swarm's prefix: as given, or from the model's name.
pub(super) fn prefix(given: Option<&str>, source: &ModelSource) -> Result<String, Usage> {
    match given {
        Some("") => {
            Err(Usage("--dht-prefix is empty: leave it out for the default, which follows the model".to_owned()))
        }
        Some(prefix) => Ok(prefix.to_owned()),
        None => Ok(source.default_dht_prefix().to_owned()),
    }
}
