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
//!
//! **Nothing is done twice.** A download that was interrupted goes on where it stopped, also in another process, and
//! processes that want the same file wait for the one that fetches it (`download`). Questions that fail for a passing
//! reason are put again, a bounded number of times (`retry`).
//!
//! **The disk is bounded.** Before a download there is room made for it, by removing what Helion downloaded and nobody
//! has used for the longest time (`space`, `usage`). A file stays as long as a [`ModelFiles`] that has it lives.

mod access;
mod cache;
mod cached;
mod download;
mod error;
mod headers;
mod listing;
mod partial;
mod retry;
mod settings;
mod space;
mod usage;
mod weights;

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use futures::{FutureExt, StreamExt, TryStreamExt};

use self::{
    access::Access,
    cache::RepositoryCache,
    download::{Download, Outcome},
    error::io_error,
    headers::{Header, Remote},
    listing::Listing,
    settings::Settings,
    space::Need,
    usage::Claim,
    weights::{Layout, WeightMap},
};
pub use self::{
    cached::{CachedModel, CachedRevision, HubCache, Removed},
    error::{Bytes, HubError, Room},
    headers::StoredTensor,
};
use super::{
    fingerprint::{FileHashes, Fingerprint, FingerprintError, sha256_of_file},
    gguf::model_name,
};

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

/// Headers that are asked for at a time: they are small, and each costs a round trip or two.
const HEADERS_AT_A_TIME: usize = 8;

/// The hub's own limit for ids.
const MAX_ID_BYTES: usize = 96;

/// Where to look for models, and how. What is `None` comes from the environment, as Hugging Face's libraries read it.
#[derive(Clone, Default)]
pub struct HubOptions {
    /// Branch, tag or commit; `main` where absent.
    pub revision: Option<String>,
    /// Access token, for gated and private models. (`HF_TOKEN`, `HUGGING_FACE_HUB_TOKEN`, `HUGGINGFACE_HUB_TOKEN`, the file
    /// `HF_TOKEN_PATH`, or what `hf auth login` stored.)
    pub token: Option<String>,
    /// The hub's cache directory. (`HF_HUB_CACHE`, `HF_HOME`.)
    pub cache_dir: Option<PathBuf>,
    /// Uses what is in the cache and never the network. (Or `HF_HUB_OFFLINE`.)
    pub offline: bool,
    /// The hub's address. (`HF_ENDPOINT`.)
    pub endpoint: Option<String>,
    /// What the weight files that Helion downloads may take in the cache, bytes; where absent, what the disk has to spare.
    pub max_disk_space_bytes: Option<u64>,
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
            .field("max_disk_space_bytes", &self.max_disk_space_bytes)
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
}

/// The files of one checkpoint.
pub struct ModelFiles {
    model: String,
    dir: PathBuf,
    options: HubOptions,
    /// `None` for a directory.
    hub: Option<Hub>,
    /// The files that nobody may remove meanwhile, by name.
    claims: Mutex<BTreeMap<String, Claim>>,
}

impl fmt::Debug for ModelFiles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ModelFiles").field("model", &self.model).field("dir", &self.dir).finish_non_exhaustive()
    }
}

