"""Ends or stops what a test started: a process and everything in its session, and nothing else."""

import contextlib
import os
import signal
import time
from pathlib import Path

from support.resources import session_pids

# Python's resource tracker outlives the others by a moment, in which it removes their shared memory from /dev/shm.
REST_LIMIT_S = 3
# A thread in the middle of a call to the kernel stops when the call ends.
STOP_LIMIT_S = 30


def end_session(process):
    """Kills what is left of the session that `process` leads. If it ended by itself, the rest may do so first."""
    if process.poll() is not None:
        deadline = time.monotonic() + REST_LIMIT_S
        while _signal(process.pid, 0) and time.monotonic() < deadline:
            time.sleep(0.02)
    kill_session(process)


def kill_session(process):
    """Kills everything in the session that `process` leads, without a word before."""
    _signal(process.pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def stopped(pid, is_group=False):
    """Inside the block this process, or all of the session that it leads, stands still (SIGSTOP).

    All threads of a process stop only once one of them has taken the signal. Until then, some milliseconds on a busy
    machine, the others still answer.
    """
    send = os.killpg if is_group else os.kill
    send(pid, signal.SIGSTOP)
    try:
        deadline = time.monotonic() + STOP_LIMIT_S
        while not all(_stands_still(each) for each in (session_pids(pid) if is_group else [pid])):
            assert time.monotonic() < deadline, f"{pid} still runs {STOP_LIMIT_S} s after SIGSTOP"
            time.sleep(0.001)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            send(pid, signal.SIGCONT)


def _stands_still(pid):
    # What has ended meanwhile does not run either.
    try:
        threads = [*Path(f"/proc/{pid}/task").iterdir()]
    except FileNotFoundError:
        return True
    for thread in threads:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            state = (thread / "stat").read_text().rpartition(")")[2].split()[0]
            if state not in "TZX":  # stopped, or ended
                return False
    return True


def _signal(group, number):
    """Whether there was somebody to send the signal to."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True
