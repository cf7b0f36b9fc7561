//! Settings that no fixture has: the fixtures' weights with changed configurations (see `generate.py` beside the expected
//! outputs), and gpt-oss without quantization.

use std::{fs, path::Path};

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

fn floats(value: &Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap() as f32).collect()
}

/// The last position of a short prompt and of a long one against the reference; and any chunks, any cut and any size of a
/// pass against each other, where the steps state the prompt's length.
fn matches_the_reference(variant: &str) {
    let expected = read_json(&fixture("variants").join(format!("{variant}.json")));
    let family = expected["family"].as_str().unwrap();
    let dir = changed(family, &expected["changes"]);
    let golden = Golden { checkpoint: Checkpoint::open(dir.path()).unwrap(), ..Golden::load(family) };
    let edges = golden.edges(Dtype::F32);
    let (whole, cut) = (golden.engines(&[], Dtype::F32), golden.engines(&[1], Dtype::F32));
    let options =
        EngineOptions { cache_tokens: 1024, batch_tokens: 8, ..EngineOptions::new(0..golden.blocks(), Dtype::F32) };
    let narrow = [Engine::load(&golden.checkpoint, options, &mut |_, _| {}).unwrap()];
    for case in expected["cases"].as_array().unwrap() {
        let count = case["tokens"].as_u64().unwrap() as usize;
        let prompt = &golden.prompt()[..count];
        let all = prefill(&mut Chain::new(&whole), &edges, prompt, count, Dtype::F32);
        let row = all.len() / count;
        let values: Vec<f32> = all.chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect();
        let width = row / 4;
        assert_close(
            &values[values.len() - width..],
            &floats(&case["hidden"]),
            &format!("{count} tokens, hidden state"),
        );
        let last = HiddenStates::from_f32(Dtype::F32, width, &values[values.len() - width..]);
        assert_close(&edges.logits(&last).unwrap(), &floats(&case["logits"]), &format!("{count} tokens, logits"));

        assert!(
            prefill(&mut Chain::new(&narrow), &edges, prompt, count, Dtype::F32) == all,
            "{count} tokens, passes of 8"
        );
        for chunk in [1, 7, count] {
            let mut chain = Chain { rope_length: Some(count), ..Chain::new(&cut) };
            assert!(prefill(&mut chain, &edges, prompt, chunk, Dtype::F32) == all, "{count} tokens, chunks of {chunk}");
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
    llama_with_linear_positions: "llama-linear",
    llama_with_yarn: "llama-yarn",
    phi3_with_longrope: "phi3-longrope",
    bloom_with_residuals_after_norms: "bloom-after-norm",
    qwen3_moe_without_normalised_weights: "qwen3_moe-probabilities",
    gemma3_with_other_windows_and_a_cap: "gemma3_text-capped",
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
        assert!(outputs[0].0 == outputs[1].0, "{dtype}");
        // 4.25 bits a number against 32 or 16.
        assert!(outputs[0].1 < outputs[1].1, "{dtype}");
    }
}
