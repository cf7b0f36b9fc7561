//! What a model takes: parameters, bytes for weights and KV cache in each format, and how much of it fits where.
//!
//! Nothing is loaded for this, and of a model on the hub no weights are downloaded: the configuration says what the tensors
//! are, and the headers of the weight files, which can be read alone, how they are stored.

use std::{collections::BTreeMap, ops::Range};

use serde::Serialize;

use super::{
    Dtype, KvDtype, Quant,
    checkpoint::spellings,
    fingerprint::Fingerprint,
    hub::StoredTensor,
    source::{ModelSource, SourceError},
    spec::{FfnSpec, HeadSpec, ModelSpec, TensorSpec, Values},
};

/// The formats that are reckoned, by the names that `--dtype` and `--quant` have for them.
const FORMATS: [Format; 7] = [
    Format::Floats(Dtype::F32),
    Format::Floats(Dtype::Bf16),
    Format::Floats(Dtype::F16),
    Format::Quantized(Quant::Q8_0),
    Format::Quantized(Quant::Q6K),
    Format::Quantized(Quant::Q4K),
    Format::Quantized(Quant::Q4_0),
];

/// Of the memory that is free, so many tenths may be taken; the rest is the system's and the computation's own.
const USED_TENTHS: u64 = 8;

/// What a model is and takes. All sizes are in bytes.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Inspection {
    /// What it is called: the hub id, or the directory's name.
    pub model: String,
    /// The commit on the hub.
    pub revision: Option<String>,
    /// Which model exactly, where that is known without reading the weights.
    pub fingerprint: Option<Fingerprint>,
    /// The family, as the configuration names it.
    pub family: String,
    /// How many blocks it has.
    pub blocks: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Rows of the embedding.
    pub vocab_size: usize,
    /// The longest sequence, tokens.
    pub context_tokens: usize,
    /// Numbers that were trained.
    pub parameters: Parameters,
    /// As the checkpoint has it.
    pub stored: StoredSizes,
    /// The largest block by format, with matrices in the format and the rest in f32.
    pub block_bytes: BTreeMap<String, u64>,
    /// All blocks by format.
    pub all_blocks_bytes: BTreeMap<String, u64>,
    /// Embedding, final norm and head by format.
    pub edges_bytes: BTreeMap<String, u64>,
    /// What a token takes in the KV cache, by dtype.
    pub kv_bytes_per_token: BTreeMap<String, KvSizes>,
    /// How many blocks fit on this machine.
    pub fits: Fits,
}

/// Numbers of parameters. Packed weights count with the numbers that they stand for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Parameters {
    /// Of the whole model, a head that is tied to the embedding counted once.
    pub total: u64,
    /// Of each block.
    pub blocks: Vec<u64>,
    /// Of the edges.
    pub edges: u64,
}

/// What the weight files have.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StoredSizes {
    /// How numbers are stored, and how many bytes of them there are: `BF16`, `U8`.
    pub dtypes: BTreeMap<String, u64>,
    /// Weight files.
    pub files: usize,
    /// What they take, where the hub says it.
    pub bytes: Option<u64>,
    /// The largest block.
    pub block_bytes: u64,
    /// The edges.
    pub edges_bytes: u64,
}

/// What a token takes in the KV cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct KvSizes {
    /// In the block where it takes most.
    pub block: u64,
    /// In all blocks.
    pub all: u64,
}

/// How many blocks fit on this machine, with their KV cache.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Fits {
    /// Memory that is free now.
    pub free_bytes: u64,
    /// The part of it that blocks may take; the rest is left to the system.
    pub usable_bytes: u64,
    /// The KV cache that is reckoned with, tokens.
    pub cache_tokens: usize,
    /// Blocks by format; the KV cache is in the same dtype, or in bf16 beside quantized weights.
    pub blocks: BTreeMap<String, usize>,
}

/// A format of matrices.
#[derive(Debug, Clone, Copy)]
enum Format {
    Floats(Dtype),
    Quantized(Quant),
}

impl Format {
    fn name(self) -> String {
        match self {
            Self::Floats(dtype) => dtype.to_string(),
            Self::Quantized(quant) => quant.to_string(),
        }
    }

    fn kv_dtype(self) -> Dtype {
        match self {
            Self::Floats(dtype) => dtype,
            Self::Quantized(_) => Dtype::Bf16,
        }
    }

    /// Bytes of a row of `columns` numbers. One that the format's blocks don't divide is in a plainer one, as when a node
    /// quantizes.
    fn row_bytes(self, columns: usize) -> u64 {
        let blocks = match self {
            Self::Floats(_) => None,
            Self::Quantized(quant) => quant.format_for(columns),
        };
        let bytes = match blocks {
            Some(format) => columns / format.numbers() * format.bytes(),
            None => columns * self.kv_dtype().size_in_bytes(),
        };
        bytes as u64
    }

