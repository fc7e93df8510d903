"""Files of a system under test: emptied, written back, dropped from the page cache."""

import ctypes
import mmap
import os
import queue
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from turns import NotRun

# Pages that a process has mapped stay: kvlane's header tables, 64 KiB of each segment. Less than one block.
KEPT_BYTES_MAX = 1 << 20


def empty(folder: str | Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)


def settle(folder: str | Path) -> None:
    """Write back what was stored, so that no system pays for its neighbour's dirty pages."""
    for path in _files(folder):
        with _opened(path) as file:
            os.fdatasync(file.fileno())


def drop(folder: str | Path) -> None:
    """Write back all pages and drop them from the page cache. Raises NotRun where the kernel keeps them."""
    settle(folder)
    files = _files(folder)
    for path in files:
        with _opened(path) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    kept = sum(resident_bytes(path) for path in files)
    if kept > KEPT_BYTES_MAX:
        raise NotRun(f"{kept / 2**20:.1f} MiB stayed in the page cache after posix_fadvise(DONTNEED)")


def resident_bytes(path: Path) -> int:
    """Bytes of the file that are in the page cache."""
    size = path.stat().st_size
    if size == 0:
        return 0
    pages = -(-size // mmap.PAGESIZE)
    with _opened(path) as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as mapping:
        view = np.frombuffer(mapping, np.uint8)
        states = np.zeros(pages, np.uint8)
        libc = ctypes.CDLL(None, use_errno=True)
        failed = libc.mincore(
            ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(size), ctypes.c_void_p(states.ctypes.data)
        )
        del view
        if failed:
            raise OSError(ctypes.get_errno(), f"mincore of {path}")
    return int((states & 1).sum()) * mmap.PAGESIZE


class DirectRead:
    """The floor of a cold load: one file of the request's size, read past the page cache."""

    CALL_BYTES = 8 << 20

    def __init__(self, folder: str | Path, size_bytes: int) -> None:
        assert size_bytes % self.CALL_BYTES == 0, "the file is read in whole calls"
        self._path = Path(folder) / "direct-read"
        self._buffers: queue.SimpleQueue[mmap.mmap] = queue.SimpleQueue()
        self._pools: dict[int, ThreadPoolExecutor] = {}
        with open(self._path, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, size_bytes)
            generator = np.random.default_rng(21)
            for _ in range(0, size_bytes, self.CALL_BYTES):
                file.write(generator.bytes(self.CALL_BYTES))
            file.flush()
            os.fdatasync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self._size_bytes = size_bytes
        try:
            self._file = os.open(self._path, os.O_RDONLY | os.O_DIRECT)
        except OSError as error:
            raise NotRun(f"O_DIRECT cannot be used here: {error}") from None

    def seconds(self, reads_at_a_time: int) -> float:
        """More than one read at a time need a thread each; they stay on the caller's core."""
        offsets = range(0, self._size_bytes, self.CALL_BYTES)
        while self._buffers.qsize() < reads_at_a_time:
            self._buffers.put(mmap.mmap(-1, self.CALL_BYTES))
        run_all = map
        if reads_at_a_time > 1:
            if reads_at_a_time not in self._pools:
                self._pools[reads_at_a_time] = ThreadPoolExecutor(reads_at_a_time)
                list(self._pools[reads_at_a_time].map(self._read, offsets))  # starts the threads
            run_all = self._pools[reads_at_a_time].map
        start = time.perf_counter()
        list(run_all(self._read, offsets))
        return time.perf_counter() - start

    def _read(self, offset: int) -> None:
        buffer, done = self._buffers.get(), 0
        while done < self.CALL_BYTES:
            read = os.preadv(self._file, [memoryview(buffer)[done:]], offset + done)
            if read == 0:
                raise EOFError(f"{self._path} ends at {offset + done}")
            done += read
        self._buffers.put(buffer)


class BareWrite:
    """The floor of a store on a disk: the same runs written to the same kind of place, and nothing else done."""

    def __init__(self, folder: str | Path, block_bytes: int, blocks: int) -> None:
        self._block_bytes, self._blocks = block_bytes, blocks
        self._file = os.open(Path(folder) / "bare-write", os.O_RDWR | os.O_CREAT, 0o600)
        os.posix_fallocate(self._file, 0, block_bytes * blocks)
        for number in range(blocks):
            os.pwrite(self._file, bytes(block_bytes), number * block_bytes)
        os.fdatasync(self._file)

    def seconds(self, runs: list[list[memoryview]], evicted: bool) -> float:
        """``runs``: those of each block."""
        if evicted:
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)
        start = time.perf_counter()
        for number, block in enumerate(runs):
            written = os.pwritev(self._file, block, number * self._block_bytes)
            assert written == self._block_bytes
        taken = time.perf_counter() - start
        os.fdatasync(self._file)
        return taken


def _files(folder: str | Path) -> list[Path]:
    return [path for path in sorted(Path(folder).rglob("*")) if path.is_file()]


def _opened(path: Path):
    return open(path, "rb", buffering=0)
