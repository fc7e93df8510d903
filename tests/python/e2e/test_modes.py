"""Risk: a mode of vLLM (chunked prefill, prefix caching, async or sync load) reads a block that is not there yet, one
too few or one too many. Every prompt length around a block border goes through every mode."""

import itertools
import json
import os

import pytest

from conftest import ask, expected_external
from settings import BLOCK_TOKENS, LENGTHS_TOKENS
from support.places import remove_store
from support.tiny_model import tiny_model

# prefill chunked, prefill prefix caching, decode chunked, decode prefix caching, sync load. The short list meets every
# pair of values of every two factors; the soak runs all combinations.
PAIRWISE = [
    (False, False, False, False, False),
    (False, True, True, True, True),
    (True, False, True, False, True),
    (True, True, False, True, False),
    (True, False, False, True, True),
    (False, True, True, False, False),
]
MODES = list(itertools.product((False, True), repeat=5)) if os.environ.get("KVLANE_SOAK") == "1" else PAIRWISE


def mode_name(mode):
    parts = ("prefill-chunked", "prefill-cached", "decode-chunked", "decode-cached", "sync-load")
    return "+".join(part for part, on in zip(parts, mode, strict=True) if on) or "plain"


@pytest.mark.parametrize("mode", MODES, ids=mode_name)
def test_every_prompt_length_gives_the_single_engines_answer(pair, prompts, mode):
    prefill_chunked, prefill_cached, decode_chunked, decode_cached, sync = mode
    pair.open(
        prefill={"chunked": prefill_chunked, "prefix_caching": prefill_cached},
        decode={"chunked": decode_chunked, "prefix_caching": decode_cached},
        options={"sync_load": sync},
    )
    requests = [ask(name, prompts.tokens(count)) for name, count in LENGTHS_TOKENS.items()]
    for request in requests:
        answers, external_tokens = pair.hand_over([request])
        wanted = expected_external(request["prompt"])
        assert external_tokens == wanted, f"{request['id']}: vLLM counted {external_tokens}, not {wanted}"
        assert answers[request["id"]]["cached_tokens"] == wanted
        pair.assert_like_single([request], answers)

    # The same again: what decode cached itself must not be loaded a second time, and must still be right.
    answers, external_tokens = pair.decode_only(requests)
    assert external_tokens == (0 if decode_cached else sum(expected_external(r["prompt"]) for r in requests))
    pair.assert_like_single(requests, answers)


WAYS = {
    "layers-one-by-one": {"sync_load": True, "layerwise_load": True},
    "block-outermost": {"block_outermost_layout": True},
    "disk-without-checksums": {"medium": "disk", "verify": False},
    "one-thread": {"io_threads": 1},
}


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS.keys())
def test_every_way_of_moving_blocks_gives_the_single_engines_answer(pair, prompts, options):
    pair.open(prefill={"chunked": True}, options=options)
    requests = [ask(f"{count} tokens", prompts.tokens(count)) for count in (7 * BLOCK_TOKENS + 5, 2003)]
    answers, external_tokens = pair.hand_over(requests)
    assert external_tokens == sum(expected_external(request["prompt"]) for request in requests)
    pair.assert_like_single(requests, answers)


def test_workers_name_their_attention_backend(pair):
    """The order of a block's bytes depends on it, and strides do not always show it."""
    pair.open()
    descriptors = (pair.store / "kvlane" / "descriptors").glob("*.json")
    names = {json.loads(path.read_text())["facts"]["attention"] for path in descriptors}
    assert len(names) == 1
    assert names.pop() not in ("", "unknown")


def test_prefixes_cached_on_decode_are_not_loaded_again(pair, prompts):
    """Local hit of 3 blocks, 7 more from the store, the rest computed."""
    pair.open(decode={"prefix_caching": True})
    prompt = prompts.tokens(10 * BLOCK_TOKENS + 7)
    pair.decode.run([ask("local", prompt[: 3 * BLOCK_TOKENS + 1])])
    answers, external_tokens = pair.hand_over([ask("whole", prompt)])
    assert external_tokens == 7 * BLOCK_TOKENS
    assert answers["whole"]["cached_tokens"] == 10 * BLOCK_TOKENS
    pair.assert_like_single([ask("whole", prompt)], answers)


def test_prefixes_cached_on_prefill_reach_the_store(pair, prompts):
    """Prefill computes only the tail of the second prompt, decode needs all of it."""
    pair.open(prefill={"prefix_caching": True})
    head = prompts.tokens(6 * BLOCK_TOKENS)
    pair.prefill.run([ask("head", head + prompts.tokens(9), max_tokens=1)])
    request = ask("tail", head + prompts.tokens(3 * BLOCK_TOKENS + 2))
    answers, external_tokens = pair.hand_over([request])
    assert external_tokens == 9 * BLOCK_TOKENS
    pair.assert_like_single([request], answers)


def test_an_empty_store_counts_zero(pair_alone, prompts):
    """Negative control of every other count: with the store removed nothing is external, and answers stay right."""
    pair = pair_alone
    pair.open()
    request = ask("control", prompts.tokens(10 * BLOCK_TOKENS + 5))
    answers, external_tokens = pair.hand_over([request])
    assert external_tokens == 10 * BLOCK_TOKENS

    pair.close()
    remove_store(pair.store)
    pair.store.mkdir()
    pair.open()
    answers, external_tokens = pair.decode_only([request])
    assert external_tokens == 0
    assert answers["control"]["cached_tokens"] == 0
    pair.assert_like_single([request], answers)


def test_bfloat16_gives_the_same_first_token(pair, prompts):
    pair.model = tiny_model("bfloat16")
    pair.open(prefill={"dtype": "bfloat16"}, decode={"dtype": "bfloat16"})
    for count in (4 * BLOCK_TOKENS + 5, 2003):
        request = ask(f"{count} tokens", prompts.tokens(count))
        answers, external_tokens = pair.hand_over([request])
        assert external_tokens == expected_external(request["prompt"])
        pair.assert_like_single([request], answers)
