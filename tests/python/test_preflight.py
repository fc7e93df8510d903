"""Guards a newcomer's first minute: everything that is missing is named in one message, before any download."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SYSTEM_TOOLS = ["awk", "bash", "df", "dirname", "env", "head", "sed", "sort", "uname"]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout without environments or builds, and a PATH folder with system tools only."""
    folder = tmp_path / "checkout"
    (folder / "tests/env").mkdir(parents=True)
    shutil.copy(ROOT / "Cargo.toml", folder)
    shutil.copy(ROOT / "tests/env/preflight.sh", folder / "tests/env")
    (tmp_path / "bin").mkdir()
    for tool in SYSTEM_TOOLS:
        located = shutil.which(tool)
        assert located, tool
        (tmp_path / "bin" / tool).symlink_to(located)
    return folder


def preflight(checkout: Path, target: str = "demo") -> subprocess.CompletedProcess[str]:
    environment = {"PATH": str(checkout.parent / "bin"), "HOME": os.environ.get("HOME", "/")}
    command = [checkout / "tests/env/preflight.sh", target]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def provide(checkout: Path, name: str, script: str) -> None:
    tool = checkout.parent / "bin" / name
    tool.unlink(missing_ok=True)
    tool.write_text(f"#!/bin/bash\n{script}\n")
    tool.chmod(0o755)


def provide_everything(checkout: Path) -> None:
    provide(checkout, "cargo", "exit 0")
    provide(checkout, "rustc", "echo 'rustc 99.1.0 (0000000 2030-01-01)'")
    provide(checkout, "python3.12", "exit 0")
    provide(checkout, "cc", "exit 0")
    provide(checkout, "df", "echo head; echo 'disk 1 1 900000000 1% /'")


def test_one_message_names_every_missing_program(checkout: Path) -> None:
    provide(checkout, "df", "echo head; echo 'disk 1 1 1000 99% /'")
    finished = preflight(checkout)
    assert finished.returncode == 1
    for word in ("cargo", "rustc", "Python 3.11 or 3.12", "C compiler", "GB are needed"):
        assert word in finished.stderr, word
    assert finished.stderr.count("cannot start") == 1


def test_a_complete_machine_is_told_the_size_and_the_time(checkout: Path) -> None:
    provide_everything(checkout)
    finished = preflight(checkout)
    assert finished.returncode == 0, finished.stderr
    assert "8 GB" in finished.stdout
    assert "minutes" in finished.stdout


def test_the_sizes_that_a_newcomer_reads_are_those_that_are_asked_for(checkout: Path) -> None:
    """In the README, in CONTRIBUTING and the demo as in the message itself: a disk of the size there must do."""
    provide_everything(checkout)

    def asked_gb(target: str) -> str:
        message = preflight(checkout, target).stdout
        found = re.search(r"up to (\d+) GB", message)
        assert found, message
        return found[1]

    assert f"about {asked_gb('test')} GB" in (ROOT / "README.md").read_text()
    assert f"about {asked_gb('demo')} GB" in (ROOT / "README.md").read_text()
    assert f"about {asked_gb('test')} GB" in (ROOT / "CONTRIBUTING.md").read_text()
    assert f"about {asked_gb('test')} GB" in preflight(checkout).stdout
    assert f"Disk: about {asked_gb('demo')} GB" in (ROOT / "examples/demo.py").read_text()


def test_the_environment_of_the_peers_is_counted_where_it_is_built(checkout: Path) -> None:
    provide_everything(checkout)
    assert "up to 9 GB" in preflight(checkout, "bench").stdout
    assert "up to 8 GB" in preflight(checkout, "demo").stdout
    ready = checkout / ".venv-peers-p2p/.kvlane-ready"
    ready.parent.mkdir()
    ready.touch()
    assert "up to 8 GB" in preflight(checkout, "bench").stdout


@pytest.mark.parametrize(
    ("target", "limit"),
    [("demo", "10 minutes"), ("test", "30 minutes"), ("lint", "8 minutes"), ("wheel", "8 minutes"), ("bench", "hours")],
)
def test_each_target_says_how_long_it_takes(checkout: Path, target: str, limit: str) -> None:
    provide_everything(checkout)
    message = preflight(checkout, target).stdout
    assert f"the first run of {target} on two cores takes " in message
    assert limit in message


@pytest.mark.parametrize(
    ("name", "script", "complaint"),
    [
        ("rustc", "echo 'rustc 1.60.0 (0000000 2022-01-01)'", "found 1.60.0"),
        ("rustc", "exit 1", "'rustc --version' failed"),
        ("python3.12", "exit 1", "Python 3.11 or 3.12 with venv"),
        ("df", "echo head; echo 'disk 1 1 5000000 1% /'", "4 GB are free"),
    ],
)
def test_a_program_that_is_too_old_or_does_not_start_counts_as_missing(
    checkout: Path, name: str, script: str, complaint: str
) -> None:
    provide_everything(checkout)
    provide(checkout, name, script)
    finished = preflight(checkout)
    assert finished.returncode == 1
    assert complaint in finished.stderr
    assert finished.stderr.count("\n  - ") == 1
