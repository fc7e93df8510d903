//! The reference backend: every promise of [`KvTransfer`], kept in the plainest way, in the memory of one process.
//!
//! It is what the conformance suite was written against and what a consumer of the trait can be tested with. It copies on
//! the calling thread and takes a lock around everything, so its speed says nothing about the real backends.

mod store;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::chain::BlockKey;
use crate::error::{Error, Result};
use crate::memory::PagedMemory;
use crate::namespace::NamespaceId;
use crate::transfer::{
    Availability, Completion, JobId, KvTransfer, LoadOrder, LoadRequest, MissReason, Outcome, StoreRequest,
};

pub use store::MemoryStore;

/// Moves blocks between one cache and a [`MemoryStore`].
///
/// ```
/// use std::sync::Arc;
/// use kvlane_core::reference::{MemoryBackend, MemoryStore};
/// use kvlane_core::{BlockMap, Device, KvTransfer, NamespaceParts, OwnedCache, TensorView};
///
/// let view = TensorView {
///     name: "layer.0".into(),
///     address: 4096,
///     device: Device::Host,
///     element_bytes: 2,
///     shape: vec![8, 16, 576],
///     strides: vec![9216, 576, 1],
/// };
/// let cache = Arc::new(OwnedCache::new(BlockMap::from_tensors([view], 8, None)?));
/// let store = MemoryStore::new(1 << 20);
/// let backend = MemoryBackend::new(store, NamespaceParts::new().id(), cache);
/// assert_eq!(backend.lookup(&[[7; 32].into()]).ready_blocks, 0);
/// # Ok::<(), kvlane_core::Error>(())
/// ```
pub struct MemoryBackend {
    store: Arc<MemoryStore>,
    namespace: NamespaceId,
    cache: Arc<dyn PagedMemory>,
    /// Tells this backend's promises from those of others.
    owner: u64,
    /// By number, so that completions are delivered in the order of the calls.
    jobs: Mutex<BTreeMap<JobId, Job>>,
    next_job: AtomicU64,
    ended: Condvar,
    /// Jobs whose completion was not delivered yet.
    undelivered: AtomicUsize,
}

enum Job {
    Store(Arc<StoreJob>),
    Ended { outcome: Outcome, is_load: bool },
}

struct StoreJob {
    request: StoreRequest,
    /// The store's epoch when the job began: bytes from before a reset must not appear after it.
    epoch: u64,
    progress: Mutex<Progress>,
}

/// Held while the job's cache blocks are read, so a job cannot end under a reader.
struct Progress {
    ended: bool,
    /// For each key that had to be copied so far.
    payloads: Vec<Option<Copied>>,
}

#[derive(Clone)]
struct Copied {
    layers: Vec<bool>,
    payload: Vec<u8>,
}

impl StoreJob {
    fn progress(&self) -> MutexGuard<'_, Progress> {
        self.progress.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl MemoryBackend {
    /// A backend for `cache`. Backends that share `store` exchange blocks if their namespaces are equal.
    pub fn new(store: Arc<MemoryStore>, namespace: NamespaceId, cache: Arc<dyn PagedMemory>) -> Self {
        static NEXT_OWNER: AtomicU64 = AtomicU64::new(0);
        Self {
            store,
            namespace,
            cache,
            owner: NEXT_OWNER.fetch_add(1, Ordering::Relaxed),
            jobs: Mutex::default(),
            next_job: AtomicU64::new(1),
            ended: Condvar::new(),
            undelivered: AtomicUsize::new(0),
        }
    }

    fn jobs(&self) -> MutexGuard<'_, BTreeMap<JobId, Job>> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn insert(&self, job: Job) -> JobId {
        let id = JobId(self.next_job.fetch_add(1, Ordering::Relaxed));
        self.undelivered.fetch_add(1, Ordering::Release);
        self.jobs().insert(id, job);
        id
    }

    /// The open store `job`; `None` if it has ended and its completion waits to be taken.
    fn open_store(&self, job: JobId) -> Result<Option<Arc<StoreJob>>> {
        match self.jobs().get(&job) {
            None => Err(Error::UnknownJob(job.0)),
            Some(Job::Store(store)) => Ok(Some(Arc::clone(store))),
            Some(Job::Ended { is_load: false, .. }) => Ok(None),
            Some(Job::Ended { is_load: true, .. }) => Err(wrong_kind(job, "load", "a store")),
        }
    }

    fn end(&self, job: JobId, progress: &mut Progress, outcome: Outcome) {
        progress.ended = true;
        progress.payloads = Vec::new();
        self.jobs().insert(
            job,
            Job::Ended {
                outcome,
                is_load: false,
            },
        );
        self.ended.notify_all();
    }

