//! A mixture of experts.
//!
//! The rows of a pass are sorted by expert, so that each expert's weights are read once, and each row's results are added
//! up in the order of the experts' numbers. So the result of a row doesn't depend on which other rows are in the pass.

use std::sync::Arc;

use pulp::{Simd, WithSimd};

use super::{
    exp::exp,
    ffn::Gate,
    kernels::on_vectors,
    linear::Linear,
    load::{LoadError, Source},
    scratch::Scratch,
};
use crate::model::spec::{ExpertTensors, ExpertsSpec, LinearSpec, MXFP4_GROUP, Routing, StackedFormat, expert_name};

/// The experts of a block.
pub(super) struct Experts {
    router: Linear,
    routing: Routing,
    active: usize,
    gate: Gate,
    experts: Vec<Expert>,
    hidden: usize,
}

struct Expert {
    gate_up: Linear,
    down: Linear,
}

/// Which expert sees which row, and the buffers for it.
#[derive(Default)]
pub(super) struct Grouping {
    /// What the router says, `[rows, experts]`.
    scores: Vec<f32>,
    /// The experts by falling score, for one row.
    order: Vec<usize>,
    chosen: Vec<Choice>,
    /// The rows of one expert, `[members, hidden]`.
    rows: Vec<f32>,
    /// What it makes of them, `[members, hidden]`.
    results: Vec<f32>,
}

/// A row that an expert sees, and the weight of its result.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Choice {
    expert: usize,
    row: usize,
    weight: f32,
}

impl Experts {
    pub(super) fn load(spec: &ExpertsSpec, hidden: usize, source: &mut Source<'_>) -> Result<Self, LoadError> {
        let (experts, alternate) = match &spec.tensors {
            ExpertTensors::Separate { gate, up, down, biases } => {
                (separate(spec, hidden, [gate, up, down], biases.as_ref(), source)?, false)
            }
            ExpertTensors::Stacked { gate_up, gate_up_bias, down, down_bias, format } => {
                let inner = spec.intermediate;
                let mut matrices = |name: &str, bias: &str, outputs: usize, inputs: usize| {
                    let stack = Stack { name, bias, shape: [spec.count, outputs, inputs], format: *format };
                    stack.load(source)
                };
                let gate_up = matrices(gate_up, gate_up_bias, 2 * inner, hidden)?;
                let down = matrices(down, down_bias, hidden, inner)?;
                (gate_up.into_iter().zip(down).map(|(gate_up, down)| Expert { gate_up, down }).collect(), true)
            }
        };
        Ok(Self {
            router: Linear::load_plain(&spec.router, source)?,
            routing: spec.routing,
            active: spec.active,
            gate: Gate { gating: spec.gating, width: spec.intermediate, alternate },
            experts,
            hidden,
        })
    }

    /// From `scratch.normed` to `scratch.fed`, both `[rows, hidden]`.
    pub(super) fn forward(&self, scratch: &mut Scratch) {
        let Scratch { normed, gate_up: both, inner, fed, grouping, room, .. } = scratch;
        self.router.forward(normed, &mut grouping.scores, room);
        grouping.choose(self.experts.len(), self.active, self.routing);
        let Grouping { chosen, rows, results, .. } = grouping;
        fed.clear();
        fed.resize(normed.len(), 0.0);
        for members in chosen.chunk_by(|one, next| one.expert == next.expert) {
            let expert = &self.experts[members[0].expert];
            rows.clear();
            members
                .iter()
                .for_each(|member| rows.extend_from_slice(&normed[member.row * self.hidden..][..self.hidden]));
            expert.gate_up.forward(rows, both, room);
            self.gate.forward(both, inner);
            expert.down.forward(inner, results, room);
            on_vectors(Weighted { members, results, hidden: self.hidden, sum: fed });
        }
    }
}

impl Grouping {
    /// Of each row's `scores`, chooses the `active` experts with the highest, the lower number where two are equal. Leaves
    /// them sorted by expert, then by row.
    fn choose(&mut self, experts: usize, active: usize, routing: Routing) {
        let Self { scores, order, chosen, .. } = self;
        chosen.clear();
        for (row, scores) in scores.chunks_exact_mut(experts).enumerate() {
            order.clear();
            order.extend(0..experts);
            order.sort_unstable_by(|a, b| scores[*b].total_cmp(&scores[*a]).then(a.cmp(b)));
            let highest = order.first().map_or(0.0, |first| scores[*first]);
            on_vectors(Powers { scores, highest });
            let counted = match routing {
                Routing::Probabilities => &order[..],
                Routing::Normalised => &order[..active],
            };
            let sum: f32 = counted.iter().map(|expert| scores[*expert]).sum();
            let weighted =
                order.iter().take(active).map(|expert| Choice { expert: *expert, row, weight: scores[*expert] / sum });
            chosen.extend(weighted);
        }
        chosen.sort_unstable_by_key(|choice| (choice.expert, choice.row));
    }
}

