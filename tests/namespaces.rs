//! Two servers that differ in anything that decides KV must not exchange a block. The risk: fluent, wrong answers.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvlane_core::reference::{MemoryBackend, MemoryStore};
use kvlane_core::{
    BlockKey, Chain, ChainRoot, KvTransfer, LoadOrder, LoadRequest, MissReason, NamespaceId, NamespaceParts,
    Outcome, OwnedCache, StoreRequest,
};
use kvlane_tests::layouts::{self, Plan, Sizes};

/// What decides the KV of one request on one worker.
#[derive(Clone)]
struct Setup {
    weights: &'static str,
    rank: &'static str,
    plan: Plan,
    block_tokens: u32,
    salt: Option<&'static str>,
    lora: Option<&'static [u8]>,
    image: Option<(u64, u64, &'static str)>,
    first_token: u32,
}

const PROMPT_BLOCKS: u32 = 4;

impl Setup {
    fn usual() -> Self {
        Self {
            weights: "index sha256:11",
            rank: "tp 0/2 pp 0/1",
            plan: layouts::usual(Sizes::SMALL),
            block_tokens: 16,
            salt: None,
            lora: None,
            image: Some((2, 10, "sha256:ca7")),
            first_token: 1,
        }
    }

    fn namespace(&self) -> NamespaceId {
        let map = self.plan.map(4096);
        NamespaceParts::new()
            .with("weights", self.weights)
            .and_then(|parts| parts.with("rank", self.rank))
            .and_then(|parts| parts.with("layout", format!("{:x?}", map.fingerprint())))
            .expect("three names")
            .id()
    }

    fn keys(&self) -> Vec<BlockKey> {
        let mut root = ChainRoot::new(self.block_tokens).expect("an allowed size");
        if let Some(salt) = self.salt {
            root = root.with_cache_salt(salt);
        }
        if let Some(lora) = self.lora {
            root = root.with_lora(lora);
        }
        let mut chain = Chain::new(&root);
        if let Some((start, length, identifier)) = self.image {
            chain
                .add_image(start, length, identifier)
                .expect("no token is in the chain yet");
        }
        chain.extend(
            (0..PROMPT_BLOCKS * self.block_tokens).map(|i| if i == 0 { self.first_token } else { i }),
        );
        chain.keys().to_vec()
    }

