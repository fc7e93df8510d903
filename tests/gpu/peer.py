"""A side in a process of its own, with deadlines on all that is asked of it."""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ANSWER_S = 60.0
END_S = 20.0


class PeerFailed(Exception):
    """The process ended, was silent for too long, or a method of its side raised."""


class Peer:
    """The process of `side.py`. What is asked of it are methods of `side.Side`."""

    def __init__(self, can_offer: bool, layout: str, lane: str = "auto", port: int = 0, **sizes: int) -> None:
        options = {"can_offer": can_offer, "layout": layout, "lane": lane, "port": port, **sizes}
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("side.py")), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._unread = b""
        try:
            facts = self._answer("start")
        except PeerFailed:
            self.kill()
            raise
        self.port, self.pid, self.place = facts["port"], facts["pid"], facts["place"]

    def tell(self, method: str, *arguments: Any) -> Any:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps([method, arguments]).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise PeerFailed(f"the process has ended before {method}") from None
        return self._answer(method)

    def _answer(self, method: str) -> Any:
        answer = json.loads(self._line(method))
        if "error" in answer:
            raise PeerFailed(f"{method} in process {self._process.pid}:\n{answer['error']}")
        return answer["value"]

    def _line(self, method: str) -> bytes:
        assert self._process.stdout is not None
        output, deadline = self._process.stdout.fileno(), time.monotonic() + ANSWER_S
        while b"\n" not in self._unread:
            ready, _, _ = select.select([output], [], [], max(deadline - time.monotonic(), 0))
            if not ready:
                raise PeerFailed(f"no answer to {method} in {ANSWER_S:.0f} s")
            part = os.read(output, 1 << 20)
            if not part:
                raise PeerFailed(f"the process ended during {method}")
            self._unread += part
        line, self._unread = self._unread.split(b"\n", 1)
        return line

    # ---- what happens to processes

    def kill(self) -> None:
        """At once, and gone when this returns."""
        self._process.kill()
        self._process.wait(END_S)
        self._close_pipes()

    @contextlib.contextmanager
    def stopped(self) -> Any:
        os.kill(self._process.pid, signal.SIGSTOP)
        try:
            # The other threads run on until one has taken the signal.
            deadline = time.monotonic() + END_S
            while not self._stands_still():
                if time.monotonic() > deadline:
                    raise PeerFailed(f"the process does not stand still {END_S:.0f} s after SIGSTOP")
                time.sleep(0.001)
            yield
        finally:
            os.kill(self._process.pid, signal.SIGCONT)

    def end(self) -> None:
        """Asks it to end, if it still runs; kills what does not."""
        if self._process.poll() is None:
            assert self._process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
            try:
                self._process.wait(END_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait(END_S)
                raise PeerFailed(f"the process did not end in {END_S:.0f} s") from None
            finally:
                self._close_pipes()

    def is_running(self) -> bool:
        return self._process.poll() is None

    def _stands_still(self) -> bool:
        for thread in Path(f"/proc/{self._process.pid}/task").iterdir():
            # Else this thread has just ended.
            with contextlib.suppress(OSError):
                if (thread / "stat").read_text().rpartition(")")[2].split()[0] not in "TZX":
                    return False
        return True

    def _close_pipes(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()
