"""Risk: the leak test looks at too little: a leak in a child process, or of one kind, is not seen."""

import subprocess
import sys
import time

import pytest

from support.processes import end_session
from support.resources import resources_of_session, session_pids

# Leaks, in a child of the session's leader, what it is told to.
CHILD = """
import socket, sys, tempfile, threading, time
kept = []
print("ready", flush=True)
for line in sys.stdin:
    kind = line.strip()
    if kind == "sockets": kept.append(socket.socket())
    if kind == "files": kept.append(tempfile.TemporaryFile())
    if kind == "threads": threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
    if kind == "resident_bytes": kept.append(bytearray(b"x") * (64 << 20))
    print("done", flush=True)
"""
# It says when the start of its child is behind it, which takes a descriptor for a moment.
LEADER = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, '-c', {CHILD!r}])
print("started", flush=True)
child.wait()
"""


@pytest.fixture
def leader():
    process = subprocess.Popen(
        [sys.executable, "-c", LEADER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert {process.stdout.readline(), process.stdout.readline()} == {"ready\n", "started\n"}
    yield process
    end_session(process)


@pytest.mark.parametrize(
    ("kind", "amount"), [("sockets", 1), ("files", 1), ("threads", 1), ("resident_bytes", 60 << 20)]
)
def test_a_leak_in_a_child_of_a_server_is_seen(leader, kind, amount):
    before = resources_of_session(leader.pid)
    print(kind, file=leader.stdin, flush=True)
    assert leader.stdout.readline() == "done\n"
    after = resources_of_session(leader.pid)
    grown = {
        name: getattr(after, name) - getattr(before, name) for name in ("sockets", "files", "threads", "processes")
    }
    assert getattr(after, kind) - getattr(before, kind) >= amount
    assert grown == {name: amount if name == kind else 0 for name in grown}


def test_the_processes_of_a_session_are_its_own_and_gone_when_it_ends(leader):
    pids = session_pids(leader.pid)
    assert leader.pid in pids
    assert len(pids) == 2
    end_session(leader)
    # The child is killed too, and gone as soon as its new parent has noticed.
    end_s = time.monotonic() + 10
    while session_pids(leader.pid):
        assert time.monotonic() < end_s, session_pids(leader.pid)
        time.sleep(0.01)
