//! Packed layers of safetensors checkpoints: FP8, GPTQ, AWQ and pack-quantized.
//!
//! A layer's tensors are brought into one of the two forms of [`StoredMatrix`] that stand for packed numbers, and stay as
//! many bits as they are in the file:
//!
//! | format | form | in memory, of the file's size |
//! |---|---|---|
//! | FP8 with a scale for each tile, row or matrix | [`Fp8Matrix`](super::Fp8Matrix): the codes as they are, scales in f32 | 1.00 |
//! | GPTQ, AWQ and pack-quantized of 4 bits, groups of 128 | [`GroupedMatrix`](super::GroupedMatrix): numbers along the inputs, zeros of 16 bits | 1.02 |
//! | the same in groups of 32 | | 1.08 |
//! | the same of 8 bits, groups of 128 | | 1.01 |
//!
//! All headers of a layer's tensors (names, data types, shapes against the specification) are checked before the first of
//! their bytes is read. A layer that has a floating point `<name>.weight` is left to
//! [`Checkpoint::matrix`](super::Checkpoint::matrix): most formats leave some layers as they were.

mod fp8;
mod grouped;

use std::{ops::Range, sync::Arc};

use safetensors::Dtype as StoredDtype;

use super::{Checkpoint, CheckpointError, StoredMatrix, shard::Shard};
use crate::model::spec::{LinearSpec, Packing};

/// The matrix of a layer, if it is packed.
pub(super) fn read(checkpoint: &Checkpoint, linear: &LinearSpec) -> Result<Option<StoredMatrix>, CheckpointError> {
    let (Some(packing), Some(name)) = (&checkpoint.spec().packing, linear.weight.strip_suffix(".weight")) else {
        return Ok(None);
    };
    let layer = Layer { checkpoint, name, linear };
    let weight = layer.tensor("weight")?.map(|tensor| tensor.dtype);
    let matrix = match (packing.format, weight) {
        (_, Some(StoredDtype::F32 | StoredDtype::BF16 | StoredDtype::F16)) => return Ok(None),
        (Packing::Fp8 { tile }, Some(_)) => StoredMatrix::Fp8(fp8::read(&layer, tile)?),
        // The reader of floating point numbers says what is wrong.
        (_, Some(_)) | (Packing::Fp8 { .. }, None) => return Ok(None),
        (Packing::Gptq { bits, group, act_order, zeros_less_one }, None) => {
            let format = grouped::Gptq { bits, group, act_order, zeros_less_one };
            StoredMatrix::Grouped(format.read(&layer)?)
        }
        (Packing::Awq { group }, None) => StoredMatrix::Grouped(grouped::awq(&layer, group)?),
        (Packing::RowWords { bits, group, zeros, act_order }, None) => {
            let format = grouped::RowWords { bits, group, zeros, act_order };
            StoredMatrix::Grouped(format.read(&layer)?)
        }
    };
    Ok(Some(matrix))
}

/// A layer whose tensors are looked for.
struct Layer<'a> {
    checkpoint: &'a Checkpoint,
    /// What the names of its tensors begin with.
    name: &'a str,
    linear: &'a LinearSpec,
}

/// A tensor of a layer, not read yet.
struct Tensor {
    shard: Arc<Shard>,
    name: String,
    dtype: StoredDtype,
    shape: Vec<usize>,
}

impl Layer<'_> {
    /// Rows of the stored matrix, of which the layer may be some.
    fn rows(&self) -> usize {
        self.linear.stored_rows()
    }

    fn columns(&self) -> usize {
        self.linear.inputs
    }

    /// The rows of the stored matrix that the layer is.
    fn runs(&self) -> Vec<Range<usize>> {
        match &self.linear.rows {
            Some(rows) => rows.runs(self.linear.outputs).collect(),
            None => std::iter::once(0..self.linear.outputs).collect(),
        }
    }

    /// The tensor `<name>.<suffix>`, if the checkpoint has it.
    fn tensor(&self, suffix: &str) -> Result<Option<Tensor>, CheckpointError> {
        match self.checkpoint.find(&format!("{}.{suffix}", self.name)) {
            Ok((shard, name)) => {
                let (dtype, shape) = shard.stored(&name)?;
                Ok(Some(Tensor { shard, name, dtype, shape }))
            }
            Err(CheckpointError::MissingTensor { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The tensor `<name>.<suffix>`, which the layer must have, in one of these data types and in this shape.
    fn required(&self, suffix: &str, shape: &[usize], dtypes: &[StoredDtype]) -> Result<Tensor, CheckpointError> {
        match self.tensor(suffix)? {
            Some(tensor) => tensor.checked(shape, dtypes),
            None => Err(CheckpointError::MissingPart { layer: self.name.to_owned(), suffix: suffix.to_owned() }),
        }
    }

    fn bad(&self, reason: String) -> CheckpointError {
        CheckpointError::BadPacking { layer: self.name.to_owned(), reason }
    }
}

impl Tensor {
    fn checked(self, shape: &[usize], dtypes: &[StoredDtype]) -> Result<Self, CheckpointError> {
        if !dtypes.contains(&self.dtype) {
            return Err(self.shard.wrong_dtype(&self.name, self.dtype, wanted(dtypes)));
        }
        // Compares the shapes.
        self.shard.find(&self.name, shape)?;
        Ok(self)
    }

    /// All bytes.
    fn read(&self) -> Result<Vec<u8>, CheckpointError> {
        self.read_rows(std::iter::once(0..self.shape.first().copied().unwrap_or(1)))
    }

    /// The bytes of some entries of the first dimension.
    fn read_rows(&self, rows: impl Iterator<Item = Range<usize>>) -> Result<Vec<u8>, CheckpointError> {
        self.shard.rows_of(&self.name, self.shard.find(&self.name, &self.shape)?, rows)
    }
}

/// What is said of a tensor of another data type than these.
fn wanted(dtypes: &[StoredDtype]) -> &'static str {
    match dtypes {
        [StoredDtype::I32] => "packed integers must be I32",
        HALVES => "the scales of packed integers must be F16 or BF16",
        fp8::SCALES => "the scales of FP8 numbers must be F32, BF16, F16 or F8_E8M0",
        _ => "FP8 numbers must be F8_E4M3",
    }
}

/// What scales of integers may be.
const HALVES: &[StoredDtype] = &[StoredDtype::F16, StoredDtype::BF16];
