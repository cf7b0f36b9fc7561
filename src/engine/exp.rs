//! The exponential, and what is made of it: `tanh` and `erf`.
//!
//! The system's libm differs from machine to machine in the last bit, and has nothing for vectors. These are polynomials in f32
//! with fused multiply-adds, written once for every width of vectors: each number goes through the same operations, each of
//! which IEEE 754 fixes to the last bit. So a result is the same in every lane and on every instruction set; `pulp::Scalar` gives
//! it for one number.
//!
//! | function | method | largest error (measured against f64) |
//! |---|---|---|
//! | [`exp`] | `x = n ln 2 + r`; `e^r` by a polynomial, and `n` added to its exponent | 1 ulp |
//! | [`tanh`] | an odd polynomial below 0.625, `1 - 2 / (e^2x + 1)` above | 1.5 ulp |
//! | [`erf`] | an odd polynomial below 0.93, `1 - e^q(x)` with a polynomial of `ln erfc` above | 1 ulp |
//!
//! The coefficients are minimax fits of the relative error (Lawson's reweighted least squares), rounded to f32.

use pulp::Simd;

/// `e^x` beyond this is infinite: the largest f32 below `128 ln 2`.
const HIGHEST: f32 = 88.722_83;
/// `e^x` below this is smaller than 2⁻¹²⁶, the least normal number, and is taken for 0.
const LOWEST: f32 = -87.336_54;
/// Added to a number of less than 2²², it leaves the nearest whole number in the lowest bits.
const ROUNDING: f32 = 12_582_912.0;
/// What `std::f32::consts::LN_2` lacks to ln 2.
const LN_2_REST: f32 = -1.904_654_3e-9;
/// Bits of an f32 below its exponent.
const FRACTION_BITS: u32 = 23;
/// `(e^r - 1 - r) / r²`, from the highest power down.
const EXP: [f32; 6] = [0.000_197_902_44, 0.001_394_475_8, 0.008_333_498, 0.041_666_295, 0.166_666_66, 0.5];

/// Where `tanh` changes its method.
const TANH_SMALL: f32 = 0.625;
/// `(tanh x - x) / x³`, in `x²`.
const TANH: [f32; 6] = [0.002_145_46, -0.008_180_487, 0.021_702_118, -0.053_947_058, 0.133_332_09, -0.333_333_3];

/// Where `erf` changes its method.
const ERF_SMALL: f32 = 0.93;
/// `erf x / x - 1`, in `x²`.
const ERF: [f32; 7] =
    [8.316_775e-5, -0.000_813_001_3, 0.005_199_907, -0.026_858_94, 0.112_836_875, -0.376_126_32, 0.128_379_17];
/// `ln erfc x` from 0.92 to 4, behind which `erf` is 1.
const LN_ERFC: [f32; 8] = [
    -2.109_496_4e-5,
    0.000_434_461_66,
    -0.004_171_058_5,
    0.025_119_416,
    -0.108_280_07,
    -0.633_346_9,
    -1.129_514_9,
    0.000_174_683_2,
];

/// `e^x` in each lane. Beyond f32's range it is infinite, below the least normal number 0, and a NaN stays one.
#[inline(always)]
pub(super) fn exp<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let shifted = simd.mul_add_f32s(x, simd.splat_f32s(std::f32::consts::LOG2_E), simd.splat_f32s(ROUNDING));
    let n = simd.sub_f32s(shifted, simd.splat_f32s(ROUNDING));
    let rest = simd.mul_add_f32s(n, simd.splat_f32s(-std::f32::consts::LN_2), x);
    let rest = simd.mul_add_f32s(n, simd.splat_f32s(-LN_2_REST), rest);
    let curve = simd.mul_add_f32s(polynomial(simd, &EXP, rest), simd.mul_f32s(rest, rest), rest);
    let fraction = simd.add_f32s(curve, simd.splat_f32s(1.0));
    // `ROUNDING`'s own bits are shifted out, and what is left is `n` in the place of the exponent.
    let n = simd.wrapping_dyn_shl_u32s(simd.transmute_u32s_f32s(shifted), simd.splat_u32s(FRACTION_BITS));
    let scaled = simd.transmute_f32s_u32s(simd.add_u32s(simd.transmute_u32s_f32s(fraction), n));

    let above_zero = simd.greater_than_or_equal_f32s(x, simd.splat_f32s(LOWEST));
    let finite = simd.less_than_or_equal_f32s(x, simd.splat_f32s(HIGHEST));
    let scaled = simd.select_f32s(above_zero, scaled, simd.splat_f32s(0.0));
    // The sum is infinite, or a NaN.
    simd.select_f32s(finite, scaled, simd.add_f32s(x, simd.splat_f32s(f32::INFINITY)))
}

