//! A long link made out of loopback: a TCP proxy that delays every byte and lets no more through than a line of some bandwidth.
//! It can be cut, or become a black hole: for everybody, or for those who dial from one port. A node dials from the port that it
//! listens on, so the links of all nodes together can cut one of them off both ways.
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
        Arc, Condvar, Mutex,
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

/// What may be wrong with a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Trouble {
    /// Connections end, and new ones end at once.
    Cut,
    /// Nothing arrives, and nobody is told. It arrives when the trouble is over.
    BlackHole,
}

/// Whose connections are in trouble.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Dialers {
    All,
    /// Those that come from this port.
    Port(u16),
}

/// Forwards connections to one target; cuts them when it is dropped.
pub(crate) struct LongLink {
    address: SocketAddr,
    line: Arc<Line>,
}

/// What the threads of a link share.
struct Line {
    profile: Mutex<Profile>,
    troubles: Mutex<Vec<(Dialers, Trouble)>>,
    /// Troubles are over.
    restored: Condvar,
    /// The ends of all connections, with the ports that they were dialled from.
    ends: Mutex<Vec<(u16, TcpStream)>>,
    is_over: AtomicBool,
}

impl LongLink {
    /// Listens on a free loopback port.
    pub(crate) fn start(target: SocketAddr, profile: Profile) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let line = Arc::new(Line {
            profile: Mutex::new(profile),
            troubles: Mutex::default(),
            restored: Condvar::new(),
            ends: Mutex::default(),
            is_over: AtomicBool::new(false),
        });
        let shared = line.clone();
        std::thread::spawn(move || {
            for inbound in listener.incoming() {
                if shared.is_over.load(Ordering::Relaxed) {
                    return;
                }
                let line = shared.clone();
                std::thread::spawn(move || inbound.and_then(|inbound| forward(inbound, target, &line)));
            }
        });
        Self { address, line }
    }

    pub(crate) fn port(&self) -> u16 {
        self.address.port()
    }

    /// Cuts the connections that there are; new ones are taken.
    pub(crate) fn cut(&self) {
        self.line.close(Dialers::All);
    }

    /// From now on.
    pub(crate) fn set(&self, profile: Profile) {
        *self.line.profile.lock().unwrap() = profile;
    }

    /// From now on, until [`LongLink::restore`].
    pub(crate) fn disturb(&self, dialers: Dialers, trouble: Trouble) {
        self.line.troubles.lock().unwrap().push((dialers, trouble));
        if trouble == Trouble::Cut {
            self.line.close(dialers);
        }
    }

    /// Ends all troubles.
    pub(crate) fn restore(&self) {
        self.line.troubles.lock().unwrap().clear();
        self.line.restored.notify_all();
    }
}

impl Dialers {
    fn include(self, port: u16) -> bool {
        self == Self::All || self == Self::Port(port)
    }
}

impl Line {
    fn close(&self, dialers: Dialers) {
        for (_, end) in self.ends.lock().unwrap().extract_if(.., |(port, _)| dialers.include(*port)) {
            // It may have ended already.
            let _ = end.shutdown(Shutdown::Both);
        }
    }

    fn is_cut(&self, dialer: u16) -> bool {
        let troubles = self.troubles.lock().unwrap();
        troubles.iter().any(|(dialers, trouble)| dialers.include(dialer) && *trouble == Trouble::Cut)
    }

    /// Waits until what comes from there, or goes there, may pass.
    fn wait_in_black_hole(&self, dialer: u16) {
        let swallows = |(dialers, trouble): &(Dialers, Trouble)| {
            dialers.include(dialer) && *trouble == Trouble::BlackHole && !self.is_over.load(Ordering::Relaxed)
        };
        let troubles = self.troubles.lock().unwrap();
        drop(self.restored.wait_while(troubles, |troubles| troubles.iter().any(swallows)).unwrap());
    }
}

impl Drop for LongLink {
    fn drop(&mut self) {
        self.line.is_over.store(true, Ordering::Relaxed);
        self.restore();
        // Wakes the thread that accepts.
        let _ = TcpStream::connect(self.address);
        self.cut();
    }
}

fn forward(inbound: TcpStream, target: SocketAddr, line: &Arc<Line>) -> std::io::Result<()> {
    let dialer = inbound.peer_addr()?.port();
    // What connecting takes: the SYN and its answer.
    std::thread::sleep(2 * line.profile.lock().unwrap().one_way);
    if line.is_cut(dialer) {
        return Ok(());
    }
    let outbound = TcpStream::connect(target)?;
    inbound.set_nodelay(true)?;
    outbound.set_nodelay(true)?;
    line.ends.lock().unwrap().extend([(dialer, inbound.try_clone()?), (dialer, outbound.try_clone()?)]);
    if line.is_cut(dialer) {
        // It was cut meanwhile.
        return inbound.shutdown(Shutdown::Both);
    }
    let back = (outbound.try_clone()?, inbound.try_clone()?, line.clone());
    std::thread::spawn(move || one_way((back.0, dialer), back.1, &back.2));
    one_way((inbound, dialer), outbound, line);
    Ok(())
}

fn one_way((mut from, dialer): (TcpStream, u16), mut to: TcpStream, line: &Arc<Line>) {
    let (sender, receiver) = mpsc::sync_channel::<(Instant, Vec<u8>)>(CHUNKS_UNDER_WAY);
    let writing = line.clone();
    std::thread::spawn(move || {
        for (due, chunk) in receiver {
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            writing.wait_in_black_hole(dialer);
            if to.write_all(&chunk).is_err() {
                return;
            }
        }
        let _ = to.shutdown(Shutdown::Write);
    });
    let mut buffer = vec![0; CHUNK_BYTES];
    let mut free_at = Instant::now();
    while let Ok(read @ 1..) = from.read(&mut buffer) {
        let profile = *line.profile.lock().unwrap();
        free_at = free_at.max(Instant::now()) + profile.transmission(read);
        if sender.send((free_at + profile.one_way, buffer[..read].to_vec())).is_err() {
            return;
        }
        std::thread::sleep(free_at.saturating_duration_since(Instant::now() + QUEUE));
    }
}
