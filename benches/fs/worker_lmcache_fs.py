"""LMCache's compiled filesystem client (the engine of its fs_native adapter), without LMCache's engine.

It only does I/O: its rows move a staging buffer that is filled already, in LMCache's unit of 256 tokens with
all layers (24 MiB), on as many of its workers as the row has threads.
"""

import glob
import hashlib
import importlib.metadata
import importlib.util
import os
import select

import numpy as np
import torch  # noqa: F401  loads the libraries that the client links

from files import empty, settle
from turns import serve, threads_on
from workload import (
    BLOCK_BYTES,
    BLOCK_TOKENS,
    NOISE_SEED,
    REQUEST_BYTES,
    Floor,
    Sample,
    WrongBytes,
    anonymous,
    touch,
)

UNIT_BYTES = BLOCK_BYTES * (256 // BLOCK_TOKENS)
UNITS = REQUEST_BYTES // UNIT_BYTES
IO_THREADS = (1, 2, 4)
WAIT_MS = 30_000


class System:
    def __init__(self, cores: list[int], folders: dict[str, str]) -> None:
        os.sched_setaffinity(0, cores[:1])
        self._cores, self._folders, self._floor = cores, folders, Floor()
        self._saved, self._loaded = anonymous(REQUEST_BYTES), anonymous(REQUEST_BYTES)
        touch([*self._floor.buffers, self._saved, self._loaded])
        self._noise = np.frombuffer(np.random.default_rng(NOISE_SEED).bytes(REQUEST_BYTES), np.uint8)
        self._client_type = compiled_client()
        self._clients = {}

    def cases(self) -> list[tuple[str, str, int]]:
        return [(c, m, threads) for m in self._folders for c in ("io-write", "io-read") for threads in IO_THREADS]

    def versions(self) -> dict[str, str]:
        return {"lmcache": importlib.metadata.version("lmcache")}

    def turn(self, case: str, medium: str, threads: int, round_number: int) -> Sample:
        folder = self._folders[medium]
        client = self._client(medium, threads)
        self._saved[:] = np.roll(self._noise, 4096 * round_number)  # other bytes at each place in each round
        names = [hashlib.sha256(b"%d %d" % (round_number, unit)).hexdigest() for unit in range(UNITS)]
        keys = ["model@0x01000100@0@" + name for name in names]

        def write():
            self._wait(client, client.submit_batch_set(keys, units_of(self._saved)))

        def read():
            self._wait(client, client.submit_batch_get(keys, units_of(self._loaded)))

        for name in os.listdir(folder):
            os.unlink(os.path.join(folder, name))
        self._loaded[:] = 0
        if case == "io-write":
            sample = self._floor.around(write)
            read()
        else:
            write()
            settle(folder)
            sample = self._floor.around(read)
        if not np.array_equal(self._saved, self._loaded):
            raise WrongBytes("the units read differ from those written")
        settle(folder)
        return sample

    def close(self) -> None:
        for client in self._clients.values():
            client.close()

    def _client(self, medium: str, threads: int):
        if (medium, threads) not in self._clients:
            empty(self._folders[medium])
            with threads_on(self._cores, threads):
                buffered, no_read_ahead = False, 0
                client = self._client_type(self._folders[medium], threads, "", buffered, no_read_ahead)
            self._clients[medium, threads] = client
        return self._clients[medium, threads]

    @staticmethod
    def _wait(client, job) -> None:
        poll = select.poll()
        poll.register(client.event_fd(), select.POLLIN)
        while poll.poll(WAIT_MS):
            for done in client.drain_completions():
                if done[0] == job:
                    if not done[1]:
                        raise RuntimeError(f"the client reports a failed transfer: {done}")
                    return
        raise TimeoutError(f"no completion within {WAIT_MS} ms")


def units_of(buffer: np.ndarray) -> list[memoryview]:
    view = memoryview(buffer)
    return [view[first : first + UNIT_BYTES] for first in range(0, REQUEST_BYTES, UNIT_BYTES)]


def compiled_client():
    """Loaded by file, without LMCache's package, whose imports would start its engine's parts."""
    package = importlib.util.find_spec("lmcache").submodule_search_locations[0]
    (path,) = glob.glob(package + "/lmcache_fs*.so")
    spec = importlib.util.spec_from_file_location("lmcache_fs", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.LMCacheFSClient


if __name__ == "__main__":
    serve(System)