/// A checkpoint on the hub, at one commit.
struct Hub {
    access: Access,
    cache: RepositoryCache,
    cache_dir: PathBuf,
    commit: String,
    offline: bool,
    /// Absent only offline, where the cache was filled by another program.
    listing: Option<Listing>,
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
            return Ok(Self::new(model, path.to_owned(), options, None));
        }
        if split_id(model).is_none() {
            return Err(HubError::NotAModel { model: model.to_owned(), is_file: path.is_file() });
        }
        let revision = options.revision.clone().unwrap_or_else(|| DEFAULT_REVISION.to_owned());
        if !is_revision(&revision) {
            return Err(HubError::Revision { revision });
        }
        let settings = Settings::of(&options);
        let cache = RepositoryCache::new(&settings.cache_dir, model);
        let mut hub = Hub {
            access: Access::new(&settings)?,
            cache,
            cache_dir: settings.cache_dir,
            commit: String::new(),
            offline: settings.offline,
            listing: None,
        };
        hub.settle(model, &revision).await?;
        let files = Self::new(model, hub.cache.snapshot(&hub.commit), options, Some(hub));
        files.fetch_small_files().await?;
        Ok(files)
    }

    fn new(model: &str, dir: PathBuf, options: HubOptions, hub: Option<Hub>) -> Self {
        Self { model: model.to_owned(), dir, options, hub, claims: Mutex::default() }
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
        let files: Vec<String> = self.weight_map().await?.files_with(wanted).into_iter().collect();
        self.fetch(&files).await
    }

    /// The sizes in bytes of the weight files that hold the tensors that `wanted` says yes to, fetched or not; `None` for a
    /// file whose size the hub doesn't tell.
    ///
    /// # Errors
    /// [`HubError`].
    pub async fn weight_files(
        &self,
        wanted: &(dyn Fn(&str) -> bool + Sync),
    ) -> Result<BTreeMap<String, Option<u64>>, HubError> {
        let files = self.weight_map().await?.files_with(wanted);
        let size = |file: &String| match self.listed(file) {
            Some(listed) => listed.size,
            None => fs::metadata(self.dir.join(file)).ok().map(|metadata| metadata.len()),
        };
        Ok(files.into_iter().map(|file| (file.clone(), size(&file))).collect())
    }

    /// All tensors of the checkpoint, by their names in it, from the headers of its weight files. Files that are not there
    /// stay where they are: their headers are read from the hub.
    ///
    /// # Errors
    /// [`HubError`].
    pub async fn stored_tensors(&self) -> Result<BTreeMap<String, StoredTensor>, HubError> {
        let files = self.weight_map().await?.files_with(&|_| true);
        Ok(self.headers(files).await?.into_values().flatten().collect())
    }

    /// The model's fingerprint, over `canonical_config` and all weight files, fetched or not: from the hub's file list,
    /// or by hashing a directory's files (which is remembered).
    ///
    /// # Errors
    /// [`HubError`]: a directory or an offline cache without file list must have all the weight files.
    pub async fn fingerprint(&self, canonical_config: &[u8]) -> Result<Fingerprint, HubError> {
        let mut hashes = Vec::new();
        for file in self.weight_map().await?.files_with(&|_| true) {
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

    /// The fingerprint, where no weight file has to be read for it.
    ///
    /// # Errors
    /// [`HubError`], where it isn't known which weight files there are.
    pub async fn known_fingerprint(&self, canonical_config: &[u8]) -> Result<Option<Fingerprint>, HubError> {
        let files = self.weight_map().await?.files_with(&|_| true);
        let remembered = |file: &str| {
            let state = self.options.hash_cache.as_ref()?;
            FileHashes::at(state).known(&self.dir.join(file))
        };
        let hashes = files.into_iter().map(|file| {
            let listed = self.listed(&file).and_then(listing::File::sha256);
            let sha256 = listed.or_else(|| remembered(&file))?;
            Some((file, sha256))
        });
        let hashes: Option<Vec<_>> = hashes.collect();
        Ok(hashes.map(|hashes| Fingerprint::of(canonical_config, &hashes)))
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
    async fn weight_map(&self) -> Result<WeightMap, HubError> {
        let names = match self.hub.as_ref().and_then(|hub| hub.listing.as_ref()) {
            Some(listing) => listing.names(),
            None => {
                let entries = fs::read_dir(&self.dir).map_err(|source| io_error(&self.dir, source))?;
                entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect()
            }
        };
        match Layout::read(&self.model, &self.dir, &names)? {
            Layout::Known(map) => Ok(map),
            Layout::Headers(files) => Ok(WeightMap::of_headers(&self.headers(files).await?)),
        }
    }

    /// The headers of weight files, by file.
    async fn headers(&self, files: BTreeSet<String>) -> Result<BTreeMap<String, Header>, HubError> {
        let reads: Vec<_> = files
            .into_iter()
            .map(|file| async move { self.header(&file).await.map(|header| (file, header)) }.boxed())
            .collect();
        futures::stream::iter(reads).buffered(HEADERS_AT_A_TIME).try_collect().await
    }

    /// The header of a weight file: from the file, from an earlier question, or from the hub.
    async fn header(&self, file: &str) -> Result<Header, HubError> {
        let wrong = |reason| HubError::Header { file: file.to_owned(), model: self.model.clone(), reason };
        let path = self.dir.join(file);
        if path.is_file() {
            let json = headers::local(&path).map_err(|source| io_error(&path, source))?.map_err(wrong)?;
            return headers::parse(&json, Some(space::size(&path))).map_err(wrong);
        }
        let (Some(hub), Some(listed)) = (&self.hub, self.listed(file)) else {
            return Err(self.lacks(file));
        };
        let kept = hub.cache.header(&listed.blob(&hub.commit));
        if let Some(header) = fs::read(&kept).ok().and_then(|json| headers::parse(&json, listed.size).ok()) {
            return Ok(header);
        }
        if hub.offline {
            return Err(self.lacks(file));
        }
        let url = hub.access.file_url(&self.model, &hub.commit, file);
        let json = Remote { access: &hub.access, model: &self.model, file, url: &url }.header().await?;
        let header = headers::parse(&json, listed.size).map_err(wrong)?;
        cache::replace(&kept, &json).map_err(|source| io_error(&kept, source))?;
        Ok(header)
    }

    /// What to say of a file that isn't there and can't be had.
    fn lacks(&self, file: &str) -> HubError {
        match &self.hub {
            Some(hub) if hub.offline => not_cached(&self.model, &hub.cache_dir, vec![file.to_owned()]),
            _ => HubError::MissingFile { dir: self.dir.clone(), file: file.to_owned() },
        }
    }

    fn listed(&self, file: &str) -> Option<&listing::File> {
        self.hub.as_ref()?.listing.as_ref()?.file(file)
    }

    /// Makes sure of these files, and returns where they are.
    async fn fetch(&self, files: &[String]) -> Result<Vec<PathBuf>, HubError> {
        let absent: Vec<&String> = files.iter().filter(|file| !self.dir.join(file).is_file()).collect();
        let paths = || files.iter().map(|file| self.dir.join(file)).collect();
        let Some(hub) = &self.hub else {
            return match absent.first() {
                Some(file) => Err(self.lacks(file)),
                None => Ok(paths()),
            };
        };
        if hub.offline && !absent.is_empty() {
            return Err(not_cached(&self.model, &hub.cache_dir, absent.into_iter().cloned().collect()));
        }
        for file in files {
            self.claim(hub, file).await?;
        }
        let checks: Vec<_> = files.iter().map(|file| self.is_usable(hub, file).boxed()).collect();
        let usable: Vec<bool> = futures::stream::iter(checks).buffered(DOWNLOADS_AT_A_TIME).try_collect().await?;
        let missing = files.iter().zip(usable).filter(|(_, usable)| !usable).map(|(file, _)| {
            // Online there is a list; what an index names and the list lacks can't be had.
            self.listed(file).ok_or_else(|| self.lacks(file))
        });
        let missing: Vec<&listing::File> = missing.collect::<Result<_, _>>()?;
        self.make_room(hub, &missing).await?;
        // Boxed one by one, or the compiler can't see that a task on any thread may wait for them.
        let fetches: Vec<_> = missing.into_iter().map(|file| self.download(hub, file).boxed()).collect();
        futures::stream::iter(fetches).buffer_unordered(DOWNLOADS_AT_A_TIME).try_collect::<()>().await?;
        Ok(paths())
    }

    /// Keeps others from removing a file, as long as this lives.
    async fn claim(&self, hub: &Hub, file: &str) -> Result<(), HubError> {
        let blob = match self.listed(file) {
            Some(listed) => Some(listed.blob(&hub.commit)),
            None => cache::content_of(&self.dir.join(file)),
        };
        let Some(blob) = blob else { return Ok(()) };
        if !self.claims.lock().unwrap_or_else(PoisonError::into_inner).contains_key(file) {
            let claim = Claim::of(&hub.cache, &blob).await?;
            self.claims.lock().unwrap_or_else(PoisonError::into_inner).insert(file.to_owned(), claim);
        }
        Ok(())
    }

    /// Whether a file is there and as it should be. A damaged one is removed, and an error where no other can be had.
    async fn is_usable(&self, hub: &Hub, file: &str) -> Result<bool, HubError> {
        let path = self.dir.join(file);
        if !path.is_file() {
            return Ok(false);
        }
        match (self.check(file, &path).await, hub.offline) {
            (Ok(()), _) => Ok(true),
            (Err(error @ HubError::Damaged { .. }), false) => {
                tracing::warn!(%error, "downloading it again");
                Ok(false)
            }
            (Err(error), _) => Err(error),
        }
    }

    /// Sees to it that there is room for what is missing of these files.
    async fn make_room(&self, hub: &Hub, files: &[&listing::File]) -> Result<(), HubError> {
        let missing = |file: &&listing::File| {
            let blob = file.blob(&hub.commit);
            if hub.cache.blob(&blob).is_file() {
                return 0;
            }
            file.size.unwrap_or(0).saturating_sub(space::size(&hub.cache.incomplete(&blob)))
        };
        let need = Need {
            model: self.model.clone(),
            cache_dir: hub.cache_dir.clone(),
            bytes: files.iter().map(missing).fold(0, u64::saturating_add),
            limit_bytes: self.options.max_disk_space_bytes,
        };
        let making = tokio::task::spawn_blocking(move || space::make_room(&need));
        making.await.unwrap_or_else(|died| Err(HubError::Hub { reason: died.to_string() }))
    }

    async fn download(&self, hub: &Hub, file: &listing::File) -> Result<(), HubError> {
        let Hub { access, cache, commit, .. } = hub;
        match (Download { access, cache, commit, file, options: &self.options }).run().await? {
            Outcome::Downloaded => Ok(()),
            Outcome::Found => self.check(&file.name, &self.dir.join(&file.name)).await,
        }
    }

    /// Compares a file with the hub's list; removes it where they differ.
    async fn check(&self, file: &str, path: &Path) -> Result<(), HubError> {
        let (Some(hub), Some(listed)) = (&self.hub, self.listed(file)) else { return Ok(()) };
        let size = fs::metadata(path).map_err(|source| io_error(path, source))?.len();
        let wrong = match (listed.size, listed.sha256()) {
            (Some(expected), _) if size != expected => Some(format!("it has {size} bytes instead of {expected}")),
            (_, Some(expected)) if self.hash(file, path.to_owned()).await? != expected => {
                Some("its SHA-256 is not the one of the hub's file list".to_owned())
            }
            _ => None,
        };
        let Some(reason) = wrong else { return Ok(()) };
        let removed = fs::remove_file(path).and_then(|()| hub.cache.remove_blob(&listed.blob(&hub.commit)));
        removed.map_err(|source| io_error(path, source))?;
        Err(HubError::Damaged { file: file.to_owned(), model: self.model.clone(), reason })
    }

    async fn hash(&self, file: &str, path: PathBuf) -> Result<[u8; 32], HubError> {
        hash_file(&self.options, file, path).await
    }
}

impl Hub {
    /// Finds out which commit is meant, and what it has: from the hub, or from the cache where that is enough or all that
    /// can be had.
    async fn settle(&mut self, model: &str, revision: &str) -> Result<(), HubError> {
        let known = self.cache.commit(revision);
        // A commit never changes, so one whose list is kept needs no question.
        let settled = listing::is_commit(revision).then(|| self.cache.listing(revision)).flatten();
        let is_settled = settled.is_some();
        let asked = if self.offline || is_settled { None } else { Some(self.access.ask(model, revision).await) };
        (self.commit, self.listing) = match (asked, known) {
            (Some(Ok((commit, listing))), _) => {
                let kept = self.cache.keep(&commit, &listing).and_then(|()| self.cache.keep_commit(revision, &commit));
                kept.map_err(|source| io_error(self.cache.dir(), source))?;
                (commit, Some(listing))
            }
            // No network is no reason to stop where everything may be there.
            (Some(Err(error)), Some(commit)) if error.is_connection() => {
                tracing::warn!(model, %error, commit, "the hub can't be reached; using the cached revision");
                self.offline = true;
                let listing = self.cache.listing(&commit);
                (commit, listing)
            }
            (Some(Err(error)), _) => return Err(error),
            (None, _) if is_settled => (revision.to_owned(), settled),
            (None, Some(commit)) => {
                let listing = self.cache.listing(&commit);
                (commit, listing)
            }
            (None, None) => return Err(not_cached(model, &self.cache_dir, vec![CONFIG.to_owned()])),
        };
        Ok(())
    }
}

/// A file's SHA-256, remembered or taken on a thread of its own.
pub(super) async fn hash_file(options: &HubOptions, file: &str, path: PathBuf) -> Result<[u8; 32], HubError> {
    let (file, options) = (file.to_owned(), options.clone());
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

/// The swarm's name for a model where the user gives none: the hub id, or the name of a directory or of a GGUF file without
/// its extension, with dots replaced by `-`.
///
/// ```
/// use helion::model::hub::default_dht_prefix;
///
/// assert_eq!(default_dht_prefix("meta-llama/Llama-3.2-1B-Instruct"), "meta-llama/Llama-3-2-1B-Instruct");
/// assert_eq!(default_dht_prefix("/models/Llama-3.2-1B"), "Llama-3-2-1B");
/// assert_eq!(default_dht_prefix("models/Llama-3.2-1B-Q8_0.gguf"), "Llama-3-2-1B-Q8_0");
/// ```
pub fn default_dht_prefix(model: &str) -> String {
    let path = Path::new(model);
    if let Some(name) = model_name(path).filter(|_| !path.is_dir()) {
        return name.replace('.', "-");
    }
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
    fn a_token_is_never_printed() {
        let options = HubOptions { token: Some("hf_secret".to_owned()), ..HubOptions::default() };
        assert!(!format!("{options:?}").contains("secret"));
    }
}
