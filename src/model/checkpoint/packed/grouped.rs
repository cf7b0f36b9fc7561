//! Integers of 4 and 8 bits with a scale and a zero for each group of a row: GPTQ, AWQ and pack-quantized.
//!
//! The three keep eight or four numbers in a little-endian word of 32 bits, from the lowest bits up, and differ in where
//! the words go. GPTQ's run along the inputs, one row of words below the other for all outputs, so that turning the words
//! round gives the canonical rows byte for byte. Pack-quantized has them that way from the start. AWQ's run along the
//! outputs, in the order 0, 2, 4, 6, 1, 3, 5, 7, and are taken apart.

use rayon::prelude::*;
use safetensors::Dtype as StoredDtype;

use super::{HALVES, Layer, Tensor};
use crate::model::{
    Dtype,
    checkpoint::{CheckpointError, GroupedMatrix},
    spec::{AWQ_PER_WORD, WORD_BITS},
};

const WORDS: &[StoredDtype] = &[StoredDtype::I32];
const WORD_BYTES: usize = WORD_BITS / 8;
/// The output, of eight, that each number of a word of AWQ belongs to, from the lowest bits up.
const AWQ_ORDER: [usize; AWQ_PER_WORD] = [0, 2, 4, 6, 1, 3, 5, 7];
/// Rows of output that one thread makes at a time: AWQ's words for them fill a line of a processor's cache.
const ROWS_AT_A_TIME: usize = 128;

/// See [`Packing::Gptq`](crate::model::spec::Packing::Gptq).
pub(super) struct Gptq {
    pub(super) bits: usize,
    pub(super) group: Option<usize>,
    pub(super) act_order: bool,
    pub(super) zeros_less_one: bool,
}

/// See [`Packing::RowWords`](crate::model::spec::Packing::RowWords).
pub(super) struct RowWords {
    pub(super) bits: usize,
    pub(super) group: Option<usize>,
    pub(super) zeros: bool,
    pub(super) act_order: bool,
}

impl Gptq {
    pub(super) fn read(&self, layer: &Layer<'_>) -> Result<GroupedMatrix, CheckpointError> {
        let (rows, columns) = (layer.rows(), layer.columns());
        let sizes = Sizes::new(layer, self.bits, self.group)?;
        let per_word = WORD_BITS / self.bits;
        let words = layer.required("qweight", &[columns / per_word, rows], WORDS)?;
        let zeros = layer.required("qzeros", &[sizes.groups, rows.div_ceil(per_word)], WORDS)?;
        let scales = layer.required("scales", &[sizes.groups, rows], HALVES)?;
        let needs_order = self.act_order && sizes.groups > 1;
        let order = match layer.tensor("g_idx")? {
            Some(indices) => order(layer, &sizes, &indices.checked(&[columns], WORDS)?)?,
            None if needs_order => return Err(missing(layer, "g_idx")),
            None => None,
        };

        // The whole word is counted up, as GPTQModel does, which counted it down: a zero of 0 borrowed from its neighbour.
        let one = if self.zeros_less_one { u32::MAX / ((1 << self.bits) - 1) } else { 0 };
        let zeros = transposed_zeros(&zeros.read()?, sizes.groups, rows, |word| word.wrapping_add(one), self.bits);
        let scale_dtype = dtype(&scales);
        let scales = transposed::<2>(&scales.read()?, sizes.groups, rows);
        let codes = transposed::<WORD_BYTES>(&words.read()?, columns / per_word, rows);
        Whole { codes, scales, scale_dtype, zeros, order }.rows_of(layer, &sizes)
    }
}

