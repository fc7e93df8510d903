//! Where the writer thread's slots come from, and how a segment of them goes back.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvlane_core::BlockKey;

use super::Writer;
use crate::counters::Counters;
use crate::error::is_full;
use crate::growth::{self, Growth};
use crate::segment::OwnedSegment;
use crate::shared::Shared;
use crate::slots::SlotRef;

/// Pause after a wish for space that was not granted.
const GROWTH_PAUSE: Duration = Duration::from_millis(250);
/// Pause after space was refused for good.
const REFUSED_PAUSE: Duration = Duration::from_secs(10);

impl Writer {
    pub(super) fn give_back(&mut self) {
        let shared = Arc::clone(&self.shared);
        let control = &shared.directory.control;
        shared.directory.wait_until_writable();
        // Under the lock: between losing its name and giving its space back, nobody may count on that space.
        let retired = control.with_budget_lock(growth::LOCK_PATIENCE, || {
            let segment = self.slots.remove(self.slots.coldest()?)?;
            // Counted first: whoever misses a block finds out why.
            Counters::add(&shared.counters.returned_segments, 1);
            segment.retire(&shared.directory);
            control.set_bytes_used(self.place, self.slots.bytes());
            Some(segment)
        });
        let Some(Some(segment)) = retired else { return };
        shared.measure();
        tracing::info!(path = %segment.view.path.display(), "gave a segment back for another writer");
    }

    /// A slot for a block of the chain `spare`: free, from a new segment, or recycled.
    pub(super) fn allocate(&mut self, spare: &HashSet<BlockKey>) -> Option<SlotRef> {
        if Instant::now() < self.recycle_until
            && let Some(at) = self.slots.take_free_written().or_else(|| self.recycle(spare))
        {
            return Some(at);
        }
        loop {
            if let Some(at) = self.slots.take_free() {
                return Some(at);
            }
            // An adopted segment may be full: nothing is evicted while another one may have room.
            if !self.grow() {
                break;
            }
        }
        self.recycle(spare).or_else(|| self.slots.take_refused())
    }

    fn recycle(&mut self, spare: &HashSet<BlockKey>) -> Option<SlotRef> {
        let at = self.slots.take_victim(spare)?;
        Counters::add(&self.shared.counters.evicted_blocks, 1);
        Some(at)
    }

    /// Takes note of why a block could not be copied; `in_vain`: into a slot that had been recycled for it.
    pub(super) fn hear_of_failure(&mut self, error: &std::io::Error, in_vain: bool) {
        let cause = if is_full(error) {
            // Where a file has no blocks in advance, a slot that was written before has its own, and a new one gets none.
            // Unless that is no help: then blocks would be given up for nothing.
            self.recycled_in_vain |= in_vain;
            let pause = if self.recycled_in_vain {
                Duration::ZERO
            } else {
                REFUSED_PAUSE
            };
            self.recycle_until = Instant::now() + pause;
            "no space for a block"
        } else if error.raw_os_error().is_some() {
            "block not written"
        } else {
            "block not read"
        };
        if self.is_new_cause(cause) {
            tracing::warn!(path = %self.shared.directory.path.display(), %error, "cannot store a block");
        } else {
            tracing::debug!(%error, "cannot store a block");
        }
    }

    pub(super) fn grow(&mut self) -> bool {
        let now = Instant::now();
        self.wished = Some(now);
        if now < self.grow_after {
            return false;
        }
        self.shared.directory.wait_until_writable();
        let own_bytes = self.slots.bytes();
        let descriptors = &self.shared.directory.descriptors;
        // One segment is always due, or nothing could be stored where others have made many.
        let wish = if own_bytes > 0 && !descriptors.has_room_for_own() {
            Growth::Refused {
                cause: "descriptors",
                reason: descriptors.complaint(),
                others_can_help: false,
            }
        } else {
            growth::grow(&self.shared, self.place, self.target_bytes, own_bytes)
        };
        match wish {
            Growth::Grown(segment) => {
                let segment = Arc::from(segment);
                populate(&self.shared, &segment);
                self.slots.add(segment, now);
                self.shared.measure();
                true
            }
            Growth::Asked | Growth::Full => {
                self.grow_after = now + GROWTH_PAUSE;
                false
            }
            Growth::Refused {
                cause,
                reason,
                others_can_help,
            } => {
                if self.is_new_cause(cause) {
                    tracing::warn!(path = %self.shared.directory.path.display(), "cannot add a segment: {reason}");
                }
                if others_can_help {
                    self.grow_after = now + GROWTH_PAUSE;
                } else {
                    // What others would give back is of no use now.
                    self.shared.directory.control.set_wants(self.place, 0);
                    self.grow_after = now + REFUSED_PAUSE;
                }
                false
            }
        }
    }

    /// Whether nobody has been told yet. It is tried again every few seconds, for days.
    pub(super) fn is_new_cause(&mut self, cause: &'static str) -> bool {
        self.complained.insert(cause)
    }
}

/// Maps the pages of a new segment in the background: a first copy would pay a fault for each of them.
fn populate(shared: &Arc<Shared>, segment: &Arc<OwnedSegment>) {
    // On a disk that someone freezes, it would stand still with the lock of the whole address space.
    if !shared.directory.mapped_payload() || !shared.directory.lives_in_memory() {
        return;
    }
    let segment = Arc::clone(segment);
    let spawned = std::thread::Builder::new()
        .name("kvlane-populate".into())
        .spawn(move || {
            // Given back already, or not before this has ended: it would take the pages again.
            let Some(_hold) = segment.view.hold() else {
                return;
            };
            let (from, to) = (
                segment.header().data_offset() as usize,
                segment.header().file_bytes() as usize,
            );
            if let Err(error) = segment.mapping().populate_write(from..to) {
                tracing::debug!(%error, "cannot populate a segment");
            }
        });
    if let Err(error) = spawned {
        tracing::debug!(%error, "cannot start a thread to populate a segment");
    }
}
