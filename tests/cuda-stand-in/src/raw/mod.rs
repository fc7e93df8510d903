//! Everything of the stand-in that the compiler cannot check: the driver's functions as C has them, memory by address, and
//! the way to a loaded stand-in.

mod calls;
mod client;
mod exported;
mod files;
mod kernels;

pub(crate) use client::Client;
pub(crate) use files::{SharedFile, copy, fill, open_shared, pinned, words};
