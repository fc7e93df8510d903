"""Risk: the GPU tests compare bytes at places where a kernel that is handed the tensors would not look for them."""

import sys
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch):
    """`layouts` and `side`, with PyTorch's tensors in host memory where they would be on a GPU."""
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "gpu"))
    before = set(sys.modules)
    import layouts
    import side

    on_host = types.SimpleNamespace(
        zeros=lambda shape, dtype, device: torch.zeros(shape, dtype=dtype),
        bfloat16=torch.bfloat16,
        cuda=types.SimpleNamespace(synchronize=lambda: None),
    )
    monkeypatch.setattr(side, "torch_with_cuda", lambda: on_host)
    yield layouts, side
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_tensors_are_where_and_as_the_arithmetic_says(modules) -> None:
    layouts, side = modules
    for layout in layouts.LAYOUTS.values():
        tensors = side.Tensors(layout)
        described = tensors.described()
        assert len(described) == layout.layers
        for number, (name, address, _, element_bytes, shape, strides) in enumerate(described):
            allocation, start = layout.place(number)
            assert (name, address) == (f"layer.{number}", tensors.addresses[allocation] + start), layout.name
            assert (element_bytes, shape, strides) == (2, layout.shape, layout.strides), layout.name


def test_the_runs_of_a_block_are_what_a_kernel_writes_into_it(modules) -> None:
    layouts, side = modules
    for layout in layouts.LAYOUTS.values():
        tensors = side.Tensors(layout)
        for layer, block in ((0, 0), (1, 17), (layout.layers - 1, layout.blocks - 1)):
            marked = tensors.view(layer).select(layout.block_dim, block)
            marked.fill_(1.0)
            allocation, start = layout.place(layer)
            memory = tensors.tensor(allocation).reshape(-1).view(torch.uint8)
            written = set(memory.nonzero().squeeze(1).tolist())
            marked.fill_(0.0)
            # Both bytes of a one are not zero.
            assert written == {start + at + byte for at, length in layout.runs(block) for byte in range(length)}, (
                layout.name
            )
            assert len(written) == layout.layer_block_bytes


def test_equal_orders_of_a_payload_have_one_name_and_different_ones_do_not(modules) -> None:
    layouts, _ = modules
    names = {name: layout.attention for name, layout in layouts.LAYOUTS.items()}
    equal = {"blocks outermost", "K and V outermost", "all layers of a block in one page"}
    assert len({names[name] for name in equal}) == 1
    assert len(set(names.values())) == 1 + len(names) - len(equal)
