//! Buffers that a pass works in. They grow to the largest pass and are kept, so that a step allocates nothing for them.

use super::{experts::Grouping, product::Room};

/// One buffer for each role. A part of a block reads [`Scratch::normed`] and leaves what it adds to the residual stream in
/// `room.tiles`, from which a sweep takes it into [`Scratch::attended`] or [`Scratch::fed`].
#[derive(Default)]
pub(super) struct Scratch {
    /// The residual stream through a norm, `[rows, hidden]`.
    pub(super) normed: Vec<f32>,
    /// Queries, keys and values, `[rows, heads + 2 · kv_heads, head_size]`.
    pub(super) qkv: Vec<f32>,
    /// Values, mixed by each head, `[rows, heads, head_size]`.
    pub(super) mixed: Vec<f32>,
    /// What attention gives, `[rows, hidden]`.
    pub(super) attended: Vec<f32>,
    /// Gate and up projection of an expert, `[rows, 2 · intermediate]`.
    pub(super) gate_up: Vec<f32>,
    /// What the down projection reads, `[rows, intermediate]`.
    pub(super) inner: Vec<f32>,
    /// What the feed-forward part gives, `[rows, hidden]`.
    pub(super) fed: Vec<f32>,
    /// Of each row, whether a block put out a number that is not finite.
    pub(super) broken: Vec<bool>,
    /// The rows of a mixture of experts, by expert.
    pub(super) grouping: Grouping,
    /// What products need beside their operands.
    pub(super) room: Room,
}
