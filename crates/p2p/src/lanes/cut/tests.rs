use proptest::prelude::*;

use super::*;

fn run(offset_bytes: usize, len_bytes: usize) -> Run {
    Run {
        offset_bytes,
        len_bytes,
    }
}

/// Tokens in front of heads: `(2, blocks, 4 tokens, 2 heads, 5 bytes)`, in blocks of two kernel blocks.
fn shape() -> CacheShape {
    let digit = |counts, size, stride_bytes| CountedDigit {
        counts,
        size,
        stride_bytes,
    };
    CacheShape {
        block_tokens: 8,
        first_head: 0,
        head_count: 2,
        tensor_ranks: 1,
        layers: vec![LayerShape {
            digits: vec![
                digit(Counts::Other(0), 2, 1000),
                digit(Counts::KernelBlocks, 2, 40),
                digit(Counts::Tokens, 4, 10),
                digit(Counts::Heads, 2, 5),
                digit(Counts::Other(3), 5, 1),
            ],
            element_bytes: 1,
            has_heads: true,
        }],
    }
}

const RUNS: [Run; 2] = [
    Run {
        offset_bytes: 0,
        len_bytes: 80,
    },
    Run {
        offset_bytes: 1000,
        len_bytes: 80,
    },
];

fn cut(slice: (u32, u32, u32)) -> Result<Cut, LaneError> {
    let (unit_tokens, first_head, head_count) = slice;
    let slice = Slice {
        unit_tokens,
        first_head,
        head_count,
    };
    Cut::new(&shape(), [RUNS.as_slice()].into_iter(), slice)
}

#[test]
fn units_lie_where_their_tokens_and_heads_do() {
    let both = cut((2, 0, 2)).unwrap();
    assert_eq!(both.units_per_block, 4);
    assert_eq!(both.layers[0].runs, [run(0, 20), run(1000, 20)]);
    assert_eq!(both.layers[0].offsets, [0, 20, 40, 60]);
    assert_eq!(both.layers[0].places[3], [(0, 60), (1, 60)]);
    // One head is a piece for every token.
    let second = cut((2, 1, 1)).unwrap();
    assert_eq!(
        second.layers[0].runs,
        [run(5, 5), run(15, 5), run(1005, 5), run(1015, 5)]
    );
    assert_eq!(second.layers[0].places[2], [(0, 45), (0, 55), (1, 45), (1, 55)]);
}

#[test]
fn units_that_do_not_fit_are_refused() {
    for (slice, told) in [
        ((3, 0, 2), "units of 3 tokens, in 4"),
        ((8, 0, 2), "units of 8 tokens, in 4"),
        ((2, 1, 2), "heads 1 to 3, of 2"),
        ((2, u32::MAX, 1), "of 2"),
        ((0, 0, 2), "without tokens or heads"),
        ((2, 0, 0), "without tokens or heads"),
    ] {
        let refused = cut(slice).unwrap_err().to_string();
        assert!(refused.contains(told), "{slice:?}: {refused}");
    }
}

#[test]
fn a_shape_that_reaches_out_of_the_block_is_refused() {
    let slice = Slice {
        unit_tokens: 4,
        first_head: 0,
        head_count: 2,
    };
    for (number, stride_bytes) in [
        (0, 2000),
        (1, 80),
        (2, 11),
        (3, u64::MAX),
        (0, u64::MAX),
        (1, u64::MAX),
    ] {
        let mut lying = shape();
        lying.layers[0].digits[number].stride_bytes = stride_bytes;
        let refused = Cut::new(&lying, [RUNS.as_slice()].into_iter(), slice);
        assert!(
            refused.is_err(),
            "dimension {number} of {stride_bytes} bytes: {refused:?}"
        );
    }
}

