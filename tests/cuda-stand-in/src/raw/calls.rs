//! The driver's functions. Their pointers are valid: the callers are kvlane's driver module and this crate's.

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{SharedFile, fill, give, open_shared, pinned};
use crate::control::NOT_YET;
use crate::memory::{Handle, Kind, Range};
use crate::streams::{Event, Part, Stream, Work};
use crate::world::*;

#[unsafe(no_mangle)]
extern "C" fn cuInit(_flags: c_uint) -> u32 {
    let world = World::get();
    if world.is_initialized.swap(1, Ordering::SeqCst) == 0 {
        eprintln!(
            "kvlane CUDA stand-in: no GPU, all of it is host memory (settings: {:?})",
            world.settings
        );
    }
    match world.begin("cuInit") {
        Ok(()) => SUCCESS,
        Err(code) => code,
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuDriverGetVersion(version: *mut c_int) -> u32 {
    give(version, 12_090);
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn cuGetErrorName(code: u32, name: *mut *const c_char) -> u32 {
    let text = match code {
        INVALID_VALUE => c"CUDA_ERROR_INVALID_VALUE",
        OUT_OF_MEMORY => c"CUDA_ERROR_OUT_OF_MEMORY",
        NOT_INITIALIZED => c"CUDA_ERROR_NOT_INITIALIZED",
        INVALID_DEVICE => c"CUDA_ERROR_INVALID_DEVICE",
        INVALID_CONTEXT => c"CUDA_ERROR_INVALID_CONTEXT",
        217 => c"CUDA_ERROR_PEER_ACCESS_UNSUPPORTED",
        INVALID_HANDLE => c"CUDA_ERROR_INVALID_HANDLE",
        NOT_FOUND => c"CUDA_ERROR_NOT_FOUND",
        ILLEGAL_ADDRESS => c"CUDA_ERROR_ILLEGAL_ADDRESS",
        801 => c"CUDA_ERROR_NOT_SUPPORTED",
        CAPTURE_UNSUPPORTED => c"CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED",
        CAPTURE_INVALIDATED => c"CUDA_ERROR_STREAM_CAPTURE_INVALIDATED",
        _ => return INVALID_VALUE,
    };
    give(name, text.as_ptr());
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetCount(count: *mut c_int) -> u32 {
    let world = begin!("cuDeviceGetCount");
    give(count, world.settings.device_count as c_int);
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGet(device: *mut c_int, ordinal: c_int) -> u32 {
    let world = begin!("cuDeviceGet");
    if ordinal < 0 || ordinal as u32 >= world.settings.device_count {
        return INVALID_DEVICE;
    }
    give(device, ordinal);
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn cuDeviceGetName(name: *mut c_char, len: c_int, _device: c_int) -> u32 {
    begin!("cuDeviceGetName");
    let text = c"kvlane stand-in (no GPU)".to_bytes_with_nul();
    if text.len() > len as usize {
        return INVALID_VALUE;
    }
    for (index, byte) in text.iter().enumerate() {
        give(name.wrapping_add(index), *byte as c_char);
    }
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn cuDevicePrimaryCtxRetain(context: *mut *mut c_void, device: c_int) -> u32 {
    let world = begin!("cuDevicePrimaryCtxRetain");
    let Some(retained) = world.retained.get(device as usize) else {
        return INVALID_DEVICE;
    };
    retained.fetch_add(1, Ordering::SeqCst);
    give(context, std::ptr::without_provenance_mut(device as usize + 1));
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn cuDevicePrimaryCtxRelease_v2(device: c_int) -> u32 {
    let world = begin!("cuDevicePrimaryCtxRelease_v2");
    let retained = world.retained.get(device as usize);
    let released = retained.map(|retained| {
        retained.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |count| count.checked_sub(1))
    });
    match released {
        Some(Ok(_)) => SUCCESS,
        _ => world.violated("a context was released more often than retained", INVALID_CONTEXT),
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxPushCurrent_v2(context: *mut c_void) -> u32 {
    let world = begin!("cuCtxPushCurrent_v2");
    let device = context.addr().wrapping_sub(1);
    match world.retained.get(device) {
        Some(retained) if retained.load(Ordering::SeqCst) > 0 => {
            CURRENT.with_borrow_mut(|current| current.push(device));
            SUCCESS
        }
        _ => world.violated("a context that is none, or was released", INVALID_CONTEXT),
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuCtxPopCurrent_v2(context: *mut *mut c_void) -> u32 {
    let world = begin!("cuCtxPopCurrent_v2");
    match CURRENT.with_borrow_mut(Vec::pop) {
        Some(device) => {
            give(context, std::ptr::without_provenance_mut(device + 1));
            SUCCESS
        }
        None => world.violated("a context was taken off where none was", INVALID_CONTEXT),
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamCreate(stream: *mut *mut c_void, _flags: c_uint) -> u32 {
    let world = begin_on_device!("cuStreamCreate");
    let number = world.number();
    lock(&world.streams).insert(number, Stream::start(number));
    give(stream, std::ptr::without_provenance_mut(number));
    SUCCESS
}

/// Priorities mean nothing here.
#[unsafe(no_mangle)]
extern "C" fn cuStreamCreateWithPriority(stream: *mut *mut c_void, flags: c_uint, _priority: c_int) -> u32 {
    cuStreamCreate(stream, flags)
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamDestroy_v2(stream: *mut c_void) -> u32 {
    let world = begin_on_device!("cuStreamDestroy_v2");
    match lock(&world.streams).remove(&stream.addr()) {
        Some(_) => SUCCESS,
        None => world.violated("a stream that is none was destroyed", INVALID_HANDLE),
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuStreamWaitEvent(stream: *mut c_void, event: *mut c_void, _flags: c_uint) -> u32 {
    let world = begin_on_device!("cuStreamWaitEvent");
    let (Some(stream), Some(event)) = (world.stream(stream.addr()), world.event(event.addr())) else {
        return world.violated("a wait of or for a handle that is none", INVALID_HANDLE);
    };
    stream.wait_for(&event);
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn cuEventCreate(event: *mut *mut c_void, _flags: c_uint) -> u32 {
    let world = begin_on_device!("cuEventCreate");
    let number = world.number();
    lock(&world.events).insert(number, Arc::<Event>::default());
    give(event, std::ptr::without_provenance_mut(number));
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn cuEventRecord(event: *mut c_void, stream: *mut c_void) -> u32 {
    let world = begin_on_device!("cuEventRecord");
    let (Some(stream), Some(event)) = (world.stream(stream.addr()), world.event(event.addr())) else {
        return world.violated("a recording of or on a handle that is none", INVALID_HANDLE);
    };
    stream.record(&event);
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn cuEventQuery(event: *mut c_void) -> u32 {
    let world = begin_outside_of_captures!("cuEventQuery");
    match world.event(event.addr()) {
        Some(event) if event.is_over() => SUCCESS,
        Some(_) => NOT_READY,
        None => world.violated("a question for an event that is none", INVALID_HANDLE),
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuEventDestroy_v2(event: *mut c_void) -> u32 {
    let world = begin_on_device!("cuEventDestroy_v2");
    match lock(&world.events).remove(&event.addr()) {
        Some(_) => SUCCESS,
        None => world.violated("an event that is none was destroyed", INVALID_HANDLE),
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuMemHostAlloc(pointer: *mut *mut c_void, len: usize, _flags: c_uint) -> u32 {
    let world = begin_outside_of_captures!("cuMemHostAlloc");
    let start = pinned(len);
    let kind = Kind::Pinned;
    world.memory_mut().add(start, Range { len, kind });
    give(pointer, std::ptr::with_exposed_provenance_mut(start));
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn cuMemFreeHost(pointer: *mut c_void) -> u32 {
    begin_outside_of_captures!("cuMemFreeHost");
    free(pointer.addr(), true)
}

#[unsafe(no_mangle)]
extern "C" fn cuMemAlloc_v2(address: *mut u64, len: usize) -> u32 {
    let world = begin_outside_of_captures!("cuMemAlloc_v2");
    if len == 0 {
        return INVALID_VALUE;
    }
    let Ok((start, file)) = SharedFile::allocate(len) else {
        return OUT_OF_MEMORY;
    };
    let kind = Kind::Device(file);
    world.memory_mut().add(start, Range { len, kind });
    give(address, start as u64);
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn cuMemFree_v2(address: u64) -> u32 {
    begin_outside_of_captures!("cuMemFree_v2");
    free(address as usize, false)
}

fn free(start: usize, is_pinned: bool) -> u32 {
    let world = World::get();
    let Some(len) = world.memory_mut().free(start, is_pinned) else {
        return world.violated("memory that is none was freed", INVALID_VALUE);
    };
    if lock(&world.pending).touches(start, len) {
        world.lose("memory was freed while an operation used it");
    }
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn cuMemGetAddressRange_v2(base: *mut u64, len: *mut usize, address: u64) -> u32 {
    let world = begin_on_device!("cuMemGetAddressRange_v2");
    match world.memory().around(address as usize) {
        Some((start, range)) if !matches!(range.kind, Kind::Pinned) => {
            give(base, start as u64);
            give(len, range.len);
            SUCCESS
        }
        _ => NOT_FOUND,
    }
}

#[unsafe(no_mangle)]
extern "C" fn cuIpcGetMemHandle(handle: *mut [u8; 64], address: u64) -> u32 {
    let world = begin_outside_of_captures!("cuIpcGetMemHandle");
    let memory = world.memory();
    let Some((
        _,
        Range {
            kind: Kind::Device(file),
            ..
        },
    )) = memory.around(address as usize)
    else {
        return world.violated(
            "a handle of what is no device memory of this process",
            INVALID_VALUE,
        );
    };
    match file.handle() {
        Ok(made) => {
            give(handle, made.encode());
            SUCCESS
        }
        Err(_) => INVALID_VALUE,
    }
}

/// Sixty-four bytes by value, as the driver has them.
#[repr(C)]
struct IpcHandle([u8; 64]);

#[unsafe(no_mangle)]
extern "C" fn cuIpcOpenMemHandle_v2(address: *mut u64, handle: IpcHandle, flags: c_uint) -> u32 {
    let world = begin_outside_of_captures!("cuIpcOpenMemHandle_v2");
    // The one flag that there is must be set.
    let Some(handle) = Handle::decode(&handle.0).filter(|_| flags == 1) else {
        return INVALID_VALUE;
    };
    // As the driver does it. No misuse: who finds a peer in its own process can only try.
    if handle.pid == std::process::id() {
        return INVALID_CONTEXT;
    }
    let mut memory = world.memory_mut();
    if let Some(start) = memory.reopen(handle) {
        give(address, start as u64);
        return SUCCESS;
    }
    let Ok(start) = open_shared(handle) else {
        return INVALID_HANDLE;
    };
    let len = handle.len as usize;
    let kind = Kind::Mapped { handle, opens: 1 };
    memory.add(start, Range { len, kind });
    give(address, start as u64);
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn cuIpcCloseMemHandle(address: u64) -> u32 {
    let world = begin_outside_of_captures!("cuIpcCloseMemHandle");
    let start = address as usize;
    let len = world.memory().around(start).map_or(1, |(_, range)| range.len);
    if world.memory_mut().close(start).is_none() {
        return world.violated("a mapping that is none was closed", INVALID_VALUE);
    }
    if world.memory().around(start).is_none() && lock(&world.pending).touches(start, len) {
        world.lose("a mapping was closed while an operation used it");
    }
    SUCCESS
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyDtoHAsync_v2(target: *mut c_void, source: u64, len: usize, stream: *mut c_void) -> u32 {
    begin_on_device!("cuMemcpyDtoHAsync_v2");
    let part = Part {
        from: source as usize,
        to: target.addr(),
        len,
        from_pinned: false,
        to_pinned: true,
    };
    copy_later(part, stream)
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyHtoDAsync_v2(
    target: u64,
    source: *const c_void,
    len: usize,
    stream: *mut c_void,
) -> u32 {
    begin_on_device!("cuMemcpyHtoDAsync_v2");
    let part = Part {
        from: source.addr(),
        to: target as usize,
        len,
        from_pinned: true,
        to_pinned: false,
    };
    copy_later(part, stream)
}

#[unsafe(no_mangle)]
extern "C" fn cuMemcpyDtoDAsync_v2(target: u64, source: u64, len: usize, stream: *mut c_void) -> u32 {
    begin_on_device!("cuMemcpyDtoDAsync_v2");
    copy_later(between_devices(source, target, len), stream)
}

fn between_devices(source: u64, target: u64, len: usize) -> Part {
    Part {
        from: source as usize,
        to: target as usize,
        len,
        from_pinned: false,
        to_pinned: false,
    }
}

fn copy_later(part: Part, stream: *mut c_void) -> u32 {
    let world = World::get();
    let Some(stream) = world.stream(stream.addr()) else {
        return world.violated("a copy on a stream that is none", INVALID_HANDLE);
    };
    if let Err(what) = world.memory().check_part(&part) {
        return world.violated(&format!("a copy of {what}"), INVALID_VALUE);
    }
    if part.to_pinned {
        fill(part.to, NOT_YET, part.len);
    }
    stream.push(Work::Copy(part));
    SUCCESS
}
