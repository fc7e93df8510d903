//! What every lane does, wherever the holder is.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use kvlane_core::PagedMemory;
use kvlane_p2p::lanes::{LaneError, Lease, LocalCache, Span};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

use crate::fixture::Form;
use crate::holder::{Layout, check_device, content};
use crate::{EVERYWHERE, LEASE, SMALL, copy, holder_for, soon, span};

/// The seed of what is in a local cache before a copy; a holder's is 1.
const BEFORE: usize = 2;

/// Checks all bytes of a local cache: what a span names has come, nothing else has changed.
fn check(local: &LocalCache, layout: Layout, span: &Span, case: &str) {
    check_device(local);
    let mut bytes = vec![0; layout.layer_bytes];
    for layer in 0..layout.layers {
        for block in 0..layout.blocks {
            local.read_layer(layer, block, &mut bytes);
            let place = span.local.iter().position(|&other| other == block);
            let expected = match place.filter(|_| span.layers.contains(&layer)) {
                Some(place) => content(1, layer, span.remote[place], layout.layer_bytes),
                None => content(BEFORE, layer, block, layout.layer_bytes),
            };
            assert!(
                bytes == expected,
                "{case}: layer {layer}, block {block} of {span:?}"
            );
        }
    }
}

fn with_form(form: Form) -> Layout {
    Layout { form, ..SMALL }
}

#[test]
fn bytes_are_exact_and_neighbours_untouched_whatever_the_two_layouts() {
    let all: Vec<u32> = (0..SMALL.blocks).collect();
    let backwards: Vec<u32> = all.iter().rev().copied().collect();
    let spans = [
        span(0..3, &all, &all),
        span(0..3, &all, &backwards),
        span(1..2, &[23], &[0]),
        span(0..2, &[4, 5, 6, 9], &[9, 10, 11, 12]),
        span(2..3, &[0, 2, 4], &[23, 21, 22]),
        span(0..3, &[7, 7], &[1, 2]),
        span(1..1, &[1], &[1]),
        span(0..3, &[], &[]),
    ];
    for (kind, place) in EVERYWHERE {
        for theirs in [Form::KvOuter, Form::BlockMajor] {
            let holder = holder_for(kind, with_form(theirs), place);
            for ours in [Form::KvOuter, Form::BlockMajor] {
                for span in &spans {
                    let local = kind.filled(with_form(ours), BEFORE);
                    let mut lane = holder.lane(kind, &local);
                    copy(lane.as_mut(), span).unwrap();
                    let case = format!("{kind:?} {place:?}, {theirs:?} to {ours:?}");
                    check(&local, SMALL, span, &case);
                }
            }
        }
    }
}

#[test]
fn any_blocks_in_any_order_arrive_over_one_lane() {
    for (kind, place) in EVERYWHERE {
        let mut random = StdRng::seed_from_u64(11);
        let holder = holder_for(kind, with_form(Form::BlockMajor), place);
        let local = kind.filled(SMALL, BEFORE);
        let mut lane = holder.lane(kind, &local);
        for round in 0..40 {
            let mut blocks: Vec<u32> = (0..SMALL.blocks).collect();
            blocks.shuffle(&mut random);
            let count = random.random_range(0..=SMALL.blocks as usize);
            let first = random.random_range(0..=SMALL.layers);
            let remote: Vec<u32> = (0..count).map(|_| random.random_range(0..SMALL.blocks)).collect();
            let span = span(
                first..random.random_range(first..=SMALL.layers),
                &remote,
                &blocks[..count],
            );
            copy(lane.as_mut(), &span).unwrap();
            check(
                &local,
                SMALL,
                &span,
                &format!("{kind:?} {place:?}, round {round}"),
            );
            for layer in 0..SMALL.layers {
                for block in 0..SMALL.blocks {
                    local.write_layer(layer, block, &content(BEFORE, layer, block, SMALL.layer_bytes));
                }
            }
        }
    }
}

#[test]
fn more_ranges_and_blocks_than_one_call_or_one_request_takes_arrive() {
    // 5000 blocks of two runs, none beside the one before: more than 1024 ranges, and more than 4096 blocks.
    let layout = Layout {
        form: Form::KvOuter,
        layers: 2,
        blocks: 5000,
        layer_bytes: 2 * 33,
    };
    let remote: Vec<u32> = (0..layout.blocks)
        .map(|index| index * 1777 % layout.blocks)
        .collect();
    let local_blocks: Vec<u32> = (0..layout.blocks)
        .map(|index| index * 333 % layout.blocks)
        .collect();
    // A block of more bytes than a window.
    let large = Layout {
        form: Form::BlockMajor,
        layers: 1,
        blocks: 2,
        layer_bytes: 9 << 20,
    };
    for (layout, span) in [
        (layout, span(0..2, &remote, &local_blocks)),
        (large, span(0..1, &[1, 0], &[0, 1])),
    ] {
        for (kind, place) in EVERYWHERE {
            let holder = holder_for(kind, layout, place);
            let local = kind.cache(layout);
            copy(holder.lane(kind, &local).as_mut(), &span).unwrap();
            let mut bytes = vec![0; layout.layer_bytes];
            for layer in 0..layout.layers {
                for (&theirs, &ours) in span.remote.iter().zip(&span.local) {
                    local.read_layer(layer, ours, &mut bytes);
                    let expected = content(1, layer, theirs, bytes.len());
                    assert!(
                        bytes == expected,
                        "{kind:?} {place:?}, layer {layer}, block {ours}"
                    );
                }
            }
        }
    }
}

