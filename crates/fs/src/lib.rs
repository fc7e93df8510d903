//! The filesystem backend: KV blocks in a folder that several processes share.
//!
//! The one idea: a block is copied once, by the process that owns a preallocated *segment* file, into a *slot* of it, and
//! becomes visible when its record and sequence number are written behind it. Readers copy a slot and then check that its
//! sequence has not moved and that the bytes match their checksum. So a writer may die, stop or recycle a slot at any
//! moment, and the worst that a reader sees is a miss.
//!
//! [`FsTransfer`] stores and loads for one paged cache, [`FsReader`] answers what is there. The bytes on disk are in
//! [`mod@format`] and in `docs/segment-format.md`.

#![deny(unsafe_code)]

mod cache;
mod cold;
mod complaints;
mod control;
mod counters;
mod descriptors;
mod directory;
mod error;
#[cfg(test)]
mod fixture;
pub mod format;
mod gate;
mod growth;
mod host;
mod index;
pub mod inspect;
mod jobs;
mod lister;
mod load;
mod medium;
mod memory_limit;
mod options;
#[allow(
    unsafe_code,
    reason = "the one place where addresses and mappings are handled"
)]
pub mod raw;
mod reader;
mod segment;
mod shared;
mod slots;
mod store;
mod transfer;
mod writer;

pub use cache::Cache;
pub use counters::FsStats;
pub use error::{FsError, Result};
pub use index::LookupCursor;
pub use medium::MediumChoice;
pub use memory_limit::headroom_bytes;
pub use options::{FsOptions, Medium};
pub use raw::HostCache;
pub use reader::FsReader;
pub use transfer::FsTransfer;
