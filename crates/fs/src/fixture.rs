//! What the unit tests of this crate share: a small folder, and segments with known slots in it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvlane_core::{BlockKey, BlockMap, Device, LoadOrder, LoadRequest, NamespaceId, TensorView};

use crate::cold::ColdQueue;
use crate::descriptors::Share;
use crate::directory::Directory;
use crate::format::{SlotRecord, SlotState};
use crate::index::Found;
use crate::jobs::Job;
use crate::lister::Lister;
use crate::load::LoadJob;
use crate::options::{FsOptions, Medium};
use crate::raw::HostCache;
use crate::segment::{Geometry, OwnedSegment};
use crate::shared::{Search, Shared};

/// The namespace of all blocks in these tests, before its epoch.
pub(crate) const NAMESPACE: NamespaceId = NamespaceId([7; 32]);
/// What a lookup waits for a listing where that is not what the test is about.
pub(crate) const LISTING_PATIENCE: Duration = Duration::from_secs(10);
/// Bytes of each of the two layers of a block.
const LAYER_BYTES: u64 = 4096;

/// An opened folder that goes away with the test.
pub(crate) struct Folder {
    pub(crate) directory: Directory,
    root: tempfile::TempDir,
}

impl Folder {
    pub(crate) fn new(capacity_bytes: u64) -> Self {
        let root = tempfile::tempdir().unwrap();
        let directory = open(root.path(), capacity_bytes, Medium::Disk);
        Folder { directory, root }
    }

    /// One whose files are memory, used through mappings.
    pub(crate) fn in_memory(capacity_bytes: u64) -> Self {
        let root = tempfile::tempdir_in("/dev/shm").unwrap();
        let directory = open(root.path(), capacity_bytes, Medium::Memory);
        Folder { directory, root }
    }

    /// The folder as another process opens it.
    pub(crate) fn open_again(&self) -> Directory {
        self.open_as(Medium::Disk)
    }

    pub(crate) fn open_as(&self, medium: Medium) -> Directory {
        open(self.root.path(), self.directory.control.capacity_bytes(), medium)
    }

    pub(crate) fn path(&self) -> &std::path::Path {
        self.root.path()
    }

    /// A new segment with `slots` slots.
    pub(crate) fn segment(&self, slots: u32, start_id: u64) -> OwnedSegment {
        segment_of(&self.directory, &geometry(), slots, start_id)
    }
}

pub(crate) fn segment_of(
    directory: &Directory,
    geometry: &Geometry,
    slots: u32,
    start_id: u64,
) -> OwnedSegment {
    let mut header = geometry.header(1, u64::MAX, directory.host).unwrap();
    header.slot_count = slots;
    OwnedSegment::create(directory, &header, &geometry.layer_bytes, start_id).unwrap()
}

fn open(path: &std::path::Path, capacity_bytes: u64, medium: Medium) -> Directory {
    let options = FsOptions::default()
        .with_capacity_bytes(capacity_bytes)
        .with_medium(medium);
    let mut directory = Directory::open(path, &options, true).unwrap().unwrap();
    // Tests run side by side in one process, of which each plays several.
    directory.descriptors = Share::of_another_process(u64::MAX);
    directory
}

pub(crate) fn geometry() -> Geometry {
    Geometry::new(vec![LAYER_BYTES; 2])
}

pub(crate) fn key(number: u32) -> BlockKey {
    BlockKey(*blake3::hash(&number.to_le_bytes()).as_bytes())
}

/// Whole bytes of one slot's record; what `state` needs besides the key is filled in.
pub(crate) fn record(state: SlotState, key: BlockKey, depth: u32) -> SlotRecord {
    let committed = state == SlotState::Committed;
    SlotRecord {
        sequence: 0,
        state,
        depth,
        key,
        namespace: NAMESPACE.with_epoch(0),
        payload_bytes: 2 * LAYER_BYTES,
        deadline_unix_ms: if state == SlotState::Reserved {
            crate::directory::unix_ms() + 60_000
        } else {
            0
        },
        owner: 0,
        written_unix_ms: 0,
        layer_crcs: if committed { vec![1, 2] } else { Vec::new() },
    }
}