    fn tensor_bytes(self, tensor: &TensorSpec) -> u64 {
        let elements = tensor.elements() as u64;
        match (tensor.values, tensor.shape.as_slice()) {
            // Packed ones stay as they are.
            (Values::Bytes, _) => elements,
            (Values::Packed { bytes }, _) => elements * bytes as u64,
            (Values::Otherwise, _) => 0,
            (Values::Floats, [_, .., columns]) if *columns > 0 => elements / *columns as u64 * self.row_bytes(*columns),
            (Values::Floats, _) => elements * Dtype::F32.size_in_bytes() as u64,
        }
    }
}

/// By format.
fn each(bytes: impl Fn(Format) -> u64) -> BTreeMap<String, u64> {
    FORMATS.into_iter().map(|format| (format.name(), bytes(format))).collect()
}

/// Numbers that a tensor stands for: a byte of MXFP4 holds two, and its scales are none.
fn parameters(tensor: &TensorSpec) -> u64 {
    let elements = tensor.elements() as u64;
    match tensor.values {
        Values::Floats => elements,
        Values::Bytes if tensor.name.ends_with("_blocks") => 2 * elements,
        Values::Bytes | Values::Packed { .. } | Values::Otherwise => 0,
    }
}

/// What the names of a block's tensors begin with: `model.layers.3.`.
fn block_prefix(tensors: &[TensorSpec]) -> Option<&str> {
    let first = &tensors.first()?.name;
    let shared = tensors.iter().fold(first.as_str(), |shared, tensor| {
        let same = shared.bytes().zip(tensor.name.bytes()).take_while(|(a, b)| a == b).count();
        // Names are cut at a `.`, so never within a character.
        shared.get(..same).unwrap_or("")
    });
    Some(&shared[..=shared.rfind('.')?])
}

/// Bytes of the stored tensors under a prefix, in any of its spellings.
fn stored_bytes(stored: &BTreeMap<String, StoredTensor>, prefix: &str) -> u64 {
    let under = |prefix: &String| -> u64 {
        let tensors = stored.range(prefix.clone()..).take_while(|(name, _)| name.starts_with(prefix.as_str()));
        tensors.map(|(_, tensor)| tensor.bytes).sum()
    };
    spellings(prefix).iter().map(under).max().unwrap_or(0)
}

impl StoredSizes {
    fn of(spec: &ModelSpec, stored: &BTreeMap<String, StoredTensor>, files: &BTreeMap<String, Option<u64>>) -> Self {
        let mut dtypes = BTreeMap::new();
        for tensor in stored.values() {
            *dtypes.entry(tensor.dtype.clone()).or_default() += tensor.bytes;
        }
        let block = |index| block_prefix(&spec.block_tensors(index)).map_or(0, |prefix| stored_bytes(stored, prefix));
        let edge = |tensor: &TensorSpec| {
            let mut names = spellings(&tensor.name).into_iter();
            names.find_map(|name| stored.get(&name)).map_or(0, |tensor| tensor.bytes)
        };
        Self {
            dtypes,
            files: files.len(),
            bytes: files.values().copied().sum(),
            block_bytes: (0..spec.num_blocks()).map(block).max().unwrap_or(0),
            edges_bytes: spec.edge_tensors().iter().map(edge).sum(),
        }
    }
}

