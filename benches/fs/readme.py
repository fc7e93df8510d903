"""Writes the figures of the README's section on speed from benches/results/fs.json.

.venv/bin/python benches/fs/readme.py            after a whole run; `make bench-fs` does it
.venv/bin/python benches/fs/readme.py --check    exit status 1 if the README shows other figures

What a run did not measure is left out of the text, never guessed and never an error.
"""

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import readme_section
from bars import sentence
from rows import BARE_WRITE, COLD_READS, DIRECT_READ, DIRECT_READS, DISTURBED, METHOD, TWO_MEMCPYS, promises

SCRIPT, RESULT = "benches/fs/readme.py", "benches/results/fs.json"
BEGIN, END = readme_section.marks(SCRIPT, RESULT)

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
SYSTEMS = {"kvlane": "kvlane", "example-connector": "ExampleConnector", "vllm-fs": "vLLM `fs` tier"}
# Peers' rows that do what a row of kvlane does. They always store into new files.
SAME_WORK = {
    "store": "store",
    "store-evicted": "store",
    "first-fill": "store",
    "load": "load",
    "load-fresh-reader": "load",
    "load-cold": "load-cold",
}
# Peers' rows that do less.
ONLY_IO = {
    "store": "io-write",
    "store-evicted": "io-write",
    "first-fill": "io-write",
    "load": "io-read",
    "load-fresh-reader": "io-read",
}
IO_SYSTEMS = {"vllm-fs": "vLLM's `fs`", "lmcache-fs": "LMCache's file client"}
IO_THREADS = (1, 2, 4)


class Result:
    """The figures of a run by name; ``None`` for what it does not have."""

    def __init__(self, result: dict) -> None:
        self.machine, self.rows = result["machine"], result["rows"]
        self.other_floors = self.machine["other_floors"]
        self._by_key = {(row["system"], row["case"], row["medium"], row["threads"]): row for row in self.rows}

    def row(self, system: str, case: str, medium: str, threads: int) -> dict | None:
        return self._by_key.get((system, case, medium, threads))

    def ms(self, *key) -> float | None:
        row = self.row(*key)
        return row and row["ms"]

    def floor(self, name: str, case: str, medium: str, threads: int) -> dict | None:
        """Another floor than memcpy, of a row of kvlane."""
        key = (name, case, medium, threads)
        found = [f for f in self.other_floors if (f["floor"], f["case"], f["medium"], f["threads"]) == key]
        return found[0] if found else None


def section(result: dict) -> str:
    """The text between the marks."""
    run = Result(result)
    bullets = [targets(run), disk_stores(run), device_loads(run), faster_peers(run), first_uses(run), calls(run)]
    lines = [heading(run), "", *table(run), "", *(f"- {text}" for text in bullets if text), *not_run(run), ""]
    return "\n".join(lines)


def heading(run: Result) -> str:
    machine = run.machine
    cores = f"{machine['cores']} {'virtual ' if machine.get('virtual') else ''}cores"
    media = " and ".join(machine["filesystems"][medium] for medium in ("tmpfs", "disk"))
    sets = f" in {machine['sets']} sets of processes" if "sets" in machine else ""
    disturbance = machine["disturbance"]
    text = (
        f"`make bench-fs` on {machine['date'][:10]}: {cores} ({machine['cpu']}), {machine['memory']}, "
        f"{machine['kernel']}, {media}; 96 MiB (48 layers, 64 blocks of 16 tokens, runs of 32 KiB), checksums on, one "
        f"thread unless said, medians of {machine['rounds']} interleaved rounds{sets}. Beside each time: its speed as "
        "a share of memcpy's, which is the time of the memcpy in that line divided by it. "
    )
    if places := machine.get("memcpy_ms"):
        ours = [ms for place, ms in places.items() if place.startswith("worker_kvlane")]
        others = [ms for place, ms in places.items() if not place.startswith("worker_kvlane")]
        text += (
            f"How fast memory is copied depends on its pages: in {len(places)} pairs of buffers a memcpy took "
            f"{min(places.values()):.1f} to {max(places.values()):.1f} ms"
        )
        if ours and others:
            text += (
                f" (median in kvlane's processes {statistics.median(ours):.1f}, "
                f"in the others' {statistics.median(others):.1f})"
            )
        text += ". "
    text += "**The machine was busy**" if disturbance > DISTURBED else "The machine was quiet"
    text += f": memcpy{' between the same buffers' if places else ''} varied by {disturbance:.1f}x. "
    return text + "All rows: [benches/results/fs.json](benches/results/fs.json)."


def table(run: Result) -> list[str]:
    lines = [
        "| 96 MiB request | memcpy | " + " | ".join(SYSTEMS.values()) + " |",
        "|---|---|" + "---|" * len(SYSTEMS),
    ]
    for name, case, medium, threads in ROWS:
        found = [run.row(system, case, medium, threads) for system in SYSTEMS]
        if any(found):
            cells = [f"{row['ms']:.2f} ms, {row['of_memcpy']:.2f}" if row else "" for row in found]
            memcpy_ms = run.ms("memcpy", "copy", medium, 1)
            lines.append(f"| {name} | {memcpy_ms:.2f} ms | " + " | ".join(cells) + " |")
    return lines


