"""Risk: a worker is not found, so its engine loads nothing; or the folder fills with files that nobody removes."""

import errno
import json
import os
import threading
import time
import types

import pytest

from kvlane import StoreError
from kvlane.vllm import connector, descriptors
from kvlane.vllm.descriptors import (
    NamespaceSearch,
    leave_descriptor,
    read_descriptor,
    remove_left_over,
    write_descriptor,
)
from kvlane.vllm.metadata import WorkerHandshake

NAMESPACE = bytes(range(32))
DAY_S = 86_400


def write(root, engine="e", tp_rank=0):
    return write_descriptor(str(root), engine, WorkerHandshake(NAMESPACE, 0, tp_rank), [("model dtype", "bf16")], 16)


def kill(descriptor):
    """What the end of a process does to its lock."""
    os.close(descriptor._handle)


def files(root):
    return sorted(path.name for path in (root / "descriptors").iterdir())


def make_older(path, by_s):
    then = time.time() - by_s
    os.utime(path, (then, then))


def test_a_descriptor_says_its_workers_namespace_to_its_own_engine_only(tmp_path):
    descriptor = write(tmp_path)
    assert read_descriptor(str(tmp_path), "e", 0, 0) == NAMESPACE
    assert read_descriptor(str(tmp_path), "f", 0, 0) is None
    os.rename(descriptor.path, tmp_path / "descriptors" / descriptors._name("f", 0, 0))
    assert read_descriptor(str(tmp_path), "f", 0, 0) is None


def test_a_worker_that_stops_takes_its_descriptor_along(tmp_path):
    worker = connector.KvlaneFsConnector.__new__(connector.KvlaneFsConnector)
    worker._search = worker._scheduler = worker._worker = None
    worker._descriptor = write(tmp_path)
    write(tmp_path, "other")
    worker.shutdown()
    worker.shutdown()
    assert len(files(tmp_path)) == 1
    assert read_descriptor(str(tmp_path), "other", 0, 0) == NAMESPACE


def test_a_worker_that_stops_leaves_the_descriptor_of_the_next_one_with_its_name(tmp_path):
    first = write(tmp_path)
    write(tmp_path)
    first.remove()
    assert read_descriptor(str(tmp_path), "e", 0, 0) == NAMESPACE


def test_a_start_removes_descriptors_of_workers_that_were_killed_and_no_others(tmp_path):
    killed, living = write(tmp_path, "killed"), write(tmp_path, "living")
    make_older(living.path, 31 * DAY_S)
    kill(killed)
    remove_left_over(str(tmp_path))
    assert files(tmp_path) == [os.path.basename(living.path)]


@pytest.mark.parametrize("boot_id", ["another machine's", None])
def test_a_descriptor_whose_worker_cannot_be_seen_from_here_stays_for_thirty_days(tmp_path, boot_id):
    descriptor = write(tmp_path)
    content = json.loads((tmp_path / descriptor.path).read_text())
    content["boot_id"] = boot_id
    (tmp_path / descriptor.path).write_text(json.dumps(content))
    kill(descriptor)
    make_older(descriptor.path, 29 * DAY_S)
    remove_left_over(str(tmp_path))
    assert len(files(tmp_path)) == 1
    make_older(descriptor.path, 31 * DAY_S)
    remove_left_over(str(tmp_path))
    assert files(tmp_path) == []


def test_half_made_descriptors_go_when_they_are_old_and_other_files_stay(tmp_path):
    folder = tmp_path / "descriptors"
    folder.mkdir()
    for name in (".staged-old", ".staged-new", "notes.txt", "rubbish.json"):
        (folder / name).write_text("[[")
        if name != ".staged-new":
            make_older(folder / name, 2 * 3600)
    (folder / "link.json").symlink_to(folder / "notes.txt")
    remove_left_over(str(tmp_path))
    assert files(tmp_path) == [".staged-new", "link.json", "notes.txt", "rubbish.json"]


@pytest.mark.parametrize("makes_it", ["a link", "another user"])
def test_a_folder_that_somebody_else_put_in_the_place_of_the_descriptors_is_left_alone(
    tmp_path, makes_it, monkeypatch, caplog
):
    descriptors._warn_once.cache_clear()
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    root.mkdir()
    left = write(elsewhere)
    kill(left)
    make_older(left.path, 31 * DAY_S)
    if makes_it == "a link":
        (root / "descriptors").symlink_to(elsewhere / "descriptors")
        problem = "symbolic link"
    else:
        os.rename(elsewhere / "descriptors", root / "descriptors")
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        problem = "belongs to user"
    before = files(root)
    remove_left_over(str(root))
    with pytest.raises(OSError, match=problem):
        write(root, "new")
    assert read_descriptor(str(root), "e", 0, 0) is None
    assert problem in caplog.text
    assert files(root) == before == [os.path.basename(left.path)]