/// Reads a layer of AWQ in the layout GEMM.
pub(super) fn awq(layer: &Layer<'_>, group: Option<usize>) -> Result<GroupedMatrix, CheckpointError> {
    let (rows, columns) = (layer.rows(), layer.columns());
    let sizes = Sizes::new(layer, 4, group)?;
    if !rows.is_multiple_of(AWQ_PER_WORD) {
        return Err(layer.bad(format!("AWQ packs outputs by {AWQ_PER_WORD}, and there are {rows}")));
    }
    let per_row = rows / AWQ_PER_WORD;
    let words = layer.required("qweight", &[columns, per_row], WORDS)?;
    let zeros = layer.required("qzeros", &[sizes.groups, per_row], WORDS)?;
    let scales = layer.required("scales", &[sizes.groups, rows], HALVES)?;

    let zeros = zeros.read()?;
    let numbers = |row: usize| {
        let (word, shift) = awq_place(row);
        let at = move |line: usize| line * per_row + word;
        (at, shift)
    };
    let mut columns_of_zeros = Vec::with_capacity(rows * sizes.groups);
    for row in 0..rows {
        let (at, shift) = numbers(row);
        columns_of_zeros.extend((0..sizes.groups).map(|group| (word_at(&zeros, at(group)) >> shift & 15) as u16));
    }
    let words = words.read()?;
    let row_bytes = columns / 2;
    let mut codes = vec![0; rows * row_bytes];
    codes.par_chunks_mut(ROWS_AT_A_TIME * row_bytes).enumerate().for_each(|(part, codes)| {
        for (index, codes) in codes.chunks_exact_mut(row_bytes).enumerate() {
            let (at, shift) = numbers(part * ROWS_AT_A_TIME + index);
            for (pair, code) in codes.iter_mut().enumerate() {
                let [low, high] = [2 * pair, 2 * pair + 1].map(|column| word_at(&words, at(column)) >> shift & 15);
                *code = (low | high << 4) as u8;
            }
        }
    });
    let scale_dtype = dtype(&scales);
    let scales = transposed::<2>(&scales.read()?, sizes.groups, rows);
    Whole { codes, scales, scale_dtype, zeros: columns_of_zeros, order: None }.rows_of(layer, &sizes)
}

impl RowWords {
    pub(super) fn read(&self, layer: &Layer<'_>) -> Result<GroupedMatrix, CheckpointError> {
        let (rows, columns) = (layer.rows(), layer.columns());
        let sizes = Sizes::new(layer, self.bits, self.group)?;
        let per_word = WORD_BITS / self.bits;
        let words = layer.required("weight_packed", &[rows, columns / per_word], WORDS)?;
        let scales = layer.required("weight_scale", &[rows, sizes.groups], HALVES)?;
        let zeros = match self.zeros {
            true => Some(layer.required("weight_zero_point", &[rows.div_ceil(per_word), sizes.groups], WORDS)?.read()?),
            false => None,
        };
        let order = match layer.tensor("weight_g_idx")? {
            Some(indices) => order(layer, &sizes, &indices.checked(&[columns], WORDS)?)?,
            None if self.act_order && sizes.groups > 1 => return Err(missing(layer, "weight_g_idx")),
            None => None,
        };
        let zero = |row: usize, group: usize| match &zeros {
            Some(words) => {
                let word = word_at(words, row / per_word * sizes.groups + group);
                (word >> (row % per_word * self.bits) & ((1 << self.bits) - 1)) as u16
            }
            // Signed numbers are stored with this added.
            None => 1 << (self.bits - 1),
        };
        let zeros = (0..rows).flat_map(|row| (0..sizes.groups).map(move |group| (row, group)));
        let zeros = zeros.map(|(row, group)| zero(row, group)).collect();
        let scale_dtype = dtype(&scales);
        Whole { codes: words.read()?, scales: scales.read()?, scale_dtype, zeros, order }.rows_of(layer, &sizes)
    }
}

fn missing(layer: &Layer<'_>, suffix: &str) -> CheckpointError {
    CheckpointError::MissingPart { layer: layer.name.to_owned(), suffix: suffix.to_owned() }
}

/// How a layer's rows are divided.
struct Sizes {
    bits: usize,
    /// Columns of a group.
    group: usize,
    /// Groups of a row.
    groups: usize,
}

