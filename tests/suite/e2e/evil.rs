//! A hop that lies: wrong shapes, numbers that are not finite, garbage, silence. It is named and replaced, and the tokens are
//! right all the same.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, OnceLock},
    time::Duration,
};

use futures::future::BoxFuture;
use helion::{
    client::{PeerRules, generation::GenerationOptions, session::Patience},
    swarm::{
        Frame, Link, Service, WeakSwarm,
        announcement::{Announcement, unix_ms},
        proto::{rpc, session as proto},
        ticket::Ticket,
    },
};

use super::{
    harness::{Place, client, fixture, reference},
    strangers::{pass_for_honest, server},
};

/// What it does instead of computing.
#[derive(Clone, Copy)]
enum Lie {
    NonFinite,
    WrongRows,
    WrongBytes,
    WrongNumber,
    Garbage,
    Silence,
}

struct EvilHop {
    lie: Lie,
    swarm: OnceLock<WeakSwarm>,
    /// Where each session's outputs go.
    next: Mutex<HashMap<Vec<u8>, Announcement>>,
}

impl EvilHop {
    /// Changes a step that should have been computed.
    fn spoil(&self, mut step: proto::Step, payload: &[u8]) -> Option<(proto::Step, Vec<u8>)> {
        let mut payload = payload.to_vec();
        match self.lie {
            Lie::NonFinite => payload[..4].copy_from_slice(&f32::NAN.to_le_bytes()),
            Lie::WrongRows => step.tensor.as_mut()?.rows += 1,
            Lie::WrongBytes => payload.truncate(payload.len() - 1),
            Lie::WrongNumber => step.number += 1000,
            Lie::Garbage => {
                let tensor = step.tensor.as_mut()?;
                (tensor.dtype, tensor.hidden) = (77, u32::MAX);
                step.lanes.clear();
            }
            Lie::Silence => return None,
        }
        Some((step, payload))
    }
}

impl Service for EvilHop {
    fn frame(&self, link: &Link, frame: Frame) {
        use proto::frame::Body;
        let Frame { header, payload } = frame;
        let answer = |body| link.send(Frame::bare(proto::Frame { body: Some(body), ..header.clone() })).unwrap();
        match header.body.clone() {
            Some(Body::Open(open)) => {
                Ticket::verify(&open, unix_ms()).unwrap();
                let next = Announcement::from_signed(&open.next.unwrap(), unix_ms()).unwrap();
                self.next.lock().unwrap().insert(header.session.to_vec(), next);
                answer(Body::Opened(proto::Opened::default()));
            }
            Some(Body::Ping(ping)) => answer(Body::Pong(proto::Pong { nonce: ping.nonce })),
            Some(Body::Step(step)) => {
                let Some((step, payload)) = self.spoil(step, &payload) else { return };
                let next = self.next.lock().unwrap()[&header.session.to_vec()].clone();
                let swarm = self.swarm.get().unwrap().upgrade().unwrap();
                let header = proto::Frame { body: Some(Body::Step(step)), ..header.clone() };
                tokio::spawn(async move {
                    let link = swarm.link(next.peer_id, &next.addresses).await.unwrap();
                    // It may have been found out already.
                    let _ = link.send(Frame { header, payload: payload.into() });
                });
            }
            _ => {}
        }
    }

    fn link_closed(&self, _link: &Link) {}

    fn request(&self, _from: helion::swarm::PeerId, _request: rpc::Request) -> BoxFuture<'static, rpc::Response> {
        Box::pin(std::future::ready(rpc::Response::default()))
    }
}

async fn is_replaced(lie: Lie) {
    let (place, model) = (Place::new(), fixture("llama"));
    let (bootstrap, nodes) = place.swarm(&model, &["0:2", "2:4", "4:6"], &[]);
    let patience = Patience {
        overdue: Duration::from_millis(500),
        pong: Duration::from_millis(500),
        step: Duration::from_secs(3),
        ..Patience::default()
    };
    let client = client(&model, &bootstrap, patience).await;

    let evil = Arc::new(EvilHop { lie, swarm: OnceLock::new(), next: Mutex::default() });
    let swarm = server(&bootstrap, evil.clone()).await;
    evil.swarm.set(swarm.downgrade()).unwrap_or_else(|_| panic!("set once"));
    pass_for_honest(&swarm, &client, 2..4).await;

    let reference = reference(&model);
    let options = GenerationOptions {
        max_tokens: reference.output.len(),
        ignore_eos: true,
        wait: Duration::from_secs(10),
        ..GenerationOptions::default()
    };
    let first_route = vec![nodes[0].peer_id.parse().unwrap(), swarm.peer_id(), nodes[2].peer_id.parse().unwrap()];
    let client = client.with_rules(PeerRules { route: first_route, ..PeerRules::default() });
    let generation = client.generate(&reference.prompt, &options, &mut |_| {}).await.unwrap();
    assert_eq!(generation.output_ids, reference.output);
    assert_eq!(generation.recoveries, 1);
    assert_eq!(generation.route[1].peer_id, nodes[1].peer_id);
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
    numbers_that_are_not_finite: Lie::NonFinite;
    a_wrong_number_of_rows: Lie::WrongRows;
    a_payload_of_a_wrong_length: Lie::WrongBytes;
    a_step_out_of_turn: Lie::WrongNumber;
    a_tensor_of_nonsense: Lie::Garbage;
    silence_while_it_lives: Lie::Silence;
}
