//! Where a checkpoint's files are: in a directory, or on the Hugging Face hub and in its cache.
//!
//! A model is named by a directory or by a hub id (`org/name`). A hub id goes through the cache that all of Hugging
//! Face's libraries share, with their settings (`HF_HOME`, `HF_HUB_CACHE`, `HF_ENDPOINT`, `HF_TOKEN`,
//! `HF_HUB_OFFLINE`), in two steps: [`ModelFiles::resolve`] fetches the small files, then
//! [`ModelFiles::fetch_weights`] those shards that hold the tensors that are asked for. A node of four blocks does not
//! download eighty.
//!
//! **One revision.** The branch or tag is turned into a commit once, and everything is of that commit.
//!
//! **Nothing is taken on trust.** The hub's file list gives size and SHA-256 of every weight file. What was downloaded
//! is checked against it before it is used, and what was in the cache already is checked once
//! ([`FileHashes`] remembers). A file that fails is removed, so that the next attempt
//! starts clean. The list is kept beside the cached files, for the fingerprint and for starts without a network.

mod access;
mod download;
mod error;
mod listing;
mod weights;

use std::{
    collections::BTreeSet,
    env, fmt, fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use futures::{FutureExt, StreamExt, TryStreamExt};
use hf_hub::{HFRepository, RepoTypeModel};

pub use self::error::HubError;
use self::{
    access::Access,
    download::Download,
    listing::{Listing, RepositoryCache},
};
use super::fingerprint::{FileHashes, Fingerprint, FingerprintError, sha256_of_file};

/// The branch that is meant where no revision is named.
const DEFAULT_REVISION: &str = "main";

/// The file without which a directory holds no model.
const CONFIG: &str = "config.json";

/// What is needed of a checkpoint beside its weights, where it is there.
const SMALL_FILES: [&str; 7] = [
    CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    weights::INDEX,
];

/// Files that are downloaded at a time: one connection seldom fills a fast line, and eight don't do so any better.
const DOWNLOADS_AT_A_TIME: usize = 4;

/// The hub's own limit for ids.
const MAX_ID_BYTES: usize = 96;

/// Where to look for models, and how. What is `None` comes from the environment, as Hugging Face's libraries read it.
#[derive(Clone, Default)]
pub struct HubOptions {
    /// Branch, tag or commit; `main` where absent.
    pub revision: Option<String>,
    /// Access token, for gated and private models. (`HF_TOKEN`, or what `hf auth login` stored.)
    pub token: Option<String>,
    /// The hub's cache directory. (`HF_HUB_CACHE`, `HF_HOME`.)
    pub cache_dir: Option<PathBuf>,
    /// Uses what is in the cache and never the network. (Or `HF_HUB_OFFLINE`.)
    pub offline: bool,
    /// The hub's address. (`HF_ENDPOINT`.)
    pub endpoint: Option<String>,
    /// The state file that remembers the hashes of files; where absent, they are taken anew each time.
    pub hash_cache: Option<PathBuf>,
    /// Told how downloads and hashing get on.
    pub progress: Option<Progress>,
}

/// Told how downloads and hashing get on; called often, from any thread, so it must be quick.
pub type Progress = Arc<dyn Fn(&Transfer<'_>) + Send + Sync>;

/// How far one file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transfer<'a> {
    /// The file's name in the checkpoint.
    pub file: &'a str,
    /// What is being done.
    pub stage: Stage,
    /// Bytes done.
    pub done_bytes: u64,
    /// Bytes in all; 0 where that is not known yet.
    pub total_bytes: u64,
}

/// What is being done with a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// It comes over the network.
    Downloading,
    /// Its hash is being taken.
    Hashing,
}

impl fmt::Debug for HubOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HubOptions")
            .field("revision", &self.revision)
            .field("token", &self.token.as_ref().map(|_| "…"))
            .field("cache_dir", &self.cache_dir)
            .field("offline", &self.offline)
            .field("endpoint", &self.endpoint)
            .field("hash_cache", &self.hash_cache)
            .finish_non_exhaustive()
    }
}

impl HubOptions {
    fn report(&self, transfer: &Transfer<'_>) {
        if let Some(progress) = &self.progress {
            progress(transfer);
        }
    }

    fn is_offline(&self) -> bool {
        self.offline || is_true(env::var("HF_HUB_OFFLINE").unwrap_or_default().as_str())
    }
}

/// Hugging Face's reading of a switch in the environment.
fn is_true(value: &str) -> bool {
    ["1", "on", "yes", "true"].contains(&value.to_lowercase().as_str())
}

/// The files of one checkpoint.
pub struct ModelFiles {
    model: String,
    dir: PathBuf,
    options: HubOptions,
    /// `None` for a directory.
    hub: Option<Hub>,
}

