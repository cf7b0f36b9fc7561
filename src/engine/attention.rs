//! Attention of ragged rows over paged keys and values.
//!
//! Each query row is computed for itself: its scores against the keys that it sees in ascending order of position, a
//! softmax over exactly these, and their values added up in the same order. Rows are taken in tiles only so that a page
//! which was widened once serves several. So the result of a row depends on nothing but its own lane.

mod product;

use product::{Matrices, product_f32};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::{
    alibi::Alibi,
    block::Batch,
    floats::Stored,
    linear::Linear,
    load::{LoadError, Source},
    norm::Norm,
    pages::{PAGE_TOKENS, PageId},
    planes::{KvPlanes, Planes},
    rope::Angles,
    scratch::Scratch,
};
use crate::model::spec::AttentionSpec;

/// Rows that share a widened page. With 16 a page's conversion costs little beside its products.
const TILE_ROWS: usize = 16;
/// Multiplications below which a second thread costs more than it saves.
const MIN_PARALLEL: usize = 1 << 20;
/// The same for numbers that are normalised and rotated.
const MIN_PARALLEL_PLACING: usize = 1 << 16;

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

/// What the scores and sums depend on.
struct Kernel {
    heads: usize,
    kv_heads: usize,
    head_size: usize,
    scale: f32,
    window: Option<usize>,
    soft_cap: Option<f32>,
    sinks: Option<Vec<f32>>,
    alibi: Option<Alibi>,
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

    /// Attends from every row of `scratch.normed`, `[rows, hidden]`, after writing the rows' own keys and values to the cache.
    /// The result is left in `scratch.attended`.
    pub(super) fn forward(&self, batch: &Batch<'_>, cache: &mut KvPlanes, scratch: &mut Scratch) {
        let Scratch { normed, qkv, mixed, attended, room, .. } = scratch;
        let runs = batch.runs;
        self.qkv.forward(normed, qkv, room);
        self.place(qkv, batch.angles);
        match cache {
            KvPlanes::F32(planes) => self.kernel.run(qkv, runs, planes, mixed),
            KvPlanes::Bf16(planes) => self.kernel.run(qkv, runs, planes, mixed),
            KvPlanes::F16(planes) => self.kernel.run(qkv, runs, planes, mixed),
        }
        self.output.forward(mixed, attended, room);
    }

    /// Normalises and rotates the heads of all rows in place.
    fn place(&self, qkv: &mut [f32], angles: Option<&Angles>) {
        if angles.is_none() && self.q_norm.is_none() && self.k_norm.is_none() {
            return;
        }
        if qkv.len() < MIN_PARALLEL_PLACING {
            Arch::new().dispatch(Placing { attention: self, first_row: 0, qkv, angles });
        } else {
            qkv.par_chunks_mut(TILE_ROWS * self.kernel.row_width()).enumerate().for_each(|(index, qkv)| {
                let first_row = index * TILE_ROWS;
                Arch::new().dispatch(Placing { attention: self, first_row, qkv, angles });
            });
        }
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

/// Some rows of one run, for the query heads that share a key and value head.
struct Tile<'a> {
    run: &'a RowRun<'a>,
    first: usize,
    rows: usize,
    kv_head: usize,
}

impl Kernel {
    fn q_width(&self) -> usize {
        self.heads * self.head_size
    }

