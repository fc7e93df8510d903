//! Segment files: as a reader sees them, and as their one writer owns them.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, OnceLock};

use kvlane_core::{BlockKey, NamespaceId};
use rustix::fs::AtFlags;

use crate::cold::open_direct;
use crate::control::open_trusted;
use crate::directory::{Directory, random_u64, segment_name, unix_ms};
use crate::error::{FsError, Result};
use crate::format::{
    self, BAD_MARK, PAGE_BYTES, RECORD_FIXED_BYTES, Reject, SEGMENT_HEADER_BYTES, SegmentHeader, SlotRecord,
    SlotState, counters,
};
use crate::host::Host;
use crate::options::Medium;
use crate::raw::{ForkGuard, OfdLock, ReadMapping, WriteMapping, store_fence};

mod create;
mod removal;

use create::{allocate, create_unnamed, fill};
pub(crate) use removal::{Hold, Removed, remove_orphan};

/// The lock that says that a segment's writer lives.
const OWNER_LOCK: OfdLock = OfdLock::byte(0);

/// A segment as anybody may read it.
#[derive(Debug)]
pub(crate) struct SegmentView {
    pub(crate) header: SegmentHeader,
    pub(crate) path: PathBuf,
    pub(crate) file: File,
    /// Slots that were read past the page cache before: who asks again would rather find them there.
    read_past: OnceLock<Vec<AtomicBool>>,
    mapping: ReadMapping,
    /// A read fault in a hole of this file takes a page.
    holes_take_memory: bool,
    /// How often it is held: the lock belongs to the open file, which has many users.
    holds: Mutex<usize>,
}

impl SegmentView {
    /// Opens and checks a segment. `Ok(None)`: it was removed meanwhile.
    pub(crate) fn open(directory: &Directory, name: &str) -> Result<Option<Self>> {
        let path = directory.path.join(name);
        let Some(file) = open_trusted(&directory.folder, name, &path, false)? else {
            return Ok(None);
        };
        Self::from_file(directory, file, path, name).map(Some)
    }

    fn from_file(directory: &Directory, file: File, path: PathBuf, name: &str) -> Result<Self> {
        let header = read_header(&file, &path, name)?;
        // What a mapping of a network or overlay file shows may differ from the file: only the tables are mapped there.
        let mapped = if directory.choice.medium == Medium::Network {
            header.data_offset()
        } else {
            header.file_bytes()
        };
        let mapping = ReadMapping::new(&file, mapped as usize).map_err(FsError::io("map", &path))?;
        Ok(SegmentView {
            header,
            path,
            file,
            read_past: OnceLock::new(),
            mapping,
            // Whatever way the bytes take to it: what is resident is read through the mapping on every local medium.
            holes_take_memory: directory.lives_in_memory(),
            holds: Mutex::new(0),
        })
    }

    /// The file for one read of a slot past the page cache, where that is to be had. The first read of a block is most
    /// often the last one; the second one goes through the page cache, so that the third need not ask the device.
    pub(crate) fn open_direct(&self, slot: u32) -> Option<File> {
        let all = || {
            (0..self.header.slot_count)
                .map(|_| AtomicBool::new(false))
                .collect()
        };
        let read_past = self.read_past.get_or_init(all);
        let again = read_past.get(slot as usize)?.swap(true, Ordering::Relaxed);
        if again { None } else { open_direct(&self.file) }
    }

    /// Brings the tables into memory. May block; where it fails, they come when they are looked at.
    pub(crate) fn map_tables(&self) {
        if let Err(error) = self.mapping.populate_read(0..self.header.data_offset() as usize) {
            tracing::debug!(path = %self.path.display(), %error, "cannot map the tables of a segment");
        }
    }

    pub(crate) fn mapping(&self) -> &ReadMapping {
        &self.mapping
    }

    /// Grows with every change of any slot.
    pub(crate) fn changes(&self) -> u64 {
        self.mapping
            .load_u64((self.header.counters_offset() + counters::CHANGES) as usize)
    }

