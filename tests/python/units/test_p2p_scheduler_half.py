"""Risk: a request waits for ever, asks twice, is offered before it is right, or is held for nobody."""

import types

import pytest

from kvlane.vllm import p2p_scheduler
from kvlane.vllm.p2p_options import P2pOptions
from kvlane.vllm.p2p_scheduler import P2pSchedulerHalf, P2pSettings
from kvlane.vllm.p2p_steps import Abort, Extend, Finish, Offer, Progress, Release, Revoke
from test_scheduler_half import BLOCK, Clock, allocate, output, request

PLACE = "___prefill_addr_10.0.0.1:14579___decode_addr_10.0.0.2:14580_"
SERVED = types.SimpleNamespace(name="FINISHED_LENGTH_CAPPED")
ABORTED = types.SimpleNamespace(name="FINISHED_ABORTED")


class Asker:
    def __init__(self):
        self.answer, self.asked, self.forgotten, self.ranks = "pending", [], [], None

    def ask(self, key, host, port, tokens, digest, timeout_ms):
        self.asked.append((key, host, port, tokens))
        if self.answer == "raise":
            raise OSError("closed")
        return self.answer

    def tensor_ranks(self, host, port):
        return self.ranks

    def forget(self, key):
        self.forgotten.append(key)

    def close(self):
        self.asked.append("closed")


@pytest.fixture(autouse=True)
def digest(monkeypatch):
    monkeypatch.setattr(p2p_scheduler, "prompt_digest", lambda chain: bytes([chain.token_count % 256]) * 32)


def make(options=None, **settings):
    clock, asker = Clock(), Asker()
    values = {"block_tokens": BLOCK, "cache_blocks": 100, "can_offer": False, "can_pull": True, **settings}
    return P2pSchedulerHalf(P2pOptions(**(options or {})), P2pSettings(**values), asker, clock), asker, clock


def prefill(**settings):
    return make(can_offer=True, can_pull=False, **settings)[0]


def named(name, tokens=100, suffix="0a1b2c3d", **changes):
    return request(tokens, f"cmpl-{PLACE}{name}-0-{suffix}", num_prompt_tokens=tokens, status=SERVED, **changes)


def key(name):
    return f"{PLACE}{name} 0 0"


def schedule(half, asked, block_ids, computed=0, scheduled=None, **kind):
    """A step in which the request (new, unless `cached`) gets blocks."""
    scheduled = asked.num_tokens - computed if scheduled is None else scheduled
    entry = (asked.request_id, block_ids, computed, scheduled)
    if kind.get("resumed"):
        return half.step(output(cached=[(*entry, True)]))
    return half.step(output(cached=[entry]) if kind.get("cached") else output(new=[entry]))


# ---- decode


def test_an_answer_is_waited_for_without_blocks_and_then_all_that_is_missing_is_pulled():
    half, asker, _ = make()
    asked = named("u")
    assert half.matched_tokens(asked, 32) == (None, False)
    assert half.step(output()).is_idle
    asker.answer = "started"
    assert half.matched_tokens(asked, 32) == (68, True)
    allocate(half, asked, list(range(1, 8)), 68)
    (pull,) = half.step(output()).pulls
    assert (pull.key, pull.host, pull.port, pull.tokens) == (key("u"), "10.0.0.1", 14579, 100)
    assert (pull.first_block, pull.block_ids) == (2, [3, 4, 5, 6, 7])
    assert asker.forgotten == [key("u")]
    assert set(asker.asked) == {(key("u"), "10.0.0.1", 14579, 100)}


def test_a_request_without_a_key_asks_nobody():
    half, asker, _ = make()
    assert half.matched_tokens(request(), 0) == (0, False)
    assert asker.asked == []


@pytest.mark.parametrize("tokens", [2, 16, 17, 33])
def test_with_all_but_the_last_token_at_hand_prefill_is_released(tokens):
    half, asker, _ = make()
    asked = named("u", tokens)
    assert half.matched_tokens(asked, tokens - 1) == (0, False)
    allocate(half, asked, [1], 0)
    (order,) = half.step(output()).orders
    assert (order.key, order.port) == (key("u"), 14579)
    assert isinstance(order, Release)
    assert asker.asked == []


def test_a_question_ends_by_a_deadline_even_if_the_asker_forgets_it():
    half, asker, clock = make({"ask_timeout_ms": 1000})
    asked = named("u")
    assert half.matched_tokens(asked, 0) == (None, False)
    clock.now_s += 2.1
    assert half.matched_tokens(asked, 0) == (0, False)
    assert asker.forgotten == [key("u")]
    asker.answer = "ready"
    assert half.matched_tokens(asked, 0) == (0, False), "what was settled stays so"


