//! A checkpoint on disk: a folder with `config.json` and safetensors files, as on the Hugging Face hub, or a GGUF file
//! ([`super::gguf`]).
//!
//! A node needs the tensors of its span and nothing else, so opening a checkpoint reads only `config.json` and, where
//! there are several files, their index. A file's header is read when the first of its tensors is asked for, and a
//! tensor's bytes when it is.
//!
//! Bytes are read with positional reads rather than through a memory map. A map needs `unsafe`, because the file may
//! change under it: one that is truncated later kills the process with SIGBUS, which here is an error. Resident memory
//! is then what was asked for, which makes it easy to state and to test.

mod error;
mod matrix;
mod packed;
mod random;
mod shard;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    ops::Range,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

pub use error::CheckpointError;
pub use matrix::{BlockFormat, BlockMatrix, Fp8Matrix, GroupedMatrix, StoredMatrix};
use shard::Shard;
pub(crate) use shard::{read_at, shard_number};

use super::{
    Dtype,
    chat::{ChatError, ChatTemplate},
    family,
    generation::{GenerationDefaults, GenerationError},
    gguf::{self, GgufModel},
    spec::{HeadSpec, LinearSpec, ModelSpec},
    tokenizer::{Tokenizer, TokenizerError},
};

const CONFIG: &str = "config.json";
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// The output head's matrix, where it has one of its own.
pub(super) const HEAD: &str = "lm_head.weight";
/// Rows of embedding and head that are compared at a time: a few MB.
const COMPARED_ROWS: usize = 1024;
/// Far above any configuration or index; keeps a wrong file from being read into memory.
const MAX_JSON_BYTES: u64 = 64 << 20;
/// Prefixes that some checkpoints have and others lack: the base model is saved without them.
const BASE_PREFIXES: [&str; 2] = ["model.", "transformer."];

/// A tensor as it is stored.
#[derive(Debug, Clone)]
pub struct TensorData {
    /// How a value is stored.
    pub dtype: Dtype,
    /// The shape that was asked for and found.
    pub shape: Vec<usize>,
    /// The values, row-major and little-endian.
    pub bytes: Vec<u8>,
}

/// An opened checkpoint. Reading takes `&self`, and may happen from several threads.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    spec: ModelSpec,
    layout: Layout,
    /// Headers that have been read, by file name.
    shards: Mutex<BTreeMap<String, Arc<Shard>>>,
}

#[derive(Debug)]
enum Layout {
    Single,
    /// File by tensor.
    Sharded(BTreeMap<String, String>),
    /// No safetensors: everything is in there.
    Gguf(Arc<GgufModel>),
    /// No files: the numbers are made up.
    Random,
}

