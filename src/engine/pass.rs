//! One pass: rows of several steps through the blocks of a span.

use std::ops::Range;

use candle_core::Error as TensorError;

use super::{
    attention::RowRun,
    block::{Batch, Block},
    hidden::HiddenStates,
    lanes::PageCopy,
    load::{LoadError, Source},
    pages::PageId,
    planes::KvPlanes,
    rope::{Angles, Rope},
    scratch::Scratch,
    snapshot::TransferError,
    threads,
};
use crate::model::{
    Dtype, KvDtype,
    spec::{ModelSpec, RopeSpec},
};

/// The loaded blocks of a span with their part of the KV cache.
pub(super) struct Span {
    first: usize,
    hidden: usize,
    blocks: Vec<LoadedBlock>,
    /// Rotary schemes, and their angles of the rows of a pass; blocks that share one share its angles.
    ropes: Vec<(Rope, Angles)>,
    /// The rows of a pass, segment after segment, `[rows, hidden]`.
    states: Vec<f32>,
    /// The rows of some of its segments, where not all go through the same blocks.
    apart: Vec<f32>,
    scratch: Scratch,
    /// Large enough for several threads to share even one token's products.
    is_large: bool,
}

/// Bytes of weights from which that is so: a part of a millisecond on the memory bus.
const LARGE_BYTES: u64 = 16 << 20;

struct LoadedBlock {
    block: Block,
    cache: KvPlanes,
    rope: Option<usize>,
}

/// Rows of one step in a pass.
pub(super) struct Segment<'a> {
    /// The blocks that they run through.
    pub(super) blocks: Range<usize>,
    /// What they are rounded to after each block.
    pub(super) wire: Dtype,
    /// The rows by lane.
    pub(super) pieces: Vec<Piece<'a>>,
    /// Pages to be copied before anything is written.
    pub(super) copies: &'a [PageCopy],
    /// The rows are these from `first` on.
    pub(super) hidden: &'a HiddenStates,
    pub(super) first: usize,
}

/// Consecutive rows of one lane.
pub(super) struct Piece<'a> {
    pub(super) position: usize,
    pub(super) rows: usize,
    /// The length that rotary factors are taken for, where they depend on one.
    pub(super) rope_length: usize,
    /// The lane's pages, enough for these rows.
    pub(super) pages: &'a [PageId],
}

/// A row of a segment that a block made non-finite.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct NonFinite {
    pub(super) row: usize,
    pub(super) block: usize,
}

/// Which of [`Pass::states`] are a segment's output.
pub(super) type Outcome = Result<Range<usize>, NonFinite>;

