"""What all tests of this folder have in common: two sides, and the name of the driver with everything that is said."""

import logging
import time
import unittest
from collections.abc import Callable, Iterable, Sequence

from driver import driver
from layouts import LAYOUTS, difference, image, moved
from peer import Peer
from side import Cache, Side

LAYOUT = "K and V outermost"
#: Seeds: what prefill computed, what decode's cache held before, and what others write later.
COMPUTED, OLD, LATER = 1, 2, 3
#: Long against all that does not wait for the stream, also on a machine that is busy. The stand-in runs where threads
#: are held up for a second.
BUSY_MS = 1200 if driver().is_stand_in else 400
PATIENCE_S = 20.0


class Claims(unittest.TestCase):
    """A test. When it ends, neither process has misused the driver, as far as the driver tells."""

    def setUp(self) -> None:
        self.addCleanup(self._check_driver)

    def _check_driver(self) -> None:
        self.assertEqual(driver().violations(), [], "this process misused the driver")

    # ---- the two sides

    def prefill(
        self, layout: str = LAYOUT, lane: str = "auto", port: int = 0, seed: int | None = COMPUTED, **sizes: int
    ) -> Peer:
        """A prefill process whose cache holds `seed`."""
        peer = Peer(True, layout, lane, port, **sizes)
        self.addCleanup(self._end, peer)
        self.assertEqual(peer.place, driver().place)
        if seed is not None:
            peer.tell("fill", seed)
        return peer

    def _end(self, peer: Peer) -> None:
        if peer.is_running():
            self.assertEqual(peer.tell("violations"), [], "prefill misused the driver")
        peer.end()

    def decode(self, lane: str, layout: str = LAYOUT, seed: int = OLD, **sizes: int) -> Side:
        """A decode worker of this process, whose cache holds `seed`."""
        side = Side(False, layout, lane, **sizes)
        self.addCleanup(side.close)
        side.fill(seed)
        return side

    def meet(self, prefill: Peer, decode: Side, lane: str) -> None:
        """A first pull, so that what a lane takes to begin is behind it: with NCCL seconds."""
        prefill.tell("hold", f"first {lane}", [0])
        self.assert_arrives(decode, decode.pull(f"first {lane}", prefill.port, [0]), lane)
        decode.fill(OLD)

    # ---- what ends in time

    def until(self, holds: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not holds():
            self.assertLess(time.monotonic(), deadline, what)
            time.sleep(0.005)

    def outcome(self, decode: Side, job: int) -> str:
        ended = decode.outcome(job)
        assert ended is not None, "a pull without an end"
        return ended

    def assert_arrives(self, decode: Side, job: int, lane: str | None = None) -> None:
        self.assertEqual(self.outcome(decode, job), "done")
        if lane is not None:
            self.assertEqual(decode.lanes(), [lane])

    def until_bytes_move(self, decode: Side) -> list[str]:
        """The lanes on which the first did."""
        lanes: list[str] = []

        def moved() -> bool:
            lanes.extend(decode.lanes())
            return bool(lanes)

        self.until(moved, "nothing moved")
        return lanes

    # ---- bytes

    def assert_holds(
        self,
        decode: Cache,
        sources: Sequence[int] = (),
        targets: Sequence[int] = (),
        *,
        seed: int = COMPUTED,
        before: int = OLD,
        layout: str | None = None,
    ) -> None:
        """Every byte of decode's cache: `targets` hold what `sources` of prefill did, the rest is as before.
        ``layout``: prefill's, if it is another."""
        pairs = zip(sources, targets, strict=True)
        self.assert_holds_all(decode, [(there, here, seed) for there, here in pairs], before=before, layout=layout)

    def assert_holds_all(
        self, decode: Cache, blocks: Iterable[tuple[int, int, int]], before: int = OLD, layout: str | None = None
    ) -> None:
        """As `assert_holds`, of (source, target, seed)."""
        own = decode.layout
        theirs = own if layout is None else LAYOUTS[layout]
        expected = image(own, before)
        by_seed: dict[int, list[tuple[int, int]]] = {}
        for there, here, seed in blocks:
            by_seed.setdefault(seed, []).append((there, here))
        for seed, pairs in by_seed.items():
            expected = moved((theirs, image(theirs, seed)), (own, expected), pairs, range(own.layers))
        wrong = difference(own, decode.content(), expected)
        self.assertIsNone(wrong, wrong)


class LogLines(logging.Handler):
    """What kvlane says in this process while it is in use as a context manager."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def __enter__(self) -> "LogLines":
        logger = logging.getLogger("vllm.kvlane")
        self._level = logger.level
        logger.setLevel(logging.INFO)
        logger.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        logger = logging.getLogger("vllm.kvlane")
        logger.removeHandler(self)
        logger.setLevel(self._level)

    def have(self, text: str) -> bool:
        return any(text in line for line in self.lines)
