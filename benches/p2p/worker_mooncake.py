"""Mooncake's transfer engine over TCP: the source, which is timed, writes a batch synchronously into the target.

Its default refuses a batch of as many pieces as a request has, so the queue per peer is wider here.
"""

import importlib.metadata
import os
import sys

from pair import CASES, Arrivals, filled_cache, noise_of, pairs, pieces, timed
from turns import Worker, serve
from workload import LAYERS, RUN_BYTES, Floor, PagedCache, Sample, touch

SETTINGS = {"MC_LOG_LEVEL": "ERROR", "MC_TCP_MAX_QUEUED_TRANSFERS_PER_PEER": "8192"}


class Source:
    def __init__(self, cores: list[int], noise: str) -> None:
        os.sched_setaffinity(0, cores)
        self._floor = Floor()
        touch(self._floor.buffers)
        self._cache = filled_cache(noise_of(noise))
        self._target = Worker(sys.executable, __file__, role="target", cores=cores, noise=noise)
        self._engine = open_engine(self._cache)
        self._peer, self._peer_address = self._target.call("place")

    def cases(self) -> list[tuple[str, str]]:
        return [(case, "tcp") for case in CASES]

    def versions(self) -> dict[str, str]:
        return {"mooncake": importlib.metadata.version("mooncake-transfer-engine-non-cuda")}

    def turn(self, case: str, lane: str, round_number: int) -> Sample:
        moved = pairs(case, round_number)
        if case == "block":
            moves = [lambda pair=pair: self._write([pair], 1) for pair in moved]
        else:
            moves = [lambda: self._write(moved, LAYERS)]
        sample = timed(case, self._floor, moves)
        self._target.call("check", case=case, round_number=round_number)
        return sample

    def close(self) -> None:
        self._target.close()

    def _write(self, moved: list[tuple[int, int]], layers: int) -> None:
        start, offsets = self._cache.layers.ctypes.data, pieces(moved, layers)
        sources = [start + source for source, _ in offsets]
        targets = [self._peer_address + target for _, target in offsets]
        result = self._engine.batch_transfer_sync_write(self._peer, sources, targets, [RUN_BYTES] * len(offsets))
        if result != 0:
            raise RuntimeError(f"Mooncake's write returned {result}")


class Target:
    def __init__(self, cores: list[int], noise: str) -> None:
        os.sched_setaffinity(0, cores)
        self._arrivals = Arrivals(noise_of(noise))
        touch(self._arrivals.buffers)
        self._engine = open_engine(self._arrivals.cache)

    def place(self) -> tuple[str, int]:
        return f"127.0.0.1:{self._engine.get_rpc_port()}", self._arrivals.cache.layers.ctypes.data

    def check(self, case: str, round_number: int) -> None:
        self._arrivals.check(case, round_number)


def open_engine(cache: PagedCache):
    os.environ.update(SETTINGS)
    from mooncake.engine import TransferEngine

    engine = TransferEngine()
    if engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") != 0:
        raise RuntimeError("Mooncake's engine does not start")
    if engine.register_memory(cache.layers.ctypes.data, cache.layers.nbytes) != 0:
        raise RuntimeError("Mooncake does not take the cache")
    return engine


def system(role: str = "source", **setup):
    return {"target": Target, "source": Source}[role](**setup)


if __name__ == "__main__":
    serve(system)
