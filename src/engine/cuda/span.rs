//! A span on a device, and one pass through it.
//!
//! The host decides everything about a pass before it begins: which rows meet in which blocks, where keys and values go,
//! who attends with whom. What it decided is sent as a few small tensors; then all blocks are put in the device's queue
//! without waiting for any, and at the end one transfer brings back the rows, together with one number for each row and
//! block that is NaN where the block made something that is not finite.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    ops::Range,
};

use bytes::Bytes;
use candle_core::{Device, Result as TensorResult, Tensor};

use super::{
    attention::Rows,
    block::Block,
    plan::{Plan, Run, Shape, Turns},
    upload::{Upload, tensor_dtype},
};
use crate::{
    engine::{
        HiddenStates,
        load::{LoadError, Source},
        pages::PAGE_TOKENS,
        pass::{NonFinite, Outcome, PagePlace, Pass, Segment},
        rope::{Angles, Rope},
        snapshot::TransferError,
    },
    model::{
        Dtype,
        spec::{ModelSpec, RopeSpec},
    },
};

/// Numbers of the largest intermediate results of attention: 256 MiB in f32.
const MAX_INTERMEDIATE: usize = 1 << 26;

/// The loaded blocks of a span with their part of the KV cache.
pub(in crate::engine) struct DeviceSpan {
    device: Device,
    /// Of the KV cache.
    dtype: Dtype,
    first: usize,
    hidden: usize,
    blocks: Vec<LoadedBlock>,
    /// Rotary schemes; blocks that share one share its angles.
    ropes: Vec<Rope>,
    /// What plans depend on; blocks that share it share a plan.
    shapes: Vec<Shape>,
    /// What the last pass brought back; the rows of all segments come first.
    states: Vec<f32>,
}

struct LoadedBlock {
    block: Block,
    rope: Option<usize>,
    shape: usize,
}

impl DeviceSpan {
    /// Loads the blocks of `span`, which must be in `spec`, with room for `pages` pages, at least one.
    ///
    /// It is used by one thread at a time, of which a device that gives each thread a queue of its own knows nothing; so
    /// what was sent has arrived before this returns.
    pub(in crate::engine) fn load(
        spec: &ModelSpec,
        span: Range<usize>,
        placed: (Device, usize),
        source: &mut Source<'_>,
        progress: &mut dyn FnMut(usize, usize),
    ) -> Result<Self, LoadError> {
        let (device, pages) = placed;
        let mut rope_specs: Vec<(&RopeSpec, usize)> = Vec::new();
        let mut shapes: Vec<Shape> = Vec::new();
        let mut blocks = Vec::with_capacity(span.len());
        let dtype = source.dtype();
        let mut upload = Upload::new(source, &device);
        progress(0, span.len());
        for (done, block) in spec.blocks[span.clone()].iter().enumerate() {
            let attention = &block.attention;
            let key = attention.rope.as_ref().map(|rope| (rope, attention.head_size));
            let shape = Shape {
                window: attention.window,
                whole: attention.alibi.is_some(),
                heads: attention.heads,
                kv_width: attention.kv_heads * attention.head_size,
                at_most: MAX_INTERMEDIATE,
            };
            blocks.push(LoadedBlock {
                block: Block::load(block, spec.hidden_size, pages, &mut upload)
                    .map_err(|error| out_of_memory(error, span.start + done))?,
                rope: key.map(|key| index_of(&mut rope_specs, key)),
                shape: index_of(&mut shapes, shape),
            });
            progress(done + 1, span.len());
        }
        upload.finish();
        device.synchronize()?;
        let ropes = rope_specs.into_iter().map(|(spec, head_size)| Rope::new(spec, head_size)).collect();
        let (first, hidden) = (span.start, spec.hidden_size);
        Ok(Self { device, dtype, first, hidden, blocks, ropes, shapes, states: Vec::new() })
    }