    fn worker(&self, store: &Arc<MemoryStore>) -> MemoryBackend {
        let cache = Arc::new(OwnedCache::new(self.plan.map(4096)));
        MemoryBackend::new(Arc::clone(store), self.namespace(), cache)
    }
}

/// How many leading blocks of its own prompt `consumer` finds and loads after `producer` has stored the same prompt.
fn found(producer: &Setup, consumer: &Setup) -> usize {
    let store = MemoryStore::new(16 << 20);
    let deadline = Instant::now() + Duration::from_secs(10);

    let keys = producer.keys();
    let worker = producer.worker(&store);
    let blocks = (0..keys.len() as u32).collect();
    let job = worker
        .begin_store(StoreRequest {
            keys,
            blocks,
            first_depth: 0,
            deadline,
        })
        .expect("a right request");
    worker.finish_store(job).expect("the store is open");
    assert_eq!(
        worker
            .wait(job, deadline)
            .expect("a known job")
            .map(|end| end.outcome),
        Some(Outcome::Done)
    );

    let keys = consumer.keys();
    let worker = consumer.worker(&store);
    let ready = worker.lookup(&keys).ready_blocks;
    // Who skips the lookup must not get more than it would have promised.
    let blocks = (0..keys.len() as u32).collect();
    let request = LoadRequest {
        keys: keys.clone(),
        blocks,
        deadline,
        order: LoadOrder::BlockMajor,
    };
    let job = worker.load(request).expect("a right request");
    let outcome = worker
        .wait(job, deadline)
        .expect("a known job")
        .map(|end| end.outcome);
    let wanted = match ready {
        all if all == keys.len() => Outcome::Done,
        some => Outcome::Miss {
            positions: (some..keys.len()).collect(),
            reason: MissReason::Absent,
        },
    };
    assert_eq!(outcome, Some(wanted));
    ready
}

#[test]
fn the_same_setup_finds_its_blocks() {
    assert_eq!(found(&Setup::usual(), &Setup::usual()), PROMPT_BLOCKS as usize);
}

#[test]
fn whatever_differs_from_the_first_token_on_is_a_miss() {
    let usual = Setup::usual();
    let sized = |sizes| layouts::usual(sizes);
    let others = [
        (
            "weights",
            Setup {
                weights: "index sha256:12",
                ..Setup::usual()
            },
        ),
        (
            "rank",
            Setup {
                rank: "tp 1/2 pp 0/1",
                ..Setup::usual()
            },
        ),
        (
            "element size",
            Setup {
                plan: sized(Sizes {
                    element_bytes: 1,
                    ..Sizes::SMALL
                }),
                ..Setup::usual()
            },
        ),
        (
            "heads",
            Setup {
                plan: sized(Sizes {
                    heads: 4,
                    ..Sizes::SMALL
                }),
                ..Setup::usual()
            },
        ),
        (
            "layers",
            Setup {
                plan: sized(Sizes {
                    layers: 2,
                    ..Sizes::SMALL
                }),
                ..Setup::usual()
            },
        ),
        (
            "block size",
            Setup {
                block_tokens: 32,
                ..Setup::usual()
            },
        ),
        (
            "salt",
            Setup {
                salt: Some("tenant"),
                ..Setup::usual()
            },
        ),
        (
            "empty salt",
            Setup {
                salt: Some(""),
                ..Setup::usual()
            },
        ),
        (
            "adapter",
            Setup {
                lora: Some(b"adapter 1"),
                ..Setup::usual()
            },
        ),
        (
            "first token",
            Setup {
                first_token: 2,
                ..Setup::usual()
            },
        ),
        (
            "no image",
            Setup {
                image: None,
                ..Setup::usual()
            },
        ),
        (
            "another image",
            Setup {
                image: Some((2, 10, "sha256:d09")),
                ..Setup::usual()
            },
        ),
        (
            "the image elsewhere",
            Setup {
                image: Some((3, 10, "sha256:ca7")),
                ..Setup::usual()
            },
        ),
        (
            "a longer image",
            Setup {
                image: Some((2, 11, "sha256:ca7")),
                ..Setup::usual()
            },
        ),
    ];
    for (what, other) in &others {
        assert_eq!(found(&usual, other), 0, "{what}");
        assert_eq!(found(other, &usual), 0, "{what}, the other way round");
        assert_eq!(found(other, other), PROMPT_BLOCKS as usize, "{what}, with itself");
    }
    // Nor do two that both differ find each other.
    for (i, (a_name, a)) in others.iter().enumerate() {
        for (b_name, b) in &others[..i] {
            assert_eq!(found(a, b), 0, "{a_name} and {b_name}");
        }
    }
}

#[test]
fn an_image_that_begins_later_leaves_the_blocks_before_it() {
    let text = Setup {
        image: None,
        ..Setup::usual()
    };
    let pictured = Setup {
        image: Some((40, 10, "sha256:ca7")),
        ..Setup::usual()
    };
    assert_eq!(found(&text, &pictured), 2);
    assert_eq!(found(&pictured, &text), 2);
}

#[test]
fn caches_of_other_addresses_and_block_distances_do_exchange() {
    let layout = |name: &str| {
        let plan = layouts::all(Sizes::SMALL)
            .into_iter()
            .find(|plan| plan.name == name);
        Setup {
            plan: plan.unwrap_or_else(|| panic!("no layout {name}")),
            ..Setup::usual()
        }
    };
    assert_eq!(found(&layout("LBHNC"), &layout("BLHNC")), PROMPT_BLOCKS as usize);
    assert_eq!(found(&layout("LBHNC"), &layout("LBNHC")), 0);
    assert_eq!(
        found(
            &layout("FlashAttention to 0.22, NHD"),
            &layout("K and V behind the blocks, NHD")
        ),
        4
    );
    assert_eq!(
        found(
            &layout("FlashAttention to 0.22, NHD"),
            &layout("FlashAttention to 0.22, HND")
        ),
        0
    );
}
