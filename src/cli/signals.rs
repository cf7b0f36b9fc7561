//! Signals that end a command: Ctrl-C (SIGINT) and SIGTERM.
//!
//! From the moment a [`Signals`] exists the system's own answer, to end the process at once, is off for good. So each command
//! makes it first, and everything that may take long runs under [`Signals::guard`]. A signal that arrives between two waits
//! is kept for the next one.

use std::{future::Future, io};

/// The command was ended by a signal.
#[derive(Debug, thiserror::Error)]
#[error("interrupted")]
pub(super) struct Interrupted;

/// Which signal came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
    /// Ctrl-C: a person at the keyboard.
    Interrupt,
    /// A request to end, from the system or a supervisor.
    Terminate,
}

/// The signals that arrive from its making on.
pub(super) struct Signals {
    #[cfg(unix)]
    interrupt: tokio::signal::unix::Signal,
    #[cfg(unix)]
    terminate: tokio::signal::unix::Signal,
    #[cfg(windows)]
    interrupt: tokio::signal::windows::CtrlC,
    #[cfg(windows)]
    terminate: tokio::signal::windows::CtrlClose,
}

impl Signals {
    /// Takes signals over from the system. Needs a runtime.
    ///
    /// # Errors
    /// Where the system refuses.
    pub(super) fn new() -> io::Result<Self> {
        #[cfg(unix)]
        {
            use tokio::signal::unix::{SignalKind, signal};
            Ok(Self { interrupt: signal(SignalKind::interrupt())?, terminate: signal(SignalKind::terminate())? })
        }
        #[cfg(windows)]
        {
            use tokio::signal::windows::{ctrl_c, ctrl_close};
            Ok(Self { interrupt: ctrl_c()?, terminate: ctrl_close()? })
        }
    }

    /// Waits for the next signal. Nothing is lost where this is dropped and called again.
    pub(super) async fn received(&mut self) -> Stop {
        tokio::select! {
            _ = self.interrupt.recv() => Stop::Interrupt,
            _ = self.terminate.recv() => Stop::Terminate,
        }
    }

    /// Does `work` unless a signal comes first: then it is dropped where it waits.
    ///
    /// # Errors
    /// Those of `work`, and [`Interrupted`].
    pub(super) async fn guard<T>(&mut self, work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
        tokio::select! {
            result = work => result,
            _ = self.received() => Err(Interrupted.into()),
        }
    }
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_signal_between_two_waits_is_kept() {
        use tokio::signal::unix::{SignalKind, signal};
        // Not the real ones: those must go on ending the process that runs the tests.
        let mut signals = Signals {
            interrupt: signal(SignalKind::user_defined1()).unwrap(),
            terminate: signal(SignalKind::user_defined2()).unwrap(),
        };
        let other = tokio::time::timeout(std::time::Duration::from_millis(1), signals.received()).await;
        assert!(other.is_err(), "{other:?}");
        let sent = std::process::Command::new("kill").args(["-USR2", &std::process::id().to_string()]).status();
        assert!(sent.unwrap().success());
        let guarded = signals.guard(std::future::pending::<anyhow::Result<()>>()).await;
        assert!(guarded.unwrap_err().is::<Interrupted>());
    }
}
