"""Risk: a file system that accepts no writes (a snapshot is taken, a disk hangs) makes an engine wait in the kernel."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from frozen_folder import LOAD_TIMEOUT_MS, STORE_TIMEOUT_MS, THAW_AFTER_S

HERE = pathlib.Path(__file__).resolve().parent
IMAGE_BYTES = 64 << 20
# Longer than the time after which the file system is thawed in any case.
LIMIT_S = 240


@pytest.mark.parametrize("medium", ["disk", "memory"])
def test_an_engine_answers_by_recomputing_while_the_file_system_is_frozen(tmp_path, medium):
    seconds = on_ext4(tmp_path, HERE / "frozen_folder.py", medium)
    # What can be told apart: waiting for the deadlines, and waiting for the thaw.
    limit_s = (STORE_TIMEOUT_MS + LOAD_TIMEOUT_MS) / 1e3 + 15
    assert limit_s < THAW_AFTER_S / 2
    assert {name: took_s for name, took_s in seconds.items() if took_s > limit_s} == {}
    assert sum(name.startswith("frozen") for name in seconds) == 4, "each was answered"


def on_ext4(folder, script, *arguments):
    """What a script says that gets an ext4 of its own, on an image below `folder`, in a mount namespace of its own."""
    image, mount = folder / "image", folder / "mount"
    mount.mkdir()
    with open(image, "wb") as file:
        file.truncate(IMAGE_BYTES)
    prelude = 'mkfs.ext4 -q "$1" && mount -o loop "$1" "$2" && echo mounted && shift 2 && exec "$0" "$@"'
    command = ["unshare", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"]), "--mount", "--"]
    command += ["sh", "-c", prelude, sys.executable, image, mount, script, mount, *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*sys.path])}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
    if not finished.stdout.startswith("mounted"):
        pytest.skip(f"NOT RUN: an engine on a frozen ext4: {finished.stderr.strip()[-200:]}")
    assert finished.returncode == 0, finished.stderr[-4000:]
    return json.loads(finished.stdout.splitlines()[-1])
