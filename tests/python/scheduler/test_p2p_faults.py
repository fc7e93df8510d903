"""Risk: an abort, a preemption or a lost transfer stops an engine, changes an answer, or keeps blocks for ever."""

import pytest

from paper_engine import ABORT_HOLDS_BLOCKS, BLOCK_TOKENS
from paper_model import expected_tokens
from paper_pair import PaperPair, request_id
from test_aborts import watch_reports

DECODE_ID = request_id("u1", side="decode")
PREFILL_ID = request_id("u1", side="prefill")


@pytest.fixture
def pair(monkeypatch, asynchronous):
    with PaperPair(monkeypatch, asynchronous=asynchronous) as made:
        yield made


def prefilled(pair, prompt, name="u1"):
    pair.ask_prefill(name, prompt)
    pair.prefill.run()


def begin_loading(pair, prompt):
    """A pull that stands still inside a copy."""
    prefilled(pair, prompt)
    pair.hub.is_frozen = True
    pair.ask_decode("u1", prompt)
    for _ in range(5):
        pair.decode.step()
    assert len(pair.hub.jobs()) == 1


# ---- aborts


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_abort_while_decode_waits_for_an_answer(pair, prompts, steps):
    """Prefill has not begun. What comes later is not kept for nobody."""
    prompt = prompts(60)
    pair.ask_decode("u1", prompt)
    for _ in range(steps):
        pair.decode.step()
    pair.decode.abort(DECODE_ID)
    assert pair.decode.settle() == pair.decode.free_blocks_at_start
    if steps:
        assert pair.hub.forgotten
    assert pair.answer("u2", prompt) == expected_tokens(prompt, 8)


def test_abort_on_decode_before_it_pulled_frees_prefill(pair, prompts):
    prompt = prompts(60)
    prefilled(pair, prompt)
    pair.ask_decode("u1", prompt)
    pair.decode.abort(DECODE_ID)
    for _ in range(2):
        pair.decode.step()
    assert pair.hub.leases() == []
    assert pair.settle()


def test_blocks_of_an_aborted_pull_stay_out_of_use_until_it_ended(monkeypatch, prompts, asynchronous):
    prompt, other = prompts(100), prompts(60)
    with PaperPair(monkeypatch, asynchronous=asynchronous, decode={"blocks": 13}) as pair:
        begin_loading(pair, prompt)
        held_blocks = set(pair.decode.block_ids(DECODE_ID))
        pair.decode.abort(DECODE_ID)
        pair.decode.add("other", other, max_tokens=16)
        for _ in range(40):
            pair.decode.step()
            if pair.decode.request("other") is not None:
                assert held_blocks.isdisjoint(pair.decode.block_ids("other")), "a block is in use while it is written"
        pair.hub.is_frozen = False
        pair.decode.run()
        assert pair.decode.answers["other"] == expected_tokens(other, 16)
        assert pair.decode.answers[DECODE_ID] == []
        assert pair.settle()
        assert pair.answer("u2", prompt) == expected_tokens(prompt, 8)


@pytest.mark.parametrize("steps_between", [0, 1, 3])
def test_an_aborted_pull_is_reported_once(pair, prompts, steps_between):
    begin_loading(pair, prompts(100))
    reported = watch_reports(pair.decode)
    pair.decode.abort(DECODE_ID)
    for _ in range(steps_between):
        pair.decode.step()
    assert reported == []
    pair.hub.is_frozen = False
    assert pair.decode.settle() == pair.decode.free_blocks_at_start
    for _ in range(5):
        pair.decode.step()
    assert reported == [("received" if ABORT_HOLDS_BLOCKS else "sent", DECODE_ID)]


def test_abort_after_the_pull_ended_and_before_it_was_heard(pair, prompts):
    prompt = prompts(100)
    begin_loading(pair, prompt)
    pair.hub.is_frozen = False
    scheduled = pair.decode.scheduler.schedule()
    result = pair.decode.runner.execute(scheduled)
    pair.decode.abort(DECODE_ID)
    pair.decode.scheduler.update_from_output(scheduled, result)
    assert pair.settle()
    assert pair.answer("u2", prompt) == expected_tokens(prompt, 8)


@pytest.mark.parametrize("steps", range(7))
@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_abort_at_any_step_of_either_side(monkeypatch, prompts, asynchronous, side, steps):
    prompt = prompts(100)
    with PaperPair(monkeypatch, asynchronous=asynchronous, prefill={"step_tokens": 24}) as pair:
        pair.hub.blocks_per_poll, pair.hub.lease_steps = 2, 30
        pair.ask_prefill("u1", prompt)
        pair.ask_decode("u1", prompt)
        for _ in range(steps):
            for engine in (pair.prefill, pair.decode):
                if engine.scheduler.has_unfinished_requests():
                    engine.step()
        engine, aborted = (pair.prefill, PREFILL_ID) if side == "prefill" else (pair.decode, DECODE_ID)
        engine.abort(aborted)
        pair.run()
        if side == "prefill":
            assert pair.decode.answers[DECODE_ID] == expected_tokens(prompt, 8)
        assert pair.settle()
        assert pair.hub.leases() == []
        assert pair.answer("u2", prompt) == expected_tokens(prompt, 8)


