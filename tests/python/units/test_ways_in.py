"""Risk: the name in a manifest loads vLLM's own example although kvlane is installed, or kvlane although it is off."""

import json
import os
import subprocess
import sys

import pytest

from kvlane import plugin

vllm = pytest.importorskip("vllm")

# As vLLM does when an engine starts; the plugin's registration stands for its entry point.
SCRIPT = """
import json, sys
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from kvlane import plugin

plugin.register()
found = {}
for name, path in json.loads(sys.argv[1]):
    config = KVTransferConfig(kv_connector=name, kv_role="kv_both", kv_connector_module_path=path)
    try:
        cls = KVConnectorFactory.get_connector_class(config)
        found[f"{name} {path}"] = f"{cls.__module__}.{cls.__name__}"
    except (ValueError, ImportError) as error:  # vLLM's own class of the old name needs what its CPU wheels leave out
        found[f"{name} {path}"] = str(error)
print(json.dumps(found))
"""

WAYS = [
    ("ExampleConnector", None),
    ("KvlaneFsConnector", None),
    ("KvlaneFsConnector", "kvlane.vllm"),
    ("ExampleConnector", "kvlane.vllm"),
    ("P2pNcclConnector", None),
    ("KvlaneP2pConnector", None),
    ("KvlaneP2pConnector", "kvlane.vllm"),
    ("P2pNcclConnector", "kvlane.vllm"),
]

MODULE_OF = {"ExampleConnector": "connector", "KvlaneFsConnector": "connector"}


@pytest.fixture(scope="module")
def classes():
    """By switch: what each way in leads to, in a process of its own."""

    def ask(switch):
        environment = {**os.environ, "KVLANE_PLUGIN": switch, "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_PLUGINS": ""}
        finished = subprocess.run(
            [sys.executable, "-c", SCRIPT, json.dumps(WAYS)],
            capture_output=True, text=True, timeout=200, env=environment,
        )  # fmt: skip
        assert finished.returncode == 0, finished.stderr
        return json.loads(finished.stdout.splitlines()[-1])

    return {switch: ask(switch) for switch in ("1", "0")}


@pytest.mark.parametrize("name", plugin.CONNECTOR_NAMES)
def test_the_plugin_alone_makes_all_names_kvlanes(classes, name):
    assert classes["1"][f"{name} None"] == f"kvlane.vllm.{MODULE_OF.get(name, 'p2p_connector')}.{name}"


@pytest.mark.parametrize("switch", ["1", "0"])
def test_the_module_path_needs_no_plugin(classes, switch):
    assert classes[switch]["KvlaneFsConnector kvlane.vllm"] == "kvlane.vllm.connector.KvlaneFsConnector"
    assert classes[switch]["KvlaneP2pConnector kvlane.vllm"] == "kvlane.vllm.p2p_connector.KvlaneP2pConnector"


def test_with_the_plugin_off_the_old_name_is_vllms_own(classes):
    assert classes["0"]["ExampleConnector None"].startswith("vllm.distributed.kv_transfer.")
    assert "Unsupported connector" in classes["0"]["KvlaneFsConnector None"]


def test_the_old_name_with_the_module_path_is_kvlanes_where_vllm_lets_it(classes):
    """vLLM before 0.20 prefers its built-in class without a word, which the README says."""
    wanted = "kvlane.vllm.connector.ExampleConnector"
    assert classes["1"]["ExampleConnector kvlane.vllm"] == wanted
    version = tuple(int(part) for part in vllm.__version__.split(".")[:2])
    if version >= (0, 20):
        assert classes["0"]["ExampleConnector kvlane.vllm"] == wanted
    else:
        assert classes["0"]["ExampleConnector kvlane.vllm"].startswith("vllm.")


def test_the_name_that_vllm_removed_is_kvlanes_by_its_module_path_where_vllm_has_none(classes):
    """Without the plugin; vLLM before 0.20 prefers its own, and has the name up to 0.23."""
    wanted = "kvlane.vllm.p2p_connector.P2pNcclConnector"
    assert classes["1"]["P2pNcclConnector kvlane.vllm"] == wanted
    version = tuple(int(part) for part in vllm.__version__.split(".")[:2])
    if version >= (0, 20):
        assert classes["0"]["P2pNcclConnector kvlane.vllm"] == wanted
