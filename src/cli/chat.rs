//! `helion client chat`: talk to a chat model.

use std::{io::IsTerminal, path::PathBuf, pin::pin};

use clap::Args;
use rustyline::{DefaultEditor, error::ReadlineError};

use super::{
    arguments::SwarmArgs,
    generate::{GenerationArgs, RuleArgs, answer_shown, chat_ids, connect_with, load_model},
    output::{PrintError, print, say},
    signals::{Interrupted, Signals, Stop},
};
use crate::{
    client::{
        Client, ClientError,
        generation::{Conversation, Generation, GenerationOptions},
        local_model::LocalModel,
    },
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
    rules: RuleArgs,
    #[command(flatten)]
    generation: GenerationArgs,
}

pub(super) async fn run(args: ChatArgs) -> anyhow::Result<()> {
    let mut signals = Signals::new()?;
    let options = args.generation.options()?;
    let connecting = async {
        let model = load_model(&args.swarm).await?;
        check_template(&model)?;
        connect_with(&args.swarm, model, args.generation.patience()).await
    };
    let client = args.rules.apply(signals.guard(connecting).await?);
    let result = converse(&client, &options, args.system.as_deref(), &mut signals).await;
    client.stop().await;
    result
}

/// Fails where the model can't chat: better said before a message is typed.
pub(super) fn check_template(model: &LocalModel) -> anyhow::Result<()> {
    chat_ids(model, &[Message::new("user", "hello")]).map(|_| ())
}

/// Reads messages and streams answers until the user has enough.
pub(super) async fn converse(
    client: &Client,
    options: &GenerationOptions,
    system: Option<&str>,
    signals: &mut Signals,
) -> anyhow::Result<()> {
    let opening: Vec<Message> = system.map(|text| Message::new("system", text)).into_iter().collect();
    let mut messages = opening.clone();
    // The hops keep what was said until the chat ends, or they have not heard of it for too long.
    let mut conversation = None;
    let mut lines = TypedLines::new()?;
    say(format_args!("chatting with {}; {COMMANDS}", client.model().name()));
    while let Some(line) = next_line(&mut lines, signals, &mut conversation).await? {
        match line.as_str() {
            "/quit" | "/exit" => break,
            "/reset" => {
                messages = opening.clone();
                conversation = None;
                say(format_args!("forgotten"));
            }
            command if command.starts_with('/') => say(format_args!("unknown command {command}: {COMMANDS}")),
            text => {
                messages.push(Message::new("user", text));
                let ids = chat_ids(client.model(), &messages)?;
                let answering = answer_shown(client, &mut conversation, &ids, options);
                match answer(answering, signals).await? {
                    Some(answer) => messages.push(Message::new("assistant", answer)),
                    None => {
                        messages.pop();
                    }
                }
            }
        }
    }
    Ok(())
}

/// The next line. Where a hop leaves meanwhile, the conversation goes over to another one.
async fn next_line(
    lines: &mut TypedLines,
    signals: &mut Signals,
    conversation: &mut Option<Conversation>,
) -> anyhow::Result<Option<String>> {
    let mut typing = pin!(lines.next(signals));
    let Some(conversation) = conversation else { return typing.await };
    loop {
        tokio::select! {
            line = &mut typing => return line,
            () = conversation.wants_attention() => {}
        }
        let mut attending = pin!(conversation.attend());
        tokio::select! {
            line = &mut typing => {
                if line.is_ok() {
                    attending.await;
                }
                return line;
            }
            () = &mut attending => {}
        }
    }
}

/// Streams one answer. `None` where there is none: it failed, or was stopped before its end.
async fn answer(
    answering: impl Future<Output = anyhow::Result<Generation>>,
    signals: &mut Signals,
) -> anyhow::Result<Option<String>> {
    let result = tokio::select! {
        result = answering => result,
        stop = signals.received() => {
            print(format_args!("\n"))?;
            if stop == Stop::Terminate {
                return Err(Interrupted.into());
            }
            say(format_args!("stopped; the message is not part of the conversation"));
            return Ok(None);
        }
    };
    match result {
        Ok(generation) => {
            print(format_args!("\n"))?;
            Ok(Some(generation.text))
        }
        Err(error) if error.is::<PrintError>() => Err(error),
        Err(error) => {
            print(format_args!("\n"))?;
            let fate = super::fate_of_steps(&error);
            let way_out = match error.downcast_ref() {
                Some(ClientError::Request(_)) => " (/reset starts anew)",
                _ => "",
            };
            say(format_args!("error: {error:#}{fate}{way_out}"));
            Ok(None)
        }
    }
}

/// The lines that the user types, with a history that is kept.
struct TypedLines {
    /// `None` while a line is read elsewhere.
    editor: Option<DefaultEditor>,
    history: PathBuf,
    /// On a terminal Ctrl-C at the prompt is a key like others, and clears the line.
    on_terminal: bool,
}

impl TypedLines {
    fn new() -> anyhow::Result<Self> {
        let mut editor = DefaultEditor::new()?;
        let history = config::home().join("chat_history");
        // The first chat has no history yet.
        let _ = editor.load_history(&history);
        Ok(Self { editor: Some(editor), history, on_terminal: std::io::stdin().is_terminal() })
    }

    /// The next line with something in it, without white space around it; `None` at the end of input.
    ///
    /// # Errors
    /// [`Interrupted`] by a signal, or what the terminal says.
    async fn next(&mut self, signals: &mut Signals) -> anyhow::Result<Option<String>> {
        loop {
            // Only missing where an earlier call was interrupted.
            let mut editor = self.editor.take().ok_or(Interrupted)?;
            // A read can't be taken back: it goes on in its thread where a signal ends the chat.
            let mut reading = tokio::task::spawn_blocking(move || {
                let line = editor.readline("> ");
                (editor, line)
            });
            let (mut editor, line) = loop {
                tokio::select! {
                    read = &mut reading => break read?,
                    stop = signals.received() => {
                        if stop == Stop::Terminate || !self.on_terminal {
                            return Err(Interrupted.into());
                        }
                    }
                }
            };
            let line = match line {
                Ok(line) => line.trim().to_owned(),
                Err(ReadlineError::Interrupted) => String::new(),
                Err(ReadlineError::Eof) => return Ok(None),
                Err(error) => return Err(error.into()),
            };
            if !line.is_empty() {
                editor.add_history_entry(&line)?;
                self.save(&mut editor);
            }
            self.editor = Some(editor);
            if !line.is_empty() {
                return Ok(Some(line));
            }
        }
    }

    /// Keeps the history after every line, so that no way of ending loses it.
    fn save(&self, editor: &mut DefaultEditor) {
        if let Err(error) = std::fs::create_dir_all(config::home())
            .map_err(ReadlineError::from)
            .and_then(|()| editor.save_history(&self.history))
        {
            tracing::warn!("the history can't be kept in {}: {error}", self.history.display());
        }
    }
}
