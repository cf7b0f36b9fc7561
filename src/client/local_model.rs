//! The client's own part of a model: its edges, tokenizer and chat template. Its blocks are the swarm's.

use super::ClientError;
use crate::{
    engine::{DeviceChoice, Edges, EdgesOptions},
    model::{
        Dtype, Quant,
        chat::ChatTemplate,
        checkpoint::Checkpoint,
        fingerprint::Fingerprint,
        generation::GenerationDefaults,
        source::{ModelSource, SourceError},
        spec::ModelSpec,
        tokenizer::Tokenizer,
    },
};

/// How the edges are loaded.
#[derive(Debug, Clone, Copy)]
pub struct EdgesChoice {
    /// `None`: as the checkpoint stores them.
    pub dtype: Option<Dtype>,
    /// How embedding and head are quantized.
    pub quant: Quant,
    /// Where they compute.
    pub device: DeviceChoice,
    /// Threads of the head; `None`: one a core.
    pub threads: Option<usize>,
}

/// What a client holds of a model. See the module's docs.
pub struct LocalModel {
    identity: ModelIdentity,
    spec: ModelSpec,
    edges: Edges,
    tokenizer: Tokenizer,
    template: Option<ChatTemplate>,
    defaults: GenerationDefaults,
}

/// What a model is called, and which one exactly.
#[derive(Debug, Clone)]
pub struct ModelIdentity {
    /// What the user called it.
    pub name: String,
    /// What `--model` takes to name it: the hub id, or the path.
    pub argument: String,
    /// Its swarm's prefix.
    pub dht_prefix: String,
    /// Which one exactly.
    pub fingerprint: Fingerprint,
    /// The quantizations in which its peers may serve it (`none` is one, too); any where empty.
    pub quants: Vec<String>,
}

impl ModelIdentity {
    /// What a model is called by default, to be served in any quantization.
    ///
    /// # Errors
    /// Where its fingerprint can't be taken.
    pub async fn of(source: &ModelSource) -> Result<Self, SourceError> {
        Ok(Self {
            name: source.name().to_owned(),
            argument: source.argument().to_owned(),
            dht_prefix: source.default_dht_prefix().to_owned(),
            fingerprint: source.fingerprint().await?,
            quants: Vec::new(),
        })
    }
}

impl LocalModel {
    /// Loads the embedding, the final norm and the head of an open checkpoint, and what turns text into tokens and back.
    ///
    /// # Errors
    /// Where a file is missing or broken; the message names it.
    pub fn load(checkpoint: &Checkpoint, identity: ModelIdentity, choice: EdgesChoice) -> Result<Self, ClientError> {
        let spec = checkpoint.spec().clone();
        let EdgesChoice { dtype, quant, device, threads } = choice;
        let options = EdgesOptions { dtype: dtype.unwrap_or(spec.stored_dtype), quant, device, threads };
        let edges = Edges::load(checkpoint, options)?;
        Ok(Self {
            edges,
            tokenizer: checkpoint.tokenizer()?,
            template: checkpoint.chat_template()?,
            defaults: checkpoint.generation_defaults()?,
            spec,
            identity,
        })
    }

    /// What it is called, and which one exactly.
    pub fn identity(&self) -> &ModelIdentity {
        &self.identity
    }

    /// What the user called it.
    pub fn name(&self) -> &str {
        &self.identity.name
    }

    /// Its shape.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// Embedding, final norm and head.
    pub fn edges(&self) -> &Edges {
        &self.edges
    }

    /// Text to tokens and back.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// Messages to a prompt, where the checkpoint says how.
    pub fn template(&self) -> Option<&ChatTemplate> {
        self.template.as_ref()
    }

    /// Whether a token ends the sequence.
    pub fn is_eos(&self, id: u32) -> bool {
        self.defaults.is_eos(id)
    }
}