/// Numbers as liars use them: small ones, and those at the ends.
fn number() -> impl Strategy<Value = u64> {
    prop_oneof![
        8 => 1u64..6,
        2 => 1u64..2000,
        1 => prop_oneof![Just(0), Just(u64::MAX), Just(u64::MAX - 511), Just(1 << 32), Just(i64::MAX as u64)],
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// What a peer says may be anything. It is refused, or every unit lies inside the block.
    #[test]
    fn whatever_a_peer_says_units_stay_inside_its_blocks(
        sizes in prop::collection::vec((number(), number()), 5),
        (element_bytes, has_heads, is_packed) in (prop_oneof![Just(1u64), Just(2), number()], any::<bool>(), any::<bool>()),
        (unit_tokens, first_head, head_count) in (number(), number(), number()),
        gap in 0usize..3,
    ) {
        let tokens = if is_packed { Counts::PackedTokens } else { Counts::Tokens };
        let counts = [Counts::KernelBlocks, Counts::Heads, tokens, Counts::Other(0), Counts::Other(3)];
        let digits = counts.into_iter().zip(&sizes).filter(|(_, (size, _))| *size != 1);
        let digits = digits.map(|(counts, &(size, stride_bytes))| CountedDigit { counts, size, stride_bytes });
        let layer = LayerShape { digits: digits.collect(), element_bytes, has_heads };
        let size = |counts| layer.digits.iter().find(|digit| digit.counts == counts).map_or(1, |digit| digit.size);
        let (block_tokens, heads) = (size(Counts::KernelBlocks).wrapping_mul(size(tokens)), size(Counts::Heads));
        let bytes = layer.digits.iter().map(|digit| digit.size).fold(element_bytes, u64::wrapping_mul);
        let shape = CacheShape {
            block_tokens: block_tokens as u32,
            first_head: 0,
            head_count: if has_heads { heads as u32 } else { 1 },
            tensor_ranks: 1,
            layers: vec![layer],
        };
        // Two runs of the right size together.
        let half = bytes as usize / 2;
        let runs = [run(0, half), run(half + gap, bytes as usize - half)];
        let runs: Vec<Run> = runs.into_iter().filter(|run| run.len_bytes > 0).collect();
        if shape.check([runs.as_slice()].into_iter()).is_err() {
            return Ok(());
        }
        let slice = Slice {
            unit_tokens: unit_tokens as u32,
            first_head: first_head as u32,
            head_count: head_count as u32,
        };
        let Ok(cut) = Cut::new(&shape, [runs.as_slice()].into_iter(), slice) else {
            return Ok(());
        };
        let layer = &cut.layers[0];
        for (offset, places) in layer.offsets.iter().zip(&layer.places) {
            for (unit_run, &(number, inside)) in layer.runs.iter().zip(places) {
                let start = runs[number].offset_bytes + inside;
                prop_assert_eq!(start, offset + unit_run.offset_bytes);
                prop_assert!(inside + unit_run.len_bytes <= runs[number].len_bytes);
            }
        }
    }
}

#[test]
fn a_block_of_more_pieces_than_any_cache_has_is_refused_before_they_are_made() {
    let tokens = 1 << 28;
    let digit = |counts, size, stride_bytes| CountedDigit {
        counts,
        size,
        stride_bytes,
    };
    let shape = CacheShape {
        block_tokens: 1 << 28,
        first_head: 0,
        head_count: 1,
        tensor_ranks: 1,
        layers: vec![LayerShape {
            digits: vec![digit(Counts::Tokens, tokens, 2), digit(Counts::Other(2), 2, 1)],
            element_bytes: 1,
            has_heads: false,
        }],
    };
    let runs = [run(0, 2 << 28)];
    shape.check([runs.as_slice()].into_iter()).unwrap();
    let slice = Slice {
        unit_tokens: 16,
        first_head: 0,
        head_count: 1,
    };
    let refused = Cut::new(&shape, [runs.as_slice()].into_iter(), slice).unwrap_err();
    assert!(
        refused.to_string().contains("more than 1048576 pieces"),
        "{refused}"
    );
}
