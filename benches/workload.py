"""The request that every system moves, its paged caches, the check of its bytes, and the memcpy floor.

Shape of Qwen3-30B-A3B: 48 layers, 4 KV heads of 128, 16-bit numbers, blocks of 16 tokens. One block in one
layer is one run of 32 KiB; a request of 1024 tokens is 64 blocks = 3072 runs = 96 MiB. Its blocks are
scattered over a cache four times as large, at other places on each side and in each round, so stale bytes of
an earlier round never pass for right ones.

All memory is anonymous, private, touched beforehand and of 4 KiB pages: what an engine without huge pages
has, and the same for every system and for the floor (see `touch`).
"""

import ctypes
import mmap
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

LAYERS = 48
KV_HEADS = 4
HEAD_DIM = 128
BLOCK_TOKENS = 16
TOKENS = 1024

BLOCKS = TOKENS // BLOCK_TOKENS
RUN_BYTES = 2 * KV_HEADS * HEAD_DIM * 2 * BLOCK_TOKENS  # K and V, two-byte numbers
BLOCK_BYTES = RUN_BYTES * LAYERS
REQUEST_BYTES = BLOCK_BYTES * BLOCKS
POOL_BLOCKS = 4 * BLOCKS
NOISE_SEED = 20
PIECE_BYTES = 2 << 20


class WrongBytes(Exception):
    """A system delivered other bytes than were stored."""


@dataclass
class Sample:
    """One timed case: its seconds, those of the memcpys right before and after it, and of other floors by name.

    ``floor_place`` names the buffers of these memcpys: a process and a pair of its buffers.
    """

    seconds: float
    floor_seconds: list[float]
    other_floors: dict[str, float] = field(default_factory=dict)
    floor_place: str = ""


def anonymous(size_bytes: int, shared: bool = False) -> np.ndarray:
    """Zero bytes in 4 KiB pages. Nothing is touched yet."""
    mapping = mmap.mmap(-1, size_bytes, flags=mmap.MAP_ANONYMOUS | (mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE))
    mapping.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(mapping, np.uint8)


def touch(buffers: list[np.ndarray]) -> None:
    """Give all buffers of a process their pages, piece by piece, in one shuffled order.

    How fast a buffer is copied depends on the pages that it got, by a third where this was written. A process is
    first given what other processes gave back page by page, and later whole stretches of memory: if its buffers were
    touched one after the other, the first one (the floor's, or the cache's) would always be the slow one. Dealt out
    in pieces, all buffers of a process get the same mixture. What differs between processes and between runs is left
    to the number of processes: see run.py.
    """
    flat = [buffer.reshape(-1) for buffer in buffers]
    pieces = [whole[first : first + PIECE_BYTES] for whole in flat for first in range(0, whole.size, PIECE_BYTES)]
    random.shuffle(pieces)
    for piece in pieces:
        piece[:] = 0


class PagedCache:
    """One side's KV cache, layer-major: ``layers[layer][block][byte]``."""

    def __init__(self, layers: np.ndarray | None = None) -> None:
        """``layers``: those of another cache, or some of them."""
        if layers is None:
            layers = anonymous(LAYERS * POOL_BLOCKS * RUN_BYTES).reshape(LAYERS, POOL_BLOCKS, RUN_BYTES)
        self.layers = layers
        self.buffers = [self.layers]

    def fill_with_noise(self) -> "PagedCache":
        """The same noise in every process, so that a reader knows what a writer stored."""
        generator = np.random.default_rng(NOISE_SEED)
        for layer in self.layers:
            words = layer.reshape(-1).view(np.uint64)
            words[:] = generator.integers(0, 2**64, words.size, dtype=np.uint64)
        return self

    def clear(self, blocks: list[int]) -> None:
        self.layers[:, blocks] = 0

    def check_request(self, blocks: list[int], source: "PagedCache", source_blocks: list[int]) -> None:
        """Every byte of the request is the source's, and no block beside the request was written."""
        for number, (here, there) in enumerate(zip(self.layers, source.layers, strict=True)):
            equal = (here[blocks] == there[source_blocks]).all(axis=1)
            if not equal.all():
                raise WrongBytes(
                    f"layer {number}: {int((~equal).sum())} of {len(blocks)} blocks differ from the source"
                )
        words = self.layers.view(np.uint64)
        written = np.bitwise_or.reduce(words, axis=2).any(axis=0)
        written[blocks] = False
        if written.any():
            raise WrongBytes(f"blocks {np.flatnonzero(written).tolist()} were written but are not part of the request")


def scattered(side: str, round_number: int, pool: int = POOL_BLOCKS) -> list[int]:
    """The request's blocks on one side in one round."""
    return random.Random(f"{side} {round_number}").sample(range(pool), BLOCKS)


class Floor:
    """One libc memcpy of the request's size, in each turn between another pair of buffers."""

    PAIRS = 2

    def __init__(self) -> None:
        self.buffers = [anonymous(REQUEST_BYTES) for _ in range(2 * self.PAIRS)]
        self._pair = 0
        self._memcpy = ctypes.CDLL(None).memcpy
        self._memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
        self._memcpy.restype = ctypes.c_void_p
        self._pool = self._ready = None

    def seconds(self, size_bytes: int | None = None) -> float:
        """A copy of the whole request, if no other size is named."""
        size_bytes = REQUEST_BYTES if size_bytes is None else size_bytes
        target, source = self._addresses()
        start = time.perf_counter()
        self._memcpy(target, source, size_bytes)
        return time.perf_counter() - start

    def seconds_of_two(self, cores: list[int]) -> float:
        """Half of the same memcpy on each of two cores."""
        half = REQUEST_BYTES // 2
        target, source = self._addresses()
        if self._pool is None:
            pin = iter(cores[:2])
            self._pool = ThreadPoolExecutor(2, initializer=lambda: os.sched_setaffinity(0, [next(pin)]))
            self._ready = threading.Barrier(2)

        def copy(offset: int) -> tuple[float, float]:
            self._ready.wait()
            start = time.perf_counter()
            self._memcpy(target + offset, source + offset, half)
            return start, time.perf_counter()

        spans = list(self._pool.map(copy, [0, half]))
        return max(end for _, end in spans) - min(start for start, _ in spans)

    def around(self, work: Callable[[], object], is_timed_after: bool = True) -> Sample:
        """Time ``work`` with a memcpy right before it and, if not told otherwise, right after it."""
        self._pair = (self._pair + 1) % self.PAIRS
        floor_seconds = [self.seconds()]
        start = time.perf_counter()
        work()
        taken = time.perf_counter() - start
        if is_timed_after:
            floor_seconds.append(self.seconds())
        place = f"{Path(sys.argv[0]).stem} {os.getpid()}, pair {self._pair}"
        return Sample(taken, floor_seconds, floor_place=place)

    def _addresses(self) -> tuple[int, int]:
        target, source = self.buffers[2 * self._pair : 2 * self._pair + 2]
        return target.ctypes.data, source.ctypes.data
