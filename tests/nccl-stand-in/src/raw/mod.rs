//! Everything of the stand-in that the compiler cannot check: NCCL's functions as C has them, memory by address, the way to the
//! stand-in for CUDA, and the way to a loaded stand-in.

mod calls;
mod client;
mod cuda;
mod memory;

pub(crate) use client::Client;
pub(crate) use cuda::Cuda;
pub(crate) use memory::{fill, random, read_memory, write_memory};
