//! The wire encoding, pinned byte by byte: a change here breaks every node that is out there.

use bytes::{Bytes, BytesMut};
use helion::swarm::{
    Announcement, Frame, FrameLimits, State,
    frame::encode_head,
    proto::{
        announcement::{self as wire, Entries, SignedAnnouncement},
        rpc, session,
    },
    records::{models_key, segment_key},
};
use libp2p::identity::Keypair;
use prost::Message;

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn pinned(message: &impl Message, expected: &str) {
    assert_eq!(hex(&message.encode_to_vec()), expected);
}

fn keypair() -> Keypair {
    Keypair::ed25519_from_bytes([9; 32]).unwrap()
}

fn signed() -> SignedAnnouncement {
    let keypair = keypair();
    let announcement = Announcement {
        dht_prefix: "a/b".into(),
        model: "a/b".into(),
        fingerprint: [3; 32],
        revision: "main".into(),
        model_blocks: 80,
        span: 16..32,
        state: State::Online,
        dtype: helion::model::Dtype::Bf16,
        quant: "q8".into(),
        kernel_path: "avx512".into(),
        compute_tokens_per_second: 12.5,
        network_tokens_per_second: 0.5,
        cache_tokens_left: 1000,
        cache_tokens_total: 2000,
        queue: 3,
        adapters: vec!["x".into()],
        addresses: vec!["/ip4/127.0.0.1/tcp/31337".parse().unwrap()],
        relayed: true,
        public_name: "me".into(),
        version: "0.1.0".into(),
        sequence: 1_800_000_000_001,
        expires_unix_ms: 1_800_000_300_000,
        ..Announcement::blank(keypair.public().to_peer_id())
    };
    announcement.sign(&keypair, 1_800_000_000_000).unwrap()
}

fn frame(body: session::frame::Body) -> session::Frame {
    session::Frame { session: Bytes::from_static(&[1; 16]), epoch: 2, body: Some(body) }
}

#[test]
fn keys() {
    assert_eq!(hex(segment_key("a/b", 0).as_ref()), "550f7572d3d820a681c02ee06d84fa1d5097da1368e914da115523779860d03c");
    assert_eq!(hex(segment_key("a/b", 1).as_ref()), "0644e4a9ecf746846030ad13006b7b11d83e07aac97322c0fd66c822c74b6bbe");
    assert_eq!(hex(models_key().as_ref()), "aeaa8f6b4107db8eceaff4aef09bdcd2dd59ef7198ec526dad67dd2772cb115a");
}

#[test]
fn announcement() {
    let signed = signed();
    assert_eq!(
        hex(&signed.body),
        "0a03612f621203612f621a20030303030303030303030303030303030303030303030303030303030303030322046d61696e28503010382040024802520271385a0661767835313261000000000000294069000000000000e03f70e80778d00f8001038a010178920108047f000001067a69980101a201026d65aa0105302e312e30b00181a0f1c2b134b801e0c783c3b134"
    );
    // ed25519 is deterministic, so the signature pins what is signed.
    assert_eq!(hex(&signed.public_key), "08011220fd1724385aa0c75b64fb78cd602fa1d991fdebf76b13c58ed702eac835e9f618");
    assert_eq!(
        hex(&signed.signature),
        "8bcf46b6ca5b16f5195d326c9ed1a0660072c85b68f17dd2a9e71bcd21e706402b74866101b04fd384ec97e032c36cd5839340ae17c886b5b2c8525ffc26bd0f"
    );
    let short = SignedAnnouncement { body: vec![1].into(), public_key: vec![2].into(), signature: vec![3].into() };
    pinned(&Entries { entries: vec![short] }, "0a090a01011201021a0103");
}

#[test]
fn session_open_and_ticket() {
    let ticket = session::Ticket {
        session: vec![1; 16].into(),
        epoch: 2,
        client: vec![3].into(),
        hop: vec![4].into(),
        upstream: vec![5].into(),
        downstream: vec![6].into(),
        dht_prefix: "a/b".into(),
        fingerprint: vec![7; 32].into(),
        start: 8,
        end: 9,
        wire_dtype: wire::Dtype::F16 as i32,
        max_lanes: 10,
        max_tokens: 11,
        max_in_flight: 12,
        max_step_tokens: 13,
        expires_unix_ms: 14,
        wire_codec: wire::WireCodec::Q8 as i32,
        take_over_from: Bytes::new(),
    };
    pinned(
        &ticket,
        "0a100101010101010101010101010101010110021a01032201042a01053201063a03612f6242200707070707070707070707070707070707070707070707070707070707070707480850095803600a680b700c780d80010e880101",
    );
    let open = session::Open {
        ticket: vec![1].into(),
        public_key: vec![2].into(),
        signature: vec![3].into(),
        next: Some(SignedAnnouncement::default()),
        ..Default::default()
    };
    pinned(
        &frame(session::frame::Body::Open(open)),
        "0a100101010101010101010101010101010110021a0b0a01011201021a01032200",
    );
    let prefix = session::Prefix { context: vec![4].into(), keys: vec![5].into(), length_class: 6, page_tokens: 7 };
    let open = session::Open { prefix: Some(prefix.clone()), adopt_prefix: true, ..Default::default() };
    pinned(
        &frame(session::frame::Body::Open(open)),
        "0a100101010101010101010101010101010110021a0e2a0a0a0104120105180620073001",
    );
    let close = session::Close { prefix: Some(prefix), applied: 8 };
    pinned(
        &frame(session::frame::Body::Close(close)),
        "0a10010101010101010101010101010101011002420e0a0a0a0104120105180620071008",
    );
    let opened = session::Opened { prefix_tokens: 9, ..Default::default() };
    pinned(&frame(session::frame::Body::Opened(opened)), "0a1001010101010101010101010101010101100222023009");
    let opened = session::Opened { cache_tokens_left: 5, queue: 6, ..Default::default() };
    pinned(&frame(session::frame::Body::Opened(opened)), "0a10010101010101010101010101010101011002220408051006");
}