    /// Ends a store without committing anything more.
    fn abandon(&self, job: JobId, store: &StoreJob, reason: MissReason) {
        let mut progress = store.progress();
        if !progress.ended {
            let keys = &store.request.keys;
            let positions = (0..keys.len()).filter(|&i| !self.store.contains(self.namespace, &keys[i]));
            self.end(job, &mut progress, outcome(positions.collect(), reason));
        }
    }

    /// Copies one layer of one block, unless that was done before.
    fn copy_out(&self, store: &StoreJob, progress: &mut Progress, layer: usize, position: usize) {
        let map = self.cache.map();
        let copied = progress.payloads[position].get_or_insert_with(|| Copied {
            layers: vec![false; map.layer_count()],
            payload: vec![0; map.block_bytes()],
        });
        if !std::mem::replace(&mut copied.layers[layer], true) {
            let start: usize = (0..layer).map(|layer| map.layer_bytes(layer)).sum();
            let target = &mut copied.payload[start..start + map.layer_bytes(layer)];
            self.cache
                .read_layer(layer, store.request.blocks[position], target);
        }
    }

    fn take(&self, jobs: &mut BTreeMap<JobId, Job>, job: JobId) -> Option<Completion> {
        let Some(Job::Ended { outcome, .. }) = jobs.remove(&job) else {
            return None;
        };
        self.undelivered.fetch_sub(1, Ordering::Release);
        Some(Completion { job, outcome })
    }

    fn check_layer(&self, layer: usize) -> Result<()> {
        let layers = self.cache.map().layer_count();
        if layer < layers {
            return Ok(());
        }
        Err(Error::InvalidArgument {
            argument: "layer",
            found: layer.to_string(),
            allowed: format!("below {layers}"),
        })
    }

    /// Copies what is there, and says of each position what went wrong.
    fn copy_in(&self, request: &LoadRequest) -> Vec<Option<MissReason>> {
        let map = self.cache.map();
        let payloads = self.store.fetch(self.namespace, &request.keys);
        let mut wrong: Vec<Option<MissReason>> = payloads
            .iter()
            .map(|payload| match payload {
                None => Some(MissReason::Absent),
                // One namespace has one layout; whoever broke that rule gets a miss rather than a shifted block.
                Some(bytes) if bytes.len() != map.block_bytes() => Some(MissReason::Corrupt),
                Some(_) => None,
            })
            .collect();

        let layers: Vec<_> = (0..map.layer_count())
            .scan(0, |end, layer| {
                let start = *end;
                *end += map.layer_bytes(layer);
                Some((layer, start..*end))
            })
            .collect();
        let mut copy = |position: usize, layer: usize, range: std::ops::Range<usize>| {
            if wrong[position].is_none() && Instant::now() >= request.deadline {
                wrong[position] = Some(MissReason::TimedOut);
            }
            if let (None, Some(payload)) = (wrong[position], &payloads[position]) {
                self.cache
                    .write_layer(layer, request.blocks[position], &payload[range]);
            }
        };
        match request.order {
            LoadOrder::BlockMajor => {
                for position in 0..request.keys.len() {
                    layers
                        .iter()
                        .for_each(|(layer, range)| copy(position, *layer, range.clone()));
                }
            }
            LoadOrder::LayerMajor => {
                for (layer, range) in &layers {
                    (0..request.keys.len()).for_each(|position| copy(position, *layer, range.clone()));
                }
            }
        }
        wrong
    }
}

impl KvTransfer for MemoryBackend {
    fn reserve(&self, chain: &[BlockKey], _first_depth: u32, deadline: Instant) -> Result<()> {
        self.store.promise(
            self.owner,
            self.namespace,
            chain,
            self.cache.map().block_bytes(),
            deadline,
        );
        Ok(())
    }

    fn withdraw(&self, keys: &[BlockKey]) -> Result<()> {
        self.store.withdraw(self.owner, self.namespace, keys);
        Ok(())
    }

    fn begin_store(&self, request: StoreRequest) -> Result<JobId> {
        request.check(self.cache.map())?;
        let progress = Progress {
            ended: false,
            payloads: vec![None; request.keys.len()],
        };
        let job = StoreJob {
            request,
            epoch: self.store.epoch(),
            progress: Mutex::new(progress),
        };
        Ok(self.insert(Job::Store(Arc::new(job))))
    }

    fn layer_ready(&self, job: JobId, layer: usize) -> Result<()> {
        self.check_layer(layer)?;
        let Some(store) = self.open_store(job)? else {
            return Ok(());
        };
        let mut progress = store.progress();
        if progress.ended {
            return Ok(());
        }
        for position in 0..store.request.keys.len() {
            // What others have stored meanwhile needs no copy. Should it be evicted again, `finish_store` copies it.
            if !self.store.contains(self.namespace, &store.request.keys[position]) {
                self.copy_out(&store, &mut progress, layer, position);
            }
        }
        Ok(())
    }

