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
import json
import os
import shutil
import signal
import sys
import tempfile
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import bars
import machine
from rows import CALLS_MEDIUM, DISTURBED, METHOD, Key, Samples, promises
from sets import ROOT, Run, python_of, read_options, take_turns, wanted, workers
from turns import Worker, WorkerFailed
from workload import WrongBytes

RESULT = ROOT / "benches" / "results" / "fs.json"
# Sets, and rounds in each.
COUNTS, QUICK_COUNTS = (5, 3), (1, 3)

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
    parser.add_argument("--tmpfs-dir", default="/dev/shm", help="parent of the memory-backed scratch folder")
    parser.add_argument("--disk-dir", default=str(ROOT / "target"), help="parent of the disk-backed scratch folder")
    options = read_options(parser, arguments, [*SYSTEMS, *CASES, *MEDIA], COUNTS, QUICK_COUNTS, RESULT)
    os.makedirs(options.disk_dir, exist_ok=True)
    for medium, folder in (("tmpfs", options.tmpfs_dir), ("disk", options.disk_dir)):
        if (machine.filesystem_of(folder) == "tmpfs") != (medium == "tmpfs"):
            parser.error(f"--{medium}-dir: {folder} is {machine.filesystem_of(folder)}")
    return options


def measure(options: argparse.Namespace, scratch: dict[str, str]) -> int:
    cores = sorted(os.sched_getaffinity(0), reverse=True)  # the highest first: core 0 serves most interrupts
    facts, run = machine.facts(cores, scratch), Run(Samples())
    for number in range(options.sets):
        folders = {medium: os.path.join(folder, f"set-{number}") for medium, folder in scratch.items()}
        starts = starts_of(options.only, cores, folders)
        with workers(starts, key_of, partial(is_wanted, options.only), run) as by_key:
            take_turns(by_key, options.rounds, run, f"set {number + 1} of {options.sets}")
        for folder in folders.values():
            shutil.rmtree(folder)
    rows, not_run = run.samples.rows(), run.not_run_lines()
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


def starts_of(only: set[str], cores: list[int], folders: dict[str, str]) -> list:
    return [
        (system, partial(start, environment, script, system, cores, folders))
        for system, scripts in SYSTEMS.items()
        for environment, script in scripts
        if wanted(only, SYSTEMS, system)
    ]


def key_of(system: str, case: str, medium: str, threads: int) -> Key:
    return Key(medium, case, threads, system)


def is_wanted(only: set[str], key: Key) -> bool:
    return wanted(only, CASES, key.case) and wanted(only, MEDIA, key.medium)


def start(environment: str, script: str, system: str, cores: list[int], folders: dict[str, str]) -> Worker:
    folders = {medium: str(Path(folder, system)) for medium, folder in folders.items()}
    for folder in folders.values():
        os.makedirs(folder, exist_ok=True)
    script_path = Path(__file__).parent / script
    return Worker(str(python_of(environment)), script_path, cores=cores, folders=folders)


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
    bars.show(promises(rows, other_floors))


if __name__ == "__main__":
    sys.exit(main())
