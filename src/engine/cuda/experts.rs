//! A mixture of experts on a device.
//!
//! Experts in floating point are used without asking the host which were chosen. The router's scores are sorted on the
//! device, and nothing that follows depends on them in its shape:
//!
//! - few rows (decoding): each row's chosen experts are copied next to each other, and are one batched product;
//! - many rows: all experts see all rows in one batched product, and what wasn't chosen is left out of the sum. It
//!   computes more than was asked for, but reads every weight once, and a device has arithmetic to spare where a round
//!   trip to the host for each block would leave it idle.
//!
//! Packed experts can't be copied or multiplied in one batch. With them the host waits for the choice, once a block, and
//! then queues the products of the experts that were chosen, each with its own rows: the one exception to the rule that a
//! pass waits only at its end. It costs some tens of microseconds a block; using all experts would cost far more.

mod packed;
mod stack;

use candle_core::{Result as TensorResult, Tensor};
use candle_nn::ops::softmax_last_dim;

use self::{
    packed::Packed,
    stack::{Separate, Stack, Stacked},
};
use super::{ffn::Gate, linear::Linear, upload::Upload};
use crate::{
    engine::load::LoadError,
    model::spec::{ExpertTensors, ExpertsSpec, Routing},
};

/// A copied expert is read, written and read again; one of the stack is read.
const COST_OF_A_COPY: usize = 3;
/// Numbers of the widest intermediate result, beyond which rows are taken in parts: 256 MiB in f32.
const MAX_INTERMEDIATE: usize = 1 << 26;

/// The experts of a block.
pub(super) struct Experts {
    /// In f32: a choice must not hang on the last bit of a rounded score.
    router: Linear,
    routing: Routing,
    active: usize,
    count: usize,
    gate: Gate,
    weights: Weights,
}

/// The experts' matrices.
enum Weights {
    Stacks { gate_up: Stack, down: Stack },
    Packed(Vec<Packed>),
}

impl Experts {
    pub(super) fn load(spec: &ExpertsSpec, hidden: usize, upload: &mut Upload<'_, '_>) -> Result<Self, LoadError> {
        let inner = spec.intermediate;
        let alternate = matches!(spec.tensors, ExpertTensors::Stacked { .. });
        let weights = match (packed::load(spec, hidden, upload)?, &spec.tensors) {
            (Some(packed), _) => Weights::Packed(packed),
            (None, ExpertTensors::Separate { gate, up, down, biases }) => {
                let [gate_bias, up_bias, down_bias] = match biases {
                    Some([gate, up, down]) => [Some(gate), Some(up), Some(down)],
                    None => [None, None, None],
                };
                let gate_up = Separate { names: &[(gate, gate_bias), (up, up_bias)], count: spec.count };
                let down = Separate { names: &[(down, down_bias)], count: spec.count };
                Weights::Stacks {
                    gate_up: gate_up.load([inner, hidden], upload)?,
                    down: down.load([hidden, inner], upload)?,
                }
            }
            (None, ExpertTensors::Stacked { gate_up, gate_up_bias, down, down_bias, format }) => {
                let gate_up = Stacked { name: gate_up, bias: gate_up_bias, shape: [spec.count, 2 * inner, hidden] };
                let down = Stacked { name: down, bias: down_bias, shape: [spec.count, hidden, inner] };
                Weights::Stacks { gate_up: gate_up.load(*format, upload)?, down: down.load(*format, upload)? }
            }
        };
        Ok(Self {
            router: upload.exact(&spec.router)?,
            routing: spec.routing,
            active: spec.active,
            count: spec.count,
            gate: Gate::new(spec.gating, alternate, upload.device())?,
            weights,
        })
    }

    /// From `[rows, hidden]` to `[rows, hidden]`.
    pub(super) fn forward(&self, x: &Tensor) -> TensorResult<Tensor> {
        let (rows, hidden) = x.dims2()?;
        let (gate_up, down) = match &self.weights {
            Weights::Packed(experts) => {
                let (ids, weights) = self.route(x)?;
                return packed::forward(experts, &self.gate, x, [&ids, &weights]);
            }
            Weights::Stacks { gate_up, down } => (gate_up, down),
        };
        if COST_OF_A_COPY * rows * self.active <= self.count {
            return self.chosen(x, gate_up, down);
        }
        let at_once = (MAX_INTERMEDIATE / (self.count * hidden.max(gate_up.outputs()?))).max(1);
        let part = |first| self.all(&x.narrow(0, first, at_once.min(rows - first))?, gate_up, down);
        match &(0..rows).step_by(at_once).map(part).collect::<TensorResult<Vec<_>>>()?[..] {
            [only] => Ok(only.clone()),
            parts => Tensor::cat(parts, 0),
        }
    }

