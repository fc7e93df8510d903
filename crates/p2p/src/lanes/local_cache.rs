//! The cache of this process, wherever it is.

use std::sync::Arc;

use kvlane_core::{BlockMap, PagedMemory};
use kvlane_cuda::DeviceCache;
use kvlane_fs::HostCache;

/// A paged KV cache that lanes read or write.
#[derive(Clone, Debug)]
pub enum LocalCache {
    /// In host memory.
    Host(Arc<HostCache>),
    /// On a CUDA device.
    Device(Arc<DeviceCache>),
}

impl LocalCache {
    /// Its layout.
    pub fn map(&self) -> &BlockMap {
        match self {
            Self::Host(cache) => cache.map(),
            Self::Device(cache) => cache.map(),
        }
    }
}

impl From<Arc<HostCache>> for LocalCache {
    fn from(cache: Arc<HostCache>) -> Self {
        Self::Host(cache)
    }
}

impl From<&Arc<HostCache>> for LocalCache {
    fn from(cache: &Arc<HostCache>) -> Self {
        Self::Host(Arc::clone(cache))
    }
}

impl From<Arc<DeviceCache>> for LocalCache {
    fn from(cache: Arc<DeviceCache>) -> Self {
        Self::Device(cache)
    }
}

impl From<&LocalCache> for LocalCache {
    fn from(cache: &LocalCache) -> Self {
        cache.clone()
    }
}

/// For tests and tools. Panics if a device fails, since the trait has no errors.
impl PagedMemory for LocalCache {
    fn map(&self) -> &BlockMap {
        self.map()
    }

    fn read_layer(&self, region: usize, block: u32, data: &mut [u8]) {
        match self {
            Self::Host(cache) => cache.read_layer(region, block, data),
            Self::Device(cache) => cache.read_layer(region, block, data),
        }
    }

    fn write_layer(&self, region: usize, block: u32, data: &[u8]) {
        match self {
            Self::Host(cache) => cache.write_layer(region, block, data),
            Self::Device(cache) => cache.write_layer(region, block, data),
        }
    }
}
