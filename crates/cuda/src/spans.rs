//! Which bytes of the device belong to a part of a block, as few contiguous pieces as possible.

use kvlane_core::BlockMap;

/// One copy: `len_bytes` at `address` on the device are the bytes at `offset_bytes` of a staging buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) address: u64,
    pub(crate) offset_bytes: usize,
    pub(crate) len_bytes: usize,
}

/// Bytes of one run of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunPart {
    /// Place of the layer in the map.
    pub layer: usize,
    /// The block.
    pub block: u32,
    /// The run in the block.
    pub run: usize,
    /// From the start of the run.
    pub offset_bytes: usize,
    /// How many.
    pub len_bytes: usize,
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

pub(crate) fn merge(runs: impl Iterator<Item = (u64, usize)>) -> Vec<Span> {
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

/// One copy between two places that the device can reach. Pieces of different groups are parts of different allocations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub(crate) from: u64,
    pub(crate) to: u64,
    pub(crate) len_bytes: usize,
    /// Allocation of the source, and of the target.
    pub(crate) groups: (u32, u32),
}

impl Piece {
    /// Where allocations do not matter: all are one.
    pub(crate) const fn new(from: u64, to: u64, len_bytes: usize) -> Self {
        Self {
            from,
            to,
            len_bytes,
            groups: (0, 0),
        }
    }
}

/// The sources of pieces, in the order given; what is adjacent and of one allocation is one.
pub(crate) fn in_order(pieces: &[Piece]) -> Vec<(u64, usize)> {
    let mut runs: Vec<(u64, usize)> = Vec::new();
    let mut group = None;
    for piece in pieces {
        match runs.last_mut() {
            Some((address, len_bytes))
                if group == Some(piece.groups.0) && *address + *len_bytes as u64 == piece.from =>
            {
                *len_bytes += piece.len_bytes;
            }
            _ => runs.push((piece.from, piece.len_bytes)),
        }
        group = Some(piece.groups.0);
    }
    runs
}

/// Puts pieces into the order of their sources, and joins those that are adjacent in both places and in one allocation each:
/// every copy costs the driver a microsecond or more, whatever its length.
pub(crate) fn join(mut pieces: Vec<Piece>) -> Vec<Piece> {
    pieces.sort_unstable_by_key(|piece| (piece.from, piece.to));
    let mut joined: Vec<Piece> = Vec::with_capacity(pieces.len());
    for piece in pieces {
        match joined.last_mut() {
            Some(last)
                if last.groups == piece.groups
                    && last.from + last.len_bytes as u64 == piece.from
                    && last.to + last.len_bytes as u64 == piece.to =>
            {
                last.len_bytes += piece.len_bytes;
            }
            _ => joined.push(piece),
        }
    }
    joined
}

/// Takes as many pieces off the front as make up to `most_bytes` and `most_pieces`; a long piece is split.
pub(crate) fn take_window(
    rest: &mut &[Piece],
    taken_bytes: &mut usize,
    most_bytes: usize,
    most_pieces: usize,
) -> Vec<Piece> {
    let mut window = Vec::new();
    let mut left_bytes = most_bytes;
    while left_bytes > 0 && window.len() < most_pieces {
        let Some(first) = rest.first() else { break };
        let len_bytes = (first.len_bytes - *taken_bytes).min(left_bytes);
        window.push(Piece {
            from: first.from + *taken_bytes as u64,
            to: first.to + *taken_bytes as u64,
            len_bytes,
            ..*first
        });
        left_bytes -= len_bytes;
        *taken_bytes += len_bytes;
        if *taken_bytes == first.len_bytes {
            *rest = &rest[1..];
            *taken_bytes = 0;
        }
    }
    window
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
    #[test]
    fn pieces_that_touch_on_both_sides_are_one_copy_in_whatever_order_they_came() {
        let found = join(vec![
            Piece::new(300, 1300, 100),
            Piece::new(100, 1100, 100),
            Piece::new(200, 1200, 100),
            Piece::new(400, 1500, 100),
        ]);
        assert_eq!(found, [Piece::new(100, 1100, 300), Piece::new(400, 1500, 100)]);
    }

    #[test]
    fn sources_keep_their_order_and_are_one_only_where_they_follow_each_other_in_one_allocation() {
        let other = Piece {
            groups: (1, 0),
            ..Piece::new(250, 0, 50)
        };
        let found = in_order(&[
            Piece::new(100, 0, 100),
            Piece::new(200, 0, 50),
            other,
            Piece::new(50, 0, 50),
            Piece::new(400, 0, 10),
        ]);
        assert_eq!(found, [(100, 150), (250, 50), (50, 50), (400, 10)]);
        assert_eq!(in_order(&[]), []);
    }

    #[test]
    fn allocations_that_happen_to_touch_are_copied_apart() {
        for groups in [(1, 0), (0, 1)] {
            let other = Piece {
                groups,
                ..Piece::new(200, 1200, 100)
            };
            assert_eq!(join(vec![Piece::new(100, 1100, 100), other]).len(), 2);
        }
    }

    #[test]
    fn windows_are_bounded_and_together_every_byte_once() {
        let all = [
            Piece::new(0, 1000, 70),
            Piece::new(100, 2000, 10),
            Piece::new(200, 3000, 45),
        ];
        let (mut rest, mut taken) = (&all[..], 0);
        let mut windows = Vec::new();
        while !rest.is_empty() {
            windows.push(take_window(&mut rest, &mut taken, 50, 2));
        }
        let expected = [
            vec![Piece::new(0, 1000, 50)],
            vec![Piece::new(50, 1050, 20), Piece::new(100, 2000, 10)],
            vec![Piece::new(200, 3000, 45)],
        ];
        assert_eq!(windows, expected);
    }
}
