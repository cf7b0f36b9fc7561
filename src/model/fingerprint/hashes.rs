//! The hashes of local files, remembered in a state file, so that a checkpoint is hashed once.
//!
//! An entry holds for a file as it was: path, size, times of the last change and inode. The state file starts with its
//! format's version and a checksum of the rest; one that is of another version, torn or edited counts as empty.

use std::{
    fs::{self, File, Metadata},
    io::{self, Write},
    path::{Path, PathBuf},
    time::UNIX_EPOCH,
};

use serde::{Deserialize, Serialize};

use super::{FingerprintError, from_hex, hex, sha256_of_file};

/// The first word of the state file; another format is another word.
const FORMAT: &str = "helion-file-hashes-1";

/// Files that are remembered; the oldest go first. A large checkpoint has 200 shards.
const MAX_ENTRIES: usize = 2_048;

/// The state file's size where a reader gives up on it: more than [`MAX_ENTRIES`] paths of usual length need.
const MAX_BYTES: u64 = 4 << 20;

/// A memory of file hashes, kept in a state file. Several processes may share it.
#[derive(Debug, Clone)]
pub struct FileHashes {
    path: PathBuf,
}

/// What tells whether a file is still the one that was hashed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct State {
    path: String,
    size: u64,
    /// Nanoseconds since 1970: the last change of the content, and of the content or the inode.
    mtime_ns: i64,
    ctime_ns: i64,
    inode: u64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Entry {
    #[serde(flatten)]
    state: State,
    sha256: String,
}

impl FileHashes {
    /// A memory that is kept in the file `path`, which need not exist.
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// The SHA-256 of a file: remembered, or taken now. `progress` is told the bytes that were read since the last call
    /// (none where it was remembered).
    ///
    /// # Errors
    /// [`FingerprintError::Unreadable`] and [`FingerprintError::Changed`]. A state file that can't be written is only
    /// logged.
    pub fn sha256(&self, file: &Path, progress: &mut dyn FnMut(u64)) -> Result<[u8; 32], FingerprintError> {
        let unreadable = |source| FingerprintError::Unreadable { path: file.to_owned(), source };
        let before = State::of(file).map_err(unreadable)?;
        if let Some(sha256) = before.as_ref().and_then(|state| self.known_as(state)) {
            return Ok(sha256);
        }
        let sha256 = sha256_of_file(file, progress)?;
        if State::of(file).map_err(unreadable)? != before {
            return Err(FingerprintError::Changed { path: file.to_owned() });
        }
        if let Some(state) = before
            && let Err(error) = self.remember(Entry { state, sha256: hex(&sha256) })
        {
            tracing::warn!(state = %self.path.display(), %error, "cannot remember a file's hash: it will be taken again");
        }
        Ok(sha256)
    }

    /// The SHA-256 of a file, where it is remembered.
    pub fn known(&self, file: &Path) -> Option<[u8; 32]> {
        self.known_as(&State::of(file).ok()??)
    }

    fn known_as(&self, state: &State) -> Option<[u8; 32]> {
        from_hex(&self.read().into_iter().find(|entry| entry.state == *state)?.sha256)
    }

    /// Remembers a file's SHA-256 that was taken while it was written. That it can't be written down is only logged.
    pub fn keep(&self, file: &Path, sha256: [u8; 32]) {
        let kept = State::of(file).and_then(|state| match state {
            Some(state) => self.remember(Entry { state, sha256: hex(&sha256) }),
            None => Ok(()),
        });
        if let Err(error) = kept {
            tracing::warn!(state = %self.path.display(), %error, "cannot remember a file's hash: it will be taken again");
        }
    }

