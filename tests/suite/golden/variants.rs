//! Settings that no fixture has: the checkpoints in `tests/fixtures/variants` (made by `generate.py` there), and gpt-oss
//! without quantization.

use std::{collections::BTreeSet, fs, path::Path};

use safetensors::{Dtype as StoredDtype, tensor::TensorView};
use serde_json::Value;
use tempfile::TempDir;

use super::*;

/// A fixture's weights with a changed configuration; a null takes a field out.
fn changed(family: &str, changes: &Value) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(fixture(family)).unwrap().flatten() {
        if entry.file_name().to_string_lossy().starts_with("model") {
            fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
        }
    }
    let mut config: Value = read_json(&fixture(family).join("config.json"));
    let fields = config.as_object_mut().unwrap();
    for (field, value) in changes.as_object().unwrap() {
        fields.insert(field.clone(), value.clone());
    }
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    dir
}

fn read_json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// One prompt of a variant, and what transformers made of it.
struct Case {
    prompt: Vec<u32>,
    golden: Golden,
}

impl Case {
    /// All prompts of a variant.
    fn all(variant: &str) -> Vec<Self> {
        let all = Golden::load(&format!("variants/{variant}"));
        let lengths: BTreeSet<&str> = all.tensors.keys().map(|name| name.split_once('.').unwrap().0).collect();
        let of = |length: &str| {
            let tensors = all.tensors.iter().filter_map(|(name, tensor)| {
                let name = name.strip_prefix(length)?.strip_prefix('.')?;
                Some((name.to_owned(), tensor.clone()))
            });
            let checkpoint = Checkpoint::open(&fixture("variants").join(variant)).unwrap();
            let golden = Golden { checkpoint, tensors: tensors.collect(), quant: Quant::Auto, kv_dtype: None };
            Self { prompt: golden.prompt(), golden }
        };
        lengths.into_iter().map(of).collect()
    }
}

/// Continues a prompt as a client does: the prompt's chunks state its length, each further token its own, and where all
/// positions change everything is computed anew.
fn generated(engines: &[Engine], edges: &Edges, prompt: &[u32], chunk: usize, count: usize) -> Vec<u32> {
    let boundary = engines[0].spec().position_boundary();
    let mut chain = Chain::new(engines);
    let mut ids = prompt.to_vec();
    let mut done = 0;
    while ids.len() < prompt.len() + count {
        if boundary == Some(done) {
            done = 0;
        }
        chain.rope_length = Some(ids.len());
        let mut last = Vec::new();
        for ids in ids[done..].chunks(chunk) {
            let hidden = edges.embed(ids, Dtype::F32).unwrap();
            let output = chain.step(&lane(done, ids.len()), hidden, Keep::LastOfEachLane).pop().unwrap();
            last = edges.logits(&output).unwrap();
            done += ids.len();
        }
        ids.push(argmax(&last));
    }
    ids
}

/// Hidden states after every block, logits and greedy ids; and any chunks, any cut and any size of a pass against each
/// other.
fn matches_the_reference(variant: &str) {
    for Case { prompt, golden } in Case::all(variant) {
        let count = prompt.len();
        let edges = golden.edges(Dtype::F32);
        let cuts: Vec<usize> = (1..golden.blocks()).collect();
        let (whole, single) = (golden.engines(&[], Dtype::F32), golden.engines(&cuts, Dtype::F32));
        let mut chain = Chain { rope_length: Some(count), ..Chain::new(&single) };
        let outputs = chain.step(&lane(0, count), edges.embed(&prompt, Dtype::F32).unwrap(), Keep::All);
        for (block, output) in outputs.iter().enumerate() {
            let what = format!("{count} tokens, block {block}");
            assert_close(&output.to_f32(), &golden.floats(&format!("hidden.{block}")), &what);
        }
        let last = outputs.last().unwrap();
        assert_close(&edges.logits(last).unwrap(), &golden.floats("logits"), &format!("{count} tokens, logits"));
        let expected = &golden.ids("greedy_ids")[0];
        let new = expected.len() - count;
        assert_eq!(&generated(&whole, &edges, &prompt, count, new), expected, "{count} tokens");
        assert_eq!(&generated(&single, &edges, &prompt, 7, new), expected, "{count} tokens, chunks of 7");

        let options =
            EngineOptions { cache_tokens: 1024, batch_tokens: 8, ..EngineOptions::new(0..golden.blocks(), Dtype::F32) };
        let narrow = [Engine::load(&golden.checkpoint, options, &mut |_, _| {}).unwrap()];
        for (engines, chunk) in [(&narrow[..], count), (&single, 1), (&single, 7), (&whole, 11)] {
            let mut chain = Chain { rope_length: Some(count), ..Chain::new(engines) };
            let found = prefill(&mut chain, &edges, &prompt, chunk, Dtype::F32);
            assert!(found == last.bytes, "{count} tokens, {} hops, chunks of {chunk}", engines.len());
        }
    }
}

