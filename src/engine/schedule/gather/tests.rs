//! Sessions go round a ring of stations, in simulated time.

use super::*;

/// Numbers that look random, from 0 to 1.
struct Random(u64);

impl Random {
    fn next(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f64 / (1u64 << 24) as f64
    }
}

/// How long a step may wait for a group.
const LIMIT: Duration = Duration::from_millis(100);

/// Something that computes: an engine, or a client's head.
#[derive(Debug, Clone, Copy)]
struct Station {
    /// Stations on one machine share its processor.
    machine: usize,
    /// Seconds of a pass, and of a row beside that.
    base: f64,
    row: f64,
}

/// A swarm whose sessions all go through the same stations.
struct Swarm {
    /// In the order of the route; the last is the client's head.
    stations: Vec<Station>,
    /// Seconds from one station to the next, at least, and what comes on top at the most.
    link: (f64, f64),
    sessions: u64,
    /// Seconds for which a session of this number pauses after a token, at the most.
    pause: fn(u64) -> f64,
    /// When a session of this number has its last token.
    end: fn(u64) -> f64,
    gathers: bool,
}

/// What came of it.
#[derive(Debug)]
struct Outcome {
    tokens_per_second: f64,
    /// Of each station.
    rows_per_pass: Vec<f64>,
    /// The part of the time for which the first session's steps were here and nothing ran.
    waited: f64,
}

struct Place {
    station: Station,
    gather: Gather,
    ready: Vec<Here>,
    running: Option<Running>,
    /// Until when it waits.
    until: Option<f64>,
    /// Since when it could have started.
    idle: f64,
    passes: u64,
    rows: u64,
}

struct Running {
    sessions: Vec<u64>,
    left: f64,
    began: f64,
}

impl Place {
    fn new(index: usize, stations: &[Station], start: Instant) -> Self {
        let mut gather = Gather::new(match index {
            0 => Meeting::FirstHop,
            index if index + 1 == stations.len() => Meeting::Head,
            _ => Meeting::LaterHop,
        });
        let station = stations[index];
        // A node measures itself before anybody comes.
        let took = Duration::from_secs_f64(station.base + station.row);
        gather.ran(1, Took { time: took, processor: took }, start);
        Self { station, gather, ready: Vec::new(), running: None, until: None, idle: 0.0, passes: 0, rows: 0 }
    }
}

impl Swarm {
    fn run(&self, seconds: f64) -> Outcome {
        let start = Instant::now();
        let at = |time: f64| start + Duration::from_secs_f64(time);
        let mut random = Random(1);
        let count = self.stations.len();
        let mut places: Vec<Place> = (0..count).map(|index| Place::new(index, &self.stations, start)).collect();
        let mut flights: Vec<(f64, u64, usize)> =
            (0..self.sessions).map(|session| (0.005 * random.next(), session, 0)).collect();
        let (mut now, mut tokens, mut waited) = (0.0, 0, 0.0);
        while now < seconds {
            let mut running = vec![0.0; count];
            for place in places.iter().filter(|place| place.running.is_some()) {
                running[place.station.machine] += 1.0;
            }
            let mut next = flights.iter().map(|flight| flight.0).fold(f64::INFINITY, f64::min);
            for place in &places {
                next = next.min(match (&place.running, place.until) {
                    (Some(pass), _) => now + pass.left.max(0.0) * running[place.station.machine],
                    (None, Some(until)) => until,
                    (None, None) => f64::INFINITY,
                });
            }
            let passed = next.max(now) - now;
            now += passed;
            for (index, place) in places.iter_mut().enumerate() {
                let Some(pass) = &mut place.running else { continue };
                pass.left -= passed / running[place.station.machine];
                if pass.left > 1e-9 {
                    continue;
                }
                let Some(pass) = place.running.take() else { continue };
                place.idle = now;
                let took = [now - pass.began, place.station.base + place.station.row * pass.sessions.len() as f64];
                let [time, processor] = took.map(Duration::from_secs_f64);
                place.gather.ran(pass.sessions.len(), Took { time, processor }, at(now));
                let is_last = index + 1 == count;
                for session in pass.sessions {
                    place.gather.stepped(Here { session, rows: 1, arrived: at(now) }, true, at(now));
                    let pause = if is_last { (self.pause)(session) * random.next() } else { 0.0 };
                    let arrives = now + self.link.0 + self.link.1 * random.next() + pause;
                    tokens += u64::from(is_last);
                    if !is_last || now < (self.end)(session) {
                        flights.push((arrives, session, (index + 1) % count));
                    }
                }
            }
            flights.retain(|(arrives, session, index)| {
                if *arrives > now {
                    return true;
                }
                let place = &mut places[*index];
                place.gather.came(*session, true, at(now));
                place.ready.push(Here { session: *session, rows: 1, arrived: at(now) });
                place.until = None;
                false
            });
            for place in &mut places {
                let is_waiting = place.until.is_some_and(|until| until > now);
                if place.running.is_some() || place.ready.is_empty() || is_waiting {
                    continue;
                }
                let until = self.gathers.then(|| place.gather.wait(&place.ready, LIMIT, at(now))).flatten();
                let until = until.map(|until| until.duration_since(start).as_secs_f64());
                place.until = until.filter(|until| *until > now + 1e-6);
                if place.until.is_some() {
                    continue;
                }
                let rows = place.ready.len();
                if let Some(first) = place.ready.iter().find(|step| step.session == 0) {
                    waited += now - first.arrived.duration_since(start).as_secs_f64().max(place.idle);
                }
                place.gather.begins(rows, at(now));
                place.passes += 1;
                place.rows += rows as u64;
                let sessions = place.ready.drain(..).map(|step| step.session).collect();
                let left = place.station.base + place.station.row * rows as f64;
                place.running = Some(Running { sessions, left, began: now });
            }
            if flights.is_empty() && places.iter().all(|place| place.running.is_none() && place.ready.is_empty()) {
                break;
            }
        }
        Outcome {
            tokens_per_second: tokens as f64 / now,
            rows_per_pass: places.iter().map(|place| place.rows as f64 / place.passes as f64).collect(),
            waited: waited / now,
        }
    }
}

