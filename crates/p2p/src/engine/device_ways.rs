//! The ways between two caches on devices, best first: `cuda`, `nccl`, `tcp`. Which of them works shows when the first bytes are
//! wanted; a way that does not is not tried again over the same connection.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kvlane_cuda::{CacheOffer, CudaError, DeviceCache, Patience, PeerCache};

use super::address::PeerAddress;
use super::copies::{CopyJob, tcp_lane};
use super::machine::NetConfig;
use super::nccl_way::{NcclWay, SharedNcclLane};
use super::options::LaneChoice;
use super::peers::host_id;
use crate::lanes::{CudaLane, Lane, LaneError, LocalCache, other_version};
use crate::proto::Hello;

/// Longest wait for a buffer and a copy of a few bytes while a peer's memory is mapped.
const MAP_MAX: Duration = Duration::from_secs(5);

/// The ways from one peer's device, at least one of them.
#[derive(Debug)]
pub(super) struct DeviceWays {
    cuda: Option<OfferedMemory>,
    nccl: Option<NcclWay>,
}

impl DeviceWays {
    /// What the two sides can do by what they have told, as far as the choice allows it. `None`: only `tcp`. An error says why
    /// the chosen lane is not possible.
    pub(super) fn new(
        address: &PeerAddress,
        hello: &Hello,
        own: &Hello,
        choice: LaneChoice,
    ) -> Result<Option<Self>, String> {
        let is_forced = choice != LaneChoice::Auto;
        let cuda = || match &hello.device {
            Some(memory) if memory.host_id == [0; 16] || memory.host_id == host_id() => Ok(OfferedMemory {
                offer: memory.into(),
                is_forced,
                mapped: Mutex::new(None),
                no_nccl: None,
            }),
            Some(_) => Err("it runs on another machine (boot ids differ)".to_owned()),
            None => Err("it offers no device memory (its log says why)".to_owned()),
        };
        let nccl = || same_nccl(hello, own).map(|()| NcclWay::new(is_forced));
        let not_possible = |lane: &str, reason| format!("lane {lane} is not possible: {reason}");
        let (cuda, nccl) = match choice {
            LaneChoice::Tcp => return Ok(None),
            LaneChoice::Shm => {
                return Err(not_possible(
                    "shm",
                    "the cache of this server is on a GPU".to_owned(),
                ));
            }
            LaneChoice::Cuda => (Some(cuda().map_err(|reason| not_possible("cuda", reason))?), None),
            LaneChoice::Nccl => (None, Some(nccl().map_err(|reason| not_possible("nccl", reason))?)),
            LaneChoice::Auto => match (cuda(), nccl()) {
                (Err(no_cuda), Err(no_nccl)) => {
                    warn_of_tcp(address, &no_cuda, &no_nccl);
                    return Ok(None);
                }
                (Err(no_cuda), Ok(nccl)) => {
                    warn_of_nccl(address, &no_cuda);
                    (None, Some(nccl))
                }
                // Told where it is missed, since nothing is lost as long as memory can be mapped.
                (Ok(cuda), Err(no_nccl)) => (Some(cuda.without_nccl(no_nccl)), None),
                (Ok(cuda), Ok(nccl)) => (Some(cuda), Some(nccl)),
            },
        };
        Ok(Some(Self { cuda, nccl }))
    }

    /// The best of those that may still work.
    pub(super) fn name(&self) -> &'static str {
        match (&self.cuda, &self.nccl) {
            (Some(cuda), _) if cuda.failure().is_none() => "cuda",
            (_, Some(nccl)) if nccl.failure().is_none() => "nccl",
            _ => "tcp",
        }
    }

    /// The way over a communicator.
    pub(super) fn nccl(&self) -> Option<&NcclWay> {
        self.nccl.as_ref()
    }
}

