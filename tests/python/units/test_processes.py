"""Risk: every run of the tests or the demo leaves files in /tmp and memory in /dev/shm, until there is none left."""

import os
import pathlib
import sys
import time

import pytest

from support.servers import Server, free_port

# Says what it made, and ends on SIGINT without tidying up, as vLLM's processes do.
LITTERS = """
import os, signal, tempfile, time
from multiprocessing.shared_memory import SharedMemory
signal.signal(signal.SIGINT, lambda *_: os._exit(0))
memory = SharedMemory(create=True, size=4096)
print("made", tempfile.mkstemp()[1], "/dev/shm/" + memory.name, flush=True)
time.sleep(60)
"""


def test_a_server_that_does_not_tidy_up_leaves_no_file_and_no_shared_memory():
    with Server("litters", [sys.executable, "-c", LITTERS], 0, dict(os.environ), ready_limit_s=0) as server:
        deadline = time.monotonic() + 30
        while "made" not in server.log_path.read_text():
            assert time.monotonic() < deadline, server.log_path.read_text()
            time.sleep(0.02)
        file, memory = map(pathlib.Path, server.log_path.read_text().split()[1:3])
        assert file.exists()
        assert memory.exists()
    assert not file.parent.exists()
    assert not memory.exists()


# Fails as torch.distributed does, but for the second time.
LOSES_ITS_PORT = """
import http.server, os, pathlib, sys
mark = pathlib.Path(os.environ["TMPDIR"]) / "started"
if len(sys.argv) > 2 or not mark.exists():
    mark.touch()
    sys.exit("DistNetworkError: port: 35453, code: -98, name: EADDRINUSE, message: address already in use")
class Healthy(http.server.SimpleHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Healthy).serve_forever()
"""


def test_a_server_that_lost_the_port_that_vllm_chose_is_started_again_and_not_for_ever():
    port = free_port()
    command = [sys.executable, "-c", LOSES_ITS_PORT, str(port)]
    with Server("loses-its-port", command, port, dict(os.environ), ready_limit_s=60) as server:
        first_pid = server.pid
        server.wait_until_ready()
        assert server.pid != first_pid
    with (
        Server("loses-every-port", [*command, "always"], port, dict(os.environ), ready_limit_s=60) as server,
        pytest.raises(RuntimeError, match="EADDRINUSE"),
    ):
        server.wait_until_ready()
