//! Which model this is, to the last bit: two nodes may be hops of one route only if their fingerprints are equal.
//!
//! A [`Fingerprint`] is BLAKE3 over the canonical configuration that the arithmetic depends on and the name and SHA-256
//! of every weight file of the checkpoint. So two fingerprints **differ** where
//!
//! - any weight differs, or the same weights are cut into other files, or the files have other names or dtypes;
//! - the configuration differs in anything that the arithmetic depends on (what that is, the caller decides).
//!
//! They are **equal** for a download and a copy of it, whatever the directory, the hub's revision, the tokenizer, the
//! chat template and the generation defaults, and whatever dtype or quantization a node loads the weights in.
//!
//! On the hub, the SHA-256 of every file is in the file list, so a node knows the fingerprint without having all
//! shards. Local files are hashed once, and [`FileHashes`] remembers.
//!
//! Files in the hub's cache are symbolic links to blobs that are named by their SHA-256. The name is not taken for the
//! hash: it says what the bytes should be, and a download that was cut short, or a disk that lost a block, would be
//! announced as the right model and compute something else.

use std::{
    fmt,
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
    str::FromStr,
};

use sha2::{Digest, Sha256};

mod hashes;

pub use hashes::FileHashes;

/// In front of what is hashed: another encoding is another version, so that the two can't be mistaken.
const VERSION: &[u8] = b"helion model fingerprint v1\0";

/// Bytes read from a file at a time: large enough that the calls cost nothing beside the hashing.
const READ_BYTES: usize = 1 << 20;

/// The identity of a model's weights and arithmetic. Written as 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Fingerprint(pub [u8; 32]);

/// Why a file's hash could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum FingerprintError {
    /// The file can't be read.
    #[error("cannot read {} to take its fingerprint: {source}", .path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Somebody wrote to the file in the meantime.
    #[error("{} changed while its fingerprint was taken: wait until it is complete", .path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// The path has no file name that is text.
    #[error("{} has no file name that is UTF-8", .path.display())]
    Name {
        /// The path.
        path: PathBuf,
    },
}

impl Fingerprint {
    /// The fingerprint of a model with this canonical configuration and these weight files: names and SHA-256, in any
    /// order.
    pub fn of(canonical_config: &[u8], weight_files_sha256: &[(String, [u8; 32])]) -> Self {
        let mut files: Vec<_> = weight_files_sha256.iter().collect();
        files.sort();
        let mut hasher = blake3::Hasher::new();
        let mut field = |bytes: &[u8]| {
            // Every field is preceded by its length, so that no two lists of fields are spelled the same.
            hasher.update(&(bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        };
        field(VERSION);
        field(canonical_config);
        for (name, sha256) in files {
            field(name.as_bytes());
            field(sha256);
        }
        Self(*hasher.finalize().as_bytes())
    }

    /// The fingerprint of a model whose weight files are `files`. Their hashes are taken from the state file `cache`
    /// where they are known, and kept there where not. `progress` is told the bytes that were read since the last call.
    ///
    /// # Errors
    /// [`FingerprintError`]. A state file that can't be used is no error: hashing takes its time again, that is all.
    pub fn of_files(
        canonical_config: &[u8],
        files: &[PathBuf],
        cache: &Path,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Self, FingerprintError> {
        let hashes = FileHashes::at(cache);
        let named = files.iter().map(|path| {
            let name = path.file_name().and_then(|name| name.to_str());
            let name = name.ok_or_else(|| FingerprintError::Name { path: path.clone() })?;
            Ok((name.to_owned(), hashes.sha256(path, progress)?))
        });
        Ok(Self::of(canonical_config, &named.collect::<Result<Vec<_>, _>>()?))
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex(&self.0))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Fingerprint({self})")
    }
}

/// The text is no [`Fingerprint`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no fingerprint: that is 64 hexadecimal digits")]
pub struct InvalidFingerprint(String);

impl FromStr for Fingerprint {
    type Err = InvalidFingerprint;

    fn from_str(text: &str) -> Result<Self, InvalidFingerprint> {
        from_hex(text).map(Self).ok_or_else(|| InvalidFingerprint(text.to_owned()))
    }
}

impl serde::Serialize for Fingerprint {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> serde::Deserialize<'de> for Fingerprint {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// The SHA-256 of a file's bytes. `progress` is told the bytes that were read since the last call.
///
/// # Errors
/// [`FingerprintError::Unreadable`].
pub fn sha256_of_file(path: &Path, progress: &mut dyn FnMut(u64)) -> Result<[u8; 32], FingerprintError> {
    let unreadable = |source| FingerprintError::Unreadable { path: path.to_owned(), source };
    let mut file = File::open(path).map_err(unreadable)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; READ_BYTES];
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return Ok(hasher.finalize().into()),
            Ok(read) => {
                hasher.update(&buffer[..read]);
                progress(read as u64);
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(source) => return Err(unreadable(source)),
        }
    }
}

/// Lower-case hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// 32 bytes from 64 hexadecimal digits of either case.
pub(crate) fn from_hex(text: &str) -> Option<[u8; 32]> {
    if text.len() != 64 || !text.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    let mut bytes = [0; 32];
    for (index, byte) in bytes.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * index..2 * index + 2], 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(names: &[(&str, u8)]) -> Vec<(String, [u8; 32])> {
        names.iter().map(|(name, byte)| ((*name).to_owned(), [*byte; 32])).collect()
    }

