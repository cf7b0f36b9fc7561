//! The engine's promises about jobs: refusals, waiting for pages, cancellation, failures.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        atomic::{AtomicBool, Ordering},
        mpsc::{self, Receiver},
    },
    time::Duration,
};

use safetensors::SafeTensors;

use super::*;

mod large;
mod long;

type Answer = (Cache, Result<StepOutput, StepError>);

const PATIENCE: Duration = Duration::from_secs(60);

fn fixture(family: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(family)
}

fn options(span: Range<usize>) -> EngineOptions {
    EngineOptions { cache_tokens: 512, kept_bytes: 1 << 20, ..EngineOptions::new(span, Dtype::F32) }
}

fn load(options: EngineOptions) -> Engine {
    Engine::load(&Checkpoint::open(&fixture("qwen3")).unwrap(), options, &mut |_, _| {}).unwrap()
}

/// The qwen3 fixture, copied to `dir`, whose block 1 makes numbers that are not finite.
pub(super) fn with_an_infinity(dir: &Path) -> Checkpoint {
    for file in ["config.json", "model.safetensors"] {
        fs::write(dir.join(file), fs::read(fixture("qwen3").join(file)).unwrap()).unwrap();
    }
    let path = dir.join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let at = {
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let tensor = tensors.tensor("model.layers.1.mlp.down_proj.weight").unwrap();
        tensor.data().as_ptr() as usize - bytes.as_ptr() as usize
    };
    bytes[at..at + 2].copy_from_slice(&half::bf16::INFINITY.to_le_bytes());
    fs::write(&path, bytes).unwrap();
    Checkpoint::open(dir).unwrap()
}

fn rows(count: usize) -> HiddenStates {
    let values: Vec<f32> = (0..count * 64).map(|i| ((i * 37 % 101) as f32 - 50.0) / 30.0).collect();
    HiddenStates::from_f32(Dtype::F32, 64, &values)
}

fn run(lane: u32, position: usize, tokens: usize) -> LaneRun {
    LaneRun { lane, position, tokens }
}

/// A job that wants everything and its answer.
fn job(cache: Cache, lanes: &[LaneRun]) -> (Job, Receiver<Answer>) {
    let (answer, answers) = mpsc::sync_channel(1);
    let job = Job {
        cache,
        hidden: rows(lanes.iter().map(|run| run.tokens).sum()),
        lanes: lanes.to_vec(),
        rope_length: None,
        keep: Keep::All,
        deadline: Instant::now() + PATIENCE,
        cancelled: Arc::default(),
        done: Box::new(move |cache, result| answer.send((cache, result)).unwrap()),
    };
    (job, answers)
}

fn submit(engine: &Engine, cache: Cache, lanes: &[LaneRun]) -> Receiver<Answer> {
    let (job, answers) = job(cache, lanes);
    engine.submit(job);
    answers
}

fn step(engine: &Engine, cache: Cache, lanes: &[LaneRun]) -> Answer {
    submit(engine, cache, lanes).recv_timeout(PATIENCE).unwrap()
}

/// Names of as many pages.
fn names(pages: u8) -> Vec<PageKey> {
    (0..pages).map(|page| PageKey([page; 32])).collect()
}

/// A session that holds `tokens` tokens.
fn session(engine: &Engine, tokens: usize) -> Cache {
    let (cache, result) = step(engine, engine.cache(engine.span()).unwrap(), &[run(0, 0, tokens)]);
    result.unwrap();
    cache
}

fn refusal(engine: &Engine, change: impl FnOnce(&mut Job)) -> StepError {
    let (mut job, answers) = job(engine.cache(engine.span()).unwrap(), &[run(0, 0, 2)]);
    change(&mut job);
    engine.submit(job);
    // Refusals come at once, on the thread that submits.
    let error = answers.try_recv().unwrap().1.unwrap_err();
    assert!(!error.maybe_applied() || error == StepError::Cancelled);
    error
}

