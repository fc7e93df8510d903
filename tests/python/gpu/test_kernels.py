"""Risk: the library has another kernel in it than the source says."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
COMPILE = ROOT / "crates" / "cuda" / "kernels" / "compile.py"


def test_the_kernels_compile_to_what_the_library_has_in_it() -> None:
    done = subprocess.run([sys.executable, COMPILE, "--check"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_kernel_that_was_changed_and_not_compiled_is_noticed(tmp_path: Path) -> None:
    for path in COMPILE.parent.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    source = tmp_path / "copy_pieces.cu"
    source.write_text(source.read_text().replace("AT_ONCE = 4", "AT_ONCE = 2"))
    command = [sys.executable, tmp_path / COMPILE.name, "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "copy_pieces.ptx is not what copy_pieces.cu compiles to: make kernels" in done.stdout
