//! What is in the cache, and taking it out again.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::{Path, PathBuf},
    time::SystemTime,
};

use chrono::{DateTime, SecondsFormat, Utc};
use serde::Serialize;

use super::{
    CONFIG, HubError, HubOptions,
    cache::{RepositoryCache, children, content_of, gone},
    error::io_error,
    settings::Settings,
    space::size,
    usage::{self, Removal},
    weights::Layout,
};

/// The cache of the hub's files, which all of Hugging Face's tools share.
#[derive(Debug)]
pub struct HubCache {
    dir: PathBuf,
}

/// A model in the cache.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CachedModel {
    /// The hub id.
    pub model: String,
    /// What its files take, bytes; what several revisions share is counted once.
    pub bytes: u64,
    /// What unfinished downloads take beside that, bytes.
    pub incomplete_bytes: u64,
    /// When Helion used one of its files last, RFC 3339; absent where it never did.
    pub last_used: Option<String>,
    /// Whether a helion process uses it now.
    pub in_use: bool,
    /// Its commits of which something is there.
    pub revisions: Vec<CachedRevision>,
}

/// A commit of a model in the cache.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CachedRevision {
    /// The commit.
    pub commit: String,
    /// The branches and tags that led here when they were last asked for.
    pub refs: Vec<String>,
    /// Files that are there.
    pub files: usize,
    /// What they take, bytes.
    pub bytes: u64,
    /// Whether the configuration and all weight files are there. A node that hosts a part of the blocks doesn't need them.
    pub complete: bool,
}

/// What was removed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Removed {
    /// The hub id.
    pub model: String,
    /// The commits.
    pub commits: Vec<String>,
    /// What was freed, bytes.
    pub bytes: u64,
}

impl HubCache {
    /// The cache that these options and the environment name.
    pub fn of(options: &HubOptions) -> Self {
        Self { dir: Settings::of(options).cache_dir }
    }

    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The models that are there, by their ids. Files are not hashed for this.
    ///
    /// # Errors
    /// [`HubError::Io`].
    pub fn models(&self) -> Result<Vec<CachedModel>, HubError> {
        let repositories = RepositoryCache::all(&self.dir).map_err(|source| io_error(&self.dir, source))?;
        repositories.iter().map(|cache| describe(cache).map_err(|source| io_error(cache.dir(), source))).collect()
    }

    /// Removes a model from the cache, or one revision of it: what other revisions have, too, stays. Also what another
    /// tool downloaded is removed.
    ///
    /// # Errors
    /// [`HubError::NothingCached`]; [`HubError::InUse`], where a helion process uses it, and then nothing is removed.
    pub fn remove(&self, model: &str, revision: Option<&str>) -> Result<Removed, HubError> {
        let cache = RepositoryCache::new(&self.dir, model);
        let nothing = || HubError::NothingCached {
            model: model.to_owned(),
            cache: self.dir.clone(),
            revision: revision.map(str::to_owned),
        };
        if super::split_id(model).is_none() || !cache.dir().is_dir() {
            return Err(nothing());
        }
        let failed = |source| io_error(cache.dir(), source);
        let commits = commits(&cache).map_err(failed)?;
        match revision {
            None => Removing { cache: &cache, commits: &commits }.everything(),
            Some(revision) => {
                let commit = if super::is_revision(revision) { cache.commit(revision) } else { None };
                let commit = commit.filter(|commit| commits.contains(commit)).ok_or_else(nothing)?;
                match commits.as_slice() {
                    [_] => Removing { cache: &cache, commits: &commits }.everything(),
                    _ => Removing { cache: &cache, commits: &commits }.one(&commit),
                }
            }
        }
    }
}

/// The commits of which something is there.
fn commits(cache: &RepositoryCache) -> io::Result<Vec<String>> {
    let dirs = children(&cache.snapshots())?;
    Ok(dirs.iter().filter_map(|dir| Some(dir.file_name()?.to_str()?.to_owned())).collect())
}

fn describe(cache: &RepositoryCache) -> io::Result<CachedModel> {
    let refs = refs(&cache.refs())?;
    let mut revisions = Vec::new();
    for commit in commits(cache)? {
        let dir = cache.snapshot(&commit);
        let sizes: Vec<u64> = children(&dir)?.iter().filter(|file| file.is_file()).map(|file| size(file)).collect();
        revisions.push(CachedRevision {
            refs: refs.get(&commit).cloned().unwrap_or_default(),
            files: sizes.len(),
            bytes: sizes.iter().sum(),
            complete: is_complete(cache, &commit, &dir),
            commit,
        });
    }
    let blobs = children(&cache.blobs())?;
    let (incomplete, whole): (Vec<_>, Vec<_>) =
        blobs.iter().partition(|path| path.extension().is_some_and(|extension| extension == "incomplete"));
    let total = |paths: &[&PathBuf]| paths.iter().map(|path| size(path)).sum();
    let entries: Vec<String> = entries(cache)?;
    let last_used = entries.iter().filter_map(|blob| usage::last_used(cache, blob)).max();
    let mut in_use = false;
    for blob in &entries {
        in_use |= Removal::of(cache, blob)?.is_none();
    }
    Ok(CachedModel {
        model: cache.model().to_owned(),
        bytes: total(&whole),
        incomplete_bytes: total(&incomplete),
        last_used: last_used.map(in_words),
        in_use,
        revisions,
    })
}

fn in_words(time: SystemTime) -> String {
    DateTime::<Utc>::from(time).to_rfc3339_opts(SecondsFormat::Secs, true)
}

