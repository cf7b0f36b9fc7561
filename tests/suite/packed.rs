//! FP8, GPTQ, AWQ and pack-quantized checkpoints against the formats' own packages (see `generate.py` beside the fixtures).

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    path::{Path, PathBuf},
};

use half::{bf16, f16};
use helion::model::{
    Dtype, KvDtype, Quant,
    checkpoint::{Checkpoint, CheckpointError, StoredMatrix},
    spec::{ExpertTensors, FfnSpec, LinearSpec, TensorSpec, Values},
};
use safetensors::{Dtype as StoredDtype, SafeTensors, tensor::TensorView};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

const FIXTURES: [&str; 12] = [
    "fp8-qwen3",
    "fp8-qwen3_moe",
    "fp8-phi3",
    "fp8-llama",
    "fp8-qwen2",
    "gptq-llama",
    "gptq-phi3",
    "gptq-qwen3_moe",
    "awq-phi3",
    "awq-qwen2",
    "int4-qwen3",
    "int8-llama",
];

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/packed-checkpoints").join(name)
}

fn open(name: &str) -> Checkpoint {
    Checkpoint::open(&fixture(name)).unwrap()
}

fn linear(weight: &str, outputs: usize, inputs: usize) -> LinearSpec {
    LinearSpec { weight: weight.to_owned(), bias: None, outputs, inputs, rows: None }
}

/// E4M3: a sign, four bits of exponent with a bias of 7, three of mantissa.
fn fp8(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let magnitude = if exponent == 0 { mantissa / 512.0 } else { (8.0 + mantissa) * 2f32.powi(exponent - 10) };
    if code < 128 { magnitude } else { -magnitude }
}

/// The numbers of a matrix, in the order of the layer's inputs.
fn unpacked(matrix: &StoredMatrix) -> Vec<f32> {
    match matrix {
        StoredMatrix::Fp8(matrix) => {
            let per_row = matrix.columns.div_ceil(matrix.tile[1]);
            assert_eq!(matrix.scales.len(), matrix.rows.div_ceil(matrix.tile[0]) * per_row);
            let scale = |at: usize| {
                let (row, column) = (at / matrix.columns / matrix.tile[0], at % matrix.columns / matrix.tile[1]);
                matrix.scales[row * per_row + column]
            };
            matrix.codes.iter().enumerate().map(|(at, code)| fp8(*code) * scale(at)).collect()
        }
        StoredMatrix::Grouped(matrix) => {
            let groups = matrix.columns / matrix.group;
            assert_eq!((matrix.scales.len(), matrix.zeros.len()), (matrix.rows * groups, matrix.rows * groups));
            assert_eq!(matrix.codes.len(), matrix.rows * matrix.columns * matrix.bits as usize / 8);
            let mut numbers = vec![f32::NAN; matrix.rows * matrix.columns];
            for row in 0..matrix.rows {
                for column in 0..matrix.columns {
                    let at = row * matrix.columns + column;
                    let code = match matrix.bits {
                        4 => matrix.codes[at / 2] >> (at % 2 * 4) & 15,
                        _ => matrix.codes[at],
                    };
                    let group = row * groups + column / matrix.group;
                    let scale = match matrix.scale_dtype {
                        Dtype::Bf16 => bf16::from_bits(matrix.scales[group]).to_f32(),
                        _ => f16::from_bits(matrix.scales[group]).to_f32(),
                    };
                    let input = matrix.order.as_ref().map_or(column, |order| order[column] as usize);
                    numbers[row * matrix.columns + input] = scale * (f32::from(code) - f32::from(matrix.zeros[group]));
                }
            }
            numbers
        }
        other => panic!("not packed: {other:?}"),
    }
}

