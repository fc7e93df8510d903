"""Risk: a worker reports a request twice or never (the engine dies or hangs), or reads blocks that vLLM reused."""

import itertools
import types

import pytest

from kvlane import ConfigError, StoreError
from kvlane.vllm import worker
from kvlane.vllm.metadata import LoadJob, Reservation, StepMetadata, StoreJob
from kvlane.vllm.options import Options
from kvlane.vllm.worker import WorkerHalf, WorkerSettings, describe_tensors


class Clock:
    now_s = 100.0

    def __call__(self):
        return self.now_s


LAYERS = {"l.0": 0, "l.1": 1, "shares l.0": 0}


class ScriptedStore:
    """A stand-in for the native worker that records calls and ends jobs when a test says so."""

    def __init__(self):
        self.calls = []
        self.ended = {}
        self._jobs = 0

    def end(self, job, positions=(), reason="done"):
        self.ended[job] = (list(positions), reason)

    def begin_store(self, keys, block_ids, first_depth, timeout_ms, epoch=None):
        if epoch is not None:
            self.calls.append(("epoch", epoch))
        return self._job("begin_store", block_ids)

    def load(self, keys, block_ids, timeout_ms, layer_major=False):
        return self._job("load", block_ids)

    def wait(self, job, timeout_ms):
        self.calls.append(("wait", job))
        return self.ended.pop(job, None)

    def poll(self):
        ended, self.ended = self.ended, {}
        return [(job, *outcome) for job, outcome in ended.items()] or None

    def wait_layer(self, job, layer, timeout_ms):
        self.calls.append(("wait_layer", job, layer))
        return job not in self.ended or not self.ended[job][0]

    def stats(self):
        return {"loaded_bytes": 1.0}

    def __getattr__(self, name):
        return lambda *arguments: self.calls.append((name, *arguments))

    def _job(self, name, block_ids):
        self._jobs += 1
        self.calls.append((name, list(block_ids)))
        return self._jobs


def make(store=None, settings=None, **options):
    half = WorkerHalf(Options(**options), settings or WorkerSettings())
    store = store or ScriptedStore()
    half.open(store, types.SimpleNamespace(layer_index=LAYERS.get))
    return half, store


def load_step(*names, blocks=(4, 5, 6)):
    return StepMetadata(loads=[LoadJob(name, bytes(32 * len(blocks)), list(blocks)) for name in names])


def run(half, step):
    half.begin_step(step)
    half.start_loads()
    half.finish_stores()
    answer = half.finished(), half.bad_blocks()
    half.end_step()
    return answer


IDLE = ((None, None), set())


def test_a_load_is_reported_once_and_only_when_it_ended():
    half, store = make()
    assert run(half, load_step("a")) == IDLE
    assert run(half, StepMetadata()) == IDLE
    store.end(1)
    assert run(half, StepMetadata()) == ((None, {"a"}), set())
    assert run(half, StepMetadata()) == IDLE


def test_loads_end_when_the_tensors_are_replaced_and_are_not_taken_for_the_next_ones():
    half, _ = make()
    run(half, load_step("a"))
    half.close()
    store = ScriptedStore()
    half.open(store, types.SimpleNamespace(layer_index=LAYERS.get))
    assert run(half, load_step("b", blocks=(7,))) == ((None, {"a"}), {4, 5, 6})
    store.end(1)
    assert run(half, StepMetadata()) == ((None, {"b"}), set())


def test_a_second_call_in_a_step_starts_no_second_load():
    half, store = make()
    half.begin_step(load_step("a"))
    half.start_loads()
    half.start_loads()
    assert [call[0] for call in store.calls] == ["load"]


def test_bad_blocks_are_reported_with_the_request():
    half, store = make()
    run(half, load_step("a"))
    store.end(1, [0, 2], "corrupt")
    assert run(half, StepMetadata()) == ((None, {"a"}), {4, 6})
    assert run(half, StepMetadata()) == IDLE


def test_a_refused_load_is_reported_as_failed_at_once():
    class Refusing(ScriptedStore):
        def load(self, *arguments):
            raise StoreError("no")

    half, _ = make(Refusing())
    assert run(half, load_step("a")) == ((None, {"a"}), {4, 5, 6})


def test_an_error_outside_of_the_store_fails_its_load_and_no_other():
    def stream():
        raise RuntimeError("the device is gone")

    half, store = make()
    half.open(store, types.SimpleNamespace(layer_index=LAYERS.get), stream)
    assert run(half, load_step("a", "b")) == ((None, {"a", "b"}), {4, 5, 6})


def test_a_load_without_keys_is_reported_as_failed():
    half, store = make()
    assert run(half, StepMetadata(loads=[LoadJob("a", b"", [4, 5])])) == ((None, {"a"}), {4, 5})
    assert store.calls == []


