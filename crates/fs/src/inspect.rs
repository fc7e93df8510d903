//! Looking into a folder from outside: what `kvlane store` shows. Works on live and on idle folders, and creates nothing.

mod explain;
mod folder;

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::path::Path;

use kvlane_core::NamespaceId;
use serde::Serialize;

use crate::directory::{Directory, unix_ms};
use crate::error::{FsError, Result};
use crate::format::{SlotRecord, SlotState};
use crate::options::FsOptions;
use crate::raw::LayerCrc;
use crate::segment::{self, SegmentView};
use crate::shared::MARK_MS;

pub use explain::{BlockInfo, Explanation, Presence, explain};
pub use folder::{FolderInfo, folder};

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
    /// Slots whose record is damaged: never served.
    pub damaged: u32,
    /// Last use of any block, Unix milliseconds, in steps of 10 s.
    pub last_used_unix_ms: u64,
    /// Blocks by namespace (64 hex digits).
    pub namespaces: BTreeMap<String, u32>,
    /// Why the file cannot be used; then everything else is zero.
    pub rejected: Option<String>,
}

/// A block that does not match its checksum.
#[derive(Debug, Clone, Serialize)]
pub struct BadBlock {
    /// File name of the segment.
    pub segment: String,
    /// The slot.
    pub slot: u32,
    /// The block's key, 64 hex digits.
    pub key: String,
    /// First layer that is wrong.
    pub layer: u32,
}

/// Outcome of a check of all payload.
#[derive(Debug, Clone, Default, Serialize)]
#[non_exhaustive]
pub struct VerifyReport {
    /// Blocks that were checked and are right.
    pub good_blocks: u64,
    /// Their payload.
    pub good_bytes: u64,
    /// Blocks that were recycled while they were read: nothing can be said of them.
    pub recycled_blocks: u64,
    /// Slots whose record is damaged.
    pub damaged_records: u64,
    /// Blocks with wrong bytes.
    pub bad_blocks: Vec<BadBlock>,
    /// Files that are not usable segments.
    pub rejected_files: Vec<String>,
}

/// Outcome of a clean-up.
#[derive(Debug, Clone, Default, Serialize)]
#[non_exhaustive]
pub struct GcReport {
    /// Segments that were removed.
    pub removed_segments: Vec<String>,
    /// Left-overs of interrupted work that were removed.
    pub removed_files: Vec<String>,
    /// Bytes that were freed.
    pub freed_bytes: u64,
}

fn open(path: &Path) -> Result<Directory> {
    Directory::open(path, &FsOptions::default(), false)?
        .ok_or_else(|| FsError::io("open", path)(std::io::ErrorKind::NotFound.into()))
}

/// Lists a folder.
///
/// # Errors
/// There is no store at `path`, or it cannot be read.
pub fn list(path: &Path) -> Result<StoreInfo> {
    let directory = open(path)?;
    let mut segments = Vec::new();
    for (_, name) in directory.segment_names()? {
        match SegmentView::open(&directory, &name) {
            Ok(Some(view)) => segments.push(describe(name, &view)),
            Ok(None) => {}
            Err(error) => segments.push(rejected(name, &error)),
        }
    }
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
            SlotView::Writing => info.writing += 1,
            SlotView::Damaged => info.damaged += 1,
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
    Writing,
    Damaged,
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
            return SlotView::Writing;
        }
        match view.record(slot, sequence) {
            Ok(record) => return SlotView::Whole(record),
            Err(_) if view.sequence(slot) == sequence => return SlotView::Damaged,
            Err(_) => {}
        }
    }
    SlotView::Writing
}