fn bytes_of(matrix: &StoredMatrix) -> usize {
    match matrix {
        StoredMatrix::Fp8(matrix) => matrix.codes.len() + 4 * matrix.scales.len(),
        StoredMatrix::Grouped(matrix) => {
            let order = matrix.order.as_ref().map_or(0, Vec::len);
            matrix.codes.len() + 2 * (matrix.scales.len() + matrix.zeros.len()) + 4 * order
        }
        other => panic!("not packed: {other:?}"),
    }
}

/// The packed matrices of a fixture, whole, and the SHA-256 of the numbers that each stands for.
fn matrices(name: &str) -> Vec<(LinearSpec, String)> {
    let golden: Value = serde_json::from_slice(&fs::read(fixture(name).join("golden.json")).unwrap()).unwrap();
    let matrices = golden["matrices"].as_object().unwrap().iter();
    matrices
        .map(|(weight, matrix)| {
            let size = |index: usize| matrix["shape"][index].as_u64().unwrap() as usize;
            (linear(weight, size(0), size(1)), matrix["sha256"].as_str().unwrap().to_owned())
        })
        .collect()
}

#[test]
fn every_format_unpacks_to_the_reference() {
    for name in FIXTURES {
        let checkpoint = open(name);
        for (linear, expected) in matrices(name) {
            let matrix = checkpoint.matrix(&linear).unwrap();
            assert_eq!((matrix.rows(), matrix.columns()), (linear.outputs, linear.inputs));
            let bytes: Vec<u8> = unpacked(&matrix).iter().flat_map(|number| number.to_le_bytes()).collect();
            let found: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(found, expected, "{name}: {}", linear.weight);
        }
        // What is not packed is read as it is.
        let (vocab, hidden) = (checkpoint.spec().vocab_size, checkpoint.spec().hidden_size);
        let embedding = linear(&checkpoint.spec().edges.embedding, vocab, hidden);
        assert!(matches!(checkpoint.matrix(&embedding).unwrap(), StoredMatrix::Floats(_)), "{name}");
    }
}

#[test]
fn rows_of_fused_matrices_are_read() {
    for name in ["fp8-phi3", "gptq-phi3", "awq-phi3"] {
        let checkpoint = open(name);
        let block = &checkpoint.spec().blocks[1];
        let FfnSpec::Gated { gate, up, .. } = &block.ffn else { panic!("phi3 has a gate") };
        let attention = &block.attention;
        for part in [&attention.q, &attention.k, &attention.v, gate, up] {
            let rows = part.rows.unwrap();
            let whole = unpacked(&checkpoint.matrix(&linear(&part.weight, rows.of, part.inputs)).unwrap());
            let matrix = checkpoint.matrix(part).unwrap();
            assert_eq!(matrix.rows(), part.outputs);
            let runs = rows.runs(part.outputs).flat_map(|run| &whole[run.start * part.inputs..run.end * part.inputs]);
            assert!(unpacked(&matrix) == runs.copied().collect::<Vec<_>>(), "{name}: {part:?}");
        }
        // Runs that follow each other at a distance, as falcon's do, and that cut through tiles and words.
        let whole = linear(&attention.q.weight, attention.q.rows.unwrap().of, attention.q.inputs);
        let numbers = unpacked(&checkpoint.matrix(&whole).unwrap());
        let part = whole.rows(3, 5, 24, 20);
        let runs =
            part.rows.unwrap().runs(20).flat_map(|run| &numbers[run.start * whole.inputs..run.end * whole.inputs]);
        assert!(unpacked(&checkpoint.matrix(&part).unwrap()) == runs.copied().collect::<Vec<_>>(), "{name}");
        assert!(checkpoint.matrix(&whole.rows(120, 9, 9, 9)).is_err(), "{name}");
    }
}

