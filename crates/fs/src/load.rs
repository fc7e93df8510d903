//! Loads: from slots into the paged cache.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, Weak};
use std::time::{Duration, Instant};

use crossbeam::channel::TrySendError;
use kvlane_core::{JobId, LoadOrder, LoadRequest, MissReason, NamespaceId, Outcome};
use kvlane_cuda::Mark;

use crate::cache::Cache;
use crate::cold::{Bounce, ColdQueue, ColdRead};
use crate::counters::Counters;
use crate::format::{SlotRecord, SlotState};
use crate::gate::Gate;
use crate::index::Found;
use crate::jobs::lock;
use crate::options::Medium;
use crate::segment::Hold;
use crate::shared::{Search, Shared};

mod ways;

use ways::Part;

/// One load in flight.
#[derive(Debug)]
pub(crate) struct LoadJob {
    id: JobId,
    request: LoadRequest,
    /// Work of the program that may still write the blocks, if they are on a device.
    after: Option<Mark>,
    /// Where each key was found; empty where it was not, or not yet.
    found: Vec<OnceLock<Found>>,
    /// In which namespace the others may still turn up.
    missing_in: Option<NamespaceId>,
    searched_again: OnceLock<()>,
    records: Vec<OnceLock<Option<SlotRecord>>>,
    /// Until the last thread has let go of the job.
    holds: Vec<OnceLock<Option<Hold>>>,
    shared: Weak<Shared>,
    /// Takes blocks that are not in the page cache; `None` where there is no such thing.
    cold: Option<ColdQueue>,
    gate: Gate,
    /// Blocks, or (layer, block) pairs in layer-major order.
    next_item: AtomicUsize,
    items_left: AtomicUsize,
    /// Layers of each block that are not in the cache and checked.
    layers_left: Vec<AtomicU32>,
    /// Blocks whose part of a layer is not there yet, for each layer.
    blocks_left: Vec<AtomicUsize>,
    bad: Mutex<BTreeMap<usize, MissReason>>,
    closed_because: OnceLock<MissReason>,
    readahead: AtomicBool,
    completed: AtomicBool,
    progress: Mutex<()>,
    progressed: Condvar,
}

impl LoadJob {
    pub(crate) fn new(
        shared: &Arc<Shared>,
        id: JobId,
        request: LoadRequest,
        search: Search,
        after: Option<Mark>,
        cold: Option<ColdQueue>,
    ) -> Arc<Self> {
        let layers = shared.geometry.layer_bytes.len();
        let blocks = search.found.len();
        let is_final = search.missing_in.is_none();
        let bad = search
            .found
            .iter()
            .enumerate()
            .filter(|(_, found)| is_final && found.is_none())
            .map(|(position, _)| (position, MissReason::Absent))
            .collect();
        let found = search.found.into_iter();
        let items = match request.order {
            LoadOrder::BlockMajor => blocks,
            LoadOrder::LayerMajor => blocks * layers,
        };
        Arc::new(LoadJob {
            id,
            records: (0..blocks).map(|_| OnceLock::new()).collect(),
            holds: (0..blocks).map(|_| OnceLock::new()).collect(),
            shared: Arc::downgrade(shared),
            gate: Gate::default(),
            next_item: AtomicUsize::new(0),
            items_left: AtomicUsize::new(items),
            layers_left: (0..blocks).map(|_| AtomicU32::new(layers as u32)).collect(),
            blocks_left: (0..layers).map(|_| AtomicUsize::new(blocks)).collect(),
            bad: Mutex::new(bad),
            closed_because: OnceLock::new(),
            readahead: AtomicBool::new(false),
            completed: AtomicBool::new(false),
            progress: Mutex::new(()),
            progressed: Condvar::new(),
            request,
            after,
            found: found
                .map(|found| found.map_or_else(OnceLock::new, OnceLock::from))
                .collect(),
            missing_in: search.missing_in,
            searched_again: OnceLock::new(),
            cold,
        })
    }

    pub(crate) fn deadline(&self) -> Instant {
        self.request.deadline
    }

    #[cfg(test)]
    pub(crate) fn gate_for_test(&self) -> &Gate {
        &self.gate
    }

    pub(crate) fn block_count(&self) -> usize {
        self.found.len()
    }

    /// Ends the job: at once if nobody is copying, else when the last one has stopped.
    pub(crate) fn close(&self, reason: MissReason) {
        let _ = self.closed_because.set(reason);
        if self.gate.close() {
            self.complete();
        }
    }

