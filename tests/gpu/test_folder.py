"""Risk: what goes from a GPU into a folder is not what its stream has computed, or what comes back is overwritten."""

import tempfile
import unittest
from collections.abc import Iterator
from contextlib import contextmanager

from claims import BUSY_MS, COMPUTED, LATER, OLD, Claims
from kvlane import _native
from layouts import LAYOUTS
from side import Cache

SOURCES, TARGETS = [3, 40, 4, 17, 18, 60], [7, 1, 2, 33, 32, 31]
TIMEOUT_MS = 20_000
OPTIONS = {"capacity_bytes": 64 << 20}


class Folder(Claims):
    def cache(self, layout: str) -> Cache:
        cache = Cache(layout)
        self.addCleanup(cache.free)
        cache.fill(OLD)
        return cache

    @contextmanager
    def worker(self, folder: str, cache: Cache, can_store: bool) -> Iterator[_native.FsWorker]:
        worker = _native.FsWorker(
            folder, cache.namespace(), cache.native_layout(), cache.tensors, OPTIONS, can_store=can_store
        )
        try:
            yield worker
        finally:
            worker.close()

    def keys(self, cache: Cache) -> bytes:
        tokens = cache.layout.block_tokens
        chain = _native.Chain(tokens)
        chain.extend(range(len(SOURCES) * tokens))
        return chain.keys(0, len(SOURCES))

    def test_what_a_step_still_computes_is_stored_and_loaded_behind_another_step_in_every_layout(self) -> None:
        for layout in LAYOUTS:
            with self.subTest(layout=layout), tempfile.TemporaryDirectory() as folder:
                prefill, decode = self.cache(layout), self.cache(layout)
                with self.worker(folder, prefill, True) as stores, self.worker(folder, decode, False) as loads:
                    keys = self.keys(prefill)
                    prefill.compute(COMPUTED, BUSY_MS)
                    job = stores.begin_store(keys, SOURCES, 0, TIMEOUT_MS)
                    stores.finish_store(job, prefill.stream.number)
                    self.assertTrue(prefill.is_busy(), "the stream was done before the store began: no test")
                    self.assertEqual(stores.wait(job, TIMEOUT_MS), ([], "done"))
                    self.assertFalse(prefill.is_busy(), "stored before it was computed")
                    decode.prepare(LATER)
                    decode.compute(LATER, BUSY_MS)
                    job = loads.load(keys, TARGETS, TIMEOUT_MS, stream=decode.stream.number)
                    self.assertTrue(decode.is_busy(), "the stream was done before the load began: no test")
                    self.assertEqual(loads.wait(job, TIMEOUT_MS), ([], "done"))
                    self.assertFalse(decode.is_busy(), "loaded in front of a step that still wrote the blocks")
                    self.assert_holds(decode, SOURCES, TARGETS, before=LATER)

    def test_a_load_whose_deadline_passes_behind_a_step_writes_nothing_later(self) -> None:
        layout = "K and V outermost"
        with tempfile.TemporaryDirectory() as folder:
            prefill, decode = self.cache(layout), self.cache(layout)
            with self.worker(folder, prefill, True) as stores, self.worker(folder, decode, False) as loads:
                keys = self.keys(prefill)
                prefill.compute(COMPUTED)
                job = stores.begin_store(keys, SOURCES, 0, TIMEOUT_MS)
                stores.finish_store(job, prefill.stream.number)
                self.assertEqual(stores.wait(job, TIMEOUT_MS), ([], "done"))
                decode.prepare(LATER)
                decode.compute(LATER, BUSY_MS)
                job = loads.load(keys, TARGETS, BUSY_MS // 8, stream=decode.stream.number)
                bad, reason = loads.wait(job, TIMEOUT_MS) or ([], "no end")
                self.assertTrue(decode.is_busy(), "it waited for the step")
                self.assertEqual((len(bad), reason), (len(TARGETS), "timed out"))
                decode.rest()
                self.assert_holds(decode, before=LATER)


if __name__ == "__main__":
    unittest.main()
