"""One TCP connection with nothing around it, in C: what one thread at each end gets out of the machine's loopback."""

import ctypes
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np

from pair import CASES, SINGLE_BLOCKS, Arrivals, filled_cache, noise_of, pairs, pieces, timed
from turns import NotRun, Worker, serve
from workload import BLOCKS, LAYERS, RUN_BYTES, Floor, Sample, touch

PIECES_MAX = max(LAYERS * BLOCKS, SINGLE_BLOCKS)


class Target:
    def __init__(self, cores: list[int], noise: str) -> None:
        os.sched_setaffinity(0, cores)
        self._floor, self._arrivals = Floor(), Arrivals(noise_of(noise))
        touch([*self._floor.buffers, *self._arrivals.buffers])
        self._source = Worker(sys.executable, __file__, role="source", cores=cores, noise=noise)
        self._socket: socket.socket | None = None

    def cases(self) -> list[tuple[str, str]]:
        return [(case, "tcp") for case in CASES]

    def versions(self) -> dict[str, str]:
        return {}

    def turn(self, case: str, lane: str, round_number: int) -> Sample:
        if self._socket is None:
            self._calls = compiled()
            self._socket = socket.create_connection(("127.0.0.1", self._source.call("port")))
            check(self._calls.prepare(self._socket.fileno()))
        self._source.call("aim", case=case, round_number=round_number)
        offsets = offsets_of(case, round_number, side=1)
        if case == "block":
            moves = [lambda number=number: self._fetch(offsets, number, 1) for number in range(len(offsets))]
        else:
            moves = [lambda: self._fetch(offsets, 0, len(offsets))]
        sample = timed(case, self._floor, moves)
        self._arrivals.check(case, round_number)
        return sample

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
        self._source.close()

    def _fetch(self, offsets: np.ndarray, first: int, count: int) -> None:
        cache = self._arrivals.cache.layers.ctypes.data
        check(self._calls.fetch(self._socket.fileno(), cache, offsets.ctypes.data, first, count, RUN_BYTES))


class Source:
    def __init__(self, cores: list[int], noise: str) -> None:
        os.sched_setaffinity(0, cores)
        self._cache, self._offsets = filled_cache(noise_of(noise)), np.zeros(PIECES_MAX, np.uint64)

    def port(self) -> int:
        """Waits there for one reader, on a thread of its own that stays in C."""
        listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._serve, args=(listener, compiled()), daemon=True).start()
        return listener.getsockname()[1]

    def aim(self, case: str, round_number: int) -> None:
        offsets = offsets_of(case, round_number, side=0)
        self._offsets[: len(offsets)] = offsets

    def _serve(self, listener: socket.socket, calls: ctypes.CDLL) -> None:
        with listener, listener.accept()[0] as reader:
            check(calls.prepare(reader.fileno()))
            places = self._cache.layers.ctypes.data, self._offsets.ctypes.data
            check(calls.serve(reader.fileno(), *places, PIECES_MAX, RUN_BYTES))


def offsets_of(case: str, round_number: int, side: int) -> np.ndarray:
    layers = 1 if case == "block" else LAYERS
    return np.array([piece[side] for piece in pieces(pairs(case, round_number), layers)], np.uint64)


def compiled() -> ctypes.CDLL:
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise NotRun("there is no C compiler")
    with tempfile.TemporaryDirectory(prefix="kvlane-bench.") as folder:
        library = Path(folder) / "raw_tcp.so"
        source = Path(__file__).with_name("raw_tcp.c")
        subprocess.run([compiler, "-O2", "-Wall", "-shared", "-fPIC", "-o", library, source], check=True)
        calls = ctypes.CDLL(str(library))
    pointer, count, size = ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint64
    calls.prepare.argtypes = [ctypes.c_int]
    calls.serve.argtypes = [ctypes.c_int, pointer, pointer, count, size]
    calls.fetch.argtypes = [ctypes.c_int, pointer, pointer, count, count, size]
    return calls


def check(error: int) -> None:
    if error:
        raise OSError(error, os.strerror(error))


def system(role: str = "target", **setup):
    return {"target": Target, "source": Source}[role](**setup)


if __name__ == "__main__":
    serve(system)
