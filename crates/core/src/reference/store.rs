//! The place that reference backends share.

use std::cmp::Reverse;
use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use crate::chain::BlockKey;
use crate::namespace::NamespaceId;
use crate::transfer::{Availability, StoreRequest};

/// Committed blocks and promises of all namespaces, bounded in bytes.
pub struct MemoryStore {
    capacity_bytes: usize,
    state: Mutex<State>,
}

type Name = (NamespaceId, BlockKey);

#[derive(Default)]
struct State {
    epoch: u64,
    /// Counts uses: one step per store and per load.
    clock: u64,
    used_bytes: usize,
    blocks: HashMap<Name, Stored>,
    promises: HashMap<Name, Vec<Promise>>,
}

struct Stored {
    payload: Arc<[u8]>,
    depth: u32,
    last_use: u64,
}

struct Promise {
    owner: u64,
    deadline: Instant,
}

impl MemoryStore {
    /// An empty store for at most `capacity_bytes` of payload. When it is full, the blocks that were used longest ago go
    /// first, and of those the deepest in their chains.
    pub fn new(capacity_bytes: usize) -> Arc<Self> {
        Arc::new(Self {
            capacity_bytes,
            state: Mutex::default(),
        })
    }

    /// Payload bytes held now.
    pub fn used_bytes(&self) -> usize {
        self.state().used_bytes
    }

    pub(super) fn epoch(&self) -> u64 {
        self.state().epoch
    }

    pub(super) fn contains(&self, namespace: NamespaceId, key: &BlockKey) -> bool {
        self.state().blocks.contains_key(&(namespace, *key))
    }

    pub(super) fn promise(
        &self,
        owner: u64,
        namespace: NamespaceId,
        keys: &[BlockKey],
        block_bytes: usize,
        deadline: Instant,
    ) {
        // More than fits at once cannot be kept.
        let limit = self.capacity_bytes / block_bytes;
        let now = Instant::now();
        let mut state = self.state();
        // Promises of producers that never came back would otherwise stay for ever.
        state.promises.retain(|_, promises| {
            promises.retain(|promise| now < promise.deadline);
            !promises.is_empty()
        });
        for key in keys.iter().take(limit) {
            let name = (namespace, *key);
            if !state.blocks.contains_key(&name) {
                let promises = state.promises.entry(name).or_default();
                promises.retain(|promise| promise.owner != owner);
                promises.push(Promise { owner, deadline });
            }
        }
    }

    pub(super) fn withdraw(&self, owner: u64, namespace: NamespaceId, keys: &[BlockKey]) {
        let mut state = self.state();
        for key in keys {
            if let Some(promises) = state.promises.get_mut(&(namespace, *key)) {
                promises.retain(|promise| promise.owner != owner);
            }
        }
    }

    pub(super) fn withdraw_all(&self, owner: u64) {
        self.state().promises.retain(|_, promises| {
            promises.retain(|promise| promise.owner != owner);
            !promises.is_empty()
        });
    }

    pub(super) fn lookup(&self, namespace: NamespaceId, chain: &[BlockKey]) -> Availability {
        let now = Instant::now();
        let state = self.state();
        let is_ready = |key: &BlockKey| state.blocks.contains_key(&(namespace, *key));
        let is_promised = |key: &BlockKey| {
            let promises = state.promises.get(&(namespace, *key));
            promises.is_some_and(|promises| promises.iter().any(|promise| now < promise.deadline))
        };
        let ready_blocks = chain.iter().take_while(|key| is_ready(key)).count();
        let pending_blocks = chain[ready_blocks..]
            .iter()
            .take_while(|key| is_promised(key) || is_ready(key))
            .count();
        Availability {
            ready_blocks,
            pending_blocks,
        }
    }

    /// Makes a request's blocks visible, head first; `payloads` lacks those that were there already. Returns the
    /// positions that are not in the store afterwards.
    pub(super) fn commit(
        &self,
        owner: u64,
        namespace: NamespaceId,
        epoch: u64,
        request: &StoreRequest,
        payloads: Vec<Option<Vec<u8>>>,
    ) -> Vec<usize> {
        let mut state = self.state();
        if state.epoch != epoch {
            return (0..request.keys.len()).collect();
        }
        state.clock += 1;
        // A request never evicts its own chain.
        let own: HashSet<Name> = request.keys.iter().map(|key| (namespace, *key)).collect();
        let mut missed = Vec::new();
        for (position, payload) in payloads.into_iter().enumerate() {
            let name = (namespace, request.keys[position]);
            let last_use = state.clock;
            if let Some(stored) = state.blocks.get_mut(&name) {
                stored.last_use = last_use;
            } else if let Some(payload) = payload
                && state.make_room(payload.len(), self.capacity_bytes, &own)
            {
                state.used_bytes += payload.len();
                let depth = request.first_depth + position as u32;
                state.blocks.insert(
                    name,
                    Stored {
                        payload: payload.into(),
                        depth,
                        last_use,
                    },
                );
            } else {
                missed.push(position);
                continue;
            }
            if let Some(promises) = state.promises.get_mut(&name) {
                promises.retain(|promise| promise.owner != owner);
            }
        }
        missed
    }

    pub(super) fn fetch(&self, namespace: NamespaceId, keys: &[BlockKey]) -> Vec<Option<Arc<[u8]>>> {
        let mut state = self.state();
        state.clock += 1;
        let last_use = state.clock;
        let mut payload = |key: &BlockKey| {
            let stored = state.blocks.get_mut(&(namespace, *key))?;
            stored.last_use = last_use;
            Some(Arc::clone(&stored.payload))
        };
        keys.iter().map(&mut payload).collect()
    }

    pub(super) fn reset(&self) {
        let mut state = self.state();
        state.epoch += 1;
        state.used_bytes = 0;
        state.blocks.clear();
        state.promises.clear();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Evicts until `bytes` more fit; `false` if that would need blocks of `own`.
    fn make_room(&mut self, bytes: usize, capacity_bytes: usize, own: &HashSet<Name>) -> bool {
        while self.used_bytes + bytes > capacity_bytes {
            let victim = self
                .blocks
                .iter()
                .filter(|(name, _)| !own.contains(*name))
                .min_by_key(|(name, stored)| (stored.last_use, Reverse(stored.depth), **name))
                .map(|(name, _)| *name);
            let Some(stored) = victim.and_then(|name| self.blocks.remove(&name)) else {
                return false;
            };
            self.used_bytes -= stored.payload.len();
        }
        true
    }
}
