"""Risk: KV that was computed on a load that failed is passed on."""

import types

import pytest

from kvlane.vllm.doubt import DoubtfulSteps
from test_scheduler_half import BLOCK, output


def started(request_id, computed_tokens, resumed=False):
    entry = (request_id, [1], computed_tokens, 1)
    return output(cached=[(*entry, True)]) if resumed else output(new=[entry])


def announced():
    return types.SimpleNamespace(has_sync_kv_loads=True)


@pytest.mark.parametrize("in_flight", [1, 2])
def test_steps_are_doubtful_until_the_outcome_is_known(in_flight):
    doubt = DoubtfulSteps(BLOCK, in_flight, siblings_are_silent=False)
    assert not doubt.next_step(output())
    assert [doubt.next_step(announced()), *(doubt.next_step(output()) for _ in range(in_flight))] == [True] * (
        in_flight + 1
    )
    assert not doubt.next_step(output())


@pytest.mark.parametrize("resumed", [False, True])
def test_a_request_that_starts_with_more_than_it_had_was_loaded_by_a_sibling(resumed):
    doubt = DoubtfulSteps(BLOCK, 1, siblings_are_silent=True)
    doubt.asked("a", 2 * BLOCK)
    assert not doubt.next_step(started("a", 2 * BLOCK + 3, resumed))
    doubt.asked("b", 2 * BLOCK)
    assert doubt.next_step(started("b", 3 * BLOCK, resumed))


def test_own_loads_and_asynchronous_ones_are_no_reason_for_doubt():
    doubt = DoubtfulSteps(BLOCK, 1, siblings_are_silent=True)
    doubt.asked("own", BLOCK)
    doubt.loads("own", 2 * BLOCK)
    assert not doubt.next_step(started("own", 3 * BLOCK - 1))
    doubt.asked("waited", 0)
    assert not doubt.next_step(output())
    assert not doubt.next_step(started("waited", 3 * BLOCK))


def test_nothing_is_remembered_of_requests_that_are_gone():
    doubt = DoubtfulSteps(BLOCK, 1, siblings_are_silent=True)
    for name in ("a", "b"):
        doubt.asked(name, 0)
    doubt.gone("a")
    doubt.next_step(started("b", 0))
    assert doubt._asked == {}
