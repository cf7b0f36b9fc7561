//! Progress of long work: a bar on a terminal, log lines elsewhere.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::model::hub::{self, Stage, Transfer};

/// Log lines don't come more often than this.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// One piece of long work.
pub(super) struct Progress {
    what: String,
    bar: ProgressBar,
    /// Where the bar has its line, if it is one of several.
    among: Option<MultiProgress>,
    on_terminal: bool,
    last_line: Mutex<Option<Instant>>,
}

impl Progress {
    /// Progress of `what`, for example "loading blocks". Nothing is shown before the first update.
    pub(super) fn new(what: impl Into<String>) -> Self {
        let what = what.into();
        let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden());
        if let Ok(style) = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len}") {
            bar.set_style(style);
        }
        bar.set_message(what.clone());
        Self { what, bar, among: None, on_terminal: console_is_attended(), last_line: Mutex::new(None) }
    }

    /// One of several pieces of work that go on at the same time, each with a line of its own.
    fn among(what: impl Into<String>, bars: &MultiProgress) -> Self {
        Self { among: Some(bars.clone()), ..Self::new(what) }
    }

    /// The same in log lines only, for a process that shares its terminal with others.
    pub(super) fn in_log(what: impl Into<String>) -> Self {
        Self { on_terminal: false, ..Self::new(what) }
    }

    /// `done` of `of` are done.
    pub(super) fn update(&self, done: u64, of: u64) {
        if self.on_terminal {
            if self.bar.is_hidden() {
                match &self.among {
                    // The bar shares its state with what is given back.
                    Some(bars) => drop(bars.add(self.bar.clone())),
                    None => self.bar.set_draw_target(ProgressDrawTarget::stderr()),
                }
            }
            self.bar.set_length(of);
            self.bar.set_position(done);
            if done >= of {
                self.bar.finish_and_clear();
            }
            return;
        }
        let mut last = self.last_line.lock().unwrap_or_else(PoisonError::into_inner);
        if done >= of || last.is_none_or(|at| at.elapsed() > LINE_EVERY) {
            *last = Some(Instant::now());
            tracing::info!("{}: {done} of {of}", self.what);
        }
    }
}

/// Shows downloads and hashing of a model's files. A file that is done within a moment is not worth a word.
pub(super) fn of_files() -> hub::Progress {
    struct Shown {
        file: String,
        since: Instant,
        progress: Progress,
    }
    let shown: Mutex<Vec<Shown>> = Mutex::default();
    let bars = MultiProgress::new();
    Arc::new(move |transfer: &Transfer<'_>| {
        let mut shown = shown.lock().unwrap_or_else(PoisonError::into_inner);
        let index = shown.iter().position(|known| known.file == transfer.file).unwrap_or_else(|| {
            let what = match transfer.stage {
                Stage::Downloading => "downloading",
                Stage::Hashing => "hashing",
            };
            let progress = Progress::among(format!("{what} {} (MiB)", transfer.file), &bars);
            shown.push(Shown { file: transfer.file.to_owned(), since: Instant::now(), progress });
            shown.len() - 1
        });
        if shown[index].since.elapsed() > Duration::from_secs(1) {
            shown[index].progress.update(transfer.done_bytes >> 20, transfer.total_bytes >> 20);
        }
        if transfer.total_bytes > 0 && transfer.done_bytes >= transfer.total_bytes {
            shown.swap_remove(index);
        }
    })
}

fn console_is_attended() -> bool {
    std::io::IsTerminal::is_terminal(&std::io::stderr())
}
