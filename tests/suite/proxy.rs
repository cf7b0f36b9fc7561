//! A TCP proxy that makes a long link out of loopback: every byte arrives half a round trip later, at any bandwidth.

use std::{net::SocketAddr, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::mpsc,
    task::JoinSet,
    time::Instant,
};

/// Chunks under way in one direction: at 64 KiB each far more than any window.
const CHUNKS_UNDER_WAY: usize = 4096;

/// Forwards connections to one target; stops when it is dropped.
pub(crate) struct DelayingProxy {
    address: SocketAddr,
    accepting: tokio::task::JoinHandle<()>,
}

impl DelayingProxy {
    /// Listens on a free loopback port.
    pub(crate) async fn start(target: SocketAddr, round_trip: Duration) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let accepting = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((inbound, _)) = listener.accept().await {
                connections.spawn(forward(inbound, target, round_trip / 2));
            }
        });
        Self { address, accepting }
    }

    pub(crate) fn port(&self) -> u16 {
        self.address.port()
    }
}

impl Drop for DelayingProxy {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

async fn forward(inbound: TcpStream, target: SocketAddr, delay: Duration) {
    // What connecting takes: the SYN and its answer.
    tokio::time::sleep(2 * delay).await;
    let Ok(outbound) = TcpStream::connect(target).await else { return };
    let _ = (inbound.set_nodelay(true), outbound.set_nodelay(true));
    let (from_dialer, to_dialer) = inbound.into_split();
    let (from_target, to_target) = outbound.into_split();
    tokio::join!(one_way(from_dialer, to_target, delay), one_way(from_target, to_dialer, delay));
}

async fn one_way(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, delay: Duration) {
    let (sender, mut receiver) = mpsc::channel::<(Instant, Vec<u8>)>(CHUNKS_UNDER_WAY);
    let reading = async move {
        let mut buffer = vec![0; 64 * 1024];
        while let Ok(read @ 1..) = from.read(&mut buffer).await {
            if sender.send((Instant::now() + delay, buffer[..read].to_vec())).await.is_err() {
                return;
            }
        }
    };
    let writing = async move {
        while let Some((due, chunk)) = receiver.recv().await {
            tokio::time::sleep_until(due).await;
            if to.write_all(&chunk).await.is_err() {
                return;
            }
        }
        let _ = to.shutdown().await;
    };
    tokio::join!(reading, writing);
}
