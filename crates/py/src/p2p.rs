//! `P2pAsker` and `P2pWorker`: the two roles of the P2P backend.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use kvlane_core::{BlockMap, Device, NamespaceId};
use kvlane_cuda::{DeviceCache, DeviceTensors, StreamHandle};
use kvlane_fs::HostCache;
use kvlane_p2p::lanes::LocalCache;
use kvlane_p2p::proto::{DenyReason, EndReason, Offer, Progress, PullResult};
use kvlane_p2p::{
    Asked, AskerOptions, PeerAddress, Prompt, PullOrder, TransferKey, WorkerOptions, WorkerStats,
};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::error::{config_error, cuda_error, guard, p2p_error, store_error};
use crate::ints::u32_items;
use crate::layout::Layout;
use crate::p2p_options::{P2pOptions, shape_of};

/// Asks prefill servers for prompts; decode's scheduler half.
#[pyclass(module = "kvlane._native", frozen)]
pub(crate) struct P2pAsker {
    inner: Mutex<Option<Arc<kvlane_p2p::P2pAsker>>>,
}

#[pymethods]
impl P2pAsker {
    #[new]
    fn new(py: Python<'_>, options: &Bound<'_, PyDict>) -> PyResult<Self> {
        guard(py, || {
            crate::logs::forward(py);
            let options = P2pOptions::parse(options)?;
            let mut settings = AskerOptions::new("");
            settings.peer = options.peer;
            let asker = py
                .detach(|| kvlane_p2p::P2pAsker::open(settings))
                .map_err(|error| p2p_error(py, &error))?;
            Ok(Self {
                inner: Mutex::new(Some(Arc::new(asker))),
            })
        })
    }

    /// 'pending', 'started', 'ready', or why there is nothing to wait for.
    #[allow(clippy::too_many_arguments, reason = "a question has so many parts")]
    fn ask(
        &self,
        py: Python<'_>,
        key: &str,
        host: &str,
        port: u16,
        tokens: u32,
        digest: &[u8],
        timeout_ms: u64,
    ) -> PyResult<&'static str> {
        guard(py, || {
            let asker = self.asker(py)?;
            let key = TransferKey::new(key).map_err(|error| p2p_error(py, &error))?;
            let Ok(address) = PeerAddress::new(host, port) else {
                // It came out of a request: the client's mistake, not the server's.
                return Ok("refused");
            };
            let prompt = prompt(py, tokens, digest)?;
            // Not detached: it only takes a lock that nobody holds while waiting.
            Ok(asked(asker.ask(&key, &address, prompt, millis(timeout_ms))))
        })
    }

    /// How many workers of a prefill server share out its KV heads; None if it was never reached or does not say.
    fn tensor_ranks(&self, py: Python<'_>, host: &str, port: u16) -> PyResult<Option<u32>> {
        guard(py, || {
            let asker = self.asker(py)?;
            let address = PeerAddress::new(host, port).ok();
            Ok(address.and_then(|address| asker.tensor_ranks(&address)))
        })
    }

    fn forget(&self, py: Python<'_>, key: &str) -> PyResult<()> {
        guard(py, || {
            let key = TransferKey::new(key).map_err(|error| p2p_error(py, &error))?;
            self.asker(py)?.forget(&key);
            Ok(())
        })
    }

    /// Gauge: open_questions.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        guard(py, || {
            let stats = PyDict::new(py);
            stats.set_item("open_questions", self.asker(py)?.question_count() as f64)?;
            Ok(stats)
        })
    }

    fn close(&self, py: Python<'_>) -> PyResult<()> {
        guard(py, || {
            let asker = locked(&self.inner).take();
            py.detach(|| {
                if let Some(asker) = asker {
                    asker.close();
                }
            });
            Ok(())
        })
    }
}

impl P2pAsker {
    fn asker(&self, py: Python<'_>) -> PyResult<Arc<kvlane_p2p::P2pAsker>> {
        locked(&self.inner)
            .clone()
            .ok_or_else(|| store_error(py, None, "the asker is closed"))
    }
}

/// One worker: holds its blocks for others, fills them from others.
#[pyclass(module = "kvlane._native", frozen)]
pub(crate) struct P2pWorker {
    inner: Mutex<Option<Arc<kvlane_p2p::P2pWorker>>>,
    /// Blocks of each pull, until it has ended.
    counts: Mutex<HashMap<u64, usize>>,
    /// Totals at the last call of `stats`.
    reported: Mutex<WorkerStats>,
    port: u16,
}

