"""One side of a transfer: a cache on the device, a worker over it, and a compute stream that writes it.

In the test's process it is decode. Run as a program it is a process of its own, prefill as a rule, which carries out
what it is told line by line:

    python side.py OPTIONS      both ways lines of JSON: ["method", [arguments]] -> {"value": ...} or {"error": ...}
"""

import ctypes
import functools
import json
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from driver import GLOBAL_CAPTURE, Event, driver
from kvlane import _native
from layouts import ELEMENT_BYTES, LAYOUTS, Image, Layout, image
from slow_work import slow_work

HOST = "127.0.0.1"
LEASE_MS, PEER_TIMEOUT_MS = 60_000, 60_000
NCCL = "libnccl.so.2"
#: NCCL refuses two ends on one GPU, unless they say that they are on two machines. It then moves bytes over sockets.
NCCL_HOST_VARIABLE = "NCCL_HOSTID"
#: What PyTorch takes of the driver has at least this size: no two of its pieces share what CUDA IPC shares.
PIECE_BYTES = 2 << 20
DIGEST = b"\7" * 32
#: Set to 0: tensors of the driver's own memory although PyTorch is there.
TORCH_VARIABLE = "KVLANE_GPU_TORCH"


def torch_with_cuda() -> Any:
    """PyTorch, if it is there and sees the device; never on the stand-in, which it does not know."""
    if driver().is_stand_in or os.environ.get(TORCH_VARIABLE) == "0":
        return None
    try:
        import torch
    except ImportError:
        return None
    return torch if torch.cuda.is_available() else None


@functools.cache
def lanes() -> tuple[str, ...]:
    """The lanes that a cache on a device has here. All claims are made of each, and each is timed."""
    if driver().is_stand_in and not driver().others:
        return ("cuda", "tcp")  # NCCL itself does not know that stand-in
    torch_with_cuda()  # whose NCCL is found by its name from then on
    try:
        ctypes.CDLL(NCCL)
    except OSError as error:
        print(f"kvlane: lane nccl is left out: there is no NCCL here ({error})", file=sys.stderr, flush=True)
        return ("cuda", "tcp")
    return ("cuda", "nccl", "tcp")


class Tensors:
    """The memory of a cache: PyTorch's where it has CUDA, else the driver's."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.torch = torch_with_cuda()
        if self.torch is None:
            size_bytes = -(-layout.allocation_bytes // PIECE_BYTES) * PIECE_BYTES
            self.addresses = [driver().allocate(size_bytes) for _ in range(layout.allocations)]
        else:
            self._tensors = [
                self.torch.zeros(layout.allocation_shape, dtype=self.torch.bfloat16, device="cuda:0")
                for _ in range(layout.allocations)
            ]
            self.torch.cuda.synchronize()
            self.addresses = [tensor.data_ptr() for tensor in self._tensors]

    def described(self) -> list[tuple[str, int, str, int, list[int], list[int]]]:
        """The tensor of each layer, as vLLM hands it to a connector."""
        return [(f"layer.{number}", *self._layer(number)) for number in range(self.layout.layers)]

    def _layer(self, number: int) -> tuple[int, str, int, list[int], list[int]]:
        layout = self.layout
        allocation, start = layout.place(number)
        if self.torch is None:
            return self.addresses[allocation] + start, "cuda:0", ELEMENT_BYTES, layout.shape, layout.strides
        tensor = self.view(number)
        device, shape, strides = str(tensor.device), list(tensor.shape), list(tensor.stride())
        return tensor.data_ptr(), device, tensor.element_size(), shape, strides

    def tensor(self, allocation: int) -> Any:
        """PyTorch's of a whole allocation."""
        return self._tensors[allocation]

    def view(self, layer: int) -> Any:
        """PyTorch's as a kernel gets it."""
        tensor, dims = self.tensor(self.layout.place(layer)[0]), self.layout.physical
        if "L" in dims:
            tensor, dims = tensor.select(dims.index("L"), layer), dims.replace("L", "")
        return tensor.permute([dims.index(dim) for dim in self.layout.logical])

    def free(self) -> None:
        """Nobody may use them any more."""
        if self.torch is None:
            for address in self.addresses:
                driver().free(address)
        self._tensors, self.addresses = [], []