    /// The slot's sequence word: odd while it is being written.
    pub(crate) fn sequence(&self, slot: u32) -> u64 {
        self.mapping.load_u64(self.header.sequence_offset(slot) as usize)
    }

    /// The slot's last-used mark; a block that turned out to be bad was never used.
    pub(crate) fn mark(&self, slot: u32) -> u32 {
        let mark = self.mapping.load_u32(self.header.mark_offset(slot) as usize);
        if mark == BAD_MARK { 0 } else { mark }
    }

    /// Whether somebody found out that the slot's bytes are not those of its block.
    pub(crate) fn is_bad(&self, slot: u32) -> bool {
        self.mapping.load_u32(self.header.mark_offset(slot) as usize) == BAD_MARK
    }

    /// Start id of the owner.
    pub(crate) fn owner(&self) -> u64 {
        self.mapping
            .load_u64((self.header.counters_offset() + counters::OWNER) as usize)
    }

    /// The slot's record, if it is whole and belongs to `sequence`.
    pub(crate) fn record(&self, slot: u32, sequence: u64) -> Result<SlotRecord, Reject> {
        let mut bytes = vec![0; RECORD_FIXED_BYTES + 4 * self.header.layer_count as usize];
        self.mapping
            .read_bytes(self.header.record_offset(slot) as usize, &mut bytes);
        let record = format::parse_slot_record(&bytes, self.header.layer_count)?;
        if record.sequence != sequence {
            return Err(Reject::Field {
                field: "sequence",
                found: record.sequence,
            });
        }
        Ok(record)
    }

    /// The payload bytes of each layer.
    pub(crate) fn layer_bytes(&self) -> Result<Vec<u64>, Reject> {
        let mut bytes = vec![0; 8 * self.header.layer_count as usize];
        self.mapping
            .read_bytes(self.header.layers_offset() as usize, &mut bytes);
        format::parse_layers(&bytes, &self.header)
    }

    /// Whether the process that owns the segment lives.
    pub(crate) fn owner_lives(&self) -> bool {
        OWNER_LOCK.is_held_by_other(&self.file).unwrap_or(false)
    }
}

/// Reads and checks a file's header and length, and that it is the file of that name and not a copy of another.
pub(crate) fn read_header(file: &File, path: &std::path::Path, name: &str) -> Result<SegmentHeader> {
    let length = file.metadata().map_err(FsError::io("inspect", path))?.len();
    let reject = |reject| FsError::Foreign {
        path: path.into(),
        reject,
    };
    let expected = SEGMENT_HEADER_BYTES as u64;
    if length < expected {
        return Err(reject(Reject::Truncated {
            found: length,
            expected,
        }));
    }
    let mut head = [0; SEGMENT_HEADER_BYTES];
    std::os::unix::fs::FileExt::read_exact_at(file, &mut head, 0).map_err(FsError::io("read", path))?;
    let header = format::parse_segment_header(&head).map_err(reject)?;
    if length < header.file_bytes() {
        return Err(reject(Reject::Truncated {
            found: length,
            expected: header.file_bytes(),
        }));
    }
    if name != segment_name(header.segment_id) {
        return Err(reject(Reject::Field {
            field: "segment_id",
            found: header.segment_id,
        }));
    }
    Ok(header)
}

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

    /// Takes over a segment whose writer is gone. `Ok(None)`: it is owned, it vanished, or its geometry is another.
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
        if !is_linked_as(directory, &file, name).map_err(FsError::io("inspect", &path))? {
            return Ok(None);
        }
        // A number of its own: this process may be the old owner too, if it has lost its lock without noticing.
        let start_id = random_u64();
        let Some(segment) = Self::finish_open(directory, file, name, start_id)? else {
            return Ok(None);
        };
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

fn is_linked_as(directory: &Directory, file: &File, name: &str) -> std::io::Result<bool> {
    let own = file.metadata()?;
    match rustix::fs::statat(&directory.folder, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => Ok(stat.st_ino == own.ino() && stat.st_dev == own.dev()),
        Err(rustix::io::Errno::NOENT) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests;
