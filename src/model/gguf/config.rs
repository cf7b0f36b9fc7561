//! From a GGUF file's metadata to the configuration that Hugging Face's checkpoint of the same model has.
//!
//! The families already read that one, with all their checks, so a GGUF file needs no second reading of each. What the
//! metadata don't say is taken from the tensors: whether the head is tied, which blocks have experts, which layout of
//! Falcon it is. What neither says is what the architecture's models have in common. Some converters lose things (the
//! window of the first Mistral, for one); a file that lost something computes what it says.

use serde_json::{Map, Value as Json, json};

use super::{
    GgufError,
    kinds::Kind,
    metadata::{Metadata, Value},
    tensors::Tensors,
};
use crate::model::{
    Dtype, family,
    spec::{ModelSpec, NormKind, RopeScaling},
};

/// An architecture of llama.cpp, and what it is called on the hub.
struct Architecture {
    name: &'static str,
    config: fn(&Source<'_>, &mut Map<String, Json>) -> Result<(), GgufError>,
}

const ARCHITECTURES: [Architecture; 10] = [
    Architecture { name: "llama", config: llama },
    Architecture { name: "qwen2", config: qwen2 },
    Architecture { name: "qwen3", config: qwen3 },
    Architecture { name: "qwen3moe", config: qwen3_moe },
    Architecture { name: "gemma3", config: gemma3 },
    Architecture { name: "gpt-oss", config: gpt_oss },
    Architecture { name: "phi2", config: phi2 },
    Architecture { name: "phi3", config: phi3 },
    Architecture { name: "falcon", config: falcon },
    Architecture { name: "bloom", config: bloom },
];

const EMBEDDING: &str = "token_embd.weight";
/// Divisors of the rotary frequencies, in which files keep Llama 3's scaling.
const ROPE_DIVISORS: &str = "rope_freqs.weight";
/// The same of LongRoPE: for short contexts and for long ones.
const LONGROPE_DIVISORS: [&str; 2] = ["rope_factors_short.weight", "rope_factors_long.weight"];
/// Blocks of Gemma 3 27B, the one model of its family whose scores are scaled by another width than a head's.
const GEMMA3_27B_BLOCKS: usize = 62;

/// What the file says that it is.
pub(super) fn architecture(metadata: &Metadata) -> Result<&str, GgufError> {
    const KEY: &str = "general.architecture";
    metadata.text(KEY)?.ok_or_else(|| metadata.missing(KEY))
}

/// Reads what the model computes. The tensors still have their names on the hub.
pub(super) fn read_spec(metadata: &Metadata, tensors: &Tensors) -> Result<ModelSpec, GgufError> {
    let name = architecture(metadata)?;
    let Some(architecture) = ARCHITECTURES.iter().find(|architecture| architecture.name == name) else {
        return Err(GgufError::UnknownArchitecture {
            path: metadata.path().to_owned(),
            architecture: name.to_owned(),
            supported: ARCHITECTURES.map(|architecture| architecture.name).join(", "),
        });
    };
    let source = Source { metadata, tensors, architecture: name };
    source.refuse_unsupported()?;
    let mut config = source.shared()?;
    (architecture.config)(&source, &mut config)?;
    let text = Json::Object(config).to_string();
    let config_error = |source| GgufError::Config { path: metadata.path().to_owned(), source };
    let mut spec = family::read_config(&text).map_err(config_error)?;
    source.divide_frequencies(&mut spec)?;
    if name == "gemma3" {
        weights_hold_the_one(&mut spec);
    }
    Ok(spec)
}

/// Gemma's norms multiply by `1 + weight`; the converter has added the one.
fn weights_hold_the_one(spec: &mut ModelSpec) {
    let of_blocks = spec.blocks.iter_mut().flat_map(|block| {
        let of_heads = block.attention.qk_norm.iter_mut().flat_map(|norms| [&mut norms.q, &mut norms.k]);
        let of_outputs = [&mut block.attention_output_norm, &mut block.ffn_output_norm].into_iter().flatten();
        [&mut block.attention_norm, &mut block.ffn_norm].into_iter().chain(of_heads).chain(of_outputs)
    });
    for norm in of_blocks.chain([&mut spec.edges.final_norm]) {
        norm.kind = NormKind::Rms;
    }
}

/// A file's metadata and tensors.
struct Source<'a> {
    metadata: &'a Metadata,
    tensors: &'a Tensors,
    architecture: &'a str,
}

