"""Risk: a request is aborted while its blocks are being filled. They must stay out of use until nobody writes them any
more, come back exactly once, and the worker must not name the request again: an id that vLLM does not know ends the
engine (0.16 and newer), and one that it waits for in vain keeps its blocks for ever."""

import pytest

from late_store import make_loads_late
from paper_engine import ABORT_HOLDS_BLOCKS, BLOCK_TOKENS, PaperEngine
from paper_model import expected_tokens

PROMPT_BLOCKS = 6


@pytest.fixture
def prompt(store, prompts):
    """A prompt whose 6 full blocks are in the store."""
    prompt = prompts(PROMPT_BLOCKS * BLOCK_TOKENS + 5)
    with PaperEngine("producer", store) as prefill:
        prefill.answer("prefill", prompt, 2)
    return prompt


def begin_loading(engine, request_id, prompt):
    late = make_loads_late(engine)
    engine.add(request_id, prompt)
    for _ in range(5):
        engine.step()
    assert late.held == 1
    assert engine.free_blocks() < engine.free_blocks_at_start
    return late


@pytest.mark.parametrize("prefix_caching", [True, False], ids=["cached", "uncached"])
def test_blocks_of_an_aborted_load_stay_out_of_use_until_it_ended(store, prompt, prompts, asynchronous, prefix_caching):
    """The pool is so small that the next request needs the blocks of the aborted one."""
    with PaperEngine("consumer", store, asynchronous=asynchronous, prefix_caching=prefix_caching, blocks=12) as engine:
        late = begin_loading(engine, "gone", prompt)
        held_blocks = set(engine.block_ids("gone"))
        engine.abort("gone")
        other = prompts(4 * BLOCK_TOKENS + 1)
        engine.add("other", other, max_tokens=16)
        for _ in range(40):
            engine.step()
            if engine.request("other") is not None:
                assert held_blocks.isdisjoint(engine.block_ids("other")), "a block is in use while a load may write it"
        late.release()
        engine.run()
        assert engine.answers["other"] == expected_tokens(other, 16)
        assert engine.answers["gone"] == []
        assert engine.settle() == engine.free_blocks_at_start
        # Whatever the late load wrote must not be found by anyone.
        assert engine.answer("again", prompt) == expected_tokens(prompt, 8)
        assert engine.settle() == engine.free_blocks_at_start


@pytest.mark.parametrize("steps_between", [0, 1, 3])
def test_an_aborted_load_is_reported_at_most_once(store, prompt, asynchronous, steps_between):
    with PaperEngine("consumer", store, asynchronous=asynchronous) as engine:
        late = begin_loading(engine, "gone", prompt)
        reported = watch_reports(engine)
        engine.abort("gone")
        for _ in range(steps_between):
            engine.step()
        assert reported == []
        late.release()
        assert engine.settle() == engine.free_blocks_at_start
        for _ in range(5):
            engine.step()
        assert reported == [("received" if ABORT_HOLDS_BLOCKS else "sent", "gone")]


def test_abort_after_the_load_ended_and_before_it_was_heard(store, prompt, asynchronous):
    """The result of the step that reports the load is on its way when the abort arrives."""
    with PaperEngine("consumer", store, asynchronous=asynchronous) as engine:
        late = begin_loading(engine, "gone", prompt)
        late.release()
        # The worker's answer exists, the scheduler has not seen it: exactly what engine.step() would deliver next.
        scheduled = engine.scheduler.schedule()
        result = engine.runner.execute(scheduled)
        engine.abort("gone")
        engine.scheduler.update_from_output(scheduled, result)
        assert engine.settle() == engine.free_blocks_at_start
        assert engine.answer("again", prompt) == expected_tokens(prompt, 8)


def test_abort_between_two_loads_of_one_prompt(store, prompt, asynchronous):
    """Two requests load the same blocks into places of their own; one of them goes away."""
    with PaperEngine("consumer", store, asynchronous=asynchronous) as engine:
        late = begin_loading(engine, "gone", prompt)
        engine.add("stays", prompt)
        for _ in range(3):
            engine.step()
        engine.abort("gone")
        late.release()
        engine.run()
        assert engine.answers["stays"] == expected_tokens(prompt, 8)
        assert engine.settle() == engine.free_blocks_at_start


def test_an_id_may_be_used_again_after_its_abort(store, prompt, asynchronous):
    """A client that retries with the id of the call that it gave up."""
    with PaperEngine("consumer", store, asynchronous=asynchronous) as engine:
        late = begin_loading(engine, "same", prompt)
        engine.abort("same")
        late.release()
        assert engine.settle() == engine.free_blocks_at_start
        del engine.ended["same"]
        assert engine.answer("same", prompt) == expected_tokens(prompt, 8)


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5, 8])
def test_abort_at_any_step_of_a_request(store, prompt, asynchronous, steps):
    with PaperEngine("consumer", store, asynchronous=asynchronous) as engine:
        engine.add("gone", prompt)
        for _ in range(steps):
            engine.step()
        engine.abort("gone")
        assert engine.settle() == engine.free_blocks_at_start
        assert engine.answer("again", prompt) == expected_tokens(prompt, 8)


@pytest.mark.parametrize("steps", range(5))
def test_abort_of_a_prefill_stores_only_what_was_computed(store, prompts, asynchronous, steps):
    prompt = prompts(PROMPT_BLOCKS * BLOCK_TOKENS + 5)
    with PaperEngine("producer", store, asynchronous=asynchronous, step_tokens=24) as prefill:
        prefill.add("gone", prompt, max_tokens=2)
        for _ in range(steps):
            prefill.step()
        prefill.abort("gone")
        assert prefill.settle() == prefill.free_blocks_at_start
    with PaperEngine("consumer", store, load_timeout_ms=60_000) as engine:
        assert engine.answer("a", prompt) == expected_tokens(prompt, 8)
        assert engine.loaded_tokens["a"] <= steps * 24
        # Nobody computes the rest any more, so there is nothing to wait for.
        assert engine.seconds["a"] < 15


def watch_reports(engine):
    """A list that grows by every id that the worker reports."""
    reported = []
    get_finished = engine.worker.get_finished

    def watched(finished_request_ids):
        sent, received = get_finished(finished_request_ids)
        reported.extend(("sent", request_id) for request_id in sent or ())
        reported.extend(("received", request_id) for request_id in received or ())
        return sent, received

    engine.worker.get_finished = watched
    return reported