#[test]
fn only_the_span_is_loaded() {
    let checkpoint = Checkpoint::open(&fixture("llama")).unwrap();
    for (span, dtype) in [(0..2, Dtype::F32), (2..3, Dtype::Bf16), (0..6, Dtype::F16)] {
        let mut reports = Vec::new();
        let engine = Engine::load(&checkpoint, EngineOptions::new(span.clone(), dtype), &mut |done, of| {
            reports.push((done, of));
        })
        .unwrap();
        let size = |tensor: &crate::model::spec::TensorSpec| {
            let each = if tensor.shape.len() == 2 { dtype.size_in_bytes() } else { 4 };
            tensor.elements() * each
        };
        let tensors = span.clone().flat_map(|block| checkpoint.spec().block_tensors(block));
        assert_eq!(engine.loaded_bytes(), tensors.map(|tensor| size(&tensor) as u64).sum::<u64>());
        assert_eq!(reports, (0..=span.len()).map(|done| (done, span.len())).collect::<Vec<_>>());
        assert_eq!((engine.span(), engine.dtype(), engine.spec().num_blocks()), (span, dtype, 6));
    }
}

#[test]
fn impossible_options_are_errors() {
    let checkpoint = Checkpoint::open(&fixture("qwen3")).unwrap();
    let error = |change: fn(&mut EngineOptions)| {
        let mut options = options(0..6);
        change(&mut options);
        Engine::load(&checkpoint, options, &mut |_, _| {}).unwrap_err().to_string()
    };
    assert!(error(|options| options.span = 5..99).contains("5:99"));
    assert!(error(|options| options.span = 3..3).contains("3:3"));
    assert!(error(|options| options.cache_tokens = 15).contains("15 tokens"));
    assert!(error(|options| options.cache_tokens = usize::MAX).contains("can't be allocated"));
    assert!(error(|options| options.cache_tokens = 1 << 40).contains("can't be allocated"));
    assert!(error(|options| options.device = DeviceChoice::Cuda(1)).contains("cuda:1"));
}

#[test]
fn wrong_steps_are_refused_at_once() {
    let engine = load(options(1..4));
    let other = load(options(0..1));
    for blocks in [0..2, 3..5, 2..2] {
        assert!(matches!(engine.cache(blocks), Err(StepError::WrongBlocks { .. })));
    }
    let bad_shape = |change: fn(&mut Job)| assert!(matches!(refusal(&engine, change), StepError::BadShape(_)));
    bad_shape(|job| job.lanes.clear());
    bad_shape(|job| job.lanes = vec![run(0, 0, 1), run(0, 0, 1)]);
    bad_shape(|job| job.lanes = vec![run(0, 0, 2), run(1, 0, 0)]);
    bad_shape(|job| job.lanes = vec![run(0, 0, 3)]);
    bad_shape(|job| job.lanes = vec![run(0, 0, usize::MAX), run(1, 0, 3)]);
    bad_shape(|job| job.hidden.rows = 3);
    bad_shape(|job| job.hidden = HiddenStates::from_f32(Dtype::F32, 32, &[0.0; 64]));
    assert!(matches!(refusal(&engine, |job| job.cache = other.cache(0..1).unwrap()), StepError::BadShape(_)));

    assert_eq!(
        refusal(&engine, |job| job.lanes[0].position = 1),
        StepError::WrongPosition { lane: 0, position: 1, end: 0 }
    );
    assert_eq!(
        refusal(&engine, |job| {
            job.lanes = vec![run(7, 0, 513)];
            job.hidden = rows(513);
        }),
        StepError::ContextExceeded { lane: 7, tokens: 513, limit: 512 }
    );
    let mut values = vec![0.0; 128];
    values[64] = f32::NAN;
    let states = HiddenStates::from_f32(Dtype::F16, 64, &values);
    assert_eq!(refusal(&engine, |job| job.hidden = states), StepError::NonFinite { row: 1, place: Place::Input });
    assert_eq!(refusal(&engine, |job| job.deadline = Instant::now()), StepError::Deadline);
    assert_eq!(refusal(&engine, |job| job.cancelled = Arc::new(AtomicBool::new(true))), StepError::Cancelled);
    assert_eq!(engine.load_now().queue, 0);
}

