//! A model as the user names it: where its files are, what it is called, and which one exactly.
//!
//! A hub id is downloaded as far as it is needed: the configuration and the tokenizer at first, then the files that hold the
//! wanted blocks, or the edges. A directory is used as it is, and so is a GGUF file.

use std::{
    collections::{BTreeMap, HashSet},
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    Dtype, KvDtype, Quant,
    checkpoint::{Checkpoint, CheckpointError, HEAD, spellings},
    family,
    fingerprint::{FileHashes, Fingerprint},
    gguf::{self, GgufError, GgufModel},
    hub::{HubError, HubOptions, ModelFiles, StoredTensor, default_dht_prefix, hash_file},
    spec::ModelSpec,
};

/// Why a model can't be used.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// Its files can't be had.
    #[error(transparent)]
    Files(#[from] HubError),
    /// Its files make no sense.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// A GGUF file can't be used.
    #[error(transparent)]
    Gguf(#[from] GgufError),
}

/// A part of a model's weights. A file that holds some of it is fetched whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// Every weight file.
    All,
    /// These blocks: what a node needs.
    Blocks(Range<usize>),
    /// The embedding, the final norm and the head: what a client needs.
    Edges,
    /// Both.
    BlocksAndEdges(Range<usize>),
}

/// A model whose configuration is known. See the module's docs.
pub struct ModelSource {
    argument: String,
    name: String,
    dht_prefix: String,
    files: Files,
    spec: ModelSpec,
}

/// Where a model's weights are.
enum Files {
    /// In a directory, or on the hub.
    Model(Box<ModelFiles>),
    /// In a GGUF file, or several.
    Gguf { model: Arc<GgufModel>, options: HubOptions },
}

impl ModelSource {
    /// Finds a model and reads its configuration.
    ///
    /// # Errors
    /// Where it is neither a directory nor a GGUF file nor a model of the hub, or is not supported.
    pub async fn open(model: &str, options: HubOptions) -> Result<Self, SourceError> {
        // `.` and `model/..` have names too.
        let full = Path::new(model).canonicalize().unwrap_or_else(|_| Path::new(model).to_owned());
        let in_directory = || full.file_name().map_or(model.to_owned(), |name| name.to_string_lossy().into_owned());
        if let Some(file) = gguf::find(Path::new(model))? {
            // A folder has its own name, and a file what it is called without the extension.
            let name =
                if full.is_dir() { in_directory() } else { gguf::model_name(&file).unwrap_or_else(in_directory) };
            let opened = GgufModel::open(&file)?;
            return Ok(Self {
                argument: model.to_owned(),
                dht_prefix: name.replace('.', "-"),
                name,
                spec: opened.spec().clone(),
                files: Files::Gguf { model: Arc::new(opened), options },
            });
        }
        let files = ModelFiles::resolve(model, options).await?;
        let path = files.dir().join("config.json");
        let text =
            std::fs::read_to_string(&path).map_err(|source| CheckpointError::Io { path: path.clone(), source })?;
        let spec = family::read_config(&text).map_err(|source| CheckpointError::Config { path, source })?;
        let (name, dht_prefix) = match files.revision() {
            Some(_) => (model.to_owned(), default_dht_prefix(model)),
            None => (in_directory(), default_dht_prefix(&full.to_string_lossy())),
        };
        Ok(Self { argument: model.to_owned(), name, dht_prefix, files: Files::Model(Box::new(files)), spec })
    }

    /// What it was opened by: the hub id, or the path.
    pub fn argument(&self) -> &str {
        &self.argument
    }

    /// What it is called: the hub id, or the name of the directory or of the file without its extension.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The commit on the hub; `None` for local files.
    pub fn revision(&self) -> Option<&str> {
        match &self.files {
            Files::Model(files) => files.revision(),
            Files::Gguf { .. } => None,
        }
    }

    /// The prefix that its peers meet under, unless the user wants another one.
    pub fn default_dht_prefix(&self) -> &str {
        &self.dht_prefix
    }

    /// The directory that its files are in.
    pub fn dir(&self) -> PathBuf {
        match &self.files {
            Files::Model(files) => files.dir().to_owned(),
            Files::Gguf { model, .. } => {
                let files = model.files();
                files.first().and_then(|file| file.parent()).map(Path::to_owned).unwrap_or_default()
            }
        }
    }

    /// Bytes of the largest block: its weights, packed as they are or as `quant` says or in `dtype`, and its part of a KV
    /// cache of `cache_tokens` tokens.
    pub fn largest_block_bytes(&self, dtype: Dtype, quant: Quant, cache: (KvDtype, usize)) -> u64 {
        let (kv_dtype, cache_tokens) = cache;
        let planned = |tokens: usize| self.spec.largest_block_bytes(dtype, quant, (kv_dtype, tokens));
        match &self.files {
            // All blocks have the same cache, so the rest is the weights.
            Files::Gguf { model, .. } if quant == Quant::Auto => {
                model.largest_block_bytes(dtype) + planned(cache_tokens) - planned(0)
            }
            _ => planned(cache_tokens),
        }
    }

