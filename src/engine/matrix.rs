//! Matrices as they lie in memory, and their rows as f32.
//!
//! A matrix keeps the form that its checkpoint has it in, or that `--quant` asks for. Some forms are packed into tiles for the
//! kernels ([`Matrix::pack`]), which multiply with them as they are; of others a product widens some rows at a time
//! (`engine/product.rs`). Then only the widening knows a form, and the sums are the same chain of f32 operations for all, so
//! that a matrix that is not packed gives bit for bit what the matrix of its widened numbers gives.
//!
//! | form | in memory | bits a number |
//! |---|---|---|
//! | f32, bf16, f16 | `[rows, columns]`, or tiles | 32, 16, 16 |
//! | blocks (`matrix/blocks.rs`, `matrix/k_blocks.rs`) | tiles (`engine/kernels/tiles.rs`), or a row is a run of blocks, each with its scales, byte by byte as in GGUF files (MXFP4: 16 bytes of numbers in the order of Hugging Face's checkpoints, then the scale) | q8_0 8.5, q6_k 6.56, q5_k 5.5, q4_0 and q4_k 4.5, mxfp4 4.25, q3_k 3.44, q2_k 2.63 |
//! | FP8 (`matrix/fp8.rs`) | `[rows, columns]` of E4M3, and an f32 for each tile | 8 + 32 / tile |
//! | grouped integers (`matrix/grouped.rs`) | `[rows, columns]` of 4 or 8 bits, and for each group of a row a scale of 16 bits and a zero of 16 bits | bits + 32 / group |
//!
//! # What quantization costs
//!
//! | format | bits a number | error of numbers | of a product | published for 8 billion parameters: perplexity |
//! |---|---|---|---|---|
//! | bf16 | 16 | 0.17 % | 0.17 % | |
//! | f16 | 16 | 0.02 % | 0.02 % | 6.23 |
//! | q8_0 | 8.5 | 0.54 % | 0.54 % | +0.003 |
//! | int8, groups of 128 | 8.25 | 0.59 % | 0.58 % | |
//! | fp8, tiles of 128 × 128 | 8 | 2.6 % | 2.7 % | |
//! | q6_k | 6.56 | 1.8 % | 1.9 % | +0.022 |
//! | q5_1 | 6 | 3.8 % | 3.7 % | +0.106 |
//! | q5_k | 5.5 | 3.7 % | 3.5 % | +0.105 (Q5_K_S) |
//! | q5_0 | 5.5 | 4.3 % | 4.3 % | +0.132 |
//! | q4_1 | 5 | 7.8 % | 7.9 % | +0.451 |
//! | q4_k | 4.5 | 7.5 % | 7.6 % | +0.269 (Q4_K_S) |
//! | iq4_nl | 4.5 | 8.0 % | 8.3 % | |
//! | q4_0 | 4.5 | 8.6 % | 8.7 % | +0.469 |
//! | int4, groups of 128 | 4.25 | 10.1 % | 10.2 % | |
//! | mxfp4 | 4.25 | 11.4 % | 11.0 % | |
//! | q3_k | 3.44 | 15.1 % | 15.2 % | +1.63 (Q3_K_S) |
//! | q2_k | 2.63 | 29.0 % | 29.5 % | +3.18 (Q2_K_S) |
//!
//! Errors are root mean squares, divided by that of what is exact, of a matrix `[1024, 1024]` with a normal distribution and of
//! its product with a row (`cargo bench --bench quantization`). A step of `q8_0` is a 127th of the largest of 32 numbers, about
//! 2.1 standard deviations, which makes an error of 2.1 / 127 / √12 = 0.5 %; one of `q4_0` is an 8th of it: 7.6 %, and a
//! little more where the largest is rounded away. int4, int8, fp8 and mxfp4 are rounded to the nearest here; checkpoints in
//! these formats were made, or trained, to do better than that. The perplexities are those of llama.cpp's `llama-quantize --help` for
//! Llama 3 8B; the base value is its perplexity tool's README's.

mod blocks;
mod fp8;
mod grouped;
mod k_blocks;

use std::{cell::RefCell, ops::Range};

use half::{bf16, f16};
use pulp::{Arch, bytemuck};
use rayon::prelude::*;

use super::{
    floats,
    kernels::{Layout, TILE},
    load::LoadError,
    product::{Operands, Room, products},
};
use crate::model::{
    Dtype,
    checkpoint::{BlockFormat, Fp8Matrix, GroupedMatrix, StoredMatrix, TensorData},
};

