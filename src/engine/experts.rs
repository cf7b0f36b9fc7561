//! A mixture of experts.
//!
//! The rows of a pass are sorted by expert, so that each expert's weights are read once, and each row's results are added
//! up in the order of the experts' numbers. So the result of a row doesn't depend on which other rows are in the pass.

use std::sync::Arc;

use candle_core::{Error as TensorError, Tensor};

use super::{
    ffn::Gate,
    linear::Linear,
    load::{LoadError, Source},
    tensor,
};
use crate::model::spec::{ExpertTensors, ExpertsSpec, LinearSpec, MXFP4_GROUP, Routing, StackedFormat, expert_name};

/// The experts of a block.
pub(super) struct Experts {
    router: Linear,
    routing: Routing,
    active: usize,
    gate: Gate,
    experts: Vec<Expert>,
}

struct Expert {
    gate_up: Linear,
    down: Linear,
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
        })
    }

    /// From `[rows, hidden]` to `[rows, hidden]`.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor, TensorError> {
        let (_, hidden) = x.dims2()?;
        let scores = self.router.forward(x)?;
        // Of each expert, the rows that it sees and its weight in each.
        let mut members: Vec<Vec<(usize, f32)>> = vec![Vec::new(); self.experts.len()];
        tensor::with_f32(&scores, |scores| {
            for (row, scores) in scores.chunks_exact(self.experts.len()).enumerate() {
                for (expert, weight) in choose(scores, self.active, self.routing) {
                    members[expert].push((row, weight));
                }
            }
        })?;
        let sum = tensor::with_f32(x, |x| {
            let mut sum = vec![0.0; x.len()];
            for (expert, members) in self.experts.iter().zip(&members).filter(|(_, members)| !members.is_empty()) {
                let rows = members.iter().flat_map(|(row, _)| &x[row * hidden..][..hidden]).copied().collect();
                let inner = self.gate.forward(&expert.gate_up.forward(&tensor::matrix(rows, hidden)?)?)?;
                tensor::with_f32(&expert.down.forward(&inner)?, |y| {
                    for ((row, weight), y) in members.iter().zip(y.chunks_exact(hidden)) {
                        for (sum, y) in sum[row * hidden..][..hidden].iter_mut().zip(y) {
                            *sum += weight * y;
                        }
                    }
                })?;
            }
            Ok::<_, TensorError>(sum)
        })??;
        tensor::matrix(sum, hidden)
    }
}

/// The `active` experts with the highest scores, the lower number where two are equal, and their weights.
fn choose(scores: &[f32], active: usize, routing: Routing) -> Vec<(usize, f32)> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
    let highest = order.first().map_or(0.0, |first| scores[*first]);
    let counted = match routing {
        Routing::Probabilities => &order[..],
        Routing::Normalised => &order[..active],
    };
    let sum: f32 = counted.iter().map(|expert| (scores[*expert] - highest).exp()).sum();
    order.iter().take(active).map(|expert| (*expert, (scores[*expert] - highest).exp() / sum)).collect()
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
        let close = |found: &[(usize, f32)], expected: &[(usize, f32)]| {
            assert_eq!(found.len(), expected.len());
            for (found, expected) in found.iter().zip(expected) {
                assert_eq!(found.0, expected.0);
                assert!((found.1 - expected.1).abs() < 1e-6);
            }
        };
        close(&choose(&scores, 2, Routing::Probabilities), &[(1, probabilities[1] / sum), (3, probabilities[3] / sum)]);
        let both = probabilities[1] + probabilities[3];
        close(&choose(&scores, 2, Routing::Normalised), &[(1, probabilities[1] / both), (3, probabilities[3] / both)]);
        assert_eq!(choose(&[1.0, 3.0, 3.0], 1, Routing::Normalised), [(1, 1.0)]);
    }
}
