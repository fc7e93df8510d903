//! A paged KV cache in host memory, by raw addresses.

use std::any::Any;
use std::marker::PhantomData;
use std::ptr;
use std::sync::Arc;

use kvlane_core::{BlockMap, Device, PagedMemory, Region};

use super::copy::{NOTHING, checksum_run, copy_run};
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

    /// Start and length of one run of one block, for system calls of other crates. They may read and write it while this
    /// cache lives, as its methods do: others may write it too, so it never becomes a reference.
    pub fn run(&self, region: usize, block: u32, run: usize) -> (*mut u8, usize) {
        let place = &self.map.regions()[region];
        let start = self.regions[region]
            .base
            .wrapping_add(place.block_offset_bytes(block));
        let run = &place.runs[run];
        (start.wrapping_add(run.offset_bytes), run.len_bytes)
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
        for ((run, len), next) in self.layer_runs_and_next(region, block) {
            // SAFETY: `run` is valid by the contract of `from_map`. The lengths of the runs add up to that of the
            // target, as checked, and a target never lies in a cache. `from_map` and `with_kernel` checked the kernel.
            unsafe { copy_run(self.kernel, run, place, len, crc.as_deref_mut(), next) };
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
            let behind = place.wrapping_add(len);
            // Behind the layer lies the next one, or at least something that may be prefetched.
            let next = (behind, len);
            // SAFETY: as in `copy_layer_out`, the other way round.
            unsafe { copy_run(self.kernel, place, run, len, crc.as_deref_mut(), next) };
            place = behind;
        }
    }

    /// Appends one block of one region to `crc`.
    pub fn checksum_layer(&self, region: usize, block: u32, crc: &mut LayerCrc) {
        for ((run, len), next) in self.layer_runs_and_next(region, block) {
            // SAFETY: valid by the contract of `from_map`; the kernel is one of this machine's.
            unsafe { checksum_run(self.kernel, run, len, crc, next) };
        }
    }

    /// Each run of one block in one region, and what is read next if the layers are taken one after the other.
    fn layer_runs_and_next(
        &self,
        region: usize,
        block: u32,
    ) -> impl Iterator<Item = ((*mut u8, usize), (*const u8, usize))> + '_ {
        let mut runs = self.layer_runs(region, block).peekable();
        std::iter::from_fn(move || {
            let run = runs.next()?;
            let next = runs.peek().copied().or_else(|| {
                let other = region + 1;
                (other < self.regions.len()).then(|| self.layer_runs(other, block).next())?
            });
            Some((run, next.map_or(NOTHING, |(next, len)| (next.cast_const(), len))))
        })
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

#[cfg(test)]
pub(super) mod tests {
    use kvlane_core::TensorView;
    use proptest::prelude::*;

    use super::*;

    /// Two layers of `(2, blocks, width)` bytes: each block has two runs far from each other. `spare` bytes in front of
    /// the tensor decide its alignment.
    pub(in crate::raw) fn split_cache(blocks: u32, width: usize, spare: usize) -> HostCache {
        let tensor_bytes = 2 * blocks as usize * width;
        HostCache::allocate(&[spare + tensor_bytes, spare + tensor_bytes], |addresses| {
            let views = addresses.iter().enumerate().map(|(layer, address)| TensorView {
                name: format!("layer.{layer}"),
                address: address + spare as u64,
                device: Device::Host,
                element_bytes: 1,
                shape: vec![2, u64::from(blocks), 1, 1, width as u64],
                strides: vec![
                    (blocks as usize * width) as i64,
                    width as i64,
                    width as i64,
                    width as i64,
                    1,
                ],
            });
            BlockMap::from_tensors(views, blocks, Some(1)).unwrap()
        })
    }

    pub(in crate::raw) fn content(seed: usize, len: usize) -> Vec<u8> {
        (0..len)
            .map(|index| (index * 31 + seed * 7 + index / 251) as u8)
            .collect()
    }

