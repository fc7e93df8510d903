//! The suite against backends that are broken on purpose. The risk: claims that pass whatever the backend does.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex};
use std::time::Instant;

use kvlane_core::reference::{MemoryBackend, MemoryStore};
use kvlane_core::{
    Availability, BlockKey, BlockMap, Completion, JobId, KvTransfer, LoadOrder, LoadRequest, NamespaceId,
    OwnedCache, PagedMemory, Result, StoreRequest,
};
use kvlane_tests::claims::{completions, loads, promises, refusals, stores, visibility};
use kvlane_tests::fixture::{Factory, Peer, Place};
use kvlane_tests::layouts::Plan;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Fault {
    None,
    FlipsOneByteOfEachBlock,
    SwapsTheFirstTwoBlocks,
    WritesIntoTheNextBlock,
    IgnoresTheNamespace,
    PublishesAfterTheLastLayer,
    ReadsAllLayersAtOnce,
    IgnoresCancel,
    IgnoresReset,
    NeverPromises,
    NeverWithdraws,
    ForgetsDeadlines,
    TellsCompletionsTwice,
    ChecksNothing,
    SaysEveryLayerIsThere,
}

type Claim = fn(&dyn Factory);

#[test]
fn every_fault_is_noticed_by_the_claim_that_is_about_it() {
    use Fault::*;
    let cases: [(Fault, Claim); 14] = [
        (
            FlipsOneByteOfEachBlock,
            visibility::stored_bytes_come_back_in_every_layout,
        ),
        (
            SwapsTheFirstTwoBlocks,
            visibility::stored_bytes_come_back_in_every_layout,
        ),
        (WritesIntoTheNextBlock, loads::a_load_touches_no_other_block),
        (IgnoresTheNamespace, visibility::another_namespace_is_a_miss),
        (
            PublishesAfterTheLastLayer,
            stores::a_store_is_invisible_until_it_is_finished,
        ),
        (
            ReadsAllLayersAtOnce,
            stores::layers_may_become_ready_in_any_order_and_twice,
        ),
        (IgnoresCancel, stores::a_cancelled_store_makes_nothing_visible),
        (IgnoresReset, visibility::reset_hides_everything_from_everyone),
        (
            NeverPromises,
            promises::a_reserved_block_is_pending_until_its_deadline,
        ),
        (
            NeverWithdraws,
            promises::a_reserved_block_is_pending_until_it_is_withdrawn,
        ),
        (ForgetsDeadlines, loads::a_load_past_its_deadline_is_a_miss),
        (
            TellsCompletionsTwice,
            completions::poll_delivers_each_completion_once,
        ),
        (
            ChecksNothing,
            refusals::loads_with_wrong_blocks_are_refused_and_change_nothing,
        ),
        (
            SaysEveryLayerIsThere,
            loads::waiting_for_a_layer_of_a_missed_load_says_no,
        ),
    ];
    // At once: some claims notice only after their patience, and all of them sleep more than they compute.
    let unnoticed: Vec<String> = std::thread::scope(|scope| {
        let threads: Vec<_> = cases
            .into_iter()
            .map(|(fault, claim)| {
                scope.spawn(move || {
                    let passes = |fault| catch_unwind(AssertUnwindSafe(|| claim(&Broken(fault)))).is_ok();
                    // Without the fault the same wrapper passes, so it is the fault that is noticed.
                    assert!(passes(None), "the claim about {fault:?} fails without it");
                    passes(fault).then(|| format!("{fault:?}"))
                })
            })
            .collect();
        threads
            .into_iter()
            .filter_map(|thread| thread.join().expect("a claim holds without faults"))
            .collect()
    });
    assert!(unnoticed.is_empty(), "not noticed: {unnoticed:?}");
}

struct Broken(Fault);

struct BrokenPlace {
    fault: Fault,
    store: Arc<MemoryStore>,
}

struct BrokenBackend {
    fault: Fault,
    inner: MemoryBackend,
    cache: Arc<OwnedCache>,
    told: Mutex<Vec<Completion>>,
}

/// What the backend sees instead of the cache.
struct BrokenMemory {
    fault: Fault,
    cache: Arc<OwnedCache>,
}

impl Factory for Broken {
    fn place(&self) -> Box<dyn Place> {
        Box::new(BrokenPlace {
            fault: self.0,
            store: MemoryStore::new(64 << 20),
        })
    }

    fn small_place(&self) -> Box<dyn Place> {
        self.place()
    }
}

