//! Hidden states as they travel: rows of numbers in one of three formats.

use bytes::Bytes;
use half::{bf16, f16};

use super::floats;
use crate::model::Dtype;

/// Rows of hidden states `[rows, hidden]`, row-major and little-endian, as they travel.
#[derive(Debug, Clone)]
pub struct HiddenStates {
    /// Format of a number.
    pub dtype: Dtype,
    /// Number of rows, one a token.
    pub rows: usize,
    /// Width of a row.
    pub hidden: usize,
    /// `rows · hidden` numbers.
    pub bytes: Bytes,
}

/// The bytes aren't as many as the shape says.
#[derive(Debug, thiserror::Error)]
#[error("{rows} rows of {hidden} {dtype} numbers are not {found} bytes")]
pub struct WrongLength {
    dtype: Dtype,
    rows: usize,
    hidden: usize,
    found: usize,
}

impl HiddenStates {
    /// Takes `bytes` as `rows` rows of `hidden` numbers.
    ///
    /// # Errors
    /// The length doesn't fit the shape.
    pub fn new(dtype: Dtype, rows: usize, hidden: usize, bytes: Bytes) -> Result<Self, WrongLength> {
        let states = Self { dtype, rows, hidden, bytes };
        if states.has_right_length() {
            Ok(states)
        } else {
            Err(WrongLength { dtype, rows, hidden, found: states.bytes.len() })
        }
    }

    /// Rounds `values`, `[rows, hidden]`, to `dtype`. A last row that is not full is left out.
    pub fn from_f32(dtype: Dtype, hidden: usize, values: &[f32]) -> Self {
        let rows = values.len().checked_div(hidden).unwrap_or(0);
        let mut bytes = Vec::with_capacity(rows * hidden * dtype.size_in_bytes());
        encode(dtype, &values[..rows * hidden], &mut bytes);
        Self { dtype, rows, hidden, bytes: bytes.into() }
    }

    /// Some of the rows; no bytes are copied. Rows past the end are left out.
    pub fn slice(&self, rows: std::ops::Range<usize>) -> Self {
        let row = self.hidden * self.dtype.size_in_bytes();
        let end = rows.end.min(self.rows);
        let start = rows.start.min(end);
        Self { rows: end - start, bytes: self.bytes.slice(start * row..end * row), ..self.clone() }
    }

    /// The numbers, `[rows, hidden]`; each of the three formats fits into `f32`.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.bytes.len() / self.dtype.size_in_bytes()];
        decode(self.dtype, &self.bytes, &mut values);
        values
    }

    /// Decodes the numbers from row `first` on into `to`, as many as there are and as fit.
    pub(super) fn decode_rows(&self, first: usize, to: &mut [f32]) {
        let start = (first * self.hidden * self.dtype.size_in_bytes()).min(self.bytes.len());
        decode(self.dtype, &self.bytes[start..], to);
    }

    /// The first row with a NaN or an infinity.
    pub fn first_non_finite(&self) -> Option<usize> {
        // All bits of the exponent set: infinity or NaN, in each of the formats.
        let half = |exponent: u16| {
            self.bytes.chunks_exact(2).position(|pair| u16::from_le_bytes([pair[0], pair[1]]) & exponent == exponent)
        };
        let index = match self.dtype {
            Dtype::F32 => {
                let exponent = 0x7F80_0000;
                self.bytes
                    .chunks_exact(4)
                    .position(|four| u32::from_le_bytes([four[0], four[1], four[2], four[3]]) & exponent == exponent)
            }
            Dtype::Bf16 => half(0x7F80),
            Dtype::F16 => half(0x7C00),
        };
        index.map(|index| index / self.hidden.max(1))
    }

    pub(super) fn has_right_length(&self) -> bool {
        let length = self.rows.checked_mul(self.hidden).and_then(|n| n.checked_mul(self.dtype.size_in_bytes()));
        length == Some(self.bytes.len())
    }
}

/// Decodes as many numbers as there are and as fit.
fn decode(dtype: Dtype, bytes: &[u8], values: &mut [f32]) {
    match dtype {
        Dtype::F32 => {
            let numbers = values.iter_mut().zip(bytes.as_chunks().0);
            numbers.for_each(|(value, bytes)| *value = f32::from_le_bytes(*bytes));
        }
        Dtype::Bf16 => floats::widen_bf16(bytes, values),
        Dtype::F16 => floats::widen_f16(bytes, values),
    }
}

/// Appends `values` to `bytes`, rounded to nearest, ties to even.
pub(super) fn encode(dtype: Dtype, values: &[f32], bytes: &mut Vec<u8>) {
    bytes.reserve(values.len() * dtype.size_in_bytes());
    match dtype {
        Dtype::F32 => bytes.extend(values.iter().flat_map(|value| value.to_le_bytes())),
        Dtype::Bf16 => bytes.extend(values.iter().flat_map(|value| bf16::from_f32(*value).to_le_bytes())),
        Dtype::F16 => bytes.extend(values.iter().flat_map(|value| f16::from_f32(*value).to_le_bytes())),
    }
}

