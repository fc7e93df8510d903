"""Risk: a mode of vLLM (chunked prefill, prefix caching), the order of the two calls, or a lane makes decode read a
block that is not there yet, one too few or one too many. Every prompt length around a block border goes through every
mode."""

import itertools
import os

import pytest

from conftest import ask
from p2p_pair import LANES, expected_cached, expected_whole
from settings import BLOCK_TOKENS, LENGTHS_TOKENS
from support.outcome import whole_prompt_tokens
from support.tiny_model import tiny_model

FACTORS = ("prefill-chunked", "prefill-cached", "decode-chunked", "decode-cached", "at-once", "tcp")
# Meets every pair of values of every two factors; the soak runs all combinations.
PAIRWISE = [
    (False, False, False, False, False, False),
    (True, True, False, False, True, False),
    (True, False, True, False, True, True),
    (True, False, False, True, False, True),
    (False, True, True, True, True, False),
    (False, True, True, True, False, True),
]
MODES = list(itertools.product((False, True), repeat=6)) if os.environ.get("KVLANE_SOAK") == "1" else PAIRWISE


def mode_name(mode):
    return "+".join(factor for factor, on in zip(FACTORS, mode, strict=True) if on) or "plain"


@pytest.mark.parametrize("mode", MODES, ids=mode_name)
def test_every_prompt_length_gives_the_single_engines_answer(p2p_pair, prompts, mode):
    prefill_chunked, prefill_cached, decode_chunked, decode_cached, at_once, tcp = mode
    pair = p2p_pair
    pair.open(
        LANES[tcp],
        prefill={"chunked": prefill_chunked, "prefix_caching": prefill_cached},
        decode={"chunked": decode_chunked, "prefix_caching": decode_cached},
    )
    requests = [ask(name, prompts.tokens(count)) for name, count in LENGTHS_TOKENS.items()]
    for request in requests:
        answers, external_tokens = pair.hand_over([request], at_once)
        wanted = expected_whole([request])
        assert external_tokens == wanted, f"{request['id']}: vLLM counted {external_tokens}, not {wanted}"
        assert answers[request["id"]]["cached_tokens"] == expected_cached(len(request["prompt"]))
        pair.assert_like_single([request], answers)

    # The same again without a prefill server: what was loaded must be right in decode's own cache too.
    answers, external_tokens = pair.decode_alone(requests)
    assert external_tokens == 0
    pair.assert_like_single(requests, answers)
    pair.assert_nothing_is_held()


@pytest.mark.parametrize("lane", LANES)
@pytest.mark.parametrize("at_once", [False, True], ids=["after prefill", "at once"])
def test_eight_requests_together_keep_their_blocks_apart(p2p_pair, prompts, lane, at_once):
    p2p_pair.open(lane, prefill={"chunked": True}, decode={"chunked": True})
    requests = [ask(f"r{i}", prompts.tokens(120 + 61 * i)) for i in range(8)]
    answers, external_tokens = p2p_pair.hand_over(requests, at_once)
    assert external_tokens == expected_whole(requests)
    p2p_pair.assert_like_single(requests, answers)
    p2p_pair.assert_nothing_is_held()


@pytest.mark.parametrize("lane", LANES)
def test_two_choices_with_temperature_and_seed(p2p_pair, prompts, lane):
    p2p_pair.open(lane)
    request = ask("choices", prompts.tokens(5 * BLOCK_TOKENS + 3), n=2, temperature=0.8, seed=4711)
    answers, external_tokens = p2p_pair.hand_over([request])
    assert external_tokens == expected_whole([request])
    p2p_pair.assert_like_single([request], answers)
    first, second = answers["choices"]["choices"]
    assert first["tokens"] != second["tokens"], "both choices drew the same random numbers"


@pytest.mark.parametrize("lane", LANES)
def test_prefixes_cached_on_decode_are_not_pulled_again(p2p_pair, prompts, lane):
    """Local hit of 3 blocks, the rest from prefill, a block that is not full included."""
    p2p_pair.open(lane, decode={"prefix_caching": True})
    prompt = prompts.tokens(10 * BLOCK_TOKENS + 7)
    p2p_pair.decode_alone([ask("local", prompt[: 3 * BLOCK_TOKENS + 1])])
    answers, external_tokens = p2p_pair.hand_over([ask("whole", prompt)])
    assert external_tokens == whole_prompt_tokens(len(prompt), 3 * BLOCK_TOKENS) == 7 * BLOCK_TOKENS + 7
    p2p_pair.assert_like_single([ask("whole", prompt)], answers)
    p2p_pair.assert_nothing_is_held()


@pytest.mark.parametrize("lane", LANES)
def test_a_prompt_that_decode_has_but_for_its_last_token_is_not_pulled_and_its_lease_ends(p2p_pair, prompts, lane):
    p2p_pair.open(lane, decode={"prefix_caching": True})
    prompt = prompts.tokens(4 * BLOCK_TOKENS + 1)
    p2p_pair.decode_alone([ask("local", prompt)])
    answers, external_tokens = p2p_pair.hand_over([ask("again", prompt)])
    assert external_tokens == 0
    p2p_pair.assert_like_single([ask("again", prompt)], answers)
    p2p_pair.assert_nothing_is_held()


