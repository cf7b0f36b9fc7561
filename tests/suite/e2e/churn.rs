//! Nodes that come and go under load: no wrong token, nothing hangs, nothing leaks.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use helion::client::{generation::GenerationOptions, session::Patience};
use rand::RngExt;

use super::{
    harness::{HANG, Place, Server, client, fixture, reference},
    sessions::holds_nothing,
};

/// Enough that every kind of hop is lost at every kind of moment, in a time that a test may take. HELION_TEST_GENERATIONS asks for
/// another number: a thousand take minutes.
const GENERATIONS: usize = 32;
const AT_A_TIME: usize = 4;
/// Beside the time that a node takes to start.
const BETWEEN_LOSSES: Duration = Duration::from_millis(300);
/// A frozen node is noticed after a part of this, or is not.
const LONGEST_FREEZE: Duration = Duration::from_millis(2500);
const PATIENCE: Duration = Duration::from_millis(500);
const SPANS: [&str; 3] = ["0:2", "2:4", "4:6"];

/// With the key that the node before it in this place had, as after a restart.
fn start(place: &Place, model: &Path, bootstrap: &Server, index: usize) -> Server {
    let key = place.path().join(format!("{index}.key")).display().to_string();
    place.node(model, bootstrap, &["--blocks", SPANS[index % SPANS.len()], "--identity-path", &key])
}

#[tokio::test(flavor = "multi_thread")]
async fn generations_survive_nodes_that_come_and_go() {
    let asked = std::env::var("HELION_TEST_GENERATIONS").ok().map(|number| number.parse().unwrap());
    let generations: usize = asked.unwrap_or(GENERATIONS);
    let (place, model) = (Arc::new(Place::new()), fixture("llama"));
    let bootstrap = Arc::new(place.bootstrap());
    let nodes: Vec<Server> = (0..2 * SPANS.len()).map(|index| start(&place, &model, &bootstrap, index)).collect();
    let patience = Patience { overdue: PATIENCE, pong: PATIENCE, ..Patience::default() };
    let client = client(&model, &bootstrap, patience).await;
    let reference = Arc::new(reference(&model));
    let over = Arc::new(AtomicBool::new(false));

    // One after the other is killed and another one started in its place, or it is frozen and wakes up, or doesn't.
    let churn = tokio::task::spawn_blocking({
        let (place, bootstrap, over, model) = (place.clone(), bootstrap.clone(), over.clone(), model.clone());
        move || {
            let (mut nodes, mut killed, mut frozen): (Vec<Server>, usize, usize) = (nodes, 0, 0);
            while !over.load(Ordering::Relaxed) {
                let index = rand::rng().random_range(0..nodes.len());
                let (freezes, is_killed) = match rand::rng().random_range(0..4) {
                    0 | 1 => (false, true),
                    2 => (true, true),
                    _ => (true, false),
                };
                if freezes {
                    nodes[index].running.signal("STOP");
                    std::thread::sleep(LONGEST_FREEZE.mul_f64(rand::rng().random_range(0.0..1.0)));
                    frozen += 1;
                }
                if is_killed {
                    // And waited for: until then its key file is in use.
                    drop(nodes.remove(index));
                    nodes.insert(index, start(&place, &model, &bootstrap, index));
                    killed += 1;
                } else {
                    nodes[index].running.signal("CONT");
                }
                std::thread::sleep(BETWEEN_LOSSES);
            }
            (nodes, killed, frozen)
        }
    });
    let generate = async {
        let mut running = tokio::task::JoinSet::new();
        let mut recoveries = 0;
        for started in 0..generations + AT_A_TIME {
            if started >= AT_A_TIME
                && let Some(done) = running.join_next().await
            {
                recoveries += done.unwrap();
            }
            if started < generations {
                let (client, reference) = (client.clone(), reference.clone());
                running.spawn(async move {
                    let options = GenerationOptions {
                        max_tokens: reference.output.len(),
                        ignore_eos: true,
                        prefill_chunk: 16,
                        wait: Duration::from_secs(30),
                        ..GenerationOptions::default()
                    };
                    let generation = client.generate(&reference.prompt, &options, &mut |_| {}).await.unwrap();
                    assert_eq!(generation.output_ids, reference.output);
                    generation.recoveries
                });
            }
        }
        recoveries
    };
    let recoveries = tokio::time::timeout(2 * HANG * generations.div_ceil(GENERATIONS) as u32, generate)
        .await
        .expect("a generation hangs");
    over.store(true, Ordering::Relaxed);
    let (nodes, killed, frozen) = churn.await.unwrap();
    eprintln!("{generations} generations, {killed} nodes killed, {frozen} frozen, {recoveries} hops replaced");
    for node in &nodes {
        holds_nothing(&client, node).await;
    }
}
