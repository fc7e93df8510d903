"""Risk: the archive for a machine with a GPU is too large, lacks a file, or needs something that is not there; or what
ran on the stand-in passes for a result of a GPU."""

import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
DRIVER_SCRIPTS = {"tests/gpu/run.py": "these tests", "benches/gpu/run.py": "the figures"}


def test_the_bundle_is_small_and_has_wheel_tests_and_benchmark(bundle: Path, wheel: Path) -> None:
    assert bundle.stat().st_size < 60_000_000
    with tarfile.open(bundle) as tar:
        entries = {entry.name.removeprefix("kvlane-gpu-bundle/"): entry for entry in tar.getmembers()}
    tests = {f"tests/gpu/{path.name}" for path in (ROOT / "tests" / "gpu").glob("*.py")}
    benches = {f"benches/gpu/{path.name}" for path in (ROOT / "benches" / "gpu").glob("*.py")}
    assert {*entries} == {"run.sh", "LICENSE", "benches/machine.py", wheel.name, *tests, *benches}
    assert {"tests/gpu/test_bytes.py", "benches/gpu/run.py"} <= {*entries}
    assert "manylinux_2_28" in wheel.name
    assert entries["run.sh"].mode & 0o111


def test_the_same_inputs_give_the_same_archive(bundle: Path, wheel: Path, pack, tmp_path: Path) -> None:
    pack(wheel, tmp_path / "again.tar.gz")
    assert (tmp_path / "again.tar.gz").read_bytes() == bundle.read_bytes()


def test_a_wheel_for_this_machine_only_is_refused(pack, tmp_path: Path) -> None:
    wheel = tmp_path / "kvlane-0.1.0-cp310-abi3-linux_x86_64.whl"
    wheel.write_bytes(b"")
    packed = pack(wheel, tmp_path / "bundle.tar.gz")
    assert packed.returncode == 1
    assert "is no wheel for manylinux_2_28" in packed.stderr
    assert not (tmp_path / "bundle.tar.gz").exists()


def test_it_runs_on_the_stand_in_with_a_bare_python_and_writes_no_figures(unpacked, stand_in: Path) -> None:
    done = unpacked.run("all", "--stand-in", stand_in, "--only", "test_automatic_is_the_lane")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert "kvlane: GPU tests passed: 1 ran, 0 failed, on stand-in (no GPU: this says nothing about one)" in lines
    assert sum("[stand-in] test_peers" in line for line in lines) == 1
    assert "these figures mean NOTHING" in lines[-1]
    assert [path.name for path in unpacked.out.iterdir()] == ["test-gpu.log"]
    assert "on stand-in" in (unpacked.out / "test-gpu.log").read_text().splitlines()[-1]


def test_a_test_that_fails_fails_the_run(unpacked, stand_in: Path) -> None:
    wrong = "class Wrong(Claims):\n    def test_wrong(self):\n        self.fail('on purpose')\n"
    (unpacked.folder / "tests" / "gpu" / "test_wrong.py").write_text(f"from claims import Claims\n{wrong}")
    done = unpacked.run("test", "--stand-in", stand_in, "--only", "test_wrong")
    assert done.returncode == 1
    assert "kvlane: GPU tests FAILED: 1 ran, 1 failed, on stand-in" in done.stdout


def test_a_name_that_no_test_has_fails_the_run(unpacked, stand_in: Path) -> None:
    done = unpacked.run("test", "--stand-in", stand_in, "--only", "test_that_is_not_there")
    assert done.returncode == 1
    assert "kvlane: GPU tests FAILED: 0 ran" in done.stdout


def test_a_stand_in_where_the_driver_would_be_is_not_taken_for_it(unpacked, stand_in: Path, tmp_path: Path) -> None:
    (tmp_path / "libcuda.so.1").symlink_to(stand_in)
    for script, what in DRIVER_SCRIPTS.items():
        done = unpacked.start(script, libraries=tmp_path)
        assert (done.returncode, done.stdout) == (1, "")
        assert f"{what} were to run on the machine's own driver, and libcuda.so.1 here is stand-in" in done.stderr


def test_without_a_driver_it_says_so_in_one_sentence(unpacked, tmp_path: Path) -> None:
    (tmp_path / "libcuda.so.1").write_bytes(b"no library")
    for script, what in DRIVER_SCRIPTS.items():
        done = unpacked.start(script, libraries=tmp_path)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith(f"kvlane: {what} need an NVIDIA GPU and its driver, and there is no CUDA driver")
        assert done.stderr.count("\n") == 1
