"""What a connector checks and settles at start, before it takes part in anything. Only here may it refuse."""

from typing import Any

from vllm.logger import init_logger

from kvlane._native import ConfigError
from kvlane.vllm import identity
from kvlane.vllm.probes import inside_multi_connector, marks_of_stale_tokens
from kvlane.vllm.unproven import STALE_TOKENS

logger = init_logger("vllm.kvlane")

#: Caches whose block tables keep every block of a request, so that a block once computed can be stored and loaded.
_FULL_ATTENTION = {"FullAttentionSpec", "MLAAttentionSpec"}


def refuse_unsupported(vllm_config: Any, kv_cache_config: Any) -> None:
    """Refuses engines whose blocks are not the whole KV of their tokens."""
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


def reason_not_to_share(vllm_config: Any, model_identity: str | None) -> str | None:
    """Why nobody else can name this worker's KV, None if others can."""
    if not identity.scales_are_portable(vllm_config.cache_config):
        return "calculate_kv_scales makes KV that no other engine can read; use a checkpoint with scales"
    where = identity.unnamed_weights(vllm_config, model_identity)
    if where is not None:
        return (
            f"weights that come from {where} cannot be told from others that were there before; servers that set the "
            "same model_identity, a name of your own for just these weights, do share"
        )
    return None


def refuse_tokens_that_nobody_drops(vllm_config: Any) -> None:
    """A request may be preempted before it is known that a synchronous load failed, with tokens in flight that came
    from its blocks. Newer vLLM can be told to drop all of them (0.27 and newer), older ones to drop the next, and that
    only where the scheduler is asynchronous: with pipeline stages either is too little."""
    marks = marks_of_stale_tokens()
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


def set_failure_policy(transfer: Any, load_failure_policy: str, sync_load: bool = False) -> None:
    """Decides what a failed load costs. vLLM reads the policy right after it made the connector."""
    # A synchronous load has its blocks in the prefix cache before they are filled. Recomputing would leave bad blocks
    # there when the request is aborted first, and a step in flight would deliver a token that came from them: such a
    # request has to fail.
    if sync_load and inside_multi_connector():
        raise ConfigError(
            "sync_load is True below MultiConnector, where the outer configuration decides what a failed load costs, "
            "allowed: sync_load False"
        )
    if load_failure_policy == "keep":
        if sync_load and transfer.kv_load_failure_policy == "recompute":
            raise ConfigError(
                "load_failure_policy is 'keep' and kv_load_failure_policy 'recompute' while sync_load is True, "
                "allowed: kv_load_failure_policy 'fail', or load_failure_policy 'recompute' (which sets it for "
                "sync_load), or sync_load False"
            )
        return
    policy = "fail" if sync_load else "recompute"
    if inside_multi_connector():
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