impl Source<'_> {
    /// The full name of an entry.
    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture)
    }

    fn optional_size(&self, name: &str) -> Result<Option<usize>, GgufError> {
        self.metadata.size(&self.key(name))
    }

    fn size(&self, name: &str) -> Result<usize, GgufError> {
        self.optional_size(name)?.ok_or_else(|| self.metadata.missing(&self.key(name)))
    }

    fn optional_number(&self, name: &str) -> Result<Option<f64>, GgufError> {
        self.metadata.number(&self.key(name))
    }

    fn number(&self, name: &str) -> Result<f64, GgufError> {
        self.optional_number(name)?.ok_or_else(|| self.metadata.missing(&self.key(name)))
    }

    fn wrong(&self, name: &str, reason: impl Into<String>) -> GgufError {
        self.metadata.wrong(&self.key(name), reason)
    }

    /// The first dimension of a tensor, which a model can't be without.
    fn rows(&self, tensor: &str) -> Result<usize, GgufError> {
        let rows = self.tensors.shape(tensor).and_then(|shape| shape.first()).copied();
        rows.ok_or_else(|| self.metadata.wrong(tensor, "the file has no such tensor: it holds no whole model"))
    }

    /// What all architectures say alike.
    fn shared(&self) -> Result<Map<String, Json>, GgufError> {
        let dtype = match self.tensors.prevailing_kind() {
            Some(Kind::Floats(dtype)) => dtype,
            // What most models are published in.
            _ => Dtype::Bf16,
        };
        let (hidden, heads) = (self.size("embedding_length")?, self.size("attention.head_count")?);
        let mut config = json!({
            "dtype": match dtype { Dtype::F32 => "float32", Dtype::Bf16 => "bfloat16", Dtype::F16 => "float16" },
            "vocab_size": self.rows(EMBEDDING)?,
            "hidden_size": hidden,
            "num_hidden_layers": self.size("block_count")?,
            "intermediate_size": self.size("feed_forward_length")?,
            "max_position_embeddings": self.size("context_length")?,
            "num_attention_heads": heads,
            "num_key_value_heads": self.optional_size("attention.head_count_kv")?.unwrap_or(heads),
            "tie_word_embeddings": !self.tensors.has("output.weight"),
        });
        let values = self.optional_size("attention.value_length")?;
        if let Some(width) = self.optional_size("attention.key_length")? {
            if values.is_some_and(|values| values != width) {
                return Err(self.wrong("attention.value_length", format!("must be that of keys, {width}")));
            }
            config["head_dim"] = width.into();
        }
        for (field, key) in [
            ("rms_norm_eps", "attention.layer_norm_rms_epsilon"),
            ("layer_norm_eps", "attention.layer_norm_epsilon"),
            ("layer_norm_epsilon", "attention.layer_norm_epsilon"),
        ] {
            if let Some(epsilon) = self.optional_number(key)? {
                config[field] = epsilon.into();
            }
        }
        match config {
            Json::Object(config) => Ok(config),
            // It was written as an object above.
            _ => Ok(Map::new()),
        }
    }

    /// How wide a head is.
    fn head_size(&self) -> Result<usize, GgufError> {
        match self.optional_size("attention.key_length")? {
            Some(width) => Ok(width),
            None => Ok(self.size("embedding_length")? / self.size("attention.head_count")?.max(1)),
        }
    }

    /// The part of a head that is rotated.
    fn rotated_part(&self) -> Result<f64, GgufError> {
        let head_size = self.head_size()?;
        let rotated = self.optional_size("rope.dimension_count")?.unwrap_or(head_size);
        Ok(rotated as f64 / head_size.max(1) as f64)
    }

    /// The rotary positions as `rope_parameters`, for families that rotate whole heads.
    fn rope(&self, default_theta: f64) -> Result<Json, GgufError> {
        if self.rotated_part()? != 1.0 {
            let whole = format!("this architecture rotates whole heads, which are {} wide", self.head_size()?);
            return Err(self.wrong("rope.dimension_count", whole));
        }
        self.rope_parameters(default_theta)
    }

    fn rope_parameters(&self, default_theta: f64) -> Result<Json, GgufError> {
        let theta = self.optional_number("rope.freq_base")?.unwrap_or(default_theta);
        let mut rope = json!({ "rope_type": "default", "rope_theta": theta });
        // The name of the first files.
        if let Some(factor) = self.optional_number("rope.scale_linear")?.filter(|factor| *factor != 1.0) {
            rope["rope_type"] = "linear".into();
            rope["factor"] = factor.into();
        }
        let longrope = LONGROPE_DIVISORS.map(|name| self.tensors.has(name));
        let kind = self.metadata.text(&self.key("rope.scaling.type"))?.unwrap_or("none");
        match kind {
            "none" | "longrope" if longrope == [true, true] => {
                rope["rope_type"] = "longrope".into();
                rope["short_factor"] = self.divisors(LONGROPE_DIVISORS[0])?.into();
                rope["long_factor"] = self.divisors(LONGROPE_DIVISORS[1])?.into();
                if let Some(factor) = self.optional_number("rope.scaling.attn_factor")? {
                    rope["attention_factor"] = factor.into();
                }
            }
            "none" => return Ok(rope),
            "linear" => {
                rope["rope_type"] = "linear".into();
                rope["factor"] = self.number("rope.scaling.factor")?.into();
            }
            "yarn" => {
                rope["rope_type"] = "yarn".into();
                for (field, key) in [
                    ("factor", "rope.scaling.factor"),
                    ("attention_factor", "rope.scaling.yarn_attn_factor"),
                    ("beta_fast", "rope.scaling.yarn_beta_fast"),
                    ("beta_slow", "rope.scaling.yarn_beta_slow"),
                ] {
                    if let Some(number) = self.optional_number(key)? {
                        rope[field] = number.into();
                    }
                }
            }
            "longrope" => {
                let [short, long] = LONGROPE_DIVISORS;
                let reason = format!("needs the tensors {short} and {long}, which are not in the file");
                return Err(self.wrong("rope.scaling.type", reason));
            }
            _ => {
                let kinds = format!("{kind:?} is not supported: the kinds are none, linear, yarn and longrope");
                return Err(self.wrong("rope.scaling.type", kinds));
            }
        }
        if let Some(context) = self.optional_size("rope.scaling.original_context_length")? {
            rope["original_max_position_embeddings"] = context.into();
        }
        Ok(rope)
    }

    /// The numbers of a tensor that rotary frequencies are divided by.
    fn divisors(&self, name: &str) -> Result<Vec<f64>, GgufError> {
        let count = self.rows(name)?;
        // They are decimals in the configurations.
        let decimal = |bytes: &[u8; 4]| {
            let number = f32::from_le_bytes(*bytes);
            number.to_string().parse().unwrap_or(f64::from(number))
        };
        match self.tensors.read(name, &[count]) {
            Ok(data) if data.dtype == Dtype::F32 => Ok(data.bytes.as_chunks().0.iter().map(decimal).collect()),
            Ok(_) => Err(self.metadata.wrong(name, "must be stored in f32")),
            Err(error) => Err(self.metadata.wrong(name, error.to_string())),
        }
    }

    /// Divides the rotary frequencies by the file's table of divisors, where there is one.
    fn divide_frequencies(&self, spec: &mut ModelSpec) -> Result<(), GgufError> {
        if !self.tensors.has(ROPE_DIVISORS) {
            return Ok(());
        }
        let divisors = self.divisors(ROPE_DIVISORS)?;
        if divisors.iter().any(|divisor| !(divisor.is_finite() && *divisor > 0.0)) {
            return Err(self.metadata.wrong(ROPE_DIVISORS, "must be finite numbers above 0"));
        }
        for block in &mut spec.blocks {
            let width = block.attention.head_size;
            let Some(rope) = &mut block.attention.rope else { continue };
            if divisors.len() != rope.width.unwrap_or(width) / 2 || rope.scaling != RopeScaling::Default {
                let reason = format!(
                    "{} divisors are not the one scaling of {} rotary frequencies",
                    divisors.len(),
                    rope.width.unwrap_or(width) / 2
                );
                return Err(self.metadata.wrong(ROPE_DIVISORS, reason));
            }
            rope.scaling = RopeScaling::Divided { divisors: divisors.clone() };
        }
        Ok(())
    }

    /// Refuses what changes the arithmetic and is no part of the supported models. The value beside each name is the one
    /// that changes nothing.
    fn refuse_unsupported(&self) -> Result<(), GgufError> {
        let numbers = [
            ("attention.clamp_kqv", 0.0),
            ("attention.temperature_scale", 0.0),
            ("attn_logit_softcapping", 0.0),
            ("router_logit_softcapping", 0.0),
            ("logit_scale", 1.0),
            ("residual_scale", 1.0),
            ("embedding_scale", 1.0),
            ("expert_shared_count", 0.0),
            ("expert_weights_scale", 1.0),
            // Softmax.
            ("expert_gating_func", 1.0),
            ("nextn_predict_layers", 0.0),
            ("pooling_type", 0.0),
            ("rope.scaling.yarn_ext_factor", 1.0),
            ("rope.scaling.yarn_log_multiplier", 0.0),
        ];
        for (name, neutral) in numbers {
            if let Some(number) = self.optional_number(name)?.filter(|number| *number != neutral && *number != 0.0) {
                return Err(self.wrong(name, format!("{number} is not supported: this architecture has no such part")));
            }
        }
        if self.metadata.flag(&self.key("attention.causal"))? == Some(false) {
            return Err(self.wrong("attention.causal", "only models whose tokens see what precedes them are supported"));
        }
        let sections = self.metadata.value(&self.key("rope.dimension_sections"));
        if matches!(sections, Some(Value::Integers(sections)) if sections.iter().any(|size| *size != 0)) {
            return Err(self.wrong("rope.dimension_sections", "positions in several dimensions are not supported"));
        }
        if self.architecture != "gemma3" && self.optional_number("final_logit_softcapping")?.unwrap_or(0.0) != 0.0 {
            return Err(self.wrong("final_logit_softcapping", "this architecture has no such part"));
        }
        Ok(())
    }

    /// The sliding window, if there is one.
    fn window(&self) -> Result<Option<usize>, GgufError> {
        Ok(self.optional_size("attention.sliding_window")?.filter(|window| *window > 0))
    }

    /// Refuses a window where the family has none in such a file.
    fn refuse_window(&self) -> Result<(), GgufError> {
        let context = self.size("context_length")?;
        match self.window()? {
            Some(window) if window < context => {
                Err(self.wrong("attention.sliding_window", format!("{window}: this architecture has no window")))
            }
            _ => Ok(()),
        }
    }

    /// Which blocks slide, as `layer_types`: those that the file says, or of every `period` all but the last.
    fn block_types(&self, period: usize) -> Result<Json, GgufError> {
        const NAME: &str = "attention.sliding_window_pattern";
        let blocks = self.size("block_count")?;
        let key = self.key(NAME);
        let slides: Vec<bool> = match self.metadata.value(&key) {
            Some(Value::Bools(slides)) => slides.clone(),
            Some(Value::Integers(slides)) => slides.iter().map(|slides| *slides != 0).collect(),
            _ => {
                let period = self.metadata.size(&key)?.unwrap_or(period);
                // Zero: all slide. One: none.
                (0..blocks).map(|block| period == 0 || block % period < period - 1).collect()
            }
        };
        if slides.len() < blocks {
            return Err(self.wrong(NAME, format!("has {} entries for {blocks} blocks", slides.len())));
        }
        let name = |slides: &bool| if *slides { "sliding_attention" } else { "full_attention" };
        Ok(slides[..blocks].iter().map(name).collect())
    }

    /// Says how many experts there are.
    fn experts(&self, config: &mut Map<String, Json>) -> Result<(), GgufError> {
        config.insert("num_local_experts".into(), self.size("expert_count")?.into());
        config.insert("num_experts_per_tok".into(), self.size("expert_used_count")?.into());
        Ok(())
    }

    /// How wide the feed-forward part is where the converter writes four times the hidden size, whatever it is.
    fn inner_width(&self) -> Result<usize, GgufError> {
        self.rows("blk.0.ffn_up.weight")
    }
}

