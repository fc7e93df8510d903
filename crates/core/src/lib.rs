//! What every kvlane backend shares: how a KV block is named, where its bytes lie, and the one transfer trait.
//!
//! The words, used the same way everywhere:
//!
//! | word | meaning |
//! |---|---|
//! | block | vLLM's KV block: `block_tokens` tokens of every layer that one worker holds |
//! | region | one registered KV cache tensor: base address, device, block stride, byte runs of a block |
//! | run | a contiguous byte range of a block inside a region; a block is a short list of runs |
//! | layer | the bytes of one block in one region: its runs, one after the other |
//! | chain hash | 32-byte name of a block's content ([`BlockKey`]): everything that decides its KV, rank and layout aside |
//! | namespace | what else must agree before bytes may be used: model and weights, rank, layout, format version |
//!
//! This crate has no unsafe code, does no I/O and knows neither vLLM nor CUDA.

#![forbid(unsafe_code)]

pub mod block_map;
pub mod chain;
pub mod error;
pub mod memory;
pub mod namespace;
pub mod owned_cache;
pub mod recent;
pub mod reference;
pub mod transfer;

pub use block_map::{BlockMap, Digit, Region, Run, TensorView};
pub use chain::{BlockKey, Chain, ChainRoot, ChainRootId, Keys};
pub use error::{Error, Result};
pub use memory::{Device, PagedMemory};
pub use namespace::{NamespaceId, NamespaceParts};
pub use owned_cache::OwnedCache;
pub use recent::{PrefixDigest, RecentChains};
pub use transfer::{
    Availability, Completion, JobId, KvTransfer, LoadOrder, LoadRequest, MissReason, Outcome, StoreRequest,
};
