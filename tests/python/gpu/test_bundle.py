"""The archive for a machine with a GPU and no network. Risk: it is too large, lacks a file, or needs something that is
not there."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
STAND_IN = ROOT / "target" / "debug" / "libkvlane_cuda_stand_in.so"
NAME = "kvlane-gpu-bundle"


@pytest.fixture(scope="module")
def wheel() -> Path:
    (found,) = (ROOT / "dist").glob("kvlane-*.whl")
    return found


@pytest.fixture(scope="module")
def bundle(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("bundle") / "bundle.tar.gz"
    packed = pack(wheel, output)
    assert packed.returncode == 0, packed.stderr
    return output


def pack(wheel: Path, output: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "tests" / "gpu" / "bundle.py", wheel, output]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def unpacked(bundle: Path, folder: Path) -> Path:
    with tarfile.open(bundle) as tar:
        tar.extractall(folder, filter="data")
    return folder / NAME


def run(place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`run.sh` from an empty folder, with the interpreter below this environment and nothing else."""
    start = place.parent / "empty"
    start.mkdir()
    python = shutil.which("python3", path=str(Path(sys.base_prefix) / "bin"))
    assert python is not None
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": python, "OUT": str(start / "out")}
    command = [str(place / "run.sh"), *arguments]
    return subprocess.run(command, cwd=start, env=environment, capture_output=True, text=True, timeout=240)


def test_the_bundle_is_small_and_has_wheel_tests_and_benchmark(bundle: Path, wheel: Path) -> None:
    assert bundle.stat().st_size < 60_000_000
    with tarfile.open(bundle) as tar:
        entries = {entry.name.removeprefix(f"{NAME}/"): entry for entry in tar.getmembers()}
    tests = {f"tests/gpu/{path.name}" for path in (ROOT / "tests" / "gpu").glob("*.py")}
    benches = {f"benches/gpu/{path.name}" for path in (ROOT / "benches" / "gpu").glob("*.py")}
    assert {*entries} == {"run.sh", "LICENSE", "benches/machine.py", wheel.name, *tests, *benches}
    assert {"tests/gpu/test_bytes.py", "benches/gpu/run.py"} <= {*entries}
    assert "manylinux_2_28" in wheel.name
    assert entries["run.sh"].mode & 0o111


def test_the_same_inputs_give_the_same_archive(bundle: Path, wheel: Path, tmp_path: Path) -> None:
    pack(wheel, tmp_path / "again.tar.gz")
    assert (tmp_path / "again.tar.gz").read_bytes() == bundle.read_bytes()


def test_a_wheel_for_this_machine_only_is_refused(tmp_path: Path) -> None:
    wheel = tmp_path / "kvlane-0.1.0-cp310-abi3-linux_x86_64.whl"
    wheel.write_bytes(b"")
    packed = pack(wheel, tmp_path / "bundle.tar.gz")
    assert packed.returncode == 1
    assert "is no wheel for manylinux_2_28" in packed.stderr
    assert not (tmp_path / "bundle.tar.gz").exists()


def test_it_runs_on_the_stand_in_with_a_bare_python_and_writes_no_figures(bundle: Path, tmp_path: Path) -> None:
    place = unpacked(bundle, tmp_path)
    done = run(place, "all", "--stand-in", str(STAND_IN), "--only", "test_automatic_is_the_lane")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert "kvlane: GPU tests passed: 1 ran, 0 failed, on stand-in (no GPU: this says nothing about one)" in lines
    assert sum("[stand-in] test_peers" in line for line in lines) == 1
    assert "these figures mean NOTHING" in lines[-1]
    written = tmp_path / "empty" / "out"
    assert [path.name for path in written.iterdir()] == ["test-gpu.log"]
    assert "on stand-in" in (written / "test-gpu.log").read_text().splitlines()[-1]


def test_a_test_that_fails_fails_the_run(bundle: Path, tmp_path: Path) -> None:
    place = unpacked(bundle, tmp_path)
    wrong = "class Wrong(Claims):\n    def test_wrong(self):\n        self.fail('on purpose')\n"
    (place / "tests" / "gpu" / "test_wrong.py").write_text(f"from claims import Claims\n{wrong}")
    done = run(place, "test", "--stand-in", str(STAND_IN), "--only", "test_wrong")
    assert done.returncode == 1
    assert "kvlane: GPU tests FAILED: 1 ran, 1 failed, on stand-in" in done.stdout


def test_without_a_driver_it_says_so_in_one_sentence_and_never_takes_the_stand_in(bundle: Path, tmp_path: Path) -> None:
    place, libraries = unpacked(bundle, tmp_path), tmp_path / "libraries"
    libraries.mkdir()

    def start(script: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "LD_LIBRARY_PATH": str(libraries)}
        command = [sys.executable, str(place / script)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)

    for script, what in (("tests/gpu/run.py", "these tests"), ("benches/gpu/run.py", "the figures")):
        # Where the driver would be found.
        library = libraries / "libcuda.so.1"
        library.symlink_to(STAND_IN)
        found = start(script)
        assert (found.returncode, found.stdout) == (1, "")
        assert f"{what} were to run on the machine's own driver, and libcuda.so.1 here is stand-in" in found.stderr
        library.unlink()
        library.write_bytes(b"no library")
        none = start(script)
        assert (none.returncode, none.stdout) == (1, "")
        assert none.stderr.startswith(f"kvlane: {what} need an NVIDIA GPU and its driver, and there is no CUDA driver")
        assert none.stderr.count("\n") == 1
        library.unlink()