/// Writes a record into a slot, as its owner does.
pub(crate) fn put(segment: &OwnedSegment, slot: u32, mut record: SlotRecord) {
    let odd = segment.invalidate(slot).expect("it is ours");
    segment.publish(slot, odd, &mut record);
}

pub(crate) fn commit(segment: &OwnedSegment, slot: u32, key: BlockKey, depth: u32, mark: u32) {
    put(segment, slot, record(SlotState::Committed, key, depth));
    segment.set_mark(slot, mark);
}

/// Damages the sequence word of a slot.
pub(crate) fn set_sequence(segment: &OwnedSegment, slot: u32, sequence: u64) {
    let offset = segment.header().sequence_offset(slot);
    let word = segment.mapping().u64_at(offset as usize);
    word.store(sequence, std::sync::atomic::Ordering::Release);
}

/// A cache of 8 blocks.
pub(crate) fn cache() -> HostCache {
    HostCache::allocate(&[8 * 2 * LAYER_BYTES as usize], |addresses| {
        let views = (0..2).map(|layer| TensorView {
            name: format!("layer.{layer}"),
            address: addresses[0] + layer * 8 * LAYER_BYTES,
            device: Device::Host,
            element_bytes: 1,
            shape: vec![8, LAYER_BYTES],
            strides: vec![LAYER_BYTES as i64, 1],
        });
        BlockMap::from_tensors(views, 8, Some(0)).unwrap()
    })
}

/// The state of a transfer without threads.
pub(crate) fn shared(directory: Directory, start_id: u64) -> Arc<Shared> {
    shared_that_verifies(directory, start_id, true)
}

pub(crate) fn shared_that_verifies(directory: Directory, start_id: u64, verify: bool) -> Arc<Shared> {
    Arc::new(Shared::new(
        directory,
        geometry(),
        cache().into(),
        NAMESPACE,
        verify,
        1 << 16,
        start_id,
        None,
        Lister::new(Some(LISTING_PATIENCE)),
    ))
}

fn search_of(found: Option<Found>) -> Search {
    Search {
        found: vec![found],
        missing_in: None,
    }
}

/// A load of one block that was found, which nobody works on yet.
pub(crate) fn load_of(
    shared: &Arc<Shared>,
    key: BlockKey,
    found: Found,
    cold: Option<ColdQueue>,
) -> (kvlane_core::JobId, Arc<LoadJob>) {
    load_after(shared, key, search_of(Some(found)), cold)
}

/// A load of one block with what a search for it found, which nobody works on yet.
pub(crate) fn load_after(
    shared: &Arc<Shared>,
    key: BlockKey,
    search: Search,
    cold: Option<ColdQueue>,
) -> (kvlane_core::JobId, Arc<LoadJob>) {
    let id = shared.jobs.next_id();
    let request = LoadRequest {
        keys: vec![key],
        blocks: vec![0],
        deadline: Instant::now() + Duration::from_secs(10),
        order: LoadOrder::BlockMajor,
    };
    let job = LoadJob::new(shared, id, request, search, None, cold);
    assert!(shared.jobs.admit(id, Job::Load(Arc::clone(&job))));
    (id, job)
}

/// A load of one block that is not there, which nobody works on.
pub(crate) fn idle_load(shared: &Arc<Shared>, lasts: Duration) -> (kvlane_core::JobId, Job) {
    let id = shared.jobs.next_id();
    let request = LoadRequest {
        keys: vec![key(0)],
        blocks: vec![0],
        deadline: Instant::now() + lasts,
        order: LoadOrder::BlockMajor,
    };
    (
        id,
        Job::Load(LoadJob::new(shared, id, request, search_of(None), None, None)),
    )
}
