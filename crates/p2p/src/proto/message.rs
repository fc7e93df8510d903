//! What peers say to each other.

use kvlane_core::{NamespaceId, Run};
use kvlane_cuda::{CacheOffer, NcclVersion, SharedAllocation};
use serde::{Deserialize, Serialize};

use crate::key::{Prompt, TransferKey};
use crate::shape::CacheShape;

/// Version of the protocol. Peers of another version are refused: both servers run the same wheel or none.
pub const VERSION: u16 = 3;

/// Longest text in a message other than a key.
pub(super) const TEXT_BYTES_MAX: usize = 512;

/// Everything that goes over a connection, in frames.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Message {
    /// Each side's first message, in the clear: who it is, and a number for the other one's proof.
    Open(Open),
    /// Shows the knowledge of the shared secret (or that there is none), bound to both sides' [`Open`].
    Proof([u8; 32]),
    /// What only an authenticated peer may know. Ends the handshake.
    Hello(Box<Hello>),
    /// The connection ends; the reason is for the other side's log.
    Bye(String),
    /// Nothing to say, but alive.
    Ping,

    /// Is this prompt's KV there, or being computed? To be answered once, within `patience_ms`.
    Ask {
        /// The asker's number of the question.
        question: u64,
        /// Names the transfer.
        key: TransferKey,
        /// What it must be of.
        prompt: Prompt,
        /// How long the answer may wait for the prompt to turn up.
        patience_ms: u32,
    },
    /// The answer to [`Ask`](Self::Ask).
    Answer {
        /// As in the question.
        question: u64,
        /// The answer.
        verdict: Verdict,
    },
    /// Nobody waits for the answer any more.
    Forget {
        /// As in the question.
        question: u64,
    },

    /// A rank of decode wants blocks.
    Want {
        /// The reader's number of the transfer.
        transfer: u64,
        /// Names it on both sides.
        key: TransferKey,
        /// What it must be of.
        prompt: Prompt,
        /// Index in the prompt of the first block that is wanted, in blocks of the reader.
        first_block: u32,
        /// How many. None: this rank has everything, which releases its part of the lease.
        block_count: u32,
        /// Tokens of a block of the reader.
        block_tokens: u32,
        /// Ranks of the reader's engine that will say to this holder that they have what they need.
        readers: u32,
    },
    /// The blocks may be read as long as `slot` holds `epoch`.
    Grant {
        /// As in the want.
        transfer: u64,
        /// Place of the lease in the holder's table.
        slot: u32,
        /// What the table must hold for bytes to be right.
        epoch: u64,
    },
    /// The blocks cannot be had.
    Deny {
        /// As in the want.
        transfer: u64,
        /// Why.
        reason: DenyReason,
    },
    /// What has become readable since the last notice.
    Ready {
        /// As in the want.
        transfer: u64,
        /// Cache blocks of the holder that come next behind those of earlier notices, from the first wanted one on.
        blocks: Vec<u32>,
        /// How far the computation is.
        progress: Progress,
    },
    /// Does `slot` still hold `epoch`? For lanes that cannot see it themselves.
    Check {
        /// As in the want.
        transfer: u64,
        /// As in the grant.
        epoch: u64,
    },
    /// The answer to [`Check`](Self::Check).
    Checked {
        /// As in the want.
        transfer: u64,
        /// Whether everything that was read until the question was right.
        held: bool,
    },
    /// This rank has what it wanted.
    Done {
        /// As in the want.
        transfer: u64,
    },
    /// This rank does not want it any more.
    Cancel {
        /// As in the want.
        transfer: u64,
    },
    /// The lease ended: what is read from now on is somebody else's.
    Revoked {
        /// As in the want.
        transfer: u64,
    },
    /// This rank has what it found posted, or does not want it any more, without having wanted it of the holder.
    Taken {
        /// Names the request on both servers.
        key: TransferKey,
        /// Place of the lease in the holder's table, as posted.
        slot: u32,
        /// The lease's epoch, as posted. Of any other lease of this key nothing is said.
        epoch: u64,
        /// As in a want.
        readers: u32,
    },
}