/// `nodes` nodes and a client. A pass through all blocks takes 34 ms, and 6 ms a row; one of the head 10 ms, and half a one. That is
/// what a model of 0.6 billion parameters in bf16 takes on two cores.
fn swarm(nodes: usize, is_one_machine: bool, sessions: u64) -> Swarm {
    let part = 1.0 / nodes as f64;
    let machine = |index: usize| if is_one_machine { 0 } else { index };
    let node = |index| Station { machine: machine(index), base: 0.034 * part, row: 0.006 * part };
    let head = Station { machine: machine(nodes), base: 0.010, row: 0.0005 };
    Swarm {
        stations: (0..nodes).map(node).chain([head]).collect(),
        link: (0.0003, 0.001),
        sessions,
        pause: |_| 0.0,
        end: |_| f64::INFINITY,
        gathers: true,
    }
}

#[test]
fn groups_stay_together_where_hops_share_a_machine() {
    for nodes in 1..=3 {
        let one = swarm(nodes, true, 1).run(10.0);
        let before = Swarm { gathers: false, ..swarm(nodes, true, 8) }.run(10.0);
        let after = swarm(nodes, true, 8).run(10.0);
        assert!(after.rows_per_pass.iter().all(|rows| *rows > 7.0), "{nodes} nodes: {after:?}");
        assert!(after.tokens_per_second > 1.4 * before.tokens_per_second, "{nodes} nodes: {before:?}, {after:?}");
        assert!(after.tokens_per_second > 4.0 * one.tokens_per_second, "{nodes} nodes: {one:?}, {after:?}");
    }
}

#[test]
fn several_groups_keep_several_machines_busy() {
    for (nodes, at_least) in [(1, 1.1), (2, 0.98), (3, 0.98)] {
        let before = Swarm { gathers: false, ..swarm(nodes, false, 8) }.run(30.0);
        let after = swarm(nodes, false, 8).run(30.0);
        assert!(after.tokens_per_second > at_least * before.tokens_per_second, "{nodes} nodes: {before:?}, {after:?}");
    }
}

#[test]
fn a_session_that_is_alone_never_waits() {
    for is_one_machine in [true, false] {
        let outcome = swarm(2, is_one_machine, 1).run(5.0);
        assert!(outcome.waited.abs() < 1e-6, "{outcome:?}");
        // Nor does one whose company has gone.
        let left = Swarm { end: |session| if session > 0 { 1.0 } else { 20.0 }, ..swarm(2, is_one_machine, 8) };
        let all = left.run(60.0);
        let beginning = left.run(1.5);
        assert!(all.waited * 20.0 < beginning.waited * 1.5 + 0.3, "{beginning:?}, {all:?}");
    }
}

#[test]
fn whoever_goes_round_at_a_speed_of_its_own_is_hardly_waited_for() {
    let pauses: [fn(u64) -> f64; 4] =
        [|_| 0.02, |_| 0.3, |session| 0.3 * (session % 2) as f64, |session| 2.0 * (session % 8 / 7) as f64];
    for (number, pause) in pauses.into_iter().enumerate() {
        for (nodes, is_one_machine, sessions) in
            (1..=3).flat_map(|n| [(n, true, 2), (n, true, 8), (n, false, 2), (n, false, 8)])
        {
            let run = |gathers| Swarm { gathers, pause, ..swarm(nodes, is_one_machine, sessions) }.run(30.0);
            let (before, after) = (run(false), run(true));
            assert!(after.waited < 0.125, "{number}, {nodes} nodes: {before:?}, {after:?}");
            assert!(
                after.tokens_per_second > 0.92 * before.tokens_per_second,
                "{number}, {nodes} nodes: {before:?}, {after:?}"
            );
        }
    }
}