def test_a_prefill_that_is_aborted_in_the_queue_is_no_reason_to_wait(pair, prompts):
    prompt = prompts(60)
    pair.ask_decode("u1", prompt)
    pair.decode.step()
    pair.ask_prefill("u1", prompt)
    pair.prefill.abort(PREFILL_ID)
    pair.prefill.step()
    pair.decode.run()
    assert pair.decode.answers[DECODE_ID] == expected_tokens(prompt, 8)


# ---- failed pulls


@pytest.mark.parametrize("bad", [[0], [3], [6], list(range(7))], ids=["first", "middle", "last", "all"])
def test_a_failed_pull_costs_a_recompute_and_is_not_tried_again(pair, prompts, bad):
    prompt = prompts(100)
    begin_loading(pair, prompt)
    (number,) = next(worker.jobs for worker in pair.hub.workers.values() if worker.jobs)
    for position in bad:
        pair.decode.cache.scribble(pair.decode.block_ids(DECODE_ID)[position])
    pair.hub.failing[number] = (bad, "timeout")
    pair.hub.is_frozen = False
    # What is not bad must be right.
    worker = next(worker for worker in pair.hub.workers.values() if worker.jobs)
    _copy_all(pair, worker.jobs[number], skip=bad)
    pair.decode.run()
    assert pair.decode.answers[DECODE_ID] == expected_tokens(prompt, 8)
    assert pair.decode.loads[DECODE_ID] == 1
    # Nothing bad was left for others to find.
    assert pair.decode.answer("plain", prompt) == expected_tokens(prompt, 8)
    for lease in list(pair.hub.workers.values()):
        for key in list(lease.leases):
            lease.end(key)
    assert pair.settle()


def test_a_failed_pull_of_an_aborted_request_is_no_trouble(pair, prompts):
    prompt = prompts(100)
    begin_loading(pair, prompt)
    (number,) = next(worker.jobs for worker in pair.hub.workers.values() if worker.jobs)
    pair.decode.abort(DECODE_ID)
    pair.hub.failing[number] = (list(range(7)), "unreachable")
    pair.hub.is_frozen = False
    assert pair.decode.settle() == pair.decode.free_blocks_at_start
    assert pair.decode.answer("plain", prompt) == expected_tokens(prompt, 8)


def test_a_prefill_server_that_goes_away_costs_a_recompute(pair, prompts):
    prompt = prompts(100)
    begin_loading(pair, prompt)
    pair.prefill.worker.shutdown()
    pair.hub.is_frozen = False
    pair.decode.run()
    assert pair.decode.answers[DECODE_ID] == expected_tokens(prompt, 8)
    own_id = pair.ask_decode("u2", prompt + prompts(40))
    pair.decode.run()
    assert len(pair.decode.answers[own_id]) == 8


# ---- preemption


def test_a_preempted_prefill_takes_its_offer_back_and_makes_it_again(monkeypatch, prompts, asynchronous):
    """Blocks that were offered are given to another request, whose KV must not be handed over in their place."""
    prompts_of = {name: prompts(100) for name in ("u1", "u2", "u3")}
    settings = {"blocks": 17, "step_tokens": 32}
    with PaperPair(monkeypatch, asynchronous=asynchronous, prefill=settings) as pair:
        pair.hub.is_frozen, pair.hub.lease_steps = True, 50
        for name, prompt in prompts_of.items():
            pair.prefill.add(request_id(name, side="prefill"), prompt, max_tokens=40)
            pair.ask_decode(name, prompt)
        for _ in range(60):
            for engine in (pair.prefill, pair.decode):
                if engine.scheduler.has_unfinished_requests():
                    engine.step()
            if sum(pair.prefill.preemptions.values()):
                break
        assert pair.prefill.preemptions, "nobody was preempted, so nothing was tested"
        pair.hub.is_frozen = False
        pair.run(steps=2000)
        for name, prompt in prompts_of.items():
            assert pair.decode.answers[request_id(name, side="decode")] == expected_tokens(prompt, 8)
            assert pair.prefill.answers[request_id(name, side="prefill")] == expected_tokens(prompt, 40)


def test_a_prefill_that_a_reset_preempts_takes_its_offer_back(monkeypatch, prompts, asynchronous):
    """vLLM 0.15 does not name whom a reset preempts. Another request gets the blocks and writes them."""
    # Where steps follow each other, a request of one token ends with its last chunk.
    max_tokens = 1 if asynchronous else 30
    settings = {"step_tokens": 24, "blocks": 20}
    with PaperPair(monkeypatch, asynchronous=asynchronous, prefill=settings) as pair:
        pair.hub.lease_steps = 500
        other, prompt = prompts(110), prompts(100)
        pair.prefill.add("plain-00000000", other, max_tokens=30)
        for _ in range(5):
            pair.prefill.step()
        pair.prefill.add(PREFILL_ID, prompt, max_tokens=max_tokens)
        while pair.prefill.request(PREFILL_ID).num_computed_tokens < 100:
            pair.prefill.step()
        assert pair.prefill.scheduler.reset_prefix_cache(reset_running_requests=True)
        for _ in range(3):
            pair.prefill.step()
        own = pair.ask_decode("u1", prompt)
        pair.run(steps=2000)
        assert pair.decode.answers[own] == expected_tokens(prompt, 8)
        assert pair.prefill.answers[PREFILL_ID] == expected_tokens(prompt, max_tokens)


