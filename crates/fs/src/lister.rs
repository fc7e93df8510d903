//! Keeps an index up to date with the files of its folder, in a thread of its own: listing, opening and mapping files, and
//! asking for locks, can stand still in a file system, and an engine must not. What an engine's thread does itself are
//! loads from what is mapped, under a lock that nobody has while he asks the kernel for anything.

use std::collections::HashSet;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::directory::Directory;
use crate::error::FsError;
use crate::index::Index;
use crate::jobs::lock;
use crate::segment::SegmentView;

/// How often the thread looks by itself.
const INTERVAL: Duration = Duration::from_millis(50);
/// How long is waited for the thread when a segment has come or gone: far more than a listing takes, also on a machine
/// that has too much to do. Nobody waits any more until a listing that was later than this has come to its end.
const PATIENCE: Duration = Duration::from_millis(250);
/// A listing that took longer was slow: on a folder in memory or on a local disk it takes a tenth of that.
const SLOW: Duration = Duration::from_millis(10);
/// So many slow listings, one behind the other, make a slow folder. One alone may be the machine's fault.
const SLOW_LISTINGS: u32 = 2;

/// What the thread and those who need it know of each other.
#[derive(Debug, Default)]
pub(crate) struct Lister {
    state: Mutex<State>,
    asked: Condvar,
    ended: Condvar,
    /// Instead of [`PATIENCE`], and then no folder counts as slow.
    patience: Option<Duration>,
}

#[derive(Debug, Default)]
struct State {
    running: bool,
    closed: bool,
    asked: bool,
    begun_rounds: u64,
    ended_rounds: u64,
    /// Somebody has waited in vain, and no round has ended since.
    late: bool,
    /// How many of the last listings were slow.
    slow_listings: u32,
}

/// How far a caller waits for a listing that is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wait {
    /// Not at all.
    Never,
    /// Unless the folder has shown to be slow.
    IfQuick,
    /// A bounded time.
    Always,
}

impl Lister {
    pub(crate) fn new(patience: Option<Duration>) -> Self {
        Lister {
            patience,
            ..Lister::default()
        }
    }

    /// The index as the folder is now, or as it was a moment ago if its file system is slow or does not answer.
    pub(crate) fn look<'a>(&self, directory: &Directory, index: &'a Mutex<Index>) -> MutexGuard<'a, Index> {
        self.look_with(directory, index, Wait::IfQuick)
    }

    /// The index as it is known now. A listing that is due comes later.
    pub(crate) fn glance<'a>(&self, directory: &Directory, index: &'a Mutex<Index>) -> MutexGuard<'a, Index> {
        self.look_with(directory, index, Wait::Never)
    }

    /// The index as the folder is now, unless that takes too long. Not for an engine's thread.
    pub(crate) fn look_patiently<'a>(
        &self,
        directory: &Directory,
        index: &'a Mutex<Index>,
    ) -> MutexGuard<'a, Index> {
        self.look_with(directory, index, Wait::Always)
    }

    fn look_with<'a>(
        &self,
        directory: &Directory,
        index: &'a Mutex<Index>,
        wait: Wait,
    ) -> MutexGuard<'a, Index> {
        let mut known = lock(index);
        if known.is_behind(directory) {
            drop(known);
            if !self.ask(wait) {
                self.list_here(directory, index);
            }
            known = lock(index);
        }
        known.catch_up(directory);
        known
    }

    /// One round in the caller's thread. May block.
    pub(crate) fn list_here(&self, directory: &Directory, index: &Mutex<Index>) {
        let started = Instant::now();
        if list(directory, index) {
            lock(&self.state).count(started.elapsed());
        }
    }

    /// The thread's work: `round` again and again until [`close`](Self::close). It answers whether it listed the folder.
    pub(crate) fn run(&self, mut round: impl FnMut() -> bool) {
        let mut state = lock(&self.state);
        state.running = true;
        loop {
            if !state.asked && !state.closed {
                state = match self.asked.wait_timeout(state, INTERVAL) {
                    Ok((state, _)) => state,
                    Err(poisoned) => poisoned.into_inner().0,
                };
            }
            if state.closed {
                return;
            }
            state.asked = false;
            state.begun_rounds += 1;
            drop(state);
            let started = Instant::now();
            let listed = round();
            state = lock(&self.state);
            if listed {
                state.count(started.elapsed());
            }
            state.ended_rounds = state.begun_rounds;
            state.late = false;
            self.ended.notify_all();
        }
    }

    /// From here on [`run`](Self::run) is on its way in another thread.
    pub(crate) fn started(&self) {
        lock(&self.state).running = true;
    }

    pub(crate) fn close(&self) {
        lock(&self.state).closed = true;
        self.asked.notify_all();
    }

    /// Asks for a round that begins after this, and waits for its end as `wait` says. `false`: there is no thread.
    fn ask(&self, wait: Wait) -> bool {
        let mut state = lock(&self.state);
        if !state.running {
            return false;
        }
        state.asked = true;
        self.asked.notify_one();
        let waits = match wait {
            Wait::Never => false,
            Wait::IfQuick => self.patience.is_some() || state.slow_listings < SLOW_LISTINGS,
            Wait::Always => true,
        };
        if !waits || state.late || state.closed {
            return true;
        }
        let wanted = state.begun_rounds + 1;
        let waits = |state: &mut State| state.ended_rounds < wanted && !state.closed;
        let patience = self.patience.unwrap_or(PATIENCE);
        state = match self.ended.wait_timeout_while(state, patience, waits) {
            Ok((state, _)) => state,
            Err(poisoned) => poisoned.into_inner().0,
        };
        if state.ended_rounds < wanted {
            state.late = true;
            state.slow_listings = SLOW_LISTINGS;
        }
        true
    }
}

