//! The P2P backend: decode pulls KV blocks out of prefill's paged cache.
//!
//! Prefill keeps computed blocks under a lease. Decode's own threads copy them into decode's own blocks and check
//! afterwards that the lease never lapsed; only then the blocks count.

pub mod discovery;
