//! A hop that does its work for a while, and then lies: wrong shapes, numbers that are not finite, garbage, silence. It is named and
//! replaced, and the tokens are right all the same.

use std::{
    collections::{HashMap, VecDeque},
    ops::Range,
    path::Path,
    sync::{Arc, Mutex, OnceLock},
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::future::BoxFuture;
use helion::{
    client::{Client, PeerRules, generation::GenerationOptions, session::Patience},
    engine::{Cache, DeviceChoice, Engine, EngineOptions, HiddenStates, Job, Keep, LaneRun},
    model::{Dtype, hub::HubOptions, source::ModelSource},
    swarm::{
        Frame, Link, PeerId, Service, Swarm, WeakSwarm,
        announcement::{Announcement, unix_ms},
        proto::{announcement, rpc, session as proto},
        ticket::Ticket,
    },
};
use proto::frame::Body;
use tokio::sync::{mpsc, oneshot};

use super::{
    harness::{Place, Server, client, fixture, reference},
    strangers::{pass_for_honest, server},
};

/// What it does with a step's output.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Lie {
    NonFinite,
    WrongRows,
    WrongBytes,
    WrongNumber,
    Garbage,
    Silence,
}

/// A hop that lies.
pub(super) struct Liar {
    pub(super) lie: Lie,
    /// Steps that it does well, from the first one on.
    pub(super) honest: u64,
    /// It passes for the honest peer that has these.
    pub(super) blocks: Range<usize>,
}

impl Liar {
    /// Joins the swarm of the fixture's nodes.
    pub(super) async fn start(self, model: &Path, peer: &Server, client: &Client) -> Swarm {
        let source = ModelSource::open(&model.display().to_string(), HubOptions::default()).await.unwrap();
        let checkpoint = source.fetch_blocks(self.blocks.clone()).await.unwrap();
        let options = EngineOptions {
            device: DeviceChoice::Cpu,
            cache_tokens: 256,
            threads: Some(1),
            ..EngineOptions::new(self.blocks.clone(), Dtype::F32)
        };
        let engine = Engine::load(&checkpoint, options, &mut |_, _| {}).unwrap();
        let blocks = self.blocks.clone();
        let hop = Arc::new(EvilHop { liar: self, engine, swarm: OnceLock::new(), sessions: Mutex::default() });
        let swarm = server(peer, Arc::new(EvilService(hop.clone()))).await;
        hop.swarm.set(swarm.downgrade()).unwrap_or_else(|_| panic!("set once"));
        pass_for_honest(&swarm, client, blocks).await;
        swarm
    }

    /// What it says instead of an output.
    fn spoil(&self, said: &mut Said) {
        if self.lie == Lie::NonFinite || self.lie == Lie::WrongRows {
            // Where nothing is wanted from the last hop, it lies all the same.
            let row = || proto::Tensor { rows: 1, ..said.blank };
            if said.tensor.is_none() {
                said.payload = vec![0; said.blank.hidden as usize * 4];
            }
            said.tensor.get_or_insert_with(row);
        }
        match (self.lie, &mut said.tensor) {
            (Lie::NonFinite, _) => said.payload[..4].copy_from_slice(&f32::NAN.to_le_bytes()),
            (Lie::WrongRows, Some(tensor)) => tensor.rows += 1,
            (Lie::WrongBytes, Some(_)) => said.payload.truncate(said.payload.len() - 1),
            (Lie::WrongBytes, None) => said.payload.push(0),
            (Lie::WrongNumber, _) => said.number += 1000,
            (Lie::Garbage, tensor) => {
                *tensor = Some(proto::Tensor { dtype: 77, hidden: u32::MAX, ..said.blank });
                said.lanes.clear();
            }
            _ => {}
        }
    }
}

/// A step's output, on its way to the next hop or the client.
struct Said {
    number: u64,
    lanes: Vec<proto::LaneRun>,
    tensor: Option<proto::Tensor>,
    payload: Vec<u8>,
    /// A tensor of this session without rows.
    blank: proto::Tensor,
}

