"""Risk: an engine starts with a configuration under which a failed load gives a wrong answer."""

import types

import pytest

from kvlane import ConfigError
from kvlane.vllm import connector, probes, start
from kvlane.vllm.options import parse_options
from kvlane.vllm.unproven import NEXT_OUTPUT, STALE_TOKENS, UnprovenBlocks


def set_policy(vllms_own, **options):
    transfer = types.SimpleNamespace(kv_load_failure_policy=vllms_own)
    given = parse_options(options)
    start.set_failure_policy(transfer, given.load_failure_policy, given.sync_load)
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
    maker = Scheduler(lambda: probes.block_pool_finder(True))
    assert maker.made() == "the pool"
    assert probes.block_pool_finder(True)() is None


def reason(model, model_identity=None, scales=False):
    config = types.SimpleNamespace(
        model_config=types.SimpleNamespace(model=model),
        load_config=types.SimpleNamespace(load_format="auto"),
        cache_config=types.SimpleNamespace(calculate_kv_scales=scales, cache_dtype="fp8"),
    )
    return start.reason_not_to_share(config, model_identity)


def test_an_engine_keeps_kv_to_itself_whose_weights_or_scales_nobody_else_can_name(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    assert reason(str(tmp_path)) is None
    assert "calculate_kv_scales" in reason(str(tmp_path), "build 7", scales=True)
    assert "'org/of-no-cache', of which no weight files were found here, cannot be told" in reason("org/of-no-cache")
    assert "'s3://models/llama'" in reason("s3://models/llama")
    assert "same model_identity" in reason("s3://models/llama")
    assert reason("s3://models/llama", "build 7") is None


def begin(marks, stages, asynchronous, monkeypatch):
    monkeypatch.setattr(start, "marks_of_stale_tokens", lambda: set(marks))
    config = types.SimpleNamespace(
        parallel_config=types.SimpleNamespace(pipeline_parallel_size=stages),
        scheduler_config=types.SimpleNamespace(async_scheduling=asynchronous),
    )
    start.refuse_tokens_that_nobody_drops(config)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("mark", NEXT_OUTPUT)
def test_synchronous_loads_with_pipeline_stages_are_refused_where_vllm_drops_one_output_at_most(
    mark, asynchronous, monkeypatch
):
    begin([mark], 1, asynchronous, monkeypatch)
    for stages in (2, 3):
        with pytest.raises(ConfigError, match=rf"pipeline_parallel_size {stages}, .*allowed: pipeline_parallel_size 1"):
            begin([mark], stages, asynchronous, monkeypatch)
        begin([STALE_TOKENS], stages, asynchronous, monkeypatch)


def test_synchronous_loads_in_overlapping_steps_are_refused_where_vllm_drops_no_output(monkeypatch):
    begin([], 1, False, monkeypatch)
    with pytest.raises(ConfigError, match=r"async_scheduling True, .*allowed: async_scheduling False"):
        begin([], 1, True, monkeypatch)


def test_this_vllm_has_a_mark_for_outputs_in_flight():
    assert probes.marks_of_stale_tokens()


@pytest.mark.parametrize(("mark", "before", "after"), [(NEXT_OUTPUT[0], False, True), (NEXT_OUTPUT[1], 0, 1)])
def test_the_one_output_in_flight_of_a_preempted_request_is_dropped(mark, before, after):
    unproven = UnprovenBlocks(lasts_steps=3)
    unproven.add({1})
    record = types.SimpleNamespace(num_output_placeholders=1, **{mark: before})
    unproven.preempted(record)
    assert (record.num_output_placeholders, getattr(record, mark)) == (0, after)
    assert type(getattr(record, mark)) is type(before)


def test_blocks_lie_outermost_where_vllm_has_that_layout_and_only_if_asked_for():
    def layout(**options):
        transfer = types.SimpleNamespace(kv_connector_extra_config=options)
        return connector.KvlaneFsConnector.get_required_kvcache_layout(
            types.SimpleNamespace(kv_transfer_config=transfer)
        )

    assert layout() is None
    try:
        from vllm.v1.kv_cache_layout import KVCacheLayout
    except ImportError:  # before 0.29
        assert layout(block_outermost_layout=True) is None
    else:
        # vLLM takes the name of one of its own layouts.
        assert KVCacheLayout[layout(block_outermost_layout=True)]