#[test]
fn prompts_larger_than_a_pass_and_all_kinds_of_output() {
    let (wide, narrow) = (load(options(0..6)), load(EngineOptions { batch_tokens: 8, ..options(0..6) }));
    let lanes = [run(3, 0, 30), run(1, 0, 5), run(2, 0, 50)];
    let answer = |engine: &Engine, keep: Keep| {
        let (mut job, answers) = job(engine.cache(0..6).unwrap(), &lanes);
        job.keep = keep;
        engine.submit(job);
        let (cache, result) = answers.recv_timeout(PATIENCE).unwrap();
        assert_eq!([3, 1, 2, 0].map(|lane| cache.end(lane)), [30, 5, 50, 0]);
        result.unwrap().hidden
    };
    let all = answer(&wide, Keep::All);
    assert_eq!(all.rows, 85);
    assert_eq!(answer(&narrow, Keep::All).bytes, all.bytes);
    let last: Vec<u8> = [29, 34, 84].iter().flat_map(|row| all.bytes[row * 256..][..256].to_vec()).collect();
    for engine in [&wide, &narrow] {
        let found = answer(engine, Keep::LastOfEachLane);
        assert_eq!((found.rows, &found.bytes[..]), (3, &last[..]));
        assert_eq!(answer(engine, Keep::Nothing).rows, 0);
    }
    assert_eq!((wide.load_now().steps, wide.load_now().tokens), (3, 255));
}

#[test]
fn a_step_that_can_never_fit_fails_at_once() {
    let engine = load(options(0..2)); // 32 pages, of which new sessions leave 2
    let error = refusal(&engine, |job| {
        job.lanes = vec![run(0, 0, 256), run(1, 0, 240)];
        job.hidden = rows(496);
    });
    assert_eq!(error, StepError::CacheFull { needed_tokens: 496, free_tokens: 512, total_tokens: 512 });
    let cache = session(&engine, 480);
    let (cache, result) = step(&engine, cache, &[run(0, 480, 32)]);
    result.unwrap();
    assert_eq!((cache.reserved_tokens(), engine.load_now().cache_tokens_left), (512, 0));
    let (cache, result) = step(&engine, cache, &[run(1, 0, 1)]);
    assert_eq!(result.unwrap_err(), StepError::CacheFull { needed_tokens: 16, free_tokens: 0, total_tokens: 512 });
    assert_eq!(cache.end(0), 512);
    drop(cache);
    assert_eq!(engine.load_now().cache_tokens_left, 512);
}

#[test]
fn steps_wait_for_pages_and_running_sessions_come_first() {
    let engine = load(options(0..2));
    let (holder, running) = (session(&engine, 240), session(&engine, 220));
    // One page is left; the watermark is two. Both must wait, the new session first in time.
    assert_eq!(engine.load_now().cache_tokens_left, 48);
    let new = submit(&engine, engine.cache(0..2).unwrap(), &[run(0, 0, 48)]);
    let growing = submit(&engine, running, &[run(0, 220, 80)]);
    assert!(new.try_recv().is_err() && growing.try_recv().is_err());
    assert_eq!(engine.load_now().queue, 2);
    drop(holder);
    let (running, result) = growing.recv_timeout(PATIENCE).unwrap();
    result.unwrap();
    let (new, result) = new.recv_timeout(PATIENCE).unwrap();
    result.unwrap();
    assert_eq!((running.reserved_tokens(), new.reserved_tokens()), (304, 48));
    assert_eq!(engine.load_now().cache_tokens_left, 512 - 304 - 48);
}

#[test]
fn a_full_cache_stops_only_the_steps_that_need_pages() {
    let engine = load(options(0..2));
    // Together they take all pages. The first needs another for its next token, the second has room for one more.
    let (holder, decoding) = (session(&engine, 240), session(&engine, 239));
    let (holder, result) = step(&engine, holder, &[run(0, 240, 32)]);
    result.unwrap();
    assert_eq!(engine.load_now().cache_tokens_left, 0);
    let starved = submit(&engine, holder, &[run(0, 272, 1)]);
    let (decoding, result) = step(&engine, decoding, &[run(0, 239, 1)]);
    result.unwrap();
    assert!(starved.try_recv().is_err() && engine.load_now().queue == 1);
    // Now the second needs a page, too, and waits like the first and like a new session.
    let behind = submit(&engine, decoding, &[run(0, 240, 1)]);
    let (third, third_answers) = job(engine.cache(0..2).unwrap(), &[run(0, 0, 1)]);
    let cancelled = third.cancelled.clone();
    engine.submit(third);
    assert!(behind.try_recv().is_err() && engine.load_now().queue == 3);
    cancelled.store(true, Ordering::Relaxed);
    assert_eq!(third_answers.recv_timeout(PATIENCE).unwrap().1.unwrap_err(), StepError::Cancelled);
    drop(engine);
    for answers in [starved, behind] {
        assert_eq!(answers.recv_timeout(PATIENCE).unwrap().1.unwrap_err(), StepError::Cancelled);
    }
}

