//! The formats that weights and caches are kept in, and their way to f32 and back.

use half::{bf16, f16, slice::HalfFloatSliceExt};
use pulp::Arch;

/// A format that caches are kept in. Widening is free of branches, so that the loop around it becomes vector instructions.
pub(super) trait Stored: Copy + Default + Send + Sync + 'static {
    /// Whether the numbers are codes, which count in steps of a scale that each token has for each head.
    const SCALED: bool = false;

    /// The number, or the code, as f32.
    fn widen(self) -> f32;
    /// Numbers that are f32 already.
    #[inline(always)]
    fn as_f32(_numbers: &[Self]) -> Option<&[f32]> {
        None
    }

    /// Rounds to this format. Returns the scale, 1 where there is none.
    fn narrow(from: &[f32], to: &mut [Self]) -> f32;
    /// Appends the bytes of a number, little-endian.
    fn write(self, bytes: &mut Vec<u8>);
    /// Reads what [`Stored::write`] wrote: as many bytes as the format is wide.
    fn read(bytes: &[u8]) -> Self;
}

/// Sixteen numbers as f32.
#[inline(always)]
pub(super) fn widen<T: Stored>(from: &[T; 16]) -> [f32; 16] {
    let mut wide = [0.0; 16];
    for (wide, value) in wide.iter_mut().zip(from) {
        *wide = value.widen();
    }
    wide
}

/// `bytes` as an array; zeroes where they are of another length, which no caller hands in.
fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    bytes.first_chunk().copied().unwrap_or([0; N])
}

impl Stored for f32 {
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }

    #[inline(always)]
    fn as_f32(numbers: &[f32]) -> Option<&[f32]> {
        Some(numbers)
    }

    fn narrow(from: &[f32], to: &mut [f32]) -> f32 {
        to.copy_from_slice(from);
        1.0
    }

    fn write(self, bytes: &mut Vec<u8>) {
        bytes.extend(self.to_le_bytes());
    }

    fn read(bytes: &[u8]) -> f32 {
        f32::from_le_bytes(array(bytes))
    }
}

impl Stored for bf16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        widen_brain(self.to_bits())
    }

    fn narrow(from: &[f32], to: &mut [bf16]) -> f32 {
        Arch::new().dispatch(|| {
            for (to, from) in to.iter_mut().zip(from) {
                *to = bf16::from_bits(narrow_brain(*from));
            }
        });
        1.0
    }

    fn write(self, bytes: &mut Vec<u8>) {
        bytes.extend(self.to_le_bytes());
    }

    fn read(bytes: &[u8]) -> bf16 {
        bf16::from_le_bytes(array(bytes))
    }
}

impl Stored for f16 {
    #[inline(always)]
    fn widen(self) -> f32 {
        widen_half(self.to_bits())
    }

    fn narrow(from: &[f32], to: &mut [f16]) -> f32 {
        to.convert_from_f32_slice(from);
        1.0
    }

    fn write(self, bytes: &mut Vec<u8>) {
        bytes.extend(self.to_le_bytes());
    }

    fn read(bytes: &[u8]) -> f16 {
        f16::from_le_bytes(array(bytes))
    }
}

/// Codes of 8 bits: a number is the nearest of 255 that lie evenly between its head's largest and its opposite.
impl Stored for i8 {
    const SCALED: bool = true;

    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from(self)
    }

    fn narrow(from: &[f32], to: &mut [i8]) -> f32 {
        /// Added to a number of less than 2²², it leaves the nearest whole number in the lowest bits.
        const ROUNDING: f32 = 12_582_912.0;
        let mut scale = 0.0;
        Arch::new().dispatch(|| {
            let mut bits = 0;
            for value in from {
                // Of numbers without their signs, bits have the order of values, and a NaN's are the highest.
                bits = bits.max(value.to_bits() & 0x7FFF_FFFF);
            }
            let largest = f32::from_bits(bits);
            scale = largest / 127.0;
            // What is so small that its inverse overflows is nothing beside any other token.
            if largest < 1e-30 {
                scale = 0.0;
            }
            let inverse = if scale > 0.0 && largest.is_finite() { 127.0 / largest } else { 0.0 };
            for (to, from) in to.iter_mut().zip(from) {
                *to = (from * inverse + ROUNDING).to_bits() as i8;
            }
            // The scale carries on what is not finite, for the codes can't.
            if !largest.is_finite() {
                scale = f32::NAN;
            }
        });
        scale
    }

    fn write(self, bytes: &mut Vec<u8>) {
        bytes.extend(self.to_le_bytes());
    }

    fn read(bytes: &[u8]) -> i8 {
        i8::from_le_bytes(array(bytes))
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

/// The nearest bf16, the even one of two, without branches.
#[inline(always)]
fn narrow_brain(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7FFF + (bits >> 16 & 1)) >> 16;
    // Rounding could make a NaN an infinity.
    (if value.is_nan() { bits >> 16 | 0x40 } else { rounded }) as u16
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

    fn is(found: f32, expected: f32) -> bool {
        found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan()
    }

    #[test]
    fn every_half_is_widened_as_it_should_be() {
        let bytes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        let mut wide = vec![0.0; 1 << 16];
        widen_f16(&bytes, &mut wide);
        for (half, wide) in (0..=u16::MAX).map(f16::from_bits).zip(&wide) {
            assert!(is(half.widen(), half.to_f32()) && is(*wide, half.to_f32()), "{half:?}");
        }
        widen_bf16(&bytes, &mut wide);
        for (brain, wide) in (0..=u16::MAX).map(bf16::from_bits).zip(&wide) {
            assert!(is(brain.widen(), brain.to_f32()) && is(*wide, brain.to_f32()), "{brain:?}");
        }
    }

    #[test]
    fn numbers_are_rounded_to_the_nearest_bf16() {
        let numbers: Vec<f32> = (0..=u32::MAX).step_by(7_919).map(f32::from_bits).collect();
        let mut brains = vec![bf16::ZERO; numbers.len()];
        assert_eq!(bf16::narrow(&numbers, &mut brains), 1.0);
        for (number, brain) in numbers.iter().zip(brains) {
            assert!(is(brain.to_f32(), bf16::from_f32(*number).to_f32()), "{number}");
        }
    }

    #[test]
    fn codes_are_within_half_a_step_and_carry_on_what_is_not_finite() {
        let numbers: Vec<f32> = (0..100).map(|index| ((index * 37 % 101) as f32 - 50.0) * 0.013).collect();
        let mut codes = vec![0; 100];
        let scale = i8::narrow(&numbers, &mut codes);
        for (number, code) in numbers.iter().zip(&codes) {
            assert!((Stored::widen(*code) * scale - number).abs() <= scale * 0.500_01, "{number}: {code} of {scale}");
        }
        assert_eq!(i8::narrow(&[0.0, -0.0], &mut [1, 1]), 0.0);
        let mut codes = [1, 1];
        assert_eq!((i8::narrow(&[1e-40, -3e-42], &mut codes), codes), (0.0, [0, 0]));
        assert!((i8::narrow(&[3e38, -3e38], &mut codes) * 127.0).is_finite() && codes == [127, -127]);
        for odd in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert!(i8::narrow(&[1.0, odd], &mut codes).is_nan());
        }
    }
}