def test_a_worker_that_is_not_open_fails_loads_and_stores_nothing():
    half = WorkerHalf(Options(), WorkerSettings())
    step = StepMetadata(stores=[StoreJob("b", bytes(32), [1], 0)], loads=[LoadJob("a", bytes(32), [4])])
    assert run(half, step) == ((None, {"a"}), {4})


@pytest.mark.parametrize("positions", [[], [0, 1, 2]])
def test_an_aborted_load_is_reported_once_without_bad_blocks(positions):
    """vLLM 0.16 and newer hold the blocks until the load is reported as received."""
    half, store = make()
    run(half, load_step("a"))
    assert run(half, StepMetadata(aborted_loads=["a"])) == IDLE
    assert ("cancel", 1) in store.calls
    store.end(1, positions, "cancelled")
    assert run(half, StepMetadata()) == ((None, {"a"}), set())
    assert run(half, StepMetadata()) == IDLE


def test_an_abort_behind_the_report_is_not_reported_again():
    half, store = make()
    run(half, load_step("a"))
    store.end(1)
    run(half, StepMetadata())
    assert run(half, StepMetadata(aborted_loads=["a"])) == IDLE


@pytest.mark.parametrize("when", ["running", "ended", "reported"])
def test_vllm_0_15_hears_of_an_aborted_load_once_as_sent(when):
    half, store = make(settings=WorkerSettings(holds_aborted_loads=False))
    run(half, load_step("a"))
    if when != "running":
        store.end(1)
    if when == "reported":
        run(half, StepMetadata())
    answers = [run(half, StepMetadata(aborted_loads=["a"]))]
    if when == "running":
        assert answers == [IDLE]
        store.end(1, [0], "cancelled")
    answers += [run(half, StepMetadata()) for _ in range(3)]
    assert [answer for answer in answers if answer != IDLE] == [(({"a"}, None), set())]


def test_a_request_may_load_again_under_its_old_name():
    half, store = make()
    for job in (1, 2):
        run(half, load_step("a"))
        store.end(job)
        assert run(half, StepMetadata()) == ((None, {"a"}), set())


def test_synchronous_loads_end_before_the_forward_pass():
    class Instant(ScriptedStore):
        def load(self, *arguments):
            job = super().load(*arguments)
            self.end(job, [1] if job == 2 else [])
            return job

    half, store = make(Instant(), sync_load=True)
    half.begin_step(load_step("a", "b"))
    half.start_loads()
    assert [call[0] for call in store.calls] == ["load", "load", "wait", "wait"]
    assert (half.finished(), half.bad_blocks()) == ((None, None), {5})


class Hanging(ScriptedStore):
    """Cancelled loads end after so many waits, as if a copy stood still in the file system until then."""

    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def wait(self, job, timeout_ms):
        self.waits -= 1
        if self.waits == 0:
            self.end(job, [0, 2], "cancelled")
        return super().wait(job, timeout_ms)


@pytest.mark.parametrize("layerwise", [False, True])
def test_a_synchronous_load_that_is_late_is_waited_for_until_no_thread_can_write_its_blocks(layerwise, caplog):
    """Blocks that are reported belong to others at once: a copy that stood still would write into their KV."""
    settings = WorkerSettings(layerwise_load=layerwise)
    half, store = make(Hanging(30), settings, sync_load=True, layerwise_load=layerwise, load_timeout_ms=1)
    assert run(half, load_step("a")) == ((None, None), {4, 6})
    assert [call[0] for call in store.calls] == ["load", "wait", "cancel", *["wait"] * 29]
    held_up = [record for record in caplog.records if "holds up" in record.message]
    assert [record.args[2] for record in held_up] == [5, 65, 125]
    # Whoever reads this has some minutes to act, or the setting to choose.
    assert all("VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS" in record.message for record in held_up)


def test_a_synchronous_load_that_the_store_does_not_know_fails_and_is_not_waited_for():
    class Forgetful(ScriptedStore):
        def wait(self, job, timeout_ms):
            raise StoreError("there is no job 1")

    half, _ = make(Forgetful(), sync_load=True)
    assert run(half, load_step("a")) == ((None, None), {4, 5, 6})


def test_layers_are_waited_for_one_by_one():
    half, store = make(
        settings=WorkerSettings(layerwise_load=True), sync_load=True, layerwise_load=True, load_timeout_ms=60_000
    )
    half.begin_step(load_step("a"))
    half.start_loads()
    half.wait_for_layer("l.0")
    half.wait_for_layer("unknown")
    half.wait_for_layer("l.1")
    assert store.calls[1:] == [("wait_layer", 1, 0), ("wait_layer", 1, 1)]
    store.end(1)
    half.finish_stores()
    assert (half.finished(), half.bad_blocks()) == ((None, None), set())