/// The contents that Helion has used.
fn entries(cache: &RepositoryCache) -> io::Result<Vec<String>> {
    let paths = children(&cache.entries())?;
    Ok(paths.iter().filter_map(|path| Some(path.file_name()?.to_str()?.to_owned())).collect())
}

/// The branches and tags that lead to each commit.
fn refs(dir: &Path) -> io::Result<BTreeMap<String, Vec<String>>> {
    let (mut refs, mut dirs) = (BTreeMap::<String, Vec<String>>::new(), vec![dir.to_owned()]);
    while let Some(next) = dirs.pop() {
        for path in children(&next)? {
            let name = path.strip_prefix(dir).ok().and_then(|name| name.to_str()).map(|name| name.replace('\\', "/"));
            match name {
                Some(_) if path.is_dir() => dirs.push(path),
                Some(name) => {
                    let commit = fs::read_to_string(&path).unwrap_or_default().trim().to_owned();
                    refs.entry(commit).or_default().push(name);
                }
                None => {}
            }
        }
    }
    Ok(refs)
}

/// Whether all of a commit that a model consists of is there.
fn is_complete(cache: &RepositoryCache, commit: &str, dir: &Path) -> bool {
    let here = || {
        let names = children(dir).unwrap_or_default();
        names.iter().filter_map(|path| Some(path.file_name()?.to_str()?.to_owned())).collect::<BTreeSet<_>>()
    };
    let names = cache.listing(commit).map_or_else(here, |listing| listing.names());
    let weights = match Layout::read(cache.model(), dir, &names) {
        Ok(Layout::Known(map)) => map.files_with(&|_| true),
        Ok(Layout::Headers(files)) => files,
        Err(_) => return false,
    };
    dir.join(CONFIG).is_file() && weights.iter().all(|file| dir.join(file).is_file())
}

/// The removal of a model or a part of it.
struct Removing<'a> {
    cache: &'a RepositoryCache,
    commits: &'a [String],
}

impl Removing<'_> {
    fn everything(&self) -> Result<Removed, HubError> {
        let cache = self.cache;
        let failed = |source| io_error(cache.dir(), source);
        let entries = entries(cache).map_err(failed)?;
        let _rights = self.rights(entries.iter())?;
        let bytes = children(&cache.blobs()).map_err(failed)?.iter().map(|blob| size(blob)).sum();
        // The links first: nothing that is still named leads nowhere, wherever this stops.
        for dir in [cache.refs(), cache.snapshots(), cache.blobs(), cache.dir().to_owned(), cache.locks().to_owned()] {
            gone(fs::remove_dir_all(dir)).map_err(failed)?;
        }
        Ok(Removed { model: cache.model().to_owned(), commits: self.commits.to_vec(), bytes })
    }

    fn one(&self, commit: &String) -> Result<Removed, HubError> {
        let cache = self.cache;
        let failed = |source| io_error(cache.dir(), source);
        let contents = |commit: &String| -> Result<BTreeSet<String>, HubError> {
            let mut contents = BTreeSet::new();
            for file in children(&cache.snapshot(commit)).map_err(failed)? {
                contents.extend(content_of(&file));
            }
            // What is not whole yet has no link.
            let listing = cache.listing(commit).map(|listing| listing.blobs(commit));
            let begun = listing.into_iter().flatten().filter(|blob| cache.incomplete(blob).is_file());
            contents.extend(begun);
            Ok(contents)
        };
        let mut alone = contents(commit)?;
        for other in self.commits.iter().filter(|other| *other != commit) {
            for shared in contents(other)? {
                alone.remove(&shared);
            }
        }
        let rights = self.rights(alone.iter())?;
        for (name, refs) in refs(&cache.refs()).map_err(failed)? {
            for reference in refs.iter().filter(|_| name == *commit) {
                gone(fs::remove_file(cache.refs().join(reference))).map_err(failed)?;
            }
        }
        gone(fs::remove_file(cache.listing_path(commit))).map_err(failed)?;
        gone(fs::remove_dir_all(cache.snapshot(commit))).map_err(failed)?;
        let mut bytes = 0;
        for blob in &alone {
            bytes += size(&cache.blob(blob)) + size(&cache.incomplete(blob));
            gone(fs::remove_file(cache.blob(blob))).map_err(failed)?;
            gone(fs::remove_file(cache.incomplete(blob))).map_err(failed)?;
        }
        rights.into_iter().try_for_each(Removal::done).map_err(failed)?;
        Ok(Removed { model: cache.model().to_owned(), commits: vec![commit.clone()], bytes })
    }

    /// The rights to remove these contents, all of them.
    fn rights<'b>(&self, blobs: impl Iterator<Item = &'b String>) -> Result<Vec<Removal>, HubError> {
        let right = |blob: &String| {
            let right = Removal::of(self.cache, blob).map_err(|source| io_error(self.cache.entries(), source))?;
            right.ok_or_else(|| HubError::InUse { model: self.cache.model().to_owned(), file: self.name(blob) })
        };
        blobs.map(right).collect()
    }

    /// The name that users know a content by, where it has one.
    fn name(&self, blob: &str) -> String {
        let mut files =
            self.commits.iter().flat_map(|commit| children(&self.cache.snapshot(commit)).unwrap_or_default());
        let file = files.find(|file| content_of(file).as_deref() == Some(blob));
        let name = file.and_then(|file| Some(file.file_name()?.to_str()?.to_owned()));
        name.unwrap_or_else(|| blob.to_owned())
    }
}
