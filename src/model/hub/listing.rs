//! What the hub has of a model, and what of it is kept beside the cached files.
//!
//! The folder of a model in the shared cache is `models--org--name`: `refs/<revision>` holds a commit,
//! `snapshots/<commit>` links to `blobs`. Beside them, Helion keeps `.helion/<commit>.json`, the hub's file list.

use std::{
    collections::BTreeSet,
    fs::{self, File as FsFile},
    io::{self, Write},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::model::fingerprint::from_hex;

/// The version of the kept list; another one is fetched anew.
const FORMAT: u32 = 1;

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
}

impl File {
    /// The SHA-256 of the content, where the hub says it.
    pub(super) fn sha256(&self) -> Option<[u8; 32]> {
        from_hex(self.sha256.as_deref()?)
    }
}

impl Listing {
    pub(super) fn new(files: Vec<File>) -> Self {
        Self { format: FORMAT, files }
    }

    pub(super) fn file(&self, name: &str) -> Option<&File> {
        self.files.iter().find(|file| file.name == name)
    }

    pub(super) fn names(&self) -> BTreeSet<String> {
        self.files.iter().map(|file| file.name.clone()).collect()
    }
}

/// A model's folder in the cache.
pub(super) struct RepositoryCache {
    dir: PathBuf,
}

impl RepositoryCache {
    pub(super) fn new(cache: &Path, model: &str) -> Self {
        Self { dir: cache.join(format!("models--{}", model.replace('/', "--"))) }
    }

    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.dir.join("snapshots").join(commit)
    }

    /// The commit that a revision was when it was last asked for.
    pub(super) fn commit(&self, revision: &str) -> Option<String> {
        if is_commit(revision) {
            return self.snapshot(revision).is_dir().then(|| revision.to_owned());
        }
        let commit = fs::read_to_string(self.dir.join("refs").join(revision)).ok()?;
        Some(commit.trim().to_owned()).filter(|commit| is_commit(commit))
    }

    pub(super) fn keep_commit(&self, revision: &str, commit: &str) -> io::Result<()> {
        if is_commit(revision) || self.commit(revision).as_deref() == Some(commit) {
            return Ok(());
        }
        replace(&self.dir.join("refs").join(revision), commit.as_bytes())
    }

    /// The kept list of a commit; `None` where it is absent, of another version or damaged.
    pub(super) fn listing(&self, commit: &str) -> Option<Listing> {
        let listing: Listing = serde_json::from_slice(&fs::read(self.listing_path(commit)).ok()?).ok()?;
        (listing.format == FORMAT).then_some(listing)
    }

    pub(super) fn keep(&self, commit: &str, listing: &Listing) -> io::Result<()> {
        replace(&self.listing_path(commit), &serde_json::to_vec_pretty(listing)?)
    }

    /// Helion's own folder in it.
    pub(super) fn state_dir(&self) -> PathBuf {
        self.dir.join(".helion")
    }

    fn listing_path(&self, commit: &str) -> PathBuf {
        self.state_dir().join(format!("{commit}.json"))
    }
}

/// Whether the text is a full commit id.
pub(super) fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|digit| digit.is_ascii_hexdigit())
}

/// Writes a file so that a reader sees the old or the new content and nothing between.
fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir)?;
    }
    let mut draft = path.as_os_str().to_owned();
    draft.push(format!(".{}.draft", std::process::id()));
    let mut file = FsFile::create(&draft)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&draft, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kept_list_comes_back_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let cache = RepositoryCache::new(dir.path(), "org/name");
        let commit = "0123456789abcdef0123456789abcdef01234567";
        let file = File { name: "a".to_owned(), size: Some(3), sha256: Some("ab".repeat(32)) };
        let listing = Listing { format: FORMAT, files: vec![file] };
        assert_eq!(cache.listing(commit), None);
        cache.keep(commit, &listing).unwrap();
        assert_eq!(cache.listing(commit), Some(listing.clone()));
        assert_eq!(listing.file("a").unwrap().sha256(), Some([0xab; 32]));
        for bad in ["", "{", r#"{"format": 2, "files": []}"#] {
            fs::write(cache.listing_path(commit), bad).unwrap();
            assert_eq!(cache.listing(commit), None, "{bad}");
        }
    }

    #[test]
    fn a_revision_is_what_it_was_last() {
        let dir = tempfile::tempdir().unwrap();
        let cache = RepositoryCache::new(dir.path(), "org/name");
        let (first, second) = ("0".repeat(40), "1".repeat(40));
        assert_eq!(cache.commit("main"), None);
        for commit in [&first, &second] {
            cache.keep_commit("refs/pr/1", commit).unwrap();
            assert_eq!(cache.commit("refs/pr/1").as_ref(), Some(commit));
        }
        assert_eq!(cache.commit(&first), None, "nothing of it is there");
        fs::create_dir_all(cache.snapshot(&first)).unwrap();
        assert_eq!(cache.commit(&first).as_ref(), Some(&first));
    }
}