def test_what_was_computed_before_a_reset_is_handed_over_no_more(pair, prompts):
    """The weights may have changed in between."""
    prompt = prompts(100)
    prefilled(pair, prompt)
    pair.prefill.add(request_id("u2", side="prefill"), prompt, max_tokens=3)
    pair.prefill.step()
    assert pair.prefill.connector.reset_cache() is True
    pair.prefill.run()
    for name in ("u1", "u2"):
        own = pair.ask_decode(name, prompt)
        pair.decode.run()
        assert pair.decode.loaded_tokens[own] == 0
        assert pair.decode.answers[own] == expected_tokens(prompt, 8)
    assert pair.hub.leases() == []
    # What comes behind it is handed over.
    assert pair.answer("u3", prompt) == expected_tokens(prompt, 8)
    assert pair.settle()


def test_decode_does_not_pull_what_it_asked_for_before_a_reset(pair, prompts):
    prompt = prompts(60)
    own = pair.ask_decode("u1", prompt)
    pair.decode.step()
    assert pair.decode.connector.reset_cache() is True
    pair.ask_prefill("u1", prompt)
    pair.run()
    assert pair.decode.answers[own] == expected_tokens(prompt, 8)
    assert pair.decode.loaded_tokens[own] == 0


def test_a_preempted_decode_computes_its_prompt_itself(monkeypatch, prompts, asynchronous):
    """Its KV was consumed and prefill does not hold it any more."""
    asked = {name: prompts(60) for name in ("u1", "u2", "u3")}
    with PaperPair(monkeypatch, asynchronous=asynchronous, decode={"blocks": 16}, parked_percent=90) as pair:
        for name, prompt in asked.items():
            pair.ask_prefill(name, prompt)
        pair.prefill.run()
        for name, prompt in asked.items():
            pair.ask_decode(name, prompt, max_tokens=60)
        pair.decode.run()
        assert pair.decode.preemptions, "nobody was preempted, so nothing was tested"
        for name, prompt in asked.items():
            own_id = request_id(name, side="decode")
            assert pair.decode.answers[own_id] == expected_tokens(prompt, 60)
            assert pair.decode.loads[own_id] <= 1
        assert pair.settle()


# ---- room


def test_small_caches_on_both_sides_make_progress_without_a_deadline(monkeypatch, prompts, asynchronous):
    asked = {f"u{number}": prompts(60 + 7 * number) for number in range(8)}
    small = {"blocks": 16, "step_tokens": 48}
    with PaperPair(monkeypatch, asynchronous=asynchronous, prefill=small, decode=small) as pair:
        pair.hub.blocks_per_poll = 1
        for name, prompt in asked.items():
            pair.ask_decode(name, prompt)
            pair.ask_prefill(name, prompt)
        pair.run(steps=3000)
        for name, prompt in asked.items():
            assert pair.decode.answers[request_id(name, side="decode")] == expected_tokens(prompt, 8)
        assert pair.settle()


def test_waiting_requests_leave_others_room_to_compute(monkeypatch, prompts, asynchronous):
    """Pulls that do not end take at most their share of the cache."""
    with PaperPair(monkeypatch, asynchronous=asynchronous, decode={"blocks": 25}) as pair:
        pair.hub.is_frozen = True
        asked = {f"u{number}": prompts(5 * BLOCK_TOKENS) for number in range(4)}
        for name, prompt in asked.items():
            prefilled(pair, prompt, name)
            pair.ask_decode(name, prompt)
        for _ in range(5):
            pair.decode.step()
        assert len(pair.hub.jobs()) == 2
        plain = prompts(100)
        pair.decode.add("plain", plain)
        for _ in range(30):
            pair.decode.step()
        assert pair.decode.answers["plain"] == expected_tokens(plain, 8)
        pair.hub.is_frozen = False
        pair.decode.run()
        for name, prompt in asked.items():
            assert pair.decode.answers[request_id(name, side="decode")] == expected_tokens(prompt, 8)
        assert pair.settle()


def _copy_all(pair, job, skip):
    from support.fake_p2p import _copy

    source = next(worker for worker in pair.hub.workers.values() if worker.port)
    target = next(worker for worker in pair.hub.workers.values() if not worker.port)
    lease = source.leases[job.key]
    for position, block in enumerate(job.block_ids):
        if position not in skip:
            _copy(source.tensors, lease.block_ids[position], target.tensors, block)