    /// The entries, oldest first; none where the state file is absent or of no use.
    fn read(&self) -> Vec<Entry> {
        let small = fs::metadata(&self.path).is_ok_and(|metadata| metadata.len() <= MAX_BYTES);
        let text = if small { fs::read_to_string(&self.path).unwrap_or_default() } else { String::new() };
        let Some((head, body)) = text.split_once('\n') else { return Vec::new() };
        if head != heading(body) {
            tracing::warn!(state = %self.path.display(), "dropping remembered file hashes: another version's, or damaged");
            return Vec::new();
        }
        body.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    fn remember(&self, entry: Entry) -> io::Result<()> {
        let dir = self.path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
        fs::create_dir_all(dir)?;
        // Held over reading and writing, so that two processes don't lose each other's entries. Readers need no lock:
        // the file is replaced as a whole.
        let lock = File::create(self.path.with_extension("lock"))?;
        lock.lock()?;
        let mut entries = self.read();
        entries.retain(|known| known.state.path != entry.state.path);
        entries.push(entry);
        let surplus = entries.len().saturating_sub(MAX_ENTRIES);
        let mut body = String::new();
        for entry in &entries[surplus..] {
            body.push_str(&serde_json::to_string(entry)?);
            body.push('\n');
        }
        let draft = self.path.with_extension(format!("{}.draft", std::process::id()));
        let mut file = File::create(&draft)?;
        file.write_all(format!("{}\n{body}", heading(&body)).as_bytes())?;
        file.sync_all()?;
        fs::rename(draft, &self.path)
    }
}

fn heading(body: &str) -> String {
    format!("{FORMAT} {}", blake3::hash(body.as_bytes()).to_hex())
}

impl State {
    /// `None` where the path is no UTF-8, and so can't be remembered. Links are followed: the target counts.
    fn of(file: &Path) -> io::Result<Option<Self>> {
        let path = fs::canonicalize(file)?;
        let metadata = fs::metadata(&path)?;
        let modified = metadata
            .modified()?
            .duration_since(UNIX_EPOCH)
            .map_or(0, |time| i64::try_from(time.as_nanos()).unwrap_or(i64::MAX));
        let (ctime_ns, inode) = identity(&metadata);
        Ok(path.to_str().map(|path| Self {
            path: path.to_owned(),
            size: metadata.len(),
            mtime_ns: modified,
            ctime_ns,
            inode,
        }))
    }
}

#[cfg(unix)]
fn identity(metadata: &Metadata) -> (i64, u64) {
    use std::os::unix::fs::MetadataExt;
    (metadata.ctime() * 1_000_000_000 + metadata.ctime_nsec(), metadata.ino())
}

#[cfg(not(unix))]
fn identity(_: &Metadata) -> (i64, u64) {
    (0, 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Fixture {
        dir: tempfile::TempDir,
        hashes: FileHashes,
    }

    impl Fixture {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let hashes = FileHashes::at(dir.path().join("deep/er/file-hashes"));
            Self { dir, hashes }
        }

        fn write(&self, name: &str, content: &str) -> PathBuf {
            let path = self.dir.path().join(name);
            fs::write(&path, content).unwrap();
            path
        }

        /// The hash, and the bytes that had to be read for it.
        fn hash(&self, path: &Path) -> ([u8; 32], u64) {
            let mut read = 0;
            let sha256 = self.hashes.sha256(path, &mut |bytes| read += bytes).unwrap();
            (sha256, read)
        }
    }

    #[test]
    fn a_file_is_read_once_until_it_changes() {
        let fixture = Fixture::new();
        let path = fixture.write("a", "abc");
        let (first, read) = fixture.hash(&path);
        assert_eq!((read, fixture.hash(&path)), (3, (first, 0)));
        // Same size, other content, and even the old time of change: the inode's own time tells.
        let modified = fs::metadata(&path).unwrap().modified().unwrap();
        fixture.write("a", "xyz");
        File::options().write(true).open(&path).unwrap().set_modified(modified).unwrap();
        let (second, read) = fixture.hash(&path);
        assert_eq!(read, 3);
        assert_ne!(first, second);
        assert_eq!(fixture.hashes.read().len(), 1, "the old entry is gone");
    }

    #[cfg(unix)]
    #[test]
    fn a_link_is_its_target() {
        let fixture = Fixture::new();
        let path = fixture.write("a", "abc");
        let link = fixture.dir.path().join("link");
        std::os::unix::fs::symlink(&path, &link).unwrap();
        let (sha256, _) = fixture.hash(&path);
        assert_eq!(fixture.hash(&link), (sha256, 0));
    }

    #[test]
    fn a_hash_that_is_known_need_not_be_taken() {
        let fixture = Fixture::new();
        let path = fixture.write("a", "abc");
        assert_eq!(fixture.hashes.known(&path), None);
        fixture.hashes.keep(&path, [7; 32]);
        assert_eq!(fixture.hashes.known(&path), Some([7; 32]));
        assert_eq!(fixture.hash(&path), ([7; 32], 0));
        fixture.hashes.keep(&path.join("none"), [7; 32]);
    }

    #[test]
    fn a_state_file_of_no_use_is_rebuilt() {
        let fixture = Fixture::new();
        let path = fixture.write("a", "abc");
        let (sha256, _) = fixture.hash(&path);
        let good = fs::read_to_string(&fixture.hashes.path).unwrap();
        let wrong = hex(&[0; 32]);
        for bad in [
            String::new(),
            "garbage".to_owned(),
            good.replace(FORMAT, "helion-file-hashes-9"),
            good[..good.len() - 5].to_owned(),
            good.replace(&hex(&sha256), &wrong),
        ] {
            fs::write(&fixture.hashes.path, &bad).unwrap();
            assert_eq!(fixture.hash(&path), (sha256, 3), "{bad}");
            assert_eq!(fixture.hash(&path), (sha256, 0), "rebuilt");
        }
        fs::write(&fixture.hashes.path, [0xFF, 0xFE]).unwrap();
        assert_eq!(fixture.hash(&path), (sha256, 3));
    }

    #[test]
    fn a_state_file_that_cannot_be_written_costs_time_only() {
        let fixture = Fixture::new();
        let path = fixture.write("a", "abc");
        let blocked = FileHashes::at(path.join("below-a-file"));
        assert!(blocked.sha256(&path, &mut |_| ()).is_ok());
    }

    #[test]
    fn the_oldest_entries_go_first() {
        let fixture = Fixture::new();
        let entry = |index: usize| Entry {
            state: State { path: format!("/{index}"), size: 0, mtime_ns: 0, ctime_ns: 0, inode: 0 },
            sha256: hex(&[0; 32]),
        };
        // Written directly, as adding them one by one would write the file as often.
        let body: String = (0..MAX_ENTRIES).map(|index| serde_json::to_string(&entry(index)).unwrap() + "\n").collect();
        fs::create_dir_all(fixture.hashes.path.parent().unwrap()).unwrap();
        fs::write(&fixture.hashes.path, format!("{}\n{body}", heading(&body))).unwrap();
        assert_eq!(fixture.hashes.read().len(), MAX_ENTRIES);
        fixture.hashes.remember(entry(MAX_ENTRIES)).unwrap();
        let entries = fixture.hashes.read();
        assert_eq!((entries.len(), entries[0].state.path.as_str()), (MAX_ENTRIES, "/1"));
    }

    #[test]
    fn processes_that_write_at_once_lose_nothing() {
        let fixture = Fixture::new();
        let paths: Vec<PathBuf> = (0..16).map(|index| fixture.write(&format!("f{index}"), "x")).collect();
        std::thread::scope(|scope| {
            for path in &paths {
                scope.spawn(|| fixture.hash(path));
            }
        });
        assert_eq!(fixture.hashes.read().len(), paths.len());
    }
}
