"""What the dimensions of KV tensors count, so that servers with other block sizes or tensor-parallel sizes can be met.

It cannot be read from a tensor: kernels may see the same memory with other eyes. So it is said only for attention
backends whose source was read (in vLLM 0.32; of older versions what they register), and where anything else leaves a
doubt, nothing is said. Then only servers of exactly the same layout exchange KV.
"""

from typing import Any

from kvlane.vllm.p2p_ranks import heads_of_rank

#: The dimensions that count tokens and heads (None: there are none, all ranks have the same bytes), and whether the
#: kernel packs the tokens of a block together.
Axes = tuple[int, int | None, bool]
#: (first KV head, heads, ranks of the tensor group, the axes of each layer), as `kvlane._native.P2pWorker` takes it.
Shape = tuple[int, int, int, dict[str, Axes]]

#: Peers that say that they have more are not believed (`kvlane_p2p::shape::TENSOR_RANKS_MAX`).
TENSOR_RANKS_MAX = 64

#: A token's keys and values of a head lie together in both: five dimensions, tokens in front of heads (up to 0.25), or
#: (blocks, heads, tokens, keys and values).
_BY_TOKEN = {"FLASH_ATTN", "FLASHINFER", "FLEX_ATTENTION", "TRITON_ATTN"}
#: Inside a head, keys are transposed (or packed for AMX), and from 0.26 on all keys of a block come before its values,
#: whatever the tensor's shape says.
_PACKED = {"CPU_ATTN"}
#: One latent for each token, the same on all ranks.
_LATENT = {"CUTLASS_MLA", "FLASHINFER_MLA", "FLASHMLA", "FLASH_ATTN_MLA", "TRITON_MLA"}
#: Values and scales of a block lie apart.
_PLANAR_DTYPES = ("nvfp4", "fp8_ds_mla")


def shape_of(
    kv_caches: dict[str, Any],
    kv_cache_config: Any,
    cache_config: Any,
    kv_heads: int | None,
    tp: tuple[int, int],
    backends: dict[str, str],
) -> Shape | None:
    """The shape of a worker's tensors, None if there is a doubt. `kv_heads`: of the whole model, None with MLA.
    `backends`: the attention backend of each layer."""
    rank, size = tp
    if size > TENSOR_RANKS_MAX:
        return None
    try:
        heads = heads_of_rank(kv_heads, rank, size)
    except ValueError:
        return None
    if any(part in str(cache_config.cache_dtype) for part in _PLANAR_DTYPES):
        return None
    specs = _specs(kv_cache_config)
    axes = {}
    for name, tensor in kv_caches.items():
        origin = name if name in specs else _origin(name, kv_caches, specs)
        spec, backend = specs.get(origin), backends.get(origin)
        if getattr(spec, "block_size", None) != cache_config.block_size:
            return None
        if kv_heads is None:
            found = _latent_axes(tensor, spec) if backend in _LATENT else None
        elif getattr(spec, "num_kv_heads", None) == len(heads):
            found = _axes(tensor, kv_cache_config.num_blocks, backend)
        else:
            found = None
        if found is None or not _fits(tensor, found, kv_cache_config.num_blocks, cache_config.block_size, len(heads)):
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


def _origin(name: str, kv_caches: dict[str, Any], specs: dict[str, Any]) -> str:
    """The layer whose tensor this one uses too."""
    tensor = kv_caches[name]
    return next((other for other, theirs in kv_caches.items() if theirs is tensor and other in specs), name)


def _axes(tensor: Any, blocks: int, backend: str | None) -> Axes | None:
    dims = len(getattr(tensor, "shape", ()))
    packed = backend in _PACKED
    if not packed and backend not in _BY_TOKEN:
        return None
    if dims == 5:
        # With so few blocks either of the first two dimensions may count them.
        return None if blocks <= 2 else (3, 2, True) if packed else (2, 3, False)
    return (2, 1, packed) if dims == 4 else None


def _latent_axes(tensor: Any, spec: Any) -> Axes | None:
    shape = list(getattr(tensor, "shape", ()))
    if type(spec).__name__ != "MLAAttentionSpec":
        return None
    if len(shape) == 3:
        return 1, None, False
    return (2, None, False) if len(shape) == 4 and shape[1] == 1 else None


def _fits(tensor: Any, axes: Axes, blocks: int, block_tokens: int, heads: int) -> bool:
    """Whether the sizes are those that vLLM has told."""
    shape, (tokens, of_heads, _) = list(tensor.shape), axes
    block_dim = 1 if len(shape) == 5 and shape[0] == 2 and shape[1] % blocks == 0 else 0
    split, rest = divmod(shape[block_dim], blocks)
    is_whole = rest == 0 and shape[tokens] * split == block_tokens
    return is_whole and (of_heads is None or shape[of_heads] == heads)
