"""Risk: what the native half has to say (why a medium was chosen, why nothing more is stored) reaches nobody, or saying
it stops an engine: a copying thread that waits for Python, an exit or a fork that hangs."""

import os
import subprocess
import sys
import textwrap

import pytest

from kvlane import logs

SETUP = """
import logging, os, sys, threading, time
import numpy
from kvlane import _native

logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(levelname)s %(name)s %(filename)s %(message)s")
folder = sys.argv[1]
cache = numpy.ones(8 << 20, numpy.uint8)
layout = _native.Layout([("layer", cache.ctypes.data, "cpu", 1, [8, 1 << 20], [1 << 20, 1])], 8, 0)
namespace = _native.namespace_id([("model", "log test")])

logged = []
class Remembers(logging.Handler):
    def emit(self, record):
        logged.append(record.getMessage())

# Behind the one that prints: what is remembered has been printed.
logging.getLogger().addHandler(Remembers())

def until_logged(part):
    end = time.monotonic() + 30
    while not any(part in line for line in logged):
        assert time.monotonic() < end, (part, logged)
        time.sleep(0.01)

def open_worker(**options):
    options = {"capacity_bytes": 64 << 20, **options}
    return _native.FsWorker(folder, namespace, layout, cache, options)

def store(worker, timeout_ms=10_000):
    chain = _native.Chain(1)
    chain.extend(range(8))
    job = worker.begin_store(chain.keys(0, 8), list(range(8)), 0, timeout_ms)
    worker.finish_store(job)
    return worker.wait(job, timeout_ms)
"""


