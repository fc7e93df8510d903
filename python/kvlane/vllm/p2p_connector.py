"""The connector from server to server, under its own name and under that of the connector that vLLM removed in 0.24."""

import socket
from hashlib import sha256
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole
from vllm.logger import init_logger

import kvlane
from kvlane import _native
from kvlane._native import ConfigError
from kvlane.vllm import identity
from kvlane.vllm.hooks import KvlaneConnector, guarded, layers_are_whole, name_hit_source, register_own_name
from kvlane.vllm.metrics import P2pPromMetrics
from kvlane.vllm.p2p_key import ids_are_random
from kvlane.vllm.p2p_options import P2pOptions, obsolete_options, parse_p2p_options
from kvlane.vllm.p2p_scheduler import P2pSchedulerHalf, P2pSettings
from kvlane.vllm.p2p_shape import shape_of, total_kv_heads
from kvlane.vllm.p2p_steps import IDLE, P2pHandshake, P2pStep
from kvlane.vllm.p2p_worker import P2pWorkerHalf, P2pWorkerSettings
from kvlane.vllm.probes import (
    holds_aborted_loads,
    inside_multi_connector,
    leaves_room_for_loads,
    ranks,
    synchronous_loads_are_announced,
)
from kvlane.vllm.start import set_failure_policy
from kvlane.vllm.worker import compute_stream

# vLLM gives handlers to loggers below its own name only.
logger = init_logger("vllm.kvlane")

#: Where it is known what the blocks hold, these may differ between two servers.
_FACTS_OF_SHAPE = ("block tokens", "tensor rank", "layout")

_ANY_HOSTS = ("0.0.0.0", "::")


