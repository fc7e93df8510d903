//! Runs the conformance suite on the filesystem backend, on every way that bytes can take. The risk: a way that is
//! rarely taken and wrong.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use kvlane_core::NamespaceId;
use kvlane_fs::{FsOptions, FsTransfer, HostCache, Medium};
use kvlane_tests::fixture::{Factory, Peer, Place};
use kvlane_tests::layouts::Plan;

/// Through mappings, on a file system that lives in memory.
mod memory {
    kvlane_tests::conformance!(super::Fs(kvlane_fs::Medium::Memory));
}

/// By pwrite and preadv2, on whatever holds the build.
mod disk {
    kvlane_tests::conformance!(super::Fs(kvlane_fs::Medium::Disk));
}

/// As for a folder of which nothing is known.
mod network {
    kvlane_tests::conformance!(super::Fs(kvlane_fs::Medium::Network));
}

struct Fs(Medium);

/// A folder that is removed with its last peer.
struct FsPlace {
    folder: tempfile::TempDir,
    options: FsOptions,
    payload_bytes: usize,
}

impl Fs {
    fn open(&self, capacity_bytes: u64, segment_bytes: u64) -> Box<dyn Place> {
        let parent = match self.0 {
            Medium::Memory => PathBuf::from("/dev/shm"),
            _ => Path::new(env!("CARGO_TARGET_TMPDIR")).to_path_buf(),
        };
        let folder = tempfile::Builder::new().prefix("kvlane-test-").tempdir_in(parent).expect("a folder");
        let options = FsOptions::default()
            .with_capacity_bytes(capacity_bytes)
            .with_segment_bytes(segment_bytes)
            .with_io_threads(2)
            .with_medium(self.0);
        Box::new(FsPlace { folder, options, payload_bytes: capacity_bytes as usize })
    }
}

impl Factory for Fs {
    fn place(&self) -> Box<dyn Place> {
        self.open(96 << 20, 4 << 20)
    }

    fn small_place(&self) -> Box<dyn Place> {
        self.open(2 << 20, 512 << 10)
    }
}

impl Place for FsPlace {
    fn peer(&self, namespace: NamespaceId, plan: &Plan) -> Peer {
        let cache = Arc::new(HostCache::allocate(&[plan.storage_bytes], |addresses| plan.map(addresses[0])));
        let backend =
            FsTransfer::open(self.folder.path(), namespace, Arc::clone(&cache), &self.options, true).expect("a store");
        Peer { backend: Arc::new(backend), cache }
    }

    fn capacity_bytes(&self) -> usize {
        self.payload_bytes
    }
}
