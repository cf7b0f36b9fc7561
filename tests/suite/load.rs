//! Many sessions on one engine, in all the ways that sessions have: whatever they do, each gets what it would get alone, bit
//! for bit, no page is lost, and nobody's decoding waits for more than it should.

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, Receiver},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use helion::{
    engine::{
        Cache, DeviceChoice, Engine, EngineOptions, HiddenStates, Job, Keep, LaneRun, Owner, PAGE_TOKENS, PageKey,
        StepError, StepOutput,
    },
    model::{Dtype, KvDtype, Quant, checkpoint::Checkpoint},
};
use proptest::prelude::*;
use rand::{RngExt, SeedableRng, rngs::StdRng};

use super::made::wide;

/// The environment variable with the seconds for which sessions come and go: a minute shows what is rare.
const SECONDS: &str = "HELION_LOAD_SECONDS";

/// Sessions at a time.
const SESSIONS: u64 = 32;
/// Tokens of a lane; the fixtures' context is 512.
const MAX_TOKENS: usize = 300;
/// How long a step may wait under load: some do too long, while the cache is full.
const DEADLINE: Duration = Duration::from_secs(1);
/// For what must come.
const PATIENCE: Duration = Duration::from_secs(120);

fn load(family: &str, options: impl FnOnce(&mut EngineOptions)) -> Engine {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(family);
    load_from(&Checkpoint::open(&folder).unwrap(), options)
}

fn load_from(checkpoint: &Checkpoint, options: impl FnOnce(&mut EngineOptions)) -> Engine {
    let mut all = EngineOptions::new(0..checkpoint.spec().num_blocks(), Dtype::F32);
    options(&mut all);
    Engine::load(checkpoint, all, &mut |_, _| {}).unwrap()
}

/// The hidden states of rows that are known by a number each.
fn rows(dtype: Dtype, width: usize, ids: &[u64]) -> HiddenStates {
    let number = |id: u64, column: usize| {
        let mixed = (id ^ column as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        (mixed ^ mixed >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9) as i32 as f32 / i32::MAX as f32
    };
    let values: Vec<f32> = ids.iter().flat_map(|id| (0..width).map(|column| number(*id, column))).collect();
    HiddenStates::from_f32(dtype, width, &values)
}

/// A lane is known by its first row, and so is what its states are rounded to.
fn dtype_of(ids: &[u64]) -> Dtype {
    [Dtype::F32, Dtype::Bf16, Dtype::F16][(ids[0] % 3) as usize]
}

/// Rows that never were.
fn fresh(rng: &mut impl RngExt, count: usize) -> Vec<u64> {
    (0..count).map(|_| rng.random()).collect()
}

/// What a lane held when a step was over, and what the step gave for the last of it.
struct Record {
    ids: Vec<u64>,
    output: Bytes,
}

/// A session that keeps its own books.
struct Session<'a> {
    engine: &'a Engine,
    /// How long its steps may wait.
    deadline: Duration,
    cache: Option<Cache>,
    lanes: BTreeMap<u32, Vec<u64>>,
    records: Vec<Record>,
}

impl<'a> Session<'a> {
    fn new(engine: &'a Engine, owner: u64) -> Self {
        let cache = engine.cache(engine.span()).unwrap().owned_by(Owner::of(&owner));
        Self { engine, deadline: PATIENCE, cache: Some(cache), lanes: BTreeMap::new(), records: Vec::new() }
    }

    /// Hands in a step: of each lane, where it begins and its rows.
    fn submit(&mut self, runs: &[(u32, usize, Vec<u64>)], cancelled: Arc<AtomicBool>) -> Receiver<Answer> {
        for (lane, position, ids) in runs {
            let held = self.lanes.entry(*lane).or_default();
            held.truncate(*position);
            held.extend(ids);
        }
        let dtype = dtype_of(&self.lanes[&runs[0].0]);
        let ids: Vec<u64> = runs.iter().flat_map(|(_, _, ids)| ids.clone()).collect();
        let (answer, answers) = mpsc::sync_channel(1);
        self.engine.submit(Job {
            cache: self.cache.take().unwrap(),
            lanes: runs
                .iter()
                .map(|(lane, position, ids)| LaneRun { lane: *lane, position: *position, tokens: ids.len() })
                .collect(),
            hidden: rows(dtype, self.engine.spec().hidden_size, &ids),
            rope_length: None,
            keep: Keep::All,
            deadline: Instant::now() + self.deadline,
            cancelled,
            done: Box::new(move |cache, result| answer.send((cache, result)).unwrap()),
        });
        answers
    }