#[test]
fn waiting_ends_at_the_deadline_or_when_cancelled() {
    let engine = load(options(0..2));
    let holder = session(&engine, 480);
    let (mut late, late_answers) = job(engine.cache(0..2).unwrap(), &[run(0, 0, 1)]);
    late.deadline = Instant::now() + Duration::from_millis(30);
    let (dropped, dropped_answers) = job(engine.cache(0..2).unwrap(), &[run(0, 0, 1)]);
    let cancelled = dropped.cancelled.clone();
    engine.submit(late);
    engine.submit(dropped);
    let error = late_answers.recv_timeout(PATIENCE).unwrap().1.unwrap_err();
    assert_eq!(error, StepError::CacheFull { needed_tokens: 16, free_tokens: 32, total_tokens: 512 });
    cancelled.store(true, Ordering::Relaxed);
    assert_eq!(dropped_answers.recv_timeout(PATIENCE).unwrap().1.unwrap_err(), StepError::Cancelled);
    assert_eq!(engine.load_now().queue, 0);
    drop(holder);
    assert_eq!(engine.load_now().cache_tokens_left, 512);
}

/// Keeps the engine's thread in a callback until the sender is used.
fn hold_up(engine: &Engine) -> mpsc::SyncSender<()> {
    let (go_on, held) = mpsc::sync_channel::<()>(1);
    let (arrived, here) = mpsc::sync_channel(1);
    let (mut blocker, _) = job(engine.cache(engine.span()).unwrap(), &[run(0, 0, 1)]);
    blocker.done = Box::new(move |_, _| {
        arrived.send(()).unwrap();
        held.recv_timeout(PATIENCE).unwrap();
    });
    engine.submit(blocker);
    here.recv_timeout(PATIENCE).unwrap();
    go_on
}

#[test]
fn the_queue_is_bounded_and_late_steps_fail() {
    let engine = load(EngineOptions { queue: 3, ..options(0..2) });
    let go_on = hold_up(&engine);
    let (mut late, late_answers) = job(engine.cache(0..2).unwrap(), &[run(0, 0, 1)]);
    let deadline = Instant::now() + Duration::from_millis(5);
    late.deadline = deadline;
    engine.submit(late);
    let kept = submit(&engine, engine.cache(0..2).unwrap(), &[run(0, 0, 1)]);
    assert_eq!(engine.load_now().queue, 2);
    assert_eq!(refusal(&engine, |_| {}), StepError::QueueFull { limit: 2 }, "an owner may fill no more than half");
    let cache_of = |name| engine.cache(0..2).unwrap().owned_by(Owner::of(&name));
    let third_answers = submit(&engine, cache_of("another"), &[run(0, 0, 1)]);
    let everybody = refusal(&engine, |job| job.cache = cache_of("a third"));
    assert_eq!(everybody, StepError::QueueFull { limit: 3 });
    while Instant::now() < deadline {
        std::thread::yield_now();
    }
    go_on.send(()).unwrap();
    let (cache, result) = late_answers.recv_timeout(PATIENCE).unwrap();
    assert_eq!((result.unwrap_err(), cache.reserved_tokens()), (StepError::Deadline, 0));
    for answers in [kept, third_answers] {
        answers.recv_timeout(PATIENCE).unwrap().1.unwrap();
    }
    assert_eq!(engine.load_now().queue, 0);
}