macro_rules! variants {
    ($($name:ident: $variant:literal,)*) => {$(
        #[test]
        fn $name() {
            matches_the_reference($variant);
        }
    )*};
}

variants! {
    llama_with_dynamic_positions: "llama-dynamic",
    phi3_with_longrope: "phi3-longrope",
    qwen2_with_yarn_and_late_windows: "qwen2-yarn",
    qwen3_with_typed_blocks: "qwen3-typed",
    mistral_with_a_short_window: "mistral-windowed",
    mixtral_with_one_expert_a_token: "mixtral-single",
    qwen3_moe_with_dense_blocks: "qwen3_moe-sparse",
    phi_with_normalised_heads: "phi-normed",
    gemma3_text_with_caps: "gemma3_text-capped",
    gemma3_with_positions_by_type: "gemma3-nested",
    gpt_oss_without_biases: "gpt_oss-plain",
    falcon_as_the_11b: "falcon-11b-style",
    falcon_with_linear_biases: "falcon-alibi",
    bloom_with_residuals_after_norms: "bloom-split",
}

/// Every variant's folder is tested.
#[test]
fn no_variant_is_forgotten() {
    let source = include_str!("variants.rs");
    for entry in fs::read_dir(fixture("variants")).unwrap().flatten().filter(|entry| entry.path().is_dir()) {
        let name = entry.file_name().into_string().unwrap();
        assert!(source.contains(&format!("\"{name}\",")), "{name}");
    }
}

/// The stacked experts of gpt-oss as bf16 numbers, each matrix transposed, which is how a converted checkpoint has them.
fn widened(codes: &TensorView<'_>, scales: &TensorView<'_>) -> (Vec<usize>, Vec<u8>) {
    const MAGNITUDES: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    let [experts, outputs, groups, _] = codes.shape().try_into().unwrap();
    let inputs = 32 * groups;
    let number = |expert: usize, output: usize, input: usize| {
        let group = (expert * outputs + output) * groups + input / 32;
        let code = codes.data()[group * 16 + input % 32 / 2] >> (input % 2 * 4) & 15;
        let sign = if code < 8 { 1.0 } else { -1.0 };
        sign * MAGNITUDES[usize::from(code & 7)] * 2f32.powi(i32::from(scales.data()[group]) - 127)
    };
    let mut bytes = Vec::new();
    for expert in 0..experts {
        for input in 0..inputs {
            for output in 0..outputs {
                bytes.extend_from_slice(&half::bf16::from_f32(number(expert, output, input)).to_le_bytes());
            }
        }
    }
    (vec![experts, inputs, outputs], bytes)
}

#[test]
fn gpt_oss_computes_the_same_from_quantized_and_from_widened_experts() {
    let dir = changed("gpt_oss", &serde_json::json!({ "quantization_config": null }));
    let stored = fs::read(fixture("gpt_oss").join("model.safetensors")).unwrap();
    let stored = SafeTensors::deserialize(&stored).unwrap();
    let tensors: Vec<(String, StoredDtype, Vec<usize>, Vec<u8>)> = stored
        .iter()
        .filter(|(name, _)| !name.ends_with("_scales"))
        .map(|(name, view)| match name.strip_suffix("_blocks") {
            None => (name.to_owned(), view.dtype(), view.shape().to_vec(), view.data().to_vec()),
            Some(name) => {
                let (shape, bytes) = widened(&view, &stored.tensor(&format!("{name}_scales")).unwrap());
                (name.to_owned(), StoredDtype::BF16, shape, bytes)
            }
        })
        .collect();
    let views = tensors
        .iter()
        .map(|(name, dtype, shape, bytes)| (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    fs::write(dir.path().join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();

    let quantized = Golden::load("gpt_oss");
    let wide = Golden { checkpoint: Checkpoint::open(dir.path()).unwrap(), ..Golden::load("gpt_oss") };
    let prompt = quantized.prompt();
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let edges = quantized.edges(dtype);
        let outputs = [&quantized, &wide].map(|golden| {
            let engines = golden.engines(&[], dtype);
            (prefill(&mut Chain::new(&engines), &edges, &prompt, 9, dtype), engines[0].loaded_bytes())
        });
        // Other engines than those of f32 round what quantized experts read.
        assert_eq!(outputs[0].0 == outputs[1].0, dtype == Dtype::F32, "{dtype}");
        // 4.25 bits a number against 32 or 16.
        assert!(outputs[0].1 < outputs[1].1, "{dtype}");
    }
}
