//! A paged KV cache in host memory, by raw addresses.

use std::any::Any;
use std::marker::PhantomData;
use std::ptr;
use std::sync::Arc;

use kvlane_core::{BlockMap, Device, PagedMemory};

use super::copy::{checksum_run, copy_run};
use super::{AlignedBuffer, ByteSource, ByteTarget, Kernel, LayerCrc};

/// A paged KV cache whose regions are host memory.
///
/// A method that names a block or a region that the map does not have panics, and so does one whose other end has
/// another length than [`layer_bytes`](Self::layer_bytes).
pub struct HostCache {
    map: BlockMap,
    regions: Vec<HostRegion>,
    kernel: Kernel,
    /// Keeps the memory valid.
    _owner: Arc<dyn Any + Send + Sync>,
}

/// A region in the form that copying needs: native pointer sizes, adjacent runs joined.
struct HostRegion {
    base: *mut u8,
    block_stride_bytes: usize,
    runs: Vec<(usize, usize)>,
    block_count: u32,
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
    /// If a region is not host memory or reaches beyond the address space.
    pub unsafe fn from_map(map: BlockMap, owner: Arc<dyn Any + Send + Sync>) -> Self {
        let regions = map.regions().iter().map(HostRegion::new).collect();
        Self { map, regions, kernel: Kernel::best(), _owner: owner }
    }

    /// A cache with memory of its own, zeroed: one buffer for each of `buffer_bytes`. `build` gets their addresses and
    /// returns the map.
    ///
    /// # Panics
    /// If the map has bytes outside of the buffers.
    pub fn allocate(buffer_bytes: &[usize], build: impl FnOnce(&[u64]) -> BlockMap) -> Self {
        let buffers: Vec<AlignedBuffer> = buffer_bytes.iter().map(|&bytes| AlignedBuffer::new(bytes)).collect();
        let addresses: Vec<u64> =
            buffers.iter().map(|buffer| buffer.as_ptr().expose_provenance() as u64).collect();
        let map = build(&addresses);
        for region in map.regions().iter().map(HostRegion::new) {
            let inside = buffers.iter().any(|buffer| {
                let start = buffer.as_ptr().addr();
                region.base.addr() >= start && region.end() <= start + buffer.len()
            });
            assert!(inside, "a region lies outside of the buffers");
        }
        // SAFETY: every block lies inside a buffer, as just checked; the owner keeps the buffers and nobody borrows them.
        unsafe { Self::from_map(map, Arc::new(buffers)) }
    }

    /// The same cache, copied with another kernel.
    ///
    /// # Panics
    /// If this machine cannot run it.
    pub fn with_kernel(mut self, kernel: Kernel) -> Self {
        assert!(Kernel::available().contains(&kernel), "this machine cannot run the copy kernel {kernel:?}");
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
    pub fn copy_layer_out(&self, region: usize, block: u32, target: ByteTarget<'_>, crc: Option<&mut LayerCrc>) {
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
    pub fn copy_layer_in(&self, region: usize, block: u32, source: ByteSource<'_>, crc: Option<&mut LayerCrc>) {
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
            // SAFETY: valid by the contract of `from_map`.
            unsafe { checksum_run(run, len, crc) };
        }
    }

    /// Start and length of each run of one block in one region, in order.
    fn layer_runs(&self, region: usize, block: u32) -> impl Iterator<Item = (*mut u8, usize)> + '_ {
        let region = &self.regions[region];
        assert!(block < region.block_count, "block {block} of a cache of {} blocks", region.block_count);
        // No overflow: `HostRegion::new` checked the end of the last block.
        let start = region.base.wrapping_add(block as usize * region.block_stride_bytes);
        region.runs.iter().map(move |&(offset, len)| (start.wrapping_add(offset), len))
    }

    fn check_length(&self, region: usize, len: usize) {
        let expected = self.layer_bytes(region);
        assert!(len == expected, "{len} bytes for a layer of {expected} bytes in region {region}");
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
        formatter.debug_struct("HostCache").field("regions", &self.regions.len()).finish_non_exhaustive()
    }
}

impl HostRegion {
    fn new(region: &kvlane_core::Region) -> Self {
        assert!(region.device == Device::Host, "a region on {:?} is not host memory", region.device);
        let native = |bytes: u64| usize::try_from(bytes).expect("a region lies in the address space");
        let mut runs: Vec<(usize, usize)> = Vec::new();
        for run in &region.runs {
            let (offset, len) = (native(run.offset_bytes), native(run.len_bytes));
            match runs.last_mut() {
                Some((last_offset, last_len)) if *last_offset + *last_len == offset => *last_len += len,
                _ => runs.push((offset, len)),
            }
        }
        let region = Self {
            base: ptr::with_exposed_provenance_mut(native(region.address)),
            block_stride_bytes: native(region.block_stride_bytes),
            layer_bytes: runs.iter().map(|&(_, len)| len).sum(),
            runs,
            block_count: region.block_count,
        };
        region.end();
        region
    }

    /// First address behind the last block; panics if it is none.
    fn end(&self) -> usize {
        let reach = self.runs.iter().map(|&(offset, len)| offset.checked_add(len)).max().unwrap_or(Some(0));
        reach
            .and_then(|reach| {
                let last = (self.block_count.saturating_sub(1) as usize).checked_mul(self.block_stride_bytes)?;
                self.base.addr().checked_add(last)?.checked_add(reach)
            })
            .expect("a region ends inside the address space")
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
