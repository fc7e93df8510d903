//! Bookkeeping of the slots that one writer owns: which are free, promised, being filled, and which go first.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvlane_core::BlockKey;

use crate::format::{SlotRecord, SlotState};
use crate::segment::OwnedSegment;

/// A slot that was half written when its segment was adopted stays unused for this long: its old writer may only have
/// been stopped, and may still finish that one copy.
const QUARANTINE: Duration = Duration::from_secs(60);
/// Slots that rest because the file system did not take a block into them. If it takes none at all, the others go on as
/// before: it is not the slots' fault, and nobody's blocks shall be given up for it.
const REFUSED_MAX: usize = 64;
/// Victims chosen in one pass over all slots, at least.
const VICTIMS_BATCH: usize = 64;
/// Chains whose keys are remembered, so that a request does not evict its own.
const CHAINS_REMEMBERED: usize = 256;
/// Keys of all of them together.
const CHAIN_KEYS_REMEMBERED: usize = 1 << 18;

/// Names a slot of an owned segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct SlotRef {
    pub(crate) segment: usize,
    pub(crate) slot: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Slot {
    Free,
    Reserved {
        key: BlockKey,
        until: Instant,
    },
    Filling,
    Committed {
        key: BlockKey,
        depth: u32,
    },
    Quarantined {
        until: Instant,
    },
    /// No block can be written into it any more.
    Spent,
}

#[derive(Debug)]
struct Owned {
    segment: Arc<OwnedSegment>,
    slots: Vec<Slot>,
    /// Which slots had a whole block at some time: where files have no blocks in advance, these have theirs.
    written: Vec<bool>,
}

/// All slots of one writer.
#[derive(Debug, Default)]
pub(crate) struct Slots {
    segments: Vec<Option<Owned>>,
    free: VecDeque<SlotRef>,
    /// Free ones that had a whole block before.
    free_written: VecDeque<SlotRef>,
    victims: VecDeque<(SlotRef, u32)>,
    /// Victims that have no new block yet.
    recycled: HashSet<SlotRef>,
    reserved: HashMap<BlockKey, SlotRef>,
    quarantined: HashSet<SlotRef>,
    /// Of those that rest, the ones to which the file system did not take a block, the first one first.
    refused: VecDeque<SlotRef>,
    chains: Chains,
}

/// The chains that requests have named lately. A key names all blocks in front of it too, so two chains that share a key
/// share their head; but each is a request of its own.
#[derive(Debug, Default)]
struct Chains {
    /// Which of them named a key last.
    latest: HashMap<BlockKey, u64>,
    remembered: VecDeque<Vec<BlockKey>>,
    /// Number of the one in front.
    first: u64,
    key_count: usize,
}

impl Chains {
    fn find(&self, key: &BlockKey) -> Option<&[BlockKey]> {
        let number = self.latest.get(key)? - self.first;
        self.remembered.get(number as usize).map(Vec::as_slice)
    }

    /// All that is known of the chain that `keys` are a part of; remembers what is new of it.
    fn whole(&mut self, keys: &[BlockKey]) -> HashSet<BlockKey> {
        let (Some(first), Some(last)) = (keys.first(), keys.last()) else {
            return HashSet::new();
        };
        // By the last key: a first one may be shared by all requests that begin with the same system prompt.
        if let Some(chain) = self.find(last)
            && let Some(at) = chain.iter().position(|key| key == first)
            && chain[at..].starts_with(keys)
        {
            return chain.iter().copied().collect();
        }
        let head = self.find(first).map_or(&[][..], |chain| {
            let at = chain.iter().position(|key| key == first);
            &chain[..at.unwrap_or(0)]
        });
        let chain = [head, keys].concat();
        let whole = chain.iter().copied().collect();
        let number = self.first + self.remembered.len() as u64;
        for key in &chain {
            self.latest.insert(*key, number);
        }
        self.key_count += chain.len();
        self.remembered.push_back(chain);
        while self.remembered.len() > CHAINS_REMEMBERED
            || (self.key_count > CHAIN_KEYS_REMEMBERED && self.remembered.len() > 1)
        {
            self.forget_first();
        }
        whole
    }