class Cache:
    """A cache on the device, and a compute stream that writes it."""

    def __init__(self, layout: str, **sizes: int) -> None:
        self.driver = driver()
        self.layout = Layout(**vars(LAYOUTS[layout]) | sizes)
        self.tensors = Tensors(self.layout)
        self.stream = self.driver.stream()
        self._sources: dict[int, list[int]] = {}
        self._last: Event | None = None

    def native_layout(self) -> Any:
        return _native.Layout(self.tensors.described(), self.layout.blocks, self.layout.block_dim)

    def namespace(self, is_shape_said: bool = False) -> bytes:
        """With ``is_shape_said`` the same for caches with other sizes of blocks and other heads."""
        layout = self.layout
        return _native.namespace_id(
            [("test", "gpu"), ("attention", layout.order if is_shape_said else layout.attention)]
        )

    # ---- the compute stream

    def prepare(self, seed: int) -> None:
        """Puts what `compute` will write where it is at hand on the device."""
        if seed not in self._sources:
            content = image(self.layout, seed)
            self._sources[seed] = [self.driver.allocate(len(part)) for part in content]
            for address, part in zip(self._sources[seed], content, strict=True):
                self.driver.write(address, part)

    def compute(
        self, seed: int, busy_ms: float = 0, blocks: Sequence[int] | None = None, layers: Sequence[int] | None = None
    ) -> None:
        """A step: takes a while, and then writes the cache, or some blocks of some layers. Does not wait."""
        self.prepare(seed)
        if busy_ms:
            slow_work(self.driver).put(self.stream, busy_ms / 1000)
        if blocks is None:
            for to, source in zip(self.tensors.addresses, self._sources[seed], strict=True):
                self.driver.copy(self.stream, to, source, self.layout.allocation_bytes)
        else:
            for layer in range(self.layout.layers) if layers is None else layers:
                allocation, start = self.layout.place(layer)
                for block in blocks:
                    for at, length in self.layout.runs(block):
                        to, source = (places[allocation] + start + at for places in self._places(seed))
                        self.driver.copy(self.stream, to, source, length)
        self._last = self.stream.mark()

    def _places(self, seed: int) -> tuple[list[int], list[int]]:
        return self.tensors.addresses, self._sources[seed]

    def fill(self, seed: int) -> None:
        """Writes the whole cache and waits for it."""
        self.compute(seed)
        self.stream.wait()

    def is_busy(self) -> bool:
        """Whether the stream has still to do something of what it was given."""
        return self._last is not None and not self._last.is_over()

    def rest(self) -> None:
        """Waits for the stream."""
        self.stream.wait()

    def content(self) -> Image:
        return [self.driver.read(address, self.layout.allocation_bytes) for address in self.tensors.addresses]

    def free(self) -> None:
        """Nobody uses it any more."""
        self.stream.wait()
        self.tensors.free()
        for addresses in self._sources.values():
            for address in addresses:
                self.driver.free(address)
        self._sources.clear()


