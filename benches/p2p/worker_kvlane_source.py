"""kvlane's prefill side: offers blocks, and plays an engine that computes them layer by layer."""

import os
import threading
import time

from kvlane import _native
from kvlane_p2p import BLOCK_DIGEST, REQUEST_DIGEST, open_worker
from pair import TIMEOUT_S, filled_cache, noise_of
from turns import serve
from workload import BLOCK_TOKENS, BLOCKS, LAYERS, TOKENS


class System:
    def __init__(self, cores: list[int], noise: str) -> None:
        os.sched_setaffinity(0, cores)
        self._noise = noise_of(noise)
        self._cache = filled_cache(self._noise)
        self._workers = {
            case: open_worker(self._cache, layers, "auto", can_offer=True)
            for case, layers in (("block", 1), ("request", LAYERS))
        }
        self._engine: threading.Thread | None = None
        self._computed_at = 0.0

    def ports(self) -> dict[str, int]:
        return {case: worker.port for case, worker in self._workers.items()}

    def offer(self, case: str, prefix: str, blocks: list[int]) -> None:
        """Requests whose KV is there: one of all blocks, or one of each block."""
        worker = self._workers[case]
        if case == "request":
            offer(worker, prefix, TOKENS, REQUEST_DIGEST, blocks, LAYERS)
        else:
            for number, block in enumerate(blocks):
                offer(worker, f"{prefix} {number}", BLOCK_TOKENS, BLOCK_DIGEST, [block], 1)

    def compute(self, key: str, blocks: list[int], start_at: float, seconds: float) -> None:
        """A request whose layers become complete one after the other, from `start_at` on, evenly over `seconds`."""
        worker = self._workers["request"]
        self._cache.clear(blocks)
        worker.offer(key, TOKENS, REQUEST_DIGEST, blocks)

        def engine() -> None:
            for layer in range(LAYERS):
                self._cache.layers[layer, blocks] = self._noise.layers[layer, blocks]
                time.sleep(max(start_at + seconds * (layer + 1) / LAYERS - time.perf_counter(), 0))
                is_last = layer + 1 == LAYERS
                if is_last:
                    self._computed_at = time.perf_counter()
                worker.progress([(key, BLOCKS if is_last else 0, BLOCKS, layer + 1)])
            worker.finish(key)

        self._engine = threading.Thread(target=engine)
        self._engine.start()

    def computed_at(self) -> float:
        """When the last layer was, on the clock that all processes share."""
        self._engine.join(TIMEOUT_S)
        return self._computed_at

    def await_release(self, case: str, count: int) -> None:
        """Decode has said that it has everything: nothing is held any more."""
        worker, deadline, released = self._workers[case], time.monotonic() + TIMEOUT_S, 0
        while released < count:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{count - released} of {count} requests are still held")
            released += len(worker.released())
            time.sleep(0.001)

    def cpu_seconds(self) -> float:
        return time.process_time()

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()


def offer(worker: _native.P2pWorker, key: str, tokens: int, digest: bytes, blocks: list[int], layers: int) -> None:
    worker.offer(key, tokens, digest, blocks)
    worker.progress([(key, len(blocks), len(blocks), layers)])
    worker.finish(key)


if __name__ == "__main__":
    serve(System)
