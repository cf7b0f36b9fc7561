//! The feed-forward part of a block, on a device.

use candle_core::{D, Device, Result as TensorResult, Tensor};

use super::{experts::Experts, linear::Linear, upload::Upload};
use crate::{
    engine::load::LoadError,
    model::spec::{Activation, FfnSpec, Gating},
};

/// A loaded feed-forward part.
pub(super) enum Ffn {
    Gated { gate_up: Linear, gate: Gate, down: Linear },
    Plain { up: Linear, activation: Activation, down: Linear },
    Experts(Experts),
}

impl Ffn {
    pub(super) fn load(spec: &FfnSpec, hidden: usize, upload: &mut Upload<'_, '_>) -> Result<Self, LoadError> {
        match spec {
            FfnSpec::Gated { activation, gate, up, down } => Ok(Self::Gated {
                gate_up: upload.linear(&[gate, up])?,
                gate: Gate::new(Gating::Plain(*activation), false, upload.device())?,
                down: upload.linear(&[down])?,
            }),
            FfnSpec::Plain { activation, up, down } => {
                Ok(Self::Plain { up: upload.linear(&[up])?, activation: *activation, down: upload.linear(&[down])? })
            }
            FfnSpec::Experts(experts) => Ok(Self::Experts(Experts::load(experts, hidden, upload)?)),
        }
    }

    /// From `[rows, hidden]` to `[rows, hidden]`.
    pub(super) fn forward(&self, x: &Tensor) -> TensorResult<Tensor> {
        match self {
            Self::Gated { gate_up, gate, down } => down.forward(&gate.forward(&gate_up.forward(x)?)?),
            Self::Plain { up, activation, down } => down.forward(&activate(*activation, &up.forward(x)?)?),
            Self::Experts(experts) => experts.forward(x),
        }
    }
}

/// What stands between a gated part's two products.
pub(super) struct Gate {
    kind: Kind,
    /// Whether gate and up projection alternate number by number; otherwise one follows the other.
    alternate: bool,
}

enum Kind {
    Plain(Activation),
    /// The limits are tensors, so that a step needs nothing from the host.
    Clamped {
        alpha: f64,
        highest: Tensor,
        lowest: Tensor,
    },
}

impl Gate {
    pub(super) fn new(gating: Gating, alternate: bool, device: &Device) -> TensorResult<Self> {
        let kind = match gating {
            Gating::Plain(activation) => Kind::Plain(activation),
            Gating::Clamped { alpha, limit } => {
                let bound = |value: f64| Tensor::new(&[value as f32], device);
                Kind::Clamped { alpha, highest: bound(limit)?, lowest: bound(-limit)? }
            }
        };
        Ok(Self { kind, alternate })
    }

    /// From `[…, gate and up]` to half the width.
    pub(super) fn forward(&self, both: &Tensor) -> TensorResult<Tensor> {
        let width = both.dim(D::Minus1)? / 2;
        let (gate, up) = if self.alternate {
            let mut dims = both.dims().to_vec();
            if let Some(last) = dims.last_mut() {
                *last = width;
            }
            dims.push(2);
            let pairs = both.reshape(dims)?;
            let half = |index| pairs.narrow(D::Minus1, index, 1)?.squeeze(D::Minus1)?.contiguous();
            (half(0)?, half(1)?)
        } else {
            let half = |start| both.narrow(D::Minus1, start, width)?.contiguous();
            (half(0)?, half(width)?)
        };
        match &self.kind {
            Kind::Plain(activation) => activate(*activation, &gate)? * up,
            Kind::Clamped { alpha, highest, lowest } => {
                let gate = at_most(&gate, highest)?;
                let up = at_least(&at_most(&up, highest)?, lowest)?;
                (up + 1.0)? * ((gate * *alpha)?.silu()? / *alpha)?
            }
        }
    }
}

fn activate(activation: Activation, x: &Tensor) -> TensorResult<Tensor> {
    match activation {
        Activation::Silu => x.silu(),
        Activation::Gelu => x.gelu_erf(),
        Activation::GeluTanh => x.gelu(),
        Activation::GeluQuick => (x * 1.702)?.silu()? / 1.702,
        Activation::Relu => positive(x),
        Activation::ReluSquared => positive(x)?.sqr(),
    }
}

/// Not `relu`, `minimum` and `maximum`, which would make a number of a NaN: what compares with one is false, so it stays.
fn positive(x: &Tensor) -> TensorResult<Tensor> {
    let zeros = x.zeros_like()?;
    x.lt(&zeros)?.where_cond(&zeros, x)
}

fn at_most(x: &Tensor, bound: &Tensor) -> TensorResult<Tensor> {
    x.broadcast_gt(bound)?.where_cond(&bound.broadcast_as(x.shape())?, x)
}

fn at_least(x: &Tensor, bound: &Tensor) -> TensorResult<Tensor> {
    x.broadcast_lt(bound)?.where_cond(&bound.broadcast_as(x.shape())?, x)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(values: &[f32]) -> Tensor {
        Tensor::from_slice(values, (1, values.len()), &Device::Cpu).unwrap()
    }

    #[test]
    fn activations_and_limits_keep_a_nan() {
        use Activation::{Gelu, GeluQuick, GeluTanh, Relu, ReluSquared, Silu};
        for activation in [Silu, Gelu, GeluTanh, GeluQuick, Relu, ReluSquared] {
            let y = activate(activation, &row(&[f32::NAN, 0.5])).unwrap().to_vec2::<f32>().unwrap();
            assert!(y[0][0].is_nan() && y[0][1] > 0.0, "{activation:?}");
        }
        let clamped = Gate::new(Gating::Clamped { alpha: 1.702, limit: 7.0 }, false, &Device::Cpu).unwrap();
        for both in [[f32::NAN, 1.0], [1.0, f32::NAN]] {
            assert!(clamped.forward(&row(&both)).unwrap().to_vec2::<f32>().unwrap()[0][0].is_nan());
        }
    }

    #[test]
    fn gate_and_up_lie_side_by_side_or_alternate() {
        let relu = |alternate| Gate::new(Gating::Plain(Activation::Relu), alternate, &Device::Cpu).unwrap();
        let both = Tensor::new(&[[1f32, 2.0, 3.0, 4.0], [-1.0, 1.0, 5.0, 6.0]], &Device::Cpu).unwrap();
        assert_eq!(relu(false).forward(&both).unwrap().to_vec2::<f32>().unwrap(), [[3.0, 8.0], [0.0, 6.0]]);
        assert_eq!(relu(true).forward(&both).unwrap().to_vec2::<f32>().unwrap(), [[2.0, 12.0], [0.0, 30.0]]);
    }
}