#[test]
fn session_steps() {
    use session::frame::Body;
    let tensor = Some(session::Tensor { dtype: wire::Dtype::Bf16 as i32, rows: 4, hidden: 2048, codec: 0 });
    let times = vec![session::HopTime { queue_us: 1, compute_us: 2 }];
    let step = session::Step {
        number: 300,
        confirmed: 299,
        lanes: vec![session::LaneRun { lane: 1, position: 2, tokens: 3 }],
        tensor,
        want: session::Want::All as i32,
        rope_length: 5,
        times: times.clone(),
        ..Default::default()
    };
    pinned(
        &frame(Body::Step(step)),
        "0a100101010101010101010101010101010110022a2108ac0210ab021a06080110021803220708021004188010280230053a0408011002",
    );
    let lanes = session::Step {
        number: 1,
        want: session::Want::None as i32,
        copies: vec![session::LaneCopy { from: 2, to: 3 }],
        drops: vec![4, 5],
        ..Default::default()
    };
    pinned(&frame(Body::Step(lanes)), "0a100101010101010101010101010101010110022a0e080128034204080210034a020405");
    pinned(
        &frame(Body::Output(session::Output { number: 300, tensor, times })),
        "0a10010101010101010101010101010101011002321208ac021207080210041880101a0408011002",
    );
    let fault = session::Fault {
        code: session::Code::CacheFull as i32,
        blame: session::Blame::Nobody as i32,
        maybe_applied: true,
        number: 7,
        peer: vec![8].into(),
        message: "full".into(),
    };
    pinned(
        &frame(Body::Fault(fault)),
        "0a100101010101010101010101010101010110023a11080b1005180120072a0108320466756c6c",
    );
    pinned(&frame(Body::Close(session::Close::default())), "0a100101010101010101010101010101010110024200");
    pinned(&frame(Body::Ping(session::Ping { nonce: 9 })), "0a100101010101010101010101010101010110024a020809");
    pinned(&frame(Body::Pong(session::Pong { nonce: 9 })), "0a1001010101010101010101010101010101100252020809");
}

#[test]
fn frame_prefix() {
    let header = frame(session::frame::Body::Close(session::Close::default()));
    let mut bytes = BytesMut::new();
    encode_head(&Frame { header, payload: vec![0; 258].into() }, FrameLimits::default(), &mut bytes).unwrap();
    assert_eq!(hex(&bytes), "16000000020100000a100101010101010101010101010101010110024200");
}

#[test]
fn requests_and_responses() {
    use rpc::{request, response};
    pinned(&rpc::Request::info(), "0a00");
    pinned(&rpc::Request::exchange("a/b"), "12050a03612f62");
    pinned(&rpc::Request::probe(vec![5]), "1a030a0105");
    let respond = |body| rpc::Response { body: Some(body) };
    let info = rpc::InfoResponse {
        sessions: 1,
        steps: 2,
        frames_refused: 3,
        cache_tokens_left: 4,
        cache_tokens_total: 5,
        ..Default::default()
    };
    pinned(&respond(response::Body::Info(info)), "0a0a10011802200328043005");
    let exchange = rpc::ExchangeResponse { announcements: vec![SignedAnnouncement::default()] };
    pinned(&respond(response::Body::Exchange(exchange)), "12020a00");
    pinned(&respond(response::Body::Probe(rpc::ProbeResponse { payload: vec![5].into() })), "1a030a0105");
    pinned(&rpc::Response::failure("no"), "7a040a026e6f");
    assert!(matches!(rpc::Request::info().body, Some(request::Body::Info(_))));
}

#[test]
fn unknown_fields_and_variants_are_tolerated() {
    // Field 99 as a varint, behind a frame; and a body of a newer version.
    let mut bytes = frame(session::frame::Body::Close(session::Close::default())).encode_to_vec();
    bytes.extend([0x98, 0x06, 0x01]);
    assert!(session::Frame::decode(bytes.as_slice()).unwrap().body.is_some());
    let newer = [0xa2, 0x06, 0x01, 0x00];
    assert_eq!(session::Frame::decode(newer.as_slice()).unwrap().body, None);
}
