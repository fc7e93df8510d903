//! A stand-in for the CUDA driver: its functions over host memory, so that everything above them runs without a GPU.
//!
//! Not a simulation of speed, but of what goes wrong: a stream is a thread that works later than it was asked to, so a
//! wait that is missing shows.
//!
//! - A copy happens some time after it was started. Until then the target of a copy to the host holds [`NOT_YET`], and the
//!   source of a copy to the device is not read.
//! - An event is over when its stream has come to it; one that was never recorded is over.
//! - Copies outside of device memory and pinned memory, pinned memory that is freed under a copy, and calls without a
//!   current context are remembered: see [`StandIn::violations`].
//!
//! Every [`StandIn`] is a device of its own, so tests do not meet. Sharing memory between processes and kernels are not supported
//! here: for that there is a library of its own, `tests/cuda-stand-in`.

use std::any::Any;
use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::{c_char, c_int, c_uint, c_void};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use cudarc::driver::sys::{
    CUcontext, CUdevice, CUdeviceptr, CUevent, CUfunction, CUipcMemHandle, CUmodule, CUstream,
};
use kvlane_core::BlockMap;

use super::driver::{Calls, Driver, NOT_READY, OUT_OF_MEMORY, SUCCESS};
use super::{DeviceTensors, StreamHandle};
use crate::error::Result;
use crate::probe::DriverInfo;

mod calls;

/// What pinned memory holds between the start of a copy into it and its end.
pub const NOT_YET: u8 = 0xa5;

const INVALID_VALUE: u32 = 1;
const INVALID_CONTEXT: u32 = 201;
const INVALID_HANDLE: u32 = 400;
const NOT_SUPPORTED: u32 = 801;

/// One device of the stand-in.
#[derive(Debug)]
pub struct StandIn {
    device: Arc<FakeDevice>,
}

impl StandIn {
    /// A new device whose copies each begin `delay` after what is before them in their stream.
    pub fn new(delay: Duration) -> Self {
        let world = world();
        let mut devices = lock(&world.devices);
        let device = Arc::new(FakeDevice {
            ordinal: devices.len() as u32,
            delay_micros: AtomicU64::new(delay.as_micros() as u64),
            memory: Mutex::default(),
            pinned: Mutex::default(),
            in_use: Mutex::default(),
            failing: Mutex::default(),
            violations: Mutex::default(),
            retained: AtomicUsize::new(0),
            copies: AtomicUsize::new(0),
            default_stream: OnceLock::new(),
        });
        devices.push(Arc::clone(&device));
        Self { device }
    }

    /// The number of this device.
    pub fn ordinal(&self) -> u32 {
        self.device.ordinal
    }

    /// From now on copies take this long to begin.
    pub fn set_delay(&self, delay: Duration) {
        self.device
            .delay_micros
            .store(delay.as_micros() as u64, Ordering::Relaxed);
    }

    /// Zeroed device memory; it lives as long as the process. Returns its address.
    pub fn allocate(&self, bytes: usize) -> u64 {
        let memory = Box::leak(vec![0u8; bytes].into_boxed_slice());
        let address = memory.as_mut_ptr().expose_provenance();
        lock(&self.device.memory).push((address, bytes));
        address as u64
    }

    /// Tensors in memory of this device.
    ///
    /// # Panics
    /// If a region of the map is not inside of memory that was allocated here, or names another device.
    pub fn tensors(&self, map: BlockMap) -> DeviceTensors {
        for region in map.regions() {
            assert_eq!(region.device, kvlane_core::Device::Cuda(self.device.ordinal));
            let inside = self
                .device
                .has_memory(region.address as usize, region.extent_bytes);
            assert!(inside, "the region of {:?} lies elsewhere", region.names);
        }
        let owner: Arc<dyn Any + Send + Sync> = Arc::clone(&self.device) as _;
        // SAFETY: as just checked, all of it is this device's memory, which is never freed.
        let tensors = unsafe { DeviceTensors::from_map(map, owner) };
        tensors.with_driver(|| Ok(driver()))
    }

