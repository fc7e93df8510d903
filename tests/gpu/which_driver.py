"""Which driver tests and benchmark run on: the one that was asked for, or none."""

import os
from pathlib import Path

from driver import STAND_IN_VARIABLE, Driver, DriverMissing, driver
from side import torch_with_cuda


def find_driver(stand_in: str | None, what: str) -> Driver | str:
    """The driver that was asked for, or why it is not there: never the other one."""
    if stand_in is None:
        os.environ.pop(STAND_IN_VARIABLE, None)
    else:
        libraries = [Path(library).resolve() for library in stand_in.split(os.pathsep)]
        for library in libraries:
            if not library.is_file():
                return f"the stand-in {library} is not there"
        os.environ[STAND_IN_VARIABLE] = os.pathsep.join(map(str, libraries))
    try:
        found = driver()
    except DriverMissing as error:
        return f"{what} need an NVIDIA GPU and its driver, and {error}"
    if found.is_stand_in != (stand_in is not None):
        wanted = "the machine's own driver" if stand_in is None else "a stand-in"
        return f"{what} were to run on {wanted}, and libcuda.so.1 here is {described(found)}"
    return found


def described(found: Driver) -> str:
    if found.is_stand_in:
        return "stand-in (no GPU: this says nothing about one)"
    return f"{found.device_name}, driver for CUDA {found.version}, tensors of {tensors()}"


def tensors() -> str:
    torch = torch_with_cuda()
    return "the driver's own memory" if torch is None else f"PyTorch {torch.__version__}"
