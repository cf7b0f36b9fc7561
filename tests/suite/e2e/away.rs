//! Connections that are cut while the hops live: they are made again, and nothing is computed again.

use std::{path::Path, time::Duration};

use helion::client::{
    generation::{GenerationEvent, GenerationOptions},
    session::Patience,
};

use super::{
    harness::{HANG, Place, Server, client, fixture, reference},
    long_links::FarNode,
    sessions::info,
};
use crate::link::Profile;

/// TCP, the handshake and the stream take longer than a connection on loopback is waited for.
const ROUND_TRIP: Duration = Duration::from_millis(300);

fn options(max_tokens: usize) -> GenerationOptions {
    GenerationOptions { max_tokens, ignore_eos: true, wait: HANG, ..GenerationOptions::default() }
}

/// Half of the blocks at the end of a long link, half of them here.
fn far_and_near(place: &Place, model: &Path) -> (Server, FarNode, Server) {
    let bootstrap = place.bootstrap();
    let far = FarNode::start(place, model, &bootstrap, "0:3", Profile::round_trip(ROUND_TRIP));
    let near = place.node(model, &bootstrap, &["--blocks", "3:6"]);
    (bootstrap, far, near)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_over_a_long_link_is_made_again() {
    let (place, model) = (Place::new(), fixture("llama"));
    let (bootstrap, far, near) = far_and_near(&place, &model);
    let client = client(&model, &bootstrap, Patience::default()).await;
    let reference = reference(&model);
    let (mut tokens, mut spare) = (0, None);
    let mut watch = |event| match event {
        GenerationEvent::Token { .. } => {
            tokens += 1;
            match tokens {
                // It could take the far one's place.
                2 => spare = Some(place.node(&model, &bootstrap, &["--blocks", "0:3"])),
                4 => far.proxy.cut(),
                _ => {}
            }
        }
        GenerationEvent::Route { .. } => {}
        GenerationEvent::Recovery { recovery, .. } => panic!("nobody was lost: {recovery:?}"),
    };
    let generation = client.generate(&reference.prompt, &options(9), &mut watch).await.unwrap();
    assert_eq!(generation.output_ids, reference.output[..9]);
    assert_eq!(generation.route[0].peer_id, far.node.peer_id);
    for node in [&far.node, &near] {
        assert_eq!(info(&client, node).await.tokens_replayed, 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_conversation_that_is_cut_off_while_it_rests_keeps_what_it_has() {
    let (place, model) = (Place::new(), fixture("qwen3"));
    let (bootstrap, far, near) = far_and_near(&place, &model);
    let client = client(&model, &bootstrap, Patience::default()).await;
    let reference = reference(&model);
    let mut kept = None;
    client.generate_on(&mut kept, &reference.prompt, &options(5), &mut |_| {}).await.unwrap();
    for _ in 0..2 {
        far.proxy.cut();
        let conversation = kept.as_mut().unwrap();
        tokio::time::timeout(HANG / 4, conversation.wants_attention()).await.unwrap();
        conversation.attend().await;
    }
    let prompt = [&reference.prompt[..], &reference.output[..5]].concat();
    let second = client.generate_on(&mut kept, &prompt, &options(4), &mut |_| {}).await.unwrap();
    assert_eq!((&second.output_ids[..], second.recoveries), (&reference.output[5..9], 0));
    for node in [&far.node, &near] {
        let info = info(&client, node).await;
        assert_eq!((info.tokens, info.tokens_replayed), (prompt.len() as u64 + 3, 0));
    }
}

/// It began to leave while the client was away.
#[tokio::test(flavor = "multi_thread")]
async fn a_conversation_that_comes_back_to_a_hop_that_leaves_moves() {
    let (place, model) = (Place::new(), fixture("llama"));
    let (bootstrap, mut nodes) = place.swarm(&model, &["0:3", "3:6", "0:3"], &[]);
    let client = client(&model, &bootstrap, Patience::default()).await;
    let reference = reference(&model);
    let mut kept = None;
    let first = client.generate_on(&mut kept, &reference.prompt, &options(10), &mut |_| {}).await.unwrap();
    let place_of = |nodes: &[Server]| nodes.iter().position(|node| node.peer_id == first.route[0].peer_id).unwrap();
    let leaving = nodes.remove(place_of(&nodes));
    client.swarm().link(leaving.peer_id.parse().unwrap(), &[]).await.unwrap().close();
    leaving.running.signal("TERM");
    leaving.running.error_with("leaving");
    let conversation = kept.as_mut().unwrap();
    for what in ["comes back", "hands over"] {
        let waiting = tokio::time::timeout(HANG / 4, conversation.wants_attention()).await;
        assert!(waiting.is_ok(), "{what}");
        conversation.attend().await;
    }
    leaving.ends_well();
    let prompt = [&reference.prompt[..], &reference.output[..10]].concat();
    let second = client.generate_on(&mut kept, &prompt, &options(6), &mut |_| {}).await.unwrap();
    assert_eq!(second.output_ids, reference.output[10..16]);
    for node in &nodes {
        assert_eq!(info(&client, node).await.tokens_replayed, 0);
    }
}
