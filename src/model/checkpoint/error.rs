//! What can be wrong with a checkpoint.

use std::{io, ops::Range, path::PathBuf};

use crate::model::{family::ConfigError, gguf::GgufError};

/// Why a checkpoint, or a tensor of it, can't be read.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// There is no such folder.
    #[error("{} is not a directory: give the folder that holds config.json", dir.display())]
    NoDirectory {
        /// What was asked for.
        dir: PathBuf,
    },
    /// A GGUF file can't be used.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// The folder has no `config.json`.
    #[error("{} has no config.json: is it the folder of a checkpoint?", dir.display())]
    NoConfig {
        /// The folder.
        dir: PathBuf,
    },
    /// The configuration can't be used.
    #[error("{}: {source}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: ConfigError,
    },
    /// There are no weights.
    #[error("{} has neither model.safetensors nor model.safetensors.index.json", dir.display())]
    NoWeights {
        /// The folder.
        dir: PathBuf,
    },
    /// There are only weights in PyTorch's old format.
    #[error(
        "{} is in PyTorch's own format, which can run code when it is loaded: convert the checkpoint to safetensors \
         (transformers' save_pretrained does it) or take a revision that has safetensors files", found.display()
    )]
    OldFormat {
        /// One of the files.
        found: PathBuf,
    },
    /// The index is broken.
    #[error("{} is not a usable index: {reason}", path.display())]
    BadIndex {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A weight file isn't there.
    #[error("{} is missing, which {named_by} calls for: download the checkpoint again", path.display())]
    MissingShard {
        /// The file.
        path: PathBuf,
        /// The file that says it should be there.
        named_by: String,
    },
    /// A weight file ends too early.
    #[error("{} is truncated: it has {found} bytes and should have {expected}; download it again", path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Its length.
        found: u64,
        /// The length that its header says.
        expected: u64,
    },
    /// A weight file's header is broken.
    #[error("{} is not a safetensors file: {reason}", path.display())]
    BadHeader {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// No file has the tensor.
    #[error("tensor {name:?} is not in {}", searched.display())]
    MissingTensor {
        /// Its name.
        name: String,
        /// The file or index that should have it.
        searched: PathBuf,
    },
    /// A packed layer lacks one of its tensors.
    #[error(
        "layer {layer:?} has neither floating point numbers in \"{layer}.weight\" nor the tensor \"{layer}.{suffix}\" of its \
         packed ones: config.json and the weight files don't belong together, or the checkpoint is not complete"
    )]
    MissingPart {
        /// What the names of its tensors begin with.
        layer: String,
        /// What is missing.
        suffix: String,
    },
    /// A packed layer's tensors contradict each other or the configuration.
    #[error("layer {layer:?} can't be unpacked: {reason}")]
    BadPacking {
        /// What the names of its tensors begin with.
        layer: String,
        /// What is wrong.
        reason: String,
    },
    /// The tensor isn't stored as it should be.
    #[error("tensor {name:?} in {} is stored as {dtype}: {wanted}", path.display())]
    WrongDtype {
        /// Its name.
        name: String,
        /// The file.
        path: PathBuf,
        /// How it is stored, as the file's format spells it.
        dtype: String,
        /// What it should be.
        wanted: &'static str,
    },
    /// The tensor has fewer rows than were asked for.
    #[error("tensor {name:?} in {} has {count} rows, and not {}..{}", path.display(), rows.start, rows.end)]
    NoSuchRows {
        /// Its name.
        name: String,
        /// The file.
        path: PathBuf,
        /// What was asked for.
        rows: Range<usize>,
        /// How many it has.
        count: usize,
    },
    /// The tensor doesn't have the shape that the configuration implies.
    #[error("tensor {name:?} in {} has shape {found:?}, and the configuration implies {expected:?}", path.display())]
    WrongShape {
        /// Its name.
        name: String,
        /// The file.
        path: PathBuf,
        /// The shape in the file.
        found: Vec<usize>,
        /// The shape that was asked for.
        expected: Vec<usize>,
    },
    /// A tensor of made-up numbers doesn't fit into memory.
    #[error("tensor {name:?} of shape {shape:?} does not fit into this machine's memory")]
    TooLarge {
        /// Its name.
        name: String,
        /// The shape that the configuration implies.
        shape: Vec<usize>,
    },
    /// The operating system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}
