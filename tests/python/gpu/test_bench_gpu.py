"""Risk: the GPU benchmark prints figures for bytes that did not arrive, or writes figures of the stand-in."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
WRONG_BYTE = """
def with_a_wrong_byte(self, right=Side.content):
    first, *others = right(self)
    return [bytes([first[0] ^ 1]) + first[1:], *others]


Side.content = with_a_wrong_byte
"""


def test_a_wrong_byte_fails_the_benchmark(unpacked, stand_in: Path) -> None:
    measure = unpacked.folder / "benches" / "gpu" / "measure.py"
    measure.write_text(measure.read_text() + WRONG_BYTE)
    done = unpacked.run("bench", "--stand-in", stand_in)
    assert done.returncode == 1
    assert "FAILED: request over cuda: 1 wrong runs: block 0, layer 0, byte 0 of the layer" in done.stderr
    assert "of a device copy" not in done.stdout


def test_a_dry_run_does_not_take_a_place_to_write_to(unpacked, stand_in: Path, tmp_path: Path) -> None:
    result = tmp_path / "gpu.json"
    arguments = ["--stand-in-dry-run", stand_in, "--json", result]
    done = unpacked.start("benches/gpu/run.py", *arguments, libraries=tmp_path)
    assert done.returncode == 2
    assert "a dry run on the stand-in writes nothing" in done.stderr
    assert not result.exists()


@pytest.fixture
def measure(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "gpu"))
    monkeypatch.syspath_prepend(str(ROOT / "benches" / "gpu"))
    before = set(sys.modules)
    import measure

    yield measure
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_the_cases_move_what_the_other_benchmarks_move(measure) -> None:
    request, pages, block = measure.CASES
    assert (request.size_bytes, request.runs) == (96 << 20, 48 * 64)
    assert (pages.size_bytes, pages.runs) == (96 << 20, 64)
    assert (block.size_bytes, block.runs) == (32 << 10, 1)


def test_a_row_is_the_median_and_its_share_of_the_device_copy_of_the_same_case(measure) -> None:
    samples = measure.Samples(measure.CASES[0])
    for copy_us, pull_us in ((60, 900), (70, 200), (50, 300)):
        samples.add(measure.DEVICE_COPY, copy_us / 1e6)
        samples.add("cuda", pull_us / 1e6)
    copy, cuda = samples.rows()
    assert (copy["lane"], copy["us"], copy["runs"], copy["of_device_copy"]) == ("device copy", 60.0, 1, 1.0)
    assert (cuda["lane"], cuda["us"], cuda["runs"], cuda["of_device_copy"]) == ("cuda", 300.0, 3072, 0.2)
    assert cuda["gbps"] == pytest.approx((96 << 20) / 300e-6 / 1e9, abs=0.001)
    assert (cuda["fastest_us"], cuda["slowest_us"]) == (200.0, 900.0)
