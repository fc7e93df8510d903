//! `FsReader` and `FsWorker`: the two roles of the filesystem backend.

use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvlane_core::{
    BlockKey, BlockMap, Completion, Device, JobId, KvTransfer, LoadOrder, LoadRequest, MissReason,
    NamespaceId, Outcome, StoreRequest,
};
use kvlane_cuda::{DeviceCache, DeviceTensors, StreamHandle};
use kvlane_fs::{Cache, FsOptions, FsStats, FsTransfer, HostCache};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::chain::Chain;
use crate::error::{config_error, cuda_error, fs_error, guard, store_error, transfer_error};
use crate::ints::u32_items;
use crate::layout::Layout;

/// The scheduler's view of a shared folder: which blocks are there. Never writes payload.
#[pyclass(module = "kvlane._native", frozen)]
pub(crate) struct FsReader {
    inner: Mutex<Option<Arc<kvlane_fs::FsReader>>>,
    /// Tells the cursors of several readers of one chain apart.
    number: u64,
}

static READER_NUMBER: AtomicU64 = AtomicU64::new(1);

#[pymethods]
impl FsReader {
    #[new]
    fn new(
        py: Python<'_>,
        path: &str,
        namespaces: Vec<Vec<u8>>,
        options: &Bound<'_, PyDict>,
    ) -> PyResult<Self> {
        guard(py, || {
            crate::logs::forward(py);
            let namespaces = namespaces
                .iter()
                .map(|bytes| namespace_of(py, bytes))
                .collect::<PyResult<Vec<NamespaceId>>>()?;
            let options = fs_options(options)?;
            let reader = py
                .detach(|| kvlane_fs::FsReader::open(Path::new(path), namespaces, &options))
                .map_err(|error| fs_error(py, &error))?;
            let number = READER_NUMBER.fetch_add(1, Ordering::Relaxed);
            Ok(Self {
                inner: Mutex::new(Some(Arc::new(reader))),
                number,
            })
        })
    }

    /// (ready, pending) leading blocks, each at most ``limit_blocks`` together.
    fn lookup(
        &self,
        py: Python<'_>,
        chain: &Bound<'_, Chain>,
        limit_blocks: usize,
    ) -> PyResult<(usize, usize)> {
        guard(py, || {
            let reader = self.reader(py)?;
            let mut chain = chain.try_borrow_mut()?;
            let number = self.number;
            let (chain, cursor) = chain.with_cursor(number);
            let found = py.detach(|| {
                let keys = chain.keys();
                reader.lookup(&keys[..limit_blocks.min(keys.len())], cursor)
            });
            Ok((found.ready_blocks, found.pending_blocks))
        })
    }

    fn reset(&self, py: Python<'_>) -> PyResult<bool> {
        guard(py, || {
            let reader = self.reader(py)?;
            Ok(py.detach(|| reader.reset()))
        })
    }

    /// `None` while the folder is not there.
    fn epoch(&self, py: Python<'_>) -> PyResult<Option<u64>> {
        guard(py, || Ok(self.reader(py)?.epoch()))
    }

    /// Gauges: used_bytes, limit_bytes. Lists the folder: not for every step.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        guard(py, || {
            let reader = self.reader(py)?;
            let (used_bytes, limit_bytes) = py.detach(|| reader.usage_bytes());
            let stats = PyDict::new(py);
            stats.set_item("used_bytes", used_bytes)?;
            stats.set_item("limit_bytes", limit_bytes)?;
            Ok(stats)
        })
    }

    fn close(&self, py: Python<'_>) -> PyResult<()> {
        guard(py, || {
            let reader = locked(&self.inner).take();
            py.detach(|| drop(reader));
            Ok(())
        })
    }
}

impl FsReader {
    fn reader(&self, py: Python<'_>) -> PyResult<Arc<kvlane_fs::FsReader>> {
        locked(&self.inner)
            .clone()
            .ok_or_else(|| store_error(py, None, "the reader is closed"))
    }
}

/// One worker's access to a shared folder: stores from and loads into its KV tensors.
#[pyclass(module = "kvlane._native", frozen)]
pub(crate) struct FsWorker {
    inner: Mutex<Option<Arc<FsTransfer>>>,
    /// Totals at the last call of `stats`.
    reported: Mutex<FsStats>,
}

