"""Guards the gate itself: a failing suite must fail make, and what could not run must not look like a pass."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "tests/env").mkdir(parents=True)
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / "tests/env/suite.sh", tmp_path / "tests/env")
    shutil.copy(ROOT / ".ci/run", tmp_path / ".ci")
    return tmp_path


def run(checkout: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=60)


def suite(checkout: Path, name: str, script: str) -> subprocess.CompletedProcess[str]:
    return run(checkout, "tests/env/suite.sh", name, "bash", "-c", script)


def write_makefile(checkout: Path, script: str) -> None:
    recipe = f"\ttests/env/suite.sh one bash -c '{script}'\n\ttests/env/suite.sh --summary\n"
    (checkout / "Makefile").write_text(f"lint:\ntest:\n{recipe}")


def test_the_status_and_the_last_lines_of_a_suite_come_through(checkout: Path) -> None:
    failed = suite(checkout, "one", "echo '1 failed'; exit 3")
    assert failed.returncode == 3
    assert "1 failed" in failed.stdout
    assert "FAILED (status 3)" in failed.stdout
    passed = suite(checkout, "two", "echo '7 passed'")
    assert passed.returncode == 0
    assert "7 passed" in passed.stdout


def test_a_suite_reads_nothing_from_the_terminal(checkout: Path) -> None:
    command = ["tests/env/suite.sh", "one", "cat"]
    finished = subprocess.run(command, cwd=checkout, input="typed", capture_output=True, text=True, timeout=60)
    assert finished.returncode == 0
    assert "typed" not in finished.stdout


def test_the_summary_names_every_suite_and_what_could_not_run_once(checkout: Path) -> None:
    suite(checkout, "one", "echo 'SKIPPED [1] a.py:3: NOT RUN: cgroup: no user namespaces'")
    suite(checkout, "two", "echo 'NOT RUN: cgroup: no user namespaces'; echo fine")
    summary = run(checkout, "tests/env/suite.sh", "--summary").stdout
    assert "one" in summary
    assert "two" in summary
    assert summary.count("NOT RUN: cgroup: no user namespaces") == 1


def test_the_summary_names_the_failed_tests_of_every_suite_however_much_they_say(checkout: Path) -> None:
    # More than a pipe holds of what a reader of the log looks for, and behind it the name, as pytest prints it.
    says_much = "yes 'E   assert [0] == [1]' | head -n 100000; echo 'FAILED tests/a.py::test_one'; exit 1"
    suite(checkout, "one", says_much)
    suite(checkout, "two", says_much.replace("one", "two"))
    summary = run(checkout, "tests/env/suite.sh", "--summary")
    assert summary.returncode == 0, summary.stderr
    assert "FAILED tests/a.py::test_one" in summary.stdout
    assert "FAILED tests/a.py::test_two" in summary.stdout
    assert len(summary.stdout.splitlines()) < 120


def test_the_gate_passes_when_everything_ran_and_passed(checkout: Path) -> None:
    write_makefile(checkout, "echo 3 passed")
    finished = run(checkout, ".ci/run")
    assert finished.returncode == 0, finished.stderr


def test_the_gate_fails_when_something_could_not_run(checkout: Path) -> None:
    write_makefile(checkout, "echo NOT RUN: fuzz: no nightly")
    finished = run(checkout, ".ci/run")
    assert finished.returncode != 0
    assert "NOT RUN: fuzz: no nightly" in finished.stderr


def test_the_gate_fails_when_a_suite_fails(checkout: Path) -> None:
    write_makefile(checkout, "exit 1")
    assert run(checkout, ".ci/run").returncode != 0
