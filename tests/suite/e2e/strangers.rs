//! Who may speak to a session, and what a client receives: the library's client against real node processes.

use std::{ops::Range, path::Path, sync::Arc, time::Duration};

use bytes::Bytes;
use futures::future::BoxFuture;
use helion::{
    client::{
        Client,
        generation::GenerationOptions,
        session::{Input, Patience, Session, SessionError, Step, Want},
    },
    engine::{HiddenStates, LaneRun},
    model::Dtype,
    swarm::{
        Frame, Link, Role, Service, State, Swarm, SwarmConfig, WireCodec,
        announcement::{Announcement, unix_ms},
        identity::Identity,
        proto::{announcement, rpc, session as proto},
        ticket::{SessionId, SessionLimits, Ticket},
    },
};
use libp2p::PeerId;
use tokio::sync::mpsc;

use super::{
    harness::{Place, Server, fixture, network, reference},
    sessions::info,
};

pub(super) async fn client(model: &Path, peer: &Server) -> Client {
    super::harness::client(model, peer, Patience::default()).await
}

pub(super) fn limits(prompt: usize) -> SessionLimits {
    SessionLimits { max_lanes: 1, max_tokens: 64, max_in_flight: 4, max_step_tokens: prompt as u32 }
}

/// What `own` would have to sign to run `blocks` on `hop` alone, in a new session.
pub(super) fn ticket(client: &Client, own: PeerId, hop: PeerId, blocks: Range<usize>) -> Ticket {
    let identity = client.model().identity();
    Ticket {
        session: SessionId::random(),
        epoch: 1,
        client: own,
        hop,
        upstream: own,
        downstream: own,
        dht_prefix: identity.dht_prefix.clone(),
        fingerprint: identity.fingerprint,
        blocks,
        wire_dtype: Dtype::F32,
        wire_codec: WireCodec::Raw,
        limits: limits(40),
        take_over_from: None,
        expires_unix_ms: u64::MAX / 2,
    }
}

fn step(hidden: HiddenStates, position: usize) -> Step {
    Step {
        lanes: vec![LaneRun { lane: 0, position, tokens: hidden.rows }],
        input: Input::Rows(hidden),
        want: Want::Last,
        rope_length: None,
    }
}

fn likeliest(logits: &[f32]) -> u32 {
    (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap() as u32
}

/// Runs the prompt, then calls `between` before every one of the following tokens, which must be the reference's.
async fn generate_with(client: &Client, session: &mut Session, model: &Path, mut between: impl AsyncFnMut(usize)) {
    let reference = reference(model);
    let edges = client.model().edges();
    let mut position = 0;
    let mut input = reference.prompt.clone();
    for expected in &reference.output {
        session.send(step(edges.embed(&input, session.wire_dtype()).unwrap(), position)).unwrap();
        position += input.len();
        let answer = session.receive().await.unwrap();
        let token = likeliest(&edges.logits(&answer.hidden.unwrap()).unwrap());
        assert_eq!(token, *expected);
        input = vec![token];
        between(position).await;
    }
}

/// Starts a peer that others can reach; it does with what it is sent as `service` likes.
pub(super) async fn server(peer: &Server, service: Arc<dyn Service>) -> Swarm {
    let config = SwarmConfig {
        initial_peers: vec![peer.address.parse().unwrap()],
        listen: vec!["/ip4/127.0.0.1/tcp/0".parse().unwrap()],
        ..SwarmConfig::new(Identity::ephemeral(), Role::Server)
    };
    Swarm::start(config, service).await.unwrap()
}

/// Has it join, and announce what an honest peer with these blocks does.
pub(super) async fn pass_for_honest(swarm: &Swarm, client: &Client, blocks: Range<usize>) {
    swarm.join(Duration::from_secs(10)).await.unwrap();
    let honest = client.observer().look_up().await.unwrap();
    let honest = honest.peers.iter().find(|peer| peer.announcement.span == blocks).unwrap().announcement.clone();
    let claims = Announcement {
        peer_id: swarm.peer_id(),
        state: State::Online,
        addresses: Vec::new(),
        signed: None,
        sequence: 0,
        ..honest
    };
    swarm.announce(claims).await.unwrap();
}

/// A peer of the swarm that says what it likes.
pub(super) struct Stranger {
    pub(super) swarm: Swarm,
    pub(super) frames: mpsc::Receiver<Frame>,
}

struct Collect(mpsc::Sender<Frame>);

impl Service for Collect {
    fn frame(&self, _link: &Link, frame: Frame) {
        // More than the test looks at is not kept.
        let _ = self.0.try_send(frame);
    }

    fn link_closed(&self, _link: &Link) {}

    fn request(&self, _from: libp2p::PeerId, _request: rpc::Request) -> BoxFuture<'static, rpc::Response> {
        Box::pin(std::future::ready(rpc::Response::default()))
    }
}

