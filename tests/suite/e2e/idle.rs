//! Clients that say nothing, or are gone: what a node holds for them it gives back in the stated time, and no sooner.

use std::time::{Duration, Instant};

use helion::{
    client::{
        Client,
        generation::{GenerationEvent, GenerationOptions},
        session::Patience,
    },
    swarm::PeerId,
};

use super::{
    harness::{HANG, Place, Running, Server, client, fixture, join, reference},
    sessions::{holds_nothing, info},
};

fn options(max_tokens: usize) -> GenerationOptions {
    GenerationOptions { max_tokens, ignore_eos: true, tenant: None, ..GenerationOptions::default() }
}

/// A client in a process of its own that has begun to generate, and is held there.
fn held(place: &Place, peer: &Server) -> Running {
    let (model, ids) = (fixture("llama").display().to_string(), join(&[5; 20]));
    let base = ["client", "generate", "--model", &model, "--initial-peers", &peer.address, "--no-mdns"];
    let more = ["--dtype", "f32", "--input-ids", &ids, "--max-tokens", "44", "--ignore-eos", "--json-stream"];
    let running = place.start(&[&base[..], &more].concat());
    running.line_with("token_id");
    running.signal("STOP");
    running
}

#[tokio::test(flavor = "multi_thread")]
async fn the_pages_of_a_client_that_is_gone_come_back_after_the_grace() {
    let (place, model) = (Place::new(), fixture("llama"));
    let grace = Duration::from_secs(2);
    let (bootstrap, nodes) = place.swarm(&model, &["0:6"], &["--reconnect-grace", "2"]);
    let observer = client(&model, &bootstrap, Patience::default()).await;
    let gone = held(&place, &bootstrap);
    if info(&observer, &nodes[0]).await.sessions == 0 {
        return; // it was quicker than the signal
    }
    gone.signal("KILL");
    let killed = Instant::now();
    holds_nothing(&observer, &nodes[0]).await;
    assert!(killed.elapsed() >= grace, "{:?}: it may have come back", killed.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_pages_of_a_client_that_froze_come_back() {
    let (place, model) = (Place::new(), fixture("llama"));
    let (bootstrap, nodes) = place.swarm(&model, &["0:6"], &["--session-idle", "2"]);
    let observer = client(&model, &bootstrap, Patience::default()).await;
    let frozen = held(&place, &bootstrap);
    holds_nothing(&observer, &nodes[0]).await;
    // Where it wakes up, it is told everything again and goes on.
    frozen.signal("CONT");
    let ended = frozen.finish();
    assert!(ended.status.success(), "{ended:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_rests_for_too_long_ends_and_is_there_again_when_it_is_used() {
    let (place, model) = (Place::new(), fixture("llama"));
    let (bootstrap, nodes) = place.swarm(&model, &["0:3", "3:6"], &["--session-idle", "2"]);
    let client = client(&model, &bootstrap, Patience::default()).await;
    let reference = reference(&model);
    let mut kept = None;
    let first = client.generate_on(&mut kept, &reference.prompt, &options(10), &mut |_| {}).await.unwrap();
    let rested = Instant::now();
    for node in &nodes {
        holds_nothing(&client, node).await;
    }
    assert!(rested.elapsed() >= Duration::from_secs(1), "{:?}", rested.elapsed());
    let prompt = [&reference.prompt[..], &first.output_ids].concat();
    let second = client.generate_on(&mut kept, &prompt, &options(14), &mut |_| {}).await.unwrap();
    assert_eq!([first.output_ids, second.output_ids].concat(), reference.output);
}

/// A peer's connection ends and not the peer: it goes on with what it has.
#[tokio::test(flavor = "multi_thread")]
async fn a_hop_whose_connection_is_cut_computes_nothing_again() {
    let (place, model) = (Place::new(), fixture("llama"));
    let (bootstrap, nodes) = place.swarm(&model, &["0:2", "2:4", "4:6"], &[]);
    let client = client(&model, &bootstrap, Patience::default()).await;
    let reference = reference(&model);
    let mut tokens = 0;
    let mut cut = |event| {
        if let GenerationEvent::Token { .. } = event {
            tokens += 1;
            if let Some(hop) = [3usize, 8, 13].iter().position(|at| *at == tokens) {
                cut_link(&client, &nodes[hop]);
            }
        }
    };
    let count = reference.output.len();
    let generation = client.generate(&reference.prompt, &options(count), &mut cut).await.unwrap();
    assert_eq!((generation.output_ids, generation.recoveries), (reference.output.clone(), 0));
    let rows = (reference.prompt.len() + reference.output.len() - 1) as u64;
    for node in &nodes {
        let info = info(&client, node).await;
        assert_eq!((info.tokens, info.tokens_replayed), (rows, 0));
    }
}

/// Ends the link to a node, as a network does.
fn cut_link(client: &Client, node: &Server) {
    let (peer, address): (PeerId, _) =
        (node.peer_id.parse().unwrap(), node.address.rsplit_once("/p2p/").unwrap().0.parse().unwrap());
    // There is one already.
    let link = futures::executor::block_on(client.swarm().link(peer, &[address])).unwrap();
    link.close();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_without_another_peer_ends_at_its_deadline() {
    let (place, model) = (Place::new(), fixture("llama"));
    let (bootstrap, mut nodes) = place.swarm(&model, &["0:6"], &["--drain-timeout", "2"]);
    let client = client(&model, &bootstrap, Patience::default()).await;
    let mut kept = None;
    client.generate_on(&mut kept, &[1, 2, 3], &options(4), &mut |_| {}).await.unwrap();
    let node = nodes.remove(0);
    let told = Instant::now();
    node.running.signal("TERM");
    // Until then it serves those who can't go elsewhere.
    let more = client.generate_on(&mut kept, &[1, 2, 3, 4], &options(4), &mut |_| {}).await.unwrap();
    assert_eq!(more.output_ids.len(), 4);
    node.ends_well();
    assert!((2..30).contains(&told.elapsed().as_secs()), "{:?}", told.elapsed());
    assert!(told.elapsed() < HANG);
}
