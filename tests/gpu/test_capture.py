"""Risk: kvlane's threads call the driver while the engine captures a graph. Most calls then fail, and spoil it."""

import ctypes
import unittest

from claims import Claims
from driver import GLOBAL_CAPTURE, DriverError, driver
from peer import Peer
from side import Side, lanes

SOURCES, TARGETS = [3, 40, 4, 17], [7, 1, 2, 33]


class Capture(Claims):
    def begin(self, prefill: Peer, decode: Side, lane: str) -> None:
        """NCCL makes a communicator on a thread of its own, which spoils graphs: until then nothing can be promised."""
        if lane == "nccl":
            self.meet(prefill, decode, lane)

    def test_a_first_pull_moves_while_decode_captures_a_graph_and_the_graph_is_whole(self) -> None:
        for lane in lanes():
            with self.subTest(lane=lane):
                prefill, decode = self.prefill(), self.decode(lane)
                self.begin(prefill, decode, lane)
                prefill.tell("hold", "request", SOURCES)
                decode.begin_capture()
                outcome = decode.outcome(decode.pull("request", prefill.port, TARGETS))
                decode.end_capture()
                self.assertEqual(outcome, "done")
                self.assertEqual(decode.lanes(), [lane])
                self.assert_holds(decode, SOURCES, TARGETS)

    def test_a_first_pull_moves_while_prefill_captures_a_graph_and_the_graph_is_whole(self) -> None:
        for lane in lanes():
            with self.subTest(lane=lane):
                prefill, decode = self.prefill(), self.decode(lane)
                self.begin(prefill, decode, lane)
                prefill.tell("begin_capture")
                prefill.tell("hold", "request", SOURCES)
                outcome = decode.outcome(decode.pull("request", prefill.port, TARGETS))
                prefill.tell("end_capture")
                self.assertEqual(outcome, "done")
                self.assert_holds(decode, SOURCES, TARGETS)


class Control(unittest.TestCase):
    def test_a_call_that_does_not_heed_the_capture_fails_and_spoils_it(self) -> None:
        """The control of the claims: without it they prove nothing."""
        stream, other, graph = driver().stream(), driver().stream(), ctypes.c_void_p()
        mark = other.mark()
        driver().call("cuStreamBeginCapture_v2", stream.handle, GLOBAL_CAPTURE)
        with self.assertRaises(DriverError):
            mark.is_over()
        with self.assertRaises(DriverError):
            driver().call("cuStreamEndCapture", stream.handle, ctypes.byref(graph))


if __name__ == "__main__":
    unittest.main()
