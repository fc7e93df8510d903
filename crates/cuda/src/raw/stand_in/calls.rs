//! The driver's functions of the stand-in. They are called by `raw::device` only, whose pointers are valid.

use super::*;

/// Writes a result where the caller wants it.
fn give<T>(place: *mut T, value: T) {
    // SAFETY: the callers are this crate's, which pass places of their own.
    unsafe { place.write(value) };
}

pub(super) unsafe extern "C" fn init(_flags: c_uint) -> u32 {
    SUCCESS
}

pub(super) unsafe extern "C" fn driver_get_version(version: *mut c_int) -> u32 {
    give(version, 12_090);
    SUCCESS
}

pub(super) unsafe extern "C" fn get_error_name(code: u32, name: *mut *const c_char) -> u32 {
    let text = match code {
        OUT_OF_MEMORY => c"CUDA_ERROR_OUT_OF_MEMORY",
        700 => c"CUDA_ERROR_ILLEGAL_ADDRESS",
        NOT_SUPPORTED => c"CUDA_ERROR_NOT_SUPPORTED",
        _ => return INVALID_VALUE,
    };
    give(name, text.as_ptr());
    SUCCESS
}

pub(super) unsafe extern "C" fn device_get_count(count: *mut c_int) -> u32 {
    give(count, lock(&world().devices).len() as c_int);
    SUCCESS
}

pub(super) unsafe extern "C" fn device_get(device: *mut CUdevice, ordinal: c_int) -> u32 {
    give(device, ordinal);
    SUCCESS
}

pub(super) unsafe extern "C" fn device_get_name(name: *mut c_char, len: c_int, _device: CUdevice) -> u32 {
    for (index, byte) in c"stand-in"
        .to_bytes_with_nul()
        .iter()
        .enumerate()
        .take(len as usize)
    {
        give(name.wrapping_add(index), *byte as c_char);
    }
    SUCCESS
}

pub(super) unsafe extern "C" fn context_retain(context: *mut CUcontext, device: CUdevice) -> u32 {
    lock(&world().devices)[device as usize]
        .retained
        .fetch_add(1, Ordering::Relaxed);
    give(context, std::ptr::without_provenance_mut(device as usize + 1));
    SUCCESS
}

pub(super) unsafe extern "C" fn context_release(device: CUdevice) -> u32 {
    lock(&world().devices)[device as usize]
        .retained
        .fetch_sub(1, Ordering::Relaxed);
    SUCCESS
}

pub(super) unsafe extern "C" fn context_push(context: CUcontext) -> u32 {
    let device = Arc::clone(&lock(&world().devices)[context.addr() - 1]);
    if device.retained.load(Ordering::Relaxed) == 0 {
        device.violated("a context was used after it was released");
    }
    CURRENT.with_borrow_mut(|current| current.push(device));
    SUCCESS
}

pub(super) unsafe extern "C" fn context_pop(context: *mut CUcontext) -> u32 {
    give(context, std::ptr::null_mut());
    match CURRENT.with_borrow_mut(Vec::pop) {
        Some(_) => SUCCESS,
        None => INVALID_CONTEXT,
    }
}

pub(super) unsafe extern "C" fn stream_create(
    stream: *mut CUstream,
    _flags: c_uint,
    _priority: c_int,
) -> u32 {
    on_current("cuStreamCreateWithPriority", |device| {
        let number = world().add_stream(Stream::start(device));
        give(stream, std::ptr::without_provenance_mut(number));
        SUCCESS
    })
}

pub(super) unsafe extern "C" fn stream_destroy(stream: CUstream) -> u32 {
    on_current("cuStreamDestroy_v2", |_| {
        lock(&world().streams)
            .remove(&stream.addr())
            .map_or(INVALID_HANDLE, |_| SUCCESS)
    })
}

pub(super) unsafe extern "C" fn stream_wait_event(stream: CUstream, event: CUevent, _flags: c_uint) -> u32 {
    on_current("cuStreamWaitEvent", |device| {
        let event = lock(&world().events).get(&event.addr()).cloned();
        let (Some(stream), Some(event)) = (world().stream(device, stream), event) else {
            return INVALID_HANDLE;
        };
        let number = event.recorded.load(Ordering::Relaxed);
        stream.push(Work::Wait(event, number));
        SUCCESS
    })
}

pub(super) unsafe extern "C" fn event_create(event: *mut CUevent, _flags: c_uint) -> u32 {
    on_current("cuEventCreate", |_| {
        let number = world().number();
        lock(&world().events).insert(number, Arc::default());
        give(event, std::ptr::without_provenance_mut(number));
        SUCCESS
    })
}

pub(super) unsafe extern "C" fn event_record(event: CUevent, stream: CUstream) -> u32 {
    on_current("cuEventRecord", |device| {
        let event = lock(&world().events).get(&event.addr()).cloned();
        let (Some(stream), Some(event)) = (world().stream(device, stream), event) else {
            return INVALID_HANDLE;
        };
        let number = event.recorded.fetch_add(1, Ordering::Relaxed) + 1;
        stream.push(Work::Record(event, number));
        SUCCESS
    })
}

pub(super) unsafe extern "C" fn event_query(event: CUevent) -> u32 {
    on_current("cuEventQuery", |_| {
        let Some(event) = lock(&world().events).get(&event.addr()).cloned() else {
            return INVALID_HANDLE;
        };
        let reached = *lock(&event.reached);
        if reached >= event.recorded.load(Ordering::Relaxed) {
            SUCCESS
        } else {
            NOT_READY
        }
    })
}