    /// A stream as the embedding program has one for its kernels.
    pub fn compute_stream(&self) -> ComputeStream {
        let stream = Stream::start(&self.device);
        let handle = world().add_stream(Arc::clone(&stream));
        ComputeStream { stream, handle }
    }

    /// The stream that has the number zero.
    pub fn default_stream(&self) -> ComputeStream {
        let stream = self
            .device
            .default_stream
            .get_or_init(|| Stream::start(&self.device));
        ComputeStream {
            stream: Arc::clone(stream),
            handle: 0,
        }
    }

    /// From now on `call` fails with `code`, after it has worked `after` more times; `None` mends it.
    pub fn fail(&self, call: &'static str, failure: Option<(usize, u32)>) {
        let mut failing = lock(&self.device.failing);
        match failure {
            Some(failure) => failing.insert(call, failure),
            None => failing.remove(call),
        };
    }

    /// What was done that a real device would punish.
    pub fn violations(&self) -> Vec<String> {
        lock(&self.device.violations).clone()
    }

    /// Pinned buffers and their bytes, now.
    pub fn pinned(&self) -> (usize, usize) {
        let pinned = lock(&self.device.pinned);
        (pinned.len(), pinned.values().sum())
    }

    /// Copies that were started.
    pub fn copies(&self) -> usize {
        self.device.copies.load(Ordering::Relaxed)
    }

    /// How often the primary context was retained and not released.
    pub fn retained(&self) -> usize {
        self.device.retained.load(Ordering::Relaxed)
    }

    /// What [`probe`](crate::probe()) says with this driver.
    pub fn probe() -> Result<DriverInfo> {
        crate::probe::info(driver())
    }
}

/// A stream for kernels.
#[derive(Debug)]
pub struct ComputeStream {
    stream: Arc<Stream>,
    handle: usize,
}

impl ComputeStream {
    /// What the program would hand to kvlane.
    pub fn handle(&self) -> StreamHandle {
        // SAFETY: a stream of the stand-in, which checks handles and never forgets this one.
        unsafe { StreamHandle::from_raw(self.handle as u64) }
    }

    /// A kernel that takes `duration` and then writes `bytes` at `address`.
    ///
    /// # Panics
    /// If that is not memory of the device.
    pub fn write(&self, address: u64, bytes: Vec<u8>, duration: Duration) {
        let device = &self.stream.device;
        assert!(
            device.has_memory(address as usize, bytes.len()),
            "not memory of the device"
        );
        self.stream.push(Work::Kernel {
            address: address as usize,
            bytes,
            duration,
        });
    }

    /// Holds up what comes on the stream from now on, until what this returns is dropped: a kernel that lasts as long as a
    /// test wants. After [`HELD`] it is over all the same, so that who waits for it fails and does not hang.
    pub fn hold(&self) -> Held {
        let (held, released) = channel();
        self.stream.push(Work::Hold(released));
        Held { _held: held }
    }
}

/// How long a stream is held up at most.
pub const HELD: Duration = Duration::from_secs(20);

/// A stream is held up while this lives.
#[derive(Debug)]
pub struct Held {
    _held: Sender<()>,
}

/// Everything that the driver's functions find by number.
#[derive(Default)]
struct World {
    devices: Mutex<Vec<Arc<FakeDevice>>>,
    streams: Mutex<HashMap<usize, Arc<Stream>>>,
    events: Mutex<HashMap<usize, Arc<FakeEvent>>>,
    next: AtomicUsize,
}

impl World {
    fn number(&self) -> usize {
        // Small numbers stand for default streams.
        self.next.fetch_add(1, Ordering::Relaxed) + 0x100
    }

    fn add_stream(&self, stream: Arc<Stream>) -> usize {
        let number = self.number();
        lock(&self.streams).insert(number, stream);
        number
    }