def test_prefixes_cached_on_prefill_are_handed_over_too(p2p_pair, prompts):
    p2p_pair.open("shm", prefill={"prefix_caching": True})
    head = prompts.tokens(6 * BLOCK_TOKENS)
    p2p_pair.prefill.run([ask("head", head + prompts.tokens(9), max_tokens=1)])
    request = ask("tail", head + prompts.tokens(3 * BLOCK_TOKENS + 2))
    answers, external_tokens = p2p_pair.hand_over([request])
    assert external_tokens == expected_whole([request])
    p2p_pair.assert_like_single([request], answers)


def test_a_prefill_that_never_comes_counts_zero_and_costs_the_ask_timeout(p2p_pair, prompts):
    """Negative control of every other count."""
    p2p_pair.open("shm", options={"ask_timeout_ms": 700})
    request = ask("control", prompts.tokens(10 * BLOCK_TOKENS + 5))
    answers, external_tokens = p2p_pair.ask_for_what_is_not_coming([request])
    assert external_tokens == 0
    assert answers["control"]["cached_tokens"] == 0
    assert answers["control"]["ttft_s"] < 20
    p2p_pair.assert_like_single([request], answers)


def test_another_prompt_under_the_same_id_is_never_used(p2p_pair, prompts):
    p2p_pair.open("shm", options={"ask_timeout_ms": 700})
    request = ask("asked", prompts.tokens(5 * BLOCK_TOKENS + 5))
    other = prompts.tokens(len(request["prompt"]))
    answers, external_tokens = p2p_pair.hand_over([request], on_prefill={"prompt": other})
    assert external_tokens == 0
    p2p_pair.assert_like_single([request], answers)


@pytest.mark.parametrize("prefix_caching", [False, True], ids=["uncached", "cached"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_an_abort_while_pulling_leaves_nothing_behind(p2p_pair, prompts, steps, prefix_caching):
    """The blocks of an aborted pull are handed to the next request, which must not see the pull writing into them."""
    p2p_pair.open("tcp", decode={"prefix_caching": prefix_caching}, options={"lease_ms": 2_000})
    gone, stays = ask("gone", prompts.tokens(2003)), ask("stays", prompts.tokens(1027))
    answers, _ = p2p_pair.hand_over([{**gone, "abort_after_steps": steps}])
    assert answers["gone"]["aborted"]
    answers, external_tokens = p2p_pair.hand_over([stays])
    assert external_tokens == expected_whole([stays])
    p2p_pair.assert_like_single([stays], answers)
    p2p_pair.assert_nothing_is_held()


@pytest.mark.parametrize("lane", LANES)
def test_preemption_pressure_on_decode(p2p_pair, prompts, lane):
    """So few blocks that running requests are thrown out and come back, with pulls in between."""
    few = {"num_gpu_blocks_override": 22, "max_model_len": 512, "max_num_batched_tokens": 512}
    p2p_pair.open(lane, decode=few)
    requests = [ask(f"r{i}", prompts.tokens(4 * BLOCK_TOKENS + 5 + i), max_tokens=96) for i in range(6)]
    before = p2p_pair.decode.counters()["vllm:num_preemptions"]
    answers, external_tokens = p2p_pair.hand_over(requests)
    assert p2p_pair.decode.counters()["vllm:num_preemptions"] > before, "the test made no pressure"
    # vLLM counts what requests load that come back after a preemption elsewhere.
    assert external_tokens == expected_whole(requests)
    p2p_pair.assert_like_single(requests, answers)
    p2p_pair.assert_nothing_is_held()


@pytest.mark.parametrize("lane", LANES)
def test_preemption_pressure_on_prefill(p2p_pair, prompts, lane):
    """Prompts that are thrown out while decode reads them, or before, cost a recompute and never an answer."""
    few = {"num_gpu_blocks_override": 24, "max_model_len": 512, "max_num_batched_tokens": 64, "chunked": True}
    p2p_pair.open(lane, prefill=few)
    requests = [ask(f"r{i}", prompts.tokens(4 * BLOCK_TOKENS + 5 + i)) for i in range(6)]
    before = p2p_pair.prefill.counters()["vllm:num_preemptions"]
    answers, external_tokens = p2p_pair.hand_over(requests, at_once=True, on_prefill={"max_tokens": 64})
    assert p2p_pair.prefill.counters()["vllm:num_preemptions"] > before, "the test made no pressure"
    assert 0 < external_tokens <= expected_whole(requests)
    p2p_pair.assert_like_single(requests, answers)
    p2p_pair.assert_nothing_is_held()


def test_bfloat16_gives_the_same_first_token(p2p_pair, prompts):
    p2p_pair.model = tiny_model("bfloat16")
    p2p_pair.open("shm", prefill={"dtype": "bfloat16"}, decode={"dtype": "bfloat16"})
    for count in (4 * BLOCK_TOKENS + 5, 2003):
        request = ask(f"{count} tokens", prompts.tokens(count))
        answers, external_tokens = p2p_pair.hand_over([request])
        assert external_tokens == expected_whole([request])
        p2p_pair.assert_like_single([request], answers)
