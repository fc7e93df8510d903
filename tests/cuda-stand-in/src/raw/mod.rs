//! Everything of the stand-in that the compiler cannot check: the driver's functions as C has them, memory by address, and
//! the way to a loaded stand-in.

/// Ends a function with the error that it was told, or found.
macro_rules! begin {
    ($call:literal) => {
        match World::get().begin($call) {
            Ok(()) => World::get(),
            Err(code) => return code,
        }
    };
}

macro_rules! begin_on_device {
    ($call:literal) => {
        match World::get().begin_on_device($call) {
            Ok(_) => World::get(),
            Err(code) => return code,
        }
    };
}

/// For what fails while a graph is captured elsewhere, and spoils it, unless the thread has said that it knows.
macro_rules! begin_outside_of_captures {
    ($call:literal) => {{
        let world = begin_on_device!($call);
        if crate::captures::forbid(world) {
            return CAPTURE_UNSUPPORTED;
        }
        world
    }};
}

mod calls;
mod client;
mod exported;
mod files;
mod kernels;

pub(crate) use client::Client;
pub(crate) use files::{SharedFile, copy, fill, open_shared, pinned, words};

/// Writes a result where the caller of a driver's function wants it.
fn give<T>(place: *mut T, value: T) {
    // SAFETY: the callers pass places of their own, see `calls`.
    unsafe { place.write(value) };
}
