//! One end of a communicator of two: its stream, the device memory through which bytes go, and groups of sends or receives.
//!
//! A send reads blocks, or staging that blocks were gathered into. A receive writes staging only: what NCCL still writes after
//! a communicator was aborted must not be somebody's block.

use std::any::Any;
use std::ffi::c_int;
use std::mem::ManuallyDrop;
use std::ptr;
use std::sync::Arc;

use cudarc::nccl::sys::{ncclComm_t, ncclConfig_t, ncclDataType_t, ncclUniqueId};

use super::device::{Device, Event, OwnStream};
use super::kernel::PieceList;
use super::memory::DeviceMemory;
use super::nccl::{IN_PROGRESS, Nccl, SUCCESS};
use super::peer::{Pieces, groups};
use crate::communicator::Rank;
use crate::error::{CudaError, Result};
use crate::nccl::CommunicatorId;
use crate::spans::{Piece, RunPart, in_order, join};

/// Marks a configuration, in NCCL's header.
const CONFIG_MAGIC: u32 = 0xcafe_beef;
/// The version that the configuration is of: the bindings' structure ends with what 2.18 has.
const CONFIG_VERSION: u32 = 21_800;
/// NCCL's mark for what it shall decide.
const UNDEFINED: c_int = c_int::MIN;
/// Most thread blocks of a group, which run beside the model's kernels: the default of the connector that vLLM had.
const BLOCKS_MAX: c_int = 8;
const RANKS: c_int = 2;

/// Runs of this length are sent from where they lie: NCCL moves its chunks of so many bytes one by one anyway, and a copy more
/// would only take memory bandwidth. Shorter ones are gathered, because every send of a group is worked on by itself.
const DIRECT_BYTES: usize = 512 << 10;

/// Device memory of our own.
pub(crate) struct DeviceBuffer {
    device: Arc<Device>,
    address: u64,
    len_bytes: usize,
}

impl DeviceBuffer {
    fn allocate(device: &Arc<Device>, len_bytes: usize) -> Result<Arc<Self>> {
        Ok(Arc::new(Self {
            address: device.allocate_on_device(len_bytes)?,
            device: Arc::clone(device),
            len_bytes,
        }))
    }

    pub(crate) fn len_bytes(&self) -> usize {
        self.len_bytes
    }

    /// Copies of bytes that lie one after the other from `offset_bytes` on into parts of runs, and where they end.
    ///
    /// # Panics
    /// If the cache has no such part, or they are more bytes than the buffer has.
    pub(crate) fn pieces(
        self: &Arc<Self>,
        memory: &Arc<DeviceMemory>,
        groups: &[u32],
        offset_bytes: usize,
        parts: &[RunPart],
    ) -> (Pieces, usize) {
        let mut next = offset_bytes;
        let piece = |part: &RunPart| {
            let from = self.address + next as u64;
            next += part.len_bytes;
            assert!(
                next <= self.len_bytes,
                "{} bytes behind {next} of {}",
                part.len_bytes,
                self.len_bytes
            );
            Piece {
                from,
                to: memory.address(part),
                len_bytes: part.len_bytes,
                groups: (0, groups[part.layer]),
            }
        };
        let pieces = parts.iter().map(piece).collect();
        let source: Arc<dyn Any + Send + Sync> = Arc::clone(self) as _;
        (Pieces::new(memory, source, pieces), next)
    }
}

impl Drop for DeviceBuffer {
    fn drop(&mut self) {
        // SAFETY: allocated once, freed once. What copies out of it keeps it, see `Flight`, and so does what NCCL does with
        // it, see `CommunicatorEnd`.
        unsafe { self.device.free_on_device(self.address) };
    }
}

/// What one group sends: parts of runs, in their order.
pub struct SendPlan {
    memory: Arc<DeviceMemory>,
    sends: Sends,
}

enum Sends {
    /// Addresses and lengths in the cache.
    Direct(Vec<(u64, usize)>),
    /// Gathered first; the targets are offsets in the staging.
    Gathered { pieces: Vec<Piece>, len_bytes: usize },
}

impl SendPlan {
    /// Most sends of a group.
    pub const SENDS_MAX: usize = 64;
    /// Most parts of a group that are gathered by one launch.
    pub const PARTS_MAX: usize = 1 << 14;

