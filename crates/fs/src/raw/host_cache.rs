//! A paged KV cache in host memory, by raw addresses.

use std::any::Any;
use std::marker::PhantomData;
use std::ptr;
use std::sync::Arc;

use kvlane_core::{BlockMap, Device, PagedMemory, Region};

use super::copy::{checksum_run, copy_run};
use super::{AlignedBuffer, ByteSource, ByteTarget, Kernel, LayerCrc};

/// A paged KV cache whose regions are host memory.
///
/// A method that names a block or a region that the map does not have panics, and so does one whose other end has
/// another length than [`layer_bytes`](Self::layer_bytes).
pub struct HostCache {
    map: BlockMap,
    /// Of each region of the map.
    regions: Vec<Place>,
    kernel: Kernel,
    /// Keeps the memory valid.
    _owner: Arc<dyn Any + Send + Sync>,
}

struct Place {
    base: *mut u8,
    layer_bytes: usize,
}

// SAFETY: the addresses are valid in every thread while the owner lives, which is itself `Send` and `Sync`. Methods only
// copy bytes; who may touch which block when is agreed outside, see `from_map`.
unsafe impl Send for HostCache {}
// SAFETY: as above.
unsafe impl Sync for HostCache {}

impl HostCache {
    /// Takes a cache that belongs to the embedding program.
    ///
    /// # Safety
    /// - All blocks of all regions of `map` are memory of this process, valid for reads and writes while `owner` lives.
    /// - No Rust reference to any of those bytes is used while a method of this value runs on the same block.
    ///
    /// Other threads of the program may write blocks while they are copied: that touches only bytes, and what was copied
    /// is then a mix, whose checksum is right for the mix. A program that wants to get back what it stored does not
    /// write a block before its store has completed.
    ///
    /// # Panics
    /// If a region is not host memory.
    pub unsafe fn from_map(map: BlockMap, owner: Arc<dyn Any + Send + Sync>) -> Self {
        let place = |region: &Region| {
            assert!(
                region.device == Device::Host,
                "a region on {:?} is not host memory",
                region.device
            );
            let address = usize::try_from(region.address).expect("a host address fits the address space");
            Place {
                base: ptr::with_exposed_provenance_mut(address),
                layer_bytes: region.layer_bytes(),
            }
        };
        let regions = map.regions().iter().map(place).collect();
        Self {
            map,
            regions,
            kernel: Kernel::best(),
            _owner: owner,
        }
    }

    /// A cache with memory of its own, zeroed: one page-aligned buffer for each of `buffer_bytes`. `build` gets their
    /// addresses and returns the map.
    ///
    /// # Panics
    /// If the map has bytes outside of the buffers.
    pub fn allocate(buffer_bytes: &[usize], build: impl FnOnce(&[u64]) -> BlockMap) -> Self {
        let buffers: Vec<AlignedBuffer> = buffer_bytes
            .iter()
            .map(|&bytes| AlignedBuffer::new(bytes))
            .collect();
        let addresses: Vec<u64> = buffers.iter().map(AlignedBuffer::address).collect();
        let map = build(&addresses);
        for region in map.regions() {
            let is_inside = buffers.iter().any(|buffer| {
                let start = region.address.checked_sub(buffer.address());
                start.is_some_and(|start| start + region.extent_bytes as u64 <= buffer.len() as u64)
            });
            assert!(
                is_inside,
                "the region of {:?} lies outside of the buffers",
                region.names
            );
        }
        // SAFETY: every block lies inside a buffer, as just checked; the owner keeps the buffers and nobody borrows them.
        unsafe { Self::from_map(map, Arc::new(buffers)) }
    }

    /// The same cache, copied with another kernel.
    ///
    /// # Panics
    /// If this machine cannot run it.
    pub fn with_kernel(mut self, kernel: Kernel) -> Self {
        assert!(
            Kernel::available().contains(&kernel),
            "this machine cannot run the copy kernel {kernel:?}"
        );
        self.kernel = kernel;
        self
    }

    /// Bytes of one block in `region`.
    pub fn layer_bytes(&self, region: usize) -> usize {
        self.regions[region].layer_bytes
    }

