"""Risk: a request that is handed from prefill to decode gets a wrong answer, waits for ever, or is computed twice."""

import pytest

from paper_engine import BLOCK_TOKENS
from paper_model import expected_tokens
from paper_pair import PaperPair, request_id

# Around block borders, and one token, of which there is nothing to hand over.
LENGTHS = [1, 2, 15, 16, 17, 31, 32, 33, 100]


@pytest.fixture
def pair(monkeypatch, asynchronous):
    with PaperPair(monkeypatch, asynchronous=asynchronous) as made:
        yield made


@pytest.mark.parametrize("tokens", LENGTHS)
def test_decode_computes_one_token_when_prefill_came_first(pair, prompts, tokens):
    prompt = prompts(tokens)
    assert pair.answer("u1", prompt) == expected_tokens(prompt, 8)
    assert pair.decode.loaded_tokens[request_id("u1", side="decode")] == (tokens if tokens > 1 else 0)
    assert pair.settle()
    assert pair.hub.leases() == []


@pytest.mark.parametrize("tokens", [17, 100])
def test_decode_may_be_asked_first(pair, prompts, tokens):
    prompt = prompts(tokens)
    own_id = pair.ask_decode("u1", prompt)
    for _ in range(5):
        pair.decode.step()
    assert pair.decode.free_blocks() == pair.decode.free_blocks_at_start, "a request that only waits holds blocks"
    pair.ask_prefill("u1", prompt)
    pair.run()
    assert pair.decode.answers[own_id] == expected_tokens(prompt, 8)
    assert pair.decode.loaded_tokens[own_id] == tokens
    assert pair.settle()


def test_a_prompt_in_chunks_is_pulled_while_it_is_computed(monkeypatch, prompts, asynchronous):
    prompt = prompts(150)
    with PaperPair(monkeypatch, asynchronous=asynchronous, prefill={"step_tokens": 24}) as pair:
        pair.ask_prefill("u1", prompt)
        pair.prefill.step()
        own_id = pair.ask_decode("u1", prompt)
        for _ in range(3):
            pair.prefill.step()
            pair.decode.step()
        (job,) = pair.hub.jobs()
        assert 0 < job.copied < 10
        pair.run()
        assert pair.decode.answers[own_id] == expected_tokens(prompt, 8)
        assert pair.settle()


def test_only_what_decode_lacks_is_pulled(pair, prompts):
    prompt = prompts(4 * BLOCK_TOKENS)
    longer = prompt + prompts(40)
    pair.answer("u1", prompt)
    assert pair.answer("u2", longer) == expected_tokens(longer, 8)
    assert pair.decode.loaded_tokens[request_id("u2", side="decode")] == 40
    assert pair.settle()


def test_a_prompt_that_decode_has_is_released_without_a_pull(pair, prompts):
    prompt = prompts(4 * BLOCK_TOKENS + 1)
    pair.answer("u1", prompt)
    asked = len(pair.hub.asked)
    assert pair.answer("u2", prompt) == expected_tokens(prompt, 8)
    assert pair.decode.loaded_tokens[request_id("u2", side="decode")] == 0
    assert len(pair.hub.asked) == asked
    assert pair.settle()
    assert pair.hub.leases() == []


def test_prefix_hits_of_prefill_are_handed_over_too(pair, prompts):
    prompt = prompts(4 * BLOCK_TOKENS)
    longer = prompt + prompts(30)
    pair.ask_prefill("u1", prompt)
    pair.prefill.run()
    assert pair.answer("u2", longer) == expected_tokens(longer, 8)
    assert pair.decode.loaded_tokens[request_id("u2", side="decode")] == len(longer)


def test_two_requests_with_one_prefix_in_one_step_are_both_whole(pair, prompts):
    """The second one's prefix is computed by the first in the same step: it is not complete before that step's end."""
    prefix = prompts(3 * BLOCK_TOKENS)
    tails = {name: prefix + prompts(20) for name in ("u1", "u2")}
    for name, prompt in tails.items():
        pair.ask_prefill(name, prompt)
        pair.ask_decode(name, prompt)
    pair.run()
    for name, prompt in tails.items():
        assert pair.decode.answers[request_id(name, side="decode")] == expected_tokens(prompt, 8)
    assert pair.settle()


