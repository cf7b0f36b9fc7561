//! What attention takes beside the rest of a block: decode at 1k to 32k tokens of KV, and prefill, for every format of the cache.
//!
//! `cargo bench --bench attention`. The model is one block with small matrices, made on the spot, so that most of a step at a long
//! context is attention; what a step takes at the shortest context is taken off. A decode step reads the whole cache once: its
//! bytes a second are to be compared with those of the memory, and its time must not grow faster than the bytes do, by
//! more than a part that caches explain ([`MOST_GROWTH`]); the program fails where it does.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs, dead_code)]

#[path = "../tests/suite/made.rs"]
mod made;

use std::{
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

use helion::{
    engine::{Cache, Engine, EngineOptions, HiddenStates, Job, Keep, LaneRun},
    model::{Dtype, KvDtype, checkpoint::Checkpoint},
};
use made::Shape;

const SHAPE: Shape = Shape { hidden: 256, intermediate: 64, blocks: 1, heads: 4, kv_heads: 2, vocab: 32, shards: 1 };
const LONGEST: usize = 32 << 10;
const CONTEXTS: [usize; 6] = [64, 1 << 10, 4 << 10, GROWS_FROM, 16 << 10, LONGEST - 64];
/// From this context on, a step that reads twice the bytes may take so many times twice the time.
const GROWS_FROM: usize = 8 << 10;
const MOST_GROWTH: f64 = 1.3;
const PREFILL: usize = 512;
/// Steps whose fastest counts.
const STEPS: usize = 20;

fn main() {
    let dir = tempfile::tempdir().unwrap();
    SHAPE.write(dir.path());
    let config = dir.path().join("config.json");
    let text = std::fs::read_to_string(&config).unwrap();
    std::fs::write(
        &config,
        text.replace("\"max_position_embeddings\":4096", &format!("\"max_position_embeddings\":{LONGEST}")),
    )
    .unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    println!(
        "| KV | prefill of {PREFILL}, ms | tokens of KV | decode, µs | more than at {}, µs | GB/s | time to bytes, from {GROWS_FROM} on |",
        CONTEXTS[0]
    );
    println!("|---|---|---|---|---|---|---|");
    let mut too_slow = Vec::new();
    for kv_dtype in [KvDtype::F32, KvDtype::Bf16, KvDtype::F16, KvDtype::Q8] {
        let options = EngineOptions {
            kv_dtype: Some(kv_dtype),
            cache_tokens: 2 * LONGEST,
            ..EngineOptions::new(0..1, Dtype::F32)
        };
        let engine = Engine::load(&checkpoint, options, &mut |_, _| {}).unwrap();
        let prefill = (0..5).map(|_| step(&engine, engine.cache(0..1).unwrap(), 0, PREFILL).1).min().unwrap();
        let mut cache = engine.cache(0..1).unwrap();
        let (mut end, mut shortest, mut from) = (0, Duration::ZERO, None);
        for tokens in CONTEXTS {
            while end < tokens {
                let rows = (tokens - end).min(PREFILL);
                cache = step(&engine, cache, end, rows).0;
                end += rows;
            }
            let mut best = Duration::MAX;
            for _ in 0..STEPS {
                let (back, took) = step(&engine, cache, tokens, 1);
                (cache, best) = (back, best.min(took));
            }
            if tokens == CONTEXTS[0] {
                shortest = best;
            }
            let head = kv_dtype.head_bytes(SHAPE.hidden / SHAPE.heads);
            let bytes = 2 * SHAPE.kv_heads * head * (tokens - CONTEXTS[0]);
            let more = best.saturating_sub(shortest);
            let second = bytes as f64 / more.as_secs_f64().max(1e-9);
            if tokens == GROWS_FROM {
                from = Some(second);
            }
            // How much more time than at the first of these contexts a byte takes.
            let growth = from.map(|from| from / second);
            too_slow.extend(growth.filter(|growth| *growth > MOST_GROWTH).map(|growth| (kv_dtype, tokens, growth)));
            println!(
                "| {kv_dtype} | {:.1} | {tokens} | {:.0} | {:.0} | {:.1} | {} |",
                prefill.as_secs_f64() * 1e3,
                best.as_secs_f64() * 1e6,
                more.as_secs_f64() * 1e6,
                second / 1e9,
                growth.map_or(String::new(), |growth| format!("{growth:.2}"))
            );
        }
    }
    assert!(too_slow.is_empty(), "grows faster than the bytes of the cache: {too_slow:?}");
}

/// Runs `tokens` rows from `position` on, and says how long that took.
fn step(engine: &Engine, cache: Cache, position: usize, tokens: usize) -> (Cache, Duration) {
    let (sender, receiver) = mpsc::sync_channel(1);
    let rows: Vec<f32> =
        (0..tokens * SHAPE.hidden).map(|i| (((i + position * 31) * 37 % 101) as f32 - 50.0) / 30.0).collect();
    let job = Job {
        cache,
        lanes: vec![LaneRun { lane: 0, position, tokens }],
        hidden: HiddenStates::from_f32(Dtype::F32, SHAPE.hidden, &rows),
        rope_length: None,
        keep: Keep::LastOfEachLane,
        deadline: Instant::now() + Duration::from_secs(600),
        cancelled: Arc::default(),
        done: Box::new(move |cache, result| sender.send((cache, result)).unwrap()),
    };
    let begun = Instant::now();
    engine.submit(job);
    let (cache, result) = receiver.recv().unwrap();
    result.unwrap();
    (cache, begun.elapsed())
}
