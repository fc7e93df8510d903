//! One device: its primary context, a stream for the copies of each direction, events, pinned memory.

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::ops::{Deref, DerefMut};
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use cudarc::driver::sys::{
    CUcontext, CUdevice, CUevent, CUevent_flags, CUipcMem_flags, CUipcMemHandle, CUstream, CUstream_flags,
    CUstreamCaptureMode,
};

use super::driver::{Calls, Driver, NOT_READY, OUT_OF_MEMORY};
use super::kernel::{CopyKernel, PieceList};
use crate::error::{CudaError, Result};
use crate::spans::Piece;

mod copies;

pub(super) use copies::{LAUNCHED_BETWEEN_DEVICES_MIN, LAUNCHED_WITH_HOST_MIN};

/// A stream of the embedding program: the number that PyTorch calls `cuda_stream`. Zero is the default stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamHandle(u64);

impl StreamHandle {
    /// # Safety
    /// The handle is a live stream of the primary context of the device whose cache it is used with, or a number that
    /// stands for a default stream, for as long as the value is used.
    pub unsafe fn from_raw(handle: u64) -> Self {
        Self(handle)
    }
}

/// Which way a copy goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    /// From the device.
    Out = 0,
    /// To the device.
    In = 1,
}

/// The highest that there is: the driver takes the next possible. A launch that copies is short; behind a model's kernels, which
/// fill the device, it would wait, and so would whoever waits for it.
const PRIORITY: c_int = -100;

/// A thread in this mode may call what a graph cannot have in it while another thread captures one.
const CAPTURE_RELAXED: c_uint = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED as c_uint;

/// A device that is in use.
pub(crate) struct Device {
    driver: &'static Driver,
    handle: CUdevice,
    context: CUcontext,
    /// For copies from the device and for copies to it; null until they are made.
    streams: [CUstream; 2],
    /// For many pieces at once, where the driver takes it.
    kernel: Option<CopyKernel>,
    /// Whether a launch has failed. Then each piece is a copy of the driver.
    has_kernel_failed: AtomicBool,
    /// The process that may use it: contexts do not survive a fork.
    process: u32,
}

// SAFETY: the driver's functions may be called from every thread with these handles, which stay valid until `Device` is
// dropped; each call makes the context current for itself.
unsafe impl Send for Device {}
// SAFETY: as above.
unsafe impl Sync for Device {}

impl Device {
    pub(crate) fn open(driver: &'static Driver, ordinal: u32) -> Result<Arc<Self>> {
        driver.init()?;
        let handle = driver.device(ordinal)?;
        let mut context = ptr::null_mut();
        // SAFETY: writes one handle, which stays valid until it is released in `drop`. The primary context is the one
        // that PyTorch's tensors live in.
        let code = unsafe { (driver.calls.cuDevicePrimaryCtxRetain)(&raw mut context, handle) };
        driver.check(code, "cuDevicePrimaryCtxRetain", "opening a device")?;
        let mut device = Self {
            driver,
            handle,
            context,
            streams: [ptr::null_mut(); 2],
            kernel: None,
            has_kernel_failed: AtomicBool::new(false),
            process: std::process::id(),
        };
        for direction in [Direction::Out, Direction::In] {
            device.streams[direction as usize] = device.new_stream()?;
        }
        device.kernel = device.load_kernel();
        Ok(Arc::new(device))
    }

    fn load_kernel(&self) -> Option<CopyKernel> {
        let loaded = self.enter().and_then(|_entered| CopyKernel::load(self.driver));
        loaded
            .inspect_err(|error| {
                tracing::warn!(
                    %error,
                    "the driver does not take the copy kernel, so that each piece of a scattered block is a copy of its own, \
                     which takes many times as long"
                );
            })
            .ok()
    }

    /// Whether many pieces are one launch. Who has a list for them makes use of that.
    pub(super) fn takes_lists(&self) -> bool {
        self.kernel.is_some() && !self.has_kernel_failed.load(Ordering::Relaxed)
    }

