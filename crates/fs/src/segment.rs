//! Segment files, as their one writer owns them.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};

use kvlane_core::{BlockKey, NamespaceId};
use rustix::fs::AtFlags;

use crate::control::open_trusted;
use crate::descriptors::TakenByOwner;
use crate::directory::{Directory, random_u64, segment_name, unix_ms};
use crate::error::{FsError, Result};
use crate::format::{self, BAD_MARK, PAGE_BYTES, SegmentHeader, SlotRecord, SlotState, counters};
use crate::host::Host;
use crate::raw::{ForkGuard, OfdLock, WriteMapping, store_fence};

mod create;
mod removal;
mod view;

use create::{allocate, create_unnamed, fill};
pub(crate) use removal::{Hold, Removed, remove_orphan};
pub(crate) use view::{SegmentView, read_header};

/// The lock that says that a segment's writer lives.
const OWNER_LOCK: OfdLock = OfdLock::byte(0);

/// A segment that this process writes.
#[derive(Debug)]
pub(crate) struct OwnedSegment {
    pub(crate) view: Arc<SegmentView>,
    // In front of `file`, so that it is dropped first.
    _fork_guard: ForkGuard,
    /// Open for writing; carries the owner lock.
    pub(crate) file: File,
    mapping: WriteMapping,
    start_id: u64,
    process: u32,
    lost: AtomicBool,
    _descriptor: TakenByOwner,
}

/// What all blocks of one cache have in common.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Geometry {
    pub(crate) layer_bytes: Vec<u64>,
    pub(crate) payload_bytes: u64,
    pub(crate) slot_bytes: u64,
    pub(crate) id: [u8; 32],
}

impl Geometry {
    pub(crate) fn new(layer_bytes: Vec<u64>) -> Self {
        let payload_bytes: u64 = layer_bytes.iter().sum();
        Geometry {
            payload_bytes,
            slot_bytes: payload_bytes.div_ceil(PAGE_BYTES) * PAGE_BYTES,
            id: format::geometry_id(&layer_bytes),
            layer_bytes,
        }
    }

    pub(crate) fn fits(&self, header: &SegmentHeader) -> bool {
        header.geometry == self.id
            && header.slot_bytes == self.slot_bytes
            && header.payload_bytes == self.payload_bytes
            && header.layer_count as usize == self.layer_bytes.len()
    }

    /// Header of a new segment of about `target_bytes`; `None` if not even one slot fits into `limit_bytes`.
    pub(crate) fn header(&self, target_bytes: u64, limit_bytes: u64, host: Host) -> Option<SegmentHeader> {
        let mut header = SegmentHeader {
            segment_id: random_u64(),
            created_unix_ms: unix_ms(),
            slot_count: 1,
            layer_count: self.layer_bytes.len() as u32,
            slot_bytes: self.slot_bytes,
            payload_bytes: self.payload_bytes,
            boot_id: host.boot_id,
            geometry: self.id,
            machine_id: host.machine_id,
        };
        let per_slot = self.slot_bytes + header.record_bytes() + 12;
        let wanted = (target_bytes.min(limit_bytes) / per_slot).clamp(1, u64::from(format::SLOTS_MAX));
        header.slot_count = wanted as u32;
        while header.slot_count > 1 && header.file_bytes() > target_bytes.min(limit_bytes) {
            header.slot_count -= 1;
        }
        (header.file_bytes() <= limit_bytes).then_some(header)
    }
}

impl OwnedSegment {
    /// Makes a segment: allocated, locked and headed before its name appears.
    pub(crate) fn create(
        directory: &Directory,
        header: &SegmentHeader,
        layer_bytes: &[u64],
        start_id: u64,
    ) -> Result<Self> {
        let name = segment_name(header.segment_id);
        let path = directory.path.join(&name);
        let (file, temporary) = create_unnamed(directory, &name).map_err(FsError::io("create", &path))?;
        let placed = directory.choice.keep_places(&file);
        let filled = placed
            .map_err(FsError::io("turn copy-on-write off for", &path))
            .and_then(|()| allocate(directory, &file, header, &path))
            .and_then(|()| fill(&file, header, layer_bytes, &path, start_id));
        let filled = filled.and_then(|()| {
            create::publish(directory, &file, temporary.as_deref(), &name).map_err(FsError::io("link", &path))
        });
        if let Err(error) = filled {
            if let Some(temporary) = &temporary {
                let _ = rustix::fs::unlinkat(&directory.folder, temporary, AtFlags::empty());
            }
            return Err(error);
        }
        let opened = Self::finish_open(directory, file, &name, start_id).and_then(|segment| {
            segment.ok_or_else(|| FsError::io("open", &path)(std::io::ErrorKind::NotFound.into()))
        });
        if opened.is_err() {
            // Nobody would own it, though it counts against the capacity.
            let _ = rustix::fs::unlinkat(&directory.folder, &name, AtFlags::empty());
        }
        directory.control.bump_generation();
        opened
    }

