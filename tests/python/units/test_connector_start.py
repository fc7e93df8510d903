"""Risk: an engine starts with a configuration under which a failed load gives a wrong answer."""

import types

import pytest

from kvlane import ConfigError
from kvlane.vllm import connector
from kvlane.vllm.options import parse_options


def set_policy(vllms_own, **options):
    transfer = types.SimpleNamespace(kv_load_failure_policy=vllms_own)
    connector._set_failure_policy(transfer, parse_options(options))
    return transfer.kv_load_failure_policy


class MultiConnector:
    """Makes a connector, as vLLM's class of that name does."""

    def __init__(self, make):
        self.made = make()


class Scheduler:
    """Makes a connector before it has a block pool, as vLLM's class of that name does."""

    def __init__(self, make):
        self.made = make()
        self.kv_cache_manager = types.SimpleNamespace(block_pool="the pool")


@pytest.mark.parametrize("vllms_own", ["fail", "recompute"])
def test_a_failed_load_costs_a_recompute_unless_it_is_synchronous(vllms_own):
    assert set_policy(vllms_own) == "recompute"
    assert set_policy(vllms_own, sync_load=True) == "fail"
    assert set_policy(vllms_own, load_failure_policy="keep") == vllms_own


def test_synchronous_loads_are_refused_where_vllm_would_recompute_them():
    assert set_policy("fail", sync_load=True, load_failure_policy="keep") == "fail"
    with pytest.raises(ConfigError, match=r"kv_load_failure_policy 'recompute' while sync_load is True, allowed: "):
        set_policy("recompute", sync_load=True, load_failure_policy="keep")


def test_below_multi_connector_synchronous_loads_are_refused_and_the_policy_is_left_alone():
    assert MultiConnector(lambda: set_policy("fail")).made == "fail"
    with pytest.raises(ConfigError, match=r"sync_load is True below MultiConnector.*allowed: sync_load False"):
        MultiConnector(lambda: set_policy("fail", sync_load=True))


def test_the_block_pool_is_found_also_where_vllm_does_not_hand_it_over():
    maker = Scheduler(lambda: connector._block_pool_finder(True))
    assert maker.made() == "the pool"
    assert connector._block_pool_finder(True)() is None
