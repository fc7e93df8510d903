//! A folder in memory and a cache of tiny blocks, for benches in which bookkeeping and not copying is to be seen.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use kvlane_core::{
    BlockKey, BlockMap, Device, KvTransfer, NamespaceId, NamespaceParts, Outcome, StoreRequest, TensorView,
};
use kvlane_fs::{FsOptions, FsTransfer, HostCache};

/// Bytes of a block in one layer.
const LAYER_BYTES: usize = 64;

/// One writer on a folder of its own, removed at the end.
pub struct TinyStore {
    /// Dropped before its folder.
    pub transfer: FsTransfer,
    /// What its blocks are stored under.
    pub namespace: NamespaceId,
    folder: tempfile::TempDir,
}

impl TinyStore {
    /// A store that holds `capacity_bytes`, for stores of at most `cache_blocks` blocks of `layers` layers.
    ///
    /// # Panics
    /// If there is no memory for it.
    pub fn new(capacity_bytes: u64, cache_blocks: u32, layers: usize) -> Self {
        // Everywhere but there the bench would measure a disk.
        let folder = tempfile::tempdir_in("/dev/shm").expect("a folder in memory");
        let namespace = NamespaceParts::new()
            .with("weights", "bench")
            .expect("a new name")
            .id();
        let options = FsOptions::default()
            .with_capacity_bytes(capacity_bytes)
            .with_io_threads(1);
        let cache = cache(cache_blocks, layers);
        let transfer = FsTransfer::open(folder.path(), namespace, cache, &options, true).expect("a store");
        Self {
            transfer,
            namespace,
            folder,
        }
    }

    /// The folder.
    pub fn path(&self) -> PathBuf {
        self.folder.path().to_owned()
    }

    /// Stores blocks under `keys` and waits until they are committed.
    ///
    /// # Panics
    /// If one of them is not.
    pub fn store(&self, keys: &[BlockKey], first_depth: u32) {
        let deadline = Instant::now() + Duration::from_secs(30);
        let job = self
            .transfer
            .begin_store(StoreRequest {
                keys: keys.to_vec(),
                blocks: (0..keys.len() as u32).collect(),
                first_depth,
                deadline,
            })
            .expect("a request in order");
        self.transfer.finish_store(job).expect("the job is known");
        let completion = self.transfer.wait(job, deadline).expect("the job is known");
        let completion = completion.expect("an end before the deadline");
        assert_eq!(completion.outcome, Outcome::Done);
    }
}

/// `count` keys that are all different, and from those of another `seed` too.
pub fn keys(seed: u64, count: usize) -> Vec<BlockKey> {
    (0..count as u64)
        .map(|number| {
            let mut hasher = blake3::Hasher::new();
            hasher.update(&seed.to_le_bytes()).update(&number.to_le_bytes());
            BlockKey(*hasher.finalize().as_bytes())
        })
        .collect()
}

fn cache(blocks: u32, layers: usize) -> HostCache {
    HostCache::allocate(&vec![LAYER_BYTES * blocks as usize; layers], |addresses| {
        let views = addresses.iter().enumerate().map(|(layer, &address)| TensorView {
            name: format!("layer {layer}"),
            address,
            device: Device::Host,
            element_bytes: 1,
            shape: vec![u64::from(blocks), LAYER_BYTES as u64],
            strides: vec![LAYER_BYTES as i64, 1],
        });
        BlockMap::from_tensors(views, blocks, None).expect("the layout is plain")
    })
}
