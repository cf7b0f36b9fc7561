//! Errors, one enum an operation. Where it decides whether a retry is safe, a variant says whether the work may have happened.

use std::{fmt, io, time::Duration};

use libp2p::{Multiaddr, PeerId};

use super::announcement::AnnouncementError;

/// Characters of a peer's words that are kept: more than any message of helion's own has.
const MAX_WORDS: usize = 500;

/// A peer's words, fit to be shown: on one line, without control characters (which could take a terminal over) and without
/// the marks that turn the direction of the text around them, cut to 500 characters.
pub fn clean(text: &str) -> String {
    let mut characters = text.chars().filter_map(|character| match character {
        '\t' | '\n' | '\r' | '\u{2028}' | '\u{2029}' => Some(' '),
        '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => None,
        _ if character.is_control() => None,
        _ => Some(character),
    });
    let mut cleaned: String = characters.by_ref().take(MAX_WORDS).collect();
    if characters.next().is_some() {
        cleaned.pop();
        cleaned.push('…');
    }
    cleaned
}

/// Why a swarm did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// An initial peer without its peer id.
    #[error(
        "the initial peer {address} is not complete: it has to end in /p2p/<peer id>, as the node prints its address"
    )]
    BadPeer {
        /// As given.
        address: Multiaddr,
    },
    /// An address that no transport listens on.
    #[error("cannot listen on {address}: use addresses like /ip4/0.0.0.0/tcp/31337 or /ip4/0.0.0.0/udp/31337/quic-v1")]
    BadListenAddress {
        /// As given.
        address: Multiaddr,
    },
    /// Somebody else listens there.
    #[error(
        "cannot listen on {address}: the port is in use; stop the process that has it, or choose another with --port (0 takes a free one)"
    )]
    PortInUse {
        /// As given.
        address: Multiaddr,
    },
    /// The system refused.
    #[error("cannot listen on {address}: {reason}")]
    Listen {
        /// As given.
        address: Multiaddr,
        /// What the system said.
        reason: String,
    },
    /// A transport could not be set up.
    #[error("cannot set up the network: {0}")]
    Stack(#[from] io::Error),
}

/// Peers that could not be reached, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unreachable(pub Vec<(Multiaddr, String)>);

impl fmt::Display for Unreachable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (address, reason)) in self.0.iter().enumerate() {
            let separator = if i == 0 { "" } else { "; " };
            write!(f, "{separator}{address}: {reason}")?;
        }
        Ok(())
    }
}

/// Why a swarm was not joined.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// There is nobody to dial.
    #[error("no initial peers were given: name one or more with --initial-peers")]
    NoPeers,
    /// None of them is there.
    #[error("none of the initial peers could be reached ({0}): check that they run and that their ports are open")]
    Unreachable(Unreachable),
    /// mDNS found nobody.
    #[error("no peer was found on the local network within {} s: name one with --initial-peers", .0.as_secs_f32())]
    NobodyNear(Duration),
    /// [`Swarm::stop`](super::Swarm::stop) was called.
    #[error("the swarm is stopped")]
    Stopped,
}

/// Why an announcement was not made.
#[derive(Debug, thiserror::Error)]
pub enum AnnounceError {
    /// Others would refuse it.
    #[error(transparent)]
    Invalid(#[from] AnnouncementError),
    /// [`Swarm::stop`](super::Swarm::stop) was called.
    #[error("the swarm is stopped")]
    Stopped,
}

/// Why nothing could be looked up.
#[derive(Debug, thiserror::Error)]
pub enum DiscoverError {
    /// No such prefix can exist.
    #[error(transparent)]
    Prefix(#[from] AnnouncementError),
    /// There is nobody to ask.
    #[error("no peer of the DHT is known: join one with --initial-peers first")]
    Alone,
    /// [`Swarm::stop`](super::Swarm::stop) was called.
    #[error("the swarm is stopped")]
    Stopped,
}

/// Why a request has no response.
#[derive(Debug, thiserror::Error)]
pub enum RpcError {
    /// Nothing was sent.
    #[error("peer {peer} cannot be reached: {reason}")]
    NotConnected {
        /// Who was asked.
        peer: PeerId,
        /// Why not.
        reason: String,
    },
    /// Nothing was done.
    #[error("peer {peer} answers no requests (it speaks no {protocol})", protocol = super::rpc::PROTOCOL)]
    Unsupported {
        /// Who was asked.
        peer: PeerId,
    },
    /// The peer said no, or that it could not.
    #[error("peer {peer} refused: {message}")]
    Refused {
        /// Who was asked.
        peer: PeerId,
        /// In its words.
        message: String,
    },
    /// The peer answered something else than it was asked.
    #[error("peer {peer} gave an answer that makes no sense: {reason}")]
    Malformed {
        /// Who was asked.
        peer: PeerId,
        /// What is wrong with it.
        reason: String,
    },
    /// It may have been done.
    #[error("peer {peer} did not answer within {} s", .after.as_secs_f32())]
    Timeout {
        /// Who was asked.
        peer: PeerId,
        /// How long it had.
        after: Duration,
    },
    /// It may have been done.
    #[error("the connection to peer {peer} was lost before the answer: {reason}")]
    Lost {
        /// Who was asked.
        peer: PeerId,
        /// What happened.
        reason: String,
    },
    /// [`Swarm::stop`](super::Swarm::stop) was called.
    #[error("the swarm is stopped")]
    Stopped,
}

impl RpcError {
    /// Whether the peer may have acted on the request all the same.
    pub fn maybe_applied(&self) -> bool {
        matches!(self, Self::Timeout { .. } | Self::Lost { .. } | Self::Malformed { .. } | Self::Stopped)
    }
}

/// Why there is no link. In every case nothing was sent.
#[derive(Debug, Clone, thiserror::Error)]
pub enum LinkError {
    /// None of its addresses answers.
    #[error("peer {peer} cannot be reached: {reason}")]
    NotConnected {
        /// To whom.
        peer: PeerId,
        /// Why not.
        reason: String,
    },
    /// It is there, but opens no stream.
    #[error("peer {peer} opens no stream for sessions: {reason}")]
    NoStream {
        /// To whom.
        peer: PeerId,
        /// Why not.
        reason: String,
    },
    /// It took too long.
    #[error("no link to peer {peer} within {} s", .after.as_secs_f32())]
    Timeout {
        /// To whom.
        peer: PeerId,
        /// How long it had.
        after: Duration,
    },
    /// [`Swarm::stop`](super::Swarm::stop) was called.
    #[error("the swarm is stopped")]
    Stopped,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peers_words_are_fit_to_be_shown() {
        assert_eq!(clean("the KV cache is full: 16 tokens"), "the KV cache is full: 16 tokens");
        assert_eq!(clean("\u{1b}[2Jone\ntwo\u{7}\u{9b}3\u{202e}four\0"), "[2Jone two3four");
        assert_eq!(clean(&"ü".repeat(500)), "ü".repeat(500));
        assert_eq!(clean(&"ü".repeat(501)), "ü".repeat(499) + "…");
    }
}
