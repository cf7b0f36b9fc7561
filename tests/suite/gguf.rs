//! GGUF files: what the converter of llama.cpp made of the fixtures is read as what it was made of, and broken files are
//! refused. What the models compute is tested in `golden`.

mod broken;

use std::{
    collections::BTreeMap,
    fs::File,
    path::{Path, PathBuf},
};

use helion::model::{
    chat::Message,
    checkpoint::{BlockFormat, Checkpoint, CheckpointError, StoredMatrix},
    generation::GenerationDefaults,
    hub::HubOptions,
    source::ModelSource,
    spec::{ExpertTensors, FfnSpec, HeadSpec, LinearSpec, ModelSpec, RopeScaling},
    tokenizer::Tokenizer,
};
use serde_json::{Value, json};

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn file(name: &str) -> PathBuf {
    fixtures().join("gguf").join(name)
}

fn open(name: &str) -> Checkpoint {
    Checkpoint::open(&file(name)).unwrap()
}

/// Makes a file of a header, with zeros for weights.
fn with_zeros(head: &str, dir: &Path) -> PathBuf {
    const ROOM: u64 = 8 << 20;
    let path = dir.join("zeros.gguf");
    std::fs::copy(file(head), &path).unwrap();
    let end = std::fs::metadata(&path).unwrap().len() + ROOM;
    File::options().write(true).open(&path).unwrap().set_len(end).unwrap();
    path
}

/// What a model computes, without the places of its weights and what the two formats say in different ways.
fn arithmetic(spec: &ModelSpec) -> Value {
    let block = |index: usize| {
        let block = &spec.blocks[index];
        let attention = &block.attention;
        let linear = |linear: &LinearSpec| json!([linear.outputs, linear.inputs, linear.bias.is_some()]);
        let ffn = match &block.ffn {
            FfnSpec::Gated { activation, gate, up, down } => json!([activation, ([gate, up, down].map(linear))]),
            FfnSpec::Plain { activation, up, down } => json!([activation, ([up, down].map(linear))]),
            FfnSpec::Experts(experts) => json!([
                experts.routing,
                experts.count,
                experts.active,
                experts.intermediate,
                experts.gating,
                linear(&experts.router)
            ]),
        };
        let rope = attention.rope.as_ref().map(|rope| {
            let scaling = match &rope.scaling {
                RopeScaling::Divided { .. } | RopeScaling::Llama3 { .. } => json!("divided"),
                scaling => json!(scaling),
            };
            json!([rope.theta, rope.width, scaling])
        });
        let norms = [Some(&block.attention_norm), Some(&block.ffn_norm)];
        let norms = norms.into_iter().chain([&block.attention_output_norm, &block.ffn_output_norm].map(Option::as_ref));
        json!({
            "residual": block.residual,
            "norms": norms.map(|norm| norm.map(|norm| json!([norm.epsilon, norm.bias.is_some()]))).collect::<Vec<_>>(),
            "heads": [attention.heads, attention.kv_heads, attention.head_size],
            "scale": attention.scale, "window": attention.window, "cap": attention.soft_cap, "alibi": attention.alibi,
            "linears": ([&attention.q, &attention.k, &attention.v, &attention.o].map(linear)),
            "qk_norm": attention.qk_norm.is_some(), "sinks": attention.sinks.is_some(), "rope": rope, "ffn": ffn,
        })
    };
    let edges = &spec.edges;
    json!({
        "sizes": [spec.hidden_size, spec.vocab_size, spec.max_context],
        "blocks": (0..spec.num_blocks()).map(block).collect::<Vec<_>>(),
        "tied": edges.head == HeadSpec::Tied, "embedding_norm": edges.embedding_norm.is_some(),
        "scale": edges.embedding_scale, "cap": edges.logit_soft_cap, "epsilon": edges.final_norm.epsilon,
    })
}

#[test]
fn metadata_say_what_the_configuration_said() {
    let dir = tempfile::tempdir().unwrap();
    let of = |name: &str| match name {
        "llama" => file("llama-00001-of-00003.gguf"),
        "mistral" | "mixtral" | "qwen3" | "falcon-7b-style" => with_zeros(&format!("{name}.head"), dir.path()),
        _ => file(&format!("{name}.gguf")),
    };
    for name in [
        "llama",
        "mistral",
        "mixtral",
        "qwen2",
        "qwen3",
        "qwen3_moe",
        "gemma3_text",
        "gpt_oss",
        "phi",
        "phi3",
        "falcon-7b-style",
        "falcon-40b-style",
        "bloom",
    ] {
        let (gguf, hub) = (Checkpoint::open(&of(name)).unwrap(), Checkpoint::open(&fixtures().join(name)).unwrap());
        let (found, expected) = (arithmetic(gguf.spec()), arithmetic(hub.spec()));
        assert_eq!(found, expected, "{name}: {found:#} and not {expected:#}");
        let all = (0..gguf.spec().num_blocks()).flat_map(|block| gguf.spec().block_tensors(block));
        assert!(all.into_iter().all(|tensor| tensor.name.starts_with("blk.")), "{name}");
    }
}

