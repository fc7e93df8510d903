//! How long committing a block takes besides copying its payload: finding a slot for it, its record, its publication.
//!
//! The whole is a store of tiny blocks through the backend into recycled slots. With many in one request the hand-over
//! between threads vanishes, with one it is all there is; between one layer and many lies the cost of starting a copy
//! and a checksum for each. The floors are copying a record's bytes and making them.
#![allow(
    missing_docs,
    reason = "criterion's macros generate public items without docs"
)]

use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use kvlane_benches::tiny_store::{TinyStore, keys};
use kvlane_core::{BlockKey, KvTransfer, NamespaceId};
use kvlane_fs::format::{RECORD_FIXED_BYTES, SlotRecord, SlotState, parse_slot_record};

/// Small enough that slots are recycled after a moment, which is what a server in use does.
const CAPACITY_BYTES: u64 = 64 << 20;
const BATCH: usize = 1024;
/// As many as the model of the big comparison has.
const LAYERS: usize = 48;

fn slot_commit(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("slot-commit");
    let record = record();
    let record_bytes = RECORD_FIXED_BYTES + 4 * LAYERS;
    let encoded = record.encode(record_bytes);
    let parsed = parse_slot_record(&encoded, LAYERS as u32).expect("what was encoded is a record");
    assert_eq!(parsed, record);

    group.throughput(Throughput::Elements(1));
    group.bench_function("floor (memcpy of a record)", |bencher| {
        let mut target = vec![0_u8; record_bytes];
        bencher.iter(|| black_box(&mut target).copy_from_slice(black_box(&encoded)));
    });
    group.bench_function("encode a record", |bencher| {
        bencher.iter(|| black_box(&record).encode(record_bytes));
    });

    for (layers, blocks) in [(1, 1), (1, BATCH), (LAYERS, 1), (LAYERS, 64), (LAYERS, BATCH)] {
        let store = TinyStore::new(CAPACITY_BYTES, BATCH as u32, layers);
        recycle_once(&store);
        group.throughput(Throughput::Elements(blocks as u64));
        let id = BenchmarkId::new(format!("store of tiny blocks/{layers}-layers"), blocks);
        group.bench_function(id, |bencher| {
            bencher.iter_custom(|rounds| {
                let mut elapsed = Duration::ZERO;
                for _ in 0..rounds {
                    let keys = fresh_keys(blocks);
                    let start = Instant::now();
                    store.store(&keys, 0);
                    elapsed += start.elapsed();
                    // A store that was dropped, or that went nowhere, is quick too.
                    let found = store.transfer.lookup(&keys[..1]);
                    assert_eq!(found.ready_blocks, 1);
                }
                elapsed
            });
        });
    }
    group.finish();
}

/// Fills the store until it has evicted, so that nothing that is timed makes a segment.
fn recycle_once(store: &TinyStore) {
    let first = fresh_keys(1);
    store.store(&first, 0);
    let patience = Instant::now() + Duration::from_secs(60);
    while store.transfer.lookup(&first).ready_blocks == 1 {
        assert!(Instant::now() < patience, "nothing was recycled");
        store.store(&fresh_keys(BATCH), 0);
    }
}

/// Keys that were never stored: one that is there already is not stored again.
fn fresh_keys(count: usize) -> Vec<BlockKey> {
    use std::sync::atomic::{AtomicU64, Ordering};
    static REQUEST: AtomicU64 = AtomicU64::new(0);
    keys(REQUEST.fetch_add(1, Ordering::Relaxed), count)
}

fn record() -> SlotRecord {
    SlotRecord {
        sequence: 2,
        state: SlotState::Committed,
        depth: 7,
        key: BlockKey([7; 32]),
        namespace: NamespaceId([8; 32]),
        payload_bytes: 1 << 20,
        deadline_unix_ms: 0,
        owner: 9,
        written_unix_ms: 10,
        layer_crcs: (0..LAYERS as u32).collect(),
    }
}

criterion_group!(benches, slot_commit);
criterion_main!(benches);