fn insert(config: &mut Map<String, Json>, fields: Json) {
    if let Json::Object(fields) = fields {
        config.extend(fields);
    }
}

/// Llama, Mistral and Mixtral.
fn llama(source: &Source<'_>, config: &mut Map<String, Json>) -> Result<(), GgufError> {
    let window = source.window()?;
    let experts = source.optional_size("expert_count")?.unwrap_or(0) > 0;
    let model_type = match (experts, window) {
        (true, _) => "mixtral",
        (false, Some(_)) => "mistral",
        (false, None) => "llama",
    };
    if experts {
        source.experts(config)?;
    }
    insert(
        config,
        json!({
            "model_type": model_type, "hidden_act": "silu", "sliding_window": window, "rope_parameters": source.rope(10_000.0)?,
        }),
    );
    Ok(())
}

fn qwen2(source: &Source<'_>, config: &mut Map<String, Json>) -> Result<(), GgufError> {
    source.refuse_window()?;
    insert(
        config,
        json!({
            "model_type": "qwen2", "hidden_act": "silu", "use_sliding_window": false, "rope_parameters": source.rope(10_000.0)?,
        }),
    );
    Ok(())
}

fn qwen3(source: &Source<'_>, config: &mut Map<String, Json>) -> Result<(), GgufError> {
    source.refuse_window()?;
    insert(
        config,
        json!({
            "model_type": "qwen3", "hidden_act": "silu", "use_sliding_window": false, "head_dim": source.head_size()?,
            "rope_parameters": source.rope(10_000.0)?,
        }),
    );
    Ok(())
}

