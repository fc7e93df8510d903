"""Packs wheel, GPU tests and GPU benchmark into one archive for a machine that has a GPU and no network.

    python tests/gpu/bundle.py WHEEL OUTPUT.tar.gz

There: tar -xf, then ./kvlane-gpu-bundle/run.sh (see that file). The same inputs give the same bytes.
"""

import gzip
import io
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NAME = "kvlane-gpu-bundle"
LIMIT_BYTES = 60_000_000
#: Files of the repository, and what they match in it.
PATTERNS = ("tests/gpu/*.py", "benches/gpu/*.py", "benches/machine.py", "LICENSE")
MANYLINUX = "manylinux_2_28"


class Refused(Exception):
    """An archive that would not work where it is meant for."""


def build(wheel: Path, output: Path) -> int:
    """Writes the archive; returns its size in bytes."""
    if MANYLINUX not in wheel.name:
        raise Refused(f"{wheel.name} is no wheel for {MANYLINUX}: make wheel")
    content = archive({**members(), wheel.name: wheel.read_bytes()})
    if len(content) > LIMIT_BYTES:
        raise Refused(f"{output} would have {len(content)} bytes, allowed: {LIMIT_BYTES}")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(content)
    return len(content)


def members() -> dict[str, bytes]:
    """All files but the wheel, by their place in the archive."""
    found = {"run.sh": (ROOT / "tests" / "gpu" / "run.sh").read_bytes()}
    for pattern in PATTERNS:
        paths = sorted(ROOT.glob(pattern))
        if not paths:
            raise Refused(f"nothing matches {pattern} in {ROOT}")
        found |= {str(path.relative_to(ROOT)): path.read_bytes() for path in paths}
    return found


def archive(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with gzip.GzipFile(fileobj=packed, mode="wb", mtime=0) as zipped, tarfile.open(fileobj=zipped, mode="w") as tar:
        for name, content in sorted(files.items()):
            entry = tarfile.TarInfo(f"{NAME}/{name}")
            entry.size, entry.mode = len(content), 0o755 if name.endswith(".sh") else 0o644
            tar.addfile(entry, io.BytesIO(content))
    return packed.getvalue()


def main() -> int:
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    wheel, output = map(Path, sys.argv[1:])
    try:
        size_bytes = build(wheel, output)
    except (OSError, Refused) as error:
        print(f"kvlane: {error}", file=sys.stderr)
        return 1
    print(f"kvlane: {output}, {size_bytes / 1e6:.1f} MB: tar -xf it beside the GPU and call {NAME}/run.sh")
    return 0


if __name__ == "__main__":
    sys.exit(main())
