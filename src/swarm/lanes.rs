//! Steps that move lanes instead of filling them: copies for beams and samples of one prompt, drops for those that are over.
//!
//! Such a step has no rows. Nothing of it can fail half-way, so it is numbered, applied, kept, passed on and answered like any
//! other, and a retry changes nothing. All copies are of what the lanes hold before the step, so that a beam search can put
//! its lanes in another order; then the drops follow. Client and hops hold it against the same rules.

use super::proto::session as proto;

/// What a step does to lanes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct LaneChanges {
    /// From which lane to which: the second one becomes what the first one is, and forgets what it was.
    pub copies: Vec<(u32, u32)>,
    /// Lanes that are forgotten.
    pub drops: Vec<u32>,
}

/// Why lanes can't be changed like this.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BadLaneChanges {
    /// Nothing is to be done.
    #[error("no lane is copied or dropped: name at least one")]
    Empty,
    /// More than the session may have.
    #[error("lane {lane}, and the session may have {most}, 0 to {}", most.saturating_sub(1))]
    NoSuchLane {
        /// The lane.
        lane: u32,
        /// How many it may have.
        most: u32,
    },
    /// What it would be is not certain.
    #[error("lane {0} is copied to or dropped more than once: name it once")]
    Twice(u32),
    /// The step has rows as well.
    #[error("the step has rows, and copies or drops lanes: send two steps")]
    WithRows,
    /// The lanes would hold more than the session may.
    #[error("the lanes would hold {tokens} tokens together, and the session may hold {most}")]
    TooManyTokens {
        /// Over all lanes, copies counted in full.
        tokens: u64,
        /// How many it may hold.
        most: u64,
    },
}

impl LaneChanges {
    /// What `step` does to lanes; `None` where it is a step with rows.
    pub fn of(step: &proto::Step) -> Option<Self> {
        let copies: Vec<_> = step.copies.iter().map(|copy| (copy.from, copy.to)).collect();
        let changes = Self { copies, drops: step.drops.clone() };
        (!changes.is_empty()).then_some(changes)
    }

    /// Writes the changes into a step's header.
    pub fn write(&self, step: &mut proto::Step) {
        step.copies = self.copies.iter().map(|&(from, to)| proto::LaneCopy { from, to }).collect();
        step.drops.clone_from(&self.drops);
    }

    fn is_empty(&self) -> bool {
        self.copies.is_empty() && self.drops.is_empty()
    }

    /// Holds the changes against a session of so many lanes and tokens; `end` is what a lane holds now.
    ///
    /// # Errors
    /// What is wrong with them. Each lane is changed once at most, so there are no more changes than lanes.
    pub fn check(&self, (lanes, tokens): (u32, u64), end: impl Fn(u32) -> usize) -> Result<(), BadLaneChanges> {
        if self.is_empty() {
            return Err(BadLaneChanges::Empty);
        }
        let changed = || self.copies.iter().map(|(_, to)| *to).chain(self.drops.iter().copied());
        let named = self.copies.iter().map(|(from, _)| *from).chain(changed());
        if let Some(lane) = named.into_iter().find(|lane| *lane >= lanes) {
            return Err(BadLaneChanges::NoSuchLane { lane, most: lanes });
        }
        // Lanes are few; a step that names more of them than there are ends here after as many.
        let mut ends: Vec<Option<usize>> = vec![None; lanes as usize];
        let copied = self.copies.iter().map(|(from, to)| (*to, end(*from)));
        for (lane, new) in copied.chain(self.drops.iter().map(|lane| (*lane, 0))) {
            if ends[lane as usize].replace(new).is_some() {
                return Err(BadLaneChanges::Twice(lane));
            }
        }
        let after = ends.iter().zip(0..).map(|(new, lane)| new.unwrap_or_else(|| end(lane)) as u64);
        let after = after.fold(0, u64::saturating_add);
        if after > tokens { Err(BadLaneChanges::TooManyTokens { tokens: after, most: tokens }) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn changes(copies: &[(u32, u32)], drops: &[u32]) -> LaneChanges {
        LaneChanges { copies: copies.to_vec(), drops: drops.to_vec() }
    }

    #[test]
    fn what_a_session_may_not_do_is_named() {
        // Lanes of 5, 3 and 0 tokens, of 12 in all.
        let end = |lane| [5, 3, 0][lane as usize];
        for (copies, drops, expected) in [
            (&[(0, 2)][..], &[][..], Err(BadLaneChanges::TooManyTokens { tokens: 13, most: 12 })),
            (&[(0, 1), (1, 0)], &[], Ok(())),
            (&[(0, 2)], &[0, 1], Ok(())),
            (&[(2, 0)], &[], Ok(())),
            (&[(0, 1), (0, 2)], &[0], Ok(())),
            (&[], &[], Err(BadLaneChanges::Empty)),
            (&[(0, 3)], &[], Err(BadLaneChanges::NoSuchLane { lane: 3, most: 3 })),
            (&[(u32::MAX, 0)], &[], Err(BadLaneChanges::NoSuchLane { lane: u32::MAX, most: 3 })),
            (&[], &[7], Err(BadLaneChanges::NoSuchLane { lane: 7, most: 3 })),
            (&[(0, 2), (1, 2)], &[], Err(BadLaneChanges::Twice(2))),
            (&[(0, 2)], &[2], Err(BadLaneChanges::Twice(2))),
            (&[], &[1, 1], Err(BadLaneChanges::Twice(1))),
        ] {
            assert_eq!(changes(copies, drops).check((3, 12), end), expected, "{copies:?} {drops:?}");
        }
        let endless = changes(&[(0, 1); 10_000], &[]);
        assert_eq!(endless.check((3, u64::MAX), end), Err(BadLaneChanges::Twice(1)));
    }

    #[test]
    fn a_header_says_what_was_written_into_it() {
        let mut step = proto::Step::default();
        assert_eq!(LaneChanges::of(&step), None);
        let wanted = changes(&[(0, 1), (1, 0)], &[4]);
        wanted.write(&mut step);
        assert_eq!(LaneChanges::of(&step), Some(wanted));
    }
}
