"""kvlane from server to server through its Python module: this process is decode, and starts prefill.

Both use what the connector uses: prefill offers, says how far it is and finishes; decode pulls. A pull is timed from
the call of `pull` until its end is seen: by `poll`, called over and over, where one block is moved; by `wait` where a
whole request is, since a caller that spins would take one of the cores from the copying threads. There are two workers
on each side: one with all layers, and one with the first layer only, so that a block of it is one run.
"""

import os
import sys
import time
from pathlib import Path

from kvlane import _native
from kvlane_p2p import BLOCK_DIGEST, REQUEST_DIGEST, check_end, open_worker
from pair import SINGLE_BLOCKS, TIMEOUT_S, Arrivals, noise_of, pairs, timed
from turns import Worker, serve
from workload import BLOCK_TOKENS, LAYERS, TOKENS, Floor, Sample, touch

LANES = ("shm", "tcp")
# Longer than any lane needs for a request, so that the pull waits for the producer and not the other way round.
COMPUTE_S = 0.15
# How long before it begins to compute the producer is told to.
COMPUTE_DELAY_S = 0.05
HOST, TIMEOUT_MS = "127.0.0.1", TIMEOUT_S * 1000


class System:
    def __init__(self, cores: list[int], noise: str) -> None:
        os.sched_setaffinity(0, cores)
        self._floor, self._arrivals = Floor(), Arrivals(noise_of(noise))
        touch([*self._floor.buffers, *self._arrivals.buffers])
        source = Path(__file__).with_name("worker_kvlane_source.py")
        self._source = Worker(sys.executable, source, cores=cores, noise=noise)
        self._ports = self._source.call("ports")
        cache = self._arrivals.cache
        self._workers = {
            (case, lane): open_worker(cache, layers, lane, can_offer=False)
            for case, layers in (("block", 1), ("request", LAYERS))
            for lane in LANES
        }

    def cases(self) -> list[tuple[str, str]]:
        return [(case, lane) for case in ("block", "request", "overlap") for lane in LANES]

    def versions(self) -> dict[str, str]:
        return {"kvlane": _native.__version__}

    def turn(self, case: str, lane: str, round_number: int) -> Sample:
        if case == "overlap":
            return self._overlap(lane, round_number)
        moved = pairs(case, round_number)
        prefix = f"{lane} {round_number}"
        self._source.call("offer", case=case, prefix=prefix, blocks=[source for source, _ in moved])
        targets = [target for _, target in moved]
        if case == "block":
            worker = self._workers["block", lane]
            moves = [
                lambda key=f"{prefix} {number}", target=target: self._pull_block(worker, key, target)
                for number, target in enumerate(targets)
            ]
        else:
            moves = [lambda: self._pull_request(lane, prefix, targets)]
        sample = timed(case, self._floor, moves)
        self._arrivals.check(case, round_number)
        self._source.call("await_release", case=case, count=SINGLE_BLOCKS if case == "block" else 1)
        return sample

    def idle_share(self, seconds: float) -> float:
        """Part of one core that both processes together use while nothing is to be moved."""
        theirs, ours, start = self._source.call("cpu_seconds"), time.process_time(), time.perf_counter()
        time.sleep(seconds)
        used = time.process_time() - ours + self._source.call("cpu_seconds") - theirs
        return used / (time.perf_counter() - start)

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()
        self._source.close()

    def _pull_block(self, worker: _native.P2pWorker, key: str, target: int) -> None:
        job = worker.pull(key, HOST, self._ports["block"], BLOCK_TOKENS, BLOCK_DIGEST, 0, [target], TIMEOUT_MS)
        while not (ended := worker.poll()):
            os.sched_yield()
        check_end(job, ended)

    def _pull_request(self, lane: str, key: str, targets: list[int]) -> float:
        """When it had ended."""
        worker = self._workers["request", lane]
        job = worker.pull(key, HOST, self._ports["request"], TOKENS, REQUEST_DIGEST, 0, targets, TIMEOUT_MS)
        end = worker.wait(job, TIMEOUT_MS)
        ended_at = time.perf_counter()
        check_end(job, [] if end is None else [(job, *end)])
        return ended_at

    def _overlap(self, lane: str, round_number: int) -> Sample:
        """The sample's seconds: how long after the producer's last layer the request was complete."""
        moved = pairs("request", round_number)
        key = f"overlap {lane} {round_number}"
        start_at = time.perf_counter() + COMPUTE_DELAY_S
        blocks = [source for source, _ in moved]
        self._source.call("compute", key=key, blocks=blocks, start_at=start_at, seconds=COMPUTE_S)
        ended_at = self._pull_request(lane, key, [target for _, target in moved])
        last_layer_at = self._source.call("computed_at")
        self._arrivals.check("request", round_number)
        self._source.call("await_release", case="request", count=1)
        return Sample(ended_at - last_layer_at, [])


if __name__ == "__main__":
    serve(System)
