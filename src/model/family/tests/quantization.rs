use super::*;
use crate::model::spec::{Packing, PackingSpec};

/// What a `quantization_config` is read as.
fn packing(quantization: &Value) -> PackingSpec {
    spec("llama", json!({ "quantization_config": quantization })).packing.unwrap()
}

fn compressed(weights: &Value, format: &str) -> Value {
    json!({"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": {"weights": weights,
        "targets": ["Linear"]}}})
}

#[test]
fn methods_are_read() {
    let gptq = |bits: usize, group: Option<usize>, act_order: bool, zeros_less_one: bool| Packing::Gptq {
        bits,
        group,
        act_order,
        zeros_less_one,
    };
    for (config, expected) in [
        (json!({"quant_method": "fp8", "weight_block_size": [128, 128]}), Packing::Fp8 { tile: Some([128, 128]) }),
        (json!({"quant_method": "fp8", "activation_scheme": "static"}), Packing::Fp8 { tile: None }),
        (json!({"quant_method": "gptq", "bits": 4, "group_size": 128}), gptq(4, Some(128), false, true)),
        (
            json!({"quant_method": "gptq", "bits": 8, "group_size": -1, "desc_act": true, "format": "gptq_v2"}),
            gptq(8, None, true, false),
        ),
        (
            json!({"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq",
                "is_marlin_format": false, "dynamic": {"-:.*gate$": {}}}),
            gptq(4, Some(32), false, true),
        ),
        (
            json!({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "GEMM"}),
            Packing::Awq { group: Some(128) },
        ),
        (json!({"quant_method": "awq", "w_bit": 4, "q_group_size": -1}), Packing::Awq { group: None }),
        (
            compressed(
                &json!({"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [64, 32]}),
                "float-quantized",
            ),
            Packing::Fp8 { tile: Some([64, 32]) },
        ),
        (
            compressed(&json!({"num_bits": 8, "type": "float", "strategy": "channel"}), "naive-quantized"),
            Packing::Fp8 { tile: None },
        ),
        (
            compressed(
                &json!({"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "actorder": "weight"}),
                "pack-quantized",
            ),
            Packing::RowWords { bits: 4, group: Some(128), zeros: false, act_order: false },
        ),
        (
            compressed(
                &json!({"num_bits": 8, "strategy": "channel", "symmetric": false, "actorder": "group"}),
                "pack-quantized",
            ),
            Packing::RowWords { bits: 8, group: None, zeros: true, act_order: true },
        ),
    ] {
        assert_eq!(packing(&config).format, expected, "{config}");
    }
    let ignored = json!({"quant_method": "fp8", "ignored_layers": ["lm_head"], "modules_to_not_convert": null});
    assert_eq!(packing(&ignored).except, ["lm_head"]);
    // A multimodal file says it of the whole model, or of its language model.
    let awq = json!({"quant_method": "awq", "bits": 4, "group_size": 32});
    let expected = Some(Packing::Awq { group: Some(32) });
    let whole = spec("gemma3", json!({ "quantization_config": awq }));
    assert_eq!(whole.packing.map(|packing| packing.format), expected);
    let mut text = fixture("gemma3")["text_config"].clone();
    text["quantization_config"] = awq;
    let part = spec("gemma3", json!({ "text_config": text }));
    assert_eq!(part.packing.map(|packing| packing.format), expected);
}

#[test]
fn packing_is_part_of_a_models_identity() {
    let gptq = |format: &str, except: &[&str]| {
        let quantization = json!({"quant_method": "gptq", "bits": 4, "group_size": 32, "format": format,
            "modules_to_not_convert": except});
        spec("llama", json!({ "quantization_config": quantization })).canonical()
    };
    assert_ne!(gptq("gptq", &[]), gptq("gptq_v2", &[]));
    // Which layers are packed is the weights' to say.
    assert_eq!(gptq("gptq", &[]), gptq("gptq", &["lm_head"]));
    let text = String::from_utf8(gptq("gptq", &[])).unwrap();
    let end = r#","packing":{"gptq":{"bits":4,"group":32,"act_order":false,"zeros_less_one":true}}}"#;
    assert!(text.ends_with(end), "{text}");
}

#[test]
fn what_cannot_be_unpacked_is_refused() {
    let cases: &[(Value, &[&str])] = &[
        (json!({"quant_method": "bitsandbytes"}), &["quant_method", "bitsandbytes", "gptq", "GGUF"]),
        (json!({"bits": 4}), &["quantization_config.quant_method"]),
        (json!({"quant_method": "gptq"}), &["quantization_config.bits"]),
        (json!({"quant_method": "gptq", "bits": 3, "group_size": 128}), &["bits = 3", "4 and 8", "GGUF"]),
        (json!({"quant_method": "gptq", "bits": 4, "group_size": 0}), &["group_size = 0"]),
        (json!({"quant_method": "gptq", "bits": 4, "group_size": 1u64 << 40}), &["group_size = 1099511627776"]),
        (json!({"quant_method": "gptq", "bits": 4, "group_size": -2}), &["group_size = -2"]),
        (
            json!({"quant_method": "gptq", "bits": 4, "group_size": 128, "checkpoint_format": "marlin"}),
            &["checkpoint_format", "marlin", "GPU"],
        ),
        (
            json!({"quant_method": "gptq", "bits": 4, "group_size": 128, "is_marlin_format": true}),
            &["is_marlin_format = true"],
        ),
        (
            json!({"quant_method": "gptq", "bits": 4, "group_size": 128, "dynamic": {"+:.*down": {"bits": 8}}}),
            &["dynamic", "down"],
        ),
        (
            json!({"quant_method": "gptq", "bits": 4, "group_size": 128, "adapter": {"name": "lora"}}),
            &["adapter", "lora"],
        ),
        (
            json!({"quant_method": "gptq", "bits": 4, "group_size": 128, "pack_dtype": "int64"}),
            &["pack_dtype", "int64"],
        ),
        (json!({"quant_method": "awq", "bits": 8, "group_size": 128}), &["bits = 8", "4 bits"]),
        (json!({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"}), &["version", "gemv", "gemm"]),
        (json!({"quant_method": "fp8", "weight_block_size": [0, 128]}), &["weight_block_size"]),
        (json!({"quant_method": "fp8", "weight_block_size": [128]}), &["weight_block_size"]),
        (json!({"quant_method": "fp8", "activation_scheme": "other"}), &["activation_scheme", "other"]),
        (json!({"quant_method": "fp8", "fmt": "e5m2"}), &["fmt", "e5m2", "E4M3"]),
        (json!({"quant_method": "fp8", "expert_dtype": "fp4"}), &["expert_dtype", "fp4"]),
        (json!({"quant_method": "compressed-tensors", "format": "int-quantized"}), &["config_groups"]),
        (
            compressed(&json!({"num_bits": 8, "type": "int", "strategy": "channel"}), "int-quantized"),
            &["format", "int-quantized", "pack-quantized"],
        ),
        (
            compressed(&json!({"num_bits": 4, "type": "float", "strategy": "group"}), "float-quantized"),
            &["config_groups.group_0.weights.num_bits = 4"],
        ),
        (
            json!({"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"a": {}, "b": {}}}),
            &["config_groups", "one group"],
        ),
        (
            json!({"quant_method": "compressed-tensors", "transform_config": {"config_groups": {}}}),
            &["transform_config"],
        ),
    ];
    let cases: Vec<(Value, &[&str])> =
        cases.iter().map(|(config, words)| (json!({ "quantization_config": config }), *words)).collect();
    refused("llama", &cases);
    refused("llama", &[(json!({"compression_config": {}}), &["compression_config"])]);
}