def targets(run: Result) -> str:
    text = sentence(promises(run.rows, run.other_floors))
    copies = {case: run.floor(TWO_MEMCPYS, case, "tmpfs", 2) for case in ("store", "load")}
    if reached := [f"{floor['floor_of_memcpy']:.2f} beside the {case}" for case, floor in copies.items() if floor]:
        text += f" Two threads that only copy, half each, reach {' and '.join(reached)} of one memcpy here."
    return text


def disk_stores(run: Result) -> str | None:
    reached = [
        f"{floor['floor_of_memcpy']:.2f} of memcpy{where}, and kvlane {floor['of_floor']:.2f} of that"
        for case, where in (("store", ""), ("store-evicted", " over evicted slots"))
        if (floor := run.floor(BARE_WRITE, case, "disk", 1))
    ]
    if not reached:
        return None
    return (
        "Stores on a disk go through the kernel's `pwritev`, which without any checksum reaches here "
        + "; ".join(reached)
        + "."
    )


def device_loads(run: Result) -> str | None:
    ms = run.ms("kvlane", "load-cold", "disk", 1)
    if ms is None:
        return None
    text = (
        f"A load from the device is done by one copying and {COLD_READS} reading threads, all on one core (the peers "
        f"read with one thread): {ms:.2f} ms."
    )
    for name in (DIRECT_READ, DIRECT_READS):
        if floor := run.floor(name, "load-cold", "disk", 1):
            text += f" {name[0].upper()}{name[1:]}: {floor['floor_ms']:.2f} ms."
    return text


def faster_peers(run: Result) -> str | None:
    if not any(row["system"] in (SYSTEMS.keys() | IO_SYSTEMS.keys()) - {"kvlane"} for row in run.rows):
        return None
    same, less = [], []
    for name, case, medium, threads in ROWS:
        ours = run.ms("kvlane", case, medium, threads)
        if ours is None:
            continue
        if peers := faster_at_same_work(run, ours, case, medium, threads):
            same.append(f"{name} {ours:.2f} ms: " + ", ".join(peers))
        if peers := faster_at_io(run, ours, case, medium, threads):
            less.append(f"{name} {ours:.2f} ms: " + ", ".join(peers))
    text = "Where others are faster: " + ("; ".join(same) or "in no row above") + "."
    if less:
        text += (
            " Peers that only do I/O, from and to a staging buffer, and neither check what they read nor reach the "
            "paged cache: " + "; ".join(less) + "."
        )
    return text


def faster_at_same_work(run: Result, ours: float, case: str, medium: str, threads: int) -> list[str]:
    found = []
    for system, title in SYSTEMS.items():
        theirs = run.ms(system, SAME_WORK.get(case, "none"), medium, threads)
        if system != "kvlane" and theirs is not None and theirs < ours:
            found.append(f"{title} {theirs:.2f} ms" + " into new files" * (case == "first-fill"))
    return found


def faster_at_io(run: Result, ours: float, case: str, medium: str, threads: int) -> list[str]:
    """Each peer with the row's number of threads, and with more."""
    found = []
    for system, title in IO_SYSTEMS.items():
        by_threads = {
            count: run.ms(system, ONLY_IO.get(case, "none"), medium, count) for count in IO_THREADS if count >= threads
        }
        faster = {count: ms for count, ms in by_threads.items() if ms is not None and ms < ours}
        if faster:
            counts = ", ".join(map(str, faster)) + (" thread" if list(faster) == [1] else " threads")
            found.append(f"{title} {', '.join(f'{ms:.2f}' for ms in faster.values())} ms with {counts}")
    return found


def first_uses(run: Result) -> str | None:
    slow = {"first-fill": "a first fill", "load-fresh-reader": "a load by a process that has just opened the folder"}
    found = [text for case, text in slow.items() if run.row("kvlane", case, "tmpfs", 1)]
    if not found:
        return None
    text = " and ".join(found)
    return f"{text[0].upper()}{text[1:]} pay for each page that is allocated or mapped for the first time."


def calls(run: Result) -> str | None:
    us = {case: run.ms("kvlane", case, "memory", 1) for case in ("lookup", "keys-first", "keys-grown", "idle-step")}
    us = {case: ms * 1e3 for case, ms in us.items() if ms is not None}
    parts = []
    if "lookup" in us:
        parts.append(f"lookup of 64 blocks {us['lookup']:.1f} us")
    if "keys-first" in us:
        parts.append(f"names and lookup of a new prompt of 131,072 tokens {us['keys-first'] / 1e3:.1f} ms")
    if "keys-grown" in us:
        parts.append(f"of such a prompt that grew by one block {us['keys-grown']:.0f} us")
    if "idle-step" in us:
        parts.append(f"a step that moves nothing {us['idle-step']:.0f} us in all hooks together")
    return f"Calls of the connector: {'; '.join(parts)}." if parts else None


def not_run(run: Result) -> list[str]:
    return [f"- NOT RUN: {line}" for line in run.machine["not_run"]]


def main() -> int:
    return readme_section.main(__doc__.splitlines()[0], SCRIPT, RESULT, METHOD, section)


if __name__ == "__main__":
    sys.exit(main())
