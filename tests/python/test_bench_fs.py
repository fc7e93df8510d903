"""The side-by-side benchmark must notice wrong bytes and keep its row format."""

import json
import os
import sys
import types

import pytest

from support.bench_modules import BENCHES, importable

BENCH = BENCHES / "fs"


@pytest.fixture(scope="module", autouse=True)
def bench_modules():
    with importable(BENCH):
        yield


@pytest.fixture
def caches(monkeypatch):
    import workload

    monkeypatch.setattr(workload, "LAYERS", 3)
    monkeypatch.setattr(workload, "POOL_BLOCKS", 16)
    monkeypatch.setattr(workload, "RUN_BYTES", 4096)
    source, target = workload.PagedCache().fill_with_noise(), workload.PagedCache()
    target.layers[:, [5, 1]] = source.layers[:, [7, 9]]
    return source, target


def test_a_right_copy_passes_the_check(caches):
    source, target = caches
    target.check_request([5, 1], source, [7, 9])


def test_one_flipped_byte_is_a_wrong_result(caches):
    import workload

    source, target = caches
    target.layers[2, 1, 4095] ^= 1
    with pytest.raises(workload.WrongBytes, match="layer 2"):
        target.check_request([5, 1], source, [7, 9])


def test_blocks_in_the_wrong_order_are_a_wrong_result(caches):
    import workload

    source, target = caches
    with pytest.raises(workload.WrongBytes):
        target.check_request([1, 5], source, [7, 9])


def test_a_byte_in_a_neighbour_block_is_a_wrong_result(caches):
    import workload

    source, target = caches
    target.layers[0, 6, 0] = 1
    with pytest.raises(workload.WrongBytes, match=r"\[6\]"):
        target.check_request([5, 1], source, [7, 9])


def test_every_key_gives_one_row_of_the_agreed_form():
    from rows import DIRECT_READ, Key, Samples
    from workload import REQUEST_BYTES, Sample

    samples = Samples()
    for _ in range(3):
        samples.add(Key("tmpfs", "load", 2, "kvlane"), Sample(0.010, [0.018, 0.022]))
        cold = Sample(0.050, [0.020, 0.020], {DIRECT_READ: 0.045})
        samples.add(Key("disk", "load-cold", 1, "kvlane"), cold)
        samples.add(Key("memory", "lookup", 1, "kvlane"), Sample(7e-6, []))
    rows = samples.rows()
    names = [(r["system"], r["case"], r["medium"], r["threads"]) for r in rows]
    assert names == [
        ("memcpy", "copy", "tmpfs", 1),
        ("memcpy", "copy", "disk", 1),
        ("kvlane", "load-cold", "disk", 1),
        ("kvlane", "lookup", "memory", 1),
        ("kvlane", "load", "tmpfs", 2),
    ]
    by_case = {r["case"]: r for r in rows}
    assert by_case["load"]["of_memcpy"] == 2.0
    assert by_case["load"]["gbps"] == pytest.approx(REQUEST_BYTES / 0.010 / 1e9, abs=0.001)
    assert all(set(row) == {"system", "case", "medium", "threads", "ms", "gbps", "of_memcpy"} for row in rows)
    assert samples.other_floors() == [
        {
            "system": "kvlane",
            "case": "load-cold",
            "medium": "disk",
            "threads": 1,
            "floor": DIRECT_READ,
            "floor_ms": 45.0,
            "of_floor": 0.9,
            "floor_of_memcpy": 0.444,
        }
    ]
    assert [by_case["lookup"][name] for name in ("ms", "gbps", "of_memcpy")] == [0.007, None, None]


def test_a_bar_is_missed_below_a_floor_and_above_a_ceiling():
    from rows import promises

    row = {"system": "kvlane", "threads": 1}
    found = promises(
        [
            {**row, "case": "store", "medium": "tmpfs", "ms": 20.0, "of_memcpy": 0.99},
            {**row, "case": "store", "medium": "tmpfs", "system": "example-connector", "ms": 100.0, "of_memcpy": 0.19},
            {**row, "case": "lookup", "medium": "memory", "ms": 0.021, "of_memcpy": None},
        ],
        [],
    )
    verdicts = {bar.text: bar.holds for bar in found}
    assert verdicts["tmpfs store, 1 thread: share of memcpy"] is False
    assert verdicts["tmpfs store, 1 thread: times example-connector"] is True
    assert verdicts["lookup"] is False
    assert verdicts["tmpfs load, 1 thread: share of memcpy"] is None