impl State {
    /// Counts a listing that took `elapsed`.
    fn count(&mut self, elapsed: Duration) {
        self.slow_listings = if elapsed > SLOW {
            self.slow_listings.saturating_add(1)
        } else {
            0
        };
    }
}

/// What is to be found out about a folder, without the index.
#[derive(Debug)]
pub(crate) struct Wanted {
    pub(crate) generation: u64,
    pub(crate) known: HashSet<u64>,
    pub(crate) rejected: HashSet<u64>,
}

/// What was found.
#[derive(Debug)]
pub(crate) struct Listing {
    pub(crate) generation: u64,
    /// `None`: the folder could not be listed.
    pub(crate) linked: Option<HashSet<u64>>,
    pub(crate) opened: Vec<(Arc<SegmentView>, bool)>,
    pub(crate) rejected: Vec<u64>,
    /// What to complain about.
    pub(crate) problems: Vec<String>,
    /// Otherwise a segment could not be opened now, though it may be all right.
    pub(crate) complete: bool,
}

impl Wanted {
    /// Asks the file system. May block: not for an engine's thread, and not with the index locked.
    pub(crate) fn list(self, directory: &Directory) -> Listing {
        self.list_some(directory, directory.descriptors.others_max())
    }

    /// At most `others_max` of those that this process does not write.
    fn list_some(self, directory: &Directory, others_max: u64) -> Listing {
        let mut listing = Listing {
            generation: self.generation,
            linked: None,
            opened: Vec::new(),
            rejected: Vec::new(),
            problems: Vec::new(),
            complete: true,
        };
        let names = match directory.segment_names() {
            Ok(names) => names,
            Err(error) => {
                listing
                    .problems
                    .push(format!("cannot list the segments: {error}"));
                listing.complete = false;
                return listing;
            }
        };
        let own = directory.descriptors.own();
        let mut linked: HashSet<u64> = names.iter().map(|(id, _)| *id).collect();
        let (mut others, mut left_out) = (0, false);
        for (id, _) in &names {
            if self.known.contains(id) && !own.contains(id) {
                if others >= others_max {
                    // Another folder of this process needs its part: as good as gone.
                    linked.remove(id);
                    left_out = true;
                } else {
                    others += 1;
                }
            }
        }
        listing.linked = Some(linked);
        for (id, name) in names {
            if self.known.contains(&id) || self.rejected.contains(&id) {
                continue;
            }
            let is_own = own.contains(&id);
            if !is_own && (others >= others_max || directory.descriptors.is_used_up()) {
                left_out = true;
                continue;
            }
            match SegmentView::open(directory, &name) {
                Ok(Some(view)) => {
                    // What an engine's thread looks at must be there when it does.
                    view.map_tables();
                    let owner_lives = view.owner_lives();
                    others += u64::from(!is_own);
                    listing.opened.push((Arc::new(view), owner_lives));
                }
                Ok(None) => {}
                Err(error) => {
                    // Somebody else's rubbish must not cost us our own blocks.
                    listing.problems.push(complaint_of(&error));
                    if is_transient(&error) {
                        tracing::debug!(%error, "a segment is left out for now");
                        listing.complete = false;
                    } else {
                        listing.rejected.push(id);
                    }
                }
            }
        }
        if left_out {
            let complaint = directory.descriptors.complaint();
            listing
                .problems
                .push(format!("segments are left out: {complaint}"));
            // There is room again once others are gone.
            listing.complete = false;
        }
        listing
    }
}

/// What to say of a segment that cannot be opened: the same for all of them if the cause is the same. One whose content
/// is wrong is tried once, so that has its name.
fn complaint_of(error: &FsError) -> String {
    match error {
        FsError::Io { action, path, source } => {
            let folder = path.parent().unwrap_or(path).display();
            format!("segments in {folder} are left out: cannot {action} them: {source}")
        }
        _ => format!("a segment is left out: {error}"),
    }
}

/// Whether the same file may be opened a moment later: whatever the system says of it, it may say something else then.
/// What a file's content or owner is does not change.
fn is_transient(error: &FsError) -> bool {
    matches!(error, FsError::Io { .. })
}

/// One round: whatever asks the kernel is done while the index is free. `false`: no listing was due.
pub(crate) fn list(directory: &Directory, index: &Mutex<Index>) -> bool {
    let wanted = lock(index).wanted_listing(directory);
    let is_due = wanted.is_some();
    if let Some(wanted) = wanted {
        let listing = wanted.list(directory);
        let taken = lock(index).take_listing(listing);
        // Like unmapping and closing what is gone, not with the index locked.
        for problem in &taken.news {
            tracing::warn!("{problem}");
        }
        drop(taken.gone);
    }
    let unsure = lock(index).unsure_owners();
    if !unsure.is_empty() {
        let answers = unsure.iter().map(|view| view.owner_lives()).collect();
        lock(index).take_owners(&unsure, answers);
    }
    is_due
}

#[cfg(test)]
mod tests;
