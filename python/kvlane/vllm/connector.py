"""The connector classes that vLLM loads. They only pass hooks on to the half that their role needs.

One class serves vLLM 0.15 to 0.33: hooks that a version does not have are never called there, and types that it does
not have are probed for. No hook lets an exception out, because that ends the engine: what fails is logged and becomes
a miss. Only the start may refuse, with a sentence that says what is wrong.
"""

import dataclasses
import functools
import inspect
import sys
import time
import uuid
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole
from vllm.logger import init_logger

from kvlane._native import ConfigError, FsReader, FsWorker, Layout
from kvlane.vllm import identity
from kvlane.vllm.descriptors import Descriptor, NamespaceSearch, leave_descriptor
from kvlane.vllm.metadata import IDLE, StepMetadata, WorkerHandshake
from kvlane.vllm.metrics import KvlanePromMetrics, KvlaneStats
from kvlane.vllm.options import Options, parse_options
from kvlane.vllm.scheduler import SchedulerHalf, SchedulerSettings
from kvlane.vllm.unproven import NEXT_OUTPUT, STALE_TOKENS
from kvlane.vllm.worker import WorkerHalf, WorkerSettings, compute_stream, describe_tensors

# vLLM gives handlers to loggers below its own name only.
logger = init_logger("vllm.kvlane")

_Result = TypeVar("_Result")

#: Caches whose block tables keep every block of a request, so that a block once computed can be stored and loaded.
_FULL_ATTENTION = {"FullAttentionSpec", "MLAAttentionSpec"}


# vLLM before 0.24 takes the scheduler half's counts only in a step in which a worker has some. Such a vLLM is told by a
# hook that came with the change.
_SCHEDULERS_COUNTS_NEED_WORKERS = not hasattr(KVConnectorBase_V1, "has_pending_push_work")
REPORT_INTERVAL_S = 1.0


def _guarded(default: Any) -> Callable[[Callable[..., _Result]], Callable[..., _Result]]:
    """A hook that logs what goes wrong, once, and answers `default` instead."""

    def decorate(hook: Callable[..., _Result]) -> Callable[..., _Result]:
        @functools.wraps(hook)
        def guarded(self: Any, *arguments: Any, **options: Any) -> _Result:
            try:
                return hook(self, *arguments, **options)
            except Exception:
                if hook.__name__ not in self._failed_hooks:
                    self._failed_hooks.add(hook.__name__)
                    logger.exception(
                        "kvlane: internal error in %s; it costs recomputes and is logged once", hook.__name__
                    )
                return default

        return guarded

    return decorate