fn qwen3_moe(source: &Source<'_>, config: &mut Map<String, Json>) -> Result<(), GgufError> {
    source.refuse_window()?;
    source.experts(config)?;
    let router = |block: &usize| source.tensors.has(&format!("blk.{block}.ffn_gate_inp.weight"));
    let dense: Vec<usize> = (0..source.size("block_count")?).filter(|block| !router(block)).collect();
    let inner = source.optional_size("expert_feed_forward_length")?;
    insert(
        config,
        json!({
            "model_type": "qwen3_moe", "hidden_act": "silu", "use_sliding_window": false, "head_dim": source.head_size()?,
            "moe_intermediate_size": inner.map_or_else(|| source.size("feed_forward_length"), Ok)?,
            "mlp_only_layers": dense,
            // Where the file is silent, the weights add up to one: that is how all of these models are.
            "norm_topk_prob": source.metadata.flag(&source.key("expert_weights_norm"))?.unwrap_or(true),
            "rope_parameters": source.rope(10_000.0)?,
        }),
    );
    Ok(())
}

fn gemma3(source: &Source<'_>, config: &mut Map<String, Json>) -> Result<(), GgufError> {
    let window = source.window()?;
    let head_size = source.head_size()?;
    // The file doesn't say what scores are scaled by.
    let scaled_by = match source.size("block_count")? {
        GEMMA3_27B_BLOCKS => source.size("embedding_length")? / source.size("attention.head_count")?.max(1),
        _ => head_size,
    };
    let local = source.optional_number("rope.freq_base_swa")?.unwrap_or(10_000.0);
    insert(
        config,
        json!({
            "model_type": "gemma3_text", "hidden_activation": "gelu_pytorch_tanh", "head_dim": head_size,
            "query_pre_attn_scalar": scaled_by,
            "sliding_window": window,
            "layer_types": source.block_types(if window.is_some() { 6 } else { 1 })?,
            "final_logit_softcapping": source.optional_number("final_logit_softcapping")?.filter(|cap| *cap != 0.0),
            "rope_parameters": {
                "full_attention": source.rope(1_000_000.0)?,
                "sliding_attention": { "rope_type": "default", "rope_theta": local },
            },
        }),
    );
    Ok(())
}

