//! The P2P backend: decode pulls KV blocks out of prefill's paged cache.
//!
//! Prefill keeps computed blocks under a lease. Decode's own threads copy them into decode's own blocks and check
//! afterwards that the lease never lapsed; only then the blocks count. So a peer that was paused, restarted or killed
//! costs a recompute and never changes a byte that is not its own.

#![deny(unsafe_code)]

pub mod discovery;
mod engine;
pub mod error;
pub mod key;
pub mod lanes;
pub mod proto;
#[allow(
    unsafe_code,
    reason = "the one place where addresses and system calls on them are handled"
)]
mod raw;
pub mod shape;

pub use engine::{
    Asked, AskerOptions, Ended, LaneChoice, P2pAsker, P2pWorker, PeerAddress, PeerOptions, PullOrder,
    WorkerOptions, WorkerStats,
};
pub use error::{Error, Result};
pub use key::{KEY_BYTES_MAX, Prompt, TransferKey};