    /// Takes over a segment whose writer is gone. `Ok(None)`: it is owned, it vanished, its geometry is another, or it has
    /// no slot that can be written.
    pub(crate) fn adopt(directory: &Directory, name: &str, geometry: &Geometry) -> Result<Option<Self>> {
        let path = directory.path.join(name);
        let Some(file) = open_trusted(&directory.folder, name, &path, true)? else {
            return Ok(None);
        };
        let header = read_header(&file, &path, name)?;
        if !geometry.fits(&header)
            || is_foreign_host(directory, &header)
            || !directory.choice.keeps_places(&file)
        {
            return Ok(None);
        }
        if !OWNER_LOCK.try_lock(&file).map_err(FsError::io("lock", &path))? {
            return Ok(None);
        }
        // Between open and lock its owner may have removed it: the name must still be this file.
        if !is_linked_as(&directory.folder, &file, name).map_err(FsError::io("inspect", &path))? {
            return Ok(None);
        }
        // A number of its own: this process may be the old owner too, if it has lost its lock without noticing.
        let start_id = random_u64();
        let Some(segment) = Self::finish_open(directory, file, name, start_id)? else {
            return Ok(None);
        };
        if (0..header.slot_count).all(|slot| segment.view.is_spent(slot)) {
            // It would take a part of the budget and never give a slot.
            return Ok(None);
        }
        segment.set_owner(start_id);
        // Its maker may have died before it told anybody that there is a new segment.
        directory.control.bump_generation();
        Ok(Some(segment))
    }

    fn finish_open(directory: &Directory, file: File, name: &str, start_id: u64) -> Result<Option<Self>> {
        let path = directory.path.join(name);
        let Some(view) = SegmentView::open(directory, name)? else {
            return Ok(None);
        };
        let mapping =
            WriteMapping::new(&file, view.mapping.len()).map_err(FsError::io("map for writing", &path))?;
        mapping.dont_fork().map_err(FsError::io("map", &path))?;
        let process = std::process::id();
        Ok(Some(OwnedSegment {
            _descriptor: directory.descriptors.take_own(view.header.segment_id),
            view: Arc::new(view),
            _fork_guard: ForkGuard::new(&file),
            file,
            mapping,
            start_id,
            process,
            lost: AtomicBool::new(false),
        }))
    }

    pub(crate) fn header(&self) -> &SegmentHeader {
        &self.view.header
    }

    pub(crate) fn mapping(&self) -> &WriteMapping {
        &self.mapping
    }

    pub(crate) fn set_owner(&self, start_id: u64) {
        let offset = self.header().counters_offset() + counters::OWNER;
        self.mapping
            .u64_at(offset as usize)
            .store(start_id, Ordering::Release);
        // The other half is in `invalidate`: an owner from before sees this, or we see its slot odd and let it rest.
        fence(Ordering::SeqCst);
    }

    /// Whether writing is still allowed: not in a forked child, and not after somebody else took the segment over.
    pub(crate) fn is_ours(&self) -> bool {
        if self.lost.load(Ordering::Relaxed) {
            return false;
        }
        let ours = self.view.owner() == self.start_id && self.process == std::process::id();
        if !ours {
            self.lost.store(true, Ordering::Relaxed);
        }
        ours
    }

    /// Makes the slot's content invisible and returns the odd sequence that stands for it. Payload may be written from
    /// here on. `None`: somebody else has taken the segment over, and what is in the slot now is left alone.
    ///
    /// A process may stand still between any two steps for as long as it takes to be replaced. So the sequence is moved
    /// on from what it was before the owner was looked at, which fails if the new owner has used the slot since; and the
    /// owner is looked at once more, because a new one that has not used the slot yet may not know that it is odd.
    pub(crate) fn invalidate(&self, slot: u32) -> Option<u64> {
        self.invalidate_with(slot, || ())
    }

    /// [`invalidate`](Self::invalidate), with what happens where it may stand still.
    fn invalidate_with(&self, slot: u32, stand_still: impl Fn()) -> Option<u64> {
        let word = self.mapping.u64_at(self.header().sequence_offset(slot) as usize);
        let odd = loop {
            let now = word.load(Ordering::SeqCst);
            if !self.is_ours() {
                return None;
            }
            stand_still();
            let odd = next_odd(now);
            let moved = word.compare_exchange(now, odd, Ordering::SeqCst, Ordering::Relaxed);
            if moved.is_ok() {
                break odd;
            }
        };
        stand_still();
        fence(Ordering::SeqCst);
        if !self.is_ours() {
            return None;
        }
        // What was found out about the block in it does not hold for the next one.
        let mark = self.mapping.u32_at(self.header().mark_offset(slot) as usize);
        let _ = mark.compare_exchange(BAD_MARK, 0, Ordering::Relaxed, Ordering::Relaxed);
        // Payload stores, non-temporal ones too, must not overtake the invalidation.
        store_fence();
        self.bump_changes();
        Some(odd)
    }

