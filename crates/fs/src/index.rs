//! Which blocks a folder has: a map in memory, kept up to date from the segments' change counters.

use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvlane_core::{BlockKey, NamespaceId};

use crate::complaints::Complaints;
use crate::directory::Directory;
use crate::format::SlotState;
use crate::lister::{Listing, Wanted};
use crate::segment::SegmentView;

mod lookup;

/// All segments are looked at this often even if nobody announced a change: a writer may have died in between.
const FULL_CHECK_INTERVAL: Duration = Duration::from_millis(200);
/// The folder is listed this often even if nobody announced a segment: whoever made or removed one may have died before
/// it could, and a removed one that is still mapped keeps its memory.
const FULL_LIST_INTERVAL: Duration = Duration::from_secs(10);
/// How long an answer to "does the owner live?" is believed.
const OWNER_CHECK_INTERVAL: Duration = Duration::from_millis(20);

/// Chain hashes are uniform already: their first bytes are as good as a hash of them.
#[derive(Default)]
pub(crate) struct KeyHasher(u64);

impl Hasher for KeyHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        let mut word = [0; 8];
        let length = bytes.len().min(8);
        word[..length].copy_from_slice(&bytes[..length]);
        self.0 ^= u64::from_le_bytes(word);
    }
    // The length prefix of arrays says nothing.
    fn write_usize(&mut self, _: usize) {}
}

type KeyMap<V> = HashMap<BlockKey, V, BuildHasherDefault<KeyHasher>>;

/// Where a block is, or is promised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry {
    segment: u32,
    slot: u32,
    sequence: u64,
    /// Unix milliseconds until which a promise counts; 0 for a committed block.
    deadline_unix_ms: u64,
}

impl Entry {
    fn committed(&self) -> bool {
        self.deadline_unix_ms == 0
    }
}

/// A committed block, held so that it can be read without the index.
#[derive(Debug, Clone)]
pub(crate) struct Found {
    pub(crate) view: Arc<SegmentView>,
    pub(crate) slot: u32,
    pub(crate) sequence: u64,
    /// In which it was found, epoch included.
    pub(crate) namespace: NamespaceId,
}

#[derive(Debug)]
struct Tracked {
    view: Arc<SegmentView>,
    changes: u64,
    /// Nobody has looked for slots that are marked bad.
    is_new: bool,
    sequences: Vec<u64>,
    /// What each slot stands for in the maps.
    entries: Vec<Option<(u32, BlockKey)>>,
    /// Who owned it when `owner_lives` was found out.
    owner: u64,
    owner_lives: bool,
    owner_checked: Instant,
    /// A lookup has relied on it since then.
    owner_asked: bool,
}

#[derive(Debug)]
struct Table {
    namespace: NamespaceId,
    effective: NamespaceId,
    blocks: KeyMap<Entry>,
}

/// The index of one process over some namespaces of a folder.
#[derive(Debug)]
pub(crate) struct Index {
    tables: Vec<Table>,
    segments: Vec<Option<Tracked>>,
    /// The same key in more than one slot: rare, so kept aside.
    others: KeyMap<Vec<(u32, Entry)>>,
    /// Names that cannot be used; none is tried again.
    rejected: HashSet<u64>,
    complaints: Complaints,
    generation: Option<u64>,
    epoch: u64,
    changes: Option<u64>,
    checked: Option<Instant>,
    listed: Option<Instant>,
    /// Generation of which not every segment could be opened.
    incomplete: Option<u64>,
    /// Somebody is listing the folder now.
    listing: bool,
    /// How many slots had been marked bad when all marks were last looked at.
    bad_slots: u64,
    /// Grows when anything that was found may be gone.
    removals: u64,
}

/// What is left to do of a listing that was taken up, without the lock.
#[derive(Debug)]
pub(crate) struct Taken {
    /// Not needed any more, to be dropped.
    pub(crate) gone: Vec<Arc<SegmentView>>,
    /// To be complained about.
    pub(crate) news: Vec<String>,
}

impl Tracked {
    fn id(&self) -> u64 {
        self.view.header.segment_id
    }
}

/// Remembers how far a chain was found, so that asking again costs what has changed.
#[derive(Debug, Clone, Copy, Default)]
pub struct LookupCursor {
    ready_blocks: usize,
    removals: u64,
}

impl Index {
    pub(crate) fn new(namespaces: &[NamespaceId]) -> Self {
        let table = |&namespace: &NamespaceId| Table {
            namespace,
            effective: namespace.with_epoch(0),
            blocks: KeyMap::default(),
        };
        Index {
            tables: namespaces.iter().map(table).collect(),
            segments: Vec::new(),
            others: KeyMap::default(),
            rejected: HashSet::new(),
            complaints: Complaints::default(),
            generation: None,
            epoch: 0,
            changes: None,
            checked: None,
            listed: None,
            incomplete: None,
            listing: false,
            bad_slots: 0,
            removals: 1,
        }
    }

    /// The namespace under which new blocks are written and found now.
    pub(crate) fn effective(&self, table: usize) -> NamespaceId {
        self.tables[table].effective
    }

