"""The parts of README.md that scripts write from results, between marks of their own."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def marks(script: str, result: str) -> tuple[str, str]:
    return f"<!-- from {result} by {script} -->\n\n", f"<!-- end of what {script} writes -->\n"


def main(description: str, script: str, result: str, method: str, section: Callable[[dict], str]) -> int:
    """The command of a script that writes one part. ``method``: that of the figures; others are refused."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if figures differ")
    arguments = parser.parse_args()
    path = ROOT / "README.md"
    text = path.read_text()
    first, last = marks(script, result)
    before, rest = text.split(first)
    after = rest.split(last)[1]
    written = written_section(result, method, section)
    if written is None:
        print(f"{result} was measured by another method: run `make {target_of(result)}`", file=sys.stderr)
        return 1
    new = before + first + written + last + after
    if new == text:
        return 0
    if arguments.check:
        print(f"README.md shows other figures than {result}: run {script}", file=sys.stderr)
        return 1
    path.write_text(new)
    return 0


def written_section(result: str, method: str, section: Callable[[dict], str]) -> str | None:
    """None: the figures were measured by another method."""
    if not (ROOT / result).exists():
        return f"Not measured yet: `make {target_of(result)}` does it, and writes the figures here.\n"
    found = json.loads((ROOT / result).read_text())
    return section(found) if found["machine"].get("method") == method else None


def target_of(result: str) -> str:
    return f"bench-{Path(result).stem}"
