//! What is asked of the engine, and what comes back.

use std::{
    fmt,
    hash::{DefaultHasher, Hash, Hasher},
    ops::Range,
    sync::{Arc, atomic::AtomicBool},
    time::{Duration, Instant},
};

use super::{cache::Cache, hidden::HiddenStates, lanes::LaneRun};

/// Whom sessions belong to: a node's clients, for example. The engine shares its time between owners, however many sessions
/// each of them has. The default is the process itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Owner(u64);

impl Owner {
    /// The owner with this name.
    pub fn of(name: &impl Hash) -> Self {
        let mut hasher = DefaultHasher::new();
        name.hash(&mut hasher);
        Self(hasher.finish())
    }
}

/// One step of one session: rows to run through the session's blocks.
pub struct Job {
    /// The session's KV cache; it comes back through `done`.
    pub cache: Cache,
    /// Whose rows they are, in order. A lane may appear once.
    pub lanes: Vec<LaneRun>,
    /// The rows, `[tokens of all lanes, hidden]`.
    pub hidden: HiddenStates,
    /// The length that rotary factors are taken for, where they depend on one (dynamic and LongRoPE scaling): the
    /// prompt's for each of its chunks, then position + 1. If `None`, of each lane the length that it has after the step.
    pub rope_length: Option<usize>,
    /// The rows of the output that are wanted.
    pub keep: Keep,
    /// A step that hasn't begun by then fails; one that has begun is finished.
    pub deadline: Instant,
    /// Set it when nobody wants the result any more.
    pub cancelled: Arc<AtomicBool>,
    /// Called exactly once: on the engine's thread, or at once where the job is refused. It should be quick.
    pub done: Box<dyn FnOnce(Cache, Result<StepOutput, StepError>) + Send>,
}

impl fmt::Debug for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Job").field("lanes", &self.lanes).field("keep", &self.keep).finish_non_exhaustive()
    }
}

/// Rows of a step's output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// All of them.
    All,
    /// The last of each lane, in the order of the lanes in the job.
    LastOfEachLane,
    /// None: the step only fills the cache.
    Nothing,
}

/// What a step gave.
#[derive(Debug, Clone)]
pub struct StepOutput {
    /// The rows that were wanted, in the format of the input.
    pub hidden: HiddenStates,
    /// From submission to the first pass.
    pub queued: Duration,
    /// In passes, which other sessions may have shared.
    pub computed: Duration,
}

/// Where a number that is not finite was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// In the rows that were sent.
    Input,
    /// In what this block put out.
    Block(usize),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Input => f.write_str("the input"),
            Self::Block(block) => write!(f, "the output of block {block}"),
        }
    }
}

/// Why a step failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StepError {
    /// The step can't get pages: never, or not before its deadline.
    #[error(
        "the KV cache is full: the step needs room for {needed_tokens} more tokens, and {free_tokens} of {total_tokens} \
         are free; a new session must leave a part of them to those that run"
    )]
    CacheFull {
        /// Room that the step needs, in whole pages.
        needed_tokens: usize,
        /// Room in pages that no session holds.
        free_tokens: usize,
        /// The cache's size.
        total_tokens: usize,
    },
    /// Too many jobs are waiting.
    #[error("{limit} steps are waiting already: try again later or elsewhere")]
    QueueFull {
        /// How many may wait; of one owner, where that is the limit that was met.
        limit: usize,
    },
    /// The deadline came before the step's turn.
    #[error("the step's deadline passed before it could begin")]
    Deadline,
    /// Nobody wants the result, or the engine is shutting down.
    #[error("the step was cancelled")]
    Cancelled,
    /// The step leaves a gap behind what the lane holds.
    #[error("lane {lane} ends at {end}, and the step begins at {position}: it may begin at the end or before it")]
    WrongPosition {
        /// The lane.
        lane: u32,
        /// Where the step begins.
        position: usize,
        /// Where the lane ends.
        end: usize,
    },
    /// Rows and lanes don't fit together.
    #[error("the step has the wrong shape: {0}")]
    BadShape(String),
    /// The session's blocks are not hosted here.
    #[error("blocks {}:{} are not a part of the span {}:{}", asked.start, asked.end, span.start, span.end)]
    WrongBlocks {
        /// What was asked for.
        asked: Range<usize>,
        /// What is hosted.
        span: Range<usize>,
    },
    /// A NaN or an infinity turned up.
    #[error("row {row} of {place} is not finite")]
    NonFinite {
        /// The row, counted over the step.
        row: usize,
        /// Where.
        place: Place,
    },
    /// The lane would get longer than the model's positions go.
    #[error("lane {lane} would have {tokens} tokens, and the model's context is {limit}")]
    ContextExceeded {
        /// The lane.
        lane: u32,
        /// Its length after the step.
        tokens: usize,
        /// The longest that it may get.
        limit: usize,
    },
    /// The engine is at fault.
    #[error("the engine failed: {0}")]
    Internal(String),
}

impl StepError {
    /// Whether something of the step may have been done.
    ///
    /// If not, all lanes are as they were before. Otherwise a lane ends where it did, or, if the step was a rollback,
    /// at the position that it began from; none of the step's tokens are in it.
    pub fn maybe_applied(&self) -> bool {
        match self {
            Self::NonFinite { place: Place::Block(_), .. } | Self::Cancelled | Self::Internal(_) => true,
            Self::NonFinite { place: Place::Input, .. }
            | Self::CacheFull { .. }
            | Self::QueueFull { .. }
            | Self::Deadline
            | Self::WrongPosition { .. }
            | Self::BadShape(_)
            | Self::WrongBlocks { .. }
            | Self::ContextExceeded { .. } => false,
        }
    }
}
