//! `helion model`: look at models, and keep their files.

use std::{
    fmt::Write as _,
    io::{BufRead, IsTerminal},
    ops::Range,
    path::PathBuf,
};

use clap::{Args, Subcommand};
use serde::Serialize;

use super::{
    arguments::{HubArgs, Usage, block_range, count},
    output::{print, print_json, say},
    signals::Signals,
};
use crate::model::{
    hub::{Bytes, CachedModel, HubCache, HubOptions, Removed},
    inspect::Inspection,
    source::{ModelSource, Part},
};

#[derive(Debug, Subcommand)]
pub(super) enum ModelCommand {
    /// Tell what a model is and takes, and how much of it fits on this machine. Of a model on the hub no weights are
    /// downloaded.
    Inspect(InspectArgs),
    /// Download a model, or the files that hold a part of it.
    Pull(PullArgs),
    /// Tell which models are in the hub's cache.
    List(ListArgs),
    /// Remove a model from the hub's cache.
    Rm(RmArgs),
}

#[derive(Debug, Args)]
pub(super) struct InspectArgs {
    /// The model: a hub id (org/name), a directory or a GGUF file.
    model: String,
    #[command(flatten)]
    hub: HubArgs,
    /// The KV cache that the number of fitting blocks is reckoned with, tokens.
    #[arg(long, value_name = "N", default_value_t = 16384, value_parser = count())]
    attn_cache_tokens: usize,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(super) struct PullArgs {
    /// The model: a hub id (org/name).
    model: String,
    #[command(flatten)]
    hub: HubArgs,
    /// Only the files that hold these blocks, half-open: what a node with them needs.
    #[arg(long, value_name = "START:END", value_parser = block_range)]
    blocks: Option<Range<usize>>,
    /// Only the files that hold embedding and head, which clients need; with --blocks both.
    #[arg(long)]
    edges: bool,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(super) struct CacheArgs {
    /// Where files of the hub are kept [default: HF_HUB_CACHE, or HF_HOME/hub].
    #[arg(long, value_name = "DIR")]
    cache_dir: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(super) struct ListArgs {
    #[command(flatten)]
    cache: CacheArgs,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(super) struct RmArgs {
    /// The model: a hub id (org/name).
    model: String,
    #[command(flatten)]
    cache: CacheArgs,
    /// Only this branch, tag or commit; what other revisions have, too, stays [default: all of the model].
    #[arg(long)]
    revision: Option<String>,
    /// Don't ask.
    #[arg(long, short)]
    yes: bool,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

impl CacheArgs {
    fn cache(&self) -> HubCache {
        HubCache::of(&HubOptions { cache_dir: self.cache_dir.clone(), ..HubOptions::default() })
    }
}

pub(super) async fn run(command: ModelCommand) -> anyhow::Result<()> {
    let mut signals = Signals::new()?;
    match command {
        ModelCommand::Inspect(args) => signals.guard(inspect(&args)).await,
        ModelCommand::Pull(args) => signals.guard(pull(&args)).await,
        ModelCommand::List(args) => list(&args),
        ModelCommand::Rm(args) => signals.guard(remove(args)).await,
    }
}

async fn inspect(args: &InspectArgs) -> anyhow::Result<()> {
    let source = ModelSource::open(&args.model, args.hub.options()).await?;
    let inspection = Inspection::of(&source, args.attn_cache_tokens).await?;
    if args.json {
        return Ok(print_json(&inspection)?);
    }
    Ok(print(format_args!("{}", described(&inspection)))?)
}

/// An inspection, for people.
fn described(found: &Inspection) -> String {
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        // Writing to a string can't fail.
        let _ = writeln!(text, "{name:<14} {value}");
    };
    line("model", found.model.clone());
    if let Some(revision) = &found.revision {
        line("revision", revision.clone());
    }
    if let Some(fingerprint) = &found.fingerprint {
        line("fingerprint", fingerprint.to_string());
    }
    line("family", found.family.clone());
    line("blocks", found.blocks.to_string());
    line("context", format!("{} tokens", found.context_tokens));
    let parameters = &found.parameters;
    let largest = parameters.blocks.iter().max().copied().unwrap_or(0);
    line(
        "parameters",
        format!("{} ({largest} in the largest block, {} in the edges)", parameters.total, parameters.edges),
    );
    let dtypes: Vec<&str> = found.stored.dtypes.keys().map(String::as_str).collect();
    let total = found.stored.bytes.map_or_else(|| "unknown size".to_owned(), |bytes| Bytes(bytes).to_string());
    line("stored", format!("{total} in {} file(s), {}", found.stored.files, dtypes.join(", ")));
    for (dtype, kv) in &found.kv_bytes_per_token {
        line(&format!("KV in {dtype}"), format!("{} bytes a token and block, {} in all blocks", kv.block, kv.all));
    }
    let fits = &found.fits;
    text.push('\n');
    let mut row = |[format, block, all, edges, fit]: [&str; 5]| {
        let _ = writeln!(text, "{}", format!("{format:<10} {block:>12} {all:>12} {edges:>12}  {fit}").trim_end());
    };
    row(["format", "a block", "all blocks", "edges", "blocks that fit here"]);
    let [block, edges] = [found.stored.block_bytes, found.stored.edges_bytes].map(|bytes| Bytes(bytes).to_string());
    row(["as stored", &block, "", &edges, ""]);
    for (format, bytes) in &found.block_bytes {
        let all = found.all_blocks_bytes.get(format).copied().unwrap_or(0);
        let edges = found.edges_bytes.get(format).copied().unwrap_or(0);
        let [block, all, edges] = [*bytes, all, edges].map(|bytes| Bytes(bytes).to_string());
        let fit = format!("{} of {}", fits.blocks.get(format).copied().unwrap_or(0), found.blocks);
        row([format, &block, &all, &edges, &fit]);
    }
    let _ = writeln!(
        text,
        "\nThat is with {} of the {} that are free, and a KV cache of {} tokens.",
        Bytes(fits.usable_bytes),
        Bytes(fits.free_bytes),
        fits.cache_tokens
    );
    text
}

/// What was fetched.
#[derive(Serialize)]
struct Pulled {
    model: String,
    revision: Option<String>,
    directory: PathBuf,
    files: Vec<PathBuf>,
    bytes: u64,
}

async fn pull(args: &PullArgs) -> anyhow::Result<()> {
    let source = ModelSource::open(&args.model, args.hub.options()).await?;
    let blocks = source.spec().num_blocks();
    let part = match (args.blocks.clone(), args.edges) {
        (Some(span), _) if span.end > blocks => {
            let wrong = format!("--blocks {}:{}: {} has blocks 0:{blocks}", span.start, span.end, source.name());
            return Err(Usage(wrong).into());
        }
        (None, false) => Part::All,
        (None, true) => Part::Edges,
        (Some(span), false) => Part::Blocks(span),
        (Some(span), true) => Part::BlocksAndEdges(span),
    };
    let files = source.fetch(&part).await?;
    let bytes = files.iter().filter_map(|file| Some(std::fs::metadata(file).ok()?.len())).sum();
    let directory = source.dir();
    if args.json {
        let revision = source.revision().map(str::to_owned);
        return Ok(print_json(&Pulled { model: source.name().to_owned(), revision, directory, files, bytes })?);
    }
    say(format_args!("{} weight file(s), {}", files.len(), Bytes(bytes)));
    Ok(print(format_args!("{}\n", directory.display()))?)
}

/// The cache's content.
#[derive(Serialize)]
struct Listed {
    cache: PathBuf,
    models: Vec<CachedModel>,
}

fn list(args: &ListArgs) -> anyhow::Result<()> {
    let cache = args.cache.cache();
    let models = cache.models()?;
    if args.json {
        return Ok(print_json(&Listed { cache: cache.dir().to_owned(), models })?);
    }
    if models.is_empty() {
        say(format_args!("{} holds no model", cache.dir().display()));
        return Ok(());
    }
    Ok(print(format_args!("{}", table(&models)))?)
}

/// The cache's content, for people: a line a revision.
fn table(models: &[CachedModel]) -> String {
    let width = models.iter().map(|model| model.model.len()).max().unwrap_or(0).max("model".len());
    let mut text = String::new();
    let mut line = |columns: [&str; 6]| {
        let [model, revision, files, size, used, state] = columns;
        // Writing to a string can't fail.
        let _ = writeln!(text, "{model:<width$}  {revision:<20} {files:>5} {size:>11}  {used:<20}  {state}");
    };
    line(["model", "revision", "files", "size", "last used", "state"]);
    for model in models {
        let used = model.last_used.as_deref().unwrap_or("not by helion");
        for revision in &model.revisions {
            let short = revision.commit.get(..8).unwrap_or(&revision.commit);
            let name = match revision.refs.as_slice() {
                [] => short.to_owned(),
                refs => format!("{short} {}", refs.join(",")),
            };
            let (files, size) = (revision.files.to_string(), Bytes(revision.bytes).to_string());
            let state = if revision.complete { "complete" } else { "in parts" };
            let state = if model.in_use { format!("{state}, in use") } else { state.to_owned() };
            line([&model.model, &name, &files, &size, used, &state]);
        }
        if model.incomplete_bytes > 0 {
            let size = Bytes(model.incomplete_bytes).to_string();
            line([&model.model, "(downloads begun)", "", &size, used, "unfinished"]);
        }
    }
    text
}

async fn remove(args: RmArgs) -> anyhow::Result<()> {
    let cache = args.cache.cache();
    if !args.yes {
        let what = match &args.revision {
            Some(revision) => format!("revision {revision} of {}", args.model),
            None => args.model.clone(),
        };
        if !std::io::stdin().is_terminal() {
            return Err(Usage(format!("nobody can be asked whether {what} should be removed: pass --yes")).into());
        }
        say(format_args!("Remove {what} from {}? [y/N]", cache.dir().display()));
        let answer = tokio::task::spawn_blocking(|| {
            let mut answer = String::new();
            std::io::stdin().lock().read_line(&mut answer).map(|_| answer)
        });
        if !matches!(answer.await??.trim(), "y" | "Y" | "yes") {
            say(format_args!("nothing was removed"));
            return Ok(());
        }
    }
    let removed: Removed = cache.remove(&args.model, args.revision.as_deref())?;
    if args.json {
        return Ok(print_json(&removed)?);
    }
    let revisions = removed.commits.len();
    Ok(print(format_args!("removed {}: {revisions} revision(s), {}\n", removed.model, Bytes(removed.bytes)))?)
}
