"""Risk: the connector and the native backend understand their contract differently."""

import pytest

from kvlane import _native
from paper_engine import BLOCK_TOKENS
from paper_model import expected_tokens
from paper_pair import PaperPair, request_id

pytestmark = pytest.mark.skipif(
    not hasattr(_native, "P2pWorker"), reason="NOT RUN: native P2P backend: this native module was built without it"
)

STEPS = 40_000  # half a millisecond each, at least


@pytest.fixture(params=["shm", "tcp"])
def pair(request):
    # Nothing here waits for a deadline. One that did would not end within the steps.
    patient = dict.fromkeys(("peer_timeout_ms", "ask_timeout_ms", "lease_ms"), 600_000)
    with PaperPair(None, lane=request.param, prefill={"step_tokens": 24}, **patient) as made:
        yield made


@pytest.mark.parametrize("order", ["prefill first", "both at once", "decode first"])
def test_every_length_is_handed_over_whole(pair, prompts, order):
    for tokens in (1, 2, 15, 16, 17, 33, 100, 150):
        prompt, name = prompts(tokens), f"u{tokens}"
        if order != "decode first":
            pair.ask_prefill(name, prompt)
        if order == "prefill first":
            pair.prefill.run()
        own_id = pair.ask_decode(name, prompt)
        if order == "decode first":
            for _ in range(5):
                pair.decode.step()
            pair.ask_prefill(name, prompt)
        pair.run(STEPS)
        assert pair.decode.answers[own_id] == expected_tokens(prompt, 8)
        assert pair.decode.loaded_tokens[own_id] == (tokens if tokens > 1 else 0)
    assert pair.settle()


def test_a_local_hit_and_an_abort_free_prefill(pair, prompts):
    prompt = prompts(4 * BLOCK_TOKENS + 1)
    pair.answer("u1", prompt)
    assert pair.answer("u2", prompt) == expected_tokens(prompt, 8)
    assert pair.decode.loaded_tokens[request_id("u2", side="decode")] == 0
    longer = prompts(100)
    pair.ask_prefill("u3", longer)
    pair.prefill.run()
    pair.ask_decode("u3", longer)
    for _ in range(3):
        pair.decode.step()
    pair.decode.abort(request_id("u3", side="decode"))
    pair.decode.step()  # vLLM runs a step for requests that have ended, so that the workers hear of it
    assert pair.settle()


def test_another_prompt_under_the_same_key_is_not_used(pair, prompts):
    first, second = prompts(60), prompts(60)
    pair.ask_prefill("u1", first)
    pair.prefill.run()
    own_id = pair.ask_decode("u1", second)
    pair.run(STEPS)
    assert pair.decode.answers[own_id] == expected_tokens(second, 8)
    assert pair.decode.loads[own_id] == 0


def test_a_prefill_server_that_is_gone_costs_a_recompute(pair, prompts):
    prompt = prompts(100)
    pair.ask_prefill("u1", prompt)
    pair.prefill.run()
    pair.prefill.worker.shutdown()
    own_id = pair.ask_decode("u1", prompt)
    pair.decode.run()
    assert pair.decode.answers[own_id] == expected_tokens(prompt, 8)
    assert pair.decode.seconds[own_id] < 5
