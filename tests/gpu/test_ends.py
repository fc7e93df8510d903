"""Risk: a pull that ends badly counts, never ends, or writes blocks that are somebody else's by then."""

import random
import time
import unittest

from claims import BUSY_MS, COMPUTED, LANES, LATER, OLD, Claims
from driver import driver
from peer import Peer
from side import Side

SOURCES, TARGETS = list(range(20, 36)), list(reversed(range(40, 56)))
#: Ends of pulls that are not the test's wish. What is "done" had a deadline to come.
ROUNDS = 12
#: After it nothing is on its way that was not told.
AFTERWARDS_S = 0.1


class Ends(Claims):
    def assert_nothing_is_written_any_more(self, prefill: Peer, decode: Side) -> None:
        """A pull has ended, so its blocks are given to somebody else."""
        decode.fill(LATER)
        prefill.tell("rest")
        time.sleep(AFTERWARDS_S)
        self.assert_holds(decode, before=LATER)

    def test_a_pull_that_waits_for_prefills_stream_ends_when_it_is_cancelled(self) -> None:
        for lane in LANES:
            with self.subTest(lane=lane):
                prefill, decode = self.prefill(), self.decode(lane)
                prefill.tell("compute", COMPUTED, BUSY_MS)
                prefill.tell("hold", "request", SOURCES)
                job = decode.pull("request", prefill.port, TARGETS)
                time.sleep(BUSY_MS / 8000)
                decode.worker.cancel(job)
                self.assertEqual(self.outcome(decode, job), "cancelled")
                self.assertTrue(prefill.tell("is_busy"), "cancelled only when prefill's stream was done")
                self.assert_nothing_is_written_any_more(prefill, decode)

    def test_a_pull_that_waits_for_decodes_stream_ends_when_it_is_cancelled_or_late(self) -> None:
        for lane in LANES:
            with self.subTest(lane=lane):
                prefill, decode = self.prefill(), self.decode(lane)
                prefill.tell("hold", "request", SOURCES)
                decode.prepare(LATER)
                decode.compute(LATER, BUSY_MS)
                cancelled = decode.pull("request", prefill.port, TARGETS)
                late = decode.pull("other", prefill.port, TARGETS, timeout_ms=BUSY_MS // 8)
                decode.worker.cancel(cancelled)
                self.assertEqual(self.outcome(decode, cancelled), "cancelled")
                self.assertEqual(self.outcome(decode, late), "timeout")
                self.assertTrue(decode.is_busy(), "ended only when the stream was done")
                decode.rest()
                time.sleep(AFTERWARDS_S)
                self.assert_holds(decode, before=LATER)

    def test_a_pull_ends_at_its_deadline(self) -> None:
        for lane in LANES:
            with self.subTest(lane=lane):
                prefill, decode = self.prefill(), self.decode(lane)
                prefill.tell("compute", COMPUTED, BUSY_MS)
                prefill.tell("hold", "request", SOURCES)
                job = decode.pull("request", prefill.port, TARGETS, timeout_ms=BUSY_MS // 4)
                self.assertEqual(self.outcome(decode, job), "timeout")
                self.assertTrue(prefill.tell("is_busy"), "ended only when prefill's stream was done")
                self.assert_nothing_is_written_any_more(prefill, decode)

    def test_pulls_that_are_cancelled_in_the_middle_write_nothing_afterwards(self) -> None:
        seeded = random.Random(4)
        for lane in LANES:
            prefill, decode = self.prefill(), self.decode(lane)
            ends = []
            for number in range(ROUNDS):
                with self.subTest(lane=lane, number=number):
                    key, layer_ms = f"request {number}", 10
                    decode.fill(OLD)
                    prefill.tell("offer", key, SOURCES)
                    prefill.tell("compute_layers", key, COMPUTED, 0, SOURCES, layer_ms)
                    job = decode.pull(key, prefill.port, TARGETS)
                    time.sleep(seeded.uniform(0, 1.5 * layer_ms * decode.layout.layers) / 1000)
                    decode.worker.cancel(job)
                    ends.append(self.outcome(decode, job))
                    self.assertIn(ends[-1], ("cancelled", "done"))
                    self.assert_nothing_is_written_any_more(prefill, decode)
                    prefill.tell("revoke", key)
            self.assertIn("cancelled", ends, "every one was done before: no test")

    def test_a_prompt_that_prefill_took_back_never_counts(self) -> None:
        for lane in LANES:
            with self.subTest(lane=lane):
                prefill, decode = self.prefill(seed=OLD), self.decode(lane)
                prefill.tell("prepare", COMPUTED)
                prefill.tell("prepare", LATER)
                prefill.tell("compute", COMPUTED, BUSY_MS)
                prefill.tell("offer", "request", SOURCES)
                prefill.tell("progress", "request", len(SOURCES))
                job = decode.pull("request", prefill.port, TARGETS, timeout_ms=4 * BUSY_MS)
                # Preempted before the stream came to it; others write the blocks.
                prefill.tell("revoke", "request")
                prefill.tell("compute", LATER)
                self.assertNotEqual(self.outcome(decode, job), "done")
                # Begun anew in other blocks, where nothing has been computed yet.
                again = TARGETS
                prefill.tell("compute", COMPUTED, BUSY_MS)
                prefill.tell("offer", "request", again)
                job = decode.pull("request", prefill.port, TARGETS)
                prefill.tell("progress", "request", len(again))
                self.assert_arrives(decode, job, lane)
                self.assertFalse(prefill.tell("is_busy"), "told of what was computed for the lost one")
                self.assert_holds(decode, again, TARGETS)

    def test_a_prompt_that_is_taken_back_while_it_is_read_counts_only_with_its_own_bytes(self) -> None:
        seeded = random.Random(5)
        for lane in LANES:
            # The stand-in takes a step that overwrites what prefill still sends for misuse. It is none, since decode
            # asks afterwards whether the bytes counted; so there nothing is overwritten on that lane.
            is_overwritten = lane != "tcp" or not driver().is_stand_in
            prefill, decode = self.prefill(), self.decode(lane)
            prefill.tell("prepare", LATER)
            prefill.tell("hold", "first", SOURCES)
            self.assert_arrives(decode, decode.pull("first", prefill.port, TARGETS), lane)
            pull_s = self.seconds_of_a_pull(prefill, decode)
            for number in range(ROUNDS):
                with self.subTest(lane=lane, number=number):
                    key = f"request {number}"
                    decode.fill(OLD)
                    prefill.tell("fill", COMPUTED)
                    prefill.tell("hold", key, SOURCES)
                    job = decode.pull(key, prefill.port, TARGETS)
                    time.sleep(seeded.uniform(0, 1.2 * pull_s))
                    prefill.tell("revoke", key)
                    if is_overwritten:
                        prefill.tell("compute", LATER)
                    if self.outcome(decode, job) == "done":
                        self.assert_holds(decode, SOURCES, TARGETS)
                    prefill.tell("rest")

    def seconds_of_a_pull(self, prefill: Peer, decode: Side) -> float:
        prefill.tell("hold", "timed", SOURCES)
        started_s = time.monotonic()
        self.assert_arrives(decode, decode.pull("timed", prefill.port, TARGETS))
        return time.monotonic() - started_s

    def test_a_prefill_that_stands_still_ends_a_pull_at_its_deadline_and_writes_nothing_later(self) -> None:
        for lane in LANES:
            with self.subTest(lane=lane):
                prefill, decode = self.prefill(), self.decode(lane)
                prefill.tell("hold", "first", SOURCES)
                self.assert_arrives(decode, decode.pull("first", prefill.port, TARGETS), lane)
                decode.fill(OLD)
                prefill.tell("hold", "second", SOURCES)
                with prefill.stopped():
                    started_s = time.monotonic()
                    job = decode.pull("second", prefill.port, TARGETS, timeout_ms=BUSY_MS)
                    self.assertNotEqual(self.outcome(decode, job), "done")
                    self.assertLess(time.monotonic() - started_s, 5)
                    decode.fill(LATER)
                self.assert_nothing_is_written_any_more(prefill, decode)


if __name__ == "__main__":
    unittest.main()
