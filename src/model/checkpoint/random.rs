//! Weights that mean nothing: speed depends on a model's shape and formats, not on what it has learned.
//!
//! Matrices are nearly normal with a standard deviation of 0.02, in bf16, so that no product overflows or is denormal;
//! vectors, which are norms and biases, are ones. The same tensor is the same every time.

use std::{ops::Range, sync::OnceLock};

use half::bf16;

use super::{CheckpointError, TensorData};
use crate::model::Dtype;

/// Numbers that are drawn; tensors repeat them. A prime, so that no two rows of a matrix are alike.
const DRAWN: usize = 2_000_003;
const BYTES: usize = size_of::<bf16>();
/// Exponents of MXFP4 run through so many values from [`FIRST_EXPONENT`] on: with codes of up to 6 they make numbers of the size that
/// others have, nothing of which is cut off at a limit.
const EXPONENTS: usize = 3;
const FIRST_EXPONENT: usize = 119;
const SCALES: &str = "_scales";

/// Some rows (entries of the first dimension) of a tensor.
///
/// # Errors
/// The memory for them is not there.
pub(super) fn rows(
    name: &str,
    shape: &[usize],
    rows: impl Iterator<Item = Range<usize>>,
) -> Result<TensorData, CheckpointError> {
    let (count, row) = match shape {
        [count, rest @ ..] => (*count, rest.iter().try_fold(BYTES, |product, size| product.checked_mul(*size))),
        [] => (1, Some(BYTES)),
    };
    let too_large = || CheckpointError::TooLarge { name: name.to_owned(), shape: shape.to_vec() };
    let row = row.filter(|row| row.checked_mul(count).is_some()).ok_or_else(too_large)?;
    let (mut bytes, mut total) = (Vec::new(), 0);
    for rows in rows {
        let length = rows.len().checked_mul(row).ok_or_else(too_large)?;
        bytes.try_reserve_exact(length).map_err(|_| too_large())?;
        match shape.len() {
            0 | 1 => (0..rows.len()).for_each(|_| bytes.extend(bf16::ONE.to_le_bytes())),
            _ => fill(&mut bytes, offset(name) + rows.start * row, length),
        }
        total += rows.len();
    }
    let shape = shape.iter().enumerate().map(|(index, size)| if index == 0 { total } else { *size }).collect();
    Ok(TensorData { dtype: Dtype::Bf16, shape, bytes })
}

/// A tensor of bytes: codes, or exponents.
///
/// # Errors
/// The memory for them is not there.
pub(super) fn bytes(name: &str, shape: &[usize]) -> Result<Vec<u8>, CheckpointError> {
    let too_large = || CheckpointError::TooLarge { name: name.to_owned(), shape: shape.to_vec() };
    let length = shape.iter().try_fold(1usize, |product, size| product.checked_mul(*size)).ok_or_else(too_large)?;
    let mut bytes = Vec::new();
    bytes.try_reserve_exact(length).map_err(|_| too_large())?;
    if name.ends_with(SCALES) {
        bytes.extend((0..length).map(|index| (FIRST_EXPONENT + index % EXPONENTS) as u8));
    } else {
        // The lower bytes of the drawn numbers hold any bits.
        let codes = drawn().as_chunks::<BYTES>().0.iter().map(|bytes| bytes[0]);
        bytes.extend(codes.cycle().skip(offset(name) / BYTES).take(length));
    }
    Ok(bytes)
}

/// Appends `length` bytes of the drawn numbers, from byte `from` on, again and again.
fn fill(bytes: &mut Vec<u8>, from: usize, length: usize) {
    let drawn = drawn();
    let (mut from, mut left) = (from % drawn.len(), length);
    while left > 0 {
        let size = left.min(drawn.len() - from);
        bytes.extend_from_slice(&drawn[from..from + size]);
        (left, from) = (left - size, 0);
    }
}

/// Where a tensor begins in the drawn numbers, bytes.
fn offset(name: &str) -> usize {
    let hash = name.bytes().fold(0u32, |hash, byte| hash.wrapping_mul(31).wrapping_add(byte.into()));
    hash as usize % DRAWN * BYTES
}

fn drawn() -> &'static [u8] {
    static NUMBERS: OnceLock<Vec<u8>> = OnceLock::new();
    NUMBERS.get_or_init(|| {
        // Numerical Recipes' generator; its upper bits are good enough for this.
        let mut state = 1u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32 - 0.5
        };
        // A sum of six has a variance of a half.
        let mut normal = || (0..6).map(|_| next()).sum::<f32>() * 0.02 * 2f32.sqrt();
        (0..DRAWN).flat_map(|_| bf16::from_f32(normal()).to_le_bytes()).collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whole(name: &str, shape: &[usize]) -> TensorData {
        rows(name, shape, std::iter::once(0..shape[0])).unwrap()
    }

    #[test]
    fn rows_are_those_of_the_whole() {
        let all = whole("a", &[3_000, 1_000]);
        assert_eq!(all.bytes.len(), 6_000_000);
        let some = rows("a", &[3_000, 1_000], [2_998..3_000, 7..8].into_iter()).unwrap();
        assert_eq!(some.shape, [3, 1_000]);
        assert_eq!(some.bytes[..4_000], all.bytes[2_998 * 2_000..]);
        assert_eq!(some.bytes[4_000..], all.bytes[7 * 2_000..8 * 2_000]);
        assert_ne!(all.bytes, whole("b", &[3_000, 1_000]).bytes);
    }

    #[test]
    fn numbers_are_of_a_size_that_occurs() {
        let numbers: Vec<f32> = whole("a", &[100, 100])
            .bytes
            .as_chunks()
            .0
            .iter()
            .map(|bytes| bf16::from_le_bytes(*bytes).to_f32())
            .collect();
        let variance = numbers.iter().map(|number| number * number).sum::<f32>() / numbers.len() as f32;
        assert!((0.015..0.025).contains(&variance.sqrt()), "{variance}");
        assert!(whole("norm", &[5]).bytes.as_chunks::<2>().0.iter().all(|bytes| *bytes == bf16::ONE.to_le_bytes()));
    }

    #[test]
    fn what_no_machine_has_room_for_is_refused() {
        for shape in [&[usize::MAX, 2][..], &[2, usize::MAX / 4], &[usize::MAX / 8]] {
            let error = rows("a", shape, std::iter::once(0..shape[0])).unwrap_err();
            assert!(error.to_string().contains("\"a\""), "{error}");
            assert!(bytes("a", &[shape, &[1 << 10]].concat()).is_err());
        }
    }
}
