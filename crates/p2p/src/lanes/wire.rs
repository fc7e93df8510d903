//! The bytes of a data connection, all numbers little-endian.
//!
//! | request | bytes |
//! |---|---|
//! | magic | 0..4 |
//! | kind: 1 fetch, 2 check, 3 join, 4 transmit, 5 cut, 6 take | 4..8 |
//! | lease: slot, epoch; in a join the version of NCCL and the bytes of staging; in a cut the tokens of a unit, and the first \
//!   head and the number of heads in four bytes each; in a take the first block of the prompt, zero | 8..12, 16..24 |
//! | number of blocks; zero in a check, join or cut | 12..16 |
//! | first layer, layer behind the last; zero in a check, join or cut | 24..28, 28..32 |
//! | the blocks, four bytes each; in a take blake3 of the key and the prompt's digest, 32 bytes each | 32.. |
//!
//! | answer | bytes |
//! |---|---|
//! | magic | 0..4 |
//! | kind: 1 data, 2 held, 3 lapsed, 4 id, 5 joined, 6 group, 7 refused, 8 found, 9 absent | 4..8 |
//! | payload bytes behind data, found, an id or a refusal; sends of a group; else zero | 8..16 |
//!
//! A fetch is answered by *lapsed*, or by *data*, the payload, and *held* or *lapsed*; a check by *held* or *lapsed*. The
//! payload comes layer by layer, in a layer run by run of the holder, in a run block by block as asked.
//!
//! A join makes a communicator of NCCL, one for the connection. It is answered by *refused* and a sentence, or by *id* and NCCL's
//! id of 128 bytes; both sides take part then, the holder as rank 0, and it says *joined* or *refused* once its part is done.
//! A transmit is a fetch whose payload goes over the communicator: instead of *data* there is, for every group of sends that
//! the holder starts, *group* and the length of each send in four bytes; it starts the group when it has said so. Groups have
//! at most as many bytes as the staging of the join. Behind the last comes *held* or *lapsed*, or *lapsed* where a group
//! should be.
//!
//! A take is a fetch of blocks of a prompt that is computed whole, without a lease that was granted: it is answered by *absent*
//! where the holder has no such prompt posted, or by *found*, the lease (slot in four bytes, epoch in eight), the payload, and
//! *held* or *lapsed*.
//!
//! A cut is not answered: from then on blocks in requests are units (`Cut`). Without one, they are the holder's blocks.

use std::ops::Range;

use kvlane_cuda::{CommunicatorId, NcclVersion, SendPlan};

use super::{LaneError, Lease};
use crate::shape::Slice;

/// Most blocks of one fetch; a span of more becomes several.
pub const MAX_FETCH_BLOCKS: usize = 4096;

pub(super) const REQUEST_BYTES: usize = 32;
pub(super) const ANSWER_BYTES: usize = 16;

const REQUEST_MAGIC: [u8; 4] = *b"kvQ1";
const ANSWER_MAGIC: [u8; 4] = *b"kvA1";
const FETCH: u32 = 1;
const CHECK: u32 = 2;
const JOIN: u32 = 3;
const TRANSMIT: u32 = 4;
const CUT: u32 = 5;
const TAKE: u32 = 6;
const DATA: u32 = 1;
const HELD: u32 = 2;
const LAPSED: u32 = 3;
const ID: u32 = 4;
const JOINED: u32 = 5;
const GROUP: u32 = 6;
const REFUSED: u32 = 7;
const FOUND: u32 = 8;
const ABSENT: u32 = 9;

/// What follows a take.
pub(super) const TAKE_BYTES: usize = 64;
/// What follows *found*.
pub(super) const LEASE_BYTES: usize = 12;

/// What follows a take of a prompt.
pub(super) fn encode_prompt(key: &[u8; 32], digest: &[u8; 32]) -> [u8; TAKE_BYTES] {
    let mut bytes = [0; TAKE_BYTES];
    bytes[..32].copy_from_slice(key);
    bytes[32..].copy_from_slice(digest);
    bytes
}

/// The key's hash and the digest.
pub(super) fn decode_prompt(bytes: &[u8; TAKE_BYTES]) -> ([u8; 32], [u8; 32]) {
    let half = |start: usize| bytes[start..start + 32].try_into().expect("32 of 64 bytes");
    (half(0), half(32))
}

