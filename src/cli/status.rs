//! `helion client status`: who serves which blocks, and whether the swarm is complete.

use std::{fmt::Write, time::Duration};

use clap::Args;

use super::{
    arguments::{SwarmArgs, seconds},
    generate::observe,
    output::{print, print_json},
    signals::{Interrupted, Signals},
};
use crate::client::{
    observer::Observer,
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
    #[arg(long, value_name = "SECONDS", default_value_t = 2, value_parser = seconds(1))]
    every: u64,
}

pub(super) async fn run(args: StatusArgs) -> anyhow::Result<()> {
    let mut signals = Signals::new()?;
    let observer = signals.guard(observe(&args.swarm)).await?;
    let result = signals.guard(show(&observer, &args)).await;
    observer.swarm().stop().await;
    match result {
        // That is how one ends watching.
        Err(error) if args.watch && error.is::<Interrupted>() => Ok(()),
        result => result,
    }
}

/// Looks and prints: once, or for ever.
async fn show(observer: &Observer, args: &StatusArgs) -> anyhow::Result<()> {
    loop {
        let mut view = observer.look_up().await?;
        observer.measure(&mut view, false).await;
        if args.json {
            print_json(&Status::from(&view))?;
        } else {
            print(format_args!("{}", table(&view)))?;
        }
        if !args.watch {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_secs(args.every)).await;
    }
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
        "{:<9} {:<9} {:>6} {:>7} {:>9} {:>9} {:>11}  peer",
        "blocks", "state", "dtype", "quant", "tokens/s", "rtt ms", "cache left"
    ));
    for peer in &status.peers {
        let rtt = peer.rtt_ms.map_or_else(|| "no answer".to_owned(), |rtt| format!("{rtt:.1}"));
        line(format_args!(
            "{:<9} {:<9} {:>6} {:>7} {:>9.1} {:>9} {:>11}  {} {}",
            format!("{}:{}", peer.span[0], peer.span[1]),
            peer.state,
            peer.dtype,
            peer.quant,
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
