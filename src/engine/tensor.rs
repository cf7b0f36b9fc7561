//! Between candle's tensors and plain slices.
//!
//! The activations between the parts of a block are candle tensors, `[rows, width]` in f32, on the device that the
//! weights are on. On the CPU each part runs a kernel of our own on their slices.

use candle_core::{CpuStorage, Device, Result, Storage, Tensor, bail};
use half::{bf16, f16};

use crate::model::{Dtype, checkpoint::TensorData};

/// Calls `f` with the values of a contiguous f32 tensor on the CPU.
pub(super) fn with_f32<R>(tensor: &Tensor, f: impl FnOnce(&[f32]) -> R) -> Result<R> {
    let (storage, layout) = tensor.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(CpuStorage::F32(values)), Some((start, end))) => Ok(f(&values[start..end])),
        _ => bail!("expected a contiguous tensor of f32 on the CPU, found {tensor:?}"),
    }
}

/// `values` as a tensor `[rows, width]`.
pub(super) fn matrix(values: Vec<f32>, width: usize) -> Result<Tensor> {
    let rows = values.len() / width;
    Tensor::from_vec(values, (rows, width), &Device::Cpu)
}

/// The sum of two tensors of the same shape.
pub(super) fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let (_, width) = a.dims2()?;
    let sum = with_f32(a, |a| with_f32(b, |b| a.iter().zip(b).map(|(a, b)| a + b).collect()))??;
    matrix(sum, width)
}

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
