"""The shapes that vLLM gives KV caches, and what bytes a cache holds after blocks were moved.

A dimension has a letter: B blocks, K key or value, T tokens of a block, H heads, D numbers of a head, C numbers of a
latent (MLA), L layers. Numbers have two bytes.
"""

import dataclasses
import functools
import hashlib
import itertools
import math
from collections.abc import Iterable, Sequence

ELEMENT_BYTES = 2

Run = tuple[int, int]
"""(distance from the start of the layer, length), in bytes."""
Row = tuple[int, int, int]
"""(key or value, token of the block, head): the numbers of one of them, which lie behind each other."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the layers of a cache lie in memory, and how a kernel sees one of them."""

    name: str
    #: Outermost first. With L, all layers lie in one allocation, else each has its own.
    physical: str
    #: The order of dimensions in the tensor of a layer.
    logical: str
    blocks: int = 64
    layers: int = 4
    heads: int = 4
    head_numbers: int = 64
    latent_numbers: int = 576
    block_tokens: int = 16

    def size(self, dim: str) -> int:
        return {
            "B": self.blocks,
            "K": 2,
            "T": self.block_tokens,
            "H": self.heads,
            "D": self.head_numbers,
            "C": self.latent_numbers,
            "L": self.layers,
        }[dim]

    def stride(self, dim: str) -> int:
        """In numbers."""
        return math.prod(self.size(inner) for inner in self.physical[self.physical.index(dim) + 1 :])

    # ---- of a layer's tensor

    @property
    def shape(self) -> list[int]:
        return [self.size(dim) for dim in self.logical]

    @property
    def strides(self) -> list[int]:
        return [self.stride(dim) for dim in self.logical]

    @property
    def block_dim(self) -> int:
        return self.logical.index("B")

    # ---- of the memory

    @property
    def allocations(self) -> int:
        return 1 if "L" in self.physical else self.layers

    @property
    def allocation_shape(self) -> list[int]:
        return [self.size(dim) for dim in self.physical]

    @property
    def allocation_bytes(self) -> int:
        return math.prod(self.allocation_shape) * ELEMENT_BYTES

    def place(self, layer: int) -> tuple[int, int]:
        """(allocation, distance in it) of a layer."""
        if "L" in self.physical:
            return 0, layer * self.stride("L") * ELEMENT_BYTES
        return layer, 0

    def axes(self) -> tuple[int, int | None]:
        """The dimensions of a layer's tensor that count tokens and heads."""
        return self.logical.index("T"), self.logical.index("H") if "H" in self.logical else None

    # ---- of a block

    def rows(self, block: int) -> Iterable[tuple[Row, int]]:
        """Of a block in one layer: what a row is of, and where in the layer it starts. Rows have `row_bytes`."""
        for half, token, head in itertools.product(
            range(2 if "K" in self.logical else 1),
            range(self.block_tokens),
            range(self.heads if "H" in self.logical else 1),
        ):
            places = zip("BKTH", (block, half, token, head), strict=True)
            at = sum(place * self.stride(dim) for dim, place in places if dim in self.logical)
            yield (half, token, head), at * ELEMENT_BYTES

    @property
    def row_bytes(self) -> int:
        return self.size(self.logical[-1]) * ELEMENT_BYTES

    @property
    def layer_block_bytes(self) -> int:
        """Bytes of a block in one layer."""
        return math.prod(self.size(dim) for dim in self.logical if dim != "B") * ELEMENT_BYTES

    def runs(self, block: int) -> list[Run]:
        """Of a block in one layer, in the order of its payload."""
        start = block * self.stride("B") * ELEMENT_BYTES
        if not self.is_split:
            return [(start, self.layer_block_bytes)]
        half = self.layer_block_bytes // 2
        return [(start + half_number * self.stride("K") * ELEMENT_BYTES, half) for half_number in range(2)]

    @property
    def is_split(self) -> bool:
        """Whether a block's keys and values lie far apart."""
        return "K" in self.physical and self.physical.index("K") < self.physical.index("B")

    @property
    def order(self) -> str:
        """Of the dimensions of a block."""
        return "".join(dim for dim in self.physical if dim not in "BL")

    @property
    def attention(self) -> str:
        """What a namespace names: caches of equal ones hold equal payloads."""
        return f"{self.order} of {self.layers} layers, {self.layer_block_bytes} bytes each"


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("blocks outermost", "BKTHD", "BKTHD"),
        Layout("K and V outermost", "KBTHD", "KBTHD"),
        Layout("heads before tokens", "KBHTD", "KBTHD"),
        Layout("MLA", "BTC", "BTC"),
        Layout("all layers of a block in one page", "BLKTHD", "BKTHD"),
        # Runs that are no multiple of what a kernel copies at a time, and begin elsewhere in it than their targets.
        Layout("odd and short", "KBTHD", "KBTHD", layers=2, heads=1, head_numbers=7, block_tokens=3),
        Layout("odd and long", "BKTHD", "BKTHD", layers=2, heads=3, head_numbers=601, block_tokens=5),
    )
}

Image = list[bytes]
"""What the allocations of a cache hold."""


@functools.lru_cache(maxsize=16)
def _noise(seed: int, allocation: int, size_bytes: int) -> bytes:
    return hashlib.shake_128(f"{seed} {allocation}".encode()).digest(size_bytes)


def image(layout: Layout, seed: int) -> Image:
    """Other bytes for every seed, and in every allocation."""
    return [_noise(seed, number, layout.allocation_bytes) for number in range(layout.allocations)]


def moved(
    source: tuple[Layout, Image], target: tuple[Layout, Image], pairs: Iterable[tuple[int, int]], layers: Sequence[int]
) -> Image:
    """The target's image with blocks of the source, given as (block of the source, block of the target)."""
    (from_layout, from_image), (to_layout, to_image) = source, target
    changed = [bytearray(content) for content in to_image]
    for there, here in pairs:
        for layer in layers:
            (from_allocation, from_start), (to_allocation, to_start) = from_layout.place(layer), to_layout.place(layer)
            payload = b"".join(
                from_image[from_allocation][from_start + at : from_start + at + length]
                for at, length in from_layout.runs(there)
            )
            for at, length in to_layout.runs(here):
                changed[to_allocation][to_start + at : to_start + at + length] = payload[:length]
                payload = payload[length:]
    return [bytes(content) for content in changed]


def difference(layout: Layout, found: Image, expected: Image) -> str | None:
    """Where the first wrong byte of each wrong block is, for a message; None: every byte is right."""
    if found == expected:
        return None
    wrong = []
    for block in range(layout.blocks):
        for layer in range(layout.layers):
            allocation, start = layout.place(layer)
            for at, length in layout.runs(block):
                here, there = (content[allocation][start + at : start + at + length] for content in (found, expected))
                if here != there:
                    first = next(index for index in range(length) if here[index] != there[index])
                    wrong.append(f"block {block}, layer {layer}, byte {at + first} of the layer")
    return f"{len(wrong)} wrong runs: " + "; ".join(wrong[:8])
