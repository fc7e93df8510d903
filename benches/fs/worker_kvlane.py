"""kvlane's filesystem backend through its Python module: this process stores, a second one loads.

Checksums are on, as by default. A store is timed from `begin_store` to the end of the job, when other processes
can find every block; a load from `load` to the end of the job. The folder holds two and a half requests and each
turn stores a new one, so every store recycles slots of an older request, except `first-fill`, which times the first
store into a folder that was empty a moment ago. `load-fresh-reader` includes opening the folder.

A row's threads are the copying ones. On a disk kvlane starts four more for reads from the device, whatever
`io_threads` says, so a `load-cold` row of one thread is 1 copying and 4 reading threads, on one core.
"""

import os
import statistics
import sys
from pathlib import Path

from files import BareWrite, DirectRead, drop, empty, settle
from kvlane import _native
from kvlane_side import REQUESTS_TO_FILL, keys_of, open_worker, store
from rows import BARE_WRITE, COLD_READS, DIRECT_READ, DIRECT_READS, TWO_MEMCPYS
from turns import Worker, serve
from workload import BLOCK_BYTES, BLOCKS, REQUEST_BYTES, Floor, PagedCache, Sample, scattered, touch

THREADS = (1, 2)


class System:
    def __init__(self, cores: list[int], folders: dict[str, str]) -> None:
        os.sched_setaffinity(0, cores[:1])
        self._cores, self._folders, self._floor = cores, folders, Floor()
        self._source = PagedCache()
        touch([*self._floor.buffers, *self._source.buffers])
        self._source.fill_with_noise()
        self._reader = Worker(sys.executable, Path(__file__).with_name("worker_kvlane_reader.py"), cores=cores)
        self._reader.call("has_memory")
        self._writers: dict[str, _native.FsWorker] = {}
        self._serial = 0
        self._direct_read: DirectRead | None = None
        self._bare_write: BareWrite | None = None

    def cases(self) -> list[tuple[str, str, int]]:
        moves = ("store", "load", "load-fresh-reader", "first-fill")
        both = [(case, medium, threads) for case in moves for medium in self._folders for threads in THREADS]
        return [*both, *((case, "disk", threads) for case in ("store-evicted", "load-cold") for threads in THREADS)]

    def versions(self) -> dict[str, str]:
        return {"kvlane": _native.__version__}

    def turn(self, case: str, medium: str, threads: int, round_number: int) -> Sample:
        # The kernel drops no page that a process has mapped, so the reader of these folders comes and goes.
        is_cold = case in ("store-evicted", "load-cold")
        folder = str(Path(self._folders[medium], f"{threads}-threads" + "-cold" * is_cold))
        if case == "first-fill":
            return self._first_fill(folder + "-first", threads)
        if folder not in self._writers:
            self._fill(folder, threads)
        writer, serial = self._writers[folder], self._next_serial()
        if case in ("store", "store-evicted"):
            if is_cold:
                self._drop(folder)
            sample = self._timed_store(writer, serial)
            if medium == "disk" and threads == 1:
                sample.other_floors[BARE_WRITE] = self._bare_write_floor(serial, is_cold)
            self._read("load", folder, threads, serial)
        else:
            store(writer, keys_of(serial), scattered("source", serial))
            self._drop(folder) if is_cold else settle(folder)
            # Before and after, as with memcpy: the device's speed drifts too.
            floors = [self._direct_floors()] if is_cold else []
            sample = self._read("load_afresh" if case == "load-fresh-reader" else "load", folder, threads, serial)
            if is_cold:
                floors.append(self._direct_floors())
                for name in floors[0]:
                    sample.other_floors[name] = statistics.mean(floor[name] for floor in floors)
        if medium == "tmpfs" and threads == 2 and case in ("store", "load"):
            sample.other_floors[TWO_MEMCPYS] = self._floor.seconds_of_two(self._cores)
        settle(folder)
        return sample

    def close(self) -> None:
        self._reader.close()
        for writer in self._writers.values():
            writer.close()

    def _fill(self, folder: str, threads: int) -> None:
        """Fill the folder once around and let the reader map all of it, as in a server that has run for a while."""
        empty(folder)
        self._writers[folder] = open_worker(folder, self._source, self._cores, threads, can_store=True)
        for _ in range(REQUESTS_TO_FILL):
            serial = self._next_serial()
            store(self._writers[folder], keys_of(serial), scattered("source", serial))
            self._read("load", folder, threads, serial)
        settle(folder)

    def _first_fill(self, folder: str, threads: int) -> Sample:
        empty(folder)
        serial = self._next_serial()
        writer = open_worker(folder, self._source, self._cores, threads, can_store=True)
        # No memcpy after it: on tmpfs the rest of the new segment is populated then, on the same core.
        sample = self._timed_store(writer, serial, is_timed_after=False)
        self._read("load", folder, threads, serial)
        self._reader.call("forget", folder=folder)
        writer.close()
        empty(folder)
        return sample

    def _timed_store(self, writer: _native.FsWorker, serial: int, is_timed_after: bool = True) -> Sample:
        keys, blocks = keys_of(serial), scattered("source", serial)
        return self._floor.around(lambda: store(writer, keys, blocks), is_timed_after)

    def _read(self, method: str, folder: str, threads: int, serial: int) -> Sample:
        return Sample(**self._reader.call(method, folder=folder, threads=threads, serial=serial))

    def _drop(self, folder: str) -> None:
        self._reader.call("forget", folder=folder)
        drop(folder)

    def _bare_write_floor(self, serial: int, is_cold: bool) -> float:
        if self._bare_write is None:
            self._bare_write = BareWrite(self._folders["disk"], BLOCK_BYTES, BLOCKS)
        runs = [[layer[block].data for layer in self._source.layers] for block in scattered("source", serial)]
        return self._bare_write.seconds(runs, is_cold)

    def _direct_floors(self) -> dict[str, float]:
        if self._direct_read is None:
            self._direct_read = DirectRead(self._folders["disk"], REQUEST_BYTES)
        return {
            DIRECT_READ: self._direct_read.seconds(reads_at_a_time=1),
            DIRECT_READS: self._direct_read.seconds(reads_at_a_time=COLD_READS),
        }

    def _next_serial(self) -> int:
        self._serial += 1
        return self._serial


if __name__ == "__main__":
    serve(System)
