//! What can be configured.

use std::time::Duration;

use serde::Deserialize;

use crate::error::{FsError, Result};

/// Which way bytes take to and from the folder.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Medium {
    /// Decide by the file system of the folder.
    #[default]
    Auto,
    /// Through mappings: for file systems that live in memory (tmpfs).
    Memory,
    /// Stores by `pwrite`. Loads through mappings what the page cache has, and past it, four blocks at a time, what not.
    Disk,
    /// By `pwrite` and non-blocking `preadv2`, blocking reads through a bounce buffer. Relies on no coherence beyond one
    /// machine: only the creating host adopts segments.
    Network,
}

/// Options of a store. All have defaults; `Deserialize` refuses unknown names.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct FsOptions {
    /// Bytes that all segments of the folder may take together. `None`: what the folder was created with, or for a
    /// new folder half of what its file system and the container's memory limit have left.
    pub capacity_bytes: Option<u64>,
    /// Size of one segment file, at most a quarter of the capacity. `None`: 64 MiB, above 64 GiB of capacity a 1024th of it.
    pub segment_bytes: Option<u64>,
    /// Threads that copy, for stores and for loads each; on a disk, four more wait for what is not in the page cache and copy
    /// that. `None`: half of the cores, at least 1, at most 8.
    pub io_threads: Option<usize>,
    /// Check the payload's CRC on every load. `false` skips only that; headers are always checked, and so is a payload from
    /// before the last boot.
    pub verify: bool,
    /// The way of the bytes.
    pub medium: Medium,
    /// Stores and loads that may be in flight; beyond it stores are dropped and loads miss.
    pub jobs_in_flight: usize,
    /// For tests on busy machines: lookups wait so long for a listing, and also if listings are slow.
    #[doc(hidden)]
    #[serde(skip)]
    pub listing_patience: Option<Duration>,
}

impl Default for FsOptions {
    fn default() -> Self {
        FsOptions {
            capacity_bytes: None,
            segment_bytes: None,
            io_threads: None,
            verify: true,
            medium: Medium::Auto,
            jobs_in_flight: 1024,
            listing_patience: None,
        }
    }
}

/// Default size of a segment.
pub(crate) const SEGMENT_BYTES_DEFAULT: u64 = 64 << 20;
/// More segments than this make directory scans and open files a burden, so segments grow instead.
const SEGMENTS_WANTED_MAX: u64 = 1024;
/// A capacity is divided into at least this many segments, so that several writers can share it.
const SEGMENTS_WANTED_MIN: u64 = 4;
/// Reservations older than this belong to nobody, whatever their deadline says.
pub(crate) const RESERVATION_MAX: Duration = Duration::from_secs(600);

impl FsOptions {
    /// Sets the capacity of the folder, in bytes.
    #[must_use]
    pub fn with_capacity_bytes(mut self, capacity_bytes: u64) -> Self {
        self.capacity_bytes = Some(capacity_bytes);
        self
    }

    /// Sets the size of one segment file, in bytes.
    #[must_use]
    pub fn with_segment_bytes(mut self, segment_bytes: u64) -> Self {
        self.segment_bytes = Some(segment_bytes);
        self
    }

    /// Sets the number of copying threads, for stores and for loads each.
    #[must_use]
    pub fn with_io_threads(mut self, io_threads: usize) -> Self {
        self.io_threads = Some(io_threads);
        self
    }

    /// Sets whether loads check the payload.
    #[must_use]
    pub fn with_verify(mut self, verify: bool) -> Self {
        self.verify = verify;
        self
    }

    /// Sets the way of the bytes.
    #[must_use]
    pub fn with_medium(mut self, medium: Medium) -> Self {
        self.medium = medium;
        self
    }

    /// Refuses values that cannot work.
    pub fn check(&self) -> Result<()> {
        let refuse = |option, found: String, allowed: &str| {
            Err(FsError::Option {
                option,
                found,
                allowed: allowed.to_owned(),
            })
        };
        if let Some(threads) = self.io_threads
            && !(1..=64).contains(&threads)
        {
            return refuse("io_threads", threads.to_string(), "1 to 64");
        }
        if let Some(bytes) = self.capacity_bytes
            && bytes < 1 << 20
        {
            return refuse("capacity_bytes", bytes.to_string(), "1 MiB or more");
        }
        if let Some(bytes) = self.segment_bytes
            && !(1 << 16..=1 << 40).contains(&bytes)
        {
            return refuse("segment_bytes", bytes.to_string(), "64 KiB to 1 TiB");
        }
        if !(1..=65_536).contains(&self.jobs_in_flight) {
            return refuse("jobs_in_flight", self.jobs_in_flight.to_string(), "1 to 65536");
        }
        Ok(())
    }

    /// Threads that copy, for each direction.
    pub fn threads(&self) -> usize {
        self.io_threads.unwrap_or_else(|| {
            let cores = std::thread::available_parallelism().map_or(1, usize::from);
            (cores / 2).clamp(1, 8)
        })
    }

    /// Size to aim at for a segment of a folder with this capacity.
    pub(crate) fn segment_target_bytes(&self, capacity_bytes: u64) -> u64 {
        let by_capacity = SEGMENT_BYTES_DEFAULT.max(capacity_bytes / SEGMENTS_WANTED_MAX);
        let target = self.segment_bytes.unwrap_or(by_capacity);
        target.min(capacity_bytes / SEGMENTS_WANTED_MIN).max(1 << 16)
    }
}