#[pymethods]
impl P2pWorker {
    #[new]
    fn new(
        py: Python<'_>,
        layout: &Layout,
        owner: Py<PyAny>,
        namespace: &[u8],
        block_tokens: u32,
        options: &Bound<'_, PyDict>,
    ) -> PyResult<Self> {
        guard(py, || {
            crate::logs::forward(py);
            let namespace = <[u8; 32]>::try_from(namespace).map(NamespaceId).map_err(|_| {
                config_error(
                    py,
                    format!("a namespace has {} bytes, allowed: 32", namespace.len()),
                )
            })?;
            let mut settings = P2pOptions::parse(options)?.worker(block_tokens);
            settings.shape = shape_of(layout.map(), block_tokens, options)?;
            let cache = cache_of(py, layout.map(), owner, &settings)?;
            let worker = py
                .detach(|| kvlane_p2p::P2pWorker::open(cache, namespace, settings))
                .map_err(|error| p2p_error(py, &error))?;
            Ok(Self {
                port: worker.port().unwrap_or(0),
                inner: Mutex::new(Some(Arc::new(worker))),
                counts: Mutex::default(),
                reported: Mutex::default(),
            })
        })
    }

    #[getter]
    fn port(&self) -> u16 {
        self.port
    }

    // ---- prefill. None of these waits: they take a lock that nobody holds while waiting.

    fn offer(
        &self,
        py: Python<'_>,
        key: &str,
        tokens: u32,
        digest: &[u8],
        block_ids: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let blocks = u32_items(block_ids, 0)?;
        self.call(py, |worker| {
            let offer = Offer {
                hold: key.into(),
                key: TransferKey::new(key)?,
                prompt: prompt_of(tokens, digest)?,
                blocks,
            };
            if !worker.offer(offer)? {
                tracing::warn!("too many requests are held for decode servers, so one is not");
            }
            Ok(())
        })
    }

    fn extend(&self, py: Python<'_>, key: &str, block_ids: &Bound<'_, PyAny>) -> PyResult<()> {
        let blocks = u32_items(block_ids, 0)?;
        self.call(py, |worker| worker.extend(key, &blocks))
    }

    /// `stream`: the compute stream that writes the blocks, as PyTorch's `cuda_stream`; for tensors on a CUDA device.
    #[pyo3(signature = (progressed, stream = None))]
    fn progress(
        &self,
        py: Python<'_>,
        progressed: Vec<(String, u32, u32, u32)>,
        stream: Option<u64>,
    ) -> PyResult<()> {
        let of = |(_, done_blocks, wave_blocks, wave_layers): &(String, u32, u32, u32)| Progress {
            done_blocks: *done_blocks,
            wave_blocks: *wave_blocks,
            wave_layers: *wave_layers,
        };
        let progressed: Vec<(&str, Progress)> =
            progressed.iter().map(|one| (one.0.as_str(), of(one))).collect();
        self.call(py, |worker| match stream_of(stream) {
            Some(stream) => worker.progress_after(&progressed, stream),
            None => worker.progress(&progressed),
        })
    }

    fn finish(&self, py: Python<'_>, key: &str) -> PyResult<()> {
        self.call(py, |worker| worker.finish(&key.into()))
    }

    fn revoke(&self, py: Python<'_>, key: &str) -> PyResult<()> {
        self.call(py, |worker| {
            if !worker.revoke(key)? {
                // The second time: nothing will come under this key.
                worker.give_up(&TransferKey::new(key)?)?;
            }
            Ok(())
        })
    }

    fn released(&self, py: Python<'_>) -> PyResult<Vec<String>> {
        self.call(py, |worker| {
            let ended = worker.ended_holds();
            Ok(ended.into_iter().map(|(hold, _)| hold.to_string()).collect())
        })
    }

    // ---- decode

