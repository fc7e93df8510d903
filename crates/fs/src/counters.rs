//! What a store has done, for metrics.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use kvlane_core::MissReason;
use serde::Serialize;

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// Running totals since the store was opened.
        #[derive(Debug, Default)]
        pub(crate) struct Counters { $(pub(crate) $name: AtomicU64,)* }

        /// A snapshot of all totals since the store was opened, and of the gauges.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
        #[non_exhaustive]
        pub struct FsStats {
            $($(#[$doc])* pub $name: u64,)*
            /// Gauge: bytes of all segments in the folder.
            pub used_bytes: u64,
            /// Gauge: bytes that they may take.
            pub limit_bytes: u64,
            /// Gauge: segments in the folder.
            pub segments: u64,
        }

        impl Counters {
            pub(crate) fn snapshot(&self) -> FsStats {
                FsStats {
                    $($name: self.$name.load(Ordering::Relaxed),)*
                    ..FsStats::default()
                }
            }
        }
    };
}

counters! {
    /// Blocks copied into the store.
    stored_blocks,
    /// Payload bytes copied into the store.
    stored_bytes,
    /// Time the copying threads spent on stores.
    store_nanos,
    /// Blocks that did not have to be stored because they were there.
    present_blocks,
    /// Blocks copied out of the store.
    loaded_blocks,
    /// Payload bytes copied out of the store.
    loaded_bytes,
    /// Time the copying threads spent on loads.
    load_nanos,
    /// Blocks not loaded because they were not there (any more).
    absent_blocks,
    /// Blocks not loaded because their slot was recycled while they were read.
    recycled_blocks,
    /// Blocks whose bytes did not match their checksum.
    corrupt_blocks,
    /// Blocks not moved before their deadline.
    timed_out_blocks,
    /// Blocks not moved because of a cancellation.
    cancelled_blocks,
    /// Blocks not moved because a system call failed.
    io_failed_blocks,
    /// Blocks not stored because there was no room or too much was in flight.
    dropped_blocks,
    /// Blocks recycled to make room.
    evicted_blocks,
    /// Segments taken over from writers that are gone.
    adopted_segments,
    /// Segments given back for other writers.
    returned_segments,
}

impl Counters {
    pub(crate) fn add(counter: &AtomicU64, amount: u64) {
        counter.fetch_add(amount, Ordering::Relaxed);
    }

    pub(crate) fn add_nanos(counter: &AtomicU64, elapsed: Duration) {
        Self::add(counter, u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX));
    }

    pub(crate) fn miss(&self, reason: MissReason, blocks: u64) {
        let counter = match reason {
            MissReason::Absent => &self.absent_blocks,
            MissReason::Recycled => &self.recycled_blocks,
            MissReason::Corrupt => &self.corrupt_blocks,
            MissReason::TimedOut => &self.timed_out_blocks,
            MissReason::Cancelled => &self.cancelled_blocks,
            MissReason::Dropped => &self.dropped_blocks,
            _ => &self.io_failed_blocks,
        };
        Self::add(counter, blocks);
    }
}