/// The tensors of a fixture's file.
fn stored(name: &str) -> BTreeMap<String, (StoredDtype, Vec<usize>, Vec<u8>)> {
    let bytes = fs::read(fixture(name).join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let owned = |view: TensorView<'_>| (view.dtype(), view.shape().to_vec(), view.data().to_vec());
    tensors.iter().map(|(name, view)| (name.to_owned(), owned(view))).collect()
}

#[test]
fn memory_stays_close_to_the_file() {
    for name in FIXTURES {
        let (checkpoint, stored) = (open(name), stored(name));
        let (mut memory, mut file) = (0, 0);
        for (linear, _) in matrices(name) {
            memory += bytes_of(&checkpoint.matrix(&linear).unwrap());
            let layer = linear.weight.strip_suffix("weight").unwrap();
            file += stored
                .iter()
                .filter(|(name, _)| name.starts_with(layer) && !name.ends_with(".bias"))
                .map(|(_, (_, _, bytes))| bytes.len())
                .sum::<usize>();
        }
        assert!(10 * memory <= 11 * file, "{name}: {memory} bytes of {file}");
    }
}

#[test]
fn the_tensors_are_named_and_counted() {
    for name in FIXTURES {
        let checkpoint = open(name);
        let spec = checkpoint.spec();
        let blocks = (0..spec.num_blocks()).flat_map(|block| spec.block_tensors(block));
        let named: HashMap<String, TensorSpec> =
            spec.edge_tensors().into_iter().chain(blocks).map(|tensor| (tensor.name.clone(), tensor)).collect();
        for (tensor, (_, shape, bytes)) in stored(name) {
            // Neither is needed: the one is what the configuration implies, the other is about activations.
            if tensor.ends_with(".weight_shape") || tensor.ends_with(".input_scale") {
                continue;
            }
            let found = named.get(&tensor).unwrap_or_else(|| panic!("{name}: {tensor} is not named"));
            match found.values {
                // One scale for all or one a row, a layer that is packed or not: the file says it.
                Values::Otherwise => {
                    assert!(tensor.ends_with("_scale") || tensor.ends_with(".weight"), "{name}: {tensor}");
                }
                Values::Packed { .. } | Values::Bytes => assert_eq!(found.shape, shape, "{name}: {tensor}"),
                Values::Floats => assert_eq!(2 * found.elements(), bytes.len(), "{name}: {tensor}"),
            }
        }
        let packed: usize = matrices(name)
            .iter()
            .filter(|(linear, _)| linear.weight.contains("layers.0."))
            .map(|(linear, _)| bytes_of(&checkpoint.matrix(linear).unwrap()))
            .sum();
        let (planned, packed) =
            (spec.largest_block_bytes(Dtype::Bf16, Quant::Auto, (KvDtype::Bf16, 0)) as f64, packed as f64);
        assert!((packed..1.12 * packed + 4096.0).contains(&planned), "{name}: {planned} of {packed}");
    }
}

#[test]
fn experts_are_packed_one_by_one() {
    for name in ["fp8-qwen3_moe", "gptq-qwen3_moe"] {
        let checkpoint = open(name);
        let FfnSpec::Experts(experts) = &checkpoint.spec().blocks[0].ffn else { panic!("{name} has experts") };
        assert!(matches!(checkpoint.matrix(&experts.router).unwrap(), StoredMatrix::Floats(_)));
        let ExpertTensors::Separate { down, .. } = &experts.tensors else {
            panic!("{name} has three matrices an expert")
        };
        let down = linear(&down.replace("{}", "1"), checkpoint.spec().hidden_size, experts.intermediate);
        assert!(!matches!(checkpoint.matrix(&down).unwrap(), StoredMatrix::Floats(_)));
    }
}

/// What can be changed in a fixture before it is opened.
struct Broken {
    config: Value,
    tensors: BTreeMap<String, (StoredDtype, Vec<usize>, Vec<u8>)>,
}

impl Broken {
    fn tensor(&mut self, name: &str) -> &mut (StoredDtype, Vec<usize>, Vec<u8>) {
        self.tensors.get_mut(name).unwrap()
    }
}

/// The first block's layer `layer` of a changed fixture can't be read, for a reason that has these words.
fn fails(name: &str, layer: &str, change: impl FnOnce(&mut Broken), words: &[&str]) {
    let config = serde_json::from_slice(&fs::read(fixture(name).join("config.json")).unwrap()).unwrap();
    let mut broken = Broken { config, tensors: stored(name) };
    change(&mut broken);
    let dir = write(&broken);
    let weight = format!("model.layers.0.{layer}.weight");
    let (linear, _) = matrices(name).into_iter().find(|(linear, _)| linear.weight == weight).unwrap();
    let result: Result<_, CheckpointError> =
        Checkpoint::open(dir.path()).and_then(|checkpoint| checkpoint.matrix(&linear));
    let Err(error) = result else { panic!("{name}: no error that says {words:?}") };
    let message = error.to_string();
    for word in words {
        assert!(message.contains(word), "{message:?} lacks {word:?}");
    }
}

fn write(broken: &Broken) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("config.json"), broken.config.to_string()).unwrap();
    let views = broken
        .tensors
        .iter()
        .map(|(name, (dtype, shape, bytes))| (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
    fs::write(dir.path().join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
    dir
}

const Q: &str = "self_attn.q_proj";
const QWEIGHT: &str = "model.layers.0.self_attn.q_proj.qweight";
const INDICES: &str = "model.layers.0.self_attn.q_proj.g_idx";

#[test]
fn missing_tensors_are_named() {
    for (suffix, words) in [
        ("qweight", ["q_proj.weight", "q_proj.qweight"]),
        ("qzeros", ["q_proj", "q_proj.qzeros"]),
        ("scales", ["q_proj", "q_proj.scales"]),
        ("g_idx", ["q_proj", "q_proj.g_idx"]),
    ] {
        let name = format!("model.layers.0.{Q}.{suffix}");
        fails("gptq-llama", Q, |broken| drop(broken.tensors.remove(&name)), &words);
    }
    let scale = "model.layers.0.self_attn.q_proj.weight_scale_inv";
    fails("fp8-qwen3", Q, |broken| drop(broken.tensors.remove(scale)), &["q_proj.weight_scale_inv"]);
    let weight = "model.layers.0.self_attn.q_proj.weight";
    fails("fp8-qwen3", Q, |broken| drop(broken.tensors.remove(weight)), &[weight]);
    let zeros = "model.layers.0.self_attn.q_proj.weight_zero_point";
    fails("int4-qwen3", Q, |broken| drop(broken.tensors.remove(zeros)), &["weight_zero_point"]);
}

#[test]
fn groups_that_make_no_sense_are_found_out() {
    let set = |index: usize, group: i32| {
        move |broken: &mut Broken| {
            broken.tensor(INDICES).2[4 * index..4 * index + 4].copy_from_slice(&group.to_le_bytes());
        }
    };
    fails("gptq-llama", Q, set(5, 2), &["q_proj", "input 5", "group 2 of 2"]);
    fails("gptq-llama", Q, set(0, -1), &["input 0", "group -1"]);
    fails("gptq-llama", Q, set(0, i32::MAX), &["input 0", "2147483647"]);
    let all = |broken: &mut Broken| broken.tensor(INDICES).2.fill(0);
    fails("gptq-llama", Q, all, &["64 inputs into group 0", "32"]);
    let longer = |broken: &mut Broken| {
        let (_, shape, bytes) = broken.tensor(INDICES);
        (*shape, *bytes) = (vec![65], vec![0; 260]);
    };
    fails("gptq-llama", Q, longer, &["g_idx", "[65]", "[64]"]);
    let size = |size: i64| move |broken: &mut Broken| broken.config["quantization_config"]["group_size"] = json!(size);
    fails("gptq-llama", Q, size(48), &["64 inputs", "48"]);
    fails("gptq-llama", Q, size(16), &["qzeros", "[2, 8]", "[4, 8]"]);
    fails("awq-phi3", "mlp.down_proj", size(64), &["96 inputs", "64"]);
}

#[test]
fn shapes_and_data_types_are_checked() {
    let turned = |broken: &mut Broken| broken.tensor(QWEIGHT).1.reverse();
    fails("gptq-llama", Q, turned, &["qweight", "[64, 8]", "[8, 64]"]);
    let floats = |broken: &mut Broken| broken.tensor(QWEIGHT).0 = StoredDtype::F32;
    fails("gptq-llama", Q, floats, &["qweight", "F32", "I32"]);
    let bits = |broken: &mut Broken| broken.config["quantization_config"]["bits"] = json!(8);
    fails("gptq-llama", Q, bits, &["qweight", "[8, 64]", "[16, 64]"]);
    let wide = |broken: &mut Broken| {
        let (dtype, shape, bytes) = broken.tensor("model.layers.0.self_attn.q_proj.scales");
        (*dtype, *bytes) = (StoredDtype::F32, vec![0; 4 * shape.iter().product::<usize>()]);
    };
    fails("gptq-llama", Q, wide, &["scales", "F32", "F16 or BF16"]);
    let codes = "model.layers.0.self_attn.q_proj.weight";
    fails("fp8-qwen3", Q, |broken| broken.tensor(codes).0 = StoredDtype::F8_E5M2, &[codes, "F8_E5M2", "F8_E4M3"]);
    let tile = |broken: &mut Broken| broken.config["quantization_config"]["weight_block_size"] = json!([64, 32]);
    fails("fp8-qwen3", Q, tile, &["weight_scale_inv", "[4, 2]", "[2, 2]"]);
    let none = |broken: &mut Broken| broken.config["quantization_config"]["weight_block_size"] = json!(null);
    fails("fp8-qwen3", Q, none, &["weight_scale_inv", "[4, 2]", "[128, 1]"]);
    let scale = "model.layers.0.self_attn.q_proj.weight_scale_inv";
    let signed = |broken: &mut Broken| {
        let (dtype, shape, bytes) = broken.tensor(scale);
        (*dtype, *bytes) = (StoredDtype::I8, vec![0; shape.iter().product()]);
    };
    fails("fp8-qwen3", Q, signed, &[scale, "I8", "F8_E8M0"]);
}

#[test]
fn layers_that_were_left_as_they_were_are_read_as_numbers() {
    let config = serde_json::from_slice(&fs::read(fixture("gptq-llama").join("config.json")).unwrap()).unwrap();
    let mut broken = Broken { config, tensors: stored("gptq-llama") };
    let weight = format!("model.layers.0.{Q}.weight");
    broken.tensors.insert(weight.clone(), (StoredDtype::F16, vec![64, 64], vec![0; 2 * 64 * 64]));
    broken.tensors.remove(QWEIGHT);
    let dir = write(&broken);
    let matrix = Checkpoint::open(dir.path()).unwrap().matrix(&linear(&weight, 64, 64)).unwrap();
    assert!(matches!(matrix, StoredMatrix::Floats(data) if data.dtype == Dtype::F16));
}

#[test]
fn truncated_files_are_found_out() {
    for name in ["fp8-qwen3", "gptq-phi3", "awq-phi3"] {
        let dir = tempfile::tempdir().unwrap();
        fs::copy(fixture(name).join("config.json"), dir.path().join("config.json")).unwrap();
        let (path, bytes) =
            (dir.path().join("model.safetensors"), fs::read(fixture(name).join("model.safetensors")).unwrap());
        let (linear, _) = matrices(name).swap_remove(0);
        fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
        let error = Checkpoint::open(dir.path()).unwrap().matrix(&linear).unwrap_err().to_string();
        assert!(error.contains("truncated"), "{error}");
        // After the header was read, too.
        fs::write(&path, &bytes).unwrap();
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        checkpoint.matrix(&linear).unwrap();
        fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(9000).unwrap();
        assert!(checkpoint.matrix(&linear).is_err());
    }
}