class Side(Cache):
    """See above. Methods whose arguments and results are plain values can be told to a process."""

    def __init__(
        self,
        can_offer: bool,
        layout: str,
        lane: str = "auto",
        port: int = 0,
        first_head: int | None = None,
        **sizes: int,
    ) -> None:
        """``first_head``: of the model's. Given, others with other sizes are met. ``sizes``: of the layout."""
        os.environ[NCCL_HOST_VARIABLE] = f"kvlane {os.getpid()}"
        super().__init__(layout, **sizes)
        options = {
            "can_offer": can_offer,
            "can_pull": not can_offer,
            "host": HOST,
            "port": port,
            "rank": 0,
            "engine_id": "prefill" if can_offer else "decode",
            "secret": None,
            "allowed_peers": [],
            "lane": lane,
            "lease_ms": LEASE_MS,
            "transfer_timeout_ms": LEASE_MS,
            "peer_timeout_ms": PEER_TIMEOUT_MS,
            "connections": 2,
            "max_leased_blocks": self.layout.blocks,
            "readers": 1,
            "facts": [],
        }
        if first_head is not None:
            tokens, heads = self.layout.axes()
            axes = {f"layer.{number}": (tokens, heads, False) for number in range(self.layout.layers)}
            options["shape"] = (first_head, self.layout.heads if heads is not None else 1, 1, axes)
        self.worker = _native.P2pWorker(
            self.native_layout(),
            self.tensors,
            self.namespace(first_head is not None),
            self.layout.block_tokens,
            options,
        )

    def facts(self) -> dict[str, Any]:
        return {"port": self.worker.port, "pid": os.getpid(), "place": self.driver.place}

    # ---- a graph

    def begin_capture(self) -> None:
        """Captures what this thread gives to a stream of its own, in the mode that forbids other threads the most."""
        self._captured = self.driver.stream()
        self.driver.call("cuStreamBeginCapture_v2", self._captured.handle, GLOBAL_CAPTURE)

    def end_capture(self) -> None:
        """Raises if the graph was spoilt."""
        graph = ctypes.c_void_p()
        self.driver.call("cuStreamEndCapture", self._captured.handle, ctypes.byref(graph))

    # ---- prefill

    def offer(self, key: str, blocks: Sequence[int], prompt_blocks: int | None = None) -> None:
        """``prompt_blocks``: of the whole prompt, if the rest is told by `extend`."""
        count = len(blocks) if prompt_blocks is None else prompt_blocks
        self.worker.offer(key, count * self.layout.block_tokens, DIGEST, list(blocks))

    def extend(self, key: str, blocks: Sequence[int]) -> None:
        self.worker.extend(key, list(blocks))

    def progress(self, key: str, done_blocks: int, wave_blocks: int | None = None, wave_layers: int = 0) -> None:
        """What the stream has been given so far makes the blocks complete."""
        wave = done_blocks if wave_blocks is None else wave_blocks
        self.worker.progress([(key, done_blocks, wave, wave_layers)], self.stream.number)

    def compute_layers(self, key: str, seed: int, done_blocks: int, blocks: Sequence[int], busy_ms: float) -> None:
        """A step that computes blocks of a request behind `done_blocks` others, and tells each layer as it is given to
        the stream. Every layer takes a while. Does not wait."""
        wave_blocks = done_blocks + len(blocks)
        for layer in range(self.layout.layers):
            self.compute(seed, busy_ms, blocks, [layer])
            if layer + 1 < self.layout.layers:
                self.progress(key, done_blocks, wave_blocks, layer + 1)
        self.progress(key, wave_blocks)

    def hold(self, key: str, blocks: Sequence[int]) -> None:
        """A request whose blocks are written, or will be by what is on the stream."""
        self.offer(key, blocks)
        self.progress(key, len(blocks))
        self.worker.finish(key)

    def revoke(self, key: str) -> None:
        self.worker.revoke(key)

    def released(self) -> list[str]:
        return self.worker.released()

    # ---- decode

    def pull(
        self,
        key: str,
        port: int,
        targets: Sequence[int],
        first_block: int = 0,
        timeout_ms: int = 20_000,
        tokens: int | None = None,
    ) -> int:
        """Pulls a prompt's blocks from `first_block` to its end, after what is on the stream. ``tokens``: of the
        prompt, if the last block is not full."""
        tokens = tokens or (first_block + len(targets)) * self.layout.block_tokens
        stream = self.stream.number
        return self.worker.pull(key, HOST, port, tokens, DIGEST, first_block, list(targets), timeout_ms, stream)

    def outcome(self, job: int, timeout_ms: int = 40_000) -> str | None:
        """How a pull ended; None: it has not."""
        ended = self.worker.wait(job, timeout_ms)
        return None if ended is None else ended[1]

    def lanes(self) -> list[str]:
        """Those that moved bytes since the last call."""
        suffix, others = "_bytes", {"received_bytes"}
        names = [name for name in self.worker.stats() if name.endswith(suffix) and name not in others]
        return sorted(name.removesuffix(suffix) for name in names)

    # ---- what a test asks of the driver of a process

    def free_bytes(self) -> int | None:
        return self.driver.free_bytes()

    def count_of(self, call: str) -> int | None:
        return self.driver.count_of(call)

    def violations(self) -> list[str]:
        return self.driver.violations()

    def close(self) -> None:
        """Ends the worker and gives its memory back. What was offered from it may still be mapped elsewhere: who offers
        ends as a process instead."""
        self.worker.close()
        self.free()


def main() -> None:
    # Whatever else prints must not end up between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    logging.basicConfig(format="prefill: %(message)s", level=logging.WARNING, stream=sys.stderr)
    side = Side(**json.loads(sys.argv[1]))
    print(json.dumps({"value": side.facts()}), file=answers, flush=True)
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            answer = {"value": getattr(side, name)(*arguments)}
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
