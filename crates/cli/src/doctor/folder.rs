//! The shared folder: can a store live there, and does its capacity fit.

use std::path::Path;

use indicatif::HumanBytes;
use kvlane_fs::inspect::{self, FolderInfo, StoreInfo};
use serde::Serialize;

use crate::store::{has_control, store_folder};

/// What was found out about the folder.
#[derive(Debug, Default, Serialize)]
pub(super) struct FolderState {
    /// The store's own folder.
    path: String,
    /// File system and access, of the store's folder or, before there is one, of the folder around it.
    place: Option<FolderInfo>,
    /// Null before a server has started, and where the store cannot be used.
    store: Option<StoreState>,
    /// Why the store cannot be used; null where it can, or where there is none yet.
    store_refused: Option<String>,
}

#[derive(Debug, Serialize)]
struct StoreState {
    capacity_bytes: u64,
    used_bytes: u64,
    live_writers: usize,
    segments: usize,
    rejected_segments: usize,
}

/// Looks at the folder that `path` stands for. `headroom_bytes` is what the container may still take.
pub(super) fn check(path: &Path, headroom_bytes: Option<u64>, problems: &mut Vec<String>) -> FolderState {
    let folder = store_folder(path);
    let mut state = FolderState {
        path: folder.display().to_string(),
        ..FolderState::default()
    };
    // Servers create the store's folder, and the folder around it if need be.
    let place = [folder.as_path(), path].into_iter().find(|place| place.exists());
    let Some(place) = place else {
        problems.push(format!(
            "There is no folder {}: mount the shared volume there, or correct shared_storage_path.",
            path.display()
        ));
        return state;
    };
    let info = match inspect::folder(place) {
        Ok(info) => info,
        Err(error) => {
            problems.push(format!(
                "The folder cannot be used ({error}): give one that user {} may read.",
                rustix::process::geteuid().as_raw()
            ));
            return state;
        }
    };
    problems.extend(place_problems(&info, place == folder));
    if has_control(&folder) {
        match inspect::list(&folder) {
            Ok(store) => {
                problems.extend(store_problems(&store, &info, headroom_bytes));
                state.store = Some(StoreState::of(&store));
            }
            Err(error) => {
                problems.push(format!("The store cannot be used: {error}."));
                state.store_refused = Some(error.to_string());
            }
        }
    }
    state.place = Some(info);
    state
}

fn place_problems(info: &FolderInfo, is_the_stores: bool) -> Vec<String> {
    let mut problems = Vec::new();
    let path = &info.path;
    if !info.writable {
        problems.push(format!(
            "{path} is not writable for user {}: mount it writable or change its owner (servers that only load can do \
             without).",
            info.user
        ));
    }
    if let Some(refused) = &info.unfit {
        problems.push(format!(
            "{path} on {} cannot hold a store ({refused}): use a local disk or an in-memory volume.",
            info.file_system
        ));
    }
    if is_the_stores && info.owner != info.user && info.owner != 0 {
        problems.push(format!(
            "{path} belongs to user {} and this is user {}, so its files are refused: run all servers (and this \
             command) as one user.",
            info.owner, info.user
        ));
    }
    if is_the_stores && info.writable_for_others {
        problems.push(format!(
            "{path} is writable for other users, who could plant KV in it: chmod 700 it."
        ));
    }
    problems
}

fn store_problems(store: &StoreInfo, info: &FolderInfo, headroom_bytes: Option<u64>) -> Vec<String> {
    let mut problems = Vec::new();
    let growth_bytes = store.capacity_bytes.saturating_sub(store.used_bytes);
    let (capacity, growth) = (HumanBytes(store.capacity_bytes), HumanBytes(growth_bytes));
    if info.free_bytes < growth_bytes {
        problems.push(format!(
            "The store may grow by {growth} to its capacity of {capacity}, but {} has {} left: enlarge the volume, or \
             remove {} and start with a smaller capacity_bytes.",
            info.file_system,
            HumanBytes(info.free_bytes),
            store.path
        ));
    }
    if store.medium == "memory"
        && let Some(left) = headroom_bytes
        && left < growth_bytes
    {
        problems.push(format!(
            "The store may grow by {growth} to its capacity of {capacity}, but the container may take only {} more \
             memory: raise the container's memory limit, or remove {} and start with a smaller capacity_bytes.",
            HumanBytes(left),
            store.path
        ));
    }
    if let Some(reason) = store
        .segments
        .iter()
        .find_map(|segment| segment.rejected.as_ref())
    {
        problems.push(format!(
            "{} files in the store are not usable and take its space, the first because {reason}.",
            StoreState::of(store).rejected_segments
        ));
    }
    problems
}

impl StoreState {
    fn of(store: &StoreInfo) -> Self {
        Self {
            capacity_bytes: store.capacity_bytes,
            used_bytes: store.used_bytes,
            live_writers: store.writers.len(),
            segments: store.segments.len(),
            rejected_segments: store
                .segments
                .iter()
                .filter(|segment| segment.rejected.is_some())
                .count(),
        }
    }
}

impl FolderState {
    /// For people: (what, value).
    pub(super) fn lines(&self) -> Vec<(&'static str, String)> {
        let Some(place) = &self.place else {
            return vec![("folder", format!("{}: not usable", self.path))];
        };
        let access = if place.writable { "writable" } else { "read-only" };
        let store = match &self.store {
            Some(store) => format!(
                "{} of {} used in {} segments, {} live writers",
                HumanBytes(store.used_bytes),
                HumanBytes(store.capacity_bytes),
                store.segments,
                store.live_writers
            ),
            None if self.store_refused.is_some() => "not usable".to_owned(),
            None => format!(
                "none yet; the first server creates it, with {} unless capacity_bytes says otherwise",
                HumanBytes(place.default_capacity_bytes)
            ),
        };
        vec![
            (
                "folder",
                format!(
                    "{}: {access}, {} left on {}",
                    self.path,
                    HumanBytes(place.free_bytes),
                    place.file_system
                ),
            ),
            ("medium", format!("{}, because {}", place.medium, place.reason)),
            ("store", store),
        ]
    }
}
