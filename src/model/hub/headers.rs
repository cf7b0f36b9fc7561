//! What a safetensors file holds, without having the file: its header, read with two range requests.
//!
//! A file begins with the length of its header, a little-endian `u64`, and the header, JSON. The first request asks for
//! as much as most headers need; only a longer one takes a second.

use std::{collections::BTreeMap, fs::File, io::Read, path::Path};

use reqwest::StatusCode;
use safetensors::tensor::Metadata;

use super::{
    HubError,
    access::{Access, Ask, chunk, first_byte},
    retry::{Failure, Retry},
};

/// What is asked for at first. A header takes some 100 bytes a tensor.
const FIRST_BYTES: u64 = 128 << 10;

/// The format's own limit.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Bytes of the header's length.
const LENGTH_BYTES: u64 = 8;

/// A tensor of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredTensor {
    /// How its values are stored, as safetensors spells it: `BF16`, `U8`, `F8_E4M3`.
    pub dtype: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// What it takes in the file.
    pub bytes: u64,
}

/// The tensors of a file, by name.
pub(super) type Header = BTreeMap<String, StoredTensor>;

/// Reads the JSON of a header. `file_bytes` is the size of its file, where that is known.
pub(super) fn parse(json: &[u8], file_bytes: Option<u64>) -> Result<Header, String> {
    // The library's checks run here: tensors without gaps and overlaps, each as long as shape and dtype say.
    let metadata: Metadata = serde_json::from_slice(json).map_err(|error| error.to_string())?;
    let expected = LENGTH_BYTES + json.len() as u64 + metadata.data_len() as u64;
    if let Some(found) = file_bytes.filter(|found| *found != expected) {
        return Err(format!("it has {found} bytes, and its header speaks of {expected}"));
    }
    let tensors = metadata.tensors().into_iter().map(|(name, info)| {
        let bytes = (info.data_offsets.1 - info.data_offsets.0) as u64;
        (name, StoredTensor { dtype: format!("{:?}", info.dtype), shape: info.shape.clone(), bytes })
    });
    Ok(tensors.collect())
}

/// The JSON of a local file's header.
pub(super) fn local(path: &Path) -> std::io::Result<Result<Vec<u8>, String>> {
    let mut file = File::open(path)?;
    let mut prefix = Vec::new();
    file.by_ref().take(LENGTH_BYTES).read_to_end(&mut prefix)?;
    let length = match header_length(&prefix) {
        Ok(length) => length,
        Err(reason) => return Ok(Err(reason)),
    };
    let mut json = Vec::new();
    file.take(length).read_to_end(&mut json)?;
    let short = json.len() as u64 != length;
    Ok(if short { Err(format!("it ends within its header of {length} bytes")) } else { Ok(json) })
}

/// A file on the hub.
pub(super) struct Remote<'a> {
    pub(super) access: &'a Access,
    pub(super) model: &'a str,
    pub(super) file: &'a str,
    pub(super) url: &'a str,
}

impl Remote<'_> {
    /// The JSON of the file's header.
    pub(super) async fn header(&self) -> Result<Vec<u8>, HubError> {
        let wrong =
            |reason: String| HubError::Header { file: self.file.to_owned(), model: self.model.to_owned(), reason };
        let mut bytes = self.read(0, FIRST_BYTES).await?;
        let length = header_length(&bytes).map_err(wrong)?;
        let (have, end) = (bytes.len() as u64, LENGTH_BYTES + length);
        if have == FIRST_BYTES && have < end {
            bytes.extend(self.read(have, end).await?);
        }
        if (bytes.len() as u64) < end {
            return Err(wrong(format!("it ends within its header of {length} bytes")));
        }
        bytes.truncate(end as usize);
        Ok(bytes.split_off(LENGTH_BYTES as usize))
    }

    /// The bytes from `from` up to `to`; fewer where the file ends before.
    async fn read(&self, from: u64, to: u64) -> Result<Vec<u8>, HubError> {
        let ask = Ask { model: self.model, revision: None, url: self.url, from, to: Some(to) };
        let mut retry = Retry::default();
        loop {
            match self.attempt(&ask, to, &mut retry).await? {
                Ok(bytes) => return Ok(bytes),
                Err(failure) => self.access.pause(&ask, &failure, &mut retry).await?,
            }
        }
    }

    async fn attempt(&self, ask: &Ask<'_>, to: u64, retry: &mut Retry) -> Result<Result<Vec<u8>, Failure>, HubError> {
        let mut response = self.access.get(ask, retry).await?;
        if response.status() == StatusCode::RANGE_NOT_SATISFIABLE {
            return Ok(Ok(Vec::new()));
        }
        let Some(first) = first_byte(&response, ask.from) else {
            let reason = "the server sends another part than was asked for".to_owned();
            return Err(HubError::Header { file: self.file.to_owned(), model: self.model.to_owned(), reason });
        };
        // A server that doesn't do ranges sends all; what is in front is dropped, and the rest never read.
        let (mut skip, wanted) = (ask.from - first, (to - ask.from) as usize);
        let mut bytes = Vec::new();
        while bytes.len() < wanted {
            match chunk(&mut response).await {
                Ok(Some(piece)) => {
                    let dropped = skip.min(piece.len() as u64);
                    skip -= dropped;
                    bytes.extend_from_slice(&piece[dropped as usize..]);
                }
                Ok(None) => break,
                Err(failure) => return Ok(Err(failure)),
            }
        }
        bytes.truncate(wanted);
        Ok(Ok(bytes))
    }
}

fn header_length(bytes: &[u8]) -> Result<u64, String> {
    let prefix = bytes.first_chunk().ok_or_else(|| format!("it has {} bytes", bytes.len()))?;
    match u64::from_le_bytes(*prefix) {
        length if length > MAX_HEADER_BYTES => {
            Err(format!("it claims a header of {length} bytes, and {MAX_HEADER_BYTES} are allowed"))
        }
        length => Ok(length),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(json: &str, length: u64) -> Result<Header, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        std::fs::write(&path, [&length.to_le_bytes()[..], json.as_bytes(), &[0; 4]].concat()).unwrap();
        let size = std::fs::metadata(&path).unwrap().len();
        local(&path).unwrap().and_then(|json| parse(&json, Some(size)))
    }

    #[test]
    fn headers_are_read_or_refused() {
        let good = r#"{"a": {"dtype": "BF16", "shape": [2, 1], "data_offsets": [0, 4]}}"#;
        let expected = StoredTensor { dtype: "BF16".to_owned(), shape: vec![2, 1], bytes: 4 };
        assert_eq!(file(good, good.len() as u64), Ok(Header::from([("a".to_owned(), expected)])));
        for (json, length, says) in [
            (good, u64::MAX, "are allowed"),
            (good, 5_000, "ends within"),
            (good, 3, "EOF"),
            (&good.replace('4', "8"), good.len() as u64, ""),
            (&good.replace("[0, 4]", "[2, 6]"), good.len() as u64, ""),
            (&good.replace("[2, 1]", "[18446744073709551615, 18446744073709551615]"), good.len() as u64 + 38, ""),
            ("[]", 2, ""),
        ] {
            let error = file(json, length).unwrap_err();
            assert!(error.contains(says), "{json} {length}: {error}");
        }
    }
}
