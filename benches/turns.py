"""Long-lived worker processes that take turns.

The systems need different Python environments and must not share a process, yet their rounds have to
alternate. So each runs in a worker process that does one thing when asked and is asleep otherwise. Questions
go to its standard input, answers come back through a pipe of their own: what libraries print on standard
output cannot get between. Both are lines of JSON.
"""

import contextlib
import gc
import json
import os
import select
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from workload import WrongBytes

ANSWER_TIMEOUT_S = 300


class NotRun(Exception):
    """A case cannot be set up on this machine; the text says why."""


class WorkerFailed(Exception):
    """A worker died, raised, or did not answer in time."""


class Worker:
    """The asking side of one worker process."""

    def __init__(
        self, python: str, script: str | Path, environment: dict[str, str] | None = None, **setup: Any
    ) -> None:
        """``environment``: variables that it has beside this process' own. ``setup``: what its system is made of."""
        self.name = Path(script).stem
        answers, answer_end = os.pipe()
        modules = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [python, str(script), str(answer_end)],
            env=os.environ | {"PYTHONPATH": modules} | (environment or {}),
            stdin=subprocess.PIPE,
            stdout=sys.stderr.fileno(),
            pass_fds=[answer_end],
        )
        os.close(answer_end)
        self._answers = os.fdopen(answers, "rb", buffering=0)
        self._pending = b""
        self._send(setup)

    def call(self, method: str, **arguments: Any) -> Any:
        """Call ``method`` of the worker's system. Raises WrongBytes, NotRun or WorkerFailed."""
        self._send({"method": method, "arguments": arguments})
        answer = json.loads(self._line())
        match answer:
            case {"value": value}:
                return value
            case {"wrong": text}:
                raise WrongBytes(f"{self.name}: {text}")
            case {"not_run": text}:
                raise NotRun(text)
        raise WorkerFailed(f"{self.name} failed in '{method}':\n{answer['error']}")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._answers.close()

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerFailed(f"{self.name} ended with status {self._process.wait()}") from None

    def _line(self) -> bytes:
        while b"\n" not in self._pending:
            if not select.select([self._answers], [], [], ANSWER_TIMEOUT_S)[0]:
                self._process.kill()
                raise WorkerFailed(f"{self.name} did not answer within {ANSWER_TIMEOUT_S} s")
            part = self._answers.read(65536)
            if not part:
                raise WorkerFailed(f"{self.name} ended with status {self._process.wait()}")
            self._pending += part
        line, self._pending = self._pending.split(b"\n", 1)
        return line


def serve(make: Callable[..., Any]) -> None:
    """The answering side: build the system, then answer calls of its methods until the pipe closes."""
    answers = os.fdopen(int(sys.argv[1]), "w", buffering=1)
    system = None
    setup = json.loads(sys.stdin.readline())
    gc.disable()  # a collection in the middle of a timed case would be charged to the system
    for line in sys.stdin:
        question = json.loads(line)
        try:
            if system is None:
                system = make(**setup)
            value = getattr(system, question["method"])(**question["arguments"])
            answer = {"value": asdict(value) if is_dataclass(value) else value}
        except WrongBytes as wrong:
            answer = {"wrong": str(wrong)}
        except NotRun as reason:
            answer = {"not_run": str(reason)}
        except Exception:
            answer = {"error": traceback.format_exc()}
        # Before the answer: the next worker has its turn on the same cores right after it. Frozen, so that the objects
        # of torch and vLLM are looked at once and not after every turn.
        gc.collect()
        gc.freeze()
        answers.write(json.dumps(answer) + "\n")
    if hasattr(system, "close"):
        system.close()


@contextlib.contextmanager
def threads_on(cores: list[int], count: int) -> Iterator[None]:
    """Threads started inside may use the first ``count`` cores; the caller goes back to the first one.

    A row of n threads runs on n cores and nothing else does: no background thread helps from a core that the
    row does not count, and the memcpy floor, which the calling thread runs, is on the first of the same
    cores.
    """
    os.sched_setaffinity(0, cores[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores[:1])