/// The part of the handshake that everybody may see.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Open {
    /// Name of the engine, for logs.
    pub engine_id: String,
    /// Random number of this start of the engine's process: after a restart it is another.
    pub start_id: [u8; 16],
    /// Rank of the worker inside its engine.
    pub rank: u32,
    /// What the dialling side wants of the connection.
    pub role: Role,
    /// Random number that the other side's proof must include.
    pub nonce: [u8; 32],
    /// Whether a secret is set.
    pub has_secret: bool,
}

/// What a process does on a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Role {
    /// Holds blocks.
    Holder,
    /// Asks questions.
    Asker,
    /// Pulls blocks.
    Puller,
}

/// What the connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Channel {
    /// Messages of this list.
    Control,
    /// After the handshake, the `tcp` lane's own frames.
    Data,
}

/// The part of the handshake for authenticated peers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// What the connection is for; the dialling side decides.
    pub channel: Channel,
    /// What must agree before bytes may be used; zeroes from an asker.
    pub namespace: [u8; 32],
    /// Names and values of what the namespace is made of, as far as a person can use them: why two of them differ.
    pub facts: Vec<(String, String)>,
    /// Tokens per block.
    pub block_tokens: u32,
    /// Where the blocks lie; none from an asker.
    pub cache: Option<CacheLayout>,
    /// How to find out whether memory can be read directly; only from a holder.
    pub probe: Option<Probe>,
    /// How to map the blocks from another process of the machine; only from a holder whose cache is on a CUDA device.
    pub device: Option<DeviceMemory>,
    /// Version of NCCL, as its own number, where it is there and the cache is on a CUDA device.
    pub nccl: Option<u32>,
}

impl Hello {
    /// The version of NCCL as the rest of kvlane knows it.
    pub fn nccl_version(&self) -> Option<NcclVersion> {
        self.nccl.map(NcclVersion::from_code)
    }

    /// The namespace as the rest of kvlane knows it.
    pub fn namespace_id(&self) -> NamespaceId {
        NamespaceId(self.namespace)
    }
}

/// Where a worker's blocks lie in its memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheLayout {
    /// Number of blocks in every region.
    pub block_count: u32,
    /// In the order of the payload.
    pub regions: Vec<Region>,
    /// Equal ones order the bytes of a block in the same way.
    pub fingerprint: [u8; 32],
    /// What the blocks hold, if that is known: then a peer whose blocks are others may take parts of them.
    pub shape: Option<CacheShape>,
}

/// One region: block `b` is the bytes at `address + b * block_stride_bytes + offset` of every run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Region {
    /// Address of the first byte.
    pub address: u64,
    /// Distance between neighbouring blocks.
    pub block_stride_bytes: u64,
    /// Bytes from the first to behind the last one.
    pub extent_bytes: u64,
    /// (offset, length) in bytes, ascending.
    pub runs: Vec<(u64, u64)>,
}

/// Lets a peer find out whether it can read this process's memory: whoever reads `token` at `address` can.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probe {
    /// Process number in the holder's own pid namespace.
    pub pid: u32,
    /// Where the token is.
    pub address: u64,
    /// Sixteen random bytes.
    pub token: [u8; 16],
    /// Where the table of epochs is: eight bytes per slot.
    pub epochs_address: u64,
    /// Number of slots.
    pub slot_count: u32,
    /// Where the board of posted prompts is.
    pub board_address: u64,
    /// Number of its entries; none: there is no board.
    pub board_entries: u32,
}

/// Device memory for others to map.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceMemory {
    /// Everything that the cache and the token lie in.
    pub allocations: Vec<DeviceAllocation>,
    /// Where the token is.
    pub token_address: u64,
    /// Who reads it there has mapped the right memory.
    pub token: [u8; 16],
    /// Names the machine since its start; only there can it be mapped. Zeroes: not known.
    pub host_id: [u8; 16],
}

impl std::fmt::Debug for DeviceMemory {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Neither token nor handles, which are as good as keys.
        formatter
            .debug_struct("DeviceMemory")
            .field("allocations", &self.allocations.len())
            .finish_non_exhaustive()
    }
}

/// One allocation of it.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceAllocation {
    /// The driver's handle, in two halves.
    pub handle: [[u8; 32]; 2],
    /// Address of the first byte in the holder's process.
    pub address: u64,
    /// How many bytes.
    pub len_bytes: u64,
}

