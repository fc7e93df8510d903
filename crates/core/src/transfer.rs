//! The one trait that a connector needs, whatever is behind it.

use std::collections::HashSet;
use std::time::Instant;

use crate::block_map::BlockMap;
use crate::chain::BlockKey;
use crate::error::{Error, Result};

/// Names one store or load until its [`Completion`] has been taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct JobId(pub u64);

/// How many leading blocks of a chain can be had.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Availability {
    /// Leading blocks that are committed now.
    pub ready_blocks: usize,
    /// Blocks right behind those that can be had once live producers keep their promises ("not yet"): each is promised,
    /// or committed behind one that is.
    pub pending_blocks: usize,
}

/// Why a block cannot be had. A miss is not an error: it costs a recompute.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum MissReason {
    /// Nobody has stored it, or it was evicted.
    Absent,
    /// It was recycled for other content while it was being read.
    Recycled,
    /// Its bytes do not match their checksum.
    Corrupt,
    /// The deadline passed first.
    TimedOut,
    /// The caller cancelled.
    Cancelled,
    /// Reading or writing failed; the backend logged the native error.
    Io,
    /// A bound (queue, capacity, memory) was reached, so a store was dropped.
    Dropped,
}

/// How a job ended. Nothing hangs and nothing panics: every job ends in one of these.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Every block was moved and checked.
    Done,
    /// Some blocks were not. The positions are indices into the request's keys, ascending. After a load, the cache
    /// blocks at these positions hold undefined bytes; all others hold exactly what was stored.
    Miss {
        /// Indices into the request's keys.
        positions: Vec<usize>,
        /// The reason of the first of them.
        reason: MissReason,
    },
}

/// A job that has ended. From here on no thread of the backend writes the request's cache blocks. A store that missed may
/// still read them for a moment; what it reads is thrown away.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Completion {
    /// The job.
    pub job: JobId,
    /// How it ended.
    pub outcome: Outcome,
}

/// Blocks to copy out of the paged cache.
#[derive(Clone, Debug)]
pub struct StoreRequest {
    /// Chain hashes of the blocks, consecutive in one chain.
    pub keys: Vec<BlockKey>,
    /// Cache block that holds each key's KV; as long as `keys`.
    pub blocks: Vec<u32>,
    /// Position of the first key in its chain. Eviction takes deep blocks first: a head serves more prompts.
    pub first_depth: u32,
    /// From when on the store counts as failed.
    pub deadline: Instant,
}

impl StoreRequest {
    /// Checks the request against the cache it will read: one block per key, no repeats, every block in the cache.
    /// A backend calls this before it does anything else.
    pub fn check(&self, map: &BlockMap) -> Result<()> {
        check_blocks(&self.keys, &self.blocks, map)?;
        let depths = u32::MAX as usize - self.first_depth as usize;
        if self.keys.len() > depths {
            return Err(refused(
                "keys",
                self.keys.len(),
                format!("at most {depths} from that depth on"),
            ));
        }
        Ok(())
    }
}

/// In which order a load fills the cache.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LoadOrder {
    /// Whole blocks one after the other: best locality in the store.
    #[default]
    BlockMajor,
    /// All blocks of a layer before the next layer, so that computing can start behind [`KvTransfer::wait_layer`].
    LayerMajor,
}

/// Blocks to copy into the paged cache.
#[derive(Clone, Debug)]
pub struct LoadRequest {
    /// Chain hashes of the blocks.
    pub keys: Vec<BlockKey>,
    /// Cache block that receives each key's KV; as long as `keys`, without repeats.
    pub blocks: Vec<u32>,
    /// From when on the load counts as failed. The job may complete a little later: only once no thread can still
    /// write into `blocks`.
    pub deadline: Instant,
    /// Order of copying.
    pub order: LoadOrder,
}

impl LoadRequest {
    /// Checks the request against the cache it will write: one block per key, no repeats, every block in the cache.
    /// A backend calls this before it does anything else.
    pub fn check(&self, map: &BlockMap) -> Result<()> {
        check_blocks(&self.keys, &self.blocks, map)
    }
}