    /// The chosen experts of each row and their weights, `[rows, active]` both.
    fn route(&self, x: &Tensor) -> TensorResult<(Tensor, Tensor)> {
        let scores = self.router.forward(x)?;
        let ids = scores.arg_sort_last_dim(false)?.narrow(1, 0, self.active)?.contiguous()?;
        let weights = match self.routing {
            Routing::Probabilities => softmax_last_dim(&scores)?.gather(&ids, 1)?,
            Routing::Normalised => softmax_last_dim(&scores.gather(&ids, 1)?)?,
        };
        Ok((ids, weights))
    }

    /// For few rows: copies of the experts that each has chosen.
    fn chosen(&self, x: &Tensor, gate_up: &Stack, down: &Stack) -> TensorResult<Tensor> {
        let (rows, hidden) = x.dims2()?;
        let (ids, weights) = self.route(x)?;
        let pairs = rows * self.active;
        let ids = ids.reshape(pairs)?;
        let x = x.unsqueeze(1)?.broadcast_as((rows, self.active, hidden))?.contiguous()?.reshape((pairs, 1, hidden))?;
        let inner = self.gate.forward(&gate_up.select(&ids)?.forward(&x)?)?;
        let y = down.select(&ids)?.forward(&inner)?.reshape((rows, self.active, hidden))?;
        y.broadcast_mul(&weights.unsqueeze(2)?)?.sum(1)
    }

    /// For many rows: all experts, of which each row leaves some out.
    fn all(&self, x: &Tensor, gate_up: &Stack, down: &Stack) -> TensorResult<Tensor> {
        let (rows, hidden) = x.dims2()?;
        let (ids, weights) = self.route(x)?;
        let weights = Tensor::zeros((rows, self.count), weights.dtype(), x.device())?.scatter(&ids, &weights, 1)?;
        let weights = weights.t()?.contiguous()?.unsqueeze(2)?;
        // The same rows for all experts, without copies of them.
        let x = x.to_dtype(gate_up.weights.dtype())?.unsqueeze(0)?.broadcast_as((self.count, rows, hidden))?;
        let inner = self.gate.forward(&gate_up.forward(&x)?)?;
        let y = down.forward(&inner)?.broadcast_mul(&weights)?;
        // Selected, and not only multiplied by zero: an expert that overflows for a row that didn't choose it is harmless.
        let is_chosen = weights.gt(&weights.zeros_like()?)?.broadcast_as(y.shape())?;
        is_chosen.where_cond(&y, &y.zeros_like()?)?.sum(0)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::{super::linear::Weight, *};
    use crate::model::spec::{Activation, Gating};

    fn random(shape: &[usize]) -> Tensor {
        Tensor::rand(-1f32, 1.0, shape, &Device::Cpu).unwrap()
    }

    /// The matrix of each expert of a stack.
    fn apart(stack: &Stack) -> Vec<Linear> {
        let expert = |tensor: &Tensor, expert: usize| tensor.get(expert).unwrap();
        let matrix = |weights: Tensor| if stack.inputs_first { weights.t().unwrap() } else { weights };
        let bias = |index: usize| stack.bias.as_ref().map(|bias| expert(bias, index).squeeze(0).unwrap());
        let linear = |index| Linear::new(vec![Weight::Floats(matrix(expert(&stack.weights, index)))], bias(index));
        (0..stack.weights.dim(0).unwrap()).map(linear).collect()
    }

    #[test]
    fn copied_experts_all_experts_and_single_experts_give_the_same() {
        let (count, hidden, inner) = (9, 16, 24);
        for (routing, inputs_first) in [(Routing::Normalised, false), (Routing::Probabilities, true)] {
            let stack = |outputs: usize, inputs: usize, bias: bool| Stack {
                weights: random(&if inputs_first { [count, inputs, outputs] } else { [count, outputs, inputs] }),
                inputs_first,
                bias: bias.then(|| random(&[count, 1, outputs])),
            };
            let (gate_up, down) = (stack(2 * inner, hidden, true), stack(hidden, inner, inputs_first));
            let experts = apart(&gate_up).into_iter().zip(apart(&down));
            let single: Vec<Packed> = experts.map(|(gate_up, down)| Packed { gate_up, down }).collect();
            let gating = Gating::Clamped { alpha: 1.702, limit: 3.0 };
            let gating = if inputs_first { gating } else { Gating::Plain(Activation::Silu) };
            let experts = Experts {
                router: Linear::new(vec![Weight::Floats(random(&[count, hidden]))], None),
                routing,
                active: 3,
                count,
                gate: Gate::new(gating, inputs_first, &Device::Cpu).unwrap(),
                weights: Weights::Packed(single),
            };
            let x = random(&[7, hidden]);
            let values = |y: Tensor| y.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            let expected = values(experts.forward(&x).unwrap());
            for found in [experts.chosen(&x, &gate_up, &down), experts.all(&x, &gate_up, &down)] {
                for (found, expected) in values(found.unwrap()).into_iter().zip(&expected) {
                    assert!((found - expected).abs() < 1e-4, "{found} for {expected}");
                }
            }
        }
    }
}
