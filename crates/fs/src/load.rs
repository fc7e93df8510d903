//! Loads: from slots into the paged cache.

use std::collections::BTreeMap;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, Weak};
use std::time::{Duration, Instant};

use kvlane_core::{JobId, LoadOrder, LoadRequest, MissReason, Outcome};
use kvlane_cuda::{DeviceCache, Lease, Mark, Patience};

use crate::cache::{Cache, gave_up};
use crate::cold::{Bounce, ColdQueue, ColdRead};
use crate::counters::Counters;
use crate::format::{SlotRecord, SlotState};
use crate::gate::Gate;
use crate::index::Found;
use crate::jobs::lock;
use crate::options::Medium;
use crate::raw::{HostCache, LayerCrc, Runs, copy_bytes, preadv_nowait, store_fence};
use crate::segment::Hold;
use crate::shared::Shared;

/// Bytes read in one call on the way through the page cache: small enough to be in the CPU's cache for the checksum.
const READ_BYTES: usize = 512 << 10;

/// One load in flight.
#[derive(Debug)]
pub(crate) struct LoadJob {
    id: JobId,
    request: LoadRequest,
    /// Work of the program that may still write the blocks, if they are on a device.
    after: Option<Mark>,
    /// Where each key was found; `None` was missed from the start.
    found: Vec<Option<Found>>,
    records: Vec<OnceLock<Option<SlotRecord>>>,
    /// Until the last thread has let go of the job.
    holds: OnceLock<Vec<Option<Hold>>>,
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
        found: Vec<Option<Found>>,
        after: Option<Mark>,
        cold: Option<ColdQueue>,
    ) -> Arc<Self> {
        let layers = shared.geometry.layer_bytes.len();
        let blocks = found.len();
        let bad = found
            .iter()
            .enumerate()
            .filter(|(_, found)| found.is_none())
            .map(|(position, _)| (position, MissReason::Absent))
            .collect();
        let items = match request.order {
            LoadOrder::BlockMajor => blocks,
            LoadOrder::LayerMajor => blocks * layers,
        };
        Arc::new(LoadJob {
            id,
            records: (0..blocks).map(|_| OnceLock::new()).collect(),
            holds: OnceLock::new(),
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
            found,
            cold,
        })
    }

    pub(crate) fn deadline(&self) -> Instant {
        self.request.deadline
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
            let is_resident = self.is_resident(&shared, position, &span);
            if !is_resident && self.defer(position, &span) {
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

    /// Whether the bytes of `layers` are known to be in memory, and can be taken from the mapping.
    fn is_resident(&self, shared: &Shared, position: usize, layers: &Range<usize>) -> bool {
        let found = self.found[position].as_ref();
        match shared.directory.choice.medium {
            Medium::Disk => found.is_some_and(|found| found.is_resident(shared, layers)),
            Medium::Memory => true,
            _ => false,
        }
    }

    /// Gives a block that is not in the page cache to the cold readers, if they are there.
    fn defer(self: &Arc<Self>, position: usize, layers: &Range<usize>) -> bool {
        // Layer by layer the pieces are small, and the kernel's readahead is better at those.
        if self.found[position].is_none() || self.request.order == LoadOrder::LayerMajor {
            return false;
        }
        let read = |job| ColdRead {
            job,
            position,
            layers: layers.clone(),
        };
        let cold = self.cold.as_ref();
        cold.is_some_and(|cold| cold.send(read(Arc::clone(self))).is_ok())
    }

    /// Counts an item that has ended.
    fn end_item(&self, shared: &Shared, position: usize, span: Range<usize>, result: Result<(), MissReason>) {
        match result {
            // Only what succeeded is counted: `complete` may run right now, and what it finds uncounted is bad.
            Ok(()) => {
                self.layers_left[position].fetch_sub(span.len() as u32, Ordering::AcqRel);
            }
            Err(reason) => {
                if matches!(reason, MissReason::Corrupt | MissReason::Recycled)
                    && let Some(found) = &self.found[position]
                {
                    lock(&shared.index).forget(found);
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
        shared.touch(touched.filter_map(|(_, found)| found.clone()));
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
        let Some(found) = &self.found[position] else {
            return Err(MissReason::Absent);
        };
        // Not where the job is made: that is an engine's thread, and this asks the kernel.
        let holds = self.holds.get_or_init(|| {
            let hold = |found: &Option<Found>| found.as_ref()?.view.hold();
            self.found.iter().map(hold).collect()
        });
        if holds[position].is_none() || found.view.sequence(found.slot) != found.sequence {
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
            Cache::Host(cache) if is_resident => self.copy_resident(cache, &part),
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

    fn copy_mapped(&self, cache: &HostCache, part: &Part<'_>) -> Result<(), MissReason> {
        self.enter(|| {
            let mapping = part.found.view.mapping();
            let mut offset = part.layer_offset(part.layers.start);
            let mut whole = true;
            for layer in part.layers.clone() {
                let bytes = part.shared.geometry.layer_bytes[layer] as usize;
                let source = mapping.source(offset as usize, bytes);
                let mut crc = part.crc(layer);
                cache.copy_layer_in(layer, part.block, source, crc.as_mut());
                whole &= part.matches(layer, crc);
                offset += bytes as u64;
            }
            store_fence();
            if whole { Ok(()) } else { Err(MissReason::Corrupt) }
        })
        .unwrap_or_else(|| Err(self.closing_reason()))
    }

    /// From the page cache where it has all the bytes and says so without waiting, through the bounce buffer where not:
    /// only what cannot block may know the address of the paged cache.
    fn copy_read(&self, cache: &HostCache, part: &Part<'_>, bounce: &mut Bounce) -> Result<(), MissReason> {
        let medium = part.shared.directory.choice.medium;
        if medium != Medium::Disk {
            let direct = self
                .enter(|| self.read_resident(cache, part))
                .unwrap_or(Some(Err(self.closing_reason())));
            if let Some(result) = direct {
                return result;
            }
        }
        let is_whole = self.request.order == LoadOrder::BlockMajor;
        let direct = if medium == Medium::Disk && is_whole {
            part.found.view.direct()
        } else {
            None
        };
        if direct.is_none() && !self.readahead.swap(true, Ordering::Relaxed) {
            self.start_readahead(part.shared);
        }
        let sizes = &part.shared.geometry.layer_bytes;
        let bytes: u64 = sizes[part.layers.clone()].iter().sum();
        let offset = part.layer_offset(part.layers.start);
        let read = bounce.read(&part.found.view.file, direct, offset, bytes as usize);
        let bytes = read.map_err(|error| {
            tracing::warn!(path = %part.found.view.path.display(), %error, "cannot read a block");
            MissReason::Io
        })?;
        self.enter(|| {
            let mut at = 0;
            let mut whole = true;
            for layer in part.layers.clone() {
                let layer_bytes = sizes[layer] as usize;
                let mut crc = part.crc(layer);
                cache.copy_layer_in(
                    layer,
                    part.block,
                    bytes[at..at + layer_bytes].into(),
                    crc.as_mut(),
                );
                whole &= part.matches(layer, crc);
                at += layer_bytes;
            }
            store_fence();
            if whole { Ok(()) } else { Err(MissReason::Corrupt) }
        })
        .unwrap_or_else(|| Err(self.closing_reason()))
    }

    /// From the mapping of a file on a disk.
    ///
    /// A page that is not there is read while the thread waits, which must not happen inside the gate: a disk that does
    /// not answer would hold the job beyond its deadline. So the pages of a layer are touched outside, microseconds before
    /// they are copied. The kernel does not let go of a page that was used that recently.
    fn copy_resident(&self, cache: &HostCache, part: &Part<'_>) -> Result<(), MissReason> {
        let mapping = part.found.view.mapping();
        let mut offset = part.layer_offset(part.layers.start) as usize;
        let mut whole = true;
        for layer in part.layers.clone() {
            let bytes = part.shared.geometry.layer_bytes[layer] as usize;
            mapping.touch(offset..offset + bytes);
            let mut crc = part.crc(layer);
            let copied = self.enter(|| {
                let source = mapping.source(offset, bytes);
                cache.copy_layer_in(layer, part.block, source, crc.as_mut());
                store_fence();
            });
            if copied.is_none() {
                return Err(self.closing_reason());
            }
            whole &= part.matches(layer, crc);
            offset += bytes;
        }
        if whole { Ok(()) } else { Err(MissReason::Corrupt) }
    }

    /// `None`: not all of it is resident.
    fn read_resident(&self, cache: &HostCache, part: &Part<'_>) -> Option<Result<(), MissReason>> {
        let mut layer = part.layers.start;
        let mut whole = true;
        while layer < part.layers.end {
            let mut runs = Runs::new();
            let first = layer;
            while layer < part.layers.end && (layer == first || runs.len_bytes() < READ_BYTES) {
                runs.push_layer(cache, layer, part.block);
                layer += 1;
            }
            match preadv_nowait(&part.found.view.file, part.layer_offset(first), &runs) {
                Ok(read) if read == runs.len_bytes() => {}
                // Not resident, or a file system that does not know the flag.
                Ok(_) | Err(_) => return None,
            }
            for layer in first..layer {
                let mut crc = part.crc(layer);
                if let Some(crc) = &mut crc {
                    cache.checksum_layer(layer, part.block, crc);
                }
                whole &= part.matches(layer, crc);
            }
        }
        Some(if whole { Ok(()) } else { Err(MissReason::Corrupt) })
    }

    /// To a device: into pinned memory with the checksum, and on to the cache only if the bytes are right. Until then
    /// nobody has an address of the cache, so a file system that blocks cannot hold up the deadline.
    fn copy_staged(&self, cache: &DeviceCache, part: &Part<'_>) -> Result<(), MissReason> {
        let cancelled = || self.gate.is_closed();
        let patience = Patience {
            deadline: self.request.deadline,
            cancelled: &cancelled,
        };
        let missed = |error| {
            if gave_up(&error) {
                // The other blocks are late too.
                self.close(MissReason::TimedOut);
                return self.closing_reason();
            }
            tracing::warn!(%error, "cannot copy a block to the device");
            MissReason::Io
        };
        let mut staging = cache.staging(&patience).map_err(missed)?;
        if !part.shared.directory.mapped_payload() && !self.readahead.swap(true, Ordering::Relaxed) {
            self.start_readahead(part.shared);
        }
        part.stage(&mut staging)?;
        if part.found.view.sequence(part.found.slot) != part.found.sequence {
            return Err(MissReason::Recycled);
        }
        let layers: Vec<usize> = part.layers.clone().collect();
        let after = self.after.as_ref();
        self.enter(|| cache.copy_block_in(part.block, &layers, staging, after, &patience))
            .map_or_else(|| Err(self.closing_reason()), |copied| copied.map_err(missed))
    }

    /// Asks the kernel for all slots of the job at once, so that the device sees a deep queue.
    fn start_readahead(&self, shared: &Shared) {
        for found in self.found.iter().flatten() {
            let offset = found.view.header.slot_offset(found.slot);
            let length = std::num::NonZeroU64::new(shared.geometry.slot_bytes);
            let _ = rustix::fs::fadvise(&found.view.file, offset, length, rustix::fs::Advice::WillNeed);
        }
    }

    fn closing_reason(&self) -> MissReason {
        self.closed_because
            .get()
            .copied()
            .unwrap_or(MissReason::Cancelled)
    }
}

impl Found {
    fn layer_offset(&self, shared: &Shared, layer: usize) -> u64 {
        let before: u64 = shared.geometry.layer_bytes[..layer].iter().sum();
        self.view.header.slot_offset(self.slot) + before
    }

    /// Whether all bytes of `layers` are in the page cache now.
    fn is_resident(&self, shared: &Shared, layers: &Range<usize>) -> bool {
        let (start, end) = (
            self.layer_offset(shared, layers.start),
            self.layer_offset(shared, layers.end),
        );
        // A slot of another geometry is refused later; until then its bounds are not to be trusted.
        let mapping = self.view.mapping();
        end <= mapping.len() as u64 && mapping.is_resident(start as usize..end as usize)
    }
}

/// Some layers of one block of a load.
struct Part<'a> {
    shared: &'a Shared,
    found: &'a Found,
    record: &'a SlotRecord,
    block: u32,
    layers: Range<usize>,
}

impl Part<'_> {
    fn layer_offset(&self, layer: usize) -> u64 {
        self.found.layer_offset(self.shared, layer)
    }

    /// The checksum of a layer, if it is to be checked. After a crash of the system a record may be there without its
    /// payload, so what was written before the last boot always is.
    fn crc(&self, layer: usize) -> Option<LayerCrc> {
        let is_from_before = self.found.view.header.boot_id != self.shared.directory.host.boot_id;
        (self.shared.verify || is_from_before).then(|| LayerCrc::new(&self.record.key.0, layer as u32))
    }

    /// Brings the part's bytes to the start of `staging` and checks them there.
    fn stage(&self, staging: &mut Lease) -> Result<(), MissReason> {
        let sizes = &self.shared.geometry.layer_bytes[self.layers.clone()];
        let offset = self.layer_offset(self.layers.start);
        let mapped = self.shared.directory.mapped_payload();
        if !mapped {
            let whole = sizes.iter().sum::<u64>() as usize;
            let read = self.found.view.file.read_exact_at(&mut staging[..whole], offset);
            if let Err(error) = read {
                tracing::warn!(path = %self.found.view.path.display(), %error, "cannot read a block");
                return Err(MissReason::Io);
            }
        }
        let mut at = 0;
        let mut whole = true;
        for (layer, &bytes) in self.layers.clone().zip(sizes) {
            let place = &mut staging[at..at + bytes as usize];
            let mut crc = self.crc(layer);
            if mapped {
                let source = self
                    .found
                    .view
                    .mapping()
                    .source(offset as usize + at, place.len());
                copy_bytes(source, place.into(), crc.as_mut());
            } else if let Some(crc) = &mut crc {
                crc.update(place);
            }
            whole &= self.matches(layer, crc);
            at += bytes as usize;
        }
        store_fence();
        if whole { Ok(()) } else { Err(MissReason::Corrupt) }
    }

    fn matches(&self, layer: usize, crc: Option<LayerCrc>) -> bool {
        crc.is_none_or(|crc| crc.value() == self.record.layer_crcs[layer])
    }
}

/// How long a thread sleeps at most before it looks whether the store was closed.
pub(crate) const IDLE_CHECK: Duration = Duration::from_millis(500);
