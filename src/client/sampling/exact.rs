//! Arithmetic that is the same on every machine: only operations that IEEE 754 fixes to the last bit.
//!
//! The standard library's `exp` is the platform's own, and those differ in last bits.

use chacha20::{
    ChaCha12Rng,
    rand_core::{Rng, SeedableRng},
};
use pulp::Arch;

/// `weights = e^((logits - top) / temperature)`, of which `top` is the largest.
pub(super) fn weigh(logits: &[f32], top: f64, temperature: f64, weights: &mut [f64]) {
    // Vector instructions of any width do to each number what the loop says: nothing is fused or reordered.
    Arch::new().dispatch(|| {
        for (weight, logit) in weights.iter_mut().zip(logits) {
            *weight = exp((f64::from(*logit) - top) / temperature);
        }
    });
}

/// `e^x` for `x <= 0`, within a few units of the last place; 0 below about -708 (where it would be subnormal).
///
/// `x = n ln 2 + r` with `|r| <= ln 2 / 2`; `e^r` by its Taylor series, and `2^n` by writing the exponent's bits. Without branches,
/// so that a loop around it becomes vector instructions.
#[inline(always)]
pub(super) fn exp(x: f64) -> f64 {
    /// The part of ln 2 whose products with whole numbers up to 2^11 are exact, and the rest of it.
    const LN_2_HIGH: f64 = 0.693_147_180_369_123_8;
    const LN_2_LOW: f64 = 1.908_214_929_270_587_7e-10;
    /// Below it results would be subnormal.
    const LOWEST: f64 = -708.0;
    /// 1/13!, 1/12!, …, 1/1!, 1/0!: the next term is below f64's resolution.
    const TERMS: [f64; 14] = [
        1.0 / 6_227_020_800.0,
        1.0 / 479_001_600.0,
        1.0 / 39_916_800.0,
        1.0 / 3_628_800.0,
        1.0 / 362_880.0,
        1.0 / 40_320.0,
        1.0 / 5_040.0,
        1.0 / 720.0,
        1.0 / 120.0,
        1.0 / 24.0,
        1.0 / 6.0,
        0.5,
        1.0,
        1.0,
    ];
    // To the nearest whole number, as `x` is not positive (`round` is a slow call on many machines).
    let bounded = if x < LOWEST { LOWEST } else { x };
    let n = (bounded * std::f64::consts::LOG2_E - 0.5) as i32;
    let power = f64::from_bits(u64::from((n + 1023).unsigned_abs()) << 52);
    let n = f64::from(n);
    let r = (bounded - n * LN_2_HIGH) - n * LN_2_LOW;
    let mut series = 0.0;
    for term in TERMS {
        series = series * r + term;
    }
    if x < LOWEST { 0.0 } else { series * power }
}

/// The random number of token `n` under `seed`, in `[0, 1)`: 53 bits of ChaCha12's key stream at word `2 n`, the seed
/// in the first eight bytes of the key.
pub(super) fn uniform(seed: u64, n: u64) -> f64 {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    let mut stream = ChaCha12Rng::from_seed(key);
    stream.set_word_pos(2 * u128::from(n));
    (stream.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_e_to_the_x() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-0.0), 1.0);
        assert_eq!(exp(f64::NEG_INFINITY), 0.0);
        for step in 0..70_000 {
            let x = f64::from(step) * -0.01;
            let relative = (exp(x) - x.exp()).abs() / x.exp();
            assert!(relative < 1e-15, "{x}: off by {relative}");
        }
    }

    #[test]
    fn exp_never_falls() {
        let mut last = 0.0;
        for step in (0..100_000).rev() {
            let value = exp(f64::from(step) * -0.001);
            assert!(value >= last);
            last = value;
        }
    }

    /// These bits must never change: seeds that people noted down would give other texts.
    #[test]
    fn the_numbers_of_a_seed_are_fixed() {
        let bits = |seed, n| (uniform(seed, n) * (1u64 << 53) as f64) as u64;
        let numbers = [bits(0, 0), bits(0, 1), bits(42, 0), bits(42, 1_000_000), bits(u64::MAX, u64::MAX)];
        // From a plain ChaCha12 written after RFC 8439 (with a 64-bit counter), in another language.
        let expected = [
            2_954_570_832_368_478,
            7_512_296_358_304_195,
            3_891_379_052_189_070,
            72_715_262_664_426,
            4_618_485_890_658_794,
        ];
        assert_eq!(numbers, expected);
    }

    #[test]
    fn numbers_are_uniform_and_differ() {
        let mean = (0..10_000).map(|n| uniform(7, n)).sum::<f64>() / 10_000.0;
        assert!((mean - 0.5).abs() < 0.01, "{mean}");
        assert!((0..1_000).all(|n| uniform(7, n) != uniform(8, n)));
    }
}
