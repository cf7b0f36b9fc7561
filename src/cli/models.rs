//! `helion client models`: what the swarms of a DHT serve.

use std::{fmt::Write, time::Duration};

use clap::Args;

use super::{
    arguments::{PeerArgs, client_network, seconds},
    output::{print, print_json},
    signals::Signals,
};
use crate::client::models::{ServedModel, connect, served};

#[derive(Debug, Args)]
pub(super) struct ModelsArgs {
    #[command(flatten)]
    peers: PeerArgs,
    /// How long to look for the first peer, seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 20, value_parser = seconds(1))]
    join_timeout: u64,
    /// Print a JSON array.
    #[arg(long)]
    json: bool,
}

pub(super) async fn run(args: ModelsArgs) -> anyhow::Result<()> {
    let mut signals = Signals::new()?;
    let network = client_network(&args.peers)?;
    let swarm = signals.guard(async { Ok(connect(network, Duration::from_secs(args.join_timeout)).await?) }).await?;
    let result = signals.guard(async { Ok(served(&swarm).await?) }).await;
    swarm.stop().await;
    let models = result?;
    if args.json {
        print_json(&models)?;
    } else {
        print(format_args!("{}", table(&models)))?;
    }
    Ok(())
}

/// The models, for people.
fn table(models: &[ServedModel]) -> String {
    let mut text = format!("{:<40} {:>6} {:>6}  {:<12}  state\n", "model", "blocks", "peers", "fingerprint");
    for model in models {
        let state = if model.complete {
            "complete".to_owned()
        } else {
            let gaps: Vec<String> = model.missing.iter().map(|[start, end]| format!("{start}:{end}")).collect();
            format!("nobody serves {}", gaps.join(", "))
        };
        let fingerprint: String = model.fingerprint.chars().take(12).collect();
        // Writing to a string can't fail.
        let _ =
            writeln!(text, "{:<40} {:>6} {:>6}  {fingerprint:<12}  {state}", model.model, model.blocks, model.peers);
    }
    text
}
