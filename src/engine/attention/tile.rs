//! The rows of one tile over the pages of their lane: scores, softmax and sum in one sweep.
//!
//! The softmax is taken as it comes (Milakov and Gimelshein 2018; Dao et al. 2022): a query keeps the highest score so far,
//! the sum of its weights and the sum of the weighted values, and where a block of [`BLOCK`] positions has a higher score,
//! scales both sums down to it. So what is needed at a time is a block, however long the context.
//!
//! # One order
//!
//! A result has the same bits for every way of cutting steps, tiles and threads, and on every width of vectors:
//!
//! - a score is one chain of fused multiply-adds over the head's numbers, a sum of values one chain over positions;
//! - weights are added up in [`PAGE_TOKENS`] partial sums by the position's place in its page, and these at the end in a
//!   fixed tree;
//! - blocks begin at multiples of [`BLOCK`] positions, wherever a step begins. Positions that a query doesn't see have no
//!   part in its chains, and add a weight of exactly 0 to the partial sums.
//!
//! Several queries, pages or columns side by side are independent chains, as many as hide the latency of an addition.

#![allow(clippy::needless_range_loop, reason = "the loops count registers, which several arrays have a part of")]

use std::{iter, mem, ops::Range};

use pulp::{Simd, WithSimd};

use super::kernel::Kernel;
use crate::engine::{
    exp::{exp, tanh},
    floats::{Stored, widen},
    pages::{PAGE_TOKENS, PageId},
    planes::Planes,
};

/// Positions between two looks at the highest score.
pub(super) const BLOCK: usize = BLOCK_PAGES * PAGE_TOKENS;
/// Pages of a block.
const BLOCK_PAGES: usize = 4;
/// Queries side by side. Six chains of 16 numbers, 16 of a page and one of a query fit the 16 registers of AVX2.
const BAND: usize = 6;
/// Queries from which on a page is widened once instead of for each band.
const WIDEN_QUERIES: usize = 2 * BAND;
/// The places of a page's tokens.
const PLACES: [f32; PAGE_TOKENS] =
    [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0, 13.0, 14.0, 15.0];

/// Attention of a tile's rows, which are consecutive in their lane.
pub(super) struct Attend<'a, T> {
    pub(super) kernel: &'a Kernel,
    pub(super) planes: &'a Planes<T>,
    /// The lane's pages.
    pub(super) pages: &'a [PageId],
    /// The first row's position.
    pub(super) position: usize,
    pub(super) kv_head: usize,
    /// `[rows, heads + 2 · kv_heads, head_size]`.
    pub(super) qkv: &'a [f32],
    /// The result, `[rows, group, head_size]`.
    pub(super) mixed: &'a mut [f32],
    pub(super) room: &'a mut TileRoom,
}

/// What a tile needs besides its result, kept for the thread's next one. Its size depends on the tile and not on the context.
#[derive(Default)]
pub(super) struct TileRoom {
    /// The queries in bands, each `[head_size, queries of the band]`.
    queries: Vec<f32>,
    /// Scores and then weights, `[queries, BLOCK]`.
    scores: Vec<f32>,
    states: Vec<State>,
    /// Biases of the block's positions, `[group, BLOCK]`.
    biases: Vec<f32>,
    /// A page's keys or values as f32.
    wide: Vec<f32>,
}

/// What a query has seen so far, besides its sum of values.
#[derive(Clone, Copy)]
struct State {
    highest: f32,
    /// Partial sums of the weights.
    sums: [f32; PAGE_TOKENS],
}

/// The part of a lane that is in hand.
#[derive(Clone, Copy)]
struct Block {
    /// Its first position.
    base: usize,
    /// The positions that some query of the tile sees.
    from: usize,
    to: usize,
}

impl Block {
    /// Its pages with these positions, counted from its first.
    #[inline(always)]
    fn places(self) -> Range<usize> {
        let first = self.base / PAGE_TOKENS;
        self.from / PAGE_TOKENS - first..self.to.div_ceil(PAGE_TOKENS) - first
    }
}

/// Places of a page, or of a block, that a query sees.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Seen {
    from: usize,
    to: usize,
}

/// All of a page.
const ALL: Seen = Seen { from: 0, to: PAGE_TOKENS };

