//! Attention below the products: which rows see which pages, and on which thread.
//!
//! Rows of one lane are taken in tiles, for the query heads that share a key and value head, so that a page that was read
//! once serves several. A tile is one thread's work. What a row's result is made of, and in which order, is
//! [`super::tile`]'s matter, and doesn't depend on the tile.

use std::cell::RefCell;

use rayon::prelude::*;

use super::{
    RowRun,
    tile::{Attend, BLOCK, TileRoom},
};
use crate::engine::{
    alibi::Alibi,
    floats::Stored,
    kernels::{cut, on_vectors},
    pages::PAGE_TOKENS,
    planes::{KvPlanes, Planes, each},
    threads,
};

/// Queries of a tile. They share a page that is widened, and their results stay in a level-2 cache.
const TILE_QUERIES: usize = 48;
/// Multiplications below which a second thread costs more than it saves.
const MIN_PARALLEL: usize = 1 << 18;

/// What the scores and sums of a block's attention depend on.
#[derive(Debug)]
pub(super) struct Kernel {
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_size: usize,
    pub(super) scale: f32,
    pub(super) window: Option<usize>,
    pub(super) soft_cap: Option<f32>,
    pub(super) sinks: Option<Vec<f32>>,
    pub(super) alibi: Option<Alibi>,
}

/// Some rows of one run, for the query heads that share a key and value head.
struct Tile {
    run: usize,
    first: usize,
    rows: usize,
    kv_head: usize,
}

/// What a pass needs besides its result, kept for the next one.
#[derive(Default)]
struct PassRoom {
    tiles: Vec<Tile>,
    /// `[tiles, rows, group, head_size]`, with room for the same number of rows in every tile.
    results: Vec<f32>,
}

thread_local! {
    static PASS: RefCell<PassRoom> = RefCell::default();
    static TILE: RefCell<TileRoom> = RefCell::default();
}

impl Kernel {
    /// Numbers of a row's queries, and of its result.
    pub(super) fn q_width(&self) -> usize {
        self.heads * self.head_size
    }

    /// Numbers of a row's queries, keys and values.
    pub(super) fn row_width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_size
    }

    /// Query heads that share a key and value head.
    pub(super) fn group(&self) -> usize {
        self.heads / self.kv_heads
    }

    /// The first position that a token at `position` sees.
    pub(super) fn first_seen(&self, position: usize) -> usize {
        self.window.map_or(0, |window| (position + 1).saturating_sub(window))
    }

    /// Keeps the rows' keys and values, and attends from every row: from `qkv`, `[rows, heads + 2 · kv_heads, head_size]`,
    /// to `mixed`, `[rows, heads, head_size]`. The runs cover the rows in order.
    pub(super) fn run(&self, qkv: &[f32], runs: &[RowRun<'_>], planes: &mut KvPlanes, mixed: &mut Vec<f32>) {
        each!(planes, planes => {
            self.keep(qkv, runs, planes);
            // Taken out rather than borrowed: while this thread waits for others it may do other work.
            let mut room = PASS.take();
            self.attend(Rows { qkv, runs }, planes, &mut room, mixed);
            PASS.set(room);
        });
    }

    pub(super) fn keep<T: Stored>(&self, qkv: &[f32], runs: &[RowRun<'_>], planes: &mut Planes<T>) {
        let kv_width = self.kv_heads * self.head_size;
        for run in runs {
            let rows = qkv[run.first_row * self.row_width()..].chunks_exact(self.row_width());
            for (row, position) in rows.zip(run.position..run.position + run.rows) {
                let (keys, values) = row[self.q_width()..].split_at(kv_width);
                planes.store(run.pages[position / PAGE_TOKENS], position % PAGE_TOKENS, keys, values);
            }
        }
    }

    fn attend<T: Stored>(&self, rows: Rows<'_>, planes: &Planes<T>, room: &mut PassRoom, mixed: &mut Vec<f32>) {
        let Rows { qkv, runs } = rows;
        let PassRoom { tiles, results } = room;
        let longest = runs.iter().map(|run| run.rows).max().unwrap_or(0);
        let tile_rows = (TILE_QUERIES / self.group()).clamp(1, longest.max(1));
        tiles.clear();
        let mut work = 0;
        for (index, run) in runs.iter().enumerate() {
            work += run.rows * (run.position + run.rows).next_multiple_of(BLOCK) * self.q_width();
            for first in (0..run.rows).step_by(tile_rows) {
                let rows = tile_rows.min(run.rows - first);
                tiles.extend((0..self.kv_heads).map(|kv_head| Tile { run: index, first, rows, kv_head }));
            }
        }
        let count: usize = runs.iter().map(|run| run.rows).sum();
        mixed.resize(count * self.q_width(), 0.0);
        let width = self.group() * self.head_size;
        let attend = |(result, tile): (&mut [f32], &Tile)| {
            let run = &runs[tile.run];
            let mut room = TILE.take();
            on_vectors(Attend {
                kernel: self,
                planes,
                pages: run.pages,
                position: run.position + tile.first,
                kv_head: tile.kv_head,
                qkv: &qkv[(run.first_row + tile.first) * self.row_width()..][..tile.rows * self.row_width()],
                mixed: &mut result[..tile.rows * width],
                room: &mut room,
            });
            TILE.set(room);
        };
        let size = tile_rows * width;
        let attend_all = |results: &mut [f32]| {
            if work < MIN_PARALLEL || rayon::current_num_threads() < 2 {
                results.chunks_exact_mut(size).zip(&*tiles).for_each(attend);
            } else {
                results.par_chunks_exact_mut(size).zip(&*tiles).for_each(attend);
            }
        };
        // The results of tiles of one row lie as they should.
        if tile_rows == 1 {
            return attend_all(mixed);
        }
        results.resize(tiles.len() * size, 0.0);
        attend_all(results);
        // The tiles of the same rows are neighbours, and follow the rows.
        let mut rest = &mut mixed[..];
        let parts = tiles.chunks_exact(self.kv_heads).zip(results.chunks_exact(self.kv_heads * size));
        let parts = parts.map(|(tiles, results)| (results, cut(&mut rest, tiles[0].rows * self.q_width())));
        threads::each(parts.collect(), work >= MIN_PARALLEL, |(results, mixed)| {
            for (head, result) in results.chunks_exact(size).enumerate() {
                for (row, values) in mixed.chunks_exact_mut(self.q_width()).zip(result.chunks_exact(width)) {
                    row[head * width..][..width].copy_from_slice(values);
                }
            }
        });
    }
}

/// The rows of a pass.
struct Rows<'a> {
    qkv: &'a [f32],
    runs: &'a [RowRun<'a>],
}
