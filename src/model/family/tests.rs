use serde_json::{Value, json};

use super::*;
use crate::model::{
    Dtype, KvDtype, Quant,
    spec::{FfnSpec, HeadSpec, RopeScaling, RopeSpec},
};

fn fixture(family: &str) -> Value {
    let path = format!("{}/tests/fixtures/{family}/config.json", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// The fixture's configuration with fields changed; `null` takes one out.
fn changed(family: &str, changes: Value) -> Result<ModelSpec, ConfigError> {
    let mut config = fixture(family);
    for (field, value) in changes.as_object().unwrap() {
        match value {
            Value::Null => config.as_object_mut().unwrap().remove(field),
            value => config.as_object_mut().unwrap().insert(field.clone(), value.clone()),
        };
    }
    read_config(&config.to_string())
}

fn spec(family: &str, changes: Value) -> ModelSpec {
    changed(family, changes).unwrap()
}

fn rope(spec: &ModelSpec, block: usize) -> &RopeSpec {
    spec.blocks[block].attention.rope.as_ref().unwrap()
}

/// Checks that each change is an error whose message has all the words.
fn refused(family: &str, cases: &[(Value, &[&str])]) {
    for (change, words) in cases {
        let message = changed(family, change.clone()).expect_err(&change.to_string()).to_string();
        for word in *words {
            assert!(message.contains(word), "{change}: {message:?} lacks {word:?}");
        }
    }
}

#[test]
fn the_fixtures_are_understood() {
    let llama = spec("llama", json!({}));
    assert_eq!((llama.hidden_size, llama.vocab_size, llama.max_context, llama.num_blocks()), (64, 512, 512, 6));
    assert_eq!((llama.stored_dtype, &llama.edges.head), (Dtype::Bf16, &HeadSpec::Tied));
    let attention = &llama.blocks[3].attention;
    assert_eq!((attention.heads, attention.kv_heads, attention.head_size, attention.window), (4, 2, 16, None));
    assert_eq!(attention.q.weight, "model.layers.3.self_attn.q_proj.weight");
    assert!(matches!(rope(&llama, 3).scaling, RopeScaling::Llama3 { original_context: 64, .. }));

    let mistral = spec("mistral", json!({}));
    assert!(mistral.blocks.iter().all(|block| block.attention.window == Some(16)));
    assert!(matches!(&mistral.edges.head, HeadSpec::Separate(head) if head.outputs == 512));
    assert_eq!(mistral.blocks[0].attention.head_size, 24);

    let qwen2 = spec("qwen2", json!({}));
    assert!(qwen2.blocks[0].attention.k.bias.is_some() && qwen2.blocks[0].attention.o.bias.is_none());
    assert_eq!(qwen2.blocks[0].attention.head_size, 16);

    let qwen3 = spec("qwen3", json!({}));
    assert!(qwen3.blocks[5].attention.qk_norm.is_some() && qwen3.blocks[5].attention.q.bias.is_none());
}

#[test]
fn both_spellings_mean_the_same() {
    let newer = json!({
        "rope_theta": null, "rope_scaling": null, "torch_dtype": null, "dtype": "bfloat16",
        "rope_parameters": {
            "rope_theta": 500000.0, "rope_type": "llama3", "factor": 32.0, "high_freq_factor": 4.0,
            "low_freq_factor": 1.0, "original_max_position_embeddings": 64
        }
    });
    assert_eq!(spec("llama", newer), spec("llama", json!({})));
    let default = json!({"rope_theta": null, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}});
    assert_eq!(spec("qwen3", default), spec("qwen3", json!({})));
}

#[test]
fn absent_fields_have_the_reference_s_defaults() {
    let llama = spec(
        "llama",
        json!({"num_key_value_heads": null, "head_dim": null, "rope_scaling": null,
        "rope_theta": null, "torch_dtype": null, "attention_bias": null, "tie_word_embeddings": null}),
    );
    let attention = &llama.blocks[0].attention;
    assert_eq!((attention.kv_heads, attention.head_size), (4, 16));
    assert_eq!((rope(&llama, 0).theta, &rope(&llama, 0).scaling), (10_000.0, &RopeScaling::Default));
    assert_eq!(llama.stored_dtype, Dtype::F32);
    assert!(matches!(llama.edges.head, HeadSpec::Separate(_)));
    assert_eq!(spec("qwen3", json!({"head_dim": null})).blocks[0].attention.head_size, 128);
}

#[test]
fn biases_are_where_the_configuration_says() {
    let llama = spec("llama", json!({"attention_bias": true, "mlp_bias": true}));
    let attention = &llama.blocks[1].attention;
    for linear in [&attention.q, &attention.k, &attention.v, &attention.o] {
        assert!(linear.bias.is_some());
    }
    let FfnSpec::Gated { gate, up, down, .. } = &llama.blocks[1].ffn else { panic!("{:?}", llama.blocks[1].ffn) };
    for linear in [gate, up, down] {
        assert!(linear.bias.is_some());
    }
    assert!(llama.block_tensors(1).iter().any(|tensor| tensor.name == "model.layers.1.mlp.down_proj.bias"));
    assert!(llama.block_tensors(6).is_empty());
}

#[test]
fn windows_follow_layer_types_or_max_window_layers() {
    let windows = |spec: &ModelSpec| spec.blocks.iter().map(|block| block.attention.window).collect::<Vec<_>>();
    for family in ["qwen2", "qwen3"] {
        let by_number = json!({"use_sliding_window": true, "sliding_window": 8, "max_window_layers": 4,
            "layer_types": null});
        assert_eq!(windows(&spec(family, by_number)), [None, None, None, None, Some(8), Some(8)]);
        let (full, sliding) = ("full_attention", "sliding_attention");
        let by_type = json!({"use_sliding_window": true, "sliding_window": 8,
            "layer_types": [full, sliding, full, sliding, full, full]});
        assert_eq!(windows(&spec(family, by_type)), [None, Some(8), None, Some(8), None, None]);
        let unused = json!({"use_sliding_window": false, "sliding_window": 8, "layer_types": null});
        assert_eq!(windows(&spec(family, unused)), [None; 6]);
    }
    // Absent isn't null.
    assert_eq!(windows(&spec("mistral", json!({"sliding_window": null}))), [Some(4096); 6]);
    let mut config = fixture("mistral");
    config["sliding_window"] = Value::Null;
    assert_eq!(windows(&read_config(&config.to_string()).unwrap()), [None; 6]);
}

#[test]
fn unknown_families_are_told_the_known_ones() {
    refused("llama", &[(json!({"model_type": "mamba"}), &["mamba", "llama, mistral, qwen2, qwen3"])]);
    refused("llama", &[(json!({"model_type": null}), &["model_type"])]);
}

#[test]
fn what_would_change_the_arithmetic_is_never_ignored() {
    refused(
        "llama",
        &[
            (json!({"hidden_act": "mish"}), &["hidden_act", "mish", "silu"]),
            (
                json!({"quantization_config": {"quant_method": "bitsandbytes"}}),
                &["quantization_config", "bitsandbytes"],
            ),
            (json!({"torch_dtype": "float8_e4m3fn"}), &["torch_dtype", "float8"]),
            (json!({"partial_rotary_factor": 0.5}), &["partial_rotary_factor", "0.5"]),
            (json!({"final_logit_softcapping": 30.0}), &["final_logit_softcapping"]),
            (json!({"rope_scaling": {"type": "mrope", "factor": 4.0}}), &["rope_scaling.type", "mrope"]),
            (
                json!({"rope_scaling": {"type": "linear", "factor": 2, "partial_rotary_factor": 0.5}}),
                &["partial_rotary"],
            ),
            (json!({"rope_scaling": {"factor": 4.0}}), &["rope_scaling.factor"]),
            (json!({"rope_parameters": {"rope_theta": 1.0}}), &["rope_theta", "500000"]),
            (json!({"rope_theta": null, "rope_parameters": {"full_attention": {}}}), &["full_attention"]),
            (
                json!({"layer_types": ["sliding_attention", "a", "b", "c", "d", "e"]}),
                &["layer_types", "sliding_window"],
            ),
        ],
    );
    refused("mistral", &[(json!({"attention_bias": true}), &["attention_bias"])]);
    refused("qwen2", &[(json!({"mlp_bias": true}), &["mlp_bias"])]);
    refused(
        "qwen3",
        &[(
            json!({"use_sliding_window": true, "sliding_window": 4, "layer_types": ["full_attention"]}),
            &["1 entries", "6"],
        )],
    );
    // Neutral values are no reason to refuse.
    spec(
        "llama",
        json!({"partial_rotary_factor": 1, "quantization_config": null, "rope_scaling": {"type": "linear", "factor": 2}}),
    );
}

#[test]
fn absurd_values_are_named() {
    refused(
        "llama",
        &[
            (json!({"num_attention_heads": 0}), &["num_attention_heads = 0"]),
            (json!({"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": null}), &["hidden_size = 64", "3"]),
            (json!({"num_key_value_heads": 3}), &["num_key_value_heads = 3", "4"]),
            (json!({"head_dim": 7}), &["head_dim = 7", "even"]),
            (json!({"hidden_size": 1u64 << 40}), &["hidden_size = 1099511627776"]),
            (json!({"hidden_size": -1}), &["hidden_size = -1"]),
            (json!({"hidden_size": "64"}), &["hidden_size = \"64\""]),
            (json!({"hidden_size": null}), &["hidden_size"]),
            (json!({"num_hidden_layers": 100_000}), &["num_hidden_layers = 100000"]),
            (json!({"vocab_size": 0}), &["vocab_size = 0"]),
            (json!({"intermediate_size": 1.5}), &["intermediate_size = 1.5"]),
            (json!({"max_position_embeddings": 0}), &["max_position_embeddings = 0"]),
            (json!({"rms_norm_eps": -1e-6}), &["rms_norm_eps"]),
            (json!({"rope_theta": 0.0}), &["rope_theta = 0.0"]),
            (json!({"rope_scaling": {"rope_type": "linear"}}), &["rope_scaling.factor"]),
            (json!({"rope_scaling": {"rope_type": "linear", "factor": 0}}), &["rope_scaling.factor = 0"]),
        ],
    );
    for text in ["", "[1]", "{", "null"] {
        assert!(matches!(read_config(text), Err(ConfigError::NotJson(_))), "{text}");
    }
}

#[test]
fn the_canonical_form_tells_models_apart_and_stays_as_it_is() {
    let canonical = |changes: Value| spec("qwen3", changes).canonical();
    let base = canonical(json!({}));
    for change in [
        json!({"rope_theta": 20000.0}),
        json!({"rms_norm_eps": 1e-5}),
        json!({"tie_word_embeddings": false}),
        json!({"use_sliding_window": true, "sliding_window": 8, "layer_types": null, "max_window_layers": 0}),
    ] {
        assert_ne!(canonical(change.clone()), base, "{change}");
    }
    // How the weights are stored is theirs to say, and their own hashes are part of a fingerprint.
    assert_eq!(canonical(json!({"torch_dtype": "float32"})), base);
    // If this changes, nodes of different versions of the program don't recognise each other's models.
    let text = String::from_utf8(base.clone()).unwrap();
    assert!(text.starts_with(
        r#"helion-spec-1
{"hidden_size":64,"vocab_size":512,"max_context":512,"blocks":[{"residual":"sequential","attention_norm":{"kind":"rms","epsilon":1e-6,"weight":"model.layers.0.input_layernorm.weight"},"attention":{"heads":4,"kv_heads":2,"head_size":32,"scale":0.17677669529663687,"q":{"weight":"model.layers.0.self_attn.q_proj.weight","outputs":128,"inputs":64},"#
    ));
    let mut wrong: Vec<String> = Vec::new();
    for (family, hash) in [
        ("llama", "ed066adb56a82cc1"),
        ("mistral", "8f9067d0c6e3569f"),
        ("qwen2", "f9392e4d0d130262"),
        ("qwen3", "330366da0ffa4e38"),
        ("mixtral", "44cbd7e7fc306d76"),
        ("qwen3_moe", "3dfe11354bd656fe"),
        ("phi", "a1caf70fe631d4f2"),
        ("phi3", "b15cf7ef1cff57de"),
        ("gemma3", "6b5ea53f3b1792e1"),
        ("gpt_oss", "9af847f7ae30b374"),
        ("falcon-7b-style", "cdb61d37410ee7e4"),
        ("falcon-40b-style", "86b7c27721950638"),
        ("falcon-rw-style", "3a5203562ab87d3f"),
        ("bloom", "e68f3b2a204fd394"),
    ] {
        let found = blake3::hash(&spec(family, json!({})).canonical()).to_hex();
        wrong.extend((&found[..16] != hash).then(|| format!("{family} is {}", &found[..16])));
    }
    assert!(wrong.is_empty(), "{wrong:?}");
}

mod layouts;
mod quantization;
