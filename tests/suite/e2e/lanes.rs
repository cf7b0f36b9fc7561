//! Lanes that are copied and dropped: samples of one prompt, beams, lost hops amid them, and steps that break the rules.

use std::time::Duration;

use helion::{
    client::{
        Client,
        generation::{GenerationEvent, GenerationOptions},
        sampling::SamplingOptions,
        session::{Input, Patience, Session, Step, Want},
    },
    engine::LaneRun,
    model::Dtype,
    swarm::{
        PeerId,
        proto::session as proto,
        ticket::{SessionLimits, Ticket},
    },
};

use super::{
    harness::{Place, Server, client, fixture, reference},
    sessions::{holds_nothing, info},
    strangers::{Stranger, foreign_step, frame, ticket},
};

#[tokio::test(flavor = "multi_thread")]
async fn samples_of_one_prompt_share_it_and_are_those_of_separate_generations() {
    const SAMPLES: usize = 4;
    let (place, model) = (Place::new(), fixture("llama"));
    let (bootstrap, nodes) = place.swarm(&model, &["0:3", "3:6"], &[]);
    let client = client(&model, &bootstrap, Patience::default()).await;
    let prompt = reference(&model).prompt;
    let options = |seed| GenerationOptions {
        max_tokens: 20,
        sampling: SamplingOptions { temperature: 1.2, seed: Some(seed), ..SamplingOptions::default() },
        ignore_eos: true,
        prefill_chunk: 16,
        ..GenerationOptions::default()
    };
    let mut told = vec![Vec::new(); SAMPLES];
    let mut hear = |sample: usize, event| match event {
        GenerationEvent::Token { token_id, .. } => told[sample].push(token_id),
        _ => assert_eq!(sample, 0),
    };
    let together = client.generate_many(&prompt, &options(5), SAMPLES, &mut hear).await.unwrap();
    for node in &nodes {
        let rows = prompt.len() + SAMPLES * 19;
        assert_eq!(info(&client, node).await.tokens, rows as u64, "the prompt is computed once");
        holds_nothing(&client, node).await;
    }
    for (sample, seed) in together.iter().zip(5..) {
        let alone = client.generate(&prompt, &options(seed), &mut |_| {}).await.unwrap();
        assert_eq!((&sample.output_ids, &sample.text), (&alone.output_ids, &alone.text));
    }
    assert!(together.iter().zip(&told).all(|(sample, told)| &sample.output_ids == told));
    assert!(together.windows(2).all(|pair| pair[0].output_ids != pair[1].output_ids), "they are drawn apart");

    // Those that end give up their lanes, and the others don't notice.
    let stop = together[0].text.chars().skip(4).take(2).collect::<String>();
    let stopped = GenerationOptions { stop: vec![stop], ..options(5) };
    let together = client.generate_many(&prompt, &stopped, SAMPLES, &mut |_, _| {}).await.unwrap();
    for (index, sample) in together.iter().enumerate() {
        let seed = GenerationOptions { stop: stopped.stop.clone(), ..options(5 + index as u64) };
        let alone = client.generate(&prompt, &seed, &mut |_| {}).await.unwrap();
        assert_eq!((&sample.output_ids, sample.finish_reason), (&alone.output_ids, alone.finish_reason));
    }
    assert!(together[0].output_ids.len() < 20);
    for wrong in [0, 65] {
        let error = client.generate_many(&prompt, &options(5), wrong, &mut |_, _| {}).await.unwrap_err();
        assert!(error.to_string().contains("1 to 64"), "{error}");
    }
}

/// Beams of a search.
const WIDTH: usize = 3;
/// Tokens behind the prompt.
const TOKENS: usize = 12;

fn limits(prompt: usize) -> SessionLimits {
    let longest = prompt + TOKENS;
    SessionLimits {
        max_lanes: WIDTH as u32,
        max_tokens: (WIDTH * longest) as u64,
        max_in_flight: 3,
        max_step_tokens: (WIDTH * longest) as u32,
    }
}

