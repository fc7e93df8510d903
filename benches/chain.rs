//! How long naming a prompt's blocks takes: the whole chain, and the one block that a decoded answer adds.
//!
//! The floor is blake3 itself over the same bytes, one dependent hash per block.
#![allow(
    missing_docs,
    reason = "criterion's macros generate public items without docs"
)]

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use kvlane_core::{Chain, ChainRoot};

const TOKENS: u32 = 131_072;
const BLOCK_TOKENS: u32 = 16;

fn chain(criterion: &mut Criterion) {
    let root = ChainRoot::new(BLOCK_TOKENS).expect("16 tokens are allowed").id();
    let tokens: Vec<u32> = (0..TOKENS)
        .map(|token| token.wrapping_mul(2_654_435_761) % 128_000)
        .collect();

    let mut group = criterion.benchmark_group("chain");
    group.throughput(Throughput::Elements(u64::from(TOKENS)));
    group.bench_function("131072 tokens, first time", |bench| {
        bench.iter(|| {
            let mut chain = Chain::new(root);
            chain.extend(black_box(&tokens).iter().copied());
            *chain.keys().last().expect("the prompt has full blocks")
        });
    });

    // The dependent hashes alone: no token handling, no growth of the key list.
    group.bench_function("131072 tokens, floor (blake3 alone)", |bench| {
        bench.iter(|| {
            let mut block = [0u8; 32 + 4 * BLOCK_TOKENS as usize];
            for _ in 0..TOKENS / BLOCK_TOKENS {
                let key = blake3::hash(black_box(&block));
                block[..32].copy_from_slice(key.as_bytes());
            }
            block
        });
    });

    group.throughput(Throughput::Elements(u64::from(BLOCK_TOKENS)));
    group.bench_function("grown by one block", |bench| {
        let mut chain = Chain::new(root);
        chain.extend(tokens.iter().copied());
        bench.iter(|| {
            // Growing for ever would measure the allocator; cutting back would measure the copy of the keys.
            if chain.block_count() > 65_536 {
                chain = Chain::new(root);
            }
            chain.extend(black_box(&tokens[..BLOCK_TOKENS as usize]).iter().copied())
        });
    });
    group.finish();
}

criterion_group!(benches, chain);
criterion_main!(benches);
