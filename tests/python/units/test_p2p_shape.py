"""Risk: a dimension is taken for another, so that tokens and heads of servers with other block sizes get mixed up."""

import types

import pytest
import torch

from kvlane.vllm.p2p_shape import shape_of

BLOCKS, HEADS, TOKENS, WIDTH = 10, 4, 16, 64


def config(**spec):
    spec = types.SimpleNamespace(**{"block_size": TOKENS, "num_kv_heads": HEADS, **spec})
    group = types.SimpleNamespace(layer_names=["a", "b"], kv_cache_spec=spec)
    return types.SimpleNamespace(num_blocks=BLOCKS, kv_cache_groups=[group])


def axes(*shape, heads=HEADS, backend="FLASH_ATTN", tp=(0, 1), **spec):
    tensors = {name: torch.empty(shape, device="meta") for name in ("a", "b")}
    total = None if heads is None else heads * tp[1]
    found = shape_of(tensors, config(**spec), total, tp, backend)
    if found is None:
        return None
    assert found[3]["a"] == found[3]["b"]
    return found[3]["a"]


# What vLLM registers, by version and backend.
@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((2, BLOCKS, TOKENS, HEADS, WIDTH), (2, 3)),  # FlashAttention up to 0.22
        ((BLOCKS, 2, TOKENS, HEADS, WIDTH), (2, 3)),  # FlashInfer, and FlashAttention from 0.23
        ((2, BLOCKS, HEADS, TOKENS, WIDTH), (3, 2)),  # CPU up to 0.22
        ((BLOCKS, HEADS, TOKENS, 2 * WIDTH), (2, 1)),  # all from 0.26 on
        ((2, 2 * BLOCKS, TOKENS // 2, HEADS, WIDTH), (2, 3)),  # the kernel's blocks are smaller
        ((4 * BLOCKS, HEADS, TOKENS // 4, 2 * WIDTH), (2, 1)),
    ],
)
def test_tokens_and_heads_are_found_in_every_layout_of_vllm(shape, expected):
    assert axes(*shape) == expected


def test_mla_has_no_heads():
    assert axes(BLOCKS, TOKENS, 576, heads=None, num_kv_heads=1) == (1, None)
    assert axes(BLOCKS, 1, TOKENS, 576, heads=None, num_kv_heads=1) == (2, None)


def test_as_many_heads_as_tokens_are_told_apart_by_the_backend_or_not_at_all():
    shape = (2, BLOCKS, 16, 16, WIDTH)
    of = {
        name: axes(*shape, heads=16, num_kv_heads=16, backend=name) for name in ("FLASH_ATTN", "CPU_ATTN", "NEW_ATTN")
    }
    assert of == {"FLASH_ATTN": (2, 3), "CPU_ATTN": (3, 2), "NEW_ATTN": None}


@pytest.mark.parametrize(
    "shape",
    [
        (BLOCKS, 2 * HEADS, TOKENS, WIDTH),  # keys and values in front of each other's heads
        (BLOCKS, HEADS, TOKENS - 1, WIDTH),
        (BLOCKS + 1, HEADS, TOKENS, WIDTH),
        (BLOCKS, TOKENS, HEADS * WIDTH),
        (BLOCKS, 2, 3, TOKENS, HEADS, WIDTH),
    ],
)
def test_what_does_not_fit_the_specification_is_left_open(shape):
    assert axes(*shape) is None


def test_layers_without_a_specification_or_with_several_tensors_leave_it_open():
    tensor = torch.empty((BLOCKS, HEADS, TOKENS, WIDTH), device="meta")
    assert shape_of({"other": tensor}, config(), HEADS, (0, 1), "FLASH_ATTN") is None
    assert shape_of({"a": [tensor, tensor]}, config(), HEADS, (0, 1), "FLASH_ATTN") is None
    # A layer that uses another one's tensor has its shape.
    found = shape_of({"a": tensor, "shared": tensor}, config(), HEADS, (0, 1), "FLASH_ATTN")
    assert found == (0, HEADS, 1, {"a": (2, 1), "shared": (2, 1)})


def test_a_rank_says_which_heads_it_has():
    tensors = {"a": torch.empty((BLOCKS, HEADS, TOKENS, WIDTH), device="meta")}
    assert shape_of(tensors, config(), 8, (1, 2), "X") == (4, 4, 2, {"a": (2, 1)})
    assert shape_of(tensors, config(num_kv_heads=1), 8, (1, 2), "X") is None
    assert shape_of(tensors, config(), 6, (1, 4), "X") is None
