"""What kvlane's connectors do alike with vLLM's hooks: they pass them on to the half that their role needs.

One class serves vLLM 0.15 to 0.33: hooks that a version does not have are never called there, and types that it does
not have are probed for. No hook lets an exception out, because that ends the engine: what fails is logged and becomes
a miss. Only the start may refuse, with a sentence that says what is wrong.
"""

import functools
import time
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata, KVConnectorRole
from vllm.logger import init_logger

from kvlane._native import Layout
from kvlane.vllm import identity
from kvlane.vllm.metrics import KvlanePromMetrics, KvlaneStats
from kvlane.vllm.probes import SCHEDULERS_COUNTS_NEED_WORKERS, ranks
from kvlane.vllm.start import reason_not_to_share, refuse_unsupported
from kvlane.vllm.worker import describe_tensors

# vLLM gives handlers to loggers below its own name only.
logger = init_logger("vllm.kvlane")

REPORT_INTERVAL_S = 1.0

_Result = TypeVar("_Result")


def guarded(default: Any) -> Callable[[Callable[..., _Result]], Callable[..., _Result]]:
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


class KvlaneConnector(KVConnectorBase_V1):
    """Base of the connectors. A subclass sets `_scheduler` or `_worker`, by its role."""

    #: Parsed options: a frozen dataclass with at least `model_identity` and `block_outermost_layout`.
    _options: Any
    _scheduler: Any = None
    _worker: Any = None
    #: The metadata of a step in which there is nothing to do.
    _idle: KVConnectorMetadata
    _parse: Callable[..., Any]
    _prom_metrics: type[KvlanePromMetrics] = KvlanePromMetrics

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any = None) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._failed_hooks: set[str] = set()
        self._next_report_s = 0.0
        transfer = vllm_config.kv_transfer_config
        self._options = type(self)._parse(transfer.kv_connector_extra_config)
        refuse_unsupported(vllm_config, kv_cache_config)
        self._engine_id = str(transfer.engine_id)
        #: No other worker has it, also where the operator gave engines or their restarts the same id.
        self._own_name = uuid.uuid4().hex

    # ---- worker side

    def _name_caches(self, kv_caches: dict[str, Any]) -> tuple[Layout, identity.Facts]:
        """The block map of a worker's tensors, and the facts of their namespace."""
        config, options = self._vllm_config, self._options
        layout = Layout(describe_tensors(kv_caches), self._kv_cache_config.num_blocks)
        pp, tp = ranks(config.parallel_config)
        facts = identity.engine_facts(config, options.model_identity)
        facts += identity.rank_facts(layout.layer_names, layout.fingerprint, pp, tp)
        reason = reason_not_to_share(config, options.model_identity)
        if reason is not None:
            logger.warning("kvlane: nothing is shared with other servers: %s", reason)
            facts.append(("engine", f"{self._engine_id} {self._own_name}"))
        return layout, facts

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        super().bind_connector_metadata(connector_metadata)
        self._begin_step(connector_metadata)

    @guarded(None)
    def _begin_step(self, step: Any) -> None:
        assert self._worker is not None
        self._worker.begin_step(step)

    def clear_connector_metadata(self) -> None:
        super().clear_connector_metadata()
        self._end_step()

    @guarded(None)
    def _end_step(self) -> None:
        assert self._worker is not None
        self._worker.end_step()

    @guarded(None)
    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        assert self._worker is not None
        self._worker.start_loads()

    def wait_for_layer_load(self, layer_name: str) -> None:
        return

    @guarded(None)
    def _layer_saved(self, layer_name: str) -> None:
        assert self._worker is not None
        self._worker.layer_saved(layer_name)

    @guarded((None, None))
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
        """What the workers said at start, by rank."""

    @guarded((0, False))
    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        assert self._scheduler is not None
        return self._scheduler.matched_tokens(request, num_computed_tokens)

    @guarded(None)
    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        assert self._scheduler is not None
        self._scheduler.blocks_allocated(request, lambda: blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        step = self._plan_step(scheduler_output)
        return self._idle if step is None else step

    @guarded(None)
    def _plan_step(self, scheduler_output: Any) -> KVConnectorMetadata | None:
        assert self._scheduler is not None
        return self._scheduler.step(scheduler_output)

    @guarded(None)
    def update_connector_output(self, connector_output: Any) -> None:
        assert self._scheduler is not None
        finished, bad = connector_output.finished_recving, connector_output.invalid_block_ids
        failed = getattr(connector_output, "failed_recving", None)
        if finished or bad or failed:
            self._scheduler.workers_answered(finished or (), failed or (), bad or set())

    @property
    def requires_kv_delivery(self) -> bool:
        """What was not handed over costs a recompute, so preempted requests need no special care."""
        return False

    # ---- both sides

    @guarded(None)
    def get_kv_connector_stats(self) -> KvlaneStats | None:
        half = self._scheduler or self._worker
        counters = half.take_counters() if half is not None else {}
        if not counters and half is not None and half is self._worker and SCHEDULERS_COUNTS_NEED_WORKERS:
            now_s = time.monotonic()
            if now_s >= self._next_report_s:
                self._next_report_s = now_s + REPORT_INTERVAL_S
                return KvlaneStats(data={})
        return KvlaneStats(data=counters) if counters else None

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
        return cls._prom_metrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        # What full graphs do not call are the layer hooks: without them KV leaves at the end of a step.
        return False

    @classmethod
    def get_required_kvcache_layout(cls, vllm_config: Any) -> str | None:
        if not cls._parse(vllm_config.kv_transfer_config.kv_connector_extra_config).block_outermost_layout:
            return None
        try:
            from vllm.v1.kv_cache_layout import KVCacheLayout
        except ImportError:
            logger.warning(
                "kvlane: this vLLM has no block-outermost layout (0.29 has), block_outermost_layout is ignored"
            )
            return None
        return "BLHNC" if hasattr(KVCacheLayout, "BLHNC") else None


def register_own_name(connector: type[KvlaneConnector]) -> None:
    """MultiConnector looks its children up by class name when it takes up their counts, also those that were loaded by
    kv_connector_module_path with the plugin turned off. Nothing else needs it, so a vLLM that moved its factory may do
    without."""
    name = connector.__name__
    try:
        from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

        if name not in KVConnectorFactory._registry:
            KVConnectorFactory.register_connector(name, "kvlane.vllm", name)
    except Exception as error:
        logger.debug("kvlane: not registered with this vLLM: %s", error)


def name_hit_source(connector: type[KvlaneConnector], source: str) -> None:
    """vLLM 0.32 and newer count hits by where they came from."""
    try:
        from vllm.v1.metrics.cache_hit_source import CacheHitSource

        connector._cache_hit_source = getattr(CacheHitSource, source)
    except (ImportError, AttributeError):
        pass


def layers_are_whole(vllm_config: Any) -> bool:
    """Whether layer hooks run once per layer and step, with all of the step's tokens."""
    parallel = vllm_config.parallel_config
    return not (getattr(parallel, "enable_dbo", False) or (getattr(parallel, "ubatch_size", 0) or 0) > 1)
