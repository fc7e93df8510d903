"""Risk: a block whose load failed is used once, by the request itself, by a later one through the prefix cache, or by a
step that was already in flight. The store is spoiled on disk, so the failure comes from the real load path."""

import pytest

from faults import corrupt_blocks
from kvlane.vllm.connector import KvlaneFsConnector
from kvlane.vllm.probes import leaves_room_for_loads
from paper_engine import BLOCK_TOKENS, PaperEngine
from paper_model import LAYERS, expected_tokens

PROMPT_BLOCKS = 6
ATTEMPTS = 8


@pytest.fixture
def stored(store, prompts):
    """A prompt whose 6 full blocks are in the store, and a function that spoils some of them there."""
    prompt = prompts(PROMPT_BLOCKS * BLOCK_TOKENS + 5)
    with PaperEngine("producer", store) as prefill:
        prefill.add("prefill", prompt, max_tokens=2)
        block_ids = []
        while prefill.request("prefill") is not None:
            block_ids = prefill.block_ids("prefill") or block_ids
            prefill.step()

        def spoil(*positions, layer=LAYERS - 1):
            patterns = [prefill.cache.first_bytes(layer, block_ids[position]) for position in positions]
            assert corrupt_blocks(store, patterns) == len(positions), "the store does not hold what was computed"

        yield prompt, spoil


def wait_until_taken_up(engine, request_id, wanted_steps=0):
    """Steps until the request left the state of waiting for its load, then some steps more."""
    for _ in range(100_000):
        request = engine.request(request_id)
        if request is None or request.status.name not in ("WAITING", "WAITING_FOR_REMOTE_KVS"):
            break
        engine.step()
    for _ in range(wanted_steps):
        if engine.request(request_id) is not None:
            engine.step()


def assert_nothing_bad_is_left(engine, prompt):
    """Every prefix of the prompt is asked for again: the prefix cache must not hold one bad block."""
    for blocks in range(1, PROMPT_BLOCKS + 1):
        prefix = prompt[: blocks * BLOCK_TOKENS + 3]
        assert engine.answer(f"after {blocks}", prefix) == expected_tokens(prefix, 8), f"{blocks} blocks"
    assert engine.answer("after all", prompt) == expected_tokens(prompt, 8)
    assert engine.settle() == engine.free_blocks_at_start


