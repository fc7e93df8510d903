"""Risk: a command of the wheel that Ctrl-C does not stop, or that it cuts off where it should finish its work."""

import ctypes
import signal
import subprocess
import sys

import pytest

from kvlane._native import FsWorker, Layout

# Who starts the tests in the background may have them ignore the signal, and children inherit that.
COMMAND = [
    sys.executable,
    "-c",
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from kvlane.cli import main; main()",
]
BLOCKS, BLOCK_BYTES = 4, 4096
PATIENCE_S = 20


@pytest.fixture
def folder(tmp_path):
    """A shared folder with an empty store."""
    cache = ctypes.create_string_buffer(BLOCKS * BLOCK_BYTES)
    tensor = ("l.0", ctypes.addressof(cache), "cpu", 1, (BLOCKS, BLOCK_BYTES), (BLOCK_BYTES, 1))
    path = tmp_path / "kvlane"
    worker = FsWorker(str(path), bytes(32), Layout([tensor], BLOCKS, 0), cache, {"capacity_bytes": 1 << 20})
    worker.close()
    return tmp_path


def start(*arguments):
    return subprocess.Popen(
        [*COMMAND, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_ctrl_c_ends_a_command_that_is_at_work(folder):
    command = ["store", "explain", str(folder), "--tokens", "-", "--block-tokens", "16", "--log-level", "info"]
    with start(*command) as process:
        try:
            # Opening the store is logged; what follows is a wait for the tokens that do not come.
            assert "opened the KV store" in process.stderr.readline()
            process.send_signal(signal.SIGINT)
            assert process.wait(PATIENCE_S) == -signal.SIGINT
        finally:
            process.kill()


def test_ctrl_c_lets_the_proxy_stop_in_order():
    nobody = "http://127.0.0.1:1"
    servers = ["--prefill", nobody, "--decode", nobody, "--kv-backend", "fs"]
    with start("proxy", *servers, "--host", "127.0.0.1", "--port", "0") as process:
        try:
            assert "listening" in process.stderr.readline()
            process.send_signal(signal.SIGINT)
            assert process.wait(PATIENCE_S) == 0
        finally:
            process.kill()
