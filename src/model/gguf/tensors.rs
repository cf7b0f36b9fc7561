//! Reading tensors of an opened GGUF model, or some rows of them.
//!
//! Names are GGUF's. A name may be followed by a number in brackets: `blk.3.ffn_up_exps.weight[7]` is entry 7 of the
//! first dimension, as GGUF keeps the experts of a block in one tensor.
//!
//! One thing is put right on the way. The converter reorders the rows of the query and key matrices of `llama` files, so
//! that the two numbers that a rotation turns against each other are neighbours. The engine has them half a head apart, as
//! the Hugging Face checkpoints do, so each head's rows are brought back into that order. Rows are runs of bytes in every
//! format, so this costs a copy and no precision.

use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    ops::Range,
    path::{Path, PathBuf},
};

use super::{header::TensorInfo, kinds::Kind};
use crate::model::{
    Dtype,
    checkpoint::{BlockFormat, BlockMatrix, CheckpointError, StoredMatrix, TensorData, read_at},
    hub::StoredTensor,
};

/// The tensors of all parts of a model.
#[derive(Debug)]
pub(super) struct Tensors {
    parts: Vec<(PathBuf, File)>,
    /// The part that a tensor is in, and where it is there.
    places: HashMap<String, (usize, TensorInfo)>,
    interleaved: HashMap<String, Interleaved>,
}

/// Rows in which the two halves of each head alternate: those of the first half are the even ones.
#[derive(Debug, Clone, Copy)]
pub(super) struct Interleaved {
    /// So many rows, from the first.
    pub(super) rows: usize,
    /// Rows of a head.
    pub(super) head_size: usize,
}

/// A tensor, or an entry of its first dimension.
struct Stored<'a> {
    path: &'a Path,
    file: &'a File,
    kind: Kind,
    shape: &'a [usize],
    /// Where it starts in the file.
    start: u64,
    interleaved: Option<Interleaved>,
}

/// Rows of a tensor, as they are stored.
struct Rows {
    kind: Kind,
    count: usize,
    bytes: Vec<u8>,
}

impl Tensors {
    /// Puts the tensors of the parts together. The name of one that two parts have is the error.
    pub(super) fn new(parts: Vec<(PathBuf, File, Vec<TensorInfo>)>) -> Result<Self, String> {
        let mut tensors = Self { parts: Vec::new(), places: HashMap::new(), interleaved: HashMap::new() };
        for (index, (path, file, infos)) in parts.into_iter().enumerate() {
            tensors.parts.push((path, file));
            for info in infos {
                if let Some((_, twice)) = tensors.places.insert(info.name.clone(), (index, info)) {
                    return Err(twice.name);
                }
            }
        }
        Ok(tensors)
    }

    /// Brings the rows of the tensor `name` into the engine's order from now on.
    pub(super) fn interleave(&mut self, name: String, interleaved: Interleaved) {
        self.interleaved.insert(name, interleaved);
    }

    /// Paths of the files.
    pub(super) fn paths(&self) -> impl Iterator<Item = &Path> {
        self.parts.iter().map(|(path, _)| path.as_path())
    }

    /// Names of all tensors.
    pub(super) fn names(&self) -> impl Iterator<Item = &str> {
        self.places.keys().map(String::as_str)
    }

    /// What is stored under each name. A tensor of a type that nothing is known about takes no bytes in it.
    pub(super) fn stored(&self) -> BTreeMap<String, StoredTensor> {
        let stored = self.places.iter().map(|(name, (_, info))| {
            let (columns, rows) = info.shape.split_last().map_or((1, &[][..]), |(columns, rows)| (*columns, rows));
            let bytes = info.kind.row_bytes(columns).unwrap_or(0) as u64 * rows.iter().product::<usize>() as u64;
            (name.clone(), StoredTensor { dtype: info.kind.name().to_uppercase(), shape: info.shape.clone(), bytes })
        });
        stored.collect()
    }

    /// Bytes that a tensor takes in memory if floating point numbers are kept in `dtype`.
    pub(super) fn bytes(&self, name: &str, dtype: Dtype) -> u64 {
        let Some((_, info)) = self.places.get(name) else { return 0 };
        let kind = if let Kind::Floats(_) = info.kind { Kind::Floats(dtype) } else { info.kind };
        let (columns, rows) = info.shape.split_last().map_or((1, &[][..]), |(columns, rows)| (*columns, rows));
        kind.row_bytes(columns).unwrap_or(0) as u64 * rows.iter().product::<usize>() as u64
    }

    /// Whether there is such a tensor.
    pub(super) fn has(&self, name: &str) -> bool {
        self.places.contains_key(name)
    }

