//! Everything of this crate that the compiler cannot check: raw addresses, shared mappings, system calls on them.
//!
//! The rest of the crate has no `unsafe`. It handles three kinds of memory through the types of this module, and none
//! of them ever becomes a `&[u8]` while somebody else may write it:
//!
//! | memory | who else writes it | type |
//! |---|---|---|
//! | the embedding program's KV cache | its own threads and vLLM's | [`HostCache`], [`Runs`] |
//! | a segment file, mapped | other processes | [`ReadMapping`], [`WriteMapping`] |
//! | bounce buffers | nobody | [`AlignedBuffer`] |
//!
//! [`ByteSource`] and [`ByteTarget`] are the other end of a copy: ranges with a checked length and a lifetime.
//!
//! # Races on bytes
//! The language has no byte-wise atomic copy yet. What this module relies on is what every user of shared memory relies
//! on: a copy of bytes that change meanwhile yields some mix of old and new bytes and nothing else. All such copies go
//! into memory of our own first or straight on to the target, are never branched on before they are there, and are
//! checked afterwards by sequence number and CRC.

mod aligned_buffer;
mod copy;
mod crc;
mod fold;
mod fork_guard;
mod host_cache;
mod kernel;
mod mapping;
mod ofd_lock;
mod range;
mod vectored;

pub use aligned_buffer::AlignedBuffer;
pub use copy::{copy_bytes, store_fence};
pub use crc::LayerCrc;
pub use fork_guard::ForkGuard;
pub use host_cache::{HostCache, Runs};
pub use kernel::Kernel;
pub use mapping::{ReadMapping, WriteMapping};
pub use ofd_lock::OfdLock;
pub use range::{ByteSource, ByteTarget};
pub use vectored::{preadv_nowait, pwritev_all};

/// Size that direct I/O, slots and pages are aligned to.
pub const PAGE_BYTES: usize = 4096;
