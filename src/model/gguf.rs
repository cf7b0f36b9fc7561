//! Models in GGUF files: configuration, tokenizer, chat template and weights in one file, or split over several.
//!
//! GGUF is llama.cpp's format, and what most quantized models are published in. A file is used as it is: what it says about
//! the model is read into the same [`ModelSpec`] as a checkpoint of the hub (`config`), its tensors are found by their
//! names in the format (`names`), and quantized matrices stay in their blocks. Of the weights only those that are asked
//! for are read, so a node of four blocks doesn't touch the others' bytes.
//!
//! ```text
//! header ─┬─ metadata ─┬─ config ─ family ─► ModelSpec ─ names ─► ModelSpec with GGUF's names
//!         │            └─ vocabulary, chat template, ids that end an answer
//!         └─ tensors ──► rows of any of them, as they are stored
//! ```
//!
//! The architectures are `llama` (Llama, Mistral, Mixtral), `qwen2`, `qwen3`, `qwen3moe`, `gemma3`, `gpt-oss`, `phi2`,
//! `phi3`, `falcon` and `bloom`. A file with a tensor that the model isn't known to have is refused, as it computes something
//! else.

mod config;
mod error;
mod files;
mod header;
mod kinds;
mod metadata;
mod names;
mod splitting;
mod tensors;
mod vocabulary;

use std::{
    collections::BTreeMap,
    fs::File,
    ops::Range,
    path::{Path, PathBuf},
};

use serde_json::{Map, Value as Json};

pub use error::GgufError;
pub use files::{find, model_name};
use header::Header;
use metadata::Metadata;
use tensors::Tensors;

use super::{
    Dtype,
    chat::{self, ChatError, ChatTemplate},
    checkpoint::{CheckpointError, StoredMatrix, TensorData},
    generation::GenerationDefaults,
    hub::StoredTensor,
    spec::{LinearSpec, ModelSpec},
    tokenizer::{Tokenizer, TokenizerError},
};

/// Tokens that end an answer, of which files for chats don't always say so (as in llama.cpp's `llama-vocab.cpp`).
const ENDS_OF_ANSWERS: [&str; 6] =
    ["<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>"];
/// The same of models that answer in several messages, each of which ends with `<|end|>`.
const ENDS_OF_SEVERAL_MESSAGES: [&str; 2] = ["<|return|>", "<|call|>"];

/// An opened GGUF model, of one file or several. Reading takes `&self`, and may happen from several threads.
#[derive(Debug)]
pub struct GgufModel {
    metadata: Metadata,
    tensors: Tensors,
    spec: ModelSpec,
}

impl GgufModel {
    /// Opens the model that the file at `path` holds, or is a part of. Reads the header of each file, and no weights.
    ///
    /// # Errors
    /// A part is missing, or one is broken, or the model isn't supported.
    pub fn open(path: &Path) -> Result<Self, GgufError> {
        let paths = files::parts(path)?;
        let count = paths.len();
        let mut metadata = None;
        let mut parts = Vec::new();
        for (number, path) in paths.into_iter().enumerate() {
            let file = File::open(&path).map_err(|source| GgufError::Io { path: path.clone(), source })?;
            let header = Header::read(&path, &file)?;
            check_part(&header.metadata, number, count)?;
            parts.push((path, file, header.tensors));
            // The first part has all of it, and the others only which part they are.
            metadata.get_or_insert(header.metadata);
        }
        let malformed = |reason: String| GgufError::Malformed { path: path.to_owned(), reason };
        let metadata = metadata.ok_or_else(|| malformed("it has no parts".to_owned()))?;
        let said = metadata.size("split.tensors.count")?;
        let found: usize = parts.iter().map(|(_, _, tensors)| tensors.len()).sum();
        if let Some(said) = said.filter(|said| *said != found) {
            return Err(malformed(format!("its parts have {found} tensors, and should have {said}")));
        }
        let twice = |name: String| malformed(format!("tensor {name:?} is in two parts"));
        let mut tensors = Tensors::new(parts).map_err(twice)?;
        let mut spec = config::read_spec(&metadata, &tensors)?;
        names::rename(&mut spec, &tensors);
        let architecture = config::architecture(&metadata)?;
        if let Some(name) = names::unused(&spec, &tensors) {
            return Err(GgufError::UnknownTensor {
                path: path.to_owned(),
                name: name.to_owned(),
                architecture: architecture.to_owned(),
            });
        }
        names::interleave(&spec, architecture, &mut tensors);
        Ok(Self { metadata, tensors, spec })
    }

