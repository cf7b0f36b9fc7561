//! Blocks on a device against the references and against the CPU's engine. The device is candle's CPU, or, in a build with
//! the feature and on a machine that has one, a GPU: `HELION_TEST_DEVICE=cuda`.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use candle_core::{Device, Tensor};
use safetensors::SafeTensors;

use super::plan::{Plan, Run, Shape};
use crate::{
    engine::{
        Cache, DeviceChoice, Edges, EdgesOptions, Engine, EngineOptions, HiddenStates, Job, Keep, LaneRun, Place,
        StepError, Target, snapshot::tests::moved, tests::with_an_infinity,
    },
    model::{Dtype, Quant, checkpoint::Checkpoint},
};

/// Largest difference from the reference in f32, in standard deviations of the reference.
const TOLERANCE: f64 = 1e-4;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn device() -> Device {
    match std::env::var("HELION_TEST_DEVICE").as_deref() {
        Ok("cuda") => Device::new_cuda(0).unwrap(),
        _ => Device::Cpu,
    }
}

fn options(checkpoint: &Checkpoint, dtype: Dtype, quant: Quant) -> EngineOptions {
    EngineOptions { cache_tokens: 1024, quant, ..EngineOptions::new(0..checkpoint.spec().num_blocks(), dtype) }
}

fn on_device(checkpoint: &Checkpoint, options: EngineOptions) -> Engine {
    Engine::load_on(Target::Device(device()), checkpoint, options, &mut |_, _| {}).unwrap()
}

fn on_cpu(checkpoint: &Checkpoint, options: EngineOptions) -> Engine {
    Engine::load_on(Target::Cpu, checkpoint, options, &mut |_, _| {}).unwrap()
}

fn edges(checkpoint: &Checkpoint) -> Edges {
    let options = EdgesOptions { dtype: Dtype::F32, quant: Quant::Auto, device: DeviceChoice::Cpu, threads: None };
    Edges::load(checkpoint, options).unwrap()
}

type Answer = (Cache, Result<HiddenStates, StepError>);

fn submit(engine: &Engine, cache: Cache, lanes: &[LaneRun], hidden: HiddenStates) -> mpsc::Receiver<Answer> {
    let (answer, answers) = mpsc::sync_channel(1);
    engine.submit(Job {
        cache,
        lanes: lanes.to_vec(),
        hidden,
        rope_length: None,
        keep: Keep::All,
        deadline: Instant::now() + Duration::from_secs(60),
        cancelled: Arc::default(),
        done: Box::new(move |cache, result| answer.send((cache, result.map(|output| output.hidden))).unwrap()),
    });
    answers
}

/// One session, whose steps must succeed.
struct Session<'a> {
    engine: &'a Engine,
    cache: Option<Cache>,
}

impl<'a> Session<'a> {
    fn new(engine: &'a Engine) -> Self {
        Self { engine, cache: Some(engine.cache(engine.span()).unwrap()) }
    }

    fn step(&mut self, lanes: &[LaneRun], hidden: HiddenStates) -> Vec<f32> {
        let answers = submit(self.engine, self.cache.take().unwrap(), lanes, hidden);
        let (cache, result) = answers.recv_timeout(Duration::from_secs(60)).unwrap();
        self.cache = Some(cache);
        result.unwrap().to_f32()
    }
}

fn run(lane: u32, position: usize, tokens: usize) -> LaneRun {
    LaneRun { lane, position, tokens }
}

/// Largest difference, in standard deviations of what was expected.
fn difference(found: &[f32], expected: &[f32]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let count = expected.len() as f64;
    let mean = expected.iter().map(|x| f64::from(*x)).sum::<f64>() / count;
    let deviation = (expected.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum::<f64>() / count).sqrt();
    let worst = found.iter().zip(expected).map(|(a, b)| f64::from((a - b).abs()));
    // Not `max`, which would pass over a NaN.
    worst.fold(0.0, |worst, each| if each <= worst { worst } else { each }) / deviation
}

