//! What a backend supplies to be tested, and what the claims do with it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvlane_core::{
    Availability, BlockKey, BlockMap, Chain, ChainRoot, Completion, JobId, KvTransfer, LoadOrder,
    LoadRequest, NamespaceId, NamespaceParts, Outcome, PagedMemory, StoreRequest,
};

use crate::layouts::{self, Plan, Sizes};

/// Makes places for one backend in one of its modes.
pub trait Factory: Sync {
    /// A new, empty place with room for at least 64 MiB of payload.
    fn place(&self) -> Box<dyn Place>;

    /// A new, empty place as small as the backend can have it, so that filling it is quick.
    fn small_place(&self) -> Box<dyn Place>;
}

/// A place where workers exchange blocks. Dropping it may delete it; the peers are dropped before.
pub trait Place: Send + Sync {
    /// A new worker with an empty cache of the planned form.
    fn peer(&self, namespace: NamespaceId, plan: &Plan) -> Peer;

    /// Upper bound of the payload that the place holds.
    fn capacity_bytes(&self) -> usize;
}

/// One worker: a cache and the backend that moves its blocks.
#[derive(Clone)]
pub struct Peer {
    /// The backend.
    pub backend: Arc<dyn KvTransfer>,
    /// The cache; the claims touch no block of it that a job may be using.
    pub cache: Arc<dyn PagedMemory>,
}

/// No claim waits so long unless it fails.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// A deadline that only a failure reaches.
pub fn far() -> Instant {
    Instant::now() + PATIENCE
}

/// Asks again until the answer is yes, for things that a backend may do in the background.
#[track_caller]
pub fn eventually(what: &str, mut answer: impl FnMut() -> bool) {
    let end = far();
    while !answer() {
        assert!(Instant::now() < end, "never happened: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// The namespace that claims use unless they are about namespaces.
pub fn namespace() -> NamespaceId {
    namespace_of("a model")
}

/// A namespace for a model of that name.
pub fn namespace_of(model: &str) -> NamespaceId {
    NamespaceParts::new().with("model", model).expect("one fact").id()
}

/// The usual layout in the usual size.
pub fn plan() -> Plan {
    layouts::usual(Sizes::SMALL)
}

/// Keys of a chain; another `salt` is another chain.
pub fn keys(salt: &str, count: usize) -> Vec<BlockKey> {
    let root = ChainRoot::new(4)
        .expect("4 tokens are allowed")
        .with_cache_salt(salt);
    let mut chain = Chain::new(&root);
    chain.extend(0..4 * count as u32);
    chain.keys().to_vec()
}

/// The bytes that a block named `key` has in these tests: they depend on key, layer and position.
pub fn content(key: &BlockKey, map: &BlockMap) -> Vec<u8> {
    let mut payload = Vec::with_capacity(map.block_bytes());
    for layer in 0..map.layer_count() {
        let mut state = key.prefix() ^ (layer as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let bytes = map.layer_bytes(layer);
        let words = std::iter::repeat_with(|| {
            // xorshift64*
            state ^= state >> 12;
            state ^= state << 25;
            state ^= state >> 27;
            state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes()
        });
        payload.extend(words.flatten().take(bytes));
    }
    payload
}

impl Peer {
    /// The layout of the cache.
    pub fn map(&self) -> &BlockMap {
        self.cache.map()
    }

    /// One block of all layers.
    pub fn payload(&self, block: u32) -> Vec<u8> {
        let mut payload = vec![0; self.map().block_bytes()];
        let mut rest = payload.as_mut_slice();
        for layer in 0..self.map().layer_count() {
            let (data, behind) = rest.split_at_mut(self.map().layer_bytes(layer));
            self.cache.read_layer(layer, block, data);
            rest = behind;
        }
        payload
    }

    /// Overwrites one block of all layers.
    pub fn set_payload(&self, block: u32, payload: &[u8]) {
        let mut rest = payload;
        for layer in 0..self.map().layer_count() {
            let (data, behind) = rest.split_at(self.map().layer_bytes(layer));
            self.cache.write_layer(layer, block, data);
            rest = behind;
        }
    }

    /// Fills a cache block with what its key stands for.
    pub fn compute(&self, key: &BlockKey, block: u32) {
        self.set_payload(block, &content(key, self.map()));
    }

    /// Whether a cache block holds what its key stands for.
    pub fn holds(&self, key: &BlockKey, block: u32) -> bool {
        self.payload(block) == content(key, self.map())
    }

    /// Starts a store of `keys` from the cache blocks from 0 on, which it fills first.
    pub fn begin(&self, keys: &[BlockKey]) -> JobId {
        let blocks: Vec<u32> = (0..keys.len() as u32).collect();
        for (key, block) in keys.iter().zip(&blocks) {
            self.compute(key, *block);
        }
        self.begin_from(keys, blocks, far())
    }

    /// Starts a store of cache blocks as they are.
    pub fn begin_from(&self, keys: &[BlockKey], blocks: Vec<u32>, deadline: Instant) -> JobId {
        self.backend
            .begin_store(StoreRequest {
                keys: keys.to_vec(),
                blocks,
                first_depth: 0,
                deadline,
            })
            .expect("a store that may begin")
    }

    /// Stores `keys` whole, with the content they stand for, and returns the outcome.
    pub fn store(&self, keys: &[BlockKey]) -> Outcome {
        let job = self.begin(keys);
        self.backend.finish_store(job).expect("the store is open");
        self.outcome(job)
    }

    /// Loads `keys` into cache blocks and returns the outcome.
    pub fn load(&self, keys: &[BlockKey], blocks: &[u32]) -> Outcome {
        let job = self.begin_load(keys, blocks, LoadOrder::BlockMajor);
        self.outcome(job)
    }

    /// Starts a load.
    pub fn begin_load(&self, keys: &[BlockKey], blocks: &[u32], order: LoadOrder) -> JobId {
        self.backend
            .load(LoadRequest {
                keys: keys.to_vec(),
                blocks: blocks.to_vec(),
                deadline: far(),
                order,
            })
            .expect("a load that may begin")
    }

    /// Waits for the end of a job.
    #[track_caller]
    pub fn outcome(&self, job: JobId) -> Outcome {
        let Completion { job: ended, outcome } = self
            .backend
            .wait(job, far())
            .expect("the job is known")
            .expect("the job ends in time");
        assert_eq!(ended, job);
        outcome
    }

    /// Committed leading blocks.
    pub fn ready(&self, chain: &[BlockKey]) -> usize {
        self.backend.lookup(chain).ready_blocks
    }

    /// Both numbers of a lookup.
    pub fn lookup(&self, chain: &[BlockKey]) -> (usize, usize) {
        let Availability {
            ready_blocks,
            pending_blocks,
        } = self.backend.lookup(chain);
        (ready_blocks, pending_blocks)
    }
}
