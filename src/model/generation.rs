//! What a checkpoint says about generating: where it ends, and which sampling its authors advise.

use std::{
    io,
    path::{Path, PathBuf},
};

use serde::{Deserialize, de::DeserializeOwned};

use super::gguf::GgufError;

/// Why a checkpoint's words about generating could not be read. (That there are none is no error.)
#[derive(Debug, thiserror::Error)]
pub enum GenerationError {
    /// The file is there but can't be read.
    #[error("cannot read {}: {source}", .path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file does not hold what it should.
    #[error("{} is not a generation configuration: {source}", .path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What the parser said, with the line.
        source: serde_json::Error,
    },
    /// A GGUF file's metadata make no sense.
    #[error(transparent)]
    Gguf(#[from] GgufError),
}

/// The defaults of `generation_config.json`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationDefaults {
    /// Ids that end a generation; any of them does. Empty where the checkpoint names none.
    pub eos_ids: Vec<u32>,
    /// The id that begins a text.
    pub bos_id: Option<u32>,
    /// The id that fills up rows of a batch.
    pub pad_id: Option<u32>,
    /// The longest text in tokens, prompt included.
    pub max_length: Option<usize>,
    /// The most new tokens.
    pub max_new_tokens: Option<usize>,
    /// The sampling that the checkpoint's authors advise. It is for the caller to decide whether it counts.
    pub sampling: SamplingAdvice,
}

/// The sampling entries of `generation_config.json`, as they are there.
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
pub struct SamplingAdvice {
    /// Whether to sample at all.
    pub do_sample: Option<bool>,
    /// Softmax temperature.
    pub temperature: Option<f64>,
    /// Nucleus sampling's share of the probability.
    pub top_p: Option<f64>,
    /// How many of the likeliest tokens to keep.
    pub top_k: Option<usize>,
    /// The smallest probability to keep, relative to the likeliest token's.
    pub min_p: Option<f64>,
    /// The factor that makes tokens less likely which occurred already.
    pub repetition_penalty: Option<f64>,
}

/// Some files name one id, some a list.
#[derive(Deserialize)]
#[serde(untagged)]
enum Ids {
    One(u32),
    Many(Vec<u32>),
}

impl From<Ids> for Vec<u32> {
    fn from(ids: Ids) -> Self {
        match ids {
            Ids::One(id) => vec![id],
            Ids::Many(ids) => ids,
        }
    }
}

#[derive(Default, Deserialize)]
struct File {
    eos_token_id: Option<Ids>,
    bos_token_id: Option<u32>,
    pad_token_id: Option<u32>,
    max_length: Option<usize>,
    max_new_tokens: Option<usize>,
    #[serde(flatten)]
    sampling: SamplingAdvice,
}

/// What counts of `config.json`.
#[derive(Default, Deserialize)]
struct Config {
    eos_token_id: Option<Ids>,
    text_config: Option<Box<Self>>,
}

/// Reads a file of a checkpoint; an absent one says nothing.
fn read<T: Default + DeserializeOwned>(dir: &Path, name: &str) -> Result<T, GenerationError> {
    let path = dir.join(name);
    match std::fs::read(&path) {
        Ok(json) => serde_json::from_slice(&json).map_err(|source| GenerationError::Malformed { path, source }),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(T::default()),
        Err(source) => Err(GenerationError::Unreadable { path, source }),
    }
}

impl GenerationDefaults {
    /// Reads `generation_config.json` in `dir`, which may be absent. Where it names no end-of-sequence ids, those of
    /// `config.json` count (of its `text_config`, in a multimodal checkpoint).
    ///
    /// # Errors
    /// [`GenerationError::Unreadable`] and [`GenerationError::Malformed`].
    pub fn open(dir: &Path) -> Result<Self, GenerationError> {
        let file: File = read(dir, "generation_config.json")?;
        let config: Config = read(dir, "config.json")?;
        let config_eos = config.eos_token_id.or(config.text_config.and_then(|text| text.eos_token_id));
        let eos_ids = file.eos_token_id.map(Vec::from).filter(|ids| !ids.is_empty());
        Ok(Self {
            eos_ids: eos_ids.or(config_eos.map(Vec::from)).unwrap_or_default(),
            bos_id: file.bos_token_id,
            pad_id: file.pad_token_id,
            max_length: file.max_length,
            max_new_tokens: file.max_new_tokens,
            sampling: file.sampling,
        })
    }

    /// Whether `id` ends a generation.
    pub fn is_eos(&self, id: u32) -> bool {
        self.eos_ids.contains(&id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(json: &str, config: &str) -> Result<GenerationDefaults, GenerationError> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("generation_config.json"), json).unwrap();
        std::fs::write(dir.path().join("config.json"), config).unwrap();
        GenerationDefaults::open(dir.path())
    }

    const NINE: &str = r#"{"eos_token_id": 9}"#;

    #[test]
    fn eos_is_one_id_or_several() {
        assert_eq!(open(r#"{"eos_token_id": 2}"#, NINE).unwrap().eos_ids, [2]);
        let several = open(r#"{"eos_token_id": [128001, 128009], "bos_token_id": 128000}"#, NINE).unwrap();
        assert_eq!((several.eos_ids.as_slice(), several.bos_id), (&[128_001, 128_009][..], Some(128_000)));
        assert!(several.is_eos(128_009) && !several.is_eos(9));
    }

    #[test]
    fn config_json_counts_where_the_file_is_silent() {
        for json in ["{}", r#"{"eos_token_id": null}"#, r#"{"eos_token_id": []}"#] {
            assert_eq!(open(json, r#"{"eos_token_id": [9, 10]}"#).unwrap().eos_ids, [9, 10], "{json}");
            assert_eq!(open(json, r#"{"text_config": {"eos_token_id": 9}}"#).unwrap().eos_ids, [9], "{json}");
        }
        let absent = GenerationDefaults::open(Path::new("/nonexistent")).unwrap();
        assert_eq!(absent, GenerationDefaults::default());
    }

    #[test]
    fn sampling_advice_is_kept_as_it_is() {
        let json = r#"{"do_sample": true, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "other": {"x": 1}}"#;
        let advice = open(json, "{}").unwrap().sampling;
        assert_eq!((advice.do_sample, advice.temperature), (Some(true), Some(0.6)));
        assert_eq!((advice.top_k, advice.top_p, advice.min_p), (Some(20), Some(0.95), None));
    }

    #[test]
    fn garbage_is_named() {
        let error = open(r#"{"eos_token_id": "two"}"#, "{}").unwrap_err().to_string();
        assert!(error.contains("generation_config.json"), "{error}");
        assert!(open("{", "{}").is_err());
    }
}