/// How a search gets from one token to the next.
#[derive(Clone, Copy, PartialEq)]
enum By {
    /// Its lanes change places, and each gets a token.
    Copies,
    /// Each lane is written anew from its first token on.
    Anew,
}

/// What a search came to.
#[derive(Debug, PartialEq)]
struct Found {
    /// What each beam holds, and its logarithm of the probability.
    beams: Vec<(Vec<u32>, f64)>,
}

/// Searches with beams, and calls `between` in front of every token but the first, when its lanes have been told to change.
async fn search(
    session: &mut Session,
    client: &Client,
    prompt: &[u32],
    by: By,
    mut between: impl FnMut(usize),
) -> Found {
    let vocabulary = client.model().spec().vocab_size;
    let lane = |lane: usize, position, tokens| LaneRun { lane: lane as u32, position, tokens };
    let step = |lanes, ids| Step { lanes, input: Input::Tokens(ids), want: Want::Last, rope_length: None };
    session.send(step(vec![lane(0, 0, prompt.len())], prompt.to_vec())).unwrap();
    let mut beams = vec![(prompt.to_vec(), 0.0)];
    let mut copied = 0;
    for token in 0..TOKENS {
        let mut answer = session.receive().await.unwrap();
        while session.in_flight() > 0 {
            answer = session.receive().await.unwrap();
        }
        let logits = client.model().edges().logits(&answer.hidden.unwrap()).unwrap();
        let mut next: Vec<(f64, usize, u32)> = Vec::new();
        for (beam, logits) in logits.chunks(vocabulary).enumerate() {
            let sum: f64 = logits.iter().map(|logit| f64::from(*logit).exp()).sum();
            let score = |logit: f32| beams[beam].1 + f64::from(logit) - sum.ln();
            next.extend(logits.iter().zip(0..).map(|(logit, id)| (score(*logit), beam, id)));
        }
        next.sort_by(|a, b| b.0.total_cmp(&a.0));
        next.truncate(WIDTH);
        beams = next.iter().map(|(score, beam, id)| ([&beams[*beam].0[..], &[*id]].concat(), *score)).collect();
        if token + 1 == TOKENS {
            break;
        }
        let length = prompt.len() + token;
        if by == By::Anew {
            let runs = (0..WIDTH).map(|beam| lane(beam, 0, length + 1)).collect();
            session.send(step(runs, beams.iter().flat_map(|(ids, _)| ids.clone()).collect())).unwrap();
            continue;
        }
        let moves = next.iter().zip(0..).map(|((_, from, _), to)| (*from as u32, to));
        let copies: Vec<(u32, u32)> = moves.filter(|(from, to)| from != to).collect();
        copied += copies.len();
        if !copies.is_empty() {
            session.copy_lanes(&copies).unwrap();
        }
        between(token);
        let runs = (0..WIDTH).map(|beam| lane(beam, length, 1)).collect();
        session.send(step(runs, next.iter().map(|(_, _, id)| *id).collect())).unwrap();
    }
    assert!(by == By::Anew || copied > TOKENS / 2, "the beams change places: {copied}");
    Found { beams }
}