    fn finish_store(&self, job: JobId) -> Result<()> {
        let Some(store) = self.open_store(job)? else {
            return Ok(());
        };
        let mut progress = store.progress();
        if progress.ended {
            return Ok(());
        }
        let request = &store.request;
        for position in 0..request.keys.len() {
            if !self.store.contains(self.namespace, &request.keys[position]) {
                (0..self.cache.map().layer_count())
                    .for_each(|layer| self.copy_out(&store, &mut progress, layer, position));
            }
        }
        if Instant::now() >= request.deadline {
            drop(progress);
            self.abandon(job, &store, MissReason::TimedOut);
            return Ok(());
        }
        let payloads = progress
            .payloads
            .iter_mut()
            .map(|copied| copied.take().map(|copied| copied.payload))
            .collect();
        let missed = self
            .store
            .commit(self.owner, self.namespace, store.epoch, request, payloads);
        self.end(job, &mut progress, outcome(missed, MissReason::Dropped));
        Ok(())
    }

    fn lookup(&self, chain: &[BlockKey]) -> Availability {
        self.store.lookup(self.namespace, chain)
    }

    fn load(&self, request: LoadRequest) -> Result<JobId> {
        request.check(self.cache.map())?;
        let wrong = self.copy_in(&request);
        Ok(self.insert(Job::Ended {
            outcome: outcome_of(&wrong),
            is_load: true,
        }))
    }

    fn wait_layer(&self, job: JobId, layer: usize, _deadline: Instant) -> Result<bool> {
        self.check_layer(layer)?;
        match self.jobs().get(&job) {
            None => Err(Error::UnknownJob(job.0)),
            Some(Job::Ended {
                outcome,
                is_load: true,
            }) => Ok(*outcome == Outcome::Done),
            Some(_) => Err(wrong_kind(job, "store", "a load")),
        }
    }

    fn wait(&self, job: JobId, deadline: Instant) -> Result<Option<Completion>> {
        let mut jobs = self.jobs();
        loop {
            let store = match jobs.get(&job) {
                None => return Err(Error::UnknownJob(job.0)),
                Some(Job::Store(store)) => Arc::clone(store),
                Some(Job::Ended { .. }) => return Ok(self.take(&mut jobs, job)),
            };
            let now = Instant::now();
            if now >= store.request.deadline {
                drop(jobs);
                self.abandon(job, &store, MissReason::TimedOut);
                jobs = self.jobs();
            } else if now >= deadline {
                return Ok(None);
            } else {
                let pause = deadline.min(store.request.deadline) - now;
                (jobs, _) = self
                    .ended
                    .wait_timeout(jobs, pause)
                    .unwrap_or_else(PoisonError::into_inner);
            }
        }
    }

    fn poll(&self, done: &mut Vec<Completion>) {
        if self.undelivered.load(Ordering::Acquire) == 0 {
            return;
        }
        let now = Instant::now();
        let late: Vec<(JobId, Arc<StoreJob>)> = self
            .jobs()
            .iter()
            .filter_map(|(id, job)| match job {
                Job::Store(store) if now >= store.request.deadline => Some((*id, Arc::clone(store))),
                _ => None,
            })
            .collect();
        for (job, store) in late {
            self.abandon(job, &store, MissReason::TimedOut);
        }
        let mut jobs = self.jobs();
        let ended: Vec<JobId> = jobs
            .iter()
            .filter(|(_, job)| matches!(job, Job::Ended { .. }))
            .map(|(id, _)| *id)
            .collect();
        done.extend(ended.into_iter().filter_map(|job| self.take(&mut jobs, job)));
    }

    fn cancel(&self, job: JobId) {
        if let Ok(Some(store)) = self.open_store(job) {
            self.abandon(job, &store, MissReason::Cancelled);
        }
    }

    fn reset(&self) -> Result<()> {
        self.store.reset();
        Ok(())
    }
}

/// A backend that is gone keeps no promise.
impl Drop for MemoryBackend {
    fn drop(&mut self) {
        self.store.withdraw_all(self.owner);
    }
}

fn outcome(positions: Vec<usize>, reason: MissReason) -> Outcome {
    if positions.is_empty() {
        Outcome::Done
    } else {
        Outcome::Miss { positions, reason }
    }
}

fn outcome_of(wrong: &[Option<MissReason>]) -> Outcome {
    let positions = (0..wrong.len())
        .filter(|&position| wrong[position].is_some())
        .collect();
    match wrong.iter().flatten().next() {
        None => Outcome::Done,
        Some(&reason) => Outcome::Miss { positions, reason },
    }
}

fn wrong_kind(job: JobId, found: &str, allowed: &str) -> Error {
    Error::InvalidArgument {
        argument: "job",
        found: format!("{}, a {found}", job.0),
        allowed: allowed.to_owned(),
    }
}
