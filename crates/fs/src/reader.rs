//! A view of a folder without a cache: what a scheduler asks before it counts on blocks.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
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
    /// A reset that was asked for before the folder was there.
    reset_wanted: bool,
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
                reset_wanted: false,
            }),
        })
    }

    /// How many leading blocks of `chain` every namespace has, continuing from what `cursor` remembers of it.
    pub fn lookup(&self, chain: &[BlockKey], cursor: &mut LookupCursor) -> Availability {
        let mut state = lock(&self.state);
        if state.opened.is_none() && state.tried.elapsed() >= REOPEN_INTERVAL {
            state.tried = Instant::now();
            match Directory::open(&self.path, &self.options, false) {
                Ok(Some(directory)) => {
                    // What is in there may be from before it: only what comes later may be found.
                    if std::mem::take(&mut state.reset_wanted)
                        && let Err(error) = directory.control.start_epoch()
                    {
                        tracing::warn!(%error, "cannot start a new epoch");
                    }
                    state.opened = Some((directory, Index::new(&self.namespaces)));
                }
                Ok(None) => {}
                Err(error) => tracing::warn!(%error, "cannot open the KV store"),
            }
        }
        let Some((directory, index)) = &mut state.opened else {
            return Availability::default();
        };
        index.refresh(directory);
        index.availability(chain, cursor)
    }

    /// Starts a new epoch; `false` if the folder is read-only or not there, or does not accept writes now: then only
    /// this process sees the new epoch until it does.
    pub fn reset(&self) -> bool {
        let control = {
            let mut state = lock(&self.state);
            match &state.opened {
                Some((directory, _)) => Arc::clone(&directory.control),
                None => {
                    state.reset_wanted = true;
                    return false;
                }
            }
        };
        control
            .start_epoch()
            .inspect_err(|error| tracing::warn!(%error, "cannot start a new epoch"))
            .is_ok()
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

#[cfg(test)]
mod tests;