    /// A tensor's shape, the outermost dimension first.
    pub(super) fn shape(&self, name: &str) -> Option<&[usize]> {
        self.places.get(name).map(|(_, info)| info.shape.as_slice())
    }

    /// How most of the numbers of matrices are stored.
    pub(super) fn prevailing_kind(&self) -> Option<Kind> {
        let mut numbers: HashMap<Kind, usize> = HashMap::new();
        for (_, info) in self.places.values().filter(|(_, info)| info.shape.len() > 1) {
            let count = info.shape.iter().fold(1usize, |product, size| product.saturating_mul(*size));
            let sum = numbers.entry(info.kind).or_default();
            *sum = sum.saturating_add(count);
        }
        numbers.into_iter().max_by_key(|(kind, count)| (*count, kind.name())).map(|(kind, _)| kind)
    }

    /// Reads a tensor of floating point numbers.
    pub(super) fn read(&self, name: &str, expected: &[usize]) -> Result<TensorData, CheckpointError> {
        self.read_rows(name, expected, std::iter::once(0..expected.first().copied().unwrap_or(1)))
    }

    /// Reads rows of a tensor of floating point numbers.
    pub(super) fn read_rows(
        &self,
        name: &str,
        expected: &[usize],
        rows: impl Iterator<Item = Range<usize>>,
    ) -> Result<TensorData, CheckpointError> {
        let tensor = self.find(name, expected)?;
        let Kind::Floats(dtype) = tensor.kind else {
            return Err(tensor.wrong_kind(name, "this tensor must be f32, bf16 or f16"));
        };
        let rows = tensor.rows(name, rows)?;
        let shape = expected.iter().enumerate().map(|(index, size)| if index == 0 { rows.count } else { *size });
        Ok(TensorData { dtype, shape: shape.collect(), bytes: rows.bytes })
    }

    /// Reads rows of a matrix `[rows, columns]` as it is stored.
    pub(super) fn matrix(
        &self,
        name: &str,
        expected: [usize; 2],
        rows: impl Iterator<Item = Range<usize>>,
    ) -> Result<StoredMatrix, CheckpointError> {
        let tensor = self.find(name, &expected)?;
        let Rows { kind, count, mut bytes } = tensor.rows(name, rows)?;
        let columns = expected[1];
        match kind {
            Kind::Floats(dtype) => Ok(StoredMatrix::Floats(TensorData { dtype, shape: vec![count, columns], bytes })),
            Kind::Blocks(format) => {
                if format == BlockFormat::Mxfp4 {
                    bytes.chunks_exact_mut(format.bytes()).for_each(reorder_mxfp4);
                }
                Ok(StoredMatrix::Blocks(BlockMatrix { format, rows: count, columns, bytes }))
            }
            Kind::Other(_) => Err(tensor.unsupported(name)),
        }
    }

    /// The tensor, if it is there and has the shape.
    fn find(&self, name: &str, expected: &[usize]) -> Result<Stored<'_>, CheckpointError> {
        let (bare, entry) = match name.strip_suffix(']').and_then(|name| name.rsplit_once('[')) {
            Some((bare, number)) => (bare, number.parse::<usize>().ok()),
            None => (name, None),
        };
        let missing = || CheckpointError::MissingTensor {
            name: name.to_owned(),
            searched: self.paths().next().map(Path::to_owned).unwrap_or_default(),
        };
        let (part, info) = self.places.get(bare).ok_or_else(missing)?;
        let (path, file) = &self.parts[*part];
        let mut tensor = Stored {
            path,
            file,
            kind: info.kind,
            shape: &info.shape,
            start: info.start,
            interleaved: self.interleaved.get(bare).copied(),
        };
        if let Some(entry) = entry {
            let (count, shape) = info.shape.split_first().ok_or_else(missing)?;
            if entry >= *count || shape.is_empty() {
                let rows = entry..entry.saturating_add(1);
                return Err(CheckpointError::NoSuchRows {
                    name: bare.to_owned(),
                    path: path.clone(),
                    rows,
                    count: *count,
                });
            }
            let (columns, rows) = shape.split_last().map_or((1, &[][..]), |(columns, rows)| (*columns, rows));
            let row = tensor.kind.row_bytes(columns).ok_or_else(|| tensor.unsupported(name))?;
            tensor.start += (entry * rows.iter().product::<usize>() * row) as u64;
            tensor.shape = shape;
        }
        if tensor.shape != expected {
            return Err(CheckpointError::WrongShape {
                name: name.to_owned(),
                path: path.clone(),
                found: tensor.shape.to_vec(),
                expected: expected.to_vec(),
            });
        }
        Ok(tensor)
    }
}