/// What follows *found*.
pub(super) fn encode_lease(lease: Lease) -> [u8; LEASE_BYTES] {
    let mut bytes = [0; LEASE_BYTES];
    bytes[..4].copy_from_slice(&lease.slot.to_le_bytes());
    bytes[4..].copy_from_slice(&lease.epoch.to_le_bytes());
    bytes
}

/// See [`encode_lease`].
pub(super) fn decode_lease(bytes: &[u8; LEASE_BYTES]) -> Lease {
    Lease {
        slot: u32_at(bytes, 0),
        epoch: u64_at(bytes, 4),
    }
}

/// Longest sentence of a refusal.
pub(super) const REFUSAL_BYTES_MAX: usize = 512;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Request {
    /// The blocks follow.
    Fetch {
        lease: Lease,
        layers: Range<usize>,
        block_count: usize,
    },
    Check {
        lease: Lease,
    },
    Join {
        version: NcclVersion,
        staging_bytes: u64,
    },
    /// The blocks follow.
    Transmit {
        lease: Lease,
        layers: Range<usize>,
        block_count: usize,
    },
    /// Blocks are units from here on.
    Cut(Slice),
    /// What the prompt is follows.
    Take {
        layers: Range<usize>,
        first_block: u32,
        block_count: usize,
    },
}

impl Request {
    pub(super) fn encode(&self) -> [u8; REQUEST_BYTES] {
        let (kind, lease, layers, block_count) = match self {
            Request::Fetch {
                lease,
                layers,
                block_count,
            } => (FETCH, *lease, layers.clone(), *block_count),
            Request::Check { lease } => (CHECK, *lease, 0..0, 0),
            Request::Join {
                version,
                staging_bytes,
            } => {
                // In the same places.
                let numbers = Lease {
                    slot: version.code(),
                    epoch: *staging_bytes,
                };
                (JOIN, numbers, 0..0, 0)
            }
            Request::Transmit {
                lease,
                layers,
                block_count,
            } => (TRANSMIT, *lease, layers.clone(), *block_count),
            Request::Cut(slice) => {
                let numbers = Lease {
                    slot: slice.unit_tokens,
                    epoch: u64::from(slice.head_count) << 32 | u64::from(slice.first_head),
                };
                (CUT, numbers, 0..0, 0)
            }
            Request::Take {
                layers,
                first_block,
                block_count,
            } => {
                let numbers = Lease {
                    slot: *first_block,
                    epoch: 0,
                };
                (TAKE, numbers, layers.clone(), *block_count)
            }
        };
        // Layers and blocks were checked against a cache, whose bounds fit.
        let number = |value: usize| u32::try_from(value).expect("fits the frame").to_le_bytes();
        let mut bytes = [0; REQUEST_BYTES];
        bytes[0..4].copy_from_slice(&REQUEST_MAGIC);
        bytes[4..8].copy_from_slice(&kind.to_le_bytes());
        bytes[8..12].copy_from_slice(&lease.slot.to_le_bytes());
        bytes[12..16].copy_from_slice(&number(block_count));
        bytes[16..24].copy_from_slice(&lease.epoch.to_le_bytes());
        bytes[24..28].copy_from_slice(&number(layers.start));
        bytes[28..32].copy_from_slice(&number(layers.end));
        bytes
    }