    /// Takes a step's answer. False if the session is over.
    fn take(&mut self, runs: &[(u32, usize, Vec<u64>)], answers: &Receiver<Answer>) -> bool {
        let (cache, result) = answers.recv_timeout(PATIENCE).unwrap();
        self.cache = Some(cache);
        let output = match result {
            Ok(output) => output.hidden,
            Err(
                StepError::CacheFull { .. } | StepError::QueueFull { .. } | StepError::Deadline | StepError::Cancelled,
            ) => return false,
            Err(error) => panic!("{error}"),
        };
        let mut row = 0;
        for (lane, _, ids) in runs {
            let output = output.slice(row..row + ids.len()).bytes;
            self.records.push(Record { ids: self.lanes[lane].clone(), output });
            row += ids.len();
        }
        true
    }
}

type Answer = (Cache, Result<StepOutput, StepError>);

/// Checks that every step gave what its lane gives in a session of its own, computed in one step on an idle engine.
fn verify(records: Vec<Record>, idle: &Engine) {
    let mut lanes: HashMap<u64, Vec<Record>> = HashMap::new();
    for record in records {
        lanes.entry(record.ids[0]).or_default().push(record);
    }
    for (_, mut records) in lanes {
        records.sort_by_key(|record| std::cmp::Reverse(record.ids.len()));
        let mut alone: Vec<(Vec<u64>, Bytes)> = Vec::new();
        for Record { ids, output } in records {
            if !alone.iter().any(|(longer, _)| longer.starts_with(&ids)) {
                let mut session = Session::new(idle, 0);
                let runs = [(0, 0, ids.clone())];
                let answers = session.submit(&runs, Arc::default());
                assert!(session.take(&runs, &answers), "an idle engine has time and room");
                alone.push((ids.clone(), session.records.remove(0).output));
            }
            let (longer, expected) = alone.iter().find(|(longer, _)| longer.starts_with(&ids)).unwrap();
            let row = expected.len() / longer.len();
            assert!(
                expected[..ids.len() * row].ends_with(&output),
                "the last {} rows of {} differ from what they are alone",
                output.len() / row,
                ids.len()
            );
        }
    }
}

/// Prefixes that sessions left for others.
type Prefixes = Mutex<Vec<Vec<u64>>>;

/// The names of the full pages of these.
fn names(ids: &[u64]) -> Vec<PageKey> {
    let ends = (1..=ids.len() / PAGE_TOKENS).map(|pages| &ids[..pages * PAGE_TOKENS]);
    ends.map(|ids| {
        let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        PageKey(*blake3::hash(&bytes).as_bytes())
    })
    .collect()
}

