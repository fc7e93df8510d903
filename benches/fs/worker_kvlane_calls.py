"""kvlane's calls that move no KV: what the scheduler and an idle engine step cost.

All go through Python, as an engine's do. A sample is the median of several calls.

- `lookup`: `FsReader.lookup` of a request of 64 blocks that are all there.
- `keys-first`: what the scheduler half does when a request with an unknown prompt of 131,072 tokens first asks: chain
  hashes from a new list, and the lookup of its blocks, all of which are there, so the lookup has to look at every one.
- `keys-grown`: the same for another request whose prompt is the first one's and one block more, as in a chat. vLLM's
  own block hashes, by which the scheduler half knows the earlier prompt, come with a request; vLLM makes them for
  itself, so they are not timed.
- `idle-step`: every hook of both halves of the connector in an engine step that moves nothing.
"""

import hashlib
import itertools
import os
import statistics
import time
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np

from kvlane import _native
from kvlane.vllm.options import Options
from kvlane.vllm.scheduler import SchedulerHalf, SchedulerSettings
from turns import serve, threads_on
from workload import BLOCK_TOKENS, BLOCKS, Sample, WrongBytes, anonymous

CALLS = {"lookup": 201, "keys-first": 5, "keys-grown": 21, "idle-step": 201}

PROMPT_TOKENS = 131_072
PROMPT_BLOCKS = PROMPT_TOKENS // BLOCK_TOKENS
VOCABULARY = 151_936
# The lookup does not depend on a block's size; small ones keep 8192 of them in 32 MiB.
SMALL_BLOCK_BYTES = 4096
CAPACITY_BYTES = 256 << 20
STORE_BLOCKS = 1024
TIMEOUT_MS = 30_000
NAMESPACE = _native.namespace_id([("model", "benchmark of calls")])


class System:
    def __init__(self, cores: list[int], folders: dict[str, str]) -> None:
        os.sched_setaffinity(0, cores[:1])
        self._cores = cores
        # Apart: the cases come in another order in each run.
        self._prompt_folder, self._engine_folder = (Path(folders["tmpfs"], name) for name in ("prompt", "engine"))
        self._prompt = np.random.default_rng(22).integers(0, VOCABULARY, PROMPT_TOKENS).tolist()
        self._reader = self._writer = self._engine = None
        self._numbers = itertools.count()

    def cases(self) -> list[tuple[str, str, int]]:
        return [(case, "memory", 1) for case in CALLS]

    def versions(self) -> dict[str, str]:
        return {"kvlane": _native.__version__}

    def turn(self, case: str, medium: str, threads: int, round_number: int) -> Sample:
        if self._reader is None and case != "idle-step":
            self._store_prompt()
            self._reader = _native.FsReader(str(self._prompt_folder), [NAMESPACE], {"capacity_bytes": CAPACITY_BYTES})
            settings = SchedulerSettings(block_tokens=BLOCK_TOKENS, can_store=False, can_load=True)
            self._scheduler = SchedulerHalf(Options(), settings)
            self._scheduler.open(self._reader)
        measure = {
            "lookup": self._lookup,
            "keys-first": self._keys_first,
            "keys-grown": self._keys_grown,
            "idle-step": self._idle_step,
        }[case]
        return Sample(statistics.median(measure() for _ in range(CALLS[case])), [])

    def close(self) -> None:
        for opened in (self._engine, self._reader, self._writer):
            if opened is not None:
                opened.close()

    def _store_prompt(self) -> None:
        """Commit all blocks of the prompt. The writer stays: a folder in use has live writers."""
        self._prompt_folder.mkdir()
        cache = anonymous(SMALL_BLOCK_BYTES * STORE_BLOCKS)
        cache[:] = 1
        shape, strides = [STORE_BLOCKS, SMALL_BLOCK_BYTES], [SMALL_BLOCK_BYTES, 1]
        layout = _native.Layout([("layer", cache.ctypes.data, "cpu", 1, shape, strides)], STORE_BLOCKS, 0)
        options = {"io_threads": 1, "capacity_bytes": CAPACITY_BYTES}
        with threads_on(self._cores, 1):
            self._writer = _native.FsWorker(str(self._prompt_folder), NAMESPACE, layout, cache, options)
        chain = _native.Chain(BLOCK_TOKENS)
        chain.extend(self._prompt)
        for first in range(0, PROMPT_BLOCKS, STORE_BLOCKS):
            keys = chain.keys(first, STORE_BLOCKS)
            job = self._writer.begin_store(keys, list(range(STORE_BLOCKS)), first, TIMEOUT_MS)
            self._writer.finish_store(job)
            if self._writer.wait(job, TIMEOUT_MS) != ([], "done"):
                raise RuntimeError(f"storing blocks {first} to {first + STORE_BLOCKS} of the prompt failed")

    def _lookup(self) -> float:
        chain = _native.Chain(BLOCK_TOKENS)
        chain.extend(self._prompt[: BLOCKS * BLOCK_TOKENS])
        return seconds(lambda: self._reader.lookup(chain, BLOCKS), (BLOCKS, 0))

    def _keys_first(self) -> float:
        return self._ask(self._request(self._prompt), (PROMPT_BLOCKS - 1) * BLOCK_TOKENS)

    def _keys_grown(self) -> float:
        first = self._request(self._prompt)
        self._ask(first, (PROMPT_BLOCKS - 1) * BLOCK_TOKENS)
        grown = self._request([*self._prompt, *range(BLOCK_TOKENS)], first.block_hashes)
        return self._ask(grown, PROMPT_TOKENS)

    def _ask(self, request: types.SimpleNamespace, expected_tokens: int) -> float:
        taken = seconds(lambda: self._scheduler.matched_tokens(request, 0), (expected_tokens, True))
        self._scheduler.finished(request.request_id)
        return taken

    def _request(self, tokens: list[int], hashes: list[bytes] | None = None) -> types.SimpleNamespace:
        """A request as vLLM makes it, of new objects. Without `hashes` to continue it shares none with others."""
        number = next(self._numbers)
        hashes = list(hashes or ())
        parent = hashes[-1] if hashes else number.to_bytes(32, "little")
        packed = np.array(tokens, dtype=np.uint32)
        for first in range(len(hashes) * BLOCK_TOKENS, len(tokens) - BLOCK_TOKENS + 1, BLOCK_TOKENS):
            parent = hashlib.sha256(parent + packed[first : first + BLOCK_TOKENS].tobytes()).digest()
            hashes.append(parent)
        return types.SimpleNamespace(
            request_id=str(number), prompt_token_ids=packed.tolist(), num_tokens=len(tokens),
            block_hashes=[bytes(bytearray(digest)) for digest in hashes],
            prompt_embeds=None, pooling_params=None, lora_request=None, cache_salt=None, mm_features=[],
            kv_transfer_params=None, sampling_params=None,
        )  # fmt: skip

    def _idle_step(self) -> float:
        if self._engine is None:
            # vLLM's imports take seconds, so only a run that has this case pays for them.
            from idle_engine import IdleEngine

            self._engine = IdleEngine(self._engine_folder)
        return seconds(self._engine.step, None)


def seconds(work: Callable[[], object], expected: object) -> float:
    start = time.perf_counter()
    result = work()
    taken = time.perf_counter() - start
    if result != expected:
        raise WrongBytes(f"answer {result}, expected {expected}")
    return taken


if __name__ == "__main__":
    serve(System)
