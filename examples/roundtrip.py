"""Stores two blocks of a small KV cache in a folder and loads them into another one, without vLLM.

    python roundtrip.py [FOLDER]

The folder may be on tmpfs (fastest) or on disk. A real connector does the same with the tensors that vLLM registers.
"""

import sys
import tempfile

import numpy as np

from kvlane._native import Chain, FsReader, FsWorker, Layout, namespace_id

LAYERS, BLOCKS, BLOCK_TOKENS, HEADS, HEAD_WIDTH = 4, 8, 16, 2, 64
OPTIONS = {"capacity_bytes": 64 << 20, "segment_bytes": 16 << 20}
TIMEOUT_MS = 5_000


def paged_cache(fill: np.random.Generator | None = None) -> list[np.ndarray]:
    """One array per layer: [block, K or V, token, head, element]."""
    shape = (BLOCKS, 2, BLOCK_TOKENS, HEADS, HEAD_WIDTH)
    if fill is None:
        return [np.zeros(shape, np.float32) for _ in range(LAYERS)]
    return [fill.standard_normal(shape, np.float32) for _ in range(LAYERS)]


def layout_of(cache: list[np.ndarray]) -> Layout:
    return Layout(
        [
            (
                f"layer.{index}",
                layer.ctypes.data,
                "cpu",
                layer.itemsize,
                layer.shape,
                [stride // layer.itemsize for stride in layer.strides],
            )
            for index, layer in enumerate(cache)
        ],
        BLOCKS,
    )


def finish(worker: FsWorker, job: int, what: str) -> None:
    outcome = worker.wait(job, TIMEOUT_MS)
    if outcome is None:
        raise TimeoutError(f"{what} is still running")
    bad_positions, reason = outcome
    if bad_positions:
        raise RuntimeError(f"{what}: blocks {bad_positions} missed: {reason}")


def main(folder: str) -> None:
    # Whatever decides the values in the cache belongs into the namespace; the tokens are in the keys.
    namespace = namespace_id([("model", "roundtrip example"), ("rank", "0")])
    prompt = list(range(40))  # two full blocks of 16; a partial block has no key
    chain = Chain(BLOCK_TOKENS)
    block_count = chain.extend(prompt)
    keys = chain.keys(0, block_count)

    prefill_cache = paged_cache(np.random.default_rng(1))
    prefill = FsWorker(folder, namespace, layout_of(prefill_cache), prefill_cache, OPTIONS)
    job = prefill.begin_store(keys, [5, 2], 0, TIMEOUT_MS)
    for layer in range(LAYERS):
        prefill.layer_ready(job, layer)
    prefill.finish_store(job)
    finish(prefill, job, "store")

    reader = FsReader(folder, [namespace], OPTIONS)
    ready, pending = reader.lookup(chain, block_count)
    print(f"{len(prompt)} tokens: {ready} blocks ready, {pending} pending")
    assert (ready, pending) == (block_count, 0)

    decode_cache = paged_cache()
    decode = FsWorker(folder, namespace, layout_of(decode_cache), decode_cache, OPTIONS, can_store=False)
    finish(decode, decode.load(keys, [0, 7], TIMEOUT_MS), "load")
    for source, target in zip(prefill_cache, decode_cache, strict=True):
        assert np.array_equal(source[[5, 2]], target[[0, 7]])
        assert not target[1:7].any()  # nothing else was touched
    print(f"loaded {block_count * BLOCK_TOKENS} tokens of KV, every byte equal")

    # Another tenant's salt is another chain: the same tokens do not hit.
    salted = Chain(BLOCK_TOKENS, cache_salt="another tenant")
    salted.extend(prompt)
    assert reader.lookup(salted, block_count) == (0, 0)

    for resource in (decode, reader, prefill):
        resource.close()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        with tempfile.TemporaryDirectory(prefix="kvlane.") as scratch:
            main(scratch)
