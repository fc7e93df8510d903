"""Risk: figures that are wrong or missing, or a front end that does not start because of them."""

import functools
import math
import os
import subprocess
import sys
import types

import prometheus_client
import pytest

from kvlane.vllm import hooks, metrics
from kvlane.vllm.connector import ExampleConnector, KvlaneFsConnector
from kvlane.vllm.metrics import KvlaneStats
from kvlane.vllm.p2p_connector import KvlaneP2pConnector, P2pNcclConnector
from kvlane.vllm.p2p_options import LANES


@pytest.fixture
def front_end(monkeypatch):
    """Makes metrics as vLLM's front end does, in a registry of their own."""
    registry = prometheus_client.CollectorRegistry()
    kinds = {
        kind: functools.partial(kind, registry=registry)
        for kind in (prometheus_client.Counter, prometheus_client.Gauge)
    }
    kinds[prometheus_client.Histogram] = prometheus_client.Histogram
    config = types.SimpleNamespace(kv_transfer_config=None)
    monkeypatch.setattr(metrics, "_made", {})

    def make(kind):
        return kind.build_prom_metrics(config, kinds, ["engine"], {0: ["0"]})

    make.registry = registry
    return make


def test_both_names_in_one_multi_connector_share_their_metrics(front_end):
    """MultiConnector asks each class for its metrics; a second one of the same name is an error to Prometheus."""
    for kind in (KvlaneFsConnector, ExampleConnector):
        front_end(kind).observe({"stored_bytes": 2, "segments": 3})
    value = front_end.registry.get_sample_value
    assert value("vllm:kvlane_transfer_bytes_total", {"engine": "0", "direction": "store"}) == 4
    assert value("vllm:kvlane_segments", {"engine": "0"}) == 3


def test_metrics_that_vllm_unregistered_are_made_anew(front_end):
    front_end(KvlaneFsConnector)
    for collector in list(front_end.registry._collector_to_names):
        front_end.registry.unregister(collector)
    front_end(KvlaneFsConnector).observe({"hit_blocks": 5})
    labels = {"engine": "0", "outcome": "hit"}
    assert front_end.registry.get_sample_value("vllm:kvlane_lookup_blocks_total", labels) == 5


def test_a_name_that_somebody_else_took_is_an_error(front_end):
    prometheus_client.Gauge("vllm:kvlane_segments", "another's", registry=front_end.registry)
    with pytest.raises(ValueError, match="Duplicated"):
        front_end(KvlaneFsConnector)


def test_what_is_a_state_is_not_added_up_over_ranks_and_reports():
    stats = KvlaneStats(data={"segments": 3, "used_bytes": 10, "stored_bytes": 1})
    stats.aggregate(KvlaneStats(data={"segments": 3, "used_bytes": 12, "stored_bytes": 1}))
    assert stats.data == {"segments": 3, "used_bytes": 12, "stored_bytes": 2}


class Half:
    def __init__(self, **counters):
        self.counters = counters

    def take_counters(self):
        counters, self.counters = self.counters, {}
        return counters


def connector_with(worker=None, scheduler=None):
    made = object.__new__(KvlaneFsConnector)
    made._failed_hooks, made._next_report_s, made._worker, made._scheduler = set(), 0.0, worker, scheduler
    return made


def test_a_worker_reports_now_and_then_where_the_schedulers_counts_travel_with_its_own(monkeypatch):
    """A server that only misses has nothing to say on the worker's side; vLLM before 0.24 then drops the misses."""
    monkeypatch.setattr(hooks, "SCHEDULERS_COUNTS_NEED_WORKERS", True)
    worker = connector_with(worker=Half())
    first = worker.get_kv_connector_stats()
    worker._next_report_s = math.inf  # the second is over before the time has come, however slow the machine is
    second = worker.get_kv_connector_stats()
    assert first.data == {}
    assert second is None
    scheduler = connector_with(scheduler=Half(miss_blocks_absent=4))
    assert first.aggregate(scheduler.get_kv_connector_stats()).data == {"miss_blocks_absent": 4}
    assert scheduler.get_kv_connector_stats() is None


def test_an_idle_worker_says_nothing_to_a_newer_vllm(monkeypatch):
    monkeypatch.setattr(hooks, "SCHEDULERS_COUNTS_NEED_WORKERS", False)
    assert connector_with(worker=Half()).get_kv_connector_stats() is None


def test_multi_connector_finds_the_class_also_with_the_plugin_turned_off():
    """It looks children up by class name when their counts arrive, in a process that only imported the class."""
    code = (
        "from kvlane.vllm import KvlaneFsConnector as ours\n"
        "from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory as factory\n"
        "assert factory.get_connector_class_by_name('KvlaneFsConnector') is ours\n"
        "assert factory.get_connector_class_by_name('ExampleConnector').__module__.startswith('vllm.')\n"
    )
    environment = {**os.environ, "KVLANE_PLUGIN": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=200)


def test_p2p_metrics_have_names_of_their_own_and_both_classes_share_them(front_end):
    front_end(KvlaneFsConnector)
    for kind in (KvlaneP2pConnector, P2pNcclConnector):
        front_end(kind).observe({"received_bytes": 2, "request_timeout": 1, "parked_blocks": 7, "unknown": 1})
    value = front_end.registry.get_sample_value
    assert value("vllm:kvlane_p2p_bytes_total", {"engine": "0", "direction": "received"}) == 4
    assert value("vllm:kvlane_p2p_requests_total", {"engine": "0", "outcome": "timeout"}) == 2
    assert value("vllm:kvlane_p2p_parked_blocks", {"engine": "0"}) == 7
    assert value("vllm:kvlane_segments", {"engine": "0"}) == 0


def test_every_lane_has_a_counter_of_its_bytes():
    counters = {name: values for name, _, _, values in metrics.P2P_COUNTERS}
    expected = {lane: f"{lane}_bytes" for lane in LANES if lane != "auto"}
    assert counters["vllm:kvlane_p2p_lane_bytes"] == expected