def test_all_rows_of_a_medium_are_divided_by_one_memcpy():
    """The second process got slow pages for its memcpys: that makes its own row no better."""
    from rows import Key, Samples
    from workload import Sample

    samples = Samples()
    for _ in range(3):
        samples.add(Key("tmpfs", "load", 1, "kvlane"), Sample(0.010, [0.009, 0.009], floor_place="reader"))
        samples.add(Key("tmpfs", "store", 1, "kvlane"), Sample(0.010, [0.014, 0.014], floor_place="writer"))
        samples.add(Key("tmpfs", "store", 1, "vllm-fs"), Sample(0.050, [0.010, 0.010], floor_place="peer"))
    rows = {(row["system"], row["case"]): row for row in samples.rows()}
    assert rows["memcpy", "copy"]["ms"] == 10.0
    assert rows["kvlane", "load"]["of_memcpy"] == rows["kvlane", "store"]["of_memcpy"] == 1.0
    assert rows["vllm-fs", "store"]["of_memcpy"] == 0.2


def test_every_place_in_memory_counts_once_however_often_it_was_used():
    from rows import Key, Samples
    from workload import Sample

    samples = Samples()
    for place, seconds, count in (("slow", 0.014, 50), ("fast", 0.009, 1), ("usual", 0.010, 2)):
        for _ in range(count):
            samples.add(Key("disk", "store", 1, "kvlane"), Sample(0.020, [seconds], floor_place=place))
    assert samples.rows()[0]["ms"] == 10.0
    assert samples.memcpy_ms() == {"slow": 14.0, "fast": 9.0, "usual": 10.0}


def test_slow_pages_are_no_sign_of_a_busy_machine():
    from rows import Key, Samples
    from workload import Sample

    samples = Samples()
    for place, seconds in (("slow", 0.016), ("fast", 0.008)):
        for number in range(10):
            sample = Sample(0.020, [seconds * (1 + number / 1000)], floor_place=place)
            samples.add(Key("tmpfs", "store", 1, "kvlane"), sample)
    assert samples.disturbance() < 1.02


def test_each_turn_times_memcpy_between_other_buffers(monkeypatch):
    import workload

    monkeypatch.setattr(workload, "REQUEST_BYTES", 1 << 20)
    floor = workload.Floor()
    workload.touch(floor.buffers)
    samples = [floor.around(lambda: None) for _ in range(2 * floor.PAIRS)]
    places = [sample.floor_place for sample in samples]
    assert len(set(places)) == floor.PAIRS
    assert places[: floor.PAIRS] == places[floor.PAIRS :]
    assert all(len(sample.floor_seconds) == 2 for sample in samples)
    assert len(floor.around(lambda: None, is_timed_after=False).floor_seconds) == 1


def test_memory_is_there_before_anything_is_timed(monkeypatch):
    import resource

    import workload

    buffers = [workload.anonymous(64 << 20), workload.anonymous(32 << 20)]
    workload.touch(buffers)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for buffer in buffers:
        buffer[:] = 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 100


def test_a_cold_case_is_not_run_where_a_block_stays_in_the_page_cache(tmp_path, monkeypatch):
    import files
    from turns import NotRun
    from workload import BLOCK_BYTES

    with open(tmp_path / "segment", "wb") as segment:
        segment.truncate(256 << 20)
    monkeypatch.setattr(files, "resident_bytes", lambda path: 64 << 10)
    files.drop(tmp_path)
    monkeypatch.setattr(files, "resident_bytes", lambda path: BLOCK_BYTES)
    with pytest.raises(NotRun, match=r"1\.5 MiB stayed"):
        files.drop(tmp_path)


@pytest.mark.parametrize("reads_at_a_time", [1, 4])
def test_the_direct_read_floor_reads_the_whole_file(tmp_path, monkeypatch, reads_at_a_time):
    import files
    from turns import NotRun

    size_bytes, offsets, preadv = 4 * files.DirectRead.CALL_BYTES, [], files.os.preadv
    try:
        floor = files.DirectRead(tmp_path, size_bytes)
    except NotRun as reason:
        pytest.skip(f"NOT RUN: direct reads: {reason}")
    floor.seconds(reads_at_a_time)

    def noted(file, buffers, offset):
        read = preadv(file, buffers, offset)
        offsets.append((offset, read))
        return read

    monkeypatch.setattr(files.os, "preadv", noted)
    assert floor.seconds(reads_at_a_time) > 0
    assert sum(read for _, read in offsets) == size_bytes
    assert len({offset for offset, _ in offsets}) == len(offsets)


WORKER = """
from turns import NotRun, serve
from workload import Sample, WrongBytes

class System:
    def __init__(self, cores, folders):
        pass
    def cases(self):
        return [("store", "tmpfs", 1), ("load", "tmpfs", 1)]
    def versions(self):
        return {{}}
    def turn(self, case, medium, threads, round_number):
        print("noise on standard output")
        if case == "load":
            raise {failure}
        return Sample(0.02, [0.02, 0.02])

serve(System)
"""


