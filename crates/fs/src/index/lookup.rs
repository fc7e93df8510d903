//! What is asked of the index: where a block is, and how far a chain can be had.

use std::sync::Arc;

use kvlane_core::{Availability, BlockKey};

use super::{Entry, Found, Index, LookupCursor};
use crate::directory::unix_ms;

impl Index {
    /// The committed block with this key. [`catch_up`](Self::catch_up) first.
    pub(crate) fn find(&self, table: usize, key: &BlockKey) -> Option<Found> {
        let entry = self.tables[table]
            .blocks
            .get(key)
            .filter(|entry| entry.committed())?;
        let tracked = self.segments[entry.segment as usize].as_ref()?;
        Some(Found {
            view: Arc::clone(&tracked.view),
            slot: entry.slot,
            sequence: entry.sequence,
            namespace: self.tables[table].effective,
        })
    }

    /// Forgets a block that turned out to be bad, until its slot changes.
    pub(crate) fn forget(&mut self, found: &Found) {
        let number = self.segments.iter().position(|tracked| {
            tracked
                .as_ref()
                .is_some_and(|tracked| Arc::ptr_eq(&tracked.view, &found.view))
        });
        let Some(number) = number else { return };
        let same = self
            .entry_of(number as u32, found.slot)
            .is_some_and(|entry| entry.sequence == found.sequence && entry.committed());
        if same {
            self.remove(number as u32, found.slot);
        }
    }

    /// How many leading blocks of `chain` all namespaces have. [`catch_up`](Self::catch_up) first.
    pub(crate) fn availability(&mut self, chain: &[BlockKey], cursor: &mut LookupCursor) -> Availability {
        if self.tables.is_empty() {
            return Availability::default();
        }
        let mut ready = if cursor.removals == self.removals {
            cursor.ready_blocks.min(chain.len())
        } else {
            0
        };
        while ready < chain.len()
            && self
                .tables
                .iter()
                .all(|table| table.blocks.get(&chain[ready]).is_some_and(Entry::committed))
        {
            ready += 1;
        }
        *cursor = LookupCursor {
            ready_blocks: ready,
            removals: self.removals,
        };
        let mut pending = ready;
        if pending < chain.len() {
            let now_ms = unix_ms();
            while pending < chain.len() && self.promised_or_ready(&chain[pending], now_ms) {
                pending += 1;
            }
        }
        Availability {
            ready_blocks: ready,
            pending_blocks: pending - ready,
        }
    }

    fn promised_or_ready(&mut self, key: &BlockKey, now_ms: u64) -> bool {
        for table in 0..self.tables.len() {
            let Some(entry) = self.tables[table].blocks.get(key).copied() else {
                return false;
            };
            if !entry.committed() && !self.is_promised(table, key, entry, now_ms) {
                return false;
            }
        }
        true
    }

    /// Whether `first`, or another slot with the same key, is a promise that counts.
    fn is_promised(&mut self, table: usize, key: &BlockKey, first: Entry, now_ms: u64) -> bool {
        let counts = |index: &mut Self, entry: Entry| {
            entry.deadline_unix_ms >= now_ms && index.owner_lives(entry.segment)
        };
        if counts(self, first) {
            return true;
        }
        let others: Vec<Entry> = self
            .others
            .get(key)
            .into_iter()
            .flatten()
            .filter(|(other, _)| *other as usize == table)
            .map(|(_, entry)| *entry)
            .collect();
        others.into_iter().any(|entry| counts(self, entry))
    }

    /// As far as it is known: who asks is an engine, and the answer a system call.
    fn owner_lives(&mut self, number: u32) -> bool {
        let Some(tracked) = &mut self.segments[number as usize] else {
            return false;
        };
        tracked.owner_asked = true;
        let owner = tracked.view.owner();
        if owner != tracked.owner {
            // Somebody has just taken it over.
            tracked.owner = owner;
            tracked.owner_lives = true;
        }
        tracked.owner_lives
    }

    /// Whether the key is stored, or promised by a writer that lives.
    pub(crate) fn knows(&mut self, table: usize, key: &BlockKey) -> bool {
        let Some(entry) = self.tables[table].blocks.get(key).copied() else {
            return false;
        };
        entry.committed() || self.is_promised(table, key, entry, unix_ms())
    }
}
