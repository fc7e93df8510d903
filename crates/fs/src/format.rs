//! The bytes of a segment file and of the control file. `docs/segment-format.md` is this module in prose.
//!
//! All numbers are little-endian. Parsers take untrusted bytes, never panic, and answer with the reason of a rejection.

mod record;

pub use record::{SlotRecord, SlotState, parse_slot_record};

/// Version of everything in this module. A file of another version is never read and never changed.
pub const FORMAT_VERSION: u32 = 1;
/// First bytes of a segment file.
pub const SEGMENT_MAGIC: [u8; 8] = *b"KVLANESG";
/// First bytes of the control file.
pub const CONTROL_MAGIC: [u8; 8] = *b"KVLANECT";
/// Unit of alignment of everything that is mapped or written as a whole: the page size of all supported machines'
/// file systems divides it or equals it.
pub const PAGE_BYTES: u64 = 4096;
/// Bytes of a segment header that are checked; the rest of its page is zero.
pub const SEGMENT_HEADER_BYTES: usize = 172;
/// Bytes of a slot record in front of its checksum table.
pub const RECORD_FIXED_BYTES: usize = 128;
/// More layers than any model has; bounds every table before it is allocated.
pub const LAYERS_MAX: u32 = 4096;
/// More slots than a segment can have; bounds every table before it is allocated.
pub const SLOTS_MAX: u32 = 1 << 20;
/// Largest segment file.
pub const SEGMENT_BYTES_MAX: u64 = 1 << 40;

/// Last-used mark of a slot whose bytes turned out not to be those of its block. Such a slot counts as absent, and its
/// owner uses it again.
pub const BAD_MARK: u32 = u32::MAX;

/// Offsets inside the counter page of a segment.
pub mod counters {
    /// u64, grows with every change of any slot: readers look here first.
    pub const CHANGES: u64 = 0;
    /// u64, start id of the process that owns the segment.
    pub const OWNER: u64 = 8;
    /// Size of the area.
    pub const BYTES: u64 = super::PAGE_BYTES;
}

/// Why bytes are not a valid header, record or control file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Reject {
    /// Fewer bytes than the structure has.
    #[error("{found} bytes where {expected} are needed")]
    Truncated {
        /// Bytes there are.
        found: u64,
        /// Bytes needed.
        expected: u64,
    },
    /// Not a file of this kind.
    #[error("the magic bytes are {found:02x?}")]
    Magic {
        /// The bytes at the place of the magic.
        found: [u8; 8],
    },
    /// Another format version.
    #[error("format version {found}, this build reads {expected}")]
    Version {
        /// The version of the file.
        found: u32,
        /// The version of this build.
        expected: u32,
    },
    /// The checksum of the structure itself is wrong: damaged, or torn by a concurrent write.
    #[error("the checksum is {found:#010x}, expected {expected:#010x}")]
    Checksum {
        /// Checksum computed over the bytes.
        found: u32,
        /// Checksum stored in them.
        expected: u32,
    },
    /// A field has a value that cannot be, though the checksum is right.
    #[error("{field} is {found}")]
    Field {
        /// The field's name.
        field: &'static str,
        /// Its value.
        found: u64,
    },
}

/// CRC-32 (ISO-HDLC, the polynomial of zlib) of a structure's own bytes.
pub fn structure_crc(parts: &[&[u8]]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    for part in parts {
        hasher.update(part);
    }
    hasher.finalize()
}

/// The immutable first page of a segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SegmentHeader {
    /// Random number; also in the file's name.
    pub segment_id: u64,
    /// Creation time, Unix milliseconds.
    pub created_unix_ms: u64,
    /// Slots in the segment.
    pub slot_count: u32,
    /// Layers of a block.
    pub layer_count: u32,
    /// Distance of two slots, a multiple of [`PAGE_BYTES`].
    pub slot_bytes: u64,
    /// Payload of a slot: all layers, one behind the other.
    pub payload_bytes: u64,
    /// The kernel's run in which it was created.
    pub boot_id: [u8; 16],
    /// blake3 of the byte lengths of the layers.
    pub geometry: [u8; 32],
    /// The machine on which it was created, or zero where it has no name that lasts: on network file systems only that
    /// one adopts.
    pub machine_id: [u8; 16],
}