impl Seen {
    #[inline(always)]
    fn is_empty(self) -> bool {
        self.from >= self.to
    }

    /// The pages of a block with these places.
    #[inline(always)]
    fn places(self) -> Range<usize> {
        self.from / PAGE_TOKENS..self.to.div_ceil(PAGE_TOKENS)
    }

    /// Places of one page, from places of the block.
    #[inline(always)]
    fn of_page(self, page: usize) -> Self {
        let place = |position: usize| position.saturating_sub(page * PAGE_TOKENS).min(PAGE_TOKENS);
        Self { from: place(self.from), to: place(self.to) }
    }
}

impl<T: Stored> WithSimd for Attend<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        self.run(simd);
    }
}

/// Calls a function of `N`, the registers that 16 numbers take.
macro_rules! by_width {
    ($of:ident.$function:ident($simd:ident)) => {
        match S::F32_LANES {
            16 => $of.$function::<S, 1>($simd),
            8 => $of.$function::<S, 2>($simd),
            4 => $of.$function::<S, 4>($simd),
            _ => $of.$function::<S, 16>($simd),
        }
    };
}

/// Sixteen numbers.
type Sixteen<S, const N: usize> = [<S as Simd>::f32s; N];

#[inline(always)]
fn load<S: Simd, const N: usize>(simd: S, from: &[f32; 16]) -> Sixteen<S, N> {
    let mut vectors = [simd.splat_f32s(0.0); N];
    for (vector, from) in vectors.iter_mut().zip(S::as_simd_f32s(from).0) {
        *vector = *from;
    }
    vectors
}

#[inline(always)]
fn store<S: Simd, const N: usize>(to: &mut [f32; 16], vectors: Sixteen<S, N>) {
    for (to, vector) in S::as_mut_simd_f32s(to).0.iter_mut().zip(vectors) {
        *to = vector;
    }
}

/// The sum of 16 numbers, in a fixed tree.
#[inline(always)]
fn sum(mut numbers: [f32; 16]) -> f32 {
    for half in [8, 4, 2, 1] {
        for index in 0..half {
            numbers[index] += numbers[index + half];
        }
    }
    numbers[0]
}

