"""Risk: a dimension is taken for another, so that tokens and heads of servers with other block sizes get mixed up."""

import types

import pytest
import torch

from kvlane.vllm.p2p_shape import shape_of

BLOCKS, HEADS, TOKENS, WIDTH = 10, 4, 16, 64


class FullAttentionSpec:
    def __init__(self, block_size=TOKENS, num_kv_heads=HEADS):
        self.block_size, self.num_kv_heads = block_size, num_kv_heads


class MLAAttentionSpec(FullAttentionSpec):
    pass


def config(spec):
    group = types.SimpleNamespace(layer_names=["a", "b"], kv_cache_spec=spec)
    return types.SimpleNamespace(num_blocks=BLOCKS, kv_cache_groups=[group])


def cache(block_size=TOKENS, cache_dtype="auto"):
    return types.SimpleNamespace(block_size=block_size, cache_dtype=cache_dtype)


def shape(tensors, spec=None, heads=HEADS, tp=(0, 1), backend="FLASH_ATTN", settings=None):
    backends = {"a": backend, "b": backend}
    return shape_of(tensors, config(spec or FullAttentionSpec()), settings or cache(), heads, tp, backends)


def axes(*dims, **more):
    found = shape({name: torch.empty(dims, device="meta") for name in ("a", "b")}, **more)
    if found is None:
        return None
    assert found[3]["a"] == found[3]["b"]
    return found[3]["a"]


# What vLLM registers, by version and backend.
@pytest.mark.parametrize(
    ("dims", "backend", "expected"),
    [
        ((2, BLOCKS, TOKENS, HEADS, WIDTH), "FLASH_ATTN", (2, 3, False)),  # up to 0.22
        ((BLOCKS, 2, TOKENS, HEADS, WIDTH), "FLASHINFER", (2, 3, False)),  # and all from 0.23 on
        ((BLOCKS, HEADS, TOKENS, 2 * WIDTH), "TRITON_ATTN", (2, 1, False)),  # from 0.26 on
        ((2, 2 * BLOCKS, TOKENS // 2, HEADS, WIDTH), "FLASH_ATTN", (2, 3, False)),  # the kernel's blocks are smaller
        ((4 * BLOCKS, HEADS, TOKENS // 4, 2 * WIDTH), "FLEX_ATTENTION", (2, 1, False)),
        ((2, BLOCKS, HEADS, TOKENS, WIDTH), "CPU_ATTN", (3, 2, True)),  # up to 0.22
        ((BLOCKS, HEADS, TOKENS, 2 * WIDTH), "CPU_ATTN", (2, 1, True)),
    ],
)
def test_tokens_and_heads_are_found_in_the_layouts_of_known_backends(dims, backend, expected):
    assert axes(*dims, backend=backend) == expected


def test_mla_has_no_heads():
    latent = {"heads": None, "spec": MLAAttentionSpec(num_kv_heads=1), "backend": "FLASHMLA"}
    assert axes(BLOCKS, TOKENS, 576, **latent) == (1, None, False)
    assert axes(BLOCKS, 1, TOKENS, 576, **latent) == (2, None, False)


@pytest.mark.parametrize(
    ("dims", "more"),
    [
        ((BLOCKS, HEADS, TOKENS, 2 * WIDTH), {"backend": "FLASH_ATTN_DIFFKV"}),  # tokens in front of heads, in four
        ((2, BLOCKS, TOKENS, HEADS, WIDTH), {"backend": "ROCM_ATTN"}),  # its kernels see another shape
        ((BLOCKS, HEADS, TOKENS, 2 * WIDTH), {"backend": "unknown"}),
        ((2, BLOCKS, TOKENS, HEADS, WIDTH), {"backend": "CPU_ATTN"}),
        ((BLOCKS, HEADS, TOKENS, 2 * WIDTH), {"settings": cache(cache_dtype="nvfp4")}),
        ((BLOCKS, 2 * HEADS, TOKENS, WIDTH), {}),
        ((BLOCKS, HEADS, TOKENS - 1, WIDTH), {}),
        ((BLOCKS + 1, HEADS, TOKENS, WIDTH), {}),
        ((BLOCKS, TOKENS, HEADS * WIDTH), {}),
        ((BLOCKS, 2, 3, TOKENS, HEADS, WIDTH), {}),
        ((BLOCKS, HEADS, TOKENS, WIDTH), {"settings": cache(block_size=2 * TOKENS)}),
        ((BLOCKS, HEADS, TOKENS, WIDTH), {"spec": FullAttentionSpec(num_kv_heads=1)}),
        # Draft layers and indexers of an MLA model.
        ((BLOCKS, 1, TOKENS, WIDTH), {"heads": None, "spec": FullAttentionSpec(num_kv_heads=1), "backend": "FLASHMLA"}),
        ((BLOCKS, TOKENS, 132), {"heads": None, "spec": MLAAttentionSpec(), "backend": "DEEPSEEK_V32_INDEXER"}),
        ((BLOCKS, TOKENS, 656), {"heads": None, "spec": MLAAttentionSpec(), "backend": "FLASHMLA_SPARSE"}),
    ],
)
def test_what_is_not_known_for_sure_is_left_open(dims, more):
    assert axes(*dims, **more) is None


def test_layers_without_a_specification_or_with_several_tensors_leave_it_open():
    tensor = torch.empty((BLOCKS, HEADS, TOKENS, WIDTH), device="meta")
    assert shape({"other": tensor}) is None
    assert shape({"a": [tensor, tensor]}) is None
    # A layer that uses another one's tensor has its shape.
    found = shape({"a": tensor, "shared": tensor})
    assert found == (0, HEADS, 1, {"a": (2, 1, False), "shared": (2, 1, False)})


def test_a_rank_says_which_heads_it_has():
    tensors = {"a": torch.empty((BLOCKS, HEADS, TOKENS, WIDTH), device="meta")}
    assert shape(tensors, heads=8, tp=(1, 2)) == (4, 4, 2, {"a": (2, 1, False)})
    assert shape(tensors, heads=6, tp=(1, 4)) is None
    assert shape(tensors, heads=4 * 128, tp=(0, 128)) is None