fn align_up(value: u64, unit: u64) -> u64 {
    value.div_ceil(unit) * unit
}

impl SegmentHeader {
    /// Byte distance of two slot records.
    pub fn record_bytes(&self) -> u64 {
        align_up(RECORD_FIXED_BYTES as u64 + 4 * u64::from(self.layer_count), 64)
    }
    /// Offset of the layer table: one u64 per layer, its payload bytes.
    pub fn layers_offset(&self) -> u64 {
        PAGE_BYTES
    }
    /// Offset of the counter page.
    pub fn counters_offset(&self) -> u64 {
        self.layers_offset() + align_up(8 * u64::from(self.layer_count), PAGE_BYTES)
    }
    /// Offset of the last-used marks, one u32 per slot, on pages of their own.
    pub fn marks_offset(&self) -> u64 {
        self.counters_offset() + counters::BYTES
    }
    /// Offset of the sequence words, one u64 per slot.
    pub fn sequences_offset(&self) -> u64 {
        self.marks_offset() + align_up(4 * u64::from(self.slot_count), PAGE_BYTES)
    }
    /// Offset of the slot records.
    pub fn records_offset(&self) -> u64 {
        align_up(self.sequences_offset() + 8 * u64::from(self.slot_count), 64)
    }
    /// Offset of slot 0.
    pub fn data_offset(&self) -> u64 {
        align_up(
            self.records_offset() + self.record_bytes() * u64::from(self.slot_count),
            PAGE_BYTES,
        )
    }
    /// Size of the whole file.
    pub fn file_bytes(&self) -> u64 {
        self.data_offset() + self.slot_bytes * u64::from(self.slot_count)
    }
    /// Offset of a slot's last-used mark.
    pub fn mark_offset(&self, slot: u32) -> u64 {
        self.marks_offset() + 4 * u64::from(slot)
    }
    /// Offset of a slot's sequence word.
    pub fn sequence_offset(&self, slot: u32) -> u64 {
        self.sequences_offset() + 8 * u64::from(slot)
    }
    /// Offset of a slot's record.
    pub fn record_offset(&self, slot: u32) -> u64 {
        self.records_offset() + self.record_bytes() * u64::from(slot)
    }
    /// Offset of a slot's payload.
    pub fn slot_offset(&self, slot: u32) -> u64 {
        self.data_offset() + self.slot_bytes * u64::from(slot)
    }

    /// The first page of the file; the layer table follows it.
    pub fn encode(&self) -> Vec<u8> {
        let mut page = Vec::with_capacity(PAGE_BYTES as usize);
        page.extend_from_slice(&SEGMENT_MAGIC);
        page.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
        page.extend_from_slice(&(PAGE_BYTES as u32).to_le_bytes());
        page.extend_from_slice(&self.segment_id.to_le_bytes());
        page.extend_from_slice(&self.created_unix_ms.to_le_bytes());
        page.extend_from_slice(&self.slot_count.to_le_bytes());
        page.extend_from_slice(&self.layer_count.to_le_bytes());
        page.extend_from_slice(&self.slot_bytes.to_le_bytes());
        page.extend_from_slice(&self.payload_bytes.to_le_bytes());
        page.extend_from_slice(&self.marks_offset().to_le_bytes());
        page.extend_from_slice(&self.sequences_offset().to_le_bytes());
        page.extend_from_slice(&self.records_offset().to_le_bytes());
        page.extend_from_slice(&self.record_bytes().to_le_bytes());
        page.extend_from_slice(&self.data_offset().to_le_bytes());
        page.extend_from_slice(&self.file_bytes().to_le_bytes());
        page.extend_from_slice(&self.boot_id);
        page.extend_from_slice(&self.geometry);
        page.extend_from_slice(&self.machine_id);
        debug_assert_eq!(page.len(), SEGMENT_HEADER_BYTES - 4);
        let crc = structure_crc(&[&page]);
        page.extend_from_slice(&crc.to_le_bytes());
        page.resize(PAGE_BYTES as usize, 0);
        page
    }
}

