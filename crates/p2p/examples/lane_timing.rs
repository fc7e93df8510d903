//! Times the lanes between two processes: 96 MiB as 48 layers of 64 scattered runs of 32 KiB, and one run, beside a copy
//! of as many bytes within this process. Checks bytes before it times.

#[allow(dead_code, reason = "shared with the tests, which use more of it")]
#[path = "../src/lanes/fixture.rs"]
mod fixture;
#[allow(dead_code, reason = "shared with the tests, which use more of it")]
#[path = "../tests/lanes/holder.rs"]
mod holder;

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use kvlane_core::PagedMemory;
use kvlane_fs::HostCache;
use kvlane_p2p::lanes::{Lane, Lease, Span, prefer_huge_pages};

use fixture::Form;
use holder::{Holder, Kind, Layout, be_a_holder, content};

const LAYOUT: Layout = Layout {
    form: Form::BlockMajor,
    layers: 48,
    blocks: 256,
    layer_bytes: 32 << 10,
};
const BLOCKS: usize = 64;
const LEASE: Lease = Lease { slot: 3, epoch: 9 };
const ROUNDS: usize = 15;

fn main() {
    if std::env::args().any(|argument| argument == "holder") {
        return be_a_holder(|_| {});
    }
    if std::env::args().any(|argument| argument == "huge-holder") {
        return be_a_holder(|cache| {
            let start = Instant::now();
            let bytes = prefer_huge_pages(cache, start + Duration::from_secs(20));
            eprintln!("{} MiB in huge pages after {:?}", bytes >> 20, start.elapsed());
        });
    }
    for (pages, argument) in [("4 KiB pages", "holder"), ("huge pages", "huge-holder")] {
        println!("holder with {pages}");
        let mut holder = Holder::child(LAYOUT, Kind::Shm, &[argument], &[]);
        holder.set(LEASE.slot, LEASE.epoch);
        time(&holder);
    }
}

fn time(holder: &Holder) {
    let local = LAYOUT.filled(2);
    // An odd step of a power of two visits every block once, none beside the one before.
    let scattered = |step: u32| {
        (0..BLOCKS as u32)
            .map(|index| index * step % LAYOUT.blocks)
            .collect()
    };
    let request = Span {
        layers: 0..LAYOUT.layers,
        remote: scattered(77),
        local: scattered(51),
    };
    let block = Span {
        layers: 0..1,
        remote: vec![5],
        local: vec![9],
    };
    let mut lanes = [Kind::Shm, Kind::Tcp].map(|kind| holder.lane(kind, &local));
    for lane in &mut lanes {
        copy(lane.as_mut(), &request);
        check(&local, &request);
    }

    let bytes = LAYOUT.layers * BLOCKS * LAYOUT.layer_bytes;
    let (from, mut to) = (vec![1u8; bytes], vec![2u8; bytes]);
    let halves = [0..LAYOUT.layers / 2, LAYOUT.layers / 2..LAYOUT.layers].map(|layers| Span {
        layers,
        ..request.clone()
    });
    let mut others = [Kind::Shm, Kind::Tcp].map(|kind| holder.lane(kind, &local));
    // Interleaved, so that what else the machine does meets all of them.
    let mut times: [Vec<f64>; 5] = Default::default();
    for _ in 0..ROUNDS {
        times[0].push(seconds(|| {
            black_box(&mut to[..]).copy_from_slice(black_box(&from))
        }));
        for (index, (lane, other)) in lanes.iter_mut().zip(&mut others).enumerate() {
            times[1 + 2 * index].push(seconds(|| copy(lane.as_mut(), &request)));
            times[2 + 2 * index].push(seconds(|| {
                std::thread::scope(|scope| {
                    scope.spawn(|| copy(other.as_mut(), &halves[1]));
                    copy(lane.as_mut(), &halves[0]);
                });
            }));
        }
    }
    let floor = median(&mut times[0]);
    let names = ["memcpy", "shm", "shm, two threads", "tcp", "tcp, two threads"];
    for (name, times) in names.iter().zip(&mut times) {
        let (middle, best) = (median(times), times[0]);
        println!(
            "{name:16} 96 MiB   median {:6.2} ms  best {:6.2} ms  {:5.2} GB/s  {:3.0} % of memcpy",
            middle * 1e3,
            best * 1e3,
            bytes as f64 / middle / 1e9,
            floor / middle * 100.0
        );
    }
    for lane in &mut lanes {
        let mut times: Vec<f64> = (0..2000)
            .map(|_| seconds(|| copy(lane.as_mut(), &block)))
            .collect();
        let (middle, best) = (median(&mut times), times[0]);
        println!(
            "{:16} 1 block  median {:6.2} us  best {:6.2} us",
            lane.name(),
            middle * 1e6,
            best * 1e6
        );
    }
}

fn copy(lane: &mut dyn Lane, span: &Span) {
    let deadline = Instant::now() + Duration::from_secs(20);
    lane.copy(span, LEASE, deadline, &AtomicBool::new(false))
        .expect("the lease is held");
}

fn check(local: &Arc<HostCache>, span: &Span) {
    let mut bytes = vec![0; LAYOUT.layer_bytes];
    for layer in span.layers.clone() {
        for (&remote, &block) in span.remote.iter().zip(&span.local) {
            local.read_layer(layer, block, &mut bytes);
            assert!(
                bytes == content(1, layer, remote, bytes.len()),
                "layer {layer}, block {block}"
            );
            local.write_layer(layer, block, &vec![0; bytes.len()]);
        }
    }
}

fn seconds(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64()
}

/// Sorts and returns the middle one.
fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}
