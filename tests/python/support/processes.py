"""Ends what a test started: a process and everything in its session, and nothing else."""

import os
import signal
import time

# Python's resource tracker outlives the others by a moment, in which it removes their shared memory from /dev/shm.
REST_LIMIT_S = 3


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


def _signal(group, number):
    """Whether there was somebody to send the signal to."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True
