//! Where the peer's blocks lie, as it says itself, checked before anything is read by it.

use kvlane_core::{BlockMap, Run};

use super::LaneError;

/// Most layers of a peer.
pub const MAX_REGIONS: usize = 4096;
/// Most runs of one block in one layer, as in a local cache.
pub(super) const MAX_RUNS: usize = 1 << 16;
/// Most runs of one block over all layers of a peer.
pub const MAX_TOTAL_RUNS: usize = 1 << 17;

/// One tensor of a peer: block `b` is the bytes at `address + b * block_stride_bytes + offset_bytes` of every run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteRegion {
    /// Address of the first element, in the peer's process.
    pub address: u64,
    /// Distance between neighbouring blocks.
    pub block_stride_bytes: u64,
    /// Bytes from the first element to the end of the last one.
    pub extent_bytes: u64,
    /// The byte ranges of a block: ascending, without overlap.
    pub runs: Vec<Run>,
}

impl RemoteRegion {
    /// Payload bytes of one block. Cannot overflow once [`RemoteCache::new`] has taken the region.
    pub fn layer_bytes(&self) -> usize {
        self.runs.iter().map(|run| run.len_bytes).sum()
    }
}

/// The paged cache of a peer. Every run of every block lies inside its region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteCache {
    pub(super) regions: Vec<RemoteRegion>,
    block_count: u32,
}

impl RemoteCache {
    /// Takes what a peer says about its cache, unless it cannot be true.
    pub fn new(regions: Vec<RemoteRegion>, block_count: u32) -> Result<Self, LaneError> {
        if regions.is_empty() || regions.len() > MAX_REGIONS {
            return Err(LaneError::Layout(format!(
                "{} layers; allowed: 1 to {MAX_REGIONS}",
                regions.len()
            )));
        }
        if block_count == 0 {
            return Err(LaneError::Layout("no blocks; allowed: at least 1".to_owned()));
        }
        let total = regions
            .iter()
            .fold(0usize, |sum, region| sum.saturating_add(region.runs.len()));
        if total > MAX_TOTAL_RUNS {
            return Err(LaneError::Layout(format!(
                "a block of {total} runs; allowed: {MAX_TOTAL_RUNS}"
            )));
        }
        for (layer, region) in regions.iter().enumerate() {
            check_region(region, block_count)
                .map_err(|what| LaneError::Layout(format!("layer {layer}: {what}")))?;
        }
        Ok(Self { regions, block_count })
    }

    /// What this process says about its own cache.
    pub fn of(map: &BlockMap) -> Result<Self, LaneError> {
        let region = |region: &kvlane_core::Region| RemoteRegion {
            address: region.address,
            block_stride_bytes: region.block_stride_bytes as u64,
            extent_bytes: region.extent_bytes as u64,
            runs: region.runs.clone(),
        };
        Self::new(map.regions().iter().map(region).collect(), map.block_count())
    }

    /// The layers, in the order of a block's payload.
    pub fn regions(&self) -> &[RemoteRegion] {
        &self.regions
    }

    /// Number of blocks.
    pub fn block_count(&self) -> u32 {
        self.block_count
    }
}

