//! Between candle's tensors and plain slices.
//!
//! The activations between the parts of a block are candle tensors, `[rows, width]` in f32, on the device that the
//! weights are on. On the CPU each part runs a kernel of our own on their slices.

use candle_core::{CpuStorage, Device, Result, Storage, Tensor, bail};
use half::{bf16, f16, vec::HalfBitsVecExt};

use crate::model::{Dtype, checkpoint::TensorData};

/// Calls `f` with the values of a contiguous f32 tensor on the CPU.
pub(super) fn with_f32<R>(tensor: &Tensor, f: impl FnOnce(&[f32]) -> R) -> Result<R> {
    match with_slice(tensor, |slice| match slice {
        Slice::F32(values) => Some(f(values)),
        _ => None,
    })? {
        Some(result) => Ok(result),
        None => bail!("expected a tensor of f32, found {:?}", tensor.dtype()),
    }
}

/// The values of a contiguous tensor on the CPU.
pub(super) enum Slice<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
    F16(&'a [f16]),
}

/// Calls `f` with the values of a contiguous tensor on the CPU.
pub(super) fn with_slice<R>(tensor: &Tensor, f: impl FnOnce(Slice<'_>) -> R) -> Result<R> {
    let (storage, layout) = tensor.storage_and_layout();
    let Some((start, end)) = layout.contiguous_offsets() else { bail!("expected a contiguous tensor") };
    match &*storage {
        Storage::Cpu(CpuStorage::F32(values)) => Ok(f(Slice::F32(&values[start..end]))),
        Storage::Cpu(CpuStorage::BF16(values)) => Ok(f(Slice::Bf16(&values[start..end]))),
        Storage::Cpu(CpuStorage::F16(values)) => Ok(f(Slice::F16(&values[start..end]))),
        _ => bail!("expected a tensor of f32, bf16 or f16 on the CPU"),
    }
}

/// `values` as a tensor `[rows, width]`.
pub(super) fn matrix(values: Vec<f32>, width: usize) -> Result<Tensor> {
    let rows = values.len() / width;
    Tensor::from_vec(values, (rows, width), &Device::Cpu)
}

/// Bytes of a checkpoint as f32.
pub(super) fn to_f32(data: &TensorData) -> Vec<f32> {
    match data.dtype {
        Dtype::F32 => data.bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        Dtype::Bf16 => halves(data).map(|bits| bf16::from_bits(bits).to_f32()).collect(),
        Dtype::F16 => halves(data).map(|bits| f16::from_bits(bits).to_f32()).collect(),
    }
}

fn halves(data: &TensorData) -> impl Iterator<Item = u16> {
    data.bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]))
}

/// Matrices of a checkpoint with the same number of columns, one below the other, in `dtype`.
pub(super) fn stack(parts: &[TensorData], dtype: Dtype) -> Result<Tensor> {
    let columns = parts.first().and_then(|part| part.shape.get(1)).copied().unwrap_or(0);
    let rows = parts.iter().filter_map(|part| part.shape.first()).sum::<usize>();
    let shape = (rows, columns);
    let same = parts.iter().all(|part| part.dtype == dtype);
    let device = &Device::Cpu;
    match dtype {
        Dtype::F32 => Tensor::from_vec(parts.iter().flat_map(to_f32).collect::<Vec<f32>>(), shape, device),
        Dtype::Bf16 if same => {
            let bits: Vec<u16> = parts.iter().flat_map(halves).collect();
            Tensor::from_vec(bits.reinterpret_into::<bf16>(), shape, device)
        }
        Dtype::F16 if same => {
            let bits: Vec<u16> = parts.iter().flat_map(halves).collect();
            Tensor::from_vec(bits.reinterpret_into::<f16>(), shape, device)
        }
        Dtype::Bf16 => {
            let values: Vec<bf16> = parts.iter().flat_map(to_f32).map(bf16::from_f32).collect();
            Tensor::from_vec(values, shape, device)
        }
        Dtype::F16 => {
            let values: Vec<f16> = parts.iter().flat_map(to_f32).map(f16::from_f32).collect();
            Tensor::from_vec(values, shape, device)
        }
    }
}

/// Bytes that a tensor takes in memory.
pub(super) fn size_in_bytes(tensor: &Tensor) -> u64 {
    (tensor.elem_count() * tensor.dtype().size_in_bytes()) as u64
}
