//! Whose fault a hop says it is: what is wrong with a step is the client's fault where the client sent it, and otherwise the
//! fault of the hop that did.

use helion::swarm::{
    Frame,
    announcement::Announcement,
    proto::{announcement, session as proto},
    ticket::{SessionLimits, Ticket},
};
use proto::frame::Body;

use super::{
    harness::{HANG, Place, Server, fixture},
    strangers::{Stranger, client, foreign_step, frame, limits, ticket},
};

/// Bytes of a row.
const ROW: usize = 64 * 4;

fn tensor(rows: u32) -> proto::Tensor {
    proto::Tensor { dtype: announcement::Dtype::F32.into(), rows, hidden: 64, codec: 0 }
}

fn run(lane: u32, position: u64, tokens: u32) -> proto::LaneRun {
    proto::LaneRun { lane, position, tokens }
}

fn step_of(lanes: Vec<proto::LaneRun>) -> Body {
    let tensor = Some(tensor(lanes.iter().map(|run| run.tokens).sum()));
    Body::Step(proto::Step { number: 1, lanes, tensor, want: proto::Want::Last.into(), ..Default::default() })
}

fn replay(index: u32, lanes: Vec<proto::LaneRun>, rows: u32) -> Body {
    Body::Replay(proto::Replay { applied: 3, hops: 1, index, lanes, tensor: Some(tensor(rows)), ..Default::default() })
}

fn nan() -> Vec<u8> {
    [f32::NAN.to_le_bytes().to_vec(), vec![0; ROW - 4]].concat()
}

/// A session's client, a hop in front of the node that isn't there, and the node.
struct Scene {
    owner: Stranger,
    before: Stranger,
    node: Announcement,
    process: Server,
    template: Ticket,
    _bootstrap: Server,
    _place: Place,
}

impl Scene {
    async fn start(limits: SessionLimits) -> Self {
        let (place, model) = (Place::new(), fixture("llama"));
        let (bootstrap, mut nodes) = place.swarm(&model, &["0:3"], &[]);
        let client = client(&model, &bootstrap).await;
        let node = client.observer().look_up().await.unwrap().peers.remove(0).announcement;
        let (owner, before) = (Stranger::join(&bootstrap).await, Stranger::join(&bootstrap).await);
        let template = Ticket { limits, ..ticket(&client, owner.swarm.peer_id(), node.peer_id, 0..3) };
        let process = nodes.remove(0);
        Self { owner, before, node, process, template, _bootstrap: bootstrap, _place: place }
    }

    /// Opens a session in which the node hears steps from the client, or from the hop before it.
    async fn open(&mut self, by_client: bool) -> Ticket {
        let own = self.owner.swarm.peer_id();
        let upstream = if by_client { own } else { self.before.swarm.peer_id() };
        let session = helion::swarm::ticket::SessionId::random();
        let ticket = Ticket { session, upstream, ..self.template.clone() };
        self.owner.open(&self.node, &ticket).await;
        ticket
    }

    async fn send(&self, by_client: bool, ticket: &Ticket, body: Body, payload: Vec<u8>) {
        let sender = if by_client { &self.owner } else { &self.before };
        let link = sender.swarm.link(self.node.peer_id, &self.node.addresses).await.unwrap();
        link.send(Frame { header: frame(ticket.session, 1, body), payload: payload.into() }).unwrap();
    }

    async fn client_hears(&mut self) -> Body {
        heard(&mut self.owner).await
    }
}

/// The next frame that a peer is sent.
async fn heard(peer: &mut Stranger) -> Body {
    let frame = tokio::time::timeout(HANG / 4, peer.frames.recv()).await;
    frame.expect("nothing comes").unwrap().header.body.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_hop_sends_wrong_is_not_the_clients_fault() {
    use proto::{Blame, Code};
    let mut scene = Scene::start(SessionLimits { max_lanes: 2, max_tokens: 30, ..limits(40) }).await;

    let cases: Vec<(Body, Vec<u8>, Code)> = vec![
        (foreign_step(1, 5), vec![0; ROW], Code::WrongPosition),
        (foreign_step(1, 64), vec![0; ROW], Code::TooLarge),
        // Each lane is short enough.
        (step_of(vec![run(0, 0, 20), run(1, 0, 20)]), vec![0; 40 * ROW], Code::TooLarge),
        (foreign_step(1, 0), vec![0; ROW - 1], Code::BadTensor),
        (foreign_step(1, 0), nan(), Code::NonFinite),
        (foreign_step(9, 0), vec![0; ROW], Code::WrongStep),
        (replay(0, vec![run(0, 5, 1)], 1), vec![0; ROW], Code::WrongPosition),
        (replay(0, vec![run(0, 0, 1)], 2), vec![0; 2 * ROW], Code::BadTensor),
        (replay(1, vec![run(0, 0, 1)], 1), vec![0; ROW], Code::WrongStep),
    ];
    for (by_client, expected) in [(true, Blame::Client), (false, Blame::Upstream)] {
        for (index, (body, payload, code)) in cases.clone().into_iter().enumerate() {
            let ticket = scene.open(by_client).await;
            scene.send(by_client, &ticket, body, payload).await;
            match scene.client_hears().await {
                Body::Fault(fault) => {
                    assert_eq!((fault.code(), fault.blame()), (code, expected), "case {index}: {fault:?}")
                }
                other => panic!("case {index}: {other:?}"),
            }
        }
    }
}

/// The client sees that a replay goes on, wherever in the route that is.
#[tokio::test(flavor = "multi_thread")]
async fn the_client_hears_of_every_part_of_a_replay_between_hops() {
    let mut scene = Scene::start(limits(40)).await;
    let ticket = scene.open(false).await;
    for index in 0..3 {
        scene.send(false, &ticket, replay(index, vec![run(0, u64::from(index), 1)], 1), vec![0; ROW]).await;
        let told = Body::Replayed(proto::Replayed { index });
        assert_eq!(scene.client_hears().await, told);
        assert_eq!(heard(&mut scene.before).await, told);
    }
}

/// A client that shows a ticket to a node that leaves is told so, as it may have been away when the others were.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_leaves_tells_whoever_comes_back() {
    let mut scene = Scene::start(limits(40)).await;
    let ticket = scene.open(true).await;
    let is_leaving = |body: &Body| matches!(body, Body::Fault(fault) if fault.code() == proto::Code::Leaving);
    scene.process.running.signal("TERM");
    let told = scene.client_hears().await;
    assert!(is_leaving(&told), "{told:?}");
    scene.owner.open(&scene.node, &Ticket { epoch: 2, ..ticket }).await;
    let told = scene.client_hears().await;
    assert!(is_leaving(&told), "{told:?}");
}