/// A span that segments can be run through: on the processor ([`Span`]), or on a device (`engine/cuda.rs`).
pub(super) trait Pass: Send {
    /// Runs the segments, which may cover different blocks, together wherever they meet.
    ///
    /// # Errors
    /// The device failed, or is full: nothing of the pass can be used.
    fn run(&mut self, segments: &[Segment<'_>]) -> Result<Vec<Outcome>, TensorError>;

    /// Rows of the last pass.
    fn states(&self, place: Range<usize>) -> &[f32];

    /// Whether the thread that runs a pass computes it, so that the processor's time of the one is that of the other.
    fn is_on_processor(&self) -> bool;

    /// Appends what the first `tokens` of a page hold of a block; the others are zeros.
    ///
    /// # Errors
    /// The device failed.
    fn read_page(&self, at: PagePlace, bytes: &mut Vec<u8>) -> Result<(), TransferError>;

    /// Takes over what [`Pass::read_page`] of another engine gave.
    ///
    /// # Errors
    /// The bytes can't be a page of this block, or the device failed.
    fn write_page(&mut self, at: PagePlace, bytes: &[u8]) -> Result<(), TransferError>;
}

/// One block's part of a page.
#[derive(Debug, Clone, Copy)]
pub(super) struct PagePlace {
    /// Of the model.
    pub(super) block: usize,
    pub(super) page: PageId,
    /// Tokens that count.
    pub(super) tokens: usize,
}

impl Span {
    /// Loads the blocks of `span`, which must be in `spec`, with room for `pages` pages.
    pub(super) fn load(
        spec: &ModelSpec,
        span: Range<usize>,
        cache: (KvDtype, usize),
        source: &mut Source<'_>,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Self, LoadError> {
        let (dtype, pages) = cache;
        let mut rope_specs: Vec<(&RopeSpec, usize)> = Vec::new();
        let mut blocks = Vec::with_capacity(span.len());
        progress(0, span.len());
        for (done, block) in spec.blocks[span.clone()].iter().enumerate() {
            let attention = &block.attention;
            let rope = attention.rope.as_ref().map(|rope| {
                let key = (rope, attention.head_size);
                rope_specs.iter().position(|known| *known == key).unwrap_or_else(|| {
                    rope_specs.push(key);
                    rope_specs.len() - 1
                })
            });
            blocks.push(LoadedBlock {
                block: Block::load(block, spec.hidden_size, source)?,
                cache: KvPlanes::new(dtype, pages, attention.kv_heads, attention.head_size),
                rope,
            });
            progress(done + 1, span.len());
        }
        let rope = |(spec, head_size): (&RopeSpec, usize)| (Rope::new(spec, head_size), Angles::default());
        Ok(Self {
            first: span.start,
            hidden: spec.hidden_size,
            blocks,
            ropes: rope_specs.into_iter().map(rope).collect(),
            states: Vec::new(),
            apart: Vec::new(),
            scratch: Scratch::default(),
            is_large: source.loaded_bytes() >= LARGE_BYTES,
        })
    }

    fn copy_pages(&mut self, segments: &[Segment<'_>]) {
        for segment in segments {
            for PageCopy { from, to } in segment.copies {
                for block in segment.blocks.clone() {
                    self.blocks[block - self.first].cache.copy_page(*from, *to);
                }
            }
        }
    }

    fn run_all(&mut self, segments: &[Segment<'_>]) -> Vec<Outcome> {
        self.copy_pages(segments);
        let hidden = self.hidden;
        let mut places = Vec::with_capacity(segments.len());
        let mut end = 0;
        for segment in segments {
            let start = end;
            end += segment.rows() * hidden;
            places.push(start..end);
        }
        self.states.resize(end, 0.0);
        for (segment, place) in segments.iter().zip(&places) {
            segment.hidden.decode_rows(segment.first, &mut self.states[place.clone()]);
        }
        let mut flaws: Vec<Option<NonFinite>> = segments.iter().map(|_| None).collect();

        // The blocks fall into stretches in which the same segments are under way.
        let mut bounds: Vec<usize> =
            segments.iter().flat_map(|segment| [segment.blocks.start, segment.blocks.end]).collect();
        bounds.sort_unstable();
        bounds.dedup();
        for bound in bounds.windows(2) {
            let stretch = bound[0]..bound[1];
            let here: Vec<usize> = (0..segments.len())
                .filter(|index| {
                    let blocks = &segments[*index].blocks;
                    blocks.start <= stretch.start && stretch.end <= blocks.end
                })
                .collect();
            if here.is_empty() {
                continue;
            }
            let group = Group::new(segments, &here);
            for (rope, angles) in &mut self.ropes {
                rope.angles(group.positions(), angles);
            }
            let all = here.len() == segments.len();
            if !all {
                self.apart.clear();
                here.iter().for_each(|index| self.apart.extend_from_slice(&self.states[places[*index].clone()]));
            }
            let x = if all { &mut self.states[..] } else { &mut self.apart[..] };
            let mut blocks = &mut self.blocks[stretch.start - self.first..stretch.end - self.first];
            let mut index = stretch.start;
            while let Some((LoadedBlock { block, cache, rope }, others)) = blocks.split_first_mut() {
                let angles = rope.map(|rope| &self.ropes[rope].1);
                let next = others.first().map(|next| &next.block);
                let batch = Batch { runs: &group.runs, angles, wires: &group.wires, next };
                if index == stretch.start {
                    block.begin(x, &batch, &mut self.scratch);
                }
                block.forward(x, &batch, cache, &mut self.scratch);
                group.find_flaws(&self.scratch.broken, index, &mut flaws);
                blocks = others;
                index += 1;
            }
            if !all {
                for (index, (start, rows)) in here.iter().zip(&group.places) {
                    let rows = &self.apart[start * hidden..][..rows * hidden];
                    self.states[places[*index].clone()].copy_from_slice(rows);
                }
            }
        }
        places.into_iter().zip(flaws).map(|(place, flaw)| flaw.map_or(Ok(place), Err)).collect()
    }
}

impl Pass for Span {
    fn run(&mut self, segments: &[Segment<'_>]) -> Result<Vec<Outcome>, TensorError> {
        Ok(if self.is_large { threads::awake(|| self.run_all(segments)) } else { self.run_all(segments) })
    }

    fn states(&self, place: Range<usize>) -> &[f32] {
        &self.states[place]
    }

    fn read_page(&self, at: PagePlace, bytes: &mut Vec<u8>) -> Result<(), TransferError> {
        self.blocks[at.block - self.first].cache.page_bytes(at.page, at.tokens, bytes);
        Ok(())
    }

    fn write_page(&mut self, at: PagePlace, bytes: &[u8]) -> Result<(), TransferError> {
        let planes = &mut self.blocks[at.block - self.first].cache;
        planes.set_page_bytes(at.page, bytes).map_err(|error| TransferError::BadPage(error.to_string()))
    }

    fn is_on_processor(&self) -> bool {
        true
    }
}

impl Segment<'_> {
    pub(super) fn rows(&self) -> usize {
        self.pieces.iter().map(|piece| piece.rows).sum()
    }
}

/// Segments laid end to end.
struct Group<'a> {
    runs: Vec<RowRun<'a>>,
    /// Of each run.
    rope_lengths: Vec<usize>,
    /// Of each row.
    wires: Vec<Dtype>,
    /// First row and number of rows of each segment.
    places: Vec<(usize, usize)>,
    /// Which segments they are.
    members: Vec<usize>,
}

impl<'a> Group<'a> {
    fn new(segments: &'a [Segment<'a>], members: &[usize]) -> Self {
        let mut group = Self {
            runs: Vec::new(),
            rope_lengths: Vec::new(),
            wires: Vec::new(),
            places: Vec::new(),
            members: members.to_vec(),
        };
        let mut row = 0;
        for segment in members.iter().map(|index| &segments[*index]) {
            let start = row;
            for Piece { position, rows, rope_length, pages } in &segment.pieces {
                group.rope_lengths.push(*rope_length);
                group.runs.push(RowRun { first_row: row, rows: *rows, position: *position, pages });
                row += rows;
            }
            group.wires.resize(row, segment.wire);
            group.places.push((start, row - start));
        }
        group
    }

    /// The positions of each run, and the length that rotary factors are taken for.
    fn positions(&self) -> impl Iterator<Item = (Range<usize>, usize)> {
        let positions = self.runs.iter().map(|run| run.position..run.position + run.rows);
        positions.zip(self.rope_lengths.iter().copied())
    }

    /// Notes the first broken row of each segment that hadn't any before.
    fn find_flaws(&self, broken: &[bool], block: usize, flaws: &mut [Option<NonFinite>]) {
        for (member, (start, count)) in self.members.iter().zip(&self.places) {
            if flaws[*member].is_none() {
                let row = broken[*start..start + count].iter().position(|broken| *broken);
                flaws[*member] = row.map(|row| NonFinite { row, block });
            }
        }
    }
}
