use kvlane_core::{BlockKey, NamespaceId};

use super::*;

fn header() -> SegmentHeader {
    SegmentHeader {
        segment_id: 0x0123_4567_89ab_cdef,
        created_unix_ms: 1_800_000_000_000,
        slot_count: 100,
        layer_count: 48,
        slot_bytes: 3 << 20,
        payload_bytes: (3 << 20) - 17,
        boot_id: [3; 16],
        geometry: [4; 32],
        machine_id: [5; 16],
    }
}

fn committed() -> SlotRecord {
    SlotRecord {
        sequence: 42,
        state: SlotState::Committed,
        depth: 7,
        key: BlockKey([1; 32]),
        namespace: NamespaceId([2; 32]),
        payload_bytes: 999,
        deadline_unix_ms: 0,
        owner: 5,
        written_unix_ms: 6,
        layer_crcs: vec![10, 20, 30],
    }
}

/// The header's bytes after `edit`, with a checksum that is right again.
fn resealed(edit: impl FnOnce(&mut [u8])) -> Vec<u8> {
    let mut bytes = header().encode();
    edit(&mut bytes);
    let body = SEGMENT_HEADER_BYTES - 4;
    let crc = structure_crc(&[&bytes[..body]]);
    bytes[body..SEGMENT_HEADER_BYTES].copy_from_slice(&crc.to_le_bytes());
    bytes
}

#[test]
fn headers_records_and_control_files_come_back_as_they_were_written() {
    assert_eq!(parse_segment_header(&header().encode()), Ok(header()));
    let record = committed();
    assert_eq!(parse_slot_record(&record.encode(192), 3), Ok(record));
    for state in [SlotState::Free, SlotState::Reserved] {
        let record = SlotRecord {
            state,
            layer_crcs: Vec::new(),
            deadline_unix_ms: 77,
            ..committed()
        };
        assert_eq!(parse_slot_record(&record.encode(192), 3), Ok(record));
    }
    assert_eq!(parse_control(&encode_control(1 << 33)), Ok(1 << 33));
    let layers = [5, 6, 7];
    let header = SegmentHeader {
        payload_bytes: 18,
        layer_count: 3,
        geometry: geometry_id(&layers),
        ..header()
    };
    assert_eq!(
        parse_layers(&encode_layers(&layers), &header),
        Ok(layers.to_vec())
    );
    assert!(parse_layers(&encode_layers(&[6, 5, 7]), &header).is_err());
    assert!(parse_layers(&encode_layers(&layers)[..23], &header).is_err());
}

#[test]
fn every_flipped_bit_of_a_header_record_or_control_file_is_noticed() {
    let good = header().encode();
    for bit in 0..8 * SEGMENT_HEADER_BYTES {
        let mut bytes = good.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        assert!(parse_segment_header(&bytes).is_err(), "header bit {bit}");
    }
    let good = committed().encode(RECORD_FIXED_BYTES + 12);
    for bit in (0..8 * good.len()).filter(|bit| !(8 * 120..8 * 128).contains(bit)) {
        let mut bytes = good.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        assert!(parse_slot_record(&bytes, 3).is_err(), "record bit {bit}");
    }
    let good = encode_control(1 << 33);
    for bit in 0..8 * control::FIXED_BYTES {
        let mut bytes = good.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        assert!(parse_control(&bytes).is_err(), "control bit {bit}");
    }
}

#[test]
fn every_truncation_is_noticed() {
    for length in 0..SEGMENT_HEADER_BYTES {
        assert!(matches!(
            parse_segment_header(&header().encode()[..length]),
            Err(Reject::Truncated { .. })
        ));
    }
    for length in 0..RECORD_FIXED_BYTES + 12 {
        assert!(matches!(
            parse_slot_record(&committed().encode(192)[..length], 3),
            Err(Reject::Truncated { .. })
        ));
    }
    for length in 0..control::FIXED_BYTES {
        assert!(matches!(
            parse_control(&encode_control(1)[..length]),
            Err(Reject::Truncated { .. })
        ));
    }
}

