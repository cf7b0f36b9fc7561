//! What is a family's own: settings beyond those of its fixture.

use super::*;
use crate::model::spec::{
    Activation, ExpertTensors, ExpertsSpec, Gating, NormKind, ResidualOrder, Routing, RowsSpec, StackedFormat,
};

fn experts(spec: &ModelSpec, block: usize) -> &ExpertsSpec {
    match &spec.blocks[block].ffn {
        FfnSpec::Experts(experts) => experts,
        other => panic!("block {block} has {other:?}"),
    }
}

fn close(found: f64, expected: f64) {
    assert!((found / expected - 1.0).abs() < 1e-12, "{found} for {expected}");
}

#[test]
fn phi3_cuts_its_fused_matrices_into_their_parts() {
    let phi3 = spec("phi3", json!({"sliding_window": 9}));
    let attention = &phi3.blocks[2].attention;
    assert_eq!((attention.window, &attention.q.weight), (Some(9), &"model.layers.2.self_attn.qkv_proj.weight".into()));
    let rows = |first: usize, run: usize| Some(RowsSpec { of: 128, first, run, stride: run });
    assert_eq!(
        [&attention.q, &attention.k, &attention.v].map(|part| part.rows),
        [rows(0, 64), rows(64, 32), rows(96, 32)]
    );
    let FfnSpec::Gated { up, .. } = &phi3.blocks[2].ffn else { panic!("phi3 has a gated part") };
    assert_eq!(up.rows, Some(RowsSpec { of: 224, first: 112, run: 112, stride: 112 }));
    // A fused tensor is one tensor.
    assert_eq!(phi3.block_tensors(0).len(), 6);
    refused("phi3", &[(json!({"attention_bias": true}), &["attention_bias"])]);
}

#[test]
fn longrope_is_read_in_all_its_spellings() {
    let factors = |count: usize| vec![1.5; count];
    for kind in ["su", "yarn", "longrope"] {
        let scaling = json!({"type": kind, "short_factor": factors(8), "long_factor": factors(8)});
        let phi3 = spec("phi3", json!({"rope_scaling": scaling, "max_position_embeddings": 131_072}));
        let RopeScaling::Longrope { original_context, attention_factor, .. } = rope(&phi3, 0).scaling else {
            panic!("{:?}", rope(&phi3, 0))
        };
        assert_eq!((original_context, phi3.max_context), (4096, 131_072));
        close(attention_factor, (1.0 + 32f64.ln() / 4096f64.ln()).sqrt());
    }
    let short = json!({"type": "longrope", "short_factor": factors(7), "long_factor": factors(8)});
    let bad = json!({"type": "longrope", "short_factor": factors(8), "long_factor": [1, 1, 1, 1, 1, 1, 1, 0]});
    refused(
        "phi3",
        &[
            (json!({"rope_scaling": short}), &["short_factor", "8 finite"]),
            (json!({"rope_scaling": bad}), &["long_factor"]),
            (json!({"rope_scaling": {"type": "longrope"}}), &["rope_scaling.short_factor"]),
            (json!({"rope_scaling": {"long_factor": factors(8)}}), &["long_factor", "rope_type"]),
        ],
    );
    let half = json!({"partial_rotary_factor": 0.5, "rope_scaling": {"type": "longrope", "attention_factor": 1.25,
        "short_factor": factors(4), "long_factor": factors(4)}});
    let phi3 = spec("phi3", half);
    assert_eq!(rope(&phi3, 0).width, Some(8));
    assert!(matches!(rope(&phi3, 0).scaling, RopeScaling::Longrope { attention_factor: 1.25, .. }));
}

