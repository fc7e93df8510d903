//! A store filled through the backend itself, and the command run as a process.

#![allow(clippy::unwrap_used, reason = "a failure here fails the test")]
#![allow(dead_code, reason = "each test file uses a part")]

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use kvlane_core::{
    BlockKey, BlockMap, Chain, ChainRoot, Device, KvTransfer, LoadOrder, LoadRequest, MissReason,
    NamespaceId, NamespaceParts, Outcome, StoreRequest, TensorView,
};
use kvlane_fs::{FsOptions, FsTransfer, HostCache};

pub(crate) const BLOCK_TOKENS: u32 = 16;
pub(crate) const LAYERS: usize = 2;
/// Bytes of a block in one layer.
pub(crate) const LAYER_BYTES: usize = 4096;
const CACHE_BLOCKS: u32 = 32;

/// A server's shared_storage_path with one writer.
pub(crate) struct Store {
    pub(crate) shared: tempfile::TempDir,
    pub(crate) namespace: NamespaceId,
    writer: Option<FsTransfer>,
}

impl Store {
    pub(crate) fn new() -> Self {
        let shared = tempfile::tempdir().unwrap();
        let namespace = NamespaceParts::new().with("weights", "test").unwrap().id();
        let mut store = Self {
            shared,
            namespace,
            writer: None,
        };
        store.start_writer();
        store
    }

    pub(crate) fn start_writer(&mut self) {
        let options = FsOptions::default()
            .with_capacity_bytes(16 << 20)
            .with_io_threads(1);
        let writer = FsTransfer::open(&self.folder(), self.namespace, cache(), &options, true).unwrap();
        self.writer = Some(writer);
    }

    /// Ends the writer as a server that stops does.
    pub(crate) fn stop_writer(&mut self) {
        self.writer = None;
    }

    pub(crate) fn folder(&self) -> PathBuf {
        self.shared.path().join("kvlane")
    }

    /// Stores the blocks of `tokens`, all or only those at `positions` of the chain.
    pub(crate) fn store(&self, tokens: &[u32], positions: impl IntoIterator<Item = usize>) {
        store(self.writer.as_ref().unwrap(), tokens, positions);
    }

    pub(crate) fn reserve(&self, tokens: &[u32], lifetime: Duration) {
        let writer = self.writer.as_ref().unwrap();
        writer
            .reserve(&keys(tokens), 0, Instant::now() + lifetime)
            .unwrap();
        // Promises are made by the writer's thread; a store that follows them through the same queue has seen them.
        self.store(&[9; BLOCK_TOKENS as usize], [0]);
    }

    pub(crate) fn reset(&self) {
        self.writer.as_ref().unwrap().reset().unwrap();
    }

    /// Stores blocks of `tokens` as another rank of the server, and leaves its descriptor.
    pub(crate) fn store_as_other_rank(&self, tokens: &[u32], positions: impl IntoIterator<Item = usize>) {
        let namespace = NamespaceParts::new().with("weights", "other rank").unwrap().id();
        let options = FsOptions::default()
            .with_capacity_bytes(16 << 20)
            .with_io_threads(1);
        let writer = FsTransfer::open(&self.folder(), namespace, cache(), &options, true).unwrap();
        store(&writer, tokens, positions);
        self.describe_rank(namespace, 0, BLOCK_TOKENS);
    }

    /// Loads all blocks of `tokens` as a server that only loads does, and answers which were missed, and why.
    pub(crate) fn load(&self, tokens: &[u32]) -> Option<(Vec<usize>, MissReason)> {
        let options = FsOptions::default().with_io_threads(1);
        let reader = FsTransfer::open(&self.folder(), self.namespace, cache(), &options, false).unwrap();
        let keys = keys(tokens);
        let deadline = Instant::now() + Duration::from_secs(20);
        let job = reader
            .load(LoadRequest {
                blocks: (0..keys.len() as u32).collect(),
                keys,
                deadline,
                order: LoadOrder::BlockMajor,
            })
            .unwrap();
        match reader
            .wait(job, deadline)
            .unwrap()
            .expect("within the deadline")
            .outcome
        {
            Outcome::Done => None,
            Outcome::Miss { positions, reason } => Some((positions, reason)),
        }
    }

    /// Leaves a descriptor as a worker does.
    pub(crate) fn describe(&self, block_tokens: u32) {
        self.describe_rank(self.namespace, 1, block_tokens);
    }

