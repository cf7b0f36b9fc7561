//! Models that are made on the spot, large enough that threads share the work and that every buffer of a pass is over 4 KiB.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    sync::atomic::AtomicUsize,
};

use rayon::ThreadPoolBuilder;
use safetensors::{Dtype as StoredDtype, serialize_to_file, tensor::TensorView};
use serde_json::json;

use super::*;
use crate::model::family::read_config;

const HIDDEN: usize = 1024;
const VOCAB: usize = 3000;

/// Makes a checkpoint of two blocks with random weights in bf16.
fn checkpoint(family: &str, dir: &Path) -> Checkpoint {
    let mut config = json!({
        "model_type": family, "hidden_size": HIDDEN, "intermediate_size": 512, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": VOCAB, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "max_position_embeddings": 4096, "hidden_act": "silu", "tie_word_embeddings": false,
        "torch_dtype": "bfloat16",
    });
    if family == "mixtral" {
        config["num_local_experts"] = json!(4);
        config["num_experts_per_tok"] = json!(2);
    }
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    // The index has to be there for the checkpoint to be opened, and the checkpoint says which tensors there are.
    let index = dir.join("model.safetensors.index.json");
    fs::write(&index, json!({ "weight_map": { "none": "none" } }).to_string()).unwrap();
    let spec = Checkpoint::open(dir).unwrap().spec().clone();
    let tensors: Vec<_> = (0..2).flat_map(|block| spec.block_tensors(block)).chain(spec.edge_tensors()).collect();
    let mut state = 1_u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        ((state >> 8) as f32 / (1 << 24) as f32 - 0.5) * 0.1
    };
    let bytes: Vec<Vec<u8>> = tensors
        .iter()
        .map(|tensor| {
            let mean = if tensor.shape.len() == 1 { 1.0 } else { 0.0 };
            (0..tensor.elements()).flat_map(|_| half::bf16::from_f32(mean + next()).to_le_bytes()).collect()
        })
        .collect();
    let views = tensors.iter().zip(&bytes).map(|(tensor, bytes)| {
        (tensor.name.clone(), TensorView::new(StoredDtype::BF16, tensor.shape.clone(), bytes).unwrap())
    });
    serialize_to_file(views, None, &dir.join("model.safetensors")).unwrap();
    let map: serde_json::Map<_, _> =
        tensors.iter().map(|tensor| (tensor.name.clone(), json!("model.safetensors"))).collect();
    fs::write(&index, json!({ "weight_map": map }).to_string()).unwrap();
    Checkpoint::open(dir).unwrap()
}

/// One whose experts are in MXFP4, with made-up numbers.
fn with_mxfp4() -> Checkpoint {
    let config = fs::read(fixture("gpt_oss").join("config.json")).unwrap();
    let mut config: serde_json::Value = serde_json::from_slice(&config).unwrap();
    let sizes = json!({
        "hidden_size": HIDDEN, "intermediate_size": 512, "num_hidden_layers": 2, "head_dim": 64, "vocab_size": VOCAB,
        "layer_types": ["sliding_attention", "full_attention"],
    });
    config.as_object_mut().unwrap().extend(sizes.as_object().unwrap().clone());
    Checkpoint::random(read_config(&config.to_string()).unwrap())
}

fn engine(checkpoint: &Checkpoint, dtype: Dtype, quant: Quant, threads: usize) -> Engine {
    let options =
        EngineOptions { threads: Some(threads), quant, cache_tokens: 4096, ..EngineOptions::new(0..2, dtype) };
    Engine::load(checkpoint, options, &mut |_, _| {}).unwrap()
}

/// Rows that look random.
fn states(dtype: Dtype, rows: usize) -> HiddenStates {
    let values: Vec<f32> = (0..rows * HIDDEN).map(|i| ((i * 7919 % 10_007) as f32 - 5003.0) / 3000.0).collect();
    HiddenStates::from_f32(dtype, HIDDEN, &values)
}

