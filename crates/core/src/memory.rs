//! The paged KV cache as a backend sees it.

use crate::block_map::BlockMap;

/// Where the bytes of a region live.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Device {
    /// Memory of this process that the CPU reads and writes.
    Host,
    /// Memory of the CUDA device with this ordinal.
    Cuda(u32),
}

/// A paged KV cache: regions of blocks whose byte runs a [`BlockMap`] describes.
///
/// `data` holds the runs of one block in one region, one after the other in the order of the map, and must have
/// exactly [`BlockMap::layer_bytes`] bytes. Implementations panic on a block or region that the map does not have:
/// callers check requests against the map before they get here.
pub trait PagedMemory: Send + Sync {
    /// The layout of this cache.
    fn map(&self) -> &BlockMap;
    /// Copies one block of one region out of the cache.
    fn read_layer(&self, region: usize, block: u32, data: &mut [u8]);
    /// Copies one block of one region into the cache.
    fn write_layer(&self, region: usize, block: u32, data: &[u8]);
}
