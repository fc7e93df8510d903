//! The filesystem backend behind the transfer trait.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam::channel::{Sender, unbounded};
use kvlane_core::{
    Availability, BlockKey, Completion, JobId, KvTransfer, LoadRequest, MissReason, NamespaceId, Outcome,
    StoreRequest,
};
use kvlane_cuda::{Mark, StreamHandle};

use crate::cache::Cache;
use crate::cold::ColdQueue;
use crate::counters::FsStats;
use crate::directory::{Directory, random_u64};
use crate::error::{FsError, Result};
use crate::index::LookupCursor;
use crate::jobs::{Job, lock};
use crate::lister::Lister;
use crate::load::LoadJob;
use crate::options::{FsOptions, RESERVATION_MAX};
use crate::segment::Geometry;
use crate::shared::Shared;
use crate::store::StoreJob;
use crate::writer::Command;

mod threads;

use threads::Spawn;

/// Loads that may wait for a thread before new ones are refused.
const LOADS_WAITING_MAX: usize = 1 << 14;
/// How long an orderly end waits for the threads; one that hangs in a file system is left behind.
const CLOSE_PATIENCE: Duration = Duration::from_secs(2);

/// Moves blocks between one paged cache and a folder.
///
/// Threads: one that lists the folder, one that decides about slots (only if it can store), and as many as the option `io_threads` says for stores
/// and for loads each. They end when the value is dropped or closed; one that hangs in a file system is left behind.
#[derive(Debug)]
pub struct FsTransfer {
    shared: Arc<Shared>,
    loads: std::sync::Mutex<Option<Sender<Arc<LoadJob>>>>,
    cold: std::sync::Mutex<Option<ColdQueue>>,
    threads: std::sync::Mutex<Vec<JoinHandle<()>>>,
    load_threads: usize,
    abandoned: Arc<AtomicBool>,
    process: u32,
}

impl FsTransfer {
    /// Opens the folder `path` for the blocks of `cache` in `namespace`.
    ///
    /// With `can_store` the folder must be writable. Without it nothing is created but the folder's own files where
    /// that is possible, so that a decode server may start before its prefill server.
    ///
    /// # Errors
    /// The folder cannot be used, is not trustworthy, or was created with other options.
    pub fn open(
        path: &Path,
        namespace: NamespaceId,
        cache: impl Into<Cache>,
        options: &FsOptions,
        can_store: bool,
    ) -> Result<Self> {
        let spawn = |name, work| std::thread::Builder::new().name(name).spawn(work);
        Self::open_with(path, namespace, cache.into(), options, can_store, &spawn)
    }

    fn open_with(
        path: &Path,
        namespace: NamespaceId,
        cache: Cache,
        options: &FsOptions,
        can_store: bool,
        spawn: &Spawn,
    ) -> Result<Self> {
        let directory = match Directory::open(path, options, true)? {
            Some(directory) => directory,
            None => return Err(FsError::NoStore { path: path.into() }),
        };
        if can_store && !directory.writable {
            return Err(FsError::ReadOnly { path: path.into() });
        }
        let map = cache.map();
        let layer_bytes: Vec<u64> = (0..map.layer_count())
            .map(|layer| map.layer_bytes(layer) as u64)
            .collect();
        if layer_bytes.is_empty() || layer_bytes.len() > crate::format::LAYERS_MAX as usize {
            return Err(FsError::Option {
                option: "layers of the cache",
                found: layer_bytes.len().to_string(),
                allowed: format!("1 to {}", crate::format::LAYERS_MAX),
            });
        }
        let geometry = Geometry::new(layer_bytes);
        let start_id = random_u64();
        let place = if can_store {
            Some(directory.control.register_writer(start_id)?)
        } else {
            None
        };
        let target_bytes = options.segment_target_bytes(directory.control.capacity_bytes());
        let (command_sender, commands) = unbounded();
        let shared = Arc::new(Shared::new(
            directory,
            geometry,
            cache,
            namespace,
            options.verify,
            options.jobs_in_flight,
            start_id,
            can_store.then_some(command_sender),
            Lister::new(options.listing_patience),
        ));
        // What is there is found from the first lookup on.
        drop(shared.look());
        let transfer = FsTransfer {
            shared,
            loads: std::sync::Mutex::default(),
            cold: std::sync::Mutex::default(),
            threads: std::sync::Mutex::default(),
            load_threads: options.threads(),
            abandoned: Arc::new(AtomicBool::new(false)),
            process: std::process::id(),
        };
        // If one thread cannot be started, dropping the value ends the others.
        transfer.start_threads(place, target_bytes, &commands, spawn)?;
        Ok(transfer)
    }

