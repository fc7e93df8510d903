//! Loads: right bytes in the right blocks, and an exact account of what is missing.

use std::time::Instant;

use kvlane_core::{LoadOrder, LoadRequest, MissReason, Outcome};

use crate::fixture::{Factory, far, keys, namespace, plan};

/// The scheduler recomputes from the first bad block, so positions must be exact and the blocks before it whole.
pub fn absent_keys_are_reported_by_position_and_the_rest_is_right(factory: &dyn Factory) {
    let place = factory.place();
    let (producer, consumer) = (place.peer(namespace(), &plan()), place.peer(namespace(), &plan()));
    let (there, gone) = (keys("there", 4), keys("gone", 3));
    assert_eq!(producer.store(&there), Outcome::Done);
    let mixed = [there[0], gone[0], there[1], there[2], gone[1], gone[2], there[3]];
    let blocks = [2, 4, 6, 8, 10, 1, 3];
    for order in [LoadOrder::BlockMajor, LoadOrder::LayerMajor] {
        blocks
            .iter()
            .for_each(|&block| consumer.set_payload(block, &vec![0; consumer.map().block_bytes()]));
        let job = consumer.begin_load(&mixed, &blocks, order);
        let missed = Outcome::Miss {
            positions: vec![1, 4, 5],
            reason: MissReason::Absent,
        };
        assert_eq!(consumer.outcome(job), missed);
        for position in [0, 2, 3, 6] {
            assert!(
                consumer.holds(&mixed[position], blocks[position]),
                "position {position}, {order:?}"
            );
        }
    }
}

/// The neighbours belong to running requests.
pub fn a_load_touches_no_other_block(factory: &dyn Factory) {
    for plan in crate::layouts::all(crate::layouts::Sizes::SMALL) {
        let place = factory.place();
        let (producer, consumer) = (place.peer(namespace(), &plan), place.peer(namespace(), &plan));
        let (stored, neighbours) = (keys("stored", 2), keys("neighbours", 12));
        assert_eq!(producer.store(&stored), Outcome::Done);
        neighbours
            .iter()
            .zip(0..)
            .for_each(|(key, block)| consumer.compute(key, block));
        assert_eq!(consumer.load(&stored, &[6, 4]), Outcome::Done, "{}", plan.name);
        for (block, key) in neighbours
            .iter()
            .enumerate()
            .filter(|(block, _)| ![4, 6].contains(block))
        {
            assert!(
                consumer.holds(key, block as u32),
                "{}: block {block} was touched",
                plan.name
            );
        }
    }
}

/// The order is a matter of speed.
pub fn both_orders_bring_the_same_bytes(factory: &dyn Factory) {
    let place = factory.place();
    let (producer, consumer) = (place.peer(namespace(), &plan()), place.peer(namespace(), &plan()));
    let keys = keys("orders", 5);
    assert_eq!(producer.store(&keys), Outcome::Done);
    for (order, first_block) in [(LoadOrder::BlockMajor, 0), (LoadOrder::LayerMajor, 5)] {
        let blocks: Vec<u32> = (first_block..first_block + 5).collect();
        let job = consumer.begin_load(&keys, &blocks, order);
        assert_eq!(consumer.outcome(job), Outcome::Done);
        assert!(
            keys.iter()
                .zip(blocks)
                .all(|(key, block)| consumer.holds(key, block)),
            "{order:?}"
        );
    }
}

/// The forward pass reads the layer right behind `wait_layer`, while later layers are still on their way.
pub fn a_layer_is_complete_once_it_was_waited_for(factory: &dyn Factory) {
    let place = factory.place();
    let (producer, consumer) = (place.peer(namespace(), &plan()), place.peer(namespace(), &plan()));
    let keys = keys("by layer", 6);
    assert_eq!(producer.store(&keys), Outcome::Done);
    for order in [LoadOrder::LayerMajor, LoadOrder::BlockMajor] {
        let blocks = [0, 2, 4, 6, 8, 10];
        blocks
            .iter()
            .for_each(|&block| consumer.set_payload(block, &vec![0; consumer.map().block_bytes()]));
        let job = consumer.begin_load(&keys, &blocks, order);
        let mut start = 0;
        for layer in 0..consumer.map().layer_count() {
            assert!(
                consumer
                    .backend
                    .wait_layer(job, layer, far())
                    .expect("the load is known"),
                "layer {layer}"
            );
            let bytes = consumer.map().layer_bytes(layer);
            for (key, block) in keys.iter().zip(blocks) {
                let mut found = vec![0; bytes];
                consumer.cache.read_layer(layer, block, &mut found);
                let wanted = &crate::fixture::content(key, consumer.map())[start..start + bytes];
                assert!(found == wanted, "layer {layer} of block {block}, {order:?}");
            }
            start += bytes;
        }
        assert_eq!(consumer.outcome(job), Outcome::Done);
    }
}

/// "No" comes at once, not at the deadline, and the completion tells the rest.
pub fn waiting_for_a_layer_of_a_missed_load_says_no(factory: &dyn Factory) {
    let place = factory.place();
    let (producer, consumer) = (place.peer(namespace(), &plan()), place.peer(namespace(), &plan()));
    let (mut wanted, gone) = (keys("layer there", 3), keys("layer gone", 1));
    assert_eq!(producer.store(&wanted), Outcome::Done);
    wanted.extend(gone);
    let asked = Instant::now();
    let job = consumer.begin_load(&wanted, &[0, 1, 2, 3], LoadOrder::LayerMajor);
    let last = consumer.map().layer_count() - 1;
    assert!(
        !consumer
            .backend
            .wait_layer(job, last, far())
            .expect("the load is known")
    );
    assert!(
        asked.elapsed() < crate::fixture::PATIENCE / 2,
        "waited for a layer that cannot come"
    );
    assert_eq!(
        consumer.outcome(job),
        Outcome::Miss {
            positions: vec![3],
            reason: MissReason::Absent
        }
    );
}

/// Too late is a miss, even if the block is there.
pub fn a_load_past_its_deadline_is_a_miss(factory: &dyn Factory) {
    let place = factory.place();
    let (producer, consumer) = (place.peer(namespace(), &plan()), place.peer(namespace(), &plan()));
    let keys = keys("late", 2);
    assert_eq!(producer.store(&keys), Outcome::Done);
    let request = LoadRequest {
        keys: keys.clone(),
        blocks: vec![0, 1],
        deadline: Instant::now(),
        order: LoadOrder::BlockMajor,
    };
    let job = consumer.backend.load(request).expect("a late load is no misuse");
    assert_eq!(
        consumer.outcome(job),
        Outcome::Miss {
            positions: vec![0, 1],
            reason: MissReason::TimedOut
        }
    );
    // The next one is not harmed.
    assert_eq!(consumer.load(&keys, &[0, 1]), Outcome::Done);
    assert!(consumer.holds(&keys[0], 0) && consumer.holds(&keys[1], 1));
}

/// Nothing to do is done.
pub fn an_empty_load_is_done(factory: &dyn Factory) {
    let place = factory.place();
    let consumer = place.peer(namespace(), &plan());
    assert_eq!(consumer.load(&[], &[]), Outcome::Done);
}
