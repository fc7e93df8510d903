//! A worker of the filesystem backend whose every answer is checked: blocks are loaded into poisoned cache blocks and
//! compared byte for byte, and calls that must not wait are timed.

use std::fmt;
use std::path::Path;
use std::str::FromStr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvlane_core::{
    Availability, BlockKey, JobId, KvTransfer, LoadOrder, LoadRequest, MissReason, Outcome, StoreRequest,
};
use kvlane_fs::{FsError, FsOptions, FsStats, FsTransfer, HostCache, Medium};

use crate::fixture::{self, Peer};
use crate::layouts::{self, Sizes};

/// Blocks of the cache: the longest chain that can be moved at once.
pub const CACHE_BLOCKS: usize = 64;
/// Bytes that no content has at all positions: what a load leaves alone keeps them.
const POISON: u8 = 0xee;

/// How a worker is opened. Written and read as words `name=value`, so that it can be handed to a process.
#[derive(Clone, Debug)]
pub struct Setup {
    /// The way of the bytes.
    pub medium: Medium,
    /// Capacity of the folder; `None` is the default.
    pub capacity_bytes: Option<u64>,
    /// Size of a segment; `None` is the default.
    pub segment_bytes: Option<u64>,
    /// Whether it may store.
    pub can_store: bool,
    /// Payload of a block, a multiple of 64 bytes per layer.
    pub block_bytes: u64,
    /// Layers of a block.
    pub layers: u64,
    /// Whether lookups and loads wait for a listing of the folder however slow it is: for tests of what is found.
    pub waits_for_listings: bool,
}

impl Default for Setup {
    fn default() -> Self {
        Setup {
            medium: Medium::Auto,
            capacity_bytes: Some(4 << 20),
            segment_bytes: Some(1 << 20),
            can_store: true,
            block_bytes: 64 << 10,
            layers: 4,
            waits_for_listings: false,
        }
    }
}

impl Setup {
    /// The same folder, for loading only.
    #[must_use]
    pub fn reader(&self) -> Self {
        Setup {
            can_store: false,
            ..self.clone()
        }
    }

    fn options(&self) -> FsOptions {
        let mut options = FsOptions::default().with_medium(self.medium).with_io_threads(2);
        options.capacity_bytes = self.capacity_bytes;
        options.segment_bytes = self.segment_bytes;
        options.listing_patience = self.waits_for_listings.then_some(fixture::PATIENCE);
        options
    }
}

impl fmt::Display for Setup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let number = |value: Option<u64>| value.map_or("none".to_owned(), |value| value.to_string());
        write!(
            f,
            "medium={:?} capacity={} segment={} store={} block={} layers={} waits={}",
            self.medium,
            number(self.capacity_bytes),
            number(self.segment_bytes),
            self.can_store,
            self.block_bytes,
            self.layers,
            self.waits_for_listings
        )
    }
}

impl FromStr for Setup {
    type Err = String;

    fn from_str(words: &str) -> Result<Self, String> {
        let mut setup = Setup::default();
        for word in words.split_whitespace() {
            let wrong = || format!("{word} is not an option");
            let (name, value) = word.split_once('=').ok_or_else(wrong)?;
            let number = || value.parse::<u64>().map_err(|_| wrong());
            match (name, value) {
                ("medium", "Memory") => setup.medium = Medium::Memory,
                ("medium", "Disk") => setup.medium = Medium::Disk,
                ("medium", "Network") => setup.medium = Medium::Network,
                ("medium", _) => setup.medium = Medium::Auto,
                ("capacity", "none") => setup.capacity_bytes = None,
                ("capacity", _) => setup.capacity_bytes = Some(number()?),
                ("segment", "none") => setup.segment_bytes = None,
                ("segment", _) => setup.segment_bytes = Some(number()?),
                ("store", _) => setup.can_store = value == "true",
                ("block", _) => setup.block_bytes = number()?,
                ("layers", _) => setup.layers = number()?,
                ("waits", _) => setup.waits_for_listings = value == "true",
                _ => return Err(wrong()),
            }
        }
        Ok(setup)
    }
}

/// What a load brought.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loaded {
    /// Positions that were not loaded; all others hold the right bytes.
    pub missed: Vec<usize>,
    /// Why the first of them was not.
    pub reason: Option<MissReason>,
}

/// One transfer with its cache.
pub struct Worker {
    peer: Peer,
    transfer: Arc<FsTransfer>,
    slowest: std::sync::Mutex<Duration>,
}

impl Worker {
    /// Opens `folder`.
    pub fn open(folder: &Path, setup: &Setup) -> Result<Self, FsError> {
        let tokens = setup.block_bytes / (setup.layers * 64);
        let sizes = Sizes {
            blocks: CACHE_BLOCKS as u64,
            tokens,
            layers: setup.layers,
            ..Sizes::SMALL
        };
        let plan = layouts::usual(sizes);
        let cache = Arc::new(HostCache::allocate(&[plan.storage_bytes], |addresses| {
            plan.map(addresses[0])
        }));
        let options = setup.options();
        let transfer = FsTransfer::open(
            folder,
            fixture::namespace(),
            Arc::clone(&cache),
            &options,
            setup.can_store,
        )?;
        let transfer = Arc::new(transfer);
        let peer = Peer {
            backend: Arc::clone(&transfer) as Arc<dyn KvTransfer>,
            cache,
        };
        Ok(Worker {
            peer,
            transfer,
            slowest: std::sync::Mutex::default(),
        })
    }

