"""Hands the native half's log lines to Python's logging.

The native half queues lines without waiting for Python; a daemon thread takes them out. The exit of the interpreter
waits a moment for the last ones, and so does the end of a process that multiprocessing made, such as vLLM's engines: a
forked one ends without the interpreter's exit.
"""

import atexit
import logging
import multiprocessing.util
import threading

from kvlane import _native

# vLLM gives handlers to loggers below its own name only.
logger = logging.getLogger("vllm.kvlane")

_EXIT_WAIT_S = 2.0


def start() -> bool:
    """Called by the native half when it first has something to say in a process. Returns whether debug lines count."""
    thread = threading.Thread(target=_carry, name="kvlane-log", daemon=True)
    thread.start()
    atexit.register(_end, thread)
    multiprocessing.util.Finalize(None, _end, args=(thread,), exitpriority=0)
    return logger.isEnabledFor(logging.DEBUG)


def _carry() -> None:
    while (lines := _native.next_logs()) is not None:
        for level, file, line, text in lines:
            if logger.isEnabledFor(level):
                # The place is that in the Rust source: there is no caller in Python.
                logger.handle(logger.makeRecord(logger.name, level, file, line, text, (), None))


def _end(thread: threading.Thread) -> None:
    _native.end_logs()
    # More than a moment is not worth it: a handler may be slow.
    thread.join(_EXIT_WAIT_S)
