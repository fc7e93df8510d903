"""Risk: every run of the tests or the demo leaves files in /tmp and memory in /dev/shm, until there is none left."""

import os
import pathlib
import sys
import time

from support.servers import Server

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