fn u32_at(bytes: &[u8], offset: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[offset..offset + 4]);
    u32::from_le_bytes(word)
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[offset..offset + 8]);
    u64::from_le_bytes(word)
}

fn array_at<const N: usize>(bytes: &[u8], offset: usize) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(&bytes[offset..offset + N]);
    array
}

fn check_magic(bytes: &[u8], magic: [u8; 8], needed: usize) -> Result<(), Reject> {
    if bytes.len() < needed {
        return Err(Reject::Truncated {
            found: bytes.len() as u64,
            expected: needed as u64,
        });
    }
    let found = array_at::<8>(bytes, 0);
    if found != magic {
        return Err(Reject::Magic { found });
    }
    let version = u32_at(bytes, 8);
    if version != FORMAT_VERSION {
        return Err(Reject::Version {
            found: version,
            expected: FORMAT_VERSION,
        });
    }
    Ok(())
}

/// Reads a segment header from the first bytes of a file.
pub fn parse_segment_header(bytes: &[u8]) -> Result<SegmentHeader, Reject> {
    check_magic(bytes, SEGMENT_MAGIC, SEGMENT_HEADER_BYTES)?;
    let body = SEGMENT_HEADER_BYTES - 4;
    let (found, expected) = (structure_crc(&[&bytes[..body]]), u32_at(bytes, body));
    if found != expected {
        return Err(Reject::Checksum { found, expected });
    }
    let header = SegmentHeader {
        segment_id: u64_at(bytes, 16),
        created_unix_ms: u64_at(bytes, 24),
        slot_count: u32_at(bytes, 32),
        layer_count: u32_at(bytes, 36),
        slot_bytes: u64_at(bytes, 40),
        payload_bytes: u64_at(bytes, 48),
        boot_id: array_at(bytes, 104),
        geometry: array_at(bytes, 120),
        machine_id: array_at(bytes, 152),
    };
    let field = |field, found| Err(Reject::Field { field, found });
    if u64::from(u32_at(bytes, 12)) != PAGE_BYTES {
        return field("header_bytes", u32_at(bytes, 12).into());
    }
    if header.slot_count == 0 || header.slot_count > SLOTS_MAX {
        return field("slot_count", header.slot_count.into());
    }
    if header.layer_count == 0 || header.layer_count > LAYERS_MAX {
        return field("layer_count", header.layer_count.into());
    }
    if header.slot_bytes == 0
        || !header.slot_bytes.is_multiple_of(PAGE_BYTES)
        || header.slot_bytes > SEGMENT_BYTES_MAX / u64::from(header.slot_count)
    {
        return field("slot_bytes", header.slot_bytes);
    }
    if header.payload_bytes == 0 || header.payload_bytes > header.slot_bytes {
        return field("payload_bytes", header.payload_bytes);
    }
    let places = [
        ("marks_offset", 56, header.marks_offset()),
        ("sequences_offset", 64, header.sequences_offset()),
        ("records_offset", 72, header.records_offset()),
        ("record_bytes", 80, header.record_bytes()),
        ("data_offset", 88, header.data_offset()),
        ("file_bytes", 96, header.file_bytes()),
    ];
    for (name, offset, expected) in places {
        if u64_at(bytes, offset) != expected {
            return field(name, u64_at(bytes, offset));
        }
    }
    Ok(header)
}

/// Name of a geometry: blake3 of the layers' payload bytes.
pub fn geometry_id(layer_bytes: &[u64]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key("kvlane 1 segment geometry");
    for bytes in layer_bytes {
        hasher.update(&bytes.to_le_bytes());
    }
    *hasher.finalize().as_bytes()
}