    fn describe_rank(&self, namespace: NamespaceId, tensor_rank: u32, block_tokens: u32) {
        let folder = self.folder().join("descriptors");
        std::fs::create_dir_all(&folder).unwrap();
        let content = serde_json::json!({
            "namespace": namespace.to_string(), "pp_rank": 0, "tp_rank": tensor_rank, "engine_id": "e",
            "block_tokens": block_tokens,
            "facts": {"weights name": "org/model", "tensor rank": format!("{tensor_rank} of 2"),
                "pipeline rank": "0 of 1"},
        });
        let name = format!("e-pp0-tp{tensor_rank}.json");
        std::fs::write(folder.join(name), content.to_string()).unwrap();
    }

    /// Flips a bit in a file of the store.
    pub(crate) fn flip(&self, file: &str, offset: u64) {
        use std::os::unix::fs::FileExt;
        let file = std::fs::File::options()
            .read(true)
            .write(true)
            .open(self.folder().join(file))
            .unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset).unwrap();
        file.write_all_at(&[byte[0] ^ 1], offset).unwrap();
    }

    /// Makes a segment one of another format version, with everything else in order.
    pub(crate) fn set_version(&self, file: &str, version: u32) {
        use kvlane_fs::format::{SEGMENT_HEADER_BYTES, structure_crc};
        let path = self.folder().join(file);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[8..12].copy_from_slice(&version.to_le_bytes());
        let body = SEGMENT_HEADER_BYTES - 4;
        let crc = structure_crc(&[&bytes[..body]]);
        bytes[body..SEGMENT_HEADER_BYTES].copy_from_slice(&crc.to_le_bytes());
        std::fs::write(path, bytes).unwrap();
    }

    /// The header of a segment file.
    pub(crate) fn header(&self, file: &str) -> kvlane_fs::format::SegmentHeader {
        let bytes = std::fs::read(self.folder().join(file)).unwrap();
        let head = &bytes[..kvlane_fs::format::SEGMENT_HEADER_BYTES];
        kvlane_fs::format::parse_segment_header(head).unwrap()
    }
}

fn store(writer: &FsTransfer, tokens: &[u32], positions: impl IntoIterator<Item = usize>) {
    let keys = keys(tokens);
    let deadline = Instant::now() + Duration::from_secs(20);
    let wanted: Vec<BlockKey> = positions.into_iter().map(|at| keys[at]).collect();
    let job = writer
        .begin_store(StoreRequest {
            blocks: (0..wanted.len() as u32).collect(),
            keys: wanted,
            first_depth: 0,
            deadline,
        })
        .unwrap();
    writer.finish_store(job).unwrap();
    let completion = writer.wait(job, deadline).unwrap().expect("within the deadline");
    assert_eq!(completion.outcome, Outcome::Done);
}

pub(crate) fn keys(tokens: &[u32]) -> Vec<BlockKey> {
    let mut chain = Chain::new(&ChainRoot::new(BLOCK_TOKENS).unwrap());
    chain.extend(tokens.iter().copied());
    chain.keys().to_vec()
}

/// A cache whose blocks all differ.
fn cache() -> HostCache {
    let cache = HostCache::allocate(&[LAYER_BYTES * CACHE_BLOCKS as usize; LAYERS], |addresses| {
        let views = addresses.iter().enumerate().map(|(layer, &address)| TensorView {
            name: format!("layer {layer}"),
            address,
            device: Device::Host,
            element_bytes: 1,
            shape: vec![u64::from(CACHE_BLOCKS), LAYER_BYTES as u64],
            strides: vec![LAYER_BYTES as i64, 1],
        });
        BlockMap::from_tensors(views, CACHE_BLOCKS, None).unwrap()
    });
    for layer in 0..LAYERS {
        for block in 0..CACHE_BLOCKS {
            let content = vec![(layer as u8) << 6 | block as u8; LAYER_BYTES];
            cache.copy_layer_in(layer, block, content.as_slice().into(), None);
        }
    }
    cache
}

/// Runs `kvlane` without what the environment says of it.
pub(crate) fn kvlane(arguments: &[&str], path: Option<&Path>, more: &[&str]) -> Output {
    kvlane_with(arguments, path, more, "")
}

/// As [`kvlane`], with a text on standard input.
pub(crate) fn kvlane_with(arguments: &[&str], path: Option<&Path>, more: &[&str], input: &str) -> Output {
    use std::io::Write;
    // What takes so long hangs; the status says 124 then.
    let mut command = Command::new("timeout");
    command.args(["60", env!("CARGO_BIN_EXE_kvlane")]);
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("KVLANE_") {
            command.env_remove(name);
        }
    }
    let mut child = command
        .args(arguments)
        .args(path)
        .args(more)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // It may end without reading all of it.
    let _written = child.stdin.take().unwrap().write_all(input.as_bytes());
    child.wait_with_output().unwrap()
}

/// The JSON document on standard output.
pub(crate) fn json(output: &Output) -> serde_json::Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}
