//! The one block: runs whatever a [`BlockSpec`] says.
//!
//! Between its two parts, attention and feed-forward, a block goes over the rows in two sweeps: from the first part to the second, and
//! from the second part over the block's end to the next block's first. A sweep takes a group of rows, as many as products take at a time,
//! and does all that there is to do to them while they are in the nearest cache: it takes them out of the tiles of the product before,
//! norms, the residual sum, the rounding to the wire format, the search for numbers that are not finite, and puts them where the
//! product after it reads them. Threads share the groups.

use std::ops::Range;

use pulp::{Simd, WithSimd};

use super::{
    attention::{Attention, RowRun},
    ffn::Ffn,
    hidden,
    kernels::{Path, cut, on_vectors},
    linear::plain_slots,
    load::{LoadError, Source},
    norm::Norm,
    planes::KvPlanes,
    product::{Room, Tiles},
    rope::Angles,
    scratch::Scratch,
    threads,
};
use crate::model::{
    Dtype,
    spec::{BlockSpec, NormSpec, ResidualOrder},
};

/// Numbers of a sweep below which a second thread costs more than it saves.
const MIN_PARALLEL: usize = 1 << 13;

/// A loaded block.
pub(super) struct Block {
    residual: ResidualOrder,
    attention_norm: Norm,
    attention: Attention,
    attention_output_norm: Option<Norm>,
    /// `None` if both parts read through the same norm.
    ffn_norm: Option<Norm>,
    ffn: Ffn,
    ffn_output_norm: Option<Norm>,
    hidden: usize,
}

/// The rows of a pass at one block.
pub(super) struct Batch<'a> {
    /// The rows by lane.
    pub(super) runs: &'a [RowRun<'a>],
    /// Rotary angles of the rows, where the block has them.
    pub(super) angles: Option<&'a Angles>,
    /// What each row is rounded to, `[rows]`.
    pub(super) wires: &'a [Dtype],
    /// The block that the rows run through after this one, in the same pass.
    pub(super) next: Option<&'a Block>,
}

impl Block {
    pub(super) fn load(spec: &BlockSpec, hidden: usize, source: &mut Source<'_>) -> Result<Self, LoadError> {
        let shared = spec.residual == ResidualOrder::Parallel && spec.attention_norm == spec.ffn_norm;
        let ffn_norm = Some(&spec.ffn_norm).filter(|_| !shared);
        let mut norm = |spec: Option<&NormSpec>| spec.map(|spec| Norm::load(spec, hidden, source)).transpose();
        Ok(Self {
            residual: spec.residual,
            ffn_norm: norm(ffn_norm)?,
            attention_output_norm: norm(spec.attention_output_norm.as_ref())?,
            ffn_output_norm: norm(spec.ffn_output_norm.as_ref())?,
            attention_norm: Norm::load(&spec.attention_norm, hidden, source)?,
            attention: Attention::load(&spec.attention, source)?,
            ffn: Ffn::load(&spec.ffn, hidden, source)?,
            hidden,
        })
    }

    /// Makes the rows `x`, `[rows, hidden]`, ready for the block: the first of a pass, for the others' rows the block before them does.
    pub(super) fn begin(&self, x: &mut [f32], batch: &Batch<'_>, scratch: &mut Scratch) {
        scratch.normed.resize(x.len(), 0.0);
        scratch.attended.resize(x.len(), 0.0);
        scratch.fed.resize(x.len(), 0.0);
        scratch.broken.resize(x.len() / self.hidden, false);
        self.sweep(Stage::Begin, x, batch.wires, scratch);
    }

    /// Runs the rows `x`, `[rows, hidden]`, through the block, in place, and makes them ready for the next. `scratch.broken` then says
    /// which of them have numbers that are not finite.
    ///
    /// The sums are in f32; what leaves the block is rounded to each row's wire format, whether or not it travels, so
    /// that the place of a cut between two nodes can't change a bit.
    pub(super) fn forward(&self, x: &mut [f32], batch: &Batch<'_>, cache: &mut KvPlanes, scratch: &mut Scratch) {
        self.attention.forward(batch, cache, scratch);
        self.sweep(Stage::Middle, x, batch.wires, scratch);
        self.ffn.forward(scratch);
        self.sweep(Stage::End { next: batch.next }, x, batch.wires, scratch);
    }

