"""What both processes of every system do alike: the source's bytes, the target's check, and the two cases.

A *target* is the process that ends up with the blocks, a *source* the one that had them. One of the two is the timed
one, which starts the other: the target where it pulls, the source where it pushes.
"""

import random
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from workload import (
    LAYERS,
    POOL_BLOCKS,
    RUN_BYTES,
    Floor,
    PagedCache,
    Sample,
    scattered,
    touch,
)

CASES = ("block", "request")
# Blocks that are moved one by one in a turn; the fastest of all turns makes the row.
SINGLE_BLOCKS = 128
# A copy of one run is so short that only the fastest of some says anything.
RUN_COPIES = 200
TIMEOUT_S = 30


def noise_file(folder: str) -> str:
    """Writes what all sources of a run hold, so that not every process makes it anew and every target can compare."""
    path = Path(folder) / "noise"
    PagedCache().fill_with_noise().layers.tofile(path)
    return str(path)


def noise_of(path: str) -> PagedCache:
    return PagedCache(np.memmap(path, np.uint8, "r", shape=(LAYERS, POOL_BLOCKS, RUN_BYTES)))


def filled_cache(noise: PagedCache) -> PagedCache:
    cache = PagedCache()
    touch(cache.buffers)
    cache.layers[:] = noise.layers
    return cache


def pairs(case: str, round_number: int) -> list[tuple[int, int]]:
    """(source's block, target's block) of a turn, on both sides in an order of its own."""
    if case == "block":
        sides = [random.Random(f"{side} {round_number}") for side in ("source", "target")]
        sources, targets = (side.sample(range(POOL_BLOCKS), SINGLE_BLOCKS) for side in sides)
    else:
        sources, targets = scattered("source", round_number), scattered("target", round_number)
    return list(zip(sources, targets, strict=True))


def pieces(moved: list[tuple[int, int]], layers: int) -> list[tuple[int, int]]:
    """(offset in the source's cache, offset in the target's) of every run, layer by layer."""
    return [
        ((layer * POOL_BLOCKS + source) * RUN_BYTES, (layer * POOL_BLOCKS + target) * RUN_BYTES)
        for layer in range(layers)
        for source, target in moved
    ]


class Arrivals:
    """The target's cache, in which every byte is compared after every turn."""

    def __init__(self, noise: PagedCache) -> None:
        self.cache, self._noise = PagedCache(), noise
        self.buffers = self.cache.buffers

    def check(self, case: str, round_number: int) -> None:
        """Raises WrongBytes, else clears what has arrived."""
        sources, targets = map(list, zip(*pairs(case, round_number), strict=True))
        layers = 1 if case == "block" else LAYERS
        arrived = PagedCache(self.cache.layers[:layers])
        arrived.check_request(targets, PagedCache(self._noise.layers[:layers]), sources)
        arrived.clear(targets)


def timed(case: str, floor: Floor, moves: list[Callable[[], object]]) -> Sample:
    """Times a whole request with a memcpy before and after it, or each of some single blocks, of which the fastest
    counts."""
    if case == "request":
        (move,) = moves
        return floor.around(move)
    copies = [floor.seconds(RUN_BYTES) for _ in range(RUN_COPIES)]
    seconds = []
    for move in moves:
        start = time.perf_counter()
        move()
        seconds.append(time.perf_counter() - start)
    return Sample(min(seconds), [min(copies)], floor_place="one run")
