//! Looking into a folder from outside: what `kvlane store` shows. Works on live and on idle folders, and creates nothing.

mod descriptors;
mod explain;
mod folder;
mod gc;
mod verify;

use std::collections::BTreeMap;
use std::path::Path;

use kvlane_core::NamespaceId;
use serde::Serialize;

use crate::directory::Directory;
use crate::error::{FsError, Result};
use crate::format::{SlotRecord, SlotState};
use crate::options::FsOptions;
use crate::segment::SegmentView;
use crate::shared::MARK_MS;

pub use descriptors::descriptors;
pub use explain::{BlockInfo, ExplainReport, Explanation, Presence, explain};
pub use folder::{FolderInfo, folder};
pub use gc::{GcReport, KeptFile, gc};
pub use verify::{BadBlock, VerifyReport, verify};

/// A folder as a whole.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct StoreInfo {
    /// The folder.
    pub path: String,
    /// Name of its file system.
    pub file_system: String,
    /// The way bytes take there.
    pub medium: String,
    /// Why that way.
    pub reason: String,
    /// Whether this process may write there.
    pub writable: bool,
    /// Bytes that all segments may take.
    pub capacity_bytes: u64,
    /// Bytes that they take.
    pub used_bytes: u64,
    /// Number of resets so far.
    pub epoch: u64,
    /// Writers that live now.
    pub writers: Vec<WriterInfo>,
    /// The segments.
    pub segments: Vec<SegmentInfo>,
}

/// A writer that lives now, as it says of itself.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct WriterInfo {
    /// Bytes of its segments.
    pub used_bytes: u64,
    /// Bytes that it asks the others to give back.
    pub wanted_bytes: u64,
}

/// One segment.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct SegmentInfo {
    /// File name.
    pub name: String,
    /// Bytes of the file.
    pub file_bytes: u64,
    /// Whether its writer lives; a segment without one is adopted or removed when space is needed.
    pub owner_lives: bool,
    /// Creation, Unix milliseconds.
    pub created_unix_ms: u64,
    /// Layers of a block.
    pub layers: u32,
    /// Payload bytes of a block.
    pub block_bytes: u64,
    /// Slots in all.
    pub slots: u32,
    /// Slots that hold a block.
    pub committed: u32,
    /// Slots that are promised.
    pub reserved: u32,
    /// Slots that are being filled.
    pub writing: u32,
    /// Slots that hold nothing.
    pub free: u32,
    /// Slots that are never served: their record is damaged, or somebody found that the bytes of their block are not its own.
    pub damaged: u32,
    /// Last use of any block, Unix milliseconds, in steps of 10 s.
    pub last_used_unix_ms: u64,
    /// Blocks by namespace (64 hex digits).
    pub namespaces: BTreeMap<String, u32>,
    /// Why the file cannot be used; then everything else is zero.
    pub rejected: Option<String>,
}

fn open(path: &Path) -> Result<Directory> {
    Directory::open(path, &FsOptions::default(), false)?
        .ok_or_else(|| FsError::io("open", path)(std::io::ErrorKind::NotFound.into()))
}

/// What looking takes note of as it goes on: (bytes done, bytes in all).
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64);

/// Shows each segment of a folder to `look`, with a place for the bytes of it that are done. A segment is open only while
/// it is looked at: a folder may have more of them than a process may have open files.
fn each_segment(
    directory: &Directory,
    progress: Progress<'_>,
    mut look: impl FnMut(String, Result<SegmentView>, &mut dyn FnMut(u64)),
) -> Result<()> {
    let mut files = Vec::new();
    for (_, name) in directory.segment_names()? {
        // What cannot be inspected is for `look` to say; it counts nothing here.
        let flags = rustix::fs::AtFlags::SYMLINK_NOFOLLOW;
        let bytes = rustix::fs::statat(&directory.folder, &name, flags)
            .map_or(0, |stat| u64::try_from(stat.st_size).unwrap_or(0));
        files.push((name, bytes));
    }
    let total = files.iter().map(|(_, bytes)| bytes).sum();
    let mut done = 0;
    progress(done, total);
    for (name, bytes) in files {
        match SegmentView::open(directory, &name) {
            Ok(None) => {}
            Ok(Some(view)) => look(name, Ok(view), &mut |within| {
                progress(done + within.min(bytes), total);
            }),
            Err(error) => look(name, Err(error), &mut |_| {}),
        }
        done += bytes;
        progress(done, total);
    }
    Ok(())
}

/// Lists a folder.
///
/// # Errors
/// There is no store at `path`, or it cannot be read.
pub fn list(path: &Path) -> Result<StoreInfo> {
    list_with(path, &mut |_, _| {})
}

/// As [`list`], telling how far it is.
///
/// # Errors
/// There is no store at `path`, or it cannot be read.
pub fn list_with(path: &Path, progress: Progress<'_>) -> Result<StoreInfo> {
    let directory = open(path)?;
    let mut segments = Vec::new();
    each_segment(&directory, progress, |name, view, _| {
        segments.push(match view {
            Ok(view) => describe(name, &view),
            Err(error) => rejected(name, &error),
        });
    })?;
    Ok(StoreInfo {
        path: path.display().to_string(),
        file_system: directory.choice.file_system.clone(),
        medium: format!("{:?}", directory.choice.medium).to_lowercase(),
        reason: directory.choice.reason.to_owned(),
        writable: directory.writable,
        capacity_bytes: directory.control.capacity_bytes(),
        used_bytes: directory.used_bytes()?,
        epoch: directory.control.epoch(),
        writers: directory
            .control
            .live_writers(None)
            .iter()
            .map(|writer| WriterInfo {
                used_bytes: writer.bytes_used,
                wanted_bytes: writer.wants_bytes,
            })
            .collect(),
        segments,
    })
}