    /// # Panics
    /// If the cache has no such part.
    pub(crate) fn new(memory: &Arc<DeviceMemory>, groups: &[u32], parts: &[RunPart]) -> Self {
        let mut len_bytes = 0;
        let piece = |part: &RunPart| {
            let to = len_bytes as u64;
            len_bytes += part.len_bytes;
            Piece {
                from: memory.address(part),
                to,
                len_bytes: part.len_bytes,
                groups: (groups[part.layer], 0),
            }
        };
        let pieces: Vec<Piece> = parts.iter().map(piece).collect();
        let runs = in_order(&pieces);
        let sends = if runs.len() <= Self::SENDS_MAX && runs.len() * DIRECT_BYTES <= len_bytes {
            Sends::Direct(runs)
        } else {
            let pieces = join(pieces);
            Sends::Gathered { pieces, len_bytes }
        };
        Self {
            memory: Arc::clone(memory),
            sends,
        }
    }

    /// Bytes of each send of the group. The peer needs them for its receives.
    pub fn lens(&self) -> Vec<usize> {
        match &self.sends {
            Sends::Direct(runs) => runs.iter().map(|(_, len)| *len).collect(),
            Sends::Gathered { len_bytes, .. } => vec![*len_bytes],
        }
    }

    /// Bytes of staging that it needs.
    pub(crate) fn staged_bytes(&self) -> usize {
        match &self.sends {
            Sends::Direct(_) => 0,
            Sends::Gathered { len_bytes, .. } => *len_bytes,
        }
    }
}

impl std::fmt::Debug for SendPlan {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("SendPlan")
            .field("lens", &self.lens())
            .finish_non_exhaustive()
    }
}

/// A communicator's handle. Neither `Send` nor `Sync`, as the pointer is not: the thread that has begun it is the only one
/// that ever uses it, which an abort needs.
struct Handle {
    nccl: &'static Nccl,
    device: Arc<Device>,
    comm: ncclComm_t,
}

impl Handle {
    fn begin(device: &Arc<Device>, id: &CommunicatorId, rank: u32) -> Result<Self> {
        let nccl = Nccl::installed()?;
        let mut handle = Self {
            nccl,
            device: Arc::clone(device),
            comm: ptr::null_mut(),
        };
        let mut config = ncclConfig_t {
            size: size_of::<ncclConfig_t>(),
            magic: CONFIG_MAGIC,
            version: CONFIG_VERSION,
            // Only such a communicator may be aborted at any time.
            blocking: 0,
            cgaClusterSize: UNDEFINED,
            minCTAs: UNDEFINED,
            maxCTAs: BLOCKS_MAX,
            netName: ptr::null(),
            splitShare: UNDEFINED,
        };
        let id = ncclUniqueId {
            internal: id.0.map(|byte| byte as std::ffi::c_char),
        };
        let _entered = device.enter()?;
        // SAFETY: writes one handle, null or one that is aborted once, by `drop`; the configuration is one of the version that
        // it says; the device's context is current.
        let code = unsafe {
            (nccl.calls.ncclCommInitRankConfig)(
                &raw mut handle.comm,
                RANKS,
                id,
                rank as c_int,
                &raw mut config,
            )
        };
        nccl.check_started(code, "ncclCommInitRankConfig", "making a communicator")?;
        if handle.comm.is_null() {
            return Err(CudaError::CommunicatorEnded);
        }
        Ok(handle)
    }

    /// Whether all calls so far have been dealt with by the host, as far as that goes without waiting.
    fn is_settled(&self, context: &'static str) -> Result<bool> {
        let _entered = self.device.enter()?;
        let mut state = SUCCESS;
        // SAFETY: the communicator is alive and used by this thread alone; writes one number.
        let code = unsafe { (self.nccl.calls.ncclCommGetAsyncError)(self.comm, &raw mut state) };
        self.nccl.check(code, "ncclCommGetAsyncError", context)?;
        match state {
            SUCCESS => Ok(true),
            IN_PROGRESS => Ok(false),
            code => Err(self.nccl.error(code, "NCCL", context)),
        }
    }

    /// One group of calls, which is ended whatever they say.
    fn group(&self, context: &'static str, calls: impl FnOnce() -> Result<()>) -> Result<()> {
        let _entered = self.device.enter()?;
        let nccl = self.nccl;
        // SAFETY: opens a group of this thread, which is closed below.
        let code = unsafe { (nccl.calls.ncclGroupStart)() };
        nccl.check(code, "ncclGroupStart", context)?;
        let called = calls();
        // SAFETY: closes the group that was opened above.
        let code = unsafe { (nccl.calls.ncclGroupEnd)() };
        called?;
        nccl.check_started(code, "ncclGroupEnd", context)
    }
}

