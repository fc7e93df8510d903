//! The protocol in simulated time: random orders of events, seeded. The risks: bytes that are taken for right and are
//! not, a write into a block that is somebody else's, a wait without end, and anything that is never given back.
//!
//! `KVLANE_SCHEDULES` sets the number of schedules (10,000), `KVLANE_SEED` the first seed.

mod world;

use std::time::Instant;

use world::{Faults, World};

fn schedules(default: u64) -> std::ops::Range<u64> {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let first = number("KVLANE_SEED").unwrap_or(1);
    first..first + number("KVLANE_SCHEDULES").unwrap_or(default)
}

#[test]
fn no_schedule_hangs_leaks_or_takes_wrong_bytes_for_right() {
    let started = Instant::now();
    let mut totals = world::Totals::default();
    let seeds = schedules(10_000);
    for seed in seeds.clone() {
        totals.add(&World::run(seed, Faults::all(seed)));
    }
    println!("seeds {seeds:?}, {:?}: {totals:?}", started.elapsed());
    // The schedules must reach what they are about.
    assert!(
        totals.pulled > 0 && totals.lapsed > 0 && totals.broken > 0 && totals.restarts > 0,
        "{totals:?}"
    );
    assert!(totals.pulled_as_posted > 0 && totals.taken > 0, "{totals:?}");
    assert!(
        totals.timed_out > 0 && totals.cancelled > 0 && totals.lies > 0,
        "{totals:?}"
    );
}

#[test]
fn without_faults_every_prompt_that_is_held_long_enough_arrives() {
    let mut totals = world::Totals::default();
    for seed in schedules(200) {
        totals.add(&World::run(seed, Faults::none()));
    }
    println!("{totals:?}");
    assert!(totals.pulled > 0, "{totals:?}");
    assert_eq!(totals.pulled, totals.requests, "{totals:?}");
}

#[test]
fn a_copy_that_no_lease_guards_is_caught_by_this_very_test() {
    // The world must notice what the protocol prevents: here it is told that every lease is held.
    let caught = schedules(10_000).any(|seed| {
        let faults = Faults {
            blind_to_lapses: true,
            ..Faults::all(seed)
        };
        std::panic::catch_unwind(|| World::run(seed, faults)).is_err()
    });
    assert!(caught, "wrong bytes went unseen");
}
