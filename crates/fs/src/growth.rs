//! Getting segments and giving them back: one budget for all writers of a folder.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::control::WriterPlace;
use crate::counters::Counters;
use crate::directory::Directory;
use crate::error::{FsError, is_full};
use crate::format::SegmentHeader;
use crate::memory_limit;
use crate::segment::{self, Geometry, OwnedSegment, SegmentView};
use crate::shared::Shared;

/// How long another process may hold the budget lock before we do without growing.
pub(crate) const LOCK_PATIENCE: Duration = Duration::from_millis(200);

/// What came of the wish for another segment.
#[derive(Debug)]
pub(crate) enum Growth {
    /// A new or adopted segment.
    Grown(Box<OwnedSegment>),
    /// No room; others have more than their share and were asked to give back.
    Asked,
    /// No room, and we have our share: recycle our own.
    Full,
    /// It cannot work: said once for each cause. The reason has numbers in it that change. `others_can_help`: those with
    /// more than their share were asked to give back.
    Refused {
        cause: &'static str,
        reason: String,
        others_can_help: bool,
    },
}

/// Tries to get one more segment for the writer at `place`, which owns `own_bytes`.
pub(crate) fn grow(shared: &Shared, place: WriterPlace, target_bytes: u64, own_bytes: u64) -> Growth {
    let attempt = || grow_locked(shared, place, target_bytes, own_bytes);
    match shared.directory.control.with_budget_lock(LOCK_PATIENCE, attempt) {
        Some(Ok(growth)) => growth,
        Some(Err(error)) => Growth::Refused {
            cause: match &error {
                FsError::Io { action, .. } => action,
                _ => "other",
            },
            reason: error.to_string(),
            others_can_help: false,
        },
        None => Growth::Full,
    }
}

fn grow_locked(
    shared: &Shared,
    place: WriterPlace,
    target_bytes: u64,
    own_bytes: u64,
) -> Result<Growth, FsError> {
    let directory = &shared.directory;
    if let Some(reason) = directory.choice.refusal() {
        return Ok(Growth::Refused {
            cause: "copy-on-write",
            reason,
            others_can_help: false,
        });
    }
    let control = &directory.control;
    let capacity = control.capacity_bytes();
    let writers = control.live_writers(Some(place));
    let share = capacity / (writers.len().max(1) as u64);
    // With many writers a segment of the usual size would be more than a share.
    let target_bytes = target_bytes.min(share);
    let somebody_waits = writers.iter().any(|writer| !writer.own && writer.wants_bytes > 0);
    let over = |share: u64| own_bytes > 0 && own_bytes + target_bytes > share.max(target_bytes);
    if somebody_waits && over(usable_bytes(directory)? / writers.len().max(1) as u64) {
        // What is free now was given back for somebody else.
        return Ok(Growth::Full);
    }
    loop {
        let left = capacity.saturating_sub(directory.used_bytes()?);
        let Some(header) = shared.geometry.header(target_bytes, capacity, directory.host) else {
            return Ok(Growth::Refused {
                cause: "capacity",
                reason: format!(
                    "capacity_bytes is {capacity}, but one block of this model takes {} with its tables",
                    shared.geometry.slot_bytes
                ),
                others_can_help: false,
            });
        };
        if header.file_bytes() <= left {
            match create(shared, &header)? {
                Ok(segment) => {
                    control.set_wants(place, 0);
                    control.set_bytes_used(place, own_bytes + header.file_bytes());
                    return Ok(Growth::Grown(Box::new(segment)));
                }
                // What is there can still be used, or make room.
                Err((cause, reason)) => match make_room(shared, place, own_bytes)? {
                    Room::Adopted(segment) => return Ok(Growth::Grown(segment)),
                    Room::Removed => continue,
                    Room::None => {
                        let usable_share = usable_bytes(directory)? / writers.len().max(1) as u64;
                        let others_can_help =
                            cause == FULL && writers.len() > 1 && (own_bytes == 0 || !over(usable_share));
                        if others_can_help {
                            control.set_wants(place, header.file_bytes());
                        }
                        return Ok(Growth::Refused {
                            cause,
                            reason,
                            others_can_help,
                        });
                    }
                },
            }
        }
        match make_room(shared, place, own_bytes)? {
            Room::Adopted(segment) => return Ok(Growth::Grown(segment)),
            Room::Removed => {}
            Room::None => break,
        }
    }
    // Everything belongs to live writers.
    if own_bytes == 0 || own_bytes + target_bytes <= share {
        control.set_wants(place, target_bytes);
        return Ok(Growth::Asked);
    }
    control.set_wants(place, 0);
    Ok(Growth::Full)
}

/// The cause of a refusal that ends when somebody else gives a segment back.
const FULL: &str = "full";

/// What segments can take here: the capacity, or less where the file system has no room for that much.
fn usable_bytes(directory: &Directory) -> Result<u64, FsError> {
    let free = rustix::fs::fstatvfs(&directory.folder)
        .map_err(|errno| FsError::io("look for free space in", &directory.path)(errno.into()))?;
    let possible = directory
        .used_bytes()?
        .saturating_add(free.f_bavail.saturating_mul(free.f_frsize));
    Ok(directory.control.capacity_bytes().min(possible))
}

