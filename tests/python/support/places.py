"""Folders of a test run. Everything lands below target/, except shared stores, which like memory best."""

import os
import pathlib
import shutil
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[3]
TARGET = ROOT / "target"
MODELS = TARGET / "models"
LOGS = TARGET / "logs"

# Two vLLM servers of the demo put a few hundred MiB of KV into their shared folder.
STORE_BYTES_WANTED = 1 << 30


def log_path(name):
    """A log file of its own for every process, named after the running Python so that two environments do not mix."""
    environment = pathlib.Path(os.path.dirname(os.path.dirname(_executable()))).name.lstrip(".")
    LOGS.mkdir(parents=True, exist_ok=True)
    return LOGS / f"{environment}-{name}.log"


def make_store(name):
    """A fresh folder to hand KV over: on tmpfs where there is room, else below target/. The caller removes it."""
    parent = pathlib.Path("/dev/shm")
    if not (parent.is_dir() and os.access(parent, os.W_OK) and shutil.disk_usage(parent).free > STORE_BYTES_WANTED):
        parent = TARGET / "stores"
        parent.mkdir(parents=True, exist_ok=True)
    return pathlib.Path(tempfile.mkdtemp(prefix=f"kvlane-{name}-", dir=parent))


def remove_store(path):
    """Removes a folder that make_store made."""
    shutil.rmtree(path, ignore_errors=True)


def make_temporary(name):
    """A folder for what a process calls temporary; whoever ends the process removes it. vLLM leaves sockets and
    rendezvous files there when it is killed. Its path is short, because a socket's path has 107 characters at most."""
    return pathlib.Path(tempfile.mkdtemp(prefix=f"kvlane-{name}-"))


def remove_temporary(path):
    """Removes a folder that make_temporary made."""
    shutil.rmtree(path, ignore_errors=True)


def _executable():
    import sys

    return sys.executable
