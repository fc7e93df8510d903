//! A bounded number of staging buffers.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::device_cache::Patience;
use crate::error::{CudaError, Result};
use crate::raw::{InFlight, Progress, Staging};

/// Buffers that copies left behind are looked for this often while somebody waits.
const RECLAIM_EVERY: Duration = Duration::from_millis(1);

/// The buffers of one cache. There are never more than were put in.
#[derive(Debug)]
pub(crate) struct Pool {
    state: Mutex<State>,
    returned: Condvar,
    buffer_bytes: usize,
}

#[derive(Debug)]
struct State {
    free: Vec<Staging>,
    /// Buffers of copies for which nobody waits any more.
    left_behind: Vec<InFlight>,
}

impl Pool {
    pub(crate) fn new(free: Vec<Staging>, buffer_bytes: usize) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                free,
                left_behind: Vec::new(),
            }),
            returned: Condvar::new(),
            buffer_bytes,
        })
    }

    /// Bytes of each buffer.
    pub(crate) fn buffer_bytes(&self) -> usize {
        self.buffer_bytes
    }

    /// A buffer for the caller alone; waits for one.
    pub(crate) fn take(self: &Arc<Self>, patience: &Patience<'_>) -> Result<Lease> {
        let mut state = self.lock();
        loop {
            state.reclaim()?;
            if let Some(staging) = state.free.pop() {
                return Ok(Lease {
                    staging: Some(staging),
                    pool: Arc::clone(self),
                });
            }
            patience.check("a staging buffer")?;
            state = self
                .returned
                .wait_timeout(state, RECLAIM_EVERY)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// A lease for a buffer that comes back from the device.
    pub(crate) fn lease(self: &Arc<Self>, staging: Staging) -> Lease {
        Lease {
            staging: Some(staging),
            pool: Arc::clone(self),
        }
    }

    /// Keeps the buffer of a copy until it has ended by itself.
    pub(crate) fn leave_behind(&self, copy: InFlight) {
        self.lock().left_behind.push(copy);
    }

    /// Waits for the copies that were left behind; `false`: not all of them ended.
    pub(crate) fn drain(&self, deadline: Instant) -> bool {
        let mut state = self.lock();
        loop {
            let lost = state.reclaim().is_err();
            if state.left_behind.is_empty() {
                return !lost;
            }
            if Instant::now() >= deadline {
                // Dropping them gives their buffers up, which is the safe thing.
                return false;
            }
            std::thread::sleep(RECLAIM_EVERY);
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Valid between any two statements.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn reclaim(&mut self) -> Result<()> {
        let mut lost: Option<CudaError> = None;
        for copy in std::mem::take(&mut self.left_behind) {
            match copy.poll() {
                Progress::Running(copy) => self.left_behind.push(copy),
                Progress::Ended { staging, .. } => self.free.push(staging),
                Progress::Lost(error) => lost = Some(error),
            }
        }
        lost.map_or(Ok(()), Err)
    }
}

/// Pinned host memory that goes back to its cache when it is dropped. As many bytes as a block has, rounded up to whole
/// pages.
#[derive(Debug)]
pub struct Lease {
    /// There until the copy engine takes it out.
    staging: Option<Staging>,
    pool: Arc<Pool>,
}

impl Lease {
    /// The buffer without the duty to give it back.
    pub(crate) fn into_staging(mut self) -> Option<Staging> {
        self.staging.take()
    }
}

impl std::ops::Deref for Lease {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.staging.as_deref().unwrap_or_default()
    }
}

impl std::ops::DerefMut for Lease {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.staging.as_deref_mut().unwrap_or_default()
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        if let Some(staging) = self.staging.take() {
            self.pool.lock().free.push(staging);
            self.pool.returned.notify_one();
        }
    }
}
