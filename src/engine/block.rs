//! The one block: runs whatever a [`BlockSpec`] says.
//!
//! Between its two parts, attention and feed-forward, a block goes over the rows in three sweeps: into the first norm, from the
//! first part to the second, and from the second part to the block's end. A sweep does all that there is to do to a row while it
//! is in the nearest cache: norms, the residual sum, the rounding to the wire format, the search for numbers that are not finite.

use pulp::{Simd, WithSimd};

use super::{
    attention::{Attention, RowRun},
    ffn::Ffn,
    hidden,
    kernels::on_vectors,
    load::{LoadError, Source},
    norm::Norm,
    planes::KvPlanes,
    rope::Angles,
    scratch::Scratch,
};
use crate::model::{
    Dtype,
    spec::{BlockSpec, NormSpec, ResidualOrder},
};

/// Numbers of a sweep below which a second thread costs more than it saves.
const MIN_PARALLEL: usize = 1 << 15;

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
    /// What the rows are rounded to, in order: so many rows to such a format.
    pub(super) wires: &'a [(usize, Dtype)],
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

    /// Runs the rows `x`, `[rows, hidden]`, through the block, in place. `scratch.broken` then says which of them have numbers
    /// that are not finite.
    ///
    /// The sums are in f32; what leaves the block is rounded to each row's wire format, whether or not it travels, so
    /// that the place of a cut between two nodes can't change a bit.
    pub(super) fn forward(&self, x: &mut [f32], batch: &Batch<'_>, cache: &mut KvPlanes, scratch: &mut Scratch) {
        scratch.normed.resize(x.len(), 0.0);
        scratch.attended.resize(x.len(), 0.0);
        scratch.fed.resize(x.len(), 0.0);
        scratch.broken.resize(x.len() / self.hidden, false);
        self.sweep(Stage::Begin, Rows::new(x, scratch));
        self.attention.forward(batch, cache, scratch);
        self.sweep(Stage::Middle, Rows::new(x, scratch));
        self.ffn.forward(scratch);
        let mut rest = Rows::new(x, scratch);
        for (rows, wire) in batch.wires {
            let (these, others) = rest.split(*rows, self.hidden);
            self.sweep(Stage::End(*wire), these);
            rest = others;
        }
    }

    fn sweep(&self, stage: Stage, rows: Rows<'_>) {
        let count = rows.broken.len();
        if rows.x.len() < MIN_PARALLEL || count < 2 {
            on_vectors(Sweep { block: self, stage, rows });
        } else {
            let (above, below) = rows.split(count / 2, self.hidden);
            rayon::join(|| self.sweep(stage, above), || self.sweep(stage, below));
        }
    }
}

/// Where in a block a sweep is.
#[derive(Clone, Copy)]
enum Stage {
    /// Before attention.
    Begin,
    /// Between attention and feed-forward part.
    Middle,
    /// Behind the feed-forward part, with the rows' wire format.
    End(Dtype),
}

/// Some rows of the buffers that sweeps go over, each `[rows, hidden]`.
struct Rows<'a> {
    x: &'a mut [f32],
    normed: &'a mut [f32],
    attended: &'a mut [f32],
    fed: &'a mut [f32],
    /// `[rows]`.
    broken: &'a mut [bool],
}

impl<'a> Rows<'a> {
    fn new(x: &'a mut [f32], scratch: &'a mut Scratch) -> Self {
        let Scratch { normed, attended, fed, broken, .. } = scratch;
        Self { x, normed, attended, fed, broken }
    }

    /// The first `rows` rows, and the others.
    fn split(self, rows: usize, hidden: usize) -> (Self, Self) {
        let (x, other_x) = self.x.split_at_mut(rows * hidden);
        let (normed, other_normed) = self.normed.split_at_mut(rows * hidden);
        let (attended, other_attended) = self.attended.split_at_mut(rows * hidden);
        let (fed, other_fed) = self.fed.split_at_mut(rows * hidden);
        let (broken, other_broken) = self.broken.split_at_mut(rows);
        let others =
            Self { x: other_x, normed: other_normed, attended: other_attended, fed: other_fed, broken: other_broken };
        (Self { x, normed, attended, fed, broken }, others)
    }
}

struct Sweep<'a> {
    block: &'a Block,
    stage: Stage,
    rows: Rows<'a>,
}

impl WithSimd for Sweep<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { block, stage, rows } = self;
        let Rows { x, normed, attended, fed, broken } = rows;
        let hidden = block.hidden;
        let parts = normed.chunks_exact_mut(hidden).zip(attended.chunks_exact_mut(hidden));
        let streams = x.chunks_exact_mut(hidden).zip(fed.chunks_exact_mut(hidden));
        for (((x, fed), (normed, attended)), broken) in streams.zip(parts).zip(broken) {
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
                Stage::End(wire) => {
                    if let Some(norm) = &block.ffn_output_norm {
                        norm.normalise_row(simd, fed);
                    }
                    match block.residual {
                        ResidualOrder::Sequential => {}
                        ResidualOrder::Parallel => add(fed, attended),
                        ResidualOrder::AfterNorm => x.copy_from_slice(normed),
                    }
                    add(x, fed);
                    hidden::round(wire, x);
                    *broken = !hidden::is_finite(x);
                }
            }
        }
    }
}

#[inline(always)]
fn add(sum: &mut [f32], x: &[f32]) {
    sum.iter_mut().zip(x).for_each(|(sum, x)| *sum += x);
}