def test_promises_come_before_stores_and_withdrawals_before_promises():
    half, store = make()
    half.begin_step(StepMetadata([Reservation(b"r", 0, 1)], [b"w"], [StoreJob("a", bytes(32), [1], 0)], [], []))
    assert [call[0] for call in store.calls] == ["withdraw", "reserve", "begin_store"]


def test_stores_are_begun_in_the_epoch_of_their_plan():
    half, store = make()
    half.begin_step(StepMetadata(stores=[StoreJob("a", bytes(32), [1], 0)], epoch=7))
    assert ("epoch", 7) in store.calls


def test_a_layer_leaves_once_also_if_another_shares_its_tensor():
    half, store = make()
    half.begin_step(StepMetadata(stores=[StoreJob("a", bytes(32), [1], 0)]))
    for name in ("l.0", "shares l.0", "l.0", "unknown", "l.1"):
        half.layer_saved(name)
    assert [call for call in store.calls if call[0] == "layer_ready"] == [("layer_ready", 1, 0), ("layer_ready", 1, 1)]


def test_layers_of_split_batches_leave_at_the_end_of_the_step():
    half, store = make(settings=WorkerSettings(whole_layers=False))
    half.begin_step(StepMetadata(stores=[StoreJob("a", bytes(32), [1], 0)]))
    half.layer_saved("l.0")
    half.finish_stores()
    assert [call[0] for call in store.calls] == ["begin_store", "finish_store", "wait", "cancel", "withdraw"]


def test_a_store_that_takes_too_long_is_cancelled_before_the_step_ends():
    half, store = make(store_timeout_ms=1)
    run(half, StepMetadata(stores=[StoreJob("a", bytes(32), [1], 0)]))
    assert store.calls[-2:] == [("cancel", 1), ("withdraw", bytes(32))]
    store.end(1, [0], "cancelled")
    assert run(half, StepMetadata()) == IDLE


def store_step(*blocks):
    keys = b"".join(block.to_bytes(32, "big") for block in blocks)
    return StepMetadata([Reservation(keys, 0, 1)], stores=[StoreJob("a", keys, list(blocks), 0)])


def key(block):
    return block.to_bytes(32, "big")


def test_a_folder_that_hangs_is_asked_less_and_less_often():
    clock = Clock()
    half = WorkerHalf(Options(store_timeout_ms=1000), WorkerSettings(), clock)
    store = ScriptedStore()
    half.open(store, types.SimpleNamespace(layer_index=LAYERS.get))
    asked_at_s = []
    for second in range(1000):
        clock.now_s = 50.0 + second
        before = len(store.calls)
        run(half, store_step(1, 2))
        asked_at_s += [second] * [call[0] for call in store.calls[before:]].count("begin_store")
    pauses_s = [later - earlier for earlier, later in itertools.pairwise(asked_at_s)]
    assert pauses_s == [4, 8, 16, 32, 64] + [100] * 8
    assert half.take_counters()["dropped_blocks"] == 2 * (1000 - len(asked_at_s))
    assert "dropped_blocks" not in half.take_counters()


def test_one_store_in_time_ends_the_pauses():
    clock = Clock()
    half = WorkerHalf(Options(store_timeout_ms=1000), WorkerSettings(), clock)
    store = ScriptedStore()
    half.open(store, types.SimpleNamespace(layer_index=LAYERS.get))
    for second, ends in enumerate([False, True, True, False], start=1):
        clock.now_s += 100
        if ends:
            store.end(second)
        run(half, store_step(1))
    clock.now_s += 10
    run(half, store_step(1))
    assert [call[0] for call in store.calls].count("begin_store") == 5


@pytest.mark.parametrize("outcome", ["late", "refused", "one block failed", "paused"])
def test_promises_that_nobody_keeps_are_withdrawn(outcome):
    """Decode servers would wait for them until their load times out."""

    class Refusing(ScriptedStore):
        def begin_store(self, *arguments):
            raise StoreError("no")

    half, store = make(Refusing() if outcome == "refused" else None, store_timeout_ms=1000)
    if outcome == "one block failed":
        store.end(1, [1], "dropped")
    if outcome == "paused":
        run(half, store_step(9))
    run(half, store_step(1, 2))
    withdrawn = [call[1] for call in store.calls if call[0] == "withdraw"]
    assert withdrawn[-1] == (key(2) if outcome == "one block failed" else key(1) + key(2))
    if outcome == "paused":
        assert ("reserve", key(1) + key(2), 0, 1) not in store.calls