impl<T: Stored> Attend<'_, T> {
    #[inline(always)]
    fn run<S: Simd>(mut self, simd: S) {
        let (size, group) = (self.kernel.head_size, self.kernel.group());
        let queries = self.mixed.len() / size;
        let rows = queries / group;
        self.begin(queries);
        let (first, end) = (self.kernel.first_seen(self.position), self.position + rows);
        for base in (first / BLOCK * BLOCK..end).step_by(BLOCK) {
            let block = Block { base, from: first.max(base), to: end.min(base + BLOCK) };
            self.score(simd, block);
            self.bias(block);
            self.weigh(simd, block);
            self.mix(simd, block);
        }
        for (mixed, state) in self.mixed.chunks_exact_mut(size).zip(&self.room.states) {
            let total = sum(state.sums);
            for mixed in mixed {
                *mixed /= total;
            }
        }
    }

    /// Makes room, packs the queries and sets the states.
    #[inline(always)]
    fn begin(&mut self, queries: usize) {
        let Self { kernel, room, .. } = self;
        let (size, group) = (kernel.head_size, kernel.group());
        room.queries.resize(queries * size, 0.0);
        room.scores.resize(queries * BLOCK, 0.0);
        room.wide.resize(size * PAGE_TOKENS, 0.0);
        room.biases.resize(if kernel.alibi.is_some() { group * BLOCK } else { 0 }, 0.0);
        for band in bands(queries) {
            let packed = &mut room.queries[band.start * size..band.end * size];
            for (index, query) in band.clone().enumerate() {
                let start = query / group * kernel.row_width() + (self.kv_head * group + query % group) * size;
                for (packed, value) in packed[index..].iter_mut().step_by(band.len()).zip(&self.qkv[start..][..size]) {
                    *packed = *value;
                }
            }
        }
        room.states.clear();
        room.states.extend((0..queries).map(|query| {
            let mut state = State { highest: f32::NEG_INFINITY, sums: [0.0; PAGE_TOKENS] };
            // A sink is a score without a value.
            if let Some(sinks) = &kernel.sinks {
                state.highest = sinks[self.kv_head * group + query % group];
                state.sums[0] = 1.0;
            }
            state
        }));
        self.mixed.fill(0.0);
    }

    /// The places of `block` that `query` sees; none if `to` is not above `from`.
    #[inline(always)]
    fn seen(&self, block: Block, query: usize) -> Seen {
        let position = self.position + query / self.kernel.group();
        let (from, to) = (self.kernel.first_seen(position), position + 1);
        let place = |position: usize| position.saturating_sub(block.base).min(BLOCK);
        Seen { from: place(from), to: place(to) }
    }

    /// Products of the queries with the keys of a block.
    #[inline(always)]
    fn score<S: Simd>(&mut self, simd: S, block: Block) {
        let (size, queries, places) = (self.kernel.head_size, self.room.states.len(), block.places());
        // Places without a page have another's: what is computed for them is not looked at.
        let mut keys: [&[T]; BLOCK_PAGES] = [&[]; BLOCK_PAGES];
        for (place, keys) in keys.iter_mut().enumerate() {
            let page = block.base / PAGE_TOKENS + place.clamp(places.start, places.end - 1);
            *keys = self.planes.keys(self.pages[page], self.kv_head);
        }
        let room = &mut *self.room;
        if queries < WIDEN_QUERIES {
            for band in bands(queries) {
                let scores = &mut room.scores[band.start * BLOCK..band.end * BLOCK];
                let queries = &room.queries[band.start * size..band.end * size];
                simd.vectorize(Products::<T, BLOCK_PAGES> { queries, keys, places: places.clone(), scores });
            }
            return;
        }
        let mut wide = mem::take(&mut room.wide);
        for place in places {
            let keys = [widen_all(keys[place], &mut wide)];
            for band in bands(queries) {
                let last = self.seen(block, band.end - 1).of_page(place);
                if self.seen(block, band.start).of_page(place).from < PAGE_TOKENS && last.to > 0 {
                    let scores = &mut self.room.scores[band.start * BLOCK..band.end * BLOCK];
                    let queries = &self.room.queries[band.start * size..band.end * size];
                    simd.vectorize(Products::<f32, 1> { queries, keys, places: place..place + 1, scores });
                }
            }
        }
        self.room.wide = wide;
    }

    /// Biases of a block's positions.
    #[inline(always)]
    fn bias(&mut self, block: Block) {
        let Some(alibi) = &self.kernel.alibi else { return };
        let group = self.kernel.group();
        for (index, biases) in self.room.biases.chunks_exact_mut(BLOCK).enumerate() {
            alibi.biases(self.kv_head * group + index, block.base, biases);
        }
    }

    /// From the queries' products with the keys of a block to their weights.
    #[inline(always)]
    fn weigh<S: Simd>(&mut self, simd: S, block: Block) {
        let (size, group) = (self.kernel.head_size, self.kernel.group());
        let mut scales = [[[1.0; PAGE_TOKENS]; BLOCK_PAGES]; 2];
        if T::SCALED {
            for place in block.places() {
                let page = self.pages[block.base / PAGE_TOKENS + place];
                scales[0][place] = *self.planes.key_scales(page, self.kv_head);
                scales[1][place] = *self.planes.value_scales(page, self.kv_head);
            }
        }
        for query in 0..self.room.states.len() {
            let seen = self.seen(block, query);
            let room = &mut *self.room;
            let biases = room.biases.as_chunks::<PAGE_TOKENS>().0;
            simd.vectorize(Weigh {
                kernel: self.kernel,
                seen,
                scales: T::SCALED.then_some(&scales),
                biases: biases.get(query % group * BLOCK_PAGES..).unwrap_or_default(),
                state: &mut room.states[query],
                scores: &mut room.scores[query * BLOCK..][..BLOCK].as_chunks_mut().0[..BLOCK_PAGES],
                mixed: &mut self.mixed[query * size..][..size],
            });
        }
    }

    /// Adds the values of a block, weighted.
    #[inline(always)]
    fn mix<S: Simd>(&mut self, simd: S, block: Block) {
        let queries = self.room.states.len();
        let mut wide = mem::take(&mut self.room.wide);
        for place in block.places() {
            let values = self.planes.values(self.pages[block.base / PAGE_TOKENS + place], self.kv_head);
            if queries < WIDEN_QUERIES {
                self.mix_page(simd, block, place, values);
            } else {
                self.mix_page(simd, block, place, widen_all(values, &mut wide));
            }
        }
        self.room.wide = wide;
    }

    #[inline(always)]
    fn mix_page<S: Simd, V: Stored>(&mut self, simd: S, block: Block, place: usize, values: &[V]) {
        let size = self.kernel.head_size;
        for band in bands(self.room.states.len()) {
            let seen = self.seen(block, band.start).of_page(place);
            // Side by side only what sees the same.
            let together = if seen == self.seen(block, band.end - 1).of_page(place) { band.len() } else { 1 };
            for first in band.step_by(together) {
                let seen = self.seen(block, first).of_page(place);
                let weights = &self.room.scores[first * BLOCK + place * PAGE_TOKENS..];
                let mixed = &mut self.mixed[first * size..][..together * size];
                simd.vectorize(Sums { weights, mixed, size, values, seen });
            }
        }
    }
}

