"""Risk: KV that was computed before a reset (new weights, for one) is found after it."""

import time

import pytest

from kvlane.vllm import connector
from paper_engine import BLOCK_TOKENS, PaperEngine
from paper_model import expected_tokens

RESET_LIMIT_S = 30


def reset(engine):
    """False: the thread that resets was held up for half a second, and who asks asks again."""
    deadline, asked_s = time.monotonic() + RESET_LIMIT_S, time.monotonic()
    while engine.connector.reset_cache() is not True:
        assert time.monotonic() - asked_s > 0.4, "refused, and not waited for"
        asked_s = time.monotonic()
        assert asked_s < deadline, "no reset"


def test_a_step_in_flight_stores_nothing_into_the_epoch_of_a_reset(store, prompts, asynchronous):
    prompt = prompts(4 * BLOCK_TOKENS + 5)
    with PaperEngine("producer", store, asynchronous=asynchronous) as prefill:
        prefill.add("a", prompt, max_tokens=1)
        scheduled = prefill.scheduler.schedule()
        assert scheduled.kv_connector_metadata.stores
        reset(prefill)
        result = prefill.runner.execute(scheduled)
        prefill.scheduler.update_from_output(scheduled, result)
        later = prompts(4 * BLOCK_TOKENS + 5)
        prefill.answer("later", later, 1)
    with PaperEngine("consumer", store) as decode:
        assert decode.answer("a", prompt) == expected_tokens(prompt, 8)
        assert decode.loaded_tokens["a"] == 0
        assert decode.answer("later", later) == expected_tokens(later, 8)
        assert decode.loaded_tokens["later"] == 4 * BLOCK_TOKENS


def test_a_server_that_only_stores_resets_what_it_stored(store, prompts):
    prompt = prompts(4 * BLOCK_TOKENS + 5)
    with PaperEngine("producer", store) as prefill:
        prefill.answer("a", prompt, 1)
        reset(prefill)
    with PaperEngine("consumer", store) as decode:
        decode.answer("a", prompt)
        assert decode.loaded_tokens["a"] == 0


@pytest.mark.parametrize("role", ["producer", "both"])
def test_a_server_whose_workers_are_not_known_yet_resets_what_it_stored(role, store, prompts, monkeypatch):
    """MultiConnector, and pipeline stages before 0.23."""
    monkeypatch.setattr(connector, "handshakes_may_be_missing", lambda parallel: True)
    monkeypatch.setattr(PaperEngine, "_shake_hands", lambda engine: None)
    monkeypatch.setattr(connector.NamespaceSearch, "start_reading", lambda search: None)
    prompt, later = prompts(4 * BLOCK_TOKENS + 5), prompts(4 * BLOCK_TOKENS + 5)
    with PaperEngine(role, store) as prefill:
        prefill.answer("a", prompt, 1)
        reset(prefill)
        prefill.answer("later", later, 1)
    monkeypatch.undo()
    with PaperEngine("consumer", store) as decode:
        decode.answer("a", prompt)
        assert decode.loaded_tokens["a"] == 0
        assert decode.answer("later", later) == expected_tokens(later, 8)
        assert decode.loaded_tokens["later"] == 4 * BLOCK_TOKENS