/// Completions not delivered yet: (job, bad positions, reason).
type Completions = Vec<(u64, Vec<usize>, &'static str)>;

#[pymethods]
impl FsWorker {
    #[new]
    #[pyo3(signature = (path, namespace, layout, owner, options, can_store = true))]
    fn new(
        py: Python<'_>,
        path: &str,
        namespace: &[u8],
        layout: &Layout,
        owner: Py<PyAny>,
        options: &Bound<'_, PyDict>,
        can_store: bool,
    ) -> PyResult<Self> {
        guard(py, || {
            crate::logs::forward(py);
            let namespace = namespace_of(py, namespace)?;
            let options = fs_options(options)?;
            let map = layout.map();
            let cache = cache_of(py, map, owner, &options)?;
            let transfer = py
                .detach(|| FsTransfer::open(Path::new(path), namespace, cache, &options, can_store))
                .map_err(|error| fs_error(py, &error))?;
            Ok(Self {
                inner: Mutex::new(Some(Arc::new(transfer))),
                reported: Mutex::default(),
            })
        })
    }

    fn reserve(&self, py: Python<'_>, keys: &[u8], first_depth: u32, timeout_ms: u64) -> PyResult<()> {
        self.call(py, |transfer| {
            transfer.reserve(&parse_keys(keys)?, first_depth, deadline(timeout_ms))
        })
    }

    fn withdraw(&self, py: Python<'_>, keys: &[u8]) -> PyResult<()> {
        self.call(py, |transfer| transfer.withdraw(&parse_keys(keys)?))
    }

    /// `epoch`: what `FsReader.epoch` said when the store was planned; after a reset in between nothing is stored.
    #[pyo3(signature = (keys, block_ids, first_depth, timeout_ms, epoch = None))]
    fn begin_store(
        &self,
        py: Python<'_>,
        keys: &[u8],
        block_ids: &Bound<'_, PyAny>,
        first_depth: u32,
        timeout_ms: u64,
        epoch: Option<u64>,
    ) -> PyResult<u64> {
        let blocks = u32_items(block_ids, 0)?;
        self.call(py, |transfer| {
            let keys = parse_keys(keys)?;
            let request = StoreRequest {
                keys,
                blocks,
                first_depth,
                deadline: deadline(timeout_ms),
            };
            Ok(transfer.begin_store_of_epoch(request, epoch)?.0)
        })
    }

    /// `stream`: the compute stream that writes the layer, as PyTorch's `cuda_stream`; for tensors on a CUDA device.
    #[pyo3(signature = (job, layer, stream = None))]
    fn layer_ready(&self, py: Python<'_>, job: u64, layer: usize, stream: Option<u64>) -> PyResult<()> {
        self.call(py, |transfer| {
            order_stores(transfer, stream)?;
            transfer.layer_ready(JobId(job), layer)
        })
    }

    /// `stream` as for `layer_ready`.
    #[pyo3(signature = (job, stream = None))]
    fn finish_store(&self, py: Python<'_>, job: u64, stream: Option<u64>) -> PyResult<()> {
        let finished = self.call(py, |transfer| {
            order_stores(transfer, stream)?;
            transfer.finish_store(JobId(job))
        });
        if finished.is_err() {
            // Nobody will finish it, so it must not be waited for until its deadline.
            self.cancel(py, job)?;
        }
        finished
    }

    /// `stream`: the compute stream whose steps may still write the blocks.
    #[pyo3(signature = (keys, block_ids, timeout_ms, layer_major = false, stream = None))]
    fn load(
        &self,
        py: Python<'_>,
        keys: &[u8],
        block_ids: &Bound<'_, PyAny>,
        timeout_ms: u64,
        layer_major: bool,
        stream: Option<u64>,
    ) -> PyResult<u64> {
        let blocks = u32_items(block_ids, 0)?;
        self.call(py, |transfer| {
            let keys = parse_keys(keys)?;
            let order = if layer_major {
                LoadOrder::LayerMajor
            } else {
                LoadOrder::BlockMajor
            };
            let request = LoadRequest {
                keys,
                blocks,
                deadline: deadline(timeout_ms),
                order,
            };
            let job = match stream_of(transfer, stream)? {
                Some(stream) => transfer.load_after(request, stream),
                None => transfer.load(request),
            }?;
            Ok(job.0)
        })
    }

    fn wait_layer(&self, py: Python<'_>, job: u64, layer: usize, timeout_ms: u64) -> PyResult<bool> {
        self.call(py, |transfer| {
            transfer.wait_layer(JobId(job), layer, deadline(timeout_ms))
        })
    }

    /// None: still running. ([], "done"), or the bad positions and the reason of the first.
    fn wait(
        &self,
        py: Python<'_>,
        job: u64,
        timeout_ms: u64,
    ) -> PyResult<Option<(Vec<usize>, &'static str)>> {
        let completion = self.call(py, |transfer| transfer.wait(JobId(job), deadline(timeout_ms)))?;
        Ok(completion.map(|completion| outcome(completion.outcome)))
    }

    /// Completions not delivered yet: (job, bad positions, reason). None, in well under a microsecond, if none.
    fn poll(&self, py: Python<'_>) -> PyResult<Option<Completions>> {
        guard(py, || {
            // Not detached: the trait promises that this does not wait, and letting go of the lock costs more than it.
            let mut done = Vec::new();
            self.transfer(py)?.poll(&mut done);
            if done.is_empty() {
                return Ok(None);
            }
            let plain = |Completion { job, outcome: ended }| {
                let (positions, reason) = outcome(ended);
                (job.0, positions, reason)
            };
            Ok(Some(done.into_iter().map(plain).collect()))
        })
    }

    fn cancel(&self, py: Python<'_>, job: u64) -> PyResult<()> {
        self.call(py, |transfer| {
            transfer.cancel(JobId(job));
            Ok(())
        })
    }

    fn reset(&self, py: Python<'_>) -> PyResult<bool> {
        self.call(py, |transfer| transfer.reset())?;
        Ok(true)
    }

    /// Counters since the last call; None when nothing happened.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyDict>>> {
        guard(py, || {
            let now = self.transfer(py)?.stats();
            let mut reported = locked(&self.reported);
            let changed = difference(&now, &reported);
            if changed.is_empty() {
                return Ok(None);
            }
            *reported = now;
            drop(reported);
            let stats = PyDict::new(py);
            for (name, value) in changed {
                stats.set_item(name, value)?;
            }
            stats.set_item("used_bytes", now.used_bytes as f64)?;
            stats.set_item("limit_bytes", now.limit_bytes as f64)?;
            stats.set_item("segments", now.segments as f64)?;
            Ok(Some(stats))
        })
    }

    fn close(&self, py: Python<'_>) -> PyResult<()> {
        guard(py, || {
            let transfer = locked(&self.inner).take();
            py.detach(|| {
                if let Some(transfer) = transfer {
                    transfer.close();
                }
            });
            Ok(())
        })
    }
}

