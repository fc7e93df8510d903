//! Stores: layer by layer, all or nothing.

use std::time::{Duration, Instant};

use kvlane_core::{MissReason, Outcome};

use crate::fixture::{Factory, eventually, far, keys, namespace, plan};

/// Being allowed to read all layers is not being allowed to publish.
pub fn a_store_is_invisible_until_it_is_finished(factory: &dyn Factory) {
    let place = factory.place();
    let (producer, consumer) = (place.peer(namespace(), &plan()), place.peer(namespace(), &plan()));
    let keys = keys("layers", 3);
    let job = producer.begin(&keys);
    for layer in 0..producer.map().layer_count() {
        producer
            .backend
            .layer_ready(job, layer)
            .expect("the store is open");
        // Give a backend with threads of its own the time to do it wrong.
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(consumer.ready(&keys), 0, "after layer {layer}");
        assert!(matches!(consumer.load(&keys, &[0, 1, 2]), Outcome::Miss { .. }));
        assert_eq!(
            producer
                .backend
                .wait(job, Instant::now())
                .expect("the store is open"),
            None
        );
    }
    producer.backend.finish_store(job).expect("the store is open");
    assert_eq!(producer.outcome(job), Outcome::Done);
    assert_eq!(consumer.ready(&keys), 3);
    assert_eq!(consumer.load(&keys, &[9, 10, 11]), Outcome::Done);
    assert!(
        keys.iter()
            .zip(9..)
            .all(|(key, block)| consumer.holds(key, block))
    );
}

/// Hooks of different vLLM versions call in different orders, and layers that share a tensor call twice. A layer that
/// was not announced must not be read early: here it gets its bytes late.
pub fn layers_may_become_ready_in_any_order_and_twice(factory: &dyn Factory) {
    let place = factory.place();
    let (producer, consumer) = (place.peer(namespace(), &plan()), place.peer(namespace(), &plan()));
    let keys = keys("order", 2);
    let layers = producer.map().layer_count();
    let job = producer.begin_from(&keys, vec![0, 1], far());
    for layer in [layers - 1, 0, 0] {
        for (block, key) in keys.iter().enumerate() {
            write_layer(&producer, key, block as u32, layer);
        }
        producer
            .backend
            .layer_ready(job, layer)
            .expect("the store is open");
        std::thread::sleep(Duration::from_millis(5));
    }
    for (block, key) in keys.iter().enumerate() {
        (1..layers - 1).for_each(|layer| write_layer(&producer, key, block as u32, layer));
    }
    producer.backend.finish_store(job).expect("the store is open");
    assert_eq!(producer.outcome(job), Outcome::Done);
    assert_eq!(consumer.load(&keys, &[6, 5]), Outcome::Done);
    assert!(consumer.holds(&keys[0], 6) && consumer.holds(&keys[1], 5));
}

/// The request was aborted, or preempted: its blocks are about to hold something else.
pub fn a_cancelled_store_makes_nothing_visible(factory: &dyn Factory) {
    let place = factory.place();
    let (producer, consumer) = (place.peer(namespace(), &plan()), place.peer(namespace(), &plan()));
    let keys = keys("cancelled", 3);
    let job = producer.begin(&keys);
    producer.backend.layer_ready(job, 0).expect("the store is open");
    producer.backend.cancel(job);
    producer.backend.cancel(job);
    let missed = Outcome::Miss {
        positions: vec![0, 1, 2],
        reason: MissReason::Cancelled,
    };
    assert_eq!(producer.outcome(job), missed);
    assert_eq!(consumer.ready(&keys), 0);

    // Finishing it after all, before its end is known, must not help either.
    let job = producer.begin(&keys);
    producer.backend.cancel(job);
    producer
        .backend
        .finish_store(job)
        .expect("its completion was not taken yet");
    assert_eq!(producer.outcome(job), missed);
    assert_eq!(consumer.ready(&keys), 0);

    // And the keys are not spoilt.
    assert_eq!(producer.store(&keys), Outcome::Done);
    assert_eq!(consumer.ready(&keys), 3);
}

/// Nobody ever finishes it: the completion must come all the same.
pub fn a_store_past_its_deadline_ends_and_makes_nothing_visible(factory: &dyn Factory) {
    let place = factory.place();
    let (producer, consumer) = (place.peer(namespace(), &plan()), place.peer(namespace(), &plan()));
    let keys = keys("forgotten", 2);
    let missed = Outcome::Miss {
        positions: vec![0, 1],
        reason: MissReason::TimedOut,
    };

    let soon = Instant::now() + Duration::from_millis(50);
    let job = producer.begin_from(&keys, vec![0, 1], soon);
    producer.backend.layer_ready(job, 0).expect("the store is open");
    assert_eq!(producer.outcome(job), missed);
    assert!(Instant::now() >= soon, "the job ended before its deadline");

    let job = producer.begin_from(&keys, vec![0, 1], Instant::now() + Duration::from_millis(50));
    let mut done = Vec::new();
    eventually("a completion by poll", || {
        producer.backend.poll(&mut done);
        !done.is_empty()
    });
    assert_eq!((done.len(), done[0].job, &done[0].outcome), (1, job, &missed));

    let job = producer.begin_from(&keys, vec![0, 1], Instant::now());
    producer
        .backend
        .finish_store(job)
        .expect("its completion was not taken yet");
    assert_eq!(producer.outcome(job), missed);
    assert_eq!(consumer.ready(&keys), 0);
}

/// Two producers computed the same prompt. Which copy stays is not said; that both hold the same content is a premise,
/// broken here to see that nothing is mixed.
pub fn storing_a_present_key_is_done_and_changes_nothing(factory: &dyn Factory) {
    let place = factory.place();
    let (first, second) = (place.peer(namespace(), &plan()), place.peer(namespace(), &plan()));
    let keys = keys("twice", 4);
    assert_eq!(first.store(&keys[..3]), Outcome::Done);

    for (block, key) in keys.iter().enumerate() {
        match block {
            3 => second.compute(key, 3),
            other => second.set_payload(other as u32, &vec![0xee; second.map().block_bytes()]),
        }
    }
    let job = second.begin_from(&keys, vec![0, 1, 2, 3], far());
    second.backend.layer_ready(job, 0).expect("the store is open");
    second.backend.finish_store(job).expect("the store is open");
    assert_eq!(second.outcome(job), Outcome::Done);
    for peer in [&first, &second] {
        assert_eq!(peer.ready(&keys), 4);
        assert_eq!(peer.load(&keys, &[8, 9, 10, 11]), Outcome::Done);
        assert!(keys.iter().zip(8..).all(|(key, block)| peer.holds(key, block)));
    }
}

/// Nothing to do is done.
pub fn an_empty_store_is_done(factory: &dyn Factory) {
    let place = factory.place();
    let producer = place.peer(namespace(), &plan());
    assert_eq!(producer.store(&[]), Outcome::Done);
}

fn write_layer(peer: &crate::fixture::Peer, key: &kvlane_core::BlockKey, block: u32, layer: usize) {
    let map = peer.map();
    let start: usize = (0..layer).map(|layer| map.layer_bytes(layer)).sum();
    let payload = crate::fixture::content(key, map);
    peer.cache
        .write_layer(layer, block, &payload[start..start + map.layer_bytes(layer)]);
}
