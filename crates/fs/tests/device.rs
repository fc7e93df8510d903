//! A cache on a CUDA device behind the folder. There is no device here: the driver is a stand-in that works later than it
//! was asked to. The risks: wrong bytes on the device, bytes that arrive after the job has ended, KV of a step that had
//! not run yet.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvlane_core::{
    BlockKey, BlockMap, Chain, ChainRoot, Device, JobId, KvTransfer, LoadOrder, LoadRequest, MissReason,
    NamespaceParts, Outcome, PagedMemory, StoreRequest, TensorView,
};
use kvlane_cuda::DeviceCache;
use kvlane_cuda::stand_in::{ComputeStream, HELD, StandIn};
use kvlane_fs::{FsOptions, FsTransfer, Medium};

const BLOCKS: u32 = 8;
const LAYERS: usize = 2;
const LAYER_BYTES: usize = 3 * 4096 + 100;
const MEDIA: [Medium; 2] = [Medium::Memory, Medium::Disk];

struct Rig {
    device: StandIn,
    cache: Arc<DeviceCache>,
    transfer: FsTransfer,
    addresses: Vec<u64>,
    folder: tempfile::TempDir,
}

impl Rig {
    fn new(medium: Medium) -> Self {
        let parent = match medium {
            Medium::Memory => PathBuf::from("/dev/shm"),
            _ => PathBuf::from(env!("CARGO_TARGET_TMPDIR")),
        };
        let folder = tempfile::Builder::new()
            .prefix("kvlane-test-")
            .tempdir_in(parent)
            .expect("a folder");
        let device = StandIn::new(Duration::from_micros(200));
        let addresses: Vec<u64> = (0..LAYERS)
            .map(|_| device.allocate(LAYER_BYTES * BLOCKS as usize))
            .collect();
        let views = addresses.iter().enumerate().map(|(layer, &address)| TensorView {
            name: format!("layer.{layer}"),
            address,
            device: Device::Cuda(device.ordinal()),
            element_bytes: 1,
            shape: vec![u64::from(BLOCKS), LAYER_BYTES as u64],
            strides: vec![LAYER_BYTES as i64, 1],
        });
        let map = BlockMap::from_tensors(views, BLOCKS, None).expect("a map");
        let options = FsOptions::default()
            .with_capacity_bytes(8 << 20)
            .with_segment_bytes(1 << 20)
            .with_io_threads(2)
            .with_medium(medium);
        let cache =
            Arc::new(DeviceCache::open(device.tensors(map), 2 * options.threads()).expect("a device"));
        let namespace = NamespaceParts::new().with("model", "m").expect("one fact").id();
        let transfer =
            FsTransfer::open(folder.path(), namespace, Arc::clone(&cache), &options, true).expect("a store");
        assert!(transfer.needs_order());
        Self {
            device,
            cache,
            transfer,
            addresses,
            folder,
        }
    }

    fn set(&self, block: u32, byte: u8) {
        for layer in 0..LAYERS {
            self.cache.write_layer(layer, block, &[byte; LAYER_BYTES]);
        }
    }

    /// Whether all bytes of a block are this one.
    fn holds(&self, block: u32, byte: u8) -> bool {
        (0..LAYERS).all(|layer| {
            let mut data = vec![!byte; LAYER_BYTES];
            self.cache.read_layer(layer, block, &mut data);
            data.iter().all(|&found| found == byte)
        })
    }

    /// A kernel that fills a block after a while.
    fn kernel(&self, stream: &ComputeStream, block: u32, byte: u8, duration_ms: u64) {
        let mut duration = Duration::from_millis(duration_ms);
        for address in &self.addresses {
            let place = address + u64::from(block) * LAYER_BYTES as u64;
            stream.write(place, vec![byte; LAYER_BYTES], duration);
            duration = Duration::ZERO;
        }
    }

    fn begin(&self, keys: &[BlockKey], blocks: &[u32], deadline: Instant) -> JobId {
        let request = StoreRequest {
            keys: keys.to_vec(),
            blocks: blocks.to_vec(),
            first_depth: 0,
            deadline,
        };
        self.transfer.begin_store(request).expect("a store")
    }

    fn store(&self, keys: &[BlockKey], blocks: &[u32]) -> Outcome {
        let job = self.begin(keys, blocks, far());
        self.transfer.finish_store(job).expect("the store is open");
        self.end(job)
    }

    fn start_load(&self, keys: &[BlockKey], blocks: &[u32], deadline: Instant) -> JobId {
        let request = LoadRequest {
            keys: keys.to_vec(),
            blocks: blocks.to_vec(),
            deadline,
            order: LoadOrder::BlockMajor,
        };
        self.transfer.load(request).expect("a load")
    }