    pub(super) fn decode(bytes: &[u8; REQUEST_BYTES]) -> Result<Self, LaneError> {
        check_magic("request", bytes, REQUEST_MAGIC)?;
        let lease = Lease {
            slot: u32_at(bytes, 8),
            epoch: u64_at(bytes, 16),
        };
        let block_count = u32_at(bytes, 12) as usize;
        let layers = u32_at(bytes, 24) as usize..u32_at(bytes, 28) as usize;
        match u32_at(bytes, 4) {
            FETCH | TRANSMIT | TAKE if block_count > MAX_FETCH_BLOCKS => Err(LaneError::Protocol(format!(
                "a request for {block_count} blocks; allowed: {MAX_FETCH_BLOCKS}"
            ))),
            FETCH => Ok(Request::Fetch {
                lease,
                layers,
                block_count,
            }),
            TRANSMIT => Ok(Request::Transmit {
                lease,
                layers,
                block_count,
            }),
            CHECK if block_count == 0 && layers == (0..0) => Ok(Request::Check { lease }),
            CHECK => Err(LaneError::Protocol("a check that names blocks".to_owned())),
            JOIN if block_count == 0 && layers == (0..0) => Ok(Request::Join {
                version: NcclVersion::from_code(lease.slot),
                staging_bytes: lease.epoch,
            }),
            JOIN => Err(LaneError::Protocol("a join that names blocks".to_owned())),
            CUT if block_count == 0 && layers == (0..0) => Ok(Request::Cut(Slice {
                unit_tokens: lease.slot,
                first_head: lease.epoch as u32,
                head_count: (lease.epoch >> 32) as u32,
            })),
            CUT => Err(LaneError::Protocol("a cut that names blocks".to_owned())),
            TAKE if lease.epoch == 0 => Ok(Request::Take {
                layers,
                first_block: lease.slot,
                block_count,
            }),
            TAKE => Err(LaneError::Protocol("a take that names a lease".to_owned())),
            kind => Err(LaneError::Protocol(format!(
                "a request of kind {kind}; allowed: {FETCH} to {TAKE}"
            ))),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Data {
        len_bytes: u64,
    },
    Held,
    Lapsed,
    /// An id of a communicator follows.
    Id,
    Joined,
    /// The lengths of the sends follow.
    Group {
        sends: usize,
    },
    /// The sentence follows.
    Refused {
        len_bytes: usize,
    },
    /// The lease follows, and then the payload.
    Found {
        len_bytes: u64,
    },
    Absent,
}

impl Answer {
    /// The answer to the question whether a lease is held.
    pub(super) fn of_lease(is_held: bool) -> Self {
        if is_held { Answer::Held } else { Answer::Lapsed }
    }

    pub(super) fn encode(self) -> [u8; ANSWER_BYTES] {
        let (kind, len_bytes) = match self {
            Answer::Data { len_bytes } => (DATA, len_bytes),
            Answer::Held => (HELD, 0),
            Answer::Lapsed => (LAPSED, 0),
            Answer::Id => (ID, CommunicatorId::LEN_BYTES as u64),
            Answer::Joined => (JOINED, 0),
            Answer::Group { sends } => (GROUP, sends as u64),
            Answer::Refused { len_bytes } => (REFUSED, len_bytes as u64),
            Answer::Found { len_bytes } => (FOUND, len_bytes),
            Answer::Absent => (ABSENT, 0),
        };
        let mut bytes = [0; ANSWER_BYTES];
        bytes[0..4].copy_from_slice(&ANSWER_MAGIC);
        bytes[4..8].copy_from_slice(&kind.to_le_bytes());
        bytes[8..16].copy_from_slice(&len_bytes.to_le_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8; ANSWER_BYTES]) -> Result<Self, LaneError> {
        check_magic("answer", bytes, ANSWER_MAGIC)?;
        match (u32_at(bytes, 4), u64_at(bytes, 8)) {
            (DATA, len_bytes) => Ok(Answer::Data { len_bytes }),
            (HELD, 0) => Ok(Answer::Held),
            (LAPSED, 0) => Ok(Answer::Lapsed),
            (FOUND, len_bytes) => Ok(Answer::Found { len_bytes }),
            (ABSENT, 0) => Ok(Answer::Absent),
            (ID, len_bytes) if len_bytes == CommunicatorId::LEN_BYTES as u64 => Ok(Answer::Id),
            (JOINED, 0) => Ok(Answer::Joined),
            (GROUP, sends) if (1..=SendPlan::SENDS_MAX as u64).contains(&sends) => Ok(Answer::Group {
                sends: sends as usize,
            }),
            (REFUSED, len_bytes) if len_bytes <= REFUSAL_BYTES_MAX as u64 => Ok(Answer::Refused {
                len_bytes: len_bytes as usize,
            }),
            (kind, len_bytes) => Err(LaneError::Protocol(format!(
                "an answer of kind {kind} with {len_bytes} bytes"
            ))),
        }
    }
}

fn check_magic(what: &str, bytes: &[u8], magic: [u8; 4]) -> Result<(), LaneError> {
    if bytes[..4] == magic {
        return Ok(());
    }
    Err(LaneError::Protocol(format!(
        "{:02x?} where a{} {what} should start",
        &bytes[..4],
        if what.starts_with('a') { "n" } else { "" }
    )))
}

fn u32_at(bytes: &[u8], place: usize) -> u32 {
    u32::from_le_bytes(bytes[place..place + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], place: usize) -> u64 {
    u64::from_le_bytes(bytes[place..place + 8].try_into().expect("eight bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEASE: Lease = Lease {
        slot: 0x0102_0304,
        epoch: 0x0506_0708_090a_0b0c,
    };

    fn fetch(block_count: usize) -> Request {
        Request::Fetch {
            lease: LEASE,
            layers: 3..48,
            block_count,
        }
    }

    #[test]
    fn frames_are_the_documented_bytes_and_come_back() {
        let bytes = fetch(64).encode();
        assert_eq!(&bytes[..8], b"kvQ1\x01\0\0\0");
        assert_eq!(bytes[8..16], [4, 3, 2, 1, 64, 0, 0, 0]);
        assert_eq!(bytes[16..24], [12, 11, 10, 9, 8, 7, 6, 5]);
        assert_eq!(bytes[24..], [3, 0, 0, 0, 48, 0, 0, 0]);
        let join = Request::Join {
            version: NcclVersion::from_code(22_907),
            staging_bytes: 64 << 20,
        };
        let transmit = Request::Transmit {
            lease: LEASE,
            layers: 0..2,
            block_count: 9,
        };
        for request in [
            fetch(0),
            fetch(MAX_FETCH_BLOCKS),
            Request::Check { lease: LEASE },
            join,
            transmit,
            Request::Cut(Slice {
                unit_tokens: 16,
                first_head: 3,
                head_count: u32::MAX,
            }),
            Request::Take {
                layers: 0..48,
                first_block: 7,
                block_count: 3,
            },
        ] {
            assert_eq!(Request::decode(&request.encode()).unwrap(), request);
        }
        for answer in [
            Answer::Data { len_bytes: 1 << 40 },
            Answer::Held,
            Answer::Lapsed,
            Answer::Id,
            Answer::Joined,
            Answer::Group { sends: 64 },
            Answer::Refused { len_bytes: 512 },
            Answer::Found { len_bytes: 1 << 40 },
            Answer::Absent,
        ] {
            assert_eq!(Answer::decode(&answer.encode()).unwrap(), answer);
        }
    }

    #[test]
    fn requests_that_are_none_or_too_large_are_refused() {
        let refused = |place: usize, byte: u8| {
            let mut bytes = fetch(1).encode();
            bytes[place] = byte;
            Request::decode(&bytes).unwrap_err().to_string()
        };
        assert!(refused(0, 0).contains("where a request should start"));
        assert!(refused(4, 0).contains("kind 0; allowed: 1 to 6"));
        assert!(refused(4, 7).contains("kind 7; allowed: 1 to 6"));
        assert!(refused(4, 6).contains("a take that names a lease"));
        assert!(refused(4, 2).contains("a check that names blocks"));
        assert!(refused(4, 3).contains("a join that names blocks"));
        assert!(refused(4, 5).contains("a cut that names blocks"));
        assert!(refused(13, 16).contains("4097 blocks; allowed: 4096"));
    }

    #[test]
    fn answers_that_are_none_are_refused() {
        let refused = |place: usize, byte: u8| {
            let mut bytes = Answer::Held.encode();
            bytes[place] = byte;
            Answer::decode(&bytes).unwrap_err().to_string()
        };
        assert!(refused(3, b'2').contains("where an answer should start"));
        assert!(refused(4, 0).contains("kind 0"));
        assert!(refused(8, 1).contains("with 1 bytes"));
        for answer in [
            Answer::Group { sends: 0 },
            Answer::Group {
                sends: SendPlan::SENDS_MAX + 1,
            },
            Answer::Refused {
                len_bytes: REFUSAL_BYTES_MAX + 1,
            },
        ] {
            assert!(Answer::decode(&answer.encode()).is_err(), "{answer:?}");
        }
    }
}