@pytest.mark.parametrize("prefix_caching", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("bad", [(), (0,), (3,), (PROMPT_BLOCKS - 1,), (1, 4)], ids=str)
def test_a_failed_load_ends_in_a_recompute(store, stored, asynchronous, bad, prefix_caching):
    prompt, spoil = stored
    spoil(*bad)
    with PaperEngine("consumer", store, asynchronous=asynchronous, prefix_caching=prefix_caching) as engine:
        assert engine.answer("a", prompt) == expected_tokens(prompt, 8)
        assert engine.ended["a"] == "length"
        loaded = engine.loaded_tokens["a"]
        assert loaded == PROMPT_BLOCKS * BLOCK_TOKENS, "the request never tried to load"
        assert_nothing_bad_is_left(engine, prompt)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_one_bad_layer_spoils_its_block(store, stored, layer):
    prompt, spoil = stored
    spoil(2, layer=layer)
    with PaperEngine("consumer", store) as engine:
        assert engine.answer("a", prompt) == expected_tokens(prompt, 8)
        assert_nothing_bad_is_left(engine, prompt)


@pytest.mark.parametrize("bad", [(0,), (3,)], ids=str)
def test_a_failed_request_is_not_claimed_again(store, stored, asynchronous, bad):
    """Claiming the same hit again and again is an endless loop on vLLM."""
    prompt, spoil = stored
    spoil(*bad)
    with PaperEngine("consumer", store, asynchronous=asynchronous) as engine:
        assert engine.answer("a", prompt) == expected_tokens(prompt, 8)
        assert engine.loads["a"] == 1


@pytest.mark.parametrize("later_steps", range(5))
@pytest.mark.parametrize("bad", [(0,), (3,)], ids=str)
def test_failure_then_abort(store, stored, asynchronous, bad, later_steps):
    prompt, spoil = stored
    spoil(*bad)
    with PaperEngine("consumer", store, asynchronous=asynchronous) as engine:
        engine.add("a", prompt)
        wait_until_taken_up(engine, "a", later_steps)
        engine.abort("a")
        got = engine.answers["a"]
        assert got == expected_tokens(prompt, 8)[: len(got)], "a token from bad KV reached the client"
        assert_nothing_bad_is_left(engine, prompt)


@pytest.mark.parametrize("later_steps", range(4))
@pytest.mark.parametrize("bad", [(0,), (3,)], ids=str)
def test_failure_then_preemption(store, stored, prompts, asynchronous, bad, later_steps):
    """An older request grows until the one whose load failed loses its blocks: in the middle of its recompute, or while
    it generates on an old vLLM, where kvlane itself lets a load begin only beside requests that fit."""
    prompt, spoil = stored
    spoil(*bad)
    # 12 usable blocks. The older request starts with 3 and grows to 8, the failed one needs 7; or it starts with 1, and
    # both grow until there is no room for both.
    older_blocks, max_tokens = (3, 24) if leaves_room_for_loads() else (1, 80)
    older = prompts(older_blocks * BLOCK_TOKENS - later_steps)
    # How many steps the load takes is up to the machine; where it was so slow that the older request had ended, again.
    for _ in range(ATTEMPTS):
        with PaperEngine("consumer", store, asynchronous=asynchronous, blocks=13, step_tokens=40) as engine:
            engine.add("older", older, max_tokens=80)
            for _ in range(6 * later_steps):
                engine.step()
            engine.add("a", prompt, max_tokens=max_tokens)
            engine.run()
            assert engine.answers["a"] == expected_tokens(prompt, max_tokens)
            assert engine.answers["older"] == expected_tokens(older, 80)
            assert_nothing_bad_is_left(engine, prompt)
            if engine.preemptions["a"] + engine.preemptions["older"] > 0:
                return
    pytest.fail(f"the test made no pressure in {ATTEMPTS} runs")


def test_failure_while_other_requests_run(store, stored, prompts, asynchronous):
    prompt, spoil = stored
    spoil(2)
    others = {f"other{i}": prompts(2 * BLOCK_TOKENS + 7 * i) for i in range(3)}
    with PaperEngine("consumer", store, asynchronous=asynchronous) as engine:
        for request_id, tokens in others.items():
            engine.add(request_id, tokens, max_tokens=20)
            engine.step()
        engine.add("a", prompt)
        engine.add("twin", prompt)
        engine.run()
        for request_id, tokens in others.items():
            assert engine.answers[request_id] == expected_tokens(tokens, 20)
        assert engine.answers["a"] == engine.answers["twin"] == expected_tokens(prompt, 8)
        assert_nothing_bad_is_left(engine, prompt)


def test_the_connector_sets_the_policy_that_recomputes(store):
    """vLLM's own default ends a request whose load failed (0.17 and newer)."""
    with PaperEngine("consumer", store) as engine:
        assert engine.scheduler.recompute_kv_load_failures


@pytest.mark.parametrize("bad", [(0,), (3,)], ids=str)
def test_a_failed_synchronous_load_ends_the_request_and_nothing_else(store, stored, asynchronous, bad):
    prompt, spoil = stored
    spoil(*bad)
    with PaperEngine("consumer", store, asynchronous=asynchronous, sync_load=True) as engine:
        assert engine.answer("a", prompt) == []
        assert engine.ended["a"] == "error"
        # It would fail again and again, so the prefixes are tried on an engine that does not load.
        engine.connector.get_num_new_matched_tokens = lambda request, computed_tokens: (0, False)
        assert_nothing_bad_is_left(engine, prompt)


def test_recomputing_a_failed_synchronous_load_is_the_hazard_that_these_tests_see(store, stored):
    """Why kvlane does not do it: vLLM keeps the bad blocks in its prefix cache when the request goes away first."""
    prompt, spoil = stored
    spoil(3)
    with PaperEngine("consumer", store, sync_load=True) as engine:
        engine.scheduler.recompute_kv_load_failures = True
        engine.add("a", prompt)
        engine.step()
        engine.abort("a")
        engine.connector.get_num_new_matched_tokens = lambda request, computed_tokens: (0, False)
        assert engine.answer("later", prompt) != expected_tokens(prompt, 8)


@pytest.mark.parametrize("handed_over", [True, False], ids=["pool handed over", "pool searched for"])
@pytest.mark.parametrize("bad", [(0,), (3,)], ids=str)
def test_a_failed_synchronous_load_whose_request_went_away_leaves_nothing_bad(
    store, stored, asynchronous, bad, handed_over, monkeypatch
):
    """The abort arrives while the step that found the bad block is on its way back: vLLM looks at running requests
    only. Blocks computed from the bad one must not stay either. vLLM before 0.22 hands no block pool over."""
    prompt, spoil = stored
    spoil(*bad)
    if not handed_over:
        monkeypatch.delattr(KvlaneFsConnector, "bind_gpu_block_pool")
    with PaperEngine("consumer", store, asynchronous=asynchronous, sync_load=True) as engine:
        engine.add("gone", prompt)
        scheduled = engine.scheduler.schedule()
        result = engine.runner.execute(scheduled)
        for block in result.kv_connector_output.invalid_block_ids:
            engine.cache.scribble(block)  # the flipped bit alone may be too small for another answer
        engine.abort("gone")
        engine.scheduler.update_from_output(scheduled, result)
        engine.connector.get_num_new_matched_tokens = lambda request, computed_tokens: (0, False)
        assert_nothing_bad_is_left(engine, prompt)


@pytest.mark.parametrize("bad", [(0,), (3,)], ids=str)
def test_a_failed_synchronous_load_whose_request_is_preempted_leaves_nothing_bad(store, stored, bad):
    """The next step is in flight already, and to plan it vLLM took the blocks away. What was sampled from the bad block
    must not reach the client, nor may the request find the block again when it comes back."""
    prompt, spoil = stored
    spoil(*bad)
    with PaperEngine("consumer", store, asynchronous=True, sync_load=True) as engine:
        engine.add("a", prompt)
        scheduled = engine.scheduler.schedule()
        result = engine.runner.execute(scheduled)
        # Newer vLLM spares requests that a step in flight writes; older ones take their blocks.
        engine.scheduler.defer_block_free = False
        preempt_in_the_next_step(engine, "a")
        in_flight = engine.scheduler.schedule()
        assert in_flight.preempted_req_ids == {"a"}
        later = engine.runner.execute(in_flight)
        for step, outcome in ((scheduled, result), (in_flight, later)):
            for outputs in engine.scheduler.update_from_output(step, outcome).values():
                assert [output for output in outputs.outputs if output.new_token_ids] == []
        engine.run()
        assert engine.answers["a"] == expected_tokens(prompt, 8)
        assert engine.loads["a"] == 1
        assert_nothing_bad_is_left(engine, prompt)


def preempt_in_the_next_step(engine, request_id):
    """Lets the next allocation fail, so that vLLM preempts the last running request."""
    allocate_slots = engine.scheduler.kv_cache_manager.allocate_slots

    def fails_once(request, *arguments, **options):
        engine.scheduler.kv_cache_manager.allocate_slots = allocate_slots
        assert request.request_id == request_id
        return None

    engine.scheduler.kv_cache_manager.allocate_slots = fails_once