    fn row_width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_size
    }

    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// From `[rows, heads + 2 · kv_heads, head_size]` to `[rows, heads, head_size]`.
    fn run<T: Stored>(&self, qkv: &[f32], runs: &[RowRun<'_>], planes: &mut Planes<T>, mixed: &mut Vec<f32>) {
        let kv_width = self.kv_heads * self.head_size;
        for run in runs {
            for row in 0..run.rows {
                let values = &qkv[(run.first_row + row) * self.row_width()..][..self.row_width()];
                let (keys, values) = values[self.q_width()..].split_at(kv_width);
                let position = run.position + row;
                planes.store(run.pages[position / PAGE_TOKENS], position % PAGE_TOKENS, keys, values);
            }
        }

        let mut tiles = Vec::new();
        let mut work = 0;
        for run in runs {
            work += run.rows * (run.position + run.rows) * self.q_width();
            for first in (0..run.rows).step_by(TILE_ROWS) {
                let rows = TILE_ROWS.min(run.rows - first);
                tiles.extend((0..self.kv_heads).map(|kv_head| Tile { run, first, rows, kv_head }));
            }
        }
        let planes = &*planes;
        let attend = |tile: &Tile<'_>| self.attend(tile, qkv, planes);
        let results: Vec<Vec<f32>> = if work < MIN_PARALLEL || rayon::current_num_threads() < 2 {
            tiles.iter().map(attend).collect()
        } else {
            tiles.par_iter().map(attend).collect()
        };

        mixed.resize(qkv.len() / self.row_width() * self.q_width(), 0.0);
        let width = self.group() * self.head_size;
        for (tile, result) in tiles.iter().zip(results) {
            for (row, values) in result.chunks_exact(width).enumerate() {
                let start = (tile.run.first_row + tile.first + row) * self.q_width() + tile.kv_head * width;
                mixed[start..start + width].copy_from_slice(values);
            }
        }
    }

    /// The first position that a token at `position` sees.
    fn first_seen(&self, position: usize) -> usize {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))
    }

    /// `[rows, group, head_size]` of a tile.
    fn attend<T: Stored>(&self, tile: &Tile<'_>, qkv: &[f32], planes: &Planes<T>) -> Vec<f32> {
        let (group, size) = (self.group(), self.head_size);
        let width = group * size;
        let mut queries = Vec::with_capacity(tile.rows * width);
        for row in 0..tile.rows {
            let start = (tile.run.first_row + tile.first + row) * self.row_width() + tile.kv_head * width;
            queries.extend_from_slice(&qkv[start..start + width]);
        }

        let position = tile.run.position + tile.first;
        let end = position + tile.rows;
        let first_page = self.first_seen(position) / PAGE_TOKENS;
        let base = first_page * PAGE_TOKENS;
        let pages = || {
            let pages = &tile.run.pages[first_page..end.div_ceil(PAGE_TOKENS)];
            pages.iter().enumerate().map(move |(index, page)| {
                let start = index * PAGE_TOKENS;
                (*page, start, PAGE_TOKENS.min(end - base - start))
            })
        };
        let mut scratch = vec![0.0; PAGE_TOKENS * size];

        let stride = end - base;
        let mut scores = vec![0.0; tile.rows * group * stride];
        for (page, start, tokens) in pages() {
            let keys = T::widen(planes.keys(page, tile.kv_head, tokens), &mut scratch);
            product_f32(Matrices { x: &queries, w: keys, inputs: size, y: &mut scores, stride, column: start });
        }
        // Where each row's view begins and ends, counted from `base`.
        let seen = |row: usize| self.first_seen(position + row) - base..position + row + 1 - base;
        for (index, scores) in scores.chunks_exact_mut(stride).enumerate() {
            let head = tile.kv_head * group + index % group;
            let seen = seen(index / group);
            self.softmax(head, base + seen.start, &mut scores[seen]);
        }
        let mut mixed = vec![0.0; tile.rows * width];
        for (page, start, tokens) in pages() {
            let values = T::widen(planes.values(page, tile.kv_head, tokens), &mut scratch);
            for (index, mixed) in mixed.chunks_exact_mut(size).enumerate() {
                let seen = seen(index / group);
                let (from, to) = (seen.start.max(start), seen.end.min(start + tokens));
                if from < to {
                    let weights = &scores[index * stride..][from..to];
                    Arch::new().dispatch(Mix { weights, values: &values[(from - start) * size..], mixed });
                }
            }
        }
        mixed
    }

    /// From the products of `head` with the keys from position `first` on to their weights.
    fn softmax(&self, head: usize, first: usize, scores: &mut [f32]) {
        let sink = self.sinks.as_ref().map(|sinks| sinks[head]);
        let mut highest = sink.unwrap_or(f32::NEG_INFINITY);
        for (index, score) in scores.iter_mut().enumerate() {
            *score *= self.scale;
            if let Some(cap) = self.soft_cap {
                *score = cap * (*score / cap).tanh();
            }
            if let Some(alibi) = &self.alibi {
                *score += alibi.bias(head, first + index);
            }
            highest = highest.max(*score);
        }
        let mut sum = sink.map_or(0.0, |sink| (sink - highest).exp());
        for score in scores.iter_mut() {
            *score = (*score - highest).exp();
            sum += *score;
        }
        for score in scores {
            *score /= sum;
        }
    }
}

/// `mixed += Σ weights[t] · values[t]`, in the order of `t`.
struct Mix<'a> {
    weights: &'a [f32],
    /// `[tokens, head_size]`, at least as many tokens as weights.
    values: &'a [f32],
    /// `[head_size]`.
    mixed: &'a mut [f32],
}

impl WithSimd for Mix<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let size = self.mixed.len();
        let (vectors, rest) = S::as_mut_simd_f32s(self.mixed);
        for (index, sum) in vectors.iter_mut().enumerate() {
            let mut total = *sum;
            for (weight, values) in self.weights.iter().zip(self.values.chunks_exact(size)) {
                total = simd.mul_add_e_f32s(simd.splat_f32s(*weight), S::as_simd_f32s(values).0[index], total);
            }
            *sum = total;
        }
        let start = size - rest.len();
        for (weight, values) in self.weights.iter().zip(self.values.chunks_exact(size)) {
            for (sum, value) in rest.iter_mut().zip(&values[start..]) {
                *sum += weight * value;
            }
        }
    }
}

#[cfg(test)]
mod tests;
