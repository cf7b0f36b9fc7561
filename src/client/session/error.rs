//! Why a session can't be had, or ends: who is to blame, whether another hop could do better, and what may have happened.

use std::{ops::Range, time::Duration};

use libp2p::PeerId;

use crate::{
    client::view::Incomplete,
    engine::EdgeError,
    swarm::{LinkError, proto::session as proto},
};

/// Why a session could not be opened, or ended.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// A hop can't be reached.
    #[error("peer {peer} (blocks {}:{}) can't be reached: {source}", blocks.start, blocks.end)]
    Unreachable {
        /// Who.
        peer: PeerId,
        /// What it was to run.
        blocks: Range<usize>,
        /// Why.
        source: LinkError,
    },
    /// A hop went away, or stopped answering.
    #[error("lost peer {peer} (blocks {}:{}): {why}", blocks.start, blocks.end)]
    HopLost {
        /// Who.
        peer: PeerId,
        /// What it ran.
        blocks: Range<usize>,
        /// How that was noticed.
        why: String,
        /// Its connection stands, and it doesn't answer or does harm.
        silent: bool,
    },
    /// A hop refused, or failed.
    #[error("peer {peer} (blocks {}:{}): {message}", blocks.start, blocks.end)]
    Fault {
        /// Who is at fault; where it is no hop's fault, who says so.
        peer: PeerId,
        /// What it runs.
        blocks: Range<usize>,
        /// What kind of fault.
        code: proto::Code,
        /// Whose fault it is.
        blame: proto::Blame,
        /// Whether steps may have been applied: there, or by the hops before it.
        maybe_applied: bool,
        /// What it says.
        message: String,
    },
    /// The last hop's answer is not what was asked for.
    #[error("peer {peer} (blocks {}:{}) answered nonsense: {why}", blocks.start, blocks.end)]
    BadAnswer {
        /// Who.
        peer: PeerId,
        /// What it ran.
        blocks: Range<usize>,
        /// What is wrong.
        why: String,
    },
    /// All hops live, and yet there is no answer.
    #[error("no answer to step {number} after {} s, though all hops are alive: the swarm is overloaded; try again later", waited.as_secs())]
    Overdue {
        /// Which step.
        number: u64,
        /// How long.
        waited: Duration,
    },
    /// A hop was lost, and no other took its place in time.
    #[error("{lost}; no hop took its place within {:.0} s: {why}", waited.as_secs_f64())]
    NotRepaired {
        /// The loss that it began with.
        lost: Box<SessionError>,
        /// Why nothing came of the last attempt.
        why: String,
        /// The blocks that nobody serves, where it was.
        incomplete: Option<Box<Incomplete>>,
        /// How long it was tried.
        waited: Duration,
        /// Whether steps may have been applied somewhere, by all that went wrong since the last answer.
        maybe_applied: bool,
    },
    /// The client's edges can't embed the tokens.
    #[error(transparent)]
    Edge(#[from] EdgeError),
    /// The client's own mistake.
    #[error("{0}")]
    Misuse(String),
}

impl SessionError {
    /// The peer to avoid when another route is tried, where the error names one that is at fault or has no room.
    pub fn peer_to_avoid(&self) -> Option<PeerId> {
        match self {
            Self::Unreachable { peer, .. } | Self::HopLost { peer, .. } | Self::BadAnswer { peer, .. } => Some(*peer),
            // A node that serves something else by now is not what the client looked up.
            Self::Fault { peer, code: proto::Code::WrongModel | proto::Code::WrongBlocks, .. } => Some(*peer),
            // What it has forgotten can be told again.
            Self::Fault { code: proto::Code::HistoryGone, .. } => None,
            Self::Fault { blame: proto::Blame::Client, .. }
            | Self::Overdue { .. }
            | Self::NotRepaired { .. }
            | Self::Edge(_)
            | Self::Misuse(_) => None,
            Self::Fault { peer, .. } => Some(*peer),
        }
    }

    /// Whether the session can go on with another route.
    pub fn is_repairable(&self) -> bool {
        let names_nobody = matches!(self, Self::Overdue { .. } | Self::Fault { code: proto::Code::HistoryGone, .. });
        names_nobody || self.peer_to_avoid().is_some()
    }

    /// Whether the hop has no room for the session: then it must give up what it holds everywhere, or two sessions that wait for
    /// each other's pages would wait for ever.
    pub(super) fn is_for_want_of_room(&self) -> bool {
        matches!(self, Self::Fault { code: proto::Code::CacheFull | proto::Code::Deadline, .. })
    }

    /// Whether a hop that works says that it will be gone.
    pub(super) fn is_of_a_leaving_hop(&self) -> bool {
        matches!(self, Self::Fault { code: proto::Code::Leaving, .. })
    }

    /// Whether a hop answered, or sent on, what no honest one does.
    pub(super) fn is_of_a_lie(&self) -> bool {
        use proto::{Blame, Code};
        match self {
            Self::BadAnswer { .. } => true,
            Self::Fault { blame: Blame::Hop, code, .. } => {
                matches!(code, Code::NonFinite | Code::BadTensor | Code::WrongStep | Code::WrongPosition)
            }
            _ => false,
        }
    }

    /// Whether the connection was lost, and nothing is known of the peer.
    pub(super) fn is_of_the_connection(&self) -> bool {
        matches!(self, Self::HopLost { silent: false, .. })
    }

    /// Whether steps that were sent and not answered may have been applied somewhere. Their numbers see to it that none is
    /// applied twice, so a repaired session sends them again in any case.
    pub fn maybe_applied(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::Misuse(_) | Self::Edge(_) => false,
            Self::HopLost { .. } | Self::BadAnswer { .. } | Self::Overdue { .. } => true,
            Self::Fault { maybe_applied, .. } | Self::NotRepaired { maybe_applied, .. } => *maybe_applied,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_is_avoided_for_what_the_client_did_or_what_can_be_told_again() {
        use proto::{Blame, Code};
        let peer = PeerId::random();
        let fault = |code, blame| SessionError::Fault {
            peer,
            blocks: 0..4,
            code,
            blame,
            maybe_applied: false,
            message: String::new(),
        };
        for code in [Code::WrongPosition, Code::WrongStep, Code::BadTensor, Code::TooLarge, Code::BadTicket] {
            let error = fault(code, Blame::Client);
            assert_eq!((error.peer_to_avoid(), error.is_repairable()), (None, false), "{code:?}");
            assert_eq!(fault(code, Blame::Hop).peer_to_avoid(), Some(peer), "{code:?}");
        }
        assert!(
            fault(Code::NonFinite, Blame::Hop).is_of_a_lie() && !fault(Code::NonFinite, Blame::Client).is_of_a_lie()
        );
        assert!(
            !fault(Code::CacheFull, Blame::Nobody).is_of_a_lie() && !fault(Code::Internal, Blame::Hop).is_of_a_lie()
        );
        let forgotten = fault(Code::HistoryGone, Blame::Hop);
        assert_eq!((forgotten.peer_to_avoid(), forgotten.is_repairable()), (None, true));
        assert_eq!(fault(Code::WrongBlocks, Blame::Client).peer_to_avoid(), Some(peer), "it serves something else");
    }
}
