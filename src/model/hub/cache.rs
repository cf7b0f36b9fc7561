//! A model's folder in the cache that all of Hugging Face's tools share.
//!
//! ```text
//! models--org--name/refs/main                        the commit that a branch was when it was last asked for
//!                   snapshots/<commit>/config.json   a link to
//!                   blobs/<hash>                     the content; <hash>.incomplete while it is downloaded
//!                   .helion/<commit>.json            Helion's own: the hub's file list of a commit
//!                   .helion/files/<hash>             who uses a content, since when, and who fetched it
//!                   .helion/headers/<hash>           the header of a safetensors file that was not downloaded
//! .locks/models--org--name/<hash>.lock               held while a content is downloaded
//! ```
//!
//! A content is put in its place by renaming, after its size and hash were found right: what is in `blobs` under its
//! hash is whole, and a download that was interrupted goes on from `.incomplete`.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use super::listing::{Listing, is_commit};

/// What a folder of a model begins with; the rest is its id with `--` for `/`.
const PREFIX: &str = "models--";

/// A model's folder in the cache.
#[derive(Debug, Clone)]
pub(super) struct RepositoryCache {
    model: String,
    dir: PathBuf,
    locks: PathBuf,
}

impl RepositoryCache {
    pub(super) fn new(cache: &Path, model: &str) -> Self {
        let folder = format!("{PREFIX}{}", model.replace('/', "--"));
        Self { model: model.to_owned(), dir: cache.join(&folder), locks: cache.join(".locks").join(folder) }
    }

    /// The folders of all models in a cache, by their ids.
    pub(super) fn all(cache: &Path) -> io::Result<Vec<Self>> {
        let entries = match fs::read_dir(cache) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let ids = names.filter_map(|name| Some(name.strip_prefix(PREFIX)?.replacen("--", "/", 1)));
        let mut ids: Vec<String> = ids.filter(|id| super::split_id(id).is_some()).collect();
        ids.sort();
        Ok(ids.iter().map(|id| Self::new(cache, id)).collect())
    }

    pub(super) fn model(&self) -> &str {
        &self.model
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.snapshots().join(commit)
    }

    pub(super) fn snapshots(&self) -> PathBuf {
        self.dir.join("snapshots")
    }

    pub(super) fn refs(&self) -> PathBuf {
        self.dir.join("refs")
    }

    pub(super) fn blobs(&self) -> PathBuf {
        self.dir.join("blobs")
    }

    pub(super) fn blob(&self, name: &str) -> PathBuf {
        self.blobs().join(name)
    }

    pub(super) fn incomplete(&self, blob: &str) -> PathBuf {
        self.blobs().join(format!("{blob}.incomplete"))
    }

    /// The file that is locked while a content is downloaded; Hugging Face's tools lock the same one.
    pub(super) fn download_lock(&self, blob: &str) -> PathBuf {
        self.locks.join(format!("{blob}.lock"))
    }

    pub(super) fn locks(&self) -> &Path {
        &self.locks
    }

    /// The folder of the entries about contents.
    pub(super) fn entries(&self) -> PathBuf {
        self.state().join("files")
    }

    pub(super) fn header(&self, blob: &str) -> PathBuf {
        self.state().join("headers").join(blob)
    }

    fn state(&self) -> PathBuf {
        self.dir.join(".helion")
    }

    /// The commit that a revision was when it was last asked for.
    pub(super) fn commit(&self, revision: &str) -> Option<String> {
        if is_commit(revision) {
            return self.snapshot(revision).is_dir().then(|| revision.to_owned());
        }
        let commit = fs::read_to_string(self.refs().join(revision)).ok()?;
        Some(commit.trim().to_owned()).filter(|commit| is_commit(commit))
    }

    pub(super) fn keep_commit(&self, revision: &str, commit: &str) -> io::Result<()> {
        if is_commit(revision) || self.commit(revision).as_deref() == Some(commit) {
            return Ok(());
        }
        replace(&self.refs().join(revision), commit.as_bytes())
    }

    /// The kept list of a commit; `None` where it is absent, of another version or damaged.
    pub(super) fn listing(&self, commit: &str) -> Option<Listing> {
        Listing::parse(&fs::read(self.listing_path(commit)).ok()?)
    }

    pub(super) fn keep(&self, commit: &str, listing: &Listing) -> io::Result<()> {
        if self.listing(commit).as_ref() == Some(listing) {
            return Ok(());
        }
        replace(&self.listing_path(commit), &serde_json::to_vec_pretty(listing)?)
    }

    pub(super) fn listing_path(&self, commit: &str) -> PathBuf {
        self.state().join(format!("{commit}.json"))
    }

    /// Makes a content the file of that name at a commit.
    pub(super) fn link(&self, commit: &str, file: &str, blob: &str) -> io::Result<()> {
        let dir = self.snapshot(commit);
        fs::create_dir_all(&dir)?;
        let link = dir.join(file);
        let draft = draft_of(&link);
        // Relative, so that the cache can be moved.
        #[cfg(unix)]
        std::os::unix::fs::symlink(Path::new("../../blobs").join(blob), &draft)?;
        // Symbolic links take a privilege there.
        #[cfg(not(unix))]
        fs::hard_link(self.blob(blob), &draft)?;
        fs::rename(&draft, link).inspect_err(|_| drop(fs::remove_file(&draft)))
    }