    #[test]
    fn each_block_of_each_layer_has_its_own_bytes() {
        for kernel in Kernel::available() {
            let cache = split_cache(5, 4096 + 17, 3).with_kernel(kernel);
            let len = cache.layer_bytes(0);
            assert_eq!(len, 2 * (4096 + 17));
            let places = || (0..2).flat_map(|region| (0..5).map(move |block| (region, block)));
            for (region, block) in places() {
                cache.write_layer(region, block, &content(region * 5 + block as usize, len));
            }
            for (region, block) in places() {
                let mut bytes = vec![0; len];
                cache.read_layer(region, block, &mut bytes);
                assert!(
                    bytes == content(region * 5 + block as usize, len),
                    "{kernel:?}, {region}, {block}"
                );
            }
        }
    }

    #[test]
    fn store_load_and_plain_checksums_of_a_layer_agree() {
        let cache = split_cache(4, 10_000, 1);
        let bytes = content(1, cache.layer_bytes(1));
        let crc = || LayerCrc::new(&[4; 32], 1);
        let (mut expected, mut loaded, mut stored, mut plain) = (crc(), crc(), crc(), crc());
        expected.update(&bytes);
        cache.copy_layer_in(1, 2, bytes.as_slice().into(), Some(&mut loaded));
        let mut back = vec![0; bytes.len()];
        cache.copy_layer_out(1, 2, back.as_mut_slice().into(), Some(&mut stored));
        cache.checksum_layer(1, 2, &mut plain);
        let expected = expected.value();
        assert_eq!([loaded.value(), stored.value(), plain.value()], [expected; 3]);
        assert!(back == bytes);
    }

    #[test]
    #[should_panic(expected = "block 4 of 4")]
    fn a_block_that_does_not_exist_panics() {
        split_cache(4, 64, 0).checksum_layer(0, 4, &mut LayerCrc::new(&[0; 32], 0));
    }

    #[test]
    #[should_panic(expected = "127 bytes for a layer of 128")]
    fn a_wrong_length_panics() {
        split_cache(4, 64, 0).write_layer(0, 0, &[0; 127]);
    }

    #[test]
    #[should_panic(expected = "outside of the buffers")]
    fn a_map_outside_of_the_memory_panics() {
        HostCache::allocate(&[100], |addresses| {
            let view = TensorView {
                name: "layer".to_owned(),
                address: addresses[0],
                device: Device::Host,
                element_bytes: 1,
                shape: vec![4, 4096],
                strides: vec![4096, 1],
            };
            BlockMap::from_tensors([view], 4, None).unwrap()
        });
    }

    #[test]
    fn runs_are_joined_only_where_they_touch() {
        // In memory: first runs of blocks 0 to 7, then their second runs.
        let cache = split_cache(8, 64, 0);
        let mut runs = Runs::new();
        runs.push_layer(&cache, 0, 2);
        runs.push_layer(&cache, 0, 3);
        assert_eq!((runs.iter().count(), runs.len_bytes()), (4, 256));
        runs.clear();
        runs.push_layer(&cache, 0, 7);
        assert_eq!((runs.iter().count(), runs.len_bytes()), (2, 128));

        let dense = HostCache::allocate(&[8 * 64], |addresses| {
            let view = TensorView {
                name: "layer".to_owned(),
                address: addresses[0],
                device: Device::Host,
                element_bytes: 1,
                shape: vec![8, 64],
                strides: vec![64, 1],
            };
            BlockMap::from_tensors([view], 8, None).unwrap()
        });
        let mut runs = Runs::new();
        [2, 3, 4, 0]
            .into_iter()
            .for_each(|block| runs.push_layer(&dense, 0, block));
        let lengths: Vec<usize> = runs.iter().map(|(_, len)| len).collect();
        assert_eq!(lengths, [192, 64]);
    }

    proptest! {
        #[test]
        fn writing_one_block_leaves_all_others_alone(
            blocks in 1_u32..6, width in 1_usize..5_000, spare in 0_usize..70, target: prop::sample::Index,
        ) {
            let cache = split_cache(blocks, width, spare);
            let (target, len) = (target.index(blocks as usize) as u32, cache.layer_bytes(0));
            cache.write_layer(0, target, &vec![0xff; len]);
            for region in 0..2 {
                for block in 0..blocks {
                    let mut bytes = vec![1; len];
                    cache.read_layer(region, block, &mut bytes);
                    let expected = if (region, block) == (0, target) { 0xff } else { 0 };
                    prop_assert!(bytes.iter().all(|&byte| byte == expected));
                }
            }
        }
    }
}