#[test]
fn a_step_that_is_cancelled_half_way_is_given_up() {
    let engine = load(EngineOptions { batch_tokens: 16, ..options(0..2) });
    let cache = session(&engine, 40);
    let go_on = hold_up(&engine);
    let (mut short, _) = job(engine.cache(0..2).unwrap(), &[run(0, 0, 1)]);
    let (long, answers) = job(cache, &[run(0, 8, 200)]);
    let cancelled = long.cancelled.clone();
    // Both have a part in the next pass; the short one ends with it.
    short.done = Box::new(move |_, _| cancelled.store(true, Ordering::Relaxed));
    engine.submit(long);
    engine.submit(short);
    go_on.send(()).unwrap();
    let (cache, result) = answers.recv_timeout(PATIENCE).unwrap();
    assert_eq!(result.unwrap_err(), StepError::Cancelled);
    assert_eq!((cache.end(0), cache.reserved_tokens()), (8, 16));
    step(&engine, cache, &[run(0, 8, 1)]).1.unwrap();
}

#[test]
fn a_panic_fails_its_pass_and_nothing_else() {
    let engine = load(options(0..2));
    let good = session(&engine, 20);
    // No caller can make such a cache: it claims blocks that aren't there.
    let (cache, result) = step(&engine, Cache::new(engine.shared.desk.clone(), 0..99), &[run(0, 0, 1)]);
    let error = result.unwrap_err();
    assert!(matches!(error, StepError::Internal(_)) && error.maybe_applied());
    assert_eq!((cache.end(0), cache.reserved_tokens()), (0, 0));
    step(&engine, good, &[run(0, 20, 1)]).1.unwrap();

    let (mut rude, _) = job(engine.cache(0..2).unwrap(), &[run(0, 0, 1)]);
    rude.done = Box::new(|_, _| panic!("a receiver that panics"));
    engine.submit(rude);
    session(&engine, 1);
}

#[test]
fn the_block_that_makes_a_nan_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let engine = Engine::load(&with_an_infinity(dir.path()), options(0..3), &mut |_, _| {}).unwrap();

    let sound = submit(&engine, engine.cache(0..1).unwrap(), &[run(0, 0, 3)]);
    let (cache, result) = step(&engine, engine.cache(0..3).unwrap(), &[run(0, 0, 3)]);
    let error = result.unwrap_err();
    assert_eq!(error, StepError::NonFinite { row: 0, place: Place::Block(1) });
    assert!(error.maybe_applied());
    assert_eq!((cache.end(0), cache.reserved_tokens()), (0, 0));
    sound.recv_timeout(PATIENCE).unwrap().1.unwrap();
}

#[test]
fn a_failed_rollback_cuts_the_lane_and_a_refused_one_does_not() {
    let engine = load(options(0..2));
    let cache = session(&engine, 40);
    let (mut refused, answers) = job(cache, &[run(0, 10, 2)]);
    refused.hidden = rows(3);
    engine.submit(refused);
    let (cache, result) = answers.recv_timeout(PATIENCE).unwrap();
    assert!(!result.unwrap_err().maybe_applied());
    assert_eq!(cache.end(0), 40);
    let (cache, result) = step(&engine, cache, &[run(0, 10, 2)]);
    result.unwrap();
    assert_eq!((cache.end(0), cache.reserved_tokens()), (12, 16));
}

#[test]
fn closing_the_engine_answers_what_waits() {
    let engine = load(options(0..2));
    let holder = session(&engine, 480);
    let waiting = submit(&engine, engine.cache(0..2).unwrap(), &[run(0, 0, 1)]);
    drop(engine);
    assert_eq!(waiting.recv_timeout(PATIENCE).unwrap().1.unwrap_err(), StepError::Cancelled);
    drop(holder);
}

/// What steps give, one after another.
fn outputs(engine: &Engine, mut cache: Cache, steps: &[Vec<LaneRun>]) -> (Cache, Vec<bytes::Bytes>) {
    let mut outputs = Vec::new();
    for lanes in steps {
        let (back, result) = step(engine, cache, lanes);
        cache = back;
        outputs.push(result.unwrap().hidden.bytes);
    }
    (cache, outputs)
}

