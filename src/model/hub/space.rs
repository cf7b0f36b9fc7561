//! Room on the disk for what is to be downloaded: least recently used files go first, and never one in use.
//!
//! The cache belongs to other tools, too. So only weight files that Helion downloaded are ever evicted, and only they count
//! against `--max-disk-space`. Some of the disk is always left to the system. Nothing is removed where that would not be
//! enough. Two processes take turns in making room; what they then download at the same time they don't reserve, so a disk
//! that both of them fill ends in [`HubError::DiskFull`].

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    time::SystemTime,
};

use super::{
    HubError,
    cache::{RepositoryCache, children, gone},
    error::{Bytes, Room, io_error},
    usage::{self, Removal},
};

/// What is left of a large disk for everything else.
const KEPT_FREE_BYTES: u64 = 1 << 30;

/// Of a small disk, one part in this many is left.
const KEPT_FREE_SHARE: u64 = 20;

/// The file that is locked while room is made.
const LOCK: &str = "helion-space.lock";

/// What is to be downloaded, and where.
pub(super) struct Need {
    pub(super) model: String,
    pub(super) cache_dir: PathBuf,
    /// What is still missing of it.
    pub(super) bytes: u64,
    /// What Helion's files may take in all, bytes.
    pub(super) limit_bytes: Option<u64>,
}

/// What there is, in bytes.
#[derive(Debug, Clone, Copy)]
struct Budget {
    /// Free and all; `None` where the system doesn't say.
    disk: Option<(u64, u64)>,
    limit: Option<u64>,
    /// What Helion's files take now.
    held: u64,
}

impl Budget {
    /// The tighter of the two bounds; `None` where there is none.
    fn room(&self) -> Option<Room> {
        let disk = self
            .disk
            .map(|(free, total)| Room::Disk(free.saturating_sub(KEPT_FREE_BYTES.min(total / KEPT_FREE_SHARE))));
        let limit = self.limit.map(|limit| Room::Limit(limit.saturating_sub(self.held)));
        disk.into_iter().chain(limit).min_by_key(|room| room.bytes())
    }

    /// What has to be removed before `needed` bytes have room.
    fn shortfall(&self, needed: u64) -> u64 {
        // Whoever is above the limit already has to come below it, too.
        let above = self.limit.map_or(0, |limit| self.held.saturating_add(needed).saturating_sub(limit));
        self.room().map_or(0, |room| needed.saturating_sub(room.bytes())).max(above)
    }
}

impl Room {
    fn bytes(self) -> u64 {
        match self {
            Self::Disk(bytes) | Self::Limit(bytes) => bytes,
        }
    }
}

/// A content that Helion downloaded, whole or not.
struct Held {
    cache: RepositoryCache,
    blob: String,
    bytes: u64,
    last_used: SystemTime,
}

/// Sees to it that there is room, by removing what was not used for the longest time. Blocks on the disk.
pub(super) fn make_room(need: &Need) -> Result<(), HubError> {
    if need.bytes == 0 {
        return Ok(());
    }
    let locks = need.cache_dir.join(".locks");
    let path = locks.join(LOCK);
    let lock =
        fs::create_dir_all(&locks).and_then(|()| File::create(&path)).and_then(|lock| lock.lock().map(|()| lock));
    let _lock = lock.map_err(|source| io_error(&path, source))?;
    let mut held = held(&need.cache_dir)?;
    let budget = Budget {
        disk: disk(&need.cache_dir),
        limit: need.limit_bytes,
        held: held.iter().map(|content| content.bytes).sum(),
    };
    let shortfall = budget.shortfall(need.bytes);
    let Some(room) = budget.room().filter(|_| shortfall > 0) else { return Ok(()) };
    held.sort_by_key(|content| content.last_used);
    let (mut chosen, mut freed_bytes) = (Vec::new(), 0);
    for content in held {
        if freed_bytes >= shortfall {
            break;
        }
        let removal = Removal::of(&content.cache, &content.blob);
        if let Some(removal) = removal.map_err(|source| io_error(content.cache.entries(), source))? {
            freed_bytes += content.bytes;
            chosen.push((content, removal));
        }
    }
    if freed_bytes < shortfall {
        return Err(HubError::NoSpace {
            model: need.model.clone(),
            cache: need.cache_dir.clone(),
            needed_bytes: need.bytes,
            room,
            freeable_bytes: freed_bytes,
        });
    }
    for (content, removal) in chosen {
        let Held { cache, blob, bytes, .. } = content;
        tracing::warn!(model = cache.model(), blob, size = %Bytes(bytes), "removed from the cache to make room for {}", need.model);
        let removed = cache.remove_blob(&blob).and_then(|()| gone(fs::remove_file(cache.incomplete(&blob))));
        removed.and_then(|()| removal.done()).map_err(|source| io_error(cache.blob(&blob), source))?;
    }
    Ok(())
}

/// Everything that Helion downloaded into a cache.
fn held(cache_dir: &Path) -> Result<Vec<Held>, HubError> {
    let mut held = Vec::new();
    for cache in RepositoryCache::all(cache_dir).map_err(|source| io_error(cache_dir, source))? {
        for entry in children(&cache.entries()).map_err(|source| io_error(cache.entries(), source))? {
            let Some(blob) = entry.file_name().and_then(|name| name.to_str()).map(str::to_owned) else { continue };
            if !usage::is_fetched(&cache, &blob) {
                continue;
            }
            let bytes = [cache.blob(&blob), cache.incomplete(&blob)].iter().map(|path| size(path)).sum();
            let last_used = usage::last_used(&cache, &blob).unwrap_or(SystemTime::UNIX_EPOCH);
            if bytes > 0 {
                held.push(Held { cache: cache.clone(), blob, bytes, last_used });
            }
        }
    }
    Ok(held)
}