struct EvilHop {
    liar: Liar,
    engine: Engine,
    swarm: OnceLock<WeakSwarm>,
    /// Where each session's frames go.
    sessions: Mutex<HashMap<Bytes, mpsc::Sender<(Link, Frame)>>>,
}

/// A session that was opened.
struct Opened {
    control: Link,
    next: Option<Announcement>,
    cache: Option<Cache>,
}

impl EvilHop {
    /// Does what one session's frames ask for, in turn.
    async fn serve(self: Arc<Self>, mut frames: mpsc::Receiver<(Link, Frame)>) {
        let (mut opened, mut steps) = (None, VecDeque::new());
        while let Some((link, Frame { header, payload })) = frames.recv().await {
            match header.body.clone() {
                Some(Body::Open(open)) => {
                    let body = Body::Opened(proto::Opened::default());
                    link.send(Frame::bare(proto::Frame { body: Some(body), ..header })).unwrap();
                    let ticket = Ticket::verify(&open, unix_ms()).unwrap();
                    let next = open.next.map(|next| Announcement::from_signed(&next, unix_ms()).unwrap());
                    opened = Some(Opened { control: link, next, cache: self.engine.cache(ticket.blocks).ok() });
                }
                // It may overtake its ticket.
                Some(Body::Step(step)) => steps.push_back((header, step, payload)),
                _ => {}
            }
            let Some(opened) = &mut opened else { continue };
            while let Some((header, step, payload)) = steps.pop_front() {
                self.take_step(opened, header, step, payload).await;
            }
        }
    }

    async fn take_step(&self, opened: &mut Opened, header: proto::Frame, step: proto::Step, payload: Bytes) {
        let asked = step.tensor.unwrap();
        // It says that it has nothing where the session goes on in another epoch, and takes no notice of what it is told then.
        let Some(output) = self.compute(opened, &step, payload).await else { return };
        let blank = proto::Tensor { dtype: announcement::Dtype::F32.into(), rows: 0, ..asked };
        let tensor = (output.rows > 0).then_some(proto::Tensor { rows: output.rows as u32, ..blank });
        let (number, lanes) = (step.number, step.lanes.clone());
        let mut said = Said { number, lanes, tensor, payload: output.bytes.to_vec(), blank };
        if number > self.liar.honest {
            if self.liar.lie == Lie::Silence {
                return;
            }
            self.liar.spoil(&mut said);
        }
        let Said { number, lanes, tensor, payload, .. } = said;
        let (link, body) = match &opened.next {
            Some(next) => {
                let swarm = self.swarm.get().unwrap().upgrade().unwrap();
                let link = swarm.link(next.peer_id, &next.addresses).await.unwrap();
                (link, Body::Step(proto::Step { number, lanes, tensor, ..step }))
            }
            None => (opened.control.clone(), Body::Output(proto::Output { number, tensor, times: step.times })),
        };
        let header = proto::Frame { body: Some(body), ..header };
        // It may have been found out already.
        let _ = link.send(Frame { header, payload: payload.into() });
    }

    /// The true output, where the step goes on from what it has.
    async fn compute(&self, opened: &mut Opened, step: &proto::Step, payload: Bytes) -> Option<HiddenStates> {
        let tensor = step.tensor.unwrap();
        let run = |run: &proto::LaneRun| LaneRun {
            lane: run.lane,
            position: run.position as usize,
            tokens: run.tokens as usize,
        };
        let (sender, done) = oneshot::channel();
        self.engine.submit(Job {
            cache: opened.cache.take().unwrap(),
            lanes: step.lanes.iter().map(run).collect(),
            hidden: HiddenStates::new(Dtype::F32, tensor.rows as usize, tensor.hidden as usize, payload).unwrap(),
            rope_length: Some(step.rope_length as usize).filter(|length| *length > 0),
            keep: match step.want() {
                _ if opened.next.is_some() => Keep::All,
                proto::Want::All => Keep::All,
                proto::Want::Last => Keep::LastOfEachLane,
                _ => Keep::Nothing,
            },
            deadline: Instant::now() + Duration::from_secs(10),
            cancelled: Arc::default(),
            done: Box::new(move |cache, result| {
                // A session that has ended meanwhile doesn't wait for it.
                let _ = sender.send((cache, result));
            }),
        });
        let (cache, result) = done.await.unwrap();
        opened.cache = Some(cache);
        Some(result.ok()?.hidden)
    }
}

