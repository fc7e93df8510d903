"""The worker half: moves blocks between one worker's KV tensors and the folder.

All hooks run on the worker's main thread. Stores end inside the step that computed them, within a bound; loads run
between steps and are reported when they ended.
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from kvlane._native import ConfigError, Layout
from kvlane.vllm.metadata import IDLE, LoadJob, StepMetadata
from kvlane.vllm.options import Options

logger = logging.getLogger("vllm.kvlane")

#: A store is registered before the forward pass, which may take long; `store_timeout_ms` counts from its end.
STORE_DEADLINE_MS = 600_000

#: How long steps do not store after a store that was not done in time, as a multiple of `store_timeout_ms`: at first,
#: then twice as long each time, at most. A hiccup costs little, and a folder that hangs soon a hundredth of the time.
FIRST_STORE_PAUSE = 4
LONGEST_STORE_PAUSE = 100

#: A synchronous load that is late is waited for in pieces of this length until it has ended, because only then no
#: thread writes to its blocks any more. Every so many pieces that is said again.
FENCE_MS = 5_000
PIECES_PER_WARNING = 12

#: vLLM 0.15 frees the blocks of an aborted load when we say so, and may stop stepping: so it is worth a short wait.
ABORT_WAIT_MS = 50


class Store(Protocol):
    """What the worker half needs of `kvlane._native.FsWorker`."""

    def reserve(self, keys: bytes, first_depth: int, timeout_ms: int) -> None: ...
    def withdraw(self, keys: bytes) -> None: ...
    def begin_store(
        self, keys: bytes, block_ids: Sequence[int], first_depth: int, timeout_ms: int, epoch: int | None = None
    ) -> int: ...
    def layer_ready(self, job: int, layer: int, stream: int | None = None) -> None: ...
    def finish_store(self, job: int, stream: int | None = None) -> None: ...
    def load(
        self,
        keys: bytes,
        block_ids: Sequence[int],
        timeout_ms: int,
        layer_major: bool = False,
        stream: int | None = None,
    ) -> int: ...
    def wait_layer(self, job: int, layer: int, timeout_ms: int) -> bool: ...
    def wait(self, job: int, timeout_ms: int) -> tuple[list[int], str] | None: ...
    def poll(self) -> list[tuple[int, list[int], str]] | None: ...
    def cancel(self, job: int) -> None: ...
    def stats(self) -> dict[str, float] | None: ...
    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class WorkerSettings:
    """Facts about the engine that the worker half depends on."""

    #: Layer hooks run once per layer and step, with all of the step's tokens.
    whole_layers: bool = True
    #: Layer hooks run in every step with a synchronous load, so that a load may be waited for layer by layer.
    layerwise_load: bool = False
    #: vLLM keeps the blocks of a request that is aborted while it loads (0.16 and newer).
    holds_aborted_loads: bool = True


@dataclasses.dataclass
class _Load:
    request_id: str
    block_ids: list[int]
    deadline_s: float
    aborted: bool = False


class WorkerHalf:
    """Carries out what the scheduler half planned."""

    def __init__(self, options: Options, settings: WorkerSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._options = options
        self._settings = settings
        self._clock = clock
        self._store: Store | None = None
        self._layer_index: Callable[[str], int | None] = lambda name: None
        self._stream: Callable[[], tuple[int, ...]] = no_stream
        self._step: StepMetadata = IDLE
        #: Stores of this step and their keys, until they were waited for.
        self.step_stores: list[tuple[int, bytes]] = []
        #: Those of them whose end a poll met, and the positions of blocks that were not stored.
        self._ended_stores: dict[int, Sequence[int]] = {}
        #: No stores before this time, and how long that pause is; 0 after a store in time.
        self._stores_pause_until_s = 0.0
        self._stores_pause_s = 0.0
        self._dropped_blocks = 0
        self._saved_layers: set[int] = set()
        #: Synchronous loads of this step, until they ended.
        self.step_loads: dict[int, _Load] = {}
        #: Asynchronous loads that run.
        self._loads: dict[int, _Load] = {}
        self._job_of_request: dict[str, int] = {}
        #: Cancelled stores whose completion nobody needs; it is taken by a later poll.
        self._forgotten: set[int] = set()
        self._received: set[str] = set()
        self._sent: set[str] = set()
        self._bad_blocks: set[int] = set()
        self._busy = False

    def open(self, store: Store, layout: Layout, stream: Callable[[], tuple[int, ...]] | None = None) -> None:
        """From now on jobs are carried out. ``stream`` is what `compute_stream` returned for the tensors."""
        self._store = store
        self._stream = stream or no_stream
        self._layer_index = layout.layer_index

    # ---- the hooks of a step, in their order

    def begin_step(self, step: StepMetadata) -> None:
        """Before the forward pass: promises, and the registration of stores so that layers can leave early."""
        self._step = step
        if step.is_idle:
            return
        self._busy = True
        for request_id in step.aborted_loads:
            self._abort_load(request_id)
        if self._store is None:
            return
        for keys in step.withdrawals:
            self._try("withdraw", self._store.withdraw, keys)
        self._saved_layers.clear()
        if self._clock() < self._stores_pause_until_s:
            for job in step.stores:
                self._dropped_blocks += len(job.block_ids)
                self._try("withdraw", self._store.withdraw, job.keys)
            return
        for promise in step.reservations:
            self._try("reserve", self._store.reserve, promise.keys, promise.first_depth, promise.timeout_ms)
        for job in step.stores:
            arguments = (job.keys, job.block_ids, job.first_depth, STORE_DEADLINE_MS, step.epoch)
            number = self._try("begin_store", self._store.begin_store, *arguments)
            if number is not None:
                self.step_stores.append((number, job.keys))
            else:
                self._try("withdraw", self._store.withdraw, job.keys)

    def start_loads(self) -> None:
        """Starts the step's loads. Synchronous ones have ended when this returns, unless layers are waited for."""
        loads = self._step.loads
        if not loads:
            return
        self._step = dataclasses.replace(self._step, loads=[])  # a second call in a step starts nothing
        for load in loads:
            try:
                self._start_load(load)
            except Exception as error:
                # vLLM waits for every load, so this one must end.
                log_once("start of a load", error)
                self._load_ended(_Load(load.request_id, load.block_ids, 0.0), list(range(len(load.block_ids))))
        if self._options.sync_load and not self._settings.layerwise_load:
            self._finish_step_loads()

    def wait_for_layer(self, name: str) -> None:
        """Waits until a layer of the step's synchronous loads is there."""
        layer = self._layer_index(name)
        if layer is None or self._store is None:
            return
        for job, load in list(self.step_loads.items()):
            remaining_ms = max(int((load.deadline_s - self._clock()) * 1000), 0)
            if not self._try("wait_layer", self._store.wait_layer, job, layer, remaining_ms):
                # The rest of this pass is wasted; waiting for every other layer too would only make it longer.
                self._finish_load(job, load)

    def layer_saved(self, name: str) -> None:
        """A layer's KV of this step is complete, so copying it can begin while the next layers compute."""
        if not self._settings.whole_layers or self._store is None:
            return
        layer = self._layer_index(name)
        if layer is None or layer in self._saved_layers:
            return
        self._saved_layers.add(layer)
        for job, _ in self.step_stores:
            if job not in self._ended_stores:
                self._try("layer_ready", self._layer_ready, job, layer)

    def finish_stores(self) -> None:
        """After the forward pass: everything is copied out, or given up after `store_timeout_ms`."""
        jobs, self.step_stores = self.step_stores, []
        ended_early, self._ended_stores = self._ended_stores, {}
        if self._store is None:
            return
        if self.step_loads:
            self._finish_step_loads()
        if not jobs:
            return
        deadline_s = self._clock() + self._options.store_timeout_ms / 1000
        for job, _ in jobs:
            if job not in ended_early:
                self._try("finish_store", self._finish_store, job)
        late = 0
        for job, keys in jobs:
            failed = ended_early.get(job)
            if failed is None:
                failed = self._wait_for_store(job, keys, deadline_s)
            if failed is None:
                # From here on vLLM may reuse the blocks; a cancelled store never becomes visible.
                self._try("cancel", self._store.cancel, job)
                self._forgotten.add(job)
                late += 1
                missing = keys
            else:
                missing = b"".join(keys[32 * position : 32 * position + 32] for position in failed)
            if missing:
                # Nobody keeps these promises any more, so nobody shall wait for them.
                self._try("withdraw", self._store.withdraw, missing)
        if late:
            self._pause_stores(late)
        elif self._stores_pause_s:
            logger.info("kvlane: the folder takes stores again")
            self._stores_pause_s = 0.0

    def _wait_for_store(self, job: int, keys: bytes, deadline_s: float) -> Sequence[int] | None:
        """The positions of blocks that were not stored, None if the store is late."""
        assert self._store is not None
        remaining_ms = max(int((deadline_s - self._clock()) * 1000), 0)
        try:
            ended = self._store.wait(job, remaining_ms)
        except Exception as error:
            # The store does not know this job, so it has ended; what became of it is not known. Should it be otherwise,
            # it must not read blocks that others write.
            log_once("wait", error)
            self._try("cancel", self._store.cancel, job)
            return range(len(keys) // 32)
        return ended[0] if ended is not None else None

    def _finish_store(self, job: int) -> None:
        assert self._store is not None
        self._store.finish_store(job, *self._stream())

    def _layer_ready(self, job: int, layer: int) -> None:
        assert self._store is not None
        self._store.layer_ready(job, layer, *self._stream())

    def _pause_stores(self, late: int) -> None:
        """A folder that does not answer must not cost every step its timeout."""
        if not self._stores_pause_s:
            logger.warning(
                "kvlane: %d stores were not done within store_timeout_ms (%d); steps without storing follow, longer "
                "ones from time to time while this lasts",
                late,
                self._options.store_timeout_ms,
            )
        timeout_s = self._options.store_timeout_ms / 1000
        first_s, longest_s = timeout_s * FIRST_STORE_PAUSE, timeout_s * LONGEST_STORE_PAUSE
        self._stores_pause_s = min(max(self._stores_pause_s * 2, first_s), longest_s)
        self._stores_pause_until_s = self._clock() + self._stores_pause_s

    def finished(self) -> tuple[set[str] | None, set[str] | None]:
        """Requests that may be freed after an aborted load, and requests whose load ended. Each is reported once.

        With speculation vLLM asks before `finish_stores`, and after the layers of the step were computed. A load of the
        step ends here, because bad blocks have to be known together with the tokens that were computed from them."""
        if self.step_loads:
            self._finish_step_loads()
        if self._loads or self._forgotten:
            self._poll()
        if not (self._sent or self._received):
            return None, None
        sent, self._sent = self._sent, set()
        received, self._received = self._received, set()
        return sent or None, received or None

    def bad_blocks(self) -> set[int]:
        """Blocks whose load failed since the last call."""
        if not self._bad_blocks:
            return set()
        bad, self._bad_blocks = self._bad_blocks, set()
        return bad

    def end_step(self) -> None:
        """The step is over. Stores that nobody finished must not read blocks any more."""
        self._step = IDLE
        if self.step_stores:
            self.finish_stores()

    def take_counters(self) -> dict[str, float]:
        """Counts since the last call, empty if nothing happened."""
        if not self._busy or self._store is None:
            return {}
        self._busy = bool(self._loads or self._forgotten)
        counters = self._store.stats() or {}
        if self._dropped_blocks:
            counters["dropped_blocks"] = counters.get("dropped_blocks", 0) + self._dropped_blocks
            self._dropped_blocks = 0
        return counters

    def close(self) -> None:
        store, self._store = self._store, None
        if store is None:
            return
        store.close()
        # Nobody hears of its jobs any more, and the next store numbers its own from the start.
        for load in (*self._loads.values(), *self.step_loads.values()):
            self._load_ended(load, range(len(load.block_ids)), "closed")
        self._loads.clear()
        self.step_loads.clear()
        self.step_stores.clear()
        self._ended_stores.clear()
        self._forgotten.clear()

    # ---- loads

    def _start_load(self, load: LoadJob) -> None:
        timeout_ms = self._options.load_timeout_ms if load.timeout_ms is None else load.timeout_ms
        entry = _Load(load.request_id, load.block_ids, self._clock() + timeout_ms / 1000)
        job = None
        if self._store is not None and len(load.keys) == 32 * len(load.block_ids):
            layer_major = self._options.sync_load and self._settings.layerwise_load
            job = self._try(
                "load", self._store.load, load.keys, load.block_ids, timeout_ms, layer_major, *self._stream()
            )
        if job is None:
            self._load_ended(entry, list(range(len(load.block_ids))))
        elif self._options.sync_load:
            self.step_loads[job] = entry
        else:
            self._loads[job] = entry
            self._job_of_request[load.request_id] = job

    def _abort_load(self, request_id: str) -> None:
        job = self._job_of_request.get(request_id)
        if job is None or self._store is None:
            # It was reported already. vLLM 0.15 waits for a word that the blocks are free; newer versions must not
            # hear of the request again.
            if not self._settings.holds_aborted_loads:
                self._sent.add(request_id)
            return
        self._loads[job].aborted = True
        self._try("cancel", self._store.cancel, job)
        if not self._settings.holds_aborted_loads:
            ended = self._try("wait", self._store.wait, job, ABORT_WAIT_MS)
            if ended is not None:
                self._load_ended(self._loads.pop(job), ended[0])

    def _poll(self) -> None:
        assert self._store is not None
        for job, positions, reason in self._try("poll", self._store.poll) or ():
            load = self._loads.pop(job, None)
            if load is not None:
                self._load_ended(load, positions, reason)
            elif job in self._forgotten:
                self._forgotten.remove(job)
            elif any(job == number for number, _ in self.step_stores):
                self._ended_stores[job] = positions

    def _load_ended(self, load: _Load, positions: Sequence[int], reason: str = "refused") -> None:
        self._job_of_request.pop(load.request_id, None)
        if positions and not load.aborted:
            self._bad_blocks.update(load.block_ids[position] for position in positions)
            logger.warning(
                "kvlane: %d of %d blocks of request %s did not load (%s)",
                len(positions), len(load.block_ids), load.request_id, reason,
            )  # fmt: skip
        if self._options.sync_load:
            return
        if load.aborted and not self._settings.holds_aborted_loads:
            self._sent.add(load.request_id)
        else:
            self._received.add(load.request_id)

    def _finish_step_loads(self) -> None:
        for job, load in list(self.step_loads.items()):
            self._finish_load(job, load)

    def _finish_load(self, job: int, load: _Load) -> None:
        """Returns when the load has ended, however long that takes: a thread that stands still inside a copy writes
        when the folder answers again, and vLLM gives blocks that we report as bad to others at once."""
        self.step_loads.pop(job, None)
        remaining_ms = max(int((load.deadline_s - self._clock()) * 1000), 0)
        ended = self._wait_for_load(job, load, remaining_ms)
        pieces = 0
        while ended is None:
            if pieces == 0:
                assert self._store is not None
                self._try("cancel", self._store.cancel, job)
            elif pieces % PIECES_PER_WARNING == 1:
                logger.warning(
                    "kvlane: the folder holds up a copy into %d blocks of request %s, and this step with it, for %d s "
                    "past its deadline, which is load_timeout_ms (%d) or less; vLLM ends an engine with worker "
                    "processes whose step takes longer than VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS",
                    len(load.block_ids), load.request_id, pieces * FENCE_MS // 1000, self._options.load_timeout_ms,
                )  # fmt: skip
            ended = self._wait_for_load(job, load, FENCE_MS)
            pieces += 1
        self._load_ended(load, *ended)

    def _wait_for_load(self, job: int, load: _Load, timeout_ms: int) -> tuple[Sequence[int], str] | None:
        assert self._store is not None
        try:
            return self._store.wait(job, timeout_ms)
        except Exception as error:
            # The store does not know this job, so it has ended; what became of it is not known.
            log_once("wait", error)
            return range(len(load.block_ids)), "lost"

    def _try(self, what: str, call: Callable[..., Any], *arguments: Any) -> Any:
        """Calls into the native module; an error there means miss or no store, never a dead engine."""
        try:
            return call(*arguments)
        except Exception as error:
            log_once(what, error)
            return None


def describe_tensors(kv_caches: Mapping[str, Any]) -> list[tuple[str, int, str, int, list[int], list[int]]]:
    """vLLM's KV tensors as `Layout` takes them; a cache that cannot be moved is refused by its layer's name."""
    described = []
    for name, tensor in kv_caches.items():
        if isinstance(tensor, (list, tuple)):
            raise ConfigError(
                f"layer '{name}' has {len(tensor)} state tensors in place of a KV cache (a Mamba or hybrid model), "
                "allowed: models whose layers all have one attention KV cache"
            )
        if tensor.device.type not in ("cpu", "cuda"):
            raise ConfigError(f"layer '{name}' has its KV cache on '{tensor.device}', allowed: cpu, cuda")
        shape, strides = list(tensor.shape), list(tensor.stride())
        device = "cpu" if tensor.device.type == "cpu" else f"cuda:{tensor.device.index or 0}"
        described.append((name, tensor.data_ptr(), device, tensor.element_size(), shape, strides))
    return described


def compute_stream(kv_caches: Mapping[str, Any]) -> Callable[[], tuple[int, ...]]:
    """What returns the handle of the stream that writes the caches at the moment, as further argument of the store's
    calls; no argument for tensors in host memory."""
    device = next((tensor.device for tensor in kv_caches.values() if tensor.device.type == "cuda"), None)
    if device is None:
        return no_stream
    import torch

    logger.warning("kvlane: the KV cache is on %s; kvlane was tested on a GPU, but not yet under vLLM on one", device)
    return lambda: (int(torch.cuda.current_stream(device).cuda_stream),)


def no_stream() -> tuple[int, ...]:
    """For tensors in host memory."""
    return ()


_logged: set[str] = set()


def log_once(what: str, error: Exception) -> None:
    line = f"{what}: {type(error).__name__}: {error}"
    if what not in _logged:
        _logged.add(what)
        logger.error("kvlane: %s; such errors cost a recompute and are logged once", line)
    else:
        logger.debug("kvlane: %s", line)