    /// Pinned host memory, zeroed.
    pub(crate) fn allocate(self: &Arc<Self>, len_bytes: usize) -> Result<Staging> {
        let len_bytes = len_bytes.max(1);
        let entered = self.enter()?;
        let mut pointer: *mut c_void = ptr::null_mut();
        // SAFETY: writes one pointer; the context is current.
        let code = unsafe { (entered.calls().cuMemHostAlloc)(&raw mut pointer, len_bytes, 0) };
        self.driver
            .check(code, "cuMemHostAlloc", "allocating pinned memory")?;
        let Some(pointer) = NonNull::new(pointer.cast::<u8>()) else {
            let driver = self.driver;
            return Err(driver.error(OUT_OF_MEMORY, "cuMemHostAlloc", "allocating pinned memory"));
        };
        // SAFETY: just allocated with this length, and nobody else has it. Zeroed, so that it may become a slice.
        unsafe { pointer.as_ptr().write_bytes(0, len_bytes) };
        Ok(Staging {
            device: Arc::clone(self),
            pointer,
            len_bytes,
        })
    }

    /// An event that has not been recorded; it counts as over.
    pub(crate) fn event(self: &Arc<Self>) -> Result<Event> {
        let entered = self.enter()?;
        let mut handle = ptr::null_mut();
        let flags = CUevent_flags::CU_EVENT_DISABLE_TIMING as u32;
        // SAFETY: writes one handle; the context is current.
        let code = unsafe { (entered.calls().cuEventCreate)(&raw mut handle, flags) };
        self.driver.check(code, "cuEventCreate", "making an event")?;
        Ok(Event {
            device: Arc::clone(self),
            handle,
        })
    }

    /// An event that is over when `stream` has done what is on it now.
    pub(crate) fn mark(self: &Arc<Self>, stream: StreamHandle) -> Result<Event> {
        let event = self.event()?;
        let entered = self.enter()?;
        let stream = ptr::with_exposed_provenance_mut(stream.0 as usize);
        // SAFETY: who made the handle vouched for it; the event is ours and lives.
        let code = unsafe { (entered.calls().cuEventRecord)(event.handle, stream) };
        self.driver
            .check(code, "cuEventRecord", "marking the compute stream")?;
        Ok(event)
    }

    /// Copies from the device that start from now on run after `event`.
    pub(crate) fn order_out_after(&self, event: &Event) -> Result<()> {
        let entered = self.enter()?;
        let stream = self.streams[Direction::Out as usize];
        // SAFETY: both are ours. The wait is for what was recorded last, whatever happens to the event later.
        let code = unsafe { (entered.calls().cuStreamWaitEvent)(stream, event.handle, 0) };
        self.driver
            .check(code, "cuStreamWaitEvent", "waiting for the compute stream")
    }

    /// Records `event` behind all copies of a direction so far.
    pub(super) fn record(&self, event: &Event, direction: Direction) -> Result<()> {
        self.record_on(event, self.streams[direction as usize])
    }

    /// Records `event` behind what is on `stream`, which is one of ours and lives.
    fn record_on(&self, event: &Event, stream: CUstream) -> Result<()> {
        let entered = self.enter()?;
        // SAFETY: both are ours and live: no function of this module passes another stream.
        let code = unsafe { (entered.calls().cuEventRecord)(event.handle, stream) };
        self.driver
            .check(code, "cuEventRecord", "marking the end of a copy")
    }

    /// A further stream, which neither waits for the program's default stream nor holds it up.
    pub(super) fn stream(self: &Arc<Self>) -> Result<OwnStream> {
        Ok(OwnStream {
            handle: self.new_stream()?,
            device: Arc::clone(self),
        })
    }

    fn new_stream(&self) -> Result<CUstream> {
        let entered = self.enter()?;
        let mut stream = ptr::null_mut();
        let flags = CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: writes one handle; the context is current.
        let code = unsafe { (entered.calls().cuStreamCreateWithPriority)(&raw mut stream, flags, PRIORITY) };
        self.driver
            .check(code, "cuStreamCreateWithPriority", "making a copy stream")?;
        Ok(stream)
    }

    /// New device memory.
    pub(super) fn allocate_on_device(&self, len_bytes: usize) -> Result<u64> {
        let entered = self.enter()?;
        let mut address = 0;
        // SAFETY: writes one number; the context is current.
        let code = unsafe { (entered.calls().cuMemAlloc_v2)(&raw mut address, len_bytes) };
        self.driver
            .check(code, "cuMemAlloc_v2", "allocating device memory")?;
        Ok(address)
    }

    /// # Safety
    /// Comes from [`allocate_on_device`](Self::allocate_on_device), no copy is using it, and nobody frees it again.
    pub(super) unsafe fn free_on_device(&self, address: u64) {
        if let Ok(entered) = self.enter() {
            // SAFETY: as the caller says.
            let _ = unsafe { (entered.calls().cuMemFree_v2)(address) };
        }
    }