#[test]
fn a_session_goes_on_as_if_it_had_not_moved() {
    for (family, dtype) in [("llama", Dtype::F32), ("gemma3_text", Dtype::Bf16), ("qwen3", Dtype::F16)] {
        let checkpoint = Checkpoint::open(&fixtures().join(family)).unwrap();
        let (here, there) = (
            on_device(&checkpoint, options(&checkpoint, dtype, Quant::Auto)),
            on_device(&checkpoint, options(&checkpoint, dtype, Quant::Auto)),
        );
        let width = checkpoint.spec().hidden_size;
        let rows = |count: usize, seed: usize| {
            let values: Vec<f32> = (0..count * width).map(|i| (((i + seed) * 37 % 101) as f32 - 50.0) / 30.0).collect();
            HiddenStates::from_f32(dtype, width, &values)
        };
        let mut session = Session::new(&here);
        session.step(&[run(0, 0, 37), run(2, 0, 5)], rows(42, 0));
        let mut copy =
            Session { engine: &there, cache: session.cache.as_ref().map(|cache| moved(&here, cache, &there, 5000)) };
        for position in 37..40 {
            let runs = [run(0, position, 1), run(2, position - 32, 1)];
            let expected = session.step(&runs, rows(2, position));
            assert_eq!(copy.step(&runs, rows(2, position)), expected, "{family}");
        }
    }
}

/// A lane that begins as a copy of lane 0.
const COPY: u32 = 4;

