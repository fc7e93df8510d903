"""Risk: a worker is not found, so its engine loads nothing; or the folder fills with files that nobody removes."""

import json
import os
import time

import pytest

from kvlane.vllm import connector, descriptors
from kvlane.vllm.descriptors import read_descriptor, remove_left_over, write_descriptor
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
    os.rename(descriptor.path, descriptors._path(str(tmp_path), "f", 0, 0))
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