    fn start_load_after(
        &self,
        stream: &ComputeStream,
        keys: &[BlockKey],
        blocks: &[u32],
        deadline: Instant,
    ) -> JobId {
        let request = LoadRequest {
            keys: keys.to_vec(),
            blocks: blocks.to_vec(),
            deadline,
            order: LoadOrder::LayerMajor,
        };
        self.transfer
            .load_after(request, stream.handle())
            .expect("a load")
    }

    fn end(&self, job: JobId) -> Outcome {
        let ended = self.transfer.wait(job, far()).expect("a known job");
        ended.expect("the job ends in time").outcome
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            assert_eq!(self.device.violations(), Vec::<String>::new());
        }
    }
}

fn far() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

fn keys(count: usize) -> Vec<BlockKey> {
    let mut chain = Chain::new(&ChainRoot::new(4).expect("4 tokens are allowed"));
    chain.extend(0..4 * count as u32);
    chain.keys().to_vec()
}

#[test]
fn a_corrupt_block_never_reaches_the_device() {
    for medium in MEDIA {
        let rig = Rig::new(medium);
        let keys = keys(2);
        rig.set(0, 0x11);
        rig.set(1, 0x22);
        assert_eq!(rig.store(&keys, &[0, 1]), Outcome::Done);
        assert!(flip_a_byte_of(0x22, &rig.folder) > 0);
        rig.set(4, 0x44);
        rig.set(5, 0x55);
        let job = rig.start_load(&keys, &[4, 5], far());
        let missed = Outcome::Miss {
            positions: vec![1],
            reason: MissReason::Corrupt,
        };
        assert_eq!(rig.end(job), missed, "{medium:?}");
        assert!(rig.holds(4, 0x11), "{medium:?}: the other block is loaded");
        assert!(
            rig.holds(5, 0x55),
            "{medium:?}: the corrupt block was copied to the device"
        );
    }
}

/// Changes one byte of each long stretch of `byte` in the folder's files; returns how many.
fn flip_a_byte_of(byte: u8, folder: &tempfile::TempDir) -> usize {
    use std::os::unix::fs::FileExt;
    let mut flipped = 0;
    for entry in std::fs::read_dir(folder.path()).expect("the folder") {
        let path = entry.expect("an entry").path();
        let content = std::fs::read(&path).expect("a file");
        let start = content.windows(64).position(|window| window == [byte; 64]);
        if let Some(start) = start {
            let file = std::fs::File::options().write(true).open(&path).expect("a file");
            file.write_all_at(&[!byte], start as u64 + 7).expect("a write");
            flipped += 1;
        }
    }
    flipped
}

#[test]
fn a_store_carries_what_the_step_before_it_computes() {
    for medium in MEDIA {
        let rig = Rig::new(medium);
        let stream = rig.device.compute_stream();
        let keys = keys(1);
        let job = rig.begin(&keys, &[0], far());
        rig.kernel(&stream, 0, 0x77, 60);
        rig.transfer
            .order_stores_after(stream.handle())
            .expect("an order");
        rig.transfer.layer_ready(job, 0).expect("the store is open");
        rig.transfer.finish_store(job).expect("the store is open");
        assert_eq!(rig.end(job), Outcome::Done);
        let job = rig.start_load(&keys, &[3], far());
        assert_eq!(rig.end(job), Outcome::Done);
        assert!(rig.holds(3, 0x77), "{medium:?}");
    }
}

#[test]
fn a_load_lands_behind_the_step_that_runs_when_it_starts() {
    for medium in MEDIA {
        let rig = Rig::new(medium);
        let stream = rig.device.compute_stream();
        let keys = keys(1);
        rig.set(0, 0x11);
        assert_eq!(rig.store(&keys, &[0]), Outcome::Done);
        // Blocks that were just freed: the step still writes them.
        rig.kernel(&stream, 3, 0x99, 60);
        let job = rig.start_load_after(&stream, &keys, &[3], far());
        assert_eq!(rig.end(job), Outcome::Done);
        rig.transfer
            .order_stores_after(stream.handle())
            .expect("an order");
        assert!(rig.holds(3, 0x11), "{medium:?}");
    }
}

/// Claims that something takes less than `limit` on a machine that holds threads up now and then.
#[track_caller]
fn in_one_of_five(limit: Duration, attempt: impl FnMut() -> Duration) {
    let late: Vec<Duration> = std::iter::repeat_with(attempt)
        .take(5)
        .take_while(|took| *took >= limit)
        .collect();
    assert!(late.len() < 5, "{late:?}, allowed: {limit:?}");
}