class KvlaneFsConnector(KVConnectorBase_V1):
    """Moves KV through a shared folder."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any = None) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._failed_hooks: set[str] = set()
        self._next_report_s = 0.0
        self._scheduler: SchedulerHalf | None = None
        self._worker: WorkerHalf | None = None
        self._search: NamespaceSearch | None = None
        self._handshake: WorkerHandshake | None = None
        self._descriptor: Descriptor | None = None
        transfer = vllm_config.kv_transfer_config
        self._options = parse_options(transfer.kv_connector_extra_config)
        _refuse_unsupported(vllm_config, kv_cache_config)
        if self._options.sync_load:
            _refuse_tokens_that_nobody_drops(vllm_config)
        self._engine_id = str(transfer.engine_id)
        #: No other worker has it, also where the operator gave engines or their restarts the same id.
        self._own_name = uuid.uuid4().hex
        if role == KVConnectorRole.SCHEDULER:
            self._start_scheduler(vllm_config, transfer)
        else:
            self._worker = WorkerHalf(self._options, _worker_settings(vllm_config, self._options))

    def _start_scheduler(self, vllm_config: Any, transfer: Any) -> None:
        options, parallel = self._options, vllm_config.parallel_config
        _set_failure_policy(transfer, options)
        self._scheduler = SchedulerHalf(
            options,
            SchedulerSettings(
                block_tokens=vllm_config.cache_config.block_size,
                can_store=transfer.is_kv_producer,
                can_load=transfer.is_kv_consumer,
                images_are_named=identity.images_are_named(vllm_config),
                batches_in_flight=parallel.pipeline_parallel_size + 1,
                holds_aborted_loads=_holds_aborted_loads(),
                siblings_are_silent=_inside_multi_connector() and not _synchronous_loads_are_announced(),
                parking_blocks=None if _leaves_room_for_loads() else self._kv_cache_config.num_blocks,
            ),
        )
        if options.sync_load:
            self._scheduler.find_prefix_cache(_block_pool_finder(vllm_config.cache_config.enable_prefix_caching))
        self._search = NamespaceSearch(
            options.root,
            self._engine_id,
            parallel.pipeline_parallel_size,
            parallel.tensor_parallel_size,
            self._open_reader,
        )
        self._scheduler.on_reader_missing = self._search.start_reading
        if _handshakes_may_be_missing(parallel):
            self._open_folder()
        logger.info(
            "kvlane: %s stores %s and loads %s KV in %s",
            type(self).__name__,
            "its" if transfer.is_kv_producer else "no",
            "others'" if transfer.is_kv_consumer else "no",
            options.root,
        )

    def _open_folder(self) -> None:
        """Without namespaces nothing is found in the folder, but it can be reset."""
        assert self._scheduler is not None
        try:
            self._scheduler.open_folder(FsReader(self._options.root, [], self._options.native()))
        except Exception as error:
            logger.warning("kvlane: the shared folder cannot be reset before its reader is there: %s", error)

    def _open_reader(self, namespaces: list[bytes]) -> None:
        # A server that only stores asks it for the folder's epoch, and resets the folder through it.
        assert self._scheduler is not None
        self._scheduler.open(FsReader(self._options.root, namespaces, self._options.native()))

    # ---- worker side

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        worker = self._worker
        assert worker is not None
        config, options, transfer = self._vllm_config, self._options, self._kv_transfer_config
        worker.close()  # after sleep mode the tensors are others
        tensors = describe_tensors(kv_caches)
        layout = Layout(tensors, self._kv_cache_config.num_blocks)
        (pp_rank, pp_size), (tp_rank, tp_size) = _ranks(config.parallel_config)
        facts = identity.engine_facts(config, options.model_identity)
        facts += identity.rank_facts(layout.layer_names, layout.fingerprint, (pp_rank, pp_size), (tp_rank, tp_size))
        reason = _reason_not_to_share(config, options)
        if reason is not None:
            logger.warning("kvlane: nothing is shared with other servers: %s", reason)
            facts.append(("engine", f"{self._engine_id} {self._own_name}"))
        namespace = identity.namespace_of(facts)
        self._handshake = WorkerHandshake(namespace, pp_rank, tp_rank)
        owner = list(kv_caches.values())
        native = FsWorker(options.root, namespace, layout, owner, options.native(), can_store=transfer.is_kv_producer)
        worker.open(native, layout, compute_stream(kv_caches))
        self._leave_descriptor(self._handshake, facts)
        logger.info(
            "kvlane: %d layers, %d bytes per block, namespace %s",
            layout.layer_count,
            layout.block_bytes,
            namespace.hex()[:16],
        )

    def _leave_descriptor(self, worker: WorkerHandshake, facts: identity.Facts) -> None:
        root, block_tokens = self._options.root, self._vllm_config.cache_config.block_size
        self._remove_descriptor()
        try:
            self._descriptor = leave_descriptor(root, self._engine_id, worker, facts, block_tokens)
        except OSError as error:
            if _handshakes_may_be_missing(self._vllm_config.parallel_config):
                logger.warning(
                    "kvlane: no descriptor was left in the folder (%s), so this engine may load nothing", error
                )
            else:
                logger.info("kvlane: no descriptor was left in the folder (%s); this engine needs none", error)

    def _remove_descriptor(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None:
            return
        try:
            descriptor.remove()
        except OSError as error:
            logger.info("kvlane: %s stays (%s); a later start removes it", descriptor.path, error)

    def get_handshake_metadata(self) -> WorkerHandshake | None:
        return self._handshake

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        super().bind_connector_metadata(connector_metadata)
        self._begin_step(connector_metadata)

    @_guarded(None)
    def _begin_step(self, step: StepMetadata) -> None:
        assert self._worker is not None
        self._worker.begin_step(step)

    def clear_connector_metadata(self) -> None:
        super().clear_connector_metadata()
        self._end_step()

    @_guarded(None)
    def _end_step(self) -> None:
        assert self._worker is not None
        self._worker.end_step()

    @_guarded(None)
    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        assert self._worker is not None
        self._worker.start_loads()

    def wait_for_layer_load(self, layer_name: str) -> None:
        worker = self._worker
        if worker is not None and worker.step_loads:
            self._wait_for_layer(layer_name)

    @_guarded(None)
    def _wait_for_layer(self, layer_name: str) -> None:
        assert self._worker is not None
        self._worker.wait_for_layer(layer_name)

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        worker = self._worker
        if worker is not None and worker.step_stores:
            self._layer_saved(layer_name)

    @_guarded(None)
    def _layer_saved(self, layer_name: str) -> None:
        assert self._worker is not None
        self._worker.layer_saved(layer_name)

    def wait_for_save(self) -> None:
        worker = self._worker
        if worker is not None and (worker.step_stores or worker.step_loads):
            self._finish_stores()

    @_guarded(None)
    def _finish_stores(self) -> None:
        assert self._worker is not None
        self._worker.finish_stores()

    @_guarded((None, None))
    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        assert self._worker is not None
        return self._worker.finished()

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.bad_blocks() if self._worker is not None else set()

    # ---- scheduler side

    def set_xfer_handshake_metadata(self, metadata: dict[int, Any]) -> None:
        self._take_handshakes(metadata)

    def set_xfer_handshake_metadata_pp_aware(self, metadata: dict[tuple[int, int], Any]) -> None:
        self._take_handshakes(metadata)

    def _take_handshakes(self, metadata: dict[Any, Any]) -> None:
        for worker in metadata.values():
            if isinstance(worker, WorkerHandshake) and self._search is not None:
                self._search.add(worker)

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        if self._scheduler is not None:
            self._scheduler.find_prefix_cache(lambda: gpu_block_pool)

    @_guarded((0, False))
    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        assert self._scheduler is not None
        return self._scheduler.matched_tokens(request, num_computed_tokens)

    @_guarded(None)
    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        assert self._scheduler is not None
        self._scheduler.blocks_allocated(request, lambda: blocks.get_block_ids()[0], num_external_tokens)

    @_guarded(IDLE)
    def build_connector_meta(self, scheduler_output: Any) -> StepMetadata:
        assert self._scheduler is not None
        return self._scheduler.step(scheduler_output)

    @_guarded(None)
    def update_connector_output(self, connector_output: Any) -> None:
        assert self._scheduler is not None
        finished, bad = connector_output.finished_recving, connector_output.invalid_block_ids
        failed = getattr(connector_output, "failed_recving", None)
        if finished or bad or failed:
            self._scheduler.workers_answered(finished or (), failed or (), bad or set())

    @_guarded((False, None))
    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        assert self._scheduler is not None
        return self._scheduler.finished(request.request_id, block_ids), None

    @_guarded(False)
    def reset_cache(self) -> bool | None:
        return self._scheduler.reset() if self._scheduler is not None else None

    @property
    def requires_kv_delivery(self) -> bool:
        """A store is a cache: what was not stored costs a recompute, so preempted requests need no special care."""
        return False

    # ---- both sides

    @_guarded(None)
    def get_kv_connector_stats(self) -> KvlaneStats | None:
        half = self._scheduler or self._worker
        counters = half.take_counters() if half is not None else {}
        if not counters and half is not None and half is self._worker and _SCHEDULERS_COUNTS_NEED_WORKERS:
            now_s = time.monotonic()
            if now_s >= self._next_report_s:
                self._next_report_s = now_s + REPORT_INTERVAL_S
                return KvlaneStats(data={})
        return KvlaneStats(data=counters) if counters else None

    @_guarded(None)
    def shutdown(self) -> None:
        for half in (self._search, self._scheduler, self._worker):
            if half is not None:
                half.close()
        self._remove_descriptor()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KvlaneStats:
        return KvlaneStats(data=dict(data or {}))

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KvlanePromMetrics:
        return KvlanePromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        # Waiting for a layer is a hook inside the forward pass, which a full graph does not call. Saves are finished
        # behind the pass either way.
        return parse_options(extra_config).layerwise_load

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        if not parse_options(vllm_config.kv_transfer_config.kv_connector_extra_config).block_outermost_layout:
            return None
        try:
            from vllm.v1.kv_cache_layout import KVCacheLayout
        except ImportError:
            logger.warning(
                "kvlane: this vLLM has no block-outermost layout (0.29 has), block_outermost_layout is ignored"
            )
            return None
        return "BLHNC" if hasattr(KVCacheLayout, "BLHNC") else None


try:
    from vllm.v1.metrics.cache_hit_source import CacheHitSource

    KvlaneFsConnector._cache_hit_source = CacheHitSource.DISK
except ImportError:  # vLLM before 0.32 does not ask where a hit came from
    pass


class ExampleConnector(KvlaneFsConnector):
    """kvlane under the name of vLLM's example, so that manifests stay as they are."""


