//! Misuse is refused before anything happens: an out-of-range block would be somebody else's memory.

use kvlane_core::{BlockKey, Error, LoadOrder, LoadRequest, Outcome, StoreRequest};

use crate::fixture::{Factory, Peer, far, keys, namespace, plan};

/// Stores: nothing becomes visible, no job exists.
pub fn stores_with_wrong_blocks_are_refused_and_change_nothing(factory: &dyn Factory) {
    let place = factory.place();
    let peer = place.peer(namespace(), &plan());
    for (what, keys, blocks) in wrong_requests(&peer) {
        let request = StoreRequest {
            keys: keys.clone(),
            blocks,
            first_depth: 0,
            deadline: far(),
        };
        let refused = peer.backend.begin_store(request);
        assert!(
            matches!(refused, Err(Error::InvalidArgument { .. })),
            "{what}: {refused:?}"
        );
        assert_eq!(peer.lookup(&keys), (0, 0), "{what}");
    }
    no_job_is_left(&peer);
}

/// Loads: no byte of the cache changes, no job exists.
pub fn loads_with_wrong_blocks_are_refused_and_change_nothing(factory: &dyn Factory) {
    let place = factory.place();
    let (producer, consumer) = (place.peer(namespace(), &plan()), place.peer(namespace(), &plan()));
    let before = keys("before", consumer.map().block_count() as usize);
    before
        .iter()
        .zip(0..)
        .for_each(|(key, block)| consumer.compute(key, block));
    assert_eq!(producer.store(&keys("wrong", 4)), Outcome::Done);
    for (what, keys, blocks) in wrong_requests(&consumer) {
        let request = LoadRequest {
            keys,
            blocks,
            deadline: far(),
            order: LoadOrder::BlockMajor,
        };
        let refused = consumer.backend.load(request);
        assert!(
            matches!(refused, Err(Error::InvalidArgument { .. })),
            "{what}: {refused:?}"
        );
    }
    assert!(
        before
            .iter()
            .zip(0..)
            .all(|(key, block)| consumer.holds(key, block))
    );
    no_job_is_left(&consumer);
}

/// A layer that the cache does not have; the job itself goes on.
pub fn layers_out_of_range_are_refused(factory: &dyn Factory) {
    let place = factory.place();
    let peer = place.peer(namespace(), &plan());
    let keys = keys("layers", 2);
    let layers = peer.map().layer_count();
    let store = peer.begin(&keys);
    for layer in [layers, usize::MAX] {
        assert!(matches!(
            peer.backend.layer_ready(store, layer),
            Err(Error::InvalidArgument { .. })
        ));
    }
    peer.backend.finish_store(store).expect("the store is open");
    assert_eq!(peer.outcome(store), Outcome::Done);

    let load = peer.begin_load(&keys, &[4, 5], LoadOrder::LayerMajor);
    for layer in [layers, usize::MAX] {
        assert!(matches!(
            peer.backend.wait_layer(load, layer, far()),
            Err(Error::InvalidArgument { .. })
        ));
    }
    assert_eq!(peer.outcome(load), Outcome::Done);
}

fn wrong_requests(peer: &Peer) -> Vec<(&'static str, Vec<BlockKey>, Vec<u32>)> {
    let keys = keys("wrong", 4);
    let count = peer.map().block_count();
    vec![
        ("fewer blocks than keys", keys.clone(), vec![0, 1, 2]),
        ("more blocks than keys", keys.clone(), vec![0, 1, 2, 3, 4]),
        ("a block twice", keys.clone(), vec![0, 1, 2, 0]),
        ("a key twice", vec![keys[0], keys[1], keys[0]], vec![0, 1, 2]),
        ("the block behind the last", keys.clone(), vec![0, 1, 2, count]),
        ("a block far outside", keys, vec![u32::MAX, 1, 2, 3]),
    ]
}

fn no_job_is_left(peer: &Peer) {
    let mut done = Vec::new();
    peer.backend.poll(&mut done);
    assert_eq!(done, [], "a refused request has a completion");
}
