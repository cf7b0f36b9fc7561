//! The floating point formats that weights and caches are kept in, widened to f32.

use half::{bf16, f16};
use pulp::Arch;

/// A format that caches are kept in.
pub(super) trait Stored: Copy + Send + Sync {
    /// `values` as f32: themselves, or widened into `scratch`, which has room for them.
    fn widen<'a>(values: &'a [Self], scratch: &'a mut [f32]) -> &'a [f32];
    /// Rounds to this format.
    fn narrow(value: f32) -> Self;
}

impl Stored for f32 {
    fn widen<'a>(values: &'a [Self], _scratch: &'a mut [f32]) -> &'a [f32] {
        values
    }

    fn narrow(value: f32) -> Self {
        value
    }
}

impl Stored for bf16 {
    fn widen<'a>(values: &'a [Self], scratch: &'a mut [f32]) -> &'a [f32] {
        let scratch = &mut scratch[..values.len()];
        Arch::new().dispatch(|| {
            for (wide, value) in scratch.iter_mut().zip(values) {
                *wide = widen_brain(value.to_bits());
            }
        });
        scratch
    }

    fn narrow(value: f32) -> Self {
        bf16::from_f32(value)
    }
}

impl Stored for f16 {
    fn widen<'a>(values: &'a [Self], scratch: &'a mut [f32]) -> &'a [f32] {
        let scratch = &mut scratch[..values.len()];
        Arch::new().dispatch(|| {
            for (wide, value) in scratch.iter_mut().zip(values) {
                *wide = widen_half(value.to_bits());
            }
        });
        scratch
    }

    fn narrow(value: f32) -> Self {
        f16::from_f32(value)
    }
}

/// Little-endian bf16 as f32.
pub(super) fn widen_bf16(bytes: &[u8], wide: &mut [f32]) {
    Arch::new().dispatch(|| {
        for (wide, bytes) in wide.iter_mut().zip(bytes.as_chunks().0) {
            *wide = widen_brain(u16::from_le_bytes(*bytes));
        }
    });
}

/// Little-endian f16 as f32.
pub(super) fn widen_f16(bytes: &[u8], wide: &mut [f32]) {
    Arch::new().dispatch(|| {
        for (wide, bytes) in wide.iter_mut().zip(bytes.as_chunks().0) {
            *wide = widen_half(u16::from_le_bytes(*bytes));
        }
    });
}

/// A bf16 as f32, whose upper half it is. (The crate's conversion looks at NaNs one by one.)
#[inline(always)]
pub(super) fn widen_brain(brain: u16) -> f32 {
    f32::from_bits(u32::from(brain) << 16)
}

/// An IEEE half as f32, without branches, so that the loop around it becomes vector instructions.
#[inline(always)]
pub(super) fn widen_half(half: u16) -> f32 {
    const EXPONENT: u32 = 0x7C00 << 13;
    /// From the bias of a half's exponent, 15, to that of an f32.
    const REBIAS: u32 = (127 - 15) << 23;
    let magnitude = u32::from(half & 0x7FFF) << 13;
    let exponent = magnitude & EXPONENT;
    let normal = magnitude + REBIAS;
    // Infinities and NaNs have the highest exponent here as there.
    let special = normal + REBIAS;
    // Subnormals have no leading one: give them one and take it away as a number.
    let subnormal = f32::from_bits(normal + (1 << 23)) - f32::from_bits(REBIAS + (1 << 23));
    let bits = if exponent == EXPONENT { special } else { normal };
    let bits = if exponent == 0 { subnormal.to_bits() } else { bits };
    f32::from_bits(bits | u32::from(half & 0x8000) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_is_widened_as_it_should_be() {
        let halves: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).collect();
        let brains: Vec<bf16> = (0..=u16::MAX).map(bf16::from_bits).collect();
        let bytes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        let is = |wide: f32, expected: f32| wide.to_bits() == expected.to_bits() || wide.is_nan() && expected.is_nan();
        let (mut scratch, mut from_bytes) = (vec![0.0; halves.len()], vec![0.0; halves.len()]);
        widen_f16(&bytes, &mut from_bytes);
        for (index, wide) in f16::widen(&halves, &mut scratch).iter().enumerate() {
            assert!(is(*wide, halves[index].to_f32()) && is(from_bytes[index], *wide), "{:?}", halves[index]);
        }
        widen_bf16(&bytes, &mut from_bytes);
        for (index, wide) in bf16::widen(&brains, &mut scratch).iter().enumerate() {
            assert!(is(*wide, brains[index].to_f32()) && is(from_bytes[index], *wide), "{:?}", brains[index]);
        }
    }
}