/// A lane to a peer whose cache is on a device.
pub(super) fn open_lane(
    ways: &Arc<DeviceWays>,
    job: &CopyJob,
    config: &Arc<NetConfig>,
) -> Result<Box<dyn Lane>, LaneError> {
    let peer = &job.peer;
    let LocalCache::Device(local) = peer.pairing.local() else {
        return Err(LaneError::Layout("the local cache is in host memory".to_owned()));
    };
    if let Some(offered) = &ways.cuda
        && let Some(memory) = offered.map(local, job, ways)?
    {
        let witness = Box::new(tcp_lane(peer, config, job.deadline, &job.is_stopped)?);
        return Ok(Box::new(CudaLane::new(
            memory,
            Arc::clone(&peer.pairing),
            witness,
        )?));
    }
    if let Some(way) = &ways.nccl
        && way.failure().is_none()
    {
        let lane = SharedNcclLane::new(Arc::clone(ways), Arc::clone(peer), Arc::clone(config));
        match lane.open(job.deadline, &job.is_stopped) {
            Ok(()) => return Ok(Box::new(lane)),
            Err(LaneError::Unavailable(reason)) if !way.is_forced() => {
                let no_cuda = match &ways.cuda {
                    Some(cuda) => cuda.failure().unwrap_or_default(),
                    None => "it offers no device memory".to_owned(),
                };
                warn_of_tcp(&peer.address, &no_cuda, &reason);
            }
            Err(error) => return Err(error),
        }
    }
    if ways.nccl.as_ref().is_some_and(NcclWay::is_forced) {
        return Err(LaneError::Unavailable(
            ways.nccl
                .as_ref()
                .and_then(NcclWay::failure)
                .unwrap_or_default()
                .to_owned(),
        ));
    }
    Ok(Box::new(tcp_lane(peer, config, job.deadline, &job.is_stopped)?))
}

fn same_nccl(hello: &Hello, own: &Hello) -> Result<(), String> {
    match (hello.nccl_version(), own.nccl_version()) {
        (Some(theirs), Some(ours)) if theirs == ours => Ok(()),
        (Some(theirs), Some(ours)) => Err(other_version(theirs, ours)),
        (None, _) => Err("the prefill server has no NCCL that it can use (its log says why)".to_owned()),
        (_, None) => {
            Err("this server has no NCCL that it can use (the start of its log says why)".to_owned())
        }
    }
}

fn warn_of_nccl(peer: &PeerAddress, no_cuda: &str) {
    tracing::warn!(
        peer = %peer, reason = no_cuda,
        "lane nccl instead of cuda: bytes are gathered, sent and scattered, which takes memory and is slower on one machine"
    );
}

fn warn_of_tcp(peer: &PeerAddress, no_cuda: &str, no_nccl: &str) {
    tracing::warn!(
        peer = %peer, reason = no_cuda, no_nccl,
        "lane tcp instead of cuda: bytes go through host memory and a connection, which is slower"
    );
}

/// A peer's device memory. It is mapped by the first thread that copies, and not by those of the engine: the driver may take
/// its time.
pub(super) struct OfferedMemory {
    offer: CacheOffer,
    /// No other lane may be used.
    is_forced: bool,
    /// What came of it, once that is certain.
    mapped: Mutex<Option<Result<PeerCache, String>>>,
    /// Why `nccl` cannot take its place.
    no_nccl: Option<String>,
}

impl OfferedMemory {
    fn without_nccl(self, reason: String) -> Self {
        Self {
            no_nccl: Some(reason),
            ..self
        }
    }

    /// Why it cannot be mapped, if that has been tried.
    fn failure(&self) -> Option<String> {
        match &*self.mapped.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(Err(reason)) => Some(reason.clone()),
            _ => None,
        }
    }

    /// The mapped memory; `None`: it cannot be mapped, and another lane takes its place.
    fn map(
        &self,
        local: &DeviceCache,
        job: &CopyJob,
        ways: &DeviceWays,
    ) -> Result<Option<PeerCache>, LaneError> {
        let peer = &job.peer.address;
        let mut known = self.mapped.lock().unwrap_or_else(PoisonError::into_inner);
        let mapped = match &*known {
            Some(mapped) => mapped.clone(),
            None => {
                let patience = Patience {
                    deadline: job.deadline.min(Instant::now() + MAP_MAX),
                    cancelled: &|| job.is_stopped.load(Ordering::Relaxed),
                };
                let mapped = match local.map_peer(&self.offer, &patience) {
                    // Another time there may be a buffer.
                    Err(CudaError::TimedOut { .. }) => return Err(LaneError::TimedOut { done_bytes: 0 }),
                    Err(CudaError::Cancelled { .. }) => return Err(LaneError::Cancelled { done_bytes: 0 }),
                    mapped => mapped.map_err(|error| error.to_string()),
                };
                match (&mapped, &ways.nccl) {
                    (Ok(_), _) => tracing::info!(%peer, "lane cuda: the peer's device memory is mapped"),
                    _ if self.is_forced => {}
                    (Err(reason), Some(_)) => warn_of_nccl(peer, reason),
                    (Err(reason), None) => {
                        warn_of_tcp(peer, reason, self.no_nccl.as_deref().unwrap_or_default());
                    }
                }
                known.insert(mapped).clone()
            }
        };
        match mapped {
            Ok(memory) => Ok(Some(memory)),
            Err(reason) if self.is_forced => {
                Err(LaneError::Layout(format!("lane cuda is not possible: {reason}")))
            }
            Err(_) => Ok(None),
        }
    }
}

