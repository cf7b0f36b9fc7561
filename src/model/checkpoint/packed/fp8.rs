//! FP8 numbers (E4M3) with a scale for each tile of a matrix, for each row, or for all of it.

use half::{bf16, f16};
use safetensors::Dtype as StoredDtype;

use super::{Layer, Tensor};
use crate::model::checkpoint::{CheckpointError, Fp8Matrix};

/// What scales may be.
pub(super) const SCALES: &[StoredDtype] =
    &[StoredDtype::F32, StoredDtype::BF16, StoredDtype::F16, StoredDtype::F8_E8M0];

/// Reads a layer; `tile` is the configuration's, and where it has none, the scale's shape says who shares one.
pub(super) fn read(layer: &Layer<'_>, tile: Option<[usize; 2]>) -> Result<Fp8Matrix, CheckpointError> {
    let (rows, columns) = (layer.rows(), layer.columns());
    let codes = layer.required("weight", &[rows, columns], &[StoredDtype::F8_E4M3])?;
    let scale = match layer.tensor("weight_scale_inv")? {
        Some(scale) => scale,
        None => layer.tensor("weight_scale")?.ok_or_else(|| CheckpointError::MissingPart {
            layer: layer.name.to_owned(),
            suffix: "weight_scale_inv".to_owned(),
        })?,
    };
    let (tile, shape) = match tile {
        Some(tile) => (tile, vec![rows.div_ceil(tile[0]), columns.div_ceil(tile[1])]),
        None if scale.shape.iter().all(|size| *size == 1) && scale.shape.len() <= 2 => {
            ([rows, columns], scale.shape.clone())
        }
        None if scale.shape == [rows] => ([1, columns], vec![rows]),
        None => ([1, columns], vec![rows, 1]),
    };
    let scale = scale.checked(&shape, SCALES)?;

    let runs = layer.runs();
    let codes = codes.read_rows(runs.iter().cloned())?;
    // Rows of several tiles become rows of smaller ones, which none of the layer's runs cuts.
    let last = runs.len().saturating_sub(1);
    let height = match rows.div_ceil(tile[0]) {
        1 => layer.linear.outputs,
        _ => runs.iter().enumerate().fold(tile[0], |height, (index, run)| {
            // The last run may end within a tile.
            let height = divisor(height, run.start);
            if index == last { height } else { divisor(height, run.len()) }
        }),
    };
    let stored = numbers(&scale)?;
    let per_row = columns.div_ceil(tile[1]);
    let tiles = match rows.div_ceil(tile[0]) {
        1 => vec![0],
        _ => runs.iter().flat_map(|run| run.clone().step_by(height)).map(|row| row / tile[0]).collect(),
    };
    let scales = tiles.into_iter().flat_map(|tile| &stored[tile * per_row..][..per_row]).copied().collect();
    Ok(Fp8Matrix { rows: layer.linear.outputs, columns, codes, tile: [height, tile[1]], scales })
}

/// The greatest common divisor; 0 divides nothing and is divided by all.
fn divisor(a: usize, b: usize) -> usize {
    if b == 0 { a } else { divisor(b, a % b) }
}

/// The numbers of a tensor of scales; all formats widen to f32 without loss.
fn numbers(scale: &Tensor) -> Result<Vec<f32>, CheckpointError> {
    let bytes = scale.read()?;
    let halves = |widen: fn([u8; 2]) -> f32| bytes.chunks_exact(2).map(|pair| widen([pair[0], pair[1]])).collect();
    Ok(match scale.dtype {
        StoredDtype::BF16 => halves(|pair| bf16::from_le_bytes(pair).to_f32()),
        StoredDtype::F16 => halves(|pair| f16::from_le_bytes(pair).to_f32()),
        StoredDtype::F8_E8M0 => bytes.into_iter().map(power_of_two).collect(),
        _ => bytes.chunks_exact(4).map(|word| f32::from_le_bytes([word[0], word[1], word[2], word[3]])).collect(),
    })
}

/// E8M0: 2^(code − 127), and 255 is no number.
fn power_of_two(code: u8) -> f32 {
    match code {
        0 => f32::MIN_POSITIVE / 2.0,
        255 => f32::NAN,
        _ => f32::from_bits(u32::from(code) << 23),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn powers_of_two_are_exact() {
        for (code, value) in
            [(127u8, 1.0f32), (128, 2.0), (120, 0.007_812_5), (254, 2f32.powi(127)), (1, 2f32.powi(-126))]
        {
            assert_eq!(power_of_two(code), value);
        }
        assert_eq!(power_of_two(0) * 2.0, power_of_two(1));
        assert!(power_of_two(255).is_nan());
    }

    #[test]
    fn common_divisors_are_the_greatest() {
        assert_eq!([divisor(128, 0), divisor(128, 96), divisor(32, 64), divisor(7, 5)], [128, 32, 32, 1]);
    }
}
