//! What others see, and that it is what was stored.

use kvlane_core::{MissReason, Outcome};

use crate::fixture::{Factory, keys, namespace, namespace_of, plan};
use crate::layouts::{self, Sizes};

/// Round trip through two caches, into other blocks, for every layout.
pub fn stored_bytes_come_back_in_every_layout(factory: &dyn Factory) {
    for plan in layouts::all(Sizes::SMALL) {
        let place = factory.place();
        let producer = place.peer(namespace(), &plan);
        let consumer = place.peer(namespace(), &plan);
        let keys = keys(&plan.name, 5);
        assert_eq!(producer.store(&keys), Outcome::Done, "{}", plan.name);
        assert_eq!(consumer.ready(&keys), 5, "{}", plan.name);

        let blocks = [11, 3, 7, 4, 8];
        assert_eq!(consumer.load(&keys, &blocks), Outcome::Done, "{}", plan.name);
        for (key, block) in keys.iter().zip(blocks) {
            assert!(
                consumer.holds(key, block),
                "{}: block {block} of {key:?}",
                plan.name
            );
        }
    }
}

/// A store owns a copy: the cache block is the engine's again once the completion was delivered.
pub fn stored_bytes_stay_when_the_cache_block_is_reused(factory: &dyn Factory) {
    let place = factory.place();
    let (producer, consumer) = (place.peer(namespace(), &plan()), place.peer(namespace(), &plan()));
    let (first, second) = (keys("first", 4), keys("second", 4));
    assert_eq!(producer.store(&first), Outcome::Done);
    assert_eq!(producer.store(&second), Outcome::Done);
    assert_eq!(consumer.load(&first, &[0, 1, 2, 3]), Outcome::Done);
    assert_eq!(consumer.load(&second, &[4, 5, 6, 7]), Outcome::Done);
    for (block, key) in first.iter().chain(&second).enumerate() {
        assert!(consumer.holds(key, block as u32), "block {block}");
    }
}

/// A prefix with a hole is no prefix.
pub fn lookup_stops_at_the_first_hole(factory: &dyn Factory) {
    let place = factory.place();
    let (producer, consumer) = (place.peer(namespace(), &plan()), place.peer(namespace(), &plan()));
    let keys = keys("hole", 6);
    assert_eq!(producer.store(&keys[..2]), Outcome::Done);
    assert_eq!(producer.store(&keys[3..]), Outcome::Done);
    for peer in [&producer, &consumer] {
        assert_eq!(peer.lookup(&keys), (2, 0));
        assert_eq!(peer.lookup(&keys[2..]), (0, 0));
        assert_eq!(peer.lookup(&keys[3..]), (3, 0));
        assert_eq!(peer.lookup(&[]), (0, 0));
    }
}

/// Nothing is made up.
pub fn an_unknown_key_is_a_miss(factory: &dyn Factory) {
    let place = factory.place();
    let (producer, consumer) = (place.peer(namespace(), &plan()), place.peer(namespace(), &plan()));
    assert_eq!(producer.store(&keys("known", 3)), Outcome::Done);
    let unknown = keys("unknown", 3);
    assert_eq!(consumer.lookup(&unknown), (0, 0));
    let missed = Outcome::Miss {
        positions: vec![0, 1, 2],
        reason: MissReason::Absent,
    };
    assert_eq!(consumer.load(&unknown, &[0, 1, 2]), missed);
}

/// Equal tokens under another model are another thing.
pub fn another_namespace_is_a_miss(factory: &dyn Factory) {
    let place = factory.place();
    let producer = place.peer(namespace_of("one model"), &plan());
    let stranger = place.peer(namespace_of("another model"), &plan());
    let keys = keys("shared tokens", 3);
    assert_eq!(producer.store(&keys), Outcome::Done);
    assert_eq!(stranger.lookup(&keys), (0, 0));
    let missed = Outcome::Miss {
        positions: vec![0, 1, 2],
        reason: MissReason::Absent,
    };
    assert_eq!(stranger.load(&keys, &[0, 1, 2]), missed);

    // Both may use the same place side by side.
    assert_eq!(stranger.store(&keys[..1]), Outcome::Done);
    assert_eq!(stranger.ready(&keys), 1);
    assert_eq!(producer.ready(&keys), 3);
}

/// Peers that were there before the store, the producer itself, and one that comes later.
pub fn a_finished_store_is_visible_to_all_peers(factory: &dyn Factory) {
    let place = factory.place();
    let (producer, early) = (place.peer(namespace(), &plan()), place.peer(namespace(), &plan()));
    let keys = keys("seen", 4);
    assert_eq!(early.lookup(&keys), (0, 0));
    assert_eq!(producer.store(&keys), Outcome::Done);
    let late = place.peer(namespace(), &plan());
    for peer in [&producer, &early, &late] {
        assert_eq!(peer.lookup(&keys), (4, 0));
        assert_eq!(peer.load(&keys, &[8, 9, 10, 11]), Outcome::Done);
        assert!(keys.iter().zip(8..).all(|(key, block)| peer.holds(key, block)));
    }
}

/// The engine's weights were replaced: all peers of the place must forget, the one that did not ask included.
pub fn reset_hides_everything_from_everyone(factory: &dyn Factory) {
    let place = factory.place();
    let (producer, consumer) = (place.peer(namespace(), &plan()), place.peer(namespace(), &plan()));
    let keys = keys("reset", 4);
    assert_eq!(producer.store(&keys), Outcome::Done);
    assert_eq!(consumer.ready(&keys), 4);
    consumer.backend.reset().expect("a reset");
    let late = place.peer(namespace(), &plan());
    for peer in [&producer, &consumer, &late] {
        assert_eq!(peer.lookup(&keys), (0, 0));
        let missed = Outcome::Miss {
            positions: vec![0, 1, 2, 3],
            reason: MissReason::Absent,
        };
        assert_eq!(peer.load(&keys, &[8, 9, 10, 11]), missed);
    }
}

/// Its bytes were computed before the reset.
pub fn a_store_from_before_a_reset_does_not_appear_after_it(factory: &dyn Factory) {
    let place = factory.place();
    let (producer, consumer) = (place.peer(namespace(), &plan()), place.peer(namespace(), &plan()));
    let keys = keys("late", 4);
    let job = producer.begin(&keys);
    producer.backend.layer_ready(job, 0).expect("the store is open");
    producer.backend.reset().expect("a reset");
    producer.backend.finish_store(job).expect("the store is known");
    assert!(matches!(producer.outcome(job), Outcome::Miss { .. }));
    assert_eq!(producer.ready(&keys), 0);
    assert_eq!(consumer.ready(&keys), 0);
}

/// A reset is no end.
pub fn after_a_reset_blocks_can_be_stored_again(factory: &dyn Factory) {
    let place = factory.place();
    let (producer, consumer) = (place.peer(namespace(), &plan()), place.peer(namespace(), &plan()));
    let keys = keys("again", 4);
    for _ in 0..3 {
        assert_eq!(producer.store(&keys), Outcome::Done);
        assert_eq!(consumer.ready(&keys), 4);
        assert_eq!(consumer.load(&keys, &[4, 5, 6, 7]), Outcome::Done);
        assert!(
            keys.iter()
                .zip(4..)
                .all(|(key, block)| consumer.holds(key, block))
        );
        producer.backend.reset().expect("a reset");
        assert_eq!(consumer.ready(&keys), 0);
    }
}
