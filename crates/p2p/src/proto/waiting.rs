//! What waits for a prompt to be offered.

use std::collections::{BTreeSet, HashMap};
use std::time::Instant;

use super::ConnectionId;
use crate::key::TransferKey;

/// A question or transfer of a connection.
pub(super) type WaitId = (ConnectionId, u64);

/// Questions, or wants, by key, by connection and by deadline.
#[derive(Debug)]
pub(super) struct Waiting<T> {
    entries: HashMap<WaitId, Entry<T>>,
    by_key: HashMap<TransferKey, Vec<WaitId>>,
    deadlines: BTreeSet<(Instant, WaitId)>,
}

#[derive(Debug)]
struct Entry<T> {
    key: TransferKey,
    about: T,
    deadline: Instant,
}

impl<T> Default for Waiting<T> {
    fn default() -> Self {
        Self {
            entries: HashMap::new(),
            by_key: HashMap::new(),
            deadlines: BTreeSet::new(),
        }
    }
}

impl<T> Waiting<T> {
    /// How many wait.
    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether this one waits.
    pub(super) fn contains(&self, id: WaitId) -> bool {
        self.entries.contains_key(&id)
    }

    /// Adds one that does not wait yet.
    pub(super) fn add(&mut self, id: WaitId, key: TransferKey, about: T, deadline: Instant) {
        self.by_key.entry(key.clone()).or_default().push(id);
        self.deadlines.insert((deadline, id));
        let entry = Entry { key, about, deadline };
        self.entries.insert(id, entry);
    }

    /// Takes all that wait for a key, with what they are about.
    pub(super) fn take(&mut self, key: &TransferKey) -> Vec<(WaitId, T)> {
        let ids = self.by_key.remove(key).unwrap_or_default();
        let taken = ids.into_iter().filter_map(|id| {
            let entry = self.entries.remove(&id)?;
            self.deadlines.remove(&(entry.deadline, id));
            Some((id, entry.about))
        });
        taken.collect()
    }

    /// Takes all.
    pub(super) fn take_all(&mut self) -> Vec<WaitId> {
        self.by_key.clear();
        self.deadlines.clear();
        self.entries.drain().map(|(id, _)| id).collect()
    }

    /// Takes all whose time is over, with their keys and what they are about.
    pub(super) fn take_late(&mut self, now: Instant) -> Vec<(WaitId, TransferKey, T)> {
        let late: Vec<WaitId> = self
            .deadlines
            .iter()
            .take_while(|(deadline, _)| *deadline <= now)
            .map(|(_, id)| *id)
            .collect();
        let taken = late.into_iter().filter_map(|id| {
            let (key, about) = self.remove(id)?;
            Some((id, key, about))
        });
        taken.collect()
    }

    /// Takes one; `None`: it does not wait.
    pub(super) fn remove(&mut self, id: WaitId) -> Option<(TransferKey, T)> {
        let entry = self.entries.remove(&id)?;
        self.deadlines.remove(&(entry.deadline, id));
        if let Some(waiting) = self.by_key.get_mut(&entry.key) {
            waiting.retain(|other| *other != id);
            if waiting.is_empty() {
                self.by_key.remove(&entry.key);
            }
        }
        Some((entry.key, entry.about))
    }

    /// Forgets those of a connection.
    pub(super) fn remove_of(&mut self, connection: ConnectionId) {
        let ids = self.entries.keys().filter(|(asker, _)| *asker == connection);
        let ids: Vec<WaitId> = ids.copied().collect();
        ids.into_iter().for_each(|id| drop(self.remove(id)));
    }

    /// When the first one's time is over.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|(deadline, _)| *deadline)
    }
}