#[derive(serde::Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Checkpoint {
    /// Opens the checkpoint in `dir`, reading its configuration and, if it has one, its index; or a GGUF file, by its path
    /// or by that of the folder that it is alone in.
    ///
    /// # Errors
    /// The folder or `config.json` is missing, the model isn't supported, or there are no weights.
    pub fn open(dir: &Path) -> Result<Self, CheckpointError> {
        if let Some(file) = gguf::find(dir)? {
            return Ok(Self::of_gguf(Arc::new(GgufModel::open(&file)?)));
        }
        if !dir.is_dir() {
            return Err(CheckpointError::NoDirectory { dir: dir.to_owned() });
        }
        let path = dir.join(CONFIG);
        let text = read_json(&path)?.ok_or_else(|| CheckpointError::NoConfig { dir: dir.to_owned() })?;
        let spec = family::read_config(&text).map_err(|source| CheckpointError::Config { path, source })?;
        let layout = Layout::find(dir)?;
        Ok(Self { dir: dir.to_owned(), spec, layout, shards: Mutex::default() })
    }

    /// The checkpoint that a GGUF model is.
    pub(super) fn of_gguf(model: Arc<GgufModel>) -> Self {
        let first = model.files().into_iter().next().unwrap_or_default();
        let dir = first.parent().map(Path::to_owned).unwrap_or_default();
        Self { dir, spec: model.spec().clone(), layout: Layout::Gguf(model), shards: Mutex::default() }
    }

    /// A model of this shape whose weights are made up as they are read, to measure its speed. What is packed in the way of a
    /// training library counts as plain numbers; there is neither a tokenizer nor a chat template.
    pub fn random(spec: ModelSpec) -> Self {
        let spec = ModelSpec { packing: None, ..spec };
        Self { dir: PathBuf::new(), spec, layout: Layout::Random, shards: Mutex::default() }
    }

    fn gguf(&self) -> Option<&GgufModel> {
        match &self.layout {
            Layout::Gguf(model) => Some(model),
            _ => None,
        }
    }

    /// Text to token ids and back.
    ///
    /// # Errors
    /// There is no tokenizer, or it isn't understood.
    pub fn tokenizer(&self) -> Result<Tokenizer, TokenizerError> {
        self.gguf().map_or_else(|| Tokenizer::open(&self.dir), GgufModel::tokenizer)
    }

    /// Messages to a prompt; `None` where the checkpoint has no template: it is no chat model.
    ///
    /// # Errors
    /// The template can't be read, or isn't one.
    pub fn chat_template(&self) -> Result<Option<ChatTemplate>, ChatError> {
        self.gguf().map_or_else(|| ChatTemplate::open(&self.dir), GgufModel::chat_template)
    }

    /// Where texts begin and end, and which sampling is advised.
    ///
    /// # Errors
    /// The checkpoint says something about it that isn't understood.
    pub fn generation_defaults(&self) -> Result<GenerationDefaults, GenerationError> {
        match self.gguf() {
            Some(model) => Ok(model.generation_defaults()?),
            None => GenerationDefaults::open(&self.dir),
        }
    }

    /// What the model computes.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// All weight files, by name; they make up the model's identity.
    ///
    /// # Errors
    /// The index names a file that isn't in the folder.
    pub fn weight_files(&self) -> Result<Vec<PathBuf>, CheckpointError> {
        let names: BTreeSet<&str> = match &self.layout {
            Layout::Single => BTreeSet::from([SINGLE]),
            Layout::Sharded(files) => files.values().map(String::as_str).collect(),
            Layout::Gguf(model) => return Ok(model.files()),
            Layout::Random => return Ok(Vec::new()),
        };
        let path = |name: &str| {
            let path = self.dir.join(name);
            if path.is_file() { Ok(path) } else { Err(self.missing_shard(name)) }
        };
        names.into_iter().map(path).collect()
    }

    /// The output head: what the configuration says, but that a head which should be the embedding is a matrix of its own
    /// where the files hold one that differs from it. Then transformers unties the two, too (since version 5), for it is the
    /// configuration that must be wrong.
    ///
    /// # Errors
    /// The two can't be read.
    pub fn head(&self) -> Result<HeadSpec, CheckpointError> {
        let ModelSpec { edges, vocab_size, hidden_size, .. } = &self.spec;
        let own = HEAD.to_owned();
        let untied = match &edges.head {
            HeadSpec::Tied => LinearSpec { weight: own, ..LinearSpec::named("", *vocab_size, *hidden_size, false) },
            HeadSpec::Separate(head) if head.weight == edges.embedding => LinearSpec { weight: own, ..head.clone() },
            HeadSpec::Separate(_) => return Ok(edges.head.clone()),
        };
        if !self.has(HEAD)? {
            return Ok(edges.head.clone());
        }
        let shape = [*vocab_size, *hidden_size];
        for first in (0..*vocab_size).step_by(COMPARED_ROWS) {
            let rows = || std::iter::once(first..(first + COMPARED_ROWS).min(*vocab_size));
            let [one, other] =
                [self.read_rows(&edges.embedding, &shape, rows())?, self.read_rows(HEAD, &shape, rows())?];
            if one.bytes != other.bytes {
                return Ok(HeadSpec::Separate(untied));
            }
        }
        Ok(edges.head.clone())
    }

    /// Whether there is such a tensor.
    fn has(&self, name: &str) -> Result<bool, CheckpointError> {
        match self.find(name) {
            Ok(_) => Ok(true),
            Err(CheckpointError::MissingTensor { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Reads one tensor of floating point numbers, and checks that it has the shape `expected`.
    ///
    /// A name is found in each of its spellings: with and without the prefixes of base models and of multimodal checkpoints.
    ///
    /// # Errors
    /// No file has the tensor, its file is missing or broken, or its shape or dtype is not what it should be.
    pub fn read(&self, name: &str, expected: &[usize]) -> Result<TensorData, CheckpointError> {
        if let Some(model) = self.gguf() {
            return model.read(name, expected);
        }
        if let Layout::Random = self.layout {
            return random::rows(name, expected, std::iter::once(0..expected.first().copied().unwrap_or(1)));
        }
        let (shard, name) = self.find(name)?;
        shard.read(&name, expected)
    }

    /// Like [`Checkpoint::read`], of the rows (entries of the first dimension) in `rows` and nothing else, in that order.
    ///
    /// # Errors
    /// Those of [`Checkpoint::read`], and rows that the tensor hasn't got.
    pub fn read_rows(
        &self,
        name: &str,
        expected: &[usize],
        rows: impl Iterator<Item = Range<usize>>,
    ) -> Result<TensorData, CheckpointError> {
        if let Some(model) = self.gguf() {
            return model.read_rows(name, expected, rows);
        }
        if let Layout::Random = self.layout {
            return random::rows(name, expected, rows);
        }
        let (shard, name) = self.find(name)?;
        shard.read_rows(&name, expected, rows)
    }

    /// Like [`Checkpoint::read`], for a tensor of bytes.
    ///
    /// # Errors
    /// Those of [`Checkpoint::read`].
    pub fn read_bytes(&self, name: &str, expected: &[usize]) -> Result<Vec<u8>, CheckpointError> {
        if let Layout::Random = self.layout {
            return random::bytes(name, expected);
        }
        let (shard, name) = self.find(name)?;
        shard.read_bytes(&name, expected)
    }

    /// Reads a layer's matrix, `[outputs, inputs]`, in the format that it is stored in.
    ///
    /// # Errors
    /// Those of [`Checkpoint::read_rows`]; and of a packed layer, a tensor that it lacks or that contradicts the others.
    pub fn matrix(&self, linear: &LinearSpec) -> Result<StoredMatrix, CheckpointError> {
        if let Some(model) = self.gguf() {
            return model.matrix(linear);
        }
        if let Some(matrix) = packed::read(self, linear)? {
            return Ok(matrix);
        }
        let shape = [linear.stored_rows(), linear.inputs];
        let data = match &linear.rows {
            Some(rows) => self.read_rows(&linear.weight, &shape, rows.runs(linear.outputs)),
            None => self.read(&linear.weight, &shape),
        };
        data.map(StoredMatrix::Floats)
    }

    /// The file that has the tensor, and the spelling of its name there.
    fn find(&self, name: &str) -> Result<(Arc<Shard>, String), CheckpointError> {
        for name in spellings(name) {
            let file = match &self.layout {
                Layout::Single => SINGLE,
                Layout::Sharded(files) => match files.get(&name) {
                    Some(file) => file,
                    None => continue,
                },
                // What is read as bytes is only in safetensors files.
                Layout::Gguf(_) | Layout::Random => continue,
            };
            let shard = self.shard(file)?;
            if shard.has(&name) {
                return Ok((shard, name));
            }
            if let Layout::Sharded(_) = self.layout {
                return Err(CheckpointError::MissingTensor { name, searched: self.dir.join(file) });
            }
        }
        let searched = match &self.layout {
            Layout::Single => SINGLE,
            Layout::Sharded(_) => INDEX,
            Layout::Gguf(_) | Layout::Random => "",
        };
        Err(CheckpointError::MissingTensor { name: name.to_owned(), searched: self.dir.join(searched) })
    }

    fn shard(&self, file: &str) -> Result<Arc<Shard>, CheckpointError> {
        let mut shards = self.shards.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(shard) = shards.get(file) {
            return Ok(shard.clone());
        }
        let path = self.dir.join(file);
        let shard = match Shard::open(&path) {
            Err(CheckpointError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Err(self.missing_shard(file));
            }
            opened => Arc::new(opened?),
        };
        shards.insert(file.to_owned(), shard.clone());
        Ok(shard)
    }

    fn missing_shard(&self, file: &str) -> CheckpointError {
        let named_by = match &self.layout {
            Layout::Single | Layout::Gguf(_) | Layout::Random => CONFIG,
            Layout::Sharded(_) => INDEX,
        };
        CheckpointError::MissingShard { path: self.dir.join(file), named_by: named_by.to_owned() }
    }
}

impl Layout {
    fn find(dir: &Path) -> Result<Self, CheckpointError> {
        let path = dir.join(INDEX);
        if let Some(text) = read_json(&path)? {
            let index: Index = serde_json::from_str(&text)
                .map_err(|error| CheckpointError::BadIndex { path: path.clone(), reason: error.to_string() })?;
            if index.weight_map.is_empty() {
                return Err(CheckpointError::BadIndex { path, reason: "it names no tensors".into() });
            }
            // A file elsewhere than beside the index would let a downloaded index read any file.
            if let Some(file) = index.weight_map.values().find(|file| !is_plain_name(file)) {
                return Err(CheckpointError::BadIndex { path, reason: format!("{file:?} is not a plain file name") });
            }
            return Ok(Self::Sharded(index.weight_map));
        }
        if dir.join(SINGLE).exists() {
            return Ok(Self::Single);
        }
        let files = shard::names_by_number(dir)?;
        if !files.is_empty() {
            // Without an index, the headers of those that are there say what they hold.
            let mut tensors = BTreeMap::new();
            for file in files {
                let names = Shard::open(&dir.join(&file))?.names();
                tensors.extend(names.into_iter().map(|tensor| (tensor, file.clone())));
            }
            return Ok(Self::Sharded(tensors));
        }
        let old = fs::read_dir(dir)
            .map_err(|source| CheckpointError::Io { path: dir.to_owned(), source })?
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| path.extension().is_some_and(|extension| extension == "bin" || extension == "pth"))
            .min();
        Err(match old {
            Some(found) => CheckpointError::OldFormat { found },
            None => CheckpointError::NoWeights { dir: dir.to_owned() },
        })
    }
}

/// The names under which a tensor may be stored: as it is called here, without the base model's prefix, and inside a
/// multimodal checkpoint, whose language model is one part of several.
pub(crate) fn spellings(name: &str) -> Vec<String> {
    let mut names = vec![name.to_owned()];
    if let Some(bare) = BASE_PREFIXES.iter().find_map(|prefix| name.strip_prefix(prefix)) {
        names.extend([bare.to_owned(), format!("model.language_model.{bare}"), format!("language_model.{bare}")]);
    }
    names.push(format!("language_model.{name}"));
    names
}

fn is_plain_name(file: &str) -> bool {
    Path::new(file).file_name().is_some_and(|name| name == file)
}

/// The text of a JSON file; `None` if there is no such file.
fn read_json(path: &Path) -> Result<Option<String>, CheckpointError> {
    let io_error = |source| CheckpointError::Io { path: path.to_owned(), source };
    let length = match fs::metadata(path) {
        Ok(metadata) => metadata.len(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io_error(error)),
    };
    if length > MAX_JSON_BYTES {
        return Err(io_error(io::Error::other(format!("{length} bytes are too many for a JSON file"))));
    }
    fs::read_to_string(path).map(Some).map_err(io_error)
}

#[cfg(test)]
mod tests;
