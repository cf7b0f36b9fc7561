use std::sync::{
    Mutex,
    atomic::AtomicBool,
    mpsc::{self, Receiver},
};

use candle_core::Error as TensorError;

use super::*;
use crate::{
    engine::{pass::PagePlace, schedule::Meeting, snapshot::TransferError},
    model::Dtype,
};

const PATIENCE: Duration = Duration::from_secs(60);

/// Of a pass: long enough that a step comes in time on a busy machine, too.
const TIME: Duration = Duration::from_millis(20);

/// Takes its time, and computes nothing.
struct Slow {
    /// Steps of each pass.
    passes: Arc<Mutex<Vec<usize>>>,
    states: Vec<f32>,
}

impl Pass for Slow {
    fn run(&mut self, segments: &[Segment<'_>]) -> Result<Vec<Outcome>, TensorError> {
        let began = Instant::now();
        self.passes.lock().unwrap().push(segments.len());
        while began.elapsed() < TIME {
            std::hint::spin_loop();
        }
        let rows = segments.iter().map(Segment::rows).sum();
        self.states = vec![0.0; rows];
        let place = |end: &mut usize, segment: &Segment<'_>| {
            let start = *end;
            *end += segment.rows();
            Some(Ok(start..*end))
        };
        Ok(segments.iter().scan(0, place).collect())
    }

    fn states(&self, place: std::ops::Range<usize>) -> &[f32] {
        &self.states[place]
    }

    fn read_page(&self, _: PagePlace, _: &mut Vec<u8>) -> Result<(), TransferError> {
        Ok(())
    }

    fn write_page(&mut self, _: PagePlace, _: &[u8]) -> Result<(), TransferError> {
        Ok(())
    }

    fn is_on_processor(&self) -> bool {
        false
    }
}

type Answer = (Cache, Result<StepOutput, StepError>);

fn submit(desk: &Desk, cache: Cache, position: usize) -> Receiver<Answer> {
    let (answer, answers) = mpsc::sync_channel(1);
    let job = Job {
        cache,
        lanes: vec![LaneRun { lane: 0, position, tokens: 1 }],
        hidden: HiddenStates::from_f32(Dtype::F32, 1, &[0.0]),
        rope_length: None,
        keep: Keep::All,
        deadline: Instant::now() + PATIENCE,
        cancelled: Arc::default(),
        done: Box::new(move |cache, result| answer.send((cache, result)).unwrap()),
    };
    let mut state = desk.lock();
    state.enter(job.cache.owner, 100).unwrap();
    state.arrivals.push_back(Pending { job, submitted: Instant::now(), starved: false });
    drop(state);
    desk.notify();
    answers
}

/// Steps of each pass while sessions decode `tokens` tokens, and come back one right after another.
fn passes(meeting: Meeting, sessions: usize, tokens: usize) -> Vec<usize> {
    let desk = Arc::new(Desk::new(64, 0, meeting));
    let passes = Arc::default();
    let batcher = Batcher::new(desk.clone(), Box::new(Slow { passes: Arc::clone(&passes), states: Vec::new() }), 512);
    let thread = std::thread::spawn(move || batcher.run());
    let mut caches: Vec<Cache> = (0..sessions).map(|_| Cache::new(desk.clone(), 0..1)).collect();
    for position in 0..tokens {
        let answers: Vec<_> = caches.drain(..).map(|cache| submit(&desk, cache, position)).collect();
        caches.extend(answers.iter().map(|answers| {
            let (cache, result) = answers.recv_timeout(PATIENCE).unwrap();
            result.unwrap();
            cache
        }));
    }
    desk.lock().closed = true;
    desk.notify();
    thread.join().unwrap();
    std::mem::take(&mut *passes.lock().unwrap())
}

#[test]
fn sessions_that_come_back_one_after_another_share_a_pass() {
    for meeting in [Meeting::FirstHop, Meeting::LaterHop] {
        let passes = passes(meeting, 4, 20);
        assert_eq!(passes.iter().sum::<usize>(), 4 * 20);
        // One a token, but for the first ones and where the machine was busy; without waiting there are two.
        assert!(passes.len() <= 30, "{meeting:?}: {passes:?}");
    }
    assert_eq!(passes(Meeting::FirstHop, 1, 5), [1; 5]);
}

/// Does the batcher's work on this thread until all of these are answered.
fn answered(batcher: &mut Batcher, answers: &[Receiver<Answer>]) -> Vec<Cache> {
    let mut caches: Vec<Option<Cache>> = answers.iter().map(|_| None).collect();
    while caches.iter().any(Option::is_none) {
        assert!(batcher.fetch());
        batcher.turn();
        for (cache, answers) in caches.iter_mut().zip(answers) {
            if let Ok((answered, result)) = answers.try_recv() {
                result.unwrap();
                *cache = Some(answered);
            }
        }
    }
    caches.into_iter().flatten().collect()
}

#[test]
fn a_wait_for_company_counts_whatever_ends_it() {
    let desk = Arc::new(Desk::new(64, 0, Meeting::FirstHop));
    let slow = Slow { passes: Arc::default(), states: Vec::new() };
    let mut batcher = Batcher::new(desk.clone(), Box::new(slow), 512);
    let mut caches: Vec<Cache> = (0..2).map(|_| Cache::new(desk.clone(), 0..1)).collect();
    // Whether it waits at all depends on how quick this machine is.
    for turn in 0..50 {
        for position in 3 * turn..3 * turn + 2 {
            let answers: Vec<_> = caches.drain(..).map(|cache| submit(&desk, cache, position)).collect();
            caches = answered(&mut batcher, &answers);
        }
        let (late, early) = (caches.pop().unwrap(), caches.pop().unwrap());
        let moved = Transfer::Read { snapshot: Arc::new(late.snapshot()), pieces: 0..0, done: Box::new(|_| {}) };
        let came = Instant::now();
        let first = submit(&desk, early, 3 * turn + 2);
        let is_over = AtomicBool::new(false);
        let waited = std::thread::scope(|scope| {
            scope.spawn(|| {
                // The step has been taken in, and the batcher has begun to wait, if it waits: it holds the lock all the while.
                while !desk.lock().arrivals.is_empty() {
                    std::thread::yield_now();
                }
                let taken = Instant::now();
                while taken.elapsed() < Duration::from_micros(500) {
                    std::hint::spin_loop();
                }
                let mut state = desk.lock();
                if !is_over.load(Ordering::Relaxed) {
                    state.transfers.push_back(moved);
                    drop(state);
                    desk.notify();
                }
            });
            assert!(batcher.fetch());
            is_over.store(true, Ordering::Relaxed);
            !desk.lock().transfers.is_empty() && batcher.schedule.was_in_the_way(came)
        });
        if waited {
            return;
        }
        caches = answered(&mut batcher, &[first]);
        let second = submit(&desk, late, 3 * turn + 2);
        caches.extend(answered(&mut batcher, &[second]));
    }
    panic!("no wait that a transfer ended was noted");
}
