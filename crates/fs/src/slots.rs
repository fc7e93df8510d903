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
/// Victims chosen in one pass over all slots, at least.
const VICTIMS_BATCH: usize = 64;
/// Chains whose keys are remembered, so that a request does not evict its own.
const CHAINS_REMEMBERED: usize = 256;

/// Names a slot of an owned segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct SlotRef {
    pub(crate) segment: usize,
    pub(crate) slot: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Slot {
    Free,
    Reserved { key: BlockKey, until: Instant },
    Filling,
    Committed { key: BlockKey, depth: u32 },
    Quarantined { until: Instant },
}

#[derive(Debug)]
struct Owned {
    segment: Arc<OwnedSegment>,
    slots: Vec<Slot>,
}

/// All slots of one writer.
#[derive(Debug, Default)]
pub(crate) struct Slots {
    segments: Vec<Option<Owned>>,
    free: Vec<SlotRef>,
    victims: VecDeque<(SlotRef, u32)>,
    reserved: HashMap<BlockKey, SlotRef>,
    chain_of: HashMap<BlockKey, u64>,
    chains: VecDeque<(u64, Vec<BlockKey>)>,
    next_chain: u64,
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
        for slot in 0..count {
            let sequence = segment.view.sequence(slot);
            let state = if sequence % 2 == 1 {
                Slot::Quarantined {
                    until: now + QUARANTINE,
                }
            } else if sequence == 0 {
                Slot::Free
            } else if let Some((key, depth)) = block_in(&segment, slot, sequence) {
                Slot::Committed { key, depth }
            } else {
                // Free already, a promise of a writer that is gone, or damaged: nobody shall find it.
                segment.clear(slot);
                Slot::Free
            };
            slots.push(state);
        }
        // Popped from the end: the first slots are used first, so that a young segment is filled from its start.
        for slot in (0..count).rev() {
            if slots[slot as usize] == Slot::Free {
                self.free.push(SlotRef {
                    segment: number,
                    slot,
                });
            }
        }
        let owned = Some(Owned { segment, slots });
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
            if let Slot::Reserved { key, .. } = owned.slots[at.slot as usize] {
                self.reserved.remove(&key);
            }
            owned.slots[at.slot as usize] = state;
            match state {
                Slot::Reserved { key, .. } => {
                    self.reserved.insert(key, at);
                }
                Slot::Free => self.free.push(at),
                _ => {}
            }
        }
    }

    /// The slot promised to `key`.
    pub(crate) fn reserved(&self, key: &BlockKey) -> Option<SlotRef> {
        self.reserved.get(key).copied()
    }

    /// Remembers that these keys are one chain.
    pub(crate) fn remember_chain(&mut self, keys: &[BlockKey]) {
        let Some(first) = keys.first() else { return };
        let number = self.chain_of.get(first).copied().unwrap_or(self.next_chain);
        if number == self.next_chain {
            self.next_chain += 1;
            self.chains.push_back((number, Vec::new()));
        }
        for key in keys {
            self.chain_of.insert(*key, number);
        }
        if let Some((_, members)) = self.chains.iter_mut().rev().find(|(chain, _)| *chain == number) {
            members.extend_from_slice(keys);
        }
        while self.chains.len() > CHAINS_REMEMBERED {
            if let Some((gone, members)) = self.chains.pop_front() {
                for key in members {
                    if self.chain_of.get(&key) == Some(&gone) {
                        self.chain_of.remove(&key);
                    }
                }
            }
        }
    }

    /// A slot that holds nothing.
    pub(crate) fn take_free(&mut self) -> Option<SlotRef> {
        while let Some(at) = self.free.pop() {
            let state = self.segments[at.segment]
                .as_ref()
                .map(|owned| owned.slots[at.slot as usize]);
            if state == Some(Slot::Free) {
                return Some(at);
            }
        }
        None
    }

    /// The slot of the block that is needed least: not of the chain that `own` belongs to, not in `spare`.
    pub(crate) fn take_victim(&mut self, own: &BlockKey, spare: &HashSet<BlockKey>) -> Option<SlotRef> {
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
                let chain = self.chain_of.get(&key);
                if spare.contains(&key) || (chain.is_some() && chain == self.chain_of.get(own)) {
                    kept.push((at, mark));
                    continue;
                }
                taken = Some(at);
                break;
            }
            for entry in kept.into_iter().rev() {
                self.victims.push_front(entry);
            }
            if taken.is_some() || attempt == 1 {
                return taken;
            }
            self.choose_victims(own, spare);
        }
        None
    }

    /// Oldest use first, and of those the deepest in its chain: a head serves more prompts than a tail.
    fn choose_victims(&mut self, own: &BlockKey, spare: &HashSet<BlockKey>) {
        let own_chain = self.chain_of.get(own).copied();
        let mut candidates: Vec<(u32, std::cmp::Reverse<u32>, SlotRef)> = Vec::new();
        for (number, owned) in self.segments.iter().enumerate() {
            let Some(owned) = owned else { continue };
            for (slot, state) in owned.slots.iter().enumerate() {
                if let Slot::Committed { key, depth } = state
                    && !spare.contains(key)
                    && (own_chain.is_none() || self.chain_of.get(key).copied() != own_chain)
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

    /// Reservations and quarantines that are over.
    pub(crate) fn overdue(&self, now: Instant) -> Vec<SlotRef> {
        let mut found = Vec::new();
        for (number, owned) in self.segments.iter().enumerate() {
            let Some(owned) = owned else { continue };
            for (slot, state) in owned.slots.iter().enumerate() {
                let (Slot::Reserved { until, .. } | Slot::Quarantined { until }) = state else {
                    continue;
                };
                if *until <= now {
                    found.push(SlotRef {
                        segment: number,
                        slot: slot as u32,
                    });
                }
            }
        }
        found
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
        self.victims.retain(|(at, _)| at.segment != number);
        self.reserved.retain(|_, at| at.segment != number);
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
