//! What the hub has of a model at one commit: its file list.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::model::fingerprint::from_hex;

/// The version of the kept list; another one is fetched anew.
const FORMAT: u32 = 2;

/// The files of a model at one commit (those at the top; folders are never needed).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Listing {
    format: u32,
    files: Vec<File>,
}

/// One file on the hub.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct File {
    pub(super) name: String,
    /// In bytes, where the hub says it.
    pub(super) size: Option<u64>,
    /// Absent for small files, which git holds itself.
    pub(super) sha256: Option<String>,
    /// Git's own id of the content.
    pub(super) git_id: Option<String>,
}

impl File {
    /// The SHA-256 of the content, where the hub says it.
    pub(super) fn sha256(&self) -> Option<[u8; 32]> {
        from_hex(self.sha256.as_deref()?)
    }

    /// The name of the content in the cache, the same as with Hugging Face's tools: its SHA-256, or git's id of a small
    /// file. Where a hub tells neither, the name comes from commit and file.
    pub(super) fn blob(&self, commit: &str) -> String {
        let digits = |text: &&String| {
            matches!(text.len(), 40 | 64) && text.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'))
        };
        let known = [&self.sha256, &self.git_id].into_iter().flatten().find(digits);
        known
            .cloned()
            .unwrap_or_else(|| blake3::hash(format!("{commit}/{}", self.name).as_bytes()).to_hex().to_string())
    }
}

impl Listing {
    pub(super) fn new(files: Vec<File>) -> Self {
        Self { format: FORMAT, files }
    }

    /// A kept list; `None` where it is of another version or damaged.
    pub(super) fn parse(json: &[u8]) -> Option<Self> {
        let listing: Self = serde_json::from_slice(json).ok()?;
        let sound = listing.format == FORMAT && listing.files.iter().all(|file| is_plain_name(&file.name));
        sound.then_some(listing)
    }

    pub(super) fn file(&self, name: &str) -> Option<&File> {
        self.files.iter().find(|file| file.name == name)
    }

    /// The names of all contents in the cache.
    pub(super) fn blobs(&self, commit: &str) -> BTreeSet<String> {
        self.files.iter().map(|file| file.blob(commit)).collect()
    }

    pub(super) fn names(&self) -> BTreeSet<String> {
        self.files.iter().map(|file| file.name.clone()).collect()
    }
}

/// Whether the file of this name holds weights: these are what takes space.
pub(super) fn is_weights(name: &str) -> bool {
    [".safetensors", ".gguf"].iter().any(|ending| name.ends_with(ending))
}

/// Whether the name is a file's at the top of a repository. Names come from the hub and become paths here.
pub(super) fn is_plain_name(name: &str) -> bool {
    !name.is_empty() && name.len() <= 255 && !name.starts_with('.') && !name.contains(['/', '\\', ':', '\0'])
}

/// Whether the text is a full commit id.
pub(super) fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|digit| digit.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(sha256: Option<&str>, git_id: Option<&str>) -> File {
        let text = |text: Option<&str>| text.map(str::to_owned);
        File { name: "a".to_owned(), size: None, sha256: text(sha256), git_id: text(git_id) }
    }

    #[test]
    fn contents_are_named_by_their_hashes() {
        let (sha256, git_id) = ("ab".repeat(32), "cd".repeat(20));
        assert_eq!(file(Some(&sha256), Some(&git_id)).blob("c"), sha256);
        assert_eq!(file(None, Some(&git_id)).blob("c"), git_id);
        // Neither may become a path elsewhere.
        for bad in ["", "../../x", "0", &"G".repeat(40)] {
            let blob = file(None, Some(bad)).blob("c");
            assert!(blob.len() == 64 && blob != file(None, Some(bad)).blob("d"), "{bad}: {blob}");
        }
    }

    #[test]
    fn names_that_would_lead_elsewhere_are_no_names() {
        assert!(is_plain_name("model.safetensors"));
        for bad in ["", ".hidden", "..", "a/b", "a\\b", "C:x", "a\0b", &"x".repeat(256)] {
            assert!(!is_plain_name(bad), "{bad:?}");
        }
    }
}
