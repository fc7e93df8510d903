"""The archive for a machine with a GPU, and what these tests run of it."""

import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
NAME = "kvlane-gpu-bundle"
Done = subprocess.CompletedProcess


@pytest.fixture(scope="session")
def stand_in() -> Path:
    """Built by `make test-gpu-stand-in`."""
    library = ROOT / "target" / "debug" / "libkvlane_cuda_stand_in.so"
    assert library.exists(), "cargo build --package kvlane-cuda-stand-in"
    return library


@pytest.fixture(scope="session")
def wheel() -> Path:
    (found,) = (ROOT / "dist").glob("kvlane-*.whl")
    return found


@pytest.fixture(scope="session")
def pack() -> Callable[[Path, Path], Done[str]]:
    """Packs the archive with a wheel."""

    def pack(wheel: Path, output: Path) -> Done[str]:
        command = [sys.executable, ROOT / "tests" / "gpu" / "bundle.py", wheel, output]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    return pack


@pytest.fixture(scope="session")
def bundle(wheel: Path, pack: Callable[[Path, Path], Done[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("bundle") / "bundle.tar.gz"
    packed = pack(wheel, output)
    assert packed.returncode == 0, packed.stderr
    return output


class Unpacked:
    """An archive that was unpacked, beside an empty folder in which things run."""

    def __init__(self, bundle: Path, folder: Path) -> None:
        with tarfile.open(bundle) as tar:
            tar.extractall(folder, filter="data")
        self.folder, self.empty = folder / NAME, folder / "empty"
        self.empty.mkdir()
        self.out = self.empty / "out"

    def run(self, *arguments: object) -> Done[str]:
        """`run.sh` with the interpreter below this environment and nothing else."""
        python = shutil.which("python3", path=str(Path(sys.base_prefix) / "bin"))
        assert python is not None
        environment = {"PATH": "/usr/bin:/bin", "PYTHON": python, "OUT": str(self.out)}
        return self._run([self.folder / "run.sh", *arguments], environment)

    def start(self, script: str, *arguments: object, libraries: Path) -> Done[str]:
        """A script with the wheel that is installed here, and a folder in which libraries are looked for."""
        environment = {**os.environ, "LD_LIBRARY_PATH": str(libraries)}
        return self._run([sys.executable, self.folder / script, *arguments], environment)

    def _run(self, command: list[object], environment: dict[str, str]) -> Done[str]:
        words = [str(word) for word in command]
        return subprocess.run(words, cwd=self.empty, env=environment, capture_output=True, text=True, timeout=240)


@pytest.fixture
def unpacked(bundle: Path, tmp_path: Path) -> Unpacked:
    return Unpacked(bundle, tmp_path)