    fn stream(&self, device: &Arc<FakeDevice>, handle: CUstream) -> Option<Arc<Stream>> {
        match handle.addr() {
            0..=2 => Some(Arc::clone(
                device.default_stream.get_or_init(|| Stream::start(device)),
            )),
            number => lock(&self.streams).get(&number).cloned(),
        }
    }
}

struct FakeDevice {
    ordinal: u32,
    delay_micros: AtomicU64,
    /// (address, bytes)
    memory: Mutex<Vec<(usize, usize)>>,
    pinned: Mutex<HashMap<usize, usize>>,
    /// Ranges of the host that copies on their way use.
    in_use: Mutex<Vec<(usize, usize)>>,
    failing: Mutex<HashMap<&'static str, (usize, u32)>>,
    violations: Mutex<Vec<String>>,
    retained: AtomicUsize,
    copies: AtomicUsize,
    default_stream: OnceLock<Arc<Stream>>,
}

impl FakeDevice {
    fn has_memory(&self, address: usize, bytes: usize) -> bool {
        contains(lock(&self.memory).iter().copied(), address, bytes)
    }

    fn has_pinned(&self, address: usize, bytes: usize) -> bool {
        let pinned = lock(&self.pinned);
        contains(pinned.iter().map(|(&start, &len)| (start, len)), address, bytes)
    }

    fn violated(&self, what: impl Into<String>) {
        lock(&self.violations).push(what.into());
    }
}

impl std::fmt::Debug for FakeDevice {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_tuple("FakeDevice").field(&self.ordinal).finish()
    }
}

fn contains(mut ranges: impl Iterator<Item = (usize, usize)>, address: usize, bytes: usize) -> bool {
    ranges.any(|(start, len)| address >= start && address + bytes <= start + len)
}

#[derive(Default)]
struct FakeEvent {
    /// How often it was recorded.
    recorded: AtomicUsize,
    /// The latest recording that a stream has come to.
    reached: Mutex<usize>,
    changed: Condvar,
}

enum Work {
    Copy {
        from: usize,
        to: usize,
        bytes: usize,
        host: usize,
    },
    Kernel {
        address: usize,
        bytes: Vec<u8>,
        duration: Duration,
    },
    Hold(Receiver<()>),
    Record(Arc<FakeEvent>, usize),
    Wait(Arc<FakeEvent>, usize),
}

struct Stream {
    device: Arc<FakeDevice>,
    work: Mutex<Sender<Work>>,
}

impl std::fmt::Debug for Stream {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_tuple("Stream").field(&self.device).finish()
    }
}

impl Stream {
    /// The thread ends when the stream is dropped and its work is done.
    fn start(device: &Arc<FakeDevice>) -> Arc<Self> {
        let (sender, work) = channel::<Work>();
        let worker = Arc::clone(device);
        std::thread::spawn(move || {
            for item in work {
                carry_out(&worker, item);
            }
        });
        Arc::new(Self {
            device: Arc::clone(device),
            work: Mutex::new(sender),
        })
    }

    fn push(&self, work: Work) {
        let _ = lock(&self.work).send(work);
    }
}

fn carry_out(device: &FakeDevice, work: Work) {
    match work {
        Work::Copy {
            from,
            to,
            bytes,
            host,
        } => {
            std::thread::sleep(Duration::from_micros(device.delay_micros.load(Ordering::Relaxed)));
            if device.has_pinned(host, bytes) {
                copy(from, to, bytes);
            } else {
                device.violated("pinned memory was freed under a copy");
            }
            let mut in_use = lock(&device.in_use);
            if let Some(place) = in_use.iter().position(|&range| range == (host, bytes)) {
                in_use.swap_remove(place);
            }
        }
        Work::Kernel {
            address,
            bytes,
            duration,
        } => {
            std::thread::sleep(duration);
            copy(bytes.as_ptr().expose_provenance(), address, bytes.len());
        }
        Work::Hold(released) => {
            let _ = released.recv_timeout(HELD);
        }
        Work::Record(event, number) => {
            let mut reached = lock(&event.reached);
            *reached = (*reached).max(number);
            event.changed.notify_all();
        }
        Work::Wait(event, number) => {
            let mut reached = lock(&event.reached);
            while *reached < number {
                reached = event
                    .changed
                    .wait(reached)
                    .unwrap_or_else(PoisonError::into_inner);
            }
        }
    }
}