def _register_own_name() -> None:
    """MultiConnector looks its children up by class name when it takes up their counts, also those that were loaded by
    kv_connector_module_path with the plugin turned off. Nothing else needs it, so a vLLM that moved its factory may do
    without."""
    try:
        from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

        if KvlaneFsConnector.__name__ not in KVConnectorFactory._registry:
            KVConnectorFactory.register_connector(KvlaneFsConnector.__name__, "kvlane.vllm", KvlaneFsConnector.__name__)
    except Exception as error:
        logger.debug("kvlane: not registered with this vLLM: %s", error)


_register_own_name()


def _refuse_unsupported(vllm_config: Any, kv_cache_config: Any) -> None:
    parallel = vllm_config.parallel_config
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        size = getattr(parallel, name, 1)
        if size > 1:
            raise ConfigError(f"{name} is {size}, allowed: 1 (a block is spread over ranks otherwise)")
    groups = getattr(kv_cache_config, "kv_cache_groups", None) or []
    if len(groups) > 1:
        raise ConfigError(
            f"the model has {len(groups)} groups of KV caches (a hybrid model), allowed: 1; KVLANE_PLUGIN=0 in the "
            "environment leaves vLLM's own connectors in place"
        )
    for group in groups:
        spec = group.kv_cache_spec
        specs = getattr(spec, "kv_cache_specs", None)  # layers of one type and several sizes
        for name, layer in specs.items() if isinstance(specs, dict) else [(group.layer_names[0], spec)]:
            if type(layer).__name__ not in _FULL_ATTENTION:
                raise ConfigError(
                    f"layer '{name}' has a KV cache of type {type(layer).__name__}, "
                    f"allowed: {', '.join(sorted(_FULL_ATTENTION))}; KVLANE_PLUGIN=0 in the environment leaves vLLM's "
                    "own connectors in place"
                )


