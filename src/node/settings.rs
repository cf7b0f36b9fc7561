//! What a node allows its sessions: how many, for how long, and how much memory.

use std::time::Duration;

/// How many sessions, and for how long.
#[derive(Debug, Clone, Copy)]
pub struct SessionSettings {
    /// Sessions at a time. Each may hold a few steps, so this bounds tasks; `held_bytes` bounds their memory.
    pub max_sessions: usize,
    /// Sessions of one client at a time, so that one can't shut out the others.
    pub max_sessions_per_client: usize,
    /// Bytes of waiting steps and kept replies, over all sessions.
    pub held_bytes: usize,
    /// Bytes of the hidden states that were sent on, over all sessions: what another hop is told that takes the next one's place.
    /// A session for which there is no room does without, and more is computed again where it loses a hop.
    pub history_bytes: usize,
    /// How long a step may wait for its turn and for KV pages.
    pub step_deadline: Duration,
    /// How long a session outlives its client's connection.
    pub reconnect_grace: Duration,
    /// How long a session may be silent.
    pub idle: Duration,
    /// How long the pages that sessions leave for others are kept unused, where nobody needs their room sooner.
    pub prefix_idle: Duration,
}

impl Default for SessionSettings {
    fn default() -> Self {
        Self {
            max_sessions: 1024,
            max_sessions_per_client: 512,
            held_bytes: 1 << 30,
            history_bytes: 1 << 30,
            step_deadline: Duration::from_secs(30),
            reconnect_grace: Duration::from_secs(15),
            idle: Duration::from_secs(600),
            prefix_idle: Duration::from_secs(600),
        }
    }
}
