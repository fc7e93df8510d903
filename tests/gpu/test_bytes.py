"""Risk: blocks arrive in the wrong place, with wrong bytes, or beside blocks that were not asked for."""

import random
import unittest
from functools import partial

from claims import COMPUTED, Claims
from driver import driver
from layouts import LAYOUTS
from peer import Peer
from side import Side, lanes

#: So many of them need more memory than there was at first, if one gave nothing back.
PULLS = 40
ADJACENT = list(range(8, 20))
ORDERS = {
    "adjacent": (ADJACENT, list(range(30, 42))),
    "reversed": (ADJACENT, list(reversed(range(30, 42)))),
    "scattered": (random.Random(1).sample(range(64), 12), random.Random(2).sample(range(64), 12)),
    "the last and the first": ([63, 0], [0, 63]),
    "one": ([17], [5]),
}


class Bytes(Claims):
    def check(self, prefill: Peer, decode: Side, lane: str, layout: str | None = None) -> None:
        for order, (sources, targets) in ORDERS.items():
            for first in (0, len(sources) - 1):
                with self.subTest(lane=lane, layout=decode.layout.name, order=order, first=first):
                    key = f"{lane} {order} {first}"
                    prefill.tell("hold", key, sources)
                    decode.fill(2)
                    job = decode.pull(key, prefill.port, targets[first:], first)
                    self.assert_arrives(decode, job, lane)
                    self.assert_holds(decode, sources[first:], targets[first:], layout=layout)
                    self.until(lambda key=key: key in prefill.tell("released"), "a hold without an end")

    def test_whole_prompts_and_tails_have_prefills_bytes_in_every_layout(self) -> None:
        for layout in LAYOUTS:
            prefill = self.prefill(layout)
            for lane in lanes():
                self.check(prefill, self.decode(lane, layout), lane)

    def test_sides_that_cut_their_blocks_into_different_runs_give_right_bytes(self) -> None:
        one_piece, two_pieces = "blocks outermost", "K and V outermost"
        for theirs, own in ((one_piece, two_pieces), (two_pieces, one_piece)):
            prefill = self.prefill(theirs)
            for lane in lanes():
                self.check(prefill, self.decode(lane, own), lane, layout=theirs)

    def test_many_pulls_at_once_do_not_meet(self) -> None:
        places, prefill = random.Random(3), self.prefill()
        for lane in lanes():
            decode = self.decode(lane)
            sources, targets = places.sample(range(64), 60), places.sample(range(64), 60)
            of = {number: slice(number * 5, number * 5 + 5) for number in range(12)}
            for number, part in of.items():
                prefill.tell("hold", f"{lane} {number}", sources[part])
            jobs = [decode.pull(f"{lane} {number}", prefill.port, targets[part]) for number, part in of.items()]
            for job in jobs:
                self.assert_arrives(decode, job)
            self.assertEqual(decode.lanes(), [lane])
            self.assert_holds(decode, sources, targets)

    def test_scattered_blocks_are_launches_and_further_ones_pin_no_further_memory(self) -> None:
        if not driver().is_stand_in:
            self.skipTest("only the stand-in counts calls")
        (sources, targets), prefill = ORDERS["scattered"], self.prefill()
        for lane in lanes():
            with self.subTest(lane=lane):
                decode = self.decode(lane)
                self.meet(prefill, decode, lane)
                sides = [decode.count_of] if lane == "cuda" else [decode.count_of, partial(prefill.tell, "count_of")]
                before = [(count("cuLaunchKernel"), count("cuMemHostAlloc")) for count in sides]
                for number in range(PULLS):
                    prefill.tell("hold", f"{lane} {number}", sources)
                    self.assert_arrives(decode, decode.pull(f"{lane} {number}", prefill.port, targets), lane)
                for count, (launches, pinned) in zip(sides, before, strict=True):
                    self.assertGreaterEqual(count("cuLaunchKernel"), launches + PULLS)
                    self.assertEqual(count("cuMemHostAlloc"), pinned)

    def test_what_decode_expects_is_of_this_seed_and_no_other(self) -> None:
        """The check itself can fail."""
        decode = self.decode("tcp")
        self.assert_holds(decode)
        with self.assertRaises(AssertionError):
            self.assert_holds(decode, [3], [3], seed=COMPUTED)


if __name__ == "__main__":
    unittest.main()
