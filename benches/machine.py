"""The facts without which a figure means nothing."""

import datetime
import os
import platform
import shlex
import subprocess
import sys
from pathlib import Path


def facts(cores: list[int], folders: dict[str, str] | None = None) -> dict:
    """What ran where. ``cores``: those that may be used; ``folders``: medium to scratch folder, if any."""
    found = {
        "cpu": cpu_name(),
        "cores": len(cores),
        "virtual": is_virtual(),
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB",
        "kernel": f"{platform.system()} {platform.release()}",
        "load": [round(load, 2) for load in os.getloadavg()],
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()},
        # The script by its place in the repository, wherever that lies.
        "command": shlex.join(["python", str(Path(*Path(sys.argv[0]).parts[-3:])), *sys.argv[1:]]),
    }
    if folders:
        found["filesystems"] = {medium: filesystem_of(folder) for medium, folder in folders.items()}
    return found


def cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def is_virtual() -> bool | None:
    """Whether the processor says that a hypervisor runs it; not every kind of processor would."""
    flags = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")]
    return "hypervisor" in flags[0].split() if flags else None


def filesystem_of(folder: str) -> str:
    """The type of the file system that holds the folder, such as ext4."""
    command = ["stat", "--file-system", "--format=%T", folder]
    name = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if name != "ext2/ext3":
        return name
    # These share one magic number with ext4: the mount table knows.
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    holding = [m for m in mounts if os.path.realpath(folder).startswith(m[1].rstrip("/") + "/")]
    return max(holding, key=lambda mount: len(mount[1]))[2] if holding else name