    /// What the model computes. Its tensors are called as in the file; an entry of a tensor of several experts has its
    /// number in brackets behind the name.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// The file, or all of them in their order.
    pub fn files(&self) -> Vec<PathBuf> {
        self.tensors.paths().map(Path::to_owned).collect()
    }

    /// Bytes that the weights of the largest block take in memory: packed matrices as they are, the others in `dtype`.
    pub fn largest_block_bytes(&self, dtype: Dtype) -> u64 {
        let block = |index: usize| -> u64 {
            let prefix = format!("blk.{index}.");
            self.tensors
                .names()
                .filter(|name| name.starts_with(&prefix))
                .map(|name| self.tensors.bytes(name, dtype))
                .sum()
        };
        (0..self.spec.num_blocks()).map(block).max().unwrap_or(0)
    }

    /// All tensors, by name.
    pub fn stored_tensors(&self) -> BTreeMap<String, StoredTensor> {
        self.tensors.stored()
    }

    /// Reads a tensor of floating point numbers, and checks that it has the shape `expected`.
    ///
    /// # Errors
    /// There is no such tensor, or it has another shape, or is quantized.
    pub fn read(&self, name: &str, expected: &[usize]) -> Result<TensorData, CheckpointError> {
        self.tensors.read(name, expected)
    }

    /// Like [`GgufModel::read`], of the rows (entries of the first dimension) in `rows` and nothing else, in that order.
    ///
    /// # Errors
    /// Those of [`GgufModel::read`], and rows that the tensor hasn't got.
    pub fn read_rows(
        &self,
        name: &str,
        expected: &[usize],
        rows: impl Iterator<Item = Range<usize>>,
    ) -> Result<TensorData, CheckpointError> {
        self.tensors.read_rows(name, expected, rows)
    }

    /// Reads a layer's matrix, `[outputs, inputs]`, in the format that it is stored in.
    ///
    /// # Errors
    /// Those of [`GgufModel::read_rows`], and a format that can't be computed with.
    pub fn matrix(&self, linear: &LinearSpec) -> Result<StoredMatrix, CheckpointError> {
        let shape = [linear.stored_rows(), linear.inputs];
        match &linear.rows {
            Some(rows) => self.tensors.matrix(&linear.weight, shape, rows.runs(linear.outputs)),
            None => self.tensors.matrix(&linear.weight, shape, std::iter::once(0..linear.outputs)),
        }
    }

    /// Text to token ids and back, as the model's tokenizer on the hub does it.
    ///
    /// # Errors
    /// [`TokenizerError::Gguf`]: the file has no vocabulary, or one of a kind that isn't known.
    pub fn tokenizer(&self) -> Result<Tokenizer, TokenizerError> {
        let built = vocabulary::tokenizer(&self.metadata);
        built.map(Tokenizer::of).map_err(|error| TokenizerError::Gguf(Box::new(error)))
    }

