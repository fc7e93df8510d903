"""The README must not say more than the benchmark measured, nor leave out where kvlane loses."""

import copy
import json
import re
import sys
from pathlib import Path

import pytest

from support.bench_modules import BENCHES, importable

ROOT = Path(__file__).resolve().parents[2]
BENCH = BENCHES / "fs"


@pytest.fixture(scope="module", autouse=True)
def bench_modules():
    with importable(BENCH):
        yield


@pytest.fixture
def committed():
    return json.loads((ROOT / "benches" / "results" / "fs.json").read_text())


@pytest.fixture
def whole():
    """A run that measured everything, with round figures: kvlane is the fastest at everything but I/O alone."""
    from rows import BARE_WRITE, DIRECT_READ, DIRECT_READS, TWO_MEMCPYS, Key, Samples
    from workload import Sample

    samples = Samples()

    def add(system: str, case: str, medium: str, threads: int, ms: float, floors: dict[str, float] | None = None):
        floor_seconds = [] if medium == "memory" else [0.010, 0.010]
        samples.add(
            Key(medium, case, threads, system), Sample(ms / 1e3, floor_seconds, floors or {}, f"worker_{system} 1")
        )

    for medium in ("tmpfs", "disk"):
        for system in ("example-connector", "vllm-fs"):
            add(system, "store", medium, 1, 80.0)
            add(system, "load", medium, 1, 60.0)
        for system in ("vllm-fs", "lmcache-fs"):
            for threads in (1, 2, 4):
                add(system, "io-write", medium, threads, 40.0 - threads)
                add(system, "io-read", medium, threads, 30.0 - threads)
        for threads in (1, 2):
            for case, ms in (("store", 9.0), ("load", 8.0), ("load-fresh-reader", 15.0), ("first-fill", 50.0)):
                is_pair, is_disk_store = (
                    (medium, threads) == ("tmpfs", 2),
                    (medium, threads, case) == ("disk", 1, "store"),
                )
                floors = {TWO_MEMCPYS: 0.006} if is_pair and case in ("store", "load") else {}
                add("kvlane", case, medium, threads, ms, floors | ({BARE_WRITE: 0.012} if is_disk_store else {}))
    for threads in (1, 2):
        add("kvlane", "store-evicted", "disk", threads, 20.0, {BARE_WRITE: 0.016} if threads == 1 else {})
        add("kvlane", "load-cold", "disk", threads, 48.0, {DIRECT_READ: 0.075, DIRECT_READS: 0.050})
    for system in ("example-connector", "vllm-fs"):
        add(system, "load-cold", "disk", 1, 90.0)
    for case in ("lookup", "keys-first", "keys-grown", "idle-step"):
        add("kvlane", case, "memory", 1, 0.01)
    machine = {
        "date": "2026-01-02T03:04:05+00:00", "cpu": "Any CPU", "cores": 8, "virtual": False, "memory": "16.0 GiB",
        "kernel": "Linux 6", "filesystems": {"tmpfs": "tmpfs", "disk": "xfs"}, "rounds": 12, "sets": 4, "not_run": [],
        "disturbance": samples.disturbance(), "memcpy_ms": samples.memcpy_ms(), "other_floors": samples.other_floors(),
    }  # fmt: skip
    return {"machine": machine, "rows": samples.rows()}


def without(result: dict, is_gone) -> dict:
    """The result of a run in which some rows of kvlane and its peers were NOT RUN."""
    left = copy.deepcopy(result)
    left["rows"] = [row for row in left["rows"] if not is_gone(row)]
    left["machine"]["other_floors"] = [floor for floor in left["machine"]["other_floors"] if not is_gone(floor)]
    return left


def set_ms(result: dict, ms: float, *key) -> None:
    (row,) = [r for r in result["rows"] if (r["system"], r["case"], r["medium"], r["threads"]) == key]
    row["ms"] = ms


def test_a_reader_who_divides_gets_every_share_of_the_committed_result(committed):
    from rows import CALLS_MEDIUM

    ms = {(row["system"], row["case"], row["medium"], row["threads"]): row["ms"] for row in committed["rows"]}
    for row in committed["rows"]:
        if row["medium"] != CALLS_MEDIUM:
            share = ms["memcpy", "copy", row["medium"], 1] / row["ms"]
            assert row["of_memcpy"] == pytest.approx(share, abs=0.0005), row
    for floor in committed["machine"]["other_floors"]:
        row_ms = ms[floor["system"], floor["case"], floor["medium"], floor["threads"]]
        assert floor["of_floor"] == pytest.approx(floor["floor_ms"] / row_ms, abs=0.0005), floor
        share = ms["memcpy", "copy", floor["medium"], 1] / floor["floor_ms"]
        assert floor["floor_of_memcpy"] == pytest.approx(share, abs=0.0005), floor