/// `scores = e^(scores - highest)`.
struct Powers<'a> {
    scores: &'a mut [f32],
    highest: f32,
}

impl WithSimd for Powers<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let highest = simd.splat_f32s(self.highest);
        let (vectors, last) = S::as_mut_simd_f32s(self.scores);
        for x in vectors {
            *x = exp(simd, simd.sub_f32s(*x, highest));
        }
        if !last.is_empty() {
            let x = simd.partial_load_f32s(last);
            simd.partial_store_f32s(last, exp(simd, simd.sub_f32s(x, highest)));
        }
    }
}

/// Adds an expert's results to the rows that it saw.
struct Weighted<'a> {
    members: &'a [Choice],
    /// `[members, hidden]`.
    results: &'a [f32],
    hidden: usize,
    /// `[rows, hidden]`.
    sum: &'a mut [f32],
}

impl WithSimd for Weighted<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        for (Choice { row, weight, .. }, result) in self.members.iter().zip(self.results.chunks_exact(self.hidden)) {
            let sum = &mut self.sum[row * self.hidden..][..self.hidden];
            sum.iter_mut().zip(result).for_each(|(sum, y)| *sum += weight * y);
        }
    }
}

/// Experts with three matrices each, and perhaps as many biases.
fn separate(
    spec: &ExpertsSpec,
    hidden: usize,
    names: [&str; 3],
    biases: Option<&[String; 3]>,
    source: &mut Source<'_>,
) -> Result<Vec<Expert>, LoadError> {
    let load = |expert: usize| {
        let matrix = |part: usize, outputs: usize, inputs: usize| LinearSpec {
            weight: expert_name(names[part], expert),
            bias: biases.map(|biases| expert_name(&biases[part], expert)),
            outputs,
            inputs,
            rows: None,
        };
        let [gate, up] = [0, 1].map(|part| matrix(part, spec.intermediate, hidden));
        let down = matrix(2, hidden, spec.intermediate);
        Ok(Expert { gate_up: Linear::load(&[&gate, &up], source)?, down: Linear::load(&[&down], source)? })
    };
    (0..spec.count).map(load).collect()
}

/// The same matrix of all experts in one tensor.
struct Stack<'a> {
    name: &'a str,
    bias: &'a str,
    /// Experts, outputs, inputs.
    shape: [usize; 3],
    format: StackedFormat,
}

impl Stack<'_> {
    fn load(&self, source: &mut Source<'_>) -> Result<Vec<Linear>, LoadError> {
        let [count, outputs, inputs] = self.shape;
        let biases = source.vector_of(self.bias, &[count, outputs])?;
        let matrices = match self.format {
            StackedFormat::Transposed => {
                let matrix = |expert| source.transposed(self.name, expert, [count, inputs, outputs]);
                (0..count).map(matrix).collect::<Result<_, _>>()?
            }
            StackedFormat::Mxfp4 => source.mxfp4(self.name, [count, outputs, inputs / MXFP4_GROUP])?,
        };
        let with_bias = matrices.into_iter().zip(biases.chunks_exact(outputs));
        Ok(with_bias.map(|(matrix, bias)| Linear::new(vec![Arc::new(matrix)], Some(bias.to_vec()))).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_scores_are_chosen_and_weighted() {
        let scores = [0.1f32, 2.0, -1.0, 1.0];
        let probabilities: Vec<f32> = scores.iter().map(|s| s.exp()).collect();
        let sum: f32 = probabilities.iter().sum();
        let close = |scores: &[f32], active: usize, routing: Routing, expected: &[(usize, f32)]| {
            let mut grouping = Grouping { scores: scores.to_vec(), ..Grouping::default() };
            grouping.choose(scores.len(), active, routing);
            assert_eq!(grouping.chosen.len(), expected.len());
            for (found, expected) in grouping.chosen.iter().zip(expected) {
                assert_eq!((found.expert, found.row), (expected.0, 0));
                assert!((found.weight - expected.1).abs() < 1e-6);
            }
        };
        let each = [(1, probabilities[1] / sum), (3, probabilities[3] / sum)];
        close(&scores, 2, Routing::Probabilities, &each);
        let both = probabilities[1] + probabilities[3];
        close(&scores, 2, Routing::Normalised, &[(1, probabilities[1] / both), (3, probabilities[3] / both)]);
        close(&[1.0, 3.0, 3.0], 1, Routing::Normalised, &[(1, 1.0)]);
    }

    #[test]
    fn rows_are_sorted_by_expert() {
        let mut grouping = Grouping { scores: vec![0.0, 1.0, 2.0, 9.0, 8.0, 7.0], ..Grouping::default() };
        grouping.choose(3, 2, Routing::Normalised);
        let places: Vec<_> = grouping.chosen.iter().map(|choice| (choice.expert, choice.row)).collect();
        assert_eq!(places, [(0, 1), (1, 0), (1, 1), (2, 0)]);
    }
}
