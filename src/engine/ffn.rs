//! The feed-forward part of a block.

use candle_core::{Error as TensorError, Tensor, cpu::erf::erf_f64};
use rayon::prelude::*;

use super::{
    experts::Experts,
    linear::Linear,
    load::{LoadError, Source},
    tensor,
};
use crate::model::spec::{Activation, FfnSpec, Gating};

/// Numbers below which a second thread costs more than it saves.
const MIN_PARALLEL: usize = 1 << 14;

/// A loaded feed-forward part.
pub(super) enum Ffn {
    Gated { gate_up: Linear, gate: Gate, down: Linear },
    Plain { up: Linear, activation: Activation, down: Linear },
    Experts(Experts),
}

impl Ffn {
    pub(super) fn load(spec: &FfnSpec, hidden: usize, source: &mut Source<'_>) -> Result<Self, LoadError> {
        match spec {
            FfnSpec::Gated { activation, gate, up, down } => Ok(Self::Gated {
                gate_up: Linear::load(&[gate, up], source)?,
                gate: Gate { gating: Gating::Plain(*activation), width: gate.outputs, alternate: false },
                down: Linear::load(&[down], source)?,
            }),
            FfnSpec::Plain { activation, up, down } => Ok(Self::Plain {
                up: Linear::load(&[up], source)?,
                activation: *activation,
                down: Linear::load(&[down], source)?,
            }),
            FfnSpec::Experts(experts) => Ok(Self::Experts(Experts::load(experts, hidden, source)?)),
        }
    }

    /// From `[rows, hidden]` to `[rows, hidden]`.
    pub(super) fn forward(&self, x: &Tensor) -> Result<Tensor, TensorError> {
        match self {
            Self::Gated { gate_up, gate, down } => down.forward(&gate.forward(&gate_up.forward(x)?)?),
            Self::Plain { up, activation, down } => {
                let inner = up.forward(x)?;
                let (_, width) = inner.dims2()?;
                let mut inner = tensor::with_f32(&inner, <[f32]>::to_vec)?;
                let each = |x: &mut f32| *x = activate(*activation, *x);
                if inner.len() < MIN_PARALLEL {
                    inner.iter_mut().for_each(each);
                } else {
                    inner.par_iter_mut().for_each(each);
                }
                down.forward(&tensor::matrix(inner, width)?)
            }
            Self::Experts(experts) => experts.forward(x),
        }
    }
}

/// What stands between a gated part's two products.
#[derive(Clone, Copy)]
pub(super) struct Gate {
    pub(super) gating: Gating,
    /// Width of the gate, and of the up projection.
    pub(super) width: usize,
    /// Whether gate and up projection alternate number by number; otherwise one follows the other.
    pub(super) alternate: bool,
}

impl Gate {
    /// From `[rows, gate and up]` to `[rows, width]`.
    pub(super) fn forward(&self, both: &Tensor) -> Result<Tensor, TensorError> {
        tensor::matrix(tensor::with_f32(both, |both| self.rows(both))?, self.width)
    }

    fn rows(&self, both: &[f32]) -> Vec<f32> {
        let mut product = vec![0.0; both.len() / 2];
        let row = |(product, both): (&mut [f32], &[f32])| {
            if self.alternate {
                for (product, pair) in product.iter_mut().zip(both.chunks_exact(2)) {
                    *product = gated(self.gating, pair[0], pair[1]);
                }
            } else {
                let (gate, up) = both.split_at(self.width);
                for ((product, gate), up) in product.iter_mut().zip(gate).zip(up) {
                    *product = gated(self.gating, *gate, *up);
                }
            }
        };
        let width = self.width;
        if product.len() < MIN_PARALLEL {
            product.chunks_exact_mut(width).zip(both.chunks_exact(2 * width)).for_each(row);
        } else {
            product.par_chunks_exact_mut(width).zip(both.par_chunks_exact(2 * width)).for_each(row);
        }
        product
    }
}

