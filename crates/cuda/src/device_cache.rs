//! A paged KV cache on a CUDA device.

use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use kvlane_core::{BlockMap, PagedMemory};

use crate::error::{CudaError, Result};
use crate::pool::{Lease, Pool};
use crate::raw::{DeviceMemory, DeviceTensors, Direction, Event, InFlight, Progress, StreamHandle};
use crate::spans::RunPart;

/// Buffers start and end on whole pages, for direct I/O.
const PAGE_BYTES: usize = 4096;

/// First and longest sleep between two looks at an event. A block of some MiB takes 100 us on a PCIe bus.
const POLL_FIRST: Duration = Duration::from_micros(10);
const POLL_LONGEST: Duration = Duration::from_micros(200);

/// How long dropping a cache waits for copies that nobody waited for.
const DROP_PATIENCE: Duration = Duration::from_secs(1);

/// How long a caller is willing to wait.
#[derive(Clone, Copy)]
pub struct Patience<'a> {
    /// Until then.
    pub deadline: Instant,
    /// Asked while waiting: `true` ends the wait at once.
    pub cancelled: &'a dyn Fn() -> bool,
}

impl Mark {
    /// Whether the stream has come to this point. Does not wait; from whatever thread.
    ///
    /// # Errors
    /// The device is lost, so nobody will ever know.
    pub fn is_over(&self) -> Result<bool> {
        self.0.is_over()
    }
}

impl Patience<'_> {
    pub(crate) fn check(&self, what: &'static str) -> Result<()> {
        if (self.cancelled)() {
            return Err(CudaError::Cancelled { what });
        }
        if Instant::now() >= self.deadline {
            return Err(CudaError::TimedOut { what });
        }
        Ok(())
    }
}

impl std::fmt::Debug for Patience<'_> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_tuple("Patience").field(&self.deadline).finish()
    }
}

/// A point in a stream of the embedding program.
#[derive(Clone, Debug)]
pub struct Mark(Arc<Event>);

/// A paged KV cache whose regions are memory of one CUDA device.
///
/// A method that names a block or a layer that the map does not have panics.
#[derive(Debug)]
pub struct DeviceCache {
    memory: Arc<DeviceMemory>,
    pool: Arc<Pool>,
    /// Why the device was lost.
    lost: OnceLock<CudaError>,
    /// How many there are of it.
    communicators: Arc<AtomicUsize>,
}

impl DeviceCache {
    /// Opens the device of `tensors`, all of which must be on one. `buffer_count` staging buffers of one block each are
    /// pinned now: not later, because pinning stalls the device, and not more, so that the host's memory is bounded.
    ///
    /// # Errors
    /// No driver, no such device, no memory, or tensors that are elsewhere.
    pub fn open(tensors: DeviceTensors, buffer_count: usize) -> Result<Self> {
        let buffer_count = buffer_count.max(1);
        let memory = DeviceMemory::open(tensors, buffer_count)?;
        let buffer_bytes = memory.map().block_bytes().next_multiple_of(PAGE_BYTES);
        let buffers = (0..buffer_count)
            .map(|_| memory.device().allocate(buffer_bytes))
            .collect::<Result<Vec<_>>>()?;
        Ok(Self {
            memory,
            pool: Pool::new(buffers, buffer_bytes),
            lost: OnceLock::new(),
            communicators: Arc::default(),
        })
    }

    /// The layout of this cache.
    pub fn map(&self) -> &BlockMap {
        self.memory.map()
    }

    /// Bytes of a staging buffer: a block's, rounded up to whole pages.
    pub fn buffer_bytes(&self) -> usize {
        self.pool.buffer_bytes()
    }

    /// Every copy *out of* the cache that starts from now on runs after what is on `stream` now. Does not wait.
    ///
    /// Call it when a store's bytes may be read: the step that writes them may not have run yet.
    pub fn order_stores_after(&self, stream: StreamHandle) -> Result<()> {
        self.check()?;
        let device = self.memory.device();
        device.order_out_after(&device.mark(stream)?)
    }