/// Moves KV blocks between one paged cache and a place that other processes can reach.
///
/// A value belongs to one namespace and one cache. All methods may be called from any thread; none of them waits for
/// a file system or a peer except the two named `wait`, which are bounded by a deadline.
///
/// # Stores
/// `begin_store` names blocks whose bytes may not be complete yet. Each `layer_ready` allows the backend to read one
/// layer of the job's blocks; `finish_store` allows the rest. The bytes must not change from the permission to the
/// completion. A block becomes visible to others at once and whole, or never. Storing a key that is present already is
/// done without copying. A dropped store is a `Miss` with [`MissReason::Dropped`].
///
/// # Loads
/// A load starts at once. Blocks are checked against their keys and checksums; what fails is a `Miss` of its position.
///
/// # Completions
/// Each job's completion is delivered exactly once, by `poll` or by `wait`, whichever asks first.
pub trait KvTransfer: Send + Sync {
    /// Promises that the blocks of `chain` will be stored before `deadline`, so that others see "not yet" rather than
    /// "no". Best effort: blocks that find no room are simply not promised. Keys that are present stay as they are.
    fn reserve(&self, chain: &[BlockKey], first_depth: u32, deadline: Instant) -> Result<()>;

    /// Takes back what `reserve` promised and no store has delivered. Unknown keys are ignored.
    fn withdraw(&self, keys: &[BlockKey]) -> Result<()>;

    /// Registers a store; see the trait's section on stores.
    fn begin_store(&self, request: StoreRequest) -> Result<JobId>;

    /// Allows layer `layer` (a region index) of all blocks of `job` to be read from now on.
    fn layer_ready(&self, job: JobId, layer: usize) -> Result<()>;

    /// Allows all layers of `job` to be read from now on. Required for the job to end in `Done`.
    fn finish_store(&self, job: JobId) -> Result<()>;

    /// How many leading blocks of `chain` can be had now.
    fn lookup(&self, chain: &[BlockKey]) -> Availability;

    /// Starts a load; see the trait's section on loads.
    fn load(&self, request: LoadRequest) -> Result<JobId>;

    /// Waits until `layer` of every block of the load `job` is in the cache and checked. `Ok(false)`: the deadline
    /// passed, or the job already has a miss; its completion tells.
    fn wait_layer(&self, job: JobId, layer: usize, deadline: Instant) -> Result<bool>;

    /// Waits for the completion of `job`, at most until `deadline`; `None` if it has not ended by then.
    fn wait(&self, job: JobId, deadline: Instant) -> Result<Option<Completion>>;

    /// Appends all completions not delivered yet. Costs one atomic load when there are none.
    fn poll(&self, done: &mut Vec<Completion>);

    /// Asks for the end of `job`. Its completion still arrives; after a cancelled store none of the blocks that were
    /// not committed before becomes visible. An unknown or ended job is ignored.
    fn cancel(&self, job: JobId);

    /// Starts a new epoch: nothing stored before is found any more, by anyone who shares the place.
    fn reset(&self) -> Result<()>;
}

fn check_blocks(keys: &[BlockKey], blocks: &[u32], map: &BlockMap) -> Result<()> {
    if keys.len() != blocks.len() {
        return Err(refused(
            "blocks",
            format!("{} blocks", blocks.len()),
            format!("{}, one per key", keys.len()),
        ));
    }
    let count = map.block_count();
    if let Some(block) = blocks.iter().find(|&&block| block >= count) {
        return Err(refused(
            "blocks",
            format!("block {block}"),
            format!("below {count}"),
        ));
    }
    let mut seen = vec![0u64; (count as usize).div_ceil(64)];
    for &block in blocks {
        let (word, bit) = (block as usize / 64, 1 << (block % 64));
        if seen[word] & bit != 0 {
            return Err(refused(
                "blocks",
                format!("block {block} twice"),
                "every block once",
            ));
        }
        seen[word] |= bit;
    }
    let mut known = HashSet::with_capacity(keys.len());
    match keys.iter().find(|key| !known.insert(**key)) {
        Some(key) => Err(refused("keys", format!("{key:?} twice"), "every key once")),
        None => Ok(()),
    }
}

fn refused(argument: &'static str, found: impl ToString, allowed: impl Into<String>) -> Error {
    Error::InvalidArgument {
        argument,
        found: found.to_string(),
        allowed: allowed.into(),
    }
}
