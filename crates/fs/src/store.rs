//! Stores: from the paged cache into slots.

use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Instant;

use kvlane_core::{JobId, MissReason, NamespaceId, Outcome, StoreRequest};
use kvlane_cuda::{DeviceCache, Patience};

use crate::cache::{Cache, gave_up};
use crate::counters::Counters;
use crate::format::{SlotRecord, SlotState};
use crate::gate::Gate;
use crate::raw::{HostCache, LayerCrc, Runs, copy_bytes, pwritev_all, store_fence};
use crate::segment::OwnedSegment;
use crate::shared::Shared;
use crate::writer::Command;

/// Bytes written in one call on the way through the page cache. The checksum has just brought them into the CPU's cache,
/// and the larger the call, the larger the pieces in which the kernel keeps its books.
const WRITE_BYTES: u64 = 2 << 20;

/// The slot that a block goes to.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub(crate) segment: Arc<OwnedSegment>,
    pub(crate) slot: u32,
    /// The odd sequence while it is filled.
    pub(crate) odd: u64,
}

/// What the writer thread decided about each block of a store.
#[derive(Debug, Clone)]
pub(crate) enum Plan {
    /// Copy it here.
    Copy(Place),
    /// It is in the store already.
    Present,
    /// There is no room for it.
    Dropped,
}

/// How a block of a store has ended.
const PENDING: u8 = 0;
const STORED: u8 = 1;
const FAILED: u8 = 2;
/// The file system did not take its bytes.
const REFUSED: u8 = 3;

/// One store in flight.
#[derive(Debug)]
pub(crate) struct StoreJob {
    id: JobId,
    request: StoreRequest,
    namespace: NamespaceId,
    /// The epoch for which it was planned, or else the one in which it began, or a later one, which the writer thread
    /// notices by the namespace.
    epoch: u64,
    shared: Weak<Shared>,
    plans: OnceLock<Vec<Plan>>,
    gate: Gate,
    next_block: AtomicUsize,
    /// (block, layer) pairs that some thread has taken on.
    claimed: Vec<AtomicBool>,
    crcs: Vec<AtomicU32>,
    /// Blocks that `finish_store` has allowed to be committed.
    allowed: Vec<AtomicBool>,
    /// Layers of each block that are not in its slot, and one more until it may be committed.
    parts_left: Vec<AtomicU32>,
    ended: Vec<AtomicU8>,
    blocks_left: AtomicUsize,
    failure: OnceLock<std::io::Error>,
    closed_because: OnceLock<MissReason>,
    completed: AtomicBool,
    released: AtomicBool,
}

impl StoreJob {
    pub(crate) fn new(
        shared: &Arc<Shared>,
        id: JobId,
        request: StoreRequest,
        namespace: NamespaceId,
        epoch: u64,
    ) -> Arc<Self> {
        let (blocks, layers) = (request.keys.len(), shared.geometry.layer_bytes.len());
        Arc::new(StoreJob {
            id,
            namespace,
            epoch,
            shared: Arc::downgrade(shared),
            plans: OnceLock::new(),
            gate: Gate::default(),
            next_block: AtomicUsize::new(0),
            claimed: (0..blocks * layers).map(|_| AtomicBool::new(false)).collect(),
            crcs: (0..blocks * layers).map(|_| AtomicU32::new(0)).collect(),
            allowed: (0..blocks).map(|_| AtomicBool::new(false)).collect(),
            parts_left: (0..blocks).map(|_| AtomicU32::new(layers as u32 + 1)).collect(),
            ended: (0..blocks).map(|_| AtomicU8::new(PENDING)).collect(),
            blocks_left: AtomicUsize::new(blocks),
            failure: OnceLock::new(),
            closed_because: OnceLock::new(),
            completed: AtomicBool::new(false),
            released: AtomicBool::new(false),
            request,
        })
    }

    pub(crate) fn id(&self) -> JobId {
        self.id
    }

    pub(crate) fn request(&self) -> &StoreRequest {
        &self.request
    }

