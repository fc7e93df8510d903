//! A view of a folder without a cache: what a scheduler asks before it counts on blocks.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use kvlane_core::{Availability, BlockKey, NamespaceId};

use crate::complaints::Complaints;
use crate::directory::Directory;
use crate::error::{FsError, Result};
use crate::index::{Index, LookupCursor};
use crate::jobs::lock;
use crate::lister::{self, Lister};
use crate::options::FsOptions;

/// How often a folder that does not exist yet is looked for.
const REOPEN_INTERVAL: Duration = Duration::from_millis(250);

/// Answers which leading blocks of a chain a folder has in all of some namespaces.
///
/// A thread of its own looks for the folder and lists it; it ends when the value is dropped.
#[derive(Debug)]
pub struct FsReader {
    watch: Arc<Watch>,
    process: u32,
}

#[derive(Debug)]
struct Watch {
    path: PathBuf,
    options: FsOptions,
    namespaces: Vec<NamespaceId>,
    opened: OnceLock<Opened>,
    /// A reset that was asked for before the folder was there.
    reset_wanted: Mutex<bool>,
    lister: Lister,
}

#[derive(Debug)]
struct Opened {
    directory: Directory,
    index: Mutex<Index>,
}

impl Watch {
    /// Opens the folder if it is there.
    fn try_open(&self) -> Result<()> {
        let Some(directory) = Directory::open(&self.path, &self.options, false)? else {
            return Ok(());
        };
        let index = Mutex::new(Index::new(&self.namespaces));
        self.lister.list_here(&directory, &index);
        lock(&index).catch_up(&directory);
        let reset = lock(&self.reset_wanted);
        let control = Arc::clone(&directory.control);
        // What is in there may be from before it: only what comes later may be found.
        let started = if *reset { control.start_epoch() } else { Ok(()) };
        let _ = self.opened.set(Opened { directory, index });
        started
    }

    /// Opens the folder if it is there now, and returns what to complain about.
    fn open_again(&self, complaints: &mut Complaints) -> Vec<String> {
        complaints.news(self.try_open().err().map(|error| error.to_string()))
    }

    /// What the thread does.
    fn run(&self) {
        let mut tried = Instant::now();
        let mut complaints = Complaints::default();
        self.lister.run(|| {
            if let Some(Opened { directory, index }) = self.opened.get() {
                return lister::list(directory, index);
            }
            if tried.elapsed() >= REOPEN_INTERVAL {
                tried = Instant::now();
                for problem in self.open_again(&mut complaints) {
                    tracing::warn!("cannot open the KV store: {problem}");
                }
            }
            false
        });
    }
}

impl FsReader {
    /// Opens the folder. One that does not exist yet counts as empty and is looked for again.
    ///
    /// # Errors
    /// The folder exists but cannot be used.
    pub fn open(path: &Path, namespaces: Vec<NamespaceId>, options: &FsOptions) -> Result<Self> {
        let watch = Arc::new(Watch {
            path: path.into(),
            options: options.clone(),
            namespaces,
            opened: OnceLock::new(),
            reset_wanted: Mutex::new(false),
            lister: Lister::new(options.listing_patience),
        });
        watch.try_open()?;
        let watching = Arc::clone(&watch);
        std::thread::Builder::new()
            .name("kvlane-lister".into())
            .spawn(move || watching.run())
            .map_err(FsError::io("start a thread for", path))?;
        watch.lister.started();
        Ok(FsReader {
            watch,
            process: std::process::id(),
        })
    }

    /// `None`: the folder is not there yet, or this is a forked child, where every lock may have been held by a thread
    /// that is not there.
    fn opened(&self) -> Option<&Opened> {
        if self.is_forked() {
            return None;
        }
        self.watch.opened.get()
    }

    fn is_forked(&self) -> bool {
        self.process != std::process::id()
    }

    /// How many leading blocks of `chain` every namespace has, continuing from what `cursor` remembers of it.
    pub fn lookup(&self, chain: &[BlockKey], cursor: &mut LookupCursor) -> Availability {
        let Some(Opened { directory, index }) = self.opened() else {
            return Availability::default();
        };
        self.watch
            .lister
            .look(directory, index)
            .availability(chain, cursor)
    }

    /// Starts a new epoch; `false` if the folder is read-only or not there, or does not accept writes now: then only
    /// this process sees the new epoch until it does.
    pub fn reset(&self) -> bool {
        if self.is_forked() {
            return false;
        }
        {
            let mut wanted = lock(&self.watch.reset_wanted);
            if self.watch.opened.get().is_none() {
                *wanted = true;
                return false;
            }
        }
        let Some(opened) = self.opened() else {
            return false;
        };
        opened
            .directory
            .control
            .start_epoch()
            .inspect_err(|error| tracing::warn!(%error, "cannot start a new epoch"))
            .is_ok()
    }

    /// The epoch that the folder is in; `None` while it is not there.
    pub fn epoch(&self) -> Option<u64> {
        self.opened().map(|opened| opened.directory.control.epoch())
    }

    /// (used, limit) bytes of the folder. Lists it: not for every step of an engine.
    pub fn usage_bytes(&self) -> (u64, u64) {
        self.opened().map_or((0, 0), |Opened { directory, .. }| {
            (
                directory.used_bytes().unwrap_or(0),
                directory.control.capacity_bytes(),
            )
        })
    }
}

impl Drop for FsReader {
    fn drop(&mut self) {
        // Without waiting: the thread may stand still in a file system.
        if !self.is_forked() {
            self.watch.lister.close();
        }
    }
}

#[cfg(test)]
mod tests;
