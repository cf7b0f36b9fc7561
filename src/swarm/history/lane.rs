//! One lane of a history: rows in the order of their positions, in chunks that copies of the lane share.
//!
//! A copy of a lane refers to the same chunks. Whoever goes on, or goes back, makes the chunk that it changes its own first: a
//! lane of thousands of steps costs some tens of references to copy.

use std::{ops::Range, sync::Arc};

/// Consecutive rows of one lane. A clone refers to the same rows.
pub trait Rows: Clone {
    /// How many.
    fn count(&self) -> usize;
    /// Some of them.
    fn slice(&self, rows: Range<usize>) -> Self;
}

/// Steps in a chunk: few enough that to copy one costs nothing, so many that a long lane has few chunks.
const CHUNK: usize = 64;

/// The rows of one lane in one step.
#[derive(Debug, Clone)]
pub(super) struct Segment<T> {
    pub(super) step: u64,
    pub(super) position: usize,
    pub(super) length_class: usize,
    pub(super) rows: T,
}

impl<T: Rows> Segment<T> {
    pub(super) fn end(&self) -> usize {
        self.position + self.rows.count()
    }
}

/// The rows of a lane, without a gap. No chunk is empty.
#[derive(Debug, Clone)]
pub(super) struct Lane<T> {
    chunks: Vec<Arc<Vec<Segment<T>>>>,
}

impl<T> Default for Lane<T> {
    fn default() -> Self {
        Self { chunks: Vec::new() }
    }
}

impl<T: Rows> Lane<T> {
    pub(super) fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// How many rows it has.
    pub(super) fn end(&self) -> usize {
        self.chunks.last().map_or(0, end_of)
    }

    /// Adds a step's rows, which begin where the lane ends.
    pub(super) fn push(&mut self, segment: Segment<T>) {
        match self.chunks.last_mut() {
            Some(chunk) if chunk.len() < CHUNK => Arc::make_mut(chunk).push(segment),
            _ => self.chunks.push(Arc::new(vec![segment])),
        }
    }

    /// Forgets the rows from `position` on.
    pub(super) fn truncate(&mut self, position: usize) {
        let whole = self.chunks.partition_point(|chunk| end_of(chunk) <= position);
        self.chunks.truncate(whole + 1);
        let Some(chunk) = self.chunks.get_mut(whole) else { return };
        let segments = Arc::make_mut(chunk);
        let first_after = segments.partition_point(|segment| segment.end() <= position);
        segments.truncate(first_after + 1);
        // The chunk ends behind `position`, so there is one.
        if let Some(cut) = segments.last_mut() {
            if cut.position < position {
                cut.rows = cut.rows.slice(0..position - cut.position);
            } else {
                segments.pop();
            }
        }
        if segments.is_empty() {
            self.chunks.pop();
        }
    }

    /// The steps' rows, from the step on that has the row at `position`.
    pub(super) fn from(&self, position: usize) -> impl Iterator<Item = &Segment<T>> {
        let first = self.chunks.partition_point(|chunk| end_of(chunk) <= position);
        let begun = move |segment: &&Segment<T>| segment.end() <= position;
        self.chunks[first..].iter().flat_map(|chunk| chunk.iter()).skip_while(begun)
    }
}

fn end_of<T: Rows>(chunk: &Arc<Vec<Segment<T>>>) -> usize {
    chunk.last().map_or(0, Segment::end)
}