fn gpt_oss(source: &Source<'_>, config: &mut Map<String, Json>) -> Result<(), GgufError> {
    source.experts(config)?;
    let mut rope = source.rope(150_000.0)?;
    // The bounds of these models' YaRN are not rounded, which the file doesn't say.
    rope["truncate"] = false.into();
    let inner = source.optional_size("expert_feed_forward_length")?;
    insert(
        config,
        json!({
            "model_type": "gpt_oss", "hidden_act": "silu",
            "intermediate_size": inner.map_or_else(|| source.size("feed_forward_length"), Ok)?,
            "head_dim": source.head_size()?,
            "sliding_window": source.window()?,
            "layer_types": source.block_types(2)?,
            "rope_parameters": rope,
        }),
    );
    Ok(())
}

fn phi2(source: &Source<'_>, config: &mut Map<String, Json>) -> Result<(), GgufError> {
    let mut rope = source.rope_parameters(10_000.0)?;
    rope["partial_rotary_factor"] = source.rotated_part()?.into();
    insert(
        config,
        json!({
            "model_type": "phi", "hidden_act": "gelu_new", "intermediate_size": source.inner_width()?,
            "rope_parameters": rope,
        }),
    );
    Ok(())
}

fn phi3(source: &Source<'_>, config: &mut Map<String, Json>) -> Result<(), GgufError> {
    let mut rope = source.rope_parameters(10_000.0)?;
    rope["partial_rotary_factor"] = source.rotated_part()?.into();
    insert(
        config,
        json!({
            "model_type": "phi3", "hidden_act": "silu", "sliding_window": source.window()?,
            // It counts from the configuration's outermost part first.
            "original_max_position_embeddings": source.optional_size("rope.scaling.original_context_length")?,
            "rope_parameters": rope,
        }),
    );
    Ok(())
}

