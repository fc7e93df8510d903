//! Reservations: "not yet" instead of "no".
//!
//! A backend may publish them in the background, so their coming and going is waited for. A promised block never counts
//! as ready.

use std::time::{Duration, Instant};

use kvlane_core::{MissReason, Outcome};

use crate::fixture::{Factory, eventually, far, keys, namespace, plan};

/// A producer that died must not make others wait for ever.
pub fn a_reserved_block_is_pending_until_its_deadline(factory: &dyn Factory) {
    let place = factory.place();
    let (producer, consumer) = (place.peer(namespace(), &plan()), place.peer(namespace(), &plan()));
    // On a busy machine a second may pass before anybody looks.
    let is_seen = [1, 4].map(Duration::from_secs).into_iter().any(|lasts| {
        let keys = keys(&format!("deadline {lasts:?}"), 4);
        let deadline = Instant::now() + lasts;
        producer
            .backend
            .reserve(&keys, 0, deadline)
            .expect("a reservation");
        while consumer.lookup(&keys) != (0, 4) {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        let missed = Outcome::Miss {
            positions: vec![0, 1, 2, 3],
            reason: MissReason::Absent,
        };
        assert_eq!(consumer.load(&keys, &[0, 1, 2, 3]), missed);
        std::thread::sleep(deadline.saturating_duration_since(Instant::now()) + Duration::from_millis(1));
        // Wall clocks of processes may be cut to coarser steps than `Instant`.
        let mut last_seen = deadline;
        eventually("the promise is over", || {
            let asked = Instant::now();
            let is_over = consumer.lookup(&keys) == (0, 0);
            if !is_over {
                last_seen = asked;
            }
            is_over
        });
        assert!(
            last_seen < deadline + Duration::from_secs(1),
            "the promise outlived its deadline by a second"
        );
        true
    });
    assert!(is_seen, "the promise was never seen");
}

/// The request was aborted before it computed anything.
pub fn a_reserved_block_is_pending_until_it_is_withdrawn(factory: &dyn Factory) {
    let place = factory.place();
    let (producer, consumer) = (place.peer(namespace(), &plan()), place.peer(namespace(), &plan()));
    let keys = keys("withdrawn", 4);
    producer.backend.reserve(&keys, 0, far()).expect("a reservation");
    eventually("the promise is seen", || consumer.lookup(&keys) == (0, 4));
    producer.backend.withdraw(&keys[2..]).expect("a withdrawal");
    eventually("half of it is taken back", || consumer.lookup(&keys) == (0, 2));
    producer
        .backend
        .withdraw(&keys)
        .expect("unknown keys are ignored");
    eventually("all of it is taken back", || consumer.lookup(&keys) == (0, 0));
    // And it can be made again.
    producer.backend.reserve(&keys, 0, far()).expect("a reservation");
    eventually("the new promise is seen", || consumer.lookup(&keys) == (0, 4));
}

/// Another worker's abort says nothing about this one's prefill.
pub fn a_promise_is_taken_back_only_by_its_maker(factory: &dyn Factory) {
    let place = factory.place();
    let (producer, consumer) = (place.peer(namespace(), &plan()), place.peer(namespace(), &plan()));
    let keys = keys("mine", 3);
    producer.backend.reserve(&keys, 0, far()).expect("a reservation");
    eventually("the promise is seen", || consumer.lookup(&keys) == (0, 3));
    consumer.backend.withdraw(&keys).expect("a withdrawal");
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(consumer.lookup(&keys), (0, 3));
}

/// Pending turns into ready; nothing is left behind.
pub fn a_store_keeps_its_promise(factory: &dyn Factory) {
    let place = factory.place();
    let (producer, consumer) = (place.peer(namespace(), &plan()), place.peer(namespace(), &plan()));
    let keys = keys("kept", 5);
    producer.backend.reserve(&keys, 0, far()).expect("a reservation");
    eventually("the promise is seen", || consumer.lookup(&keys) == (0, 5));

    let job = producer.begin(&keys[..3]);
    producer.backend.layer_ready(job, 0).expect("the store is open");
    assert_eq!(consumer.lookup(&keys), (0, 5));
    producer.backend.finish_store(job).expect("the store is open");
    assert_eq!(producer.outcome(job), Outcome::Done);
    assert_eq!(consumer.lookup(&keys), (3, 2));

    assert_eq!(producer.store(&keys[3..]), Outcome::Done);
    assert_eq!(consumer.lookup(&keys), (5, 0));
    producer
        .backend
        .withdraw(&keys)
        .expect("nothing is left to withdraw");
    assert_eq!(consumer.lookup(&keys), (5, 0));
    assert_eq!(consumer.load(&keys, &[7, 8, 9, 10, 11]), Outcome::Done);
    assert!(
        keys.iter()
            .zip(7..)
            .all(|(key, block)| consumer.holds(key, block))
    );
}

/// A chain whose middle was evicted is promised again: what is present behind the hole will be of use then.
pub fn a_reservation_leaves_present_blocks_as_they_are(factory: &dyn Factory) {
    let place = factory.place();
    let (producer, consumer) = (place.peer(namespace(), &plan()), place.peer(namespace(), &plan()));
    let keys = keys("middle", 6);
    assert_eq!(producer.store(&keys[..2]), Outcome::Done);
    assert_eq!(producer.store(&keys[3..5]), Outcome::Done);
    assert_eq!(consumer.lookup(&keys), (2, 0));
    producer.backend.reserve(&keys, 0, far()).expect("a reservation");
    eventually("the promise is seen", || consumer.lookup(&keys) == (2, 4));
    producer.backend.withdraw(&keys).expect("a withdrawal");
    eventually("the promise is taken back", || consumer.lookup(&keys) == (2, 0));
    assert_eq!(consumer.ready(&keys[3..]), 2);
}
