//! What a checkpoint says about generating: where it ends, and which sampling its authors advise.

use std::{
    io,
    path::{Path, PathBuf},
};

use serde::Deserialize;

/// Why `generation_config.json` could not be read. (That there is none is no error.)
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

impl GenerationDefaults {
    /// Reads `generation_config.json` in `dir`, which may be absent. `config_eos` are the end-of-sequence ids of
    /// `config.json`; they count where the file names none.
    ///
    /// # Errors
    /// [`GenerationError::Unreadable`] and [`GenerationError::Malformed`].
    pub fn open(dir: &Path, config_eos: &[u32]) -> Result<Self, GenerationError> {
        let path = dir.join("generation_config.json");
        let file: File = match std::fs::read(&path) {
            Ok(json) => serde_json::from_slice(&json).map_err(|source| GenerationError::Malformed { path, source })?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => File::default(),
            Err(source) => return Err(GenerationError::Unreadable { path, source }),
        };
        let eos_ids = file.eos_token_id.map(Vec::from).filter(|ids| !ids.is_empty());
        Ok(Self {
            eos_ids: eos_ids.unwrap_or_else(|| config_eos.to_vec()),
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

    fn open(json: &str, config_eos: &[u32]) -> Result<GenerationDefaults, GenerationError> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("generation_config.json"), json).unwrap();
        GenerationDefaults::open(dir.path(), config_eos)
    }

    #[test]
    fn eos_is_one_id_or_several() {
        assert_eq!(open(r#"{"eos_token_id": 2}"#, &[9]).unwrap().eos_ids, [2]);
        let several = open(r#"{"eos_token_id": [128001, 128009], "bos_token_id": 128000}"#, &[9]).unwrap();
        assert_eq!((several.eos_ids.as_slice(), several.bos_id), (&[128_001, 128_009][..], Some(128_000)));
        assert!(several.is_eos(128_009) && !several.is_eos(9));
    }

    #[test]
    fn config_json_counts_where_the_file_is_silent() {
        for json in ["{}", r#"{"eos_token_id": null}"#, r#"{"eos_token_id": []}"#] {
            assert_eq!(open(json, &[9, 10]).unwrap().eos_ids, [9, 10], "{json}");
        }
        let absent = GenerationDefaults::open(Path::new("/nonexistent"), &[9]).unwrap();
        assert_eq!(absent, GenerationDefaults { eos_ids: vec![9], ..Default::default() });
    }

    #[test]
    fn sampling_advice_is_kept_as_it_is() {
        let json = r#"{"do_sample": true, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "other": {"x": 1}}"#;
        let advice = open(json, &[]).unwrap().sampling;
        assert_eq!((advice.do_sample, advice.temperature), (Some(true), Some(0.6)));
        assert_eq!((advice.top_k, advice.top_p, advice.min_p), (Some(20), Some(0.95), None));
    }

    #[test]
    fn garbage_is_named() {
        let error = open(r#"{"eos_token_id": "two"}"#, &[]).unwrap_err().to_string();
        assert!(error.contains("generation_config.json"), "{error}");
        assert!(open("{", &[]).is_err());
    }
}