    /// What it computes.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Which model exactly. Local files are hashed, once.
    ///
    /// A GGUF model's name doesn't count, only the number of each part: who downloads a file may call it as they like.
    ///
    /// # Errors
    /// Where a weight file can't be read.
    pub async fn fingerprint(&self) -> Result<Fingerprint, SourceError> {
        let canonical = self.spec.canonical();
        match &self.files {
            Files::Model(files) => Ok(files.fingerprint(&canonical).await?),
            Files::Gguf { model, options } => {
                let mut hashes = Vec::new();
                for (part, path) in model.files().into_iter().enumerate() {
                    hashes.push((part_name(part), hash_file(options, &file_name(&path), path.clone()).await?));
                }
                Ok(Fingerprint::of(&canonical, &hashes))
            }
        }
    }

    /// The same, where no weight file has to be read for it: from the hub's file list, or from hashes that were taken
    /// before.
    ///
    /// # Errors
    /// Where it isn't known which weight files there are.
    pub async fn known_fingerprint(&self) -> Result<Option<Fingerprint>, SourceError> {
        let canonical = self.spec.canonical();
        match &self.files {
            Files::Model(files) => Ok(files.known_fingerprint(&canonical).await?),
            Files::Gguf { model, options } => {
                let Some(state) = &options.hash_cache else { return Ok(None) };
                let parts = model.files().into_iter().enumerate();
                let known = parts.map(|(part, path)| Some((part_name(part), FileHashes::at(state).known(&path)?)));
                let hashes: Option<Vec<_>> = known.collect();
                Ok(hashes.map(|hashes| Fingerprint::of(&canonical, &hashes)))
            }
        }
    }

    /// All tensors of the model, by their names in the weight files, from the headers of these. Files on the hub stay there.
    ///
    /// # Errors
    /// Where a header can't be had or read.
    pub async fn stored_tensors(&self) -> Result<BTreeMap<String, StoredTensor>, SourceError> {
        match &self.files {
            Files::Model(files) => Ok(files.stored_tensors().await?),
            Files::Gguf { model, .. } => Ok(model.stored_tensors()),
        }
    }

    /// The weight files' names and sizes in bytes, fetched or not; `None` for a file whose size the hub doesn't tell.
    ///
    /// # Errors
    /// Where it isn't known which weight files there are.
    pub async fn weight_files(&self) -> Result<BTreeMap<String, Option<u64>>, SourceError> {
        match &self.files {
            Files::Model(files) => Ok(files.weight_files(&|_| true).await?),
            Files::Gguf { model, .. } => {
                let size = |path: &Path| std::fs::metadata(path).ok().map(|metadata| metadata.len());
                Ok(model.files().iter().map(|path| (file_name(path), size(path))).collect())
            }
        }
    }

    /// Fetches the weight files that hold a part of the model, and returns where they are. A GGUF model's are there.
    ///
    /// # Errors
    /// Where one can't be had.
    pub async fn fetch(&self, part: &Part) -> Result<Vec<PathBuf>, SourceError> {
        let files = match &self.files {
            Files::Model(files) => files,
            Files::Gguf { model, .. } => return Ok(model.files()),
        };
        let tensors: Vec<String> = match part {
            Part::All => return Ok(files.fetch_weights(&|_| true).await?),
            Part::Blocks(blocks) => self.block_tensors(blocks).collect(),
            Part::Edges => self.edge_tensors().collect(),
            Part::BlocksAndEdges(blocks) => self.block_tensors(blocks).chain(self.edge_tensors()).collect(),
        };
        // Checkpoints name tensors in several ways.
        let names: HashSet<String> = tensors.iter().flat_map(|name| spellings(name)).collect();
        Ok(files.fetch_weights(&|name: &str| names.contains(name)).await?)
    }

    fn block_tensors(&self, blocks: &Range<usize>) -> impl Iterator<Item = String> {
        blocks.clone().flat_map(|block| self.spec.block_tensors(block)).map(|tensor| tensor.name)
    }

    fn edge_tensors(&self) -> impl Iterator<Item = String> {
        // Files may hold a head even where it should be the embedding.
        self.spec.edge_tensors().into_iter().map(|tensor| tensor.name).chain([HEAD.to_owned()])
    }

    /// Opens the checkpoint with the files that hold these blocks.
    ///
    /// # Errors
    /// Where one can't be had.
    pub async fn fetch_blocks(&self, blocks: Range<usize>) -> Result<Checkpoint, SourceError> {
        self.open_part(&Part::Blocks(blocks)).await
    }

    /// Opens the checkpoint with the files that hold the edges.
    ///
    /// # Errors
    /// Where one can't be had.
    pub async fn fetch_edges(&self) -> Result<Checkpoint, SourceError> {
        self.open_part(&Part::Edges).await
    }

    /// Opens the checkpoint with the files that hold a part of it.
    ///
    /// # Errors
    /// Where one can't be had.
    pub async fn open_part(&self, part: &Part) -> Result<Checkpoint, SourceError> {
        match &self.files {
            Files::Model(files) => {
                self.fetch(part).await?;
                Ok(Checkpoint::open(files.dir())?)
            }
            Files::Gguf { model, .. } => Ok(Checkpoint::of_gguf(model.clone())),
        }
    }
}

/// What a part of a GGUF model counts as in its fingerprint.
fn part_name(part: usize) -> String {
    format!("{part:05}.gguf")
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}
