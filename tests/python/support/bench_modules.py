"""The modules of a benchmark, which are no package: those of its folder and those that benchmarks share."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

BENCHES = Path(__file__).resolve().parents[3] / "benches"


@contextlib.contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Inside, they can be imported by name. Later they are gone: other benchmarks' have the same names."""
    paths = [str(folder), str(BENCHES)]
    sys.path[:0] = paths
    try:
        yield
    finally:
        for path in paths:
            sys.path.remove(path)
        for name, module in list(sys.modules.items()):
            if Path(getattr(module, "__file__", None) or "/").is_relative_to(BENCHES):
                del sys.modules[name]
