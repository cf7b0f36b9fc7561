//! Hidden states as they travel: rows of numbers in one of three formats.

use bytes::Bytes;
use half::{bf16, f16};

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
        decode(self.dtype, &self.bytes)
    }

    /// The numbers of `count` rows from `first` on, or fewer at the end.
    pub(super) fn rows_to_f32(&self, first: usize, count: usize) -> Vec<f32> {
        let row = self.hidden * self.dtype.size_in_bytes();
        let end = ((first + count) * row).min(self.bytes.len());
        decode(self.dtype, &self.bytes[(first * row).min(end)..end])
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

fn decode(dtype: Dtype, bytes: &[u8]) -> Vec<f32> {
    match dtype {
        Dtype::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        Dtype::Bf16 => bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        Dtype::F16 => bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
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

/// Rounds `values` in place to what `dtype` can hold.
pub(super) fn round(dtype: Dtype, values: &mut [f32]) {
    match dtype {
        Dtype::F32 => {}
        Dtype::Bf16 => values.iter_mut().for_each(|value| *value = bf16::from_f32(*value).to_f32()),
        Dtype::F16 => values.iter_mut().for_each(|value| *value = f16::from_f32(*value).to_f32()),
    }
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
    fn rounding_and_travelling_agree() {
        let values: Vec<f32> = (0..200).map(|i| (i as f32 - 77.3) * 0.37).collect();
        for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
            let mut rounded = values.clone();
            round(dtype, &mut rounded);
            let states = HiddenStates::from_f32(dtype, 10, &values);
            assert_eq!(states.to_f32(), rounded);
            assert_eq!(states.rows_to_f32(3, 2), rounded[30..50]);
            assert_eq!(states.rows_to_f32(19, 5), rounded[190..]);
        }
    }
}
