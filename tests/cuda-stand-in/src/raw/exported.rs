//! Functions that the driver does not have: what a test asks of the library that it has loaded, see `Control`, and what the
//! stand-in for NCCL needs of streams and memory.

use std::ffi::{CStr, c_char, c_void};
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::streams::{Foreign, Work};
use crate::world::{CURRENT, INVALID_HANDLE, INVALID_VALUE, SUCCESS, World};

#[unsafe(no_mangle)]
unsafe extern "C" fn kvlane_stand_in_kernel(
    stream: usize,
    address: u64,
    bytes: *const u8,
    len: usize,
    duration_us: u64,
) -> u32 {
    let world = World::get();
    let Some(stream) = world.stream(stream) else {
        return world.violated("a kernel on a stream that is none", INVALID_HANDLE);
    };
    if let Err(what) = world.memory().check(address as usize, len, false) {
        return world.violated(&format!("a kernel for {what}"), INVALID_VALUE);
    }
    // SAFETY: the caller, `Client`, has borrowed as many bytes.
    let bytes = unsafe { std::slice::from_raw_parts(bytes, len) }.to_vec();
    stream.push(Work::Kernel {
        address: address as usize,
        bytes,
        duration: Duration::from_micros(duration_us),
    });
    SUCCESS
}

#[unsafe(no_mangle)]
unsafe extern "C" fn kvlane_stand_in_fail(call: *const c_char, after: u64, code: u32) {
    // SAFETY: the caller, `Client`, passes a text that ends with a zero.
    let call = unsafe { CStr::from_ptr(call) }.to_string_lossy();
    World::get().fail(&call, after, code);
}

#[unsafe(no_mangle)]
unsafe extern "C" fn kvlane_stand_in_calls(call: *const c_char) -> u64 {
    // SAFETY: as above.
    let call = unsafe { CStr::from_ptr(call) }.to_string_lossy();
    World::get().call_count(&call)
}

#[unsafe(no_mangle)]
extern "C" fn kvlane_stand_in_delay(most_us: u64) {
    World::get().delay_most_us.store(most_us, Ordering::Relaxed);
}

/// Writes as much as fits of a line for each violation; returns how many bytes all of them have.
#[unsafe(no_mangle)]
unsafe extern "C" fn kvlane_stand_in_violations(text: *mut u8, len: usize) -> usize {
    let all = World::get().violations().join("\n");
    // SAFETY: the caller, `Client`, has borrowed as many bytes for writing.
    unsafe { all.as_ptr().copy_to_nonoverlapping(text, all.len().min(len)) };
    all.len()
}

/// A number that stands for what the other library wants back; it goes to the stream's thread.
struct Argument(*mut c_void);

// SAFETY: the other library hands it over and uses it in `run` only, once.
unsafe impl Send for Argument {}

impl Argument {
    fn into_inner(self) -> *mut c_void {
        self.0
    }
}

/// Puts work of another library on a stream: `run` is called once with `argument`, in the stream's order. The first `read_count`
/// of the ranges, which are a start and a length each, are read by it, the others written. Where this fails, `run` is not called.
#[unsafe(no_mangle)]
unsafe extern "C" fn kvlane_stand_in_foreign(
    stream: usize,
    ranges: *const [usize; 2],
    count: usize,
    read_count: usize,
    run: extern "C" fn(*mut c_void),
    argument: *mut c_void,
) -> u32 {
    let world = World::get();
    let Some(stream) = world.stream(stream) else {
        return world.violated("work of another library on a stream that is none", INVALID_HANDLE);
    };
    // SAFETY: the caller, the stand-in for NCCL, has borrowed as many ranges.
    let ranges = unsafe { std::slice::from_raw_parts(ranges, count) };
    let ranges: Vec<(usize, usize)> = ranges.iter().map(|&[start, len]| (start, len)).collect();
    let (reads, writes) = ranges.split_at(read_count.min(count));
    let argument = Argument(argument);
    stream.push(Work::Foreign(Foreign {
        reads: reads.to_vec(),
        writes: writes.to_vec(),
        run: Box::new(move || run(argument.into_inner())),
    }));
    SUCCESS
}

/// Whether `len` bytes at an address are memory of a device now; that they are not is misuse.
#[unsafe(no_mangle)]
extern "C" fn kvlane_stand_in_check(address: usize, len: usize) -> u32 {
    let world = World::get();
    let checked = world.memory().check(address, len, false);
    match checked {
        Ok(()) => SUCCESS,
        Err(what) => world.violated(&format!("NCCL uses {what}"), INVALID_VALUE),
    }
}

/// 1: the calling thread has a current context.
#[unsafe(no_mangle)]
extern "C" fn kvlane_stand_in_has_context() -> u32 {
    u32::from(CURRENT.with_borrow(|current| !current.is_empty()))
}

/// Misuse that the other library has found.
#[unsafe(no_mangle)]
unsafe extern "C" fn kvlane_stand_in_violated(what: *const c_char) {
    // SAFETY: the caller, the stand-in for NCCL, passes a text that ends with a zero.
    let what = unsafe { CStr::from_ptr(what) }.to_string_lossy();
    World::get().violated(&what, INVALID_VALUE);
}
