//! One suite for all lanes, and what each of them must refuse. The risk: bytes that are not those of a held lease count as
//! blocks, or a peer that is dead, stopped, broken or lying stops this side or changes what it does not own.

#![allow(clippy::unwrap_used, reason = "a failure here fails the test")]

mod device;
#[allow(
    dead_code,
    reason = "shared with the crate's own tests and a timing, which use more of it"
)]
#[path = "../../src/lanes/fixture.rs"]
mod fixture;
mod holder;
mod lying;
mod nccl;
mod serving;
mod suite;
mod takes;
mod times;

use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use fixture::Form;
use holder::{Holder, Kind, Layout};
use kvlane_p2p::lanes::{Lane, LaneError, Lease, Span};

const LEASE: Lease = Lease { slot: 5, epoch: 77 };

/// Small, with runs that are no multiple of anything.
const SMALL: Layout = Layout {
    form: Form::KvOuter,
    layers: 3,
    blocks: 24,
    layer_bytes: 2 * 1237,
};

/// What a deadline may be overrun by.
const SLACK: Duration = Duration::from_millis(400);

/// Where the holder is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Here,
    Child,
}

const EVERYWHERE: [(Kind, Place); 9] = [
    (Kind::Shm, Place::Here),
    (Kind::Shm, Place::Child),
    (Kind::Tcp, Place::Here),
    (Kind::Tcp, Place::Child),
    // CUDA has no handles for the process that made them.
    (Kind::Cuda, Place::Child),
    (Kind::Nccl, Place::Here),
    (Kind::Nccl, Place::Child),
    (Kind::TcpDevice, Place::Here),
    (Kind::TcpDevice, Place::Child),
];

/// A holder of blocks in host memory under [`LEASE`].
fn holder(layout: Layout, place: Place) -> Holder {
    holder_for(Kind::Shm, layout, place)
}

/// A holder of blocks under [`LEASE`], where a lane needs them.
fn holder_for(kind: Kind, layout: Layout, place: Place) -> Holder {
    match place {
        Place::Here => {
            let mut holder = Holder::here(layout, kind);
            holder.set(LEASE.slot, LEASE.epoch);
            holder
        }
        Place::Child => holder_with(kind, layout, &[]),
    }
}

/// A holder of blocks under [`LEASE`] in a child, which has these settings of the stand-ins.
fn holder_with(kind: Kind, layout: Layout, settings: &[(&str, &str)]) -> Holder {
    let arguments = ["--exact", "the_holder_of_a_child_process", "--nocapture"];
    let mut holder = Holder::child(layout, kind, &arguments, settings);
    holder.set(LEASE.slot, LEASE.epoch);
    holder
}

/// Not a test: what [`Holder::child`] starts.
#[test]
fn the_holder_of_a_child_process() {
    holder::be_a_holder(|_| {});
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

fn copy(lane: &mut dyn Lane, span: &Span) -> Result<(), LaneError> {
    lane.copy(span, LEASE, soon(), &AtomicBool::new(false))
}

fn span(layers: std::ops::Range<usize>, remote: &[u32], local: &[u32]) -> Span {
    Span {
        layers,
        remote: remote.to_vec(),
        local: local.to_vec(),
    }
}