pub(super) unsafe extern "C" fn event_destroy(event: CUevent) -> u32 {
    on_current("cuEventDestroy_v2", |_| {
        lock(&world().events)
            .remove(&event.addr())
            .map_or(INVALID_HANDLE, |_| SUCCESS)
    })
}

pub(super) unsafe extern "C" fn host_alloc(pointer: *mut *mut c_void, bytes: usize, _flags: c_uint) -> u32 {
    on_current("cuMemHostAlloc", |device| {
        // Never freed for real, so that a copy into freed memory is noticed and not fatal.
        let memory = Box::leak(vec![0u8; bytes].into_boxed_slice());
        let address = memory.as_mut_ptr().expose_provenance();
        lock(&device.pinned).insert(address, bytes);
        give(pointer, memory.as_mut_ptr().cast());
        SUCCESS
    })
}

pub(super) unsafe extern "C" fn host_free(pointer: *mut c_void) -> u32 {
    on_current("cuMemFreeHost", |device| {
        let start = pointer.addr();
        let Some(bytes) = lock(&device.pinned).remove(&start) else {
            return INVALID_VALUE;
        };
        let used = lock(&device.in_use)
            .iter()
            .any(|&(used, len)| used < start + bytes && used + len > start);
        if used {
            device.violated("pinned memory was freed under a copy");
        }
        SUCCESS
    })
}

pub(super) unsafe extern "C" fn copy_out(
    target: *mut c_void,
    source: CUdeviceptr,
    bytes: usize,
    stream: CUstream,
) -> u32 {
    on_current("cuMemcpyDtoHAsync_v2", |device| {
        start_copy(device, stream, source as usize, target.addr(), bytes, true)
    })
}

pub(super) unsafe extern "C" fn copy_in(
    target: CUdeviceptr,
    source: *const c_void,
    bytes: usize,
    stream: CUstream,
) -> u32 {
    on_current("cuMemcpyHtoDAsync_v2", |device| {
        start_copy(device, stream, target as usize, source.addr(), bytes, false)
    })
}

fn start_copy(
    device: &Arc<FakeDevice>,
    stream: CUstream,
    on_device: usize,
    on_host: usize,
    bytes: usize,
    out: bool,
) -> u32 {
    let Some(stream) = world().stream(device, stream) else {
        return INVALID_HANDLE;
    };
    if !device.has_memory(on_device, bytes) || !device.has_pinned(on_host, bytes) {
        device.violated("a copy outside of device memory or pinned memory");
        return INVALID_VALUE;
    }
    let (from, to) = if out {
        (on_device, on_host)
    } else {
        (on_host, on_device)
    };
    if out {
        let host: *mut u8 = std::ptr::with_exposed_provenance_mut(on_host);
        // SAFETY: inside of pinned memory, as just checked, which the caller gave away with the call.
        unsafe { host.write_bytes(NOT_YET, bytes) };
    }
    device.copies.fetch_add(1, Ordering::Relaxed);
    lock(&device.in_use).push((on_host, bytes));
    stream.push(Work::Copy {
        from,
        to,
        bytes,
        host: on_host,
    });
    SUCCESS
}

// What it does not model, answered as by a device that cannot do it.

pub(super) unsafe extern "C" fn no_copy_between(
    _target: CUdeviceptr,
    _source: CUdeviceptr,
    _bytes: usize,
    _stream: CUstream,
) -> u32 {
    NOT_SUPPORTED
}

pub(super) unsafe extern "C" fn no_allocation(_address: *mut CUdeviceptr, _bytes: usize) -> u32 {
    NOT_SUPPORTED
}

pub(super) unsafe extern "C" fn no_address(_address: CUdeviceptr) -> u32 {
    NOT_SUPPORTED
}

pub(super) unsafe extern "C" fn no_range(
    _base: *mut CUdeviceptr,
    _bytes: *mut usize,
    _address: CUdeviceptr,
) -> u32 {
    NOT_SUPPORTED
}

pub(super) unsafe extern "C" fn no_handle(_handle: *mut CUipcMemHandle, _address: CUdeviceptr) -> u32 {
    NOT_SUPPORTED
}

pub(super) unsafe extern "C" fn no_mapping(
    _address: *mut CUdeviceptr,
    _handle: CUipcMemHandle,
    _flags: c_uint,
) -> u32 {
    NOT_SUPPORTED
}

pub(super) unsafe extern "C" fn no_module(_module: *mut CUmodule, _image: *const c_void) -> u32 {
    NOT_SUPPORTED
}

pub(super) unsafe extern "C" fn no_unloading(_module: CUmodule) -> u32 {
    NOT_SUPPORTED
}

pub(super) unsafe extern "C" fn no_function(
    _function: *mut CUfunction,
    _module: CUmodule,
    _name: *const c_char,
) -> u32 {
    NOT_SUPPORTED
}

pub(super) unsafe extern "C" fn no_launch(
    _function: CUfunction,
    _grid_x: c_uint,
    _grid_y: c_uint,
    _grid_z: c_uint,
    _block_x: c_uint,
    _block_y: c_uint,
    _block_z: c_uint,
    _shared_bytes: c_uint,
    _stream: CUstream,
    _arguments: *mut *mut c_void,
    _extra: *mut *mut c_void,
) -> u32 {
    NOT_SUPPORTED
}

/// Nobody captures graphs here.
pub(super) unsafe extern "C" fn exchange_capture_mode(_mode: *mut c_uint) -> u32 {
    SUCCESS
}