impl FsWorker {
    fn transfer(&self, py: Python<'_>) -> PyResult<Arc<FsTransfer>> {
        locked(&self.inner)
            .clone()
            .ok_or_else(|| store_error(py, None, "the worker is closed"))
    }

    /// Runs `work` without the interpreter lock.
    fn call<T: Send>(
        &self,
        py: Python<'_>,
        work: impl FnOnce(&FsTransfer) -> kvlane_core::Result<T> + Send,
    ) -> PyResult<T> {
        guard(py, || {
            let transfer = self.transfer(py)?;
            py.detach(|| work(&transfer))
                .map_err(|error| transfer_error(py, &error))
        })
    }
}

/// What stores read is what the compute stream leaves behind.
fn order_stores(transfer: &FsTransfer, stream: Option<u64>) -> kvlane_core::Result<()> {
    if let Some(stream) = stream_of(transfer, stream)? {
        transfer.order_stores_after(stream)?;
    }
    Ok(())
}

/// The compute stream; must be given for a cache on a device: without it, KV of a step that has not run yet would be taken
/// for computed. For other caches it means nothing.
fn stream_of(transfer: &FsTransfer, stream: Option<u64>) -> kvlane_core::Result<Option<StreamHandle>> {
    match stream {
        _ if !transfer.needs_order() => Ok(None),
        // SAFETY: the caller of the methods with a stream (kvlane.vllm, from `torch.cuda.current_stream`) passes a live
        // stream of the device that the tensors are on. The handle is used before the method returns, and not kept.
        Some(handle) => Ok(Some(unsafe { StreamHandle::from_raw(handle) })),
        None => Err(kvlane_core::Error::InvalidArgument {
            argument: "stream",
            found: "None".to_owned(),
            allowed: "the compute stream, since the tensors are on a CUDA device".to_owned(),
        }),
    }
}

