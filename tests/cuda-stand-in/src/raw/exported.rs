//! Functions that the driver does not have: what a test asks of the library that it has loaded. See `Control`.

use std::ffi::{CStr, c_char};
use std::sync::atomic::Ordering;
use std::time::Duration;

use crate::streams::Work;
use crate::world::{INVALID_HANDLE, INVALID_VALUE, SUCCESS, World};

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