/// The queries of a tile in bands of 6, 4, 2 and 1.
#[inline(always)]
fn bands(queries: usize) -> impl Iterator<Item = Range<usize>> {
    let mut first = 0;
    iter::from_fn(move || {
        let width = match queries - first {
            0 => return None,
            1 => 1,
            2 | 3 => 2,
            4 | 5 => 4,
            _ => BAND,
        };
        first += width;
        Some(first - width..first)
    })
}

/// `numbers` as f32: themselves, or in `wide`.
#[inline(always)]
fn widen_all<'a, T: Stored>(numbers: &'a [T], wide: &'a mut [f32]) -> &'a [f32] {
    if let Some(numbers) = T::as_f32(numbers) {
        return numbers;
    }
    for (wide, number) in wide.iter_mut().zip(numbers) {
        *wide = number.widen();
    }
    wide
}

#[inline(always)]
fn first_lane<S: Simd>(simd: S, vector: S::f32s) -> f32 {
    let mut lanes = [0.0; PAGE_TOKENS];
    simd.partial_store_f32s(&mut lanes[..S::F32_LANES], vector);
    lanes[0]
}

/// One query's scores of a block, on their way to weights.
struct Weigh<'a> {
    kernel: &'a Kernel,
    seen: Seen,
    /// Of the keys and of the values, where they are codes.
    scales: Option<&'a [[[f32; PAGE_TOKENS]; BLOCK_PAGES]; 2]>,
    /// None if there are no biases.
    biases: &'a [[f32; PAGE_TOKENS]],
    state: &'a mut State,
    scores: &'a mut [[f32; PAGE_TOKENS]],
    /// `[head_size]`.
    mixed: &'a mut [f32],
}

impl WithSimd for Weigh<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        by_width!(self.run(simd));
    }
}