    /// Totals since the start, and gauges.
    pub fn stats(&self) -> FsStats {
        self.shared.stats()
    }

    /// The bytes of one block in this cache.
    pub fn block_bytes(&self) -> u64 {
        self.shared.geometry.payload_bytes
    }

    /// Whether stores and loads must be told behind which work of the program they come, since the cache is on a device:
    /// [`order_stores_after`](Self::order_stores_after) and [`load_after`](Self::load_after).
    pub fn needs_order(&self) -> bool {
        matches!(self.shared.cache, Cache::Device(_))
    }

    /// What a store reads from a device from now on is what the work on `stream` so far leaves there. Call it before each
    /// `layer_ready` and `finish_store`. With a cache in host memory it does nothing.
    pub fn order_stores_after(&self, stream: StreamHandle) -> Result<()> {
        match &self.shared.cache {
            Cache::Device(cache) if !self.is_forked() => Ok(cache.order_stores_after(stream)?),
            _ => Ok(()),
        }
    }

    /// As `load`, behind the work on `stream` so far, which may still write the blocks: they may have been freed while a
    /// step that uses them is running.
    pub fn load_after(&self, request: LoadRequest, stream: StreamHandle) -> kvlane_core::Result<JobId> {
        let mark = match &self.shared.cache {
            Cache::Device(cache) if !self.is_forked() => Some(cache.mark(stream).map_err(FsError::from)?),
            _ => None,
        };
        self.start_load(request, mark)
    }

    /// How many leading blocks of a chain can be had, continuing from what `cursor` remembers of the same chain.
    pub fn lookup_from(&self, chain: &[BlockKey], cursor: &mut LookupCursor) -> Availability {
        if self.is_forked() {
            return Availability::default();
        }
        self.shared.look().availability(chain, cursor)
    }

