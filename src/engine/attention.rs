//! Attention of ragged rows over paged keys and values.
//!
//! A row's result depends on nothing but its own lane: what it is made of is added up in an order that positions alone decide
//! (`engine/attention/tile.rs`).

mod kernel;
mod tile;

use std::ops::Range;

use kernel::Kernel;
use pulp::{Simd, WithSimd};

use super::{
    alibi::Alibi,
    block::Batch,
    kernels::{Path, Rows, Slot, fill_all, on_vectors},
    linear::Linear,
    load::{LoadError, Source},
    norm::Norm,
    pages::PageId,
    planes::KvPlanes,
    product::Tiles,
    rope::Angles,
    scratch::Scratch,
    threads,
};
use crate::model::spec::AttentionSpec;

/// Numbers that are normalised and rotated below which a second thread costs more than it saves.
const MIN_PARALLEL_PLACING: usize = 1 << 13;
/// Rows that a thread places at a time, at most.
const PLACED_AT_ONCE: usize = 8;

/// Consecutive rows of a pass that belong to one lane.
pub(super) struct RowRun<'a> {
    /// The first of them.
    pub(super) first_row: usize,
    /// How many they are.
    pub(super) rows: usize,
    /// The first one's position in its lane.
    pub(super) position: usize,
    /// The lane's pages, enough for all of the rows.
    pub(super) pages: &'a [PageId],
}

/// A block's attention.
pub(super) struct Attention {
    qkv: Linear,
    output: Linear,
    q_norm: Option<Norm>,
    k_norm: Option<Norm>,
    kernel: Kernel,
}

impl Attention {
    pub(super) fn load(spec: &AttentionSpec, source: &mut Source<'_>) -> Result<Self, LoadError> {
        let (mut q_norm, mut k_norm) = (None, None);
        if let Some(norms) = &spec.qk_norm {
            q_norm = Some(Norm::load(&norms.q, spec.head_size, source)?);
            k_norm = Some(Norm::load(&norms.k, spec.head_size, source)?);
        }
        Ok(Self {
            qkv: Linear::load(&[&spec.q, &spec.k, &spec.v], source)?,
            output: Linear::load(&[&spec.o], source)?,
            q_norm,
            k_norm,
            kernel: Kernel {
                heads: spec.heads,
                kv_heads: spec.kv_heads,
                head_size: spec.head_size,
                scale: spec.scale as f32,
                window: spec.window,
                soft_cap: spec.soft_cap.map(|cap| cap as f32),
                sinks: spec.sinks.as_ref().map(|name| source.vector(name, spec.heads)).transpose()?,
                alibi: spec.alibi.as_ref().map(|alibi| Alibi::new(alibi, spec.heads)),
            },
        })
    }

    /// Places for the rows that it reads, besides `scratch.normed`.
    pub(super) fn slots<'a>(&self, rows: usize, prepared: &'a mut Vec<Rows>) -> Vec<Slot<'a>> {
        self.qkv.slots(rows, prepared)
    }

    /// Attends from every row of `scratch.normed`, `[rows, hidden]`, whose rows are also in the places that [`Attention::slots`] gave, after
    /// writing the rows' own keys and values to the cache. The result is left for [`Attention::collect`].
    pub(super) fn forward(&self, batch: &Batch<'_>, cache: &mut KvPlanes, scratch: &mut Scratch) {
        let Scratch { normed, qkv, mixed, room, .. } = scratch;
        self.qkv.multiply(normed, room);
        let rows = room.tiles.rows();
        qkv.resize(rows * self.kernel.row_width(), 0.0);
        self.place(&room.tiles, qkv, batch.angles);
        self.kernel.run(qkv, batch.runs, cache, mixed);
        fill_all(self.output.slots(rows, &mut room.rows), mixed, Path::chosen());
        self.output.multiply(mixed, room);
    }

    /// Takes some rows of the result into `attended`, `[rows, hidden]`.
    pub(super) fn collect(&self, tiles: &Tiles, rows: Range<usize>, attended: &mut [f32]) {
        self.output.collect(tiles, rows, attended);
    }

    /// Takes queries, keys and values of all rows out of the tiles, normalised and rotated.
    fn place(&self, tiles: &Tiles, qkv: &mut [f32], angles: Option<&Angles>) {
        let width = self.kernel.row_width();
        let at_once = tiles.rows().div_ceil(2 * rayon::current_num_threads()).min(PLACED_AT_ONCE);
        let is_worth_it = qkv.len() >= MIN_PARALLEL_PLACING;
        let parts: Vec<_> = (0..).step_by(at_once).zip(qkv.chunks_mut(at_once * width)).collect();
        threads::each(parts, is_worth_it, |(first_row, qkv)| {
            self.qkv.collect(tiles, first_row..first_row + qkv.len() / width, qkv);
            if angles.is_some() || self.q_norm.is_some() || self.k_norm.is_some() {
                on_vectors(Placing { attention: self, first_row, qkv, angles });
            }
        });
    }
}

/// Some rows whose queries and keys are normalised and rotated.
struct Placing<'a> {
    attention: &'a Attention,
    /// The first of them, among those that there are angles for.
    first_row: usize,
    qkv: &'a mut [f32],
    angles: Option<&'a Angles>,
}

impl WithSimd for Placing<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Attention { q_norm, k_norm, kernel, .. } = self.attention;
        for (row, values) in self.qkv.chunks_exact_mut(kernel.row_width()).enumerate() {
            let heads = values.chunks_exact_mut(kernel.head_size).take(kernel.heads + kernel.kv_heads);
            for (index, head) in heads.enumerate() {
                if let Some(norm) = if index < kernel.heads { q_norm } else { k_norm } {
                    norm.normalise_row(simd, head);
                }
                if let Some(angles) = self.angles {
                    angles.rotate(self.first_row + row, head);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