impl Weigh<'_> {
    #[inline(always)]
    fn run<S: Simd, const N: usize>(self, simd: S) {
        let Self { kernel, seen, scales, biases, state, scores, mixed } = self;
        if seen.is_empty() {
            return;
        }
        let lowest = simd.splat_f32s(f32::NEG_INFINITY);
        let mut highest = lowest;
        for place in seen.places() {
            let mut score: Sixteen<S, N> = load(simd, &scores[place]);
            if let Some([scales, _]) = scales {
                let scales: Sixteen<S, N> = load(simd, &scales[place]);
                for n in 0..N {
                    score[n] = simd.mul_f32s(score[n], scales[n]);
                }
            }
            for n in 0..N {
                score[n] = simd.mul_f32s(score[n], simd.splat_f32s(kernel.scale));
            }
            if let Some(cap) = kernel.soft_cap {
                let cap = simd.splat_f32s(cap);
                for n in 0..N {
                    score[n] = simd.mul_f32s(cap, tanh(simd, simd.div_f32s(score[n], cap)));
                }
            }
            if let Some(biases) = biases.get(place) {
                let biases: Sixteen<S, N> = load(simd, biases);
                for n in 0..N {
                    score[n] = simd.add_f32s(score[n], biases[n]);
                }
            }
            let in_page = seen.of_page(place);
            if in_page != ALL {
                let places: Sixteen<S, N> = load(simd, &PLACES);
                let (from, to) = (simd.splat_f32s(in_page.from as f32), simd.splat_f32s(in_page.to as f32));
                for n in 0..N {
                    let before_end = simd.select_f32s(simd.less_than_f32s(places[n], to), score[n], lowest);
                    let from_start = simd.greater_than_or_equal_f32s(places[n], from);
                    score[n] = simd.select_f32s(from_start, before_end, lowest);
                }
            }
            for score in score {
                highest = simd.max_f32s(highest, score);
            }
            store::<S, N>(&mut scores[place], score);
        }

        let highest = state.highest.max(simd.reduce_max_f32s(highest));
        let mut sums: Sixteen<S, N> = load(simd, &state.sums);
        if highest != state.highest {
            let factor = exp(simd, simd.splat_f32s(state.highest - highest));
            for sum in &mut sums {
                *sum = simd.mul_f32s(*sum, factor);
            }
            let (vectors, rest) = S::as_mut_simd_f32s(mixed);
            for vector in vectors {
                *vector = simd.mul_f32s(*vector, factor);
            }
            for number in rest {
                *number *= first_lane(simd, factor);
            }
            state.highest = highest;
        }
        let highest = simd.splat_f32s(highest);
        for place in seen.places() {
            let mut weight: Sixteen<S, N> = load(simd, &scores[place]);
            for n in 0..N {
                weight[n] = exp(simd, simd.sub_f32s(weight[n], highest));
                sums[n] = simd.add_f32s(sums[n], weight[n]);
            }
            // A value's scale is taken into its weight.
            if let Some([_, scales]) = scales {
                let scales: Sixteen<S, N> = load(simd, &scales[place]);
                for n in 0..N {
                    weight[n] = simd.mul_f32s(weight[n], scales[n]);
                }
            }
            store::<S, N>(&mut scores[place], weight);
        }
        store::<S, N>(&mut state.sums, sums);
    }
}

/// Products of a band of queries with pages of a block.
struct Products<'a, K, const PAGES: usize> {
    /// `[head_size, queries]`.
    queries: &'a [f32],
    /// The keys of all pages, or of the only one, `[head_size, PAGE_TOKENS]` each.
    keys: [&'a [K]; PAGES],
    /// Which pages of the block are wanted.
    places: Range<usize>,
    /// `[queries, BLOCK]`.
    scores: &'a mut [f32],
}

impl<K: Stored, const PAGES: usize> WithSimd for Products<'_, K, PAGES> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        by_width!(self.run(simd));
    }
}

impl<K: Stored, const PAGES: usize> Products<'_, K, PAGES> {
    #[inline(always)]
    fn run<S: Simd, const N: usize>(self, simd: S) {
        match self.scores.len() / BLOCK {
            1 => self.band::<S, N, 1>(simd),
            2 => self.band::<S, N, 2>(simd),
            4 => self.band::<S, N, 4>(simd),
            _ => self.band::<S, N, BAND>(simd),
        }
    }

    /// As many pages side by side as it takes to have enough chains, and as registers allow.
    #[inline(always)]
    fn band<S: Simd, const N: usize, const R: usize>(self, simd: S) {
        if PAGES > 1 && N * R <= 2 {
            self.pages::<S, N, R, 4>(simd);
        } else if PAGES > 1 && (N == 1 || N * R <= 4) {
            self.pages::<S, N, R, 2>(simd);
        } else {
            self.pages::<S, N, R, 1>(simd);
        }
    }

    #[inline(always)]
    fn pages<S: Simd, const N: usize, const R: usize, const P: usize>(self, simd: S) {
        let queries = self.queries.as_chunks::<R>().0;
        for first in (self.places.start / P * P..self.places.end).step_by(P) {
            // Loops rather than `map`: a closure that isn't inlined would be compiled for the oldest processors.
            let mut keys: [&[[K; PAGE_TOKENS]]; P] = [&[]; P];
            for p in 0..P {
                keys[p] = &self.keys[if PAGES > 1 { first + p } else { 0 }].as_chunks().0[..queries.len()];
            }
            let mut sums = [[[simd.splat_f32s(0.0); N]; P]; R];
            for (index, query) in queries.iter().enumerate() {
                for p in 0..P {
                    let key: Sixteen<S, N> = load(simd, &widen(&keys[p][index]));
                    for r in 0..R {
                        let query = simd.splat_f32s(query[r]);
                        for n in 0..N {
                            sums[r][p][n] = simd.mul_add_f32s(query, key[n], sums[r][p][n]);
                        }
                    }
                }
            }
            for (r, sums) in sums.into_iter().enumerate() {
                let scores = &mut self.scores[r * BLOCK + first * PAGE_TOKENS..].as_chunks_mut().0[..P];
                for (score, sum) in scores.iter_mut().zip(sums) {
                    store::<S, N>(score, sum);
                }
            }
        }
    }
}