#[test]
fn vocabularies_give_the_ids_that_the_checkpoints_tokenizers_give() {
    let cases: BTreeMap<String, Vec<Value>> =
        serde_json::from_str(&std::fs::read_to_string(file("ids.json")).unwrap()).unwrap();
    for (name, cases) in cases {
        let checkpoint = open(&format!("{}.gguf", if name == "gpt-2" { "bloom" } else { &name }));
        let tokenizer = checkpoint.tokenizer().unwrap();
        for case in &cases {
            let text = case["text"].as_str().unwrap();
            let ids: Vec<u32> = serde_json::from_value(case["ids"].clone()).unwrap();
            let found = tokenizer.encode(text, false).unwrap();
            assert_eq!(
                found,
                ids,
                "{name}: {text:?}: {:?}",
                found.iter().map(|id| tokenizer.id_to_token(*id)).collect::<Vec<_>>()
            );
            let decoded = tokenizer.decode(&ids, false).unwrap();
            // SentencePiece's sign for a space is one when it is written out, too; and a space in front of all is what the
            // prefix is taken for.
            let text = if name == "gpt-2" { text.to_owned() } else { text.replace('▁', " ") };
            let same = decoded == text || text.starts_with(' ') && text[1..] == decoded;
            assert!(same, "{name}: {text:?} and {decoded:?}");
        }
    }
    // SentencePiece's texts begin with a token, and these byte-level ones don't.
    let (pieces, bytes) = (open("spm-prefix.gguf").tokenizer().unwrap(), open("bloom.gguf").tokenizer().unwrap());
    assert_eq!(pieces.encode("x", true).unwrap()[0], 1);
    assert_eq!(pieces.encode("x", true).unwrap()[1..], pieces.encode("x", false).unwrap());
    assert_eq!(bytes.encode("x", true).unwrap(), bytes.encode("x", false).unwrap());
}

#[test]
fn everything_beside_the_weights_is_as_in_the_checkpoint() {
    for name in ["bloom", "falcon-40b-style", "gemma3_text", "gpt_oss", "phi", "phi3", "qwen2", "qwen3_moe"] {
        let (checkpoint, dir) = (open(&format!("{name}.gguf")), fixtures().join(name));
        let golden: Value = serde_json::from_str(&std::fs::read_to_string(dir.join("golden.json")).unwrap()).unwrap();
        let (found, expected) = (checkpoint.tokenizer().unwrap(), Tokenizer::open(&dir).unwrap());
        assert_eq!(
            (found.vocab_size(), found.special_ids()),
            (expected.vocab_size(), expected.special_ids()),
            "{name}"
        );
        let prompt = golden["prompt"].as_str().unwrap();
        assert_eq!(found.encode(prompt, true).unwrap(), expected.encode(prompt, true).unwrap(), "{name}");
        let messages: Vec<Message> = serde_json::from_value(golden["chat"].clone()).unwrap();
        let text = checkpoint.chat_template().unwrap().unwrap().render(&messages, true).unwrap();
        assert_eq!(text, golden["chat_text"].as_str().unwrap(), "{name}");
        let (found, expected) = (checkpoint.generation_defaults().unwrap(), GenerationDefaults::open(&dir).unwrap());
        assert_eq!((found.bos_id, found.pad_id), (expected.bos_id, expected.pad_id), "{name}");
        // The template ends each message with a well-known token, which the checkpoint forgets to name.
        assert_eq!(found.eos_ids, [&expected.eos_ids[..], &[6]].concat(), "{name}");
    }
    assert!(open("spm-plain.gguf").chat_template().unwrap().is_none());
    assert_eq!(open("spm-plain.gguf").generation_defaults().unwrap().eos_ids, [2]);
}

/// The matrix of one expert.
fn expert(pattern: &str, number: usize, [outputs, inputs]: [usize; 2]) -> LinearSpec {
    let weight = pattern.replace("{}", &number.to_string());
    LinearSpec { weight, bias: None, outputs, inputs, rows: None }
}