def test_a_request_without_a_key_is_served_at_once_on_both_sides(pair, prompts):
    prompt = prompts(60)
    for engine in (pair.prefill, pair.decode):
        assert engine.answer("cmpl-plain-0-0a1b2c3d", prompt) == expected_tokens(prompt, 8)
        assert engine.settle() == engine.free_blocks_at_start
    assert pair.hub.asked == []
    assert pair.hub.leases() == []


def test_the_same_key_with_another_prompt_is_not_used(pair, prompts):
    first, second = prompts(60), prompts(60)
    pair.ask_prefill("u1", first)
    pair.prefill.run()
    own_id = pair.ask_decode("u1", second)
    pair.decode.run()
    assert pair.decode.answers[own_id] == expected_tokens(second, 8)
    assert pair.decode.loads[own_id] == 0


@pytest.mark.parametrize("answer", ["none", "mismatch", "unreachable", "refused", "timeout", "busy", "what?"])
def test_every_other_answer_means_compute(pair, prompts, answer):
    prompt = prompts(60)
    pair.hub.answers[f"{request_id('u1', side='decode')[5:-11]} 0 0"] = answer
    assert pair.answer("u1", prompt) == expected_tokens(prompt, 8)
    assert pair.decode.loads[request_id("u1", side="decode")] == 0


def test_several_prompts_and_children_of_a_call_are_told_apart(pair, prompts):
    asked = {(index, child): prompts(50) for index in (0, 1) for child in (0, 1)}
    for side, engine, max_tokens in (("prefill", pair.prefill, 1), ("decode", pair.decode, 8)):
        for (index, child), prompt in asked.items():
            engine.add(request_id("u1", side=side, index=index, child=child), prompt, max_tokens)
        engine.run()
    for (index, child), prompt in asked.items():
        own_id = request_id("u1", side="decode", index=index, child=child)
        assert pair.decode.answers[own_id] == expected_tokens(prompt, 8)
        assert pair.decode.loaded_tokens[own_id] == 50
    assert pair.settle()


def test_parameters_lead_from_the_prefill_servers_answer_to_its_kv(pair, prompts):
    prompt = prompts(70)
    pair.prefill.add("cmpl-h-0-0a1b2c3d", prompt, 1, parameters={"do_remote_decode": True})
    pair.prefill.run()
    parameters = pair.prefill.parameters["cmpl-h-0-0a1b2c3d"]
    assert parameters["do_remote_prefill"] is True
    pair.decode.add("cmpl-other-0-99999999", prompt, parameters=parameters)
    pair.decode.run()
    assert pair.decode.answers["cmpl-other-0-99999999"] == expected_tokens(prompt, 8)
    assert pair.decode.loaded_tokens["cmpl-other-0-99999999"] == 70
    assert pair.settle()


def test_a_second_try_with_the_same_id_takes_the_place_of_the_first(pair, prompts):
    prompt = prompts(60)
    pair.ask_prefill("u1", prompt)
    pair.prefill.run()
    again = request_id("u1", side="prefill").replace("0a1b2c3d", "0a1b2c3e")
    pair.prefill.add(again, prompt, 1)
    pair.prefill.run()
    own_id = pair.ask_decode("u1", prompt)
    pair.decode.run()
    assert pair.decode.answers[own_id] == expected_tokens(prompt, 8)
    assert pair.decode.loaded_tokens[own_id] == 60
    assert pair.settle()
    assert pair.hub.leases() == []


def test_a_lease_that_ends_before_its_request_gives_the_blocks_back(pair, prompts):
    """Decode has all before prefill has sampled its token, or gave up waiting."""
    prompt = prompts(60)
    pair.ask_prefill("u1", prompt)
    pair.prefill.step()
    (worker,) = [worker for worker in pair.hub.workers.values() if worker.port]
    for key in list(worker.leases):
        worker.end(key)
    pair.prefill.run()
    assert pair.prefill.settle() == pair.prefill.free_blocks_at_start
    own_id = pair.ask_decode("u1", prompt)
    worker.gone.add(f"{own_id[5:-11]} 0 0")
    pair.decode.run()
    assert pair.decode.answers[own_id] == expected_tokens(prompt, 8)
