"""Workers' namespaces in the shared folder, for engines whose workers cannot all reach the scheduler half.

vLLM hands what a worker says at start to the scheduler half. Before 0.23 it drops what pipeline stages behind the
first say, and MultiConnector passes on only one connector's words. So every worker also leaves a small file, and the
scheduler half reads these where something is missing.
"""

import hashlib
import json
import logging
import os
import tempfile
import threading
from collections.abc import Callable

from kvlane.vllm.identity import Facts
from kvlane.vllm.metadata import WorkerHandshake

logger = logging.getLogger("vllm.kvlane")

FOLDER = "descriptors"
_POLL_S = 0.25


def write_descriptor(root: str, engine_id: str, worker: WorkerHandshake, facts: Facts, block_tokens: int) -> None:
    """Leaves a worker's namespace and the facts behind it in the folder. Raises OSError where that is not possible."""
    content = {
        "namespace": worker.namespace.hex(),
        "pp_rank": worker.pp_rank,
        "tp_rank": worker.tp_rank,
        "engine_id": engine_id,
        "block_tokens": block_tokens,
        "facts": dict(facts),
    }
    folder = os.path.join(root, FOLDER)
    os.makedirs(folder, mode=0o700, exist_ok=True)
    # Renamed into place, so that a reader sees the whole file or none. The mode of temporary files is 0600.
    handle, staged = tempfile.mkstemp(prefix=".staged-", dir=folder)
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(content, file, indent=1)
        os.replace(staged, _path(root, engine_id, worker.pp_rank, worker.tp_rank))
    except BaseException:
        os.unlink(staged)
        raise


def read_descriptor(root: str, engine_id: str, pp_rank: int, tp_rank: int) -> bytes | None:
    """The namespace that a worker of this engine left, None if it is not there or not readable."""
    try:
        with open(_path(root, engine_id, pp_rank, tp_rank)) as file:
            content = json.load(file)
        namespace = bytes.fromhex(content["namespace"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    same = content.get("engine_id") == engine_id and len(namespace) == 32
    return namespace if same else None


class NamespaceSearch:
    """Collects the namespaces of all ranks and calls `found` once, with the list in rank order."""

    def __init__(
        self, root: str, engine_id: str, pp_size: int, tp_size: int, found: Callable[[list[bytes]], None]
    ) -> None:
        self._root = root
        self._engine_id = engine_id
        self._ranks = [(pp, tp) for pp in range(pp_size) for tp in range(tp_size)]
        self._known: dict[tuple[int, int], bytes] = {}
        self._found: Callable[[list[bytes]], None] | None = found
        #: A handshake and the thread may find the last rank at once.
        self._finding = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    def add(self, worker: WorkerHandshake) -> None:
        """Takes what a worker said itself."""
        self._known[worker.pp_rank, worker.tp_rank] = worker.namespace
        self._finish_if_complete()

    def start_reading(self) -> None:
        """Looks for the missing ranks' files in the background, because the folder may not answer at once."""
        if self._thread is None and self._found is not None:
            self._thread = threading.Thread(target=self._read, name="kvlane-descriptors", daemon=True)
            self._thread.start()

    def close(self) -> None:
        self._stop.set()

    def _read(self) -> None:
        logger.info("kvlane: looking for the workers' descriptors in %s", os.path.join(self._root, FOLDER))
        while not self._stop.is_set():
            for pp_rank, tp_rank in self._ranks:
                if (pp_rank, tp_rank) not in self._known:
                    namespace = read_descriptor(self._root, self._engine_id, pp_rank, tp_rank)
                    if namespace is not None:
                        self._known[pp_rank, tp_rank] = namespace
            if self._finish_if_complete():
                return
            self._stop.wait(_POLL_S)

    def _finish_if_complete(self) -> bool:
        if any(rank not in self._known for rank in self._ranks):
            return False
        with self._finding:
            found, self._found = self._found, None
        if found is not None:
            try:
                found([self._known[rank] for rank in self._ranks])
            except Exception:
                logger.exception("kvlane: the shared folder cannot be read, so requests compute their prompts")
        return True


def _path(root: str, engine_id: str, pp_rank: int, tp_rank: int) -> str:
    # An engine id is the operator's text and may hold slashes.
    name = hashlib.sha256(engine_id.encode()).hexdigest()[:32]
    return os.path.join(root, FOLDER, f"{name}-pp{pp_rank}-tp{tp_rank}.json")
