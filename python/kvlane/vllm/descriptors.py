"""Workers' namespaces in the shared folder, for engines whose workers cannot all reach the scheduler half.

vLLM hands what a worker says at start to the scheduler half. Before 0.23 it drops what pipeline stages behind the
first say, and MultiConnector passes on only one connector's words. So every worker also leaves a small file, and the
scheduler half reads these where something is missing.
"""

import contextlib
import fcntl
import functools
import hashlib
import json
import logging
import os
import stat
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from kvlane.vllm.identity import Facts
from kvlane.vllm.metadata import WorkerHandshake

logger = logging.getLogger("vllm.kvlane")

FOLDER = "descriptors"
_POLL_S = 0.25
#: Opening the folder is tried again after a failure, at first soon, then after twice as long each time, at most this.
_LONGEST_POLL_S = 30.0

_STAGED = ".staged-"
#: A descriptor holds a model configuration; more than this is none.
_DESCRIPTOR_BYTES_MAX = 4 << 20
#: Whether a worker of another machine lives cannot be seen from here. After so long its descriptor has been read by
#: whoever needs it to start.
_DESCRIPTOR_AGE_MAX_S = 30 * 86_400
#: Making a descriptor takes milliseconds.
_STAGED_AGE_MAX_S = 3_600
#: The longest time that a start spends on others' left-overs; the next one goes on.
_CLEANING_S = 1.0


class Descriptor:
    """A worker's file in the folder, locked while the worker lives."""

    def __init__(self, root: str, name: str, handle: int) -> None:
        self.path = os.path.join(root, FOLDER, name)
        self._root = root
        self._name = name
        self._handle: int | None = handle

    def is_gone(self) -> bool:
        """Whether nothing has this name any more."""
        try:
            with _folder(self._root) as folder:
                os.stat(self._name, dir_fd=folder, follow_symlinks=False)
        except OSError as error:
            return isinstance(error, FileNotFoundError)
        return False

    def remove(self) -> None:
        """Takes the file out of the folder, unless the next worker of this name has replaced it."""
        handle, self._handle = self._handle, None
        if handle is None:
            return
        try:
            with contextlib.suppress(FileNotFoundError), _folder(self._root) as folder:
                _unlink(folder, self._name, handle)
        finally:
            os.close(handle)


def leave_descriptor(root: str, engine_id: str, worker: WorkerHandshake, facts: Facts, block_tokens: int) -> Descriptor:
    """Writes this worker's descriptor and removes left-overs. Raises OSError where it cannot be written."""
    try:
        descriptor = write_descriptor(root, engine_id, worker, facts, block_tokens)
    finally:
        remove_left_over(root)
    if descriptor.is_gone():
        # Whoever removed the one before us, its worker or another start, looked at the name and then removed ours.
        descriptor.remove()
        descriptor = write_descriptor(root, engine_id, worker, facts, block_tokens)
    return descriptor