def test_a_store_ends_also_if_the_device_is_gone():
    def stream():
        raise RuntimeError("the device is gone")

    half, store = make(store_timeout_ms=1)
    half.open(store, types.SimpleNamespace(layer_index=LAYERS.get), stream)
    half.begin_step(store_step(1))
    half.layer_saved("l.0")
    half.finish_stores()
    assert ("cancel", 1) in store.calls


def test_stores_are_ended_even_if_the_save_hook_did_not_run():
    half, store = make()
    half.begin_step(StepMetadata(stores=[StoreJob("a", bytes(32), [1], 0)]))
    half.end_step()
    assert ("finish_store", 1) in store.calls
    assert half.step_stores == []


class Knowing(ScriptedStore):
    """Knows, like the native worker, which jobs run or have ended untaken, and refuses all others."""

    def __init__(self):
        super().__init__()
        self.known = set()

    def _job(self, name, block_ids):
        job = super()._job(name, block_ids)
        self.known.add(job)
        return job

    def _check(self, name, job):
        self.calls.append((name, job))
        if job not in self.known:
            raise StoreError(f"there is no job {job}")

    def layer_ready(self, job, layer):
        self._check("layer_ready", job)

    def finish_store(self, job):
        self._check("finish_store", job)

    def wait(self, job, timeout_ms):
        self._check("wait", job)
        self.known -= {job} & set(self.ended)
        return self.ended.pop(job, None)

    def poll(self):
        self.known -= set(self.ended)
        return super().poll()


def run_speculating(half, step, ends=lambda: None, draft_layers=()):
    """The order of hooks with which vLLM runs a step of a server that speculates: it asks, drafts, and then saves."""
    half.begin_step(step)
    half.start_loads()
    ends()
    answer = half.finished(), half.bad_blocks()
    for name in draft_layers:
        half.layer_saved(name)
    half.finish_stores()
    half.end_step()
    return answer


def failures(caplog):
    return [record.message for record in caplog.records if record.levelname in ("WARNING", "ERROR")]


@pytest.mark.parametrize("busy", ["a load runs", "a store was forgotten"])
def test_a_store_that_ended_before_it_was_waited_for_is_not_late(busy, caplog, monkeypatch):
    """All of its blocks were there already, so it ends as soon as it is begun, and a poll meets its end."""
    monkeypatch.setattr(worker, "_logged", set())
    half, store = make(Knowing())
    if busy == "a load runs":
        run_speculating(half, load_step("b"))
    else:
        run_speculating(half, store_step(8))
        half._stores_pause_s = half._stores_pause_until_s = 0.0
    caplog.clear()
    run_speculating(half, store_step(1, 2), lambda: store.end(2, [1], "dropped"), ["l.0"])
    assert failures(caplog) == []
    assert [call[1] for call in store.calls if call[0] == "withdraw"][-1] == key(2)
    assert half._stores_pause_s == 0
    store.end(1)
    run_speculating(half, StepMetadata())
    assert not half._forgotten, "every later step would poll"


def test_a_store_that_nobody_knows_any_more_is_neither_late_nor_remembered(caplog):
    half, store = make(Knowing())
    half.begin_step(store_step(1, 2))
    store.known.clear()
    half.finish_stores()
    assert (half._forgotten, half._stores_pause_s) == (set(), 0)
    assert not any("store_timeout_ms" in line for line in failures(caplog))
    assert store.calls[-2:] == [("cancel", 1), ("withdraw", key(1) + key(2))]


@pytest.mark.parametrize("positions", [[], [1]])
def test_a_layerwise_load_of_a_speculating_server_ends_with_its_own_step(positions):
    """Bad blocks that are reported a step late come behind tokens that were computed from them."""
    settings = WorkerSettings(layerwise_load=True)
    half, store = make(Knowing(), settings, sync_load=True, layerwise_load=True)
    half._forgotten.add(99)  # so that there is something to poll for
    bad = {(4, 5, 6)[position] for position in positions}
    assert run_speculating(half, load_step("a"), lambda: store.end(1, positions)) == ((None, None), bad)
    assert run_speculating(half, StepMetadata()) == IDLE


def test_closing_twice_is_fine():
    half, store = make()
    half.close()
    half.close()
    assert store.calls == [("close",)]


def test_state_tensors_and_devices_that_cannot_be_moved_are_refused_by_layer():
    with pytest.raises(ConfigError, match=r"'mamba\.3' has 2 state tensors"):
        describe_tensors({"mamba.3": [object(), object()]})
    xpu = types.SimpleNamespace(device=types.SimpleNamespace(type="xpu"))
    with pytest.raises(ConfigError, match=r"'l\.0' has its KV cache on .* allowed: cpu, cuda"):
        describe_tensors({"l.0": xpu})
