//! Whether all payload is what it was when it was stored.

use std::os::unix::fs::FileExt;
use std::path::Path;

use serde::Serialize;

use super::{Progress, SlotView, each_segment, hex, open, state};
use crate::error::{FsError, Result};
use crate::format::{SlotRecord, SlotState};
use crate::raw::LayerCrc;
use crate::segment::SegmentView;

/// A block that does not match its checksum, or that cannot be read.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct BadBlock {
    /// File name of the segment.
    pub segment: String,
    /// The slot.
    pub slot: u32,
    /// The block's key, 64 hex digits.
    pub key: String,
    /// First layer that is wrong; `None` if the block cannot be read.
    pub layer: Option<u32>,
    /// Why the block cannot be read.
    pub error: Option<String>,
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
    /// Blocks with wrong bytes, or whose bytes cannot be read.
    pub bad_blocks: Vec<BadBlock>,
    /// Files that are not usable segments.
    pub rejected_files: Vec<String>,
}

/// Reads every block and compares it with its checksums.
///
/// # Errors
/// There is no store at `path`, or it cannot be listed. What cannot be read of it is in the report.
pub fn verify(path: &Path, progress: Progress<'_>) -> Result<VerifyReport> {
    let directory = open(path)?;
    let mut report = VerifyReport::default();
    each_segment(&directory, progress, |name, view, done| {
        let checked = view.and_then(|view| {
            let layers = view.layer_bytes().map_err(|reject| FsError::Foreign {
                path: view.path.clone(),
                reject,
            })?;
            report.check(&name, &view, &layers, done);
            Ok(())
        });
        if let Err(error) = checked {
            report.rejected_files.push(format!("{name}: {error}"));
        }
    })?;
    Ok(report)
}

impl VerifyReport {
    fn check(&mut self, name: &str, view: &SegmentView, layers: &[u64], done: &mut dyn FnMut(u64)) {
        let mut payload = vec![0; view.header.payload_bytes as usize];
        for slot in 0..view.header.slot_count {
            match state(view, slot) {
                SlotView::Damaged => self.damaged_records += 1,
                SlotView::Whole(record) | SlotView::Bad(record) if record.state == SlotState::Committed => {
                    let read = view
                        .file
                        .read_exact_at(&mut payload, view.header.slot_offset(slot));
                    let found = match read {
                        Ok(()) => {
                            first_wrong_layer(&payload, layers, &record).map(|layer| (Some(layer), None))
                        }
                        // One bad place of a disk says nothing about the rest.
                        Err(error) => Some((None, Some(error.to_string()))),
                    };
                    if view.sequence(slot) != record.sequence {
                        self.recycled_blocks += 1;
                    } else if let Some((layer, error)) = found {
                        self.bad_blocks.push(BadBlock {
                            segment: name.to_owned(),
                            slot,
                            key: hex(&record.key.0),
                            layer,
                            error,
                        });
                    } else {
                        self.good_blocks += 1;
                        self.good_bytes += payload.len() as u64;
                    }
                }
                _ => {}
            }
            done(view.header.slot_bytes * (u64::from(slot) + 1));
        }
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{Folder, commit, key};

    /// How many segments of a folder this process has open.
    fn open_segments(folder: &Path) -> usize {
        std::fs::read_dir("/proc/self/fd")
            .unwrap()
            .flatten()
            .filter_map(|entry| std::fs::read_link(entry.path()).ok())
            .filter(|target| target.starts_with(folder) && target.to_string_lossy().contains("seg-"))
            .count()
    }

    #[test]
    fn a_folder_with_many_segments_needs_one_open_file_at_a_time() {
        let folder = Folder::new(1 << 30);
        for number in 0..5 {
            drop(folder.segment(2, number));
        }
        assert_eq!(open_segments(folder.path()), 0);
        let mut most = 0;
        let mut last = (0, 0);
        verify(folder.path(), &mut |done, total| {
            most = most.max(open_segments(folder.path()));
            assert!(
                done >= last.0 && done <= total,
                "{done} of {total} after {last:?}"
            );
            last = (done, total);
        })
        .unwrap();
        assert_eq!(most, 1);
        assert!(last.0 > 0 && last.0 == last.1, "{last:?}");
    }

    #[test]
    fn a_block_that_cannot_be_read_is_bad_and_the_others_are_checked() {
        let folder = Folder::new(1 << 30);
        let mut names = Vec::new();
        for number in 0..2 {
            let segment = folder.segment(2, number);
            commit(&segment, 1, key(7), 0, 0);
            names.push(segment.view.path.clone());
        }
        let mut cut = false;
        let report = verify(folder.path(), &mut |done, _| {
            // Behind the check of the header and in front of the last slot: as a disk that fails.
            if done > 0 && !cut {
                cut = true;
                for name in &names {
                    let file = std::fs::File::options().write(true).open(name).unwrap();
                    let whole = file.metadata().unwrap().len();
                    file.set_len(whole - 1).unwrap();
                }
            }
        })
        .unwrap();
        // The second one was cut before it was opened.
        assert_eq!(report.rejected_files.len(), 1, "{report:?}");
        assert_eq!(report.bad_blocks.len(), 1, "{report:?}");
        let bad = &report.bad_blocks[0];
        assert_eq!((bad.slot, bad.layer, &bad.key), (1, None, &hex(&key(7).0)));
        assert!(bad.error.is_some());
    }
}
