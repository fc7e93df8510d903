//! The lane between devices of one machine: the peer's cache is mapped here, and the local device copies out of it into its
//! own blocks. No byte passes the host.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use kvlane_cuda::{DeviceCache, Patience, PeerCache};

use super::{Lane, LaneError, Lease, LocalCache, Pairing, Span};

/// Most bytes and parts that are handed to the device at a time: what is adjacent among them becomes one copy. Behind each
/// lot but the last the witness is asked, so that a peer that ended is noticed early.
const LOT_BYTES: usize = 256 << 20;
const LOT_PARTS: usize = 1 << 16;

/// Copies out of the peer's mapped memory on the local cache's own stream.
///
/// - Memory that was mapped stays readable when the peer's process stops or ends, whatever is in it then. So whether the
///   lease was held is asked of a *witness*, another lane to the same peer, after the event behind the copies is over.
/// - A copy on a device cannot be called off. At its deadline the lane starts no more of them and waits for those on their
///   way: at most 64 MiB, milliseconds on a device that works. A device that does not end them has stopped for the engine,
///   too; then the lane waits with it, because blocks that may still be written must not be given back.
/// - The lane does not wait for work that the program gave its compute stream before: who orders a copy has done that.
pub struct CudaLane {
    local: Arc<DeviceCache>,
    peer: PeerCache,
    pairing: Arc<Pairing>,
    witness: Box<dyn Lane>,
    is_open: bool,
}

impl CudaLane {
    /// A lane to the peer whose memory `peer` is, whose layout `pairing` has as the remote one, and whose leases `witness`
    /// knows.
    pub fn new(peer: PeerCache, pairing: Arc<Pairing>, witness: Box<dyn Lane>) -> Result<Self, LaneError> {
        let LocalCache::Device(local) = pairing.local() else {
            return Err(LaneError::Layout(
                "the local cache is in host memory; allowed: on a device".to_owned(),
            ));
        };
        Ok(Self {
            local: Arc::clone(local),
            peer,
            pairing,
            witness,
            is_open: true,
        })
    }

    fn copy_all(
        &mut self,
        span: &Span,
        lease: Lease,
        deadline: Instant,
        cancelled: &AtomicBool,
    ) -> Result<(), LaneError> {
        let patience = Patience {
            deadline,
            cancelled: &|| cancelled.load(Ordering::Relaxed),
        };
        let pairing = Arc::clone(&self.pairing);
        let mut walk = pairing.walk(&span.layers, &span.remote, &span.local);
        let mut done_bytes = 0;
        while !walk.is_done() {
            let mut parts = Vec::new();
            let mut lot_bytes = 0;
            while parts.len() < LOT_PARTS
                && let Some(part) = walk.next(LOT_BYTES - lot_bytes)
            {
                lot_bytes += part.len;
                parts.push((part.local(), part.address));
            }
            match self.local.copy_from_peer(&self.peer, parts, &patience) {
                Ok(bytes) => done_bytes += bytes,
                Err(failed) => {
                    return Err(LaneError::of_device(failed.error, done_bytes + failed.done_bytes));
                }
            }
            if !walk.is_done() {
                self.check_lease(lease, deadline, cancelled, done_bytes)?;
            }
        }
        self.check_lease(lease, deadline, cancelled, done_bytes)
    }

    fn check_lease(
        &mut self,
        lease: Lease,
        deadline: Instant,
        cancelled: &AtomicBool,
        done_bytes: u64,
    ) -> Result<(), LaneError> {
        match self.witness.is_held(lease, deadline, cancelled) {
            Ok(true) => Ok(()),
            Ok(false) => Err(lease.lapsed()),
            Err(LaneError::TimedOut { .. }) => Err(LaneError::TimedOut { done_bytes }),
            Err(LaneError::Cancelled { .. }) => Err(LaneError::Cancelled { done_bytes }),
            Err(error) => Err(error),
        }
    }
}

impl Lane for CudaLane {
    fn name(&self) -> &'static str {
        "cuda"
    }

    fn is_open(&self) -> bool {
        self.is_open && self.witness.is_open()
    }

    fn copy(
        &mut self,
        span: &Span,
        lease: Lease,
        deadline: Instant,
        cancelled: &AtomicBool,
    ) -> Result<(), LaneError> {
        if !self.is_open() {
            return Err(LaneError::Closed);
        }
        self.pairing.check(span)?;
        let result = self.copy_all(span, lease, deadline, cancelled);
        if let Err(LaneError::Device(_)) = &result {
            self.is_open = false;
        }
        result
    }

    fn is_held(
        &mut self,
        lease: Lease,
        deadline: Instant,
        cancelled: &AtomicBool,
    ) -> Result<bool, LaneError> {
        if !self.is_open() {
            return Err(LaneError::Closed);
        }
        self.witness.is_held(lease, deadline, cancelled)
    }
}

impl std::fmt::Debug for CudaLane {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("CudaLane")
            .field("peer", &self.peer)
            .field("witness", &self.witness.name())
            .finish_non_exhaustive()
    }
}