/// The layer table.
pub fn encode_layers(layer_bytes: &[u64]) -> Vec<u8> {
    layer_bytes.iter().flat_map(|bytes| bytes.to_le_bytes()).collect()
}

/// Reads the layer table of a segment; the header's geometry is its checksum.
pub fn parse_layers(bytes: &[u8], header: &SegmentHeader) -> Result<Vec<u64>, Reject> {
    let needed = 8 * header.layer_count as usize;
    if bytes.len() < needed {
        return Err(Reject::Truncated {
            found: bytes.len() as u64,
            expected: needed as u64,
        });
    }
    let layers: Vec<u64> = bytes[..needed]
        .chunks_exact(8)
        .map(|word| u64_at(word, 0))
        .collect();
    let sum = layers.iter().try_fold(0u64, |sum, &bytes| sum.checked_add(bytes));
    if sum != Some(header.payload_bytes) || geometry_id(&layers) != header.geometry {
        return Err(Reject::Field {
            field: "layer table",
            found: sum.unwrap_or(u64::MAX),
        });
    }
    Ok(layers)
}

/// Layout of the control file.
pub mod control {
    /// Size of the file.
    pub const FILE_BYTES: u64 = 2 * super::PAGE_BYTES;
    /// u64, all segment files together.
    pub const CAPACITY: u64 = 16;
    /// Bytes that never change once there is a segment, checksum included.
    pub const FIXED_BYTES: usize = 28;
    /// u64, grows whenever a segment appears or disappears.
    pub const GENERATION: u64 = 64;
    /// u64, grows with every reset: part of the effective namespace.
    pub const EPOCH: u64 = 72;
    /// u64, grows after changes of any segment: one load tells a reader that nothing happened.
    pub const CHANGES: u64 = 80;
    /// u64, written as zero by whoever wants to know whether the file system accepts writes.
    pub const SCRATCH: u64 = 88;
    /// u64, grows whenever somebody has written [`BAD_MARK`](super::BAD_MARK): indexes and owners look at the marks then.
    pub const BAD_SLOTS: u64 = 96;
    /// First writer entry.
    pub const WRITERS: u64 = super::PAGE_BYTES;
    /// Bytes of a writer entry.
    pub const WRITER_BYTES: u64 = 64;
    /// Writers that can be alive at once.
    pub const WRITERS_MAX: u32 = 64;
    /// u64 in a writer entry: start id, 0 = unused.
    pub const WRITER_START_ID: u64 = 0;
    /// u64 in a writer entry: bytes of its segments.
    pub const WRITER_BYTES_USED: u64 = 8;
    /// u64 in a writer entry: bytes that it asks others to give back.
    pub const WRITER_WANTS: u64 = 16;
    /// Byte range lock held while the budget is changed.
    pub const LOCK_BUDGET: u64 = 0;
    /// First of the byte locks that show that a writer lives.
    pub const LOCK_WRITER: u64 = 1;
}

/// First bytes of the control file.
pub fn encode_control(capacity_bytes: u64) -> Vec<u8> {
    let mut out = Vec::with_capacity(control::FILE_BYTES as usize);
    out.extend_from_slice(&CONTROL_MAGIC);
    out.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&capacity_bytes.to_le_bytes());
    let crc = structure_crc(&[&out]);
    out.extend_from_slice(&crc.to_le_bytes());
    out.resize(control::FILE_BYTES as usize, 0);
    out
}

/// Reads the capacity from the control file.
pub fn parse_control(bytes: &[u8]) -> Result<u64, Reject> {
    check_magic(bytes, CONTROL_MAGIC, control::FIXED_BYTES)?;
    let (found, expected) = (structure_crc(&[&bytes[..24]]), u32_at(bytes, 24));
    if found != expected {
        return Err(Reject::Checksum { found, expected });
    }
    Ok(u64_at(bytes, 16))
}

#[cfg(test)]
mod tests;
