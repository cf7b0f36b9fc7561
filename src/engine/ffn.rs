//! The feed-forward part of a block.

use std::{cell::RefCell, ops::Range};

use pulp::{Simd, WithSimd};
use rayon::prelude::*;

use super::{
    exp::{erf, exp, tanh},
    experts::Experts,
    kernels::{Path, Rows, Slot, cut, grown, on_vectors},
    linear::{Linear, plain_slots},
    load::{LoadError, Source},
    product::{Room, Tiles},
    scratch::Scratch,
    threads,
};
use crate::model::spec::{Activation, FfnSpec, Gating};

/// Numbers below which a second thread costs more than it saves.
const MIN_PARALLEL: usize = 1 << 13;
/// Pairs of gate and up projection that are taken apart at a time, where they alternate.
const PAIRS: usize = 64;

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

    /// Places for the rows that it reads, besides `scratch.normed`.
    pub(super) fn slots<'a>(&self, rows: usize, prepared: &'a mut Vec<Rows>) -> Vec<Slot<'a>> {
        match self {
            Self::Gated { gate_up: first, .. } | Self::Plain { up: first, .. } => first.slots(rows, prepared),
            Self::Experts(_) => plain_slots(rows),
        }
    }

    /// From `scratch.normed`, whose rows are also in the places that [`Ffn::slots`] gave, to what [`Ffn::collect`] takes.
    pub(super) fn forward(&self, scratch: &mut Scratch) {
        let Scratch { normed, inner, room, .. } = scratch;
        let (first, down) = match self {
            Self::Gated { gate_up, down, .. } => (gate_up, down),
            Self::Plain { up, down, .. } => (up, down),
            Self::Experts(experts) => return experts.forward(scratch),
        };
        first.multiply(normed, room);
        let Room { rows: prepared, tiles, .. } = room;
        let (rows, width) = (tiles.rows(), down.inputs());
        inner.resize(rows * width, 0.0);
        let mut rest = &mut inner[..];
        let tasks = down.slots(rows, prepared).into_iter().map(|slot| {
            let inner = cut(&mut rest, slot.rows().len() * width);
            (slot, inner)
        });
        threads::each(tasks.collect(), rows * width >= MIN_PARALLEL, |(slot, inner)| {
            match self {
                Self::Gated { gate, .. } => BOTH.with_borrow_mut(|both| {
                    let both = grown(both, 2 * inner.len());
                    first.collect(tiles, slot.rows(), both);
                    on_vectors(GatedRows { gate: *gate, both, product: inner });
                }),
                Self::Plain { activation, .. } => {
                    first.collect(tiles, slot.rows(), inner);
                    on_vectors(Activated { activation: *activation, values: inner });
                }
                Self::Experts(_) => {}
            }
            slot.fill(inner, Path::chosen());
        });
        down.multiply(inner, room);
    }

    /// Takes some rows of the result into `fed`, `[rows, hidden]`; those of a mixture are there already.
    pub(super) fn collect(&self, tiles: &Tiles, rows: Range<usize>, fed: &mut [f32]) {
        match self {
            Self::Gated { down, .. } | Self::Plain { down, .. } => down.collect(tiles, rows, fed),
            Self::Experts(_) => {}
        }
    }
}

thread_local! {
    /// Gate and up projection of some rows, while they are in hand.
    static BOTH: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
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
    pub(super) fn forward(&self, both: &[f32], product: &mut Vec<f32>) {
        product.resize(both.len() / 2, 0.0);
        let at_once = (MIN_PARALLEL / 2 / self.width.max(1)).max(1) * self.width;
        if product.len() < MIN_PARALLEL {
            on_vectors(GatedRows { gate: *self, both, product });
        } else {
            product.par_chunks_mut(at_once).zip(both.par_chunks(2 * at_once)).for_each(|(product, both)| {
                on_vectors(GatedRows { gate: *self, both, product });
            });
        }
    }
}

struct GatedRows<'a> {
    gate: Gate,
    both: &'a [f32],
    product: &'a mut [f32],
}

