"""Risk: the demo ends well although an answer is wrong or nothing came over the folder, and a newcomer believes it."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

from support.client import Completion

DEMO = SimpleNamespace(**runpy.run_path(str(Path(__file__).resolve().parents[3] / "examples/demo.py"), run_name="demo"))
PROMPT = list(range(4 * DEMO.BLOCK_TOKENS + 5))
WHOLE_BLOCKS_TOKENS = 4 * DEMO.BLOCK_TOKENS


def completion(text="a b", tokens=("token_id:1", "token_id:2"), logprobs=(-0.25, -1.5), ttft_s=0.1):
    return Completion(
        ttft_s=ttft_s, tokens=[list(tokens)], logprobs=[list(logprobs)], texts=[text], finish_reasons=["length"]
    )


def answer(handed_over=None, external_tokens=WHOLE_BLOCKS_TOKENS, single=None):
    """What the demo keeps of one prompt: through the proxy, then of decode alone, then of the single server."""
    pair = (handed_over or completion(), external_tokens, completion(ttft_s=0.02))
    return PROMPT, pair, single or completion(ttft_s=0.3)


def row_of(*answers):
    return DEMO.make_row(answers)


def test_equal_answers_pass_and_fill_every_field_of_the_row():
    row = row_of(answer(completion(ttft_s=0.1)), answer(completion(ttft_s=0.5)), answer(completion(ttft_s=0.2)))
    assert {name: value for name, value in row.items() if not name.startswith("_")} == {
        "prompt_tokens": len(PROMPT),
        "external_tokens": WHOLE_BLOCKS_TOKENS,
        "ttft_ms": 200.0,
        "single_ttft_ms": 300.0,
        "text_equal": True,
        "max_logprob_diff": 0.0,
    }
    assert DEMO.verdict([row, row]) == 0


def test_a_prompt_shorter_than_a_block_passes_with_nothing_from_the_folder():
    short = (PROMPT[:20], *answer(external_tokens=0)[1:])
    assert DEMO.verdict([row_of(short)]) == 0


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        (answer(completion(text="a c")), "the text differs"),
        (answer(completion(tokens=("token_id:1", "token_id:3"))), "the text differs"),
        (answer(completion(tokens=("token_id:1",), logprobs=(-0.25,))), "the text differs"),
        (answer(completion(logprobs=(-0.25, -1.502))), "log-probabilities differ by 0.002"),
        (answer(external_tokens=0), f"KV of 0 tokens came over the folder, {WHOLE_BLOCKS_TOKENS} expected"),
        (answer(external_tokens=WHOLE_BLOCKS_TOKENS - DEMO.BLOCK_TOKENS), "tokens came over the folder"),
        (answer(external_tokens=WHOLE_BLOCKS_TOKENS + DEMO.BLOCK_TOKENS), "tokens came over the folder"),
    ],
    ids=["text", "token", "shorter", "logprob", "nothing external", "a block too few", "a block too many"],
)
def test_one_wrong_answer_among_good_ones_fails_and_is_named(capsys, wrong, complaint):
    good = answer()
    # Among good ones of its own length, and among good rows.
    assert DEMO.verdict([row_of(good, good, good), row_of(good, wrong, good)]) == 1
    assert complaint in capsys.readouterr().out