/// One session after another, until the time is over: prompts, tokens, lanes that are copied, steps back, pauses, and an end
/// that nobody sees coming.
fn come_and_go(engine: &Engine, prefixes: &Prefixes, owner: u64, until: Instant) -> Vec<Record> {
    let mut rng = rand::rng();
    let mut records = Vec::new();
    while Instant::now() < until {
        let mut session = Session { deadline: DEADLINE, ..Session::new(engine, owner) };
        let mut first = rng.random_range(1..200);
        if rng.random_bool(0.3)
            && let Some(ids) = prefixes.lock().unwrap().last()
        {
            let pages = session.cache.as_mut().unwrap().adopt_prefix(0, &names(ids)).len();
            if pages > 0 {
                session.lanes.insert(0, ids[..pages * PAGE_TOKENS].to_vec());
                first = rng.random_range(1..20);
            }
        }
        let start = session.lanes.get(&0).map_or(0, Vec::len);
        let mut runs = vec![(0, start, fresh(&mut rng, first))];
        for _ in 0..rng.random_range(1..40) {
            let cancelled = Arc::new(AtomicBool::new(false));
            let answers = session.submit(&runs, cancelled.clone());
            cancelled.store(rng.random_bool(0.02), Ordering::Relaxed);
            if !session.take(&runs, &answers) || Instant::now() > until {
                break;
            }
            let cache = session.cache.as_mut().unwrap();
            match rng.random_range(0..20) {
                0 => std::thread::sleep(Duration::from_millis(rng.random_range(1..30))),
                1 | 2 => {
                    let to = rng.random_range(1..3);
                    cache.copy_lanes(&[(0, to)]);
                    session.lanes.insert(to, session.lanes[&0].clone());
                }
                3 => {
                    let held = &session.lanes[&0];
                    let ids = held[..rng.random_range(1..100).min(held.len())].to_vec();
                    cache.keep_prefix(0, &names(&ids), Vec::new());
                    let mut prefixes = prefixes.lock().unwrap();
                    prefixes.push(ids);
                    if prefixes.len() > 4 {
                        prefixes.remove(0);
                    }
                }
                _ => {}
            }
            runs.clear();
            for (lane, held) in &session.lanes {
                let back = if rng.random_bool(0.1) { rng.random_range(0..held.len().min(30)) } else { 0 };
                let count = if rng.random_bool(0.05) { rng.random_range(9..80) } else { rng.random_range(1..=2) };
                // At least one row stays, by which the lane is known.
                let position = (held.len() - back).max(1);
                if runs.is_empty() || rng.random_bool(0.5) {
                    runs.push((*lane, position, fresh(&mut rng, count)));
                }
            }
            if runs.iter().any(|(_, position, ids)| position + ids.len() > MAX_TOKENS) {
                break;
            }
        }
        records.append(&mut session.records);
    }
    records
}

#[test]
fn sessions_that_come_and_go_get_what_they_get_alone() {
    let seconds = std::env::var(SECONDS).ok().map_or(3, |seconds| seconds.parse().unwrap());
    let (cache_tokens, batch_tokens) = (4096, 512);
    let engine = load("gemma3_text", |options| {
        (options.cache_tokens, options.batch_tokens) = (cache_tokens, batch_tokens);
    });
    let until = Instant::now() + Duration::from_secs(seconds);
    let prefixes = Prefixes::default();
    let records: Vec<Record> = std::thread::scope(|scope| {
        let sessions: Vec<_> = (0..SESSIONS)
            // A third of them are one peer's, the others have one for every two.
            .map(|number| {
                let owner = if number % 3 == 0 { 0 } else { number / 2 };
                let (engine, prefixes) = (&engine, &prefixes);
                scope.spawn(move || come_and_go(engine, prefixes, owner, until))
            })
            .collect();
        sessions.into_iter().flat_map(|session| session.join().unwrap()).collect()
    });
    engine.forget_prefixes(Instant::now() + DEADLINE);
    let load = engine.load_now();
    println!("{} steps, {} rows in {} passes, {:?} busy", load.steps, load.rows, load.passes, load.busy);
    println!("{} of {} short steps took too long", load.slow_decodes, load.decodes);
    assert!(!records.is_empty() && load.rows >= load.tokens);
    assert_eq!((load.queue, load.cache_tokens_left, load.cache_tokens_shared), (0, cache_tokens, 0));
    assert_eq!(load.late_decodes, 0, "a decode step met a second chunk of a prompt");
    // The rule, in time: nine of ten steps, as the machine may be busy with other things, and as soon as there were enough for the
    // engine to know how long passes take.
    let is_known = load.decodes >= 1_000;
    assert!(!is_known || 10 * load.slow_decodes <= load.decodes, "{} of {}", load.slow_decodes, load.decodes);
    verify(records, &self::load("gemma3_text", |_| {}));
}

