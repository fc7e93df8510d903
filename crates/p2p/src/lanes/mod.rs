//! Ways on which bytes of a peer's blocks reach local ones.
//!
//! A lane copies *out of* a peer's cache and *into* the local one; nothing of this module writes another process'
//! memory. While a peer holds its blocks under a lease, a slot of its [`EpochTable`] has the lease's epoch. A copy reads
//! the bytes first and the slot afterwards: if it still has the epoch, the bytes were the lease's.
//!
//! | lane | how | needs |
//! |---|---|---|
//! | [`ShmLane`] | `process_vm_readv` straight into the local runs | the same machine and pid namespace, the right to trace |
//! | [`CudaLane`] | copies from device to device, out of the peer's mapped memory | the same machine, CUDA IPC |
//! | [`NcclLane`] | the peer's [`serve`] sends from its device, this side receives and scatters | NCCL of one version on both sides |
//! | [`TcpLane`] | the peer's [`serve`] sends from its runs, this side receives into its own | a connection |
//!
//! A cache on a device has no `shm`; over `tcp` its bytes go through pinned memory on both sides.

mod cuda;
mod cut;
mod epoch_table;
mod error;
#[cfg(test)]
pub(crate) mod fixture;
mod huge_pages;
mod local_cache;
mod nccl;
mod offer_board;
mod pairing;
mod patience;
mod remote;
mod serve;
mod shm;
mod take;
mod tcp;
mod watch;
mod wire;

use std::ops::Range;
use std::sync::atomic::AtomicBool;
use std::time::Instant;

pub use cuda::CudaLane;
pub use cut::Cut;
pub use epoch_table::{EpochTable, ProbeToken};
pub use error::LaneError;
pub use huge_pages::prefer_huge_pages;
pub use local_cache::LocalCache;
pub use nccl::NcclLane;
pub(crate) use nccl::other_version;
pub use offer_board::{OfferBoard, POSTED_BLOCKS_MAX, PostedPrompt};
pub use pairing::Pairing;
pub use remote::{MAX_REGIONS, MAX_TOTAL_RUNS, RemoteCache, RemoteRegion};
pub use serve::{Leases, Served, serve};
pub use shm::{PeerMemory, ShmLane};
pub use take::{TakeLine, Taken};
pub use tcp::TcpLane;
pub use wire::MAX_FETCH_BLOCKS;

/// Blocks of some layers: for every layer, `remote[i]` is copied into `local[i]`. Where the two sides' blocks differ, what is
/// said of blocks here is said of units ([`Cut`]).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Span {
    /// Layers, by their place in a block's payload.
    pub layers: Range<usize>,
    /// Blocks of the peer.
    pub remote: Vec<u32>,
    /// As many local blocks.
    pub local: Vec<u32>,
}

/// What says that a peer keeps its blocks: its slot has this epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Lease {
    /// Place in the holder's epoch table.
    pub slot: u32,
    /// Never zero in a lease that counts.
    pub epoch: u64,
}

impl Lease {
    fn lapsed(self) -> LaneError {
        LaneError::Lapsed {
            slot: self.slot,
            epoch: self.epoch,
        }
    }
}

/// A way to one peer, used by one thread at a time.
pub trait Lane: Send {
    /// The lane's name in logs and metrics.
    fn name(&self) -> &'static str;

    /// Whether the lane may be used again. An error may close it: then a new one is needed.
    fn is_open(&self) -> bool;

    /// Copies a span. `Ok` means that every byte has arrived and the lease was held after the last one was read.
    ///
    /// Returns soon after `deadline`, and soon after `cancelled` is set, whatever the peer does. Once it has returned,
    /// nothing writes the local blocks any more.
    fn copy(
        &mut self,
        span: &Span,
        lease: Lease,
        deadline: Instant,
        cancelled: &AtomicBool,
    ) -> Result<(), LaneError>;

    /// Whether the peer still holds the lease: all that was copied under it before this call is then right.
    fn is_held(&mut self, lease: Lease, deadline: Instant, cancelled: &AtomicBool)
    -> Result<bool, LaneError>;
}