@pytest.mark.parametrize(
    ("failure", "status", "said"),
    [
        ("WrongBytes('one byte')", 1, "FAILED: worker: one byte"),
        ("RuntimeError('broken')", 1, "RuntimeError: broken"),
        ("SystemExit(3)", 1, "ended with status 3"),
        ("NotRun('no disk')", 0, "NOT RUN: kvlane load tmpfs 1: no disk"),
    ],
)
def test_the_run_fails_for_wrong_bytes_and_broken_workers_only(tmp_path, monkeypatch, capfd, failure, status, said):
    import run

    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(failure=failure))
    environment = tmp_path / "environment" / "bin"
    environment.mkdir(parents=True)
    (environment / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (environment / "python").chmod(0o755)
    monkeypatch.setattr(run, "SYSTEMS", {"kvlane": [(str(environment.parent), str(script))]})
    result = tmp_path / "fs.json"
    arguments = ["run.py", "--rounds", "1", "--json", str(result), "--disk-dir", str(BENCH)]
    monkeypatch.setattr(sys, "argv", arguments)
    before = {*BENCH.glob("kvlane-bench.*")}
    assert run.main() == status
    assert said in "".join(capfd.readouterr())
    assert {*BENCH.glob("kvlane-bench.*")} <= before
    if status == 0:
        written = json.loads(result.read_text())
        assert [(row["system"], row["case"]) for row in written["rows"]] == [("memcpy", "copy"), ("kvlane", "store")]
        assert written["machine"]["not_run"] == ["kvlane load tmpfs 1: no disk"]
    else:
        assert not result.exists()


SET_WORKER = """
import os
from pathlib import Path
from turns import NotRun, serve
from workload import Sample

class System:
    def __init__(self, cores, folders):
        self._folders = folders
    def cases(self):
        return [("store", "tmpfs", 1), ("load-cold", "disk", 1)]
    def versions(self):
        return {{}}
    def turn(self, case, medium, threads, round_number):
        if case == "load-cold" and round_number >= {first_not_run}:
            raise NotRun("no disk")
        if case == "load-cold":
            return Sample(0.02, [0.02, 0.02], floor_place=str(os.getpid()))
        left = os.listdir(self._folders[medium])
        Path(self._folders[medium], str(round_number)).touch()
        with open({log!r}, "a") as log:
            print(os.getpid(), round_number, len(left), file=log)
        return Sample(0.02, [0.02, 0.02], floor_place=str(os.getpid()))

serve(System)
"""


# The second: the case could be set up in the first set of processes, and in no later one.
@pytest.mark.parametrize("first_not_run", [0, 3])
def test_each_set_has_new_processes_and_empty_folders_and_what_not_all_could_run_has_no_row(
    tmp_path, monkeypatch, first_not_run
):
    import run

    script, log = tmp_path / "worker.py", tmp_path / "log"
    script.write_text(SET_WORKER.format(log=str(log), first_not_run=first_not_run))
    environment = tmp_path / "environment" / "bin"
    environment.mkdir(parents=True)
    (environment / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (environment / "python").chmod(0o755)
    monkeypatch.setattr(run, "SYSTEMS", {"kvlane": [(str(environment.parent), str(script))]})
    result = tmp_path / "fs.json"
    arguments = ["run.py", "--sets", "3", "--rounds", "2", "--json", str(result), "--disk-dir", str(BENCH)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert run.main() == 0
    turns = [tuple(map(int, line.split())) for line in log.read_text().splitlines()]
    assert [number for _, number, _ in turns] == list(range(9))
    assert len({process for process, _, _ in turns}) == 3
    assert [left for _, _, left in turns] == [0, 1, 2] * 3
    written = json.loads(result.read_text())
    machine = written["machine"]
    assert {row["case"] for row in written["rows"]} == {"copy", "store"}
    assert (machine["sets"], machine["rounds"], len(machine["memcpy_ms"])) == (3, 6, 3)
    assert machine["not_run"] == ["kvlane load-cold disk 1: no disk"]


def test_the_cases_of_calls_run_in_any_order(tmp_path, monkeypatch):
    """An idle engine makes its folder first; the stored prompt still finds a place."""
    import worker_kvlane_calls as calls

    class IdleEngine:
        def __init__(self, folder):
            (folder / "store").mkdir(parents=True)

        def step(self):
            pass

        def close(self):
            pass

    monkeypatch.setitem(sys.modules, "idle_engine", types.SimpleNamespace(IdleEngine=IdleEngine))
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None)
    monkeypatch.setattr(calls, "CALLS", dict.fromkeys(calls.CALLS, 1))
    system = calls.System([0], {"tmpfs": str(tmp_path)})
    try:
        for case in ("idle-step", "lookup", "keys-first", "keys-grown"):
            assert system.turn(case, "memory", 1, 0).seconds > 0
    finally:
        system.close()
