"""Risk: blocks are read before prefill's stream has written them, or written while decode's stream still does."""

import time
import unittest

from claims import BUSY_MS, COMPUTED, LATER, OLD, Claims
from driver import driver
from side import lanes
from slow_work import chain_of_copies, slow_work

SOURCES, TARGETS = [3, 40, 4, 17, 18, 60], [7, 1, 2, 33, 32, 31]


class Order(Claims):
    def test_blocks_that_prefill_still_computes_are_not_read_however_soon_decode_asks(self) -> None:
        prefill = self.prefill()
        for lane in lanes():
            with self.subTest(lane=lane):
                prefill.tell("fill", OLD)
                decode = self.decode(lane)
                prefill.tell("compute", COMPUTED, BUSY_MS)
                prefill.tell("hold", lane, SOURCES)
                job = decode.pull(lane, prefill.port, TARGETS)
                self.assertTrue(prefill.tell("is_busy"), "the stream was done before decode asked: no test")
                self.assert_arrives(decode, job, lane)
                self.assertFalse(prefill.tell("is_busy"), "complete before prefill's stream was")
                self.assert_holds(decode, SOURCES, TARGETS)

    def test_blocks_that_decodes_stream_still_writes_are_not_filled_before_it_is_done(self) -> None:
        prefill = self.prefill()
        for lane in lanes():
            with self.subTest(lane=lane):
                decode = self.decode(lane)
                prefill.tell("hold", lane, SOURCES)
                decode.prepare(LATER)
                # A step that was given to the stream before the blocks were freed.
                decode.compute(LATER, BUSY_MS)
                job = decode.pull(lane, prefill.port, TARGETS)
                self.assertTrue(decode.is_busy(), "the stream was done before the pull began: no test")
                self.assert_arrives(decode, job, lane)
                self.assertFalse(decode.is_busy(), "complete before decode's own stream was")
                self.assert_holds(decode, SOURCES, TARGETS, before=LATER)

    def test_both_streams_late_at_once(self) -> None:
        prefill = self.prefill()
        for lane in lanes():
            for prefill_ms, decode_ms in ((BUSY_MS / 2, BUSY_MS), (BUSY_MS, BUSY_MS / 2)):
                with self.subTest(lane=lane, prefill_ms=prefill_ms):
                    prefill.tell("fill", OLD)
                    decode = self.decode(lane)
                    decode.prepare(LATER)
                    prefill.tell("compute", COMPUTED, prefill_ms)
                    decode.compute(LATER, decode_ms)
                    key = f"{lane} {prefill_ms}"
                    prefill.tell("hold", key, SOURCES)
                    job = decode.pull(key, prefill.port, TARGETS)
                    self.assert_arrives(decode, job, lane)
                    self.assert_holds(decode, SOURCES, TARGETS, before=LATER)

    def test_layers_arrive_wave_by_wave_while_prefill_computes_chunk_after_chunk(self) -> None:
        prefill = self.prefill()
        for lane in lanes():
            with self.subTest(lane=lane):
                prefill.tell("fill", OLD)
                decode = self.decode(lane)
                first, second = SOURCES[:2], SOURCES[2:]
                prefill.tell("offer", lane, first, len(SOURCES))
                prefill.tell("compute_layers", lane, COMPUTED, 0, first, BUSY_MS / 8)
                prefill.tell("extend", lane, second)
                prefill.tell("compute_layers", lane, COMPUTED, len(first), second, BUSY_MS / 8)
                job = decode.pull(lane, prefill.port, TARGETS)
                self.assertTrue(prefill.tell("is_busy"), "the stream was done before decode asked: no test")
                self.assert_arrives(decode, job, lane)
                self.assertFalse(prefill.tell("is_busy"), "complete before the last layer was")
                self.assert_holds(decode, SOURCES, TARGETS)

    def test_layers_move_before_the_last_one_is_computed(self) -> None:
        prefill = self.prefill()
        for lane in lanes():
            with self.subTest(lane=lane):
                prefill.tell("fill", OLD)
                decode = self.decode(lane)
                self.meet(prefill, decode, lane)
                prefill.tell("offer", lane, SOURCES)
                prefill.tell("compute_layers", lane, COMPUTED, 0, SOURCES, BUSY_MS / 2)
                job = decode.pull(lane, prefill.port, TARGETS)
                self.assertEqual(self.until_bytes_move(decode), [lane])
                self.assertTrue(prefill.tell("is_busy"), "nothing moved before the last layer was computed")
                self.assert_arrives(decode, job, lane)
                self.assert_holds(decode, SOURCES, TARGETS)


class SlowWork(Claims):
    def test_slow_work_keeps_a_stream_busy_for_most_of_the_time_that_is_asked(self) -> None:
        """What the claims above rest on."""
        stream = driver().stream()
        for work in (slow_work(driver()), chain_of_copies(driver())):
            with self.subTest(work=work.name):
                started_s = time.monotonic()
                work.put(stream, BUSY_MS / 1000)
                end = stream.mark()
                self.assertFalse(end.is_over())
                end.wait()
                taken_s = time.monotonic() - started_s
                self.assertGreater(taken_s, BUSY_MS / 1000 / 2)
                self.assertLess(taken_s, BUSY_MS / 1000 * 8)


if __name__ == "__main__":
    unittest.main()