fn large_step(engine: &Engine, cache: Cache, lanes: &[LaneRun], keep: Keep) -> (Cache, HiddenStates) {
    let (mut job, answers) = job(cache, lanes);
    job.hidden = states(Dtype::Bf16, job.hidden.rows);
    job.keep = keep;
    engine.submit(job);
    let (cache, result) = answers.recv_timeout(PATIENCE).unwrap();
    (cache, result.unwrap().hidden)
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let plain = [("llama", Quant::Auto, "none"), ("mixtral", Quant::Auto, "none"), ("gpt_oss", Quant::Auto, "mxfp4")];
    let packed = [Quant::Q8_0, Quant::Q4_0, Quant::Q4K, Quant::Q6K];
    let packed = packed.into_iter().zip(["q8_0", "q4_0", "q4_k", "q6_k"]).map(|(quant, name)| ("llama", quant, name));
    for (family, quant, name) in plain.into_iter().chain(packed) {
        let dir = tempfile::tempdir().unwrap();
        let checkpoint = if family == "gpt_oss" { with_mxfp4() } else { checkpoint(family, dir.path()) };
        let outputs = [1, 2, 3, 4].map(|threads| {
            let engine = engine(&checkpoint, Dtype::Bf16, quant, threads);
            assert_eq!(engine.quantization(), name);
            let cache = engine.cache(0..2).unwrap();
            let (cache, prompts) = large_step(&engine, cache, &[run(0, 0, 12), run(1, 0, 7)], Keep::All);
            let (_, tokens) = large_step(&engine, cache, &[run(0, 12, 1), run(1, 7, 1)], Keep::All);
            [prompts.bytes, tokens.bytes]
        });
        assert!(outputs.iter().all(|output| *output == outputs[0]), "{family} in {name}");
    }
}

#[test]
fn numbers_of_threads_have_limits() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = checkpoint("llama", dir.path());
    for count in [0, MAX_THREADS + 1, usize::MAX] {
        let options = EngineOptions { threads: Some(count), ..options(0..2) };
        let error = Engine::load(&checkpoint, options, &mut |_, _| {}).unwrap_err().to_string();
        assert_eq!(error, format!("{count} threads were asked for: give a number from 1 to 1024"));
        let edges = Edges::load(&checkpoint, edges_options(Some(count)));
        assert!(matches!(edges, Err(LoadError::Threads(ThreadsError::Count { .. }))));
    }
}

fn edges_options(threads: Option<usize>) -> EdgesOptions {
    EdgesOptions { dtype: Dtype::Bf16, quant: Quant::Auto, device: DeviceChoice::Cpu, threads }
}

#[test]
fn generations_share_the_head_and_get_what_they_would_get_alone() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = checkpoint("llama", dir.path());
    for threads in [None, Some(1), Some(2)] {
        let edges = Edges::load(&checkpoint, edges_options(threads)).unwrap();
        let all = states(Dtype::Bf16, 20);
        let expected = edges.logits(&all).unwrap();
        assert_eq!(expected.len(), 20 * VOCAB);
        std::thread::scope(|scope| {
            for number in 0..8 {
                let (edges, all, expected) = (&edges, &all, &expected);
                scope.spawn(move || {
                    let (seat, mut logits) = (edges.seat(), Vec::new());
                    for round in 0..5 {
                        let rows = number + round..number + round + 1 + number % 3;
                        logits = edges.logits_at(&seat, &all.slice(rows.clone()), logits).unwrap();
                        assert!(logits == expected[rows.start * VOCAB..rows.end * VOCAB], "{number} {round}");
                    }
                });
            }
        });
        let (seat, mut logits) = (edges.seat(), Vec::with_capacity(VOCAB));
        let place = logits.as_ptr();
        logits = edges.logits_at(&seat, &all.slice(7..8), logits).unwrap();
        let columns = 0..VOCAB;
        let differ: Vec<_> = columns.filter(|column| logits[*column] != expected[7 * VOCAB + column]).collect();
        let again = edges.logits_at(&seat, &all.slice(7..8), Vec::new()).unwrap() == expected[7 * VOCAB..8 * VOCAB];
        assert!(differ.is_empty(), "on {threads:?} threads logits differ, {again} the second time: {differ:?}");
        assert_eq!(logits.as_ptr(), place, "the memory is used again");
        assert!(edges.logits_at(&seat, &all.slice(3..3), logits).unwrap().is_empty());
    }
}