/// The size of a file; 0 where there is none.
pub(super) fn size(path: &Path) -> u64 {
    fs::metadata(path).map_or(0, |metadata| metadata.len())
}

/// Free for this user, and in all, bytes, of the disk that a folder lies on.
#[cfg(unix)]
fn disk(dir: &Path) -> Option<(u64, u64)> {
    let disk = rustix::fs::statvfs(dir).ok()?;
    Some((disk.f_bavail.saturating_mul(disk.f_frsize), disk.f_blocks.saturating_mul(disk.f_frsize)))
}

/// Not known there: a full disk is noticed when it is full.
#[cfg(not(unix))]
fn disk(_: &Path) -> Option<(u64, u64)> {
    None
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn some_of_the_disk_stays_free() {
        let budget = |free, total| Budget { disk: Some((free, total)), limit: None, held: 0 };
        assert_eq!(budget(100 * GIB, 1_000 * GIB).room(), Some(Room::Disk(99 * GIB)));
        assert_eq!(budget(2 * GIB, 10 * GIB).room(), Some(Room::Disk(2 * GIB - GIB / 2)));
        assert_eq!(budget(GIB / 2, 100 * GIB).room(), Some(Room::Disk(0)));
        assert_eq!(budget(5 * GIB, 1_000 * GIB).shortfall(6 * GIB), 2 * GIB);
        assert_eq!(budget(5 * GIB, 1_000 * GIB).shortfall(4 * GIB), 0);
        assert_eq!(Budget { disk: None, limit: None, held: GIB }.shortfall(u64::MAX), 0, "nothing is known");
    }

    #[test]
    fn the_limit_is_one_for_all_files() {
        let budget = |held| Budget { disk: Some((1_000 * GIB, 2_000 * GIB)), limit: Some(10 * GIB), held };
        assert_eq!(budget(4 * GIB).room(), Some(Room::Limit(6 * GIB)));
        assert_eq!([budget(4 * GIB).shortfall(6 * GIB), budget(4 * GIB).shortfall(7 * GIB)], [0, GIB]);
        assert_eq!(budget(12 * GIB).shortfall(GIB), 3 * GIB, "it was smaller before");
    }

    /// A cache with contents that were used so many seconds ago.
    fn cache(contents: &[(&str, &str, u64)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (model, blob, seconds) in contents {
            let cache = RepositoryCache::new(dir.path(), model);
            for dir in [cache.blobs(), cache.entries()] {
                fs::create_dir_all(dir).unwrap();
            }
            fs::write(cache.blob(blob), vec![0; 100]).unwrap();
            usage::mark_fetched(&cache, blob).unwrap();
            let entry = File::options().write(true).open(cache.entries().join(blob)).unwrap();
            entry.set_modified(SystemTime::now() - Duration::from_secs(*seconds)).unwrap();
        }
        dir
    }

    fn need(cache: &tempfile::TempDir, bytes: u64, limit: u64) -> Need {
        Need { model: "org/new".to_owned(), cache_dir: cache.path().to_owned(), bytes, limit_bytes: Some(limit) }
    }

    fn there(cache: &tempfile::TempDir) -> Vec<String> {
        held(cache.path()).unwrap().into_iter().map(|content| content.blob).collect()
    }

    #[tokio::test]
    async fn what_was_not_used_for_the_longest_time_goes_first() {
        let dir = cache(&[("org/a", "a1", 10), ("org/a", "a2", 40), ("org/b", "b1", 30), ("org/b", "b2", 20)]);
        // Of another tool: it doesn't count, and stays.
        let other = RepositoryCache::new(dir.path(), "org/a").blob("other");
        fs::write(&other, vec![0; 1_000]).unwrap();
        make_room(&need(&dir, 50, 450)).unwrap();
        assert_eq!(there(&dir).len(), 4, "there was room");
        make_room(&need(&dir, 150, 450)).unwrap();
        assert_eq!(there(&dir), ["a1", "b1", "b2"]);
        // The next would be b1.
        let _claim = usage::Claim::of(&RepositoryCache::new(dir.path(), "org/b"), "b1").await.unwrap();
        make_room(&need(&dir, 50, 300)).unwrap();
        assert_eq!(there(&dir), ["a1", "b1"]);
        let error = make_room(&need(&dir, 250, 300)).unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, HubError::NoSpace { freeable_bytes: 100, room: Room::Limit(100), .. }), "{text}");
        assert!(text.contains("--max-disk-space") && text.contains("250 bytes"), "{text}");
        assert_eq!(there(&dir), ["a1", "b1"], "nothing is removed where it isn't enough");
        assert!(other.exists());
    }

    #[test]
    fn a_disk_is_measured() {
        let dir = tempfile::tempdir().unwrap();
        if let Some((free, total)) = disk(dir.path()) {
            assert!(free <= total && total > 0);
            let all = Need { limit_bytes: None, ..need(&dir, u64::MAX, 0) };
            assert!(matches!(make_room(&all), Err(HubError::NoSpace { room: Room::Disk(_), .. })));
        }
    }
}
