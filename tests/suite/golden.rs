//! The engine against Hugging Face transformers, on the tiny checkpoints in `tests/fixtures` (see the README there).
//!
//! One driver for all: a [`Chain`] of engines that together hold the model, and the edges. What is compared with the
//! reference is compared within a tolerance; what the engine promises to be exact (any cut, any chunks, any batch) is
//! compared bit for bit.

mod gguf;
mod packed;
mod paths;
mod quantized;
mod variants;

use std::{
    collections::HashMap,
    ops::Range,
    path::{Path, PathBuf},
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use helion::{
    engine::{
        Cache, DeviceChoice, Edges, EdgesOptions, Engine, EngineOptions, HiddenStates, Job, Keep, LaneRun, StepError,
    },
    model::{Dtype, KvDtype, Quant, checkpoint::Checkpoint},
};
use safetensors::SafeTensors;

/// Largest difference from the reference, in standard deviations of the reference.
const TOLERANCE: f64 = 1e-4;

fn fixture(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(family)
}

/// A checkpoint and what transformers computed with it.
struct Golden {
    checkpoint: Checkpoint,
    /// How its blocks and edges are quantized.
    quant: Quant,
    /// What keys and values are kept in; `None`: as the blocks compute.
    kv_dtype: Option<KvDtype>,
    tensors: HashMap<String, (Vec<usize>, Vec<u8>)>,
}

impl Golden {
    fn load(family: &str) -> Self {
        let bytes = std::fs::read(fixture(family).join("golden.safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let tensors =
            tensors.iter().map(|(name, view)| (name.to_owned(), (view.shape().to_vec(), view.data().to_vec())));
        let checkpoint = Checkpoint::open(&fixture(family)).unwrap();
        Self { checkpoint, quant: Quant::Auto, kv_dtype: None, tensors: tensors.collect() }
    }

    fn blocks(&self) -> usize {
        self.checkpoint.spec().num_blocks()
    }

    fn floats(&self, name: &str) -> Vec<f32> {
        self.tensors[name].1.chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
    }

    /// The rows of a tensor of ids.
    fn ids(&self, name: &str) -> Vec<Vec<u32>> {
        let (shape, bytes) = &self.tensors[name];
        let ids: Vec<u32> =
            bytes.chunks_exact(8).map(|bytes| i64::from_le_bytes(bytes.try_into().unwrap()) as u32).collect();
        ids.chunks_exact(shape[1]).map(<[u32]>::to_vec).collect()
    }

    fn prompt(&self) -> Vec<u32> {
        self.ids("input_ids").remove(0)
    }

    /// The prompts of the batch without their padding, and their continuations.
    fn batch(&self) -> Vec<(Vec<u32>, Vec<u32>)> {
        let unpadded = self.ids("batch_ids").into_iter().zip(self.ids("batch_mask")).map(|(ids, mask)| {
            ids.into_iter().zip(mask).filter(|(_, mask)| *mask == 1).map(|(id, _)| id).collect::<Vec<u32>>()
        });
        let prompt_width = self.prompt().len();
        unpadded.zip(self.ids("batch_greedy")).map(|(ids, greedy)| (ids, greedy[prompt_width..].to_vec())).collect()
    }

    fn edges(&self, dtype: Dtype) -> Edges {
        Edges::load(
            &self.checkpoint,
            EdgesOptions { dtype, quant: self.quant, device: DeviceChoice::Cpu, threads: None },
        )
        .unwrap()
    }

    fn engine(&self, span: Range<usize>, dtype: Dtype) -> Engine {
        let options = EngineOptions {
            cache_tokens: 1024,
            quant: self.quant,
            kv_dtype: self.kv_dtype,
            ..EngineOptions::new(span, dtype)
        };
        Engine::load(&self.checkpoint, options, &mut |_, _| {}).unwrap()
    }

    /// Engines for the parts that `cuts` leaves.
    fn engines(&self, cuts: &[usize], dtype: Dtype) -> Vec<Engine> {
        let bounds: Vec<usize> = [0].into_iter().chain(cuts.iter().copied()).chain([self.blocks()]).collect();
        bounds.windows(2).map(|bounds| self.engine(bounds[0]..bounds[1], dtype)).collect()
    }
}

/// One session on a chain of engines.
struct Chain {
    hops: Vec<(Engine, Option<Cache>)>,
    /// What its steps state.
    rope_length: Option<usize>,
}

/// What a session asks of an engine.
struct Step<'a> {
    lanes: &'a [LaneRun],
    hidden: HiddenStates,
    keep: Keep,
    rope_length: Option<usize>,
}

impl Chain {
    fn new(engines: &[Engine]) -> Self {
        let hop = |engine: &Engine| (engine.clone(), Some(engine.cache(engine.span()).unwrap()));
        Self { hops: engines.iter().map(hop).collect(), rope_length: None }
    }

    /// Runs `hidden` through all engines; the outputs of each.
    fn step(&mut self, lanes: &[LaneRun], hidden: HiddenStates, keep: Keep) -> Vec<HiddenStates> {
        let mut outputs: Vec<HiddenStates> = Vec::new();
        let last = self.hops.len() - 1;
        for (index, (engine, cache)) in self.hops.iter_mut().enumerate() {
            let input = outputs.last().unwrap_or(&hidden).clone();
            let keep = if index == last { keep } else { Keep::All };
            let step = Step { lanes, hidden: input, keep, rope_length: self.rope_length };
            let (returned, result) = run(engine, cache.take().unwrap(), step);
            *cache = Some(returned);
            outputs.push(result.unwrap());
        }
        outputs
    }
}

type Answer = (Cache, Result<HiddenStates, StepError>);

fn run(engine: &Engine, cache: Cache, step: Step<'_>) -> Answer {
    submit(engine, cache, step).recv_timeout(Duration::from_secs(60)).unwrap()
}

fn submit(engine: &Engine, cache: Cache, step: Step<'_>) -> mpsc::Receiver<Answer> {
    let Step { lanes, hidden, keep, rope_length } = step;
    let (answer, answers) = mpsc::sync_channel(1);
    engine.submit(Job {
        cache,
        lanes: lanes.to_vec(),
        hidden,
        rope_length,
        keep,
        deadline: Instant::now() + Duration::from_secs(60),
        cancelled: Arc::default(),
        done: Box::new(move |cache, result| answer.send((cache, result.map(|output| output.hidden))).unwrap()),
    });
    answers
}

fn lane(position: usize, tokens: usize) -> [LaneRun; 1] {
    [LaneRun { lane: 0, position, tokens }]
}

/// Hidden states of the whole prompt behind the last block, computed in chunks.
fn prefill(chain: &mut Chain, edges: &Edges, ids: &[u32], chunk: usize, wire: Dtype) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (index, ids) in ids.chunks(chunk).enumerate() {
        let hidden = edges.embed(ids, wire).unwrap();
        let output = chain.step(&lane(index * chunk, ids.len()), hidden, Keep::All).pop().unwrap();
        bytes.extend_from_slice(&output.bytes);
    }
    bytes
}

fn argmax(logits: &[f32]) -> u32 {
    (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap() as u32
}

/// Continues every prompt greedily, each in a lane of its own, all in one session; prompts go in chunks.
fn greedy(chain: &mut Chain, edges: &Edges, prompts: &[Vec<u32>], chunk: usize, count: usize) -> Vec<Vec<u32>> {
    let mut ids: Vec<Vec<u32>> = prompts.to_vec();
    let mut done = vec![0; ids.len()];
    let total: Vec<usize> = prompts.iter().map(|prompt| prompt.len() + count).collect();
    while (0..ids.len()).any(|lane| ids[lane].len() < total[lane]) {
        let mut runs = Vec::new();
        let mut step_ids = Vec::new();
        for (lane, ids) in ids.iter().enumerate().filter(|(lane, ids)| ids.len() < total[*lane]) {
            let tokens = (ids.len() - done[lane]).min(chunk);
            runs.push(LaneRun { lane: lane as u32, position: done[lane], tokens });
            step_ids.extend_from_slice(&ids[done[lane]..done[lane] + tokens]);
            done[lane] += tokens;
        }
        let hidden = edges.embed(&step_ids, Dtype::F32).unwrap();
        let output = chain.step(&runs, hidden, Keep::LastOfEachLane).pop().unwrap();
        let logits = edges.logits(&output).unwrap();
        for (run, logits) in runs.iter().zip(logits.chunks_exact(edges.vocab())) {
            let ids = &mut ids[run.lane as usize];
            if run.position + run.tokens == ids.len() {
                ids.push(argmax(logits));
            }
        }
    }
    ids.into_iter().zip(prompts).map(|(ids, prompt)| ids[prompt.len()..].to_vec()).collect()
}

fn assert_close(found: &[f32], expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let count = expected.len() as f64;
    let mean = expected.iter().map(|x| f64::from(*x)).sum::<f64>() / count;
    let deviation = (expected.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum::<f64>() / count).sqrt();
    let worst = found.iter().zip(expected).map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max);
    assert!(worst <= TOLERANCE * deviation, "{what}: off by {} standard deviations", worst / deviation);
}

/// Hidden states after every block, logits and greedy ids, with the model in one piece per block.
fn matches_the_reference(family: &str) {
    Golden::load(family).matches();
}

impl Golden {
    fn matches(&self) {
        let edges = self.edges(Dtype::F32);
        let cuts: Vec<usize> = (1..self.blocks()).collect();
        let engines = self.engines(&cuts, Dtype::F32);
        let prompt = self.prompt();

        let embedded = edges.embed(&prompt, Dtype::F32).unwrap();
        assert_close(&embedded.to_f32(), &self.floats("hidden.0"), "embedding");
        let outputs = Chain::new(&engines).step(&lane(0, prompt.len()), embedded, Keep::All);
        for (block, output) in outputs.iter().enumerate() {
            assert_close(&output.to_f32(), &self.floats(&format!("hidden.{}", block + 1)), &format!("block {block}"));
        }
        let logits = edges.logits(outputs.last().unwrap()).unwrap();
        assert_close(&logits, &self.floats("logits"), "logits");

        let expected = &self.ids("greedy_ids")[0];
        let new = expected.len() - prompt.len();
        let found = greedy(&mut Chain::new(&engines), &edges, std::slice::from_ref(&prompt), prompt.len(), new);
        assert_eq!(found[0], expected[prompt.len()..]);
    }
}

/// Every way to cut the model in two and every chunk size give the same bits, and the reference's ids.
fn cuts_and_chunks_change_nothing(family: &str, dtype: Dtype) {
    let golden = Golden::load(family);
    let edges = golden.edges(dtype);
    let prompt = golden.prompt();
    let whole = golden.engines(&[], dtype);
    let expected = prefill(&mut Chain::new(&whole), &edges, &prompt, prompt.len(), dtype);
    let greedy_ids = &golden.ids("greedy_ids")[0][prompt.len()..];
    for cut in 0..golden.blocks() {
        let engines = if cut == 0 { whole.clone() } else { golden.engines(&[cut], dtype) };
        for chunk in [1, 7, prompt.len()] {
            let found = prefill(&mut Chain::new(&engines), &edges, &prompt, chunk, dtype);
            assert!(found == expected, "{dtype}: cut at {cut}, chunks of {chunk}");
            if dtype == Dtype::F32 {
                let prompts = std::slice::from_ref(&prompt);
                let found = greedy(&mut Chain::new(&engines), &edges, prompts, chunk, greedy_ids.len());
                assert_eq!(found[0], greedy_ids, "cut at {cut}, chunks of {chunk}");
            }
        }
    }
}

/// Rows of different lengths in one ragged batch: each continues as it does alone.
fn lanes_equal_their_rows(family: &str) {
    let golden = Golden::load(family);
    let edges = golden.edges(Dtype::F32);
    let engines = golden.engines(&[golden.blocks() / 2], Dtype::F32);
    let batch = golden.batch();
    let prompts: Vec<Vec<u32>> = batch.iter().map(|(prompt, _)| prompt.clone()).collect();
    let count = batch[0].1.len();
    for chunk in [usize::MAX, 7] {
        let found = greedy(&mut Chain::new(&engines), &edges, &prompts, chunk, count);
        for (lane, (_, expected)) in batch.iter().enumerate() {
            assert_eq!(&found[lane], expected, "lane {lane}, chunks of {chunk}");
        }
    }

    // Bit for bit, too: every row of the batch against its lane alone.
    let ids: Vec<u32> = prompts.concat();
    let runs: Vec<LaneRun> = prompts
        .iter()
        .enumerate()
        .map(|(lane, ids)| LaneRun { lane: lane as u32, position: 0, tokens: ids.len() })
        .collect();
    let all = Chain::new(&engines).step(&runs, edges.embed(&ids, Dtype::F32).unwrap(), Keep::All).pop().unwrap();
    let mut start = 0;
    for prompt in &prompts {
        let alone = prefill(&mut Chain::new(&engines), &edges, prompt, prompt.len(), Dtype::F32);
        assert!(all.bytes[start..start + alone.len()] == alone[..], "a lane of {} tokens", prompt.len());
        start += alone.len();
    }
}

/// Sessions that share an engine, some only a part of its span and some in another wire format, as if each were alone.
fn sessions_share_an_engine(family: &str, dtype: Dtype) {
    let golden = Golden::load(family);
    let edges = golden.edges(dtype);
    let engine = golden.engine(0..golden.blocks(), dtype);
    let (ids, middle, end) = (&golden.ids("greedy_ids")[0], golden.blocks() / 2, golden.blocks());
    let steps = |session: usize| -> Vec<Range<usize>> {
        let first = 5 + 6 * session;
        std::iter::once(0..first).chain((0..10).map(|step| first + step..first + step + 1)).collect()
    };
    let blocks = |session: usize| [0..end, 0..middle, middle..end, 1..end][session % 4].clone();
    let wire = |session: usize| if session % 3 == 2 { Dtype::Bf16 } else { dtype };

    let alone: Vec<Vec<HiddenStates>> = (0..6)
        .map(|session| {
            let mut cache = Some(engine.cache(blocks(session)).unwrap());
            let step = |step: Range<usize>| {
                let hidden = edges.embed(&ids[step.clone()], wire(session)).unwrap();
                let lanes = lane(step.start, step.len());
                let step = Step { lanes: &lanes, hidden, keep: Keep::All, rope_length: None };
                let (returned, result) = run(&engine, cache.take().unwrap(), step);
                cache = Some(returned);
                result.unwrap()
            };
            steps(session).into_iter().map(step).collect()
        })
        .collect();

    let mut caches: Vec<Option<Cache>> = (0..6).map(|session| Some(engine.cache(blocks(session)).unwrap())).collect();
    let rounds: Vec<Vec<&HiddenStates>> =
        (0..11).map(|round| alone.iter().map(|session| &session[round]).collect()).collect();
    for (round, expected) in rounds.iter().enumerate() {
        let answers: Vec<_> = (0..6)
            .map(|session| {
                let step = steps(session)[round].clone();
                let hidden = edges.embed(&ids[step.clone()], wire(session)).unwrap();
                let lanes = lane(step.start, step.len());
                let step = Step { lanes: &lanes, hidden, keep: Keep::All, rope_length: None };
                submit(&engine, caches[session].take().unwrap(), step)
            })
            .collect();
        for (session, answer) in answers.into_iter().enumerate() {
            let (cache, result) = answer.recv_timeout(Duration::from_secs(60)).unwrap();
            caches[session] = Some(cache);
            assert!(result.unwrap().bytes == expected[session].bytes, "{dtype}: session {session}, step {round}");
        }
    }
}

/// A rollback forgets what came after, as if it had never been.
fn a_rollback_forgets(family: &str) {
    let golden = Golden::load(family);
    let edges = golden.edges(Dtype::F32);
    let engines = golden.engines(&[2], Dtype::F32);
    let prompt = golden.prompt();
    let expected = prefill(&mut Chain::new(&engines), &edges, &prompt, prompt.len(), Dtype::F32);
    let row = expected.len() / prompt.len();

    let mut chain = Chain::new(&engines);
    let wrong: Vec<u32> = prompt[..20].iter().copied().chain((0..20).map(|i| i + 100)).collect();
    prefill(&mut chain, &edges, &wrong, 13, Dtype::F32);
    let hidden = edges.embed(&prompt[20..], Dtype::F32).unwrap();
    let output = chain.step(&lane(20, 20), hidden, Keep::All).pop().unwrap();
    assert!(output.bytes == expected[20 * row..]);
}

macro_rules! families {
    ($($family:ident: $fixture:literal,)*) => {$(
        mod $family {
            use helion::model::Dtype;

            const FAMILY: &str = $fixture;

            #[test]
            fn matches_the_reference() {
                super::matches_the_reference(FAMILY);
            }

            #[test]
            fn cuts_and_chunks_change_nothing_f32() {
                super::cuts_and_chunks_change_nothing(FAMILY, Dtype::F32);
            }

            #[test]
            fn cuts_and_chunks_change_nothing_bf16() {
                super::cuts_and_chunks_change_nothing(FAMILY, Dtype::Bf16);
            }

            #[test]
            fn cuts_and_chunks_change_nothing_f16() {
                super::cuts_and_chunks_change_nothing(FAMILY, Dtype::F16);
            }

            #[test]
            fn lanes_equal_their_rows() {
                super::lanes_equal_their_rows(FAMILY);
            }

            #[test]
            fn sessions_share_an_engine_f32() {
                super::sessions_share_an_engine(FAMILY, Dtype::F32);
            }

            #[test]
            fn sessions_share_an_engine_bf16() {
                super::sessions_share_an_engine(FAMILY, Dtype::Bf16);
            }

            #[test]
            fn a_rollback_forgets() {
                super::a_rollback_forgets(FAMILY);
            }
        }
    )*};
}

families! {
    llama: "llama",
    mistral: "mistral",
    qwen2: "qwen2",
    qwen3: "qwen3",
    mixtral: "mixtral",
    qwen3_moe: "qwen3_moe",
    phi: "phi",
    phi3: "phi3",
    gemma3: "gemma3",
    gemma3_text: "gemma3_text",
    gpt_oss: "gpt_oss",
    falcon_7b: "falcon-7b-style",
    falcon_40b: "falcon-40b-style",
    falcon_rw: "falcon-rw-style",
    bloom: "bloom",
}