/// A search by copies finds what one without them does, where the hop of this index is killed on the way, or none is.
async fn searches(family: &str, lost: Option<usize>) {
    let spans = ["0:2", "2:4", "4:6"];
    let spare = lost.map(|hop| spans[hop]);
    let (place, model) = (Place::new(), fixture(family));
    let (bootstrap, nodes) = place.swarm(&model, &[&spans[..], spare.as_slice()].concat(), &[]);
    let client = client(&model, &bootstrap, Patience::default()).await;
    let prompt = reference(&model).prompt;
    let open = || client.open_session(limits(prompt.len()), Duration::ZERO);
    let expected = search(&mut open().await.unwrap().0, &client, &prompt, By::Anew, |_| {}).await;
    let mut before = Vec::new();
    for node in &nodes {
        before.push(info(&client, node).await.tokens);
    }

    let (mut session, route) = open().await.unwrap();
    let peer_of = |hop: usize| route.hops[hop].announcement.peer_id.to_string();
    let node_of = |hop: usize| nodes.iter().find(|node| node.peer_id == peer_of(hop)).unwrap();
    let kill = |token| {
        if let Some(hop) = lost.filter(|_| token == 6) {
            node_of(hop).running.signal("KILL");
        }
    };
    assert_eq!(search(&mut session, &client, &prompt, By::Copies, kill).await, expected);
    assert_eq!(session.take_recoveries().len(), usize::from(lost.is_some()));

    let rows = (prompt.len() + (TOKENS - 1) * WIDTH) as u64;
    for (node, before) in nodes.iter().zip(before) {
        if lost.is_some_and(|hop| node.peer_id == peer_of(hop)) {
            continue;
        }
        let info = info(&client, node).await;
        if (0..spans.len()).any(|hop| node.peer_id == peer_of(hop)) {
            assert_eq!((info.tokens - before, info.tokens_replayed), (rows, 0), "nothing is computed again");
        } else {
            assert!(info.tokens_replayed > 0, "it was told what the lost one had");
        }
    }
    drop(session);
    for node in nodes.iter().filter(|node| lost.is_none_or(|hop| node.peer_id != peer_of(hop))) {
        holds_nothing(&client, node).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn beams_that_change_places_are_those_that_are_written_anew() {
    searches("llama", None).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn beams_in_a_window() {
    searches("mistral", None).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_hop_is_lost_amid_a_search() {
    searches("llama", Some(0)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_middle_hop_is_lost_amid_a_search() {
    searches("qwen3", Some(1)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_hop_is_lost_amid_a_search() {
    searches("llama", Some(2)).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_search_goes_back_over_its_copies() {
    let (place, model) = (Place::new(), fixture("llama"));
    let (bootstrap, _nodes) = place.swarm(&model, &["0:3", "3:6"], &[]);
    let client = client(&model, &bootstrap, Patience::default()).await;
    let prompt = reference(&model).prompt;
    let (mut session, _) = client.open_session(limits(prompt.len()), Duration::ZERO).await.unwrap();
    let first = search(&mut session, &client, &prompt, By::Copies, |_| {}).await;
    // From the first token on again, in the lanes that are there; two of them are of no use at first.
    session.drop_lanes(&[1, 2]).unwrap();
    session.receive().await.unwrap();
    assert_eq!(search(&mut session, &client, &prompt, By::Copies, |_| {}).await, first);
    for (wrong, says) in
        [(&[(0, 3)][..], "lane 3"), (&[(9, 0)], "lane 9"), (&[(0, 1), (2, 1)], "more than once"), (&[], "at least one")]
    {
        let error = session.copy_lanes(wrong).unwrap_err();
        assert!(error.to_string().contains(says), "{error} should say {says}");
    }
    // What is refused here changes nothing.
    assert_eq!(search(&mut session, &client, &prompt, By::Copies, |_| {}).await, first);
}

/// A session of 3 lanes and 64 tokens on one node, of somebody who sends what he likes.
async fn raw(stranger: &mut Stranger, client: &Client, node: &Server) -> Ticket {
    let (own, hop) = (stranger.swarm.peer_id(), node.peer_id.parse::<PeerId>().unwrap());
    let limits = SessionLimits { max_lanes: 3, max_tokens: 64, max_in_flight: 4, max_step_tokens: 40 };
    let ticket = Ticket { limits, ..ticket(client, own, hop, 0..6) };
    let hop = client.observer().look_up().await.unwrap().peers.remove(0).announcement;
    stranger.open(&hop, &ticket).await;
    let proto::frame::Body::Step(step) = foreign_step(1, 0) else { unreachable!("it is one") };
    let lanes = vec![proto::LaneRun { lane: 0, position: 0, tokens: 30 }];
    let tensor = step.tensor.map(|tensor| proto::Tensor { rows: 30, ..tensor });
    let step = proto::frame::Body::Step(proto::Step { lanes, tensor, ..step });
    let rows = client.model().edges().embed(&[7; 30], Dtype::F32).unwrap().bytes.to_vec();
    let answer = stranger.ask(&hop, frame(ticket.session, 1, step), rows).await;
    assert!(matches!(answer, proto::frame::Body::Output(_)), "{answer:?}");
    ticket
}

#[tokio::test(flavor = "multi_thread")]
async fn steps_that_break_the_rules_of_lanes_are_refused() {
    let (place, model) = (Place::new(), fixture("llama"));
    let (bootstrap, nodes) = place.swarm(&model, &["0:6"], &[]);
    let client = client(&model, &bootstrap, Patience::default()).await;
    let hop = client.observer().look_up().await.unwrap().peers.remove(0).announcement;
    let mut stranger = Stranger::join(&bootstrap).await;
    let step = |copies: &[(u32, u32)], drops: &[u32]| proto::Step {
        number: 2,
        want: proto::Want::None.into(),
        copies: copies.iter().map(|&(from, to)| proto::LaneCopy { from, to }).collect(),
        drops: drops.to_vec(),
        ..proto::Step::default()
    };
    let rows = proto::Step { lanes: vec![proto::LaneRun { lane: 1, position: 0, tokens: 1 }], ..step(&[(0, 1)], &[]) };
    let answered = proto::Step { want: proto::Want::All.into(), ..step(&[(0, 1)], &[]) };
    for (step, code) in [
        (step(&[(0, 3)], &[]), proto::Code::WrongStep),
        (step(&[(u32::MAX, 1)], &[]), proto::Code::WrongStep),
        (step(&[], &[3]), proto::Code::WrongStep),
        (step(&[(0, 1); 5000], &[]), proto::Code::WrongStep),
        (step(&[], &[2; 30_000]), proto::Code::WrongStep),
        (step(&[(0, 1)], &[1]), proto::Code::WrongStep),
        (step(&[(0, 1), (0, 2)], &[]), proto::Code::TooLarge),
        (rows, proto::Code::WrongStep),
        (answered, proto::Code::WrongStep),
        (proto::Step { number: 10, ..step(&[(0, 1)], &[]) }, proto::Code::WrongStep),
    ] {
        let session = raw(&mut stranger, &client, &nodes[0]).await.session;
        let body = proto::frame::Body::Step(step.clone());
        assert_eq!(stranger.is_refused(&hop, frame(session, 1, body), vec![]).await, code, "{step:?}");
    }
    // A retry changes nothing: lane 1 is what lane 0 was.
    let session = raw(&mut stranger, &client, &nodes[0]).await.session;
    for step in [step(&[(0, 1), (1, 0)], &[]), step(&[(0, 1), (1, 0)], &[])] {
        let body = proto::frame::Body::Step(step);
        let answer = stranger.ask(&hop, frame(session, 1, body), vec![]).await;
        let proto::frame::Body::Output(output) = answer else { panic!("{answer:?}") };
        assert_eq!((output.number, output.tensor), (2, None));
    }
    let gap = proto::Step { number: 3, ..one_row(0, 1) };
    let row = client.model().edges().embed(&[7], Dtype::F32).unwrap().bytes.to_vec();
    let refused = stranger.is_refused(&hop, frame(session, 1, proto::frame::Body::Step(gap)), row).await;
    assert_eq!(refused, proto::Code::WrongPosition, "lane 0 is empty now");
}

/// A step with one row.
fn one_row(lane: u32, position: u64) -> proto::Step {
    let proto::frame::Body::Step(step) = foreign_step(1, position) else { unreachable!("it is one") };
    proto::Step { lanes: vec![proto::LaneRun { lane, position, tokens: 1 }], ..step }
}
