//! What is in front of a GGUF file's tensor bytes: the metadata, and where each tensor is.
//!
//! Layout: the magic `GGUF`, the version, the numbers of tensors and of metadata entries, the entries, the tensors'
//! descriptions, padding, the tensors' bytes; all little-endian (`docs/gguf.md` of the ggml project). Nothing of it is
//! trusted: every length is checked against what is left of the file before anything is allocated for it, counts only
//! bound loops, and each tensor must lie in the file and apart from the others.

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    io::{self, BufReader, Read},
    path::Path,
};

use super::{
    GgufError,
    kinds::Kind,
    metadata::{Metadata, Texts, Value},
};

const MAGIC: [u8; 4] = *b"GGUF";
/// What files are aligned to that don't say.
const DEFAULT_ALIGNMENT: u64 = 32;
/// The headers of the largest vocabularies take some 20 MB.
const MAX_HEADER_BYTES: u64 = 256 << 20;
/// Far above the largest models in one tensor an expert; keeps a hostile header from filling the memory with entries.
const MAX_TENSORS: u64 = 1 << 17;
/// Far above what any file has.
const MAX_ENTRIES: u64 = 1 << 16;
/// Longer than any name of a tensor or an entry.
const MAX_NAME_BYTES: u64 = 1024;
/// GGML's own limit.
const MAX_DIMENSIONS: u32 = 4;

/// A file's header.
#[derive(Debug)]
pub(super) struct Header {
    pub(super) metadata: Metadata,
    pub(super) tensors: Vec<TensorInfo>,
}

/// Where a tensor is, and how it is stored.
#[derive(Debug, Clone)]
pub(super) struct TensorInfo {
    pub(super) name: String,
    /// The outermost dimension first, as everywhere but in GGUF.
    pub(super) shape: Vec<usize>,
    pub(super) kind: Kind,
    /// From the file's start.
    pub(super) start: u64,
}

impl Header {
    /// Reads the header of an open file.
    pub(super) fn read(path: &Path, file: &File) -> Result<Self, GgufError> {
        let length = file.metadata().map_err(|source| GgufError::Io { path: path.to_owned(), source })?.len();
        let mut cursor = Cursor { path, reader: BufReader::with_capacity(1 << 16, file), at: 0, length };
        let tensors = cursor.begin()?;
        let entries = cursor.count("metadata entries", MAX_ENTRIES)?;
        let mut metadata = HashMap::new();
        for _ in 0..entries {
            let key = cursor.name()?;
            let kind = cursor.u32()?;
            let value = cursor.value(kind)?;
            if metadata.insert(key.clone(), value).is_some() {
                return Err(cursor.malformed(format!("metadata entry {key:?} is there twice")));
            }
        }
        let alignment = match metadata.get("general.alignment") {
            None => DEFAULT_ALIGNMENT,
            Some(Value::Integer(bytes)) if (8..=65_536).contains(bytes) && bytes.count_ones() == 1 => *bytes as u64,
            Some(_) => {
                return Err(cursor.malformed("general.alignment must be a power of two from 8 to 65536".to_owned()));
            }
        };
        let tensors = (0..tensors).map(|_| cursor.tensor(alignment)).collect::<Result<Vec<_>, _>>()?;
        let data_start = cursor.at.next_multiple_of(alignment);
        let tensors = placed(path, tensors, data_start, length)?;
        Ok(Self { metadata: Metadata::new(path, metadata), tensors })
    }
}

/// Checks that the tensors lie in the file and apart, and makes their offsets count from the file's start.
fn placed(
    path: &Path,
    mut tensors: Vec<TensorInfo>,
    data_start: u64,
    length: u64,
) -> Result<Vec<TensorInfo>, GgufError> {
    let malformed = |reason: String| GgufError::Malformed { path: path.to_owned(), reason };
    let mut names = HashSet::new();
    // Start, end and index.
    let mut places = Vec::with_capacity(tensors.len());
    for (index, tensor) in tensors.iter_mut().enumerate() {
        if !names.insert(tensor.name.clone()) {
            return Err(malformed(format!("tensor {:?} is there twice", tensor.name)));
        }
        let beyond = || malformed(format!("tensor {:?} lies beyond what a file can hold", tensor.name));
        let start = tensor.start.checked_add(data_start).ok_or_else(beyond)?;
        let end = match bytes(tensor) {
            Ok(Some(bytes)) => start.checked_add(bytes).ok_or_else(beyond)?,
            // Of a type whose size isn't known only the start can be checked.
            Ok(None) => start,
            Err(reason) => return Err(malformed(format!("tensor {:?}, {:?}: {reason}", tensor.name, tensor.shape))),
        };
        if end > length {
            return Err(GgufError::Truncated { path: path.to_owned(), found: length, expected: end });
        }
        tensor.start = start;
        places.push((start, end, index));
    }
    places.sort_unstable();
    if let Some(pair) = places.windows(2).find(|pair| pair[0].1 > pair[1].0) {
        let [one, other] = [pair[0].2, pair[1].2].map(|index| &tensors[index].name);
        return Err(malformed(format!("tensors {one:?} and {other:?} overlap")));
    }
    Ok(tensors)
}