impl Sizes {
    fn new(layer: &Layer<'_>, bits: usize, group: Option<usize>) -> Result<Self, CheckpointError> {
        let columns = layer.columns();
        let group = group.unwrap_or(columns);
        if !columns.is_multiple_of(group) {
            return Err(layer.bad(format!("its {columns} inputs are not a multiple of the group size, {group}")));
        }
        let per_word = WORD_BITS / bits;
        if !columns.is_multiple_of(per_word) {
            return Err(layer.bad(format!("its {columns} inputs don't fill words of {per_word} numbers")));
        }
        Ok(Self { bits, group, groups: columns / group })
    }
}

/// A stored matrix in the canonical form.
struct Whole {
    /// `[rows, columns · bits / 8]`.
    codes: Vec<u8>,
    /// `[rows, groups]`, as bytes.
    scales: Vec<u8>,
    scale_dtype: Dtype,
    /// `[rows, groups]`.
    zeros: Vec<u16>,
    order: Option<Vec<u32>>,
}

impl Whole {
    /// The rows that the layer is, their columns in the order of the groups.
    fn rows_of(self, layer: &Layer<'_>, sizes: &Sizes) -> Result<GroupedMatrix, CheckpointError> {
        let columns = layer.columns();
        let row_bytes = columns * sizes.bits / 8;
        let scales = self.scales.chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]])).collect();
        let mut matrix = GroupedMatrix {
            rows: layer.linear.outputs,
            columns,
            bits: sizes.bits as u32,
            group: sizes.group,
            codes: self.codes,
            scales,
            scale_dtype: self.scale_dtype,
            zeros: self.zeros,
            order: self.order,
        };
        let runs = layer.runs();
        if let Some(run) = runs.iter().find(|run| run.end > layer.rows()) {
            return Err(layer.bad(format!("it has {} rows, and not {}..{}", layer.rows(), run.start, run.end)));
        }
        if layer.linear.rows.is_some() {
            matrix.codes = runs
                .iter()
                .flat_map(|run| &matrix.codes[run.start * row_bytes..run.end * row_bytes])
                .copied()
                .collect();
            let groups = |values: &[u16]| -> Vec<u16> {
                runs.iter().flat_map(|run| &values[run.start * sizes.groups..run.end * sizes.groups]).copied().collect()
            };
            matrix.scales = groups(&matrix.scales);
            matrix.zeros = groups(&matrix.zeros);
        }
        if let Some(order) = &matrix.order {
            matrix.codes.par_chunks_exact_mut(row_bytes).for_each_init(
                || vec![0; row_bytes],
                |row, codes| {
                    row.copy_from_slice(codes);
                    reorder(row, order, sizes.bits, codes);
                },
            );
        }
        Ok(matrix)
    }
}

/// Fills `codes` with the numbers of `row` in the given order.
fn reorder(row: &[u8], order: &[u32], bits: usize, codes: &mut [u8]) {
    let number = |column: &u32| {
        let column = *column as usize;
        if bits == 8 { row[column] } else { row[column / 2] >> (column % 2 * 4) & 15 }
    };
    if bits == 8 {
        codes.iter_mut().zip(order).for_each(|(code, column)| *code = number(column));
    } else {
        codes
            .iter_mut()
            .zip(order.chunks_exact(2))
            .for_each(|(code, pair)| *code = number(&pair[0]) | number(&pair[1]) << 4);
    }
}

/// The columns sorted by the group that `indices` says they are in, each group's in ascending order; `None` if they are in
/// that order from the start.
fn order(layer: &Layer<'_>, sizes: &Sizes, indices: &Tensor) -> Result<Option<Vec<u32>>, CheckpointError> {
    let bytes = indices.read()?;
    let mut members = vec![Vec::new(); sizes.groups];
    for (column, word) in bytes.chunks_exact(WORD_BYTES).enumerate() {
        let group = i32::from_le_bytes([word[0], word[1], word[2], word[3]]);
        let Some(members) = usize::try_from(group).ok().and_then(|group| members.get_mut(group)) else {
            let reason = format!("{} puts input {column} into group {group} of {}", indices.name, sizes.groups);
            return Err(layer.bad(reason));
        };
        members.push(column as u32);
    }
    if let Some(group) = members.iter().position(|members| members.len() != sizes.group) {
        let (found, expected) = (members[group].len(), sizes.group);
        return Err(layer.bad(format!("{} puts {found} inputs into group {group}, and not {expected}", indices.name)));
    }
    let order = members.concat();
    Ok(if order.is_sorted() { None } else { Some(order) })
}