impl Stranger {
    pub(super) async fn join(peer: &Server) -> Self {
        let (sender, frames) = mpsc::channel(64);
        let swarm = Swarm::start(network(peer), Arc::new(Collect(sender))).await.unwrap();
        swarm.join(Duration::from_secs(10)).await.unwrap();
        Self { swarm, frames }
    }

    /// Signs a ticket and opens the session on its hop.
    pub(super) async fn open(&mut self, hop: &Announcement, ticket: &Ticket) -> proto::Opened {
        match self.ask_to_open(hop, ticket).await {
            proto::frame::Body::Opened(opened) => opened,
            other => panic!("not opened: {other:?}"),
        }
    }

    /// The same, with whatever comes first.
    pub(super) async fn ask_to_open(&mut self, hop: &Announcement, ticket: &Ticket) -> proto::frame::Body {
        let open = ticket.sign(self.swarm.identity().keypair()).unwrap();
        self.ask(hop, frame(ticket.session, ticket.epoch, proto::frame::Body::Open(open)), vec![]).await
    }

    /// Sends a frame and returns the answer.
    pub(super) async fn ask(
        &mut self,
        node: &Announcement,
        header: proto::Frame,
        payload: Vec<u8>,
    ) -> proto::frame::Body {
        let link = self.swarm.link(node.peer_id, &node.addresses).await.unwrap();
        link.send(Frame { header, payload: payload.into() }).unwrap();
        let answer = tokio::time::timeout(Duration::from_secs(10), self.frames.recv()).await.unwrap().unwrap();
        answer.header.body.unwrap()
    }

    /// Sends a frame and checks that it is refused.
    pub(super) async fn is_refused(
        &mut self,
        node: &Announcement,
        header: proto::Frame,
        payload: Vec<u8>,
    ) -> proto::Code {
        match self.ask(node, header, payload).await {
            proto::frame::Body::Fault(fault) => fault.code(),
            other => panic!("not refused: {other:?}"),
        }
    }
}

pub(super) fn frame(session: SessionId, epoch: u64, body: proto::frame::Body) -> proto::Frame {
    proto::Frame { session: session.to_wire(), epoch, body: Some(body) }
}