    pub(crate) fn namespace(&self) -> NamespaceId {
        self.namespace
    }

    pub(crate) fn deadline(&self) -> Instant {
        self.request.deadline
    }

    pub(crate) fn plans(&self) -> &[Plan] {
        self.plans.get().map_or(&[], Vec::as_slice)
    }

    pub(crate) fn stored(&self, position: usize) -> bool {
        self.ended[position].load(Ordering::Acquire) == STORED
    }

    /// Whether the file system did not take the bytes of a block: that says something of its slot.
    pub(crate) fn was_refused(&self, position: usize) -> bool {
        self.ended[position].load(Ordering::Acquire) == REFUSED
    }

    /// Why the first block that could not be copied could not.
    pub(crate) fn failure(&self) -> Option<&std::io::Error> {
        self.failure.get()
    }

    /// Takes the writer thread's decisions; blocks without a copy end here.
    pub(crate) fn set_plans(&self, plans: Vec<Plan>) {
        let decided: Vec<(usize, u8)> = plans
            .iter()
            .enumerate()
            .filter_map(|(position, plan)| match plan {
                Plan::Copy(_) => None,
                Plan::Present => Some((position, STORED)),
                Plan::Dropped => Some((position, FAILED)),
            })
            .collect();
        let _ = self.plans.set(plans);
        for (position, state) in decided {
            self.end_block(position, state);
        }
    }

    /// Ends the job for its owner. Threads that are still copying can no longer commit anything; their slots are free
    /// again once they have stopped.
    pub(crate) fn close(&self, reason: MissReason) {
        let _ = self.closed_because.set(reason);
        let empty = self.gate.close();
        self.complete();
        if empty {
            self.release();
        }
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.gate.is_closed()
    }

    /// Copies one layer of all blocks, early. On a disk whole slots are written, so it waits for the rest there.
    pub(crate) fn run_layer(&self, layer: usize) {
        let Some(shared) = self.shared.upgrade() else {
            return;
        };
        if !shared.directory.mapped_payload() {
            return;
        }
        let started = Instant::now();
        for position in 0..self.request.keys.len() {
            self.copy_block(&shared, position, layer..layer + 1, false);
        }
        Counters::add_nanos(&shared.counters.store_nanos, started.elapsed());
    }

    /// Copies what is left of the blocks, one after the other; several threads share the job.
    pub(crate) fn run_rest(&self) {
        let Some(shared) = self.shared.upgrade() else {
            return;
        };
        let started = Instant::now();
        let layers = shared.geometry.layer_bytes.len();
        loop {
            let position = self.next_block.fetch_add(1, Ordering::Relaxed);
            if position >= self.request.keys.len() || self.gate.is_closed() {
                break;
            }
            if Instant::now() >= self.request.deadline {
                self.close(MissReason::TimedOut);
                break;
            }
            self.copy_block(&shared, position, 0..layers, true);
        }
        Counters::add_nanos(&shared.counters.store_nanos, started.elapsed());
    }

    fn copy_block(&self, shared: &Shared, position: usize, layers: std::ops::Range<usize>, allow: bool) {
        let Some(Plan::Copy(place)) = self.plans().get(position) else {
            return;
        };
        let left = || self.release();
        let Some(_inside) = self.gate.enter(&left) else {
            return;
        };
        if !place.segment.is_ours() {
            self.end_block(position, FAILED);
            return;
        }
        let count = shared.geometry.layer_bytes.len();
        let mine: Vec<usize> = layers
            .filter(|layer| !self.claimed[position * count + layer].swap(true, Ordering::AcqRel))
            .collect();
        let allows = u32::from(allow && !self.allowed[position].swap(true, Ordering::AcqRel));
        let copied = match &shared.cache {
            _ if mine.is_empty() => Ok(()),
            Cache::Host(cache) if shared.directory.mapped_payload() => {
                self.copy_mapped(shared, cache, position, place, &mine);
                Ok(())
            }
            Cache::Host(cache) => self.write_slot(shared, cache, position, place),
            Cache::Device(cache) => self.copy_staged(shared, cache, position, place, &mine),
        };
        if let Err(error) = copied {
            self.fail_block(position, error);
            return;
        }
        let parts = mine.len() as u32 + allows;
        if parts > 0 && self.parts_left[position].fetch_sub(parts, Ordering::AcqRel) == parts {
            self.commit(shared, position, place);
        }
    }