#[test]
fn mxfp4_is_moved_and_not_changed() {
    let (gguf, hub) = (open("gpt_oss.gguf"), Checkpoint::open(&fixtures().join("gpt_oss")).unwrap());
    for (block, (found, expected)) in gguf.spec().blocks.iter().zip(&hub.spec().blocks).enumerate() {
        let (FfnSpec::Experts(found), FfnSpec::Experts(expected)) = (&found.ffn, &expected.ffn) else { panic!() };
        let ExpertTensors::Separate { gate, up, down, biases: Some(biases) } = &found.tensors else { panic!() };
        let ExpertTensors::Stacked { gate_up, gate_up_bias, down: packed, .. } = &expected.tensors else { panic!() };
        let (count, inner, hidden) = (found.count, found.intermediate, gguf.spec().hidden_size);
        let packed_rows = |name: &str, outputs: usize, inputs: usize| {
            let groups = inputs / 32;
            let codes = hub.read_bytes(&format!("{name}_blocks"), &[count, outputs, groups, 16]).unwrap();
            let scales = hub.read_bytes(&format!("{name}_scales"), &[count, outputs, groups]).unwrap();
            let blocks = codes.chunks(16).zip(scales).flat_map(|(codes, scale)| [codes, &[scale]].concat());
            blocks.collect::<Vec<u8>>().chunks(groups * 17).map(<[u8]>::to_vec).collect::<Vec<_>>()
        };
        let (gate_up_rows, down_rows) = (packed_rows(gate_up, 2 * inner, hidden), packed_rows(packed, hidden, inner));
        let gate_up_biases = hub.read(gate_up_bias, &[count, 2 * inner]).unwrap();
        for number in 0..count {
            let blocks = |pattern: &str, shape| match gguf.matrix(&expert(pattern, number, shape)).unwrap() {
                StoredMatrix::Blocks(matrix) if matrix.format == BlockFormat::Mxfp4 => matrix.bytes,
                other => panic!("{other:?}"),
            };
            let alternate = |first: usize| -> Vec<u8> {
                (0..inner).flat_map(|row| gate_up_rows[number * 2 * inner + 2 * row + first].clone()).collect()
            };
            assert!(blocks(gate, [inner, hidden]) == alternate(0), "block {block}, expert {number}: gate");
            assert!(blocks(up, [inner, hidden]) == alternate(1), "block {block}, expert {number}: up");
            let rows = down_rows[number * hidden..(number + 1) * hidden].concat();
            assert!(blocks(down, [hidden, inner]) == rows, "block {block}, expert {number}: down");
            let bias = gguf.read(&biases[0].replace("{}", &number.to_string()), &[inner]).unwrap();
            // The converter widens them.
            let first = f32::from_le_bytes(bias.bytes[..4].try_into().unwrap());
            let at = number * 2 * inner * 2;
            let bits = u16::from_le_bytes(gate_up_biases.bytes[at..at + 2].try_into().unwrap());
            assert_eq!(first, half::bf16::from_bits(bits).to_f32());
        }
    }
}

#[test]
fn a_format_that_is_not_known_is_named_when_it_is_needed() {
    let checkpoint = open("blocks.gguf");
    let FfnSpec::Gated { down, up, .. } = &checkpoint.spec().blocks[1].ffn else { panic!() };
    let error = checkpoint.matrix(down).unwrap_err().to_string();
    assert!(error.contains("blk.1.ffn_down.weight") && error.contains("IQ3_S"), "{error}");
    assert!(checkpoint.matrix(up).is_ok());
    let error = checkpoint.read(&up.weight, &[256, 256]).unwrap_err();
    assert!(matches!(error, CheckpointError::WrongDtype { .. }), "{error}");
    assert!(matches!(checkpoint.read(&up.weight, &[256, 255]), Err(CheckpointError::WrongShape { .. })));
    assert!(matches!(checkpoint.read("blk.9.x", &[1]), Err(CheckpointError::MissingTensor { .. })));
    assert!(matches!(
        open("gpt_oss.gguf").read("blk.0.ffn_up_exps.bias[4]", &[64]),
        Err(CheckpointError::NoSuchRows { .. })
    ));
}

#[tokio::test]
async fn a_files_name_is_the_models_and_not_its_identity() {
    let dir = tempfile::tempdir().unwrap();
    let open = async |path: &Path| ModelSource::open(&path.display().to_string(), HubOptions::default()).await.unwrap();
    let copy = dir.path().join("My.Phi-Q8.gguf");
    std::fs::copy(file("phi.gguf"), &copy).unwrap();
    let (one, other) = (open(&file("phi.gguf")).await, open(&copy).await);
    assert_eq!((other.name(), other.default_dht_prefix()), ("My.Phi-Q8", "My-Phi-Q8"));
    assert_eq!(one.fingerprint().await.unwrap(), other.fingerprint().await.unwrap());
    let folder = open(dir.path()).await;
    assert_eq!(folder.name(), dir.path().file_name().unwrap().to_str().unwrap());
    assert_eq!(folder.fingerprint().await.unwrap(), one.fingerprint().await.unwrap());
    let parts = [1, 3].map(|number| file(&format!("llama-0000{number}-of-00003.gguf")));
    let (one, other) = (open(&parts[0]).await, open(&parts[1]).await);
    assert_eq!((one.name(), one.default_dht_prefix()), ("llama", "llama"));
    assert_eq!(one.fingerprint().await.unwrap(), other.fingerprint().await.unwrap());
    assert_eq!(one.fetch_blocks(0..1).await.unwrap().weight_files().unwrap().len(), 3);
}