/// Bytes of a tensor; `None` where its type's size isn't known.
fn bytes(tensor: &TensorInfo) -> Result<Option<u64>, String> {
    const TOO_LARGE: &str = "its size overflows";
    let (columns, outer) = tensor.shape.split_last().ok_or("it has no dimensions")?;
    let rows = outer.iter().try_fold(1usize, |rows, size| rows.checked_mul(*size)).ok_or(TOO_LARGE)?;
    if let Kind::Other(_) = tensor.kind {
        return Ok(None);
    }
    let row = tensor.kind.row_bytes(*columns);
    let row = row.ok_or_else(|| format!("rows of {columns} numbers can't be stored as {}", tensor.kind.name()))?;
    let bytes = row.checked_mul(rows).ok_or(TOO_LARGE)?;
    Ok(Some(bytes as u64))
}

/// A place in the header.
struct Cursor<'a> {
    path: &'a Path,
    reader: BufReader<&'a File>,
    /// Bytes read.
    at: u64,
    /// Bytes of the file.
    length: u64,
}

impl Cursor<'_> {
    /// Reads what all files begin with; the number of tensors.
    fn begin(&mut self) -> Result<u64, GgufError> {
        let not = |reason: String| GgufError::NotGguf { path: self.path.to_owned(), reason };
        if self.length < 4 {
            return Err(not("it is too short".to_owned()));
        }
        let magic: [u8; 4] = self.array()?;
        let not = |reason: String| GgufError::NotGguf { path: self.path.to_owned(), reason };
        if magic != MAGIC {
            return Err(not("it begins with other bytes than a GGUF file".to_owned()));
        }
        let version = self.u32()?;
        let not = |reason: String| GgufError::NotGguf { path: self.path.to_owned(), reason };
        match version {
            2 | 3 => self.count("tensors", MAX_TENSORS),
            1 => Err(not("version 1 is long out of use; convert the model again".to_owned())),
            swapped if swapped.swap_bytes() <= 3 => {
                Err(not("its numbers are big-endian; convert the model for little-endian machines".to_owned()))
            }
            other => Err(not(format!("its version is {other}, and 2 and 3 are known"))),
        }
    }

    fn malformed(&self, reason: String) -> GgufError {
        GgufError::Malformed { path: self.path.to_owned(), reason }
    }

    /// Fails unless so many bytes are left, and allowed.
    fn expect(&self, bytes: u64) -> Result<(), GgufError> {
        let end = self.at.saturating_add(bytes);
        if end > self.length {
            return Err(GgufError::Truncated { path: self.path.to_owned(), found: self.length, expected: end });
        }
        if end > MAX_HEADER_BYTES {
            return Err(self.malformed(format!("its header has more than {MAX_HEADER_BYTES} bytes")));
        }
        Ok(())
    }

    fn fill(&mut self, buffer: &mut [u8]) -> Result<(), GgufError> {
        self.expect(buffer.len() as u64)?;
        let read = self.reader.read_exact(buffer);
        read.map_err(|source| match source.kind() {
            // It has got shorter since it was opened.
            io::ErrorKind::UnexpectedEof => {
                GgufError::Truncated { path: self.path.to_owned(), found: self.at, expected: self.length }
            }
            _ => GgufError::Io { path: self.path.to_owned(), source },
        })?;
        self.at += buffer.len() as u64;
        Ok(())
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], GgufError> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn u32(&mut self) -> Result<u32, GgufError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, GgufError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn count(&mut self, what: &str, limit: u64) -> Result<u64, GgufError> {
        let count = self.u64()?;
        if count > limit {
            return Err(self.malformed(format!("it claims {count} {what}, and {limit} are allowed")));
        }
        Ok(count)
    }

    /// The bytes of a text.
    fn bytes(&mut self) -> Result<Vec<u8>, GgufError> {
        let length = self.u64()?;
        self.expect(length)?;
        let mut bytes = vec![0; length as usize];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn text(&mut self) -> Result<String, GgufError> {
        let at = self.at;
        String::from_utf8(self.bytes()?).map_err(|_| self.malformed(format!("the text at byte {at} is not UTF-8")))
    }

    fn name(&mut self) -> Result<String, GgufError> {
        let name = self.text()?;
        if name.len() as u64 > MAX_NAME_BYTES {
            return Err(self.malformed(format!("a name has {} bytes, and {MAX_NAME_BYTES} are allowed", name.len())));
        }
        Ok(name)
    }

    fn value(&mut self, kind: u32) -> Result<Value, GgufError> {
        const TEXT: u32 = 8;
        const ARRAY: u32 = 9;
        match kind {
            TEXT => Ok(Value::Text(self.text()?)),
            ARRAY => {
                let kind = self.u32()?;
                let count = self.u64()?;
                if kind == TEXT {
                    return self.texts(count).map(Value::Texts);
                }
                let scalar = self.scalar(kind)?;
                let bytes = count.saturating_mul(scalar.bytes as u64);
                self.expect(bytes)?;
                let mut bytes = vec![0; bytes as usize];
                self.fill(&mut bytes)?;
                let values = bytes.chunks_exact(scalar.bytes);
                Ok(match scalar.class {
                    Class::Bool => Value::Bools(values.map(|value| value[0] != 0).collect()),
                    // Arrays of numbers above 2^63 mean nothing that is read here.
                    Class::Signed | Class::Unsigned => {
                        Value::Integers(values.map(|value| scalar.integer(value) as i64).collect())
                    }
                    Class::Float => Value::Floats(values.map(|value| scalar.float(value)).collect()),
                })
            }
            _ => {
                let scalar = self.scalar(kind)?;
                let mut buffer = [0; 8];
                let bytes = &mut buffer[..scalar.bytes];
                self.fill(bytes)?;
                Ok(match scalar.class {
                    Class::Bool => Value::Bool(bytes[0] != 0),
                    Class::Signed | Class::Unsigned => Value::Integer(scalar.integer(bytes)),
                    Class::Float => Value::Float(scalar.float(bytes)),
                })
            }
        }
    }

    fn texts(&mut self, count: u64) -> Result<Texts, GgufError> {
        // Each has its length in front.
        self.expect(count.saturating_mul(8))?;
        let mut texts = Texts::default();
        for _ in 0..count {
            texts.push(&self.bytes()?);
        }
        Ok(texts)
    }

    fn scalar(&self, kind: u32) -> Result<Scalar, GgufError> {
        let (class, bytes) = match kind {
            0 => (Class::Unsigned, 1),
            1 => (Class::Signed, 1),
            2 => (Class::Unsigned, 2),
            3 => (Class::Signed, 2),
            4 => (Class::Unsigned, 4),
            5 => (Class::Signed, 4),
            6 => (Class::Float, 4),
            7 => (Class::Bool, 1),
            10 => (Class::Unsigned, 8),
            11 => (Class::Signed, 8),
            12 => (Class::Float, 8),
            9 => return Err(self.malformed("it has an array of arrays, which no model needs".to_owned())),
            _ => return Err(self.malformed(format!("it has a metadata value of the unknown type {kind}"))),
        };
        Ok(Scalar { class, bytes })
    }

    fn tensor(&mut self, alignment: u64) -> Result<TensorInfo, GgufError> {
        let name = self.name()?;
        let dimensions = self.u32()?;
        if !(1..=MAX_DIMENSIONS).contains(&dimensions) {
            return Err(self.malformed(format!("tensor {name:?} has {dimensions} dimensions")));
        }
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            let size = self.u64()?;
            match usize::try_from(size) {
                Ok(size) if size > 0 => shape.push(size),
                _ => return Err(self.malformed(format!("tensor {name:?} has a dimension of {size}"))),
            }
        }
        shape.reverse();
        let kind = Kind::of(self.u32()?);
        let start = self.u64()?;
        if !start.is_multiple_of(alignment) {
            return Err(self.malformed(format!("tensor {name:?} begins at {start}, not at a multiple of {alignment}")));
        }
        Ok(TensorInfo { name, shape, kind, start })
    }
}

/// How a number is stored.
#[derive(Clone, Copy)]
struct Scalar {
    class: Class,
    bytes: usize,
}

#[derive(Clone, Copy)]
enum Class {
    Bool,
    Signed,
    Unsigned,
    Float,
}

impl Scalar {
    fn integer(self, bytes: &[u8]) -> i128 {
        let mut wide = [0; 16];
        wide[..bytes.len()].copy_from_slice(bytes);
        let number = i128::from_le_bytes(wide);
        match self.class {
            // Moves the sign to where that of an i128 is, and back.
            Class::Signed => number << (128 - 8 * bytes.len()) >> (128 - 8 * bytes.len()),
            _ => number,
        }
    }

    fn float(self, bytes: &[u8]) -> f64 {
        match bytes {
            [a, b, c, d] => {
                let number = f32::from_le_bytes([*a, *b, *c, *d]);
                // The shortest decimal that means this f32, as an f64; see `Value::Float`.
                number.to_string().parse().unwrap_or(f64::from(number))
            }
            _ => {
                let mut wide = [0; 8];
                wide.copy_from_slice(bytes);
                f64::from_le_bytes(wide)
            }
        }
    }
}