/// The cache that a layout describes.
fn cache_of(py: Python<'_>, map: &BlockMap, owner: Py<PyAny>, options: &FsOptions) -> PyResult<Cache> {
    let map = map.clone();
    // SAFETY, for both branches: the caller of the constructor (kvlane.vllm, from vLLM's own tensors) describes the tensors
    // that `owner` is, and the cache keeps that object. The block map has checked that every run of every block lies
    // inside the extent that shape and strides describe.
    if map.regions().iter().all(|region| region.device == Device::Host) {
        // SAFETY: as above; no Rust code has references into the tensors.
        return Ok(unsafe { HostCache::from_map(map, Arc::new(owner)) }.into());
    }
    // SAFETY: as above; PyTorch's tensors live in the primary context.
    let tensors = unsafe { DeviceTensors::from_map(map, Arc::new(owner)) };
    // Each copying thread, of both directions, has one buffer at a time.
    let buffers = 2 * options.threads();
    let cache = py
        .detach(|| DeviceCache::open(tensors, buffers))
        .map_err(|error| cuda_error(py, &error))?;
    Ok(cache.into())
}

/// Options travel as JSON: serde then names an option that does not exist or has a wrong type.
fn fs_options(options: &Bound<'_, PyDict>) -> PyResult<FsOptions> {
    let py = options.py();
    let text: String = py.import("json")?.call_method1("dumps", (options,))?.extract()?;
    let options: FsOptions = serde_json::from_str(&text).map_err(|error| {
        let what = error.to_string();
        // serde_json adds the place in a text that the caller never saw.
        let what = what.split(" at line ").next().unwrap_or_default();
        config_error(py, format!("options: {what}"))
    })?;
    options.check().map_err(|error| fs_error(py, &error))?;
    Ok(options)
}

fn namespace_of(py: Python<'_>, bytes: &[u8]) -> PyResult<NamespaceId> {
    <[u8; 32]>::try_from(bytes)
        .map(NamespaceId)
        .map_err(|_| config_error(py, format!("a namespace has {} bytes, allowed: 32", bytes.len())))
}

fn parse_keys(keys: &[u8]) -> kvlane_core::Result<Vec<BlockKey>> {
    BlockKey::parse_many(keys)
}

fn deadline(timeout_ms: u64) -> Instant {
    // A day is "for ever" here, and keeps the sum in range.
    Instant::now() + Duration::from_millis(timeout_ms.min(86_400_000))
}

fn outcome(outcome: Outcome) -> (Vec<usize>, &'static str) {
    match outcome {
        Outcome::Done => (Vec::new(), "done"),
        Outcome::Miss { positions, reason } => (positions, reason_name(reason)),
    }
}

fn reason_name(reason: MissReason) -> &'static str {
    match reason {
        MissReason::Absent => "absent",
        MissReason::Recycled => "recycled",
        MissReason::Corrupt => "corrupt",
        MissReason::TimedOut => "timed out",
        MissReason::Cancelled => "cancelled",
        MissReason::Io => "i/o error",
        MissReason::Dropped => "dropped",
        _ => "other",
    }
}

/// The counters that moved; times in seconds.
fn difference(now: &FsStats, before: &FsStats) -> Vec<(&'static str, f64)> {
    let counters = [
        ("stored_blocks", now.stored_blocks, before.stored_blocks),
        ("stored_bytes", now.stored_bytes, before.stored_bytes),
        ("present_blocks", now.present_blocks, before.present_blocks),
        ("loaded_blocks", now.loaded_blocks, before.loaded_blocks),
        ("loaded_bytes", now.loaded_bytes, before.loaded_bytes),
        ("absent_blocks", now.absent_blocks, before.absent_blocks),
        ("recycled_blocks", now.recycled_blocks, before.recycled_blocks),
        ("corrupt_blocks", now.corrupt_blocks, before.corrupt_blocks),
        ("timed_out_blocks", now.timed_out_blocks, before.timed_out_blocks),
        ("cancelled_blocks", now.cancelled_blocks, before.cancelled_blocks),
        ("io_failed_blocks", now.io_failed_blocks, before.io_failed_blocks),
        ("dropped_blocks", now.dropped_blocks, before.dropped_blocks),
        ("evicted_blocks", now.evicted_blocks, before.evicted_blocks),
        ("adopted_segments", now.adopted_segments, before.adopted_segments),
        (
            "returned_segments",
            now.returned_segments,
            before.returned_segments,
        ),
    ];
    let nanos = [
        ("store_seconds", now.store_nanos, before.store_nanos),
        ("load_seconds", now.load_nanos, before.load_nanos),
    ];
    let counted = counters
        .into_iter()
        .map(|(name, now, before)| (name, now.saturating_sub(before) as f64));
    let timed = nanos
        .into_iter()
        .map(|(name, now, before)| (name, now.saturating_sub(before) as f64 / 1e9));
    counted.chain(timed).filter(|(_, amount)| *amount > 0.0).collect()
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What these mutexes protect is replaced as a whole, so a panic leaves nothing half done.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