    /// Writes a record and makes it visible. `odd` is what [`invalidate`](Self::invalidate) returned. `false`: the slot
    /// has another sequence by now, so it belongs to whoever took the segment over, and is left alone.
    pub(crate) fn publish(&self, slot: u32, odd: u64, record: &mut SlotRecord) -> bool {
        let word = self.mapping.u64_at(self.header().sequence_offset(slot) as usize);
        // The end of the numbers is nothing that counting reaches, but a file may say so.
        let Some(even) = odd.checked_add(1) else {
            return false;
        };
        if word.load(Ordering::Acquire) != odd {
            return false;
        }
        record.sequence = even;
        record.owner = self.start_id;
        record.written_unix_ms = unix_ms();
        // Payload before record before sequence: non-temporal stores are not ordered by a release store alone.
        store_fence();
        let bytes = record.encode(self.header().record_bytes() as usize);
        self.mapping
            .write_bytes(self.header().record_offset(slot) as usize, &bytes);
        store_fence();
        fence(Ordering::Release);
        let published = word.compare_exchange(odd, even, Ordering::AcqRel, Ordering::Relaxed);
        self.bump_changes();
        published.is_ok()
    }

    /// Makes the slot one that holds nothing, for everybody to see.
    pub(crate) fn clear(&self, slot: u32) {
        let Some(odd) = self.invalidate(slot) else {
            return;
        };
        let mut record = SlotRecord {
            sequence: 0,
            state: SlotState::Free,
            depth: 0,
            key: BlockKey([0; 32]),
            namespace: NamespaceId([0; 32]),
            payload_bytes: 0,
            deadline_unix_ms: 0,
            owner: 0,
            written_unix_ms: 0,
            layer_crcs: Vec::new(),
        };
        self.publish(slot, odd, &mut record);
    }

    pub(crate) fn bump_changes(&self) {
        let offset = self.header().counters_offset() + counters::CHANGES;
        self.mapping
            .u64_at(offset as usize)
            .fetch_add(1, Ordering::AcqRel);
    }

    pub(crate) fn set_mark(&self, slot: u32, mark: u32) {
        self.mapping
            .u32_at(self.header().mark_offset(slot) as usize)
            .fetch_max(mark, Ordering::Relaxed);
    }

    /// Empties the segment, gives its space back and removes its name. Readers that still have it mapped find nothing
    /// valid in it; its length stays, so their mappings stay safe.
    pub(crate) fn retire(&self, directory: &Directory) {
        if (0..self.header().slot_count).any(|slot| self.invalidate(slot).is_none()) {
            return;
        }
        let name = segment_name(self.header().segment_id);
        let unlinked = rustix::fs::unlinkat(&directory.folder, name, AtFlags::empty());
        directory.control.bump_generation();
        directory.control.bump_changes();
        if let Err(errno) = unlinked
            && errno != rustix::io::Errno::NOENT
        {
            // It still has a name and will be adopted: its slots must keep their blocks of the disk, or a store through
            // the mapping could meet a full file system.
            tracing::warn!(path = %self.view.path.display(), %errno, "cannot remove a segment");
            return;
        }
        match self.file.try_clone() {
            Ok(file) => directory.give_back_payload(Removed::new(file, self.header())),
            Err(error) => tracing::debug!(%error, "a removed segment keeps its memory until nobody maps it"),
        }
    }
}

/// Whether a free lock says nothing about the segment's writer, since it may run on another machine.
pub(crate) fn is_foreign_host(directory: &Directory, header: &SegmentHeader) -> bool {
    directory.choice.is_shared_by_machines() && !directory.host.has_made(header)
}

/// The next odd number of a sequence.
fn next_odd(sequence: u64) -> u64 {
    sequence.saturating_add(1) | 1
}

/// Moves a sequence on to its next odd number, whoever else is moving it, and returns that.
fn move_on(word: &AtomicU64) -> u64 {
    let mut now = word.load(Ordering::Relaxed);
    while let Err(other) = word.compare_exchange_weak(now, next_odd(now), Ordering::SeqCst, Ordering::Relaxed)
    {
        now = other;
    }
    next_odd(now)
}

/// Whether `name` in `folder` still is this file.
pub(crate) fn is_linked_as(folder: &File, file: &File, name: &str) -> std::io::Result<bool> {
    let own = file.metadata()?;
    match rustix::fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(stat.st_ino == own.ino() && stat.st_dev == own.dev()),
        Err(rustix::io::Errno::NOENT) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests;
