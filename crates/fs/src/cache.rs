//! The paged cache of a transfer, wherever its memory is.

use std::sync::Arc;

use kvlane_core::BlockMap;
use kvlane_cuda::{CudaError, DeviceCache};

use crate::raw::HostCache;

/// A paged KV cache in host memory or on a CUDA device.
///
/// Host memory is copied straight to and from the folder. A device's bytes take a second step, through pinned memory:
/// they are checked there, and reach the device only if they are right.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Cache {
    /// Memory that the CPU reads and writes.
    Host(Arc<HostCache>),
    /// Memory of a CUDA device.
    Device(Arc<DeviceCache>),
}

impl Cache {
    /// The layout.
    pub fn map(&self) -> &BlockMap {
        match self {
            Cache::Host(cache) => kvlane_core::PagedMemory::map(cache.as_ref()),
            Cache::Device(cache) => cache.map(),
        }
    }
}

impl From<HostCache> for Cache {
    fn from(cache: HostCache) -> Self {
        Cache::Host(Arc::new(cache))
    }
}

impl From<Arc<HostCache>> for Cache {
    fn from(cache: Arc<HostCache>) -> Self {
        Cache::Host(cache)
    }
}

impl From<DeviceCache> for Cache {
    fn from(cache: DeviceCache) -> Self {
        Cache::Device(Arc::new(cache))
    }
}

impl From<Arc<DeviceCache>> for Cache {
    fn from(cache: Arc<DeviceCache>) -> Self {
        Cache::Device(cache)
    }
}

/// Whether a copy did not happen because its job was over, which is no fault of the device.
pub(crate) fn gave_up(error: &CudaError) -> bool {
    matches!(error, CudaError::TimedOut { .. } | CudaError::Cancelled { .. })
}