/// The hyperbolic tangent in each lane. A NaN stays one.
#[inline(always)]
pub(super) fn tanh<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let one = simd.splat_f32s(1.0);
    let size = simd.abs_f32s(x);
    let square = simd.mul_f32s(size, size);
    let small = simd.mul_add_f32s(simd.mul_f32s(polynomial(simd, &TANH, square), square), size, size);
    let power = exp(simd, simd.add_f32s(size, size));
    let large = simd.sub_f32s(one, simd.div_f32s(simd.splat_f32s(2.0), simd.add_f32s(power, one)));
    let is_small = simd.less_than_f32s(size, simd.splat_f32s(TANH_SMALL));
    with_sign_of(simd, simd.select_f32s(is_small, small, large), x)
}

/// The error function in each lane. A NaN stays one.
#[inline(always)]
pub(super) fn erf<S: Simd>(simd: S, x: S::f32s) -> S::f32s {
    let size = simd.abs_f32s(x);
    let small = simd.mul_add_f32s(polynomial(simd, &ERF, simd.mul_f32s(size, size)), size, size);
    let large = simd.sub_f32s(simd.splat_f32s(1.0), exp(simd, polynomial(simd, &LN_ERFC, size)));
    let is_small = simd.less_than_f32s(size, simd.splat_f32s(ERF_SMALL));
    with_sign_of(simd, simd.select_f32s(is_small, small, large), x)
}

/// By Horner's rule, from the highest power down.
#[inline(always)]
fn polynomial<S: Simd, const N: usize>(simd: S, coefficients: &[f32; N], x: S::f32s) -> S::f32s {
    let mut sum = simd.splat_f32s(coefficients[0]);
    for coefficient in &coefficients[1..] {
        sum = simd.mul_add_f32s(sum, x, simd.splat_f32s(*coefficient));
    }
    sum
}

/// `size`, which is not negative, with the sign of `x`.
#[inline(always)]
fn with_sign_of<S: Simd>(simd: S, size: S::f32s, x: S::f32s) -> S::f32s {
    simd.or_f32s(size, simd.and_f32s(x, simd.splat_f32s(-0.0)))
}

#[cfg(test)]
mod tests {
    use candle_core::cpu::erf::erf_f64;
    use pulp::{Arch, Scalar, Scalar128b, Scalar256b, Scalar512b, WithSimd};

    use super::*;

    fn exp_f32(x: f32) -> f32 {
        exp(Scalar, x)
    }

    fn tanh_f32(x: f32) -> f32 {
        tanh(Scalar, x)
    }

    fn erf_f32(x: f32) -> f32 {
        erf(Scalar, x)
    }

    type Function = (fn(f32) -> f32, fn(f64) -> f64, f64);

    /// Each with its reference and the error that its docs state, in units of the last place.
    const FUNCTIONS: [Function; 3] = [(exp_f32, f64::exp, 1.0), (tanh_f32, f64::tanh, 1.5), (erf_f32, erf_f64, 1.0)];

    /// Numbers all over f32's range, and many where the functions bend.
    fn numbers() -> impl Iterator<Item = f32> {
        let everywhere = (0..=u32::MAX).step_by(20_011).map(f32::from_bits);
        let near = (-200_000..200_000).map(|i| i as f32 * 0.000_5);
        let edges = [HIGHEST, LOWEST, TANH_SMALL, -TANH_SMALL, ERF_SMALL, 4.0, 9.0, 0.0, -0.0, f32::MAX, f32::MIN];
        let edges = edges.into_iter().flat_map(|x| [x.next_down().next_down(), x.next_down(), x, x.next_up()]);
        let special = [f32::NAN, -f32::NAN, f32::from_bits(0x7F80_0001), f32::INFINITY, f32::NEG_INFINITY];
        everywhere.chain(near).chain(edges).chain(special)
    }