/// The numbers of a golden tensor.
fn golden(family: &str) -> HashMap<String, Vec<f32>> {
    let bytes = fs::read(fixtures().join(family).join("golden.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let floats = tensors.iter().filter(|(_, view)| view.dtype() == safetensors::Dtype::F32);
    floats
        .map(|(name, view)| {
            (name.to_owned(), view.data().as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
        })
        .collect()
}

/// The steps of a session that has everything: chunks of a prompt beside other lanes, decoding, a run of several tokens,
/// a rollback, lanes that end, one that begins late, and a copied one. Each with its tokens.
fn story(engine: &Engine, edges: &Edges, wire: Dtype) -> Vec<f32> {
    let (mut session, vocab) = (Session::new(engine), edges.vocab() as u32);
    let steps: [&[LaneRun]; 11] = [
        &[run(0, 0, 19), run(1, 0, 5)],
        &[run(0, 19, 21), run(1, 5, 1), run(2, 0, 33)],
        &[run(1, 6, 1), run(0, 40, 1), run(2, 33, 1)],
        &[run(2, 34, 1), run(0, 41, 1), run(1, 7, 1)],
        &[run(0, 42, 4), run(1, 8, 4), run(2, 35, 2)],
        &[run(0, 20, 3), run(2, 36, 1)],
        &[run(0, 23, 1), run(3, 0, 1), run(2, 37, 1)],
        &[run(3, 1, 17), run(0, 24, 1)],
        &[run(1, 2, 1)],
        &[run(COPY, 25, 2), run(0, 25, 1)],
        &[run(0, 26, 1), run(COPY, 27, 7)],
    ];
    let mut outputs = Vec::new();
    for (number, lanes) in steps.into_iter().enumerate() {
        if number == 9 {
            // Amid a page, which the first of the two to write to it has to copy.
            session.cache.as_mut().unwrap().copy_lanes(&[(0, COPY)]);
        }
        let tokens = lanes.iter().flat_map(|run| (run.position..run.position + run.tokens).map(|p| (run.lane, p)));
        let ids: Vec<u32> = tokens.map(|(lane, p)| (lane * 131 + p as u32 * 17 + number as u32) % vocab).collect();
        outputs.extend(session.step(lanes, edges.embed(&ids, wire).unwrap()));
    }
    outputs
}

/// A story on the device and on the CPU.
fn both(checkpoint: &Checkpoint, dtype: Dtype, quant: Quant) -> [Vec<f32>; 2] {
    let (options, edges) = (options(checkpoint, dtype, quant), edges(checkpoint));
    let engines = [on_device(checkpoint, options.clone()), on_cpu(checkpoint, options)];
    engines.map(|engine| story(&engine, &edges, Dtype::F32))
}

/// How far the device is from the CPU's engine over a whole story in f32. Both may be off by [`TOLERANCE`].
fn distance(checkpoint: &Checkpoint) -> f64 {
    let [found, expected] = both(checkpoint, Dtype::F32, Quant::Auto);
    difference(&found, &expected)
}

/// Root mean square of a difference, in that of what was expected.
fn error(found: &[f32], expected: &[f32]) -> f64 {
    let square = |sum: f64, x: f64| sum + x * x;
    let wrong = found.iter().zip(expected).map(|(a, b)| f64::from(a - b)).fold(0.0, square);
    (wrong / expected.iter().map(|x| f64::from(*x)).fold(0.0, square)).sqrt()
}

const FAMILIES: [&str; 15] = [
    "bloom",
    "falcon-40b-style",
    "falcon-7b-style",
    "falcon-rw-style",
    "gemma3",
    "gemma3_text",
    "gpt_oss",
    "llama",
    "mistral",
    "mixtral",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "qwen3_moe",
];

#[test]
fn every_family_computes_what_transformers_computes() {
    for family in FAMILIES {
        let checkpoint = Checkpoint::open(&fixtures().join(family)).unwrap();
        let engine = on_device(&checkpoint, options(&checkpoint, Dtype::F32, Quant::Auto));
        let golden = golden(family);
        let (input, blocks) = (&golden["hidden.0"], checkpoint.spec().num_blocks());
        let hidden = HiddenStates::from_f32(Dtype::F32, checkpoint.spec().hidden_size, input);
        let whole = Session::new(&engine).step(&[run(0, 0, 40)], hidden.clone());
        let off = difference(&whole, &golden[&format!("hidden.{blocks}")]);
        assert!(off < TOLERANCE, "{family}: off by {off} standard deviations");
        let mut chunked = Session::new(&engine);
        let chunks = (0..40).step_by(7).flat_map(|first| {
            let rows = 7.min(40 - first);
            chunked.step(&[run(0, first, rows)], hidden.slice(first..first + rows))
        });
        let off = difference(&chunks.collect::<Vec<_>>(), &whole);
        assert!(off < TOLERANCE, "{family} in chunks: off by {off} standard deviations");
    }
}

#[test]
fn lanes_chunks_and_rollbacks_of_every_family_follow_the_cpu() {
    for family in FAMILIES {
        let checkpoint = Checkpoint::open(&fixtures().join(family)).unwrap();
        let off = distance(&checkpoint);
        assert!(off < 2.0 * TOLERANCE, "{family}: off by {off} standard deviations");
    }
}

#[test]
fn every_variant_follows_the_cpu() {
    let mut names: Vec<PathBuf> =
        fs::read_dir(fixtures().join("variants")).unwrap().map(|e| e.unwrap().path()).collect();
    names.retain(|path| path.join("config.json").exists());
    assert!(names.len() > 10);
    for path in names {
        let off = distance(&Checkpoint::open(&path).unwrap());
        assert!(off < 2.0 * TOLERANCE, "{}: off by {off} standard deviations", path.display());
    }
}

#[test]
fn halves_are_as_near_as_their_rounding() {
    for family in ["llama", "gpt_oss", "bloom"] {
        let checkpoint = Checkpoint::open(&fixtures().join(family)).unwrap();
        let [_, exact] = both(&checkpoint, Dtype::F32, Quant::Auto);
        for dtype in [Dtype::Bf16, Dtype::F16] {
            let [device, cpu] = both(&checkpoint, dtype, Quant::Auto).map(|found| error(&found, &exact));
            // The device rounds what products read and give, too, and experts are chosen by what comes of it.
            assert!(device < 10.0 * cpu, "{family} {dtype}: {device} on the device, {cpu} on the CPU");
        }
    }
}

#[test]
fn packed_checkpoints_and_blocks_follow_the_cpu() {
    // Widened, so exact.
    for path in ["fp8-qwen3", "gptq-llama", "awq-phi3", "int8-llama", "fp8-qwen3_moe"] {
        let checkpoint = Checkpoint::open(&fixtures().join("packed-checkpoints").join(path)).unwrap();
        let off = distance(&checkpoint);
        assert!(off < 2.0 * TOLERANCE, "{path}: off by {off} standard deviations");
    }
    // Products of blocks round activations to 8 bits, and experts are chosen by what comes of it.
    let cases = [
        ("llama", Quant::Q8_0, 0.15),
        ("phi3", Quant::Q4_0, 0.15),
        ("bloom", Quant::Q8_0, 0.1),
        ("mixtral", Quant::Q4_0, 0.2),
        // Three times as sensitive to any rounding, on the CPU as well.
        ("gpt_oss", Quant::Q8_0, 0.4),
    ];
    for (family, quant, most) in cases {
        let checkpoint = Checkpoint::open(&fixtures().join(family)).unwrap();
        let (options, edges) = (options(&checkpoint, Dtype::F32, quant), edges(&checkpoint));
        let [device, cpu] = [on_device(&checkpoint, options.clone()), on_cpu(&checkpoint, options)];
        assert_eq!(device.quantization(), cpu.quantization());
        // The CPU fills the last 16 rows of each matrix up.
        let (device_bytes, cpu_bytes) = (device.loaded_bytes(), cpu.loaded_bytes());
        assert!((device_bytes..=device_bytes / 10 * 11).contains(&cpu_bytes), "{device_bytes} and {cpu_bytes}");
        let off = error(&story(&device, &edges, Dtype::F32), &story(&cpu, &edges, Dtype::F32));
        assert!(off < most, "{family} {quant}: off by {off}");
    }
}

#[test]
fn hidden_states_are_rounded_behind_every_block() {
    let checkpoint = Checkpoint::open(&fixtures().join("qwen3")).unwrap();
    let all = options(&checkpoint, Dtype::F32, Quant::Auto);
    let (whole, edges) = (on_device(&checkpoint, all.clone()), edges(&checkpoint));
    let parts = [0..2, 2..6].map(|span| on_device(&checkpoint, EngineOptions { span, ..all.clone() }));
    let hidden = edges.embed(&[5, 6, 7, 8, 9], Dtype::Bf16).unwrap();
    let expected = Session::new(&whole).step(&[run(0, 0, 5)], hidden.clone());
    let between = Session::new(&parts[0]).step(&[run(0, 0, 5)], hidden);
    let between = HiddenStates::from_f32(Dtype::Bf16, checkpoint.spec().hidden_size, &between);
    assert_eq!(Session::new(&parts[1]).step(&[run(0, 0, 5)], between), expected);
}

#[test]
fn sessions_with_other_blocks_and_formats_share_passes() {
    let checkpoint = Checkpoint::open(&fixtures().join("llama")).unwrap();
    let (engine, edges) = (on_device(&checkpoint, options(&checkpoint, Dtype::F32, Quant::Auto)), edges(&checkpoint));
    let cases = [(0..6, Dtype::F32), (0..3, Dtype::Bf16), (2..6, Dtype::F16), (4..5, Dtype::Bf16), (0..6, Dtype::F32)];
    let step = |index: usize| {
        let (blocks, wire) = cases[index].clone();
        let ids: Vec<u32> = (0..9 + index as u32).map(|token| token * 31 % 500 + index as u32).collect();
        let hidden = edges.embed(&ids, wire).unwrap();
        submit(&engine, engine.cache(blocks).unwrap(), &[run(0, 0, ids.len())], hidden)
    };
    let result =
        |answers: mpsc::Receiver<Answer>| answers.recv_timeout(Duration::from_secs(60)).unwrap().1.unwrap().to_f32();
    let alone: Vec<Vec<f32>> = (0..cases.len()).map(|index| result(step(index))).collect();
    for _ in 0..4 {
        let waiting: Vec<_> = (0..cases.len()).map(step).collect();
        for (answers, alone) in waiting.into_iter().zip(&alone) {
            // A last bit before a rounding is a step of the format after it.
            assert!(difference(&result(answers), alone) < 0.02);
        }
    }
}

#[test]
fn what_is_not_finite_is_named_and_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoint = with_an_infinity(dir.path());
    let few = EngineOptions { cache_tokens: 64, ..options(&checkpoint, Dtype::F32, Quant::Auto) };
    let (engine, edges) = (on_device(&checkpoint, few), edges(&checkpoint));
    let ids: Vec<u32> = (3..43).collect();
    let hidden = edges.embed(&ids, Dtype::F32).unwrap();
    let answer = |blocks, rows: usize| {
        let answers = submit(&engine, engine.cache(blocks).unwrap(), &[run(0, 0, rows)], hidden.slice(0..rows));
        answers.recv_timeout(Duration::from_secs(60)).unwrap().1.map(|rows| rows.to_f32())
    };
    let sound = answer(2..6, 20).unwrap();
    assert_eq!(answer(0..6, 40).unwrap_err(), StepError::NonFinite { row: 0, place: Place::Block(1) });
    // The same pages, of which the last is not full.
    assert_eq!(answer(2..6, 20).unwrap(), sound);
}

#[test]
fn rows_of_a_shape_are_grouped_and_all_rows_are_in_a_group() {
    let pages: Vec<u32> = (0..64).collect();
    let of = |first_row, rows, position: usize, first: usize| Run {
        first_row,
        rows,
        position,
        pages: &pages[first..first + (position + rows).div_ceil(16)],
    };
    let shape = Shape { window: None, whole: false, heads: 4, kv_width: 32, at_most: 1 << 20 };
    // Decoding lanes of 33, 5 and 50 tokens, and a chunk between them.
    let runs = [of(0, 1, 32, 0), of(1, 7, 20, 8), of(8, 1, 4, 16), of(9, 1, 49, 24)];
    let plan = Plan::new(&runs, shape, &Device::Cpu).unwrap();
    let sizes: Vec<_> = plan.groups.iter().map(|group| (group.lanes, group.rows, group.pages_each)).collect();
    assert_eq!(sizes, [(1, 1, 1), (2, 1, 4), (1, 7, 2)]);
    assert_eq!(plan.order.unwrap().to_vec1::<u32>().unwrap(), [1, 3, 4, 5, 6, 7, 8, 9, 0, 2]);
    // The shorter one is filled up with its own first page, and sees none of it.
    assert_eq!(plan.groups[1].pages.to_vec1::<u32>().unwrap(), [0, 1, 2, 0, 24, 25, 26, 27]);
    let seen =
        |mask: &Tensor| mask.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().filter(|m| **m == 0.0).count();
    assert_eq!(seen(&plan.groups[1].mask), 33 + 50);
    assert_eq!(seen(&plan.groups[2].mask), (21..28).sum::<usize>());

    // A window leaves pages out, except where scores depend on positions.
    let windowed = Shape { window: Some(10), ..shape };
    let plan = Plan::new(&runs[3..], windowed, &Device::Cpu).unwrap();
    assert_eq!(plan.groups[0].pages.to_vec1::<u32>().unwrap(), [26, 27]);
    assert_eq!(seen(&plan.groups[0].mask), 10);
    let plan = Plan::new(&runs[3..], Shape { whole: true, ..windowed }, &Device::Cpu).unwrap();
    assert_eq!((plan.groups[0].pages_each, seen(&plan.groups[0].mask)), (4, 10));

    // Rows are cut where their scores would be too many.
    let plan = Plan::new(&[of(0, 40, 0, 0)], Shape { at_most: 4 * 48 * 16, ..shape }, &Device::Cpu).unwrap();
    let sizes: Vec<_> = plan.groups.iter().map(|group| (group.lanes, group.rows, group.pages_each)).collect();
    assert_eq!(sizes, [(1, 8, 3), (1, 16, 1), (1, 16, 2)]);
}

#[test]
fn a_step_that_cannot_fit_into_the_device_is_an_error() {
    let checkpoint = Checkpoint::open(&fixtures().join("llama")).unwrap();
    let huge = EngineOptions { cache_tokens: 1 << 33, ..options(&checkpoint, Dtype::F32, Quant::Auto) };
    let error = Engine::load_on(Target::Device(device()), &checkpoint, huge, &mut |_, _| {}).unwrap_err();
    assert!(error.to_string().contains("can't be allocated"), "{error}");
}