    pub(crate) fn segment_count(&self) -> usize {
        self.segments.iter().flatten().count()
    }

    /// Whether segments have come or gone that the index was not told of.
    pub(crate) fn is_behind(&self, directory: &Directory) -> bool {
        let generation = Some(directory.control.generation());
        self.generation != generation && self.incomplete != generation
    }

    /// Takes up what changed in the segments that are known. Costs a few loads when nothing did.
    pub(crate) fn catch_up(&mut self, directory: &Directory) {
        let control = &directory.control;
        let epoch = control.epoch();
        if epoch != self.epoch {
            self.start_epoch(epoch);
        }
        let changes = control.changes();
        let due = self
            .checked
            .is_none_or(|checked| checked.elapsed() > FULL_CHECK_INTERVAL);
        if self.changes == Some(changes) && !due {
            return;
        }
        let bad_slots = control.bad_slots();
        for number in 0..self.segments.len() {
            self.rescan(number as u32, bad_slots != self.bad_slots);
        }
        self.bad_slots = bad_slots;
        self.changes = Some(changes);
        self.checked = Some(Instant::now());
    }

    /// What a listing of the folder needs to know, if one is due; [`take_listing`](Self::take_listing) must follow.
    pub(crate) fn wanted_listing(&mut self, directory: &Directory) -> Option<Wanted> {
        if self.listing {
            return None;
        }
        let generation = directory.control.generation();
        // What could not be opened is tried again now and then, not with every look.
        let pause = if self.incomplete == Some(generation) {
            FULL_CHECK_INTERVAL
        } else {
            FULL_LIST_INTERVAL
        };
        if !self.is_behind(directory) && self.listed.is_some_and(|listed| listed.elapsed() <= pause) {
            return None;
        }
        self.listing = true;
        self.listed = Some(Instant::now());
        let ids = self.segments.iter().flatten().map(Tracked::id);
        Some(Wanted {
            generation,
            known: ids.collect(),
            rejected: self.rejected.clone(),
        })
    }

    /// Takes up a listing.
    pub(crate) fn take_listing(&mut self, listing: Listing) -> Taken {
        self.listing = false;
        self.generation = listing.complete.then_some(listing.generation);
        self.incomplete = (!listing.complete).then_some(listing.generation);
        let mut gone = Vec::new();
        if let Some(linked) = listing.linked {
            for number in 0..self.segments.len() {
                let tracked = self.segments[number].as_ref();
                if tracked.is_some_and(|tracked| !linked.contains(&tracked.id())) {
                    gone.extend(self.drop_segment(number as u32));
                }
            }
            self.rejected.retain(|id| linked.contains(id));
        }
        self.rejected.extend(listing.rejected);
        for (view, owner_lives) in listing.opened {
            self.track(view, owner_lives);
        }
        self.changes = None;
        Taken {
            gone,
            news: self.complaints.news(listing.problems),
        }
    }

    /// Segments of which a lookup needs to know whether their owner lives, and the answer is old.
    pub(crate) fn unsure_owners(&self) -> Vec<Arc<SegmentView>> {
        let unsure = |tracked: &&Tracked| {
            tracked.owner_asked && tracked.owner_checked.elapsed() > OWNER_CHECK_INTERVAL
        };
        let tracked = self.segments.iter().flatten().filter(unsure);
        tracked.map(|tracked| Arc::clone(&tracked.view)).collect()
    }

    pub(crate) fn take_owners(&mut self, views: &[Arc<SegmentView>], answers: Vec<bool>) {
        for (view, owner_lives) in views.iter().zip(answers) {
            let mut tracked = self.segments.iter_mut().flatten();
            if let Some(tracked) = tracked.find(|tracked| Arc::ptr_eq(&tracked.view, view)) {
                tracked.owner_lives = owner_lives;
                tracked.owner_checked = Instant::now();
                tracked.owner_asked = false;
            }
        }
    }

    fn start_epoch(&mut self, epoch: u64) {
        self.epoch = epoch;
        self.forget_all();
        for table in &mut self.tables {
            table.effective = table.namespace.with_epoch(epoch);
        }
    }

    fn forget_all(&mut self) {
        for table in &mut self.tables {
            table.blocks.clear();
        }
        self.others.clear();
        for tracked in self.segments.iter_mut().flatten() {
            tracked.entries.fill(None);
            tracked.sequences.fill(0);
            tracked.changes = u64::MAX;
            tracked.is_new = true;
        }
        self.changes = None;
        self.removals += 1;
    }

    fn track(&mut self, view: Arc<SegmentView>, owner_lives: bool) {
        let slots = view.header.slot_count as usize;
        let tracked = Tracked {
            owner: view.owner(),
            view,
            changes: u64::MAX,
            is_new: true,
            sequences: vec![0; slots],
            entries: vec![None; slots],
            owner_lives,
            owner_checked: Instant::now(),
            owner_asked: false,
        };
        match self.segments.iter_mut().find(|place| place.is_none()) {
            Some(place) => *place = Some(tracked),
            None => self.segments.push(Some(tracked)),
        }
    }

