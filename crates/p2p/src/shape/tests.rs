use super::*;

fn run(offset_bytes: usize, len_bytes: usize) -> Run {
    Run {
        offset_bytes,
        len_bytes,
    }
}

fn digit(counts: Counts, size: u64, stride_bytes: u64) -> CountedDigit {
    CountedDigit {
        counts,
        size,
        stride_bytes,
    }
}

/// `(blocks, heads, tokens, 8 bytes)`.
fn shape(block_tokens: u32, tokens: u64, heads: Range<u32>) -> CacheShape {
    let count = heads.len() as u64;
    let kernel_blocks = u64::from(block_tokens) / tokens;
    let digits = [
        digit(Counts::KernelBlocks, kernel_blocks, count * tokens * 8),
        digit(Counts::Heads, count, tokens * 8),
        digit(Counts::Tokens, tokens, 8),
        digit(Counts::Other(2), 8, 1),
    ];
    CacheShape {
        block_tokens,
        first_head: heads.start,
        head_count: heads.len() as u32,
        tensor_ranks: 1,
        layers: vec![LayerShape {
            digits: digits.into_iter().filter(|digit| digit.size > 1).collect(),
            element_bytes: 1,
            has_heads: true,
        }],
    }
}

fn runs(shape: &CacheShape) -> Vec<Run> {
    let bytes: u64 = shape.layers[0].digits.iter().map(|digit| digit.size).product();
    vec![run(0, bytes as usize)]
}

#[test]
fn a_unit_has_the_tokens_that_fit_both_and_the_heads_that_both_have() {
    let agreed = |ours: &CacheShape, theirs: &CacheShape| {
        let (ours, theirs) = agree(ours, theirs).unwrap();
        (
            ours.unit_tokens,
            (ours.first_head, theirs.first_head),
            ours.head_count,
        )
    };
    assert_eq!(
        agreed(&shape(16, 16, 0..4), &shape(16, 16, 0..4)),
        (16, (0, 0), 4)
    );
    assert_eq!(
        agreed(&shape(16, 16, 0..4), &shape(64, 64, 0..4)),
        (16, (0, 0), 4)
    );
    assert_eq!(
        agreed(&shape(48, 48, 0..4), &shape(32, 32, 0..4)),
        (16, (0, 0), 4)
    );
    // A block of two kernel blocks is not contiguous in its tokens.
    assert_eq!(
        agreed(&shape(32, 32, 0..4), &shape(32, 16, 0..4)),
        (16, (0, 0), 4)
    );
    assert_eq!(
        agreed(&shape(16, 16, 2..4), &shape(16, 16, 0..4)),
        (16, (0, 2), 2)
    );
    assert_eq!(
        agreed(&shape(16, 16, 0..4), &shape(16, 16, 3..4)),
        (16, (3, 0), 1)
    );
}

#[test]
fn a_refusal_names_what_differs() {
    let refused = |ours: &CacheShape, theirs: &CacheShape| agree(ours, theirs).unwrap_err();
    let told = refused(&shape(16, 16, 0..2), &shape(16, 16, 2..4));
    assert_eq!(
        told,
        "its KV heads are 2..4 and ours 0..2: it is not the worker that has ours"
    );
    let mut other = shape(32, 32, 0..2);
    other.layers[0].digits.swap(0, 1);
    other.layers[0].digits[0].stride_bytes = 16;
    other.layers[0].digits[1].stride_bytes = 8;
    let told = refused(&shape(16, 16, 0..2), &other);
    assert!(
        told.contains("its [16 tokens, 2 heads, 8] of 1 bytes, ours [2 heads, 16 tokens, 8] of 1 bytes"),
        "{told}"
    );
    assert!(told.contains("VLLM_KV_CACHE_LAYOUT"), "{told}");
    let mut other = shape(16, 16, 0..2);
    other.layers.push(other.layers[0].clone());
    assert!(refused(&shape(16, 16, 0..2), &other).contains("it has 2 layers and this server 1"));
}

#[test]
fn what_a_peer_says_of_its_blocks_must_fit_their_bytes() {
    let good = shape(16, 8, 0..2);
    let of = |shape: &CacheShape| shape.check([runs(&good).as_slice()].into_iter());
    of(&good).unwrap();
    let refused = |change: fn(&mut CacheShape)| {
        let mut shape = good.clone();
        change(&mut shape);
        of(&shape).unwrap_err()
    };
    assert!(refused(|shape| shape.block_tokens = 32).contains("16 tokens in a block of 32"));
    assert!(refused(|shape| shape.head_count = 1).contains("2 heads, of 1"));
    assert!(refused(|shape| shape.head_count = 0).contains("no tokens, heads or ranks"));
    assert!(refused(|shape| shape.tensor_ranks = 0).contains("no tokens, heads or ranks"));
    assert!(refused(|shape| shape.layers[0].element_bytes = 2).contains("another size than its 256 bytes"));
    assert!(refused(|shape| shape.layers[0].digits[3].size = u64::MAX).contains("another size"));
    assert!(refused(|shape| shape.layers[0].digits[0].counts = Counts::Heads).contains("count the same"));
    assert!(refused(|shape| shape.layers.clear()).contains("0 layers, of 1"));
}

#[test]
fn tokens_that_a_kernel_packs_together_are_not_cut() {
    let packed = |block_tokens, tokens| {
        let mut shape = shape(block_tokens, tokens, 0..2);
        for digit in &mut shape.layers[0].digits {
            if digit.counts == Counts::Tokens {
                digit.counts = Counts::PackedTokens;
            }
        }
        shape.check([runs(&shape).as_slice()].into_iter()).unwrap();
        shape
    };
    let mut both = packed(16, 16);
    both.block_tokens = 32;
    both.layers[0].digits.push(digit(Counts::Tokens, 2, 1));
    let told = both.check([runs(&both).as_slice()].into_iter()).unwrap_err();
    assert!(told.contains("and tokens that are not"), "{told}");
    let told = agree(&packed(16, 16), &packed(32, 32)).unwrap_err();
    assert!(
        told.contains("blocks of 32 tokens and ours of 16") && told.contains("must be equal"),
        "{told}"
    );
    assert!(agree(&packed(16, 16), &shape(16, 16, 0..2)).is_err());
    // Of equal kernel blocks the manager may have several, and ranks other heads.
    let (ours, _) = agree(&packed(16, 16), &packed(32, 16)).unwrap();
    assert_eq!(ours.unit_tokens, 16);
    let mut half = packed(16, 16);
    half.head_count = 1;
    half.layers[0]
        .digits
        .retain(|digit| digit.counts != Counts::Heads);
    let (_, theirs) = agree(&half, &packed(16, 16)).unwrap();
    assert_eq!((theirs.unit_tokens, theirs.head_count), (16, 1));
}