    /// Ends all jobs and threads. Called by drop.
    pub fn close(&self) {
        if self.is_forked() {
            // In a forked child there are no threads, and the parent's segments are not ours to touch.
            return;
        }
        self.shared.jobs.close();
        self.abandoned.store(true, Ordering::Relaxed);
        self.shared.tell_writer(Command::Stop);
        self.shared.lister.close();
        // Without a sender, the loading threads end at once.
        *lock(&self.loads) = None;
        *lock(&self.cold) = None;
        let handles = std::mem::take(&mut *lock(&self.threads));
        let deadline = Instant::now() + CLOSE_PATIENCE;
        for handle in &handles {
            handle.thread().unpark();
        }
        for handle in handles {
            while !handle.is_finished() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(1));
            }
            if handle.is_finished() {
                let _ = handle.join();
            } else {
                tracing::warn!("a thread of the KV store hangs in the file system and is left behind");
            }
        }
    }

    /// In a forked child every lock may have been held by a thread that is not there: none may be taken.
    fn is_forked(&self) -> bool {
        self.process != std::process::id()
    }

    fn refuse_forked(&self) -> Result<()> {
        if self.is_forked() {
            return Err(FsError::Forked {
                path: self.shared.directory.path.clone(),
            });
        }
        Ok(())
    }

    fn start_load(&self, request: LoadRequest, after: Option<Mark>) -> kvlane_core::Result<JobId> {
        self.refuse_forked()?;
        request.check(self.shared.cache.map())?;
        let id = self.shared.jobs.next_id();
        let blocks = request.keys.len();
        if blocks == 0 {
            self.shared.jobs.finish(id, Outcome::Done);
            return Ok(id);
        }
        let search = self.shared.search(&request.keys);
        let cold = lock(&self.cold).clone();
        let job = LoadJob::new(&self.shared, id, request, search, after, cold);
        if !self.shared.jobs.admit(id, Job::Load(Arc::clone(&job))) {
            self.miss_all(id, blocks, MissReason::Dropped);
            return Ok(id);
        }
        if let Some(loads) = &*lock(&self.loads) {
            if loads.len() >= LOADS_WAITING_MAX {
                // The threads stand still in a file system.
                job.close(MissReason::Dropped);
                return Ok(id);
            }
            for _ in 0..self.load_threads.min(job.block_count()) {
                let _ = loads.send(Arc::clone(&job));
            }
        }
        Ok(id)
    }

    fn check_layer(&self, layer: usize) -> kvlane_core::Result<()> {
        let layers = self.shared.geometry.layer_bytes.len();
        if layer >= layers {
            return Err(kvlane_core::Error::InvalidArgument {
                argument: "layer",
                found: layer.to_string(),
                allowed: format!("0 to {}", layers - 1),
            });
        }
        Ok(())
    }

    fn check_job(&self, job: JobId) -> kvlane_core::Result<()> {
        self.refuse_forked()?;
        if self.shared.jobs.is_known(job) {
            Ok(())
        } else {
            Err(kvlane_core::Error::UnknownJob(job.0))
        }
    }

    fn miss_all(&self, id: JobId, blocks: usize, reason: MissReason) {
        self.shared.counters.miss(reason, blocks as u64);
        self.shared.jobs.finish(
            id,
            Outcome::Miss {
                positions: (0..blocks).collect(),
                reason,
            },
        );
    }

    /// As [`KvTransfer::begin_store`], for blocks that were planned when the folder was in `epoch`
    /// ([`FsReader::epoch`](crate::FsReader::epoch)). After a reset in between nothing is stored: the blocks were
    /// computed before it.
    pub fn begin_store_of_epoch(
        &self,
        request: StoreRequest,
        epoch: Option<u64>,
    ) -> kvlane_core::Result<JobId> {
        self.refuse_forked()?;
        request.check(self.shared.cache.map())?;
        if !self.shared.can_store() {
            return Err(FsError::ReadOnly {
                path: self.shared.directory.path.clone(),
            }
            .into());
        }
        let id = self.shared.jobs.next_id();
        let blocks = request.keys.len();
        if blocks == 0 {
            self.shared.jobs.finish(id, Outcome::Done);
            return Ok(id);
        }
        let namespace = self.shared.glance().effective(0);
        // Behind the namespace: epochs only grow, so one that is over in the namespace is noticed by the writer thread.
        let now = self.shared.directory.control.epoch();
        let job = StoreJob::new(&self.shared, id, request, namespace, now);
        let admitted = epoch.is_none_or(|planned| planned == now)
            && !self.shared.writer_is_behind()
            && self.shared.jobs.admit(id, Job::Store(Arc::clone(&job)));
        if !admitted {
            self.miss_all(id, blocks, MissReason::Dropped);
        } else if !self.shared.tell_writer(Command::Begin(Arc::clone(&job))) {
            // Through the job: since it was admitted, its deadline may have ended it.
            job.close(MissReason::Dropped);
        }
        Ok(id)
    }
}

