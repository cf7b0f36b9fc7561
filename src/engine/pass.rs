//! One pass: rows of several steps through the blocks of a span.

use std::ops::Range;

use candle_core::{Error as TensorError, Tensor};

use super::{
    attention::RowRun,
    block::{Batch, Block},
    load::{LoadError, Source},
    pages::PageId,
    planes::KvPlanes,
    rope::{Angles, Rope},
    tensor,
};
use crate::model::{
    Dtype,
    spec::{ModelSpec, RopeSpec},
};

/// The loaded blocks of a span with their part of the KV cache.
pub(super) struct Span {
    first: usize,
    hidden: usize,
    blocks: Vec<LoadedBlock>,
    /// Rotary schemes; blocks that share one share its angles.
    ropes: Vec<Rope>,
}

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
    /// The rows, `[rows, hidden]`.
    pub(super) input: Vec<f32>,
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

/// The output rows of a segment, `[rows, hidden]`.
pub(super) type Outcome = Result<Vec<f32>, NonFinite>;

impl Span {
    /// Loads the blocks of `span`, which must be in `spec`, with room for `pages` pages.
    pub(super) fn load(
        spec: &ModelSpec,
        span: Range<usize>,
        cache: (Dtype, usize),
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
        let ropes = rope_specs.into_iter().map(|(spec, head_size)| Rope::new(spec, head_size)).collect();
        Ok(Self { first: span.start, hidden: spec.hidden_size, blocks, ropes })
    }

    /// Runs the segments, which may cover different blocks, together wherever they meet.
    pub(super) fn run(&mut self, segments: &[Segment<'_>]) -> Result<Vec<Outcome>, TensorError> {
        let input = |segment: &Segment<'_>| tensor::matrix(segment.input.clone(), self.hidden);
        let mut rows: Vec<Tensor> = segments.iter().map(input).collect::<Result<_, TensorError>>()?;
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
            let angles = self.angles(&group);
            let mut x = match &here[..] {
                [only] => rows[*only].clone(),
                _ => Tensor::cat(&here.iter().map(|index| &rows[*index]).collect::<Vec<_>>(), 0)?,
            };
            for index in stretch {
                let loaded = &mut self.blocks[index - self.first];
                let batch =
                    Batch { runs: &group.runs, angles: loaded.rope.map(|rope| &angles[rope]), wires: &group.wires };
                x = loaded.block.forward(&x, &batch, &mut loaded.cache)?;
                group.find_flaws(&x, index, &mut flaws)?;
            }
            for (index, (start, count)) in here.iter().zip(&group.places) {
                rows[*index] = x.narrow(0, *start, *count)?;
            }
        }
        let outcome = |(rows, flaw): (Tensor, Option<NonFinite>)| match flaw {
            Some(flaw) => Ok(Err(flaw)),
            None => tensor::with_f32(&rows, <[f32]>::to_vec).map(Ok),
        };
        rows.into_iter().zip(flaws).map(outcome).collect()
    }

    fn angles(&self, group: &Group<'_>) -> Vec<Angles> {
        let positions = |run: &RowRun<'_>| run.position..run.position + run.rows;
        let runs = || group.runs.iter().map(positions).zip(group.rope_lengths.iter().copied());
        self.ropes.iter().map(|rope| rope.angles(runs())).collect()
    }
}

/// Segments laid end to end.
struct Group<'a> {
    runs: Vec<RowRun<'a>>,
    /// Of each run.
    rope_lengths: Vec<usize>,
    wires: Vec<(usize, Dtype)>,
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
            group.wires.push((row - start, segment.wire));
            group.places.push((start, row - start));
        }
        group
    }

    /// Notes the first non-finite row of each segment that hadn't any before.
    fn find_flaws(&self, x: &Tensor, block: usize, flaws: &mut [Option<NonFinite>]) -> Result<(), TensorError> {
        let (_, width) = x.dims2()?;
        tensor::with_f32(x, |x| {
            for (member, (start, count)) in self.members.iter().zip(&self.places) {
                if flaws[*member].is_none() {
                    let rows = &x[start * width..][..count * width];
                    let index = rows.iter().position(|value| !value.is_finite());
                    flaws[*member] = index.map(|index| NonFinite { row: index / width, block });
                }
            }
        })
    }
}