def lines_of(folder, script, **environment):
    """Standard output of a process that runs SETUP and the script."""
    finished = subprocess.run(
        [sys.executable, "-c", SETUP + textwrap.dedent(script), str(folder)],
        capture_output=True, text=True, timeout=60, env={**os.environ, **environment},
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert "panicked" not in finished.stderr, finished.stderr
    return finished.stdout.splitlines()


def test_the_chosen_medium_and_its_reason_are_logged_once_per_opening(tmp_path):
    lines = lines_of(tmp_path, "open_worker().close()")
    opened = [line for line in lines if "opened the KV store" in line]
    assert len(opened) == 1, lines
    assert opened[0].startswith("INFO vllm.kvlane directory.rs kvlane: ")
    for word in (f"path: {tmp_path}", "medium: ", "reason: ", "file_system: "):
        assert word in opened[0], word


def test_a_warning_of_a_copying_thread_arrives_while_the_engine_runs(tmp_path):
    """A damaged block is noticed by a thread that Python does not know."""
    lines = lines_of(
        tmp_path,
        """
        worker = open_worker()
        assert store(worker) == ([], "done")
        for name in os.listdir(folder):
            path = os.path.join(folder, name)
            if os.path.isfile(path) and os.path.getsize(path) > 8 << 20:
                with open(path, "r+b") as file:
                    data = file.read()
                    file.seek(data.index(bytes([1]) * 4096) + 100)
                    file.write(bytes([2]))
        chain = _native.Chain(1)
        chain.extend(range(8))
        bad, reason = worker.wait(worker.load(chain.keys(0, 8), list(range(8)), 10_000), 10_000)
        assert len(bad) == 1, (bad, reason)
        until_logged("checksum")
        print("before the end")
        worker.close()
        """,
    )
    warned = [line for line in lines if line.startswith("WARNING vllm.kvlane") and "checksum" in line]
    assert len(warned) == 1, lines
    assert lines.index(warned[0]) < lines.index("before the end")


def test_a_folder_that_is_writable_for_others_is_warned_of(tmp_path):
    tmp_path.chmod(0o777)
    lines = lines_of(tmp_path, "open_worker().close()")
    assert [line for line in lines if line.startswith("WARNING") and "writable for others" in line], lines


def test_a_limit_that_stops_all_storing_is_warned_of(tmp_path):
    """Noticed by the thread that makes segments, as a full file system and a container's memory limit are."""
    lines = lines_of(
        tmp_path,
        """
        worker = open_worker(capacity_bytes=1 << 20)
        bad, reason = store(worker, 2_000)
        assert len(bad) == 8, reason
        worker.close()
        """,
    )
    warned = [line for line in lines if line.startswith("WARNING vllm.kvlane") and "cannot add a segment" in line]
    assert len(warned) == 1, lines


def test_lines_below_the_loggers_level_do_not_appear(tmp_path):
    lines = lines_of(tmp_path, "logging.getLogger('vllm.kvlane').setLevel(logging.ERROR); open_worker().close()")
    assert not lines


def test_recording_does_not_wait_for_the_interpreter(tmp_path):
    """The thread that logs gets no turn here; a store, whose events go into the queue, ends all the same."""
    lines = lines_of(
        tmp_path,
        """
        stuck = threading.Event()
        class Stuck(logging.Handler):
            def emit(self, record):
                stuck.wait(20)
        logging.getLogger("vllm.kvlane").addHandler(Stuck())
        worker = open_worker()
        start = time.monotonic()
        assert store(worker) == ([], "done")
        for _ in range(400):
            _native.FsReader(folder, [namespace], {"capacity_bytes": 64 << 20}).close()
        print("waited", time.monotonic() - start < 10)
        worker.close()
        stuck.set()
        """,
    )
    assert "waited True" in lines
    assert any("log lines were dropped" in line for line in lines), lines[-3:]


def test_a_process_that_ends_at_once_logs_its_last_lines_and_ends(tmp_path):
    lines = lines_of(tmp_path, "worker = open_worker(); store(worker)")
    assert any("opened the KV store" in line for line in lines)


def test_a_forked_process_logs_its_own_lines_and_ends(tmp_path):
    lines = lines_of(
        tmp_path,
        """
        worker = open_worker()
        until_logged("opened the KV store")
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            other = os.path.join(folder, "child")
            os.mkdir(other)
            _native.FsWorker(other, namespace, layout, cache, {"capacity_bytes": 64 << 20}).close()
            until_logged("/child")
            sys.stdout.flush()
            os._exit(0)
        deadline = time.monotonic() + 20
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            assert time.monotonic() < deadline, "the child hangs"
            time.sleep(0.05)
        worker.close()
        """,
    )
    assert sum("opened the KV store" in line for line in lines) == 2, lines
    assert sum(f"path: {tmp_path}/child" in line for line in lines) == 1, lines


@pytest.mark.parametrize("way", ["fork", "spawn"])
def test_an_engine_process_that_ends_at_once_logs_its_last_lines(tmp_path, way):
    """As vLLM makes them; a slow handler, so that the lines are still queued when the process ends."""
    (tmp_path / "engine.py").write_text(
        SETUP.replace("folder = sys.argv[1]", "folder = os.environ['FOLDER']").replace(
            "from kvlane import _native", "from kvlane import _native, logs"
        )
        + textwrap.dedent(
            """
            class Slow(logging.StreamHandler):
                def emit(self, record):
                    time.sleep(0.3)
                    print(record.getMessage(), flush=True)

            def run():
                logs._EXIT_WAIT_S = 30
                logging.getLogger().handlers[:] = [Slow()]
                open_worker().close()
            """
        )
    )
    (tmp_path / "store").mkdir()
    lines = lines_of(
        tmp_path / "store",
        f"""
        import multiprocessing
        sys.path.insert(0, {str(tmp_path)!r})
        import engine
        process = multiprocessing.get_context({way!r}).Process(target=engine.run)
        process.start()
        process.join(30)
        assert process.exitcode == 0, process.exitcode
        """,
        FOLDER=str(tmp_path / "store"),
    )
    assert any("opened the KV store" in line for line in lines), lines
    assert logs._EXIT_WAIT_S >= 1, "what is shipped; the test waits longer, for busy machines"


def test_exits_while_lines_are_being_logged_are_clean(tmp_path):
    for _ in range(5):
        lines_of(
            tmp_path,
            """
            for _ in range(300):
                _native.FsReader(folder, [namespace], {"capacity_bytes": 64 << 20}).close()
            """,
        )