impl WithSimd for GatedRows<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Gate { gating, width, alternate } = self.gate;
        for (product, both) in self.product.chunks_exact_mut(width).zip(self.both.chunks_exact(2 * width)) {
            if alternate {
                for (product, pairs) in product.chunks_mut(PAIRS).zip(both.chunks(2 * PAIRS)) {
                    let (mut gates, mut ups) = ([0.0; PAIRS], [0.0; PAIRS]);
                    for ((gate, up), pair) in gates.iter_mut().zip(&mut ups).zip(pairs.as_chunks::<2>().0) {
                        [*gate, *up] = *pair;
                    }
                    let count = product.len();
                    gated_row(simd, gating, [&gates[..count], &ups[..count]], product);
                }
            } else {
                let (gate, up) = both.split_at(width);
                gated_row(simd, gating, [gate, up], product);
            }
        }
    }
}

#[inline(always)]
fn gated_row<S: Simd>(simd: S, gating: Gating, [gate, up]: [&[f32]; 2], product: &mut [f32]) {
    let (gates, last_gates) = S::as_simd_f32s(gate);
    let (ups, last_ups) = S::as_simd_f32s(up);
    let (products, last) = S::as_mut_simd_f32s(product);
    for ((product, gate), up) in products.iter_mut().zip(gates).zip(ups) {
        *product = gated(simd, gating, *gate, *up);
    }
    if !last.is_empty() {
        let (gate, up) = (simd.partial_load_f32s(last_gates), simd.partial_load_f32s(last_ups));
        simd.partial_store_f32s(last, gated(simd, gating, gate, up));
    }
}

#[inline(always)]
fn gated<S: Simd>(simd: S, gating: Gating, gate: S::f32s, up: S::f32s) -> S::f32s {
    match gating {
        Gating::Plain(activation) => simd.mul_f32s(activate(simd, activation, gate), up),
        Gating::Clamped { alpha, limit } => {
            // By comparisons: what `min` and `max` make of a NaN differs from machine to machine, and it has to stay one.
            let (high, low) = (simd.splat_f32s(limit as f32), simd.splat_f32s(-limit as f32));
            let gate = simd.select_f32s(simd.greater_than_f32s(gate, high), high, gate);
            let up = simd.select_f32s(simd.greater_than_f32s(up, high), high, up);
            let up = simd.select_f32s(simd.less_than_f32s(up, low), low, up);
            simd.mul_f32s(simd.add_f32s(up, simd.splat_f32s(1.0)), swish(simd, gate, alpha as f32))
        }
    }
}

/// Applies an activation to every number of `values`.
struct Activated<'a> {
    activation: Activation,
    values: &'a mut [f32],
}

impl WithSimd for Activated<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let (vectors, last) = S::as_mut_simd_f32s(self.values);
        for x in vectors {
            *x = activate(simd, self.activation, *x);
        }
        if !last.is_empty() {
            let x = activate(simd, self.activation, simd.partial_load_f32s(last));
            simd.partial_store_f32s(last, x);
        }
    }
}

#[inline(always)]
fn activate<S: Simd>(simd: S, activation: Activation, x: S::f32s) -> S::f32s {
    // x/2 · (1 + y).
    let half = |y: S::f32s| {
        let share = simd.add_f32s(simd.splat_f32s(1.0), y);
        simd.mul_f32s(simd.mul_f32s(simd.splat_f32s(0.5), x), share)
    };
    // Not `max`, which would make a number of a NaN on some machines.
    let positive = simd.select_f32s(simd.less_than_f32s(x, simd.splat_f32s(0.0)), simd.splat_f32s(0.0), x);
    match activation {
        Activation::Silu => swish(simd, x, 1.0),
        Activation::Gelu => half(erf(simd, simd.mul_f32s(x, simd.splat_f32s(std::f32::consts::FRAC_1_SQRT_2)))),
        Activation::GeluTanh => {
            const ROOT_OF_2_OVER_PI: f32 = 0.797_884_6;
            let cube = simd.mul_f32s(simd.mul_f32s(x, x), x);
            let inner = simd.mul_add_f32s(simd.splat_f32s(0.044_715), cube, x);
            half(tanh(simd, simd.mul_f32s(simd.splat_f32s(ROOT_OF_2_OVER_PI), inner)))
        }
        Activation::GeluQuick => swish(simd, x, 1.702),
        Activation::Relu => positive,
        Activation::ReluSquared => simd.mul_f32s(positive, positive),
    }
}

/// `x · sigmoid(gain · x)`.
#[inline(always)]
fn swish<S: Simd>(simd: S, x: S::f32s, gain: f32) -> S::f32s {
    let power = exp(simd, simd.mul_f32s(x, simd.splat_f32s(-gain)));
    simd.div_f32s(x, simd.add_f32s(simd.splat_f32s(1.0), power))
}

