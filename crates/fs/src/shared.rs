//! What the threads of one transfer have in common.

use std::collections::HashSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};

use crossbeam::channel::Sender;
use kvlane_core::{BlockKey, NamespaceId};

use crate::cache::Cache;
use crate::control::open_trusted;
use crate::counters::{Counters, FsStats};
use crate::directory::{Directory, segment_name, unix_ms};
use crate::format::BAD_MARK;
use crate::index::{Found, Index};
use crate::jobs::{Jobs, lock};
use crate::lister::Lister;
use crate::segment::Geometry;
use crate::writer::Command;

/// Resolution of last-used marks: finer would write more, coarser would evict less well.
pub(crate) const MARK_MS: u64 = 10_000;
/// Marks that wait to be written; more would be forgotten first anyway.
const TOUCHED_MAX: usize = 1 << 16;

/// Commands that may wait for the writer thread before new work is refused.
pub(crate) const COMMANDS_MAX: usize = 1 << 14;

/// The mark for "used now".
pub(crate) fn mark_now() -> u32 {
    (unix_ms() / MARK_MS) as u32
}

/// What was found of some keys.
#[derive(Debug)]
pub(crate) struct Search {
    /// `None`: not found.
    pub(crate) found: Vec<Option<Found>>,
    /// Some were not found, but there are segments that the index does not know yet: they may be in there, and then in
    /// this namespace.
    pub(crate) missing_in: Option<NamespaceId>,
}

/// State shared by the engine's calls and the threads behind them.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) directory: Directory,
    pub(crate) geometry: Geometry,
    pub(crate) cache: Cache,
    pub(crate) verify: bool,
    pub(crate) index: Mutex<Index>,
    pub(crate) lister: Lister,
    pub(crate) jobs: Jobs,
    pub(crate) counters: Counters,
    pub(crate) start_id: u64,
    writer: Option<Sender<Command>>,
    touched: Mutex<Touched>,
    used_bytes: AtomicU64,
    segments: AtomicU64,
}

#[derive(Debug, Default)]
struct Touched {
    seen: HashSet<(u64, u32)>,
    found: Vec<Found>,
}

