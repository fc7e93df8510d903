"""Risk: a disk that hangs makes every step wait for its stores, so that the engine as good as stands still."""

import time

import pytest

from paper_engine import BLOCK_TOKENS, PaperEngine
from paper_model import expected_tokens

STORE_TIMEOUT_MS = 400


class HangingStore:
    """No store on it ever ends. Everything else goes straight to the store behind it."""

    def __init__(self, store):
        self._store = store
        self.begun = 0

    def begin_store(self, *arguments):
        self.begun += 1
        return self.begun << 40

    def layer_ready(self, *arguments):
        pass

    finish_store = cancel = layer_ready

    def wait(self, job, timeout_ms):
        time.sleep(timeout_ms / 1000)

    def __getattr__(self, name):
        return getattr(self._store, name)


@pytest.mark.parametrize("role", ["producer", "both"])
def test_a_prompt_of_many_chunks_waits_now_and_then_for_a_folder_that_hangs(store, prompts, asynchronous, role):
    prompt = prompts(20 * BLOCK_TOKENS + 5)
    with PaperEngine(
        role, store, asynchronous=asynchronous, step_tokens=2 * BLOCK_TOKENS, store_timeout_ms=STORE_TIMEOUT_MS
    ) as engine:
        engine.worker._worker._store = hanging = HangingStore(engine.worker._worker._store)
        assert engine.answer("a", prompt) == expected_tokens(prompt, 8)
        assert engine.steps > 10
        assert 1 <= hanging.begun <= 4  # one on a machine that has time for the test
        # Others must not wait for promises that nobody keeps.
        with PaperEngine("consumer", store, load_timeout_ms=60_000) as decode:
            assert decode.answer("a", prompt) == expected_tokens(prompt, 8)
            assert decode.seconds["a"] < 15