def test_a_worker_that_stops_removes_nothing_behind_a_link_that_took_the_folders_place(tmp_path):
    descriptor = write(tmp_path)
    os.rename(tmp_path / "descriptors", tmp_path / "moved")
    (tmp_path / "descriptors").symlink_to(tmp_path / "moved")
    with pytest.raises(OSError, match="symbolic link"):
        descriptor.remove()
    assert len(files(tmp_path)) == 1


@pytest.mark.parametrize("content", ["[[", "{}", '{"namespace": "zz", "engine_id": "e"}', '{"namespace": "%s"}'])
def test_a_file_that_is_no_descriptor_stays_however_old_it_is(tmp_path, content):
    (tmp_path / "descriptors").mkdir()
    path = tmp_path / "descriptors" / "somebodys.json"
    path.write_text(content.replace("%s", NAMESPACE.hex()))
    make_older(path, 400 * DAY_S)
    remove_left_over(str(tmp_path))
    assert files(tmp_path) == ["somebodys.json"]


def leave(root):
    return leave_descriptor(str(root), "e", WorkerHandshake(NAMESPACE, 0, 0), [], 16)


def test_a_worker_whose_descriptor_was_removed_in_place_of_the_one_before_leaves_it_again(tmp_path, monkeypatch):
    def remove_the_one_before(root):
        # It compared the name with its own file, stood still, and goes on now.
        os.unlink(tmp_path / "descriptors" / descriptors._name("e", 0, 0))

    monkeypatch.setattr(descriptors, "remove_left_over", remove_the_one_before)
    descriptor = leave(tmp_path)
    assert read_descriptor(str(tmp_path), "e", 0, 0) == NAMESPACE
    descriptor.remove()
    assert files(tmp_path) == []


def test_a_worker_that_was_replaced_meanwhile_leaves_the_next_ones_descriptor_alone(tmp_path, monkeypatch):
    next_one = []
    monkeypatch.setattr(descriptors, "remove_left_over", lambda root: next_one.append(write(tmp_path)))
    leave(tmp_path)
    assert os.path.samestat(os.stat(next_one[0].path), os.fstat(next_one[0]._handle))


@pytest.mark.parametrize("has_links", [True, False], ids=["links", "no links"])
def test_a_descriptor_that_is_made_while_the_one_before_is_removed_stays(tmp_path, monkeypatch, has_links):
    before, next_one, is_named = write(tmp_path), [], descriptors._is_named

    def stand_still(folder, name, handle):
        answer = is_named(folder, name, handle)
        if not next_one:
            next_one.append(write(tmp_path))
        return answer

    def no_links(*_, **__):
        raise PermissionError("no links here")

    monkeypatch.setattr(descriptors, "_is_named", stand_still)
    if not has_links:
        monkeypatch.setattr(os, "link", no_links)
    before.remove()
    assert os.path.samestat(os.stat(next_one[0].path), os.fstat(next_one[0]._handle))
    assert files(tmp_path) == [os.path.basename(next_one[0].path)]


def test_a_start_removes_left_overs_also_where_it_can_write_nothing(tmp_path, monkeypatch):
    killed = write(tmp_path, "killed")
    kill(killed)
    with monkeypatch.context() as patched:
        patched.setattr(json, "dump", lambda *arguments, **named: os.stat(tmp_path / "no space left"))
        with pytest.raises(FileNotFoundError):
            leave(tmp_path)
    assert files(tmp_path) == []


@pytest.mark.parametrize(("is_needed", "level"), [(True, "WARNING"), (False, "INFO")])
def test_a_descriptor_that_could_not_be_left_is_warned_of_where_it_is_needed(is_needed, level, monkeypatch, caplog):
    def read_only(*arguments):
        raise OSError(errno.EROFS, "read-only")

    monkeypatch.setattr(connector, "leave_descriptor", read_only)
    monkeypatch.setattr(connector, "handshakes_may_be_missing", lambda parallel: is_needed)
    worker = connector.KvlaneFsConnector.__new__(connector.KvlaneFsConnector)
    worker._options = types.SimpleNamespace(root="/nowhere")
    worker._vllm_config = types.SimpleNamespace(cache_config=types.SimpleNamespace(block_size=16), parallel_config=None)
    worker._engine_id, worker._descriptor = "e", None
    with caplog.at_level("INFO", logger="vllm.kvlane"):
        worker._leave_descriptor(WorkerHandshake(NAMESPACE, 0, 0), [])
    said = [record for record in caplog.records if "no descriptor was left" in record.message]
    assert [record.levelname for record in said] == [level]


def test_where_there_are_no_descriptors_nothing_is_removed(tmp_path):
    remove_left_over(str(tmp_path))