    fn forget_first(&mut self) {
        let Some(chain) = self.remembered.pop_front() else {
            return;
        };
        self.key_count -= chain.len();
        for key in chain {
            if self.latest.get(&key) == Some(&self.first) {
                self.latest.remove(&key);
            }
        }
        self.first += 1;
    }
}

impl Slots {
    /// Takes a segment in; an adopted one brings its blocks along.
    pub(crate) fn add(&mut self, segment: Arc<OwnedSegment>, now: Instant) {
        let number = self
            .segments
            .iter()
            .position(Option::is_none)
            .unwrap_or(self.segments.len());
        let count = segment.header().slot_count;
        let mut slots = Vec::with_capacity(count as usize);
        let mut written = Vec::with_capacity(count as usize);
        for slot in 0..count {
            let sequence = segment.view.sequence(slot);
            let state = if segment.view.is_spent(slot) {
                Slot::Spent
            } else if sequence % 2 == 1 {
                Slot::Quarantined {
                    until: now + QUARANTINE,
                }
            } else if sequence == 0 {
                Slot::Free
            } else if !segment.view.is_bad(slot)
                && let Some((key, depth)) = block_in(&segment, slot, sequence)
            {
                Slot::Committed { key, depth }
            } else {
                // Free already, a promise of a writer that is gone, or damaged: nobody shall find it.
                segment.clear(slot);
                Slot::Free
            };
            written.push(matches!(state, Slot::Committed { .. }));
            slots.push(state);
        }
        for slot in 0..count {
            if matches!(slots[slot as usize], Slot::Quarantined { .. }) {
                self.quarantined.insert(SlotRef {
                    segment: number,
                    slot,
                });
            }
        }
        // Popped from the end: the first slots are used first, so that a young segment is filled from its start.
        for slot in (0..count).rev() {
            if slots[slot as usize] == Slot::Free {
                self.free.push_back(SlotRef {
                    segment: number,
                    slot,
                });
            }
        }
        let owned = Some(Owned {
            segment,
            slots,
            written,
        });
        if number == self.segments.len() {
            self.segments.push(owned);
        } else {
            self.segments[number] = owned;
        }
    }

    pub(crate) fn segment(&self, at: SlotRef) -> Option<&Arc<OwnedSegment>> {
        self.segments[at.segment].as_ref().map(|owned| &owned.segment)
    }

    pub(crate) fn segments(&self) -> impl Iterator<Item = &Arc<OwnedSegment>> {
        self.segments.iter().flatten().map(|owned| &owned.segment)
    }

    pub(crate) fn bytes(&self) -> u64 {
        self.segments().map(|segment| segment.header().file_bytes()).sum()
    }

    pub(crate) fn set(&mut self, at: SlotRef, state: Slot) {
        if let Some(owned) = &mut self.segments[at.segment] {
            match owned.slots[at.slot as usize] {
                Slot::Reserved { key, .. } => drop(self.reserved.remove(&key)),
                Slot::Quarantined { .. } => drop(self.quarantined.remove(&at)),
                _ => {}
            }
            owned.slots[at.slot as usize] = state;
            if !matches!(state, Slot::Reserved { .. } | Slot::Filling) {
                self.recycled.remove(&at);
            }
            match state {
                Slot::Reserved { key, .. } => drop(self.reserved.insert(key, at)),
                Slot::Quarantined { .. } => drop(self.quarantined.insert(at)),
                Slot::Free if owned.written[at.slot as usize] => self.free_written.push_back(at),
                Slot::Free => self.free.push_back(at),
                Slot::Committed { .. } => owned.written[at.slot as usize] = true,
                _ => {}
            }
        }
    }

    /// For a slot into which the file system did not take a block: it rests, or the next store would get it first again.
    pub(crate) fn set_refused(&mut self, at: SlotRef, now: Instant) {
        let mut refused = std::mem::take(&mut self.refused);
        refused.retain(|other| *other != at && self.quarantined.contains(other));
        if let Some(owned) = &mut self.segments[at.segment] {
            owned.written[at.slot as usize] = false;
        }
        if refused.len() < REFUSED_MAX {
            refused.push_back(at);
            let until = now + QUARANTINE;
            self.set(at, Slot::Quarantined { until });
        } else {
            self.set(at, Slot::Free);
            // Behind the other free ones.
            self.free.rotate_right(1);
        }
        self.refused = refused;
    }

