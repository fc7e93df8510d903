//! Many at once, and more than fits: misses are allowed, wrong bytes are not.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use kvlane_core::{BlockKey, Chain, ChainRoot, MissReason, Outcome};

use crate::fixture::{Factory, PATIENCE, Peer, keys, namespace, plan};
use crate::layouts::{self, Plan, Sizes};

/// Producers store overlapping chains while consumers load them.
pub fn many_threads_store_and_load_right_bytes(factory: &dyn Factory) {
    const CHAINS: usize = 6;
    const ROUNDS: usize = 30;
    let place = factory.place();
    let chains: Vec<Vec<BlockKey>> = (0..CHAINS)
        .map(|chain| keys(&format!("thread {chain}"), 12))
        .collect();
    let loaded = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for thread in 0..3 {
            let (producer, consumer) = (place.peer(namespace(), &plan()), place.peer(namespace(), &plan()));
            let (chains, loaded) = (&chains, &loaded);
            scope.spawn(move || {
                for round in 0..ROUNDS {
                    let chain = &chains[(thread * 7 + round * 5) % CHAINS];
                    assert_eq!(producer.store(&chain[..4 + (round + thread) % 9]), Outcome::Done);
                }
            });
            scope.spawn(move || {
                // Until it has seen enough: the producers may be slow to begin.
                for round in 0.. {
                    let chain = &chains[(thread * 5 + round) % CHAINS];
                    let ready = consumer.ready(chain);
                    loaded.fetch_add(check(&consumer, &chain[..ready]), Ordering::Relaxed);
                    if round >= ROUNDS && loaded.load(Ordering::Relaxed) > 0 {
                        break;
                    }
                    std::thread::yield_now();
                }
            });
        }
    });
    assert!(loaded.into_inner() > 0);
    let last = place.peer(namespace(), &plan());
    for chain in &chains {
        let ready = last.ready(chain);
        assert_eq!(
            check(&last, &chain[..ready]),
            ready,
            "nothing was evicted from a place with room"
        );
    }
}

/// Three times as much as fits, while a reader loads what it is told is there.
pub fn eviction_never_returns_wrong_bytes(factory: &dyn Factory) {
    let place = factory.small_place();
    let plan = sized_plan(place.capacity_bytes() / 32);
    let (producer, consumer) = (place.peer(namespace(), &plan), place.peer(namespace(), &plan));
    let block_bytes = producer.map().block_bytes();
    let count = 3 * place.capacity_bytes() / block_bytes / 8;
    let chains: Vec<Vec<BlockKey>> = (0..count)
        .map(|chain| keys(&format!("evicted {chain}"), 8))
        .collect();

    let stored = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for chain in &chains {
                if let Outcome::Miss { reason, .. } = producer.store(chain) {
                    assert_eq!(reason, MissReason::Dropped);
                }
                stored.fetch_add(1, Ordering::Release);
            }
        });
        scope.spawn(|| {
            while stored.load(Ordering::Acquire) < count {
                for chain in &chains[..stored.load(Ordering::Acquire)] {
                    let ready = consumer.ready(chain);
                    check(&consumer, &chain[..ready]);
                }
                std::thread::yield_now();
            }
        });
    });

    let present: usize = chains.iter().map(|chain| check(&consumer, chain)).sum();
    assert!(present > 0, "nothing survived");
    assert!(
        present * block_bytes <= place.capacity_bytes(),
        "{present} blocks of {block_bytes} bytes are more than the place holds"
    );
    assert_eq!(
        check(&consumer, &chains[count - 1]),
        8,
        "the newest chain is not there"
    );
}

/// Three times as much as fits, of chains that all begin with the same system prompt: a full place goes on working.
pub fn chains_that_begin_alike_evict_each_other(factory: &dyn Factory) {
    let place = factory.small_place();
    let plan = sized_plan(place.capacity_bytes() / 32);
    let (producer, consumer) = (place.peer(namespace(), &plan), place.peer(namespace(), &plan));
    let count = 3 * place.capacity_bytes() / producer.map().block_bytes() / 4;
    let prompts = common_start("the system prompt", 2, 6, count);
    for chain in &prompts {
        let deadline = Instant::now() + PATIENCE;
        producer
            .backend
            .reserve(chain, 0, deadline)
            .expect("it may be promised");
        assert_eq!(producer.store(chain), Outcome::Done);
        assert_eq!(check(&consumer, chain), 6, "the newest chain is not there");
    }
}

/// A request never evicts its own chain: its head is kept, its tail is dropped and named.
pub fn a_store_larger_than_the_place_says_what_was_dropped(factory: &dyn Factory) {
    let place = factory.small_place();
    let plan = sized_plan(place.capacity_bytes() / 8);
    let (producer, consumer) = (place.peer(namespace(), &plan), place.peer(namespace(), &plan));
    let chain = keys("too long", 12);
    let outcome = producer.store(&chain);
    let Outcome::Miss {
        positions,
        reason: MissReason::Dropped,
    } = outcome
    else {
        panic!(
            "12 blocks do not fit into {} bytes, but: {outcome:?}",
            place.capacity_bytes()
        );
    };
    let kept = positions[0];
    assert!(kept > 0, "not even the head was kept");
    assert_eq!(
        positions,
        (kept..12).collect::<Vec<_>>(),
        "the head is kept, the tail is dropped"
    );
    assert_eq!(consumer.ready(&chain), kept);
    assert_eq!(check(&consumer, &chain[..kept]), kept);
}

/// Loads keys and returns how many were there; those must be right.
#[track_caller]
fn check(peer: &Peer, keys: &[BlockKey]) -> usize {
    let blocks: Vec<u32> = (0..keys.len() as u32).collect();
    let wrong = match peer.load(keys, &blocks) {
        Outcome::Done => Vec::new(),
        Outcome::Miss { positions, reason } => {
            assert!(
                matches!(reason, MissReason::Absent | MissReason::Recycled),
                "{reason:?}"
            );
            positions
        }
    };
    for (position, key) in keys
        .iter()
        .enumerate()
        .filter(|(position, _)| !wrong.contains(position))
    {
        assert!(
            peer.holds(key, position as u32),
            "position {position} has wrong bytes"
        );
    }
    keys.len() - wrong.len()
}

/// `count` chains of `length` blocks of which the first `common` are the same.
fn common_start(salt: &str, common: usize, length: usize, count: usize) -> Vec<Vec<BlockKey>> {
    let root = ChainRoot::new(4)
        .expect("4 tokens are allowed")
        .with_cache_salt(salt);
    let prompt = |number: usize| {
        let mut chain = Chain::new(&root);
        chain.extend(0..4 * common as u32);
        chain.extend((0..4 * (length - common) as u32).map(|token| 1_000 * (number as u32 + 1) + token));
        chain.keys().to_vec()
    };
    (0..count).map(prompt).collect()
}

/// A cache of 12 blocks of about `block_bytes` each.
fn sized_plan(block_bytes: usize) -> Plan {
    let small = Sizes::SMALL;
    let token_bytes = 2 * small.heads * small.dim * small.layers * u64::from(small.element_bytes);
    layouts::usual(Sizes {
        tokens: (block_bytes as u64 / token_bytes).max(1),
        ..small
    })
}