#[cfg(test)]
mod tests {
    use pulp::{Scalar, Scalar128b, Scalar256b, Scalar512b};

    use super::*;

    fn of(activation: Activation, x: f32) -> f32 {
        let mut values = [x];
        on_vectors(Activated { activation, values: &mut values });
        values[0]
    }

    fn pair(gating: Gating, gate: f32, up: f32) -> f32 {
        rows(Gate { gating, width: 1, alternate: false }, &[gate, up])[0]
    }

    fn rows(gate: Gate, both: &[f32]) -> Vec<f32> {
        let mut product = vec![9.0; 3];
        gate.forward(both, &mut product);
        product
    }

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
            let found = of(activation, at);
            assert!((found - expected).abs() < 1e-5, "{activation:?} of {at}: {found}");
        }
        use Activation::{Gelu, GeluQuick, GeluTanh, Relu, ReluSquared, Silu};
        for activation in [Silu, Gelu, GeluTanh, GeluQuick, Relu, ReluSquared] {
            assert!(of(activation, f32::NAN).is_nan());
        }
    }

    #[test]
    fn a_clamped_gate_follows_its_formula() {
        let gating = Gating::Clamped { alpha: 1.702, limit: 7.0 };
        let formula = |gate: f32, up: f32| (up + 1.0) * gate / (1.0 + (-1.702 * gate).exp());
        assert!((pair(gating, 0.5, -0.3) - formula(0.5, -0.3)).abs() < 1e-6);
        assert!((pair(gating, 50.0, 50.0) - formula(7.0, 7.0)).abs() < 1e-5);
        assert!((pair(gating, -50.0, -50.0) - formula(-50.0, -7.0)).abs() < 1e-5);
        assert!(pair(gating, f32::NAN, 1.0).is_nan() && pair(gating, 1.0, f32::NAN).is_nan());
    }

    #[test]
    fn gate_and_up_lie_side_by_side_or_alternate() {
        let gate = Gate { gating: Gating::Plain(Activation::Relu), width: 2, alternate: false };
        assert_eq!(rows(gate, &[1.0, 2.0, 3.0, 4.0, -1.0, 1.0, 5.0, 6.0]), [3.0, 8.0, 0.0, 6.0]);
        let gate = Gate { alternate: true, ..gate };
        assert_eq!(rows(gate, &[1.0, 2.0, 3.0, 4.0, -1.0, 1.0, 5.0, 6.0]), [2.0, 12.0, 0.0, 30.0]);
    }

    #[test]
    fn bits_are_the_same_on_every_path_and_in_every_lane() {
        use Activation::{Gelu, GeluQuick, GeluTanh, Relu, ReluSquared, Silu};
        let both: Vec<f32> = (0..2 * 3 * 83).map(|i| ((i * 7919 % 10_007) as f32 / 10_007.0 - 0.5) * 40.0).collect();
        let plain = [Silu, Gelu, GeluTanh, GeluQuick, Relu, ReluSquared].map(Gating::Plain);
        for gating in plain.into_iter().chain([Gating::Clamped { alpha: 1.702, limit: 7.0 }]) {
            for alternate in [false, true] {
                let gate = Gate { gating, width: 83, alternate };
                let place = |row: usize, i: usize| match alternate {
                    true => (row * 166 + 2 * i, row * 166 + 2 * i + 1),
                    false => (row * 166 + i, row * 166 + 83 + i),
                };
                let each = (0..3).flat_map(|row| (0..83).map(move |i| place(row, i)));
                let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                let expected: Vec<f32> = each.map(|(gate, up)| pair(gating, both[gate], both[up])).collect();
                assert_eq!(bits(&rows(gate, &both)), bits(&expected));
                let on = |run: &dyn Fn(GatedRows<'_>)| {
                    let mut product = vec![0.0; 3 * 83];
                    run(GatedRows { gate, both: &both, product: &mut product });
                    assert_eq!(bits(&product), bits(&expected), "{gating:?}");
                };
                on(&|rows| rows.with_simd(Scalar));
                on(&|rows| rows.with_simd(Scalar128b));
                on(&|rows| rows.with_simd(Scalar256b));
                on(&|rows| rows.with_simd(Scalar512b));
            }
        }
    }
}
