//! Who uses which file of the cache: what tells eviction and `helion model rm` what must stay.
//!
//! Every content has an entry, a small file. A process that uses the content holds a shared lock on its entry, which the
//! system gives back however the process ends; who removes the content holds an exclusive one. The entry's time of
//! change is the last use (a file system's access times are often switched off), and its text says that Helion downloaded
//! the content: what another tool brought into the shared cache is never evicted.

use std::{
    fs::{self, File, TryLockError},
    io::{self, Read, Write},
    path::Path,
    time::{Duration, SystemTime},
};

use super::{HubError, cache::RepositoryCache, error::io_error};

/// What an entry of a content says that Helion downloaded and may evict.
const FETCHED: &[u8] = b"fetched by helion\n";

/// How often is looked whether a lock has become free.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// A content in use, until this is dropped or the process ends.
#[derive(Debug)]
pub(super) struct Claim {
    /// `None` where the cache is read-only: nobody can remove anything there.
    _entry: Option<File>,
}

/// An exclusive right to remove a content.
#[derive(Debug)]
pub(super) struct Removal {
    entry: Option<File>,
}

impl Claim {
    /// Marks a content as used from now on. Waits while somebody removes it.
    pub(super) async fn of(cache: &RepositoryCache, blob: &str) -> Result<Self, HubError> {
        use io::ErrorKind::{PermissionDenied, ReadOnlyFilesystem};
        let path = cache.entries().join(blob);
        loop {
            let entry = match fs::create_dir_all(cache.entries()).and_then(|()| open(&path)) {
                Ok(entry) => entry,
                Err(error) if matches!(error.kind(), PermissionDenied | ReadOnlyFilesystem) => {
                    return Ok(Self { _entry: None });
                }
                Err(source) => return Err(io_error(path, source)),
            };
            lock(&path, || entry.try_lock_shared()).await?;
            // Whoever held it may have removed the whole model: then others would never see this lock.
            if is_still(&entry, &path) {
                entry.set_modified(SystemTime::now()).map_err(|source| io_error(&path, source))?;
                return Ok(Self { _entry: Some(entry) });
            }
        }
    }
}

impl Removal {
    /// The right to remove a content; `None` while somebody uses it.
    pub(super) fn of(cache: &RepositoryCache, blob: &str) -> io::Result<Option<Self>> {
        let path = cache.entries().join(blob);
        if !path.exists() {
            // No Helion has ever used it.
            return Ok(Some(Self { entry: None }));
        }
        let entry = open(&path)?;
        match entry.try_lock() {
            Ok(()) => Ok(Some(Self { entry: Some(entry) })),
            Err(TryLockError::WouldBlock) => Ok(None),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    /// The content is gone: it was not fetched any more. The entry stays, as another process may wait for its lock.
    pub(super) fn done(self) -> io::Result<()> {
        match &self.entry {
            Some(entry) => entry.set_len(0),
            None => Ok(()),
        }
    }
}

/// Notes that Helion downloaded a content.
pub(super) fn mark_fetched(cache: &RepositoryCache, blob: &str) -> io::Result<()> {
    let mut entry = open(&cache.entries().join(blob))?;
    entry.set_len(0)?;
    entry.write_all(FETCHED)
}

/// Whether Helion downloaded a content.
pub(super) fn is_fetched(cache: &RepositoryCache, blob: &str) -> bool {
    let mut text = Vec::new();
    let opened = File::open(cache.entries().join(blob));
    let read = opened.and_then(|entry| entry.take(FETCHED.len() as u64 + 1).read_to_end(&mut text));
    read.is_ok() && text == FETCHED
}

/// When a content was used last; `None` where Helion never did.
pub(super) fn last_used(cache: &RepositoryCache, blob: &str) -> Option<SystemTime> {
    fs::metadata(cache.entries().join(blob)).ok()?.modified().ok()
}

/// Whether an opened file is the one that the path leads to.
#[cfg(unix)]
fn is_still(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let identity = |metadata: io::Result<fs::Metadata>| metadata.map(|found| (found.dev(), found.ino())).ok();
    identity(file.metadata()) == identity(fs::metadata(path))
}

/// An open file can't be removed there.
#[cfg(not(unix))]
fn is_still(_: &File, _: &Path) -> bool {
    true
}

fn open(path: &Path) -> io::Result<File> {
    File::options().read(true).write(true).create(true).truncate(false).open(path)
}

/// Waits for a lock.
pub(super) async fn lock(path: &Path, attempt: impl Fn() -> Result<(), TryLockError>) -> Result<(), HubError> {
    loop {
        match attempt() {
            Ok(()) => return Ok(()),
            Err(TryLockError::WouldBlock) => tokio::time::sleep(LOOK_EVERY).await,
            Err(TryLockError::Error(source)) => return Err(io_error(path, source)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_used_cannot_be_removed() {
        let dir = tempfile::tempdir().unwrap();
        let cache = RepositoryCache::new(dir.path(), "org/name");
        assert!(Removal::of(&cache, "a").unwrap().is_some(), "never used");
        let (first, second) = (Claim::of(&cache, "a").await.unwrap(), Claim::of(&cache, "a").await.unwrap());
        drop(first);
        assert!(Removal::of(&cache, "a").unwrap().is_none());
        assert!(Removal::of(&cache, "b").unwrap().is_some());
        drop(second);
        let removal = Removal::of(&cache, "a").unwrap().unwrap();
        assert!(Removal::of(&cache, "a").unwrap().is_none(), "one at a time");
        let waiting = tokio::time::timeout(Duration::from_millis(1), Claim::of(&cache, "a"));
        assert!(waiting.await.is_err(), "who wants to use it waits");
        removal.done().unwrap();
        Claim::of(&cache, "a").await.unwrap();
    }

    #[tokio::test]
    async fn entries_say_who_fetched_and_when_it_was_used() {
        let dir = tempfile::tempdir().unwrap();
        let cache = RepositoryCache::new(dir.path(), "org/name");
        assert_eq!((is_fetched(&cache, "a"), last_used(&cache, "a")), (false, None));
        let before = SystemTime::now() - Duration::from_secs(1);
        let claim = Claim::of(&cache, "a").await.unwrap();
        assert!(!is_fetched(&cache, "a") && last_used(&cache, "a").unwrap() > before);
        mark_fetched(&cache, "a").unwrap();
        assert!(is_fetched(&cache, "a"));
        drop(claim);
        Removal::of(&cache, "a").unwrap().unwrap().done().unwrap();
        assert!(!is_fetched(&cache, "a"));
    }
}
