//! A stand-in for libcuda: the driver's calls that kvlane makes, on host memory. For tests on machines without a GPU; what
//! runs on it says nothing about the speed of anything.
//!
//! It models what goes wrong on a device:
//! - Every stream is a queue with a thread of its own, which works later than it was asked to and out of step with the
//!   others. Until a copy to the host has happened, its target holds [`NOT_YET`].
//! - Device memory lies in files without a name, so that a handle of it opens in another process, as CUDA IPC does, and not
//!   in the one that made it.
//! - The one kernel that kvlane has is run by a host twin, so named, which copies what the list of a launch says. The list is
//!   read again when the stream comes to the launch, and must be as it was.
//! - While a thread captures a graph, calls that cannot be part of one fail in other threads, and spoil it.
//! - Misuse is said on standard error, counted, and answered with the driver's error: memory that was freed or was never
//!   there, memory in use by a copy while it is freed, an operation on memory that an unfinished one of another stream
//!   writes, handles that are none, calls without a context. What a real device finds while it works stays: every later
//!   call fails.
//!
//! | variable | meaning |
//! |---|---|
//! | `KVLANE_CUDA_STAND_IN_DEVICES` | number of devices; 1 |
//! | `KVLANE_CUDA_STAND_IN_DELAY_US` | longest delay of an operation; 200 |
//! | `KVLANE_CUDA_STAND_IN_SEED` | of the delays; 1 |
//! | `KVLANE_CUDA_STAND_IN_FAIL` | `call:after:code,...`: the call fails with the code, after it has worked so often |
//!
//! A program takes it for the driver if it was loaded before ([`load`]), or if the search path has a link to it named
//! `libcuda.so.1`.

#![deny(unsafe_code)]

mod captures;
mod control;
mod memory;
#[allow(unsafe_code, reason = "the driver's functions, and memory by address")]
mod raw;
mod settings;
mod streams;
mod world;

pub use control::{Control, NOT_YET, load};
