//! A long link made out of loopback: a TCP proxy that delays every byte and lets no more through than a line of some bandwidth.
//!
//! Threads that sleep, not timers of a runtime: those count in milliseconds, of which a token over four hops would meet five.
#![allow(
    clippy::unwrap_used,
    dead_code,
    reason = "an emulator that can't go on stops; tests and benches use parts of it"
)]

use std::{
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

/// What is read at a time; at 100 Mbit/s it takes 1.3 ms to pass.
const CHUNK_BYTES: usize = 16 * 1024;
/// Chunks under way in one direction: more than any window.
const CHUNKS_UNDER_WAY: usize = 16 * 1024;
/// How far the line may be behind before the sender has to wait, as at a router with a queue of that length.
const QUEUE: Duration = Duration::from_millis(50);

/// What a link is like, either way.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Profile {
    pub(crate) one_way: Duration,
    /// `None`: as fast as it goes.
    pub(crate) bits_per_second: Option<f64>,
}

impl Profile {
    /// Delays by half a round trip, at any bandwidth.
    pub(crate) fn round_trip(round_trip: Duration) -> Self {
        Self { one_way: round_trip / 2, bits_per_second: None }
    }

    /// How long the line is busy with these bytes.
    pub(crate) fn transmission(&self, bytes: usize) -> Duration {
        self.bits_per_second.map_or(Duration::ZERO, |rate| Duration::from_secs_f64(8.0 * bytes as f64 / rate))
    }
}

/// Forwards connections to one target; cuts them when it is dropped.
pub(crate) struct LongLink {
    address: SocketAddr,
    profile: Arc<Mutex<Profile>>,
    ends: Arc<Mutex<Vec<TcpStream>>>,
    is_over: Arc<AtomicBool>,
}

impl LongLink {
    /// Listens on a free loopback port.
    pub(crate) fn start(target: SocketAddr, profile: Profile) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let link =
            Self { address, profile: Arc::new(Mutex::new(profile)), ends: Arc::default(), is_over: Arc::default() };
        let (profile, ends, is_over) = (link.profile.clone(), link.ends.clone(), link.is_over.clone());
        std::thread::spawn(move || {
            for inbound in listener.incoming() {
                if is_over.load(Ordering::Relaxed) {
                    return;
                }
                let (profile, ends) = (profile.clone(), ends.clone());
                std::thread::spawn(move || inbound.and_then(|inbound| forward(inbound, target, &profile, &ends)));
            }
        });
        link
    }

    pub(crate) fn port(&self) -> u16 {
        self.address.port()
    }

    /// From now on.
    pub(crate) fn set(&self, profile: Profile) {
        *self.profile.lock().unwrap() = profile;
    }
}

impl Drop for LongLink {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        // Wakes the thread that accepts.
        let _ = TcpStream::connect(self.address);
        for end in self.ends.lock().unwrap().drain(..) {
            let _ = end.shutdown(Shutdown::Both);
        }
    }
}

fn forward(
    inbound: TcpStream,
    target: SocketAddr,
    profile: &Arc<Mutex<Profile>>,
    ends: &Mutex<Vec<TcpStream>>,
) -> std::io::Result<()> {
    // What connecting takes: the SYN and its answer.
    std::thread::sleep(2 * profile.lock().unwrap().one_way);
    let outbound = TcpStream::connect(target)?;
    inbound.set_nodelay(true)?;
    outbound.set_nodelay(true)?;
    ends.lock().unwrap().extend([inbound.try_clone()?, outbound.try_clone()?]);
    let back = (outbound.try_clone()?, inbound.try_clone()?, profile.clone());
    std::thread::spawn(move || one_way(back.0, back.1, &back.2));
    one_way(inbound, outbound, profile);
    Ok(())
}

fn one_way(mut from: TcpStream, mut to: TcpStream, profile: &Mutex<Profile>) {
    let (sender, receiver) = mpsc::sync_channel::<(Instant, Vec<u8>)>(CHUNKS_UNDER_WAY);
    std::thread::spawn(move || {
        for (due, chunk) in receiver {
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            if to.write_all(&chunk).is_err() {
                return;
            }
        }
        let _ = to.shutdown(Shutdown::Write);
    });
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut free_at = Instant::now();
    while let Ok(read @ 1..) = from.read(&mut buffer) {
        let profile = *profile.lock().unwrap();
        free_at = free_at.max(Instant::now()) + profile.transmission(read);
        if sender.send((free_at + profile.one_way, buffer[..read].to_vec())).is_err() {
            return;
        }
        std::thread::sleep(free_at.saturating_duration_since(Instant::now() + QUEUE));
    }
}
