"""What both halves of the kvlane system share: the same layout, names and options in the writer and the reader."""

from kvlane import _native
from kvlane_layout import layout_of
from turns import threads_on
from workload import BLOCK_TOKENS, BLOCKS, TOKENS, PagedCache

TIMEOUT_MS = 30_000
# Two and a half requests: a store of a request always recycles the slots of an older one.
CAPACITY_BYTES = 256 << 20
REQUESTS_TO_FILL = 4

NAMESPACE = _native.namespace_id([("model", "benchmark"), ("rank", "0")])


def keys_of(serial: int) -> bytes:
    """The chain hashes of request number ``serial``; the hashing is not part of any move."""
    chain = _native.Chain(BLOCK_TOKENS)
    chain.extend([serial] * TOKENS)
    return chain.keys(0, BLOCKS)


def open_worker(folder: str, cache: PagedCache, cores: list[int], threads: int, can_store: bool) -> _native.FsWorker:
    """Its threads, the copying ones and all others, stay on the row's cores."""
    options = {"io_threads": threads, "capacity_bytes": CAPACITY_BYTES}
    with threads_on(cores, threads):
        return _native.FsWorker(folder, NAMESPACE, layout_of(cache), cache.layers, options, can_store)


def store(worker: _native.FsWorker, keys: bytes, blocks: list[int]) -> None:
    job = worker.begin_store(keys, blocks, 0, TIMEOUT_MS)
    worker.finish_store(job)
    finish(worker, job, "store")


def load(worker: _native.FsWorker, keys: bytes, blocks: list[int]) -> None:
    finish(worker, worker.load(keys, blocks, TIMEOUT_MS), "load")


def finish(worker: _native.FsWorker, job: int, what: str) -> None:
    outcome = worker.wait(job, TIMEOUT_MS)
    if outcome is None:
        raise TimeoutError(f"the {what} did not end within {TIMEOUT_MS} ms")
    positions, reason = outcome
    if positions:
        raise RuntimeError(f"{len(positions)} blocks of a {what} were not moved: {reason}")
