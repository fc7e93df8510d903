//! Runs the conformance suite on every backend. The risk: a backend that is fast and wrong.

use std::sync::Arc;

use kvlane_core::reference::{MemoryBackend, MemoryStore};
use kvlane_core::{NamespaceId, OwnedCache};
use kvlane_tests::fixture::{Factory, Peer, Place};
use kvlane_tests::layouts::Plan;

/// The reference backend, which also shows that the claims can be met.
mod memory {
    use super::Memory;

    kvlane_tests::conformance!(Memory);
}

struct Memory;

struct MemoryPlace {
    store: Arc<MemoryStore>,
    capacity_bytes: usize,
}

impl Factory for Memory {
    fn place(&self) -> Box<dyn Place> {
        MemoryPlace::boxed(64 << 20)
    }

    fn small_place(&self) -> Box<dyn Place> {
        MemoryPlace::boxed(256 << 10)
    }
}

impl MemoryPlace {
    fn boxed(capacity_bytes: usize) -> Box<dyn Place> {
        Box::new(MemoryPlace {
            store: MemoryStore::new(capacity_bytes),
            capacity_bytes,
        })
    }
}

impl Place for MemoryPlace {
    fn peer(&self, namespace: NamespaceId, plan: &Plan) -> Peer {
        let cache = Arc::new(OwnedCache::new(plan.map(0x10_0000)));
        let backend = MemoryBackend::new(
            Arc::clone(&self.store),
            namespace,
            Arc::<OwnedCache>::clone(&cache),
        );
        Peer {
            backend: Arc::new(backend),
            cache,
        }
    }

    fn capacity_bytes(&self) -> usize {
        self.capacity_bytes
    }
}
