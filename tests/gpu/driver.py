"""The CUDA driver through ctypes: memory of a device, copies, streams and events, as a program beside kvlane has them.

The stand-in for the driver has every call but those in OPTIONAL, so the same tests run on both. Nothing here waits
without a deadline.
"""

import ctypes
import functools
import os
import time

#: The path of a stand-in that takes the driver's place, for this process and those that it starts. Behind it, with
#: colons, other libraries that are then found under their names, such as one that works on that stand-in only.
STAND_IN_VARIABLE = "KVLANE_GPU_STAND_IN"
LIBRARY = "libcuda.so.1"
WAIT_S = 60.0
NOT_READY = 600
#: The mode of a capture in which other threads may call least; PyTorch's own graphs are captured so.
GLOBAL_CAPTURE = 0
#: Streams that do not wait for the default one; PyTorch's own are such.
NON_BLOCKING = 1
STAGING_BYTES = 4 << 20

_place, _number, _size = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
_address, _handle = ctypes.c_uint64, ctypes.c_void_p
CALLS = {
    "cuInit": [ctypes.c_uint],
    "cuDriverGetVersion": [_place],
    "cuGetErrorName": [ctypes.c_uint, _place],
    "cuDeviceGetCount": [_place],
    "cuDeviceGet": [_place, _number],
    "cuDeviceGetName": [_place, _number, _number],
    "cuDevicePrimaryCtxRetain": [_place, _number],
    "cuCtxPushCurrent_v2": [_handle],
    "cuStreamCreate": [_place, ctypes.c_uint],
    "cuEventCreate": [_place, ctypes.c_uint],
    "cuEventRecord": [_handle, _handle],
    "cuEventQuery": [_handle],
    "cuEventDestroy_v2": [_handle],
    "cuMemAlloc_v2": [_place, _size],
    "cuMemFree_v2": [_address],
    "cuMemHostAlloc": [_place, _size, ctypes.c_uint],
    "cuMemcpyDtoHAsync_v2": [_place, _address, _size, _handle],
    "cuMemcpyHtoDAsync_v2": [_address, _place, _size, _handle],
    "cuMemcpyDtoDAsync_v2": [_address, _address, _size, _handle],
    "cuStreamBeginCapture_v2": [_handle, ctypes.c_uint],
    "cuStreamEndCapture": [_handle, _place],
}
#: Needed on a real driver only.
OPTIONAL = {
    "cuMemGetInfo_v2": [_place, _place],
    "cuModuleLoadData": [_place, _place],
    "cuModuleGetFunction": [_place, _handle, ctypes.c_char_p],
    "cuLaunchKernel": [_handle, *[ctypes.c_uint] * 7, _handle, _place, _place],
}


class DriverMissing(Exception):
    """There is no driver, or none that has a device."""


class DriverError(Exception):
    """A call of the driver failed."""


@functools.cache
def driver() -> "Driver":
    """The one of this process. Its context is current on the thread that asks first."""
    return Driver((os.environ.get(STAND_IN_VARIABLE) or LIBRARY).split(os.pathsep))


class Event:
    """A point in a stream."""

    def __init__(self, owner: "Driver", stream: "Stream") -> None:
        self._driver, handle = owner, ctypes.c_void_p()
        owner.call("cuEventCreate", ctypes.byref(handle), 2)  # without timing
        self._handle = handle
        owner.call("cuEventRecord", handle, stream.handle)

    def is_over(self) -> bool:
        code = self._driver.code("cuEventQuery", self._handle)
        if code not in (0, NOT_READY):
            raise self._driver.error("cuEventQuery", code)
        return code == 0

    def wait(self, is_urgent: bool = False) -> None:
        """``is_urgent``: without sleeping in between, to time it."""
        deadline = time.monotonic() + WAIT_S
        while not self.is_over():
            if time.monotonic() > deadline:
                raise DriverError(f"a stream was not done after {WAIT_S:.0f} s")
            if not is_urgent:
                time.sleep(5e-5)

    def __del__(self) -> None:
        self._driver.code("cuEventDestroy_v2", self._handle)


class Stream:
    """A stream of this process' own. It lives as long as the process."""

    def __init__(self, owner: "Driver") -> None:
        self._driver, handle = owner, ctypes.c_void_p()
        owner.call("cuStreamCreate", ctypes.byref(handle), NON_BLOCKING)
        self.handle = handle

    @property
    def number(self) -> int:
        """What PyTorch calls ``cuda_stream``."""
        return int(self.handle.value or 0)

    def mark(self) -> Event:
        """The end of what is on it now."""
        return Event(self._driver, self)

    def wait(self) -> None:
        self.mark().wait()


