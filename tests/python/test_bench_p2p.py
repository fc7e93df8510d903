"""The comparison of transfers from server to server must notice wrong bytes and keep its row format."""

import json
import sys

import pytest

from support.bench_modules import BENCHES, importable

BENCH = BENCHES / "p2p"


@pytest.fixture(scope="module", autouse=True)
def bench_modules():
    with importable(BENCH):
        yield


@pytest.fixture(params=["block", "request"])
def arrived(request, monkeypatch, tmp_path):
    """A target to which everything of a turn was moved, with its case and round."""
    import pair
    import workload

    for module in (pair, workload):
        monkeypatch.setattr(module, "LAYERS", 3)
        monkeypatch.setattr(module, "POOL_BLOCKS", 256)
        monkeypatch.setattr(module, "RUN_BYTES", 4096)
    noise = pair.noise_of(pair.noise_file(str(tmp_path)))
    source, target = pair.filled_cache(noise), pair.Arrivals(noise)
    case, round_number = request.param, 7
    from_bytes, to_bytes = source.layers.reshape(-1), target.cache.layers.reshape(-1)
    moved = pair.pieces(pair.pairs(case, round_number), 1 if case == "block" else 3)
    for here, there in moved:
        to_bytes[there : there + 4096] = from_bytes[here : here + 4096]
    return target, case, round_number


def test_a_right_transfer_passes_the_check_and_leaves_nothing_for_the_next(arrived):
    import pair
    import workload

    target, case, round_number = arrived
    assert target.cache.layers.any()
    target.check(case, round_number)
    assert not target.cache.layers.any()
    with pytest.raises(workload.WrongBytes):
        target.check(case, round_number)
    assert pair.pairs(case, round_number) != pair.pairs(case, round_number + 1)


def test_one_flipped_byte_is_a_wrong_result(arrived):
    import pair
    import workload

    target, case, round_number = arrived
    (_, block) = pair.pairs(case, round_number)[-1]
    layer = 0 if case == "block" else 2
    target.cache.layers[layer, block, 4095] ^= 1
    with pytest.raises(workload.WrongBytes, match=f"layer {layer}"):
        target.check(case, round_number)


def test_blocks_of_another_round_are_a_wrong_result(arrived):
    import workload

    target, case, round_number = arrived
    with pytest.raises(workload.WrongBytes):
        target.check(case, round_number + 1)


def test_a_byte_in_a_neighbour_block_is_a_wrong_result(arrived):
    import pair
    import workload

    target, case, round_number = arrived
    written = {block for _, block in pair.pairs(case, round_number)}
    other = next(block for block in range(256) if block not in written)
    target.cache.layers[0, other, 9] = 1
    with pytest.raises(workload.WrongBytes, match=rf"\[{other}\]"):
        target.check(case, round_number)


def test_a_turn_of_single_blocks_counts_the_fastest_of_them():
    import pair

    class Floor:
        def seconds(self, size_bytes):
            assert size_bytes == 32 << 10
            return 1e-6

    calls = []
    sample = pair.timed("block", Floor(), [lambda number=number: calls.append(number) for number in range(5)])
    assert calls == list(range(5))
    assert 0 < sample.seconds < 1e-3
    assert sample.floor_seconds == [1e-6]


def samples_of_a_run():
    from rows import Key, Samples
    from workload import Sample

    samples = Samples()
    for seconds in (0.030, 0.010, 0.020):
        samples.add(Key("request", "shm", "kvlane"), Sample(seconds, [0.011, 0.013], floor_place="one"))
        samples.add(Key("request", "default", "nixl"), Sample(3 * seconds, [0.020], floor_place="two"))
        samples.add(Key("block", "shm", "kvlane"), Sample(seconds / 1e3, [2e-6], floor_place="one run"))
        samples.add(Key("block", "tcp", "kvlane"), Sample(seconds / 1e3, [1e-6], floor_place="one run"))
        samples.add(Key("overlap", "shm", "kvlane"), Sample(seconds / 10, []))
    return samples


def test_every_key_gives_one_row_of_the_agreed_form():
    from workload import REQUEST_BYTES, RUN_BYTES

    rows = samples_of_a_run().rows()
    assert all(list(row) == ["system", "case", "lane", "ms", "gbps", "of_memcpy"] for row in rows)
    by_key = {(row["system"], row["case"], row["lane"]): row for row in rows}
    assert len(by_key) == len(rows) == 6
    assert by_key["memcpy", "request", "memory"]["ms"] == 16.0  # each place counts once
    assert by_key["memcpy", "block", "memory"]["ms"] == 0.001  # the fastest
    assert by_key["kvlane", "request", "shm"]["ms"] == 20.0  # the median
    assert by_key["kvlane", "request", "shm"]["of_memcpy"] == 0.8
    assert by_key["kvlane", "request", "shm"]["gbps"] == pytest.approx(REQUEST_BYTES / 0.020 / 1e9, abs=0.001)
    assert by_key["kvlane", "block", "tcp"]["ms"] == 0.01  # the fastest
    assert by_key["kvlane", "block", "tcp"]["of_memcpy"] == 0.1
    assert by_key["kvlane", "block", "tcp"]["gbps"] == pytest.approx(RUN_BYTES / 10e-6 / 1e9, abs=0.001)