    /// What is on `stream` now, for [`copy_block_in`](Self::copy_block_in) to come after. Does not wait.
    ///
    /// Take it when a load starts: freed blocks may still be written by a step that is running. Each load has a mark of
    /// its own and the copy stream waits for none, since on a busy server there is always a later step to wait for.
    pub fn mark(&self, stream: StreamHandle) -> Result<Mark> {
        self.check()?;
        Ok(Mark(Arc::new(self.memory.device().mark(stream)?)))
    }

    /// A buffer to fill for [`copy_block_in`](Self::copy_block_in). Waits for one. Who fills it with non-temporal stores
    /// puts a store fence behind them.
    pub fn staging(&self, patience: &Patience<'_>) -> Result<Lease> {
        self.check()?;
        self.latched(self.pool.take(patience))
    }

    /// One block of `layers`, one layer after the other, in a buffer. An error: nobody will touch a buffer of the caller.
    pub fn copy_block_out(&self, block: u32, layers: &[usize], patience: &Patience<'_>) -> Result<Lease> {
        let lease = self.staging(patience)?;
        patience.check("the start of a copy")?;
        let Some(staging) = lease.into_staging() else {
            return Err(CudaError::Cancelled { what: "a buffer" });
        };
        let copy = self.memory.start(Direction::Out, block, layers, staging);
        self.finish(copy, Some(patience))
    }

    /// Copies one block of `layers`, which lie one after the other in `staging`, into the cache.
    ///
    /// When this returns, nothing of it can reach the cache any more: bytes that are on their way are waited for, however
    /// long that takes. So that it does not take long, the copies are started only once what `after` marks is over;
    /// `patience` ends before that, and then the cache is untouched. Any other error: the part of the block holds undefined
    /// bytes.
    pub fn copy_block_in(
        &self,
        block: u32,
        layers: &[usize],
        staging: Lease,
        after: Option<&Mark>,
        patience: &Patience<'_>,
    ) -> Result<()> {
        self.check()?;
        patience.check("the start of a copy")?;
        if let Some(mark) = after {
            self.wait_for(mark, patience)?;
        }
        let Some(staging) = staging.into_staging() else {
            return Err(CudaError::Cancelled { what: "a buffer" });
        };
        let copy = self.memory.start(Direction::In, block, layers, staging);
        self.finish(copy, None).map(drop)
    }

    /// Parts of runs, one after the other in a buffer, which has room for as many as [`buffer_bytes`](Self::buffer_bytes). An
    /// error: nobody will touch a buffer of the caller.
    pub fn gather(&self, parts: &[RunPart], patience: &Patience<'_>) -> Result<Lease> {
        let lease = self.staging(patience)?;
        patience.check("the start of a copy")?;
        let Some(staging) = lease.into_staging() else {
            return Err(CudaError::Cancelled { what: "a buffer" });
        };
        let copy = self.memory.start_parts(Direction::Out, parts, staging);
        self.finish(copy, Some(patience))
    }

    /// Copies what lies in `staging`, one after the other, into parts of runs, and gives the buffer back.
    ///
    /// When this returns, nothing of it can reach the cache any more, as with [`copy_block_in`](Self::copy_block_in).
    pub fn scatter(&self, parts: &[RunPart], staging: Lease, patience: &Patience<'_>) -> Result<Lease> {
        self.check()?;
        patience.check("the start of a copy")?;
        let Some(staging) = staging.into_staging() else {
            return Err(CudaError::Cancelled { what: "a buffer" });
        };
        let copy = self.memory.start_parts(Direction::In, parts, staging);
        self.finish(copy, None)
    }

    /// Copies one block of one layer out, now.
    pub fn read(&self, layer: usize, block: u32, data: &mut [u8], patience: &Patience<'_>) -> Result<()> {
        let bytes = self.copy_block_out(block, &[layer], patience)?;
        data.copy_from_slice(&bytes[..data.len()]);
        Ok(())
    }

