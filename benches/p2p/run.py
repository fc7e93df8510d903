#!/usr/bin/env python3
"""Side-by-side benchmark of kvlane's transfer from server to server against its peers and against memcpy.

    .venv/bin/python benches/p2p/run.py                 everything, writes benches/results/p2p.json
    .venv/bin/python benches/p2p/run.py --quick         few rounds, writes nothing unless --json is given
    .venv/bin/python benches/p2p/run.py --only kvlane,request,shm   these systems, cases and lanes only

Every system is a pair of processes on this machine, each with a paged cache of its own in host memory: a request of 96
MiB as 48 layers x 64 scattered runs of 32 KiB, and single runs. Sets and rounds: see benches/sets.py; what a row is
made of: METHOD in rows.py. `overlap` pulls a request whose producer computes its layers one by one meanwhile. After
the last set a pair of kvlane's processes that has nothing to do is watched for ten seconds.

What a system moved is compared byte for byte in every turn. The exit status is 1 after a wrong byte or a broken
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
from pair import noise_file
from rows import DISTURBED, METHOD, OVERLAP, Key, Samples, promises
from sets import ROOT, Run, python_of, read_options, take_turns, wanted, workers
from turns import Worker, WorkerFailed
from workload import WrongBytes

RESULT = ROOT / "benches" / "results" / "p2p.json"
# Sets, and rounds in each.
COUNTS, QUICK_COUNTS = (5, 5), (1, 3)
IDLE_S = 10

# Worker scripts of each system, with the environment whose Python runs them, and what they are told.
PEERS = ".venv-peers-p2p"
SYSTEMS = {
    "kvlane": [(".venv", "worker_kvlane.py", {})],
    "nixl": [(PEERS, "worker_nixl.py", {"lane": "default"}), (PEERS, "worker_nixl.py", {"lane": "tcp"})],
    "mooncake": [(PEERS, "worker_mooncake.py", {})],
    "raw-tcp": [(".venv", "worker_raw_tcp.py", {})],
}
# Mooncake's library wants RDMA libraries beside it, whether there is RDMA or not; tests/env/build.sh put some there.
ENVIRONMENTS = {"mooncake": {"LD_LIBRARY_PATH": str(ROOT / PEERS / "borrowed-libs")}}
LANES = ("shm", "tcp", "default")
CASES = ("block", "request", OVERLAP)


def main() -> int:
    options = parse(sys.argv[1:])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the scratch folder is removed
    scratch = tempfile.mkdtemp(prefix="kvlane-bench.", dir=options.tmpfs_dir)
    try:
        return measure(options, scratch)
    except (WrongBytes, WorkerFailed) as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tmpfs-dir", default="/dev/shm", help="where the bytes that all sources hold are written")
    return read_options(parser, arguments, [*SYSTEMS, *CASES, *LANES], COUNTS, QUICK_COUNTS, RESULT)


def measure(options: argparse.Namespace, scratch: str) -> int:
    cores = sorted(os.sched_getaffinity(0))
    facts, run, noise, idle_share = machine.facts(cores), Run(Samples()), noise_file(scratch), None
    for number in range(options.sets):
        starts = starts_of(options.only, cores, noise)
        with workers(starts, key_of, partial(is_wanted, options.only), run) as by_key:
            take_turns(by_key, options.rounds, run, f"set {number + 1} of {options.sets}")
            if number + 1 == options.sets:
                idle_share = idle_share_of(by_key)
    rows, overlaps, not_run = run.samples.rows(), run.samples.overlaps(), run.not_run_lines()
    show(run.samples, rows, not_run)
    bars.show(promises(rows, overlaps, idle_share))
    if options.json:
        facts["versions"] |= dict(sorted(run.versions.items()))
        facts |= {"rounds": options.sets * options.rounds, "sets": options.sets, "method": METHOD, "not_run": not_run}
        facts["disturbance"] = round(run.samples.disturbance(), 2)
        facts["memcpy_ms"] = run.samples.memcpy_ms()
        facts |= {"overlap": overlaps, "idle_share": idle_share}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")
        print(f"wrote {options.json}")
    return 0


def starts_of(only: set[str], cores: list[int], noise: str) -> list:
    return [
        (system, partial(start, system, environment, script, cores=cores, noise=noise, **told))
        for system, scripts in SYSTEMS.items()
        for environment, script, told in scripts
        if wanted(only, SYSTEMS, system) and ("lane" not in told or wanted(only, LANES, told["lane"]))
    ]


def start(system: str, environment: str, script: str, **setup) -> Worker:
    python, script_path = str(python_of(environment)), Path(__file__).parent / script
    return Worker(python, script_path, ENVIRONMENTS.get(system), **setup)


def key_of(system: str, case: str, lane: str) -> Key:
    return Key(case, lane, system)


def is_wanted(only: set[str], key: Key) -> bool:
    return wanted(only, CASES, key.case) and wanted(only, LANES, key.lane)


def idle_share_of(by_key: dict[Key, Worker]) -> float | None:
    """None: kvlane was not run."""
    ours = [worker for key, worker in by_key.items() if key.system == "kvlane"]
    return round(ours[0].call("idle_share", seconds=IDLE_S), 5) if ours else None


def show(samples: Samples, rows: list[dict], not_run: list[str]) -> None:
    for row in rows:
        key = Key(row["case"], row["lane"], row["system"])
        scale, unit = (1e3, "us") if key.case == "block" else (1, "ms")
        fastest, slowest = (1e3 * scale * seconds for seconds in samples.spread(key))
        spread = f"[{fastest:.1f}..{slowest:.1f}]"
        print(f"{key.system:9} {key.case:8} {key.lane:8} {row['ms'] * scale:8.2f} {unit} {spread:18}", end="")
        print(f" {row['gbps']:6.2f} GB/s {row['of_memcpy']:7.3f} of memcpy")
    for overlap in samples.overlaps():
        print(
            f"kvlane    {OVERLAP:8} {overlap['lane']:8} {overlap['late_ms']:8.2f} ms behind the last layer, "
            f"{overlap['of_transfer']:.3f} of a transfer"
        )
    for place, ms in samples.memcpy_ms().items():
        print(f"memcpy took {ms:6.2f} ms in {place}")
    for line in not_run:
        print(f"NOT RUN: {line}")
    if samples.disturbance() > DISTURBED:
        print(f"The machine was busy: memcpy on the same pages varied by {samples.disturbance():.1f}x. Run it again.")


if __name__ == "__main__":
    sys.exit(main())
