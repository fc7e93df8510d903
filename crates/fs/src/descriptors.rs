//! How many file descriptors segments may take: an engine that has none left answers no request any more.
//!
//! A process may have several folders open, or one twice: where one GPU is all there is, vLLM schedules and works in the
//! same process. So all of them are counted together.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use crate::jobs::lock;

/// An own segment takes one for its lock and one for its owner's reads, besides one for each index of its folder.
const OWN_DESCRIPTORS: u64 = 2;

/// What the segments of one process have open.
#[derive(Debug, Default)]
pub(crate) struct Descriptors {
    /// What they may; `None`: half of what the process may. The other half is for everything else.
    max: Option<u64>,
    open: AtomicU64,
    /// Open folders, each of which has an index.
    folders: AtomicU64,
    /// Ids of the segments that this process writes, and how often it has each open: one that was lost to another folder of
    /// the same process is open twice until the loser has noticed.
    own: Mutex<HashMap<u64, u64>>,
}

/// The descriptors of a process, and in a chain behind them those of its forked children: each finds its own by its process
/// id. Whoever had a lock of the parent when it forked does not exist in the child.
struct OfProcess {
    process: u32,
    descriptors: Arc<Descriptors>,
    forked: OnceLock<Box<OfProcess>>,
}

static OF_PROCESSES: OnceLock<OfProcess> = OnceLock::new();

impl OfProcess {
    /// `inherited`: what is open from before the fork.
    fn new(process: u32, inherited: u64) -> Self {
        let descriptors = Descriptors {
            open: AtomicU64::new(inherited),
            ..Descriptors::default()
        };
        OfProcess {
            process,
            descriptors: Arc::new(descriptors),
            forked: OnceLock::new(),
        }
    }

    fn descriptors_of(&self, process: u32) -> Arc<Descriptors> {
        let mut entry = self;
        while entry.process != process {
            let inherited = entry.descriptors.open();
            entry = entry
                .forked
                .get_or_init(|| Box::new(OfProcess::new(process, inherited)));
        }
        Arc::clone(&entry.descriptors)
    }
}

impl Descriptors {
    pub(crate) fn max(&self) -> u64 {
        self.max.unwrap_or_else(|| {
            let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
            limit.map_or(u64::MAX, |limit| limit / 2)
        })
    }

    /// What own segments may take, and what those of others may: each leaves something for the other.
    fn part_max(&self) -> u64 {
        self.max() / 4 * 3 + self.max() % 4
    }

    fn open(&self) -> u64 {
        self.open.load(Ordering::Relaxed)
    }

    /// What to say when there are no more for another segment.
    pub(crate) fn complaint(&self) -> String {
        format!(
            "segments may take {} file descriptors, which is half of what this process may have (ulimit -n): \
             raise that limit, or `segment_bytes`",
            self.max()
        )
    }
}

/// An open folder's part in them.
#[derive(Debug)]
pub(crate) struct Share(Arc<Descriptors>);

impl Share {
    pub(crate) fn of_this_process() -> Self {
        let process = std::process::id();
        Self::of(
            OF_PROCESSES
                .get_or_init(|| OfProcess::new(process, 0))
                .descriptors_of(process),
        )
    }

    fn of(descriptors: Arc<Descriptors>) -> Self {
        descriptors.folders.fetch_add(1, Ordering::Relaxed);
        Share(descriptors)
    }

    /// Counts an open segment.
    pub(crate) fn take(&self) -> Taken {
        self.0.open.fetch_add(1, Ordering::Relaxed);
        Taken(Arc::clone(&self.0))
    }

    /// Counts what its owner has open of a segment.
    pub(crate) fn take_own(&self, id: u64) -> TakenByOwner {
        *lock(&self.0.own).entry(id).or_default() += 1;
        TakenByOwner {
            taken: self.take(),
            id,
            process: std::process::id(),
        }
    }

    /// Segments that this process writes. They are few enough, and it must find its own blocks.
    pub(crate) fn own(&self) -> HashSet<u64> {
        lock(&self.0.own).keys().copied().collect()
    }

    /// How many segments of others the index of this folder may have open, so that every index gets its part.
    pub(crate) fn others_max(&self) -> u64 {
        self.0.part_max() / self.0.folders.load(Ordering::Relaxed).max(1)
    }

    /// Whether no segment of others may be opened now, whoever has all of them.
    pub(crate) fn is_used_up(&self) -> bool {
        self.0.open() >= self.0.max()
    }

    /// Whether one more segment may be written.
    pub(crate) fn has_room_for_own(&self) -> bool {
        let each = OWN_DESCRIPTORS + self.0.folders.load(Ordering::Relaxed);
        let own = lock(&self.0.own).values().sum::<u64>() + 1;
        own.saturating_mul(each) <= self.0.part_max() && self.0.open().saturating_add(each) <= self.0.max()
    }

    pub(crate) fn complaint(&self) -> String {
        self.0.complaint()
    }

    #[cfg(test)]
    pub(crate) fn of_another_process(max: u64) -> Self {
        Self::of(Arc::new(Descriptors {
            max: Some(max),
            ..Descriptors::default()
        }))
    }

    /// Another folder of the same process.
    #[cfg(test)]
    pub(crate) fn beside(&self) -> Self {
        Self::of(Arc::clone(&self.0))
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.0.folders.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A descriptor that is counted.
#[derive(Debug)]
pub(crate) struct Taken(Arc<Descriptors>);

impl Drop for Taken {
    fn drop(&mut self) {
        self.0.open.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The descriptor of a segment's owner.
#[derive(Debug)]
pub(crate) struct TakenByOwner {
    taken: Taken,
    id: u64,
    process: u32,
}

impl Drop for TakenByOwner {
    fn drop(&mut self) {
        // In a forked child somebody who is not there may have the lock.
        if self.process == std::process::id() {
            let mut own = lock(&self.taken.0.own);
            if let Some(count) = own.get_mut(&self.id) {
                *count -= 1;
                if *count == 0 {
                    own.remove(&self.id);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