class Driver:
    """A loaded driver and its first device."""

    def __init__(self, libraries: list[str]) -> None:
        library, *others = libraries
        try:
            self.library = ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
            #: Loaded once, they are found by their names.
            self.others = [ctypes.CDLL(other) for other in others]
        except OSError as error:
            raise DriverMissing(f"there is no CUDA driver here: {error}") from None
        for name, arguments in {**CALLS, **OPTIONAL}.items():
            try:
                function = getattr(self.library, name)
            except AttributeError:
                if name in OPTIONAL:
                    continue
                raise DriverMissing(f"{library} is no CUDA driver: it lacks {name}") from None
            function.argtypes, function.restype = arguments, ctypes.c_uint
        self._start(library)
        self._staging = ctypes.c_void_p()
        self.call("cuMemHostAlloc", ctypes.byref(self._staging), STAGING_BYTES, 0)
        self._copies = Stream(self)

    def _start(self, library: str) -> None:
        count = ctypes.c_int()
        try:
            self.call("cuInit", 0)
            self.call("cuDeviceGetCount", ctypes.byref(count))
        except DriverError as error:
            raise DriverMissing(f"the CUDA driver {library} does not start: {error}") from None
        if count.value == 0:
            raise DriverMissing(f"the CUDA driver {library} finds no GPU")
        device, name, context = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_void_p()
        self.call("cuDeviceGet", ctypes.byref(device), 0)
        self.call("cuDeviceGetName", name, len(name), device)
        self.device_name = name.value.decode(errors="replace")
        # PyTorch and kvlane use this context as well.
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self.call("cuCtxPushCurrent_v2", context)

    # ---- what it is

    @property
    def is_stand_in(self) -> bool:
        return hasattr(self.library, "kvlane_stand_in_kernel") or "stand-in" in self.device_name

    @property
    def place(self) -> str:
        """What tests say that they ran on."""
        return "stand-in" if self.is_stand_in else self.device_name

    @property
    def version(self) -> str:
        version = ctypes.c_int()
        self.call("cuDriverGetVersion", ctypes.byref(version))
        return f"{version.value // 1000}.{version.value % 1000 // 10}"

    def has(self, call: str) -> bool:
        return hasattr(self.library, call)

    # ---- calls

    def code(self, call: str, *arguments: object) -> int:
        return getattr(self.library, call)(*arguments)

    def call(self, call: str, *arguments: object) -> None:
        code = self.code(call, *arguments)
        if code != 0:
            raise self.error(call, code)

    def error(self, call: str, code: int) -> DriverError:
        text = ctypes.c_char_p()
        known = self.code("cuGetErrorName", code, ctypes.byref(text)) == 0 and text.value
        return DriverError(f"{call}: {text.value.decode() if known else 'an unknown code'} ({code})")

    # ---- memory

    def allocate(self, size_bytes: int) -> int:
        address = ctypes.c_uint64()
        self.call("cuMemAlloc_v2", ctypes.byref(address), size_bytes)
        return address.value

    def free(self, address: int) -> None:
        self.call("cuMemFree_v2", address)

    def free_bytes(self) -> int | None:
        """Of the device; None where the driver does not say, which is the stand-in."""
        if not self.has("cuMemGetInfo_v2"):
            return None
        free, whole = ctypes.c_size_t(), ctypes.c_size_t()
        self.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(whole))
        return free.value

    def stream(self) -> Stream:
        return Stream(self)

    def copy(self, stream: Stream, to: int, source: int, size_bytes: int) -> None:
        """Starts a copy on the device."""
        self.call("cuMemcpyDtoDAsync_v2", to, source, size_bytes, stream.handle)

    def write(self, address: int, content: bytes) -> None:
        """Writes to the device and waits for it. No other stream may be at work there."""
        for at in range(0, len(content), STAGING_BYTES):
            part = content[at : at + STAGING_BYTES]
            ctypes.memmove(self._staging, part, len(part))
            self.call("cuMemcpyHtoDAsync_v2", address + at, self._staging, len(part), self._copies.handle)
            self._copies.wait()

    def read(self, address: int, size_bytes: int) -> bytes:
        """Reads from the device. No other stream may be at work there."""
        parts = []
        for at in range(0, size_bytes, STAGING_BYTES):
            part_bytes = min(size_bytes - at, STAGING_BYTES)
            self.call("cuMemcpyDtoHAsync_v2", self._staging, address + at, part_bytes, self._copies.handle)
            self._copies.wait()
            parts.append(ctypes.string_at(self._staging, part_bytes))
        return b"".join(parts)

    # ---- what only the stand-in can say

    def violations(self) -> list[str]:
        """Misuse of the driver by this process. A real driver does not tell: then the list is empty."""
        if not self.is_stand_in:
            return []
        text = ctypes.create_string_buffer(64 << 10)
        function = self.library.kvlane_stand_in_violations
        function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_size_t], ctypes.c_size_t
        used = function(text, len(text))
        return text.raw[: min(used, len(text))].decode(errors="replace").splitlines()

    def count_of(self, call: str) -> int | None:
        """How often this process made a call; None on a real driver."""
        if not self.is_stand_in:
            return None
        function = self.library.kvlane_stand_in_calls
        function.argtypes, function.restype = [ctypes.c_char_p], ctypes.c_uint64
        return function(call.encode())
