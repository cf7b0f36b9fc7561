//! Positions as a bias of the scores (ALiBi).

use half::{bf16, f16};

use crate::model::{Dtype, spec::AlibiSpec};

/// The biases of a block's heads.
#[derive(Debug)]
pub(super) struct Alibi {
    slopes: Vec<f32>,
    factor: f32,
    rounding: Dtype,
}

impl Alibi {
    pub(super) fn new(spec: &AlibiSpec, heads: usize) -> Self {
        let slopes = slopes(heads).into_iter().map(|slope| rounded(spec.rounding, slope)).collect();
        Self { slopes, factor: spec.factor as f32, rounding: spec.rounding }
    }

    /// What `head` adds to the scores of the keys at the positions from `first` on.
    ///
    /// It is taken for the position and not for the distance, as in transformers: with rounding, the two differ.
    pub(super) fn biases(&self, head: usize, first: usize, biases: &mut [f32]) {
        let (slope, rounding) = (self.slopes[head], self.rounding);
        for (position, bias) in (first..).zip(biases) {
            *bias = self.factor * rounded(rounding, slope * rounded(rounding, position as f32));
        }
    }
}

fn rounded(dtype: Dtype, value: f32) -> f32 {
    match dtype {
        Dtype::F32 => value,
        Dtype::Bf16 => bf16::from_f32(value).to_f32(),
        Dtype::F16 => f16::from_f32(value).to_f32(),
    }
}

/// `2^(-8 i / heads)` for head `i`, from 1, of a power of two of heads. Of another number, the next lower power's
/// slopes, and then every second one of the next higher power's (transformers, `modeling_bloom.py`).
fn slopes(heads: usize) -> Vec<f32> {
    let power = 1 << heads.max(1).ilog2();
    let base = |count: usize| (-8.0 / count as f64).exp2() as f32;
    let slope = |base: f32, exponent: usize| f64::from(base).powi(exponent as i32) as f32;
    let further = (0..heads - power).map(|index| slope(base(2 * power), 2 * index + 1));
    (1..=power).map(|index| slope(base(power), index)).chain(further).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slopes_of_any_number_of_heads() {
        assert_eq!(slopes(4), [0.25, 0.0625, 0.015_625, 0.003_906_25]);
        assert_eq!(slopes(8), [1, 2, 3, 4, 5, 6, 7, 8].map(|index| 2f32.powi(-index)));
        // Four of four heads, then the first and the third of eight.
        assert_eq!(slopes(6), [0.25, 0.0625, 0.015_625, 0.003_906_25, 0.5, 0.125]);
        assert_eq!(slopes(1), [2f32.powi(-8)]);
        assert_eq!(slopes(71).len(), 71);
    }

    #[test]
    fn biases_are_rounded_as_the_reference_rounds_them() {
        let exact = Alibi::new(&AlibiSpec { factor: 1.0, rounding: Dtype::F32 }, 6);
        let biases = |alibi: &Alibi, head| {
            let mut biases = [1.0; 302];
            alibi.biases(head, 0, &mut biases);
            (biases[0], biases[301])
        };
        assert_eq!((biases(&exact, 0), biases(&exact, 5)), ((0.0, 75.25), (0.0, 37.625)));
        let falcon = Alibi::new(&AlibiSpec { factor: 0.25, rounding: Dtype::Bf16 }, 6);
        // 301 is 300 in steps of 2 (half to even), and 75 needs no rounding.
        assert_eq!(biases(&falcon, 0), (0.0, 0.25 * 75.0));
    }
}
