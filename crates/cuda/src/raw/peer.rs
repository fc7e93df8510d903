//! Device memory of another process of this machine, mapped here, and copies out of it.

use std::any::Any;
use std::mem::ManuallyDrop;
use std::sync::Arc;

use super::device::{Device, Direction, Event, LAUNCHED_BETWEEN_DEVICES_MIN, Staging};
use super::kernel::PieceList;
use super::memory::{DeviceMemory, Progress};
use crate::error::{CudaError, Result};
use crate::share::{ALLOCATIONS_MAX, CacheOffer, SharedAllocation};
use crate::spans::{Piece, RunPart, Span, join, take_window};

/// Device memory that is shared whole is allocated in pieces of this size, so that nothing else lies in it.
const SHARED_BYTES: usize = 2 << 20;

/// A token in device memory of its own.
pub(crate) struct TokenMemory {
    device: Arc<Device>,
    address: u64,
}

impl TokenMemory {
    pub(crate) fn allocate(memory: &DeviceMemory) -> Result<Self> {
        let device = Arc::clone(memory.device());
        let address = device.allocate_on_device(SHARED_BYTES)?;
        Ok(Self { device, address })
    }

    /// Starts writing the first bytes of a buffer to it. The value must be kept until the copy has ended.
    pub(crate) fn start_write(
        &self,
        memory: &Arc<DeviceMemory>,
        len_bytes: usize,
        staging: Staging,
    ) -> Progress {
        assert!(len_bytes <= SHARED_BYTES, "{len_bytes} bytes of a token");
        // SAFETY: inside of memory that is this value's, which the caller keeps.
        unsafe { memory.start_spans(Direction::In, vec![span(self.address, len_bytes)], staging, None) }
    }

    pub(crate) fn address(&self) -> u64 {
        self.address
    }
}

impl Drop for TokenMemory {
    fn drop(&mut self) {
        // SAFETY: allocated once, freed once; its only copy was waited for, see `DeviceCache::share`.
        unsafe { self.device.free_on_device(self.address) };
    }
}

impl DeviceMemory {
    /// All allocations that the regions and `more` lie in, each once.
    pub(crate) fn shared_allocations(&self, more: u64) -> Result<Vec<SharedAllocation>> {
        let mut shared: Vec<SharedAllocation> = Vec::new();
        let regions = self.map().regions().iter();
        let ranges = regions.map(|region| (region.address, region.extent_bytes as u64));
        for (address, len_bytes) in ranges.chain([(more, 1)]) {
            let is_inside = |one: &SharedAllocation| {
                address >= one.address && address + len_bytes <= one.address + one.len_bytes
            };
            if shared.iter().any(is_inside) {
                continue;
            }
            let (start, whole_bytes) = self.device().allocation_around(address)?;
            let one = SharedAllocation {
                handle: self.device().ipc_handle(start)?,
                address: start,
                len_bytes: whole_bytes,
            };
            if !is_inside(&one) {
                return Err(CudaError::Offer(format!(
                    "{len_bytes} bytes at {address:#x} lie in more than one allocation (an allocator with expandable \
                     segments cannot share its memory this way)"
                )));
            }
            shared.push(one);
        }
        Ok(shared)
    }
}

struct Mapped {
    /// In the other process.
    remote: u64,
    /// Here.
    local: u64,
    len_bytes: u64,
}

/// All of a peer's allocations, mapped as long as this value lives.
pub(crate) struct PeerMapping {
    device: Arc<Device>,
    maps: Vec<Mapped>,
    /// By local region: which of them lie in one allocation.
    groups: Vec<u32>,
}

impl PeerMapping {
    pub(crate) fn open(memory: &DeviceMemory, offer: &CacheOffer) -> Result<Arc<Self>> {
        let count = offer.allocations.len();
        if count == 0 || count > ALLOCATIONS_MAX {
            return Err(CudaError::Offer(format!(
                "{count} allocations, allowed: 1 to {ALLOCATIONS_MAX}"
            )));
        }
        let device = Arc::clone(memory.device());
        let mut mapping = Self {
            groups: groups(memory),
            maps: Vec::with_capacity(count),
            device,
        };
        for one in &offer.allocations {
            let local = mapping.device.open_ipc(&one.handle)?;
            // From here on `drop` closes it.
            mapping.maps.push(Mapped {
                remote: one.address,
                local,
                len_bytes: one.len_bytes,
            });
            // What the peer says of the length could be a lie; a copy from beyond the end would cost us the device.
            let (start, len_bytes) = mapping.device.allocation_around(local)?;
            let end = one.address.checked_add(one.len_bytes);
            if start + len_bytes - local < one.len_bytes || end.is_none() || one.len_bytes == 0 {
                return Err(CudaError::Offer(format!(
                    "an allocation of {} bytes, of which {len_bytes} are there",
                    one.len_bytes
                )));
            }
        }
        Ok(Arc::new(mapping))
    }

