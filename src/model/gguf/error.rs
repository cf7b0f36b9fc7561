//! What can be wrong with a GGUF file.

use std::{io, path::PathBuf};

use crate::model::family::ConfigError;

/// Why a GGUF file can't be used.
#[derive(Debug, thiserror::Error)]
pub enum GgufError {
    /// The operating system refused.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file is something else, or of a version that isn't read.
    #[error("{} can't be read as GGUF: {reason}", path.display())]
    NotGguf {
        /// The file.
        path: PathBuf,
        /// What it is instead.
        reason: String,
    },
    /// The file ends too early.
    #[error("{} is truncated: it has {found} bytes and should have at least {expected}; download it again", path.display())]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Its length.
        found: u64,
        /// The length that its header says.
        expected: u64,
    },
    /// The file contradicts itself or goes beyond what a model needs.
    #[error("{} is not a usable GGUF file: {reason}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Not all parts of a split model are there.
    #[error(
        "{} is one of the {count} parts of a model, and these are not beside it: {}", path.display(), missing.join(", ")
    )]
    MissingParts {
        /// The part that was asked for.
        path: PathBuf,
        /// How many there should be.
        count: usize,
        /// The names of those that aren't there.
        missing: Vec<String>,
    },
    /// A folder holds more than one model.
    #[error("{} holds several GGUF models ({}): name the file of one", dir.display(), models.join(", "))]
    SeveralModels {
        /// The folder.
        dir: PathBuf,
        /// The models' names.
        models: Vec<String>,
    },
    /// An entry of the metadata is missing, makes no sense, or asks for something that isn't supported.
    #[error("{}: {key}: {reason}", path.display())]
    Metadata {
        /// The file.
        path: PathBuf,
        /// The entry's name.
        key: String,
        /// What is wrong with it.
        reason: String,
    },
    /// No family has that architecture.
    #[error("{}: architecture {architecture:?} is not supported: the supported ones are {supported}", path.display())]
    UnknownArchitecture {
        /// The file.
        path: PathBuf,
        /// What the file says.
        architecture: String,
        /// The names of those that are supported.
        supported: String,
    },
    /// A tensor that the model is not known to have: leaving it out would compute something else.
    #[error("{}: tensor {name:?} is no part of a model of architecture {architecture:?} that is supported", path.display())]
    UnknownTensor {
        /// The file.
        path: PathBuf,
        /// The tensor.
        name: String,
        /// What the file says that it is.
        architecture: String,
    },
    /// What the metadata says amounts to a configuration that can't be used.
    #[error("{}, whose metadata were read as a config.json: {source}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: ConfigError,
    },
}
