"""Risk: decode waits for KV that never comes, does not wait for KV that is about to come, or claims more than vLLM
allows (an assertion that ends the engine)."""

import pytest

from paper_engine import BLOCK_TOKENS, PaperEngine
from paper_model import expected_tokens

# An id as the proxy makes it: it says that a prefill is on its way.
PROXY_ID = "cmpl-___prefill_addr_127.0.0.1:8100___decode_addr_127.0.0.1:8200_0123456789abcdef-0-89abcdef"
PROMPT_BLOCKS = 8
CHUNK_TOKENS = 2 * BLOCK_TOKENS
# Far from what a deadline of a minute costs, and far from what a busy machine does.
AT_ONCE_S = 15


def test_decode_waits_while_prefill_writes_and_then_loads_all(store, prompts, asynchronous):
    prompt = prompts(PROMPT_BLOCKS * BLOCK_TOKENS + 5)
    with (
        PaperEngine("producer", store, asynchronous=asynchronous, step_tokens=CHUNK_TOKENS) as prefill,
        PaperEngine("consumer", store, asynchronous=asynchronous) as decode,
    ):
        prefill.add("prefill", prompt, max_tokens=1)
        prefill.step()
        prefill.step()
        decode.add(PROXY_ID, prompt)
        for _ in range(PROMPT_BLOCKS * BLOCK_TOKENS // CHUNK_TOKENS - 2):
            for _ in range(3):
                decode.step()
            assert decode.request(PROXY_ID).num_computed_tokens == 0, "decode did not wait for the rest"
            assert decode.free_blocks() == decode.free_blocks_at_start, "a waiting request holds blocks"
            prefill.step()
        prefill.run()
        decode.run()
        assert decode.answers[PROXY_ID] == expected_tokens(prompt, 8)
        assert decode.loaded_tokens[PROXY_ID] == PROMPT_BLOCKS * BLOCK_TOKENS


def test_waiting_for_a_prefill_that_hangs_is_bounded(store, prompts, asynchronous):
    """Prefill computed two chunks, then its process stopped making progress; the rest stays promised."""
    prompt = prompts(PROMPT_BLOCKS * BLOCK_TOKENS + 5)
    with (
        PaperEngine("producer", store, step_tokens=CHUNK_TOKENS) as prefill,
        PaperEngine("consumer", store, asynchronous=asynchronous, load_timeout_ms=500) as decode,
    ):
        prefill.add("prefill", prompt, max_tokens=1)
        prefill.step()
        prefill.step()
        assert decode.answer(PROXY_ID, prompt) == expected_tokens(prompt, 8)
        assert 0.4 < decode.seconds[PROXY_ID] < AT_ONCE_S
        assert decode.loaded_tokens[PROXY_ID] <= 2 * CHUNK_TOKENS


def test_a_prefill_that_never_starts_costs_a_short_grace(store, prompts, asynchronous):
    prompt = prompts(3 * BLOCK_TOKENS + 5)
    with PaperEngine(
        "consumer", store, asynchronous=asynchronous, prefill_grace_ms=300, load_timeout_ms=60_000
    ) as decode:
        assert decode.answer(PROXY_ID, prompt) == expected_tokens(prompt, 8)
        assert 0.2 < decode.seconds[PROXY_ID] < AT_ONCE_S
        assert decode.loaded_tokens[PROXY_ID] == 0


def test_a_request_without_a_prefill_does_not_wait(store, prompts, asynchronous):
    prompt = prompts(3 * BLOCK_TOKENS + 5)
    with PaperEngine(
        "consumer", store, asynchronous=asynchronous, prefill_grace_ms=60_000, load_timeout_ms=60_000
    ) as decode:
        assert decode.answer("plain", prompt) == expected_tokens(prompt, 8)
        assert decode.seconds["plain"] < AT_ONCE_S


def test_others_run_while_one_waits(store, prompts, asynchronous):
    waiting, other = prompts(PROMPT_BLOCKS * BLOCK_TOKENS), prompts(40)
    with (
        PaperEngine("producer", store, step_tokens=CHUNK_TOKENS) as prefill,
        PaperEngine("consumer", store, asynchronous=asynchronous, load_timeout_ms=1500) as decode,
    ):
        prefill.add("prefill", waiting, max_tokens=1)
        prefill.step()
        decode.add(PROXY_ID, waiting)
        decode.add("other", other)
        decode.run()
        assert decode.answers["other"] == expected_tokens(other, 8)
        assert decode.answers[PROXY_ID] == expected_tokens(waiting, 8)
        assert decode.seconds["other"] < decode.seconds[PROXY_ID]


def test_abort_and_preemption_of_a_prefill_end_the_waiting(store, prompts, asynchronous):
    prompt = prompts(PROMPT_BLOCKS * BLOCK_TOKENS + 5)
    with (
        PaperEngine("producer", store, step_tokens=CHUNK_TOKENS) as prefill,
        PaperEngine("consumer", store, asynchronous=asynchronous, load_timeout_ms=60_000) as decode,
    ):
        prefill.add("prefill", prompt, max_tokens=1)
        prefill.step()
        prefill.step()
        decode.add(PROXY_ID, prompt)
        for _ in range(3):
            decode.step()
        prefill.abort("prefill")
        prefill.step()
        decode.run()
        assert decode.answers[PROXY_ID] == expected_tokens(prompt, 8)
        assert decode.seconds[PROXY_ID] < AT_ONCE_S


LENGTHS_TOKENS = [1, BLOCK_TOKENS - 1, BLOCK_TOKENS, BLOCK_TOKENS + 1, 4 * BLOCK_TOKENS, 4 * BLOCK_TOKENS + 1, 100]


@pytest.mark.parametrize("local_tokens", [0, 2 * BLOCK_TOKENS + 1])
@pytest.mark.parametrize("sync", [False, True], ids=["async", "sync"])
@pytest.mark.parametrize("count", LENGTHS_TOKENS)
def test_a_hit_is_whole_blocks_and_leaves_one_token(store, prompts, asynchronous, count, sync, local_tokens):
    prompt = prompts(count)
    with PaperEngine("producer", store) as prefill:
        prefill.answer("prefill", prompt, 2)
    with PaperEngine("consumer", store, asynchronous=asynchronous, sync_load=sync) as decode:
        if local_tokens:
            decode.answer("local", prompt[:local_tokens] or prompt)
        before = decode.loaded_tokens.total()
        assert decode.answer("a", prompt) == expected_tokens(prompt, 8)
        reachable = (count - 1) // BLOCK_TOKENS * BLOCK_TOKENS
        local = min(len(prompt[:local_tokens]) // BLOCK_TOKENS * BLOCK_TOKENS, reachable)
        assert decode.loaded_tokens.total() - before == reachable - local


def test_asking_many_times_changes_nothing(store, prompts):
    """vLLM asks in every step while blocks are short, and again after a preemption."""
    prompt = prompts(4 * BLOCK_TOKENS + 5)
    with PaperEngine("producer", store) as prefill:
        prefill.answer("prefill", prompt, 2)
    with PaperEngine("consumer", store) as decode:
        decode.add("a", prompt)
        request = decode.request("a")
        answers = {decode.connector.get_num_new_matched_tokens(request, 0) for _ in range(20)}
        assert answers == {(4 * BLOCK_TOKENS, True)}
        decode.run()
        assert decode.answers["a"] == expected_tokens(prompt, 8)
        assert decode.loads["a"] == 1
