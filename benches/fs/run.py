#!/usr/bin/env python3
"""Side-by-side benchmark of kvlane's filesystem backend against its peers and against memcpy.

    .venv/bin/python benches/fs/run.py                 everything, writes benches/results/fs.json
    .venv/bin/python benches/fs/run.py --quick         few rounds, writes nothing unless --json is given
    .venv/bin/python benches/fs/run.py --only kvlane,load,tmpfs   these systems, cases and media only

Every system has a long-lived worker process; in each round all of them take one turn per case, so whatever
disturbs the machine meets all. A row of n threads runs on n cores. Right before and right after each timed
case the same process times one memcpy of the request's size, on the first of those cores. Rows are medians
over the rounds; the `copy` rows are the median of all those memcpys, and `of_memcpy` is a copy row divided by
the row: one denominator for all rows of a medium.

How fast memory is copied depends on the pages that a process got. So after a few rounds all workers end, and new
ones start with empty folders: a set. In each set the workers get their memory in another order, and every set's
first round is not counted. A row's median is over these places too, for every system alike.

What a system moved is checked byte for byte in every turn. The exit status is 1 after a wrong byte or a broken
worker, never because something is slow.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

import machine
from rows import CALLS_MEDIUM, DISTURBED, METHOD, Bar, Key, Samples, bars
from turns import NotRun, Worker, WorkerFailed
from workload import Sample, WrongBytes

ROOT = Path(__file__).resolve().parents[2]
RESULT = ROOT / "benches" / "results" / "fs.json"
SETS, ROUNDS = 5, 3
QUICK_SETS, QUICK_ROUNDS = 1, 3

# Worker scripts of each system, with the environment whose Python runs them.
SYSTEMS = {
    "kvlane": [(".venv", "worker_kvlane.py"), (".venv", "worker_kvlane_calls.py")],
    "example-connector": [(".venv", "worker_example_connector.py")],
    "vllm-fs": [(".venv", "worker_vllm_fs.py")],
    "lmcache-fs": [(".venv-peers-fs", "worker_lmcache_fs.py")],
}
MEDIA = ("tmpfs", "disk", CALLS_MEDIUM)
CASES = (
    *(
        "store",
        "load",
        "store-evicted",
        "load-cold",
        "load-fresh-reader",
        "first-fill",
        "io-write",
        "io-read",
    ),
    *("lookup", "keys-first", "keys-grown", "idle-step"),
)


def main() -> int:
    options = parse(sys.argv[1:])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the scratch folders are removed
    scratch = {
        "tmpfs": tempfile.mkdtemp(prefix="kvlane-bench.", dir=options.tmpfs_dir),
        "disk": tempfile.mkdtemp(prefix="kvlane-bench.", dir=options.disk_dir),
    }
    try:
        return measure(options, scratch)
    except (WrongBytes, WorkerFailed) as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    finally:
        for folder in scratch.values():
            shutil.rmtree(folder, ignore_errors=True)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help=f"write the rows here (a whole run: {RESULT.relative_to(ROOT)})")
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_SETS} set instead of {SETS}")
    parser.add_argument("--sets", type=int, help="how often all workers start anew")
    parser.add_argument("--rounds", type=int, help="number of rounds in each set")
    parser.add_argument(
        "--only", default="", help="comma-separated names of systems, cases and media; others are left out"
    )
    parser.add_argument("--tmpfs-dir", default="/dev/shm", help="parent of the memory-backed scratch folder")
    parser.add_argument("--disk-dir", default=str(ROOT / "target"), help="parent of the disk-backed scratch folder")
    options = parser.parse_args(arguments)
    options.only = {name for name in options.only.split(",") if name}
    unknown = options.only - {*SYSTEMS, *CASES, *MEDIA}
    if unknown:
        parser.error(f"--only: {', '.join(sorted(unknown))} unknown; known: {', '.join([*SYSTEMS, *CASES, *MEDIA])}")
    options.sets = options.sets or (QUICK_SETS if options.quick else SETS)
    options.rounds = options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS)
    if options.json is None and not options.quick and not options.only:
        options.json = RESULT
    os.makedirs(options.disk_dir, exist_ok=True)
    for medium, folder in (("tmpfs", options.tmpfs_dir), ("disk", options.disk_dir)):
        if (machine.filesystem_of(folder) == "tmpfs") != (medium == "tmpfs"):
            parser.error(f"--{medium}-dir: {folder} is {machine.filesystem_of(folder)}")
    return options


@dataclass
class Run:
    """What all sets of workers add to."""

    samples: Samples = field(default_factory=Samples)
    not_run: dict[Key, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    rounds_begun: int = 0
    shuffle: random.Random = field(default_factory=lambda: random.Random(0))


def measure(options: argparse.Namespace, scratch: dict[str, str]) -> int:
    cores = sorted(os.sched_getaffinity(0), reverse=True)  # the highest first: core 0 serves most interrupts
    facts, run = machine.facts(scratch, cores), Run()
    for number in range(options.sets):
        folders = {medium: os.path.join(folder, f"set-{number}") for medium, folder in scratch.items()}
        with workers(options.only, cores, folders, run) as by_key:
            take_turns(by_key, options.rounds, run, f"set {number + 1} of {options.sets}")
        for folder in folders.values():
            shutil.rmtree(folder)
    rows, not_run = run.samples.rows(), [f"{name_of(key)}: {reason}" for key, reason in run.not_run.items()]
    show(run.samples, rows, not_run)
    if options.json:
        facts["versions"] |= dict(sorted(run.versions.items()))
        facts |= {"rounds": options.sets * options.rounds, "sets": options.sets, "method": METHOD, "not_run": not_run}
        facts["disturbance"] = round(run.samples.disturbance(), 2)
        facts["memcpy_ms"] = run.samples.memcpy_ms()
        facts["other_floors"] = run.samples.other_floors()
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")
        print(f"wrote {options.json}")
    return 0


@contextlib.contextmanager
def workers(only: set[str], cores: list[int], folders: dict[str, str], run: Run) -> Iterator[dict[Key, Worker]]:
    """A new process for each system, ready for its turns: by row, without those that cannot be run."""
    started: list[tuple[str, Worker]] = []
    by_key: dict[Key, Worker] = {}
    try:
        for system, scripts in SYSTEMS.items():
            for environment, script in scripts if wanted(only, SYSTEMS, system) else ():
                started.append((system, start(environment, script, system, cores, folders)))
        # They import together, and get their memory one after the other: who is first gets other pages.
        for system, worker in run.shuffle.sample(started, len(started)):
            run.versions |= worker.call("versions")
            for case, medium, threads in worker.call("cases"):
                key = Key(medium, case, threads, system)
                if wanted(only, CASES, case) and wanted(only, MEDIA, medium) and key not in run.not_run:
                    by_key[key] = worker
        yield by_key
    finally:
        for _, worker in started:
            worker.close()


def start(environment: str, script: str, system: str, cores: list[int], folders: dict[str, str]) -> Worker:
    python = ROOT / environment / "bin" / "python"
    if not python.exists():
        name = environment.removeprefix(".venv").removeprefix("-") or "main"
        raise WorkerFailed(f"{environment} is missing; build it: tests/env/build.sh {name}")
    folders = {medium: str(Path(folder, system)) for medium, folder in folders.items()}
    for folder in folders.values():
        os.makedirs(folder, exist_ok=True)
    return Worker(str(python), script, cores=cores, folders=folders)


def wanted(only: set[str], kind, name: str) -> bool:
    """Names of one kind (system, case, medium) in --only exclude the others of that kind."""
    return name in only or not only.intersection(kind)


def take_turns(by_key: dict[Key, Worker], rounds: int, run: Run, title: str) -> None:
    """The first round is not counted: it opens files, fills stores and starts threads."""
    keys = sorted(by_key)
    total = len(keys) * (rounds + 1)
    with tqdm(total=total, file=sys.stderr, unit="turn", mininterval=1, dynamic_ncols=True) as progress:
        for number in range(rounds + 1):
            for key in in_turn(keys, run.shuffle):
                progress.set_description(f"{title}: {name_of(key)}", refresh=False)
                try:
                    arguments = {
                        "case": key.case,
                        "medium": key.medium,
                        "threads": key.threads,
                        "round_number": run.rounds_begun,
                    }
                    sample = Sample(**by_key[key].call("turn", **arguments))
                    if number:
                        run.samples.add(key, sample)
                except NotRun as reason:
                    run.not_run[key] = str(reason)
                    run.samples.drop(key)
                    keys.remove(key)
                progress.update()
            run.rounds_begun += 1


def name_of(key: Key) -> str:
    return f"{key.system} {key.case} {key.medium} {key.threads}"


def in_turn(keys: list[Key], shuffle: random.Random) -> list[Key]:
    """The order of a round: the systems of one case follow each other, in another order each round."""
    place = {(key.medium, key.case): shuffle.random() for key in keys}
    return sorted(keys, key=lambda key: (place[key.medium, key.case], shuffle.random()))


def show(samples: Samples, rows: list[dict], not_run: list[str]) -> None:
    floors = {row["medium"]: row["ms"] for row in rows if row["case"] == "copy"}
    for row in rows:
        key = Key(row["medium"], row["case"], row["threads"], row["system"])
        name = f"{key.system:18} {key.case:18} {key.medium:7} {key.threads}"
        if key.medium == CALLS_MEDIUM:
            print(f"{name} {row['ms'] * 1e3:10.2f} us")
            continue
        fastest, slowest = samples.spread(key)
        spread = f"[{fastest * 1e3:.1f}..{slowest * 1e3:.1f}]"
        print(f"{name} {row['ms']:8.2f} ms {spread:16} {row['gbps']:6.2f} GB/s", end="")
        print(f" {row['of_memcpy']:7.3f} of memcpy ({floors[key.medium]:.2f} ms)")
    other_floors = samples.other_floors()
    for floor in other_floors:
        name = f"{floor['system']:18} {floor['case']:18} {floor['medium']:7} {floor['threads']}"
        print(f"{name} {floor['of_floor']:7.3f} of {floor['floor']}", end="")
        print(f" ({floor['floor_ms']:.2f} ms, {floor['floor_of_memcpy']:.3f} of memcpy)")
    for place, ms in samples.memcpy_ms().items():
        print(f"memcpy took {ms:6.2f} ms in {place}")
    for line in not_run:
        print(f"NOT RUN: {line}")
    if samples.disturbance() > DISTURBED:
        print(f"The machine was busy: memcpy on the same pages varied by {samples.disturbance():.1f}x. Run it again.")
    print("\nBars (for information):")
    for bar in bars(rows, other_floors):
        print(f"  {mark(bar)} {bar.text}")


def mark(bar: Bar) -> str:
    sign = "at most" if bar.is_ceiling else "at least"
    verdict = {True: "pass", False: "FAIL", None: "----"}[bar.holds]
    figure = "not run" if bar.figure is None else f"{bar.figure:.2f}{bar.unit}"
    return f"{verdict}  {figure:>9}  ({sign} {bar.limit:g}{bar.unit})"


if __name__ == "__main__":
    sys.exit(main())