    #[test]
    fn they_are_as_exact_as_their_docs_say() {
        for (index, (function, reference, allowed)) in FUNCTIONS.into_iter().enumerate() {
            let mut worst = (0.0, 0.0);
            for x in numbers().filter(|x| !x.is_nan()) {
                let (found, exact) = (f64::from(function(x)), reference(f64::from(x)));
                let smallest = f64::from(f32::MIN_POSITIVE);
                if exact.abs() < smallest {
                    assert!((found - exact).abs() < smallest, "{index} of {x}: {found} for {exact}");
                } else if exact > f64::from(f32::MAX) {
                    assert_eq!(found, f64::INFINITY, "{index} of {x}");
                } else {
                    let place = (exact.abs().log2().floor() - 23.0).exp2();
                    let error = (found - exact).abs() / place;
                    if error > worst.1 {
                        worst = (x, error);
                    }
                }
            }
            println!("function {index}: off by {} ulp at {}", worst.1, worst.0);
            assert!(worst.1 <= allowed, "function {index} of {}: off by {} ulp", worst.0, worst.1);
        }
    }

    #[test]
    fn a_nan_stays_one_and_limits_are_reached() {
        for x in [f32::NAN, -f32::NAN, f32::from_bits(0x7F80_0001), f32::from_bits(0xFFFF_FFFF)] {
            assert!(FUNCTIONS.iter().all(|(function, ..)| function(x).is_nan()));
        }
        assert_eq!([f32::NEG_INFINITY, -1000.0, 0.0, -0.0, 1000.0].map(exp_f32), [0.0, 0.0, 1.0, 1.0, f32::INFINITY]);
        for function in [tanh_f32, erf_f32] {
            assert_eq!([f32::NEG_INFINITY, -30.0, 30.0, f32::INFINITY].map(function), [-1.0, -1.0, 1.0, 1.0]);
            assert_eq!([0.0, -0.0].map(|x| function(x).to_bits()), [0.0_f32, -0.0].map(f32::to_bits));
        }
    }

    struct All<'a>(&'a [f32]);

    impl WithSimd for All<'_> {
        type Output = Vec<[f32; 3]>;

        fn with_simd<S: Simd>(self, simd: S) -> Self::Output {
            let mut results = Vec::new();
            for chunk in self.0.chunks(S::F32_LANES) {
                let x = simd.partial_load_f32s(chunk);
                let mut each = [[0.0; 16]; 3];
                for (values, y) in each.iter_mut().zip([exp(simd, x), tanh(simd, x), erf(simd, x)]) {
                    simd.partial_store_f32s(&mut values[..S::F32_LANES], y);
                }
                results.extend((0..chunk.len()).map(|i| [each[0][i], each[1][i], each[2][i]]));
            }
            results
        }
    }

    #[test]
    fn their_bits_are_the_same_on_every_path() {
        let numbers: Vec<f32> = numbers().step_by(5).chain([f32::NAN, f32::INFINITY, LOWEST, HIGHEST, 1.0]).collect();
        let expected: Vec<[f32; 3]> = numbers.iter().map(|x| FUNCTIONS.map(|(function, ..)| function(*x))).collect();
        let paths = [
            Arch::new().dispatch(All(&numbers)),
            All(&numbers).with_simd(Scalar128b),
            All(&numbers).with_simd(Scalar256b),
            All(&numbers).with_simd(Scalar512b),
        ];
        for path in paths {
            for ((found, expected), x) in path.iter().zip(&expected).zip(&numbers) {
                for (found, expected) in found.iter().zip(expected) {
                    let same = found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan();
                    assert!(same, "{x}: {found} and {expected}");
                }
            }
        }
    }
}
