"""Risk: an installed kvlane keeps a vLLM from starting that does not even use it."""

import logging
import sys

import pytest

from kvlane import plugin

FACTORY = "vllm.distributed.kv_transfer.kv_connector.factory"


@pytest.fixture
def registry():
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    before = dict(KVConnectorFactory._registry)
    yield KVConnectorFactory._registry
    KVConnectorFactory._registry.clear()
    KVConnectorFactory._registry.update(before)


def test_the_names_lead_to_kvlane(registry):
    plugin.register()
    plugin.register()  # twice is fine
    assert {registry[name]().__module__ for name in plugin.CONNECTOR_NAMES} == {
        "kvlane.vllm.connector",
        "kvlane.vllm.p2p_connector",
    }


@pytest.mark.parametrize("value", ["0", "false", "OFF", " no "])
def test_turned_off_it_does_not_even_look_at_vllm(monkeypatch, value):
    monkeypatch.setenv("KVLANE_PLUGIN", value)
    monkeypatch.setitem(sys.modules, FACTORY, None)
    monkeypatch.setattr(plugin, "_take_over", lambda: pytest.fail("it did"))
    plugin.register()


def test_a_vllm_that_moved_its_factory_still_starts(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, FACTORY, None)  # importing it fails
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    plugin.register()
    assert "this vLLM is unknown (ModuleNotFoundError" in caplog.text


def test_a_vllm_that_registers_differently_keeps_its_own_connectors(monkeypatch, registry):
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    before = dict(registry)
    monkeypatch.setattr(KVConnectorFactory, "register_connector", lambda name: None)
    plugin.register()
    assert registry == before
