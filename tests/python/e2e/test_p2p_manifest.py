"""Risk: a manifest that runs today does not start with kvlane, or starts servers that answer nothing.

The P2P configurations of the 2026-02 deployment as they stand in its manifests, with the flags beside them. Both name
port 14579, so one side runs after the other.
"""

import re
import socket
import time

import pytest

from support import cpus
from support.client import complete
from support.outcome import assert_same
from support.prompts import Prompts
from support.servers import vllm_server
from support.tiny_model import vocabulary_size

pytestmark = pytest.mark.timeout(1800)

PORT = 14579
PREFILL = (
    '{"kv_connector":"P2pNcclConnector","kv_role":"kv_producer","kv_rank":0,"kv_parallel_size":2,"kv_ip":"0.0.0.0",'
    '"kv_port":14579,"engine_id":"p2p-nccl-same-node"}'
)
DECODE = (
    '{"kv_connector":"P2pNcclConnector","kv_role":"kv_consumer","kv_rank":1,"kv_parallel_size":2,"kv_ip":"0.0.0.0",'
    '"kv_port":14579,"engine_id":"p2p-nccl-same-node"}'
)
# Of the flags those that fit any model and machine.
FLAGS = [
    "--tensor-parallel-size=1",
    "--max-model-len=2048",
    "--no-enable-prefix-caching",
    "--no-enable-chunked-prefill",
]
OUTPUT_TOKENS = 8
# Another run of this test on the same machine has the port for a while.
PORT_LIMIT_S = 300
# A start takes minutes on a machine with other work.
READY_LIMIT_S = 600


def test_each_side_of_the_deployments_manifest_starts_unchanged_and_answers(model):
    prompt = Prompts(vocabulary_size(model), seed=PORT).tokens(100)
    first, second = (_answer_of(model, *side, prompt) for side in (("prefill", PREFILL), ("decode", DECODE)))
    assert first.completion_tokens == second.completion_tokens == OUTPUT_TOKENS
    assert_same(second.choices(), first.choices(), first.choices())


def _answer_of(model, side, config, prompt):
    _wait_until_the_port_is_free()
    arguments = ["--kv-transfer-config", config, "--dtype=float32", *FLAGS]
    with vllm_server(
        f"manifest-{side}", model, cpus.halves()[0], arguments=arguments, ready_limit_s=READY_LIMIT_S
    ) as server:
        server.wait_until_ready()
        answer = complete(server.url, prompt, OUTPUT_TOKENS)
        if side == "prefill":
            socket.create_connection(("127.0.0.1", PORT), timeout=5).close()
        log = server.log_path.read_text(errors="replace")
    named = re.search(r"kvlane: obsolete and without effect: (.*)", log)
    assert named, f"{server.log_path} does not say what of the manifest is obsolete"
    assert {"kv_rank", "kv_parallel_size", "kv_ip"} <= {name.strip() for name in named.group(1).split(",")}
    return answer


def _wait_until_the_port_is_free():
    deadline = time.monotonic() + PORT_LIMIT_S
    while True:
        try:
            with socket.socket() as probe:
                # As the server does: connections that have ended are no obstacle.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("0.0.0.0", PORT))
                return
        except OSError as error:
            if time.monotonic() > deadline:
                pytest.fail(f"port {PORT}, which the manifest names, is not free on this machine: {error}")
            time.sleep(1)
