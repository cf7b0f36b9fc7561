//! Pools of threads.

use std::io;

use rayon::{ThreadPool, ThreadPoolBuilder};

use super::load::LoadError;

/// More threads than this nobody wants: the memory bus is the limit long before, and each takes memory.
pub const MAX_THREADS: usize = 1024;

/// A pool of `count` threads, or of one a core, named after their `role`.
pub(super) fn pool(role: &'static str, count: Option<usize>) -> Result<ThreadPool, LoadError> {
    let mut builder = ThreadPoolBuilder::new().thread_name(move |index| format!("{role}-{index}"));
    if let Some(count) = count {
        if !(1..=MAX_THREADS).contains(&count) {
            return Err(LoadError::ThreadCount { count });
        }
        builder = builder.num_threads(count);
    }
    builder.build().map_err(|error| LoadError::Threads(io::Error::other(error)))
}