impl DeviceMemory {
    /// What a cache offers on a machine.
    pub fn new(offer: &CacheOffer, host_id: [u8; 16]) -> Self {
        let allocation = |one: &SharedAllocation| {
            let (first, second) = one.handle.split_at(32);
            let half = |bytes: &[u8]| bytes.try_into().expect("half of 64 bytes");
            DeviceAllocation {
                handle: [half(first), half(second)],
                address: one.address,
                len_bytes: one.len_bytes,
            }
        };
        Self {
            allocations: offer.allocations.iter().map(allocation).collect(),
            token_address: offer.token_address,
            token: offer.token,
            host_id,
        }
    }
}

impl From<&DeviceMemory> for CacheOffer {
    fn from(memory: &DeviceMemory) -> Self {
        let allocation = |one: &DeviceAllocation| SharedAllocation {
            handle: one.handle.concat().try_into().expect("64 bytes"),
            address: one.address,
            len_bytes: one.len_bytes,
        };
        Self {
            allocations: memory.allocations.iter().map(allocation).collect(),
            token_address: memory.token_address,
            token: memory.token,
        }
    }
}

/// How far prefill is with a prompt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Leading blocks of the prompt that are complete.
    pub done_blocks: u32,
    /// Blocks up to here are complete in the first `wave_layers` layers; at least `done_blocks`.
    pub wave_blocks: u32,
    /// See `wave_blocks`.
    pub wave_layers: u32,
}

/// The answer to a question.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Verdict {
    /// It is being computed; a want will be granted.
    Started,
    /// All of it is there.
    Ready,
    /// It is not there and did not turn up in time.
    None,
    /// The key is known, but for another prompt.
    Mismatch,
    /// Too many questions wait.
    Busy,
}

/// Why blocks cannot be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum DenyReason {
    /// The lease ended, or there never was one.
    Gone,
    /// The key is known, but for another prompt.
    Mismatch,
    /// The wanted blocks are not the prompt's.
    Range,
    /// Too many transfers are open.
    Busy,
    /// The two caches cannot exchange bytes: another model, KV type or layout, or other heads.
    Namespace,
}

impl From<&kvlane_core::Region> for Region {
    fn from(region: &kvlane_core::Region) -> Self {
        let run = |run: &Run| (run.offset_bytes as u64, run.len_bytes as u64);
        Self {
            address: region.address,
            block_stride_bytes: region.block_stride_bytes as u64,
            extent_bytes: region.extent_bytes as u64,
            runs: region.runs.iter().map(run).collect(),
        }
    }
}

impl From<&kvlane_core::BlockMap> for CacheLayout {
    fn from(map: &kvlane_core::BlockMap) -> Self {
        Self {
            block_count: map.block_count(),
            regions: map.regions().iter().map(Region::from).collect(),
            fingerprint: map.fingerprint(),
            shape: None,
        }
    }
}

/// Most ranks of an engine that one holder hears of.
pub const READERS_MAX: u32 = 4096;

/// Most facts of a Hello.
pub const FACTS_MAX: usize = 64;

/// Whether there are not too many facts, and none is too long.
pub fn facts_are_bounded(facts: &[(String, String)]) -> bool {
    let fits =
        |(name, value): &(String, String)| name.len() <= TEXT_BYTES_MAX && value.len() <= TEXT_BYTES_MAX;
    facts.len() <= FACTS_MAX && facts.iter().all(fits)
}

impl Message {
    /// Whether somebody waits for it. The others only give back what is not needed any more.
    pub fn is_urgent(&self) -> bool {
        !matches!(
            self,
            Self::Done { .. }
                | Self::Cancel { .. }
                | Self::Forget { .. }
                | Self::Taken { .. }
                | Self::Want { block_count: 0, .. }
        )
    }

    /// Whether all texts are within their bounds; a frame with other ones is refused.
    pub(super) fn texts_are_bounded(&self) -> bool {
        match self {
            Self::Open(open) => open.engine_id.len() <= TEXT_BYTES_MAX,
            Self::Bye(reason) => reason.len() <= TEXT_BYTES_MAX,
            Self::Hello(hello) => facts_are_bounded(&hello.facts),
            Self::Ask { key, .. } | Self::Want { key, .. } | Self::Taken { key, .. } => {
                TransferKey::new(key.as_str()).is_ok()
            }
            _ => true,
        }
    }
}
