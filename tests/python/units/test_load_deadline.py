"""Risk: a request waits for its prefill and then as long again for its load, twice what the operator allowed."""

import types

import pytest

from kvlane.vllm.metadata import LoadJob, StepMetadata
from kvlane.vllm.options import Options
from kvlane.vllm.worker import FENCE_MS, WorkerHalf, WorkerSettings
from test_scheduler_half import BLOCK, PREFILLED, Folder, allocate, make, output, request
from test_worker_half import ScriptedStore

TIMEOUT_MS = 1000
BLOCKS = 3


class TimedStore(ScriptedStore):
    """Loads last until somebody gives up on them, and remember how long they may take."""

    def __init__(self, clock):
        super().__init__()
        self.clock = clock
        self.timeouts_ms = []

    def load(self, keys, block_ids, timeout_ms, layer_major=False):
        self.timeouts_ms.append(timeout_ms)
        return super().load(keys, block_ids, timeout_ms, layer_major)

    def wait(self, job, timeout_ms):
        self.clock.now_s += timeout_ms / 1000
        if ("cancel", job) in self.calls:
            self.end(job, [0], "cancelled")
        return super().wait(job, timeout_ms)


def halves(folder, **options):
    options = {"load_timeout_ms": TIMEOUT_MS, **options}
    scheduler, clock = make(folder, options)
    worker, store = WorkerHalf(Options(**options), WorkerSettings(), clock), TimedStore(clock)
    worker.open(store, types.SimpleNamespace(layer_index={}.get))
    return scheduler, worker, store, clock


def ask_until_answered(scheduler, clock, asked, step_s=0.125, until_s=None, then=lambda: None):
    """vLLM asks in every step; after `until_s`, `then` happens. Returns the tokens that the request may load."""
    start_s = clock.now_s
    while (found := scheduler.matched_tokens(asked, 0)[0]) is None:
        clock.now_s += step_s
        if until_s is not None and clock.now_s - start_s >= until_s:
            then()
    return found


def load(scheduler, worker, asked, found):
    allocate(scheduler, asked, list(range(1, 8)), found)
    worker.begin_step(scheduler.step(output()))
    worker.start_loads()


@pytest.mark.parametrize("sync_load", [False, True])
def test_the_wait_for_the_prefill_and_the_load_share_one_deadline(sync_load):
    folder = Folder(ready=0, pending=BLOCKS)
    scheduler, worker, store, clock = halves(folder, sync_load=sync_load)
    asked = request(BLOCKS * BLOCK + 1)
    began_s = clock.now_s
    found = ask_until_answered(scheduler, clock, asked, until_s=0.625, then=lambda: vars(folder).update(ready=BLOCKS))
    assert found == BLOCKS * BLOCK
    load(scheduler, worker, asked, found)
    assert store.timeouts_ms == [375]
    if sync_load:
        # The load never ended by itself, and was given up when the second had passed.
        assert [call[0] for call in store.calls] == ["load", "wait", "cancel", "wait"]
        assert worker.bad_blocks() == {1}
        assert clock.now_s - began_s <= TIMEOUT_MS / 1000 + FENCE_MS / 1000


def test_a_load_behind_a_wait_that_took_all_of_the_time_gets_a_tenth():
    scheduler, worker, store, clock = halves(Folder(ready=2, pending=1))
    asked = request(BLOCKS * BLOCK + 1)
    load(scheduler, worker, asked, ask_until_answered(scheduler, clock, asked))
    assert store.timeouts_ms == [TIMEOUT_MS // 10]


def test_the_grace_for_a_prefill_counts_as_well():
    scheduler, worker, store, clock = halves(Folder(ready=2), prefill_grace_ms=250)
    asked = request(BLOCKS * BLOCK + 1, PREFILLED)
    load(scheduler, worker, asked, ask_until_answered(scheduler, clock, asked))
    assert store.timeouts_ms == [750]


def test_time_in_vllms_own_queue_takes_nothing_from_the_load():
    scheduler, worker, store, clock = halves(Folder(ready=BLOCKS))
    asked = request(BLOCKS * BLOCK + 1)
    for _ in range(100):  # there is something to load, and no room for the request yet
        assert scheduler.matched_tokens(asked, 0) == (BLOCKS * BLOCK, True)
        clock.now_s += 1
    load(scheduler, worker, asked, BLOCKS * BLOCK)
    assert store.timeouts_ms == [TIMEOUT_MS]


def test_time_in_vllms_own_queue_behind_a_wait_takes_no_more_than_a_step_from_the_load():
    folder = Folder(ready=0, pending=BLOCKS)
    scheduler, worker, store, clock = halves(folder)
    asked = request(BLOCKS * BLOCK + 1)
    assert scheduler.matched_tokens(asked, 0) == (None, False)
    folder.ready = BLOCKS
    clock.now_s += 30  # vLLM has no room for another request
    assert scheduler.matched_tokens(asked, 0) == (BLOCKS * BLOCK, True)
    load(scheduler, worker, asked, BLOCKS * BLOCK)
    assert store.timeouts_ms == [750]


def test_a_load_after_a_preemption_has_all_of_the_time():
    folder = Folder(ready=0, pending=BLOCKS)
    scheduler, worker, store, clock = halves(folder)
    asked = request(BLOCKS * BLOCK + 1)
    found = ask_until_answered(scheduler, clock, asked, until_s=0.625, then=lambda: vars(folder).update(ready=BLOCKS))
    load(scheduler, worker, asked, found)
    scheduler.workers_answered({"r"}, (), set())
    clock.now_s += 60
    load(scheduler, worker, asked, ask_until_answered(scheduler, clock, asked))
    assert store.timeouts_ms == [375, TIMEOUT_MS]


def test_a_load_that_names_no_time_gets_load_timeout_ms():
    _, worker, store, _ = halves(Folder())
    worker.begin_step(StepMetadata(loads=[LoadJob("a", bytes(32), [1])]))
    worker.start_loads()
    assert store.timeouts_ms == [TIMEOUT_MS]
