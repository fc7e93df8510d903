//! From device to device: a cache that another process of this machine maps, and copies out of it; bytes that came over a
//! communicator.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::{DeviceCache, Patience, Pause};
use crate::communicator::{Communicator, CommunicatorPlace, Rank};
use crate::error::{CudaError, Result};
use crate::nccl::CommunicatorId;
use crate::raw::{Flown, PeerMapping, PieceList, Pieces, TokenMemory};
use crate::share::CacheOffer;
use crate::spans::RunPart;

/// Most bytes that are started before the caller's patience is looked at again. At most two such windows are on their way:
/// that is what a caller waits for beyond its deadline, since a copy on a device cannot be called off. Each takes a tenth of a
/// millisecond over NVLink and one or two over PCIe, once the device has room for it; the stream has the highest priority.
const WINDOW_BYTES: usize = PieceList::WINDOW_BYTES;
const WINDOWS_MAX: usize = 2;

/// Short copies take a few microseconds, less than any sleep.
const SPIN: Duration = Duration::from_micros(50);

/// After this time somebody should know that a device does not end its copies.
const WARN_AFTER: Duration = Duration::from_secs(5);

/// A cache that other processes may map, as long as this value lives.
pub struct SharedCache {
    offer: CacheOffer,
    /// Whose memory the offer names.
    _token: TokenMemory,
}

impl SharedCache {
    /// What a peer needs, and nobody else may know: with it the cache can be read and written.
    pub fn offer(&self) -> &CacheOffer {
        &self.offer
    }
}

impl std::fmt::Debug for SharedCache {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_tuple("SharedCache").field(&self.offer).finish()
    }
}

/// The cache of another process, mapped as long as this value lives.
#[derive(Clone, Debug)]
pub struct PeerCache(Arc<PeerMapping>);

/// Bytes of a peer did not come, or not all.
#[derive(Debug, thiserror::Error)]
#[error("{error}, after {done_bytes} bytes")]
pub struct PeerCopyError {
    /// What was copied before, at least.
    pub done_bytes: u64,
    /// The reason.
    pub error: CudaError,
}

impl DeviceCache {
    /// Lets other processes map the allocations that this cache lies in: whole ones, with whatever else the program has in
    /// them. `token` is random bytes, by which they find out that they have mapped the right memory.
    ///
    /// # Errors
    /// The driver refuses: memory of some allocators cannot be shared, nor on some systems.
    pub fn share(&self, token: [u8; 16], patience: &Patience<'_>) -> Result<SharedCache> {
        let mut lease = self.staging(patience)?;
        lease[..token.len()].copy_from_slice(&token);
        let Some(staging) = lease.into_staging() else {
            return Err(CudaError::Cancelled { what: "a buffer" });
        };
        let memory = TokenMemory::allocate(&self.memory)?;
        let written = memory.start_write(&self.memory, token.len(), staging);
        if let Err(error) = self.finish(written, None) {
            // A copy may still be on its way to it.
            std::mem::forget(memory);
            return Err(error);
        }
        Ok(SharedCache {
            offer: CacheOffer {
                allocations: self.memory.shared_allocations(memory.address())?,
                token_address: memory.address(),
                token,
            },
            _token: memory,
        })
    }

    /// Maps the cache of another process of this machine. Takes milliseconds.
    ///
    /// # Errors
    /// The driver refuses: the other process is elsewhere, ended, cannot be reached from this device, or is this one.
    /// [`CudaError::Offer`]: there is memory, but not what the offer says.
    pub fn map_peer(&self, offer: &CacheOffer, patience: &Patience<'_>) -> Result<PeerCache> {
        self.check()?;
        let mapping = PeerMapping::open(&self.memory, offer)?;
        let Some(staging) = self.staging(patience)?.into_staging() else {
            return Err(CudaError::Cancelled { what: "a buffer" });
        };
        let token_bytes = offer.token.len();
        let started = mapping.start_read(&self.memory, offer.token_address, token_bytes, staging)?;
        let read = self.finish(started, Some(patience))?;
        if read[..token_bytes] != offer.token {
            return Err(CudaError::Offer(
                "its token is not in the memory that was mapped: another machine or process".to_owned(),
            ));
        }
        Ok(PeerCache(mapping))
    }

