//! A content that is not whole yet: `blobs/<hash>.incomplete`, and the hash of what it has so far.

use std::{
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use sha2::{Digest, Sha256};

/// Bytes that are read at a time when the hash of what is there is taken.
const READ_BYTES: usize = 1 << 20;

/// A content that grows. Everything here blocks on the disk.
pub(super) struct Partial {
    path: PathBuf,
    file: File,
    hasher: Sha256,
    length: u64,
    /// So much was there when it was opened.
    inherited: u64,
    /// Held as long as anything may be written: other processes wait for it.
    _lock: File,
}

impl Partial {
    /// Opens what is there, or begins. `lock` is the held lock of the download.
    pub(super) fn open(path: &Path, lock: File, progress: &dyn Fn(u64)) -> io::Result<Self> {
        let mut file = File::options().read(true).write(true).create(true).truncate(false).open(path)?;
        let (mut hasher, mut length, mut buffer) = (Sha256::new(), 0, vec![0; READ_BYTES]);
        loop {
            match file.read(&mut buffer) {
                Ok(0) => break,
                Ok(read) => {
                    hasher.update(&buffer[..read]);
                    length += read as u64;
                    progress(length);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(Self { path: path.to_owned(), file, hasher, length, inherited: length, _lock: lock })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Bytes that are there.
    pub(super) fn length(&self) -> u64 {
        self.length
    }

    /// Whether some of it came from an earlier attempt of some process.
    pub(super) fn is_inherited(&self) -> bool {
        self.inherited > 0
    }

    pub(super) fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let written = self.file.write_all(bytes);
        if written.is_ok() {
            self.hasher.update(bytes);
            self.length += bytes.len() as u64;
        } else {
            // A part may have been written: what is in the file must be what was counted.
            self.file.set_len(self.length)?;
            self.file.seek(SeekFrom::Start(self.length))?;
        }
        written
    }

    /// Forgets everything.
    pub(super) fn restart(&mut self) -> io::Result<()> {
        self.file.set_len(0)?;
        self.file.seek(SeekFrom::Start(0))?;
        self.hasher = Sha256::new();
        (self.length, self.inherited) = (0, 0);
        Ok(())
    }

    /// The SHA-256 of what is there.
    pub(super) fn sha256(&self) -> [u8; 32] {
        self.hasher.clone().finalize().into()
    }

    /// Makes it the content `blob`. It is on the disk before it has that name.
    pub(super) fn complete(self, blob: &Path) -> io::Result<()> {
        self.file.sync_all()?;
        fs::rename(&self.path, blob)
    }

    /// Removes it.
    pub(super) fn discard(self) -> io::Result<()> {
        fs::remove_file(&self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(dir: &Path) -> Partial {
        let lock = File::create(dir.join("lock")).unwrap();
        Partial::open(&dir.join("x.incomplete"), lock, &|_| ()).unwrap()
    }

    #[test]
    fn it_goes_on_where_it_stopped() {
        let dir = tempfile::tempdir().unwrap();
        let mut partial = open(dir.path());
        assert!(!partial.is_inherited());
        partial.append(b"abc").unwrap();
        drop(partial);
        let mut partial = open(dir.path());
        assert_eq!((partial.length(), partial.is_inherited()), (3, true));
        partial.append(b"def").unwrap();
        assert_eq!(partial.sha256(), <[u8; 32]>::from(Sha256::digest(b"abcdef")));
        partial.complete(&dir.path().join("x")).unwrap();
        assert_eq!(fs::read(dir.path().join("x")).unwrap(), b"abcdef");
        assert!(!dir.path().join("x.incomplete").exists());
    }

    #[test]
    fn starting_again_leaves_nothing_of_before() {
        let dir = tempfile::tempdir().unwrap();
        let mut partial = open(dir.path());
        partial.append(b"abcdef").unwrap();
        partial.restart().unwrap();
        partial.append(b"xy").unwrap();
        assert_eq!((partial.length(), partial.sha256()), (2, Sha256::digest(b"xy").into()));
        assert_eq!(fs::read(partial.path()).unwrap(), b"xy");
        partial.discard().unwrap();
        assert!(!dir.path().join("x.incomplete").exists());
    }
}
