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

/// The sum of two tensors of the same shape.
pub(super) fn add(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let (_, width) = a.dims2()?;
    let sum = with_f32(a, |a| with_f32(b, |b| a.iter().zip(b).map(|(a, b)| a + b).collect()))??;
    matrix(sum, width)
}

/// Bytes of a checkpoint as f32.
pub(super) fn to_f32(data: &TensorData) -> Vec<f32> {
    let mut values = Vec::with_capacity(data.bytes.len() / data.dtype.size_in_bytes());
    extend(&mut values, data, |value| value);
    values
}

/// Appends the values of `data`, converted.
fn extend<T>(values: &mut Vec<T>, data: &TensorData, convert: impl Fn(f32) -> T) {
    let four = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
    match data.dtype {
        Dtype::F32 => values.extend(data.bytes.chunks_exact(4).map(|bytes| convert(four(bytes)))),
        Dtype::Bf16 => values.extend(halves(data).map(|bits| convert(bf16::from_bits(bits).to_f32()))),
        Dtype::F16 => values.extend(halves(data).map(|bits| convert(f16::from_bits(bits).to_f32()))),
    }
}

fn halves(data: &TensorData) -> impl Iterator<Item = u16> {
    data.bytes.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]]))
}

/// Matrices of a checkpoint with the same number of columns, one below the other, in `dtype`.
pub(super) fn stack(parts: &[TensorData], dtype: Dtype) -> Result<Tensor> {
    let columns = parts.first().and_then(|part| part.shape.get(1)).copied().unwrap_or(0);
    let rows = parts.iter().filter_map(|part| part.shape.first()).sum::<usize>();
    let (shape, device) = ((rows, columns), &Device::Cpu);
    if dtype != Dtype::F32 && parts.iter().all(|part| part.dtype == dtype) {
        let mut bits: Vec<u16> = Vec::with_capacity(rows * columns);
        parts.iter().for_each(|part| bits.extend(halves(part)));
        return match dtype {
            Dtype::F16 => Tensor::from_vec(bits.reinterpret_into::<f16>(), shape, device),
            _ => Tensor::from_vec(bits.reinterpret_into::<bf16>(), shape, device),
        };
    }
    match dtype {
        Dtype::F32 => Tensor::from_vec(converted(parts, rows * columns, |value| value), shape, device),
        Dtype::Bf16 => Tensor::from_vec(converted(parts, rows * columns, bf16::from_f32), shape, device),
        Dtype::F16 => Tensor::from_vec(converted(parts, rows * columns, f16::from_f32), shape, device),
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

fn converted<T>(parts: &[TensorData], count: usize, convert: impl Fn(f32) -> T) -> Vec<T> {
    let mut values = Vec::with_capacity(count);
    parts.iter().for_each(|part| extend(&mut values, part, &convert));
    values
}

/// Bytes that a tensor takes in memory.
pub(super) fn size_in_bytes(tensor: &Tensor) -> u64 {
    (tensor.elem_count() * tensor.dtype().size_in_bytes()) as u64
}