    fn drop_segment(&mut self, number: u32) -> Option<Arc<SegmentView>> {
        let slots = self.segments[number as usize]
            .as_ref()
            .map_or(0, |tracked| tracked.entries.len());
        for slot in 0..slots {
            self.remove(number, slot as u32);
        }
        self.segments[number as usize].take().map(|tracked| tracked.view)
    }

    fn rescan(&mut self, number: u32, has_new_bad: bool) {
        let Some(tracked) = &mut self.segments[number as usize] else {
            return;
        };
        let changes = tracked.view.changes();
        let has_new_bad = has_new_bad || tracked.is_new;
        if changes == tracked.changes && !has_new_bad {
            return;
        }
        tracked.changes = changes;
        tracked.is_new = false;
        let view = Arc::clone(&tracked.view);
        let changed: Vec<(u32, u64)> = (0..view.header.slot_count)
            .filter_map(|slot| {
                let sequence = view.sequence(slot);
                (sequence != tracked.sequences[slot as usize]).then_some((slot, sequence))
            })
            .collect();
        for (slot, sequence) in changed {
            self.take_up(number, &view, slot, sequence);
        }
        if has_new_bad {
            for slot in (0..view.header.slot_count).filter(|&slot| view.is_bad(slot)) {
                if self.entry_of(number, slot).is_some_and(|entry| entry.committed()) {
                    self.remove(number, slot);
                }
            }
        }
    }

    /// Takes up one slot whose sequence word is `sequence` now.
    fn take_up(&mut self, number: u32, view: &SegmentView, slot: u32, sequence: u64) {
        let at = slot as usize;
        if sequence % 2 == 1 {
            // A promised slot that is being filled is still promised.
            let promised = self
                .entry_of(number, slot)
                .is_some_and(|entry| !entry.committed());
            if !promised {
                self.remove(number, slot);
            }
            if let Some(tracked) = &mut self.segments[number as usize] {
                tracked.sequences[at] = sequence;
            }
            return;
        }
        self.remove(number, slot);
        let record = match view.record(slot, sequence) {
            Ok(record) => record,
            // Torn: the writer is at it again, and will count another change when it is done.
            Err(_) => return,
        };
        if let Some(tracked) = &mut self.segments[number as usize] {
            tracked.sequences[at] = sequence;
        }
        let Some(table) = self
            .tables
            .iter()
            .position(|table| table.effective == record.namespace)
        else {
            return;
        };
        let deadline_unix_ms = match record.state {
            SlotState::Free => return,
            SlotState::Reserved => record.deadline_unix_ms.max(1),
            SlotState::Committed => 0,
        };
        let entry = Entry {
            segment: number,
            slot,
            sequence,
            deadline_unix_ms,
        };
        self.insert(table as u32, record.key, entry);
    }

    fn entry_of(&self, number: u32, slot: u32) -> Option<Entry> {
        let (table, key) = self.segments[number as usize].as_ref()?.entries[slot as usize]?;
        let here = |entry: &&Entry| entry.segment == number && entry.slot == slot;
        self.tables[table as usize]
            .blocks
            .get(&key)
            .filter(here)
            .copied()
            .or_else(|| {
                self.others
                    .get(&key)?
                    .iter()
                    .map(|(_, entry)| entry)
                    .find(here)
                    .copied()
            })
    }

    fn insert(&mut self, table: u32, key: BlockKey, entry: Entry) {
        if let Some(tracked) = &mut self.segments[entry.segment as usize] {
            tracked.entries[entry.slot as usize] = Some((table, key));
        }
        let blocks = &mut self.tables[table as usize].blocks;
        match blocks.get_mut(&key) {
            None => {
                blocks.insert(key, entry);
            }
            Some(first) => {
                // A whole block beats a promise; the other is kept for when the first one goes.
                let mut other = entry;
                if entry.committed() && !first.committed() {
                    std::mem::swap(first, &mut other);
                }
                self.others.entry(key).or_default().push((table, other));
            }
        }
    }

    fn remove(&mut self, number: u32, slot: u32) {
        let Some(tracked) = &mut self.segments[number as usize] else {
            return;
        };
        let Some((table, key)) = tracked.entries[slot as usize].take() else {
            return;
        };
        let here = |entry: &Entry| entry.segment == number && entry.slot == slot;
        let mut rest = self.others.remove(&key).unwrap_or_default();
        rest.retain(|(_, entry)| !here(entry));
        let blocks = &mut self.tables[table as usize].blocks;
        if blocks.get(&key).is_some_and(here) {
            blocks.remove(&key);
            self.removals += 1;
            let here = |&(other, _): &(u32, Entry)| other == table;
            // A whole block first: behind a promise nobody would find it.
            let whole = |other: &(u32, Entry)| here(other) && other.1.committed();
            let next = rest.iter().position(whole).or_else(|| rest.iter().position(here));
            if let Some(next) = next {
                let (_, entry) = rest.swap_remove(next);
                self.tables[table as usize].blocks.insert(key, entry);
            }
        }
        if !rest.is_empty() {
            self.others.insert(key, rest);
        }
    }
}

#[cfg(test)]
mod tests;
