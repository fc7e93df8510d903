"""Risk: requests that run together mix their blocks; one that ends early or is preempted leaves blocks behind, or lets
a load write into blocks that belong to somebody else by then."""

import pytest

from conftest import OUTPUT_TOKENS, ask, expected_external
from settings import BLOCK_TOKENS, CHUNK_TOKENS, PATIENT_FS, engine_settings
from support.connector import transfer_config
from support.metrics import EXTERNAL_HITS
from support.outcome import LOGPROB_TOLERANCE, logprob_difference


# Module scope lets pytest run all tests of one kind after another, so that engines stay open.
@pytest.fixture(scope="module", params=[False, True], ids=["async", "sync"])
def options(request):
    return {"sync_load": request.param}


def test_eight_concurrent_requests(pair, prompts, options):
    pair.open(prefill={"chunked": True}, decode={"chunked": True}, options=options)
    requests = [ask(f"r{i}", prompts.tokens(120 + 61 * i)) for i in range(8)]
    answers, external_tokens = pair.hand_over(requests)
    assert external_tokens == sum(expected_external(request["prompt"]) for request in requests)
    pair.assert_like_single(requests, answers)


def test_two_choices_with_temperature_and_seed(pair, prompts, options):
    pair.open(options=options)
    request = ask("choices", prompts.tokens(5 * BLOCK_TOKENS + 3), n=2, temperature=0.8, seed=4711)
    answers, external_tokens = pair.hand_over([request])
    assert external_tokens == 2 * expected_external(request["prompt"])
    pair.assert_like_single([request], answers)
    first, second = answers["choices"]["choices"]
    assert first["tokens"] != second["tokens"], "both choices drew the same random numbers"


def test_shared_prefix_with_different_tails(pair, prompts, options):
    pair.open(prefill={"prefix_caching": True}, decode={}, options=options)
    head = prompts.tokens(4 * BLOCK_TOKENS + 11)
    requests = [ask(f"tail{i}", head + prompts.tokens(2 * BLOCK_TOKENS + i)) for i in range(4)]
    answers, external_tokens = pair.hand_over(requests)
    assert external_tokens == sum(expected_external(request["prompt"]) for request in requests)
    pair.assert_like_single(requests, answers)


def test_tail_that_was_never_stored_is_computed(pair, prompts, options):
    pair.open(options=options)
    head = prompts.tokens(4 * BLOCK_TOKENS)
    pair.prefill.run([ask("head", head + prompts.tokens(8), max_tokens=1)])
    request = ask("other tail", head + prompts.tokens(3 * BLOCK_TOKENS))
    answers, external_tokens = pair.decode_only([request])
    assert external_tokens == 4 * BLOCK_TOKENS
    pair.assert_like_single([request], answers)


def test_another_cache_salt_misses(pair, prompts):
    pair.open()
    prompt = prompts.tokens(5 * BLOCK_TOKENS)
    pair.prefill.run([ask("stored", prompt, max_tokens=1, cache_salt="one")])
    request = ask("asked", prompt, cache_salt="two")
    answers, external_tokens = pair.decode_only([request])
    assert external_tokens == 0
    pair.assert_like_single([request], answers)
    _, external_tokens = pair.decode_only([ask("again", prompt, cache_salt="one")])
    assert external_tokens == 4 * BLOCK_TOKENS


def test_abort_while_generating_frees_its_blocks_and_leaves_others_alone(pair, prompts, options):
    pair.open(options=options)
    requests = [ask(f"r{i}", prompts.tokens(8 * BLOCK_TOKENS + 3 + i)) for i in range(3)]
    pair.prefill.run([{**request, "max_tokens": 1} for request in requests])
    ending = [{**requests[0], "abort_after_tokens": 4}, *requests[1:]]
    answers, _ = pair.decode_only(ending)
    assert answers["r0"]["aborted"]
    assert len(answers["r0"]["choices"][0]["tokens"]) < OUTPUT_TOKENS
    assert pair.decode.settled_free_blocks() == pair.decode.free_blocks_at_start
    first, second = pair.single.run(requests), pair.single.run(requests)
    for name in ("r1", "r2"):
        if first[name]["choices"][0]["tokens"] == second[name]["choices"][0]["tokens"]:
            assert answers[name]["choices"][0]["tokens"] == first[name]["choices"][0]["tokens"]


