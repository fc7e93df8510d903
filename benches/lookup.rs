//! How long it takes to say how many leading blocks of a prompt a folder has: for a request that nobody asked about, and
//! for one that grew by a block since it was asked about.
//!
//! The floor is the same number of look-ups in a plain hash table that is not shared with anybody. A reader first sees
//! whether the folder changed: the row with an empty chain is that alone.
#![allow(
    missing_docs,
    reason = "criterion's macros generate public items without docs"
)]

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use kvlane_benches::tiny_store::{TinyStore, keys};
use kvlane_core::BlockKey;
use kvlane_fs::{FsOptions, FsReader, LookupCursor};

/// A prompt of 131,072 tokens in blocks of 16.
const LONG: usize = 8192;
const SHORT: usize = 64;
const BATCH: usize = 1024;

fn lookup(criterion: &mut Criterion) {
    let store = TinyStore::new(256 << 20, BATCH as u32, 1);
    let chain = keys(0, LONG + 1);
    for (number, part) in chain.chunks(BATCH).enumerate() {
        store.store(part, (number * BATCH) as u32);
    }
    let reader =
        FsReader::open(&store.path(), vec![store.namespace], &FsOptions::default()).expect("the store");
    let ready = |chain: &[BlockKey], cursor: &mut LookupCursor| reader.lookup(chain, cursor).ready_blocks;
    assert_eq!(ready(&chain, &mut LookupCursor::default()), LONG + 1);
    let mut unknown = chain.clone();
    unknown[SHORT / 2] = BlockKey([0; 32]);
    assert_eq!(ready(&unknown, &mut LookupCursor::default()), SHORT / 2);

    let table: Table = chain.iter().map(|key| (*key, 0)).collect();
    let in_table = |chain: &[BlockKey]| chain.iter().take_while(|key| table.contains_key(*key)).count();
    assert_eq!(in_table(&unknown), SHORT / 2);

    let mut group = criterion.benchmark_group("lookup");
    group.bench_function("no block (has the folder changed?)", |bencher| {
        bencher.iter(|| ready(black_box(&[]), &mut LookupCursor::default()));
    });
    for blocks in [SHORT, LONG] {
        let chain = &chain[..blocks];
        group.throughput(Throughput::Elements(blocks as u64));
        group.bench_function(format!("{blocks} blocks, first time"), |bencher| {
            bencher.iter(|| ready(black_box(chain), &mut LookupCursor::default()));
        });
        group.bench_function(format!("{blocks} blocks, floor (hash table)"), |bencher| {
            bencher.iter(|| in_table(black_box(chain)));
        });
    }

    let mut before = LookupCursor::default();
    assert_eq!(ready(&chain[..LONG], &mut before), LONG);
    group.throughput(Throughput::Elements(1));
    group.bench_function(format!("{LONG} blocks, grown by one"), |bencher| {
        bencher.iter(|| ready(black_box(&chain), &mut black_box(before)));
    });
    group.bench_function("1 block, floor (hash table)", |bencher| {
        bencher.iter(|| in_table(black_box(&chain[LONG..])));
    });
    group.finish();
}

/// Keys are hashes, so the cheapest table takes a part of them as it is.
type Table = HashMap<BlockKey, u64, BuildHasherDefault<Plain>>;

#[derive(Default)]
struct Plain(u64);

impl Hasher for Plain {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, _: &[u8]) {
        unreachable!("a block key hashes as one number");
    }
    fn write_u64(&mut self, number: u64) {
        self.0 = number;
    }
}

criterion_group!(benches, lookup);
criterion_main!(benches);
