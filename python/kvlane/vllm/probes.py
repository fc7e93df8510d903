"""What the running vLLM does and has. Features are probed for, versions are never compared."""

import dataclasses
import inspect
import sys
import weakref
from collections.abc import Callable
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1
from vllm.logger import init_logger

from kvlane.vllm.unproven import NEXT_OUTPUT, STALE_TOKENS

# vLLM gives handlers to loggers below its own name only.
logger = init_logger("vllm.kvlane")

#: vLLM before 0.24 takes the scheduler half's counts only in a step in which a worker has some. Such a vLLM is told by
#: a hook that came with the change.
SCHEDULERS_COUNTS_NEED_WORKERS = not hasattr(KVConnectorBase_V1, "has_pending_push_work")


def marks_of_stale_tokens() -> set[str]:
    """The attributes of vLLM's requests by which `unproven` has outputs in flight dropped."""
    from vllm.v1.request import Request

    return {STALE_TOKENS, *NEXT_OUTPUT} & set(Request.__init__.__code__.co_names)


def handshakes_may_be_missing(parallel: Any) -> bool:
    """Whether vLLM drops some of what workers say at start: then their namespaces are known late (`descriptors`)."""
    pp_aware = hasattr(KVConnectorBase_V1, "set_xfer_handshake_metadata_pp_aware")
    return inside_multi_connector() or (parallel.pipeline_parallel_size > 1 and not pp_aware)


def inside_multi_connector() -> bool:
    """Whether MultiConnector is making this connector. It gives its children a configuration without a trace of it."""
    return maker("MultiConnector") is not None


def maker(class_name: str) -> Any:
    """The object of that class whose code is making this connector, None if there is none."""
    frame = sys._getframe(1)
    while frame is not None:
        maker = frame.f_locals.get("self")
        if maker is not None and any(kind.__name__ == class_name for kind in type(maker).__mro__):
            return maker
        frame = frame.f_back  # type: ignore[assignment]
    return None


def block_pool_finder(prefix_caching: bool) -> Callable[[], Any]:
    """A way to vLLM's block pool, which does not exist yet. vLLM 0.22 and newer hand it over later; before, it can only
    be had from the scheduler that is making this connector."""
    scheduler = maker("Scheduler")
    if scheduler is None:
        if prefix_caching and not hasattr(KVConnectorBase_V1, "bind_gpu_block_pool"):
            logger.warning(
                "kvlane: vLLM's scheduler was not found, so a bad block may stay in the prefix cache if its request is "
                "aborted then; leave sync_load or prefix caching off"
            )
        return lambda: None
    known = weakref.ref(scheduler)
    return lambda: getattr(getattr(known(), "kv_cache_manager", None), "block_pool", None)


def holds_aborted_loads() -> bool:
    """Whether vLLM keeps the blocks of a request that is aborted while it loads (0.16 and newer)."""
    from vllm.v1.core.sched.scheduler import Scheduler

    return "delay_free_blocks" in inspect.signature(Scheduler._free_request).parameters


def leaves_room_for_loads() -> bool:
    """Whether vLLM admits an asynchronous load only if the request can compute afterwards."""
    from vllm.v1.core.sched.scheduler import Scheduler

    return hasattr(Scheduler, "_inflight_prefill_reserved_blocks")


def synchronous_loads_are_announced() -> bool:
    """Whether vLLM says in a step that somebody loads synchronously in it (0.29 and newer)."""
    from vllm.v1.core.sched.output import SchedulerOutput

    return "has_sync_kv_loads" in {field.name for field in dataclasses.fields(SchedulerOutput)}


def ranks(parallel: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    """(rank, size) of this worker in the pipeline group and in the tensor group."""
    pp_size, tp_size = parallel.pipeline_parallel_size, parallel.tensor_parallel_size
    try:
        from vllm.distributed.parallel_state import get_pp_group, get_tp_group

        return (get_pp_group().rank_in_group, pp_size), (get_tp_group().rank_in_group, tp_size)
    except (ImportError, AssertionError):  # no groups: one process without distribution
        return (parallel.rank // tp_size % pp_size, pp_size), (parallel.rank % tp_size, tp_size)
