"""Writes the figures of the README's section on speed from benches/results/fs.json.

.venv/bin/python benches/fs/readme.py            after a whole run; `make bench-fs` does it
.venv/bin/python benches/fs/readme.py --check    exit status 1 if the README shows other figures
"""

import argparse
import json
import sys
from pathlib import Path

from rows import bars

ROOT = Path(__file__).resolve().parents[2]
BEGIN = "<!-- from benches/results/fs.json by benches/fs/readme.py -->\n\n"
END = "<!-- end of what benches/fs/readme.py writes -->\n"

ROWS = [
    ("store, tmpfs", "store", "tmpfs", 1),
    ("store, tmpfs, 2 threads", "store", "tmpfs", 2),
    ("load, tmpfs", "load", "tmpfs", 1),
    ("load, tmpfs, 2 threads", "load", "tmpfs", 2),
    ("load, tmpfs, folder opened for it", "load-fresh-reader", "tmpfs", 1),
    ("store, tmpfs, into an empty folder", "first-fill", "tmpfs", 1),
    ("store, disk", "store", "disk", 1),
    ("store, disk, over evicted slots", "store-evicted", "disk", 1),
    ("store, disk, into an empty folder", "first-fill", "disk", 1),
    ("load, disk, from the page cache", "load", "disk", 1),
    ("load, disk, from the device", "load-cold", "disk", 1),
]
SYSTEMS = [("kvlane", "kvlane"), ("ExampleConnector", "example-connector"), ("vLLM `fs` tier", "vllm-fs")]


def section(result: dict) -> str:
    """The text between the marks."""
    machine = result["machine"]
    rows = {(row["system"], row["case"], row["medium"], row["threads"]): row for row in result["rows"]}
    floors = {(floor["case"], floor["medium"], floor["threads"]): floor for floor in machine["other_floors"]}

    def cell(*key) -> str:
        row = rows.get(key)
        return f"{row['ms']:.1f} ms, {row['of_memcpy']:.2f}" if row else ""

    def share(*key) -> str:
        return f"{rows[key]['of_memcpy']:.2f}"

    def call_us(case: str) -> float:
        return rows["kvlane", case, "memory", 1]["ms"] * 1e3

    busy = machine["disturbance"] > 1.3
    lines = [
        f"`make bench-fs` on {machine['date'][:10]}: {machine['cores']} virtual cores of a shared {machine['cpu']}, "
        f"{machine['memory']}, {machine['kernel']}, {machine['filesystems']['disk']} on a virtual disk; 96 MiB "
        "(48 layers, 64 blocks of 16 tokens, runs of 32 KiB), checksums on, one thread unless said, medians of "
        f"{machine['rounds']} interleaved rounds. Beside each time: its share of one memcpy of that size, timed right "
        "before and after it (1.0 is memcpy). "
        + ("**The machine was busy**: memcpy" if busy else "The machine was quiet: memcpy")
        + f" itself varied by {machine['disturbance']:.1f}x. All rows: "
        "[benches/results/fs.json](benches/results/fs.json).",
        "",
        "| 96 MiB request | " + " | ".join(title for title, _ in SYSTEMS) + " |",
        "|---|" + "---|" * len(SYSTEMS),
    ]
    for name, case, medium, threads in ROWS:
        cells = [cell(system, case, medium, threads) for _, system in SYSTEMS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    store, evicted = floors["store", "disk", 1], floors["store-evicted", "disk", 1]
    missed = [bar for bar in bars(result["rows"], machine["other_floors"]) if bar.holds is False]
    targets = [
        f"{bar.text} {bar.figure:.2f}{bar.unit} "
        f"(wanted: at {'most' if bar.is_ceiling else 'least'} {bar.limit:g}{bar.unit})"
        for bar in missed
    ]
    lines += [
        "",
        "- Targets that this run misses: " + ("; ".join(targets) if targets else "none") + ". Two threads that only "
        f"copy, half each, reach {floors['load', 'tmpfs', 2]['floor_of_memcpy']:.2f} of one memcpy here.",
        f"- Stores on a disk go through the kernel's `pwritev`, which without any checksum takes "
        f"{store['floor_of_memcpy']:.2f} of memcpy here ({evicted['floor_of_memcpy']:.2f} over evicted slots): kvlane "
        f"reaches {store['of_floor']:.2f} ({evicted['of_floor']:.2f}) of that. A load from the device is "
        f"{floors['load-cold', 'disk', 1]['of_floor']:.2f} times as fast as one direct read of a file of that size.",
        "- Where others are ahead or near: peers that only do I/O read the page cache into a staging buffer with "
        f"{share('vllm-fs', 'io-read', 'disk', 1)} (vLLM's `fs`, 1 thread) and "
        f"{share('lmcache-fs', 'io-read', 'disk', 2)} (LMCache's file client, 2 threads) of memcpy. They do not check "
        "what they read, nor put it into the paged cache. A first fill and a folder that was just opened are slow: "
        "every page has to be allocated or mapped.",
        f"- Calls of the connector: lookup of 64 blocks {call_us('lookup'):.1f} us; names and lookup of a prompt of "
        f"131,072 tokens {call_us('keys-first') / 1e3:.1f} ms the first time and {call_us('keys-grown'):.0f} us when "
        f"it grew by one block; a step that moves nothing {call_us('idle-step'):.0f} us in all hooks together.",
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 if figures differ")
    arguments = parser.parse_args()
    path = ROOT / "README.md"
    text = path.read_text()
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    new = before + BEGIN + section(json.loads((ROOT / "benches/results/fs.json").read_text())) + END + after
    if new == text:
        return 0
    if arguments.check:
        print("README.md shows other figures than benches/results/fs.json: run benches/fs/readme.py", file=sys.stderr)
        return 1
    path.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