    /// Whether a slot has had another block before the one that is on its way there.
    pub(crate) fn is_recycled(&self, at: SlotRef) -> bool {
        self.recycled.contains(&at)
    }

    /// The slot that has rested longest of those into which the file system did not take a block.
    pub(crate) fn take_refused(&mut self) -> Option<SlotRef> {
        while let Some(at) = self.refused.pop_front() {
            if self.quarantined.contains(&at) && !self.put_away_if_spent(at) {
                return Some(at);
            }
        }
        None
    }

    /// The slot promised to `key`.
    pub(crate) fn reserved(&self, key: &BlockKey) -> Option<SlotRef> {
        self.reserved.get(key).copied()
    }

    /// Blocks that a request for `keys` must not evict: all that is known of its own chain.
    pub(crate) fn own_chain(&mut self, keys: &[BlockKey]) -> HashSet<BlockKey> {
        self.chains.whole(keys)
    }

    /// A slot that holds nothing.
    pub(crate) fn take_free(&mut self) -> Option<SlotRef> {
        if let Some(at) = self.take_free_written() {
            return Some(at);
        }
        while let Some(at) = self.free.pop_back() {
            if self.state(at) == Some(Slot::Free) && !self.put_away_if_spent(at) {
                return Some(at);
            }
        }
        None
    }

    /// A slot that holds nothing and had a whole block before, so that even a full file system takes one into it.
    pub(crate) fn take_free_written(&mut self) -> Option<SlotRef> {
        while let Some(at) = self.free_written.pop_back() {
            if self.state(at) == Some(Slot::Free) && !self.put_away_if_spent(at) {
                return Some(at);
            }
        }
        None
    }

    /// A slot that can never be written would be free again at once, and the first one that the next store gets.
    fn put_away_if_spent(&mut self, at: SlotRef) -> bool {
        let Some(owned) = &mut self.segments[at.segment] else {
            return false;
        };
        let is_spent = owned.segment.view.is_spent(at.slot);
        if is_spent {
            self.quarantined.remove(&at);
            tracing::debug!(path = %owned.segment.view.path.display(), at.slot, "a slot has a damaged sequence");
            owned.slots[at.slot as usize] = Slot::Spent;
        }
        is_spent
    }

    /// The slot of the block that is needed least and not in `spare`.
    pub(crate) fn take_victim(&mut self, spare: &HashSet<BlockKey>) -> Option<SlotRef> {
        for attempt in 0..2 {
            let mut kept = Vec::new();
            let mut taken = None;
            while let Some((at, mark)) = self.victims.pop_front() {
                let Some(owned) = &self.segments[at.segment] else {
                    continue;
                };
                let Slot::Committed { key, .. } = owned.slots[at.slot as usize] else {
                    continue;
                };
                if owned.segment.view.mark(at.slot) != mark {
                    continue;
                }
                if spare.contains(&key) {
                    kept.push((at, mark));
                    continue;
                }
                if self.put_away_if_spent(at) {
                    continue;
                }
                self.recycled.insert(at);
                taken = Some(at);
                break;
            }
            for entry in kept.into_iter().rev() {
                self.victims.push_front(entry);
            }
            if taken.is_some() || attempt == 1 {
                return taken;
            }
            self.choose_victims(spare);
        }
        None
    }

    /// Oldest use first, and of those the deepest in its chain: a head serves more prompts than a tail.
    fn choose_victims(&mut self, spare: &HashSet<BlockKey>) {
        let mut candidates: Vec<(u32, std::cmp::Reverse<u32>, SlotRef)> = Vec::new();
        for (number, owned) in self.segments.iter().enumerate() {
            let Some(owned) = owned else { continue };
            for (slot, state) in owned.slots.iter().enumerate() {
                if let Slot::Committed { key, depth } = state
                    && !spare.contains(key)
                {
                    let slot = slot as u32;
                    let at = SlotRef {
                        segment: number,
                        slot,
                    };
                    candidates.push((owned.segment.view.mark(slot), std::cmp::Reverse(*depth), at));
                }
            }
        }
        let wanted = VICTIMS_BATCH.max(candidates.len() / 16).min(candidates.len());
        if wanted == 0 {
            return;
        }
        let order = |candidate: &(u32, std::cmp::Reverse<u32>, SlotRef)| (candidate.0, candidate.1);
        if wanted < candidates.len() {
            candidates.select_nth_unstable_by_key(wanted - 1, order);
            candidates.truncate(wanted);
        }
        candidates.sort_by_key(order);
        self.victims = candidates.into_iter().map(|(mark, _, at)| (at, mark)).collect();
    }