impl Inspection {
    /// Looks at a model. `cache_tokens` is the KV cache that a node would have.
    ///
    /// # Errors
    /// Where the headers of the weight files can't be had or read.
    pub async fn of(source: &ModelSource, cache_tokens: usize) -> Result<Self, SourceError> {
        let spec = source.spec();
        let stored = source.stored_tensors().await?;
        let files = source.weight_files().await?;
        // What the layers stand for, however they are packed.
        let plain = ModelSpec { packing: None, ..spec.clone() };
        let tensors: Vec<Vec<TensorSpec>> = (0..plain.num_blocks()).map(|block| plain.block_tensors(block)).collect();
        let edges = plain.edge_tensors();
        let bytes = |tensors: &[TensorSpec], format: Format| -> u64 {
            tensors.iter().map(|tensor| format.tensor_bytes(tensor)).sum()
        };
        let count = |tensors: &[TensorSpec]| -> u64 { tensors.iter().map(parameters).sum() };
        let blocks: Vec<u64> = tensors.iter().map(|tensors| count(tensors)).collect();
        let largest = |format| tensors.iter().map(|tensors| bytes(tensors, format)).max().unwrap_or(0);
        let kv = |dtype: KvDtype| {
            let each = spec.blocks.iter().map(|block| {
                let attention = &block.attention;
                (2 * attention.kv_heads * dtype.head_bytes(attention.head_size)) as u64
            });
            KvSizes { block: each.clone().max().unwrap_or(0), all: each.sum() }
        };
        let free_bytes = free_memory_bytes();
        let usable_bytes = usable_memory_bytes(free_bytes);
        let fitting = |format: Format| {
            let block = largest(format) + kv(format.kv_dtype().into()).block * cache_tokens as u64;
            usize::try_from(usable_bytes / block.max(1)).unwrap_or(usize::MAX).min(spec.num_blocks())
        };
        Ok(Self {
            model: source.name().to_owned(),
            revision: source.revision().map(str::to_owned),
            fingerprint: source.known_fingerprint().await?,
            family: spec.model_type.clone(),
            blocks: spec.num_blocks(),
            hidden_size: spec.hidden_size,
            vocab_size: spec.vocab_size,
            context_tokens: spec.max_context,
            parameters: Parameters { total: blocks.iter().sum::<u64>() + count(&edges), blocks, edges: count(&edges) },
            stored: StoredSizes::of(spec, &stored, &files),
            block_bytes: each(largest),
            all_blocks_bytes: each(|format| tensors.iter().map(|tensors| bytes(tensors, format)).sum()),
            edges_bytes: each(|format| bytes(&edges, format)),
            kv_bytes_per_token: [KvDtype::F32, KvDtype::Bf16, KvDtype::F16, KvDtype::Q8]
                .into_iter()
                .map(|dtype| (dtype.to_string(), kv(dtype)))
                .collect(),
            fits: Fits {
                free_bytes,
                usable_bytes,
                cache_tokens,
                blocks: FORMATS.into_iter().map(|format| (format.name(), fitting(format))).collect(),
            },
        })
    }
}

/// What weights take in the formats that they are loaded in, bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WeightBytes {
    /// All of them.
    pub all: u64,
    /// Those that every step reads; `None` for mixtures, where that depends on the experts chosen. Of an embedding that isn't
    /// the head, too, a step reads only some rows, which don't count.
    pub a_step: Option<u64>,
}

impl WeightBytes {
    /// Of some blocks, and of the edges where `edges` says so. Matrices are in `dtype` or packed as `quant` says, the rest in f32;
    /// what the checkpoint has packed counts as it is in `stored`, the tensors of its files.
    pub fn of(
        spec: &ModelSpec,
        (blocks, edges): (Range<usize>, bool),
        (dtype, quant): (Dtype, Quant),
        stored: &BTreeMap<String, StoredTensor>,
    ) -> Self {
        let format = match quant {
            Quant::Auto | Quant::None => Format::Floats(dtype),
            quant => Format::Quantized(quant),
        };
        let keeps_packed = quant == Quant::Auto && !stored.is_empty();
        let plain = ModelSpec { packing: None, ..spec.clone() };
        let spec = if keeps_packed { spec } else { &plain };
        let bytes = |tensor: &TensorSpec| {
            let found = spellings(&tensor.name).into_iter().find_map(|name| stored.get(&name));
            let is_packed = |found: &&StoredTensor| !matches!(found.dtype.as_str(), "F32" | "F16" | "BF16");
            match found.filter(is_packed) {
                Some(packed) if keeps_packed => packed.bytes,
                _ => format.tensor_bytes(tensor),
            }
        };
        let is_mixture = spec.blocks[blocks.clone()].iter().any(|block| matches!(block.ffn, FfnSpec::Experts(_)));
        let of_blocks: u64 = blocks.flat_map(|block| spec.block_tensors(block)).map(|tensor| bytes(&tensor)).sum();
        let edges = if edges { spec.edge_tensors() } else { Vec::new() };
        let own_head = matches!(&spec.edges.head, HeadSpec::Separate(_));
        let looked_up: u64 =
            edges.iter().filter(|tensor| own_head && tensor.name == spec.edges.embedding).map(bytes).sum();
        let all = of_blocks + edges.iter().map(bytes).sum::<u64>();
        Self { all, a_step: (!is_mixture).then_some(all - looked_up) }
    }
}

/// Memory that is free on this machine now, bytes; 0 where the system doesn't say.
pub fn free_memory_bytes() -> u64 {
    let Ok(mut system) = sysinfo::System::new() else { return 0 };
    system.refresh_memory();
    system.available_memory()
}

