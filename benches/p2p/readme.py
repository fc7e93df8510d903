"""Writes the figures of the README's section on transfers from server to server from benches/results/p2p.json.

.venv/bin/python benches/p2p/readme.py            after a whole run; `make bench-p2p` does it
.venv/bin/python benches/p2p/readme.py --check    exit status 1 if the README shows other figures

What a run did not measure is left out of the text, never guessed and never an error.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import readme_section
from bars import sentence
from rows import DISTURBED, METHOD, promises

SCRIPT, RESULT = "benches/p2p/readme.py", "benches/results/p2p.json"
BEGIN, END = readme_section.marks(SCRIPT, RESULT)

ROWS = [
    ("memcpy, one thread", "memcpy", "memory"),
    ("kvlane, lane `shm`", "kvlane", "shm"),
    ("NIXL, its default", "nixl", "default"),
    ("kvlane, lane `tcp`", "kvlane", "tcp"),
    ("NIXL over TCP", "nixl", "tcp"),
    ("Mooncake over TCP", "mooncake", "tcp"),
    ("one TCP connection, in C", "raw-tcp", "tcp"),
]
# What does the same work as a lane of kvlane.
PEERS = {"shm": [("nixl", "default")], "tcp": [("nixl", "tcp"), ("mooncake", "tcp"), ("raw-tcp", "tcp")]}


class Result:
    """The figures of a run by name; ``None`` for what it does not have."""

    def __init__(self, result: dict) -> None:
        self.machine, self.rows = result["machine"], result["rows"]
        self._by_key = {(row["system"], row["case"], row["lane"]): row for row in self.rows}

    def row(self, system: str, case: str, lane: str) -> dict | None:
        return self._by_key.get((system, case, lane))


def section(result: dict) -> str:
    """The text between the marks."""
    run = Result(result)
    bullets = [targets(run), faster_peers(run), overlaps(run), idle(run)]
    lines = [heading(run), "", *table(run), "", *(f"- {text}" for text in bullets if text), *not_run(run), ""]
    return "\n".join(lines)


def heading(run: Result) -> str:
    machine = run.machine
    cores = f"{machine['cores']} {'virtual ' if machine.get('virtual') else ''}cores"
    text = (
        f"From server to server, `make bench-p2p` on {machine['date'][:10]}: {cores} ({machine['cpu']}), "
        f"{machine['memory']}, {machine['kernel']}; two processes with caches in host memory, 96 MiB (48 layers, 64 "
        "scattered runs of 32 KiB in each) as the median, and one run of 32 KiB as the fastest, of "
        f"{machine['rounds']} interleaved rounds in {machine['sets']} sets of processes. "
    )
    disturbance = machine["disturbance"]
    text += "**The machine was busy**" if disturbance > DISTURBED else "The machine was quiet"
    text += f": memcpy between the same buffers varied by {disturbance:.1f}x. "
    return text + f"All rows: [{RESULT}]({RESULT})."


def table(run: Result) -> list[str]:
    lines = ["| | 96 MiB | GB/s | share of memcpy | one run |", "|---|---|---|---|---|"]
    for title, system, lane in ROWS:
        request, block = (run.row(system, case, lane) for case in ("request", "block"))
        if request or block:
            cells = ["", "", ""]
            if request:
                cells = [milliseconds(request), f"{request['gbps']:.1f}", f"{request['of_memcpy']:.2f}"]
            lines.append(f"| {title} | {' | '.join(cells)} | {microseconds(block) if block else ''} |")
    return lines


def targets(run: Result) -> str:
    return sentence(promises(run.rows, run.machine["overlap"], run.machine["idle_share"]))


def faster_peers(run: Result) -> str | None:
    if not any(row["system"] not in ("kvlane", "memcpy") for row in run.rows):
        return None
    titles = {(system, lane): title for title, system, lane in ROWS}
    found = []
    for lane, peers in PEERS.items():
        for case, shown in (("request", milliseconds), ("block", microseconds)):
            ours = run.row("kvlane", case, lane)
            rows = [(peer, run.row(peer[0], case, peer[1])) for peer in peers]
            faster = [(peer, row) for peer, row in rows if ours and row and row["ms"] < ours["ms"]]
            if faster:
                theirs = ", ".join(f"{titles[peer]} {shown(row)}" for peer, row in faster)
                what = "96 MiB" if case == "request" else "one run"
                found.append(f"{what} over `{lane}` {shown(ours)}: {theirs}")
    return "Where others are faster: " + ("; ".join(found) or "in no row above") + "."


def overlaps(run: Result) -> str | None:
    found = [
        f"{overlap['late_ms']:.2f} ms behind it over `{overlap['lane']}` ({overlap['of_transfer']:.2f} of a transfer)"
        for overlap in run.machine["overlap"]
    ]
    if not found:
        return None
    return (
        "A request that is pulled while its layers are being computed is complete soon after the last of them: "
        + ", ".join(found)
        + "."
    )


def idle(run: Result) -> str | None:
    share = run.machine["idle_share"]
    if share is None:
        return None
    return f"Two connected processes with nothing to move use {100 * share:.2f} % of a core, both together."


def milliseconds(row: dict) -> str:
    return f"{row['ms']:.2f} ms"


def microseconds(row: dict) -> str:
    return f"{row['ms'] * 1e3:.1f} us"


def not_run(run: Result) -> list[str]:
    return [f"- NOT RUN: {line}" for line in run.machine["not_run"]]


def main() -> int:
    return readme_section.main(__doc__.splitlines()[0], SCRIPT, RESULT, METHOD, section)


if __name__ == "__main__":
    sys.exit(main())