impl Drop for FsTransfer {
    fn drop(&mut self) {
        if self.is_forked() {
            // Ending a channel takes its locks, and the threads are the parent's: left as they are.
            std::mem::forget(self.loads.get_mut().map(Option::take));
            std::mem::forget(self.cold.get_mut().map(Option::take));
            std::mem::forget(self.threads.get_mut().map(std::mem::take));
            return;
        }
        self.close();
    }
}

impl KvTransfer for FsTransfer {
    fn reserve(&self, chain: &[BlockKey], first_depth: u32, deadline: Instant) -> kvlane_core::Result<()> {
        if self.is_forked() || chain.is_empty() {
            return Ok(());
        }
        if self.shared.writer_is_behind() {
            return Ok(());
        }
        let deadline = deadline.min(Instant::now() + RESERVATION_MAX);
        self.shared.tell_writer(Command::Reserve {
            keys: chain.to_vec(),
            first_depth,
            deadline,
        });
        Ok(())
    }

    fn withdraw(&self, keys: &[BlockKey]) -> kvlane_core::Result<()> {
        // A promise that is not taken back ends by itself; what waits for a thread that stands still must have a bound.
        if !self.is_forked() && !keys.is_empty() && !self.shared.writer_is_behind() {
            self.shared.tell_writer(Command::Withdraw { keys: keys.to_vec() });
        }
        Ok(())
    }

    fn begin_store(&self, request: StoreRequest) -> kvlane_core::Result<JobId> {
        self.begin_store_of_epoch(request, None)
    }

    fn layer_ready(&self, job: JobId, layer: usize) -> kvlane_core::Result<()> {
        self.check_layer(layer)?;
        self.check_job(job)?;
        // On a disk whole slots are written at the end; a message per layer would only cost time.
        if self.shared.directory.mapped_payload() && !self.shared.writer_is_behind() {
            self.shared.tell_writer(Command::Layer(job, layer));
        }
        Ok(())
    }

    fn finish_store(&self, job: JobId) -> kvlane_core::Result<()> {
        self.check_job(job)?;
        self.shared.tell_writer(Command::Finish(job));
        Ok(())
    }

    fn lookup(&self, chain: &[BlockKey]) -> Availability {
        self.lookup_from(chain, &mut LookupCursor::default())
    }

    /// With a cache on a device: nothing orders it behind a compute stream, see [`FsTransfer::load_after`].
    fn load(&self, request: LoadRequest) -> kvlane_core::Result<JobId> {
        self.start_load(request, None)
    }

    fn wait_layer(&self, job: JobId, layer: usize, deadline: Instant) -> kvlane_core::Result<bool> {
        self.check_layer(layer)?;
        self.refuse_forked()?;
        match self.shared.jobs.get(job) {
            Some(Job::Load(job)) => Ok(job.wait_layer(layer, deadline)),
            Some(Job::Store(_)) => Err(kvlane_core::Error::UnknownJob(job.0)),
            // It has ended, so its completion is there; a done job has all of its layers.
            None => {
                self.check_job(job)?;
                Ok(self.shared.jobs.ended_well(job))
            }
        }
    }

    fn wait(&self, job: JobId, deadline: Instant) -> kvlane_core::Result<Option<Completion>> {
        self.refuse_forked()?;
        self.shared
            .jobs
            .wait(job, deadline)
            .map_err(|()| kvlane_core::Error::UnknownJob(job.0))
    }

    fn poll(&self, done: &mut Vec<Completion>) {
        if self.is_forked() {
            return;
        }
        self.shared.jobs.poll(done);
    }

    fn cancel(&self, job: JobId) {
        if self.is_forked() {
            return;
        }
        match self.shared.jobs.get(job) {
            Some(Job::Load(job)) => job.close(MissReason::Cancelled),
            Some(Job::Store(job)) => job.close(MissReason::Cancelled),
            None => {}
        }
    }

    fn reset(&self) -> kvlane_core::Result<()> {
        self.refuse_forked()?;
        Ok(self.shared.directory.control.start_epoch()?)
    }
}

#[cfg(test)]
mod tests;
