"""The connector through a shared folder, under its own name and under that of vLLM's example."""

from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole
from vllm.logger import init_logger

from kvlane._native import FsReader, FsWorker
from kvlane.vllm import identity
from kvlane.vllm.descriptors import Descriptor, NamespaceSearch, leave_descriptor
from kvlane.vllm.hooks import KvlaneConnector, guarded, layers_are_whole, name_hit_source, register_own_name
from kvlane.vllm.metadata import IDLE, WorkerHandshake
from kvlane.vllm.options import Options, parse_options
from kvlane.vllm.probes import (
    block_pool_finder,
    handshakes_may_be_missing,
    holds_aborted_loads,
    inside_multi_connector,
    leaves_room_for_loads,
    ranks,
    synchronous_loads_are_announced,
)
from kvlane.vllm.scheduler import SchedulerHalf, SchedulerSettings
from kvlane.vllm.start import refuse_tokens_that_nobody_drops, set_failure_policy
from kvlane.vllm.worker import WorkerHalf, WorkerSettings, compute_stream

# vLLM gives handlers to loggers below its own name only.
logger = init_logger("vllm.kvlane")


class KvlaneFsConnector(KvlaneConnector):
    """Moves KV through a shared folder."""

    _options: Options
    _scheduler: SchedulerHalf | None
    _worker: WorkerHalf | None
    _idle = IDLE
    _parse = staticmethod(parse_options)

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any = None) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._search: NamespaceSearch | None = None
        self._handshake: WorkerHandshake | None = None
        self._descriptor: Descriptor | None = None
        if self._options.sync_load:
            refuse_tokens_that_nobody_drops(vllm_config)
        if role == KVConnectorRole.SCHEDULER:
            self._start_scheduler(vllm_config, vllm_config.kv_transfer_config)
        else:
            self._worker = WorkerHalf(self._options, _worker_settings(vllm_config, self._options))

    def _start_scheduler(self, vllm_config: Any, transfer: Any) -> None:
        options, parallel = self._options, vllm_config.parallel_config
        set_failure_policy(transfer, options.load_failure_policy, options.sync_load)
        self._scheduler = SchedulerHalf(
            options,
            SchedulerSettings(
                block_tokens=vllm_config.cache_config.block_size,
                can_store=transfer.is_kv_producer,
                can_load=transfer.is_kv_consumer,
                images_are_named=identity.images_are_named(vllm_config),
                batches_in_flight=parallel.pipeline_parallel_size + 1,
                holds_aborted_loads=holds_aborted_loads(),
                siblings_are_silent=inside_multi_connector() and not synchronous_loads_are_announced(),
                parking_blocks=None if leaves_room_for_loads() else self._kv_cache_config.num_blocks,
            ),
        )
        if options.sync_load:
            self._scheduler.find_prefix_cache(block_pool_finder(vllm_config.cache_config.enable_prefix_caching))
        self._search = NamespaceSearch(
            options.root,
            self._engine_id,
            parallel.pipeline_parallel_size,
            parallel.tensor_parallel_size,
            self._open_reader,
        )
        self._scheduler.on_reader_missing = self._search.start_reading
        if handshakes_may_be_missing(parallel):
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
        options, transfer = self._options, self._kv_transfer_config
        worker.close()  # after sleep mode the tensors are others
        layout, facts = self._name_caches(kv_caches)
        (pp_rank, _), (tp_rank, _) = ranks(self._vllm_config.parallel_config)
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
            if handshakes_may_be_missing(self._vllm_config.parallel_config):
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

    def wait_for_layer_load(self, layer_name: str) -> None:
        worker = self._worker
        if worker is not None and worker.step_loads:
            self._wait_for_layer(layer_name)

    @guarded(None)
    def _wait_for_layer(self, layer_name: str) -> None:
        assert self._worker is not None
        self._worker.wait_for_layer(layer_name)

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        worker = self._worker
        if worker is not None and worker.step_stores:
            self._layer_saved(layer_name)

    def wait_for_save(self) -> None:
        worker = self._worker
        if worker is not None and (worker.step_stores or worker.step_loads):
            self._finish_stores()

    @guarded(None)
    def _finish_stores(self) -> None:
        assert self._worker is not None
        self._worker.finish_stores()

    # ---- scheduler side

    def _take_handshakes(self, metadata: dict[Any, Any]) -> None:
        for worker in metadata.values():
            if isinstance(worker, WorkerHandshake) and self._search is not None:
                self._search.add(worker)

    def bind_gpu_block_pool(self, gpu_block_pool: Any) -> None:
        if self._scheduler is not None:
            self._scheduler.find_prefix_cache(lambda: gpu_block_pool)

    @guarded((False, None))
    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        assert self._scheduler is not None
        return self._scheduler.finished(request.request_id, block_ids), None

    @guarded(False)
    def reset_cache(self) -> bool | None:
        return self._scheduler.reset() if self._scheduler is not None else None

    # ---- both sides

    @guarded(None)
    def shutdown(self) -> None:
        for half in (self._search, self._scheduler, self._worker):
            if half is not None:
                half.close()
        self._remove_descriptor()

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        # Waiting for a layer is a hook inside the forward pass, which a full graph does not call. Saves are finished
        # behind the pass either way.
        return parse_options(extra_config).layerwise_load


class ExampleConnector(KvlaneFsConnector):
    """kvlane under the name of vLLM's example, so that manifests stay as they are."""


name_hit_source(KvlaneFsConnector, "DISK")
register_own_name(KvlaneFsConnector)


def _worker_settings(vllm_config: Any, options: Options) -> WorkerSettings:
    # Since this probe exists (0.17), vLLM keeps the layer hooks alive for connectors that say they need them.
    hooks_run = hasattr(KVConnectorBase_V1, "requires_piecewise_for_cudagraph")
    if options.layerwise_load and not hooks_run:
        logger.warning("kvlane: this vLLM may skip layer hooks, so layerwise_load waits for whole loads")
    return WorkerSettings(
        whole_layers=layers_are_whole(vllm_config),
        layerwise_load=options.layerwise_load and hooks_run,
        holds_aborted_loads=holds_aborted_loads(),
    )


__all__ = ["ExampleConnector", "KvlaneFsConnector"]
