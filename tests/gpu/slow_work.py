"""Work that keeps a stream busy for some time, so that whoever does not wait for the stream comes too early.

Three ways: the stand-in's kernel; on a GPU a kernel that looks at the clock until the time is over; and where the
driver does not take that kernel, a chain of copies whose length was measured.
"""

import ctypes
import functools
import time

from driver import Driver, DriverError, Stream

#: For all GPUs since Maxwell: the driver translates it when it is loaded.
CLOCK_KERNEL = b"""\
.version 6.0
.target sm_50
.address_size 64
.visible .entry kvlane_watch_clock(.param .u64 nanoseconds)
{
  .reg .u64 %now, %end, %left;
  .reg .pred %more;
  ld.param.u64 %left, [nanoseconds];
  mov.u64 %now, %globaltimer;
  add.u64 %end, %now, %left;
again:
  mov.u64 %now, %globaltimer;
  setp.lt.u64 %more, %now, %end;
  @%more bra again;
  ret;
}
"""


class StandInKernel:
    """The stand-in has a kernel that takes as long as it is told, and then writes some bytes."""

    name = "the stand-in's kernel"

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        #: By stream: nothing orders one stream's kernel with another's.
        self._scratch: dict[int, int] = {}
        self._kernel = driver.library.kvlane_stand_in_kernel
        self._kernel.argtypes = [ctypes.c_size_t, ctypes.c_uint64, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint64]
        self._kernel.restype = ctypes.c_uint

    def put(self, stream: Stream, duration_s: float) -> None:
        if stream.number not in self._scratch:
            self._scratch[stream.number] = self._driver.allocate(8)
        code = self._kernel(stream.number, self._scratch[stream.number], bytes(8), 8, int(duration_s * 1e6))
        if code != 0:
            raise DriverError(f"the stand-in refused a kernel ({code})")


class ClockKernel:
    """One thread of the GPU that watches the clock."""

    name = "a kernel that watches the clock"

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        driver.call("cuModuleLoadData", ctypes.byref(module), CLOCK_KERNEL + b"\0")
        driver.call("cuModuleGetFunction", ctypes.byref(self._function), module, b"kvlane_watch_clock")

    def put(self, stream: Stream, duration_s: float) -> None:
        nanoseconds = ctypes.c_uint64(int(duration_s * 1e9))
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(nanoseconds))
        size = (1, 1, 1, 1, 1, 1, 0)
        self._driver.call("cuLaunchKernel", self._function, *size, stream.handle, arguments, None)


class ChainOfCopies:
    """Copies between two buffers, as many as take the time."""

    name = "a chain of copies"
    MEASURED, ROUNDS = 8, 5

    def __init__(self, driver: Driver, size_bytes: int) -> None:
        self._driver, self._size_bytes = driver, size_bytes
        self._buffers = [driver.allocate(size_bytes), driver.allocate(size_bytes)]
        stream = driver.stream()
        # The fastest round: one that the machine held up would make the chain too short to keep a stream busy. The
        # first round warms up besides.
        self._copy_s = max(min(self._round_s(stream) for _ in range(self.ROUNDS)) / self.MEASURED, 1e-6)

    def put(self, stream: Stream, duration_s: float) -> None:
        self._copies(stream, int(duration_s / self._copy_s) + 1)

    def _round_s(self, stream: Stream) -> float:
        started_s = time.monotonic()
        self._copies(stream, self.MEASURED)
        stream.wait()
        return time.monotonic() - started_s

    def _copies(self, stream: Stream, count: int) -> None:
        for number in range(count):
            to, source = self._buffers[number % 2], self._buffers[1 - number % 2]
            self._driver.copy(stream, to, source, self._size_bytes)


SlowWork = StandInKernel | ClockKernel | ChainOfCopies


@functools.cache
def slow_work(driver: Driver) -> SlowWork:
    """The best way here. One for all streams of a process."""
    if driver.is_stand_in:
        return StandInKernel(driver)
    try:
        return ClockKernel(driver)
    except (AttributeError, DriverError) as error:
        print(f"kvlane: the driver does not take a kernel ({error}), so streams are kept busy by copies", flush=True)
        return chain_of_copies(driver)


def chain_of_copies(driver: Driver) -> ChainOfCopies:
    """The way that every driver has."""
    return ChainOfCopies(driver, 4 << 20 if driver.is_stand_in else 256 << 20)
