"""The request's caches as kvlane sees them."""

from kvlane import _native
from workload import BLOCK_TOKENS, HEAD_DIM, KV_HEADS, LAYERS, POOL_BLOCKS, PagedCache

NUMBER_BYTES = 2


def layout_of(cache: PagedCache, layers: int = LAYERS) -> _native.Layout:
    """The first layers, as vLLM 0.32 hands tensors over: [block][head][token][K and V of a head]."""
    shape = [POOL_BLOCKS, KV_HEADS, BLOCK_TOKENS, 2 * HEAD_DIM]
    token = KV_HEADS * 2 * HEAD_DIM
    strides = [BLOCK_TOKENS * token, 2 * HEAD_DIM, token, 1]
    tensors = [
        (f"model.layers.{number}.self_attn.attn", layer.ctypes.data, "cpu", NUMBER_BYTES, shape, strides)
        for number, layer in enumerate(cache.layers[:layers])
    ]
    return _native.Layout(tensors, POOL_BLOCKS, 0)
