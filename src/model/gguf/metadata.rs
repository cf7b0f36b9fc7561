//! The entries in front of a GGUF file's tensors, by name.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use super::GgufError;

/// A value of the metadata. Integers and floating point numbers of all widths are widened.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    /// A truth value.
    Bool(bool),
    /// An integer of up to 64 bits.
    Integer(i128),
    /// A floating point number: the one with the fewest decimal digits that its stored bits stand for. Who wrote `1e-6`
    /// into an f32 meant that, and Hugging Face's configurations say it.
    Float(f64),
    /// A text.
    Text(String),
    /// An array of truth values.
    Bools(Vec<bool>),
    /// An array of integers.
    Integers(Vec<i64>),
    /// An array of floating point numbers.
    Floats(Vec<f64>),
    /// An array of texts.
    Texts(Texts),
}

/// Many texts, one behind the other in one piece of memory: vocabularies have hundreds of thousands.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Texts {
    /// All of them.
    bytes: Vec<u8>,
    /// Where each ends.
    ends: Vec<u32>,
}

impl Texts {
    /// Appends a text. The header's limit keeps all of them together below 4 GiB.
    pub(super) fn push(&mut self, text: &[u8]) {
        self.bytes.extend_from_slice(text);
        self.ends.push(self.bytes.len() as u32);
    }

    /// How many there are.
    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    /// The texts in their order; `Err` with its number for one that is not UTF-8.
    pub(super) fn iter(&self) -> impl Iterator<Item = Result<&str, usize>> {
        self.ends.iter().enumerate().map(|(index, end)| {
            let start = if index == 0 { 0 } else { self.ends[index - 1] };
            std::str::from_utf8(&self.bytes[start as usize..*end as usize]).map_err(|_| index)
        })
    }
}

/// The metadata of a file.
#[derive(Debug)]
pub(super) struct Metadata {
    path: PathBuf,
    entries: HashMap<String, Value>,
}

impl Metadata {
    /// The entries of the file at `path`.
    pub(super) fn new(path: &Path, entries: HashMap<String, Value>) -> Self {
        Self { path: path.to_owned(), entries }
    }

    /// The file that they are from.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// An entry's value, if there is one.
    pub(super) fn value(&self, key: &str) -> Option<&Value> {
        self.entries.get(key)
    }

    /// An error about an entry.
    pub(super) fn wrong(&self, key: &str, reason: impl Into<String>) -> GgufError {
        GgufError::Metadata { path: self.path.clone(), key: key.to_owned(), reason: reason.into() }
    }

    /// An error about an entry that isn't there.
    pub(super) fn missing(&self, key: &str) -> GgufError {
        self.wrong(key, "the file has no such entry, and it is needed; convert the model again")
    }

    /// A text.
    pub(super) fn text(&self, key: &str) -> Result<Option<&str>, GgufError> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Text(text)) => Ok(Some(text)),
            Some(_) => Err(self.wrong(key, "must be a text")),
        }
    }

    /// A truth value.
    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>, GgufError> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(_) => Err(self.wrong(key, "must be true or false")),
        }
    }

    /// An integer that is not negative. An array that has the same integer for every block counts as that.
    pub(super) fn size(&self, key: &str) -> Result<Option<usize>, GgufError> {
        let number = match self.value(key) {
            None => return Ok(None),
            Some(Value::Integer(number)) => *number,
            Some(Value::Integers(numbers)) => match numbers.split_first() {
                Some((first, rest)) if rest.iter().all(|other| other == first) => i128::from(*first),
                _ => return Err(self.wrong(key, "must be the same for all blocks: no supported model mixes them")),
            },
            Some(_) => return Err(self.wrong(key, "must be an integer")),
        };
        match usize::try_from(number) {
            Ok(size) => Ok(Some(size)),
            Err(_) => Err(self.wrong(key, format!("{number} is no size"))),
        }
    }

    /// A token's id.
    pub(super) fn id(&self, key: &str) -> Result<Option<u32>, GgufError> {
        let Some(id) = self.size(key)? else { return Ok(None) };
        // Converters write the highest number for a token that there isn't.
        match u32::try_from(id) {
            Ok(u32::MAX) => Ok(None),
            Ok(id) => Ok(Some(id)),
            Err(_) => Err(self.wrong(key, format!("{id} is no token id"))),
        }
    }

    /// A number.
    pub(super) fn number(&self, key: &str) -> Result<Option<f64>, GgufError> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Float(number)) => Ok(Some(*number)),
            Some(Value::Integer(number)) => Ok(Some(*number as f64)),
            Some(_) => Err(self.wrong(key, "must be a number")),
        }
    }

    /// An array of texts.
    pub(super) fn texts(&self, key: &str) -> Result<Option<Vec<&str>>, GgufError> {
        let texts = match self.value(key) {
            None => return Ok(None),
            Some(Value::Texts(texts)) => texts,
            Some(_) => return Err(self.wrong(key, "must be an array of texts")),
        };
        let all: Result<Vec<&str>, usize> = texts.iter().collect();
        all.map(Some).map_err(|index| self.wrong(key, format!("entry {index} of {} is not UTF-8", texts.len())))
    }

    /// An array of integers.
    pub(super) fn integers(&self, key: &str) -> Result<Option<&[i64]>, GgufError> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Integers(numbers)) => Ok(Some(numbers)),
            Some(_) => Err(self.wrong(key, "must be an array of integers")),
        }
    }

    /// An array of numbers.
    pub(super) fn floats(&self, key: &str) -> Result<Option<&[f64]>, GgufError> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Floats(numbers)) => Ok(Some(numbers)),
            Some(_) => Err(self.wrong(key, "must be an array of numbers")),
        }
    }
}