def test_links_pipes_and_files_of_other_users_are_refused_and_named_once(tmp_path, monkeypatch, caplog):
    descriptors._warn_once.cache_clear()
    descriptor = write(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(os, "geteuid", lambda: os.getuid() + 1)
        assert read_descriptor(str(tmp_path), "e", 0, 0) is None
        assert read_descriptor(str(tmp_path), "e", 0, 0) is None
    os.rename(descriptor.path, tmp_path / "moved")
    os.symlink(tmp_path / "moved", descriptor.path)
    assert read_descriptor(str(tmp_path), "e", 0, 0) is None
    os.unlink(descriptor.path)
    os.mkfifo(descriptor.path)
    assert read_descriptor(str(tmp_path), "e", 0, 0) is None
    said = [record.message for record in caplog.records]
    assert len(said) == 3, said
    for line, problem in zip(said, ("belongs to user", "symbolic link", "not a regular file"), strict=True):
        assert problem in line
        assert descriptor.path in line


@pytest.mark.parametrize("text", ["", "[1]", "7", '{"namespace": 7}', '{"namespace": "zz"}', "[" * 100_000])
def test_a_file_that_is_no_descriptor_is_none(tmp_path, text):
    descriptor = write(tmp_path)
    with open(descriptor.path, "w") as file:
        file.write(text)
    assert read_descriptor(str(tmp_path), "e", 0, 0) is None


class Folder:
    """Opens when a test lets it."""

    def __init__(self, failures):
        self.failures = failures
        self.tries = 0
        self.opened = threading.Event()

    def open(self, namespaces):
        self.tries += 1
        if self.tries <= self.failures:
            raise StoreError("the folder does not answer")
        self.namespaces = namespaces
        self.opened.set()


def search(root, folder, tp_size=1):
    return NamespaceSearch(str(root), "e", 1, tp_size, folder.open)


@pytest.fixture
def short_pauses(monkeypatch):
    monkeypatch.setattr(descriptors, "_POLL_S", 0.01)
    monkeypatch.setattr(descriptors, "_LONGEST_POLL_S", 0.04)


@pytest.mark.parametrize("from_files", [False, True])
def test_a_folder_that_cannot_be_opened_is_tried_again_until_it_can(tmp_path, short_pauses, from_files, caplog):
    folder = Folder(failures=5)
    searching = search(tmp_path, folder)
    descriptor = write(tmp_path)
    if from_files:
        searching.start_reading()
    else:
        searching.add(WorkerHandshake(NAMESPACE, 0, 0))
    assert folder.opened.wait(10), "after one failure nobody tried again"
    assert (folder.tries, folder.namespaces) == (6, [NAMESPACE])
    assert len([record for record in caplog.records if record.levelname == "ERROR"]) == 1
    searching._thread.join(10)
    searching.add(WorkerHandshake(NAMESPACE, 0, 0))
    searching.start_reading()
    assert folder.tries == 6
    descriptor.remove()


def test_a_search_that_got_no_thread_is_started_by_the_next_request(tmp_path, short_pauses, monkeypatch, caplog):
    descriptors._warn_once.cache_clear()
    folder = Folder(failures=0)
    searching = search(tmp_path, folder)
    descriptor = write(tmp_path)

    def refuse(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        searching.start_reading()
        searching.start_reading()
    assert len([record for record in caplog.records if "cannot be looked for now" in record.message]) == 1
    searching.start_reading()
    assert folder.opened.wait(10), "it was never tried again"
    descriptor.remove()


def test_pauses_between_tries_grow_to_a_bound(tmp_path, monkeypatch):
    folder = Folder(failures=12)
    searching = search(tmp_path, folder)
    pauses_s = []
    monkeypatch.setattr(searching._stop, "wait", pauses_s.append)
    searching._known[0, 0] = NAMESPACE
    searching._read()
    assert pauses_s == [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0, 30.0, 30.0]


def test_a_search_that_is_closed_tries_no_more(tmp_path, short_pauses):
    folder = Folder(failures=1_000_000)
    searching = search(tmp_path, folder)
    searching.add(WorkerHandshake(NAMESPACE, 0, 0))
    searching.close()
    searching._thread.join(10)
    assert not searching._thread.is_alive()


def test_a_rank_that_is_missing_is_found_later_and_the_folder_opened_once(tmp_path, short_pauses):
    folder = Folder(failures=0)
    searching = search(tmp_path, folder, tp_size=2)
    searching.add(WorkerHandshake(b"h" * 32, 0, 0))
    assert folder.tries == 0
    searching.start_reading()
    write(tmp_path, tp_rank=1)
    assert folder.opened.wait(10)
    assert (folder.tries, folder.namespaces) == (1, [b"h" * 32, NAMESPACE])