/// The system's allocator, which counts what watched threads ask it for.
struct Counting;

/// From this size on allocations count.
const LARGE: usize = 4096 + 1;
/// Lanes of the session that is watched.
const LANES: usize = 3;
/// Sessions that are watched together, with one lane each.
const SESSIONS: usize = 64;
/// In how many rounds of steps every thread has had its part in everything.
const ROUNDS: usize = 20;
/// Bytes of an answer: the one thing that is allocated on purpose.
const ANSWER: usize = LANES * HIDDEN * 2;

thread_local! {
    static WATCHED: Cell<bool> = const { Cell::new(false) };
}
static ANSWERS: AtomicUsize = AtomicUsize::new(0);
static OTHERS: AtomicUsize = AtomicUsize::new(0);
static LARGEST: AtomicUsize = AtomicUsize::new(0);

fn count(size: usize) {
    if size >= LARGE && WATCHED.get() {
        if size == ANSWER {
            ANSWERS.fetch_add(1, Ordering::Relaxed);
        } else {
            OTHERS.fetch_add(1, Ordering::Relaxed);
            LARGEST.fetch_max(size, Ordering::Relaxed);
        }
    }
}

// SAFETY: every call is handed to the system's allocator as it is.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: the caller keeps the contract, which is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size());
        // SAFETY: likewise.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, old: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(size);
        // SAFETY: likewise.
        unsafe { System.realloc(old, layout, size) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: likewise.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Watches the engine's threads, or no longer: `done` runs on one of them, and reaches the others through their pool.
fn watch(engine: &Engine, watched: bool) {
    let (told, is_told) = mpsc::sync_channel(1);
    let (mut job, _) = job(engine.cache(0..2).unwrap(), &[run(0, 0, 1)]);
    job.hidden = states(Dtype::Bf16, 1);
    job.done = Box::new(move |_, _| {
        rayon::broadcast(|_| WATCHED.set(watched));
        told.send(()).unwrap();
    });
    engine.submit(job);
    is_told.recv_timeout(PATIENCE).unwrap();
}

/// Has `round` do so many steps, of watched threads, until nothing large is allocated but `answers` answers a step.
///
/// A buffer is made when a thread first has a part in what it is for, which on a busy machine may be long after the first steps. But
/// that is once: there are few buffers, and many rounds.
fn settles(what: &str, steps: usize, answers: usize, mut round: impl FnMut()) {
    found();
    let mut others = Vec::new();
    for _ in 0..ROUNDS {
        round();
        let [made, number, largest] = found();
        assert_eq!(made, steps * answers, "{what}: answers");
        if number == 0 {
            return;
        }
        others.push((number, largest));
    }
    panic!("{what}: other large allocations, and the largest of these, in each {steps} steps: {others:?}");
}

/// Answers, other large allocations, and the largest of these, since the last time.
fn found() -> [usize; 3] {
    [&ANSWERS, &OTHERS, &LARGEST].map(|number| number.swap(0, Ordering::Relaxed))
}

/// A session with three lanes.
fn lanes_decode(engine: &Engine, steps: usize) {
    let lanes = |position: usize, tokens: usize| [0, 1, 2].map(|lane| run(lane, position, tokens));
    let (cache, _) = large_step(engine, engine.cache(0..2).unwrap(), &lanes(0, 20), Keep::LastOfEachLane);
    let (mut cache, mut positions) = (Some(cache), 20..);
    watch(engine, true);
    settles("three lanes", steps, 1, || {
        for position in positions.by_ref().take(steps) {
            let step = large_step(engine, cache.take().unwrap(), &lanes(position, 1), Keep::LastOfEachLane);
            cache = Some(step.0);
        }
    });
    watch(engine, false);
}

/// As many sessions as a node may well have, all of them in every pass.
fn sessions_decode(engine: &Engine, steps: usize) {
    let mut caches: Vec<Cache> = (0..SESSIONS).map(|_| engine.cache(0..2).unwrap()).collect();
    let mut step = |position: usize| {
        let (go_on, held) = mpsc::sync_channel::<()>(1);
        let (arrived, here) = mpsc::sync_channel(1);
        let (mut first, _) = job(engine.cache(0..2).unwrap(), &[run(0, 0, 1)]);
        first.hidden = states(Dtype::Bf16, 1);
        first.done = Box::new(move |_, _| {
            arrived.send(()).unwrap();
            held.recv_timeout(PATIENCE).unwrap();
        });
        engine.submit(first);
        here.recv_timeout(PATIENCE).unwrap();
        let submit = |cache: Cache| {
            let (mut job, answers) = job(cache, &[run(0, position, 1)]);
            job.hidden = states(Dtype::Bf16, 1);
            engine.submit(job);
            answers
        };
        let answers: Vec<_> = caches.drain(..).map(submit).collect();
        go_on.send(()).unwrap();
        let answered = |answers: &Receiver<Answer>| answers.recv_timeout(PATIENCE).unwrap();
        caches.extend(answers.iter().map(answered).map(|(cache, result)| (cache, result.unwrap()).0));
    };
    let mut positions = 0..;
    watch(engine, true);
    // Their answers are small.
    settles("many sessions", steps, 0, || {
        let passes = engine.load_now().passes;
        positions.by_ref().take(steps).for_each(&mut step);
        let passes = engine.load_now().passes - passes;
        assert_eq!(passes as usize, 2 * steps, "they did not share their passes");
    });
    watch(engine, false);
}

/// A client's part of a token: the logits, and the embedding of what was chosen.
fn edges_decode(edges: &Edges, threads: usize, steps: usize) {
    let pool = ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
    pool.install(|| {
        let (seat, mut logits) = (edges.seat(), Vec::new());
        rayon::broadcast(|_| WATCHED.set(true));
        settles("a client", steps, 1, || {
            for step in 0..steps {
                let ids = [0, 1, 2].map(|lane| (7 * step + lane) as u32);
                let hidden = edges.embed(&ids, Dtype::Bf16).unwrap();
                logits = edges.logits_at(&seat, &hidden, std::mem::take(&mut logits)).unwrap();
            }
        });
        rayon::broadcast(|_| WATCHED.set(false));
    });
}

/// One test, because what is counted is counted for the process.
#[test]
fn a_decode_step_allocates_nothing_large_but_its_answer() {
    let cases = [
        ("llama", Dtype::F32, Quant::Auto, 1, 50),
        ("llama", Dtype::Bf16, Quant::Auto, 1, 20),
        ("llama", Dtype::Bf16, Quant::Auto, 2, 50),
        ("llama", Dtype::Bf16, Quant::Q8_0, 2, 20),
        ("llama", Dtype::Bf16, Quant::Q4K, 2, 20),
        ("mixtral", Dtype::F32, Quant::Auto, 1, 20),
        ("gpt_oss", Dtype::Bf16, Quant::Auto, 1, 20),
    ];
    for (family, dtype, quant, threads, steps) in cases {
        println!("{family} in {dtype} and {quant} on {threads} threads");
        let dir = tempfile::tempdir().unwrap();
        let checkpoint = if family == "gpt_oss" { with_mxfp4() } else { checkpoint(family, dir.path()) };
        let engine = engine(&checkpoint, dtype, quant, threads);
        lanes_decode(&engine, steps);
        sessions_decode(&engine, 5);
        let edges = Edges::load(&checkpoint, EdgesOptions { dtype, quant, ..edges_options(None) }).unwrap();
        edges_decode(&edges, threads, steps);
    }
}
