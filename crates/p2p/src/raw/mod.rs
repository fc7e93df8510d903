//! Everything of this crate that the compiler cannot check: system calls on addresses.
//!
//! The rest of the crate has no `unsafe`. No memory of a cache ever becomes a `&[u8]` here: others may write it at any
//! time. The kernel copies it, as [`LocalRanges`] says; addresses of another process are only numbers for the kernel,
//! which checks them.

mod huge_pages;
mod local_ranges;
mod process;
mod socket;

pub(crate) use huge_pages::{HUGE_PAGE_BYTES, join_pages};
pub(crate) use local_ranges::LocalRanges;
pub(crate) use process::{RemoteRanges, read_process, read_process_bytes};
pub(crate) use socket::{Interest, keep_alive, receive, send, send_unpaced, wait};

/// Most ranges that one call takes; Linux' UIO_MAXIOV.
const RANGES_PER_CALL: usize = 1024;