    /// `stream`: the compute stream whose steps may still write the blocks; for tensors on a CUDA device.
    #[allow(clippy::too_many_arguments, reason = "a pull has so many parts")]
    #[pyo3(signature = (key, host, port, tokens, digest, first_block, block_ids, timeout_ms, stream = None, *, readers = 1))]
    fn pull(
        &self,
        py: Python<'_>,
        key: &str,
        host: &str,
        port: u16,
        tokens: u32,
        digest: &[u8],
        first_block: u32,
        block_ids: &Bound<'_, PyAny>,
        timeout_ms: u64,
        stream: Option<u64>,
        readers: u32,
    ) -> PyResult<u64> {
        let targets = u32_items(block_ids, 0)?;
        let count = targets.len();
        let job = self.call(py, |worker| {
            let order = PullOrder {
                address: PeerAddress::new(host, port)?,
                key: TransferKey::new(key)?,
                prompt: prompt_of(tokens, digest)?,
                first_block,
                targets,
                readers,
                timeout: millis(timeout_ms),
            };
            match stream_of(stream) {
                Some(stream) => worker.pull_after(order, stream),
                None => worker.pull(order),
            }
        })?;
        locked(&self.counts).insert(job, count);
        Ok(job)
    }

    #[pyo3(signature = (key, host, port, digest, *, readers = 1))]
    fn release(
        &self,
        py: Python<'_>,
        key: &str,
        host: &str,
        port: u16,
        digest: &[u8],
        readers: u32,
    ) -> PyResult<()> {
        self.call(py, |worker| {
            let address = PeerAddress::new(host, port)?;
            worker.release(&address, TransferKey::new(key)?, prompt_of(0, digest)?, readers);
            Ok(())
        })
    }

    fn cancel(&self, py: Python<'_>, job: u64) -> PyResult<()> {
        self.call(py, |worker| {
            worker.cancel(job);
            Ok(())
        })
    }

    fn poll(&self, py: Python<'_>) -> PyResult<Vec<(u64, Vec<usize>, &'static str)>> {
        self.call(py, |worker| {
            let ended = worker.poll();
            Ok(ended
                .into_iter()
                .map(|ended| (ended.job, ended.result))
                .collect::<Vec<_>>())
        })
        .map(|ended| {
            let plain = |(job, result)| {
                let (positions, reason) = self.outcome(job, result);
                (job, positions, reason)
            };
            ended.into_iter().map(plain).collect()
        })
    }

    fn wait(
        &self,
        py: Python<'_>,
        job: u64,
        timeout_ms: u64,
    ) -> PyResult<Option<(Vec<usize>, &'static str)>> {
        guard(py, || {
            let worker = self.worker(py)?;
            let deadline = Instant::now() + millis(timeout_ms);
            let result = py
                .detach(|| worker.wait(job, deadline))
                .map_err(|error| p2p_error(py, &error))?;
            Ok(result.map(|result| self.outcome(job, result)))
        })
    }

    /// Counters since the last call, and gauges.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        guard(py, || {
            let now = self.worker(py)?.stats();
            let before = std::mem::replace(&mut *locked(&self.reported), now.clone());
            let stats = PyDict::new(py);
            let moved = |name: String, amount: f64| {
                if amount > 0.0 {
                    stats.set_item(name, amount)
                } else {
                    Ok(())
                }
            };
            let (mut received, mut seconds) = (0, Duration::ZERO);
            for (lane, bytes) in &now.pulled_bytes {
                let bytes = bytes - before.pulled_bytes.get(lane).copied().unwrap_or_default();
                moved(format!("{lane}_bytes"), bytes as f64)?;
                received += bytes;
            }
            for (lane, time) in &now.pull_time {
                seconds += time.saturating_sub(before.pull_time.get(lane).copied().unwrap_or_default());
            }
            moved("received_bytes".to_owned(), received as f64)?;
            moved("pull_seconds".to_owned(), seconds.as_secs_f64())?;
            for (reason, count) in &now.holds {
                let count = count - before.holds.get(reason).copied().unwrap_or_default();
                moved(format!("{}_leases", end_name(*reason)), count as f64)?;
            }
            stats.set_item("peers_up", now.peers as f64)?;
            Ok(stats)
        })
    }

    fn close(&self, py: Python<'_>) -> PyResult<()> {
        guard(py, || {
            let worker = locked(&self.inner).take();
            py.detach(|| {
                if let Some(worker) = worker {
                    worker.close();
                }
            });
            Ok(())
        })
    }
}

impl P2pWorker {
    fn worker(&self, py: Python<'_>) -> PyResult<Arc<kvlane_p2p::P2pWorker>> {
        locked(&self.inner)
            .clone()
            .ok_or_else(|| store_error(py, None, "the worker is closed"))
    }

