//! Pools of threads, and how they stay awake.

use std::{
    hint, io,
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use rayon::{ThreadPool, ThreadPoolBuilder, prelude::*};

/// More threads than this nobody wants: the memory bus is the limit long before, and each takes memory.
pub const MAX_THREADS: usize = 1024;

/// Why there are no threads to compute on.
#[derive(Debug, thiserror::Error)]
pub enum ThreadsError {
    /// So many there can't be.
    #[error("{count} threads were asked for: give a number from 1 to {}", MAX_THREADS)]
    Count {
        /// How many were asked for.
        count: usize,
    },
    /// None could be started.
    #[error("the engine's threads can't be started: {0}")]
    Start(io::Error),
}

/// A pool of `count` threads, or of one a core, named after their `role`.
pub(super) fn pool(role: &'static str, count: Option<usize>) -> Result<ThreadPool, ThreadsError> {
    let mut builder = ThreadPoolBuilder::new().thread_name(move |index| format!("{role}-{index}"));
    if let Some(count) = count {
        if !(1..=MAX_THREADS).contains(&count) {
            return Err(ThreadsError::Count { count });
        }
        builder = builder.num_threads(count);
    }
    builder.build().map_err(|error| ThreadsError::Start(io::Error::other(error)))
}

/// Rounds without work in which a thread that is kept awake spins before it lets others run: some 5 µs.
const SPINS: usize = 128;

/// Does `work` on a thread of a pool while the pool's other threads stay awake for the parts that they are to do.
///
/// Between two products, a thread would go to sleep, and be woken some 30 µs later than it is wanted: for each of a token's hundred
/// products. Awake threads take nothing from others, as they offer their core whenever they find no work.
pub(super) fn awake<R>(work: impl FnOnce() -> R) -> R {
    let Some(own) = rayon::current_thread_index() else { return work() };
    let is_over = AtomicBool::new(false);
    /// Ends the watch, also where the work panics.
    struct Ends<'a>(&'a AtomicBool);
    impl Drop for Ends<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Release);
        }
    }
    rayon::in_place_scope(|scope| {
        let ends = Ends(&is_over);
        for _ in 1..rayon::current_num_threads() {
            scope.spawn(|_| stay(own, &is_over));
        }
        let result = work();
        drop(ends);
        result
    })
}

/// Works for others until it is over. The thread that does the work itself may come here while it waits for a part, and has to
/// go back to it.
///
/// It offers its core and doesn't sleep, however long it finds nothing. Within a pass that is as long as another thread is alone at work
/// between two products, and a sleeper would be woken too late for the second of them. When the pass is over all threads sleep, so an
/// engine that has nothing to do takes no time, and during it whoever else wants the core gets it at once.
fn stay(working: usize, is_over: &AtomicBool) {
    let mut idle = 0;
    while rayon::current_thread_index() != Some(working) && !is_over.load(Ordering::Acquire) {
        if rayon::yield_now() == Some(rayon::Yield::Executed) {
            idle = 0;
        } else if idle < SPINS {
            idle += 1;
            hint::spin_loop();
        } else {
            thread::yield_now();
        }
    }
}

/// Does `work` with each of the tasks: on several threads where that is worth it, else one after the other.
pub(super) fn each<T: Send>(tasks: Vec<T>, is_worth_it: bool, work: impl Fn(T) + Sync + Send) {
    if is_worth_it && tasks.len() > 1 {
        tasks.into_par_iter().with_max_len(1).for_each(work);
    } else {
        tasks.into_iter().for_each(work);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_done_and_its_threads_go_home() {
        let pool = pool("test", Some(4)).unwrap();
        for _ in 0..200 {
            let sum = pool.install(|| {
                awake(|| {
                    let first: u64 = (0..1000u64).into_par_iter().sum();
                    first + (0..1000u64).into_par_iter().map(|number| number % 2).sum::<u64>()
                })
            });
            assert_eq!(sum, 499_500 + 500);
        }
        let work = || pool.install(|| awake(|| panic!("in the work")));
        let panics = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
        assert!(panics.is_err());
        assert_eq!(pool.install(|| awake(|| 7)), 7);
        assert_eq!(awake(|| 8), 8);
    }
}
