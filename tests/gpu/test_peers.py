"""Risk: a prefill server that dies, or one without the forced lane, stops decode, or leaves memory behind."""

import os
import unittest

from claims import BUSY_MS, COMPUTED, LAYOUT, Claims, LogLines
from driver import driver
from peer import Peer
from side import Side, lanes

SOURCES, TARGETS = [3, 40, 4, 17], [7, 1, 2, 33]
#: Blocks of a cache that is large beside whatever else a device does meanwhile: 512 MiB on a GPU.
LARGE_BLOCKS = 8192


class Death(Claims):
    def test_prefill_killed_in_the_middle_ends_the_pull_and_the_next_prefill_of_its_address_serves(self) -> None:
        for lane in lanes():
            with self.subTest(lane=lane):
                prefill, decode = self.prefill(), self.decode(lane)
                self.meet(prefill, decode, lane)
                prefill.tell("offer", "request", SOURCES)
                prefill.tell("compute_layers", "request", COMPUTED, 0, SOURCES, BUSY_MS / 2)
                job = decode.pull("request", prefill.port, TARGETS)
                self.until_bytes_move(decode)
                self.assertTrue(prefill.tell("is_busy"), "the stream was done before prefill died: no test")
                prefill.kill()
                self.assertNotEqual(self.outcome(decode, job), "done")
                again = self.prefill(port=prefill.port)
                self.assertEqual(again.port, prefill.port)
                again.tell("hold", "request", SOURCES)
                self.until_arrives(decode, again)
                self.assert_holds(decode, SOURCES, TARGETS)

    def until_arrives(self, decode: Side, prefill: Peer) -> None:
        """The first tries may still end with what is known of the dead one."""

        def arrives() -> bool:
            return self.outcome(decode, decode.pull("request", prefill.port, TARGETS)) == "done"

        self.until(arrives, "decode does not find the new prefill")

    def test_decode_with_two_prefills_loses_only_what_was_on_the_one_that_dies(self) -> None:
        for lane in lanes():
            with self.subTest(lane=lane):
                dies, stays, decode = self.prefill(), self.prefill(), self.decode(lane)
                for prefill in (dies, stays):
                    prefill.tell("compute", COMPUTED, BUSY_MS)
                    prefill.tell("hold", "request", SOURCES)
                lost = decode.pull("request", dies.port, [50, 51, 52, 53])
                kept = decode.pull("request", stays.port, TARGETS)
                dies.kill()
                self.assertNotEqual(self.outcome(decode, lost), "done")
                self.assert_arrives(decode, kept, lane)
                self.assert_holds(decode, SOURCES, TARGETS)

    def test_decode_killed_in_the_middle_leaves_prefill_at_work_for_others(self) -> None:
        prefill = self.prefill()
        for lane in lanes():
            with self.subTest(lane=lane):
                dies, stays = Peer(False, LAYOUT, lane), self.decode(lane)
                self.addCleanup(self._end, dies)
                for key in (lane, f"{lane} other"):
                    prefill.tell("offer", key, SOURCES)
                    prefill.tell("compute_layers", key, COMPUTED, 0, SOURCES, BUSY_MS / 8)
                dies.tell("pull", lane, prefill.port, TARGETS)
                job = stays.pull(f"{lane} other", prefill.port, TARGETS)
                dies.kill()
                self.assertTrue(prefill.tell("is_busy"), "the stream was done before decode died: no test")
                self.assert_arrives(stays, job, lane)
                self.assert_holds(stays, SOURCES, TARGETS)

    def test_the_memory_of_a_dead_prefill_is_let_go_of_by_a_decode_that_does_nothing(self) -> None:
        """Decode in a process of its own, so that all that it maps is this prefill's."""
        blocks = 64 if driver().is_stand_in else LARGE_BLOCKS
        decode = Peer(False, LAYOUT, "cuda")
        self.addCleanup(self._end, decode)
        decode.tell("fill", 2)
        free_before = decode.tell("free_bytes")
        prefill = Peer(True, LAYOUT, blocks=blocks)
        self.addCleanup(self._end, prefill)
        prefill.tell("compute", COMPUTED, 0, SOURCES)
        prefill.tell("hold", "request", SOURCES)
        job = decode.tell("pull", "request", prefill.port, TARGETS)
        self.assertEqual(decode.tell("outcome", job), "done")
        if free_before is None:
            opened = decode.tell("count_of", "cuIpcOpenMemHandle_v2")
            self.assertGreater(opened, 0)
            self.assertEqual(decode.tell("count_of", "cuIpcCloseMemHandle"), 0)
        prefill.kill()

        def is_let_go() -> bool:
            if free_before is None:
                return decode.tell("count_of", "cuIpcCloseMemHandle") == opened
            # Half of the dead one's cache would be missing.
            return decode.tell("free_bytes") > free_before - blocks * (64 << 10) // 2

        self.until(is_let_go, "the memory of a dead process is kept")


