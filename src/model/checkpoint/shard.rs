//! One safetensors file: its header, and reads of single tensors.
//!
//! Layout: the header's length as a little-endian `u64`, the header as JSON, the tensors' bytes. Nothing of it is
//! trusted: lengths and offsets are checked against the file before anything is allocated.

use std::{
    fs::{self, File},
    io,
    ops::Range,
    path::{Path, PathBuf},
};

use safetensors::{
    Dtype as StoredDtype,
    tensor::{Metadata, TensorInfo},
};

use super::{CheckpointError, TensorData};
use crate::model::Dtype;

const LENGTH_BYTES: u64 = 8;
/// The format's own limit.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// An open file and its header.
#[derive(Debug)]
pub(super) struct Shard {
    path: PathBuf,
    file: File,
    header: Metadata,
    /// Where the tensors' bytes begin.
    data_start: u64,
}

impl Shard {
    pub(super) fn open(path: &Path) -> Result<Self, CheckpointError> {
        let io_error = |source| CheckpointError::Io { path: path.to_owned(), source };
        let truncated = |found, expected| CheckpointError::Truncated { path: path.to_owned(), found, expected };
        let bad = |reason: String| CheckpointError::BadHeader { path: path.to_owned(), reason };

        let file = File::open(path).map_err(io_error)?;
        let length = file.metadata().map_err(io_error)?.len();
        if length < LENGTH_BYTES {
            return Err(truncated(length, LENGTH_BYTES));
        }
        let mut prefix = [0; LENGTH_BYTES as usize];
        read_at(&file, &mut prefix, 0).map_err(io_error)?;
        let header_length = u64::from_le_bytes(prefix);
        if header_length > MAX_HEADER_BYTES {
            return Err(bad(format!(
                "it claims a header of {header_length} bytes, and {MAX_HEADER_BYTES} are allowed"
            )));
        }
        let data_start = LENGTH_BYTES + header_length;
        if data_start > length {
            return Err(truncated(length, data_start));
        }
        let mut header = vec![0; header_length as usize];
        read_at(&file, &mut header, LENGTH_BYTES).map_err(io_error)?;
        // The crate's `read_metadata` wants the whole file in memory. Its checks run here too: the tensors follow each
        // other without gaps, and each is as long as its shape and dtype say.
        let header: Metadata = serde_json::from_slice(&header).map_err(|error| bad(error.to_string()))?;
        let expected = data_start.saturating_add(header.data_len() as u64);
        if expected > length {
            return Err(truncated(length, expected));
        }
        if expected < length {
            return Err(bad(format!("{} bytes follow the last tensor", length - expected)));
        }
        Ok(Self { path: path.to_owned(), file, header, data_start })
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.header.info(name).is_some()
    }

    /// The tensors' names.
    pub(super) fn names(&self) -> Vec<String> {
        self.header.offset_keys()
    }

    pub(super) fn read(&self, name: &str, expected: &[usize]) -> Result<TensorData, CheckpointError> {
        self.read_rows(name, expected, std::iter::once(0..expected.first().copied().unwrap_or(1)))
    }

    pub(super) fn read_rows(
        &self,
        name: &str,
        expected: &[usize],
        rows: impl Iterator<Item = Range<usize>>,
    ) -> Result<TensorData, CheckpointError> {
        let info = self.find(name, expected)?;
        let dtype = match info.dtype {
            StoredDtype::F32 => Dtype::F32,
            StoredDtype::BF16 => Dtype::Bf16,
            StoredDtype::F16 => Dtype::F16,
            other => return Err(self.wrong_dtype(name, other, "weights must be F32, BF16 or F16")),
        };
        let mut total = 0;
        let bytes = self.rows_of(name, info, rows.inspect(|rows| total += rows.len()))?;
        let shape = expected.iter().enumerate().map(|(index, size)| if index == 0 { total } else { *size }).collect();
        Ok(TensorData { dtype, shape, bytes })
    }

