//! Fetching weights from memory while others are multiplied.
//!
//! With several groups of rows, tiles are read from memory for the first group and are near for the others: without this,
//! memory would wait while these compute, and the cores while the first reads. So each group fetches its share of the tiles that
//! come next, evenly over its time.

use std::ops::Range;

use super::Isa;

/// What is fetched at a time.
const LINE: usize = 64;

/// The share of a group, of so many groups, in what comes behind `tiles` and is as long. A lone group has none: memory is read in
/// order then, and the processor guesses what comes.
#[inline(always)]
pub(super) fn ahead(all: &[u8], tiles: Range<usize>, (group, groups): (usize, usize)) -> &[u8] {
    if groups == 1 {
        return &[];
    }
    let lines = all[tiles.end..].len().min(tiles.len()).div_ceil(LINE);
    let start = tiles.end + lines * group / groups * LINE;
    let end = all.len().min(tiles.end + lines * (group + 1) / groups * LINE);
    &all[start.min(end)..end]
}

/// Fetches lines in steps.
pub(super) struct Fetching<'a> {
    lines: &'a [[u8; LINE]],
    /// Steps from one line to the next, and until the next.
    every: usize,
    left: usize,
}

impl<'a> Fetching<'a> {
    /// Takes from `ahead` what `now` of `tiles` tiles are to fetch in so many steps.
    #[inline(always)]
    pub(super) fn new(ahead: &mut &'a [u8], steps: usize, tiles: usize, now: usize) -> Self {
        let all = ahead.as_chunks().0;
        let (lines, others) = all.split_at((all.len() * now).div_ceil(tiles.max(1)).min(all.len()));
        *ahead = others.as_flattened();
        let every = (steps / lines.len().max(1)).max(1);
        Self { lines, every, left: every }
    }

    /// One step: fetches a line if it is time.
    #[inline(always)]
    pub(super) fn step<A: Isa>(&mut self, isa: A) {
        self.left -= 1;
        if self.left == 0 {
            self.left = self.every;
            if let Some((line, others)) = self.lines.split_first() {
                isa.fetch(line);
                self.lines = others;
            }
        }
    }
}
