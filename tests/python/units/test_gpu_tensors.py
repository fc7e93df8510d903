"""KV on a GPU, as far as it goes without one. Risk: KV of a step that has not run yet is taken for computed; an engine
dies where no CUDA driver is."""

import os
import subprocess
import sys
import types

import pytest

from kvlane import ConfigError
from kvlane._native import FsWorker, Layout
from kvlane.vllm.metadata import LoadJob, StepMetadata, StoreJob
from kvlane.vllm.options import Options
from kvlane.vllm.p2p_options import P2pOptions
from kvlane.vllm.p2p_steps import P2pStep, Progress
from kvlane.vllm.p2p_worker import P2pWorkerHalf, P2pWorkerSettings
from kvlane.vllm.worker import WorkerHalf, WorkerSettings, compute_stream, describe_tensors
from test_p2p_worker_half import Layout as P2pLayout
from test_p2p_worker_half import Native, pull, run
from test_worker_half import LAYERS, ScriptedStore


class OrderedStore(ScriptedStore):
    """Takes the stream of a load, too."""

    def load(self, keys, block_ids, timeout_ms, layer_major=False, stream=None):
        self.calls.append(("load behind", stream))
        return self._job("load", block_ids)


def tensor(index=0, address=0x7F00_0000_0000):
    """A tensor of 4 blocks with 256 bytes each, described as torch does; nobody reads it."""
    device = types.SimpleNamespace(type="cuda", index=index)
    return types.SimpleNamespace(
        device=device,
        shape=(4, 128),
        stride=lambda: (128, 1),
        data_ptr=lambda: address,
        element_size=lambda: 2,
    )


def test_tensors_on_a_gpu_are_described_with_their_device():
    described = describe_tensors({"l.0": tensor(index=3)})
    assert described == [("l.0", 0x7F00_0000_0000, "cuda:3", 2, [4, 128], [128, 1])]


OPENING = """
import ctypes, sys
from kvlane._native import ConfigError, FsWorker, Layout
layout = Layout([("l.0", 0x7F00_0000_0000, "cuda:0", 2, [4, 128], [128, 1])], 4)
try:
    FsWorker(sys.argv[1], bytes(32), layout, None, {})
except ConfigError as refusal:
    print(refusal)
try:
    ctypes.CDLL("libcuda.so.1")
except OSError as error:
    print(error)
"""


def test_without_a_driver_opening_names_the_library_and_creates_nothing(tmp_path):
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    for name in ("libcuda.so.1", "libcuda.so"):
        # The loader takes the first file of a name, and this one is no library: as if the machine had no driver.
        (hidden / name).write_bytes(b"no library" * 1000)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(hidden)}
    refusal, premise = subprocess.run(
        [sys.executable, "-c", OPENING, str(tmp_path / "kv")],
        check=True, capture_output=True, text=True, timeout=60, env=environment,
    ).stdout.splitlines()  # fmt: skip
    assert "libcuda.so.1" in refusal
    assert str(hidden) in premise, "the loader took the machine's own driver"
    assert not (tmp_path / "kv").exists()


def test_tensors_on_two_devices_are_refused_by_layer(tmp_path):
    tensors = {"l.0": tensor(0), "l.1": tensor(1, address=0x7F80_0000_0000)}
    layout = Layout(describe_tensors(tensors), 4)
    with pytest.raises(ConfigError, match=r"'l\.1' is on Cuda\(1\)"):
        FsWorker(str(tmp_path / "kv"), bytes(32), layout, None, {})


def test_every_permission_to_copy_carries_the_compute_stream_of_its_moment():
    half = WorkerHalf(Options(), WorkerSettings())
    store = OrderedStore()
    streams = iter(range(1000, 2000))
    half.open(store, types.SimpleNamespace(layer_index=LAYERS.get), lambda: (next(streams),))
    stored = StoreJob("a", b"k" * 32, [1], 0)
    loaded = LoadJob("b", b"k" * 32, [2])
    half.begin_step(StepMetadata(stores=[stored], loads=[loaded]))
    half.start_loads()
    half.layer_saved("l.0")
    store.end(1)
    half.finish_stores()
    assert ("load behind", 1000) in store.calls
    assert ("layer_ready", 1, 0, 1001) in store.calls
    assert ("finish_store", 1, 1002) in store.calls


def test_every_word_of_the_p2p_worker_carries_the_compute_stream_of_its_moment():
    half = P2pWorkerHalf(P2pOptions(transfer_timeout_ms=7000), P2pWorkerSettings())
    native = Native()
    streams = iter(range(1000, 2000))
    half.open(native, P2pLayout(), lambda: (next(streams),))
    run(half, P2pStep(progress=[Progress("k", 0, 2)], pulls=[pull()]))
    *_, pulled_behind = native.named("pull")[0]
    assert pulled_behind == 1000
    assert native.named("progress") == [
        ("progress", "k", 0, 2, 1, 1001), ("progress", "k", 0, 2, 2, 1002), ("progress", "k", 2, 2, 0, 1003),
    ]  # fmt: skip


def test_tensors_in_host_memory_need_no_stream():
    cpu = types.SimpleNamespace(device=types.SimpleNamespace(type="cpu"))
    assert compute_stream({"l.0": cpu})() == ()
