//! Runs the conformance suite on the filesystem backend, on every way that bytes can take. The risk: a way that is
//! rarely taken and wrong.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvlane_core::{BlockMap, Device, NamespaceId};
use kvlane_cuda::{DeviceCache, stand_in::StandIn};
use kvlane_fs::{FsOptions, FsTransfer, HostCache, Medium};
use kvlane_tests::fixture::{Factory, PATIENCE, Peer, Place};
use kvlane_tests::layouts::Plan;

/// How late each copy of the stand-in begins: long against everything that does not wait for it.
const COPY_DELAY: Duration = Duration::from_micros(200);

/// No writer waits so long for its first segment unless something is wrong.
const SETTLE_LIMIT: Duration = Duration::from_secs(10);

/// Through mappings, on a file system that lives in memory.
mod memory {
    kvlane_tests::conformance!(super::Fs::new(kvlane_fs::Medium::Memory));
}

/// By pwrite and preadv2, on whatever holds the build.
mod disk {
    kvlane_tests::conformance!(super::Fs::new(kvlane_fs::Medium::Disk));
}

/// As for a folder of which nothing is known.
mod network {
    kvlane_tests::conformance!(super::Fs::new(kvlane_fs::Medium::Network));
}

/// Without checksums of payloads: the sequences of slots alone must tell what was recycled under a copy.
mod unchecked {
    mod memory {
        kvlane_tests::conformance!(crate::Fs::unchecked(kvlane_fs::Medium::Memory));
    }

    mod disk {
        kvlane_tests::conformance!(crate::Fs::unchecked(kvlane_fs::Medium::Disk));
    }

    mod network {
        kvlane_tests::conformance!(crate::Fs::unchecked(kvlane_fs::Medium::Network));
    }
}

/// A cache on a CUDA device, through pinned memory. There is no device: the driver is a stand-in whose copies happen later
/// than they were asked for.
mod device_stand_in {
    mod memory {
        kvlane_tests::conformance!(crate::OnDevice(crate::Fs::new(kvlane_fs::Medium::Memory)));
    }

    mod disk {
        kvlane_tests::conformance!(crate::OnDevice(crate::Fs::new(kvlane_fs::Medium::Disk)));
    }
}

struct Fs {
    medium: Medium,
    verify: bool,
}

/// As `Fs`, with caches on the stand-in of a CUDA device.
struct OnDevice(Fs);

/// A folder that is removed with its last peer.
struct FsPlace {
    folder: tempfile::TempDir,
    options: FsOptions,
    payload_bytes: usize,
}

impl Fs {
    fn new(medium: Medium) -> Self {
        Self { medium, verify: true }
    }

    fn unchecked(medium: Medium) -> Self {
        Self {
            medium,
            verify: false,
        }
    }

    fn open(&self, capacity_bytes: u64, segment_bytes: u64) -> FsPlace {
        let parent = match self.medium {
            Medium::Memory => PathBuf::from("/dev/shm"),
            _ => Path::new(env!("CARGO_TARGET_TMPDIR")).to_path_buf(),
        };
        let folder = tempfile::Builder::new()
            .prefix("kvlane-test-")
            .tempdir_in(parent)
            .expect("a folder");
        let mut options = FsOptions::default()
            .with_capacity_bytes(capacity_bytes)
            .with_segment_bytes(segment_bytes)
            .with_io_threads(2)
            .with_medium(self.medium)
            .with_verify(self.verify);
        // The claims say what a lookup finds, not how long it waits on a busy machine.
        options.listing_patience = Some(PATIENCE);
        FsPlace {
            folder,
            options,
            payload_bytes: capacity_bytes as usize,
        }
    }
}

impl FsPlace {
    /// Waits until every writer has its first segment. A writer that gets its share later gets it from the others, with
    /// the blocks that are in it, which the claims about a full place do not expect.
    fn settle(&self) {
        let deadline = Instant::now() + SETTLE_LIMIT;
        loop {
            let info = kvlane_fs::inspect::list(self.folder.path()).expect("a store");
            if info.writers.iter().all(|writer| writer.used_bytes > 0) {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "a writer got no segment: {:?}",
                info.writers
            );
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Factory for Fs {
    fn place(&self) -> Box<dyn Place> {
        Box::new(self.open(96 << 20, 4 << 20))
    }

    fn small_place(&self) -> Box<dyn Place> {
        Box::new(self.open(2 << 20, 512 << 10))
    }
}

impl Place for FsPlace {
    fn peer(&self, namespace: NamespaceId, plan: &Plan) -> Peer {
        let cache = Arc::new(HostCache::allocate(&[plan.storage_bytes], |addresses| {
            plan.map(addresses[0])
        }));
        let backend = FsTransfer::open(
            self.folder.path(),
            namespace,
            Arc::clone(&cache),
            &self.options,
            true,
        )
        .expect("a store");
        self.settle();
        Peer {
            backend: Arc::new(backend),
            cache,
        }
    }

    fn capacity_bytes(&self) -> usize {
        self.payload_bytes
    }
}

impl Factory for OnDevice {
    fn place(&self) -> Box<dyn Place> {
        Box::new(DevicePlace(self.0.open(96 << 20, 4 << 20)))
    }

    fn small_place(&self) -> Box<dyn Place> {
        Box::new(DevicePlace(self.0.open(2 << 20, 512 << 10)))
    }
}

struct DevicePlace(FsPlace);

impl Place for DevicePlace {
    fn peer(&self, namespace: NamespaceId, plan: &Plan) -> Peer {
        let device = StandIn::new(COPY_DELAY);
        let mut views = plan.views(device.allocate(plan.storage_bytes));
        for view in &mut views {
            view.device = Device::Cuda(device.ordinal());
        }
        let map = BlockMap::from_tensors(views, plan.block_count, Some(plan.block_dim)).expect("a map");
        let buffers = 2 * self.0.options.threads();
        let cache = DeviceCache::open(device.tensors(map), buffers).expect("a device");
        let cache = Arc::new(cache);
        let FsPlace { folder, options, .. } = &self.0;
        let backend = FsTransfer::open(folder.path(), namespace, Arc::clone(&cache), options, true);
        let backend = backend.expect("a store");
        self.0.settle();
        Peer {
            backend: Arc::new(backend),
            cache,
        }
    }

    fn capacity_bytes(&self) -> usize {
        self.0.capacity_bytes()
    }
}