def write_descriptor(root: str, engine_id: str, worker: WorkerHandshake, facts: Facts, block_tokens: int) -> Descriptor:
    """Leaves a worker's namespace and the facts behind it in the folder. Raises OSError where that is not possible."""
    content: dict[str, Any] = {
        "namespace": worker.namespace.hex(),
        "pp_rank": worker.pp_rank,
        "tp_rank": worker.tp_rank,
        "engine_id": engine_id,
        "block_tokens": block_tokens,
        "facts": dict(facts),
    }
    os.makedirs(os.path.join(root, FOLDER), mode=0o700, exist_ok=True)
    # Renamed into place, so that a reader sees the whole file or none.
    staged, name = f"{_STAGED}{uuid.uuid4().hex}", _name(engine_id, worker.pp_rank, worker.tp_rank)
    with _folder(root) as folder:
        access = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        handle = os.open(staged, access, 0o600, dir_fd=folder)
        try:
            # The lock ends with the process, however that ends, and is seen by all processes of this kernel.
            if _lock(handle) is True:
                content["boot_id"] = _boot_id()
            with open(handle, "w", closefd=False) as file:
                json.dump(content, file, indent=1)
            os.replace(staged, name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            os.close(handle)
            os.unlink(staged, dir_fd=folder)
            raise
    return Descriptor(root, name, handle)


def read_descriptor(root: str, engine_id: str, pp_rank: int, tp_rank: int) -> bytes | None:
    """The namespace that a worker of this engine left, None if it is not there, not readable or not to be trusted."""
    name = _name(engine_id, pp_rank, tp_rank)
    try:
        with _folder(root) as folder:
            handle = _open_trusted(folder, name, os.O_RDONLY)
        try:
            content = _content(handle)
        finally:
            os.close(handle)
    except _Untrusted as refusal:
        _warn_once(f"a worker's descriptor is refused: {os.path.join(root, FOLDER, name)}: {refusal}")
        return None
    except (OSError, ValueError):
        return None
    return _namespace(content) if content.get("engine_id") == engine_id else None


def remove_left_over(root: str) -> None:
    """Removes what workers left that were killed: descriptors that nobody locks any more, and very old ones."""
    end_s = time.monotonic() + _CLEANING_S
    try:
        with _folder(root) as folder, os.scandir(folder) as entries:
            for entry in entries:
                if time.monotonic() > end_s:
                    return
                if entry.name.endswith(".json") or entry.name.startswith(_STAGED):
                    with contextlib.suppress(OSError):
                        _remove_if_left_over(folder, entry.name)
    except OSError as error:
        logger.debug("kvlane: no left-overs were looked for in %s: %s", os.path.join(root, FOLDER), error)


def _remove_if_left_over(folder: int, name: str) -> None:
    handle = _open_trusted(folder, name, os.O_RDWR)  # NFS gives this kind of lock only to who may write
    try:
        age_s = time.time() - os.fstat(handle).st_mtime
        is_free = _lock(handle)
        if is_free is False:
            return
        if name.startswith(_STAGED):
            is_left_over = age_s > _STAGED_AGE_MAX_S
        else:
            content = _content(handle)
            if _namespace(content) is None or not isinstance(content.get("engine_id"), str):
                return
            # Another machine's lock may be invisible here.
            boot_id = _boot_id()
            is_of_this_boot = boot_id is not None and content.get("boot_id") == boot_id
            is_left_over = age_s > _DESCRIPTOR_AGE_MAX_S or (is_free is True and is_of_this_boot)
        if is_left_over:
            _unlink(folder, name, handle)
    except ValueError:
        pass  # no descriptor of ours, so it is not ours to remove
    finally:
        os.close(handle)


class _Untrusted(OSError):
    """A file or folder that somebody else could have put there."""


@contextlib.contextmanager
def _folder(root: str) -> Iterator[int]:
    """The folder of descriptors as an open handle: a link in its place is not followed, then or later."""
    path = os.path.join(root, FOLDER)
    if os.path.islink(path):
        raise _Untrusted(f"{path} is a symbolic link, allowed: folders")
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        owner, own = os.fstat(handle).st_uid, os.geteuid()
        if owner != own:
            raise _Untrusted(f"{path} belongs to user {owner}, allowed: folders of user {own}")
        yield handle
    finally:
        os.close(handle)


def _open_trusted(folder: int, name: str, access: int) -> int:
    """Opens a file without following a link, and refuses what another user made."""
    if stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
        raise _Untrusted("it is a symbolic link, allowed: regular files")
    handle = os.open(name, access | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=folder)
    status, own = os.fstat(handle), os.geteuid()
    problem = None
    if not stat.S_ISREG(status.st_mode):
        problem = "it is not a regular file, allowed: regular files"
    elif status.st_uid != own:
        problem = f"it belongs to user {status.st_uid}, allowed: files of user {own}"
    if problem is not None:
        os.close(handle)
        raise _Untrusted(problem)
    return handle


def _content(handle: int) -> dict[str, Any]:
    """What a descriptor says. Raises ValueError if it is none."""
    with open(handle, "rb", closefd=False) as file:
        text = file.read(_DESCRIPTOR_BYTES_MAX + 1)
    if len(text) > _DESCRIPTOR_BYTES_MAX:
        raise ValueError(f"more than {_DESCRIPTOR_BYTES_MAX} bytes")
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    if not isinstance(content, dict):
        raise ValueError("not an object")
    return content


def _namespace(content: dict[str, Any]) -> bytes | None:
    """The namespace that a descriptor names, None if it names none."""
    try:
        namespace = bytes.fromhex(content["namespace"])
    except (KeyError, TypeError, ValueError):
        return None
    return namespace if len(namespace) == 32 else None


def _lock(handle: int) -> bool | None:
    """Locks a file without waiting. False: somebody else has the lock. None: this file system has no such locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _unlink(folder: int, name: str, handle: int) -> None:
    """Removes the name of an open file if the name is still that file's.

    Somebody may replace the file at any moment: it is moved aside first, and what turns out to be another's goes back.
    """
    if not _is_named(folder, name, handle):
        return
    aside = f"{_STAGED}{uuid.uuid4().hex}"
    os.rename(name, aside, src_dir_fd=folder, dst_dir_fd=folder)
    if not _is_named(folder, aside, handle):
        try:
            os.link(aside, name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
        except FileExistsError:
            pass  # an even later one is there
        except OSError:  # a file system without links
            os.rename(aside, name, src_dir_fd=folder, dst_dir_fd=folder)
            return
    os.unlink(aside, dir_fd=folder)


def _is_named(folder: int, name: str, handle: int) -> bool:
    return os.path.samestat(os.stat(name, dir_fd=folder, follow_symlinks=False), os.fstat(handle))


@functools.lru_cache(maxsize=1)
def _boot_id() -> str | None:
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip() or None
    except OSError:
        return None


@functools.lru_cache(maxsize=64)
def _warn_once(problem: str) -> None:
    logger.warning("kvlane: %s", problem)


class NamespaceSearch:
    """Collects the namespaces of all ranks and calls `found` with the list in rank order, until it succeeds once."""

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
        self._has_failed = False
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    def add(self, worker: WorkerHandshake) -> None:
        """Takes what a worker said itself."""
        self._known[worker.pp_rank, worker.tp_rank] = worker.namespace
        if not self._finish_if_complete() and self._has_failed:
            self.start_reading()

    def start_reading(self) -> None:
        """Looks for the missing ranks' files in the background, because the folder may not answer at once."""
        if self._thread is not None or self._found is None:
            return
        thread = threading.Thread(target=self._read, name="kvlane-descriptors", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # no more threads; the next request that asks tries again
            _warn_once(f"the workers' descriptors cannot be looked for now: {error}")
            return
        self._thread = thread

    def close(self) -> None:
        self._stop.set()

    def _read(self) -> None:
        logger.info("kvlane: looking for the workers' descriptors in %s", os.path.join(self._root, FOLDER))
        pause_s = _POLL_S
        while not self._stop.is_set():
            for pp_rank, tp_rank in self._ranks:
                if (pp_rank, tp_rank) not in self._known:
                    namespace = read_descriptor(self._root, self._engine_id, pp_rank, tp_rank)
                    if namespace is not None:
                        self._known[pp_rank, tp_rank] = namespace
            if self._finish_if_complete():
                return
            self._stop.wait(pause_s)
            if self._has_failed:
                pause_s = min(2 * pause_s, _LONGEST_POLL_S)

    def _finish_if_complete(self) -> bool:
        """Whether `found` has succeeded, now or before."""
        if any(rank not in self._known for rank in self._ranks):
            return False
        if not self._finding.acquire(blocking=False):
            return False  # the other thread is at it, and tries again if it fails
        try:
            if self._found is not None:
                self._found([self._known[rank] for rank in self._ranks])
                self._found = None
                if self._has_failed:
                    logger.info("kvlane: the shared folder can be read now")
            return True
        except Exception as error:
            if self._has_failed:
                logger.debug("kvlane: the shared folder still cannot be read: %s", error)
            else:
                logger.exception(
                    "kvlane: the shared folder cannot be read, so requests compute their prompts; it is tried again"
                )
            self._has_failed = True
            return False
        finally:
            self._finding.release()


def _name(engine_id: str, pp_rank: int, tp_rank: int) -> str:
    # An engine id is the operator's text and may hold slashes.
    return f"{hashlib.sha256(engine_id.encode()).hexdigest()[:32]}-pp{pp_rank}-tp{tp_rank}.json"
