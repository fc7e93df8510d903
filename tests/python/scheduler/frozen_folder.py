"""Engines on a file system that is frozen under them, started by test_frozen_folder.py in a mount namespace.

    python frozen_folder.py MOUNT MEDIUM        prints one JSON object: seconds by what was asked

A frozen file system accepts no write: whoever tries one waits for the thaw, in the kernel, where no signal reaches it.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

from paper_engine import BLOCK_TOKENS, PaperEngine
from paper_model import VOCABULARY, expected_tokens
from support.prompts import Prompts

STORE_TIMEOUT_MS = 400
LOAD_TIMEOUT_MS = 1_000
# A process that hangs, or is killed, must not leave it frozen: the file system would outlive the namespace.
THAW_AFTER_S = 45
STORES_AGAIN_LIMIT_S = 10


@contextlib.contextmanager
def frozen(mount):
    """Inside the block the file system is frozen, but no longer than THAW_AFTER_S."""
    thaw = ["fsfreeze", "-u", str(mount)]
    late = subprocess.Popen(
        ["sh", "-c", f'sleep {THAW_AFTER_S}; exec "$@"', "sh", *thaw],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    subprocess.run(["fsfreeze", "-f", str(mount)], check=True)
    try:
        yield
    finally:
        subprocess.run(thaw, check=True)
        os.killpg(late.pid, signal.SIGKILL)
        late.wait()


def main():
    mount, medium = pathlib.Path(sys.argv[1]), sys.argv[2]
    options = {
        "medium": medium,
        "capacity_bytes": "16MiB",
        "segment_bytes": "2MiB",
        "load_timeout_ms": LOAD_TIMEOUT_MS,
        "prefix_caching": False,
    }
    prompts = Prompts(VOCABULARY, seed=random.Random(medium).randrange(1 << 32)).tokens
    stored, fresh = prompts(8 * BLOCK_TOKENS + 5), prompts(8 * BLOCK_TOKENS + 5)
    seconds = {}

    def ask(engine, request_id, prompt):
        role = "reader" if engine is reader else "writer"
        assert engine.answer(request_id, prompt) == expected_tokens(prompt, 8), request_id
        seconds[f"{request_id} ({role})"] = engine.seconds[request_id]

    with (
        PaperEngine("both", mount, step_tokens=4 * BLOCK_TOKENS, **options) as writer,
        PaperEngine("consumer", mount, **options) as reader,
    ):
        ask(writer, "before", stored)
        ask(reader, "before", stored)
        assert reader.loaded_tokens["before"] == 8 * BLOCK_TOKENS
        writer.worker._worker._options = dataclasses.replace(
            writer.worker._worker._options, store_timeout_ms=STORE_TIMEOUT_MS
        )
        with frozen(mount):
            ask(writer, "frozen: fresh", fresh)
            ask(reader, "frozen: the same", fresh)
            ask(reader, "frozen: stored before", stored)
            ask(writer, "frozen: stored before", stored)
        # Writes that waited for the thaw come first.
        deadline = time.monotonic() + STORES_AGAIN_LIMIT_S
        attempt = "thawed"
        while reader.loaded_tokens[attempt] != 8 * BLOCK_TOKENS:
            assert time.monotonic() < deadline, "nothing is stored after the thaw"
            attempt, prompt = f"{attempt}, again", prompts(8 * BLOCK_TOKENS + 5)
            ask(writer, attempt, prompt)
            ask(reader, attempt, prompt)
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
