//! Segment headers, slot records and control files are read from a folder that others can write: no bytes may panic a
//! parser, and whatever a parser accepts must describe places inside the file and must encode back to the same bytes.
//!
//! Random bytes never get past a checksum. So half of the inputs are valid structures with a few bytes overwritten, and
//! most of those get their checksum repaired, which brings the field checks behind it under fire.

#![no_main]

use arbitrary::{Arbitrary, Result, Unstructured};
use kvlane_core::{BlockKey, NamespaceId};
use kvlane_fs::format::{
    LAYERS_MAX, RECORD_FIXED_BYTES, SEGMENT_HEADER_BYTES, SegmentHeader, SlotRecord, SlotState,
    encode_control, parse_control, parse_segment_header, parse_slot_record, structure_crc,
};
use libfuzzer_sys::fuzz_target;

/// Where the checksum of a slot record lies: after the fixed fields, in front of the padding.
const RECORD_CRC_OFFSET: usize = 116;
/// Where the checksum of the control file lies.
const CONTROL_CRC_OFFSET: usize = 24;

fuzz_target!(|data: &[u8]| {
    // Too little data for a case is no finding.
    let _ = case(&mut Unstructured::new(data));
});

fn case(input: &mut Unstructured<'_>) -> Result<()> {
    match input.int_in_range(0..=5)? {
        0 => check_header(input.take_rest_bytes()),
        1 => {
            let layer_count = input.arbitrary()?;
            check_record(input.take_rest_bytes(), layer_count);
        }
        2 => check_control(input.take_rest_bytes()),
        3 => check_header(&edited_header(input)?),
        4 => {
            let (bytes, layer_count) = edited_record(input)?;
            check_record(&bytes, layer_count);
        }
        _ => check_control(&edited_control(input)?),
    }
    Ok(())
}

trait RestBytes {
    fn take_rest_bytes(&mut self) -> &[u8];
}

impl RestBytes for Unstructured<'_> {
    fn take_rest_bytes(&mut self) -> &[u8] {
        let length = self.len();
        self.bytes(length).unwrap_or_default()
    }
}

fn check_header(bytes: &[u8]) {
    let Ok(header) = parse_segment_header(bytes) else {
        return;
    };
    assert_eq!(
        header.encode()[..SEGMENT_HEADER_BYTES],
        bytes[..SEGMENT_HEADER_BYTES]
    );
    let last = header.slot_count - 1;
    assert!(header.mark_offset(last) + 4 <= header.sequences_offset());
    assert!(header.sequence_offset(last) + 8 <= header.records_offset());
    assert!(header.record_offset(last) + header.record_bytes() <= header.data_offset());
    assert!(header.slot_offset(last) + header.payload_bytes <= header.file_bytes());
    assert!(header.file_bytes() <= i64::MAX as u64, "no file offset overflows");
}

fn check_record(bytes: &[u8], layer_count: u32) {
    let Ok(record) = parse_slot_record(bytes, layer_count) else {
        return;
    };
    let again = record.encode(bytes.len());
    assert_eq!(again[..RECORD_CRC_OFFSET + 4], bytes[..RECORD_CRC_OFFSET + 4]);
    assert_eq!(parse_slot_record(&again, layer_count).as_ref(), Ok(&record));
    assert!(record.layer_crcs.is_empty() || record.layer_crcs.len() == layer_count as usize);
}

fn check_control(bytes: &[u8]) {
    let Ok(capacity_bytes) = parse_control(bytes) else {
        return;
    };
    assert_eq!(parse_control(&encode_control(capacity_bytes)), Ok(capacity_bytes));
}

fn edited_header(input: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    let header = SegmentHeader {
        segment_id: input.arbitrary()?,
        created_unix_ms: input.arbitrary()?,
        slot_count: input.int_in_range(1..=4096)?,
        layer_count: input.int_in_range(1..=LAYERS_MAX)?,
        slot_bytes: 4096 * input.int_in_range(1..=1024)?,
        payload_bytes: input.int_in_range(1..=4096)?,
        boot_id: input.arbitrary()?,
        geometry: input.arbitrary()?,
        machine_id: input.arbitrary()?,
    };
    let mut bytes = header.encode();
    let body_bytes = SEGMENT_HEADER_BYTES - 4;
    edit(input, &mut bytes[..SEGMENT_HEADER_BYTES])?;
    if repair(input)? {
        let crc = structure_crc(&[&bytes[..body_bytes]]);
        bytes[body_bytes..SEGMENT_HEADER_BYTES].copy_from_slice(&crc.to_le_bytes());
    }
    truncate(input, &mut bytes)?;
    Ok(bytes)
}

fn edited_record(input: &mut Unstructured<'_>) -> Result<(Vec<u8>, u32)> {
    let layer_count: u32 = input.int_in_range(1..=96)?;
    let committed = bool::arbitrary(input)?;
    let record = SlotRecord {
        sequence: input.arbitrary::<u64>()? & !1,
        state: if committed {
            SlotState::Committed
        } else {
            SlotState::Reserved
        },
        depth: input.arbitrary()?,
        key: BlockKey(input.arbitrary()?),
        namespace: NamespaceId(input.arbitrary()?),
        payload_bytes: input.arbitrary()?,
        deadline_unix_ms: input.arbitrary()?,
        owner: input.arbitrary()?,
        written_unix_ms: input.arbitrary()?,
        layer_crcs: if committed {
            (0..layer_count).collect()
        } else {
            Vec::new()
        },
    };
    let mut bytes = record.encode(RECORD_FIXED_BYTES + 4 * layer_count as usize);
    edit(input, &mut bytes)?;
    if repair(input)? {
        let table_bytes = if committed { 4 * layer_count as usize } else { 0 };
        let (fixed, table) = bytes.split_at(RECORD_FIXED_BYTES);
        let crc = structure_crc(&[&fixed[..RECORD_CRC_OFFSET], &table[..table_bytes]]);
        bytes[RECORD_CRC_OFFSET..RECORD_CRC_OFFSET + 4].copy_from_slice(&crc.to_le_bytes());
    }
    truncate(input, &mut bytes)?;
    Ok((bytes, layer_count))
}

fn edited_control(input: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    let mut bytes = encode_control(input.arbitrary()?);
    edit(input, &mut bytes[..CONTROL_CRC_OFFSET + 4])?;
    if repair(input)? {
        let crc = structure_crc(&[&bytes[..CONTROL_CRC_OFFSET]]);
        bytes[CONTROL_CRC_OFFSET..CONTROL_CRC_OFFSET + 4].copy_from_slice(&crc.to_le_bytes());
    }
    truncate(input, &mut bytes)?;
    Ok(bytes)
}

/// Overwrites up to eight bytes.
fn edit(input: &mut Unstructured<'_>, bytes: &mut [u8]) -> Result<()> {
    for _ in 0..input.int_in_range(0..=8)? {
        let place = input.choose_index(bytes.len())?;
        bytes[place] = input.arbitrary()?;
    }
    Ok(())
}

fn repair(input: &mut Unstructured<'_>) -> Result<bool> {
    input.ratio(3, 4)
}

fn truncate(input: &mut Unstructured<'_>, bytes: &mut Vec<u8>) -> Result<()> {
    if input.ratio(1, 8)? {
        let length = input.choose_index(bytes.len() + 1)?;
        bytes.truncate(length);
    }
    Ok(())
}
