#!/usr/bin/env python3
"""Times the lanes between caches on a GPU, beside a copy on the device in the same run.

    python benches/gpu/run.py                          writes benches/results/gpu.json, or what --json names
    python benches/gpu/run.py --stand-in-dry-run LIB   runs the benchmark on the stand-in; writes nothing, and its
                                                       figures mean nothing

Needs Python 3.10, kvlane on the import path and an NVIDIA GPU; where PyTorch has CUDA, caches are its tensors. The exit
status is 1 after a wrong byte, never because something is slow.
"""

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "gpu"))

import machine
from driver import driver
from measure import CASES, DRY_CASES, Case, WrongBytes, measure
from which_driver import described, find_driver, tensors

RESULT = Path(__file__).resolve().parents[1] / "results" / "gpu.json"
NOTHING = "kvlane: a dry run on the stand-in: there is no GPU, and these figures mean NOTHING"
METHOD = (
    "Two processes on one GPU, prefill and decode, each with a cache of its own; blocks are scattered on both sides, "
    "anew in each round. request: 48 layers x 64 runs of 32 KiB; pages: the same bytes as 64 runs; block: one "
    "run of 32 KiB. us: the median of all rounds, from the order of a pull to its end, called and timed from Python, "
    "both streams idle. device copy: one copy of as many bytes between two buffers of the device, timed before each "
    "pull. of_device_copy: its us divided by the us of the row. nccl: NCCL takes the two ends for two machines, since "
    "it refuses them on one GPU else, so its bytes go over sockets."
)


def main() -> int:
    options = parse(sys.argv[1:])
    found = find_driver(options.stand_in_dry_run, "the figures")
    if isinstance(found, str):
        print(f"kvlane: {found}", file=sys.stderr)
        return 1
    is_dry = found.is_stand_in
    print(NOTHING if is_dry else f"kvlane: GPU benchmark on {described(found)}", flush=True)
    rows = []
    try:
        for case in DRY_CASES if is_dry else CASES:
            rows += measured(case)
    except WrongBytes as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    if is_dry:
        print(NOTHING)
        return 0
    write(options.json, rows)
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the result is written; benches/results/gpu.json")
    parser.add_argument("--stand-in-dry-run", metavar="LIBRARY", help="the stand-in; nothing is written")
    options = parser.parse_args(arguments)
    if options.stand_in_dry_run and options.json:
        parser.error("a dry run on the stand-in writes nothing, so --json is not allowed with it")
    options.json = options.json or RESULT
    return options


def measured(case: Case) -> list[dict]:
    rows = measure(case).rows()
    for row in rows:
        spread = f"[{row['fastest_us']:.0f}..{row['slowest_us']:.0f}]"
        print(
            f"{row['case']:8} {row['lane']:12} {row['bytes'] / 2**20:8.2f} MiB in {row['runs']:5} runs "
            f"{row['us']:10.1f} us {spread:18} {row['gbps']:9.3f} GB/s {row['of_device_copy']:7.4f} of a device copy",
            flush=True,
        )
    return rows


def write(path: Path, rows: list[dict]) -> None:
    facts = machine.facts(sorted(os.sched_getaffinity(0)))
    facts |= {"gpu": driver().device_name, "driver": driver_version(), "tensors": tensors(), "method": METHOD}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n")
    print(f"wrote {path}")


def driver_version() -> str:
    """The interface's version, and the kernel module's where the system tells."""
    cuda = f"CUDA {driver().version}"
    try:
        module = Path("/proc/driver/nvidia/version").read_text().splitlines()[0]
    except OSError:
        return cuda
    return f"{cuda}; {' '.join(module.split())}"


if __name__ == "__main__":
    sys.exit(main())