    /// Copies bytes at addresses of the peer into parts of own runs. What is adjacent on both sides is one copy.
    ///
    /// When this returns, nothing of it can reach the cache any more, and nothing reads the peer's memory. For that it waits
    /// beyond the caller's patience for what is on its way, at most 64 MiB. Who has given the compute stream work on these
    /// blocks before has waited for its [`Mark`](super::Mark).
    pub fn copy_from_peer(
        &self,
        peer: &PeerCache,
        parts: impl IntoIterator<Item = (RunPart, u64)>,
        patience: &Patience<'_>,
    ) -> std::result::Result<u64, PeerCopyError> {
        let fail = |error| PeerCopyError { done_bytes: 0, error };
        self.check().map_err(fail)?;
        let pieces = peer.0.pieces(&self.memory, parts.into_iter());
        self.fly(pieces.map_err(fail)?, patience)
    }

    /// Room for one more communicator of this cache.
    ///
    /// # Errors
    /// Too many are open, or could not be closed.
    pub fn communicator_place(&self) -> Result<CommunicatorPlace> {
        self.check()?;
        CommunicatorPlace::take(&self.communicators)
    }

    /// Makes a communicator with a peer that does the same, over `staging_bytes` of device memory. Waits for it, which may
    /// take seconds.
    ///
    /// # Errors
    /// NCCL is missing or refuses, as for two ends on one GPU; the peer does not come.
    pub fn join(
        &self,
        place: CommunicatorPlace,
        id: &CommunicatorId,
        rank: Rank,
        staging_bytes: usize,
        patience: &Patience<'_>,
    ) -> Result<Communicator> {
        self.check()?;
        Communicator::join(&self.memory, place, (id, rank), staging_bytes, patience)
    }

    /// Copies the received bytes that come next into parts of own runs. What is adjacent on both sides is one copy.
    ///
    /// When this returns, nothing of it can reach the cache any more, as with [`copy_from_peer`](Self::copy_from_peer).
    ///
    /// # Panics
    /// If the communicator is of another cache, or has received fewer bytes.
    pub fn scatter_received(
        &self,
        communicator: &mut Communicator,
        parts: &[RunPart],
        patience: &Patience<'_>,
    ) -> std::result::Result<u64, PeerCopyError> {
        self.check()
            .map_err(|error| PeerCopyError { done_bytes: 0, error })?;
        self.fly(communicator.take_received(&self.memory, parts), patience)
    }

    /// Carries out copies into this cache, and waits for their end.
    fn fly(&self, mut pieces: Pieces, patience: &Patience<'_>) -> std::result::Result<u64, PeerCopyError> {
        let mut done_bytes = 0;
        let mut failure = None;
        let mut flying = VecDeque::with_capacity(WINDOWS_MAX);
        loop {
            while failure.is_none() && !pieces.is_done() && flying.len() < WINDOWS_MAX {
                match patience.check("copies into the cache") {
                    Ok(()) => flying.push_back(pieces.start_next(WINDOW_BYTES)),
                    Err(error) => failure = Some(error),
                }
            }
            let Some(oldest) = flying.pop_front() else { break };
            let (bytes, result) = self.land(oldest);
            done_bytes += bytes;
            failure = failure.or(result.err());
        }
        failure.map_or(Ok(done_bytes), |error| Err(PeerCopyError { done_bytes, error }))
    }

    /// Waits for the end of copies.
    fn land(&self, started: Flown) -> (u64, Result<()>) {
        let since = Instant::now();
        let mut flown = started;
        let mut pause = Pause::default();
        let mut has_warned = false;
        loop {
            let flight = match flown {
                Flown::Running(flight) => flight,
                Flown::Ended { bytes, result } => return (bytes, result),
                Flown::Lost(error) => return (0, self.latched(Err(error))),
            };
            let waited = since.elapsed();
            if waited > WARN_AFTER && !has_warned {
                tracing::warn!("copies into the cache do not end; waiting for them");
                has_warned = true;
            }
            if waited < SPIN {
                std::thread::yield_now();
            } else {
                pause.sleep();
            }
            flown = flight.poll();
        }
    }
}
