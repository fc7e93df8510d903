"""Compiles the kernels to PTX with NVRTC, which needs no GPU.

    python crates/cuda/kernels/compile.py            writes NAME.ptx beside each NAME.cu
    python crates/cuda/kernels/compile.py --check    says which are not what would be written; status 1

The driver translates PTX for its GPU when it loads it. It takes no PTX of a newer CUDA than its own, so an old NVRTC is
used: what that of 11.8 writes, every driver of a CUDA 12 or newer takes.
"""

import argparse
import ctypes
import difflib
import importlib.util
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
#: The oldest GPUs that vLLM runs on.
OPTIONS = ("--gpu-architecture=compute_70", "--std=c++14")
LIBRARY = "libnvrtc.so.11.2"
PACKAGE = "nvidia-cuda-nvrtc-cu11"


class CompileError(Exception):
    """There is no compiler, or it refuses a kernel."""


def compiler() -> ctypes.CDLL:
    found = importlib.util.find_spec("nvidia")
    for place in (found.submodule_search_locations or []) if found else []:
        path = Path(place) / "cuda_nvrtc" / "lib" / LIBRARY
        if path.exists():
            return ctypes.CDLL(str(path))
    raise CompileError(f"there is no {LIBRARY} in this environment: pip install {PACKAGE}")


def compiled(library: ctypes.CDLL, source: Path) -> str:
    """The PTX of a file."""
    program = ctypes.c_void_p()
    content, name = source.read_bytes(), source.name.encode()
    check(
        library, "nvrtcCreateProgram", library.nvrtcCreateProgram(ctypes.byref(program), content, name, 0, None, None)
    )
    options = (ctypes.c_char_p * len(OPTIONS))(*[option.encode() for option in OPTIONS])
    code = library.nvrtcCompileProgram(program, len(OPTIONS), options)
    if code != 0:
        raise CompileError(text(library, program, "ProgramLog"))
    return text(library, program, "PTX")


def text(library: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> str:
    size = ctypes.c_size_t()
    call = f"nvrtcGet{what}Size"
    check(library, call, getattr(library, call)(program, ctypes.byref(size)))
    place = ctypes.create_string_buffer(size.value)
    call = f"nvrtcGet{what}"
    check(library, call, getattr(library, call)(program, place))
    return place.value.decode()


def check(library: ctypes.CDLL, call: str, code: int) -> None:
    if code != 0:
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise CompileError(f"{call}: {library.nvrtcGetErrorString(code).decode()}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    is_same = True
    try:
        library = compiler()
        for source in sorted(FOLDER.glob("*.cu")):
            target, new = source.with_suffix(".ptx"), compiled(library, source)
            if not options.check:
                target.write_text(new)
                print(f"wrote {target}")
                continue
            old = target.read_text() if target.exists() else ""
            lines = list(
                difflib.unified_diff(old.splitlines(), new.splitlines(), str(target), source.name, lineterm="")
            )
            is_same = is_same and not lines
            if lines:
                print(*lines, f"kvlane: {target} is not what {source.name} compiles to: make kernels", sep="\n")
    except CompileError as error:
        print(f"kvlane: {error}", file=sys.stderr)
        return 1
    return 0 if is_same else 1


if __name__ == "__main__":
    sys.exit(main())
