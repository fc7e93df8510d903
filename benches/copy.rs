//! Gather (cache to segment) and scatter (segment to cache) of 96 MiB by run length, beside a memcpy of 96 MiB.
//!
//! The cache is ordinary memory with its blocks in random order, the segment a mapping of a file in memory. A copy that
//! delivered a wrong byte or a wrong checksum makes the run fail.

use std::fs::File;
use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use kvlane_core::{BlockMap, Device, TensorView};
use kvlane_fs::raw::{HostCache, LayerCrc, WriteMapping, store_fence};
use rand::SeedableRng;
use rand::seq::SliceRandom;

const TOTAL_BYTES: usize = 96 << 20;
const KEY: [u8; 32] = [7; 32];

#[derive(Clone, Copy, PartialEq)]
enum Direction {
    Gather,
    Scatter,
}

/// A cache, a segment, and the order in which blocks lie in the segment.
struct Case {
    cache: HostCache,
    segment: WriteMapping,
    order: Vec<u32>,
    run_bytes: usize,
}

impl Case {
    fn new(run_bytes: usize) -> Self {
        let count = (TOTAL_BYTES / run_bytes) as u32;
        let cache = HostCache::allocate(&[TOTAL_BYTES], |addresses| {
            let view = TensorView {
                name: "layer".to_owned(),
                address: addresses[0],
                device: Device::Host,
                element_bytes: 1,
                shape: vec![u64::from(count), run_bytes as u64],
                strides: vec![run_bytes as i64, 1],
            };
            BlockMap::from_tensors([view], count, None).expect("the layout is plain")
        });
        let file = memory_file();
        file.set_len(TOTAL_BYTES as u64).expect("memory for the segment");
        let segment = WriteMapping::new(&file, TOTAL_BYTES).expect("a mapping");
        segment
            .populate_write(0..TOTAL_BYTES)
            .expect("memory for the segment");
        let mut order: Vec<u32> = (0..count).collect();
        order.shuffle(&mut rand::rngs::StdRng::seed_from_u64(1));
        let case = Self {
            cache,
            segment,
            order,
            run_bytes,
        };
        for block in 0..count {
            case.cache
                .copy_layer_in(0, block, content(block, run_bytes).as_slice().into(), None);
        }
        case
    }

    /// Copies everything with `threads` threads. Returns the checksums, exclusive-or-ed.
    fn copy(&self, direction: Direction, threads: usize, is_checked: bool) -> u32 {
        let share = self.order.len().div_ceil(threads);
        std::thread::scope(|scope| {
            let parts: Vec<_> = (1..threads)
                .map(|part| scope.spawn(move || self.copy_part(direction, part * share, share, is_checked)))
                .collect();
            let own = self.copy_part(direction, 0, share, is_checked);
            parts
                .into_iter()
                .fold(own, |sum, part| sum ^ part.join().expect("a copy thread"))
        })
    }

    fn copy_part(&self, direction: Direction, first: usize, count: usize, is_checked: bool) -> u32 {
        let mut sum = 0;
        for (slot, &block) in self.order.iter().enumerate().skip(first).take(count) {
            let mut crc = is_checked.then(|| LayerCrc::new(&KEY, 0));
            let offset = slot * self.run_bytes;
            match direction {
                Direction::Gather => {
                    let target = self.segment.target(offset, self.run_bytes);
                    self.cache.copy_layer_out(0, block, target, crc.as_mut());
                }
                Direction::Scatter => {
                    let source = self.segment.source(offset, self.run_bytes);
                    self.cache.copy_layer_in(0, block, source, crc.as_mut());
                }
            }
            sum ^= crc.map_or(0, LayerCrc::value);
        }
        store_fence();
        sum
    }

    /// Copies there and back over cleared memory and compares all bytes and the checksums.
    fn check(&self) {
        let expected = (0..self.order.len() as u32).fold(0, |sum, block| {
            let mut crc = LayerCrc::new(&KEY, 0);
            crc.update(&content(block, self.run_bytes));
            sum ^ crc.value()
        });
        assert_eq!(
            self.copy(Direction::Gather, 2, true),
            expected,
            "checksum of the gather"
        );
        let mut bytes = vec![0; self.run_bytes];
        for block in 0..self.order.len() as u32 {
            self.cache.copy_layer_in(0, block, bytes.as_slice().into(), None);
        }
        assert_eq!(
            self.copy(Direction::Scatter, 2, true),
            expected,
            "checksum of the scatter"
        );
        for (slot, &block) in self.order.iter().enumerate() {
            let content = content(block, self.run_bytes);
            self.segment.read_bytes(slot * self.run_bytes, &mut bytes);
            assert!(bytes == content, "block {block} in the segment");
            self.cache
                .copy_layer_out(0, block, bytes.as_mut_slice().into(), None);
            assert!(bytes == content, "block {block} in the cache");
        }
    }
}

/// Bytes that no other block has.
fn content(block: u32, len: usize) -> Vec<u8> {
    let mut word = u64::from(block) + 1;
    let mut next = || {
        word = word
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        word.to_le_bytes()
    };
    (0..len / 8).flat_map(|_| next()).collect()
}

/// A file without a name, in memory.
fn memory_file() -> File {
    rustix::fs::memfd_create("kvlane-bench", rustix::fs::MemfdFlags::CLOEXEC)
        .expect("a file in memory")
        .into()
}

fn copy(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("copy-96MiB");
    group
        .sample_size(15)
        .throughput(Throughput::Bytes(TOTAL_BYTES as u64));

    let source = vec![1_u8; TOTAL_BYTES];
    let mut target = vec![2_u8; TOTAL_BYTES];
    group.bench_function("memcpy", |bencher| {
        bencher.iter(|| black_box(&mut target).copy_from_slice(black_box(&source)));
    });
    drop((source, target));

    for run_bytes in [2, 4, 8, 16, 32, 128, 1024].map(|kib| kib << 10) {
        let case = Case::new(run_bytes);
        case.check();
        for (name, direction) in [("gather", Direction::Gather), ("scatter", Direction::Scatter)] {
            for threads in [1, 2] {
                for (suffix, is_checked) in [("", true), ("-unchecked", false)] {
                    let id = format!("{name}{suffix}/{threads}-thread");
                    group.bench_function(
                        BenchmarkId::new(id, format!("{}KiB", run_bytes >> 10)),
                        |bencher| {
                            bencher.iter(|| black_box(case.copy(direction, threads, is_checked)));
                        },
                    );
                }
            }
        }
    }
    group.finish();
}

criterion_group!(benches, copy);
criterion_main!(benches);
