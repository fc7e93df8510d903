"""Risk: where blocks have other sizes on the two sides, or ranks other heads, tokens or heads get mixed up."""

import random
import unittest

from claims import COMPUTED, OLD, Claims
from layouts import LAYOUTS, Image, Layout, difference, image
from side import Cache, lanes

#: Tokens of a block of prefill and of decode.
SIZES = [(32, 16), (16, 32), (24, 16)]
PROMPT_BLOCKS = 6
FORMS = ["blocks outermost", "K and V outermost", "heads before tokens", "MLA", "all layers of a block in one page"]


def with_tokens(
    theirs: Layout, own: Cache, sources: list[int], targets: list[int], first_head: int, tokens: range
) -> Image:
    """Decode's image with `tokens` of a prompt from prefill's: the blocks of both, each from the prompt's first one on.
    ``first_head``: decode's, of prefill's."""
    content, expected = image(theirs, COMPUTED), [bytearray(part) for part in image(own.layout, OLD)]
    for layer in range(own.layout.layers):
        (from_allocation, from_start), (to_allocation, to_start) = theirs.place(layer), own.layout.place(layer)
        found = {
            (half, index * theirs.block_tokens + token, head): from_start + at
            for index, block in enumerate(sources)
            for (half, token, head), at in theirs.rows(block)
        }
        for index, block in enumerate(targets):
            for (half, token, head), at in own.layout.rows(block):
                number = index * own.layout.block_tokens + token
                if number in tokens:
                    there = found[half, number, head + first_head]
                    row = content[from_allocation][there : there + theirs.row_bytes]
                    expected[to_allocation][to_start + at : to_start + at + len(row)] = row
    return [bytes(part) for part in expected]


class Unequal(Claims):
    def check(self, form: str, theirs: dict[str, int], own: dict[str, int], first_head: int = 0) -> None:
        prefill = self.prefill(form, first_head=0, **theirs)
        layout = Layout(**vars(LAYOUTS[form]) | theirs)
        places = random.Random(f"{form} {theirs} {own}")
        for lane in lanes():
            with self.subTest(form=form, lane=lane, theirs=theirs, own=own):
                decode = self.decode(lane, form, first_head=first_head, **own)
                own_tokens = decode.layout.block_tokens
                sources = places.sample(range(layout.blocks), PROMPT_BLOCKS)
                tokens = PROMPT_BLOCKS * layout.block_tokens
                blocks = -(-tokens // own_tokens)
                first = places.randrange(1, blocks - 1)
                targets = places.sample(range(decode.layout.blocks), blocks)
                prefill.tell("hold", lane, sources)
                job = decode.pull(lane, prefill.port, targets[first:], first, tokens=tokens)
                self.assert_arrives(decode, job, lane)
                pulled = range(first * own_tokens, tokens)
                expected = with_tokens(layout, decode, sources, targets, first_head, pulled)
                wrong = difference(decode.layout, decode.content(), expected)
                self.assertIsNone(wrong, wrong)
                self.until(lambda lane=lane: lane in prefill.tell("released"), "a hold without an end")

    def test_blocks_of_other_sizes_meet_token_by_token(self) -> None:
        for form in FORMS:
            for theirs, own in SIZES:
                self.check(form, {"block_tokens": theirs}, {"block_tokens": own})

    def test_a_rank_takes_its_own_heads_of_a_rank_that_has_more(self) -> None:
        for form in FORMS:
            if "H" in LAYOUTS[form].logical:
                self.check(form, {"heads": 4}, {"heads": 2}, first_head=2)
                self.check(form, {"heads": 4, "block_tokens": 32}, {"heads": 1}, first_head=1)


if __name__ == "__main__":
    unittest.main()
