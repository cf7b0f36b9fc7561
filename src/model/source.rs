//! A model as the user names it: where its files are, what it is called, and which one exactly.
//!
//! A hub id is downloaded as far as it is needed: the configuration and the tokenizer at first, then the files that hold the
//! wanted blocks, or the edges. A directory is used as it is.

use std::{
    collections::HashSet,
    ops::Range,
    path::{Path, PathBuf},
};

use super::{
    checkpoint::{Checkpoint, CheckpointError, spellings},
    family,
    fingerprint::Fingerprint,
    hub::{HubError, HubOptions, ModelFiles, default_dht_prefix},
    spec::{ModelSpec, TensorSpec},
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
    files: ModelFiles,
    spec: ModelSpec,
}

impl ModelSource {
    /// Finds a model and reads its configuration.
    ///
    /// # Errors
    /// Where it is neither a directory nor a model of the hub, or is not supported.
    pub async fn open(model: &str, options: HubOptions) -> Result<Self, SourceError> {
        let files = ModelFiles::resolve(model, options).await?;
        let path = files.dir().join("config.json");
        let text =
            std::fs::read_to_string(&path).map_err(|source| CheckpointError::Io { path: path.clone(), source })?;
        let spec = family::read_config(&text).map_err(|source| CheckpointError::Config { path, source })?;
        let (name, dht_prefix) = match files.revision() {
            Some(_) => (model.to_owned(), default_dht_prefix(model)),
            None => {
                // `.` and `model/..` have names too.
                let full = Path::new(model).canonicalize().unwrap_or_else(|_| Path::new(model).to_owned());
                let name = full.file_name().map_or(model.to_owned(), |name| name.to_string_lossy().into_owned());
                (name, default_dht_prefix(&full.to_string_lossy()))
            }
        };
        Ok(Self { argument: model.to_owned(), name, dht_prefix, files, spec })
    }

    /// What it was opened by: the hub id, or the path.
    pub fn argument(&self) -> &str {
        &self.argument
    }

    /// What it is called: the hub id, or the directory's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The commit on the hub; `None` for a directory.
    pub fn revision(&self) -> Option<&str> {
        self.files.revision()
    }

    /// The prefix that its peers meet under, unless the user wants another one.
    pub fn default_dht_prefix(&self) -> &str {
        &self.dht_prefix
    }

    /// Where its files are.
    pub fn files(&self) -> &ModelFiles {
        &self.files
    }

    /// What it computes.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Which model exactly. A directory's files are hashed, once.
    ///
    /// # Errors
    /// Where a weight file can't be read.
    pub async fn fingerprint(&self) -> Result<Fingerprint, SourceError> {
        Ok(self.files.fingerprint(&self.spec.canonical()).await?)
    }

    /// The same, where no weight file has to be read for it: from the hub's file list, or from hashes that were taken
    /// before.
    ///
    /// # Errors
    /// Where it isn't known which weight files there are.
    pub async fn known_fingerprint(&self) -> Result<Option<Fingerprint>, SourceError> {
        Ok(self.files.known_fingerprint(&self.spec.canonical()).await?)
    }

    /// Fetches the weight files that hold a part of the model, and returns where they are.
    ///
    /// # Errors
    /// Where one can't be had.
    pub async fn fetch(&self, part: &Part) -> Result<Vec<PathBuf>, SourceError> {
        let tensors: Vec<TensorSpec> = match part {
            Part::All => return Ok(self.files.fetch_weights(&|_| true).await?),
            Part::Blocks(blocks) => self.block_tensors(blocks).collect(),
            Part::Edges => self.spec.edge_tensors(),
            Part::BlocksAndEdges(blocks) => self.block_tensors(blocks).chain(self.spec.edge_tensors()).collect(),
        };
        // Checkpoints name tensors in several ways.
        let names: HashSet<String> = tensors.iter().flat_map(|tensor| spellings(&tensor.name)).collect();
        Ok(self.files.fetch_weights(&|name: &str| names.contains(name)).await?)
    }

    fn block_tensors(&self, blocks: &Range<usize>) -> impl Iterator<Item = TensorSpec> {
        blocks.clone().flat_map(|block| self.spec.block_tensors(block))
    }

    /// Opens the checkpoint with the files that hold these blocks.
    ///
    /// # Errors
    /// Where one can't be had.
    pub async fn fetch_blocks(&self, blocks: Range<usize>) -> Result<Checkpoint, SourceError> {
        self.fetch(&Part::Blocks(blocks)).await?;
        Ok(Checkpoint::open(self.files.dir())?)
    }

    /// Opens the checkpoint with the files that hold the edges.
    ///
    /// # Errors
    /// Where one can't be had.
    pub async fn fetch_edges(&self) -> Result<Checkpoint, SourceError> {
        self.fetch(&Part::Edges).await?;
        Ok(Checkpoint::open(self.files.dir())?)
    }
}
