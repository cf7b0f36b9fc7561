//! `helion demo`: a whole swarm on this machine, for a look.

mod processes;

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context;
use clap::Args;

use self::processes::Processes;
use super::{
    LogFormat,
    arguments::{DtypeArg, HubArgs, ModelArgs, PeerArgs, SwarmArgs, count},
    chat::{check_template, converse},
    generate::{chat_ids, connect_with, generate_shown, load_model},
    output::{Shown, print, say, summary},
    signals::Signals,
};
use crate::{
    client::{Client, generation::GenerationOptions, session::Patience},
    model::{Quant, chat::Message},
};

#[derive(Debug, Args)]
pub(super) struct DemoArgs {
    /// A question. Without one a chat is opened.
    prompt: Option<String>,
    /// Nodes to start; each gets a part of the blocks.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::builder::RangedU64ValueParser::<usize>::new().range(1..=64))]
    nodes: usize,
    /// Another chat model: a hub id, a directory or a GGUF file [default: the one that is built in].
    #[arg(long, value_name = "HUB_ID|DIR|GGUF")]
    model: Option<String>,
    #[command(flatten)]
    hub: HubArgs,
    /// Tokens to generate at most.
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = count())]
    max_tokens: usize,
    /// Print one JSON object, like `client generate --json`; needs a prompt.
    #[arg(long, requires = "prompt")]
    json: bool,
}

pub(super) async fn run(args: DemoArgs, log_format: LogFormat) -> anyhow::Result<()> {
    let mut signals = Signals::new()?;
    let scratch = tempfile::tempdir().context("no directory for the demo's files")?;
    let mut processes = Processes::new(scratch.path().to_owned(), log_format)?;
    let result = show(&args, scratch.path(), &mut processes, &mut signals).await;
    processes.stop().await;
    result
}

async fn show(args: &DemoArgs, scratch: &Path, processes: &mut Processes, signals: &mut Signals) -> anyhow::Result<()> {
    let client = signals.guard(start(args, scratch, processes)).await?;
    let options = GenerationOptions {
        max_tokens: args.max_tokens,
        wait: Duration::from_secs(30),
        ..GenerationOptions::default()
    };
    let result = match &args.prompt {
        Some(prompt) => signals.guard(ask(&client, &options, prompt, args.json)).await,
        None => converse(&client, &options, None, signals).await,
    };
    client.stop().await;
    result
}

/// Starts the swarm and joins it.
async fn start(args: &DemoArgs, scratch: &Path, processes: &mut Processes) -> anyhow::Result<Client> {
    let (model, dtype) = match &args.model {
        Some(model) => (model.clone(), DtypeArg::Auto),
        None => (unpack(scratch)?.display().to_string(), DtypeArg::F32),
    };
    let mut swarm = SwarmArgs {
        model: ModelArgs { model, hub: args.hub.clone() },
        // Nobody will find these peers again.
        peers: PeerArgs { initial_peers: Vec::new(), no_mdns: true, no_remember: true },
        require_quant: Vec::new(),
        dht_prefix: None,
        join_timeout: 20,
        dtype,
        head_quant: Quant::Auto,
        threads: None,
        identity_path: None,
    };
    let local = load_model(&swarm).await?;
    check_template(&local)?;
    let blocks = local.spec().num_blocks();
    anyhow::ensure!(
        args.nodes <= blocks,
        "{} nodes are more than {} has blocks: {blocks} at most",
        args.nodes,
        local.name()
    );

    say(format_args!("starting a bootstrap node and {} nodes …", args.nodes));
    let bootstrap = processes.start_bootstrap().await?;
    swarm.peers.initial_peers = vec![bootstrap];
    processes.start_nodes(&swarm, blocks, args.nodes).await?;
    connect_with(&swarm, local, Patience::default()).await
}

async fn ask(client: &Client, options: &GenerationOptions, prompt: &str, json: bool) -> anyhow::Result<()> {
    let ids = chat_ids(client.model(), &[Message::new("user", prompt)])?;
    let shown = if json { Shown::Json } else { Shown::Text };
    let generation = generate_shown(client, &ids, options, shown).await?;
    shown.result(&generation)?;
    if !json {
        print(format_args!("\n{}\n", summary(std::slice::from_ref(&generation))))?;
    }
    Ok(())
}

/// Writes the model that is built in to a folder that names it.
#[cfg(feature = "demo-model")]
fn unpack(scratch: &Path) -> anyhow::Result<PathBuf> {
    const FILES: [(&str, &[u8]); 6] = [
        ("config.json", include_bytes!("demo/helion-tiny/config.json")),
        ("generation_config.json", include_bytes!("demo/helion-tiny/generation_config.json")),
        ("chat_template.jinja", include_bytes!("demo/helion-tiny/chat_template.jinja")),
        ("tokenizer.json", include_bytes!("demo/helion-tiny/tokenizer.json")),
        ("tokenizer_config.json", include_bytes!("demo/helion-tiny/tokenizer_config.json")),
        ("model.safetensors", include_bytes!("demo/helion-tiny/model.safetensors")),
    ];
    let directory = scratch.join("helion-tiny");
    std::fs::create_dir(&directory).with_context(|| format!("{} can't be made", directory.display()))?;
    for (name, content) in FILES {
        let path = directory.join(name);
        std::fs::write(&path, content).with_context(|| format!("{} can't be written", path.display()))?;
    }
    Ok(directory)
}

#[cfg(not(feature = "demo-model"))]
fn unpack(_scratch: &Path) -> anyhow::Result<PathBuf> {
    Err(super::arguments::Usage(
        "this helion was built without its demo model: give one with --model, or build with the feature demo-model"
            .to_owned(),
    )
    .into())
}