fn gated(gating: Gating, gate: f32, up: f32) -> f32 {
    match gating {
        Gating::Plain(activation) => activate(activation, gate) * up,
        Gating::Clamped { alpha, limit } => {
            // `min` and `clamp` of the standard library differ in what they make of a NaN; it has to stay one.
            let limit = limit as f32;
            let gate = if gate > limit { limit } else { gate };
            let up = up.clamp(-limit, limit);
            (up + 1.0) * (gate / (1.0 + (-gate * alpha as f32).exp()))
        }
    }
}

fn activate(activation: Activation, x: f32) -> f32 {
    match activation {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::Gelu => {
            let x = f64::from(x);
            (0.5 * x * (1.0 + erf_f64(x * std::f64::consts::FRAC_1_SQRT_2))) as f32
        }
        Activation::GeluTanh => {
            const ROOT_OF_2_OVER_PI: f32 = 0.797_884_6;
            0.5 * x * (1.0 + (ROOT_OF_2_OVER_PI * (x + 0.044_715 * x * x * x)).tanh())
        }
        Activation::GeluQuick => x / (1.0 + (-1.702 * x).exp()),
        Activation::Relu => positive(x),
        Activation::ReluSquared => positive(x) * positive(x),
    }
}

/// Not `max`, which would make a number of a NaN.
fn positive(x: f32) -> f32 {
    if x < 0.0 { 0.0 } else { x }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn activations_have_the_values_that_torch_computes() {
        for (activation, at, expected) in [
            (Activation::Silu, 1.5, 1.226_361_7),
            (Activation::Gelu, 1.5, 1.399_789_2),
            (Activation::Gelu, -0.7, -0.169_374_46),
            (Activation::GeluTanh, 1.5, 1.399_571_5),
            (Activation::GeluTanh, -0.7, -0.169_429_87),
            (Activation::Relu, -0.7, 0.0),
            (Activation::Relu, 0.7, 0.7),
            (Activation::GeluQuick, 1.5, 1.391_662_2),
            (Activation::ReluSquared, -0.7, 0.0),
            (Activation::ReluSquared, 0.7, 0.49),
        ] {
            let found = activate(activation, at);
            assert!((found - expected).abs() < 1e-5, "{activation:?} of {at}: {found}");
        }
        use Activation::{Gelu, GeluQuick, GeluTanh, Relu, ReluSquared, Silu};
        for activation in [Silu, Gelu, GeluTanh, GeluQuick, Relu, ReluSquared] {
            assert!(activate(activation, f32::NAN).is_nan());
        }
    }

    #[test]
    fn a_clamped_gate_follows_its_formula() {
        let gating = Gating::Clamped { alpha: 1.702, limit: 7.0 };
        let formula = |gate: f32, up: f32| (up + 1.0) * gate / (1.0 + (-1.702 * gate).exp());
        assert!((gated(gating, 0.5, -0.3) - formula(0.5, -0.3)).abs() < 1e-6);
        assert!((gated(gating, 50.0, 50.0) - formula(7.0, 7.0)).abs() < 1e-5);
        assert!((gated(gating, -50.0, -50.0) - formula(-50.0, -7.0)).abs() < 1e-5);
        assert!(gated(gating, f32::NAN, 1.0).is_nan() && gated(gating, 1.0, f32::NAN).is_nan());
    }

    #[test]
    fn gate_and_up_lie_side_by_side_or_alternate() {
        let gate = Gate { gating: Gating::Plain(Activation::Relu), width: 2, alternate: false };
        assert_eq!(gate.rows(&[1.0, 2.0, 3.0, 4.0, -1.0, 1.0, 5.0, 6.0]), [3.0, 8.0, 0.0, 6.0]);
        let gate = Gate { alternate: true, ..gate };
        assert_eq!(gate.rows(&[1.0, 2.0, 3.0, 4.0, -1.0, 1.0, 5.0, 6.0]), [2.0, 12.0, 0.0, 30.0]);
    }
}