class KvlaneP2pConnector(KvlaneConnector):
    """Moves KV from prefill's cache into decode's."""

    _options: P2pOptions
    _scheduler: P2pSchedulerHalf | None
    _worker: P2pWorkerHalf | None
    _idle = IDLE
    _parse = staticmethod(parse_p2p_options)
    _prom_metrics = P2pPromMetrics

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any = None) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._handshake: P2pHandshake | None = None
        self._ping: _native.P2pPing | None = None
        transfer = vllm_config.kv_transfer_config
        self._first_port = _first_port(transfer.kv_port, vllm_config.parallel_config)
        self._secret = self._options.secret()
        if role == KVConnectorRole.SCHEDULER:
            self._start_scheduler(vllm_config, transfer)
        else:
            (pp_rank, _), (tp_rank, tp_size) = ranks(vllm_config.parallel_config)
            settings = P2pWorkerSettings(
                pp_rank=pp_rank,
                tp_rank=tp_rank,
                tp_size=tp_size,
                kv_heads=total_kv_heads(vllm_config),
                whole_layers=layers_are_whole(vllm_config),
                holds_aborted_loads=holds_aborted_loads(),
            )
            self._worker = P2pWorkerHalf(self._options, settings)

    def _start_scheduler(self, vllm_config: Any, transfer: Any) -> None:
        options, parallel = self._options, vllm_config.parallel_config
        set_failure_policy(transfer, options.load_failure_policy)
        asker = None
        if transfer.is_kv_consumer:
            asker = _native.P2pAsker(self._native_options(0, 0, can_offer=False, facts=[]))
        self._scheduler = P2pSchedulerHalf(
            options,
            P2pSettings(
                block_tokens=vllm_config.cache_config.block_size,
                cache_blocks=self._kv_cache_config.num_blocks,
                can_offer=transfer.is_kv_producer,
                can_pull=transfer.is_kv_consumer,
                own_port=self._first_port,
                own_host=_own_host(options.host) if transfer.is_kv_producer else "",
                engine_id=self._engine_id,
                random_ids=ids_are_random(),
                images_are_named=identity.images_are_named(vllm_config),
                batches_in_flight=parallel.pipeline_parallel_size + 1,
                holds_aborted_loads=holds_aborted_loads(),
                siblings_are_silent=inside_multi_connector() and not synchronous_loads_are_announced(),
                leaves_room=leaves_room_for_loads(),
            ),
            asker,
        )
        obsolete = obsolete_options(transfer)
        if obsolete:
            logger.info("kvlane: obsolete and without effect: %s", ", ".join(obsolete))
        if self._secret is None and transfer.is_kv_producer:
            logger.warning(
                "kvlane: there is no secret_file, so whoever reaches port %d may read KV or take part, and on this "
                "machine map the KV of a GPU (also for writing)",
                self._first_port,
            )
        logger.info(
            "kvlane: %s offers %s and pulls %s KV, lane %s",
            type(self).__name__,
            "its" if transfer.is_kv_producer else "no",
            "others'" if transfer.is_kv_consumer else "no",
            options.lane,
        )

    def _native_options(self, port: int, rank: int, can_offer: bool, facts: identity.Facts) -> dict[str, Any]:
        options, transfer = self._options, self._kv_transfer_config
        return {
            "can_offer": can_offer,
            "can_pull": bool(transfer.is_kv_consumer),
            "host": options.host or _every_address(),
            "port": port,
            "rank": rank,
            "engine_id": self._engine_id,
            "secret": self._secret,
            "allowed_peers": list(options.allowed_peers),
            "lane": options.lane,
            "lease_ms": options.lease_ms,
            "transfer_timeout_ms": options.transfer_timeout_ms,
            "peer_timeout_ms": options.peer_timeout_ms,
            "connections": options.connections,
            "max_leased_blocks": max(self._kv_cache_config.num_blocks * options.leased_percent // 100, 1),
            "readers": 1,
            "facts": facts,
        }

    # ---- worker side

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        worker = self._worker
        assert worker is not None
        worker.close()  # after sleep mode the tensors are others
        layout, facts = self._name_caches(kv_caches)
        config = self._vllm_config
        _, tp = ranks(config.parallel_config)
        # ROCm's backends share names with CUDA's, and lay their caches out in other ways.
        backends = {} if torch.version.hip else identity.backends_of_layers(config)
        shape = shape_of(kv_caches, self._kv_cache_config, config.cache_config, total_kv_heads(config), tp, backends)
        if shape is not None:
            # What follows from these two servers agree on when they meet.
            facts = [(name, value) for name, value in facts if name not in _FACTS_OF_SHAPE]
        rank = _rank(self._vllm_config.parallel_config)
        namespace = identity.namespace_of(facts)
        can_offer = bool(self._kv_transfer_config.is_kv_producer)
        port = self._first_port + rank if self._first_port else 0
        native = _native.P2pWorker(
            layout,
            list(kv_caches.values()),
            namespace,
            self._vllm_config.cache_config.block_size,
            self._native_options(port, rank, can_offer, _told(facts, kv_caches)) | {"shape": shape},
        )
        worker.open(native, layout, compute_stream(kv_caches))
        self._handshake = P2pHandshake(rank, native.port)
        logger.info(
            "kvlane: rank %d, %s, %d layers, %d bytes per block, namespace %s",
            rank,
            f"port {native.port}" if can_offer else "not listening",
            layout.layer_count,
            layout.block_bytes,
            namespace.hex()[:16],
        )
        if rank == 0:
            self._announce(native.port)

    def _announce(self, port: int) -> None:
        """Tells the proxy of `proxy_ip` that this instance is there, as the old connector did: P if it offers."""
        options = self._options
        if options.proxy_ip is None or options.proxy_port is None or options.http_port is None:
            return
        self._silence()
        own_host = _own_host(options.host)
        is_prefill = bool(self._kv_transfer_config.is_kv_producer)
        shown = f"[{own_host}]" if ":" in own_host else own_host
        parallel = self._vllm_config.parallel_config
        self._ping = _native.P2pPing(
            options.proxy_ip,
            options.proxy_port,
            is_prefill,
            f"{shown}:{options.http_port}",
            f"{shown}:{port or self._first_port}",
            [("kvlane", kvlane.__version__), ("engine_id", self._engine_id)],
            [("tp_size", parallel.tensor_parallel_size), ("block_size", self._vllm_config.cache_config.block_size)],
        )
        logger.info("kvlane: announced to the proxy at %s:%d every 3 s", options.proxy_ip, options.proxy_port)

    def _silence(self) -> None:
        ping, self._ping = self._ping, None
        if ping is not None:
            ping.close()

    def get_handshake_metadata(self) -> P2pHandshake | None:
        return self._handshake

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        # Up to vLLM 0.18 this brings request ids, in the step whose metadata says the same a moment later.
        if isinstance(kv_connector_metadata, P2pStep):
            self._carry_out(kv_connector_metadata)

    @guarded(None)
    def _carry_out(self, step: P2pStep) -> None:
        assert self._worker is not None
        self._worker.carry_out(step)

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        worker = self._worker
        if worker is not None and worker.step_progress:
            self._layer_saved(layer_name)

    def wait_for_save(self) -> None:
        worker = self._worker
        if worker is not None and worker.step_progress:
            self._finish_step()

    @guarded(None)
    def _finish_step(self) -> None:
        assert self._worker is not None
        self._worker.finish_step()

    # ---- scheduler side

    def _take_handshakes(self, metadata: dict[Any, Any]) -> None:
        for worker in metadata.values():
            if isinstance(worker, P2pHandshake) and worker.rank == 0 and worker.port and self._scheduler is not None:
                self._scheduler.listens_on(worker.port)

    def update_connector_output(self, connector_output: Any) -> None:
        super().update_connector_output(connector_output)
        if connector_output.finished_sending:
            self._take_sent(connector_output.finished_sending)

    @guarded(None)
    def _take_sent(self, request_ids: set[str]) -> None:
        assert self._scheduler is not None
        self._scheduler.workers_sent(request_ids)

    @guarded((False, None))
    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        assert self._scheduler is not None
        return self._scheduler.finished(request)

    @guarded(False)
    def reset_cache(self) -> bool | None:
        return self._scheduler.reset() if self._scheduler is not None else None

    # ---- both sides

    @guarded(None)
    def shutdown(self) -> None:
        self._silence()
        for half in (self._scheduler, self._worker):
            if half is not None:
                half.close()


class P2pNcclConnector(KvlaneP2pConnector):
    """kvlane under the name of the connector that vLLM removed, so that manifests stay as they are."""


name_hit_source(KvlaneP2pConnector, "P2P")
register_own_name(KvlaneP2pConnector)


def _rank(parallel: Any) -> int:
    (pp_rank, _), (tp_rank, tp_size) = ranks(parallel)
    return pp_rank * tp_size + tp_rank


def _first_port(kv_port: Any, parallel: Any) -> int:
    """The port of this engine's rank 0: data parallel engines on one host follow each other. 0 takes any port."""
    ranks_per_engine = parallel.pipeline_parallel_size * parallel.tensor_parallel_size
    first = int(kv_port)
    if first:
        first += (getattr(parallel, "data_parallel_index", 0) or 0) * ranks_per_engine
    if not 0 <= first <= 65536 - ranks_per_engine:
        raise ConfigError(
            f"kv_port is {kv_port}, with which {ranks_per_engine} workers would listen on ports from {first}, "
            f"allowed: 0 (any), or a port with room for them below 65536"
        )
    if first == 0 and ranks_per_engine > 1:
        raise ConfigError(
            f"kv_port is 0 (any) with {ranks_per_engine} workers, whose ports have to follow each other, "
            "allowed: a port, or one worker"
        )
    return first


def _own_host(host: str | None) -> str:
    """The address under which others reach this server."""
    if host is not None and host not in _ANY_HOSTS:
        return host
    try:
        from vllm.utils.network_utils import get_ip

        return str(get_ip())
    except Exception as error:
        logger.info("kvlane: this server's address is not known (%s); its host name is announced", error)
        return socket.gethostname()


def _every_address() -> str:
    """What to listen on for all addresses: IPv6 only where this server's own address is one."""
    return "::" if ":" in _own_host(None) else "0.0.0.0"


def _told(facts: identity.Facts, kv_caches: dict[str, Any]) -> identity.Facts:
    """What a peer of another namespace is told of this one: long values by their hash, and what tensors look like."""
    told, files = [], []
    for name, value in facts:
        if " file " in name:
            files.append((name, value))
        else:
            told.append((name, value if len(value) <= 120 else sha256(value.encode()).hexdigest()))
    told.append(("files", f"{len(files)}, sha256 {sha256(repr(files).encode()).hexdigest()}"))
    for name, tensor in list(kv_caches.items())[:1]:
        if not hasattr(tensor, "stride"):
            continue  # layers with several tensors
        shape, strides = list(tensor.shape), list(tensor.stride())
        told.append(("tensors", f"{len(kv_caches)}, {name} of {tensor.dtype} {shape} with strides {strides}"[:400]))
    return told[:60]


__all__ = ["KvlaneP2pConnector", "P2pNcclConnector"]