impl std::fmt::Debug for OfferedMemory {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("OfferedMemory")
            .field("mapped", &self.mapped)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::{Channel, DeviceAllocation, DeviceMemory};

    const THEIRS: u32 = 22_708;
    const OURS: u32 = 22_907;

    fn hello(has_memory: bool, nccl: Option<u32>) -> Hello {
        let allocation = DeviceAllocation {
            handle: [[0; 32]; 2],
            address: 0x1000,
            len_bytes: 0x1000,
        };
        Hello {
            channel: Channel::Control,
            namespace: [1; 32],
            facts: Vec::new(),
            block_tokens: 16,
            cache: None,
            probe: None,
            device: has_memory.then(|| DeviceMemory {
                allocations: vec![allocation],
                token_address: 0x1000,
                token: [0; 16],
                host_id: [0; 16],
            }),
            nccl,
        }
    }

    /// The name of the best way, or why there is none.
    fn best(theirs: &Hello, ours: Option<u32>, choice: LaneChoice) -> Result<&'static str, String> {
        let address = PeerAddress::new("prefill", 1).unwrap();
        let ways = DeviceWays::new(&address, theirs, &hello(false, ours), choice)?;
        Ok(ways.map_or("tcp", |ways| ways.name()))
    }

    #[test]
    fn the_best_way_is_the_first_that_both_sides_have() {
        for (theirs, ours, expected) in [
            (hello(true, Some(OURS)), Some(OURS), "cuda"),
            (hello(true, None), Some(OURS), "cuda"),
            (hello(false, Some(OURS)), Some(OURS), "nccl"),
            (hello(false, Some(OURS)), None, "tcp"),
            (hello(false, None), Some(OURS), "tcp"),
            (hello(false, Some(THEIRS)), Some(OURS), "tcp"),
        ] {
            let found = best(&theirs, ours, LaneChoice::Auto);
            assert_eq!(found.as_deref(), Ok(expected), "{theirs:?} {ours:?}");
        }
        let all = hello(true, Some(OURS));
        for (choice, expected) in [
            (LaneChoice::Cuda, "cuda"),
            (LaneChoice::Nccl, "nccl"),
            (LaneChoice::Tcp, "tcp"),
        ] {
            assert_eq!(best(&all, Some(OURS), choice).as_deref(), Ok(expected));
        }
    }

    #[test]
    fn a_forced_way_that_is_not_possible_is_refused_with_a_sentence_that_says_what_to_do() {
        let refused = |theirs: &Hello, ours, choice| best(theirs, ours, choice).unwrap_err();
        let other = refused(&hello(true, Some(THEIRS)), Some(OURS), LaneChoice::Nccl);
        assert_eq!(
            other,
            "lane nccl is not possible: NCCL 2.27.8 on the prefill server and 2.29.7 on the decode server: install the same \
             version of PyTorch, or of its package nvidia-nccl, on both"
        );
        let theirs = refused(&hello(true, None), Some(OURS), LaneChoice::Nccl);
        assert!(theirs.contains("the prefill server has no NCCL"), "{theirs}");
        let ours = refused(&hello(true, Some(OURS)), None, LaneChoice::Nccl);
        assert!(ours.contains("this server has no NCCL"), "{ours}");
        let memory = refused(&hello(false, Some(OURS)), Some(OURS), LaneChoice::Cuda);
        assert!(memory.contains("it offers no device memory"), "{memory}");
        let mut elsewhere = hello(true, Some(OURS));
        elsewhere.device.as_mut().unwrap().host_id = [7; 16];
        let another = refused(&elsewhere, Some(OURS), LaneChoice::Cuda);
        assert!(another.contains("another machine"), "{another}");
        assert_eq!(
            best(&elsewhere, Some(OURS), LaneChoice::Auto).as_deref(),
            Ok("nccl")
        );
        let shm = refused(&hello(true, Some(OURS)), Some(OURS), LaneChoice::Shm);
        assert!(shm.contains("on a GPU"), "{shm}");
    }
}
