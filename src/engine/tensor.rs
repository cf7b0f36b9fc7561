//! Small tensors of a checkpoint, before they become norms, biases and experts.

use half::{bf16, f16};

use crate::model::{Dtype, checkpoint::TensorData};

/// Bytes of a checkpoint as f32.
pub(super) fn to_f32(data: &TensorData) -> Vec<f32> {
    match data.dtype {
        Dtype::F32 => data.bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect(),
        Dtype::Bf16 => data.bytes.as_chunks().0.iter().map(|bytes| bf16::from_le_bytes(*bytes).to_f32()).collect(),
        Dtype::F16 => data.bytes.as_chunks().0.iter().map(|bytes| f16::from_le_bytes(*bytes).to_f32()).collect(),
    }
}

/// `data`, `[…, rows, columns]` with a product of one for what comes first, as `[columns, rows]`.
pub(super) fn transposed(data: &TensorData, rows: usize, columns: usize) -> TensorData {
    let size = data.dtype.size_in_bytes();
    let mut bytes = Vec::with_capacity(data.bytes.len());
    for column in 0..columns {
        for row in 0..rows {
            bytes.extend_from_slice(&data.bytes[(row * columns + column) * size..][..size]);
        }
    }
    TensorData { dtype: data.dtype, shape: vec![columns, rows], bytes }
}