/// Hands the frames of each session to a task of its own.
struct EvilService(Arc<EvilHop>);

impl Service for EvilService {
    fn frame(&self, link: &Link, frame: Frame) {
        let mut sessions = self.0.sessions.lock().unwrap();
        match &frame.header.body {
            Some(Body::Ping(ping)) => {
                let body = Body::Pong(proto::Pong { nonce: ping.nonce });
                link.send(Frame::bare(proto::Frame { body: Some(body), ..frame.header })).unwrap();
            }
            Some(Body::Close(_)) => drop(sessions.remove(&frame.header.session)),
            Some(Body::Open(_) | Body::Step(_)) => {
                let begin = || {
                    let (sender, frames) = mpsc::channel(64);
                    tokio::spawn(self.0.clone().serve(frames));
                    sender
                };
                let session = sessions.entry(frame.header.session.clone()).or_insert_with(begin);
                session.try_send((link.clone(), frame)).unwrap();
            }
            _ => {}
        }
    }

    fn link_closed(&self, _link: &Link) {}

    fn request(&self, _from: PeerId, _request: rpc::Request) -> BoxFuture<'static, rpc::Response> {
        Box::pin(std::future::ready(rpc::Response::default()))
    }
}

/// One lie after the other, on each hop in turn: told at once, in the middle of the prompt, and in the middle of the answer. The lies that
/// the fault matrix leaves out.
async fn is_replaced(lie: Lie) {
    let (place, model) = (Place::new(), fixture("llama"));
    let spans = ["0:2", "2:4", "4:6"];
    let (bootstrap, nodes) = place.swarm(&model, &spans, &[]);
    for (hop, honest) in [(1, 0), (0, 3), (2, 15)] {
        let patience = Patience {
            overdue: Duration::from_millis(500),
            pong: Duration::from_millis(500),
            step: Duration::from_millis(1500),
            ..Patience::default()
        };
        let client = client(&model, &bootstrap, patience).await;
        let liar = Liar { lie, honest, blocks: 2 * hop..2 * hop + 2 };
        let swarm = liar.start(&model, &bootstrap, &client).await;

        let reference = reference(&model);
        let options = GenerationOptions {
            max_tokens: reference.output.len(),
            ignore_eos: true,
            wait: Duration::from_secs(10),
            prefill_chunk: 7,
            ..GenerationOptions::default()
        };
        let mut first_route: Vec<PeerId> = nodes.iter().map(|node| node.peer_id.parse().unwrap()).collect();
        first_route[hop] = swarm.peer_id();
        let client = client.with_rules(PeerRules { route: first_route, ..PeerRules::default() });
        let generation = client.generate(&reference.prompt, &options, &mut |_| {}).await.unwrap();
        assert_eq!(generation.output_ids, reference.output);
        assert_eq!(generation.recoveries, 1, "hop {hop} after {honest} steps");
        assert_eq!(generation.route[hop].peer_id, nodes[hop].peer_id);
        client.stop().await;
        swarm.stop().await;
    }
}

macro_rules! lies {
    ($($name:ident: $lie:expr;)*) => {$(
        #[tokio::test(flavor = "multi_thread")]
        async fn $name() {
            is_replaced($lie).await;
        }
    )*};
}

lies! {
    a_step_out_of_turn: Lie::WrongNumber;
    a_tensor_of_nonsense: Lie::Garbage;
    silence_while_it_lives: Lie::Silence;
}