@pytest.mark.parametrize(("answer", "released"), [("none", False), ("timeout", True), ("unreachable", False)])
def test_a_miss_is_counted_by_its_reason(answer, released):
    half, asker, _ = make()
    asker.answer = answer
    asked = named("u")
    assert half.matched_tokens(asked, 0) == (0, False)
    allocate(half, asked, [1], 0)
    assert bool(half.step(output()).orders) == released
    assert half.take_counters()[f"request_{answer}"] == 1


def test_a_question_that_cannot_be_asked_is_not_asked_again():
    half, asker, _ = make()
    asker.answer = "raise"
    asked = named("u")
    assert [half.matched_tokens(asked, 0) for _ in range(3)] == [(0, False)] * 3
    assert len(asker.asked) == 1


def test_a_request_that_needs_its_prompts_logits_computes_it():
    half, asker, _ = make()
    asked = named("u", sampling_params=types.SimpleNamespace(prompt_logprobs=0))
    assert half.matched_tokens(asked, 0) == (0, False)
    allocate(half, asked, [1], 0)
    assert asker.asked == []
    assert isinstance(half.step(output()).orders[0], Release)


@pytest.mark.parametrize("how", ["failed", "bad block"])
def test_a_request_whose_pull_failed_never_pulls_again(how):
    half, asker, _ = make()
    asker.answer = "ready"
    asked = named("u")
    half.matched_tokens(asked, 0)
    allocate(half, asked, list(range(1, 8)), 100)
    half.step(output())
    half.workers_answered([asked.request_id], [asked.request_id] if how == "failed" else [], {3})
    assert half.matched_tokens(asked, 0) == (0, False)
    assert half.take_counters()["recomputed_requests"] == 1


def test_vllms_negative_count_after_a_failed_partial_block_is_taken_back():
    half, asker, _ = make()
    asker.answer = "ready"
    asked = named("u")
    half.matched_tokens(asked, 32)
    allocate(half, asked, list(range(1, 8)), 68)
    half.step(output())
    half.workers_answered([asked.request_id], [], {3})
    asked.num_external_computed_tokens = -27  # what 0.15.0 makes of it; its counter refuses to go back
    allocate(half, asked, list(range(1, 8)), 0)
    assert asked.num_external_computed_tokens == 0


def test_a_preempted_request_does_not_pull():
    half, asker, _ = make()
    asker.answer = "ready"
    assert half.matched_tokens(named("u", num_tokens=101), 0) == (0, False)
    assert half.matched_tokens(named("u", num_tokens=100, suffix="00000000"), 0) == (100, True)


def test_parked_blocks_have_a_bound_but_one_request_always_fits():
    half, asker, clock = make({"parked_percent": 10, "ask_timeout_ms": 1000, "transfer_timeout_ms": 1000})
    asker.answer = "started"
    first, second = named("a", 400), named("b", 16)
    assert half.matched_tokens(first, 0) == (400, True)
    allocate(half, first, list(range(1, 26)), 400)
    assert half.matched_tokens(second, 0) == (None, False)
    half.step(output())
    half.workers_answered([first.request_id], [], set())
    assert half.matched_tokens(second, 0) == (None, False), "loaded and not started, it still holds its blocks"
    schedule(half, first, list(range(1, 26)), 399)
    assert half.matched_tokens(second, 0) == (16, True)
    allocate(half, second, [30], 16)
    third = named("c", 400)
    assert half.matched_tokens(third, 0) == (None, False)
    clock.now_s += 2.1
    assert half.matched_tokens(third, 0) == (0, False)
    assert third.request_id not in half._loading


@pytest.mark.parametrize("holds", [True, False])
def test_an_abort_while_loading_is_left_to_the_workers(holds):
    half, asker, _ = make(holds_aborted_loads=holds)
    asker.answer = "ready"
    asked = named("u")
    half.matched_tokens(asked, 0)
    allocate(half, asked, list(range(1, 8)), 100)
    half.step(output())
    assert half.finished(asked) == (not holds, None)
    assert half.step(output()).orders == [Abort(asked.request_id)]


def test_an_abort_before_the_pull_releases_prefill():
    half, asker, _ = make()
    asked = named("u")
    half.matched_tokens(asked, 0)
    asked.status = ABORTED
    assert half.finished(asked) == (False, None)
    (order,) = half.step(output()).orders
    assert isinstance(order, Release)
    assert asker.forgotten == [key("u")]
    assert half.step(output()).is_idle


# ---- prefill


