//! The thread pool: its size can be set, and a forked process, which has none of its parent's threads, gets a new one.

use crate::error::Error;
use rayon::{ThreadPool, ThreadPoolBuilder};
use std::sync::{Arc, Mutex, PoisonError};

struct Pool {
    process: u32,
    threads: usize,
    pool: Arc<ThreadPool>,
}

static POOL: Mutex<Option<Pool>> = Mutex::new(None);

fn get(threads: Option<usize>) -> Result<Arc<ThreadPool>, Error> {
    let mut slot = POOL.lock().unwrap_or_else(PoisonError::into_inner);
    let process = std::process::id();
    let known = slot.as_ref().map(|pool| (pool.process, pool.threads));
    let wanted = threads.or(known.map(|(_, threads)| threads));
    if let Some(pool) = slot.as_ref()
        && known == Some((process, wanted.unwrap_or(pool.threads)))
    {
        return Ok(pool.pool.clone());
    }
    let pool = ThreadPoolBuilder::new()
        .num_threads(wanted.unwrap_or(0)) // 0: as many as there are cores, or RAYON_NUM_THREADS
        .thread_name(|i| format!("flashattn-{i}"))
        .build()
        .map_err(|error| Error::Value(format!("threads cannot be started: {error}")))?;
    let (threads, pool) = (pool.current_num_threads(), Arc::new(pool));
    let old = slot.replace(Pool { process, threads, pool: pool.clone() });
    if let Some(old) = old
        && old.process != process
    {
        // Its threads are the parent's: nobody here would answer when it waits for them.
        std::mem::forget(old);
    }
    Ok(pool)
}

/// Runs `f` in the pool.
pub fn run<R: Send>(f: impl FnOnce() -> R + Send) -> Result<R, Error> {
    Ok(get(None)?.install(f))
}

/// Threads of the pool.
pub fn count() -> Result<usize, Error> {
    Ok(get(None)?.current_num_threads())
}

/// Makes the pool this large, from the next call on.
pub fn set(threads: usize) -> Result<(), Error> {
    if threads == 0 {
        return Err(Error::Value("num_threads is 0, expected at least 1".into()));
    }
    get(Some(threads)).map(drop)
}
