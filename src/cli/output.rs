//! How results are printed.
//!
//! Nothing here panics where a stream is closed (`helion client status | head -1`), as `println!` would: on stdout it is
//! [`PrintError::ReaderGone`], which ends the command quietly; what can't be said on stderr is lost.

use std::{
    fmt::Arguments,
    io::{self, Write},
    sync::{Mutex, PoisonError},
};

use serde::Serialize;
use tokio::sync::Notify;

use crate::client::generation::{Generation, GenerationEvent};

/// Why standard output does not take a result.
#[derive(Debug, thiserror::Error)]
pub(super) enum PrintError {
    /// Whoever read it has seen enough and left.
    #[error("nobody reads standard output any more")]
    ReaderGone,
    /// For example a full disk.
    #[error("standard output can't be written: {0}")]
    Failed(io::Error),
}

impl From<io::Error> for PrintError {
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::BrokenPipe { Self::ReaderGone } else { Self::Failed(error) }
    }
}

/// Writes to standard output at once; the line end is the caller's.
pub(super) fn print(text: Arguments<'_>) -> Result<(), PrintError> {
    let mut stdout = io::stdout().lock();
    stdout.write_fmt(text)?;
    Ok(stdout.flush()?)
}

/// Writes a line to standard error. Where that is closed there is nobody to tell.
pub(super) fn say(text: Arguments<'_>) {
    let _ = writeln!(io::stderr().lock(), "{text}");
}

/// Prints one JSON object and a line end.
pub(super) fn print_json(value: &impl Serialize) -> Result<(), PrintError> {
    let text = serde_json::to_string(value).map_err(|error| PrintError::Failed(error.into()))?;
    print(format_args!("{text}\n"))
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
    /// Shows the result.
    pub(super) fn result(self, generation: &Generation) -> Result<(), PrintError> {
        match self {
            Self::Text => print(format_args!("\n")),
            Self::Json | Self::JsonStream => print_json(generation),
        }
    }

    /// Shows several samples of one prompt, each with its number. Their texts come side by side, so they are shown in the end.
    pub(super) fn samples(self, generations: &[Generation]) -> Result<(), PrintError> {
        generations.iter().enumerate().try_for_each(|(index, generation)| match self {
            Self::Text => print(format_args!("[{index}]\n{}\n", generation.text)),
            Self::Json | Self::JsonStream => print_json(&OfSample { index, what: generation }),
        })
    }
}

/// One of several samples' JSON.
#[derive(Serialize)]
struct OfSample<'a, T> {
    index: usize,
    #[serde(flatten)]
    what: &'a T,
}

/// Shows what happens in one generation, and tells when that can't be shown any more.
pub(super) struct Display {
    shown: Shown,
    failure: Mutex<Option<PrintError>>,
    failed: Notify,
}

impl Display {
    pub(super) fn new(shown: Shown) -> Self {
        Self { shown, failure: Mutex::default(), failed: Notify::new() }
    }

    /// Shows what happens on the way.
    pub(super) fn event(&self, event: &GenerationEvent) {
        self.note(match (self.shown, event) {
            (Shown::Text, GenerationEvent::Token { text, .. }) => print(format_args!("{text}")),
            (Shown::JsonStream, event) => print_json(event),
            _ => Ok(()),
        });
    }

    /// Shows what happens to one of several samples.
    pub(super) fn event_of(&self, index: usize, event: &GenerationEvent) {
        self.note(match (self.shown, event) {
            (Shown::JsonStream, what @ GenerationEvent::Token { .. }) => print_json(&OfSample { index, what }),
            (Shown::JsonStream, event) => print_json(event),
            _ => Ok(()),
        });
    }

    fn note(&self, printed: Result<(), PrintError>) {
        if let Err(error) = printed {
            self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
            self.failed.notify_one();
        }
    }

    /// Returns when something could not be printed: the rest would be computed for nobody.
    pub(super) async fn failed(&self) -> PrintError {
        loop {
            if let Some(error) = self.failure.lock().unwrap_or_else(PoisonError::into_inner).take() {
                return error;
            }
            self.failed.notified().await;
        }
    }
}

/// The route and the speed of a generation, or of several samples of one prompt, for people.
pub(super) fn summary(samples: &[Generation]) -> String {
    let Some(first) = samples.first() else { return String::new() };
    let mut lines = Vec::new();
    for (index, hop) in first.route.iter().enumerate() {
        lines.push(format!("hop {}: blocks {}:{} on {}", index + 1, hop.span[0], hop.span[1], hop.peer_id));
    }
    let generated: usize = samples.iter().map(|sample| sample.usage.completion_tokens).sum();
    let mut speed = format!(
        "{} prompt tokens, {generated} generated; first token after {:.0} ms",
        first.usage.prompt_tokens, first.timing.time_to_first_token_ms
    );
    let decoding = samples.iter().map(|sample| sample.timing.total_ms - sample.timing.time_to_first_token_ms);
    let (decode_ms, later) = (decoding.fold(0.0, f64::max), generated - samples.len().min(generated));
    if later > 0 {
        speed += &format!(", then {:.1} tokens a second", later as f64 * 1e3 / decode_ms.max(1e-6));
    }
    lines.push(speed);
    if first.recoveries > 0 {
        lines.push(format!("{} hop(s) were lost on the way, and replaced", first.recoveries));
    }
    lines.join("\n")
}