    /// Copies one block of one region to `target` and appends it to `crc`, if one is given. [`store_fence`] must come
    /// before the target is published.
    ///
    /// [`store_fence`]: super::store_fence
    pub fn copy_layer_out(
        &self,
        region: usize,
        block: u32,
        target: ByteTarget<'_>,
        crc: Option<&mut LayerCrc>,
    ) {
        self.check_length(region, target.len());
        let mut crc = crc;
        let mut place = target.pointer();
        for (run, len) in self.layer_runs(region, block) {
            // SAFETY: `run` is valid by the contract of `from_map`. The lengths of the runs add up to that of the
            // target, as checked, and a target never lies in a cache. `from_map` and `with_kernel` checked the kernel.
            unsafe { copy_run(self.kernel, run, place, len, crc.as_deref_mut()) };
            place = place.wrapping_add(len);
        }
    }

    /// Copies `source` into one block of one region and appends the bytes to `crc`, if one is given. The bytes are in
    /// the cache whatever the checksum turns out to be: who finds it wrong reports the block.
    pub fn copy_layer_in(
        &self,
        region: usize,
        block: u32,
        source: ByteSource<'_>,
        crc: Option<&mut LayerCrc>,
    ) {
        self.check_length(region, source.len());
        let mut crc = crc;
        let mut place = source.pointer();
        for (run, len) in self.layer_runs(region, block) {
            // SAFETY: as in `copy_layer_out`, the other way round.
            unsafe { copy_run(self.kernel, place, run, len, crc.as_deref_mut()) };
            place = place.wrapping_add(len);
        }
    }

    /// Appends one block of one region to `crc`.
    pub fn checksum_layer(&self, region: usize, block: u32, crc: &mut LayerCrc) {
        for (run, len) in self.layer_runs(region, block) {
            // SAFETY: valid by the contract of `from_map`; the kernel is one of this machine's.
            unsafe { checksum_run(self.kernel, run, len, crc) };
        }
    }

    /// Start and length of each run of one block in one region, in order.
    fn layer_runs(&self, region: usize, block: u32) -> impl Iterator<Item = (*mut u8, usize)> + '_ {
        let place = &self.map.regions()[region];
        // The map vouches for all runs of all its blocks lying inside the region; it panics on other blocks.
        let start = self.regions[region]
            .base
            .wrapping_add(place.block_offset_bytes(block));
        place
            .runs
            .iter()
            .map(move |run| (start.wrapping_add(run.offset_bytes), run.len_bytes))
    }

    fn check_length(&self, region: usize, len: usize) {
        let expected = self.layer_bytes(region);
        assert!(
            len == expected,
            "{len} bytes for a layer of {expected} bytes in region {region}"
        );
    }
}

impl PagedMemory for HostCache {
    fn map(&self) -> &BlockMap {
        &self.map
    }

    fn read_layer(&self, region: usize, block: u32, data: &mut [u8]) {
        self.copy_layer_out(region, block, data.into(), None);
        super::store_fence();
    }

    fn write_layer(&self, region: usize, block: u32, data: &[u8]) {
        self.copy_layer_in(region, block, data.into(), None);
        super::store_fence();
    }
}

impl std::fmt::Debug for HostCache {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("HostCache")
            .field("regions", &self.regions.len())
            .finish_non_exhaustive()
    }
}

/// Runs of several layers, one after the other, as one vectored read or write takes them.
#[derive(Debug, Default)]
pub struct Runs<'a> {
    ranges: Vec<(*mut u8, usize)>,
    len_bytes: usize,
    cache: PhantomData<&'a HostCache>,
}

// SAFETY: the ranges are those of a borrowed `HostCache`, which is `Sync`.
unsafe impl Send for Runs<'_> {}

impl<'a> Runs<'a> {
    /// No runs yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends the runs of one block in one region; joins what is adjacent in memory.
    pub fn push_layer(&mut self, cache: &'a HostCache, region: usize, block: u32) {
        for (start, len) in cache.layer_runs(region, block) {
            self.len_bytes += len;
            match self.ranges.last_mut() {
                Some((last, last_len)) if last.wrapping_add(*last_len) == start => *last_len += len,
                _ => self.ranges.push((start, len)),
            }
        }
    }

    /// Forgets the runs, keeps the memory for their list.
    pub fn clear(&mut self) {
        self.ranges.clear();
        self.len_bytes = 0;
    }

    /// Bytes of all runs.
    pub fn len_bytes(&self) -> usize {
        self.len_bytes
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (*mut u8, usize)> + '_ {
        self.ranges.iter().copied()
    }
}