@pytest.mark.parametrize("prefix_caching", [False, True], ids=["uncached", "cached"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_abort_while_loading_frees_its_blocks_once(pair, prompts, steps, prefix_caching):
    """The blocks of an aborted load are handed to the next request, which must not see the load writing into them."""
    pair.open(decode={"prefix_caching": prefix_caching})
    gone, stays = ask("gone", prompts.tokens(2003)), ask("stays", prompts.tokens(1027))
    pair.prefill.run([{**request, "max_tokens": 1} for request in (gone, stays)])
    answers, _ = pair.decode_only([{**gone, "abort_after_steps": steps}])
    assert answers["gone"]["aborted"]
    if steps == 1:
        # The first step only starts the load; whether later ones meet it depends on how fast the machine is.
        assert answers["gone"]["state_at_abort"] == "WAITING_FOR_REMOTE_KVS"
    answers, external_tokens = pair.decode_only([stays])
    assert external_tokens == expected_external(stays["prompt"])
    pair.assert_like_single([stays], answers)
    assert pair.decode.settled_free_blocks() == pair.decode.free_blocks_at_start
    answers, _ = pair.decode_only([gone])
    pair.assert_like_single([gone], answers)


@pytest.mark.parametrize("steps", [1, 3])
def test_abort_of_prefill_leaves_only_whole_prefixes(pair, prompts, steps):
    """Prefill is aborted between chunks: decode may find a shorter prefix, never a hole."""
    pair.open(prefill={"chunked": True})
    request = ask("cut", prompts.tokens(2003))
    pair.prefill.run([{**request, "max_tokens": 1, "abort_after_steps": steps}])
    answers, external_tokens = pair.decode_only([request])
    assert external_tokens % BLOCK_TOKENS == 0
    # What ended steps computed is there; the last step may have been planned and not run.
    assert max((steps - 1) * CHUNK_TOKENS, 1) <= external_tokens <= steps * CHUNK_TOKENS
    pair.assert_like_single([request], answers)
    assert pair.prefill.settled_free_blocks() == pair.prefill.free_blocks_at_start


def test_decode_may_ask_while_prefill_still_computes(pair, prompts):
    """Both engines get the request at once: whatever decode finds, the answer is right and nobody waits for ever."""
    pair.open(prefill={"chunked": True})
    requests = [ask(f"r{i}", prompts.tokens(2003 + i)) for i in range(3)]
    pair.prefill.begin_run([{**request, "max_tokens": 1} for request in requests])
    answers, external_tokens = pair.decode_only(requests)
    pair.prefill.finish_run()
    assert external_tokens <= sum(expected_external(request["prompt"]) for request in requests)
    pair.assert_like_single(requests, answers)


def test_decode_that_is_told_of_a_prefill_waits_for_all_of_it(pair, prompts):
    """The proxy's ids name the prefill server, so decode waits for blocks that nobody has announced yet. The limits are
    far above what the slowest machine needs; the answer comes when the blocks do."""
    pair.open(prefill={"chunked": True}, options={"prefill_grace_ms": 60_000, "load_timeout_ms": 60_000})
    addresses = "___prefill_addr_127.0.0.1:1___decode_addr_127.0.0.1:2"
    requests = [ask(f"{addresses}_{i}", prompts.tokens(2003 + i)) for i in range(3)]
    pair.prefill.begin_run([{**request, "max_tokens": 1} for request in requests])
    answers, external_tokens = pair.decode_only(requests)
    pair.prefill.finish_run()
    assert external_tokens == sum(expected_external(request["prompt"]) for request in requests)
    pair.assert_like_single(requests, answers)


def test_an_engine_of_both_roles_loads_what_it_stored(processes, shared_store, model, prompts, options):
    _, both, single = processes
    single.begin_open(engine_settings(model, prefix_caching=True))
    both.open(
        engine_settings(model, prefix_caching=True), transfer_config("both", shared_store, **{**PATIENT_FS, **options})
    )
    single.finish_open()
    request = ask("first", prompts.tokens(7 * BLOCK_TOKENS + 3))
    before = both.counters().get(EXTERNAL_HITS, 0)
    first = both.run([request])["first"]
    assert both.counters().get(EXTERNAL_HITS, 0) == before
    assert both.settled_free_blocks() == both.free_blocks_at_start
    assert both.reset_prefix_cache()
    again = both.run([{**request, "id": "again"}])["again"]
    assert both.counters()[EXTERNAL_HITS] - before == again["cached_tokens"] == 7 * BLOCK_TOKENS
    alone = single.run([request])["first"]
    for answer in (first, again):
        assert answer["choices"][0]["tokens"][0] == alone["choices"][0]["tokens"][0]
        difference = logprob_difference(answer["choices"][0], alone["choices"][0])
        assert difference <= LOGPROB_TOLERANCE["float32"], difference
    assert again["choices"][0]["tokens"] == first["choices"][0]["tokens"]
    assert both.settled_free_blocks() == both.free_blocks_at_start


@pytest.mark.parametrize("prefix_caching", [False, True], ids=["uncached", "cached"])
def test_preemption_pressure(pair, prompts, prefix_caching, options):
    """So few blocks that running requests are thrown out and come back, with loads in between."""
    few = {
        "num_gpu_blocks_override": 22,
        "max_model_len": 512,
        "max_num_batched_tokens": 512,
        "prefix_caching": prefix_caching,
    }
    # The last request waits until the others have made room, which takes a slow machine long.
    pair.open(prefill={}, decode=few, options={**options, "load_timeout_ms": 60_000})
    requests = [ask(f"r{i}", prompts.tokens(4 * BLOCK_TOKENS + 5 + i), max_tokens=96) for i in range(6)]
    before = pair.decode.counters()["vllm:num_preemptions"]
    answers, external_tokens = pair.hand_over(requests)
    assert pair.decode.counters()["vllm:num_preemptions"] > before, "the test made no pressure"
    # vLLM counts what requests load that come back after a preemption elsewhere.
    assert external_tokens == sum(expected_external(request["prompt"]) for request in requests)
    pair.assert_like_single(requests, answers)
    assert pair.decode.settled_free_blocks() == pair.decode.free_blocks_at_start


def test_preemption_pressure_on_prefill(pair, prompts):
    """A prompt that prefill throws out half-way and starts again is stored right."""
    few = {"num_gpu_blocks_override": 24, "max_model_len": 512, "max_num_batched_tokens": 64, "chunked": True}
    pair.open(prefill=few)
    requests = [ask(f"r{i}", prompts.tokens(4 * BLOCK_TOKENS + 5 + i)) for i in range(6)]
    before = pair.prefill.counters()["vllm:num_preemptions"]
    pair.prefill.run([{**request, "max_tokens": 64} for request in requests])
    assert pair.prefill.counters()["vllm:num_preemptions"] > before, "the test made no pressure"
    answers, external_tokens = pair.decode_only(requests)
    assert external_tokens == sum(expected_external(request["prompt"]) for request in requests)
    pair.assert_like_single(requests, answers)
    assert pair.prefill.settled_free_blocks() == pair.prefill.free_blocks_at_start