def test_how_late_an_overlapped_request_is_comes_with_the_transfer_that_it_is_a_share_of():
    samples = samples_of_a_run()
    late = {"lane": "shm", "late_ms": 2.0, "transfer_ms": 20.0, "of_transfer": 0.1}
    assert samples.overlaps() == [late]
    from rows import Key

    samples.drop(Key("request", "shm", "kvlane"))
    assert samples.overlaps() == []


def test_a_bar_is_missed_below_a_floor_and_above_a_ceiling():
    from rows import promises

    samples = samples_of_a_run()
    verdicts = {bar.text: bar.holds for bar in promises(samples.rows(), samples.overlaps(), 0.011)}
    assert verdicts["request, shm: share of memcpy"] is True
    assert verdicts["request, shm: times nixl default"] is True
    assert verdicts["request, tcp: times mooncake"] is None
    assert verdicts["one block, shm"] is True
    assert verdicts["one block, tcp"] is True
    assert verdicts["pulled while it is computed, shm: late by share of a transfer"] is True
    assert verdicts["pulled while it is computed, tcp: late by share of a transfer"] is None
    assert verdicts["an idle pair: percent of a core"] is False
    assert [bar.holds for bar in promises([], [], None)] == [None] * len(verdicts)


WORKER = """
from turns import NotRun, serve
from workload import Sample, WrongBytes

class System:
    def __init__(self, cores, noise):
        pass
    def cases(self):
        return [(case, "shm") for case in ("block", "request", "overlap")]
    def versions(self):
        return {{}}
    def turn(self, case, lane, round_number):
        if case == "block":
            raise {failure}
        return Sample(0.002 if case == "overlap" else 0.02, [0.02, 0.02] if case == "request" else [])
    def idle_share(self, seconds):
        assert seconds == 10
        return 0.005

serve(System)
"""


@pytest.mark.parametrize(
    ("failure", "status", "said"),
    [
        ("WrongBytes('one byte')", 1, "FAILED: worker: one byte"),
        ("RuntimeError('broken')", 1, "RuntimeError: broken"),
        ("SystemExit(3)", 1, "ended with status 3"),
        ("NotRun('no compiler')", 0, "NOT RUN: kvlane block shm: no compiler"),
    ],
)
def test_the_run_fails_for_wrong_bytes_and_broken_workers_only(tmp_path, monkeypatch, capfd, failure, status, said):
    import pair
    import run

    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(failure=failure))
    environment = tmp_path / "environment" / "bin"
    environment.mkdir(parents=True)
    (environment / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (environment / "python").chmod(0o755)
    monkeypatch.setattr(run, "SYSTEMS", {"kvlane": [(str(environment.parent), str(script), {})]})
    monkeypatch.setattr(pair, "LAYERS", 1)
    result, scratch = tmp_path / "p2p.json", tmp_path / "scratch"
    scratch.mkdir()
    arguments = ["run.py", "--rounds", "1", "--json", str(result), "--tmpfs-dir", str(scratch)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert run.main() == status
    assert said in "".join(capfd.readouterr())
    assert not list(scratch.iterdir())
    if status == 0:
        written = json.loads(result.read_text())
        found = [(row["system"], row["case"], row["lane"]) for row in written["rows"]]
        assert found == [("memcpy", "request", "memory"), ("kvlane", "request", "shm")]
        machine = written["machine"]
        assert machine["not_run"] == ["kvlane block shm: no compiler"]
        assert machine["idle_share"] == 0.005
        assert machine["overlap"] == [{"lane": "shm", "late_ms": 2.0, "transfer_ms": 20.0, "of_transfer": 0.1}]
    else:
        assert not result.exists()


def test_only_excludes_the_others_of_a_kind():
    import run

    noise, cores = "", [0]

    def lanes_started(*only):
        return [(system, start.keywords.get("lane")) for system, start in run.starts_of({*only}, cores, noise)]

    assert lanes_started("kvlane", "shm") == [("kvlane", None)]
    assert lanes_started("tcp", "nixl") == [("nixl", "tcp")]
    assert lanes_started() == [
        ("kvlane", None),
        ("nixl", "default"),
        ("nixl", "tcp"),
        ("mooncake", None),
        ("raw-tcp", None),
    ]
    assert run.is_wanted({"request"}, run.key_of("kvlane", "request", "shm"))
    assert not run.is_wanted({"request"}, run.key_of("kvlane", "overlap", "shm"))
    assert not run.is_wanted({"tcp"}, run.key_of("kvlane", "request", "shm"))