fn falcon(source: &Source<'_>, config: &mut Map<String, Json>) -> Result<(), GgufError> {
    if source.tensors.has("blk.0.attn_qkv.bias") || source.tensors.has("blk.0.ffn_norm.weight") {
        let reason =
            "Falcon RW has positions that this architecture's files don't tell of; use its safetensors checkpoint";
        return Err(source.wrong("attention.head_count_kv", reason));
    }
    let kv_heads = source.optional_size("attention.head_count_kv")?.unwrap_or(1);
    let two_norms = source.tensors.has("blk.0.attn_norm_2.weight");
    insert(
        config,
        json!({
            "model_type": "falcon", "activation": "gelu", "alibi": false, "bias": false, "parallel_attn": true,
            "new_decoder_architecture": two_norms || kv_heads > 1,
            "num_ln_in_parallel_attn": if two_norms { 2 } else { 1 },
            "num_kv_heads": kv_heads, "multi_query": true, "ffn_hidden_size": source.inner_width()?,
            "rope_parameters": source.rope(10_000.0)?,
        }),
    );
    Ok(())
}

fn bloom(source: &Source<'_>, config: &mut Map<String, Json>) -> Result<(), GgufError> {
    let context = source.size("context_length")?;
    insert(
        config,
        json!({
            "model_type": "bloom", "seq_length": context, "apply_residual_connection_post_layernorm": false,
        }),
    );
    Ok(())
}