#[test]
fn fields_that_cannot_be_are_refused_even_under_a_right_checksum() {
    let refused = |name: &str, offset: usize, value: &[u8]| {
        let bytes = resealed(|bytes| bytes[offset..offset + value.len()].copy_from_slice(value));
        match parse_segment_header(&bytes) {
            Err(Reject::Field { field, .. }) => assert_eq!(field, name),
            other => panic!("{name}: {other:?}"),
        }
    };
    refused("header_bytes", 12, &4095_u32.to_le_bytes());
    refused("slot_count", 32, &0_u32.to_le_bytes());
    refused("slot_count", 32, &(SLOTS_MAX + 1).to_le_bytes());
    refused("layer_count", 36, &0_u32.to_le_bytes());
    refused("layer_count", 36, &(LAYERS_MAX + 1).to_le_bytes());
    refused("slot_bytes", 40, &0_u64.to_le_bytes());
    refused("slot_bytes", 40, &4097_u64.to_le_bytes());
    refused(
        "slot_bytes",
        40,
        &(SEGMENT_BYTES_MAX - SEGMENT_BYTES_MAX % 4096).to_le_bytes(),
    );
    refused("slot_bytes", 40, &(u64::MAX - 4095).to_le_bytes());
    refused("payload_bytes", 48, &0_u64.to_le_bytes());
    refused("payload_bytes", 48, &((3_u64 << 20) + 1).to_le_bytes());
    for (name, offset) in [
        ("marks_offset", 56),
        ("sequences_offset", 64),
        ("records_offset", 72),
        ("record_bytes", 80),
        ("data_offset", 88),
        ("file_bytes", 96),
    ] {
        for value in [0, 4096, u64::MAX, u64::MAX - 4095] {
            refused(name, offset, &value.to_le_bytes());
        }
    }
    let version = resealed(|bytes| bytes[8..12].copy_from_slice(&2_u32.to_le_bytes()));
    assert_eq!(
        parse_segment_header(&version),
        Err(Reject::Version {
            found: 2,
            expected: FORMAT_VERSION
        })
    );
    let magic = resealed(|bytes| bytes[..8].copy_from_slice(&CONTROL_MAGIC));
    assert_eq!(
        parse_segment_header(&magic),
        Err(Reject::Magic { found: CONTROL_MAGIC })
    );
}

#[test]
fn records_that_contradict_themselves_are_refused() {
    let refused =
        |name: &str, record: &SlotRecord, layers: u32| match parse_slot_record(&record.encode(192), layers) {
            Err(Reject::Field { field, .. }) => assert_eq!(field, name),
            other => panic!("{name}: {other:?}"),
        };
    refused(
        "crc_count",
        &SlotRecord {
            layer_crcs: Vec::new(),
            ..committed()
        },
        3,
    );
    refused(
        "crc_count",
        &SlotRecord {
            state: SlotState::Free,
            ..committed()
        },
        3,
    );
    refused("crc_count", &committed(), 4);
    refused("crc_count", &committed(), 2);
    refused(
        "sequence",
        &SlotRecord {
            sequence: 43,
            ..committed()
        },
        3,
    );
}

#[test]
fn the_places_in_a_segment_follow_each_other_without_overlap() {
    for slot_count in [1, 2, 63, 1000, SLOTS_MAX] {
        for layer_count in [1, 17, 96, LAYERS_MAX] {
            let header = SegmentHeader {
                slot_count,
                layer_count,
                slot_bytes: 4096,
                payload_bytes: 4096,
                ..header()
            };
            let last = slot_count - 1;
            assert!(header.layers_offset() + 8 * u64::from(layer_count) <= header.counters_offset());
            assert!(header.counters_offset() + counters::BYTES <= header.marks_offset());
            assert!(header.mark_offset(last) + 4 <= header.sequences_offset());
            assert!(header.sequence_offset(last) + 8 <= header.records_offset());
            assert!(header.record_offset(last) + header.record_bytes() <= header.data_offset());
            assert_eq!(header.slot_offset(last) + header.slot_bytes, header.file_bytes());
            assert!(
                header.records_offset().is_multiple_of(64) && header.data_offset().is_multiple_of(PAGE_BYTES)
            );
            assert!(header.record_bytes() >= RECORD_FIXED_BYTES as u64 + 4 * u64::from(layer_count));
        }
    }
}
