//! Everything that the driver's functions find by number, and what was done wrong.

use std::cell::RefCell;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::memory::Memory;
use crate::settings::Settings;
use crate::streams::{Event, Pending, Stream};

pub(crate) const SUCCESS: u32 = 0;
pub(crate) const INVALID_VALUE: u32 = 1;
pub(crate) const OUT_OF_MEMORY: u32 = 2;
pub(crate) const NOT_INITIALIZED: u32 = 3;
pub(crate) const INVALID_DEVICE: u32 = 101;
pub(crate) const INVALID_CONTEXT: u32 = 201;
pub(crate) const INVALID_HANDLE: u32 = 400;
pub(crate) const NOT_FOUND: u32 = 500;
pub(crate) const NOT_READY: u32 = 600;
pub(crate) const ILLEGAL_ADDRESS: u32 = 700;
pub(crate) const CAPTURE_UNSUPPORTED: u32 = 900;
pub(crate) const CAPTURE_INVALIDATED: u32 = 901;

/// The state of the stand-in; one for each process.
pub(crate) struct World {
    pub(crate) settings: Settings,
    pub(crate) streams: Mutex<HashMap<usize, Arc<Stream>>>,
    pub(crate) events: Mutex<HashMap<usize, Arc<Event>>>,
    pub(crate) pending: Mutex<Pending>,
    /// Streams of which a graph is captured, and whether it is whole so far.
    pub(crate) captures: Mutex<HashMap<usize, bool>>,
    /// How often each device's context was retained.
    pub(crate) retained: Vec<AtomicUsize>,
    pub(crate) delay_most_us: AtomicU64,
    pub(crate) is_initialized: AtomicU32,
    memory: RwLock<Memory>,
    failing: Mutex<HashMap<String, (u64, u32)>>,
    calls: Mutex<HashMap<&'static str, u64>>,
    violations: Mutex<Vec<String>>,
    /// The error that a device ran into, which stays.
    lost: AtomicU32,
    next: AtomicUsize,
}

impl World {
    /// The one of this process.
    pub(crate) fn get() -> &'static Self {
        static WORLD: OnceLock<World> = OnceLock::new();
        WORLD.get_or_init(|| {
            let settings = Settings::from_environment();
            Self {
                streams: Mutex::default(),
                events: Mutex::default(),
                pending: Mutex::default(),
                captures: Mutex::default(),
                retained: (0..settings.device_count).map(|_| AtomicUsize::new(0)).collect(),
                delay_most_us: AtomicU64::new(settings.delay_most.as_micros() as u64),
                is_initialized: AtomicU32::new(0),
                memory: RwLock::default(),
                failing: Mutex::new(settings.failing.clone()),
                calls: Mutex::default(),
                violations: Mutex::default(),
                lost: AtomicU32::new(SUCCESS),
                next: AtomicUsize::new(0),
                settings,
            }
        })
    }

    pub(crate) fn number(&self) -> usize {
        // Small numbers stand for default streams.
        self.next.fetch_add(1, Ordering::Relaxed) + 0x100
    }

    pub(crate) fn memory(&self) -> RwLockReadGuard<'_, Memory> {
        self.memory.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn memory_mut(&self) -> RwLockWriteGuard<'_, Memory> {
        self.memory.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// A stream by its handle; the small numbers are one.
    pub(crate) fn stream(&self, handle: usize) -> Option<Arc<Stream>> {
        let number = if handle <= 2 { 0 } else { handle };
        let mut streams = lock(&self.streams);
        if number == 0 && !streams.contains_key(&0) {
            streams.insert(0, Stream::start(0));
        }
        streams.get(&number).cloned()
    }

    pub(crate) fn event(&self, handle: usize) -> Option<Arc<Event>> {
        lock(&self.events).get(&handle).cloned()
    }

    /// Counts misuse and tells it; returns `code`.
    pub(crate) fn violated(&self, what: &str, code: u32) -> u32 {
        eprintln!("kvlane CUDA stand-in: misuse: {what}");
        lock(&self.violations).push(what.to_owned());
        code
    }

    /// Misuse that a device finds while it works.
    pub(crate) fn lose(&self, what: &str) {
        self.violated(what, ILLEGAL_ADDRESS);
        self.lost.store(ILLEGAL_ADDRESS, Ordering::SeqCst);
    }

    pub(crate) fn violations(&self) -> Vec<String> {
        lock(&self.violations).clone()
    }

    pub(crate) fn call_count(&self, call: &str) -> u64 {
        lock(&self.calls).get(call).copied().unwrap_or_default()
    }

    /// From now on `call` fails with `code`, after it has worked `after` more times; code 0 mends it.
    pub(crate) fn fail(&self, call: &str, after: u64, code: u32) {
        let mut failing = lock(&self.failing);
        if code == SUCCESS {
            failing.remove(call);
        } else {
            failing.insert(call.to_owned(), (after, code));
        }
    }

    /// Counts a call, and says whether it shall fail.
    pub(crate) fn begin(&self, call: &'static str) -> Result<(), u32> {
        *lock(&self.calls).entry(call).or_default() += 1;
        match lock(&self.failing).get_mut(call) {
            Some((0, code)) => return Err(*code),
            Some((after, _)) => *after -= 1,
            None => {}
        }
        if self.is_initialized.load(Ordering::SeqCst) == 0 {
            return Err(self.violated(&format!("{call} before cuInit"), NOT_INITIALIZED));
        }
        Ok(())
    }

    /// As [`begin`](Self::begin), for a call that needs a context.
    pub(crate) fn begin_on_device(&self, call: &'static str) -> Result<usize, u32> {
        self.begin(call)?;
        let Some(device) = CURRENT.with_borrow(|current| current.last().copied()) else {
            return Err(self.violated(&format!("{call} without a current context"), INVALID_CONTEXT));
        };
        if self.retained[device].load(Ordering::SeqCst) == 0 {
            let what = format!("{call} in a context that was released");
            return Err(self.violated(&what, INVALID_CONTEXT));
        }
        match self.lost.load(Ordering::SeqCst) {
            SUCCESS => Ok(device),
            code => Err(code),
        }
    }
}

thread_local! {
    /// The devices whose contexts are current; the last one counts.
    pub(crate) static CURRENT: RefCell<Vec<usize>> = const { RefCell::new(Vec::new()) };
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