impl fmt::Debug for ModelFiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ModelFiles").field("model", &self.model).field("dir", &self.dir).finish_non_exhaustive()
    }
}

/// A checkpoint on the hub, at one commit.
struct Hub {
    repository: HFRepository<RepoTypeModel>,
    endpoint: String,
    commit: String,
    offline: bool,
    /// Absent only offline, where the cache was filled by another program.
    listing: Option<Listing>,
    /// Where the lists and locks of this model are.
    state_dir: PathBuf,
}

impl ModelFiles {
    /// Finds the files of `model`, a directory or a hub id; an existing directory wins. Of a model on the hub the small
    /// files (configuration, tokenizer, index of the shards) are fetched where they aren't in the cache yet.
    ///
    /// Where the hub can't be reached, a revision that is in the cache is used, and that is logged.
    ///
    /// # Errors
    /// [`HubError`], with what to do about it.
    pub async fn resolve(model: &str, options: HubOptions) -> Result<Self, HubError> {
        let path = Path::new(model);
        if path.is_dir() {
            if !path.join(CONFIG).is_file() {
                return Err(HubError::NoConfig { dir: path.to_owned() });
            }
            return Ok(Self { model: model.to_owned(), dir: path.to_owned(), options, hub: None });
        }
        let Some((org, name)) = split_id(model) else {
            return Err(HubError::NotAModel { model: model.to_owned(), is_file: path.is_file() });
        };
        let revision = options.revision.clone().unwrap_or_else(|| DEFAULT_REVISION.to_owned());
        if !is_revision(&revision) {
            return Err(HubError::Revision { revision });
        }
        let access = Access::new(&options)?;
        let cache = RepositoryCache::new(access.cache_dir(), model);
        let mut hub = Hub {
            repository: access.client.model(org, name),
            endpoint: access.client.endpoint().to_owned(),
            commit: String::new(),
            offline: options.is_offline(),
            listing: None,
            state_dir: cache.state_dir(),
        };
        let known = cache.commit(&revision);
        // A commit never changes, so one whose list is kept needs no question.
        let settled = listing::is_commit(&revision) && cache.listing(&revision).is_some();
        let asked = if hub.offline || settled { None } else { Some(access.ask(model, &revision).await) };
        (hub.commit, hub.listing) = match (asked, known) {
            (Some(Ok((commit, listing))), _) => {
                let kept = cache.keep(&commit, &listing).and_then(|()| cache.keep_commit(&revision, &commit));
                kept.map_err(|source| HubError::Io { path: hub.state_dir.clone(), source })?;
                (commit, Some(listing))
            }
            // No network is no reason to stop where everything may be there.
            (Some(Err(error)), Some(commit)) if error.is_connection() => {
                tracing::warn!(model, %error, commit, "the hub can't be reached; using the cached revision");
                hub.offline = true;
                let listing = cache.listing(&commit);
                (commit, listing)
            }
            (Some(Err(error)), _) => return Err(error),
            (None, Some(commit)) => {
                let listing = cache.listing(&commit);
                (commit, listing)
            }
            (None, None) if settled => (revision.clone(), cache.listing(&revision)),
            (None, None) => return Err(not_cached(model, access.cache_dir(), vec![CONFIG.to_owned()])),
        };
        let dir = cache.snapshot(&hub.commit);
        let files = Self { model: model.to_owned(), dir, options, hub: Some(hub) };
        files.fetch_small_files().await?;
        Ok(files)
    }

    /// The directory that holds the configuration, the tokenizer and the weight files that were fetched.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The commit on the hub; `None` for a directory.
    pub fn revision(&self) -> Option<&str> {
        self.hub.as_ref().map(|hub| hub.commit.as_str())
    }

    /// Fetches the weight files that hold the tensors that `wanted` says yes to (by their names in the checkpoint) and
    /// returns where they are, in the order of their names. A checkpoint of a single file is fetched whole. In a
    /// directory the files must be there.
    ///
    /// # Errors
    /// [`HubError`]; what was fetched before stays in the cache.
    pub async fn fetch_weights(&self, wanted: &(dyn Fn(&str) -> bool + Sync)) -> Result<Vec<PathBuf>, HubError> {
        let files: Vec<String> = self.weight_map()?.files_with(wanted).into_iter().collect();
        self.fetch(&files).await
    }