    /// Promises that nobody has kept yet.
    pub(crate) fn promises(&self) -> Vec<SlotRef> {
        self.reserved.values().copied().collect()
    }

    /// What a slot is believed to hold.
    pub(crate) fn state(&self, at: SlotRef) -> Option<Slot> {
        let owned = self.segments[at.segment].as_ref()?;
        Some(owned.slots[at.slot as usize])
    }

    /// Reservations and quarantines that are over. Costs what is promised or rests, not what there is.
    pub(crate) fn overdue(&self, now: Instant) -> Vec<SlotRef> {
        let waiting = self.reserved.values().chain(&self.quarantined);
        let over = |at: &SlotRef| {
            matches!(
                self.state(*at),
                Some(Slot::Reserved { until, .. } | Slot::Quarantined { until }) if until <= now
            )
        };
        waiting.copied().filter(over).collect()
    }

    /// Slots whose block somebody has marked bad. Looks at all of them.
    pub(crate) fn bad(&self) -> Vec<SlotRef> {
        let mut bad = Vec::new();
        for (number, owned) in self.segments.iter().enumerate() {
            let Some(owned) = owned else { continue };
            for (slot, state) in owned.slots.iter().enumerate() {
                let slot = slot as u32;
                if matches!(state, Slot::Committed { .. }) && owned.segment.view.is_bad(slot) {
                    bad.push(SlotRef {
                        segment: number,
                        slot,
                    });
                }
            }
        }
        bad
    }

    /// What became of a slot that was half written at adoption: its old writer, only stopped, may have finished it.
    pub(crate) fn block_in(&self, at: SlotRef) -> Option<(BlockKey, u32)> {
        let segment = self.segment(at)?;
        let sequence = segment.view.sequence(at.slot);
        block_in(segment, at.slot, sequence)
    }

    /// The segment whose blocks were used least lately, if nobody is filling or waiting for it.
    pub(crate) fn coldest(&self) -> Option<usize> {
        let mut coldest: Option<(u32, usize)> = None;
        for (number, owned) in self.segments.iter().enumerate() {
            let Some(owned) = owned else { continue };
            let busy = |slot: &Slot| matches!(slot, Slot::Filling | Slot::Reserved { .. });
            if owned.slots.iter().any(busy) {
                continue;
            }
            let used = (0..owned.slots.len())
                .map(|slot| owned.segment.view.mark(slot as u32))
                .max()
                .unwrap_or(0);
            if coldest.is_none_or(|(other, _)| used < other) {
                coldest = Some((used, number));
            }
        }
        coldest.map(|(_, number)| number)
    }

    /// Lets go of a segment.
    pub(crate) fn remove(&mut self, number: usize) -> Option<Arc<OwnedSegment>> {
        self.free.retain(|at| at.segment != number);
        self.free_written.retain(|at| at.segment != number);
        self.victims.retain(|(at, _)| at.segment != number);
        self.reserved.retain(|_, at| at.segment != number);
        self.quarantined.retain(|at| at.segment != number);
        self.refused.retain(|at| at.segment != number);
        self.recycled.retain(|at| at.segment != number);
        self.segments[number].take().map(|owned| owned.segment)
    }

    /// Segments that another process has taken over from us, and that nobody here is filling.
    pub(crate) fn lost(&self) -> Vec<usize> {
        let lost = |(number, owned): (usize, &Option<Owned>)| {
            let owned = owned.as_ref()?;
            let lost = !owned.segment.is_ours() && !owned.slots.contains(&Slot::Filling);
            lost.then_some(number)
        };
        self.segments.iter().enumerate().filter_map(lost).collect()
    }
}

/// Key and depth of the committed block in a slot.
fn block_in(segment: &OwnedSegment, slot: u32, sequence: u64) -> Option<(BlockKey, u32)> {
    match segment.view.record(slot, sequence) {
        Ok(SlotRecord {
            state: SlotState::Committed,
            key,
            depth,
            ..
        }) => Some((key, depth)),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