/// A first hop where passes of 20 ms took `slowness` times as long while others were away; all sessions were in the last one, which
/// ended at `ended`.
fn first_hop(sessions: u64, slowness: f64, ended: Instant) -> Gather {
    let mut gather = Gather::new(Meeting::FirstHop);
    go_round(&mut gather, sessions, slowness, ended);
    gather
}

fn go_round(gather: &mut Gather, sessions: u64, slowness: f64, ended: Instant) {
    let processor = Duration::from_millis(20);
    for round in (0..20).rev() {
        let now = ended - Duration::from_millis(90) * round;
        let here = if (1..19).contains(&round) { 0..1 } else { 0..sessions };
        gather.came(0, true, now - processor);
        gather.begins(1, now - processor);
        gather.ran(1, Took { time: processor.mul_f64(slowness), processor }, now);
        here.for_each(|session| gather.stepped(Here { session, rows: 1, arrived: now }, true, now));
    }
}

#[test]
fn a_wait_that_comes_to_nothing_costs_no_more_than_it_took() {
    let mut ended = Instant::now() + Duration::from_secs(10);
    let mut gather = first_hop(4, 2.0, ended);
    for _ in 0..2 {
        let arrived = ended + Duration::from_millis(80);
        gather.came(0, true, arrived);
        gather.wait(&[Here { session: 0, rows: 1, arrived }], LIMIT, arrived).unwrap();
        assert!(gather.waiting.is_some_and(|waiting| waiting.forms));
        // A client closes all its sessions; others come an hour later.
        (0..4).for_each(|session| gather.forget(session));
        gather.gives_up(arrived + Duration::from_millis(10));
        ended += Duration::from_secs(3600);
        go_round(&mut gather, 4, 2.0, ended);
    }
}

#[test]
fn a_wait_ends_when_all_are_here_or_its_time_is_up() {
    let ended = Instant::now() + Duration::from_secs(10);
    let at = |ms: u64| ended + Duration::from_millis(ms);
    let here = |sessions: std::ops::Range<u64>, ms: u64| -> Vec<Here> {
        sessions.map(|session| Here { session, rows: 1, arrived: at(ms) }).collect()
    };
    let mut gather = first_hop(4, 2.0, ended);
    gather.came(0, true, at(80));
    let until = gather.wait(&here(0..1, 80), LIMIT, at(80)).unwrap();
    assert!(until > at(80) && until <= at(180), "{:?}", until - ended);
    // Never longer than the limit, whoever is still away.
    assert_eq!(gather.wait(&here(0..1, 80), LIMIT, at(181)), None);
    for session in 1..4 {
        gather.came(session, true, at(90));
    }
    assert_eq!(gather.wait(&here(0..4, 80), LIMIT, at(90)), None);
    // On a machine of its own, the first hop leaves groups as they are.
    let mut gather = first_hop(4, 1.0, ended);
    gather.came(0, true, at(80));
    assert_eq!(gather.wait(&here(0..1, 80), LIMIT, at(80)), None);
    // Closed sessions aren't expected.
    let mut gather = first_hop(4, 2.0, ended);
    gather.came(0, true, at(80));
    (1..4).for_each(|session| gather.forget(session));
    assert_eq!(gather.wait(&here(0..1, 80), LIMIT, at(80)), None);
}

#[test]
fn passes_that_are_short_or_large_wait_for_nobody() {
    let ended = Instant::now() + Duration::from_secs(10);
    let now = ended + Duration::from_millis(80);
    let mut gather = first_hop(4, 2.0, ended);
    gather.came(0, true, now);
    let here = |rows| [Here { session: 0, rows, arrived: now }];
    assert!(gather.wait(&here(1), LIMIT, now).is_some());
    assert_eq!(gather.wait(&here(MOST_ROWS), LIMIT, now), None);
    let short = Duration::from_micros(300);
    (0..20).for_each(|_| gather.ran(1, Took { time: short, processor: short }, ended));
    assert_eq!(gather.wait(&here(1), LIMIT, now), None);
}

#[test]
fn a_session_that_had_a_step_is_expected_until_it_comes_or_ends_or_is_late() {
    let mut gather = Gather::new(Meeting::LaterHop);
    let now = Instant::now();
    assert!(!gather.expects_more(now));
    let step = |session| Here { session, rows: 1, arrived: now };
    gather.stepped(step(1), false, now);
    assert!(gather.expects_more(now));
    gather.came(1, false, now);
    assert!(!gather.expects_more(now));
    gather.stepped(step(2), true, now + NEXT_TOKEN);
    assert!(gather.expects_more(now + NEXT_TOKEN));
    assert!(!gather.expects_more(now + 2 * NEXT_TOKEN));
    gather.forget(2);
    assert!(!gather.expects_more(now + NEXT_TOKEN));
}
