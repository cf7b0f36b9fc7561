//! Checkpoints made on the spot, as large as wanted, and a process of its own that loads one and says what that took.

use std::{
    fs::File,
    io::{BufWriter, Write},
    path::Path,
    process::Command,
    time::Instant,
};

use helion::{
    engine::{DeviceChoice, Edges, EdgesOptions, Engine, EngineOptions},
    model::{Dtype, Quant, checkpoint::Checkpoint, family::read_config, spec::TensorSpec},
};
use serde_json::{Value, json};

/// The environment variable that makes a process load a checkpoint: its folder and what to do, separated by a newline.
const WHAT_TO_LOAD: &str = "HELION_TEST_WHAT_TO_LOAD";

/// The shape of a llama checkpoint.
#[derive(Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) hidden: usize,
    pub(crate) intermediate: usize,
    pub(crate) blocks: usize,
    pub(crate) heads: usize,
    pub(crate) kv_heads: usize,
    pub(crate) vocab: usize,
    pub(crate) shards: usize,
}

impl Shape {
    /// Makes the checkpoint in `dir`: random weights of a size that occurs, in bf16. Returns the bytes of its weights.
    pub(crate) fn write(&self, dir: &Path) -> u64 {
        let Self { hidden, intermediate, blocks, heads, kv_heads, vocab, shards } = *self;
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden,
            "intermediate_size": intermediate, "num_hidden_layers": blocks, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "head_dim": hidden / heads, "vocab_size": vocab,
            "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 4096, "hidden_act": "silu",
            "tie_word_embeddings": false, "torch_dtype": "bfloat16",
        });
        std::fs::write(dir.join("config.json"), config.to_string()).unwrap();
        // The index has to be there for the checkpoint to be opened, and the checkpoint says which tensors there are.
        let index = |map: &Value| {
            std::fs::write(dir.join("model.safetensors.index.json"), json!({ "weight_map": map }).to_string()).unwrap();
        };
        index(&json!({ "none": "none" }));
        let spec = Checkpoint::open(dir).unwrap().spec().clone();
        let parts: Vec<Vec<TensorSpec>> =
            (0..blocks).map(|block| spec.block_tensors(block)).chain([spec.edge_tensors()]).collect();
        let (mut map, mut bytes) = (serde_json::Map::new(), 0);
        for (number, parts) in parts.chunks(parts.len().div_ceil(shards)).enumerate() {
            let name = format!("model-{number:05}.safetensors");
            let tensors: Vec<&TensorSpec> = parts.iter().flatten().collect();
            bytes += write_shard(&dir.join(&name), &tensors);
            map.extend(tensors.iter().map(|tensor| (tensor.name.clone(), Value::from(name.as_str()))));
        }
        index(&Value::Object(map));
        bytes
    }
}

/// Writes one file, a piece at a time.
fn write_shard(path: &Path, tensors: &[&TensorSpec]) -> u64 {
    let (mut header, mut end) = (serde_json::Map::new(), 0);
    for tensor in tensors {
        let start = end;
        end += 2 * tensor.elements();
        let entry = json!({ "dtype": "BF16", "shape": tensor.shape, "data_offsets": [start, end] });
        header.insert(tensor.name.clone(), entry);
    }
    let header = Value::Object(header).to_string();
    let mut file = BufWriter::new(File::create(path).unwrap());
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    let random = random_bytes();
    for (index, tensor) in tensors.iter().enumerate() {
        let mut left = 2 * tensor.elements();
        if tensor.shape.len() == 1 {
            let ones: Vec<u8> = (0..tensor.elements()).flat_map(|_| half::bf16::ONE.to_le_bytes()).collect();
            file.write_all(&ones).unwrap();
            continue;
        }
        // Another piece of the same numbers for each tensor.
        let mut from = index * 5_003 * 2 % random.len();
        while left > 0 {
            let size = left.min(random.len() - from);
            file.write_all(&random[from..from + size]).unwrap();
            (left, from) = (left - size, 0);
        }
    }
    file.into_inner().unwrap();
    end as u64
}