    /// The model's fingerprint, over `canonical_config` and all weight files, fetched or not: from the hub's file list,
    /// or by hashing a directory's files (which is remembered).
    ///
    /// # Errors
    /// [`HubError`]: a directory or an offline cache without file list must have all the weight files.
    pub async fn fingerprint(&self, canonical_config: &[u8]) -> Result<Fingerprint, HubError> {
        let mut hashes = Vec::new();
        for file in self.weight_map()?.files_with(&|_| true) {
            let known = self.listed(&file).and_then(|entry| entry.sha256());
            let sha256 = match known {
                Some(sha256) => sha256,
                None => {
                    let fetched = self.fetch(std::slice::from_ref(&file)).await?;
                    let path = fetched.into_iter().next().unwrap_or_else(|| self.dir.join(&file));
                    self.hash(&file, path).await?
                }
            };
            hashes.push((file, sha256));
        }
        Ok(Fingerprint::of(canonical_config, &hashes))
    }

    async fn fetch_small_files(&self) -> Result<(), HubError> {
        let listing = self.hub.as_ref().and_then(|hub| hub.listing.as_ref());
        let is_there = |file: &str| match listing {
            Some(listing) => listing.file(file).is_some(),
            None => file == CONFIG || self.dir.join(file).exists(),
        };
        let files = SMALL_FILES.into_iter().filter(|file| is_there(file)).map(str::to_owned);
        let files: Vec<String> = files.collect();
        if !files.iter().any(|file| file == CONFIG) {
            return Err(HubError::NoConfig { dir: PathBuf::from(&self.model) });
        }
        self.fetch(&files).await.map(|_| ())
    }

    /// Which tensor is in which file.
    fn weight_map(&self) -> Result<weights::WeightMap, HubError> {
        match self.hub.as_ref().and_then(|hub| hub.listing.as_ref()) {
            Some(listing) => weights::WeightMap::read(&self.model, &self.dir, &listing.names()),
            None => {
                let entries =
                    fs::read_dir(&self.dir).map_err(|source| HubError::Io { path: self.dir.clone(), source })?;
                let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
                let names: BTreeSet<String> = names.collect();
                weights::WeightMap::read(&self.model, &self.dir, &names)
            }
        }
    }

    fn listed(&self, file: &str) -> Option<&listing::File> {
        self.hub.as_ref()?.listing.as_ref()?.file(file)
    }

    /// Makes sure of these files, and returns where they are.
    async fn fetch(&self, files: &[String]) -> Result<Vec<PathBuf>, HubError> {
        let absent = files.iter().filter(|file| !self.dir.join(file).is_file());
        match &self.hub {
            None => {
                if let Some(file) = absent.into_iter().next() {
                    return Err(HubError::MissingFile { dir: self.dir.clone(), file: file.clone() });
                }
            }
            Some(hub) if hub.offline => {
                let absent: Vec<String> = absent.cloned().collect();
                if !absent.is_empty() {
                    return Err(not_cached(&self.model, &self.dir, absent));
                }
            }
            Some(_) => {}
        }
        // Boxed one by one, or the compiler can't see that a task on any thread may wait for them.
        let fetches: Vec<_> = files.iter().map(|file| self.fetch_file(file).boxed()).collect();
        futures::stream::iter(fetches).buffered(DOWNLOADS_AT_A_TIME).try_collect().await
    }

    async fn fetch_file(&self, file: &str) -> Result<PathBuf, HubError> {
        let path = self.dir.join(file);
        let Some(hub) = &self.hub else { return Ok(path) };
        let listed = self.listed(file);
        if path.is_file() {
            match (self.check(file, &path, listed).await, hub.offline) {
                (Ok(()), _) => return Ok(path),
                (Err(error @ HubError::Damaged { .. }), false) => {
                    tracing::warn!(%error, "downloading it again");
                }
                (Err(error), _) => return Err(error),
            }
        }
        let total_bytes = listed.and_then(|entry| entry.size).unwrap_or(0);
        let download = Download { model: &self.model, hub, options: &self.options, file, total_bytes, path: &path };
        download.run().await?;
        self.check(file, &path, listed).await?;
        Ok(path)
    }

    /// Compares a file with the hub's list; removes it where they differ.
    async fn check(&self, file: &str, path: &Path, listed: Option<&listing::File>) -> Result<(), HubError> {
        let Some(listed) = listed else { return Ok(()) };
        let size = fs::metadata(path).map_err(|source| HubError::Io { path: path.to_owned(), source })?.len();
        let wrong = match (listed.size, listed.sha256()) {
            (Some(expected), _) if size != expected => Some(format!("it has {size} bytes instead of {expected}")),
            (_, Some(expected)) if self.hash(file, path.to_owned()).await? != expected => {
                Some("its SHA-256 is not the one of the hub's file list".to_owned())
            }
            _ => None,
        };
        let Some(reason) = wrong else { return Ok(()) };
        download::remove(path).map_err(|source| HubError::Io { path: path.to_owned(), source })?;
        Err(HubError::Damaged { file: file.to_owned(), model: self.model.clone(), reason })
    }

