//! A view of a folder without a cache: what a scheduler asks before it counts on blocks.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use kvlane_core::{Availability, BlockKey, NamespaceId};

use crate::directory::Directory;
use crate::error::Result;
use crate::index::{Index, LookupCursor};
use crate::jobs::lock;
use crate::options::FsOptions;

/// How often a folder that does not exist yet is looked for.
const REOPEN_INTERVAL: Duration = Duration::from_millis(250);

/// Answers which leading blocks of a chain a folder has in all of some namespaces.
#[derive(Debug)]
pub struct FsReader {
    path: PathBuf,
    options: FsOptions,
    namespaces: Vec<NamespaceId>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    opened: Option<(Directory, Index)>,
    tried: Instant,
}

impl FsReader {
    /// Opens the folder. One that does not exist yet counts as empty and is looked for again.
    ///
    /// # Errors
    /// The folder exists but cannot be used.
    pub fn open(path: &Path, namespaces: Vec<NamespaceId>, options: &FsOptions) -> Result<Self> {
        let opened =
            Directory::open(path, options, false)?.map(|directory| (directory, Index::new(&namespaces)));
        Ok(FsReader {
            path: path.into(),
            options: options.clone(),
            namespaces,
            state: Mutex::new(State {
                opened,
                tried: Instant::now(),
            }),
        })
    }

    /// How many leading blocks of `chain` every namespace has, continuing from what `cursor` remembers of it.
    pub fn lookup(&self, chain: &[BlockKey], cursor: &mut LookupCursor) -> Availability {
        let mut state = self.state();
        let Some((directory, index)) = &mut state.opened else {
            return Availability::default();
        };
        index.refresh(directory);
        index.availability(chain, cursor)
    }

    /// Starts a new epoch; `false` if the folder is read-only or not there, or does not accept writes now: then only
    /// this process sees the new epoch until it does.
    pub fn reset(&self) -> bool {
        let control = match &self.state().opened {
            Some((directory, _)) => Arc::clone(&directory.control),
            None => return false,
        };
        control
            .start_epoch()
            .inspect_err(|error| tracing::warn!(%error, "cannot start a new epoch"))
            .is_ok()
    }

    /// The epoch that the folder is in; `None` while it is not there.
    pub fn epoch(&self) -> Option<u64> {
        let state = lock(&self.state);
        state
            .opened
            .as_ref()
            .map(|(directory, _)| directory.control.epoch())
    }

    /// The state, after another look for a folder that was not there.
    fn state(&self) -> MutexGuard<'_, State> {
        let mut state = lock(&self.state);
        if state.opened.is_none() && state.tried.elapsed() >= REOPEN_INTERVAL {
            state.tried = Instant::now();
            match Directory::open(&self.path, &self.options, false) {
                Ok(Some(directory)) => state.opened = Some((directory, Index::new(&self.namespaces))),
                Ok(None) => {}
                Err(error) => tracing::warn!(%error, "cannot open the KV store"),
            }
        }
        state
    }

    /// (used, limit) bytes of the folder. Lists it: not for every step of an engine.
    pub fn usage_bytes(&self) -> (u64, u64) {
        lock(&self.state)
            .opened
            .as_ref()
            .map_or((0, 0), |(directory, _)| {
                (
                    directory.used_bytes().unwrap_or(0),
                    directory.control.capacity_bytes(),
                )
            })
    }
}