/// Two million numbers in bf16, nearly normal, with a standard deviation of 0.02; not a multiple of a row, so that no two
/// rows are alike.
fn random_bytes() -> Vec<u8> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 24) as f32 - 0.5
    };
    let mut normal = || (0..6).map(|_| next()).sum::<f32>() * 0.02 * 2f32.sqrt();
    (0..2_000_003).flat_map(|_| half::bf16::from_f32(normal()).to_le_bytes()).collect()
}

/// A model of two blocks with rows of 256 numbers, so that they can be cut into all blocks, and with enough of them that threads share
/// the products of a few rows. Its weights are made up.
pub(crate) fn wide(family: &str) -> Checkpoint {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(family);
    let mut config: Value = serde_json::from_slice(&std::fs::read(fixture.join("config.json")).unwrap()).unwrap();
    let sizes = json!({
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 8,
        "num_key_value_heads": 4, "head_dim": 32, "vocab_size": 512,
    });
    config.as_object_mut().unwrap().extend(sizes.as_object().unwrap().clone());
    if let Some(types) = config.get_mut("layer_types").and_then(Value::as_array_mut) {
        types.truncate(2);
    }
    Checkpoint::random(read_config(&config.to_string()).unwrap())
}

/// Which part of a checkpoint is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) enum What {
    Blocks,
    Edges,
}

/// What loading took.
#[derive(Debug, serde::Serialize, serde::Deserialize)]
pub(crate) struct Report {
    /// Memory that the process had before, bytes.
    pub(crate) before: u64,
    /// The most that it had until the end, bytes.
    pub(crate) peak: u64,
    /// What the weights take, bytes.
    pub(crate) loaded: u64,
    pub(crate) seconds: f64,
}

impl Report {
    /// The most memory that loading took, bytes.
    pub(crate) fn grown(&self) -> u64 {
        self.peak - self.before
    }
}

/// Loads in a process of its own: this same program, run with `args`, in which [`load_if_asked`] must be reached.
pub(crate) fn load_in_child(args: &[&str], dir: &Path, what: What, quant: Quant) -> Report {
    let asked = serde_json::to_string(&(dir, what, quant.to_string())).unwrap();
    let output = Command::new(std::env::current_exe().unwrap()).args(args).env(WHAT_TO_LOAD, asked).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    // A test's process says other things, too, perhaps on the same line.
    let report = text.lines().find_map(|line| Some(&line[line.find("{\"before")?..]));
    let report = report.unwrap_or_else(|| panic!("{text} {}", String::from_utf8_lossy(&output.stderr)));
    serde_json::from_str(report).unwrap()
}

/// Does what [`load_in_child`] asked this process for. Whether it was asked.
pub(crate) fn load_if_asked() -> bool {
    let Ok(asked) = std::env::var(WHAT_TO_LOAD) else { return false };
    let (dir, what, quant): (std::path::PathBuf, What, String) = serde_json::from_str(&asked).unwrap();
    let quant: Quant = quant.parse().unwrap();
    let checkpoint = Checkpoint::open(&dir).unwrap();
    let (before, start) = (memory("VmRSS:"), Instant::now());
    let loaded = match what {
        What::Blocks => {
            let blocks = 0..checkpoint.spec().num_blocks();
            let options = EngineOptions { quant, cache_tokens: 64, ..EngineOptions::new(blocks, Dtype::Bf16) };
            let engine = Engine::load(&checkpoint, options, &mut |_, _| {}).unwrap();
            engine.loaded_bytes()
        }
        What::Edges => {
            let options = EdgesOptions { dtype: Dtype::Bf16, quant, device: DeviceChoice::Cpu, threads: None };
            Edges::load(&checkpoint, options).unwrap().loaded_bytes()
        }
    };
    let report = Report { before, peak: memory("VmHWM:"), loaded, seconds: start.elapsed().as_secs_f64() };
    println!("{}", serde_json::to_string(&report).unwrap());
    true
}

/// A line of `/proc/self/status`, bytes.
fn memory(line: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|found| found.starts_with(line)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}
