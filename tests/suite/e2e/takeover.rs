//! Hand-overs that a node must not believe: from somebody else than the ticket names, or of a session that there can't be.

use helion::swarm::{
    Frame,
    announcement::Announcement,
    proto::{announcement, session as proto},
    ticket::{SessionId, Ticket},
};
use proto::{frame::Body, take_over::Part};

use super::{
    harness::{Place, fixture},
    sessions::holds_nothing,
    strangers::{Stranger, client, frame, ticket},
};

/// Bytes of one block's part of a page: keys and values of 16 tokens, two heads of 16 numbers in f32.
const PIECE: usize = 2 * 16 * 2 * 16 * 4;

/// What a leaving hop sends, with payloads.
type Parts = Vec<(Part, Vec<u8>)>;

/// 20 tokens on two pages.
fn state() -> proto::SessionState {
    proto::SessionState {
        applied: 3,
        confirmed: 2,
        lanes: vec![proto::LaneState { lane: 0, tokens: 20, pages: vec![proto::PageRun { first: 0, count: 2 }] }],
        pages: 2,
        kernel_path: "cpu".to_owned(),
        kv_dtype: "f32".to_owned(),
        whole: true,
        quant_settings: vec!["none".to_owned(), "of the future".to_owned()],
    }
}

fn with(change: impl FnOnce(&mut proto::SessionState)) -> (Part, Vec<u8>) {
    let mut state = state();
    change(&mut state);
    (Part::State(state), Vec::new())
}

fn pieces(first: u64, count: u32, bytes: Vec<u8>) -> (Part, Vec<u8>) {
    (Part::Pieces(proto::Pieces { first, count }), bytes)
}

/// All of the pages of three blocks.
fn all_pieces() -> (Part, Vec<u8>) {
    pieces(0, 6, vec![0; 6 * PIECE])
}

fn tensor(rows: u32) -> proto::Tensor {
    proto::Tensor { dtype: announcement::Dtype::F32.into(), rows, hidden: 64, codec: 0 }
}

fn rows(run: proto::KeptRun, tensor: proto::Tensor, payload: Vec<u8>) -> (Part, Vec<u8>) {
    (Part::Rows(proto::KeptRows { runs: vec![run], tensor: Some(tensor) }), payload)
}

fn kept(step: u64, lane: u32, position: u64, tokens: u32) -> proto::KeptRun {
    proto::KeptRun { step, rows: Some(proto::LaneRun { lane, position, tokens }), length_class: 0, before: 0 }
}

fn reply(number: u64, tensor: proto::Tensor, payload: Vec<u8>) -> (Part, Vec<u8>) {
    let lanes = vec![proto::LaneRun { lane: 0, position: 19, tokens: 1 }];
    (Part::Reply(proto::Step { number, lanes, tensor: Some(tensor), ..Default::default() }), payload)
}

fn good_reply() -> (Part, Vec<u8>) {
    reply(3, tensor(1), vec![0; 256])
}

fn end() -> (Part, Vec<u8>) {
    (Part::End(proto::TakeOverEnd {}), Vec::new())
}

/// A session that waits for `from` to hand it over.
async fn open(owner: &mut Stranger, hop: &Announcement, ticket: &Ticket) {
    let opened = owner.open(hop, ticket).await;
    assert!(opened.filling && opened.applied == 0, "{opened:?}");
}

