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
    assert_eq!(both.units_per_block(), 4);
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
