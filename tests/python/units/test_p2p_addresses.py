"""Risk: a port is bound twice or in the wrong process, or a server starts that nobody can reach."""

import types

import pytest

from kvlane import ConfigError
from kvlane.vllm import p2p_connector

pytest.importorskip("vllm")


def parallel(tp=1, pp=1, dp_index=0):
    return types.SimpleNamespace(tensor_parallel_size=tp, pipeline_parallel_size=pp, data_parallel_index=dp_index)


def test_every_rank_of_every_engine_on_a_host_has_a_port_of_its_own():
    first = [p2p_connector._first_port(14579, parallel(tp=4, pp=2, dp_index=rank)) for rank in range(3)]
    assert first == [14579, 14587, 14595]
    assert p2p_connector._first_port(0, parallel(dp_index=1)) == 0


@pytest.mark.parametrize(
    ("port", "ranks", "text"),
    [
        (65535, 2, "kv_port is 65535, with which 2 workers .*, allowed: "),
        (-1, 1, "kv_port is -1"),
        (70000, 1, "kv_port is 70000"),
        (0, 2, r"kv_port is 0 \(any\) with 2 workers"),
    ],
)
def test_a_port_without_room_for_all_workers_stops_the_start(port, ranks, text):
    with pytest.raises(ConfigError, match=text):
        p2p_connector._first_port(port, parallel(tp=ranks))


@pytest.mark.parametrize(("own", "every"), [("10.0.0.7", "0.0.0.0"), ("fd00::7", "::")])
def test_all_addresses_are_those_of_the_servers_own_family(monkeypatch, own, every):
    network = pytest.importorskip("vllm.utils.network_utils")
    monkeypatch.setattr(network, "get_ip", lambda: own)
    assert p2p_connector._every_address() == every
    assert p2p_connector._own_host(None) == p2p_connector._own_host("0.0.0.0") == own
    assert p2p_connector._own_host("10.1.1.1") == "10.1.1.1"