    /// The bytes of some entries of a tensor's first dimension, whatever it is made of.
    pub(super) fn rows_of(
        &self,
        name: &str,
        info: &TensorInfo,
        rows: impl Iterator<Item = Range<usize>>,
    ) -> Result<Vec<u8>, CheckpointError> {
        // `open` has checked that the range lies in the file and is as long as shape and dtype say.
        let (start, end) = info.data_offsets;
        let count = info.shape.first().copied().unwrap_or(1);
        let row_bytes = (end - start).checked_div(count).unwrap_or(0);
        let mut bytes = Vec::new();
        for rows in rows {
            if rows.start > rows.end || rows.end > count {
                return Err(CheckpointError::NoSuchRows {
                    name: name.to_owned(),
                    path: self.path.clone(),
                    rows,
                    count,
                });
            }
            let (at, length) = (rows.start * row_bytes, rows.len() * row_bytes);
            let filled = bytes.len();
            bytes.resize(filled + length, 0);
            self.read_at(&mut bytes[filled..], start + at)?;
        }
        Ok(bytes)
    }

    /// What a tensor is made of, and its shape.
    pub(super) fn stored(&self, name: &str) -> Result<(StoredDtype, Vec<usize>), CheckpointError> {
        let info = self.header.info(name).ok_or_else(|| self.missing(name))?;
        Ok((info.dtype, info.shape.clone()))
    }

    pub(super) fn read_bytes(&self, name: &str, expected: &[usize]) -> Result<Vec<u8>, CheckpointError> {
        let info = self.find(name, expected)?;
        if info.dtype != StoredDtype::U8 {
            return Err(self.wrong_dtype(name, info.dtype, "packed weights must be U8"));
        }
        let (start, end) = info.data_offsets;
        let mut bytes = vec![0; end - start];
        self.read_at(&mut bytes, start)?;
        Ok(bytes)
    }

    /// The tensor, if it is there and has the shape.
    pub(super) fn find(&self, name: &str, expected: &[usize]) -> Result<&TensorInfo, CheckpointError> {
        let info = self.header.info(name).ok_or_else(|| self.missing(name))?;
        if info.shape != expected {
            return Err(CheckpointError::WrongShape {
                name: name.to_owned(),
                path: self.path.clone(),
                found: info.shape.clone(),
                expected: expected.to_vec(),
            });
        }
        Ok(info)
    }

    fn missing(&self, name: &str) -> CheckpointError {
        CheckpointError::MissingTensor { name: name.to_owned(), searched: self.path.clone() }
    }

    pub(super) fn wrong_dtype(&self, name: &str, dtype: StoredDtype, wanted: &'static str) -> CheckpointError {
        let dtype = format!("{dtype:?}");
        CheckpointError::WrongDtype { name: name.to_owned(), path: self.path.clone(), dtype, wanted }
    }

    /// Fills `buffer` from `offset` of the tensors' bytes on.
    fn read_at(&self, buffer: &mut [u8], offset: usize) -> Result<(), CheckpointError> {
        read_at(&self.file, buffer, self.data_start + offset as u64)
            .map_err(|source| CheckpointError::Io { path: self.path.clone(), source })
    }
}

/// Number and count of a shard that is named by them: `model-00002-of-00005.safetensors` is 2 of 5.
pub(crate) fn shard_number(file: &str) -> Option<(u32, u32)> {
    let (number, count) = file.strip_prefix("model-")?.strip_suffix(".safetensors")?.split_once("-of-")?;
    let parse = |digits: &str| digits.bytes().all(|digit| digit.is_ascii_digit()).then(|| digits.parse().ok())?;
    let (number, count) = (parse(number)?, parse(count)?);
    (1..=count).contains(&number).then_some((number, count))
}

/// The files of a folder that are named by number and count, in their order.
pub(super) fn names_by_number(dir: &Path) -> Result<Vec<String>, CheckpointError> {
    let entries = fs::read_dir(dir).map_err(|source| CheckpointError::Io { path: dir.to_owned(), source })?;
    let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
    let mut names: Vec<String> = names.filter(|name| shard_number(name).is_some()).collect();
    names.sort();
    Ok(names)
}

/// Fills `buffer` from byte `offset` of the file on, wherever another read has left off.
#[cfg(unix)]
pub(crate) fn read_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, buffer, offset)
}

/// Fills `buffer` from byte `offset` of the file on, wherever another read has left off.
#[cfg(windows)]
pub(crate) fn read_at(file: &File, mut buffer: &mut [u8], mut offset: u64) -> io::Result<()> {
    while !buffer.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, buffer, offset)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            read => {
                buffer = &mut buffer[read..];
                offset += read as u64;
            }
        }
    }
    Ok(())
}