    /// Start and length of the allocation that has an address.
    pub(super) fn allocation_around(&self, address: u64) -> Result<(u64, u64)> {
        let entered = self.enter()?;
        let (mut start, mut len) = (0, 0);
        // SAFETY: writes two numbers; the driver checks the address.
        let code =
            unsafe { (entered.calls().cuMemGetAddressRange_v2)(&raw mut start, &raw mut len, address) };
        self.driver.check(
            code,
            "cuMemGetAddressRange_v2",
            "looking for an address's allocation",
        )?;
        Ok((start, len as u64))
    }

    /// What another process needs to map the allocation that starts at an address.
    pub(super) fn ipc_handle(&self, address: u64) -> Result<[u8; 64]> {
        let entered = self.enter()?;
        let mut handle = CUipcMemHandle { reserved: [0; 64] };
        // SAFETY: writes one handle; the driver checks the address.
        let code = unsafe { (entered.calls().cuIpcGetMemHandle)(&raw mut handle, address) };
        self.driver
            .check(code, "cuIpcGetMemHandle", "sharing an allocation of the KV cache")?;
        Ok(handle.reserved.map(|byte| byte as u8))
    }

    /// Maps another process' allocation; where.
    pub(super) fn open_ipc(&self, handle: &[u8; 64]) -> Result<u64> {
        let entered = self.enter()?;
        let handle = CUipcMemHandle {
            reserved: handle.map(|byte| byte as c_char),
        };
        let flags = CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
        let mut address = 0;
        // SAFETY: writes one number; the driver checks the handle.
        let code = unsafe { (entered.calls().cuIpcOpenMemHandle_v2)(&raw mut address, handle, flags) };
        self.driver
            .check(code, "cuIpcOpenMemHandle_v2", "mapping the peer's KV cache")?;
        Ok(address)
    }

    /// # Safety
    /// Comes from [`open_ipc`](Self::open_ipc), no copy is using it, and it is not closed more often than opened.
    pub(super) unsafe fn close_ipc(&self, address: u64) {
        if let Ok(entered) = self.enter() {
            // SAFETY: as the caller says.
            let _ = unsafe { (entered.calls().cuIpcCloseMemHandle)(address) };
        }
    }

    fn is_forked(&self) -> bool {
        self.process != std::process::id()
    }

    /// Makes the context current until the result is dropped, and what was current before current again then.
    pub(super) fn enter(&self) -> Result<Entered<'_>> {
        if self.is_forked() {
            return Err(CudaError::Forked);
        }
        // SAFETY: the context is retained.
        let code = unsafe { (self.driver.calls.cuCtxPushCurrent_v2)(self.context) };
        self.driver
            .check(code, "cuCtxPushCurrent_v2", "entering the device's context")?;
        let mut entered = Entered {
            device: self,
            capture_mode: None,
        };
        // While another thread captures a graph, most calls outside of it fail, and spoil the graph, unless their thread has
        // said that it knows.
        let mut mode = CAPTURE_RELAXED;
        // SAFETY: exchanges one number of this thread.
        let code = unsafe { (self.driver.calls.cuThreadExchangeStreamCaptureMode)(&raw mut mode) };
        self.driver.check(
            code,
            "cuThreadExchangeStreamCaptureMode",
            "entering the device's context",
        )?;
        entered.capture_mode = Some(mode);
        Ok(entered)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        if self.is_forked() {
            return;
        }
        if let Ok(entered) = self.enter() {
            for stream in self.streams.into_iter().filter(|stream| !stream.is_null()) {
                // SAFETY: ours, and nobody has it any more; what is still on it runs to its end.
                let _ = unsafe { (entered.calls().cuStreamDestroy_v2)(stream) };
            }
            if let Some(kernel) = &self.kernel {
                kernel.unload(self.driver);
            }
        }
        // At the end of the process the driver may be gone already; then it says so, and there is nothing to do.
        // SAFETY: retained once in `open`, released once here.
        let _ = unsafe { (self.driver.calls.cuDevicePrimaryCtxRelease_v2)(self.handle) };
    }
}

impl std::fmt::Debug for Device {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_tuple("Device").field(&self.handle).finish()
    }
}