impl Handle {
    /// Ends the communicator; `true`: NCCL puts nothing on the stream any more.
    ///
    /// Always an abort: an orderly end waits for the peer, which may be gone, and nothing is worth waiting for.
    fn abort(&mut self) -> bool {
        let comm = std::mem::replace(&mut self.comm, ptr::null_mut());
        if comm.is_null() {
            return true;
        }
        let Ok(_entered) = self.device.enter() else {
            return false;
        };
        // SAFETY: begun as a non-blocking communicator, no thread is inside of NCCL with it, and nobody uses it again: the
        // handle was just taken.
        let code = unsafe { (self.nccl.calls.ncclCommAbort)(comm) };
        if let Err(error) = self
            .nccl
            .check_started(code, "ncclCommAbort", "ending a communicator")
        {
            tracing::warn!(%error, "a communicator could not be ended in order");
        }
        code == SUCCESS
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.abort();
    }
}

/// How far the latest group is.
enum Phase {
    /// There is none, or it is over.
    Idle,
    /// NCCL may still be putting it on the stream.
    Settling(&'static str),
    /// It is on the stream, in front of the event.
    Running(&'static str, Event),
}

/// One end of a communicator, and what NCCL reads and writes for it. Used by the thread that has begun it.
///
/// Dropping it gives up the stream, the staging and the cache's memory for good, since the device may still be using them;
/// [`give_back`](Self::give_back) does better.
pub(crate) struct CommunicatorEnd {
    /// Taken when it was aborted.
    handle: Option<Handle>,
    peer: c_int,
    stream: ManuallyDrop<OwnStream>,
    staging: ManuallyDrop<Arc<DeviceBuffer>>,
    memory: ManuallyDrop<Arc<DeviceMemory>>,
    /// What the latest gathering reads.
    list: ManuallyDrop<Option<PieceList>>,
    phase: Phase,
}

impl CommunicatorEnd {
    /// Begins to take part. It can be used once it [is over](Self::is_over).
    pub(crate) fn begin(
        memory: &Arc<DeviceMemory>,
        id: &CommunicatorId,
        rank: Rank,
        staging_bytes: usize,
    ) -> Result<Self> {
        let device = memory.device();
        let staging = DeviceBuffer::allocate(device, staging_bytes)?;
        // Who receives gathers nothing. Pinned here, where NCCL takes seconds anyway.
        let list = (rank == Rank::Sender && device.takes_lists())
            .then(|| PieceList::allocate(device, SendPlan::PARTS_MAX, staging_bytes))
            .transpose()?;
        let stream = device.stream()?;
        let rank = rank as u32;
        let handle = Handle::begin(device, id, rank)?;
        Ok(Self {
            handle: Some(handle),
            peer: (1 - rank) as c_int,
            stream: ManuallyDrop::new(stream),
            staging: ManuallyDrop::new(staging),
            memory: ManuallyDrop::new(Arc::clone(memory)),
            list: ManuallyDrop::new(list),
            phase: Phase::Idle,
        })
    }

    pub(crate) fn staging(&self) -> &Arc<DeviceBuffer> {
        &self.staging
    }

    /// Whether the communicator is made.
    pub(crate) fn is_made(&self) -> Result<bool> {
        self.handle()?.is_settled("making a communicator")
    }

    /// Starts to send. What was started before must be over.
    ///
    /// # Panics
    /// If the plan is of another cache, or needs more staging than there is.
    pub(crate) fn start_send(&mut self, plan: &SendPlan) -> Result<()> {
        assert!(
            Arc::ptr_eq(&plan.memory, &self.memory),
            "a plan for another cache"
        );
        assert!(
            plan.staged_bytes() <= self.staging.len_bytes,
            "too little staging"
        );
        self.check_idle();
        let context = "sending blocks";
        let (stream, peer) = (self.stream.handle(), self.peer);
        let staging = self.staging.address;
        // From here on the device may be reading.
        self.phase = Phase::Settling(context);
        let gathered;
        let sends = match &plan.sends {
            Sends::Direct(runs) => runs.as_slice(),
            Sends::Gathered { pieces, len_bytes } => {
                let pieces: Vec<Piece> = pieces
                    .iter()
                    .map(|piece| Piece {
                        to: staging + piece.to,
                        ..*piece
                    })
                    .collect();
                // SAFETY: the sources were found in runs of the cache by `SendPlan::new`, the targets lie in the staging, as
                // was just checked; both and the list are kept until an event behind the copies is over, or for ever.
                unsafe { self.stream.start_between(&pieces, self.list.as_mut())? };
                gathered = [(staging, *len_bytes)];
                gathered.as_slice()
            }
        };
        let handle = self.handle()?;
        let (nccl, comm) = (handle.nccl, handle.comm);
        handle.group(context, || {
            sends.iter().try_for_each(|&(address, len_bytes)| {
                let bytes = ptr::with_exposed_provenance(address as usize);
                // SAFETY: the bytes are the cache's or the staging's, kept as above; the communicator and the stream are alive
                // and used by this thread alone.
                let code = unsafe {
                    (nccl.calls.ncclSend)(
                        bytes,
                        len_bytes,
                        ncclDataType_t::ncclUint8 as u32,
                        peer,
                        comm,
                        stream,
                    )
                };
                nccl.check_started(code, "ncclSend", context)
            })
        })
    }

    /// Starts to receive into the staging, one after the other. What was started before must be over.
    ///
    /// # Panics
    /// If they are more bytes than the staging has.
    pub(crate) fn start_receive(&mut self, lens: &[usize]) -> Result<()> {
        let total = lens
            .iter()
            .try_fold(0usize, |sum, &len| sum.checked_add(len))
            .filter(|&total| total <= self.staging.len_bytes);
        assert!(total.is_some(), "too little staging");
        self.check_idle();
        let context = "receiving blocks";
        let (stream, peer) = (self.stream.handle(), self.peer);
        let mut next = self.staging.address;
        // From here on the device may be writing the staging.
        self.phase = Phase::Settling(context);
        let handle = self.handle()?;
        let (nccl, comm) = (handle.nccl, handle.comm);
        handle.group(context, || {
            lens.iter().try_for_each(|&len_bytes| {
                let bytes = ptr::with_exposed_provenance_mut(next as usize);
                next += len_bytes as u64;
                // SAFETY: the bytes are inside of the staging, as was just checked, which is kept until an event behind the
                // group is over, or for ever; the communicator and the stream are alive and used by this thread alone.
                let code = unsafe {
                    (nccl.calls.ncclRecv)(
                        bytes,
                        len_bytes,
                        ncclDataType_t::ncclUint8 as u32,
                        peer,
                        comm,
                        stream,
                    )
                };
                nccl.check_started(code, "ncclRecv", context)
            })
        })
    }

    /// Looks how far the latest group is; `true`: all of its bytes are where they should be.
    pub(crate) fn is_over(&mut self) -> Result<bool> {
        let context = match &self.phase {
            Phase::Idle => return Ok(true),
            Phase::Settling(context) | Phase::Running(context, _) => *context,
        };
        // An error that comes later than the last byte counts, too.
        if !self.handle()?.is_settled(context)? {
            return Ok(false);
        }
        if let Phase::Settling(_) = self.phase {
            // Before this NCCL might not have put it on the stream, and the event would be in front of it.
            let event = self.memory.device().event()?;
            self.stream.record(&event)?;
            self.phase = Phase::Running(context, event);
        }
        if let Phase::Running(_, event) = &self.phase
            && !event.is_over()?
        {
            return Ok(false);
        }
        self.phase = Phase::Idle;
        Ok(true)
    }

    /// Ends the communicator, if it has not ended. What is on its way stops, in some time.
    pub(crate) fn abort(&mut self) {
        let Some(mut handle) = self.handle.take() else {
            return;
        };
        if handle.abort()
            && let Phase::Settling(context) = self.phase
            && let Ok(event) = self.memory.device().event()
            && self.stream.record(&event).is_ok()
        {
            self.phase = Phase::Running(context, event);
        }
    }

    /// After an abort: whether the device uses nothing of it any more.
    pub(crate) fn is_quiet(&self) -> bool {
        match &self.phase {
            Phase::Idle => true,
            // What NCCL still puts on the stream, nobody can say.
            Phase::Settling(_) => false,
            Phase::Running(_, event) => event.is_over().unwrap_or(false),
        }
    }

    /// Gives back what it has, if the device uses nothing of it any more; else it is given up for good. `false`: given up.
    pub(crate) fn give_back(mut self) -> bool {
        self.abort();
        if !self.is_quiet() {
            return false;
        }
        let Self {
            stream,
            staging,
            memory,
            list,
            ..
        } = self;
        drop(ManuallyDrop::into_inner(list));
        drop(ManuallyDrop::into_inner(stream));
        drop(ManuallyDrop::into_inner(staging));
        drop(ManuallyDrop::into_inner(memory));
        true
    }

    fn handle(&self) -> Result<&Handle> {
        self.handle.as_ref().ok_or(CudaError::CommunicatorEnded)
    }

    fn check_idle(&self) {
        assert!(
            matches!(self.phase, Phase::Idle),
            "the latest group was not waited for"
        );
    }
}

impl DeviceMemory {
    /// By region: which of them lie in one allocation.
    pub(crate) fn allocation_groups(&self) -> Vec<u32> {
        groups(self)
    }
}
