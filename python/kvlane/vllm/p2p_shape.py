"""What the dimensions of KV tensors count, so that servers with other block sizes or tensor-parallel sizes can be met.

It cannot be read from a tensor alone: it follows from the number of dimensions and from vLLM's specification of a
layer, and where that leaves a doubt nothing is said. Then only servers of exactly the same layout exchange KV.
"""

from typing import Any

from kvlane.vllm.p2p_ranks import heads_of_rank

#: (first KV head, heads, ranks of the tensor group, for each layer the dimensions that count tokens and heads), as
#: `kvlane._native.P2pWorker` takes it.
Shape = tuple[int, int, int, dict[str, tuple[int, int | None]]]

#: Backends whose five-dimensional tensors have tokens in front of heads (vLLM up to 0.25), and the one that has heads
#: in front. Others are told apart by their sizes.
_TOKENS_FIRST = {"FLASH_ATTN", "FLASHINFER", "FLEX_ATTENTION", "TRITON_ATTN"}
_HEADS_FIRST = {"CPU_ATTN"}


def shape_of(
    kv_caches: dict[str, Any], kv_cache_config: Any, kv_heads: int | None, tp: tuple[int, int], backend: str
) -> Shape | None:
    """The shape of a worker's tensors, None if there is a doubt. `kv_heads`: of the whole model, None with MLA."""
    rank, size = tp
    try:
        heads = heads_of_rank(kv_heads, rank, size)
    except ValueError:
        return None
    specs = _specs(kv_cache_config)
    axes = {}
    for name, tensor in kv_caches.items():
        spec = specs.get(name) or _shared_spec(name, kv_caches, specs)
        found = _axes(tensor, spec, kv_cache_config.num_blocks, None if kv_heads is None else len(heads), backend)
        if found is None:
            return None
        axes[name] = found
    return heads.start, len(heads), size, axes


def total_kv_heads(vllm_config: Any) -> int | None:
    """KV heads of the model, None if all ranks have the same bytes (MLA)."""
    model = vllm_config.model_config
    return None if getattr(model, "use_mla", False) else int(model.get_total_num_kv_heads())


def _specs(kv_cache_config: Any) -> dict[str, Any]:
    specs = {}
    for group in kv_cache_config.kv_cache_groups:
        of_layers = getattr(group.kv_cache_spec, "kv_cache_specs", {})
        for name in group.layer_names:
            specs[name] = of_layers.get(name, group.kv_cache_spec)
    return specs


def _shared_spec(name: str, kv_caches: dict[str, Any], specs: dict[str, Any]) -> Any:
    """The specification of the layer whose tensor this one uses too."""
    tensor = kv_caches[name]
    return next((specs[other] for other, theirs in kv_caches.items() if theirs is tensor and other in specs), None)


def _axes(tensor: Any, spec: Any, blocks: int, heads: int | None, backend: str) -> tuple[int, int | None] | None:
    shape = list(getattr(tensor, "shape", ()))
    block_tokens = getattr(spec, "block_size", None)
    if block_tokens is None or not shape:
        return None
    if heads is None:
        # (blocks, tokens, content), or (blocks, 1, tokens, content) from 0.29 on
        candidates: list[tuple[int, int | None]] = [(1, None)] if len(shape) == 3 else [(2, None)]
        if len(shape) not in (3, 4) or (len(shape) == 4 and shape[1] != 1):
            return None
    elif getattr(spec, "num_kv_heads", None) != heads:
        return None
    elif len(shape) == 5:
        # (2, blocks, ..) or (blocks, 2, ..)
        candidates = [(2, 3), (3, 2)]
        if shape[2] == shape[3]:
            candidates = [(2, 3)] if backend in _TOKENS_FIRST else [(3, 2)] if backend in _HEADS_FIRST else []
    else:
        # (blocks, heads, tokens, keys and values)
        candidates = [(2, 1)] if len(shape) == 4 else []
    block_dim = 1 if len(shape) == 5 and shape[0] == 2 and shape[1] % blocks == 0 else 0
    if blocks <= 2 and len(shape) == 5:
        return None  # either of the first two dimensions may count blocks
    split, rest = divmod(shape[block_dim], blocks)
    fits = [
        (tokens, of_heads)
        for tokens, of_heads in candidates
        if rest == 0 and shape[tokens] * split == block_tokens and (of_heads is None or shape[of_heads] == heads)
    ]
    return fits[0] if len(fits) == 1 else None