    /// Runs `work`, which does not wait: letting go of the interpreter lock would cost more than it.
    fn call<T>(
        &self,
        py: Python<'_>,
        work: impl FnOnce(&kvlane_p2p::P2pWorker) -> kvlane_p2p::Result<T>,
    ) -> PyResult<T> {
        guard(py, || {
            let worker = self.worker(py)?;
            work(&worker).map_err(|error| p2p_error(py, &error))
        })
    }

    /// Positions that are bad, and why. A pull counts whole or not at all.
    fn outcome(&self, job: u64, result: PullResult) -> (Vec<usize>, &'static str) {
        let count = locked(&self.counts).remove(&job).unwrap_or_default();
        match result {
            PullResult::Done => (Vec::new(), "done"),
            other => ((0..count).collect(), result_name(other)),
        }
    }
}

/// Pinned buffers of a block each, in addition to one for each copying thread: for data connections of lane tcp that are
/// served at the same time.
const SERVING_BUFFERS: usize = 8;

/// The cache that a layout describes.
fn cache_of(
    py: Python<'_>,
    map: &BlockMap,
    owner: Py<PyAny>,
    settings: &WorkerOptions,
) -> PyResult<LocalCache> {
    let map = map.clone();
    // SAFETY, for both branches: the caller of the constructor (kvlane.vllm, from vLLM's own tensors) describes the tensors
    // that `owner` is, and the cache keeps that object. The block map has checked that every run of every block lies
    // inside the extent that shape and strides describe.
    if map.regions().iter().all(|region| region.device == Device::Host) {
        // SAFETY: as above; no Rust code has references into the tensors.
        return Ok(Arc::new(unsafe { HostCache::from_map(map, Arc::new(owner)) }).into());
    }
    // SAFETY: as above; PyTorch's tensors live in the primary context.
    let tensors = unsafe { DeviceTensors::from_map(map, Arc::new(owner)) };
    let buffers = settings.copy_threads + SERVING_BUFFERS;
    let cache = py
        .detach(|| DeviceCache::open(tensors, buffers))
        .map_err(|error| cuda_error(py, &error))?;
    Ok(Arc::new(cache).into())
}

fn stream_of(stream: Option<u64>) -> Option<StreamHandle> {
    // SAFETY: the caller of the methods with a stream (kvlane.vllm, from `torch.cuda.current_stream`) passes a live stream
    // of the device that the tensors are on. The handle is used before the method returns, and not kept.
    stream.map(|handle| unsafe { StreamHandle::from_raw(handle) })
}

fn prompt(py: Python<'_>, tokens: u32, digest: &[u8]) -> PyResult<Prompt> {
    prompt_of(tokens, digest).map_err(|error| p2p_error(py, &error))
}

fn prompt_of(tokens: u32, digest: &[u8]) -> kvlane_p2p::Result<Prompt> {
    let digest = <[u8; 32]>::try_from(digest).map_err(|_| kvlane_p2p::Error::InvalidArgument {
        argument: "digest",
        found: format!("{} bytes", digest.len()),
        allowed: "32 bytes".to_owned(),
    })?;
    Ok(Prompt { tokens, digest })
}

pub(crate) fn millis(timeout_ms: u64) -> Duration {
    // A day is "for ever" here, and keeps sums in range.
    Duration::from_millis(timeout_ms.min(86_400_000))
}

fn asked(asked: Asked) -> &'static str {
    match asked {
        Asked::Pending => "pending",
        Asked::Started => "started",
        Asked::Ready => "ready",
        Asked::Mismatch => "mismatch",
        Asked::Unreachable => "unreachable",
        Asked::Refused => "refused",
        Asked::TimedOut => "timeout",
        Asked::Busy => "busy",
        _ => "none",
    }
}

fn result_name(result: PullResult) -> &'static str {
    match result {
        PullResult::Done => "done",
        PullResult::Denied(DenyReason::Gone) => "none",
        PullResult::Denied(DenyReason::Mismatch) => "mismatch",
        PullResult::Denied(DenyReason::Busy) | PullResult::Busy => "busy",
        PullResult::Denied(_) | PullResult::Misbehaved => "refused",
        PullResult::Lapsed => "lapsed",
        PullResult::TimedOut => "timeout",
        PullResult::Cancelled => "cancelled",
        PullResult::Unreachable => "unreachable",
        _ => "lost",
    }
}

fn end_name(reason: EndReason) -> &'static str {
    match reason {
        EndReason::Released => "released",
        EndReason::Expired => "expired",
        EndReason::Dropped | EndReason::Closed => "dropped",
        _ => "revoked",
    }
}

fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