    /// Ends a block that could not be copied. The writer thread hears of it when the job has ended.
    pub(crate) fn fail_block(&self, position: usize, error: std::io::Error) {
        // Only the system has a number for it. What a device says is not the slot's fault.
        let is_refused = error.raw_os_error().is_some();
        if is_refused || !self.gate.is_closed() {
            let _ = self.failure.set(error);
        }
        self.end_block(position, if is_refused { REFUSED } else { FAILED });
    }

    fn copy_mapped(
        &self,
        shared: &Shared,
        cache: &HostCache,
        position: usize,
        place: &Place,
        layers: &[usize],
    ) {
        let count = shared.geometry.layer_bytes.len();
        let slot = place.segment.header().slot_offset(place.slot);
        let mut next = 0;
        let mut offset = slot;
        for &layer in layers {
            offset += shared.geometry.layer_bytes[next..layer].iter().sum::<u64>();
            let bytes = shared.geometry.layer_bytes[layer];
            let target = place.segment.mapping().target(offset as usize, bytes as usize);
            let mut crc = LayerCrc::new(&self.request.keys[position].0, layer as u32);
            cache.copy_layer_out(layer, self.request.blocks[position], target, Some(&mut crc));
            self.crcs[position * count + layer].store(crc.value(), Ordering::Release);
            offset += bytes;
            next = layer + 1;
        }
        store_fence();
    }

    /// Writes the whole slot, in pieces of whole pages: a partial page that is not resident would have to be read first.
    fn write_slot(
        &self,
        shared: &Shared,
        cache: &HostCache,
        position: usize,
        place: &Place,
    ) -> std::io::Result<()> {
        let geometry = &shared.geometry;
        let count = geometry.layer_bytes.len();
        let block = self.request.blocks[position];
        let mut offset = place.segment.header().slot_offset(place.slot);
        let mut runs = Runs::new();
        for layer in 0..count {
            let mut crc = LayerCrc::new(&self.request.keys[position].0, layer as u32);
            cache.checksum_layer(layer, block, &mut crc);
            self.crcs[position * count + layer].store(crc.value(), Ordering::Release);
            runs.push_layer(cache, layer, block);
            let gathered = runs.len_bytes() as u64;
            let last = layer + 1 == count;
            if last || (gathered >= WRITE_BYTES && gathered.is_multiple_of(crate::format::PAGE_BYTES)) {
                let padding = if last {
                    geometry.slot_bytes - geometry.payload_bytes
                } else {
                    0
                };
                pwritev_all(&place.segment.file, offset, &runs, padding as usize)?;
                offset += gathered;
                runs.clear();
            }
        }
        Ok(())
    }

    /// From a device: into pinned memory, and from there with the checksum to where the medium wants it.
    fn copy_staged(
        &self,
        shared: &Shared,
        cache: &DeviceCache,
        position: usize,
        place: &Place,
        layers: &[usize],
    ) -> std::io::Result<()> {
        let cancelled = || self.gate.is_closed();
        let patience = Patience {
            deadline: self.request.deadline,
            cancelled: &cancelled,
        };
        let copied = cache.copy_block_out(self.request.blocks[position], layers, &patience);
        let mut staging = copied.map_err(|error| {
            if gave_up(&error) {
                self.close(MissReason::TimedOut);
            }
            std::io::Error::other(error)
        })?;
        let geometry = &shared.geometry;
        let slot = place.segment.header().slot_offset(place.slot);
        let mapped = shared.directory.mapped_payload();
        let mut at = 0;
        for &layer in layers {
            let bytes = &staging[at..at + geometry.layer_bytes[layer] as usize];
            let mut crc = LayerCrc::new(&self.request.keys[position].0, layer as u32);
            if mapped {
                let offset = slot + geometry.layer_bytes[..layer].iter().sum::<u64>();
                let target = place.segment.mapping().target(offset as usize, bytes.len());
                copy_bytes(bytes.into(), target, Some(&mut crc));
            } else {
                crc.update(bytes);
            }
            let number = position * geometry.layer_bytes.len() + layer;
            self.crcs[number].store(crc.value(), Ordering::Release);
            at += bytes.len();
        }
        if mapped {
            store_fence();
            return Ok(());
        }
        // The layers are all of them, since a medium that is not mapped gets whole slots.
        let whole = geometry.slot_bytes as usize;
        staging[at..whole].fill(0);
        place.segment.file.write_all_at(&staging[..whole], slot)
    }