    /// Removes a content, and the links that lead to it.
    pub(super) fn remove_blob(&self, blob: &str) -> io::Result<()> {
        for link in self.links_to(blob)? {
            gone(fs::remove_file(link))?;
        }
        gone(fs::remove_file(self.blob(blob)))
    }

    /// The files of all commits that are this content.
    fn links_to(&self, blob: &str) -> io::Result<Vec<PathBuf>> {
        let mut links = Vec::new();
        for commit in children(&self.snapshots())? {
            for file in children(&commit)? {
                if content_of(&file).as_deref() == Some(blob) {
                    links.push(file);
                }
            }
        }
        Ok(links)
    }
}

/// The name of the content that a file of a snapshot leads to, whether that is there or not; `None` where it is no link.
pub(super) fn content_of(file: &Path) -> Option<String> {
    let target = fs::read_link(file).ok()?;
    Some(target.file_name()?.to_str()?.to_owned())
}

/// What is in a folder; nothing where there is none.
pub(super) fn children(dir: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(Vec::new());
        }
        Err(error) => return Err(error),
    };
    let mut paths: Vec<PathBuf> = entries.map(|entry| Ok(entry?.path())).collect::<io::Result<_>>()?;
    paths.sort();
    Ok(paths)
}

/// Something that is not there need not be removed.
pub(super) fn gone(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// A name beside a file's, for what will replace it: another one each time, in all processes.
fn draft_of(path: &Path) -> PathBuf {
    static DRAFTS: AtomicU64 = AtomicU64::new(0);
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let number = DRAFTS.fetch_add(1, Ordering::Relaxed);
    path.with_file_name(format!(".{name}.{}.{number}.draft", std::process::id()))
}

/// Writes a file so that a reader sees the old or the new content and nothing between.
pub(super) fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    if let Some(dir) = path.parent() {
        fs::create_dir_all(dir)?;
    }
    let draft = draft_of(path);
    let written = File::create(&draft).and_then(|mut file| {
        file.write_all(content)?;
        file.sync_all()
    });
    match written {
        Ok(()) => fs::rename(&draft, path),
        Err(error) => {
            // What could not be written is of no use, and takes room on a disk that may be full.
            let _ = fs::remove_file(&draft);
            Err(error)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::listing, *};

    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

    #[test]
    fn a_kept_list_comes_back_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let cache = RepositoryCache::new(dir.path(), "org/name");
        let file = listing::File { name: "a".to_owned(), size: Some(3), sha256: Some("ab".repeat(32)), git_id: None };
        let kept = Listing::new(vec![file]);
        assert_eq!(cache.listing(COMMIT), None);
        cache.keep(COMMIT, &kept).unwrap();
        assert_eq!(cache.listing(COMMIT), Some(kept.clone()));
        assert_eq!(kept.file("a").unwrap().sha256(), Some([0xab; 32]));
        let escape = r#"{"format": 2, "files": [{"name": "../x", "size": 1, "sha256": null, "git_id": null}]}"#;
        for bad in ["", "{", r#"{"format": 1, "files": []}"#, escape] {
            fs::write(cache.listing_path(COMMIT), bad).unwrap();
            assert_eq!(cache.listing(COMMIT), None, "{bad}");
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

    #[test]
    fn folders_are_ids_and_back() {
        let dir = tempfile::tempdir().unwrap();
        for id in ["org/na--me", "Qwen/Qwen3-0.6B"] {
            fs::create_dir(RepositoryCache::new(dir.path(), id).dir()).unwrap();
        }
        for other in ["datasets--a--b", "models--gpt2", ".locks", "models--..--x"] {
            fs::create_dir(dir.path().join(other)).unwrap();
        }
        let all = RepositoryCache::all(dir.path()).unwrap();
        assert_eq!(all.iter().map(RepositoryCache::model).collect::<Vec<_>>(), ["Qwen/Qwen3-0.6B", "org/na--me"]);
        assert!(RepositoryCache::all(&dir.path().join("none")).unwrap().is_empty());
    }

    #[cfg(unix)]
    #[test]
    fn a_content_goes_with_its_links() {
        let dir = tempfile::tempdir().unwrap();
        let cache = RepositoryCache::new(dir.path(), "org/name");
        fs::create_dir_all(cache.blobs()).unwrap();
        fs::write(cache.blob("abc"), "x").unwrap();
        let other = "1".repeat(40);
        for commit in [COMMIT, &other] {
            cache.link(commit, "file", "abc").unwrap();
            // Again, over what is there.
            cache.link(commit, "file", "abc").unwrap();
            assert_eq!(fs::read(cache.snapshot(commit).join("file")).unwrap(), b"x");
        }
        cache.remove_blob("abc").unwrap();
        assert!(children(&cache.snapshot(COMMIT)).unwrap().is_empty());
        assert!(!cache.blob("abc").exists());
        cache.remove_blob("abc").unwrap();
    }
}