fn copy(from: usize, to: usize, bytes: usize) {
    let from: *const u8 = std::ptr::with_exposed_provenance(from);
    let to: *mut u8 = std::ptr::with_exposed_provenance_mut(to);
    // SAFETY: the callers checked that both are memory of the stand-in; device memory is never freed and pinned memory
    // that is freed early is noticed before. Device and host memory do not overlap.
    unsafe { from.copy_to_nonoverlapping(to, bytes) };
}

fn world() -> &'static World {
    static WORLD: OnceLock<World> = OnceLock::new();
    WORLD.get_or_init(World::default)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

thread_local! {
    /// The contexts that are current, by device; the last one counts.
    static CURRENT: RefCell<Vec<Arc<FakeDevice>>> = const { RefCell::new(Vec::new()) };
}

/// Runs a function of the driver on the current device, unless it was told to fail.
fn on_current(call: &'static str, work: impl FnOnce(&Arc<FakeDevice>) -> u32) -> u32 {
    let Some(device) = CURRENT.with_borrow(|current| current.last().cloned()) else {
        return INVALID_CONTEXT;
    };
    match lock(&device.failing).get_mut(call) {
        Some((0, code)) => return *code,
        Some((after, _)) => *after -= 1,
        None => {}
    }
    work(&device)
}

fn driver() -> &'static Driver {
    static DRIVER: OnceLock<Driver> = OnceLock::new();
    DRIVER.get_or_init(|| {
        Driver::stand_in(Calls {
            cuInit: calls::init,
            cuDriverGetVersion: calls::driver_get_version,
            cuGetErrorName: calls::get_error_name,
            cuDeviceGetCount: calls::device_get_count,
            cuDeviceGet: calls::device_get,
            cuDeviceGetName: calls::device_get_name,
            cuDevicePrimaryCtxRetain: calls::context_retain,
            cuDevicePrimaryCtxRelease_v2: calls::context_release,
            cuCtxPushCurrent_v2: calls::context_push,
            cuCtxPopCurrent_v2: calls::context_pop,
            cuStreamCreateWithPriority: calls::stream_create,
            cuStreamDestroy_v2: calls::stream_destroy,
            cuStreamWaitEvent: calls::stream_wait_event,
            cuEventCreate: calls::event_create,
            cuEventRecord: calls::event_record,
            cuEventQuery: calls::event_query,
            cuEventDestroy_v2: calls::event_destroy,
            cuMemHostAlloc: calls::host_alloc,
            cuMemFreeHost: calls::host_free,
            cuMemcpyDtoHAsync_v2: calls::copy_out,
            cuMemcpyHtoDAsync_v2: calls::copy_in,
            cuMemcpyDtoDAsync_v2: calls::no_copy_between,
            cuMemAlloc_v2: calls::no_allocation,
            cuMemFree_v2: calls::no_address,
            cuMemGetAddressRange_v2: calls::no_range,
            cuIpcGetMemHandle: calls::no_handle,
            cuIpcOpenMemHandle_v2: calls::no_mapping,
            cuIpcCloseMemHandle: calls::no_address,
            cuModuleLoadData: calls::no_module,
            cuModuleUnload: calls::no_unloading,
            cuModuleGetFunction: calls::no_function,
            cuLaunchKernel: calls::no_launch,
            cuThreadExchangeStreamCaptureMode: calls::exchange_capture_mode,
        })
    })
}
