"""vLLM's own "fs" tier: its compiled file I/O and its thread pool, without an engine.

The tier reads and writes a host buffer (its "primary" tier, shared memory), one file per block with all
layers. `store` and `load` include the copy between the paged cache and that buffer, which the tier always
needs; `io-write` and `io-read` are the files alone, one job per thread on the tier's pool (one job calls it
directly). Page-cache rows are buffered, which is faster here than the tier's default of O_DIRECT; the cold
row uses O_DIRECT where the tier's own probe allows it.
"""

import functools
import hashlib
import os

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import vllm
from vllm.v1.kv_offload.tiering.fs import io as tier_io
from vllm.v1.kv_offload.tiering.fs.thread_pool import DualQueueThreadPool

from files import drop, empty, settle
from turns import serve, threads_on
from workload import (
    BLOCK_BYTES,
    BLOCKS,
    LAYERS,
    RUN_BYTES,
    Floor,
    PagedCache,
    Sample,
    anonymous,
    scattered,
    touch,
)

PRIMARY_SLOTS = 2 * BLOCKS
POOL_THREADS = 16  # the tier's default, for each of its two queues
IO_THREADS = (1, 2, 4)


class System:
    def __init__(self, cores: list[int], folders: dict[str, str]) -> None:
        os.sched_setaffinity(0, cores[:1])
        assert tier_io._HAS_FSIO_C, "vLLM's compiled file I/O is missing; the Python fallback would be an unfair peer"
        self._cores, self._folders, self._floor = cores, folders, Floor()
        self._source, self._target = PagedCache(), PagedCache()
        self._primary = anonymous(PRIMARY_SLOTS * BLOCK_BYTES, shared=True).reshape(PRIMARY_SLOTS, LAYERS, RUN_BYTES)
        touch([*self._floor.buffers, *self._source.buffers, *self._target.buffers, self._primary])
        self._source.fill_with_noise()
        self._view = memoryview(self._primary).cast("B")
        self._pools: dict[int, DualQueueThreadPool] = {}
        self._direct_when_cold = {medium: tier_io.probe_o_direct(folder) for medium, folder in folders.items()}

    def cases(self) -> list[tuple[str, str, int]]:
        moves = [(case, medium, 1) for medium in self._folders for case in ("store", "load")]
        files = [(c, m, threads) for m in self._folders for c in ("io-write", "io-read") for threads in IO_THREADS]
        return [*moves, ("load-cold", "disk", 1), *files]

    def versions(self) -> dict[str, str]:
        return {"vllm": vllm.__version__}

    def turn(self, case: str, medium: str, threads: int, round_number: int) -> Sample:
        folder = self._folders[medium]
        self._paths = block_paths(folder, round_number)
        self._source_blocks, self._target_blocks = (
            scattered("source", round_number),
            scattered("target", round_number),
        )
        slots = scattered("slots", round_number, PRIMARY_SLOTS)
        self._slots, self._offsets = slots, [slot * BLOCK_BYTES for slot in slots]
        direct = case == "load-cold" and self._direct_when_cold[medium]
        write = functools.partial(self._files, "store", threads, False)
        read = functools.partial(self._files, "load", threads, direct)
        cases = {
            "store": (lambda: None, lambda: (self._gather(), write())),
            "io-write": (self._gather, write),
            "load": (lambda: (self._gather(), write(), self._forget()), lambda: (read(), self._scatter())),
            "load-cold": (
                lambda: (self._gather(), write(), self._forget()),
                lambda: (read(), self._scatter()),
            ),
            "io-read": (lambda: (self._gather(), write(), self._forget()), read),
        }
        prepare, work = cases[case]
        empty(folder)
        prepare()
        if case == "load-cold":
            drop(folder)
        else:
            settle(folder)
        sample = self._floor.around(work)
        if case in ("store", "io-write"):
            self._forget()
            read()
        if case not in ("load", "load-cold"):
            self._scatter()
        self._target.check_request(self._target_blocks, self._source, self._source_blocks)
        self._target.clear(self._target_blocks)
        settle(folder)
        return sample

    def close(self) -> None:
        for pool in self._pools.values():
            pool.shutdown()

    def _gather(self) -> None:
        for slot, block in zip(self._slots, self._source_blocks, strict=True):
            self._primary[slot] = self._source.layers[:, block]

    def _scatter(self) -> None:
        for slot, block in zip(self._slots, self._target_blocks, strict=True):
            self._target.layers[:, block] = self._primary[slot]

    def _forget(self) -> None:
        self._primary[self._slots] = 0

    def _files(self, direction: str, threads: int, direct: bool) -> None:
        transfer = tier_io.batch_store_block if direction == "store" else tier_io.batch_load_block
        if threads == 1:
            transfer(self._paths, self._view, self._offsets, BLOCK_BYTES, direct)
            return
        if threads not in self._pools:
            with threads_on(self._cores, threads):
                self._pools[threads] = DualQueueThreadPool(POOL_THREADS, POOL_THREADS)
        pool = self._pools[threads]
        enqueue = pool.enqueue_store if direction == "store" else pool.enqueue_load
        step = BLOCKS // threads
        for job in range(threads):
            part = slice(job * step, (job + 1) * step)
            work = functools.partial(transfer, self._paths[part], self._view, self._offsets[part], BLOCK_BYTES, direct)
            enqueue(job, 1, [work])
        pool.wait_idle()
        if not all(finished[1] for finished in pool.get_finished()):
            raise RuntimeError(f"the tier reports a failed {direction}")


def block_paths(folder: str, round_number: int) -> list[str]:
    """The tier's tree: <root>/<model>_<hex>_r<rank>/<3 hex>/<2 hex>_g<group>/<hash>.bin"""
    hashes = [hashlib.sha256(b"%d %d" % (round_number, block)).hexdigest() for block in range(BLOCKS)]
    return [f"{folder}/model_0123456789ab_r0/{h[:3]}/{h[3:5]}_g0/{h}.bin" for h in hashes]


if __name__ == "__main__":
    serve(System)