#[test]
fn yarn_and_dynamic_scaling_stretch_the_context() {
    let yarn = |extra: Value| {
        let mut scaling = json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512});
        scaling.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        let spec = spec("qwen3", json!({"rope_scaling": scaling}));
        assert_eq!(spec.max_context, 2048);
        match rope(&spec, 0).scaling {
            RopeScaling::Yarn { attention_factor, beta_fast, beta_slow, truncate, .. } => {
                (attention_factor, [beta_fast, beta_slow], truncate)
            }
            ref other => panic!("{other:?}"),
        }
    };
    let (attention, betas, truncate) = yarn(json!({}));
    close(attention, 0.1 * 4f64.ln() + 1.0);
    assert_eq!((betas, truncate), ([32.0, 1.0], true));
    let (attention, ..) = yarn(json!({"mscale": 2.0, "mscale_all_dim": 1.0}));
    close(attention, (0.2 * 4f64.ln() + 1.0) / (0.1 * 4f64.ln() + 1.0));
    assert_eq!(yarn(json!({"attention_factor": 1.5, "beta_fast": 8, "truncate": false})), (1.5, [8.0, 1.0], false));
    let dynamic = spec("llama", json!({"rope_scaling": {"type": "dynamic", "factor": 3.0}}));
    // The formula knows no end; the factor is not one.
    assert_eq!(dynamic.max_context, 8 * 512);
    assert!(matches!(rope(&dynamic, 0).scaling, RopeScaling::Dynamic { original_context: 512, .. }));
    refused(
        "qwen3",
        &[
            (json!({"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 1, "beta_slow": 2}}), &["beta_fast"]),
            (json!({"rope_scaling": {"type": "dynamic"}}), &["rope_scaling.factor"]),
        ],
    );
}

#[test]
fn mixtral_and_qwen3_moe_have_their_experts() {
    let mixtral = spec("mixtral", json!({}));
    let mixture = experts(&mixtral, 3);
    assert_eq!((mixture.count, mixture.active, mixture.routing), (4, 2, Routing::Normalised));
    assert!(mixtral.block_tensors(3).iter().any(|t| t.name == "model.layers.3.block_sparse_moe.experts.3.w2.weight"));
    assert_eq!(spec("mixtral", json!({"sliding_window": 8})).blocks[1].attention.window, Some(8));
    assert_eq!(rope(&spec("mixtral", json!({"rope_theta": null})), 0).theta, 1e6);
    refused(
        "mixtral",
        &[
            (json!({"num_experts_per_tok": 5}), &["num_experts_per_tok = 5", "4 experts"]),
            (json!({"num_local_experts": 0}), &["num_local_experts = 0"]),
        ],
    );

    let dense = |spec: &ModelSpec| {
        let of = |block: &crate::model::spec::BlockSpec| matches!(block.ffn, FfnSpec::Gated { .. });
        spec.blocks.iter().map(of).collect::<Vec<_>>()
    };
    let moe = spec("qwen3_moe", json!({"decoder_sparse_step": 2, "norm_topk_prob": false}));
    assert_eq!(dense(&moe), [true, false, true, false]);
    assert_eq!((experts(&moe, 1).routing, experts(&moe, 1).intermediate), (Routing::Probabilities, 48));
    let FfnSpec::Gated { gate, .. } = &moe.blocks[0].ffn else { panic!("block 0 is dense") };
    assert_eq!((gate.outputs, &gate.weight), (112, &"model.layers.0.mlp.gate_proj.weight".into()));
    assert_eq!(dense(&spec("qwen3_moe", json!({"mlp_only_layers": [0, 3]}))), [true, false, false, true]);
    let sliding = spec("qwen3_moe", json!({"use_sliding_window": true, "sliding_window": 8}));
    assert!(sliding.blocks.iter().all(|block| block.attention.window == Some(8)));
    assert_eq!(spec("qwen3_moe", json!({"sliding_window": 8})).blocks[0].attention.window, None);
    // The field has two names.
    let renamed = json!({"num_local_experts": null, "num_experts": 8});
    assert_eq!(spec("qwen3_moe", renamed), spec("qwen3_moe", json!({})));
}

#[test]
fn gemma3_has_norms_windows_and_positions_of_its_own() {
    let gemma = spec("gemma3_text", json!({}));
    let windows: Vec<_> = gemma.blocks.iter().map(|block| block.attention.window).collect();
    assert_eq!(windows, [Some(16), Some(16), Some(16), Some(16), Some(16), None, Some(16)]);
    assert_eq!((rope(&gemma, 0).theta, rope(&gemma, 5).theta), (1e4, 1e6));
    let block = &gemma.blocks[1];
    assert_eq!(block.ffn_norm.weight, "model.layers.1.pre_feedforward_layernorm.weight");
    assert_eq!(block.attention_norm.kind, NormKind::RmsPlusOne);
    assert_eq!(block.attention.qk_norm.as_ref().unwrap().k.kind, NormKind::RmsPlusOne);
    assert_eq!((gemma.edges.embedding_scale, gemma.edges.final_norm.kind), (Some(8.0), NormKind::RmsPlusOne));
    assert_eq!(spec("gemma3_text", json!({"query_pre_attn_scalar": 64})).blocks[0].attention.scale, 0.125);
    assert_eq!(spec("gemma3_text", json!({"final_logit_softcapping": 30})).edges.logit_soft_cap, Some(30.0));

    let newer = json!({"rope_theta": null, "rope_local_base_freq": null, "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }});
    let linear = spec("gemma3_text", json!({"rope_scaling": {"rope_type": "linear", "factor": 8.0}}));
    assert_eq!(spec("gemma3_text", newer), linear);
    assert_eq!(rope(&linear, 5).scaling, RopeScaling::Linear { factor: 8.0 });
    assert_eq!(rope(&linear, 0).scaling, RopeScaling::Default);
    let types = [
        "full_attention",
        "sliding_attention",
        "full_attention",
        "full_attention",
        "full_attention",
        "full_attention",
        "full_attention",
    ];
    let typed = spec("gemma3_text", json!({"layer_types": types}));
    assert_eq!((rope(&typed, 0).theta, rope(&typed, 1).theta, typed.blocks[1].attention.window), (1e6, 1e4, Some(16)));
    refused(
        "gemma3_text",
        &[
            (json!({"use_bidirectional_attention": true}), &["use_bidirectional_attention"]),
            (json!({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}), &["rope_type", "full_attention"]),
            (json!({"query_pre_attn_scalar": 0}), &["query_pre_attn_scalar"]),
        ],
    );
}

#[test]
fn a_multimodal_gemma3_is_its_language_model() {
    let mut text = spec("gemma3_text", json!({}));
    let multimodal = spec("gemma3", json!({}));
    assert_eq!(multimodal.model_type, "gemma3");
    text.model_type = "gemma3".into();
    assert_eq!(multimodal, text);
    // What the configurations on the hub say, and no more.
    let bare = json!({"text_config": {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
        "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024}});
    let bare = spec("gemma3", bare);
    assert_eq!((bare.num_blocks(), bare.vocab_size, bare.max_context), (34, 262_208, 131_072));
    assert_eq!((bare.blocks[0].attention.heads, bare.blocks[0].attention.head_size), (8, 256));
    assert_eq!((&bare.edges.head, bare.stored_dtype), (&HeadSpec::Tied, Dtype::Bf16));
    assert!(matches!(spec("gemma3", json!({"tie_word_embeddings": false})).edges.head, HeadSpec::Separate(_)));
    refused(
        "gemma3",
        &[
            (json!({"text_config": null}), &["text_config"]),
            (json!({"text_config": {"hidden_size": 0}}), &["text_config.hidden_size = 0"]),
            (json!({"quantization_config": {"quant_method": "bitsandbytes"}}), &["bitsandbytes"]),
        ],
    );
}

#[test]
fn gpt_oss_is_read_with_and_without_quantization() {
    let quantized = spec("gpt_oss", json!({}));
    let format = |spec: &ModelSpec| match &experts(spec, 0).tensors {
        ExpertTensors::Stacked { format, .. } => *format,
        other => panic!("{other:?}"),
    };
    assert_eq!(format(&quantized), StackedFormat::Mxfp4);
    let names: Vec<_> = quantized.block_tensors(1).into_iter().map(|tensor| (tensor.name, tensor.shape)).collect();
    assert!(names.contains(&("model.layers.1.mlp.experts.gate_up_proj_blocks".into(), vec![4, 128, 2, 16])));
    // Half a byte a number, whatever the dtype.
    assert!(quantized.largest_block_bytes(Dtype::F32, Quant::Auto, (KvDtype::F32, 0)) < 200_000);
    let [wide, narrow] = [Quant::None, Quant::Q4_0]
        .map(|quant| quantized.largest_block_bytes(Dtype::Bf16, quant, (KvDtype::Bf16, 0)) as f64);
    assert_eq!(narrow / wide, 4.5 / 16.0);
    let plain = spec("gpt_oss", json!({"quantization_config": null}));
    assert_eq!(format(&plain), StackedFormat::Transposed);
    assert_ne!(plain.canonical(), quantized.canonical());
    let windows: Vec<_> = quantized.blocks.iter().map(|block| block.attention.window).collect();
    assert_eq!(windows, [Some(16), None, Some(16), None]);
    assert_eq!(spec("gpt_oss", json!({"layer_types": null})), quantized);
    let bare = spec("gpt_oss", json!({"rope_scaling": null, "rope_theta": null, "max_position_embeddings": null}));
    assert_eq!((rope(&bare, 0).theta, bare.max_context), (150_000.0, 131_072));
    assert!(matches!(rope(&bare, 0).scaling, RopeScaling::Yarn { original_context: 4096, truncate: false, .. }));
    refused(
        "gpt_oss",
        &[
            (json!({"quantization_config": {"quant_method": "awq"}}), &["quant_method", "awq", "mxfp4"]),
            (json!({"intermediate_size": 40}), &["intermediate_size = 40", "32"]),
            (json!({"hidden_act": "gelu"}), &["hidden_act"]),
        ],
    );
}

#[test]
fn phi_may_normalise_heads_and_share_its_head() {
    let phi = spec("phi", json!({"qk_layernorm": true, "rope_parameters": null, "partial_rotary_factor": 0.25}));
    let attention = &phi.blocks[0].attention;
    let norm = &attention.qk_norm.as_ref().unwrap().q;
    assert_eq!((norm.kind, norm.bias.as_deref()), (NormKind::Layer, Some("model.layers.0.self_attn.q_layernorm.bias")));
    assert_eq!((rope(&phi, 0).width, phi.blocks[0].residual), (Some(4), ResidualOrder::Parallel));
    assert_eq!(rope(&spec("phi", json!({"rope_parameters": null})), 0).width, Some(8));
    let tied = spec("phi", json!({"tie_word_embeddings": true}));
    let HeadSpec::Separate(head) = &tied.edges.head else { panic!("the bias is the head's own") };
    assert_eq!((&head.weight, head.bias.as_deref()), (&tied.edges.embedding, Some("lm_head.bias")));
    refused(
        "phi",
        &[
            (json!({"rope_parameters": {"partial_rotary_factor": 0.2}}), &["partial_rotary_factor", "even"]),
            (json!({"rope_parameters": {"partial_rotary_factor": 1.5}}), &["partial_rotary_factor"]),
        ],
    );
}

#[test]
fn falcon_has_four_layouts() {
    let read = |family: &str, changes: Value| {
        let spec = spec(family, changes);
        let block = spec.blocks[0].clone();
        let norms = [&block.attention_norm, &block.ffn_norm].map(|norm| norm.weight.rsplit('.').nth(1).unwrap().into());
        (block.residual, norms, block.attention.kv_heads, block.attention.rope.is_some())
    };
    let names = |a: &str, b: &str| [a.to_owned(), b.to_owned()];
    let one = names("input_layernorm", "input_layernorm");
    let parallel = ResidualOrder::Parallel;
    assert_eq!(read("falcon-7b-style", json!({})), (parallel, one.clone(), 1, true));
    assert_eq!(read("falcon-40b-style", json!({})), (parallel, names("ln_attn", "ln_mlp"), 2, true));
    let eleven = json!({"num_ln_in_parallel_attn": 1, "rope_theta": 500_042.0, "tie_word_embeddings": false});
    assert_eq!(read("falcon-40b-style", eleven), (parallel, one, 2, true));
    assert_eq!(
        read("falcon-rw-style", json!({})),
        (ResidualOrder::Sequential, names("input_layernorm", "post_attention_layernorm"), 4, false)
    );
    // Absent, it follows the architecture.
    let absent = read("falcon-40b-style", json!({"num_ln_in_parallel_attn": null}));
    assert_eq!(absent, read("falcon-40b-style", json!({})));

    let falcon = spec("falcon-40b-style", json!({"ffn_hidden_size": null, "max_position_embeddings": null}));
    let attention = &falcon.blocks[0].attention;
    let rows = |first: usize, run: usize| Some(RowsSpec { of: 128, first, run, stride: 64 });
    assert_eq!(
        [&attention.q, &attention.k, &attention.v].map(|part| part.rows),
        [rows(0, 32), rows(32, 16), rows(48, 16)]
    );
    assert_eq!(attention.q.rows.unwrap().runs(64).collect::<Vec<_>>(), [0..32, 64..96]);
    let FfnSpec::Plain { activation, up, .. } = &falcon.blocks[0].ffn else { panic!("falcon has no gate") };
    assert_eq!((*activation, up.outputs, falcon.max_context), (Activation::Gelu, 256, 2048));
    refused(
        "falcon-40b-style",
        &[
            (json!({"parallel_attn": false}), &["parallel_attn"]),
            (json!({"num_ln_in_parallel_attn": 3}), &["num_ln_in_parallel_attn = 3"]),
            (json!({"num_kv_heads": 3}), &["num_kv_heads = 3", "4"]),
        ],
    );
    refused("falcon-7b-style", &[(json!({"num_ln_in_parallel_attn": 2}), &["num_ln_in_parallel_attn"])]);
}

#[test]
fn bloom_is_read_with_its_old_names() {
    let older = json!({"hidden_size": null, "n_embed": 64, "n_layer": null, "num_hidden_layers": 6, "n_head": null,
        "num_attention_heads": 4});
    assert_eq!(spec("bloom", older), spec("bloom", json!({})));
    let after = spec("bloom", json!({"apply_residual_connection_post_layernorm": true, "seq_length": 4096}));
    assert_eq!((after.blocks[0].residual, after.max_context), (ResidualOrder::AfterNorm, 4096));
    assert_eq!(after.blocks[0].attention.k.rows, Some(RowsSpec { of: 192, first: 16, run: 16, stride: 48 }));
    refused("bloom", &[(json!({"n_head": 5}), &["n_head = 5", "64"])]);
}

#[test]
fn bloom_split_as_in_training_has_two_biases_less() {
    let biases = |changes: Value| {
        let bloom = spec("bloom", changes);
        let block = &bloom.blocks[0];
        let FfnSpec::Plain { up, down, .. } = &block.ffn else { panic!("bloom has no gate") };
        [&block.attention.q, &block.attention.o, up, down].map(|linear| linear.bias.is_some())
    };
    assert_eq!(biases(json!({"slow_but_exact": true, "pretraining_tp": 2})), [true, false, true, false]);
    assert_eq!(biases(json!({"slow_but_exact": true, "pretraining_tp": 1})), [true; 4]);
    assert_eq!(biases(json!({"pretraining_tp": 4})), [true; 4]);
}

#[test]
fn heads_of_an_odd_width_need_positions_that_are_no_rotations() {
    let narrow = json!({"hidden_size": 60, "ffn_hidden_size": null});
    assert_eq!(spec("falcon-rw-style", narrow.clone()).blocks[0].attention.head_size, 15);
    refused("falcon-7b-style", &[(narrow, &["num_attention_heads = 4", "15", "even"])]);
}

#[test]
fn what_a_file_leaves_out_is_as_in_its_family() {
    let absent = json!({"hidden_act": null, "rms_norm_eps": null, "layer_norm_eps": null, "max_position_embeddings": null,
        "original_max_position_embeddings": null, "rope_scaling": null, "num_attention_heads": 32, "head_dim": 16,
        "num_key_value_heads": null, "sliding_window": null, "use_sliding_window": true, "max_window_layers": 0,
        "layer_types": null});
    for (family, context, kv_heads, epsilon, window) in [
        ("llama", 2048, 32, 1e-6, None),
        ("mistral", 131_072, 8, 1e-6, Some(4096)),
        ("mixtral", 131_072, 8, 1e-5, None),
        ("qwen2", 32_768, 32, 1e-6, Some(4096)),
        ("qwen3", 32_768, 32, 1e-6, Some(4096)),
        ("qwen3_moe", 32_768, 4, 1e-6, Some(4096)),
        ("phi", 2048, 32, 1e-5, None),
        ("phi3", 4096, 32, 1e-5, None),
    ] {
        let spec = spec(family, absent.clone());
        let block = &spec.blocks[0];
        let found = (spec.max_context, block.attention.kv_heads, block.attention_norm.epsilon, block.attention.window);
        assert_eq!(found, (context, kv_heads, epsilon, window), "{family}");
        let activation = match &block.ffn {
            FfnSpec::Gated { activation, .. } | FfnSpec::Plain { activation, .. } => *activation,
            FfnSpec::Experts(experts) => match experts.gating {
                Gating::Plain(activation) => activation,
                gating => panic!("{gating:?}"),
            },
        };
        assert_eq!(activation, if family == "phi" { Activation::GeluTanh } else { Activation::Silu }, "{family}");
    }
}

#[test]
fn fields_that_the_reference_never_reads_change_nothing() {
    let types = json!([
        "full_attention",
        "sliding_attention",
        "full_attention",
        "full_attention",
        "full_attention",
        "full_attention"
    ]);
    for family in ["mistral", "qwen3_moe"] {
        assert_eq!(spec(family, json!({"layer_types": types})), spec(family, json!({})));
    }
    let yarn = |extra: Value| {
        let mut part = json!({"rope_type": "yarn", "factor": 8.0, "rope_theta": 1e6});
        part.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        spec(
            "gemma3_text",
            json!({"rope_theta": null, "rope_local_base_freq": null, "rope_parameters": {
            "full_attention": part, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}}),
        )
    };
    assert_eq!(yarn(json!({"truncate": false})), yarn(json!({})));
}