#[test]
fn a_load_behind_a_long_step_misses_in_time_and_nothing_arrives_later() {
    for medium in MEDIA {
        in_one_of_five(Duration::from_millis(400), || {
            let rig = Rig::new(medium);
            let stream = rig.device.compute_stream();
            let keys = keys(2);
            rig.set(0, 0x11);
            rig.set(1, 0x22);
            assert_eq!(rig.store(&keys, &[0, 1]), Outcome::Done);
            rig.set(3, 0x33);
            let held = stream.hold();
            let started = Instant::now();
            let job = rig.start_load_after(&stream, &keys, &[3, 4], started + Duration::from_millis(50));
            let missed = Outcome::Miss {
                positions: vec![0, 1],
                reason: MissReason::TimedOut,
            };
            assert_eq!(rig.end(job), missed, "{medium:?}");
            let took = started.elapsed();
            assert!(took < HELD / 2, "{took:?}");
            assert!(rig.holds(3, 0x33), "{medium:?}");
            drop(held);
            std::thread::sleep(Duration::from_millis(50));
            assert!(rig.holds(3, 0x33), "{medium:?}");
            took
        });
    }
}

#[test]
fn a_load_whose_copies_are_slow_ends_only_when_they_have() {
    for medium in MEDIA {
        let rig = Rig::new(medium);
        let keys = keys(1);
        rig.set(0, 0x11);
        assert_eq!(rig.store(&keys, &[0]), Outcome::Done);
        rig.set(3, 0x33);
        rig.device.set_delay(Duration::from_millis(150));
        let job = rig.start_load(&keys, &[3], Instant::now() + Duration::from_millis(100));
        let outcome = rig.end(job);
        // Whatever the job says, it is over: what is written from here on must stay.
        rig.device.set_delay(Duration::ZERO);
        rig.set(3, 0x44);
        std::thread::sleep(Duration::from_millis(400));
        assert!(rig.holds(3, 0x44), "{medium:?}: bytes arrived after {outcome:?}");
    }
}

#[test]
fn a_cancelled_store_lets_go_of_its_slots_while_the_device_is_busy() {
    for medium in MEDIA {
        in_one_of_five(Duration::from_millis(300), || {
            let rig = Rig::new(medium);
            let stream = rig.device.compute_stream();
            let keys = keys(1);
            let held = stream.hold();
            rig.kernel(&stream, 0, 0x11, 0);
            rig.transfer
                .order_stores_after(stream.handle())
                .expect("an order");
            let started = Instant::now();
            let job = rig.begin(&keys, &[0], far());
            rig.transfer.finish_store(job).expect("the store is open");
            std::thread::sleep(Duration::from_millis(50));
            rig.transfer.cancel(job);
            assert!(matches!(rig.end(job), Outcome::Miss { .. }));
            let took = started.elapsed();
            assert!(took < HELD / 2, "{took:?}");
            drop(held);
            // The same key can be stored once the device is free.
            assert_eq!(rig.store(&keys, &[0]), Outcome::Done);
            assert_eq!(rig.transfer.lookup(&keys).ready_blocks, 1);
            took
        });
    }
}

#[test]
fn a_device_that_fails_costs_misses_and_nothing_else() {
    for medium in MEDIA {
        let rig = Rig::new(medium);
        let keys = keys(2);
        rig.set(0, 0x11);
        rig.device.fail("cuMemcpyDtoHAsync_v2", Some((0, 2)));
        assert!(matches!(
            rig.store(&keys, &[0, 1]),
            Outcome::Miss {
                reason: MissReason::Io,
                ..
            }
        ));
        rig.device.fail("cuMemcpyDtoHAsync_v2", None);
        assert_eq!(rig.transfer.lookup(&keys).ready_blocks, 0);
        assert_eq!(rig.store(&keys, &[0, 1]), Outcome::Done);
        rig.device.fail("cuMemcpyHtoDAsync_v2", Some((0, 2)));
        let job = rig.start_load(&keys, &[4, 5], far());
        assert!(matches!(
            rig.end(job),
            Outcome::Miss {
                reason: MissReason::Io,
                ..
            }
        ));
        rig.device.fail("cuMemcpyHtoDAsync_v2", None);
        let job = rig.start_load(&keys, &[4, 5], far());
        assert_eq!(rig.end(job), Outcome::Done);
        assert!(rig.holds(4, 0x11));
    }
}