/// The weighted values of a page, for a band of queries.
struct Sums<'a, V> {
    /// `[queries, BLOCK]`, from the page's place on.
    weights: &'a [f32],
    /// `[queries, head_size]`.
    mixed: &'a mut [f32],
    size: usize,
    /// `[PAGE_TOKENS, head_size]`.
    values: &'a [V],
    /// The places that all of them see.
    seen: Seen,
}

impl<V: Stored> WithSimd for Sums<'_, V> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        by_width!(self.run(simd));
    }
}

impl<V: Stored> Sums<'_, V> {
    #[inline(always)]
    fn run<S: Simd, const N: usize>(self, simd: S) {
        match self.mixed.len() / self.size {
            _ if self.seen.is_empty() => {}
            1 => self.band::<S, N, 1>(simd),
            2 => self.band::<S, N, 2>(simd),
            4 => self.band::<S, N, 4>(simd),
            _ => self.band::<S, N, BAND>(simd),
        }
    }

    /// As many columns side by side as it takes to have enough chains, and as registers allow.
    #[inline(always)]
    fn band<S: Simd, const N: usize, const R: usize>(mut self, simd: S) {
        let mut column = 0;
        while N * R <= 2 && column + 64 <= self.size {
            self.columns::<S, N, R, 4>(simd, column);
            column += 64;
        }
        while N * R > 2 && (N == 1 || N * R <= 4) && column + 32 <= self.size {
            self.columns::<S, N, R, 2>(simd, column);
            column += 32;
        }
        while column + 16 <= self.size {
            self.columns::<S, N, R, 1>(simd, column);
            column += 16;
        }
        let Seen { from, to } = self.seen;
        for (r, mixed) in self.mixed.chunks_exact_mut(self.size).enumerate() {
            for (index, mixed) in mixed.iter_mut().enumerate().skip(column) {
                for token in from..to {
                    let value = self.values[token * self.size + index].widen();
                    *mixed = self.weights[r * BLOCK + token].mul_add(value, *mixed);
                }
            }
        }
    }

    /// `16 · C` columns.
    #[inline(always)]
    fn columns<S: Simd, const N: usize, const R: usize, const C: usize>(&mut self, simd: S, column: usize) {
        let size = self.size;
        let mut weights: [&[f32]; R] = [&[]; R];
        let mut sums = [[[simd.splat_f32s(0.0); N]; C]; R];
        for r in 0..R {
            weights[r] = &self.weights[r * BLOCK..][..PAGE_TOKENS];
            let mixed = &self.mixed[r * size + column..].as_chunks().0[..C];
            for c in 0..C {
                sums[r][c] = load(simd, &mixed[c]);
            }
        }
        let Seen { from, to } = self.seen;
        for token in from..to.min(PAGE_TOKENS) {
            let values = &self.values[token * size + column..].as_chunks::<16>().0[..C];
            for c in 0..C {
                let value: Sixteen<S, N> = load(simd, &widen(&values[c]));
                for r in 0..R {
                    let weight = simd.splat_f32s(weights[r][token]);
                    for n in 0..N {
                        sums[r][c][n] = simd.mul_add_f32s(weight, value[n], sums[r][c][n]);
                    }
                }
            }
        }
        for (r, sums) in sums.into_iter().enumerate() {
            let mixed = &mut self.mixed[r * size + column..].as_chunks_mut().0[..C];
            for (mixed, sum) in mixed.iter_mut().zip(sums) {
                store::<S, N>(mixed, sum);
            }
        }
    }
}
