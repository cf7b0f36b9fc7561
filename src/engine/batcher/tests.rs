use std::sync::{
    Mutex,
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