fn part(ticket: &Ticket, index: usize, part: Part) -> proto::Frame {
    frame(ticket.session, 1, Body::TakeOver(proto::TakeOver { index: index as u32, part: Some(part) }))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_there_can_not_be_is_not_taken_over() {
    use proto::Code;
    let (place, model) = (Place::new(), fixture("llama"));
    let (bootstrap, nodes) = place.swarm(&model, &["0:3"], &[]);
    let client = client(&model, &bootstrap).await;
    let hop = client.observer().look_up().await.unwrap().peers.remove(0).announcement;
    let (mut owner, mut leaving) = (Stranger::join(&bootstrap).await, Stranger::join(&bootstrap).await);
    let mut third = Stranger::join(&bootstrap).await;
    let template = Ticket {
        take_over_from: Some(leaving.swarm.peer_id()),
        ..ticket(&client, owner.swarm.peer_id(), hop.peer_id, 0..3)
    };
    let lane = |lane: u32, tokens: u64, first: u32, count: u32| {
        with(|state| {
            state.lanes = vec![proto::LaneState { lane, tokens, pages: vec![proto::PageRun { first, count }] }];
        })
    };
    // What a lane had before a step that was long ago; the client may have 4 steps under way.
    let before = |before: u64| rows(proto::KeptRun { before, ..kept(1, 0, 0, 2) }, tensor(2), vec![0; 512]);
    let nan = |bytes: usize| [vec![0; bytes - 4], f32::NAN.to_le_bytes().to_vec()].concat();
    let good = with(|_| {});
    let cases: Vec<(Parts, Code)> = vec![
        (vec![all_pieces()], Code::WrongStep),
        (vec![end()], Code::WrongStep),
        (vec![with(|state| state.kernel_path = "cuda-sm90".to_owned())], Code::Unsupported),
        (vec![with(|state| state.kv_dtype = "q8".to_owned())], Code::Unsupported),
        (vec![with(|state| state.quant_settings = vec!["q4_k".to_owned()])], Code::Unsupported),
        (vec![with(|state| state.quant_settings.clear())], Code::Unsupported),
        (vec![with(|state| state.confirmed = 4)], Code::WrongStep),
        (vec![with(|state| state.pages = 3)], Code::WrongPosition),
        (vec![with(|state| state.pages = u64::MAX)], Code::WrongPosition),
        (vec![lane(1, 20, 0, 2)], Code::TooLarge),
        (vec![lane(0, 65, 0, 5)], Code::TooLarge),
        (vec![lane(0, u64::MAX, 0, u32::MAX)], Code::TooLarge),
        (vec![lane(0, 20, 0, u32::MAX)], Code::TooLarge),
        (vec![lane(0, 20, u32::MAX, 2)], Code::TooLarge),
        (vec![lane(0, 20, 1, 2)], Code::WrongPosition),
        (vec![lane(0, 20, 0, 1)], Code::WrongPosition),
        (vec![lane(0, 0, 0, 0)], Code::WrongPosition),
        (vec![good.clone(), good.clone()], Code::WrongStep),
        (vec![good.clone(), pieces(1, 5, vec![0; 5 * PIECE])], Code::WrongStep),
        (vec![good.clone(), pieces(0, 0, vec![])], Code::WrongStep),
        (vec![good.clone(), pieces(0, 7, vec![0; 7 * PIECE])], Code::WrongPosition),
        (vec![good.clone(), pieces(0, u32::MAX, vec![0; PIECE])], Code::WrongPosition),
        (vec![good.clone(), pieces(0, 6, vec![0; 6 * PIECE - 1])], Code::BadTensor),
        (vec![good.clone(), pieces(0, 6, nan(6 * PIECE))], Code::BadTensor),
        (vec![good.clone(), all_pieces(), all_pieces()], Code::WrongStep),
        (vec![good.clone(), good_reply(), end()], Code::WrongStep),
        (vec![good.clone(), rows(kept(1, 0, 0, 2), tensor(2), nan(512))], Code::NonFinite),
        (vec![good.clone(), rows(kept(1, 0, 0, 2), tensor(2), vec![0; 511])], Code::BadTensor),
        (vec![good.clone(), rows(kept(1, 0, 0, 1), tensor(2), vec![0; 512])], Code::WrongPosition),
        (vec![good.clone(), rows(kept(1, 0, 63, 2), tensor(2), vec![0; 512])], Code::WrongPosition),
        (vec![good.clone(), rows(kept(1, 0, u64::MAX, 2), tensor(2), vec![0; 512])], Code::WrongPosition),
        (vec![good.clone(), rows(kept(4, 0, 0, 2), tensor(2), vec![0; 512])], Code::WrongPosition),
        (vec![good.clone(), rows(kept(1, 1, 0, 2), tensor(2), vec![0; 512])], Code::WrongPosition),
        (
            vec![good.clone(), rows(kept(1, 0, 0, 2), proto::Tensor { hidden: 32, ..tensor(2) }, vec![0; 512])],
            Code::BadTensor,
        ),
        (vec![with(|state| state.applied = 100), before(93), before(92)], Code::WrongPosition),
        (vec![good.clone(), reply(2, tensor(1), vec![0; 256])], Code::WrongStep),
        (vec![good.clone(), reply(4, tensor(1), vec![0; 256])], Code::WrongStep),
        (vec![good.clone(), good_reply(), good_reply()], Code::WrongStep),
        (vec![good.clone(), reply(3, tensor(2), vec![0; 512])], Code::BadTensor),
        (vec![good.clone(), reply(3, tensor(1), nan(256))], Code::NonFinite),
    ];
    for (index, (parts, code)) in cases.into_iter().enumerate() {
        let ticket = Ticket { session: SessionId::random(), ..template.clone() };
        open(&mut owner, &hop, &ticket).await;
        // Nobody else may; and what they say spoils nothing.
        let header = part(&ticket, 0, good.0.clone());
        assert_eq!(third.is_refused(&hop, header.clone(), vec![]).await, Code::UnknownSession);
        assert_eq!(owner.is_refused(&hop, header, vec![]).await, Code::UnknownSession);
        let last = parts.len() - 1;
        for (number, (content, payload)) in parts.into_iter().enumerate() {
            match leaving.ask(&hop, part(&ticket, number, content), payload).await {
                Body::TakenOver(taken) => assert!(number < last && taken.index as usize == number, "case {index}"),
                Body::Fault(fault) => assert_eq!((number, fault.code()), (last, code), "case {index}: {fault:?}"),
                other => panic!("case {index}: {other:?}"),
            }
        }
        // The client hears it as well.
        let told = owner.frames.recv().await.unwrap().header.body.unwrap();
        assert!(matches!(&told, Body::Fault(fault) if fault.code() == code), "case {index}: {told:?}");
        let link = owner.swarm.link(hop.peer_id, &hop.addresses).await.unwrap();
        link.send(Frame::bare(frame(ticket.session, 1, Body::Close(proto::Close::default())))).unwrap();
    }
    holds_nothing(&client, &nodes[0]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_is_taken_over_from_whom_the_ticket_names() {
    let (place, model) = (Place::new(), fixture("llama"));
    let (bootstrap, _nodes) = place.swarm(&model, &["0:3"], &[]);
    let client = client(&model, &bootstrap).await;
    let hop = client.observer().look_up().await.unwrap().peers.remove(0).announcement;
    let (mut owner, mut leaving) = (Stranger::join(&bootstrap).await, Stranger::join(&bootstrap).await);
    let ticket = Ticket {
        take_over_from: Some(leaving.swarm.peer_id()),
        ..ticket(&client, owner.swarm.peer_id(), hop.peer_id, 0..3)
    };
    open(&mut owner, &hop, &ticket).await;
    let history = rows(kept(1, 0, 0, 2), tensor(2), vec![0; 512]);
    for (index, (content, payload)) in
        [with(|_| {}), all_pieces(), history, good_reply(), end()].into_iter().enumerate()
    {
        let answer = leaving.ask(&hop, part(&ticket, index, content), payload).await;
        assert_eq!(answer, Body::TakenOver(proto::TakenOver { index: index as u32 }));
    }
    let opened = owner.frames.recv().await.unwrap().header.body.unwrap();
    assert!(
        matches!(&opened, Body::Opened(opened) if opened.applied == 3 && opened.whole && !opened.filling),
        "{opened:?}"
    );
    // Nothing more is taken.
    let late = part(&ticket, 5, with(|_| {}).0);
    assert_eq!(leaving.is_refused(&hop, late, vec![]).await, proto::Code::UnknownSession);
    // Only its client may hand it on.
    let order = Body::HandOver(proto::HandOver { epoch: 2, to: None });
    let refused = leaving.is_refused(&hop, frame(ticket.session, 1, order.clone()), vec![]).await;
    assert_eq!(refused, proto::Code::UnknownSession);
    // And only to somebody who is announced.
    match owner.ask(&hop, frame(ticket.session, 1, order), vec![]).await {
        Body::NotHandedOver(not) => assert_eq!(not.code(), proto::Code::BadTicket),
        other => panic!("{other:?}"),
    }
    // What the client has not confirmed is there to be sent again, once the route goes on in another epoch.
    let again = Ticket { epoch: 2, take_over_from: None, ..ticket.clone() };
    assert_eq!(owner.open(&hop, &again).await.applied, 3);
    let resume = Body::Resume(proto::Resume { applied: 2, replay_hops: 0 });
    match owner.ask(&hop, frame(ticket.session, 2, resume), vec![]).await {
        Body::Output(output) => assert_eq!((output.number, output.tensor.unwrap().rows), (3, 1)),
        other => panic!("{other:?}"),
    }
}
