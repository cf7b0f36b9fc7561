//! Copying and dropping lanes: beams that change places, samples of one prompt, samples that are over.
//!
//! These are steps of their own, numbered and answered like those with rows; they need not be waited for before the next step
//! is sent. A hop that takes a lost one's place is told the rows of a copied lane as the lane's own.

use super::{Input, Session, SessionError};
use crate::swarm::{lanes::LaneChanges, proto::session as proto};

impl Session {
    /// Makes the second lane of each pair what the first one is behind the last step that was sent: of all at once, so that lanes
    /// may change places. No row is computed or sent for that, on any hop. Returns the step's number; its answer, with no
    /// rows, comes as [`Session::receive`] has it.
    ///
    /// # Errors
    /// Where the credit is used up, a lane is not one of the session's or named twice as a second one, or all lanes would hold
    /// more tokens together than the session may: copies count in full.
    pub fn copy_lanes(&mut self, pairs: &[(u32, u32)]) -> Result<u64, SessionError> {
        self.change_lanes(&LaneChanges { copies: pairs.to_vec(), drops: Vec::new() })
    }

    /// Forgets these lanes, and gives the pages back that only they held. As [`Session::copy_lanes`] otherwise.
    ///
    /// # Errors
    /// Where the credit is used up, or a lane is not one of the session's or named twice.
    pub fn drop_lanes(&mut self, lanes: &[u32]) -> Result<u64, SessionError> {
        self.change_lanes(&LaneChanges { copies: Vec::new(), drops: lanes.to_vec() })
    }

    fn change_lanes(&mut self, changes: &LaneChanges) -> Result<u64, SessionError> {
        self.check_credit()?;
        changes
            .check((self.limits.max_lanes, self.limits.max_tokens), |lane| self.history.end(lane))
            .map_err(|error| SessionError::Misuse(error.to_string()))?;
        let mut header =
            proto::Step { number: self.next_number, want: proto::Want::None.into(), ..proto::Step::default() };
        changes.write(&mut header);
        self.history.change_lanes(header.number, changes);
        // No rows: what a repair sends again is as empty.
        let nothing = Input::Tokens(Vec::new());
        let hidden = self.embed(&nothing)?;
        Ok(self.dispatch(header, nothing, hidden))
    }
}