    fn sweep(&self, stage: Stage<'_>, x: &mut [f32], wires: &[Dtype], scratch: &mut Scratch) {
        let Scratch { normed, attended, fed, broken, room: Room { rows: prepared, tiles, .. }, .. } = scratch;
        let count = broken.len();
        let slots = match stage {
            Stage::Begin => self.attention.slots(count, prepared),
            Stage::Middle => self.ffn.slots(count, prepared),
            Stage::End { next: Some(next) } => next.attention.slots(count, prepared),
            Stage::End { next: None } => plain_slots(count),
        };
        let is_worth_it = x.len() >= MIN_PARALLEL;
        let (mut x, mut normed, mut attended) = (x, &mut normed[..], &mut attended[..]);
        let (mut fed, mut broken) = (&mut fed[..], &mut broken[..]);
        let tasks = slots.into_iter().map(|slot| {
            let (place, count) = (slot.rows(), slot.rows().len());
            let rows = Rows {
                x: cut(&mut x, count * self.hidden),
                normed: cut(&mut normed, count * self.hidden),
                attended: cut(&mut attended, count * self.hidden),
                fed: cut(&mut fed, count * self.hidden),
                broken: cut(&mut broken, count),
                wires: &wires[place.clone()],
                place,
            };
            (slot, rows)
        });
        threads::each(tasks.collect(), is_worth_it, |(slot, mut rows)| {
            on_vectors(Sweep { block: self, stage, tiles, rows: &mut rows });
            slot.fill(rows.normed, Path::chosen());
        });
    }
}

/// Where in a block a sweep is.
#[derive(Clone, Copy)]
enum Stage<'a> {
    /// Before attention.
    Begin,
    /// Between attention and feed-forward part.
    Middle,
    /// Behind the feed-forward part, and before the attention of the next block.
    End { next: Option<&'a Block> },
}

/// A group of rows of the buffers that sweeps go over, each `[rows, hidden]`.
struct Rows<'a> {
    x: &'a mut [f32],
    normed: &'a mut [f32],
    attended: &'a mut [f32],
    fed: &'a mut [f32],
    /// `[rows]`.
    broken: &'a mut [bool],
    /// What the rows are rounded to.
    wires: &'a [Dtype],
    /// Which rows they are.
    place: Range<usize>,
}

struct Sweep<'a, 'b> {
    block: &'a Block,
    stage: Stage<'a>,
    /// What the part before the sweep gave.
    tiles: &'a Tiles,
    rows: &'a mut Rows<'b>,
}

impl WithSimd for Sweep<'_, '_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { block, stage, tiles, rows } = self;
        let Rows { x, normed, attended, fed, broken, wires, place } = rows;
        match stage {
            Stage::Begin => {}
            Stage::Middle => block.attention.collect(tiles, place.clone(), attended),
            Stage::End { .. } => block.ffn.collect(tiles, place.clone(), fed),
        }
        let hidden = block.hidden;
        let parts = normed.chunks_exact_mut(hidden).zip(attended.chunks_exact_mut(hidden));
        let streams = x.chunks_exact_mut(hidden).zip(fed.chunks_exact_mut(hidden));
        let ends = broken.iter_mut().zip(*wires);
        for (((x, fed), (normed, attended)), (broken, wire)) in streams.zip(parts).zip(ends) {
            match stage {
                Stage::Begin => {
                    normed.copy_from_slice(x);
                    block.attention_norm.normalise_row(simd, normed);
                }
                Stage::Middle => {
                    if let Some(norm) = &block.attention_output_norm {
                        norm.normalise_row(simd, attended);
                    }
                    match block.residual {
                        ResidualOrder::Sequential => {
                            add(x, attended);
                            normed.copy_from_slice(x);
                        }
                        ResidualOrder::Parallel if block.ffn_norm.is_some() => normed.copy_from_slice(x),
                        ResidualOrder::Parallel => {}
                        ResidualOrder::AfterNorm => add(normed, attended),
                    }
                    if let Some(norm) = &block.ffn_norm {
                        norm.normalise_row(simd, normed);
                    }
                }
                Stage::End { next } => {
                    if let Some(norm) = &block.ffn_output_norm {
                        norm.normalise_row(simd, fed);
                    }
                    match block.residual {
                        ResidualOrder::Sequential => {}
                        ResidualOrder::Parallel => add(fed, attended),
                        ResidualOrder::AfterNorm => x.copy_from_slice(normed),
                    }
                    add(x, fed);
                    hidden::round(*wire, x);
                    *broken = !hidden::is_finite(x);
                    if let Some(next) = next {
                        normed.copy_from_slice(x);
                        next.attention_norm.normalise_row(simd, normed);
                    }
                }
            }
        }
    }
}

#[inline(always)]
fn add(sum: &mut [f32], x: &[f32]) {
    sum.iter_mut().zip(x).for_each(|(sum, x)| *sum += x);
}
