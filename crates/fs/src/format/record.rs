//! The record of a slot.

use kvlane_core::{BlockKey, NamespaceId};

use super::{RECORD_FIXED_BYTES, Reject, array_at, structure_crc, u32_at, u64_at};

/// What a slot holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SlotState {
    /// Nothing.
    Free,
    /// A promise: the key's payload will be here before the deadline.
    Reserved,
    /// A whole, checked block.
    Committed,
}

/// The record of one slot: its commit record and its entry in the index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotRecord {
    /// The sequence word's value at which this record is valid; always even.
    pub sequence: u64,
    /// What the slot holds.
    pub state: SlotState,
    /// Position of the block in its chain.
    pub depth: u32,
    /// The block's chain hash.
    pub key: BlockKey,
    /// The namespace, epoch included.
    pub namespace: NamespaceId,
    /// Payload bytes.
    pub payload_bytes: u64,
    /// Unix milliseconds until which a reservation counts; 0 otherwise.
    pub deadline_unix_ms: u64,
    /// Start id of the process that wrote the record.
    pub owner: u64,
    /// Unix milliseconds of the commit.
    pub written_unix_ms: u64,
    /// CRC-32 of each layer, seeded with key and layer; empty unless committed.
    pub layer_crcs: Vec<u32>,
}

impl SlotRecord {
    /// The record's bytes, `record_bytes` long.
    pub fn encode(&self, record_bytes: usize) -> Vec<u8> {
        let mut out = Vec::with_capacity(record_bytes);
        out.extend_from_slice(&self.sequence.to_le_bytes());
        let state: u32 = match self.state {
            SlotState::Free => 0,
            SlotState::Reserved => 1,
            SlotState::Committed => 2,
        };
        out.extend_from_slice(&state.to_le_bytes());
        out.extend_from_slice(&self.depth.to_le_bytes());
        out.extend_from_slice(&self.key.0);
        out.extend_from_slice(&self.namespace.0);
        out.extend_from_slice(&self.payload_bytes.to_le_bytes());
        out.extend_from_slice(&self.deadline_unix_ms.to_le_bytes());
        out.extend_from_slice(&self.owner.to_le_bytes());
        out.extend_from_slice(&self.written_unix_ms.to_le_bytes());
        out.extend_from_slice(&(self.layer_crcs.len() as u32).to_le_bytes());
        let crcs: &[u8] = bytemuck::cast_slice(&self.layer_crcs);
        let crc = structure_crc(&[&out, crcs]);
        out.extend_from_slice(&crc.to_le_bytes());
        out.resize(RECORD_FIXED_BYTES, 0);
        out.extend_from_slice(crcs);
        out.resize(record_bytes, 0);
        out
    }
}

/// Reads a slot record of a segment whose blocks have `layer_count` layers.
pub fn parse_slot_record(bytes: &[u8], layer_count: u32) -> Result<SlotRecord, Reject> {
    let needed = RECORD_FIXED_BYTES + 4 * layer_count as usize;
    if bytes.len() < needed {
        return Err(Reject::Truncated {
            found: bytes.len() as u64,
            expected: needed as u64,
        });
    }
    let crc_count = u32_at(bytes, 112);
    if crc_count != 0 && crc_count != layer_count {
        return Err(Reject::Field {
            field: "crc_count",
            found: crc_count.into(),
        });
    }
    let table = &bytes[RECORD_FIXED_BYTES..RECORD_FIXED_BYTES + 4 * crc_count as usize];
    let (found, expected) = (structure_crc(&[&bytes[..116], table]), u32_at(bytes, 116));
    if found != expected {
        return Err(Reject::Checksum { found, expected });
    }
    let state = match u32_at(bytes, 8) {
        0 => SlotState::Free,
        1 => SlotState::Reserved,
        2 => SlotState::Committed,
        other => {
            return Err(Reject::Field {
                field: "state",
                found: other.into(),
            });
        }
    };
    if (state == SlotState::Committed) != (crc_count != 0) {
        return Err(Reject::Field {
            field: "crc_count",
            found: crc_count.into(),
        });
    }
    let sequence = u64_at(bytes, 0);
    if !sequence.is_multiple_of(2) {
        return Err(Reject::Field {
            field: "sequence",
            found: sequence,
        });
    }
    Ok(SlotRecord {
        sequence,
        state,
        depth: u32_at(bytes, 12),
        key: BlockKey(array_at(bytes, 16)),
        namespace: NamespaceId(array_at(bytes, 48)),
        payload_bytes: u64_at(bytes, 80),
        deadline_unix_ms: u64_at(bytes, 88),
        owner: u64_at(bytes, 96),
        written_unix_ms: u64_at(bytes, 104),
        layer_crcs: table.chunks_exact(4).map(|word| u32_at(word, 0)).collect(),
    })
}