class Forced(Claims):
    def refused(self, prefill: Peer, lane: str, outcome: str, text: str) -> None:
        """A pull over a lane that is not possible ends so, with a line that has the text."""
        decode = self.decode(lane)
        prefill.tell("hold", f"request {lane}", SOURCES)
        with LogLines() as log:
            job = decode.pull(f"request {lane}", prefill.port, TARGETS)
            self.assertEqual(self.outcome(decode, job), outcome, lane)
            self.until(lambda: log.have(text), f"no line '{text}' was said")
        self.assertEqual(decode.lanes(), [])
        self.assert_holds(decode)

    def served(self, prefill: Peer, lane: str, used: str) -> None:
        decode = self.decode(lane)
        prefill.tell("hold", "request", SOURCES)
        self.assert_arrives(decode, decode.pull("request", prefill.port, TARGETS), used)
        self.assert_holds(decode, SOURCES, TARGETS)

    def next_best(self) -> str:
        """Where memory cannot be mapped. NCCL itself refuses two ends in one process, its stand-in does not."""
        return "nccl" if driver().is_stand_in and "nccl" in lanes() else "tcp"

    def test_automatic_is_the_lane_between_devices(self) -> None:
        self.served(self.prefill(), "auto", "cuda")

    def test_what_prefill_does_not_allow_is_refused_with_a_sentence_if_forced_and_else_goes_over_tcp(
        self,
    ) -> None:
        prefill = self.prefill(lane="tcp")
        self.refused(prefill, "cuda", "refused", "nothing can be pulled from this prefill server")
        self.served(prefill, "auto", "tcp")

    def test_shared_memory_of_the_host_is_refused_for_a_cache_on_a_device(self) -> None:
        self.refused(self.prefill(), "shm", "refused", "nothing can be pulled from this prefill server")

    def test_memory_that_cannot_be_mapped_goes_over_tcp_and_fails_with_a_sentence_if_cuda_is_forced(self) -> None:
        """Both workers in one process, where CUDA opens no handles of its own."""
        prefill = Side(True, LAYOUT)
        self.addCleanup(prefill.close)
        prefill.fill(COMPUTED)
        prefill.hold("request", SOURCES)
        decode = self.decode("cuda")
        with LogLines() as log:
            job = decode.pull("request", prefill.worker.port, TARGETS)
            self.assertNotEqual(self.outcome(decode, job), "done")
            self.until(lambda: log.have("blocks did not arrive"), "no line was said")
        self.assertEqual(decode.lanes(), [])
        self.assert_holds(decode)
        prefill.hold("other", SOURCES)
        decode = self.decode("auto")
        with LogLines() as log:
            self.assert_arrives(decode, decode.pull("other", prefill.worker.port, TARGETS), self.next_best())
            self.until(lambda: log.have(f"lane {self.next_best()} instead of cuda"), "no line was said")
        self.assert_holds(decode, SOURCES, TARGETS)

    def test_memory_that_cannot_be_shared_is_not_offered(self) -> None:
        if not driver().is_stand_in:
            self.skipTest("only the stand-in can be told to refuse")
        os.environ["KVLANE_CUDA_STAND_IN_FAIL"] = "cuIpcGetMemHandle:0:801"
        try:
            prefill = self.prefill()
        finally:
            del os.environ["KVLANE_CUDA_STAND_IN_FAIL"]
        self.refused(prefill, "cuda", "refused", "nothing can be pulled from this prefill server")
        self.served(prefill, "auto", self.next_best())


if __name__ == "__main__":
    unittest.main()