#[test]
fn copied_lanes_give_what_lanes_of_their_own_give() {
    for batch_tokens in [4, 512] {
        let engine = load(EngineOptions { batch_tokens, ..options(0..3) });
        let alone = |steps: &[Vec<LaneRun>]| outputs(&engine, session(&engine, 40), steps).1;
        let (grown, back) = ([vec![run(0, 40, 9)]], [vec![run(0, 21, 12)]]);
        let (grown, back) = (alone(&grown), alone(&back));

        let mut cache = session(&engine, 40);
        cache.copy_lanes(&[(0, 1)]);
        cache.copy_lanes(&[(1, 2), (0, 3)]);
        assert_eq!((cache.reserved_tokens(), cache.end(3)), (48, 40));
        // One lane goes on, one goes back, and two go on in one step; all of them wrote to one page.
        let (cache, found) = outputs(&engine, cache, &[vec![run(1, 40, 9)], vec![run(2, 21, 12)]]);
        assert_eq!([&found[0], &found[1]], [&grown[0], &back[0]]);
        let (mut both, answers) = job(cache, &[run(0, 40, 9), run(3, 40, 9)]);
        both.hidden = HiddenStates { rows: 18, bytes: [&rows(9).bytes[..], &rows(9).bytes].concat().into(), ..rows(1) };
        engine.submit(both);
        let (mut cache, result) = answers.recv_timeout(PATIENCE).unwrap();
        assert_eq!(result.unwrap().hidden.bytes, [&grown[0][..], &grown[0]].concat());

        cache.drop_lane(1);
        cache.drop_lane(2);
        cache.keep_prefix(3, &names(9), Vec::new());
        drop(cache);
        let load = engine.load_now();
        assert_eq!((load.cache_tokens_kept, load.cache_tokens_left), (48, 512), "49 tokens fill three pages");
        let mut cache = engine.cache(0..2).unwrap();
        cache.adopt_prefix(5, &names(9));
        assert_eq!((cache.end(5), engine.load_now().cache_tokens_left), (48, 512 - 48));
        engine.forget_prefixes(Instant::now() + PATIENCE);
        assert_eq!(engine.load_now().cache_tokens_left, 512 - 48);
        drop(cache);
        assert_eq!((engine.load_now().cache_tokens_kept, engine.load_now().cache_tokens_left), (0, 512));
    }
}

#[test]
fn a_session_goes_on_behind_another_ones_prefix() {
    let engine = load(options(0..3));
    let (_, whole) = outputs(&engine, engine.cache(0..3).unwrap(), &[vec![run(0, 0, 40)]]);
    let kept = vec![(1, rows(16))];
    session(&engine, 40).keep_prefix(0, &names(2), kept);
    assert_eq!(engine.load_now().kept_bytes, 16 * 256);
    let mut cache = engine.cache(0..3).unwrap();
    let found = cache.adopt_prefix(0, &names(2));
    assert!(found[0].is_none() && found[1].as_ref().unwrap().bytes == rows(16).bytes);
    // The rest of the same rows; then back into the shared pages, which stay as they are for the next session.
    for _ in 0..2 {
        let (mut rest, answers) = job(cache, &[run(0, 20, 20)]);
        rest.hidden = rows(40).slice(20..40);
        engine.submit(rest);
        let (back, result) = answers.recv_timeout(PATIENCE).unwrap();
        assert_eq!(result.unwrap().hidden.bytes, whole[0][20 * 256..]);
        drop(back);
        cache = engine.cache(0..3).unwrap();
        assert_eq!(cache.adopt_prefix(0, &names(4)).len(), 2);
    }
}

#[test]
fn a_step_that_never_begins_leaves_what_its_lane_shares() {
    let engine = load(options(0..2));
    let mut cache = session(&engine, 24);
    cache.copy_lanes(&[(0, 1)]);
    let go_on = hold_up(&engine);
    let (unwanted, answers) = job(cache, &[run(1, 20, 2)]);
    let cancelled = unwanted.cancelled.clone();
    engine.submit(unwanted);
    cancelled.store(true, Ordering::Relaxed);
    go_on.send(()).unwrap();
    let (cache, result) = answers.recv_timeout(PATIENCE).unwrap();
    assert_eq!(result.unwrap_err(), StepError::Cancelled);
    assert_eq!((cache.end(0), cache.end(1), cache.reserved_tokens()), (24, 24, 32));
    let (_, result) = step(&engine, cache, &[run(0, 24, 20), run(1, 20, 2)]);
    result.unwrap();
    assert_eq!(engine.load_now().cache_tokens_left, 512);
}