/// What an engine computes with: a model, what its matrices are kept in, and its keys and values.
#[derive(Debug, Clone, Copy)]
struct Form {
    family: &'static str,
    /// Rows of 256 numbers rather than the fixture's own.
    wide: bool,
    dtype: Dtype,
    quant: Quant,
    kv_dtype: Option<KvDtype>,
}

impl Form {
    fn load(&self, options: impl FnOnce(&mut EngineOptions)) -> Engine {
        let options = |all: &mut EngineOptions| {
            (all.dtype, all.quant, all.kv_dtype) = (self.dtype, self.quant, self.kv_dtype);
            (all.cache_tokens, all.device) = (4096, DeviceChoice::Cpu);
            options(all);
        };
        if self.wide { load_from(&wide(self.family), options) } else { load(self.family, options) }
    }
}

fn form() -> impl Strategy<Value = Form> {
    let narrow = prop::sample::select(vec!["qwen3", "gemma3_text", "gpt_oss", "bloom"]);
    let plain = narrow.prop_map(|family| (family, false, Dtype::F32, Quant::Auto));
    let quants = vec![Quant::None, Quant::Q8_0, Quant::Q4_0, Quant::Q4K, Quant::Q6K];
    let families = prop::sample::select(vec!["qwen3", "mixtral"]);
    let dtypes = prop::sample::select(vec![Dtype::F32, Dtype::Bf16, Dtype::F16]);
    let packed = (families, dtypes.clone(), prop::sample::select(quants))
        .prop_map(|(family, dtype, quant)| (family, true, dtype, quant));
    let mxfp4 = dtypes.prop_map(|dtype| ("gpt_oss", true, dtype, Quant::Auto));
    let kinds = vec![None, Some(KvDtype::F32), Some(KvDtype::Bf16), Some(KvDtype::F16), Some(KvDtype::Q8)];
    (prop_oneof![1 => plain, 4 => packed, 1 => mxfp4], prop::sample::select(kinds)).prop_map(|(form, kv_dtype)| {
        let (family, wide, dtype, quant) = form;
        Form { family, wide, dtype, quant, kv_dtype }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]
    /// Any sessions, cut into any steps, in passes of any size, on any pages and any number of threads, in any format.
    #[test]
    fn a_batch_is_the_sum_of_its_sessions(
        form in form(),
        seed in any::<u64>(),
        (batch_tokens, threads) in (prop::sample::select(vec![2usize, 7, 16, 33, 512]), 1..4usize),
        steps in prop::collection::vec(prop::collection::vec((1..70usize, 0..20usize), 1..6), 1..8),
        gone in prop::collection::vec((1..60usize, any::<bool>()), 0..8),
    ) {
        let mut rng = StdRng::seed_from_u64(seed);
        let engine = form.load(|options| (options.batch_tokens, options.threads) = (batch_tokens, Some(threads)));
        // Sessions that are gone leave pages in whatever order.
        let mut before: Vec<Session> = Vec::new();
        for (tokens, stays) in gone {
            let mut session = Session::new(&engine, 0);
            let runs = [(0, 0, fresh(&mut rng, tokens))];
            let answers = session.submit(&runs, Arc::default());
            prop_assert!(session.take(&runs, &answers));
            before.push(session);
            if !stays {
                before.swap_remove(0);
            }
        }
        let mut sessions: Vec<Session> = (0..steps.len()).map(|owner| Session::new(&engine, owner as u64)).collect();
        for turn in 0..6 {
            let mut answers = Vec::new();
            for (session, steps) in sessions.iter_mut().zip(&steps) {
                let Some((tokens, back)) = steps.get(turn) else { continue };
                let held = session.lanes.get(&0).map_or(0, Vec::len);
                let position = held.saturating_sub(*back).max(held.min(1));
                let runs = [(0, position, fresh(&mut rng, *tokens))];
                let waiting = session.submit(&runs, Arc::default());
                answers.push((session, runs, waiting));
            }
            for (session, runs, waiting) in answers {
                prop_assert!(session.take(&runs, &waiting));
            }
        }
        let records = sessions.into_iter().flat_map(|session| session.records).collect();
        verify(records, &form.load(|_| {}));
    }
}