impl Shared {
    #[allow(
        clippy::too_many_arguments,
        reason = "one caller, which has just made all of them"
    )]
    pub(crate) fn new(
        directory: Directory,
        geometry: Geometry,
        cache: Cache,
        namespace: NamespaceId,
        verify: bool,
        jobs_in_flight: usize,
        start_id: u64,
        writer: Option<Sender<Command>>,
        lister: Lister,
    ) -> Self {
        Shared {
            directory,
            geometry,
            cache,
            verify,
            index: Mutex::new(Index::new(&[namespace])),
            lister,
            jobs: Jobs::new(jobs_in_flight),
            counters: Counters::default(),
            start_id,
            writer,
            touched: Mutex::default(),
            used_bytes: AtomicU64::new(0),
            segments: AtomicU64::new(0),
        }
    }

    /// The index as the folder is now, or as it was a moment ago if the folder is slow.
    pub(crate) fn look(&self) -> MutexGuard<'_, Index> {
        self.lister.look(&self.directory, &self.index)
    }

    /// The index as it is known now, without waiting for the folder.
    pub(crate) fn glance(&self) -> MutexGuard<'_, Index> {
        self.lister.glance(&self.directory, &self.index)
    }

    /// The index as the folder is now. May wait: not for an engine's thread.
    pub(crate) fn look_patiently(&self) -> MutexGuard<'_, Index> {
        self.lister.look_patiently(&self.directory, &self.index)
    }

    /// Where `keys` are, without waiting for the folder.
    pub(crate) fn search(&self, keys: &[BlockKey]) -> Search {
        let index = self.glance();
        let found: Vec<_> = keys.iter().map(|key| index.find(0, key)).collect();
        let may_come = found.iter().any(Option::is_none) && index.is_behind(&self.directory);
        Search {
            found,
            missing_in: may_come.then(|| index.effective(0)),
        }
    }

    /// `false`: this transfer cannot store, or its writer thread is gone.
    pub(crate) fn tell_writer(&self, command: Command) -> bool {
        self.writer
            .as_ref()
            .is_some_and(|writer| writer.send(command).is_ok())
    }

    /// Whether the writer thread has more to do than it will get done in time: it stands still in a file system. What
    /// can be dropped is dropped then.
    pub(crate) fn writer_is_behind(&self) -> bool {
        self.writer
            .as_ref()
            .is_some_and(|writer| writer.len() >= COMMANDS_MAX)
    }

    #[cfg(test)]
    pub(crate) fn commands_waiting(&self) -> usize {
        self.writer.as_ref().map_or(0, Sender::len)
    }

    pub(crate) fn can_store(&self) -> bool {
        self.writer.is_some()
    }

    /// Remembers that blocks were used; [`write_marks`](Self::write_marks) writes it down later.
    pub(crate) fn touch(&self, found: impl Iterator<Item = Found>) {
        let mut touched = lock(&self.touched);
        for found in found {
            if touched.found.len() >= TOUCHED_MAX {
                return;
            }
            if touched.seen.insert((found.view.header.segment_id, found.slot)) {
                touched.found.push(found);
            }
        }
    }

    /// Writes the marks of the blocks used since the last call. May block: not for an engine's thread.
    pub(crate) fn write_marks(&self) {
        let touched = std::mem::take(&mut *lock(&self.touched));
        if !self.directory.writable || touched.found.is_empty() {
            return;
        }
        let mark = mark_now();
        let mut opened: Option<(u64, Option<File>)> = None;
        for found in touched.found {
            let id = found.view.header.segment_id;
            if found.view.mark(found.slot) >= mark || found.view.is_bad(found.slot) {
                continue;
            }
            if opened.as_ref().is_none_or(|(open, _)| *open != id) {
                opened = Some((id, self.open_to_mark(&found)));
            }
            if let Some((_, Some(file))) = &opened {
                let _ = file.write_all_at(&mark.to_le_bytes(), found.view.header.mark_offset(found.slot));
            }
        }
    }

    /// Tells everybody that a block's bytes are bad: nobody shall count on it, and its owner shall use the slot again.
    /// Where the folder cannot be written, only this index forgets it. May block: not for an engine's thread.
    pub(crate) fn condemn(&self, found: &Found) {
        lock(&self.index).forget(found);
        // Another block in the slot by now is none of our business. If it comes just now, it costs a recompute.
        if !self.directory.writable || found.view.sequence(found.slot) != found.sequence {
            return;
        }
        let offset = found.view.header.mark_offset(found.slot);
        let file = self.open_to_mark(found);
        match file.map(|file| file.write_all_at(&BAD_MARK.to_le_bytes(), offset)) {
            Some(Ok(())) => self.directory.control.bump_bad_slots(),
            Some(Err(error)) => {
                tracing::debug!(path = %found.view.path.display(), %error, "cannot mark a bad block");
            }
            None => {}
        }
    }

    /// The segment of a block, to write a mark into; `None`: it was removed, or must not be written.
    fn open_to_mark(&self, found: &Found) -> Option<File> {
        let name = segment_name(found.view.header.segment_id);
        open_trusted(&self.directory.folder, &name, &found.view.path, true)
            .ok()
            .flatten()
    }

    /// Looks at the folder for the gauges. May block: not for an engine's thread.
    pub(crate) fn measure(&self) {
        if let Ok(used) = self.directory.used_bytes() {
            self.used_bytes.store(used, Ordering::Relaxed);
        }
    }

    pub(crate) fn stats(&self) -> FsStats {
        let mut stats = self.counters.snapshot();
        stats.used_bytes = self.used_bytes.load(Ordering::Relaxed);
        stats.limit_bytes = self.directory.control.capacity_bytes();
        // Without waiting: while the index is busy, what it had before is the answer.
        if let Ok(index) = self.index.try_lock() {
            self.segments
                .store(index.segment_count() as u64, Ordering::Relaxed);
        }
        stats.segments = self.segments.load(Ordering::Relaxed);
        stats
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixture::{Folder, shared};

    #[test]
    fn while_the_index_is_busy_the_number_of_segments_is_the_last_known() {
        let folder = Folder::new(8 << 20);
        let shared = shared(folder.open_again(), 1);
        let _segment = folder.segment(4, 2);
        lock(&shared.index).refresh(&shared.directory);
        assert_eq!(shared.stats().segments, 1);
        let busy = lock(&shared.index);
        assert_eq!(shared.stats().segments, 1);
        drop(busy);
    }
}