/// Rounds `values` in place to what `dtype` can hold: to nearest, ties to even. Without branches, so that the loop becomes vector
/// instructions where it is inlined.
#[inline(always)]
pub(super) fn round(dtype: Dtype, values: &mut [f32]) {
    match dtype {
        Dtype::F32 => {}
        Dtype::Bf16 => values.iter_mut().for_each(|value| *value = round_to_brain(*value)),
        Dtype::F16 => values.iter_mut().for_each(|value| *value = round_to_half(*value)),
    }
}

#[inline(always)]
fn round_to_brain(value: f32) -> f32 {
    let rounded = round_bits(value.to_bits(), 16);
    // The sum may run over where a NaN's fraction is all ones.
    if value.is_nan() { f32::NAN } else { f32::from_bits(rounded) }
}

#[inline(always)]
fn round_to_half(value: f32) -> f32 {
    /// Half of this and above lie the numbers with a last place of 2⁻²⁴, that of a half's subnormals.
    const SUBNORMAL: f32 = 0.5;
    /// 2⁻¹⁴, the least normal half.
    const LEAST: f32 = 1.0 / 16_384.0;
    /// From here on numbers are rounded to infinity.
    const TOO_LARGE: f32 = 65_520.0;
    let size = value.abs();
    let normal = f32::from_bits(round_bits(size.to_bits(), 13));
    let subnormal = (size + SUBNORMAL) - SUBNORMAL;
    let rounded = if size < LEAST { subnormal } else { normal };
    let rounded = if size >= TOO_LARGE { f32::INFINITY } else { rounded };
    let rounded = if value.is_nan() { f32::NAN } else { rounded };
    rounded.copysign(value)
}

/// Rounds the lowest `count` bits away.
#[inline(always)]
fn round_bits(bits: u32, count: u32) -> u32 {
    let last = bits >> count & 1;
    bits.wrapping_add((1 << (count - 1)) - 1 + last) & !((1 << count) - 1)
}

/// Whether no number is infinite or NaN.
#[inline(always)]
pub(super) fn is_finite(values: &[f32]) -> bool {
    const EXPONENT: u32 = 0x7F80_0000;
    // The largest size, rather than a search, so that the loop becomes vector instructions.
    values.iter().fold(0, |largest, value| largest.max(value.to_bits() & 0x7FFF_FFFF)) < EXPONENT
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_length_must_fit_the_shape() {
        assert!(HiddenStates::new(Dtype::Bf16, 2, 3, Bytes::from(vec![0; 12])).is_ok());
        let error = HiddenStates::new(Dtype::Bf16, 2, 3, Bytes::from(vec![0; 11])).unwrap_err();
        assert_eq!(error.to_string(), "2 rows of 3 bf16 numbers are not 11 bytes");
        assert!(HiddenStates::new(Dtype::F32, usize::MAX, 3, Bytes::new()).is_err());
    }

    #[test]
    fn the_first_row_that_is_not_finite_is_found_in_every_format() {
        for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
            for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let states = HiddenStates::from_f32(dtype, 2, &[1.0, -2.0, 60000.0, 0.0, 3.0, bad]);
                assert_eq!(states.first_non_finite(), Some(2), "{dtype} {bad}");
            }
            assert_eq!(HiddenStates::from_f32(dtype, 2, &[1.0, -2.0, 60000.0, 0.0]).first_non_finite(), None);
        }
    }

    #[test]
    fn numbers_are_rounded_as_the_formats_say() {
        // All signs and exponents, with fractions on both sides of ties.
        let fractions = [0, 1, 0xFFF, 0x1000, 0x1001, 0x1FFF, 0x2000, 0x3000, 0x7FFF, 0x8000, 0x8001, 0xFFFF];
        let bits = (0..=u32::from(u16::MAX)).flat_map(|high| fractions.map(|low| high << 16 | low));
        for value in bits.map(f32::from_bits) {
            for (dtype, expected) in
                [(Dtype::Bf16, bf16::from_f32(value).to_f32()), (Dtype::F16, f16::from_f32(value).to_f32())]
            {
                let mut rounded = [value];
                round(dtype, &mut rounded);
                let same = rounded[0].to_bits() == expected.to_bits() || rounded[0].is_nan() && expected.is_nan();
                assert!(same, "{dtype} {value:e}: {:e} for {expected:e}", rounded[0]);
                assert_eq!(is_finite(&[1.0, rounded[0]]), expected.is_finite());
            }
        }
    }

    #[test]
    fn rounding_and_travelling_agree() {
        let values: Vec<f32> = (0..200).map(|i| (i as f32 - 77.3) * 0.37).collect();
        for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
            let mut rounded = values.clone();
            round(dtype, &mut rounded);
            let states = HiddenStates::from_f32(dtype, 10, &values);
            assert_eq!(states.to_f32(), rounded);
            let mut some = [0.0; 20];
            states.decode_rows(3, &mut some);
            assert_eq!(some, rounded[30..50]);
            some.fill(7.0);
            states.decode_rows(19, &mut some);
            assert_eq!((&some[..10], &some[10..]), (&rounded[190..], &[7.0; 10][..]));
        }
    }
}