impl Stored<'_> {
    /// Reads the rows (entries of the first dimension) one behind the other.
    fn rows(&self, name: &str, rows: impl Iterator<Item = Range<usize>>) -> Result<Rows, CheckpointError> {
        let (count, inner) = self.shape.split_first().map_or((1, &[][..]), |(count, inner)| (*count, inner));
        // The header's reader has checked that sizes don't overflow and lie in the file.
        let bytes = match inner.split_last() {
            Some((columns, outer)) => self.kind.row_bytes(*columns).map(|row| row * outer.iter().product::<usize>()),
            // Of a vector each number is a row.
            None => self.kind.row_bytes(1),
        };
        let Some(row_bytes) = bytes else { return Err(self.unsupported(name)) };
        let mut read = Rows { kind: self.kind, count: 0, bytes: Vec::new() };
        for run in rows {
            if run.start > run.end || run.end > count {
                return Err(CheckpointError::NoSuchRows {
                    name: name.to_owned(),
                    path: self.path.to_owned(),
                    rows: run,
                    count,
                });
            }
            let filled = read.bytes.len();
            read.bytes.resize(filled + run.len() * row_bytes, 0);
            self.run(run.clone(), row_bytes, &mut read.bytes[filled..])?;
            read.count += run.len();
        }
        Ok(read)
    }

    /// Fills `buffer` with a run of rows.
    fn run(&self, run: Range<usize>, row_bytes: usize, buffer: &mut [u8]) -> Result<(), CheckpointError> {
        let interleaved = self.interleaved.filter(|interleaved| run.start < interleaved.rows);
        let Some(Interleaved { rows, head_size }) = interleaved else {
            return self.read_at(buffer, run.start * row_bytes);
        };
        // Behind the heads the rows are as they should be.
        let (heads, rest) = buffer.split_at_mut((run.end.min(rows) - run.start) * row_bytes);
        self.read_at(rest, run.start.max(rows) * row_bytes)?;
        let mut head = vec![0; head_size * row_bytes];
        let mut loaded = None;
        for (row, bytes) in (run.start..).zip(heads.chunks_exact_mut(row_bytes)) {
            let (number, place) = (row / head_size, row % head_size);
            if loaded != Some(number) {
                self.read_at(&mut head, number * head_size * row_bytes)?;
                loaded = Some(number);
            }
            let half = head_size / 2;
            let stored = if place < half { 2 * place } else { 2 * (place - half) + 1 };
            bytes.copy_from_slice(&head[stored * row_bytes..][..row_bytes]);
        }
        Ok(())
    }

    /// Fills `buffer` from byte `offset` of the tensor on.
    fn read_at(&self, buffer: &mut [u8], offset: usize) -> Result<(), CheckpointError> {
        read_at(self.file, buffer, self.start + offset as u64)
            .map_err(|source| CheckpointError::Io { path: self.path.to_owned(), source })
    }

    fn unsupported(&self, name: &str) -> CheckpointError {
        self.wrong_kind(
            name,
            "this format can't be computed with; use a file in another quantization (q4_k_m, q8_0, …)",
        )
    }

    fn wrong_kind(&self, name: &str, wanted: &'static str) -> CheckpointError {
        CheckpointError::WrongDtype {
            name: name.to_owned(),
            path: self.path.to_owned(),
            dtype: self.kind.name(),
            wanted,
        }
    }
}

/// From GGML's MXFP4 (the scale, then bytes that hold number `i` and number `i + 16`) to [`BlockFormat::Mxfp4`].
fn reorder_mxfp4(block: &mut [u8]) {
    let Ok(&mut [scale, ref codes @ ..]) = <&mut [u8; 17]>::try_from(&mut *block) else { return };
    let mut pairs = [0; 16];
    for (index, pair) in pairs.iter_mut().enumerate() {
        // The first half of the numbers is in the lower halves of the bytes.
        let (at, shift) = if index < 8 { (2 * index, 0) } else { (2 * index - 16, 4) };
        *pair = (codes[at] >> shift & 15) | (codes[at + 1] >> shift & 15) << 4;
    }
    block[..16].copy_from_slice(&pairs);
    block[16] = scale;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mxfp4_blocks_are_reordered() {
        // Number `i` has code `i % 16`, in GGML's order: bytes of `i` and `i + 16`.
        let mut block: Vec<u8> = [99].into_iter().chain((0..16).map(|i| i | i << 4)).collect();
        reorder_mxfp4(&mut block);
        let expected: Vec<u8> = (0..16u8).map(|pair| ((2 * pair) % 16) | (((2 * pair + 1) % 16) << 4)).collect();
        assert_eq!(block[..16], expected);
        assert_eq!(block[16], 99);
    }
}