    /// Stores the chain named `salt`, whole.
    pub fn store(&self, salt: &str, count: usize, patience: Duration) -> Outcome {
        self.prepare(salt, count, 0);
        self.store_prepared(salt, count, 0, patience)
    }

    /// Fills the cache blocks from `first` on with what the chain named `salt` stands for.
    pub fn prepare(&self, salt: &str, count: usize, first: u32) {
        for (block, key) in (first..).zip(&fixture::keys(salt, count)) {
            self.peer.compute(key, block);
        }
    }

    /// Stores a chain whose content is in the cache blocks from `first` on.
    pub fn store_prepared(&self, salt: &str, count: usize, first: u32, patience: Duration) -> Outcome {
        let job = self.begin_store(salt, count, first, patience);
        self.timed(|| self.transfer.finish_store(job))
            .expect("the store is known");
        self.outcome(job, patience)
    }

    /// Begins a store of the cache blocks from `first` on and leaves it.
    pub fn begin_store(&self, salt: &str, count: usize, first: u32, patience: Duration) -> JobId {
        let request = StoreRequest {
            keys: fixture::keys(salt, count),
            blocks: (first..first + count as u32).collect(),
            first_depth: 0,
            deadline: Instant::now() + patience,
        };
        self.timed(|| self.transfer.begin_store(request))
            .expect("a store may begin")
    }

    /// Loads the chain named `salt` and compares what came.
    ///
    /// # Panics
    /// If a byte is wrong, or the load does not end.
    pub fn load(&self, salt: &str, count: usize, patience: Duration) -> Loaded {
        let keys = fixture::keys(salt, count);
        let poison = vec![POISON; self.peer.map().block_bytes()];
        for block in 0..count as u32 {
            self.peer.set_payload(block, &poison);
        }
        let request = LoadRequest {
            keys: keys.clone(),
            blocks: (0..count as u32).collect(),
            deadline: Instant::now() + patience,
            order: if count.is_multiple_of(2) {
                LoadOrder::BlockMajor
            } else {
                LoadOrder::LayerMajor
            },
        };
        let job = self
            .timed(|| self.transfer.load(request))
            .expect("a load may begin");
        let loaded = match self.outcome(job, patience) {
            Outcome::Done => Loaded {
                missed: Vec::new(),
                reason: None,
            },
            Outcome::Miss { positions, reason } => Loaded {
                missed: positions,
                reason: Some(reason),
            },
        };
        for (position, key) in keys.iter().enumerate() {
            if !loaded.missed.contains(&position) {
                assert!(
                    self.peer.holds(key, position as u32),
                    "WRONG BYTES: block {position} of chain {salt} was loaded with bytes that it never had"
                );
            }
        }
        loaded
    }

    /// Promises the chain named `salt`.
    pub fn reserve(&self, salt: &str, count: usize, lasts: Duration) {
        let keys = fixture::keys(salt, count);
        self.timed(|| self.transfer.reserve(&keys, 0, Instant::now() + lasts))
            .expect("a promise may be made");
    }

    /// Takes the promise back.
    pub fn withdraw(&self, salt: &str, count: usize) {
        let keys = fixture::keys(salt, count);
        self.timed(|| self.transfer.withdraw(&keys))
            .expect("a promise may be withdrawn");
    }

    /// How much of the chain named `salt` can be had.
    pub fn lookup(&self, salt: &str, count: usize) -> Availability {
        let keys: Vec<BlockKey> = fixture::keys(salt, count);
        self.timed(|| self.transfer.lookup(&keys))
    }

    /// Starts a new epoch.
    pub fn reset(&self) -> kvlane_core::Result<()> {
        self.timed(|| self.transfer.reset())
    }

    /// Ends the transfer.
    pub fn close(&self) {
        self.timed(|| self.transfer.close());
    }

    /// Totals.
    pub fn stats(&self) -> FsStats {
        self.transfer.stats()
    }

    /// The longest that a call took which must not wait; starts anew.
    pub fn slowest(&self) -> Duration {
        std::mem::take(&mut self.slowest.lock().expect("no call panicked"))
    }

    fn outcome(&self, job: JobId, patience: Duration) -> Outcome {
        // A job may end a little behind its deadline; what takes longer hangs.
        let bound = Instant::now() + patience + Duration::from_secs(5);
        let completion = self.transfer.wait(job, bound).expect("the job is known");
        completion
            .unwrap_or_else(|| panic!("job {job:?} did not end: the backend hangs"))
            .outcome
    }

    fn timed<R>(&self, call: impl FnOnce() -> R) -> R {
        let started = Instant::now();
        let result = call();
        let mut slowest = self.slowest.lock().expect("no call panicked");
        *slowest = slowest.max(started.elapsed());
        result
    }
}