def test_every_line_of_the_table_shows_the_memcpy_that_its_shares_are_made_of(whole, committed):
    from readme import section

    assert section(whole).count("\n| ") == 12  # a head, and all rows
    lines = [line for line in section(committed).splitlines() if line.startswith("|") and " ms, " in line]
    assert lines
    for line in lines:
        memcpy_ms = float(line.split("|")[2].removesuffix(" ms "))
        for ms, share in re.findall(r"([\d.]+) ms, ([\d.]+)", line):
            assert memcpy_ms / float(ms) == pytest.approx(float(share), abs=0.011), line


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("store", "| store, disk |"),
        ("load", "| load, tmpfs |"),
        ("store-evicted", "over evicted slots"),
        ("load-cold", "from the device"),
        ("load-fresh-reader", "opened"),
        ("first-fill", "first fill"),
        ("lookup", "lookup of 64 blocks"),
        ("keys-first", "a new prompt"),
        ("keys-grown", "that grew"),
        ("idle-step", "a step that moves nothing"),
    ],
)
def test_a_case_that_was_not_run_is_left_out_of_the_text(whole, case, words):
    from readme import section

    assert words in section(whole)
    assert words not in section(without(whole, lambda row: row["case"] == case))


@pytest.mark.parametrize(
    "is_gone",
    [
        lambda row: row["threads"] > 1,
        lambda row: row["medium"] == "disk",
        lambda row: row["medium"] == "tmpfs",
        lambda row: row["medium"] == "memory",
        lambda row: row["system"] == "kvlane",
        lambda row: row["system"] != "kvlane" and row["case"] != "copy",
        lambda row: True,
    ],
    ids=["one core", "no disk", "no tmpfs", "no calls", "no kvlane", "no peers", "nothing"],
)
def test_half_a_run_is_half_a_text_and_no_error(whole, is_gone):
    from readme import section

    text = section(without(whole, is_gone))
    assert text.startswith("`make bench-fs` on ")
    assert text.endswith(".\n")


def test_no_peers_no_comparison(whole):
    from readme import section

    assert "Where others are faster" in section(whole)
    text = section(without(whole, lambda row: row["system"] not in ("kvlane", "memcpy")))
    assert "Where others are faster" not in text


def test_what_was_not_run_is_said_with_its_reason(whole):
    from readme import section

    whole["machine"]["not_run"] = ["kvlane load-cold disk 1: O_DIRECT cannot be used here"]
    text = section(without(whole, lambda row: row["case"] == "load-cold"))
    assert "NOT RUN: kvlane load-cold disk 1: O_DIRECT cannot be used here" in text
    assert "Not measured: disk load-cold" in text
    assert "from the device" not in text


def test_a_first_fill_slower_than_a_peer_is_said(whole):
    from readme import section

    set_ms(whole, 50.0, "kvlane", "first-fill", "tmpfs", 1)
    set_ms(whole, 46.0, "vllm-fs", "store", "tmpfs", 1)
    losing = section(whole).partition("Where others are faster: ")[2]
    assert "store, tmpfs, into an empty folder 50.00 ms: vLLM `fs` tier 46.00 ms into new files" in losing
    set_ms(whole, 40.0, "kvlane", "first-fill", "tmpfs", 1)
    assert "vLLM `fs` tier 46.00 ms into new files" not in section(whole)


def test_a_store_slower_than_a_peer_is_said(whole):
    from readme import section

    set_ms(whole, 90.0, "kvlane", "store", "tmpfs", 1)
    set_ms(whole, 80.0, "example-connector", "store", "tmpfs", 1)
    assert "store, tmpfs 90.00 ms: ExampleConnector 80.00 ms" in section(whole)


def test_the_threads_of_a_load_from_the_device_are_all_counted(whole):
    from readme import section
    from rows import COLD_READS, METHOD

    source = (ROOT / "crates" / "fs" / "src" / "cold.rs").read_text()
    assert f"COLD_READS: usize = {COLD_READS};" in source
    assert f"one copying and {COLD_READS} reading threads, all on one core" in section(whole)
    assert f"{COLD_READS} more" in METHOD


def test_the_machine_is_described_by_its_facts_only(whole):
    from readme import section

    text = section(whole)
    assert "8 cores (Any CPU)" in text
    assert "tmpfs and xfs" in text
    assert "virtual" not in text
    whole["machine"]["virtual"] = True
    assert "8 virtual cores (Any CPU)" in section(whole)


def test_readme_and_run_call_a_machine_busy_at_the_same_limit(whole, capsys):
    import run
    from readme import section
    from rows import DISTURBED, Key, Samples
    from workload import Sample

    for factor, is_busy in ((DISTURBED - 0.1, False), (DISTURBED + 0.1, True)):
        samples = Samples()
        for seconds in [0.010] * 10 + [0.010 * factor] * 10:
            samples.add(Key("tmpfs", "store", 1, "kvlane"), Sample(0.02, [seconds]))
        whole["machine"]["disturbance"] = samples.disturbance()
        run.show(samples, samples.rows(), [])
        assert ("The machine was busy" in capsys.readouterr().out) == is_busy
        assert ("The machine was busy" in section(whole)) == is_busy


def test_figures_of_an_older_method_do_not_pass_the_check(whole, tmp_path, monkeypatch, capsys):
    import readme
    import readme_section
    from rows import METHOD

    (tmp_path / "benches/results").mkdir(parents=True)
    monkeypatch.setattr(readme_section, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["readme.py", "--check"])
    for method, status in ((METHOD, 0), ("Each row is divided by a memcpy of its own.", 1)):
        whole["machine"]["method"] = method
        (tmp_path / "benches/results/fs.json").write_text(json.dumps(whole))
        (tmp_path / "README.md").write_text(readme.BEGIN + readme.section(whole) + readme.END)
        assert readme.main() == status
    assert "another method: run `make bench-fs`" in capsys.readouterr().err
