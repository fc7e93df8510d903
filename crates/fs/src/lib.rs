//! Filesystem backend of kvlane: single-writer segments in a shared folder.

#[doc(hidden)] // Reached by the benchmarks.
pub mod raw;
