"""The cases of the GPU benchmark: two processes on one device, every byte compared after every transfer."""

import random
import statistics
import time
from dataclasses import dataclass, field

from driver import Stream, driver
from layouts import LAYOUTS, Image, Layout, difference, image, moved
from peer import Peer
from side import Side, lanes

#: The row of the floor that the others are divided by.
DEVICE_COPY = "device copy"
COMPUTED, OLD = 1, 2
#: By then prefill has seen that its stream is done.
SETTLE_S = 0.02
SEED = 20


class WrongBytes(Exception):
    """A lane delivered other bytes than prefill has."""


@dataclass(frozen=True)
class Case:
    """Blocks that are moved at once, scattered on both sides."""

    name: str
    layout: str
    layers: int
    #: Of one transfer, and of each cache.
    blocks: int
    pool_blocks: int
    rounds: int

    @property
    def shape(self) -> Layout:
        return Layout(**vars(LAYOUTS[self.layout]) | self.sizes)

    @property
    def sizes(self) -> dict[str, int]:
        # Qwen3-30B-A3B: a block of 16 tokens is 32 KiB in one layer.
        return {"layers": self.layers, "blocks": self.pool_blocks, "heads": 4, "head_numbers": 128}

    @property
    def size_bytes(self) -> int:
        return self.blocks * self.layers * self.shape.layer_block_bytes

    @property
    def runs(self) -> int:
        """Pieces of memory that a transfer is made of."""
        return self.blocks * self.shape.allocations


#: 96 MiB as 48 layers x 64 runs of 32 KiB, the same bytes as 64 pages, and one run.
CASES = (
    Case("request", "blocks outermost", 48, 64, 256, 11),
    Case("pages", "all layers of a block in one page", 48, 64, 256, 11),
    Case("block", "blocks outermost", 1, 1, 256, 101),
)
#: So small that the stand-in takes seconds; what it measures says nothing.
DRY_CASES = (
    Case("request", "blocks outermost", 4, 6, 24, 2),
    Case("pages", "all layers of a block in one page", 4, 6, 24, 2),
    Case("block", "blocks outermost", 1, 1, 24, 2),
)


@dataclass
class Samples:
    """Seconds of a case by lane."""

    case: Case
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def add(self, lane: str, seconds: float) -> None:
        self.seconds.setdefault(lane, []).append(seconds)

    def rows(self) -> list[dict]:
        """Medians. Shares are made of the rounded times: what a reader can divide."""
        us = {lane: round(statistics.median(seconds) * 1e6, 1) for lane, seconds in self.seconds.items()}
        return [
            {
                "case": self.case.name,
                "lane": lane,
                "bytes": self.case.size_bytes,
                "runs": 1 if lane == DEVICE_COPY else self.case.runs,
                "us": us[lane],
                "gbps": round(self.case.size_bytes / us[lane] / 1e3, 3),
                "of_device_copy": round(us[DEVICE_COPY] / us[lane], 4),
                "fastest_us": round(min(seconds) * 1e6, 1),
                "slowest_us": round(max(seconds) * 1e6, 1),
            }
            for lane, seconds in self.seconds.items()
        ]


class DeviceCopy:
    """One copy between two buffers of the device, as large as a transfer."""

    def __init__(self, size_bytes: int) -> None:
        self._driver, self._size_bytes = driver(), size_bytes
        self._stream: Stream = self._driver.stream()
        self._buffers = [self._driver.allocate(size_bytes) for _ in range(2)]
        self.seconds()  # the first one pays for what is set up

    def seconds(self) -> float:
        start = time.perf_counter()
        self._driver.copy(self._stream, *self._buffers, self._size_bytes)
        self._stream.mark().wait(is_urgent=True)
        return time.perf_counter() - start

    def free(self) -> None:
        for buffer in self._buffers:
            self._driver.free(buffer)


def measure(case: Case) -> Samples:
    """Rounds of a copy on the device and a transfer over each lane in turn. The first round is not counted."""
    samples, places = Samples(case), random.Random(SEED)
    images = {seed: image(case.shape, seed) for seed in (COMPUTED, OLD)}
    prefill = Peer(True, case.layout, **case.sizes)
    decodes = {lane: Side(False, case.layout, lane, **case.sizes) for lane in lanes()}
    floor = DeviceCopy(case.size_bytes)
    try:
        prefill.tell("fill", COMPUTED)
        for number in range(case.rounds + 1):
            for lane, decode in decodes.items():
                sources, targets = (places.sample(range(case.pool_blocks), case.blocks) for _ in range(2))
                copy_s = floor.seconds()
                pull_s = pull(f"{case.name} {number} {lane}", prefill, decode, sources, targets)
                check(case, lane, decode, images, sources, targets)
                if number > 0:
                    samples.add(DEVICE_COPY, copy_s)
                    samples.add(lane, pull_s)
    finally:
        for decode in decodes.values():
            decode.close()
        prefill.end()
        floor.free()
    return samples


def pull(key: str, prefill: Peer, decode: Side, sources: list[int], targets: list[int]) -> float:
    """Seconds from the order to the end, as an engine sees them; both streams have nothing to do."""
    decode.fill(OLD)
    prefill.tell("hold", key, sources)
    time.sleep(SETTLE_S)
    start = time.perf_counter()
    outcome = decode.outcome(decode.pull(key, prefill.port, targets))
    seconds = time.perf_counter() - start
    if outcome != "done":
        raise RuntimeError(f"the pull of {key} ended as '{outcome}'")
    return seconds


def check(
    case: Case, lane: str, decode: Side, images: dict[int, Image], sources: list[int], targets: list[int]
) -> None:
    """Every byte of decode's cache."""
    used = decode.lanes()
    if used != [lane]:
        raise RuntimeError(f"{case.name} went over {used}, not over {lane}")
    layout, pairs = case.shape, list(zip(sources, targets, strict=True))
    expected = moved((layout, images[COMPUTED]), (layout, images[OLD]), pairs, range(case.layers))
    wrong = difference(layout, decode.content(), expected)
    if wrong is not None:
        raise WrongBytes(f"{case.name} over {lane}: {wrong}")
