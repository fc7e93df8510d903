//! Which bytes of the device belong to a part of a block, as few contiguous pieces as possible.

use kvlane_core::BlockMap;

/// One copy: `len_bytes` at `address` on the device are the bytes at `offset_bytes` of a staging buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) address: u64,
    pub(crate) offset_bytes: usize,
    pub(crate) len_bytes: usize,
}

/// Bytes of one block in `layers` together.
pub(crate) fn part_bytes(map: &BlockMap, layers: &[usize]) -> usize {
    layers.iter().map(|&layer| map.layer_bytes(layer)).sum()
}

/// The copies for one block of `layers`, which lie one after the other in the staging buffer, in the order given.
///
/// What is adjacent both on the device and in the buffer is one copy: every copy costs the driver a few microseconds,
/// and a layout with the blocks outermost needs a single one for all layers.
///
/// # Panics
/// If the map has no such block or layer.
pub(crate) fn spans(map: &BlockMap, block: u32, layers: &[usize]) -> Vec<Span> {
    let runs = layers.iter().flat_map(|&layer| {
        let region = &map.regions()[layer];
        let start = region.address + region.block_offset_bytes(block) as u64;
        let pieces = region.runs.iter();
        pieces.map(move |run| (start + run.offset_bytes as u64, run.len_bytes))
    });
    merge(runs)
}

fn merge(runs: impl Iterator<Item = (u64, usize)>) -> Vec<Span> {
    let mut spans: Vec<Span> = Vec::new();
    let mut offset_bytes = 0;
    for (address, len_bytes) in runs {
        match spans.last_mut() {
            Some(last) if last.address + last.len_bytes as u64 == address => last.len_bytes += len_bytes,
            _ => spans.push(Span {
                address,
                offset_bytes,
                len_bytes,
            }),
        }
        offset_bytes += len_bytes;
    }
    spans
}

#[cfg(test)]
mod tests {
    use kvlane_core::{Device, TensorView};
    use proptest::prelude::*;

    use super::*;

    /// Layers of `width` bytes a block, packed so that a block's layers are one row.
    fn rows(layers: u64, blocks: u32, width: u64) -> BlockMap {
        let views = (0..layers).map(|layer| TensorView {
            name: format!("layer.{layer}"),
            address: 0x1000 + layer * width,
            device: Device::Cuda(0),
            element_bytes: 1,
            shape: vec![u64::from(blocks), width],
            strides: vec![(layers * width) as i64, 1],
        });
        BlockMap::from_tensors(views, blocks, None).unwrap()
    }

    #[test]
    fn a_block_whose_layers_are_one_row_is_one_copy() {
        let map = rows(4, 3, 100);
        let all = [0, 1, 2, 3];
        assert_eq!(part_bytes(&map, &all), 400);
        let expected = Span {
            address: 0x1000 + 800,
            offset_bytes: 0,
            len_bytes: 400,
        };
        assert_eq!(spans(&map, 2, &all), [expected]);
    }

    #[test]
    fn layers_that_are_left_out_split_the_copy_but_not_the_buffer() {
        let map = rows(4, 3, 100);
        let found = spans(&map, 0, &[0, 2, 3]);
        let plain: Vec<_> = found
            .iter()
            .map(|span| (span.address, span.offset_bytes, span.len_bytes))
            .collect();
        assert_eq!(plain, [(0x1000, 0, 100), (0x1000 + 200, 100, 200)]);
    }

    #[test]
    fn pieces_that_touch_in_the_wrong_order_stay_apart() {
        let found = merge([(200, 100), (100, 100)].into_iter());
        assert_eq!(found.len(), 2);
    }

    proptest! {
        /// Byte by byte, merged copies are the same as unmerged ones, and no two neighbours could be merged.
        #[test]
        fn merging_changes_no_byte(gaps in prop::collection::vec((0u64..3, 1usize..40), 1..30)) {
            let mut address = 0x100;
            let runs: Vec<(u64, usize)> = gaps
                .iter()
                .map(|&(gap, len)| {
                    let start = address + gap;
                    address = start + len as u64;
                    (start, len)
                })
                .collect();
            let merged = merge(runs.iter().copied());
            let bytes = |pieces: Vec<(u64, usize)>| -> Vec<u64> {
                pieces.into_iter().flat_map(|(start, len)| start..start + len as u64).collect()
            };
            let pieces = merged.iter().map(|span| (span.address, span.len_bytes)).collect();
            prop_assert_eq!(bytes(pieces), bytes(runs));
            let mut offset = 0;
            for span in &merged {
                prop_assert_eq!(span.offset_bytes, offset);
                offset += span.len_bytes;
            }
            for pair in merged.windows(2) {
                prop_assert!(pair[0].address + (pair[0].len_bytes as u64) < pair[1].address);
            }
        }
    }
}
