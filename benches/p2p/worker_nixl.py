"""NIXL with UCX, set up as by default: the target reads. As in vLLM's connector descriptor lists are prepared once, and
each transfer is a fresh handle with indices into them; unlike there, the agent has no threads of its own (vLLM gives it
four, which split a request). One pair of processes per lane: UCX_TLS is read once.
"""

import base64
import importlib.metadata
import os
import sys
import threading
import time

from pair import CASES, Arrivals, filled_cache, noise_of, pairs, timed
from turns import Worker, serve
from workload import LAYERS, POOL_BLOCKS, RUN_BYTES, Floor, PagedCache, Sample, touch

# As long as a vLLM step with nothing to do may take.
NOTES_EVERY_S = 0.0005


class Target:
    def __init__(self, cores: list[int], noise: str, lane: str) -> None:
        os.sched_setaffinity(0, cores)
        self._lane, self._floor, self._arrivals = lane, Floor(), Arrivals(noise_of(noise))
        touch([*self._floor.buffers, *self._arrivals.buffers])
        self._source = Worker(sys.executable, __file__, role="source", cores=cores, noise=noise, lane=lane)
        cache = self._arrivals.cache
        self._agent = open_agent("target", cache, lane)
        theirs = self._source.call("metadata")
        peer = self._agent.add_remote_agent(base64.b64decode(theirs["agent"]))
        local = self._agent.get_xfer_descs(runs_from(address_of(cache)), "DRAM")
        remote = self._agent.get_xfer_descs(runs_from(theirs["address"]), "DRAM")
        self._local = self._agent.prep_xfer_dlist("NIXL_INIT_AGENT", local)
        self._remote = self._agent.prep_xfer_dlist(peer, remote)
        self._source.call("connect", metadata=text_of(self._agent))

    def cases(self) -> list[tuple[str, str]]:
        return [(case, self._lane) for case in CASES]

    def versions(self) -> dict[str, str]:
        return {"nixl": importlib.metadata.version("nixl")}

    def turn(self, case: str, lane: str, round_number: int) -> Sample:
        moved = pairs(case, round_number)
        self._source.call("listen")
        if case == "block":
            moves = [lambda pair=pair: self._read([pair], 1) for pair in moved]
        else:
            moves = [lambda: self._read(moved, LAYERS)]
        sample = timed(case, self._floor, moves)
        self._source.call("rest")
        self._arrivals.check(case, round_number)
        return sample

    def close(self) -> None:
        self._source.close()

    def _read(self, moved: list[tuple[int, int]], layers: int) -> None:
        sources = [layer * POOL_BLOCKS + source for layer in range(layers) for source, _ in moved]
        targets = [layer * POOL_BLOCKS + target for layer in range(layers) for _, target in moved]
        handle = self._agent.make_prepped_xfer("READ", self._local, targets, self._remote, sources)
        state = self._agent.transfer(handle)
        while state != "DONE":
            if state != "PROC":
                raise RuntimeError(f"NIXL's transfer is in state {state}")
            state = self._agent.check_xfer_state(handle)
        self._agent.release_xfer_handle(handle)


class Source:
    def __init__(self, cores: list[int], noise: str, lane: str) -> None:
        os.sched_setaffinity(0, cores)
        self._cache = filled_cache(noise_of(noise))
        self._agent = open_agent("source", self._cache, lane)
        self._listener: threading.Thread | None = None
        self._listens = False

    def metadata(self) -> dict:
        return {"agent": text_of(self._agent), "address": address_of(self._cache)}

    def connect(self, metadata: str) -> None:
        self._agent.add_remote_agent(base64.b64decode(metadata))

    def listen(self) -> None:
        """Looks for notes now and then, as an engine does in its steps; without, some lanes make no progress."""
        self._listens = True
        self._listener = threading.Thread(target=self._look_for_notes)
        self._listener.start()

    def rest(self) -> None:
        self._listens = False
        self._listener.join()

    def _look_for_notes(self) -> None:
        while self._listens:
            self._agent.get_new_notifs()
            time.sleep(NOTES_EVERY_S)


def open_agent(name: str, cache: PagedCache, lane: str):
    os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
    if lane != "default":
        os.environ["UCX_TLS"] = lane
    from nixl._api import nixl_agent, nixl_agent_config

    agent = nixl_agent(name, nixl_agent_config(backends=["UCX"]))
    layer_bytes = POOL_BLOCKS * RUN_BYTES
    start = address_of(cache)
    agent.register_memory([(start + layer * layer_bytes, layer_bytes, 0, "") for layer in range(LAYERS)], "DRAM")
    return agent


def text_of(agent) -> str:
    return base64.b64encode(agent.get_agent_metadata()).decode()


def address_of(cache: PagedCache) -> int:
    return cache.layers.ctypes.data


def runs_from(address: int) -> list[tuple[int, int, int]]:
    return [(address + number * RUN_BYTES, RUN_BYTES, 0) for number in range(LAYERS * POOL_BLOCKS)]


def system(role: str = "target", **setup):
    return {"target": Target, "source": Source}[role](**setup)


if __name__ == "__main__":
    serve(system)