def test_a_prompt_in_chunks_is_offered_at_once_and_grows():
    half = prefill()
    asked = named("u")
    assert half.matched_tokens(asked, 0) == (0, False)
    step = schedule(half, asked, [1, 2], scheduled=40)
    (offer,) = step.orders
    assert (offer.key, offer.tokens, offer.block_ids) == (key("u"), 100, [1, 2])
    assert step.progress == [Progress(key("u"), 0, 2)]
    step = schedule(half, asked, [3, 4, 5], 40, 40, cached=True)
    assert step.orders == [Extend(key("u"), [3, 4, 5])]
    assert step.progress == [Progress(key("u"), 2, 5)]
    step = schedule(half, asked, [6, 7], 80, 20, cached=True)
    assert step.progress == [Progress(key("u"), 5, 7)], "the last block counts though it is not full"
    step = schedule(half, asked, [8], 100, 30, cached=True)
    assert step.is_idle, "blocks behind the prompt are no one else's affair"
    assert half.finished(asked) == (True, None)
    assert half.step(output()).orders == [Finish(key("u"), asked.request_id)]


def test_a_request_without_a_key_or_of_another_side_is_not_offered():
    half = prefill()
    for asked in (request(), named("u", kv_transfer_params={"do_remote_prefill": True})):
        half.matched_tokens(asked, 0)
        assert schedule(half, asked, [1]).is_idle


def test_a_prompt_of_one_token_has_nothing_to_hand_over():
    half, decode = prefill(), make()[0]
    asked = named("u", 1)
    half.matched_tokens(asked, 0)
    assert schedule(half, asked, [1]).is_idle
    assert half.finished(asked) == (False, None)
    assert decode.matched_tokens(asked, 0) == (0, False)
    allocate(decode, asked, [1], 0)
    assert decode.step(output()).is_idle


def test_an_answer_to_parameters_leads_decode_here():
    half = prefill(own_host="10.0.0.7", own_port=14579, engine_id="e")
    half.listens_on(20000)
    asked = request(40, "cmpl-h-0-0a1b2c3d", kv_transfer_params={"do_remote_decode": True}, status=SERVED)
    half.matched_tokens(asked, 0)
    schedule(half, asked, [1, 2, 3])
    assert half.finished(asked) == (
        True,
        {
            "do_remote_prefill": True, "do_remote_decode": False, "transfer_id": "h", "remote_engine_id": "e",
            "remote_host": "10.0.0.7", "remote_port": 20000,
        },
    )  # fmt: skip


@pytest.mark.parametrize("why", ["unfinished", "aborted"])
def test_what_ends_before_its_time_is_revoked(why):
    half = prefill()
    asked = named("u")
    half.matched_tokens(asked, 0)
    schedule(half, asked, [1, 2], scheduled=100 if why == "aborted" else 40)
    asked.status = ABORTED if why == "aborted" else SERVED
    assert half.finished(asked) == (False, None)
    # The second one says that nothing will come any more.
    assert half.step(output()).orders == [Revoke(key("u")), Revoke(key("u"))]


def test_a_request_that_ends_in_the_queue_is_said_to_be_gone():
    half = prefill()
    asked = named("u")
    asked.status = ABORTED
    assert half.finished(asked) == (False, None)
    assert half.step(output()).orders == [Revoke(key("u"))]


def test_preemption_revokes_in_the_same_step_and_a_resumed_request_is_offered_anew():
    half = prefill()
    asked = named("u")
    half.matched_tokens(asked, 0)
    schedule(half, asked, [1, 2, 3], scheduled=48)
    assert half.step(output(preempted=[asked.request_id])).orders == [Revoke(key("u"))]
    step = schedule(half, asked, [4, 5, 6, 7, 8, 9, 10], 16, 84, resumed=True)
    (offer,) = step.orders
    assert isinstance(offer, Offer)
    assert offer.block_ids == [4, 5, 6, 7, 8, 9, 10]
    assert step.progress == [Progress(key("u"), 0, 7)]
    assert half.finished(asked)[0] is True


def test_an_answer_in_flight_of_a_preempted_request_hands_nothing_over():
    half = prefill()
    asked = named("u")
    half.matched_tokens(asked, 0)
    schedule(half, asked, list(range(1, 8)))
    half.step(output(preempted=[asked.request_id]))
    assert half.finished(asked) == (False, None)


def test_a_computation_that_begins_again_begins_its_offer_again():
    """A failed load of another connector: vLLM goes back to the first bad block."""
    half = prefill()
    asked = named("u")
    half.matched_tokens(asked, 0)
    schedule(half, asked, [1, 2, 3], 0, 48)
    step = schedule(half, asked, None, 16, 32, cached=True)
    assert [type(order) for order in step.orders] == [Revoke, Offer]
    assert step.orders[1].block_ids == [1, 2, 3]
    assert step.progress == [Progress(key("u"), 0, 3)]


