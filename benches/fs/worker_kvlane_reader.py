"""The decode side of the kvlane system: a process with a paged cache of its own that loads and checks."""

import os

from kvlane_side import keys_of, load, open_worker
from turns import serve
from workload import Floor, PagedCache, Sample, scattered, touch


class System:
    def __init__(self, cores: list[int]) -> None:
        os.sched_setaffinity(0, cores[:1])
        self._cores, self._floor = cores, Floor()
        # What the writer's cache holds, to compare with.
        self._source, self._target = PagedCache(), PagedCache()
        touch([*self._floor.buffers, *self._source.buffers, *self._target.buffers])
        self._source.fill_with_noise()
        self._open = {}

    def has_memory(self) -> bool:
        """The first call builds this system, so after it the memory is there."""
        return True

    def load(self, folder: str, threads: int, serial: int) -> Sample:
        """Load a request by the worker that stays open for this folder, and check it."""
        if folder not in self._open:
            self._open[folder] = open_worker(folder, self._target, self._cores, threads, can_store=False)
        worker = self._open[folder]
        keys, blocks = keys_of(serial), scattered("target", serial)
        sample = self._floor.around(lambda: load(worker, keys, blocks))
        self._check(blocks, serial)
        return sample

    def load_afresh(self, folder: str, threads: int, serial: int) -> Sample:
        """Open the folder and load, both timed."""
        keys, blocks = keys_of(serial), scattered("target", serial)
        opened = []

        def work():
            opened.append(open_worker(folder, self._target, self._cores, threads, can_store=False))
            load(opened[0], keys, blocks)

        sample = self._floor.around(work)
        opened[0].close()
        self._check(blocks, serial)
        return sample

    def forget(self, folder: str) -> None:
        if folder in self._open:
            self._open.pop(folder).close()

    def close(self) -> None:
        for folder in list(self._open):
            self.forget(folder)

    def _check(self, blocks: list[int], serial: int) -> None:
        self._target.check_request(blocks, self._source, scattered("source", serial))
        self._target.clear(blocks)


if __name__ == "__main__":
    serve(System)