/// Why there is no segment: the kind of cause, and the reason in words.
type Refusal = (&'static str, String);

/// Makes a segment, if memory and file system allow; the inner error says why not.
fn create(shared: &Shared, header: &SegmentHeader) -> Result<Result<OwnedSegment, Refusal>, FsError> {
    let directory = &shared.directory;
    if (directory.lives_in_memory() || directory.mapped_payload())
        && let Some(headroom) = memory_limit::headroom_bytes()
        && headroom < header.file_bytes()
    {
        let reason = format!(
            "the container has {headroom} bytes of memory left for a segment of {}; \
             a tmpfs segment counts against its memory limit",
            header.file_bytes()
        );
        return Ok(Err(("memory limit", reason)));
    }
    match OwnedSegment::create(directory, header, &shared.geometry.layer_bytes, shared.start_id) {
        Ok(segment) => Ok(Ok(segment)),
        Err(FsError::Io { source, .. }) if is_full(&source) => {
            Ok(Err((FULL, format!("the file system is full: {source}"))))
        }
        Err(error) => Err(error),
    }
}

/// What a search for orphans brought.
enum Room {
    Adopted(Box<OwnedSegment>),
    Removed,
    None,
}

/// Takes over a segment of a writer that is gone, or removes one that nobody here can use.
fn make_room(shared: &Shared, place: WriterPlace, own_bytes: u64) -> Result<Room, FsError> {
    let directory = &shared.directory;
    if let Some(segment) = adopt_one(directory, &shared.geometry) {
        Counters::add(&shared.counters.adopted_segments, 1);
        directory.control.set_wants(place, 0);
        directory
            .control
            .set_bytes_used(place, own_bytes + segment.header().file_bytes());
        return Ok(Room::Adopted(Box::new(segment)));
    }
    if remove_coldest_orphan(directory)? {
        return Ok(Room::Removed);
    }
    Ok(Room::None)
}

/// How long the writer with the most may keep everything while others wait: a living one gives back at its next tick.
const LARGEST_PATIENCE: Duration = Duration::from_secs(1);

/// Decides when to give back.
#[derive(Debug, Default)]
pub(crate) struct Generosity {
    /// The writer with the most, what it has, and since when.
    largest: Option<(WriterPlace, u64, Instant)>,
}

impl Generosity {
    /// Whether this writer has more than its share while somebody else waits for some.
    pub(crate) fn should_give_back(
        &mut self,
        directory: &Directory,
        place: WriterPlace,
        own_bytes: u64,
        now: Instant,
    ) -> bool {
        let writers = directory.control.live_writers(Some(place));
        let needed: u64 = writers
            .iter()
            .filter(|writer| !writer.own)
            .map(|writer| writer.wants_bytes)
            .sum();
        if needed == 0 || !is_short(directory, own_bytes, needed, writers.len()) {
            self.largest = None;
            return false;
        }
        let Some(most) = writers.iter().max_by_key(|writer| writer.bytes_used) else {
            return false;
        };
        if own_bytes >= most.bytes_used {
            return true;
        }
        // Whoever has most gives, unless it does not move: it may have been stopped.
        let since = match self.largest {
            Some((place, bytes, since)) if (place, bytes) == (most.place, most.bytes_used) => since,
            _ => now,
        };
        self.largest = Some((most.place, most.bytes_used, since));
        now.duration_since(since) >= LARGEST_PATIENCE
    }
}

/// Whether there is no room for those who wait, and the one of `writers` with `own_bytes` has more than its share.
fn is_short(directory: &Directory, own_bytes: u64, needed_bytes: u64, writers: usize) -> bool {
    let (Ok(usable), Ok(used)) = (usable_bytes(directory), directory.used_bytes()) else {
        return false;
    };
    own_bytes > usable / writers.max(1) as u64 && usable.saturating_sub(used) < needed_bytes
}

/// The segment of a writer that is gone, of our geometry.
fn adopt_one(directory: &Directory, geometry: &Geometry) -> Option<OwnedSegment> {
    for (_, name) in directory.segment_names().ok()? {
        match OwnedSegment::adopt(directory, &name, geometry) {
            Ok(Some(segment)) => return Some(segment),
            Ok(None) => {}
            Err(error) => tracing::debug!(%error, "a segment cannot be adopted"),
        }
    }
    None
}

/// Removes the orphan that was used least lately. It is of no use to us, else it would have been adopted.
fn remove_coldest_orphan(directory: &Directory) -> Result<bool, FsError> {
    let mut ages: HashMap<String, u32> = HashMap::new();
    for (_, name) in directory.segment_names()? {
        if let Ok(Some(view)) = SegmentView::open(directory, &name)
            && !view.owner_lives()
        {
            let used = (0..view.header.slot_count)
                .map(|slot| view.mark(slot))
                .max()
                .unwrap_or(0);
            ages.insert(name, used);
        }
    }
    let mut order: Vec<(u32, String)> = ages.into_iter().map(|(name, used)| (used, name)).collect();
    order.sort();
    Ok(remove_first(&order, |name| {
        segment::remove_orphan(directory, name)
    }))
}

/// Removes the first segment that can be removed.
fn remove_first(order: &[(u32, String)], remove: impl Fn(&str) -> Result<bool, FsError>) -> bool {
    for (_, name) in order {
        match remove(name) {
            Ok(true) => {
                tracing::info!(
                    segment = name,
                    "removed a segment of another model that nobody owns"
                );
                return true;
            }
            Ok(false) => {}
            // The next one may make room.
            Err(error) => tracing::debug!(%error, "a segment cannot be removed"),
        }
    }
    false
}

#[cfg(test)]
mod tests;