fn dtype(scales: &Tensor) -> Dtype {
    if scales.dtype == StoredDtype::BF16 { Dtype::Bf16 } else { Dtype::F16 }
}

fn word_at(bytes: &[u8], index: usize) -> u32 {
    let at = index * WORD_BYTES;
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// The word of a line of AWQ's that has a number of output `row`, and how far up in it.
fn awq_place(row: usize) -> (usize, usize) {
    let number = AWQ_ORDER.iter().position(|output| *output == row % AWQ_PER_WORD).unwrap_or(0);
    (row / AWQ_PER_WORD, 4 * number)
}

/// Zeros `[rows, groups]` from words `[groups, rows · bits / 32]`, each of which is `corrected`.
fn transposed_zeros(words: &[u8], groups: usize, rows: usize, corrected: impl Fn(u32) -> u32, bits: usize) -> Vec<u16> {
    let per_word = WORD_BITS / bits;
    let line = rows.div_ceil(per_word);
    let zero = |row: usize, group: usize| {
        let word = corrected(word_at(words, group * line + row / per_word));
        (word >> (row % per_word * bits) & ((1 << bits) - 1)) as u16
    };
    (0..rows).flat_map(|row| (0..groups).map(move |group| (row, group))).map(|(row, group)| zero(row, group)).collect()
}

/// Values of `N` bytes each, `[height, width]`, with rows for columns.
fn transposed<const N: usize>(bytes: &[u8], height: usize, width: usize) -> Vec<u8> {
    let mut turned = vec![0; bytes.len()];
    if turned.is_empty() {
        return turned;
    }
    // Some rows of output at a time, so that what is read of each line is more than one value.
    turned.par_chunks_mut(ROWS_AT_A_TIME * height * N).enumerate().for_each(|(part, turned)| {
        let first = part * ROWS_AT_A_TIME;
        for (line, values) in bytes.chunks_exact(width * N).enumerate() {
            let values = values[first * N..].chunks_exact(N);
            for (row, value) in turned.chunks_exact_mut(height * N).zip(values) {
                row[line * N..][..N].copy_from_slice(value);
            }
        }
    });
    turned
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_transposed() {
        for (height, width) in [(1, 1), (3, 5), (2, 300), (300, 2), (0, 4)] {
            let values: Vec<u16> = (0..height * width).map(|index| index as u16 * 7).collect();
            let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            let turned = transposed::<2>(&bytes, height, width);
            let expected = (0..width).flat_map(|x| (0..height).map(move |y| (y, x)));
            let expected: Vec<u8> = expected.flat_map(|(y, x)| values[y * width + x].to_le_bytes()).collect();
            assert_eq!(turned, expected, "{height} × {width}");
        }
    }

    #[test]
    fn numbers_are_put_into_order() {
        let mut codes = [0; 2];
        reorder(&[0x10, 0x32], &[3, 0, 2, 1], 4, &mut codes);
        assert_eq!(codes, [0x03, 0x12]);
        let mut codes = [0; 3];
        reorder(&[10, 11, 12], &[2, 0, 1], 8, &mut codes);
        assert_eq!(codes, [12, 10, 11]);
    }

    #[test]
    fn zeros_are_counted_up_by_words() {
        // Zeros 0, 5 and 15, less one each in one subtraction.
        let word = 0x0000_0f50u32.wrapping_sub(0x1111_1111);
        let one = u32::MAX / 15;
        let zeros = transposed_zeros(&word.to_le_bytes(), 1, 3, |word| word.wrapping_add(one), 4);
        assert_eq!(zeros, [0, 5, 15]);
        let word = 0x00ff_0180u32.wrapping_sub(0x0101_0101);
        let zeros = transposed_zeros(&word.to_le_bytes(), 1, 3, |word| word.wrapping_add(u32::MAX / 255), 8);
        assert_eq!(zeros, [128, 1, 255]);
    }
}