/// What blocks may take of `free_bytes`: most of it, the rest is the system's.
pub fn usable_memory_bytes(free_bytes: u64) -> u64 {
    free_bytes / 10 * USED_TENTHS
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::model::hub::HubOptions;

    async fn inspect(fixture: &str) -> (ModelSource, Inspection) {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(fixture);
        let source = ModelSource::open(dir.to_str().unwrap(), HubOptions::default()).await.unwrap();
        let inspection = Inspection::of(&source, 1_024).await.unwrap();
        (source, inspection)
    }

    #[test]
    fn rows_are_as_large_as_their_blocks() {
        let row = |quant, columns| Format::Quantized(quant).row_bytes(columns);
        assert_eq!(row(Quant::Q8_0, 64), 68);
        assert_eq!(row(Quant::Q4K, 512), 288);
        assert_eq!(row(Quant::Q4K, 64), row(Quant::Q4_0, 64));
        assert_eq!(row(Quant::Q6K, 64), row(Quant::Q8_0, 64));
        assert_eq!(row(Quant::Q4_0, 40), 80, "no block fits");
        assert_eq!(Format::Floats(Dtype::F32).row_bytes(3), 12);
    }

    #[tokio::test]
    async fn every_stored_byte_is_in_a_block_or_an_edge() {
        let fixtures = ["bloom", "falcon-7b-style", "gpt_oss", "llama", "mixtral", "phi", "phi3", "qwen3", "qwen3_moe"];
        for fixture in fixtures {
            let (source, inspection) = inspect(fixture).await;
            let stored: u64 = inspection.stored.dtypes.values().sum();
            let blocks = inspection.stored.block_bytes * inspection.blocks as u64;
            assert_eq!(blocks + inspection.stored.edges_bytes, stored, "{fixture}");
            // Stored in one float format, that is what is reckoned but for the norms and biases, which are f32.
            if inspection.stored.dtypes.len() == 1 && inspection.stored.dtypes.contains_key("F32") {
                assert_eq!(inspection.block_bytes["f32"], inspection.stored.block_bytes, "{fixture}");
                assert_eq!(inspection.edges_bytes["f32"], inspection.stored.edges_bytes, "{fixture}");
                assert_eq!(inspection.parameters.total * 4, stored, "{fixture}");
            }
            assert_eq!(inspection.blocks, source.spec().num_blocks());
            assert_eq!(inspection.parameters.blocks.len(), inspection.blocks);
            let bytes = &inspection.block_bytes;
            assert!(bytes["f32"] > bytes["q8_0"] && bytes["q8_0"] > bytes["q4_0"], "{fixture}: {bytes:?}");
            let kv = inspection.kv_bytes_per_token["f32"];
            assert_eq!(kv.all, inspection.kv_bytes_per_token["bf16"].all * 2);
            assert!(inspection.kv_bytes_per_token["q8"].all * 2 < kv.all);
            assert!(kv.block * inspection.blocks as u64 >= kv.all && kv.block > 0);
            assert_eq!(inspection.fits.blocks["f32"], inspection.blocks, "such a small model fits anywhere");
        }
    }

    #[tokio::test]
    async fn weights_by_themselves_are_what_is_inspected() {
        for fixture in ["llama", "qwen3", "qwen3_moe", "gpt_oss"] {
            let (source, inspection) = inspect(fixture).await;
            let spec = source.spec();
            let of =
                |blocks, edges, quant| WeightBytes::of(spec, (blocks, edges), (Dtype::Bf16, quant), &BTreeMap::new());
            let blocks = 0..spec.num_blocks();
            let all = of(blocks.clone(), true, Quant::Q8_0);
            assert_eq!(all.all, inspection.all_blocks_bytes["q8_0"] + inspection.edges_bytes["q8_0"], "{fixture}");
            assert_eq!(of(blocks.clone(), false, Quant::Auto).all, inspection.all_blocks_bytes["bf16"], "{fixture}");
            let dense = matches!(fixture, "llama" | "qwen3");
            assert_eq!(all.a_step.is_some(), dense, "{fixture}");
            let stored = source.stored_tensors().await.unwrap();
            let kept = WeightBytes::of(spec, (blocks, true), (Dtype::F32, Quant::Auto), &stored);
            assert!(kept.all >= inspection.stored.dtypes.values().sum(), "{fixture}: {kept:?}");
        }
    }

    #[tokio::test]
    async fn the_vision_part_of_a_checkpoint_is_nobodys() {
        let (_, inspection) = inspect("gemma3").await;
        let stored: u64 = inspection.stored.dtypes.values().sum();
        let read = inspection.stored.block_bytes * inspection.blocks as u64 + inspection.stored.edges_bytes;
        assert!(read < stored && inspection.stored.block_bytes > 0, "{inspection:?}");
    }
}