#[test]
fn a_lapsed_lease_is_seen_and_the_lane_stays_open() {
    for (kind, place) in EVERYWHERE {
        let mut holder = holder_for(kind, SMALL, place);
        let local = kind.filled(SMALL, BEFORE);
        let mut lane = holder.lane(kind, &local);
        let never = AtomicBool::new(false);
        let span = span(0..3, &[1, 2], &[3, 4]);
        copy(lane.as_mut(), &span).unwrap();
        assert!(lane.is_held(LEASE, soon(), &never).unwrap());
        for epoch in [LEASE.epoch + 1, 0, LEASE.epoch << 8] {
            holder.set(LEASE.slot, epoch);
            let lapsed = copy(lane.as_mut(), &span).unwrap_err();
            assert!(
                matches!(lapsed, LaneError::Lapsed { slot: 5, epoch: 77 }),
                "{kind:?} {place:?}: {lapsed}"
            );
            assert!(!lane.is_held(LEASE, soon(), &never).unwrap());
            // No blocks at all are none of a lease that has lapsed, too.
            let nothing = Span {
                layers: 0..3,
                ..Span::default()
            };
            assert!(matches!(
                copy(lane.as_mut(), &nothing),
                Err(LaneError::Lapsed { .. })
            ));
        }
        assert!(lane.is_open());
        holder.set(LEASE.slot, LEASE.epoch);
        copy(lane.as_mut(), &span).unwrap();
        check(&local, SMALL, &span, &format!("{kind:?} {place:?}"));
    }
}

#[test]
fn a_lease_of_epoch_zero_or_of_no_slot_is_never_held() {
    for (kind, place) in EVERYWHERE {
        let holder = holder_for(kind, SMALL, place);
        let local = kind.cache(SMALL);
        for lease in [
            Lease { slot: 6, epoch: 0 },
            Lease { slot: 64, epoch: 77 },
            Lease {
                slot: u32::MAX,
                epoch: 0,
            },
        ] {
            let never = AtomicBool::new(false);
            let mut lane = holder.lane(kind, &local);
            let copied = lane.copy(&span(0..1, &[0], &[0]), lease, soon(), &never);
            assert!(copied.is_err(), "{kind:?} {place:?} {lease:?}");
            assert!(
                !matches!(lane.is_held(lease, soon(), &never), Ok(true)),
                "{kind:?} {place:?} {lease:?}"
            );
        }
    }
}

#[test]
fn a_span_beyond_a_cache_is_refused_before_anything_is_copied() {
    for (kind, place) in EVERYWHERE {
        let holder = holder_for(kind, SMALL, place);
        let local = kind.filled(SMALL, BEFORE);
        let mut lane = holder.lane(kind, &local);
        for wrong in [
            span(0..4, &[0], &[0]),
            span(0..1, &[0, SMALL.blocks], &[0, 1]),
            span(0..1, &[0, 1], &[0, SMALL.blocks]),
            span(0..1, &[0, 1], &[0]),
        ] {
            let refused = copy(lane.as_mut(), &wrong).unwrap_err();
            assert!(
                matches!(refused, LaneError::Request(_)),
                "{kind:?} {place:?}: {refused}"
            );
        }
        assert!(lane.is_open());
        check(&local, SMALL, &Span::default(), &format!("{kind:?} {place:?}"));
    }
}

#[test]
fn several_lanes_to_one_holder_copy_at_the_same_time() {
    for (kind, place) in EVERYWHERE {
        let holder = holder_for(kind, SMALL, place);
        let local = kind.filled(SMALL, BEFORE);
        let span_of = |thread: u32| {
            let blocks: Vec<u32> = (thread * 6..thread * 6 + 6).collect();
            span(0..3, &blocks, &blocks)
        };
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let mut lane = holder.lane(kind, &local);
                scope.spawn(move || {
                    for _ in 0..50 {
                        copy(lane.as_mut(), &span_of(thread)).unwrap();
                    }
                });
            }
        });
        let all: Vec<u32> = (0..SMALL.blocks).collect();
        check(
            &local,
            SMALL,
            &span(0..3, &all, &all),
            &format!("{kind:?} {place:?}"),
        );
    }
}

#[test]
fn a_lane_keeps_the_local_memory_while_it_lives() {
    let owners = |local: &LocalCache| match local {
        LocalCache::Host(cache) => Arc::strong_count(cache),
        LocalCache::Device(cache) => Arc::strong_count(cache),
    };
    for (kind, place) in EVERYWHERE {
        let holder = holder_for(kind, SMALL, place);
        let local = kind.cache(SMALL);
        let lane = holder.lane(kind, &local);
        assert!(owners(&local) > 1);
        drop(lane);
        assert_eq!(owners(&local), 1, "{kind:?} {place:?}");
    }
}
