"""The README must not say more than the comparison of transfers measured, nor leave out where kvlane loses."""

import copy
import json
import sys
from pathlib import Path

import pytest

from support.bench_modules import BENCHES, importable

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benches" / "results" / "p2p.json"
BENCH = BENCHES / "p2p"


@pytest.fixture(scope="module", autouse=True)
def bench_modules():
    with importable(BENCH):
        yield


@pytest.fixture
def whole():
    """A run that measured everything, with round figures: kvlane meets all of its targets."""
    from rows import METHOD, Key, Samples
    from workload import Sample

    samples = Samples()

    def add(system: str, lane: str, request_ms: float, block_us: float) -> None:
        request = Sample(request_ms / 1e3, [0.010, 0.010], floor_place=f"worker_{system} 1")
        samples.add(Key("request", lane, system), request)
        samples.add(Key("block", lane, system), Sample(block_us / 1e6, [1e-6], floor_place="one run"))

    add("kvlane", "shm", 12.0, 10.0)
    add("kvlane", "tcp", 20.0, 30.0)
    add("nixl", "default", 40.0, 11.0)
    add("nixl", "tcp", 80.0, 50.0)
    add("mooncake", "tcp", 70.0, 60.0)
    add("raw-tcp", "tcp", 21.0, 31.0)
    for lane in ("shm", "tcp"):
        samples.add(Key("overlap", lane, "kvlane"), Sample(0.001, []))
    machine = {
        "date": "2026-01-02T03:04:05+00:00", "cpu": "Any CPU", "cores": 8, "virtual": False, "memory": "16.0 GiB",
        "kernel": "Linux 6", "rounds": 12, "sets": 4, "not_run": [], "disturbance": samples.disturbance(),
        "memcpy_ms": samples.memcpy_ms(), "overlap": samples.overlaps(), "idle_share": 0.002, "method": METHOD,
    }  # fmt: skip
    return {"machine": machine, "rows": samples.rows()}


def without(result: dict, is_gone) -> dict:
    left = copy.deepcopy(result)
    left["rows"] = [row for row in left["rows"] if not is_gone(row)]
    return left


def set_ms(result: dict, ms: float, *key) -> None:
    (row,) = [r for r in result["rows"] if (r["system"], r["case"], r["lane"]) == key]
    row["ms"] = ms


def test_all_rows_are_shown_and_a_run_that_meets_its_targets_says_so(whole):
    from readme import section

    text = section(whole)
    assert text.count("\n| ") == 8  # a head, and seven systems
    assert "| kvlane, lane `shm` | 12.00 ms | 8.4 | 0.83 | 10.0 us |" in text
    assert "Targets that this run misses: none." in text
    assert "Not measured" not in text
    assert "Where others are faster: in no row above." in text
    assert "0.20 % of a core" in text
    assert "The machine was quiet" in text


def test_a_missed_target_is_named_with_its_figure(whole):
    from readme import section

    set_ms(whole, 0.0213, "kvlane", "block", "shm")
    whole["machine"]["overlap"][1]["of_transfer"] = 0.21
    whole["machine"]["idle_share"] = 0.013
    text = section(whole)
    assert "one block, shm 21.30 us (wanted: at most 15 us)" in text
    assert "pulled while it is computed, tcp: late by share of a transfer 0.21 (wanted: at most 0.1)" in text
    assert "an idle pair: percent of a core 1.30 % (wanted: at most 1 %)" in text
    assert "misses: none" not in text


def test_whoever_is_faster_at_the_same_work_is_named(whole):
    from readme import section

    set_ms(whole, 0.009, "nixl", "block", "default")
    set_ms(whole, 19.0, "raw-tcp", "request", "tcp")
    losing = section(whole).partition("Where others are faster: ")[2]
    assert "one run over `shm` 10.0 us: NIXL, its default 9.0 us" in losing
    assert "96 MiB over `tcp` 20.00 ms: one TCP connection, in C 19.00 ms" in losing


@pytest.mark.parametrize(
    "is_gone",
    [
        lambda row: row["case"] == "block",
        lambda row: row["case"] == "request",
        lambda row: row["lane"] == "tcp",
        lambda row: row["system"] == "kvlane",
        lambda row: row["system"] not in ("kvlane", "memcpy"),
        lambda row: True,
    ],
    ids=["no blocks", "no requests", "no tcp", "no kvlane", "no peers", "nothing"],
)
def test_half_a_run_is_half_a_text_and_no_error(whole, is_gone):
    from readme import section

    left = without(whole, is_gone)
    left["machine"] |= {"overlap": [], "idle_share": None, "not_run": ["nixl block tcp: no such library"]}
    text = section(left)
    assert text.startswith("From server to server, `make bench-p2p` on 2026-01-02")
    assert "an idle pair" in text.partition("Not measured: ")[2]
    assert text.endswith("- NOT RUN: nixl block tcp: no such library\n")


def test_a_busy_machine_is_said(whole):
    from readme import section

    whole["machine"]["disturbance"] = 2.4
    assert "**The machine was busy**: memcpy between the same buffers varied by 2.4x" in section(whole)


def test_the_check_finds_other_figures_and_other_methods(whole, tmp_path, monkeypatch, capsys):
    import readme
    import readme_section

    (tmp_path / "benches/results").mkdir(parents=True)
    monkeypatch.setattr(readme_section, "ROOT", tmp_path)
    shown, result = tmp_path / "README.md", tmp_path / readme.RESULT

    def status(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["readme.py", *arguments])
        return readme.main()

    shown.write_text("before\n" + readme.BEGIN + "Not measured yet\n" + readme.END + "after\n")
    assert status("--check") == 1
    assert status() == 0
    assert status("--check") == 0
    assert "Not measured yet: `make bench-p2p`" in shown.read_text()
    result.write_text(json.dumps(whole))
    assert status("--check") == 1
    assert status() == 0
    assert status("--check") == 0
    assert shown.read_text() == "before\n" + readme.BEGIN + readme.section(whole) + readme.END + "after\n"
    whole["machine"]["method"] = "guessed"
    result.write_text(json.dumps(whole))
    assert status("--check") == 1
    assert "another method: run `make bench-p2p`" in capsys.readouterr().err


def test_a_reader_who_divides_gets_every_share(whole):
    committed = [json.loads(RESULT.read_text())] if RESULT.exists() else []
    for result in [whole, *committed]:
        rows = result["rows"]
        ms = {(row["system"], row["case"], row["lane"]): row["ms"] for row in rows}
        assert len(ms) == len(rows)
        for row in rows:
            share = ms["memcpy", row["case"], "memory"] / row["ms"]
            assert row["of_memcpy"] == pytest.approx(share, abs=0.0005), row