    /// Puts all segments' way through their blocks in the device's queue.
    fn queue(&self, segments: &[Segment<'_>]) -> TensorResult<Queued> {
        self.copy_pages(segments)?;
        let mut rows = self.send(segments)?;
        let mut checks = Vec::new();
        // The blocks fall into stretches in which the same segments are under way.
        let mut bounds: Vec<usize> =
            segments.iter().flat_map(|segment| [segment.blocks.start, segment.blocks.end]).collect();
        bounds.sort_unstable();
        bounds.dedup();
        for bound in bounds.windows(2) {
            let together = Together::new(segments, bound[0]..bound[1]);
            if together.members.is_empty() {
                continue;
            }
            let blocks = &self.blocks[bound[0] - self.first..bound[1] - self.first];
            let prepared = self.prepare(&together, blocks)?;
            let inputs: Vec<&Tensor> = together.members.iter().map(|member| &rows[member.segment]).collect();
            let mut x = match &inputs[..] {
                [only] => (*only).clone(),
                several => Tensor::cat(several, 0)?,
            };
            for (index, loaded) in (bound[0]..).zip(blocks) {
                x = round(loaded.block.forward(&x, &prepared.rows(loaded)?)?, &together.wires)?;
                // Zero times what isn't finite is NaN, and so is its sum.
                let sums = x.affine(0.0, 0.0)?.sum(1)?;
                checks.push(Check { block: index, members: together.members.clone(), sums });
            }
            for member in &together.members {
                rows[member.segment] = x.narrow(0, member.rows.start, member.rows.len())?;
            }
        }
        Ok(Queued { rows, checks })
    }

    /// The rows of each segment, in one transfer.
    fn send(&self, segments: &[Segment<'_>]) -> TensorResult<Vec<Tensor>> {
        let total: usize = segments.iter().map(Segment::rows).sum();
        let mut values = vec![0.0; total * self.hidden];
        let (mut rest, mut first) = (&mut values[..], 0);
        for segment in segments {
            let (own, others) = rest.split_at_mut(segment.rows() * self.hidden);
            segment.hidden.decode_rows(segment.first, own);
            rest = others;
        }
        let values = Tensor::from_vec(values, (total, self.hidden), &self.device)?;
        let rows = segments.iter().map(|segment| {
            first += segment.rows();
            values.narrow(0, first - segment.rows(), segment.rows())
        });
        rows.collect()
    }

    /// Copies the pages that lanes shared and now write to.
    fn copy_pages(&self, segments: &[Segment<'_>]) -> TensorResult<()> {
        for segment in segments.iter().filter(|segment| !segment.copies.is_empty()) {
            for loaded in &self.blocks[segment.blocks.start - self.first..segment.blocks.end - self.first] {
                loaded.block.attention.copy_pages(segment.copies)?;
            }
        }
        Ok(())
    }

    /// What the blocks of a stretch need to know of its rows.
    fn prepare(&self, together: &Together<'_>, blocks: &[LoadedBlock]) -> TensorResult<Prepared> {
        let device = &self.device;
        let mut prepared = Prepared::default();
        for LoadedBlock { block, rope, shape } in blocks {
            let width = block.attention.kv_width();
            if let Entry::Vacant(entry) = prepared.slots.entry(width) {
                entry.insert(slots(&together.runs, width, device)?);
            }
            if let Some(rope) = rope
                && let Entry::Vacant(entry) = prepared.turns.entry(*rope)
            {
                let positions = together.runs.iter().map(|run| run.position..run.position + run.rows);
                let mut angles = Angles::default();
                self.ropes[*rope].angles(positions.zip(together.rope_lengths.iter().copied()), &mut angles);
                entry.insert(Turns::new(angles, device)?);
            }
            if let Entry::Vacant(entry) = prepared.plans.entry(*shape) {
                entry.insert(Plan::new(&together.runs, self.shapes[*shape], device)?);
            }
        }
        Ok(prepared)
    }

    /// Forgets what the segments wrote, in case it isn't finite: their pages will be others', whose masks hide it, and a
    /// hidden NaN is still one in a product.
    fn erase<'a>(&self, segments: impl Iterator<Item = &'a Segment<'a>>) -> TensorResult<()> {
        for segment in segments {
            let runs = runs(segment, 0).collect::<Vec<_>>();
            for index in segment.blocks.clone() {
                let attention = &self.blocks[index - self.first].block.attention;
                attention.erase(&slots(&runs, attention.kv_width(), &self.device)?)?;
            }
        }
        Ok(())
    }
}

impl Pass for DeviceSpan {
    fn run(&mut self, segments: &[Segment<'_>]) -> TensorResult<Vec<Outcome>> {
        match self.queue(segments).and_then(|queued| queued.fetch(segments)) {
            Ok((outcomes, states)) => {
                self.states = states;
                let spoilt = segments.iter().zip(&outcomes).filter(|(_, outcome)| outcome.is_err());
                self.erase(spoilt.map(|(segment, _)| segment))?;
                Ok(outcomes)
            }
            Err(error) => {
                // The first error says why the pass failed; if this fails, too, so will the next pass.
                if let Err(second) = self.erase(segments.iter()) {
                    tracing::warn!(%second, "what a failed pass wrote can't be erased");
                }
                Err(error)
            }
        }
    }

    fn states(&self, place: Range<usize>) -> &[f32] {
        &self.states[place]
    }

    fn read_page(&self, at: PagePlace, bytes: &mut Vec<u8>) -> Result<(), TransferError> {
        let attention = &self.blocks[at.block - self.first].block.attention;
        attention.read_page(at, self.dtype, bytes).map_err(|error| TransferError::Device(error.to_string()))
    }

    fn write_page(&mut self, at: PagePlace, bytes: &[u8]) -> Result<(), TransferError> {
        let attention = &self.blocks[at.block - self.first].block.attention;
        let width = PAGE_TOKENS * attention.kv_width();
        let numbers = HiddenStates::new(self.dtype, 2, width, Bytes::copy_from_slice(bytes));
        let numbers = numbers.map_err(|error| TransferError::BadPage(error.to_string()))?;
        if numbers.first_non_finite().is_some() {
            return Err(TransferError::BadPage("a page with a number that is not finite".to_owned()));
        }
        attention.write_page(at.page, &numbers.to_f32()).map_err(|error| TransferError::Device(error.to_string()))
    }

    fn is_on_processor(&self) -> bool {
        false
    }
}

/// A pass that is under way: no value of it is known to the host.
struct Queued {
    /// The output of each segment, `[rows, hidden]`.
    rows: Vec<Tensor>,
    checks: Vec<Check>,
}

/// For each row behind a block 0, or NaN if it isn't finite.
struct Check {
    block: usize,
    members: Vec<Member>,
    /// `[rows]`.
    sums: Tensor,
}

impl Queued {
    /// Waits for the pass and brings everything back at once: where each segment's rows are, and all numbers.
    fn fetch(self, segments: &[Segment<'_>]) -> TensorResult<(Vec<Outcome>, Vec<f32>)> {
        let outputs = self.rows.iter().map(Tensor::flatten_all);
        let sums = self.checks.iter().map(|check| Ok(check.sums.clone()));
        let all = Tensor::cat(&outputs.chain(sums).collect::<TensorResult<Vec<_>>>()?, 0)?.to_vec1::<f32>()?;
        let mut end = 0;
        let mut next = |tensor: &Tensor| {
            end += tensor.elem_count();
            end - tensor.elem_count()..end
        };
        let places: Vec<Range<usize>> = self.rows.iter().map(&mut next).collect();
        let mut flaws: Vec<Option<NonFinite>> = segments.iter().map(|_| None).collect();
        for Check { block, members, sums } in &self.checks {
            let sums = &all[next(sums)];
            for Member { segment, rows } in members {
                let row = || sums[rows.clone()].iter().position(|sum| sum.is_nan());
                let flaw = &mut flaws[*segment];
                *flaw = flaw.take().or_else(|| row().map(|row| NonFinite { row, block: *block }));
            }
        }
        let outcomes = flaws.into_iter().zip(places).map(|(flaw, place)| flaw.map_or(Ok(place), Err));
        Ok((outcomes.collect(), all))
    }
}

/// Segments laid end to end.
struct Together<'a> {
    runs: Vec<Run<'a>>,
    /// Of each run.
    rope_lengths: Vec<usize>,
    /// How many rows are rounded to what.
    wires: Vec<(usize, Dtype)>,
    members: Vec<Member>,
}

/// A segment among others.
#[derive(Clone)]
struct Member {
    segment: usize,
    rows: Range<usize>,
}

impl<'a> Together<'a> {
    /// The segments that run through all of `blocks`.
    fn new(segments: &'a [Segment<'a>], blocks: Range<usize>) -> Self {
        let mut together = Self { runs: Vec::new(), rope_lengths: Vec::new(), wires: Vec::new(), members: Vec::new() };
        let mut first = 0;
        for (index, segment) in segments.iter().enumerate() {
            if segment.blocks.start > blocks.start || blocks.end > segment.blocks.end {
                continue;
            }
            let start = first;
            for run in runs(segment, start) {
                first += run.rows;
                together.runs.push(run);
            }
            together.rope_lengths.extend(segment.pieces.iter().map(|piece| piece.rope_length));
            together.wires.push((first - start, segment.wire));
            together.members.push(Member { segment: index, rows: start..first });
        }
        together
    }
}

/// The rows of a segment by lane, counted from `first` on.
fn runs<'a>(segment: &'a Segment<'a>, mut first: usize) -> impl Iterator<Item = Run<'a>> {
    segment.pieces.iter().map(move |piece| {
        first += piece.rows;
        Run { first_row: first - piece.rows, rows: piece.rows, position: piece.position, pages: piece.pages }
    })
}

/// What blocks need to know of the rows of a stretch.
#[derive(Default)]
struct Prepared {
    /// By the width of a token's keys.
    slots: BTreeMap<usize, Tensor>,
    /// By the number of the rotary scheme.
    turns: BTreeMap<usize, Turns>,
    /// By the number of the shape.
    plans: BTreeMap<usize, Plan>,
}

impl Prepared {
    fn rows(&self, loaded: &LoadedBlock) -> TensorResult<Rows<'_>> {
        let slots = self.slots.get(&loaded.block.attention.kv_width());
        match (slots, self.plans.get(&loaded.shape)) {
            (Some(slots), Some(plan)) => {
                Ok(Rows { slots, plan, turns: loaded.rope.and_then(|rope| self.turns.get(&rope)) })
            }
            _ => candle_core::bail!("a block that a pass wasn't prepared for"),
        }
    }
}

/// Where each row's keys go in planes `[tokens, width]`: `[rows, width]`, all numbers of a row alike.
fn slots(runs: &[Run<'_>], width: usize, device: &Device) -> TensorResult<Tensor> {
    let slots: Vec<u32> = runs.iter().flat_map(Run::slots).collect();
    let rows = slots.len();
    Tensor::from_vec(slots, (rows, 1), device)?.broadcast_as((rows, width))?.contiguous()
}

/// Rounds each row to its wire format, whether or not it travels.
fn round(x: Tensor, wires: &[(usize, Dtype)]) -> TensorResult<Tensor> {
    let to = |x: &Tensor, dtype: Dtype| x.to_dtype(tensor_dtype(dtype))?.to_dtype(x.dtype());
    match wires {
        wires if wires.iter().all(|(_, dtype)| *dtype == Dtype::F32) => Ok(x),
        [(_, first), others @ ..] if others.iter().all(|(_, dtype)| dtype == first) => to(&x, *first),
        wires => {
            let mut first = 0;
            let parts = wires.iter().map(|(rows, dtype)| {
                first += rows;
                to(&x.narrow(0, first - rows, *rows)?, *dtype)
            });
            Tensor::cat(&parts.collect::<TensorResult<Vec<_>>>()?, 0)
        }
    }
}

/// Where `item` is among `known`, which it is added to.
fn index_of<T: PartialEq>(known: &mut Vec<T>, item: T) -> usize {
    known.iter().position(|known| *known == item).unwrap_or_else(|| {
        known.push(item);
        known.len() - 1
    })
}

/// What can go wrong with a device while a block is loaded is its memory.
fn out_of_memory(error: LoadError, block: usize) -> LoadError {
    match error {
        LoadError::Tensor(error) => LoadError::Device(format!(
            "the device can't take block {block}: {error}; if its memory is full, fewer blocks (--num-blocks), a smaller \
             cache (--attn-cache-tokens) or packed weights (--quant) need less of it"
        )),
        other => other,
    }
}