pub(super) struct Entered<'a> {
    device: &'a Device,
    /// The thread's own, once it was exchanged.
    capture_mode: Option<c_uint>,
}

impl Entered<'_> {
    fn calls(&self) -> &'static Calls {
        &self.device.driver.calls
    }
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        if let Some(mut mode) = self.capture_mode {
            // SAFETY: exchanges one number of this thread.
            let _ = unsafe { (self.calls().cuThreadExchangeStreamCaptureMode)(&raw mut mode) };
        }
        let mut context = ptr::null_mut();
        // SAFETY: takes off what `enter` put on this thread: no function of this module hands an `Entered` on.
        let _ = unsafe { (self.calls().cuCtxPopCurrent_v2)(&raw mut context) };
    }
}

/// A stream beside those for copies. It is destroyed when it is dropped; what is on it then runs to its end.
pub(super) struct OwnStream {
    device: Arc<Device>,
    handle: CUstream,
}

impl OwnStream {
    pub(super) fn handle(&self) -> CUstream {
        self.handle
    }

    /// Records `event` behind what is on it.
    pub(super) fn record(&self, event: &Event) -> Result<()> {
        self.device.record_on(event, self.handle)
    }

    /// As [`Device::start_between`], on this stream.
    ///
    /// # Safety
    /// As there.
    pub(super) unsafe fn start_between(&self, pieces: &[Piece], list: Option<&mut PieceList>) -> Result<()> {
        // SAFETY: as the caller says.
        unsafe { self.device.start_between_on(self.handle, pieces, list) }
    }
}

impl Drop for OwnStream {
    fn drop(&mut self) {
        if let Ok(entered) = self.device.enter() {
            // SAFETY: made once, destroyed once.
            let _ = unsafe { (entered.calls().cuStreamDestroy_v2)(self.handle) };
        }
    }
}

/// A point in a stream.
#[derive(Debug)]
pub(crate) struct Event {
    device: Arc<Device>,
    handle: CUevent,
}

// SAFETY: as for `Device`.
unsafe impl Send for Event {}
// SAFETY: as for `Device`.
unsafe impl Sync for Event {}

impl Event {
    /// Whether the stream has passed the point.
    pub(crate) fn is_over(&self) -> Result<bool> {
        let entered = self.device.enter()?;
        // SAFETY: ours and alive.
        match unsafe { (entered.calls().cuEventQuery)(self.handle) } {
            NOT_READY => Ok(false),
            code => {
                let driver = self.device.driver;
                driver.check(code, "cuEventQuery", "waiting for the device")?;
                Ok(true)
            }
        }
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if let Ok(entered) = self.device.enter() {
            // SAFETY: ours; the driver keeps what it still needs of an event that has not come yet.
            let _ = unsafe { (entered.calls().cuEventDestroy_v2)(self.handle) };
        }
    }
}

/// Pinned host memory that no copy is using.
#[derive(Debug)]
pub(crate) struct Staging {
    device: Arc<Device>,
    pointer: NonNull<u8>,
    len_bytes: usize,
}

// SAFETY: it owns its bytes, like a `Box<[u8]>`.
unsafe impl Send for Staging {}
// SAFETY: as above; shared access is through `&[u8]` only.
unsafe impl Sync for Staging {}

impl Staging {
    /// Where a part of the buffer lies. No reference is made, since copies into other parts may be on their way.
    fn place(&self, offset_bytes: usize, len_bytes: usize) -> *mut u8 {
        let is_inside = offset_bytes
            .checked_add(len_bytes)
            .is_some_and(|end| end <= self.len_bytes);
        assert!(
            is_inside,
            "{len_bytes} bytes at {offset_bytes} of a buffer of {}",
            self.len_bytes
        );
        self.pointer.as_ptr().wrapping_add(offset_bytes)
    }
}

impl Deref for Staging {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: allocated with this length and zeroed; no copy is using it, see `InFlight`.
        unsafe { std::slice::from_raw_parts(self.pointer.as_ptr(), self.len_bytes) }
    }
}

impl DerefMut for Staging {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `deref`; `self` is borrowed for writing.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.as_ptr(), self.len_bytes) }
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if let Ok(entered) = self.device.enter() {
            // SAFETY: allocated once, freed once, and no copy is using it.
            let _ = unsafe { (entered.calls().cuMemFreeHost)(self.pointer.as_ptr().cast()) };
        }
    }
}