    /// The chat template; `None` where the file has none: it is no chat model.
    ///
    /// # Errors
    /// [`ChatError::Malformed`].
    pub fn chat_template(&self) -> Result<Option<ChatTemplate>, ChatError> {
        const TEMPLATE: &str = "tokenizer.chat_template";
        let malformed = |reason: String| ChatError::Malformed { path: self.metadata.path().to_owned(), reason };
        let text = |key: &str| self.metadata.text(key).map_err(|error| malformed(error.to_string()));
        let mut templates = BTreeMap::new();
        if let Some(template) = text(TEMPLATE)? {
            templates.insert(chat::DEFAULT.to_owned(), template.to_owned());
        }
        let names = self.metadata.texts("tokenizer.chat_templates").map_err(|error| malformed(error.to_string()))?;
        for name in names.unwrap_or_default() {
            if let Some(template) = text(&format!("{TEMPLATE}.{name}"))? {
                templates.insert(name.to_owned(), template.to_owned());
            }
        }
        let tokens = self.metadata.texts(vocabulary::TOKENS).map_err(|error| malformed(error.to_string()))?;
        let mut special = Map::new();
        for (name, key) in [
            ("bos_token", vocabulary::BOS),
            ("eos_token", vocabulary::EOS),
            ("unk_token", "tokenizer.ggml.unknown_token_id"),
            ("sep_token", "tokenizer.ggml.seperator_token_id"),
            ("pad_token", "tokenizer.ggml.padding_token_id"),
        ] {
            let id = self.metadata.id(key).map_err(|error| malformed(error.to_string()))?;
            let token = id.and_then(|id| tokens.as_ref()?.get(id as usize).copied());
            special.extend(token.map(|token| (name.to_owned(), Json::from(token))));
        }
        ChatTemplate::of(templates, special).map_err(malformed)
    }

    /// Where answers end, and how texts begin.
    ///
    /// The ids are those that the file names. Where it has a chat template and names no end of a turn, the well-known ones
    /// that its template writes end an answer too.
    ///
    /// # Errors
    /// An entry of the metadata makes no sense.
    pub fn generation_defaults(&self) -> Result<GenerationDefaults, GgufError> {
        let id = |key: &str| self.metadata.id(key);
        let turn = [id("tokenizer.ggml.eot_token_id")?, id("tokenizer.ggml.eom_token_id")?];
        let mut eos_ids: Vec<u32> = id(vocabulary::EOS)?.into_iter().collect();
        if turn == [None, None] {
            eos_ids.extend(self.ends_of_answers()?);
        } else {
            eos_ids.extend(turn.into_iter().flatten());
        }
        let mut seen = std::collections::BTreeSet::new();
        eos_ids.retain(|id| seen.insert(*id));
        Ok(GenerationDefaults {
            eos_ids,
            bos_id: id(vocabulary::BOS)?,
            pad_id: id("tokenizer.ggml.padding_token_id")?,
            ..GenerationDefaults::default()
        })
    }

    /// The well-known tokens of the vocabulary that end an answer and that the chat template writes.
    fn ends_of_answers(&self) -> Result<Vec<u32>, GgufError> {
        let Some(template) = self.metadata.text("tokenizer.chat_template")? else { return Ok(Vec::new()) };
        let tokens = self.metadata.texts(vocabulary::TOKENS)?.unwrap_or_default();
        let ids = |texts: &[&str]| -> Vec<u32> {
            let ends = |token: &&str| texts.contains(token) && template.contains(*token);
            (0u32..).zip(&tokens).filter(|(_, token)| ends(token)).map(|(id, _)| id).collect()
        };
        let several = ids(&ENDS_OF_SEVERAL_MESSAGES);
        Ok(if several.is_empty() { ids(&ENDS_OF_ANSWERS) } else { several })
    }
}

/// Checks that a file is the part that its name says.
fn check_part(metadata: &Metadata, number: usize, count: usize) -> Result<(), GgufError> {
    const NUMBER: &str = "split.no";
    const COUNT: &str = "split.count";
    let said = metadata.size(COUNT)?.unwrap_or(1).max(1);
    if said != count {
        let name = "parts are named NAME-00001-of-00003.gguf and so on";
        return Err(
            metadata.wrong(COUNT, format!("the model has {said} parts, and the file's name says {count}; {name}"))
        );
    }
    match metadata.size(NUMBER)? {
        Some(said) if count > 1 && said != number => {
            let reason = format!("this is part {} by what it says, and part {} by its name", said + 1, number + 1);
            Err(metadata.wrong(NUMBER, reason))
        }
        _ => Ok(()),
    }
}