    /// The file's SHA-256, remembered or taken on a thread of its own.
    async fn hash(&self, file: &str, path: PathBuf) -> Result<[u8; 32], HubError> {
        let (file, options) = (file.to_owned(), self.options.clone());
        let hashing = move || {
            let total_bytes = fs::metadata(&path).map_or(0, |metadata| metadata.len());
            let mut done_bytes = 0;
            let mut progress = |read| {
                done_bytes += read;
                options.report(&Transfer { file: &file, stage: Stage::Hashing, done_bytes, total_bytes });
            };
            match &options.hash_cache {
                Some(state) => FileHashes::at(state).sha256(&path, &mut progress),
                None => sha256_of_file(&path, &mut progress),
            }
        };
        let hashed: Result<_, FingerprintError> =
            tokio::task::spawn_blocking(hashing).await.map_err(|error| HubError::Hub { reason: error.to_string() })?;
        Ok(hashed?)
    }
}

fn not_cached(model: &str, cache: &Path, files: Vec<String>) -> HubError {
    HubError::NotCached { model: model.to_owned(), cache: cache.to_owned(), files }
}

/// Organisation and name of a hub id.
fn split_id(model: &str) -> Option<(&str, &str)> {
    let (org, name) = model.split_once('/')?;
    let allowed = |part: &str| {
        let plain = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        !part.is_empty() && part.chars().all(plain) && !part.starts_with(['.', '-']) && !part.contains("..")
    };
    (model.len() <= MAX_ID_BYTES && allowed(org) && allowed(name)).then_some((org, name))
}

/// Whether the text may be a branch, tag or commit; it becomes a path below `refs/`.
fn is_revision(revision: &str) -> bool {
    let part = |part: &str| !part.is_empty() && !part.starts_with('.') && !part.contains(['\\', ':', '\0']);
    revision.len() <= MAX_ID_BYTES && revision.split('/').all(part)
}

/// The swarm's name for a model where the user gives none: the hub id with dots replaced by `-`, a directory's name.
///
/// ```
/// use helion::model::hub::default_dht_prefix;
///
/// assert_eq!(default_dht_prefix("meta-llama/Llama-3.2-1B-Instruct"), "meta-llama/Llama-3-2-1B-Instruct");
/// assert_eq!(default_dht_prefix("/models/Llama-3.2-1B"), "Llama-3-2-1B");
/// ```
pub fn default_dht_prefix(model: &str) -> String {
    let path = Path::new(model);
    let name = if path.is_dir() || split_id(model).is_none() {
        // `.` and `..` have no name of their own, but stand for a directory that has one.
        let real = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let name = path.file_name().or(real.file_name()).map(|name| name.to_string_lossy().into_owned());
        name.unwrap_or_else(|| model.to_owned())
    } else {
        model.to_owned()
    };
    name.replace('.', "-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_two_plain_words() {
        for id in ["meta-llama/Llama-3.2-1B-Instruct", "a/b", "Qwen/Qwen3-0.6B", "o_r-g/n.a.m.e"] {
            assert!(split_id(id).is_some(), "{id}");
        }
        for id in ["", "gpt2", "a/b/c", "../b", "a/..", "./b", "/etc/passwd", "a b/c", "a/b?x", "a/-b", "a/b..c"] {
            assert!(split_id(id).is_none(), "{id}");
        }
        assert!(split_id(&format!("a/{}", "b".repeat(95))).is_none());
    }

    #[test]
    fn revisions_stay_below_their_folder() {
        for revision in ["main", "refs/pr/1", "v1.0", "0123456789abcdef0123456789abcdef01234567"] {
            assert!(is_revision(revision), "{revision}");
        }
        for revision in ["", "..", "../x", "a/../b", "/etc", "a//b", "a\\b", ".hidden"] {
            assert!(!is_revision(revision), "{revision}");
        }
    }

    #[test]
    fn a_directorys_prefix_is_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let model = dir.path().join("my.model");
        fs::create_dir(&model).unwrap();
        assert_eq!(default_dht_prefix(model.to_str().unwrap()), "my-model");
        fs::create_dir(model.join("sub")).unwrap();
        assert_eq!(default_dht_prefix(model.join("sub/..").to_str().unwrap()), "my-model");
        assert_eq!(default_dht_prefix(&format!("{}/", model.display())), "my-model");
    }

    #[test]
    fn switches_are_read_as_hugging_face_reads_them() {
        assert!(["1", "ON", "yes", "True"].into_iter().all(is_true));
        assert!(!["0", "", "no", "false", "2"].into_iter().any(is_true));
    }

    #[test]
    fn a_token_is_never_printed() {
        let options = HubOptions { token: Some("hf_secret".to_owned()), ..HubOptions::default() };
        assert!(!format!("{options:?}").contains("secret"));
    }
}
