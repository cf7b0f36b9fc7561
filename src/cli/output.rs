//! How results are printed.

use std::io::Write;

use anyhow::Context;
use serde::Serialize;

use crate::client::generation::{Generation, GenerationEvent};

/// Prints one JSON object and a line end.
pub(super) fn print_json(value: &impl Serialize) -> anyhow::Result<()> {
    let mut stdout = std::io::stdout().lock();
    serde_json::to_writer(&mut stdout, value).context("the result can't be printed")?;
    writeln!(stdout)?;
    Ok(())
}

/// Prints a piece of text at once.
pub(super) fn print_text(text: &str) {
    let mut stdout = std::io::stdout().lock();
    // A reader that has gone (a closed pipe) is noticed when the result is printed.
    let _ = stdout.write_all(text.as_bytes());
    let _ = stdout.flush();
}

/// How a generation is shown while it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shown {
    /// The text, as it comes.
    Text,
    /// One JSON object at the end.
    Json,
    /// One JSON object a line: the route, every token, the result.
    JsonStream,
}

impl Shown {
    /// Shows what happens on the way.
    pub(super) fn event(self, event: &GenerationEvent) {
        match (self, event) {
            (Self::Text, GenerationEvent::Token { text, .. }) => print_text(text),
            (Self::JsonStream, event) => {
                // As for text: a reader that has gone is noticed at the end.
                let _ = print_json(event);
            }
            _ => {}
        }
    }

    /// Shows the result.
    pub(super) fn result(self, generation: &Generation) -> anyhow::Result<()> {
        match self {
            Self::Text => {
                println!();
                Ok(())
            }
            Self::Json | Self::JsonStream => print_json(generation),
        }
    }
}

/// The route and the speed of a generation, for people.
pub(super) fn summary(generation: &Generation) -> String {
    let mut lines = Vec::new();
    for (index, hop) in generation.route.iter().enumerate() {
        lines.push(format!("hop {}: blocks {}:{} on {}", index + 1, hop.span[0], hop.span[1], hop.peer_id));
    }
    let timing = &generation.timing;
    let mut speed = format!(
        "{} prompt tokens, {} generated; first token after {:.0} ms",
        generation.usage.prompt_tokens, generation.usage.completion_tokens, timing.time_to_first_token_ms
    );
    if let Some(rate) = timing.decode_tokens_per_second {
        speed += &format!(", then {rate:.1} tokens a second");
    }
    lines.push(speed);
    lines.join("\n")
}
