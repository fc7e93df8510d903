//! A stand-in for NCCL: the calls that kvlane makes, between two processes of one machine over a socket, on the streams and the
//! memory of the stand-in for CUDA, which must be loaded before. For tests on machines without a GPU; what runs on it says
//! nothing about the speed of anything, nor whether NCCL finds a way between two devices.
//!
//! It models what goes wrong with NCCL:
//! - A communicator that is not blocking is made, and a group put on its stream, some time after the call has returned. Until
//!   then the asynchronous error is "in progress", and every other call is misuse.
//! - What a group receives is written when its stream comes to it, late; before, it holds [`NOT_YET`].
//! - When the peer is gone, or something was injected, the asynchronous error says so and the group stays on the device until
//!   the communicator is aborted. After an abort it still writes some bytes, [`LATE`], before it ends.
//! - Misuse is told to the stand-in for CUDA, which counts it: use after an abort or by another thread than the one that has
//!   made the communicator, an abort of a blocking communicator, a send or receive without a partner, memory that is none or
//!   was freed, or that an unfinished operation of another stream writes.
//!
//! What it does not do: more than two ranks, ranks of which rank 0 is not where the id was made, collectives.
//!
//! | variable | meaning |
//! |---|---|
//! | `KVLANE_NCCL_STAND_IN_VERSION` | NCCL's version number; 22907 |
//! | `KVLANE_NCCL_STAND_IN_DELAY_US` | longest delay of what happens later; 200 |
//! | `KVLANE_NCCL_STAND_IN_SEED` | of the delays; 1 |
//! | `KVLANE_NCCL_STAND_IN_FAIL` | `what:after:code,...`: a call fails with the code after it has worked so often; instead of a call, `init` or `group`: it fails asynchronously, `hang`: the group never ends |
//!
//! A program takes it for NCCL if it was loaded before ([`load`]), or if the search path has a link to it named
//! `libnccl.so.2`.

#![deny(unsafe_code)]

mod communicator;
mod control;
mod link;
#[allow(unsafe_code, reason = "NCCL's functions, and memory by address")]
mod raw;
mod settings;
mod world;

pub use control::{Control, LATE, NOT_YET, load};