pub(super) fn foreign_step(number: u64, position: u64) -> proto::frame::Body {
    proto::frame::Body::Step(proto::Step {
        number,
        lanes: vec![proto::LaneRun { lane: 0, position, tokens: 1 }],
        tensor: Some(proto::Tensor { dtype: announcement::Dtype::F32.into(), rows: 1, hidden: 64, codec: 0 }),
        want: proto::Want::Last.into(),
        ..Default::default()
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_who_knows_a_sessions_id_can_do_nothing_to_it() {
    let (place, model) = (Place::new(), fixture("llama"));
    let (bootstrap, _nodes) = place.swarm(&model, &["0:3", "3:6"], &[]);
    let client = client(&model, &bootstrap).await;
    let (mut session, route) = client.open_session(limits(40), Duration::ZERO).await.unwrap();
    let mut stranger = Stranger::join(&bootstrap).await;
    let id = session.id();
    let hops: Vec<Announcement> = route.hops.iter().map(|hop| hop.announcement.clone()).collect();

    generate_with(&client, &mut session, &model, async |position| {
        let next = (position - 40 + 2) as u64;
        for hop in &hops {
            for (number, position) in [(next, position as u64), (next, 3), (next - 1, 0), (0, 0), (u64::MAX, 0)] {
                let header = frame(id, 1, foreign_step(number, position));
                assert_eq!(stranger.is_refused(hop, header, vec![0; 256]).await, proto::Code::UnknownSession);
            }
            let close = frame(id, 1, proto::frame::Body::Close(proto::Close::default()));
            assert_eq!(stranger.is_refused(hop, close, vec![]).await, proto::Code::UnknownSession);
        }
    })
    .await;

    // Nor with tickets of its own making: signed by itself, or copied from what it might have seen.
    let own = stranger.swarm.peer_id();
    let ticket = Ticket { session: id, epoch: 2, ..ticket(&client, own, hops[0].peer_id, 0..3) };
    let keypair = stranger.swarm.identity().keypair().clone();
    for (claims, code) in [(own, proto::Code::NotAllowed), (client.swarm().peer_id(), proto::Code::BadTicket)] {
        let open = Ticket { client: claims, ..ticket.clone() }.sign(&keypair).unwrap();
        let header = frame(id, 2, proto::frame::Body::Open(open));
        assert_eq!(stranger.is_refused(&hops[0], header, vec![]).await, code);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_newer_ticket_takes_the_place_of_an_opening_that_waits() {
    let (place, model) = (Place::new(), fixture("llama"));
    let (bootstrap, _nodes) = place.swarm(&model, &["0:3", "3:6"], &[]);
    let client = client(&model, &bootstrap).await;
    let peers = client.observer().look_up().await.unwrap().peers;
    let of = |start: usize| peers.iter().find(|peer| peer.announcement.span.start == start).unwrap();
    let (hop, last) = (&of(0).announcement, &of(3).announcement);
    // The next hop takes connections and says nothing.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("/ip4/127.0.0.1/tcp/{}", listener.local_addr().unwrap().port()).parse().unwrap();
    let mute = helion::swarm::Identity::ephemeral();
    let announcement = Announcement { peer_id: mute.peer_id(), addresses: vec![address], ..last.clone() };
    let signed = announcement.sign(mute.keypair(), helion::swarm::announcement::unix_ms()).unwrap();

    let mut stranger = Stranger::join(&bootstrap).await;
    let own = stranger.swarm.peer_id();
    let keypair = stranger.swarm.identity().keypair().clone();
    let id = SessionId::random();
    let ticket_of =
        |epoch: u64, downstream| Ticket { session: id, epoch, downstream, ..ticket(&client, own, hop.peer_id, 0..3) };
    let mut open = ticket_of(1, mute.peer_id()).sign(&keypair).unwrap();
    open.next = Some(signed);
    let link = stranger.swarm.link(hop.peer_id, &hop.addresses).await.unwrap();
    link.send(Frame::bare(frame(id, 1, proto::frame::Body::Open(open)))).unwrap();
    // The same ticket again changes nothing; the next one does.
    let again = ticket_of(1, own).sign(&keypair).unwrap();
    let refused = stranger.is_refused(hop, frame(id, 1, proto::frame::Body::Open(again)), vec![]).await;
    assert_eq!(refused, proto::Code::Busy);
    let newer = ticket_of(2, own).sign(&keypair).unwrap();
    let answer = stranger.ask(hop, frame(id, 2, proto::frame::Body::Open(newer)), vec![]).await;
    assert!(matches!(answer, proto::frame::Body::Opened(_)), "{answer:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_speaks_for_a_hop() {
    // Nor the client for a hop: it is upstream of the first one only.
    let (place, model) = (Place::new(), fixture("llama"));
    let (bootstrap, nodes) = place.swarm(&model, &["0:3", "3:6"], &[]);
    let client = client(&model, &bootstrap).await;
    let mut answers = Vec::new();
    for meddles in [false, true] {
        let (mut session, route) = client.open_session(limits(40), Duration::ZERO).await.unwrap();
        if meddles {
            let hop = &route.hops[1].announcement;
            let link = client.swarm().link(hop.peer_id, &hop.addresses).await.unwrap();
            let step = frame(session.id(), 1, foreign_step(1, 0));
            link.send(Frame { header: step, payload: vec![0; 256].into() }).unwrap();
        }
        session.send(step(client.model().edges().embed(&[1], Dtype::F32).unwrap(), 0)).unwrap();
        answers.push(session.receive().await.unwrap().hidden.unwrap().bytes);
    }
    // It is refused there, which is no reason to end the session, and changes nothing in it.
    assert_eq!(answers[0], answers[1]);
    for node in &nodes {
        assert_eq!(info(&client, node).await.tokens, 2);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn in_decode_one_response_comes_back_a_step_and_no_other_hidden_states() {
    let (place, model) = (Place::new(), fixture("llama"));
    let (bootstrap, _nodes) = place.swarm(&model, &["0:2", "2:4", "4:6"], &[]);
    let client = client(&model, &bootstrap).await;
    let reference = reference(&model);
    let options =
        GenerationOptions { max_tokens: 24, ignore_eos: true, prefill_chunk: 10, ..GenerationOptions::default() };
    let generation = client.generate(&reference.prompt, &options, &mut |_| {}).await.unwrap();
    assert_eq!(generation.output_ids, reference.output);
    // Four chunks of the prompt, of which the last one brings a row, then 23 decode steps.
    let (steps, rows) = (4 + 23, 24);
    assert_eq!(client.traffic().outputs(), steps);
    assert_eq!(client.traffic().payload_bytes(), rows * 64 * 4);
}

#[tokio::test(flavor = "multi_thread")]
async fn broken_rules_are_named_and_end_the_session_alone() {
    let (place, model) = (Place::new(), fixture("llama"));
    let (bootstrap, _nodes) = place.swarm(&model, &["0:3", "3:6"], &[]);
    let client = client(&model, &bootstrap).await;
    let embed = |count: usize| client.model().edges().embed(&vec![7; count], Dtype::F32).unwrap();
    let poisoned = || {
        let mut bytes = embed(1).bytes.to_vec();
        bytes[..4].copy_from_slice(&f32::NAN.to_le_bytes());
        HiddenStates { bytes: Bytes::from(bytes), ..embed(1) }
    };
    for (hidden, position, says) in [
        (embed(1), 5, "begins at 5"),
        (embed(41), 0, "41 rows"),
        (embed(1), 64, "65 tokens"),
        (HiddenStates { hidden: 32, rows: 2, ..embed(1) }, 0, "hidden size 32"),
        (poisoned(), 0, "finite"),
    ] {
        let (mut session, _) = client.open_session(limits(40), Duration::ZERO).await.unwrap();
        session.send(step(hidden, position)).unwrap();
        let error = session.receive().await.unwrap_err();
        assert!(error.to_string().contains(says), "{error} should say {says}");
        assert!(matches!(error, SessionError::Fault { maybe_applied: false, .. }), "{error:?}");
    }
    let (mut session, _) = client.open_session(limits(40), Duration::ZERO).await.unwrap();
    generate_with(&client, &mut session, &model, async |_| {}).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rollback_forgets_what_came_after() {
    let (place, model) = (Place::new(), fixture("qwen3"));
    let (bootstrap, _nodes) = place.swarm(&model, &["0:3", "3:6"], &[]);
    let client = client(&model, &bootstrap).await;
    let (mut session, _) = client.open_session(limits(40), Duration::ZERO).await.unwrap();
    let nonsense = client.model().edges().embed(&[9; 30], Dtype::F32).unwrap();
    session.send(step(nonsense, 0)).unwrap();
    session.receive().await.unwrap();
    // From position 0 again: the reference's tokens, as if nothing had been there.
    generate_with(&client, &mut session, &model, async |_| {}).await;
}

/// A session's hops outlast what was announced when it began.
#[tokio::test(flavor = "multi_thread")]
async fn a_next_hop_whose_announcement_has_expired_is_found_where_it_was() {
    let (place, model) = (Place::new(), fixture("llama"));
    let (bootstrap, _nodes) = place.swarm(&model, &["0:3"], &[]);
    let client = client(&model, &bootstrap).await;
    let hop = client.observer().look_up().await.unwrap().peers.remove(0).announcement;
    let next = server(&bootstrap, Arc::new(Collect(mpsc::channel(1).0))).await;
    let mut stranger = Stranger::join(&bootstrap).await;
    let own = stranger.swarm.peer_id();
    for (minutes, is_opened) in [(6, true), (50, true), (70, false)] {
        let expired = unix_ms() - minutes * 60_000;
        let announcement = Announcement {
            peer_id: next.peer_id(),
            span: 3..6,
            addresses: next.addresses(),
            signed: None,
            sequence: expired,
            expires_unix_ms: expired,
            ..hop.clone()
        };
        let ticket = Ticket { downstream: next.peer_id(), ..ticket(&client, own, hop.peer_id, 0..3) };
        let signed = announcement.sign(next.identity().keypair(), expired - 1000).unwrap();
        let open = ticket.sign(stranger.swarm.identity().keypair()).unwrap();
        let open = proto::Open { next: Some(signed), ..open };
        let answer = stranger.ask(&hop, frame(ticket.session, 1, proto::frame::Body::Open(open)), vec![]).await;
        assert_eq!(matches!(answer, proto::frame::Body::Opened(_)), is_opened, "{minutes}: {answer:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_step_that_overtakes_its_ticket_is_applied() {
    let (place, model) = (Place::new(), fixture("llama"));
    let (bootstrap, _nodes) = place.swarm(&model, &["0:6"], &[]);
    let client = client(&model, &bootstrap).await;
    let hop = client.observer().look_up().await.unwrap().peers.remove(0).announcement;
    let mut stranger = Stranger::join(&bootstrap).await;
    let own = stranger.swarm.peer_id();
    let ticket = ticket(&client, own, hop.peer_id, 0..6);
    let link = stranger.swarm.link(hop.peer_id, &hop.addresses).await.unwrap();
    let step = Frame { header: frame(ticket.session, 1, foreign_step(1, 0)), payload: vec![0; 256].into() };
    link.send(step).unwrap();
    let answer = stranger.ask_to_open(&hop, &ticket).await;
    let next = stranger.frames.recv().await.unwrap().header.body.unwrap();
    for body in [answer, next] {
        assert!(matches!(body, proto::frame::Body::Opened(_) | proto::frame::Body::Output(_)), "{body:?}");
    }
}