    /// Which mapping has bytes of the peer, and where they are here.
    fn translate(&self, remote: u64, len_bytes: u64) -> Option<(u32, u64)> {
        let end = remote.checked_add(len_bytes)?;
        let inside = |map: &Mapped| remote >= map.remote && end <= map.remote + map.len_bytes;
        let index = self.maps.iter().position(inside)?;
        let map = &self.maps[index];
        Some((index as u32, map.local + (remote - map.remote)))
    }

    /// Copies of bytes at addresses of the peer into parts of local runs.
    ///
    /// # Panics
    /// If the local map has no such part.
    pub(crate) fn pieces(
        self: &Arc<Self>,
        memory: &Arc<DeviceMemory>,
        parts: impl Iterator<Item = (RunPart, u64)>,
    ) -> Result<Pieces> {
        let piece = |(part, remote): (RunPart, u64)| {
            let Some((from_group, from)) = self.translate(remote, part.len_bytes as u64) else {
                return Err(CudaError::Offer(format!(
                    "{} bytes at {remote:#x} are not in what it has offered",
                    part.len_bytes
                )));
            };
            Ok(Piece {
                from,
                to: memory.address(&part),
                len_bytes: part.len_bytes,
                groups: (from_group, self.groups[part.layer]),
            })
        };
        let pieces = parts.map(piece).collect::<Result<_>>()?;
        Ok(Pieces::new(memory, Arc::clone(self) as _, pieces))
    }

    /// Starts reading bytes of the peer into a buffer.
    pub(crate) fn start_read(
        self: &Arc<Self>,
        memory: &Arc<DeviceMemory>,
        remote: u64,
        len_bytes: usize,
        staging: Staging,
    ) -> Result<Progress> {
        let Some((_, from)) = self.translate(remote, len_bytes as u64) else {
            return Err(CudaError::Offer(format!(
                "{remote:#x} is not in what it has offered"
            )));
        };
        let spans = vec![span(from, len_bytes)];
        // SAFETY: inside of a mapping, which `InFlight` keeps until the copy has ended.
        Ok(unsafe { memory.start_spans(Direction::Out, spans, staging, Some(Arc::clone(self))) })
    }
}

impl Drop for PeerMapping {
    fn drop(&mut self) {
        for map in &self.maps {
            // SAFETY: opened once each, closed once each; whoever has copies on their way keeps this value.
            unsafe { self.device.close_ipc(map.local) };
        }
    }
}

impl std::fmt::Debug for PeerMapping {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("PeerMapping")
            .field("allocations", &self.maps.len())
            .finish_non_exhaustive()
    }
}

/// Numbers that are equal for regions of one allocation.
pub(super) fn groups(memory: &DeviceMemory) -> Vec<u32> {
    let mut starts: Vec<u64> = Vec::new();
    let regions = memory.map().regions().iter().enumerate();
    regions
        .map(|(layer, region)| {
            // Where the driver cannot say it, every region is one of its own.
            let start = memory.device().allocation_around(region.address);
            let start = start.map_or(u64::MAX - layer as u64, |(start, _)| start);
            let known = starts.iter().position(|&other| other == start);
            known.unwrap_or_else(|| {
                starts.push(start);
                starts.len() - 1
            }) as u32
        })
        .collect()
}

fn span(address: u64, len_bytes: usize) -> Span {
    Span {
        address,
        offset_bytes: 0,
        len_bytes,
    }
}

/// Most copies that are started at once where each is a call: those take the driver 3 ms.
const COPIES_MAX: usize = 512;