fn check_region(region: &RemoteRegion, block_count: u32) -> Result<(), String> {
    let (address, extent) = (region.address, region.extent_bytes);
    // Signed sizes are what the kernel counts in.
    let end = address
        .checked_add(extent)
        .filter(|&end| end <= i64::MAX as u64 && usize::try_from(end).is_ok());
    if address == 0 || end.is_none() {
        return Err(format!("{extent} bytes at address {address:#x} are no memory"));
    }
    if region.runs.is_empty() || region.runs.len() > MAX_RUNS {
        return Err(format!(
            "a block of {} runs; allowed: 1 to {MAX_RUNS}",
            region.runs.len()
        ));
    }
    let mut reach = 0;
    for (index, run) in region.runs.iter().enumerate() {
        if run.len_bytes == 0 {
            return Err(format!("run {index} has no bytes"));
        }
        if run.offset_bytes < reach {
            return Err(format!(
                "run {index} starts at {}, before the end of the one in front, {reach}",
                run.offset_bytes
            ));
        }
        reach = run
            .offset_bytes
            .checked_add(run.len_bytes)
            .ok_or_else(|| format!("run {index} ends beyond the address space"))?;
    }
    if block_count > 1 && region.block_stride_bytes == 0 {
        return Err(format!("{block_count} blocks at one place"));
    }
    let last_end = u64::from(block_count - 1)
        .checked_mul(region.block_stride_bytes)
        .and_then(|start| start.checked_add(reach as u64));
    match last_end {
        Some(last_end) if last_end <= extent => Ok(()),
        _ => Err(format!(
            "block {} with a stride of {} and a reach of {reach} ends behind the {extent} bytes of the tensor",
            block_count - 1,
            region.block_stride_bytes
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(offset_bytes: usize, len_bytes: usize) -> Run {
        Run {
            offset_bytes,
            len_bytes,
        }
    }

    /// Four blocks with two runs of 16 bytes: `(2, 4, 16)`.
    fn honest() -> RemoteRegion {
        RemoteRegion {
            address: 0x1000,
            block_stride_bytes: 16,
            extent_bytes: 128,
            runs: vec![run(0, 16), run(64, 16)],
        }
    }

    fn refusal(change: impl FnOnce(&mut RemoteRegion)) -> String {
        let mut region = honest();
        change(&mut region);
        RemoteCache::new(vec![region], 4).unwrap_err().to_string()
    }

    #[test]
    fn an_honest_cache_is_taken_and_its_last_byte_may_be_the_last_of_the_tensor() {
        let cache = RemoteCache::new(vec![honest()], 4).unwrap();
        assert_eq!(cache.regions()[0].layer_bytes(), 32);
        assert_eq!(cache.block_count(), 4);
    }

    #[test]
    fn every_way_out_of_the_tensor_is_refused() {
        let big = usize::MAX;
        for (case, told) in [
            ("one byte too few", refusal(|region| region.extent_bytes = 127)),
            (
                "stride too large",
                refusal(|region| region.block_stride_bytes = 17),
            ),
            (
                "the product overflows",
                refusal(|region| region.block_stride_bytes = u64::MAX / 3 + 1),
            ),
            (
                "a run past the end",
                refusal(|region| region.runs[1] = run(64, 17)),
            ),
            (
                "a run far away",
                refusal(|region| region.runs[1] = run(big - 8, 8)),
            ),
        ] {
            assert!(told.contains("ends behind the"), "{case}: {told}");
        }
        let told = refusal(|region| region.runs[1] = run(big, 2));
        assert!(told.contains("beyond the address space"), "{told}");
    }

    #[test]
    fn addresses_that_wrap_or_are_null_are_refused() {
        for address in [0, u64::MAX, u64::MAX - 127, i64::MAX as u64] {
            let told = refusal(|region| region.address = address);
            assert!(told.contains("are no memory"), "{address:#x}: {told}");
        }
        let told = refusal(|region| region.extent_bytes = u64::MAX);
        assert!(told.contains("are no memory"), "{told}");
    }

    #[test]
    fn runs_that_are_empty_overlap_or_are_too_many_are_refused() {
        assert!(refusal(|region| region.runs[0].len_bytes = 0).contains("run 0 has no bytes"));
        assert!(refusal(|region| region.runs[1].offset_bytes = 15).contains("before the end"));
        assert!(refusal(|region| region.runs.swap(0, 1)).contains("before the end"));
        assert!(refusal(|region| region.runs.clear()).contains("a block of 0 runs"));
        let many = |region: &mut RemoteRegion| region.runs = vec![run(0, 1); MAX_RUNS + 1];
        assert!(refusal(many).contains("a block of 65537 runs"));
        let half = RemoteRegion {
            runs: vec![run(0, 1); MAX_RUNS / 2 + 1],
            ..honest()
        };
        let told = RemoteCache::new(vec![half; 4], 4).unwrap_err().to_string();
        assert!(told.contains("allowed: 131072"), "{told}");
    }

    #[test]
    fn no_layers_no_blocks_and_blocks_at_one_place_are_refused() {
        assert!(RemoteCache::new(Vec::new(), 4).is_err());
        assert!(RemoteCache::new(vec![honest(); MAX_REGIONS + 1], 4).is_err());
        assert!(RemoteCache::new(vec![honest()], 0).is_err());
        assert!(refusal(|region| region.block_stride_bytes = 0).contains("at one place"));
        // One block needs no stride.
        let one = RemoteRegion {
            block_stride_bytes: 0,
            ..honest()
        };
        assert!(RemoteCache::new(vec![one], 1).is_ok());
    }
}