/// Numbers that a conversion widens at a time: some rows, in a part of a level-2 cache.
const CONVERTED_AT_ONCE: usize = 1 << 15;

thread_local! {
    /// Rows of packed matrices as they were before, while they are widened: an embedding's, for every token.
    static UNPACKED: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// A matrix `[outputs, inputs]` in one of the forms above, for products with rows of `inputs` numbers.
pub struct Matrix {
    outputs: usize,
    inputs: usize,
    values: Values,
    /// How it is packed for the kernels; `None`: its numbers lie row by row.
    layout: Option<Layout>,
}

/// Its numbers, row by row or in tiles.
enum Values {
    F32(Vec<f32>),
    /// Little-endian, as in files: they are read straight into place.
    Bf16(Vec<u8>),
    /// Likewise.
    F16(Vec<u8>),
    Blocks(BlockFormat, Vec<u8>),
    Fp8(Fp8Matrix),
    Grouped(GroupedMatrix),
}

impl Matrix {
    /// Takes a matrix as it is stored. `name` is for the error.
    ///
    /// # Errors
    /// Its parts don't have the sizes that its shape asks for.
    pub fn new(name: &str, stored: StoredMatrix) -> Result<Self, LoadError> {
        if let Err(reason) = check(&stored) {
            return Err(LoadError::Matrix { name: name.to_owned(), reason });
        }
        let (outputs, inputs) = (stored.rows(), stored.columns());
        let values = match stored {
            StoredMatrix::Floats(TensorData { dtype: Dtype::Bf16, bytes, .. }) => Values::Bf16(bytes),
            StoredMatrix::Floats(TensorData { dtype: Dtype::F16, bytes, .. }) => Values::F16(bytes),
            StoredMatrix::Floats(TensorData { dtype: Dtype::F32, bytes, .. }) => {
                Values::F32(bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
            }
            StoredMatrix::Blocks(matrix) => Values::Blocks(matrix.format, matrix.bytes),
            StoredMatrix::Fp8(matrix) => Values::Fp8(matrix),
            StoredMatrix::Grouped(matrix) => Values::Grouped(matrix),
        };
        Ok(Self { outputs, inputs, values, layout: None })
    }

    /// A matrix of f32.
    #[cfg(test)]
    pub(super) fn from_f32(values: Vec<f32>, inputs: usize) -> Self {
        Self { outputs: values.len() / inputs, inputs, values: Values::F32(values), layout: None }
    }

    /// Rows.
    pub(super) fn outputs(&self) -> usize {
        self.outputs
    }

    /// Columns.
    pub(super) fn inputs(&self) -> usize {
        self.inputs
    }

    /// Where there is one, column `i` here is column `order[i]` of what the matrix is multiplied with.
    pub(super) fn order(&self) -> Option<&[u32]> {
        match &self.values {
            Values::Grouped(matrix) => matrix.order.as_deref(),
            _ => None,
        }
    }

    /// Bytes that it takes in memory.
    pub fn size_in_bytes(&self) -> usize {
        match &self.values {
            Values::F32(values) => size_of_val(&values[..]),
            Values::Bf16(bytes) | Values::F16(bytes) | Values::Blocks(_, bytes) => bytes.len(),
            Values::Fp8(matrix) => matrix.codes.len() + size_of_val(&matrix.scales[..]),
            Values::Grouped(matrix) => {
                let order = matrix.order.as_deref().map_or(0, size_of_val);
                matrix.codes.len() + size_of_val(&matrix.scales[..]) + size_of_val(&matrix.zeros[..]) + order
            }
        }
    }

    /// What it is packed in, as announcements name it; `None` if it is in floating point.
    pub(super) fn packed_in(&self) -> Option<&'static str> {
        match &self.values {
            Values::F32(_) | Values::Bf16(_) | Values::F16(_) => None,
            Values::Blocks(format, _) => Some(format.name()),
            Values::Fp8(_) => Some("fp8"),
            Values::Grouped(matrix) if matrix.bits == 4 => Some("int4"),
            Values::Grouped(_) => Some("int8"),
        }
    }

    /// Whether it is in blocks of this format.
    pub(super) fn is_in(&self, format: BlockFormat) -> bool {
        matches!(&self.values, Values::Blocks(found, _) if *found == format)
    }

    /// What its numbers are, where it is in floating point.
    pub(super) fn dtype(&self) -> Option<Dtype> {
        match &self.values {
            Values::F32(_) => Some(Dtype::F32),
            Values::Bf16(_) => Some(Dtype::Bf16),
            Values::F16(_) => Some(Dtype::F16),
            _ => None,
        }
    }

    /// `x · selfᵀ` for `x` of `[rows, inputs]`: `[rows, outputs]`. Columns of `x` are taken in the matrix's own order.
    pub fn product(&self, x: &[f32]) -> Vec<f32> {
        let mut y = Vec::new();
        products(&[Operands { x, w: self }], &mut y, &mut Room::default());
        y
    }

    /// Packs it for the kernels, where they have a layout for its form and width. With blocks, products then round what it is
    /// multiplied with, so an engine that must not round leaves these as they are: `rounds_rows` is false.
    ///
    /// A row that is packed takes as many bytes as before; the last tile is filled up with zeros.
    pub fn pack(&mut self, rounds_rows: bool) {
        let layout = match &self.values {
            Values::F32(_) => Layout::of_floats(Dtype::F32),
            Values::Bf16(_) => Layout::of_floats(Dtype::Bf16),
            Values::F16(_) => Layout::of_floats(Dtype::F16),
            Values::Blocks(format, _) => match Layout::of_blocks(*format) {
                Some(layout) if rounds_rows => layout,
                _ => return,
            },
            Values::Fp8(_) | Values::Grouped(_) => return,
        };
        if self.layout.is_some() || !layout.fits(self.inputs) {
            return;
        }
        let rows = self.outputs.next_multiple_of(TILE);
        match &mut self.values {
            Values::F32(values) => {
                values.reserve_exact(rows * self.inputs - values.len());
                values.resize(rows * self.inputs, 0.0);
                layout.pack_all(bytemuck::cast_slice_mut(values), self.inputs);
            }
            Values::Bf16(bytes) | Values::F16(bytes) | Values::Blocks(_, bytes) => {
                let size = rows * layout.row_bytes(self.inputs);
                bytes.reserve_exact(size - bytes.len());
                bytes.resize(size, 0);
                layout.pack_all(bytes, self.inputs);
            }
            Values::Fp8(_) | Values::Grouped(_) => {}
        }
        self.layout = Some(layout);
    }

    /// How it is packed.
    pub(super) fn layout(&self) -> Option<Layout> {
        self.layout
    }

    /// Some tiles of a packed matrix.
    pub(super) fn tiles(&self, tiles: Range<usize>) -> &[u8] {
        let all = match &self.values {
            Values::F32(values) => bytemuck::cast_slice(values),
            Values::Bf16(bytes) | Values::F16(bytes) | Values::Blocks(_, bytes) => bytes,
            Values::Fp8(_) | Values::Grouped(_) => &[],
        };
        let size = self.layout.map_or(0, |layout| layout.row_bytes(self.inputs) * TILE);
        &all[tiles.start * size..tiles.end * size]
    }

    /// Rows of a packed matrix as f32.
    fn unpack(&self, layout: Layout, rows: Range<usize>, numbers: &mut [f32]) {
        UNPACKED.with_borrow_mut(|bytes| {
            let size = layout.row_bytes(self.inputs);
            bytes.resize(rows.len() * size, 0);
            for (row, bytes) in rows.zip(bytes.chunks_exact_mut(size)) {
                layout.unpack(self.tiles(row / TILE..row / TILE + 1), row % TILE, bytes);
            }
            match &self.values {
                Values::F32(_) => {
                    numbers.iter_mut().zip(bytes.as_chunks().0).for_each(|(x, bytes)| *x = f32::from_ne_bytes(*bytes));
                }
                Values::Bf16(_) => floats::widen_bf16(bytes, numbers),
                Values::F16(_) => floats::widen_f16(bytes, numbers),
                Values::Blocks(format, _) => blocks::widen(*format, bytes, numbers),
                // They have no layout.
                Values::Fp8(_) | Values::Grouped(_) => {}
            }
        });
    }

    /// Some rows as f32, `[rows, inputs]`: themselves, or widened into `scratch`, which has room for them.
    pub fn widen<'a>(&'a self, rows: Range<usize>, scratch: &'a mut [f32]) -> &'a [f32] {
        if let Some(layout) = self.layout {
            let scratch = &mut scratch[..rows.len() * self.inputs];
            self.unpack(layout, rows, scratch);
            return scratch;
        }
        let numbers = rows.start * self.inputs..rows.end * self.inputs;
        let scratch = match &self.values {
            Values::F32(values) => return &values[numbers],
            _ => &mut scratch[..numbers.len()],
        };
        match &self.values {
            Values::F32(_) => {}
            Values::Bf16(bytes) => floats::widen_bf16(&bytes[2 * numbers.start..2 * numbers.end], scratch),
            Values::F16(bytes) => floats::widen_f16(&bytes[2 * numbers.start..2 * numbers.end], scratch),
            Values::Blocks(format, bytes) => {
                let width = self.inputs / format.numbers() * format.bytes();
                blocks::widen(*format, &bytes[rows.start * width..rows.end * width], scratch);
            }
            Values::Fp8(matrix) => Arch::new().dispatch(fp8::Widening { matrix, rows, numbers: scratch }),
            Values::Grouped(matrix) => Arch::new().dispatch(grouped::Widening { matrix, rows, numbers: scratch }),
        }
        scratch
    }

    /// The same numbers, rounded to `dtype`.
    pub(super) fn to_dtype(&self, dtype: Dtype) -> Self {
        let values = match dtype {
            Dtype::F32 => Values::F32(self.converted(self.inputs, |wide, values| values.copy_from_slice(wide))),
            Dtype::Bf16 => Values::Bf16(self.converted(2 * self.inputs, |wide, bytes: &mut [u8]| {
                for (bytes, wide) in bytes.as_chunks_mut().0.iter_mut().zip(wide) {
                    *bytes = bf16::from_f32(*wide).to_le_bytes();
                }
            })),
            Dtype::F16 => Values::F16(self.converted(2 * self.inputs, |wide, bytes: &mut [u8]| {
                for (bytes, wide) in bytes.as_chunks_mut().0.iter_mut().zip(wide) {
                    *bytes = f16::from_f32(*wide).to_le_bytes();
                }
            })),
        };
        Self { outputs: self.outputs, inputs: self.inputs, values, layout: None }
    }

    /// The same numbers, rounded to blocks of `format`, which is one that [`Quant`](crate::model::Quant) names and whose
    /// numbers divide the columns.
    ///
    /// # Errors
    /// Those of the tensor library.
    pub(super) fn to_blocks(&self, format: BlockFormat) -> Result<Self, LoadError> {
        let width = self.inputs / format.numbers() * format.bytes();
        let failed = std::sync::OnceLock::new();
        let bytes = self.converted(width, |wide, bytes: &mut [u8]| {
            if let Err(error) = blocks::quantize(format, wide, bytes) {
                failed.get_or_init(|| error);
            }
        });
        match failed.into_inner() {
            Some(error) => Err(error.into()),
            None => {
                let values = Values::Blocks(format, bytes);
                Ok(Self { outputs: self.outputs, inputs: self.inputs, values, layout: None })
            }
        }
    }

    /// Converts all rows, some at a time on each thread, with the columns in the order of what they are multiplied with.
    /// `convert` gets rows as f32 and as many of `width` values each.
    fn converted<T: Clone + Default + Send>(&self, width: usize, convert: impl Fn(&[f32], &mut [T]) + Sync) -> Vec<T> {
        let rows = (CONVERTED_AT_ONCE / self.inputs.max(1)).max(1);
        let mut values = vec![T::default(); self.outputs * width];
        if values.is_empty() {
            return values;
        }
        values.par_chunks_mut(rows * width).enumerate().for_each(|(index, values)| {
            let first = index * rows;
            let mut scratch = vec![0.0; rows * self.inputs];
            let wide = self.widen(first..first + values.len() / width, &mut scratch);
            match self.order() {
                None => convert(wide, values),
                Some(order) => {
                    let mut sorted = vec![0.0; wide.len()];
                    for (sorted, wide) in sorted.chunks_exact_mut(self.inputs).zip(wide.chunks_exact(self.inputs)) {
                        wide.iter().zip(order).for_each(|(value, column)| sorted[*column as usize] = *value);
                    }
                    convert(&sorted, values);
                }
            }
        });
        values
    }

    /// Puts the rows of `other`, which has the same form and columns, below these.
    ///
    /// # Errors
    /// Nothing, if it has.
    pub(super) fn extend(&mut self, other: Self) -> Result<(), LoadError> {
        match (&mut self.values, other.values) {
            (Values::F32(values), Values::F32(more)) => values.extend_from_slice(&more),
            (Values::Bf16(bytes), Values::Bf16(more)) | (Values::F16(bytes), Values::F16(more)) => {
                bytes.extend_from_slice(&more);
            }
            (Values::Blocks(format, bytes), Values::Blocks(found, more)) if *format == found => {
                bytes.extend_from_slice(&more);
            }
            _ => {
                let reason = "its rows are stored in different formats".to_owned();
                return Err(LoadError::Matrix { name: "a large matrix".to_owned(), reason });
            }
        }
        self.outputs += other.outputs;
        Ok(())
    }

    /// Makes room for so many rows in all, so that [`Matrix::extend`] doesn't copy what is there.
    pub(super) fn reserve_rows(&mut self, rows: usize) {
        let more = |size: usize| size / self.outputs.max(1) * rows.saturating_sub(self.outputs);
        match &mut self.values {
            Values::F32(values) => values.reserve_exact(more(values.len())),
            Values::Bf16(bytes) | Values::F16(bytes) | Values::Blocks(_, bytes) => {
                bytes.reserve_exact(more(bytes.len()));
            }
            Values::Fp8(_) | Values::Grouped(_) => {}
        }
    }
}

/// Whether the parts of a matrix have the sizes that its shape asks for. Readers of checkpoints see to it; a mistake there
/// would end in a panic in the middle of a step.
fn check(stored: &StoredMatrix) -> Result<(), String> {
    let count = |what: &str, found: usize, expected: Option<usize>| match expected {
        Some(expected) if found == expected => Ok(()),
        Some(expected) => Err(format!("it has {found} {what}, and its shape asks for {expected}")),
        None => Err("its shape is beyond counting".to_owned()),
    };
    let divides = |numbers: usize, columns: usize| match numbers > 0 && columns.is_multiple_of(numbers) {
        true => Ok(()),
        false => Err(format!("its {columns} columns are not a multiple of {numbers}")),
    };
    let (rows, columns) = (stored.rows(), stored.columns());
    match stored {
        StoredMatrix::Floats(data) => {
            if data.shape.len() != 2 {
                return Err(format!("it has {} dimensions", data.shape.len()));
            }
            let size = data.dtype.size_in_bytes();
            count("bytes", data.bytes.len(), rows.checked_mul(columns).and_then(|count| count.checked_mul(size)))
        }
        StoredMatrix::Blocks(matrix) => {
            divides(matrix.format.numbers(), columns)?;
            let blocks = rows.checked_mul(columns / matrix.format.numbers());
            count("bytes", matrix.bytes.len(), blocks.and_then(|blocks| blocks.checked_mul(matrix.format.bytes())))
        }
        StoredMatrix::Fp8(matrix) => {
            let [high, wide] = matrix.tile;
            if high == 0 || wide == 0 {
                return Err(format!("its tiles are {high} × {wide}"));
            }
            count("bytes", matrix.codes.len(), rows.checked_mul(columns))?;
            count("scales", matrix.scales.len(), rows.div_ceil(high).checked_mul(columns.div_ceil(wide)))
        }
        StoredMatrix::Grouped(matrix) => {
            let in_a_byte = match matrix.bits {
                4 => 2,
                8 => 1,
                bits => return Err(format!("its integers have {bits} bits; 4 and 8 are supported")),
            };
            divides(matrix.group, columns)?;
            divides(in_a_byte, matrix.group)?;
            if matrix.scale_dtype == Dtype::F32 {
                return Err("its scales are in f32; f16 and bf16 are supported".to_owned());
            }
            let groups = rows.checked_mul(columns / matrix.group);
            count("bytes", matrix.codes.len(), rows.checked_mul(columns / in_a_byte))?;
            count("scales", matrix.scales.len(), groups)?;
            count("zeros", matrix.zeros.len(), groups)?;
            let Some(order) = &matrix.order else { return Ok(()) };
            let mut seen = vec![false; columns];
            count("places in its order of columns", order.len(), Some(columns))?;
            for column in order {
                match seen.get_mut(*column as usize) {
                    Some(seen) if !*seen => *seen = true,
                    _ => {
                        return Err(format!("its order of columns names column {column} twice, or has no such column"));
                    }
                }
            }
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests;