    /// Waits until every block has its part of `layer`.
    pub(crate) fn wait_layer(&self, layer: usize, deadline: Instant) -> bool {
        let deadline = deadline.min(self.deadline());
        let mut guard = lock(&self.progress);
        loop {
            if self.blocks_left[layer].load(Ordering::Acquire) == 0 {
                return lock(&self.bad).is_empty();
            }
            let now = Instant::now();
            if now >= deadline || self.completed.load(Ordering::Acquire) {
                return false;
            }
            guard = match self.progressed.wait_timeout(guard, deadline - now) {
                Ok((guard, _)) => guard,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }

    /// What a loading thread does for this job: items until there are none.
    pub(crate) fn run(self: &Arc<Self>, bounce: &mut Bounce) {
        let Some(shared) = self.shared.upgrade() else {
            return;
        };
        let started = Instant::now();
        let layers = shared.geometry.layer_bytes.len();
        let blocks = self.found.len();
        let items = match self.request.order {
            LoadOrder::BlockMajor => blocks,
            LoadOrder::LayerMajor => blocks * layers,
        };
        loop {
            let item = self.next_item.fetch_add(1, Ordering::Relaxed);
            if item >= items || self.gate.is_closed() {
                break;
            }
            let (position, span) = match self.request.order {
                LoadOrder::BlockMajor => (item, 0..layers),
                LoadOrder::LayerMajor => (item % blocks, item / blocks..item / blocks + 1),
            };
            if Instant::now() >= self.request.deadline {
                self.close(MissReason::TimedOut);
                break;
            }
            self.search_again(&shared, position);
            let is_resident = self.is_resident(&shared, position, &span);
            if !is_resident && self.defer(&shared, position, &span) {
                continue;
            }
            let result = self.load(&shared, position, span.clone(), is_resident, bounce);
            self.end_item(&shared, position, span, result);
        }
        Counters::add_nanos(&shared.counters.load_nanos, started.elapsed());
    }

    /// What a cold reader does for this job.
    pub(crate) fn run_cold(&self, position: usize, span: Range<usize>, bounce: &mut Bounce) {
        let Some(shared) = self.shared.upgrade() else {
            return;
        };
        if self.gate.is_closed() {
            return;
        }
        let started = Instant::now();
        let result = self.load(&shared, position, span.clone(), false, bounce);
        self.end_item(&shared, position, span, result);
        Counters::add_nanos(&shared.counters.load_nanos, started.elapsed());
    }

    /// Looks for a block that was not found when the load began, and for all of its kind, once the folder has been listed.
    /// Not where the job is made: that is an engine's thread, and a folder may be slow.
    fn search_again(&self, shared: &Shared, position: usize) {
        let Some(namespace) = self.missing_in else {
            return;
        };
        if self.found[position].get().is_some() {
            return;
        }
        self.searched_again.get_or_init(|| {
            let index = shared.look_patiently();
            for (place, key) in self.found.iter().zip(&self.request.keys) {
                // After a reset in between, what is there now is not what was asked for.
                let found = index.find(0, key).filter(|found| found.namespace == namespace);
                if let (None, Some(found)) = (place.get(), found) {
                    let _ = place.set(found);
                }
            }
        });
    }

    /// Whether the bytes of `layers` are known to be in memory, and can be taken from the mapping.
    fn is_resident(&self, shared: &Shared, position: usize, layers: &Range<usize>) -> bool {
        let found = self.found[position].get();
        match shared.directory.choice.medium {
            Medium::Disk => found.is_some_and(|found| found.is_resident(shared, layers)),
            Medium::Memory => true,
            _ => false,
        }
    }

    /// Gives a block that is not in the page cache to the cold readers, if they are there.
    fn defer(self: &Arc<Self>, shared: &Shared, position: usize, layers: &Range<usize>) -> bool {
        let Some(cold) = &self.cold else {
            return false;
        };
        // Layer by layer the pieces are small, and the kernel's readahead is better at those.
        if self.found[position].get().is_none() || self.request.order == LoadOrder::LayerMajor {
            return false;
        }
        let read = ColdRead {
            job: Arc::clone(self),
            position,
            layers: layers.clone(),
        };
        match cold.try_send(read) {
            Ok(()) => true,
            Err(TrySendError::Full(read)) => {
                // The readers stand still in a file system. The thread of this job must not join them.
                self.end_item(shared, position, read.layers, Err(MissReason::Dropped));
                true
            }
            Err(TrySendError::Disconnected(_)) => false,
        }
    }

    /// Counts an item that has ended.
    fn end_item(&self, shared: &Shared, position: usize, span: Range<usize>, result: Result<(), MissReason>) {
        match result {
            // Only what succeeded is counted: `complete` may run right now, and what it finds uncounted is bad.
            Ok(()) => {
                self.layers_left[position].fetch_sub(span.len() as u32, Ordering::AcqRel);
            }
            Err(reason) => {
                match (reason, self.found[position].get()) {
                    (MissReason::Corrupt, Some(found)) => shared.condemn(found),
                    (MissReason::Recycled, Some(found)) => lock(&shared.index).forget(found),
                    _ => {}
                }
                lock(&self.bad).entry(position).or_insert(reason);
            }
        }
        let mut layer_complete = false;
        for layer in span {
            layer_complete |= self.blocks_left[layer].fetch_sub(1, Ordering::AcqRel) == 1;
        }
        if layer_complete && self.request.order == LoadOrder::LayerMajor {
            drop(lock(&self.progress));
            self.progressed.notify_all();
        }
        if self.items_left.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.complete();
        }
    }

    fn complete(&self) {
        if self.completed.swap(true, Ordering::AcqRel) {
            return;
        }
        let Some(shared) = self.shared.upgrade() else {
            return;
        };
        let late = self.closed_because.get().copied().unwrap_or(MissReason::TimedOut);
        // Copied, not taken: whoever waits for a layer still looks at it.
        let mut bad = lock(&self.bad).clone();
        for (position, left) in self.layers_left.iter().enumerate() {
            if left.load(Ordering::Acquire) != 0 {
                bad.entry(position).or_insert(late);
            }
        }
        for reason in bad.values() {
            shared.counters.miss(*reason, 1);
        }
        let loaded = (self.found.len() - bad.len()) as u64;
        Counters::add(&shared.counters.loaded_blocks, loaded);
        Counters::add(
            &shared.counters.loaded_bytes,
            loaded * shared.geometry.payload_bytes,
        );
        let touched = self
            .found
            .iter()
            .enumerate()
            .filter(|(position, _)| !bad.contains_key(position));
        shared.touch(touched.filter_map(|(_, found)| found.get().cloned()));
        let outcome = match bad.values().next() {
            None => Outcome::Done,
            Some(&reason) => Outcome::Miss {
                positions: bad.keys().copied().collect(),
                reason,
            },
        };
        shared.jobs.finish(self.id, outcome);
        drop(lock(&self.progress));
        self.progressed.notify_all();
    }

    fn load(
        &self,
        shared: &Shared,
        position: usize,
        layers: Range<usize>,
        is_resident: bool,
        bounce: &mut Bounce,
    ) -> Result<(), MissReason> {
        let Some(found) = self.found[position].get() else {
            return Err(MissReason::Absent);
        };
        // Not where the job is made: that is an engine's thread, and this asks the kernel.
        let hold = self.holds[position].get_or_init(|| found.view.hold());
        if hold.is_none() || found.view.sequence(found.slot) != found.sequence {
            return Err(MissReason::Recycled);
        }
        let record = self.records[position].get_or_init(|| {
            let record = found.view.record(found.slot, found.sequence).ok()?;
            let right = record.state == SlotState::Committed
                && record.key == self.request.keys[position]
                && record.namespace == found.namespace
                && shared.geometry.fits(&found.view.header)
                && record.payload_bytes == shared.geometry.payload_bytes
                && record.layer_crcs.len() == shared.geometry.layer_bytes.len();
            right.then_some(record)
        });
        let Some(record) = record else {
            return Err(MissReason::Recycled);
        };
        let block = self.request.blocks[position];
        let part = Part {
            shared,
            found,
            record,
            block,
            layers,
        };
        let copied = match &shared.cache {
            Cache::Host(cache) if shared.directory.mapped_payload() => self.copy_mapped(cache, &part),
            Cache::Host(cache) if is_resident => self.copy_resident(cache, &part, bounce),
            Cache::Host(cache) => self.copy_read(cache, &part, bounce),
            Cache::Device(cache) => self.copy_staged(cache, &part),
        };
        // The sequence tells whether the slot was recycled under the copy; then a wrong checksum means nothing.
        if found.view.sequence(found.slot) != found.sequence {
            return Err(MissReason::Recycled);
        }
        if copied == Err(MissReason::Corrupt) {
            tracing::warn!(path = %found.view.path.display(), slot = found.slot, "a block does not match its checksum");
        }
        copied
    }

    fn enter<R>(&self, work: impl FnOnce() -> R) -> Option<R> {
        let left = || self.complete();
        let _inside = self.gate.enter(&left)?;
        Some(work())
    }

    fn closing_reason(&self) -> MissReason {
        self.closed_because
            .get()
            .copied()
            .unwrap_or(MissReason::Cancelled)
    }
}

/// How long a thread sleeps at most before it looks whether the store was closed.
pub(crate) const IDLE_CHECK: Duration = Duration::from_millis(500);

#[cfg(test)]
mod tests;