    #[test]
    fn what_counts_makes_a_difference() {
        let fingerprint = Fingerprint::of(b"config", &files(&[("a", 1), ("b", 2)]));
        assert_eq!(fingerprint, Fingerprint::of(b"config", &files(&[("b", 2), ("a", 1)])), "order doesn't count");
        for other in [
            Fingerprint::of(b"Config", &files(&[("a", 1), ("b", 2)])),
            Fingerprint::of(b"config", &files(&[("a", 1), ("b", 3)])),
            Fingerprint::of(b"config", &files(&[("a", 2), ("b", 1)])),
            Fingerprint::of(b"config", &files(&[("a", 1), ("c", 2)])),
            Fingerprint::of(b"config", &files(&[("a", 1)])),
            Fingerprint::of(b"configa", &files(&[("", 1), ("b", 2)])),
        ] {
            assert_ne!(fingerprint, other);
        }
    }

    /// Nodes of different versions must agree: this may only change together with [`VERSION`].
    #[test]
    fn the_encoding_is_fixed() {
        let mut bytes = Vec::new();
        for field in [VERSION, b"{}", b"model.safetensors", &[7; 32]] {
            bytes.extend((field.len() as u64).to_le_bytes());
            bytes.extend(field);
        }
        let expected = Fingerprint(*blake3::hash(&bytes).as_bytes());
        assert_eq!(Fingerprint::of(b"{}", &files(&[("model.safetensors", 7)])), expected);
        assert_eq!(expected.to_string(), "d02f62f615844c5bd567bb29e276a0c3874804bf12f4572d935b817fbf1850cc");
    }

    #[test]
    fn text_and_back() {
        let fingerprint = Fingerprint::of(b"", &[]);
        assert_eq!(fingerprint.to_string().parse(), Ok(fingerprint));
        assert_eq!(fingerprint.to_string().to_uppercase().parse(), Ok(fingerprint));
        let json = serde_json::to_string(&fingerprint).unwrap();
        assert_eq!(json, format!("\"{fingerprint}\""));
        assert_eq!(serde_json::from_str::<Fingerprint>(&json).unwrap(), fingerprint);
        for bad in ["", "00", &"g".repeat(64), &"0".repeat(63), &"é".repeat(32)] {
            assert!(bad.parse::<Fingerprint>().unwrap_err().to_string().contains("64"));
        }
    }

    #[test]
    fn files_are_hashed_by_name_and_content() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        std::fs::write(&path, b"abc").unwrap();
        let mut read = 0;
        let sha256 = sha256_of_file(&path, &mut |bytes| read += bytes).unwrap();
        assert_eq!(
            (hex(&sha256).as_str(), read),
            ("ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad", 3)
        );
        let cache = dir.path().join("state/hashes");
        let of_files = Fingerprint::of_files(b"c", &[path], &cache, &mut |_| ()).unwrap();
        assert_eq!(of_files, Fingerprint::of(b"c", &[("model.safetensors".to_owned(), sha256)]));
        let gone = [dir.path().join("gone.safetensors")];
        let error = Fingerprint::of_files(b"c", &gone, &cache, &mut |_| ()).unwrap_err();
        assert!(error.to_string().contains("gone.safetensors"), "{error}");
    }
}
