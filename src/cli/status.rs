//! `helion client status`: who serves which blocks, and whether the swarm is complete.

use std::{fmt::Write, time::Duration};

use clap::Args;

use super::{arguments::SwarmArgs, generate::connect, output::print_json};
use crate::client::{
    session::Patience,
    view::{Status, SwarmView},
};

#[derive(Debug, Args)]
pub(super) struct StatusArgs {
    #[command(flatten)]
    swarm: SwarmArgs,
    /// Print JSON: one object, or with --watch one a line.
    #[arg(long)]
    json: bool,
    /// Look again and again until Ctrl-C.
    #[arg(long)]
    watch: bool,
    /// How long to wait between two looks, seconds.
    #[arg(long, value_name = "SECONDS", default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..))]
    every: u64,
}

pub(super) async fn run(args: StatusArgs) -> anyhow::Result<()> {
    let client = connect(&args.swarm, Patience::default()).await?;
    loop {
        let mut view = client.observer().look_up().await?;
        client.observer().measure(&mut view, false).await;
        if args.json {
            print_json(&Status::from(&view))?;
        } else {
            print!("{}", table(&view));
        }
        if !args.watch {
            break;
        }
        tokio::select! {
            () = tokio::time::sleep(Duration::from_secs(args.every)) => {}
            _ = tokio::signal::ctrl_c() => break,
        }
    }
    client.stop().await;
    Ok(())
}

/// The swarm as a table, for people.
fn table(view: &SwarmView) -> String {
    let status = Status::from(view);
    let mut text = String::new();
    let mut line = |args: std::fmt::Arguments<'_>| {
        // Writing to a string can't fail.
        let _ = writeln!(text, "{args}");
    };
    line(format_args!("{} ({} blocks), prefix {}", status.model, status.blocks, status.dht_prefix));
    line(format_args!(
        "{:<9} {:<9} {:>6} {:>9} {:>9} {:>11}  peer",
        "blocks", "state", "dtype", "tokens/s", "rtt ms", "cache left"
    ));
    for peer in &status.peers {
        let rtt = peer.rtt_ms.map_or_else(|| "no answer".to_owned(), |rtt| format!("{rtt:.1}"));
        line(format_args!(
            "{:<9} {:<9} {:>6} {:>9.1} {:>9} {:>11}  {} {}",
            format!("{}:{}", peer.span[0], peer.span[1]),
            peer.state,
            peer.dtype,
            peer.throughput,
            rtt,
            peer.cache_tokens_left,
            peer.peer_id,
            peer.public_name.as_deref().unwrap_or(""),
        ));
    }
    if status.complete {
        let least = status.coverage.iter().min().copied().unwrap_or(0);
        line(format_args!("complete: every block has at least {least} peer(s)"));
    } else {
        line(format_args!("incomplete: {}", view.incomplete()));
    }
    if !view.foreign.is_empty() {
        line(format_args!(
            "{} peer(s) under this prefix serve another model or revision and are ignored",
            view.foreign.len()
        ));
    }
    text
}
