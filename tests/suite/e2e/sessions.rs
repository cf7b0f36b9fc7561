//! Sessions over time: they share a cache that is too small for all, and go on from one generation to the next.

use std::time::Duration;

use helion::{
    client::{
        Client, PeerRules,
        generation::{Generation, GenerationEvent, GenerationOptions},
        session::Patience,
    },
    swarm::{
        PeerId, WireCodec,
        rpc::{Request, response},
    },
};

use super::harness::{HANG, Place, Server, client, fixture, reference};

fn options(max_tokens: usize) -> GenerationOptions {
    GenerationOptions { max_tokens, ignore_eos: true, prefill_chunk: 16, ..GenerationOptions::default() }
}

/// What a node says of itself.
pub(super) async fn info(client: &Client, node: &Server) -> helion::swarm::proto::rpc::InfoResponse {
    let peer: PeerId = node.peer_id.parse().unwrap();
    let addresses = [node.address.rsplit_once("/p2p/").unwrap().0.parse().unwrap()];
    let answer = client.swarm().request(peer, &addresses, Request::info(), Duration::from_secs(10)).await;
    match answer.unwrap().body {
        Some(response::Body::Info(info)) => info,
        other => panic!("no info: {other:?}"),
    }
}

/// Waits until a node holds nothing of any session: what is closed, or was left for the reconnection time.
pub(super) async fn holds_nothing(client: &Client, node: &Server) {
    let deadline = tokio::time::Instant::now() + HANG / 2;
    loop {
        let info = info(client, node).await;
        let held = (info.sessions, info.cache_tokens_total - info.cache_tokens_left, info.history_bytes);
        if held == (0, 0, 0) {
            return;
        }
        assert!(tokio::time::Instant::now() < deadline, "sessions, tokens and bytes that leaked: {held:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn sessions_that_together_need_twice_the_cache_all_finish() {
    const SESSIONS: usize = 20;
    let (place, model) = (Place::new(), fixture("llama"));
    // Each session takes 64 tokens in the end.
    let cache = (SESSIONS * 64 / 2).to_string();
    let args = ["--attn-cache-tokens", &cache, "--step-deadline", "1"];
    let (bootstrap, nodes) = place.swarm(&model, &["0:3", "3:6"], &args);
    let patience = Patience { recovery: Duration::from_secs(50), ..Patience::default() };
    let client = client(&model, &bootstrap, patience).await;
    let reference = reference(&model);
    let mut generations = tokio::task::JoinSet::new();
    for _ in 0..SESSIONS {
        let (client, prompt, count) = (client.clone(), reference.prompt.clone(), reference.output.len());
        generations.spawn(async move { client.generate(&prompt, &options(count), &mut |_| {}).await.unwrap() });
    }
    let done: Vec<Generation> = generations.join_all().await;
    assert!(done.iter().all(|generation| generation.output_ids == reference.output));
    // Nobody holds on to anything.
    for node in &nodes {
        holds_nothing(&client, node).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_conversation_sends_only_what_is_new() {
    let (place, model) = (Place::new(), fixture("llama"));
    let (bootstrap, nodes) = place.swarm(&model, &["0:3", "3:6"], &[]);
    let client = client(&model, &bootstrap, Patience::default()).await;
    let reference = reference(&model);
    let mut conversation = None;
    let first = client.generate_on(&mut conversation, &reference.prompt, &options(10), &mut |_| {}).await.unwrap();
    assert_eq!(first.output_ids, reference.output[..10]);
    let before = info(&client, &nodes[0]).await.tokens;
    // The next turn: what was said, the last token of it included, which the hops have not seen yet.
    let prompt = [&reference.prompt[..], &reference.output[..10]].concat();
    let second = client.generate_on(&mut conversation, &prompt, &options(14), &mut |_| {}).await.unwrap();
    assert_eq!(second.output_ids, reference.output[10..]);
    assert_eq!(info(&client, &nodes[0]).await.tokens - before, 1 + 13);
    // One that goes back only computes what differs.
    let before = info(&client, &nodes[0]).await.tokens;
    let third = client.generate_on(&mut conversation, &reference.prompt, &options(5), &mut |_| {}).await.unwrap();
    assert_eq!(third.output_ids, reference.output[..5]);
    assert_eq!(info(&client, &nodes[0]).await.tokens - before, 1 + 4);
    assert_eq!(info(&client, &nodes[0]).await.sessions, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_conversation_survives_a_hop_that_goes_in_the_pause() {
    let (place, model) = (Place::new(), fixture("qwen3"));
    let (bootstrap, nodes) = place.swarm(&model, &["0:3", "3:6", "0:3", "3:6"], &[]);
    let client = client(&model, &bootstrap, Patience::default()).await;
    let reference = reference(&model);
    let mut conversation = None;
    let first = client.generate_on(&mut conversation, &reference.prompt, &options(10), &mut |_| {}).await.unwrap();
    for hop in &first.route {
        nodes.iter().find(|node| node.peer_id == hop.peer_id).unwrap().running.signal("KILL");
    }
    let prompt = [&reference.prompt[..], &reference.output[..10]].concat();
    let second = client.generate_on(&mut conversation, &prompt, &options(14), &mut |_| {}).await.unwrap();
    assert_eq!((second.output_ids, second.recoveries), (reference.output[10..].to_vec(), 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_users_rules_hold() {
    let (place, model) = (Place::new(), fixture("llama"));
    let (bootstrap, nodes) = place.swarm(&model, &["0:6", "0:2", "2:6"], &[]);
    let client = client(&model, &bootstrap, Patience::default()).await;
    let ids: Vec<PeerId> = nodes.iter().map(|node| node.peer_id.parse().unwrap()).collect();
    let through = async |rules: PeerRules| {
        let generation = client.clone().with_rules(rules).generate(&[1, 2, 3], &options(2), &mut |_| {}).await;
        generation.map(|generation| generation.route.into_iter().map(|hop| hop.peer_id).collect::<Vec<_>>())
    };
    let names = |peers: &[usize]| peers.iter().map(|peer| nodes[*peer].peer_id.clone()).collect::<Vec<_>>();
    let route = PeerRules { route: vec![ids[1], ids[2]], ..PeerRules::default() };
    assert_eq!(through(route).await.unwrap(), names(&[1, 2]));
    let block = PeerRules { block: [ids[0]].into(), ..PeerRules::default() };
    assert_eq!(through(block).await.unwrap(), names(&[1, 2]));
    let allow = PeerRules { allow: [ids[0]].into(), ..PeerRules::default() };
    assert_eq!(through(allow).await.unwrap(), names(&[0]));
    let early = PeerRules { route: vec![ids[1]], ..PeerRules::default() };
    assert!(through(early).await.unwrap_err().to_string().contains("ends at block 2"));
    let gap = PeerRules { route: vec![ids[2]], ..PeerRules::default() };
    assert!(through(gap).await.unwrap_err().to_string().contains("block 0 is needed"));
    let nobody = PeerRules { block: ids.iter().copied().collect(), ..PeerRules::default() };
    assert!(through(nobody).await.unwrap_err().to_string().contains("no peer"));
}

/// What the README states: how far the logits are off, and that a lost hop changes nothing more.
#[tokio::test(flavor = "multi_thread")]
async fn hidden_states_in_eight_bits() {
    let (place, model) = (Place::new(), fixture("llama"));
    let (bootstrap, nodes) = place.swarm(&model, &["0:2", "2:4", "4:6", "2:4"], &[]);
    let exact = client(&model, &bootstrap, Patience::default()).await;
    let packed = exact.clone().with_wire_codec(WireCodec::Q8);
    let reference = reference(&model);
    let logits = exact.score(&reference.prompt, &options(1)).await.unwrap();
    let off = packed.score(&reference.prompt, &options(1)).await.unwrap();
    let (error, power) = logits.iter().zip(&off).fold((0.0, 0.0), |(error, power), (was, is)| {
        (error + f64::from(was - is).powi(2), power + f64::from(*was).powi(2))
    });
    let relative = (error / power).sqrt();
    eprintln!("logits through 3 hops in q8 are off by {relative:.5}");
    assert!(relative > 0.0 && relative < 0.06, "{relative}");

    let undisturbed = packed.generate(&reference.prompt, &options(24), &mut |_| {}).await.unwrap();
    assert_eq!((undisturbed.exact, undisturbed.wire_codec.as_deref()), (false, Some("q8")));
    let (mut tokens, mut middle) = (0, String::new());
    let mut kill = |event| match event {
        GenerationEvent::Route { route } => middle.clone_from(&route[1].peer_id),
        GenerationEvent::Token { .. } => {
            tokens += 1;
            if tokens == 7 {
                nodes.iter().find(|node| node.peer_id == middle).unwrap().running.signal("KILL");
            }
        }
        GenerationEvent::Recovery { .. } => {}
    };
    let disturbed = packed.generate(&reference.prompt, &options(24), &mut kill).await.unwrap();
    assert_eq!((disturbed.output_ids, disturbed.recoveries), (undisturbed.output_ids, 1));
}