impl Place for BrokenPlace {
    fn peer(&self, namespace: NamespaceId, plan: &Plan) -> Peer {
        let fault = self.fault;
        let namespace = if fault == Fault::IgnoresTheNamespace {
            NamespaceId([0; 32])
        } else {
            namespace
        };
        let cache = Arc::new(OwnedCache::new(plan.map(4096)));
        let memory = BrokenMemory {
            fault,
            cache: Arc::clone(&cache),
        };
        let inner = MemoryBackend::new(Arc::clone(&self.store), namespace, Arc::new(memory));
        let backend = BrokenBackend {
            fault,
            inner,
            cache: Arc::clone(&cache),
            told: Mutex::default(),
        };
        Peer {
            backend: Arc::new(backend),
            cache,
        }
    }

    fn capacity_bytes(&self) -> usize {
        64 << 20
    }
}

impl PagedMemory for BrokenMemory {
    fn map(&self) -> &BlockMap {
        self.cache.map()
    }

    fn read_layer(&self, region: usize, block: u32, data: &mut [u8]) {
        let block = if self.fault == Fault::SwapsTheFirstTwoBlocks && block < 2 {
            1 - block
        } else {
            block
        };
        self.cache.read_layer(region, block, data);
        if self.fault == Fault::FlipsOneByteOfEachBlock && region == 0 {
            data[0] ^= 1;
        }
    }

    fn write_layer(&self, region: usize, block: u32, data: &[u8]) {
        self.cache.write_layer(region, block, data);
        if self.fault == Fault::WritesIntoTheNextBlock && block + 1 < self.cache.map().block_count() {
            self.cache.write_layer(region, block + 1, data);
        }
    }
}

impl KvTransfer for BrokenBackend {
    fn reserve(&self, chain: &[BlockKey], first_depth: u32, deadline: Instant) -> Result<()> {
        if self.fault == Fault::NeverPromises {
            Ok(())
        } else {
            self.inner.reserve(chain, first_depth, deadline)
        }
    }

    fn withdraw(&self, keys: &[BlockKey]) -> Result<()> {
        if self.fault == Fault::NeverWithdraws {
            Ok(())
        } else {
            self.inner.withdraw(keys)
        }
    }

    fn begin_store(&self, request: StoreRequest) -> Result<JobId> {
        self.inner.begin_store(request)
    }

    fn layer_ready(&self, job: JobId, layer: usize) -> Result<()> {
        let layers = self.cache.map().layer_count();
        match self.fault {
            Fault::ReadsAllLayersAtOnce => {
                (0..layers).try_for_each(|layer| self.inner.layer_ready(job, layer))
            }
            Fault::PublishesAfterTheLastLayer if layer == layers - 1 => self.inner.finish_store(job),
            _ => self.inner.layer_ready(job, layer),
        }
    }

    fn finish_store(&self, job: JobId) -> Result<()> {
        self.inner.finish_store(job)
    }

    fn lookup(&self, chain: &[BlockKey]) -> Availability {
        self.inner.lookup(chain)
    }

    fn load(&self, mut request: LoadRequest) -> Result<JobId> {
        if self.fault == Fault::ForgetsDeadlines {
            request.deadline = kvlane_tests::fixture::far();
        }
        if self.fault == Fault::ChecksNothing && request.check(self.cache.map()).is_err() {
            request = LoadRequest {
                keys: Vec::new(),
                blocks: Vec::new(),
                order: LoadOrder::BlockMajor,
                ..request
            };
        }
        self.inner.load(request)
    }

    fn wait_layer(&self, job: JobId, layer: usize, deadline: Instant) -> Result<bool> {
        let answer = self.inner.wait_layer(job, layer, deadline)?;
        Ok(answer || self.fault == Fault::SaysEveryLayerIsThere)
    }

    fn wait(&self, job: JobId, deadline: Instant) -> Result<Option<Completion>> {
        self.inner.wait(job, deadline)
    }

    fn poll(&self, done: &mut Vec<Completion>) {
        let mut told = self.told.lock().expect("no panic while it is held");
        if self.fault == Fault::TellsCompletionsTwice {
            done.append(&mut told);
        }
        let first = done.len();
        self.inner.poll(done);
        told.extend_from_slice(&done[first..]);
    }

    fn cancel(&self, job: JobId) {
        match self.fault {
            Fault::IgnoresCancel => drop(self.inner.finish_store(job)),
            _ => self.inner.cancel(job),
        }
    }

    fn reset(&self) -> Result<()> {
        if self.fault == Fault::IgnoresReset {
            Ok(())
        } else {
            self.inner.reset()
        }
    }
}
