//! Segment files, as anybody may read them.

use std::fs::File;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock};

use super::{OWNER_LOCK, next_odd};
use crate::cold::open_direct;
use crate::control::open_trusted;
use crate::descriptors::Taken;
use crate::directory::{Directory, segment_name};
use crate::error::{FsError, Result};
use crate::format::{
    self, BAD_MARK, RECORD_FIXED_BYTES, Reject, SEGMENT_HEADER_BYTES, SegmentHeader, SlotRecord, counters,
};
use crate::options::Medium;
use crate::raw::ReadMapping;

/// A segment as anybody may read it.
#[derive(Debug)]
pub(crate) struct SegmentView {
    pub(crate) header: SegmentHeader,
    pub(crate) path: PathBuf,
    pub(crate) file: File,
    /// Slots that were read past the page cache before: who asks again would rather find them there.
    read_past: OnceLock<Vec<AtomicBool>>,
    pub(super) mapping: ReadMapping,
    /// A read fault in a hole of this file takes a page.
    pub(super) holes_take_memory: bool,
    _descriptor: Taken,
    /// How often it is held: the lock belongs to the open file, which has many users.
    pub(super) holds: Mutex<usize>,
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
            _descriptor: directory.descriptors.take(),
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

    /// Whether no block can ever be written into the slot again, since no even number is left for its sequence. Counting
    /// does not get there, but a damaged word may say so.
    pub(crate) fn is_spent(&self, slot: u32) -> bool {
        next_odd(self.sequence(slot)) == u64::MAX
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
