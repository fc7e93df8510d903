"""Risk: the tests on paper pass because they cannot fail. The model must give its known answer through vLLM's scheduler
without any connector, and another answer as soon as one block is wrong."""

import pytest

from paper_engine import BLOCK_TOKENS, PaperEngine
from paper_model import expected_tokens


@pytest.mark.parametrize("count", [1, BLOCK_TOKENS - 1, BLOCK_TOKENS, BLOCK_TOKENS + 1, 5 * BLOCK_TOKENS + 3])
def test_the_scheduler_gives_the_answer_on_paper(store, prompts, asynchronous, count):
    prompt = prompts(count)
    with PaperEngine(None, store, asynchronous=asynchronous) as engine:
        assert engine.answer("a", prompt) == expected_tokens(prompt, 8)
        assert engine.answer("from the prefix cache", prompt) == expected_tokens(prompt, 8)


def test_chunks_and_preemptions_change_no_answer(store, prompts, asynchronous):
    wanted = {f"r{i}": prompts(2 * BLOCK_TOKENS + 5 * i) for i in range(5)}
    with PaperEngine(None, store, asynchronous=asynchronous, blocks=14, step_tokens=40) as engine:
        for request_id, prompt in wanted.items():
            engine.add(request_id, prompt, max_tokens=40)
        engine.run()
        for request_id, prompt in wanted.items():
            assert engine.answers[request_id] == expected_tokens(prompt, 40), request_id
        assert engine.free_blocks() == engine.free_blocks_at_start


@pytest.mark.parametrize("bad_block", [0, 2, 4])
def test_a_wrong_block_in_the_prefix_cache_changes_the_answer(store, prompts, asynchronous, bad_block):
    prompt = prompts(5 * BLOCK_TOKENS + 3)
    with PaperEngine(None, store, asynchronous=asynchronous) as engine:
        engine.add("a", prompt)
        block_ids = []
        while engine.request("a") is not None:
            block_ids = engine.block_ids("a") or block_ids
            engine.step()
        engine.run()
        engine.cache.scribble(block_ids[bad_block])
        assert engine.answer("b", prompt) != expected_tokens(prompt, 8)