    fn commit(&self, shared: &Shared, position: usize, place: &Place) {
        // Closed means that the paged cache may have changed under the copy. A gate that is open now was open during
        // the whole copy, so what was copied is what was meant.
        if self.gate.is_closed() || !place.segment.is_ours() {
            self.end_block(position, FAILED);
            return;
        }
        if shared.directory.control.epoch() != self.epoch {
            // Nobody would find it: it is named in the epoch that is over.
            let _ = self.closed_because.set(MissReason::Dropped);
            self.end_block(position, FAILED);
            return;
        }
        let count = shared.geometry.layer_bytes.len();
        let crcs = &self.crcs[position * count..(position + 1) * count];
        let mut record = SlotRecord {
            sequence: 0,
            state: SlotState::Committed,
            depth: self.request.first_depth + position as u32,
            key: self.request.keys[position],
            namespace: self.namespace,
            payload_bytes: shared.geometry.payload_bytes,
            deadline_unix_ms: 0,
            owner: 0,
            written_unix_ms: 0,
            layer_crcs: crcs.iter().map(|crc| crc.load(Ordering::Acquire)).collect(),
        };
        shared.directory.wait_until_writable();
        if !place.segment.publish(place.slot, place.odd, &mut record) {
            self.end_block(position, FAILED);
            return;
        }
        place.segment.set_mark(place.slot, crate::shared::mark_now());
        shared.directory.control.bump_changes();
        Counters::add(&shared.counters.stored_blocks, 1);
        Counters::add(&shared.counters.stored_bytes, shared.geometry.payload_bytes);
        self.end_block(position, STORED);
    }

    fn end_block(&self, position: usize, state: u8) {
        let first =
            self.ended[position].compare_exchange(PENDING, state, Ordering::AcqRel, Ordering::Acquire);
        if first.is_ok() && self.blocks_left.fetch_sub(1, Ordering::AcqRel) == 1 {
            // Everything has ended by itself; closing lets the last thread out release the slots.
            let empty = self.gate.close();
            self.complete();
            if empty {
                self.release();
            }
        }
    }

    fn complete(&self) {
        if self.completed.swap(true, Ordering::AcqRel) {
            return;
        }
        let Some(shared) = self.shared.upgrade() else {
            return;
        };
        let positions: Vec<usize> = (0..self.ended.len())
            .filter(|&position| !self.stored(position))
            .collect();
        let outcome = if positions.is_empty() {
            Outcome::Done
        } else {
            let dropped = positions
                .iter()
                .any(|&position| matches!(self.plans().get(position), Some(Plan::Dropped)));
            let otherwise = if dropped {
                MissReason::Dropped
            } else {
                MissReason::Io
            };
            let reason = self.closed_because.get().copied().unwrap_or(otherwise);
            shared.counters.miss(reason, positions.len() as u64);
            Outcome::Miss { positions, reason }
        };
        shared.jobs.finish(self.id, outcome);
    }

    /// Nobody copies for this job any more: the writer thread may use the slots that were not committed.
    fn release(&self) {
        if self.released.swap(true, Ordering::AcqRel) {
            return;
        }
        if let Some(shared) = self.shared.upgrade() {
            shared.tell_writer(Command::Ended(self.id));
        }
    }
}