def _reason_not_to_share(vllm_config: Any, options: Options) -> str | None:
    """Why nobody else can name this worker's KV, None if others can."""
    if not identity.scales_are_portable(vllm_config.cache_config):
        return "calculate_kv_scales makes KV that no other engine can read; use a checkpoint with scales"
    where = identity.unnamed_weights(vllm_config, options.model_identity)
    if where is not None:
        return (
            f"weights that come from {where} cannot be told from others that were there before; servers that set the "
            "same model_identity, a name of your own for just these weights, do share"
        )
    return None


def _worker_settings(vllm_config: Any, options: Options) -> WorkerSettings:
    parallel = vllm_config.parallel_config
    # Since this probe exists (0.17), vLLM keeps the layer hooks alive for connectors that say they need them.
    hooks_run = hasattr(KVConnectorBase_V1, "requires_piecewise_for_cudagraph")
    if options.layerwise_load and not hooks_run:
        logger.warning("kvlane: this vLLM may skip layer hooks, so layerwise_load waits for whole loads")
    split = getattr(parallel, "enable_dbo", False) or (getattr(parallel, "ubatch_size", 0) or 0) > 1
    return WorkerSettings(
        whole_layers=not split,
        layerwise_load=options.layerwise_load and hooks_run,
        holds_aborted_loads=_holds_aborted_loads(),
    )


def _refuse_tokens_that_nobody_drops(vllm_config: Any) -> None:
    """A request may be preempted before it is known that a synchronous load failed, with tokens in flight that came
    from its blocks. Newer vLLM can be told to drop all of them (0.27 and newer), older ones to drop the next, and that
    only where the scheduler is asynchronous: with pipeline stages either is too little."""
    marks = _marks_of_stale_tokens()
    if STALE_TOKENS in marks:
        return
    stages = vllm_config.parallel_config.pipeline_parallel_size
    if stages > 1:
        raise ConfigError(
            f"sync_load is True and pipeline_parallel_size {stages}, with which this vLLM may answer with tokens from "
            "blocks that did not load, allowed: pipeline_parallel_size 1, or sync_load False, or vLLM 0.27 and newer"
        )
    if vllm_config.scheduler_config.async_scheduling and not marks:
        raise ConfigError(
            "sync_load is True and async_scheduling True, with which this vLLM may answer with tokens from blocks that "
            "did not load, allowed: async_scheduling False, or sync_load False"
        )


def _marks_of_stale_tokens() -> set[str]:
    """The attributes of vLLM's requests by which `unproven` has outputs in flight dropped."""
    from vllm.v1.request import Request

    return {STALE_TOKENS, *NEXT_OUTPUT} & set(Request.__init__.__code__.co_names)