/// Copies out of other memory that were found to be inside of it and of local runs, as few as possible.
#[derive(Debug)]
pub(crate) struct Pieces {
    memory: Arc<DeviceMemory>,
    /// Keeps the sources valid.
    source: Arc<dyn Any + Send + Sync>,
    pieces: Vec<Piece>,
    /// The next one, and what was started of it.
    next: usize,
    taken_bytes: usize,
}

impl Pieces {
    /// The callers, of this module's parent, have found the sources in memory that `source` keeps, and the targets in runs of
    /// the cache.
    pub(super) fn new(
        memory: &Arc<DeviceMemory>,
        source: Arc<dyn Any + Send + Sync>,
        pieces: Vec<Piece>,
    ) -> Self {
        Self {
            memory: Arc::clone(memory),
            source,
            pieces: join(pieces),
            next: 0,
            taken_bytes: 0,
        }
    }

    /// Whether all of them were started.
    pub(crate) fn is_done(&self) -> bool {
        self.next == self.pieces.len()
    }

    /// Starts the next copies, of so many bytes at most.
    pub(crate) fn start_next(&mut self, most_bytes: usize) -> Flown {
        let is_long = self.pieces.len() - self.next >= LAUNCHED_BETWEEN_DEVICES_MIN;
        let mut list = is_long
            .then(|| self.memory.take_list())
            .flatten()
            .map(ManuallyDrop::new);
        let most_pieces = match list {
            Some(_) => PieceList::WINDOW_PIECES,
            None => COPIES_MAX,
        };
        let mut rest = &self.pieces[self.next..];
        let window = take_window(&mut rest, &mut self.taken_bytes, most_bytes, most_pieces);
        self.next = self.pieces.len() - rest.len();
        let device = self.memory.device();
        let event = match device.event() {
            Ok(event) => event,
            Err(error) => {
                if let Some(list) = list {
                    self.memory.give_list(ManuallyDrop::into_inner(list));
                }
                return Flown::Ended {
                    bytes: 0,
                    result: Err(error),
                };
            }
        };
        // SAFETY: who made this value has found the sources in memory that `source` keeps and the targets in runs of the
        // cache; `Flight` keeps both, and the list, until the event behind the copies is over.
        let started = unsafe { device.start_between(&window, list.as_deref_mut()) };
        match device.record(&event, Direction::In) {
            Ok(()) => Flown::Running(Flight {
                event,
                bytes: window.iter().map(|piece| piece.len_bytes as u64).sum(),
                failure: started.err(),
                list,
                memory: ManuallyDrop::new(Arc::clone(&self.memory)),
                source: ManuallyDrop::new(Arc::clone(&self.source)),
            }),
            Err(error) => {
                // When the copies have ended, nobody can say, so what they use is never given back.
                std::mem::forget((Arc::clone(&self.memory), Arc::clone(&self.source)));
                Flown::Lost(started.err().unwrap_or(error))
            }
        }
    }
}

/// Copies on their way. Dropping this value keeps their source for ever, since the device may still be reading it.
#[derive(Debug)]
pub(crate) struct Flight {
    event: Event,
    bytes: u64,
    failure: Option<CudaError>,
    list: Option<ManuallyDrop<PieceList>>,
    memory: ManuallyDrop<Arc<DeviceMemory>>,
    source: ManuallyDrop<Arc<dyn Any + Send + Sync>>,
}

/// How far copies are.
#[derive(Debug)]
pub(crate) enum Flown {
    /// Not at their end.
    Running(Flight),
    /// Nothing is on its way any more.
    Ended {
        /// Copied.
        bytes: u64,
        /// Whether all were.
        result: Result<()>,
    },
    /// The device cannot say; it is broken.
    Lost(CudaError),
}

impl Flight {
    /// Looks how far the copies are.
    pub(crate) fn poll(self) -> Flown {
        match self.event.is_over() {
            Ok(false) => Flown::Running(self),
            Ok(true) => {
                if let Some(list) = self.list {
                    self.memory.give_list(ManuallyDrop::into_inner(list));
                }
                drop(ManuallyDrop::into_inner(self.memory));
                drop(ManuallyDrop::into_inner(self.source));
                Flown::Ended {
                    bytes: self.bytes,
                    result: self.failure.map_or(Ok(()), Err),
                }
            }
            Err(error) => Flown::Lost(error),
        }
    }
}