    /// Copies one block of one layer in, now.
    pub fn write(&self, layer: usize, block: u32, data: &[u8], patience: &Patience<'_>) -> Result<()> {
        let mut staging = self.staging(patience)?;
        staging[..data.len()].copy_from_slice(data);
        self.copy_block_in(block, &[layer], staging, None, patience)
    }

    /// Waits for the end of copies, or only as long as the caller has patience.
    fn finish(&self, started: Progress, patience: Option<&Patience<'_>>) -> Result<Lease> {
        let mut progress = started;
        let mut pause = Pause::default();
        loop {
            let copy: InFlight = match progress {
                Progress::Running(copy) => copy,
                Progress::Ended { staging, result } => {
                    let lease = self.pool.lease(staging);
                    return result.map(|()| lease);
                }
                Progress::Lost(error) => return self.latched(Err(error)),
            };
            if let Some(Err(error)) = patience.map(|patience| patience.check("a copy from the device")) {
                self.pool.leave_behind(copy);
                return Err(error);
            }
            pause.sleep();
            progress = copy.poll();
        }
    }

    fn wait_for(&self, mark: &Mark, patience: &Patience<'_>) -> Result<()> {
        let mut pause = Pause::default();
        while !self.latched(mark.0.is_over())? {
            patience.check("the compute stream")?;
            pause.sleep();
        }
        Ok(())
    }

    fn check(&self) -> Result<()> {
        self.lost.get().map_or(Ok(()), |error| Err(error.clone()))
    }

    /// Remembers an error that the driver gave while something was on its way: such errors stay with a context.
    fn latched<T>(&self, result: Result<T>) -> Result<T> {
        if let Err(error @ CudaError::Driver { .. }) = &result
            && self.lost.set(error.clone()).is_ok()
        {
            tracing::error!(%error, "the CUDA device is lost for KV transfer");
        }
        result
    }
}

impl Drop for DeviceCache {
    fn drop(&mut self) {
        let deadline = Instant::now() + DROP_PATIENCE;
        if !self.pool.drain(deadline) {
            tracing::warn!("copies from a CUDA device do not end; their buffers are given up");
        }
    }
}

/// For tests and tools: no backend calls it. Each call is a copy of its own, in some ten microseconds.
///
/// # Panics
/// If the device fails, since the trait has no errors. [`DeviceCache::read`] and [`DeviceCache::write`] have.
impl PagedMemory for DeviceCache {
    fn map(&self) -> &BlockMap {
        self.memory.map()
    }

    fn read_layer(&self, region: usize, block: u32, data: &mut [u8]) {
        assert_eq!(data.len(), self.map().layer_bytes(region), "length of the data");
        let done = self.read(region, block, data, &long());
        done.unwrap_or_else(|error| panic!("cannot read a block from the device: {error}"));
    }

    fn write_layer(&self, region: usize, block: u32, data: &[u8]) {
        assert_eq!(data.len(), self.map().layer_bytes(region), "length of the data");
        let done = self.write(region, block, data, &long());
        done.unwrap_or_else(|error| panic!("cannot write a block to the device: {error}"));
    }
}

fn long() -> Patience<'static> {
    Patience {
        deadline: Instant::now() + Duration::from_secs(60),
        cancelled: &|| false,
    }
}

/// Sleeps that grow, so that short copies are noticed early and long waits cost nothing.
#[derive(Default)]
pub(crate) struct Pause {
    next: Option<Duration>,
}

impl Pause {
    pub(crate) fn sleep(&mut self) {
        let pause = self.next.unwrap_or(POLL_FIRST);
        std::thread::sleep(pause);
        self.next = Some((pause * 2).min(POLL_LONGEST));
    }
}

mod peer;
#[cfg(test)]
mod tests;

pub use peer::{PeerCache, PeerCopyError, SharedCache};