def test_the_last_request_with_a_key_has_it():
    half = prefill()
    first, second = named("u"), named("u", suffix="99999999")
    for asked in (first, second):
        half.matched_tokens(asked, 0)
    schedule(half, first, list(range(1, 8)))
    step = schedule(half, second, list(range(11, 18)))
    assert [type(order) for order in step.orders] == [Revoke, Revoke, Offer]
    assert half.finished(first) == (False, None)
    assert half.step(output()).is_idle, "the key is another's now"
    assert half.finished(second)[0] is True


def test_what_a_displaced_request_completes_is_not_said_of_the_one_that_took_its_key():
    half = prefill()
    first, second = named("u"), named("u", suffix="ffffffff")
    half.matched_tokens(first, 0), half.matched_tokens(second, 0)
    allocate(half, first, list(range(1, 8)), 0)
    allocate(half, second, list(range(11, 18)), 0)
    both = [(first.request_id, list(range(1, 8)), 0, 100), (second.request_id, list(range(11, 18)), 0, 40)]
    step = half.step(output(new=both))
    (offer,) = [order for order in step.orders[-1:] if isinstance(order, Offer)]
    assert offer.block_ids == list(range(11, 18))
    # 40 tokens are two whole blocks; the third is filled by half.
    assert step.progress == [Progress(key("u"), 0, 2)]


def test_a_second_try_takes_the_key_of_a_held_request():
    half = prefill()
    first, second = named("u"), named("u", suffix="99999999")
    half.matched_tokens(first, 0)
    schedule(half, first, list(range(1, 8)))
    assert half.finished(first)[0] is True
    half.matched_tokens(second, 0)
    step = schedule(half, second, list(range(11, 18)))
    assert [type(order) for order in step.orders] == [Finish, Revoke, Revoke, Offer]
    half.workers_sent([first.request_id])
    assert half.finished(second)[0] is True
    half.workers_sent([second.request_id])
    assert half._offers.count == 0
    assert half._offers._owners == {}


def test_what_a_doubtful_step_computed_counts_after_a_reliable_one():
    half = prefill(batches_in_flight=1)
    asked = named("u")
    half.matched_tokens(asked, 0)
    doubtful = output(new=[(asked.request_id, [1, 2], 0, 32)])
    doubtful.has_sync_kv_loads = True
    step = half.step(doubtful)
    assert [type(order) for order in step.orders] == [Offer]
    assert step.progress == []
    assert schedule(half, asked, [3], 32, 16, cached=True).progress == []
    assert schedule(half, asked, [4], 48, 16, cached=True).progress == [Progress(key("u"), 0, 4)]


def test_an_error_in_planning_loses_no_order_that_vllm_waits_for(monkeypatch):
    half = prefill()
    done, running = named("a"), named("b")
    half.matched_tokens(done, 0)
    schedule(half, done, list(range(1, 8)))
    half.matched_tokens(running, 0)
    schedule(half, running, [8], scheduled=16)
    assert half.finished(done)[0] is True
    step = half.step(types.SimpleNamespace())
    assert step.orders == [Finish(key("a"), done.request_id), Revoke(key("b"))]


# ---- servers with both roles


@pytest.mark.parametrize(
    ("port", "max_tokens", "asks"),
    [(14579, 8, False), (14580, 1, True), (9, 1, False), (9, 8, True)],
    ids=["its own prefill port", "its own decode port", "one token", "more tokens"],
)
def test_a_server_with_both_roles_knows_its_part(port, max_tokens, asks):
    half, asker, _ = make(can_offer=True, own_port=port)
    half.matched_tokens(named("u", max_tokens=max_tokens), 0)
    assert bool(asker.asked) == asks


def test_workers_are_told_how_many_ranks_the_prefill_server_has():
    half, asker, _ = make()
    asker.answer, asker.ranks = "ready", 4
    asked = named("a")
    assert half.matched_tokens(asked, 0) == (100, True)
    half.blocks_allocated(asked, lambda: list(range(7)), 100)
    local = named("b")
    half.matched_tokens(local, 0)
    half.blocks_allocated(local, lambda: list(range(7, 14)), 0)
    step = half.step(output())
    assert [pull.tensor_ranks for pull in step.pulls] == [4]
    assert [order.tensor_ranks for order in step.orders] == [4]


def test_a_pull_begins_also_where_the_number_of_ranks_cannot_be_read():
    half, asker, _ = make()
    asker.answer = "ready"

    def fail(host, port):
        raise OSError("closed")

    asker.tensor_ranks = fail
    asked = named("a")
    half.matched_tokens(asked, 0)
    half.blocks_allocated(asked, lambda: list(range(7)), 100)
    assert [pull.tensor_ranks for pull in half.step(output()).pulls] == [None]