fn describe(name: String, view: &SegmentView) -> SegmentInfo {
    let header = &view.header;
    let mut info = SegmentInfo {
        name,
        file_bytes: header.file_bytes(),
        owner_lives: view.owner_lives(),
        created_unix_ms: header.created_unix_ms,
        layers: header.layer_count,
        block_bytes: header.payload_bytes,
        slots: header.slot_count,
        committed: 0,
        reserved: 0,
        writing: 0,
        free: 0,
        damaged: 0,
        last_used_unix_ms: 0,
        namespaces: BTreeMap::new(),
        rejected: None,
    };
    for slot in 0..header.slot_count {
        info.last_used_unix_ms = info.last_used_unix_ms.max(u64::from(view.mark(slot)) * MARK_MS);
        match state(view, slot) {
            SlotView::Empty => info.free += 1,
            SlotView::Writing(_) => info.writing += 1,
            SlotView::Damaged | SlotView::Bad(_) => info.damaged += 1,
            SlotView::Whole(record) => match record.state {
                SlotState::Free => info.free += 1,
                SlotState::Reserved => info.reserved += 1,
                SlotState::Committed => {
                    info.committed += 1;
                    *info.namespaces.entry(hex(&record.namespace.0)).or_default() += 1;
                }
            },
        }
    }
    info
}

fn rejected(name: String, error: &FsError) -> SegmentInfo {
    SegmentInfo {
        name,
        file_bytes: 0,
        owner_lives: false,
        created_unix_ms: 0,
        layers: 0,
        block_bytes: 0,
        slots: 0,
        committed: 0,
        reserved: 0,
        writing: 0,
        free: 0,
        damaged: 0,
        last_used_unix_ms: 0,
        namespaces: BTreeMap::new(),
        rejected: Some(error.to_string()),
    }
}

enum SlotView {
    /// Never used.
    Empty,
    /// Being changed, with what it was before: the promise of a block is filled in its own slot.
    Writing(Option<SlotRecord>),
    Damaged,
    /// A block whose bytes somebody found not to be its own: nobody is served it any more.
    Bad(SlotRecord),
    Whole(SlotRecord),
}

fn state(view: &SegmentView, slot: u32) -> SlotView {
    // A writer may be at work: a record is damaged only if its sequence stands still.
    for _ in 0..3 {
        let sequence = view.sequence(slot);
        if sequence == 0 {
            return SlotView::Empty;
        }
        if sequence % 2 == 1 {
            let before = view.record(slot, sequence - 1).ok();
            return SlotView::Writing(before);
        }
        match view.record(slot, sequence) {
            Ok(record) if record.state == SlotState::Committed && view.is_bad(slot) => {
                return SlotView::Bad(record);
            }
            Ok(record) => return SlotView::Whole(record),
            Err(_) if view.sequence(slot) == sequence => return SlotView::Damaged,
            Err(_) => {}
        }
    }
    SlotView::Writing(None)
}

/// Number of resets of the folder so far; cheaper than [`list`].
///
/// # Errors
/// There is no store at `path`, or it cannot be read.
pub fn epoch(path: &Path) -> Result<u64> {
    Ok(open(path)?.control.epoch())
}

/// The namespace that records carry for `namespace` in the folder's present epoch, 64 hex digits.
///
/// # Errors
/// There is no store at `path`.
pub fn effective_namespace(path: &Path, namespace: NamespaceId) -> Result<String> {
    Ok(hex(&namespace.with_epoch(open(path)?.control.epoch()).0))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{Folder, commit, key};
    use crate::format::BAD_MARK;
    use crate::reader::FsReader;

    #[test]
    fn looking_into_a_folder_without_a_store_creates_nothing() {
        let root = tempfile::tempdir().unwrap();
        assert!(list(root.path()).is_err());
        assert!(verify(root.path(), &mut |_, _| {}).is_err());
        assert!(gc(root.path(), 0, false, &mut |_, _| {}).is_err());
        assert!(explain(root.path(), &[], &mut |_, _| {}).is_err());
        let reader = FsReader::open(root.path(), vec![], &FsOptions::default()).unwrap();
        assert_eq!(reader.usage_bytes(), (0, 0));
        assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_block_that_was_marked_bad_counts_as_damaged_and_is_still_verified() {
        let folder = Folder::new(1 << 30);
        let segment = folder.segment(3, 1);
        for slot in 0..2 {
            commit(&segment, slot, key(slot), slot, 0);
        }
        segment.set_mark(1, BAD_MARK);
        let info = list(folder.path()).unwrap().segments.remove(0);
        assert_eq!((info.committed, info.damaged, info.free), (1, 1, 1));
        assert_eq!(info.namespaces.values().sum::<u32>(), 1);
        // Both have other checksums than their records say.
        assert_eq!(verify(folder.path(), &mut |_, _| {}).unwrap().bad_blocks.len(), 2);
    }
}
