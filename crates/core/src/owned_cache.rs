//! A paged cache in ordinary memory of this process, for tests, examples and the reference backend.

use std::sync::{PoisonError, RwLock};

use crate::block_map::{BlockMap, Region};
use crate::memory::PagedMemory;

/// Memory for every region of a [`BlockMap`], whatever its layout.
///
/// The map's addresses are only names here: regions whose ranges overlap share one buffer, as layers do that are packed
/// into one allocation, so a copy that strays into a neighbour is seen. Locks keep readers and writers of different
/// threads apart without unsafe code; a real cache has none.
#[derive(Debug)]
pub struct OwnedCache {
    map: BlockMap,
    /// Ascending by address, without overlap per device.
    buffers: Vec<Buffer>,
    /// The buffer of every region.
    places: Vec<usize>,
}

#[derive(Debug)]
struct Buffer {
    address: u64,
    bytes: RwLock<Vec<u8>>,
}

impl OwnedCache {
    /// A cache of zeroes.
    pub fn new(map: BlockMap) -> Self {
        let regions = map.regions();
        let mut by_address: Vec<usize> = (0..regions.len()).collect();
        by_address.sort_by_key(|&region| (device_number(&regions[region]), regions[region].address));

        let mut buffers: Vec<Buffer> = Vec::new();
        let mut places = vec![0; regions.len()];
        let mut open: Option<(u64, u64, u64)> = None;
        for region in by_address {
            let (device, start) = (device_number(&regions[region]), regions[region].address);
            let end = start + regions[region].extent_bytes as u64;
            open = match open {
                Some((same, first, reach)) if same == device && start < reach => {
                    Some((same, first, reach.max(end)))
                }
                _ => {
                    buffers.push(Buffer {
                        address: start,
                        bytes: RwLock::default(),
                    });
                    Some((device, start, end))
                }
            };
            if let (Some((_, first, reach)), Some(buffer)) = (open, buffers.last_mut()) {
                buffer.bytes = RwLock::new(vec![0; (reach - first) as usize]);
            }
            places[region] = buffers.len() - 1;
        }
        Self { map, buffers, places }
    }

    /// One block of one region, its runs one after the other.
    pub fn layer(&self, region: usize, block: u32) -> Vec<u8> {
        let mut data = vec![0; self.map.layer_bytes(region)];
        self.read_layer(region, block, &mut data);
        data
    }

    /// One block of all regions, in the order of the map.
    pub fn payload(&self, block: u32) -> Vec<u8> {
        (0..self.map.layer_count())
            .flat_map(|region| self.layer(region, block))
            .collect()
    }

    /// Writes one block of all regions from what [`payload`](Self::payload) returns.
    pub fn set_payload(&self, block: u32, payload: &[u8]) {
        assert_eq!(payload.len(), self.map.block_bytes(), "length of the payload");
        let mut rest = payload;
        for region in 0..self.map.layer_count() {
            let (layer, behind) = rest.split_at(self.map.layer_bytes(region));
            self.write_layer(region, block, layer);
            rest = behind;
        }
    }

    /// The bytes from the first element of `region` to its last, those of other layers in between included.
    pub fn extent(&self, region: usize) -> Vec<u8> {
        let (start, len) = self.place(region);
        let bytes = self.buffers[self.places[region]]
            .bytes
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        bytes[start..start + len].to_vec()
    }

    /// Overwrites what [`extent`](Self::extent) returns.
    pub fn set_extent(&self, region: usize, data: &[u8]) {
        let (start, len) = self.place(region);
        let mut bytes = self.buffers[self.places[region]]
            .bytes
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        bytes[start..start + len].copy_from_slice(data);
    }

    /// Start and length of a region in its buffer.
    fn place(&self, region: usize) -> (usize, usize) {
        let place = &self.map.regions()[region];
        (
            (place.address - self.buffers[self.places[region]].address) as usize,
            place.extent_bytes,
        )
    }
}

impl PagedMemory for OwnedCache {
    fn map(&self) -> &BlockMap {
        &self.map
    }

    fn read_layer(&self, region: usize, block: u32, data: &mut [u8]) {
        assert_eq!(data.len(), self.map.layer_bytes(region), "length of the data");
        let place = &self.map.regions()[region];
        let start = self.place(region).0 + place.block_offset_bytes(block);
        let bytes = self.buffers[self.places[region]]
            .bytes
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        let mut rest = data;
        for run in &place.runs {
            let (target, behind) = rest.split_at_mut(run.len_bytes);
            target.copy_from_slice(&bytes[start + run.offset_bytes..][..run.len_bytes]);
            rest = behind;
        }
    }

    fn write_layer(&self, region: usize, block: u32, data: &[u8]) {
        assert_eq!(data.len(), self.map.layer_bytes(region), "length of the data");
        let place = &self.map.regions()[region];
        let start = self.place(region).0 + place.block_offset_bytes(block);
        let mut bytes = self.buffers[self.places[region]]
            .bytes
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        let mut rest = data;
        for run in &place.runs {
            let (source, behind) = rest.split_at(run.len_bytes);
            bytes[start + run.offset_bytes..][..run.len_bytes].copy_from_slice(source);
            rest = behind;
        }
    }
}

/// Devices have address spaces of their own.
fn device_number(region: &Region) -> u64 {
    match region.device {
        crate::memory::Device::Host => 0,
        crate::memory::Device::Cuda(ordinal) => u64::from(ordinal) + 1,
    }
}
