//! `helion client chat`: talk to a chat model.

use clap::Args;
use rustyline::error::ReadlineError;

use super::{
    arguments::SwarmArgs,
    generate::{GenerationArgs, chat_ids, connect},
    output::Shown,
};
use crate::{
    client::{Client, ClientError, generation::GenerationOptions},
    config,
    model::chat::Message,
};

/// What the chat understands besides messages.
const COMMANDS: &str = "/reset forgets the conversation, /quit (or Ctrl-D) ends it, Ctrl-C stops an answer";

#[derive(Debug, Args)]
pub(super) struct ChatArgs {
    #[command(flatten)]
    swarm: SwarmArgs,
    /// Instructions for the model, before the conversation.
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    #[command(flatten)]
    generation: GenerationArgs,
}

pub(super) async fn run(args: ChatArgs) -> anyhow::Result<()> {
    let options = args.generation.options();
    options.sampling.validate()?;
    let client = connect(&args.swarm, args.generation.patience()).await?;
    converse(&client, &options, args.system.as_deref()).await?;
    client.stop().await;
    Ok(())
}

/// Reads messages and streams answers until the user has enough.
pub(super) async fn converse(client: &Client, options: &GenerationOptions, system: Option<&str>) -> anyhow::Result<()> {
    let opening: Vec<Message> = system.map(|text| Message::new("system", text)).into_iter().collect();
    let mut messages = opening.clone();
    chat_ids(client.model(), &[Message::new("user", "hello")])?; // no template: say so before a message is typed
    let mut editor = rustyline::DefaultEditor::new()?;
    let history = config::home().join("chat_history");
    // The first chat has no history yet.
    let _ = editor.load_history(&history);
    eprintln!("chatting with {}; {COMMANDS}", client.model().name());
    loop {
        let line = match tokio::task::block_in_place(|| editor.readline("> ")) {
            Ok(line) => line,
            Err(ReadlineError::Eof) => break,
            Err(ReadlineError::Interrupted) => continue,
            Err(error) => return Err(error.into()),
        };
        let text = line.trim();
        if text.is_empty() {
            continue;
        }
        editor.add_history_entry(text)?;
        match text {
            "/quit" | "/exit" => break,
            "/reset" => {
                messages = opening.clone();
                eprintln!("forgotten");
                continue;
            }
            command if command.starts_with('/') => {
                eprintln!("unknown command {command}: {COMMANDS}");
                continue;
            }
            _ => {}
        }
        messages.push(Message::new("user", text));
        match answer(client, options, &messages).await? {
            Some(answer) => messages.push(Message::new("assistant", answer)),
            None => {
                messages.pop();
            }
        }
    }
    if let Err(error) = std::fs::create_dir_all(config::home())
        .map_err(ReadlineError::from)
        .and_then(|()| editor.save_history(&history))
    {
        tracing::warn!("the history can't be kept in {}: {error}", history.display());
    }
    Ok(())
}

/// Streams one answer. `None` where there is none: it failed, or was stopped before its end.
async fn answer(client: &Client, options: &GenerationOptions, messages: &[Message]) -> anyhow::Result<Option<String>> {
    let ids = chat_ids(client.model(), messages)?;
    let mut show = |event| Shown::Text.event(&event);
    let result = tokio::select! {
        result = client.generate(&ids, options, &mut show) => result,
        _ = tokio::signal::ctrl_c() => {
            println!();
            eprintln!("stopped; the message is not part of the conversation");
            return Ok(None);
        }
    };
    println!();
    match result {
        Ok(generation) => Ok(Some(generation.text)),
        Err(error @ ClientError::Request(_)) => {
            eprintln!("error: {error} (/reset starts anew)");
            Ok(None)
        }
        Err(error) => {
            eprintln!("error: {error}");
            Ok(None)
        }
    }
}
