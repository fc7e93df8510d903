//! Everything that NCCL's functions find by number.

use std::collections::HashMap;
use std::net::TcpListener;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use crate::communicator::Communicator;
use crate::link::Token;
use crate::raw::Cuda;
use crate::settings::Settings;

pub(crate) const SUCCESS: u32 = 0;
pub(crate) const UNHANDLED_CUDA_ERROR: u32 = 1;
pub(crate) const SYSTEM_ERROR: u32 = 2;
pub(crate) const INVALID_ARGUMENT: u32 = 4;
pub(crate) const INVALID_USAGE: u32 = 5;
pub(crate) const REMOTE_ERROR: u32 = 6;
pub(crate) const IN_PROGRESS: u32 = 7;

/// The state of the stand-in; one for each process.
pub(crate) struct World {
    pub(crate) settings: Settings,
    pub(crate) cuda: Cuda,
    pub(crate) communicators: Mutex<HashMap<usize, Arc<Communicator>>>,
    /// Where rank 0 of a communicator waits for the other one.
    pub(crate) listeners: Mutex<HashMap<Token, TcpListener>>,
    failing: Mutex<HashMap<String, (u64, u32)>>,
    calls: Mutex<HashMap<&'static str, u64>>,
    next: AtomicUsize,
}

impl World {
    /// The one of this process.
    pub(crate) fn get() -> &'static Self {
        static WORLD: OnceLock<World> = OnceLock::new();
        WORLD.get_or_init(|| {
            let settings = Settings::from_environment();
            eprintln!("kvlane NCCL stand-in: no NCCL, all of it goes over sockets (settings: {settings:?})");
            Self {
                cuda: Cuda::find(),
                communicators: Mutex::default(),
                listeners: Mutex::default(),
                failing: Mutex::new(settings.failing.clone()),
                calls: Mutex::default(),
                next: AtomicUsize::new(0),
                settings,
            }
        })
    }

    pub(crate) fn number(&self) -> usize {
        self.next.fetch_add(1, Ordering::Relaxed) + 0x4e00
    }

    pub(crate) fn communicator(&self, handle: usize) -> Option<Arc<Communicator>> {
        lock(&self.communicators).get(&handle).cloned()
    }

    /// Tells misuse; returns `code`.
    pub(crate) fn violated(&self, what: &str, code: u32) -> u32 {
        self.cuda.violated(&format!("NCCL: {what}"));
        code
    }

    pub(crate) fn call_count(&self, call: &str) -> u64 {
        lock(&self.calls).get(call).copied().unwrap_or_default()
    }

    /// From now on `what` fails with `code`, after it has worked `after` more times; code 0 mends it.
    pub(crate) fn fail(&self, what: &str, after: u64, code: u32) {
        let mut failing = lock(&self.failing);
        if code == SUCCESS {
            failing.remove(what);
        } else {
            failing.insert(what.to_owned(), (after, code));
        }
    }

    /// The code with which something shall fail, this time.
    pub(crate) fn injected(&self, what: &str) -> Option<u32> {
        match lock(&self.failing).get_mut(what) {
            Some((0, code)) => Some(*code),
            Some((after, _)) => {
                *after -= 1;
                None
            }
            None => None,
        }
    }

    /// Counts a call, and says whether it shall fail.
    pub(crate) fn begin(&self, call: &'static str) -> Result<(), u32> {
        *lock(&self.calls).entry(call).or_default() += 1;
        self.injected(call).map_or(Ok(()), Err)
    }
}

/// A small generator: the same seed gives the same delays.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(number: usize) -> Self {
        Self(World::get().settings.seed ^ (number as u64) << 32 | 1)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }

    /// Sleeps for up to the longest delay, one time of `of`.
    pub(crate) fn dawdle(&mut self, of: u64) {
        let most_us = World::get().settings.delay_most.as_micros() as u64;
        if most_us > 0 && self.below(of) == 0 {
            std::thread::sleep(std::time::Duration::from_micros(self.below(most_us) + 1));
        }
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
