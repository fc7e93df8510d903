"""Risk: the manifest of 2026-02 does not start on a new vLLM, or a mistyped key is swallowed."""

import json
import os
import subprocess
import sys
import types

import pytest

from kvlane.compat import LEGACY, LEGACY_KEYS, move_legacy_keys
from kvlane.vllm import options

pytest.importorskip("vllm")

MANIFEST = (
    '{"kv_connector":"P2pNcclConnector","kv_role":"kv_producer","kv_rank":0,"kv_parallel_size":2,"kv_ip":"0.0.0.0",'
    '"kv_port":14579,"engine_id":"p2p-nccl-same-node"}'
)

# In processes of their own, because the change is one for a whole process.
SCRIPT = """
import json, sys
way, manifest = sys.argv[1:]
if way == "plugin":
    from kvlane import plugin
    plugin.register()
elif way == "import":
    import kvlane.compat
from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser
from pydantic import TypeAdapter
found = {}
for name, make in {
    "json": lambda: TypeAdapter(KVTransferConfig).validate_json(manifest),
    "constructor": lambda: KVTransferConfig(**json.loads(manifest)),
    "unknown": lambda: KVTransferConfig(kv_connector="X", kv_role="kv_both", kv_rnak=1),
    "command line": lambda: EngineArgs.add_cli_args(FlexibleArgumentParser()).parse_args(
        ["--kv-transfer-config", manifest]
    ).kv_transfer_config,
}.items():
    try:
        made = make()
        found[name] = [made.kv_connector, made.kv_port, getattr(made, "kv_rank", None), made.kv_connector_extra_config]
    except (Exception, SystemExit) as error:
        found[name] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""


@pytest.fixture(scope="module", params=["plugin", "import"])
def found(request):
    environment = {
        **os.environ,
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_PLUGINS": "",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    finished = subprocess.run(
        [sys.executable, "-c", SCRIPT, request.param, MANIFEST],
        capture_output=True, text=True, timeout=200, env=environment,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout.splitlines()[-1])


@pytest.mark.parametrize("way", ["json", "constructor", "command line"])
def test_the_manifest_is_accepted_unchanged(found, way):
    connector, port, rank, extra = found[way]
    assert (connector, port) == ("P2pNcclConnector", 14579)
    assert extra.get(LEGACY, {"kv_rank": rank})["kv_rank"] == 0


def test_a_key_that_vllm_never_knew_still_fails_where_it_did(found):
    """vLLM 0.15 drops unknown keys without a word."""
    assert "kv_rnak" in found["unknown"] or found["unknown"] == ["X", 14579, None, {}]


def test_moving_leaves_everything_else_alone():
    given = {"kv_connector": "P2pNcclConnector", "kv_rank": 1, "kv_connector_extra_config": {"lane": "tcp"}}
    assert move_legacy_keys(given) == {
        "kv_connector": "P2pNcclConnector",
        "kv_connector_extra_config": {LEGACY: {"kv_rank": 1}, "lane": "tcp"},
    }
    assert given["kv_rank"] == 1
    for other in ({"kv_connector": "X"}, "text", None, 7, {"kv_rank": 1, "kv_connector_extra_config": "wrong"}):
        assert move_legacy_keys(other) is other


def test_arguments_of_a_constructor_are_moved_too():
    class ArgsKwargs(types.SimpleNamespace):
        def __init__(self, args, kwargs):
            super().__init__(args=args, kwargs=kwargs)

    moved = move_legacy_keys(ArgsKwargs((), dict.fromkeys(LEGACY_KEYS, 1)))
    assert moved.kwargs == {"kv_connector_extra_config": {LEGACY: dict.fromkeys(LEGACY_KEYS, 1)}}


def test_the_connectors_know_the_place():
    assert options.LEGACY == LEGACY
