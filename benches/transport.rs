//! What a kept link costs: the echo of a frame between two peers of this machine, beside a bare TCP socket.
//!
//! `cargo bench --bench transport`. Each round trip starts on a thread of its own and ends there, as a step does between a
//! node's compute thread and the network.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    sync::{Arc, mpsc},
};

use bytes::Bytes;
use futures::future::BoxFuture;
use helion::swarm::{Frame, Identity, Link, PeerId, Role, Service, Swarm, SwarmConfig, rpc};
use tokio::runtime::Builder;

const SIZES: [usize; 3] = [8 * 1024, 64 * 1024, 1024 * 1024];

fn main() {
    divan::main();
}

/// Sends frames back, or to the measuring thread.
struct Echo {
    answered: mpsc::SyncSender<usize>,
}

impl Service for Echo {
    fn frame(&self, link: &Link, frame: Frame) {
        if link.opened_by_us() {
            self.answered.send(frame.payload.len()).unwrap();
        } else {
            link.send(frame).unwrap();
        }
    }

    fn link_closed(&self, _: &Link) {}

    fn request(&self, _: PeerId, _: rpc::Request) -> BoxFuture<'static, rpc::Response> {
        Box::pin(async { rpc::Response::failure("nothing here") })
    }
}

async fn peer(listen: Option<&str>) -> (Swarm, mpsc::Receiver<usize>) {
    let (answered, answers) = mpsc::sync_channel(16);
    let mut config = SwarmConfig::new(Identity::ephemeral(), Role::Server);
    config.listen = listen.iter().map(|address| address.parse().unwrap()).collect();
    (Swarm::start(config, Arc::new(Echo { answered })).await.unwrap(), answers)
}

fn echo_over_link(bencher: divan::Bencher<'_, '_>, listen: &str, bytes: usize) {
    // A runtime each, as in two processes.
    let one = || Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let (here, there) = (one(), one());
    let (node, _answers) = there.block_on(peer(Some(listen)));
    let (client, answers) = here.block_on(peer(None));
    let link = here.block_on(client.link(node.peer_id(), &node.addresses())).unwrap();
    let payload = Bytes::from(vec![7; bytes]);
    let round_trip = || {
        link.send(Frame { payload: payload.clone(), ..Frame::default() }).unwrap();
        assert_eq!(answers.recv().unwrap(), bytes);
    };
    // Windows grow with use.
    (0..20).for_each(|_| round_trip());
    bencher.counter(divan::counter::BytesCount::new(bytes)).bench_local(round_trip);
}

#[divan::bench(args = SIZES, sample_count = 2000)]
fn link_over_tcp(bencher: divan::Bencher<'_, '_>, bytes: usize) {
    echo_over_link(bencher, "/ip4/127.0.0.1/tcp/0", bytes);
}

#[divan::bench(args = SIZES, sample_count = 2000)]
fn link_over_quic(bencher: divan::Bencher<'_, '_>, bytes: usize) {
    echo_over_link(bencher, "/ip4/127.0.0.1/udp/0/quic-v1", bytes);
}

#[divan::bench(args = SIZES, sample_count = 2000)]
fn bare_tcp(bencher: divan::Bencher<'_, '_>, bytes: usize) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    stream.set_nodelay(true).unwrap();
    std::thread::spawn(move || {
        let mut stream = listener.accept().unwrap().0;
        stream.set_nodelay(true).unwrap();
        let mut buffer = vec![0; bytes];
        while stream.read_exact(&mut buffer).is_ok() {
            stream.write_all(&buffer).unwrap();
        }
    });
    let mut buffer = vec![7; bytes];
    bencher.counter(divan::counter::BytesCount::new(bytes)).bench_local(|| {
        stream.write_all(&buffer).unwrap();
        stream.read_exact(&mut buffer).unwrap();
    });
}