def _set_failure_policy(transfer: Any, options: Options) -> None:
    """Decides what a failed load costs. vLLM reads the policy right after it made the connector."""
    # A synchronous load has its blocks in the prefix cache before they are filled. Recomputing would leave bad blocks
    # there when the request is aborted first, and a step in flight would deliver a token that came from them: such a
    # request has to fail.
    if options.sync_load and _inside_multi_connector():
        raise ConfigError(
            "sync_load is True below MultiConnector, where the outer configuration decides what a failed load costs, "
            "allowed: sync_load False"
        )
    if options.load_failure_policy == "keep":
        if options.sync_load and transfer.kv_load_failure_policy == "recompute":
            raise ConfigError(
                "load_failure_policy is 'keep' and kv_load_failure_policy 'recompute' while sync_load is True, "
                "allowed: kv_load_failure_policy 'fail', or load_failure_policy 'recompute' (which sets it for "
                "sync_load), or sync_load False"
            )
        return
    policy = "fail" if options.sync_load else "recompute"
    if _inside_multi_connector():
        logger.warning(
            "kvlane: below MultiConnector the failure policy is the outer configuration's; set kv_load_failure_policy "
            "to '%s' there",
            policy,
        )
        return
    if transfer.kv_load_failure_policy != policy:
        transfer.kv_load_failure_policy = policy
        logger.info(
            "kvlane: kv_load_failure_policy is now '%s'; the option load_failure_policy 'keep' leaves vLLM's", policy
        )


def _handshakes_may_be_missing(parallel: Any) -> bool:
    """Whether vLLM drops some of what workers say at start: then their namespaces are known late (`descriptors`)."""
    pp_aware = hasattr(KVConnectorBase_V1, "set_xfer_handshake_metadata_pp_aware")
    return _inside_multi_connector() or (parallel.pipeline_parallel_size > 1 and not pp_aware)


def _inside_multi_connector() -> bool:
    """Whether MultiConnector is making this connector. It gives its children a configuration without a trace of it."""
    return _maker("MultiConnector") is not None


def _maker(class_name: str) -> Any:
    """The object of that class whose code is making this connector, None if there is none."""
    frame = sys._getframe(1)
    while frame is not None:
        maker = frame.f_locals.get("self")
        if maker is not None and any(kind.__name__ == class_name for kind in type(maker).__mro__):
            return maker
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _block_pool_finder(prefix_caching: bool) -> Callable[[], Any]:
    """A way to vLLM's block pool, which does not exist yet. vLLM 0.22 and newer hand it over later; before, it can only
    be had from the scheduler that is making this connector."""
    scheduler = _maker("Scheduler")
    if scheduler is None:
        if prefix_caching and not hasattr(KVConnectorBase_V1, "bind_gpu_block_pool"):
            logger.warning(
                "kvlane: vLLM's scheduler was not found, so a bad block may stay in the prefix cache if its request is "
                "aborted then; leave sync_load or prefix caching off"
            )
        return lambda: None
    known = weakref.ref(scheduler)
    return lambda: getattr(getattr(known(), "kv_cache_manager", None), "block_pool", None)


def _holds_aborted_loads() -> bool:
    """Whether vLLM keeps the blocks of a request that is aborted while it loads (0.16 and newer)."""
    from vllm.v1.core.sched.scheduler import Scheduler

    return "delay_free_blocks" in inspect.signature(Scheduler._free_request).parameters


def _leaves_room_for_loads() -> bool:
    """Whether vLLM admits an asynchronous load only if the request can compute afterwards."""
    from vllm.v1.core.sched.scheduler import Scheduler

    return hasattr(Scheduler, "_inflight_prefill_reserved_blocks")


def _synchronous_loads_are_announced() -> bool:
    """Whether vLLM says in a step that somebody loads synchronously in it (0.29 and newer)."""
    from vllm.v1.core.sched.output import SchedulerOutput

    return "has_sync_kv_loads" in {field.name for field in dataclasses.fields(SchedulerOutput)}


def _ranks(parallel: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    """(rank, size) of this worker in the pipeline group and in the tensor group."""
    pp_size, tp_size = parallel.pipeline_parallel_size, parallel.tensor_parallel_size
    try:
        from vllm.distributed.parallel_state import get_pp_group, get_tp_group

        return (get_pp_group().rank_in_group, pp_size), (get_tp_group().rank_in_group, tp_size)
    except (ImportError, AssertionError):  # no groups: one process without distribution
        return (parallel.rank // tp_size % pp_size, pp_size), (parallel.rank % tp_size, tp_size)


__all__ = ["ExampleConnector", "KvlaneFsConnector"]