/// Reads every block and compares it with its checksums. `progress` gets (bytes done, bytes in all).
///
/// # Errors
/// There is no store at `path`, or it cannot be read.
pub fn verify(path: &Path, progress: &mut dyn FnMut(u64, u64)) -> Result<VerifyReport> {
    let directory = open(path)?;
    let mut report = VerifyReport::default();
    let mut views = Vec::new();
    for (_, name) in directory.segment_names()? {
        match SegmentView::open(&directory, &name) {
            Ok(Some(view)) => views.push((name, view)),
            Ok(None) => {}
            Err(error) => report.rejected_files.push(format!("{name}: {error}")),
        }
    }
    let total: u64 = views
        .iter()
        .map(|(_, view)| view.header.slot_bytes * u64::from(view.header.slot_count))
        .sum();
    let mut done = 0;
    progress(done, total);
    for (name, view) in &views {
        let layers = match view.layer_bytes() {
            Ok(layers) => layers,
            Err(reject) => {
                report.rejected_files.push(format!("{name}: {reject}"));
                continue;
            }
        };
        let mut payload = vec![0; view.header.payload_bytes as usize];
        for slot in 0..view.header.slot_count {
            match state(view, slot) {
                SlotView::Damaged => report.damaged_records += 1,
                SlotView::Whole(record) if record.state == SlotState::Committed => {
                    view.file
                        .read_exact_at(&mut payload, view.header.slot_offset(slot))
                        .map_err(FsError::io("read", &view.path))?;
                    let wrong = first_wrong_layer(&payload, &layers, &record);
                    if view.sequence(slot) != record.sequence {
                        report.recycled_blocks += 1;
                    } else if let Some(layer) = wrong {
                        let (segment, key) = (name.clone(), hex(&record.key.0));
                        report.bad_blocks.push(BadBlock {
                            segment,
                            slot,
                            key,
                            layer,
                        });
                    } else {
                        report.good_blocks += 1;
                        report.good_bytes += payload.len() as u64;
                    }
                }
                _ => {}
            }
            done += view.header.slot_bytes;
            progress(done, total);
        }
    }
    Ok(report)
}

fn first_wrong_layer(payload: &[u8], layers: &[u64], record: &SlotRecord) -> Option<u32> {
    let mut rest = payload;
    for (layer, (&bytes, &expected)) in layers.iter().zip(&record.layer_crcs).enumerate() {
        let (data, behind) = rest.split_at(bytes as usize);
        let mut crc = LayerCrc::new(&record.key.0, layer as u32);
        crc.update(data);
        if crc.value() != expected {
            return Some(layer as u32);
        }
        rest = behind;
    }
    None
}

/// Removes segments that nobody owns and that were not used for `unused_ms`, and left-overs of interrupted work. A
/// running writer's segments are never touched.
///
/// # Errors
/// There is no store at `path`, or it is read-only.
pub fn gc(path: &Path, unused_ms: u64, dry_run: bool) -> Result<GcReport> {
    let directory = open(path)?;
    if !directory.writable && !dry_run {
        return Err(FsError::ReadOnly { path: path.into() });
    }
    let mut report = GcReport::default();
    let now_ms = unix_ms();
    for (_, name) in directory.segment_names()? {
        let Ok(Some(view)) = SegmentView::open(&directory, &name) else {
            continue;
        };
        let info = describe(name.clone(), &view);
        let used_ms = info.last_used_unix_ms.max(info.created_unix_ms);
        if info.owner_lives || now_ms.saturating_sub(used_ms) < unused_ms {
            continue;
        }
        if dry_run || segment::remove_orphan(&directory, &name)? {
            report.freed_bytes += info.file_bytes;
            report.removed_segments.push(name);
        }
    }
    for entry in std::fs::read_dir(path)
        .map_err(FsError::io("list", path))?
        .flatten()
    {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Ok(meta) = entry.metadata() else { continue };
        let age_ms = meta
            .modified()
            .ok()
            .and_then(|at| at.elapsed().ok())
            .map_or(0, |age| age.as_millis() as u64);
        // A minute is far longer than making a file takes.
        if name.ends_with(".tmp") && meta.is_file() && age_ms > 60_000 {
            if !dry_run {
                std::fs::remove_file(entry.path()).map_err(FsError::io("remove", entry.path()))?;
            }
            report.freed_bytes += meta.len();
            report.removed_files.push(name);
        }
    }
    Ok(report)
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
    use crate::reader::FsReader;

    #[test]
    fn looking_into_a_folder_without_a_store_creates_nothing() {
        let root = tempfile::tempdir().unwrap();
        assert!(list(root.path()).is_err());
        assert!(verify(root.path(), &mut |_, _| {}).is_err());
        assert!(gc(root.path(), 0, false).is_err());
        assert!(explain(root.path(), &[]).is_err());
        let reader = FsReader::open(root.path(), vec![], &FsOptions::default()).unwrap();
        assert_eq!(reader.usage_bytes(), (0, 0));
        assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 0);
    }
}
