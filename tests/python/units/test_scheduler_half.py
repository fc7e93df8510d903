"""Risk: a request waits for ever, is given KV it must not use, or KV of a failed load reaches the folder."""

import types

import pytest

from kvlane._native import Chain
from kvlane.vllm.options import Options
from kvlane.vllm.scheduler import SchedulerHalf, SchedulerSettings

BLOCK = 16
PREFILLED = "cmpl-___prefill_addr_10.0.0.1:8000___decode_addr_10.0.0.2:8000_7f-0-89abcdef"


class Folder:
    """A stand-in for the native reader: how many leading blocks are ready and promised."""

    def __init__(self, ready=0, pending=0):
        self.ready, self.pending = ready, pending

    def lookup(self, chain, limit_blocks):
        ready = min(self.ready, limit_blocks)
        return ready, min(self.pending, limit_blocks - ready)

    epoch_now = 7

    def epoch(self):
        return self.epoch_now

    def reset(self):
        self.epoch_now += 1
        return True


class Clock:
    now_s = 100.0

    def __call__(self):
        return self.now_s


def make(folder=None, options=None, **settings):
    clock = Clock()
    values = {"block_tokens": BLOCK, "can_store": False, "can_load": True, **settings}
    half = SchedulerHalf(Options(**(options or {})), SchedulerSettings(**values), clock)
    if folder is not None:
        half.open(folder)
    return half, clock


def request(tokens=100, request_id="r", **changes):
    values = {
        "request_id": request_id, "prompt_token_ids": list(range(tokens)), "num_tokens": tokens, "prompt_embeds": None,
        "pooling_params": None, "lora_request": None, "cache_salt": None, "mm_features": [], "max_tokens": 8,
        "sampling_params": None, "kv_transfer_params": None, "skip_reading_prefix_cache": False,
    }  # fmt: skip
    return types.SimpleNamespace(**{**values, **changes})


def output(new=(), cached=(), preempted=()):
    """`new` and `cached`: (request id, block ids or None, computed tokens, scheduled tokens[, resumed])."""
    news = [types.SimpleNamespace(req_id=r, block_ids=(ids,), num_computed_tokens=c) for r, ids, c, _ in new]
    cached_data = types.SimpleNamespace(
        req_ids=[entry[0] for entry in cached],
        new_block_ids=[None if entry[1] is None else (entry[1],) for entry in cached],
        num_computed_tokens=[entry[2] for entry in cached],
        resumed_req_ids={entry[0] for entry in cached if len(entry) > 4},
    )
    scheduled = {entry[0]: entry[3] for entry in (*new, *cached)}
    return types.SimpleNamespace(
        scheduled_new_reqs=news,
        scheduled_cached_reqs=cached_data,
        num_scheduled_tokens=scheduled,
        preempted_req_ids=set(preempted),
    )


def allocate(half, asked, blocks, tokens):
    half.blocks_allocated(asked, lambda: blocks, tokens)


def keys_of(asked):
    chain = Chain(BLOCK)
    chain.extend(asked.prompt_token_ids)
    return chain.keys(0, chain.block_count)


# ---- hits


@pytest.mark.parametrize(("tokens", "hit"), [(15, 0), (16, 0), (17, 16), (32, 16), (33, 32), (100, 96)])
def test_one_token_is_always_left_to_compute(tokens, hit):
    half, _ = make(Folder(ready=99))
    assert half.matched_tokens(request(tokens), 0) == (hit, hit > 0)


def test_local_blocks_are_not_loaded():
    half, _ = make(Folder(ready=4))
    asked = request()
    assert half.matched_tokens(asked, 32) == (32, True)
    allocate(half, asked, [1, 2, 3, 4, 5, 6], 32)
    (load,) = half.step(output()).loads
    assert (load.block_ids, load.keys) == ([3, 4], keys_of(asked)[64:128])
    assert half.matched_tokens(request(request_id="all local"), 64) == (0, False)


def test_asking_again_changes_nothing():
    half, _ = make(Folder(ready=3))
    assert [half.matched_tokens(request(), 0) for _ in range(3)] == [(48, True)] * 3
    assert half.step(output()).is_idle


def test_synchronous_loading_is_told_to_vllm():
    half, _ = make(Folder(ready=3), {"sync_load": True})
    assert half.matched_tokens(request(), 0) == (48, False)


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt_token_ids": None},
        {"prompt_embeds": object()},
        {"pooling_params": object()},
        {"skip_reading_prefix_cache": True},
        {"sampling_params": types.SimpleNamespace(prompt_logprobs=0)},
    ],
)
def test_requests_that_must_compute_their_prompt_load_nothing(changes):
    half, _ = make(Folder(ready=9))
    assert half.matched_tokens(request(**changes), 0) == (0, False)


def test_a_server_that_only_stores_loads_nothing():
    half, _ = make(Folder(ready=9), can_load=False, can_store=True)
    assert half.matched_tokens(request(), 0) == (0, False)


def test_without_a_reader_nothing_hits_and_the_search_begins():
    half, _ = make()
    begun = []
    half.on_reader_missing = lambda: begun.append(1)
    assert half.matched_tokens(request(), 0) == (0, False)
    assert begun


# ---- waiting


def test_promised_blocks_are_waited_for_until_the_timeout():
    half, clock = make(Folder(ready=2, pending=4), {"load_timeout_ms": 1000})
    assert half.matched_tokens(request(), 0) == (None, False)
    clock.now_s += 0.999
    assert half.matched_tokens(request(), 0) == (None, False)
    clock.now_s += 0.002
    assert half.matched_tokens(request(), 0) == (32, True)


def test_promises_behind_local_blocks_only_are_waited_for():
    half, _ = make(Folder(ready=1, pending=1))
    assert half.matched_tokens(request(), 32) == (0, False)


def test_a_named_prefill_gets_a_short_grace():
    half, clock = make(Folder(), {"prefill_grace_ms": 200})
    assert half.matched_tokens(request(request_id=PREFILLED), 0) == (None, False)
    assert half.matched_tokens(request(request_id="plain"), 0) == (0, False)
    clock.now_s += 0.201
    assert half.matched_tokens(request(request_id=PREFILLED), 0) == (0, False)


def test_the_prefill_itself_does_not_wait_for_itself():
    half, _ = make(Folder(), can_store=True)
    assert half.matched_tokens(request(request_id=PREFILLED, max_tokens=1), 0) == (0, False)
    assert half.matched_tokens(request(request_id=PREFILLED + "0", max_tokens=8), 0) == (None, False)


# ---- failures and ends


def loading(half, name="a", blocks=(1, 2, 3, 4, 5, 6)):
    asked = request(request_id=name)
    found, _ = half.matched_tokens(asked, 0)
    allocate(half, asked, list(blocks), found)
    half.step(output())
    return asked


def test_a_request_whose_load_failed_is_never_claimed_again():
    half, _ = make(Folder(ready=9))
    asked, other = loading(half), loading(half, "b", range(11, 17))
    half.workers_answered(["a", "b"], [], {4})
    assert half.matched_tokens(asked, 0) == (0, False)
    assert half.matched_tokens(other, 0) == (96, True)
    assert half.take_counters()["recomputed_requests"] == 1


def test_failures_of_single_ranks_count_before_the_request_is_done():
    half, _ = make(Folder(ready=9))
    asked = loading(half)
    half.workers_answered([], [], {4})
    half.workers_answered(["a"], [], set())
    assert half.matched_tokens(asked, 0) == (0, False)


@pytest.mark.parametrize("holds", [True, False])
def test_an_abort_while_loading_reaches_the_workers(holds):
    half, _ = make(Folder(ready=9), holds_aborted_loads=holds)
    loading(half)
    assert half.finished("a") is not holds
    assert half.step(output()).aborted_loads == ["a"]
    assert half.step(output()).is_idle


@pytest.mark.parametrize("holds", [True, False])
def test_an_abort_behind_the_load_frees_at_once(holds):
    half, _ = make(Folder(ready=9), holds_aborted_loads=holds)
    loading(half)
    half.workers_answered(["a"], [], set())
    assert half.finished("a") is False
    assert half.step(output()).is_idle


def test_requests_leave_no_state_behind():
    half, _ = make(Folder(ready=9), can_store=True)
    asked = loading(half)
    half.step(output(new=[("a", [1, 2, 3, 4, 5, 6], 96, 4)]))
    half.finished(asked.request_id)
    half.step(output())
    assert (half._requests, half._storing, half._loading) == ({}, {}, {})


# ---- stores


def seen(half, asked, blocks=()):
    half.matched_tokens(asked, 0)
    allocate(half, asked, list(blocks), 0)


def test_chunks_are_stored_as_they_are_computed():
    half, _ = make(can_store=True, can_load=False)
    asked = request(70)
    seen(half, asked)
    keys = keys_of(asked)
    first = half.step(output(new=[("r", [7, 8], 0, 30)]))
    assert [(r.keys, r.first_depth) for r in first.reservations] == [(keys, 0)]
    assert [(s.keys, s.block_ids, s.first_depth) for s in first.stores] == [(keys[:32], [7], 0)]
    second = half.step(output(cached=[("r", [9, 3], 30, 30)]))
    assert [(s.keys, s.block_ids, s.first_depth) for s in second.stores] == [(keys[32:96], [8, 9], 1)]
    assert second.reservations == []
    third = half.step(output(cached=[("r", [5], 60, 10)]))
    assert [(s.keys, s.block_ids, s.first_depth) for s in third.stores] == [(keys[96:], [3], 3)]
    assert half.step(output(cached=[("r", None, 70, 1)])).is_idle


def test_only_prompts_are_stored():
    half, _ = make(can_store=True, can_load=False)
    seen(half, request(20))
    assert len(half.step(output(new=[("r", [7, 8], 0, 20)])).stores[0].block_ids) == 1
    assert half.step(output(cached=[("r", [9], 20, 40)])).is_idle


def test_a_resumed_request_goes_on_with_its_new_blocks():
    half, _ = make(can_store=True, can_load=False)
    asked = request(64)
    seen(half, asked)
    half.step(output(new=[("r", [1, 2], 0, 32)]))
    withdrawn = half.step(output(preempted=["r"]))
    assert withdrawn.withdrawals == [keys_of(asked)[64:]]
    resumed = half.step(output(cached=[("r", [5, 6, 7, 8], 16, 48, True)]))
    assert [(s.block_ids, s.first_depth) for s in resumed.stores] == [([7, 8], 2)]
    assert len(resumed.reservations) == 1


def test_an_abort_withdraws_what_was_promised():
    half, _ = make(can_store=True, can_load=False)
    asked = request(64)
    seen(half, asked)
    half.step(output(new=[("r", [1], 0, 16)]))
    assert half.finished("r") is False
    assert half.step(output()).withdrawals == [keys_of(asked)[32:]]


def test_long_prefills_renew_their_promise():
    half, clock = make(can_store=True, can_load=False)
    seen(half, request(64))
    half.step(output(new=[("r", [1], 0, 16)]))
    clock.now_s += 25
    assert len(half.step(output(cached=[("r", [2], 16, 16)])).reservations) == 1


def test_an_error_in_planning_stores_costs_the_stores_and_no_load():
    half, _ = make(Folder(ready=9), can_store=True)
    seen(half, request(64, "stores"))
    half.step(output(new=[("stores", [7], 0, 16)]))
    for name in ("a", "b"):
        asked = request(request_id=name)
        allocate(half, asked, [1, 2, 3, 4, 5, 6], half.matched_tokens(asked, 0)[0])
        unlike_vllm = output(cached=[("stores", [8], 16, 16)])
        del unlike_vllm.scheduled_cached_reqs.new_block_ids
        step = half.step(unlike_vllm)
        assert [load.request_id for load in step.loads] == [name]
        assert len(step.withdrawals) == (1 if name == "a" else 0)
    assert half._storing == {}


def test_null_blocks_are_never_stored():
    half, _ = make(can_store=True, can_load=False)
    seen(half, request(64))
    step = half.step(output(new=[("r", [0, 2, 3, 4], 16, 48)]))
    assert step.stores == []
    assert len(step.withdrawals) == 1


def test_nothing_is_stored_while_a_synchronous_load_may_still_fail():
    """Blocks computed in that step, and in steps planned before its result, may hold KV that depends on bad blocks."""
    half, _ = make(Folder(ready=2), {"sync_load": True}, can_store=True, batches_in_flight=2)
    asked = request(64)
    found, _ = half.matched_tokens(asked, 0)
    allocate(half, asked, [1, 2, 3, 4], found)
    other = request(64, "other")
    seen(half, other, [5, 6, 7, 8])
    steps = [half.step(output(new=[("r", [1, 2, 3, 4], 32, 32), ("other", [5, 6, 7, 8], 0, 64)]))]
    steps += [half.step(output(cached=[("r", None, 64 + i, 1), ("other", None, 64 + i, 1)])) for i in range(4)]
    assert [len(step.stores) for step in steps] == [0, 0, 0, 2, 0]


def test_nothing_is_stored_while_another_connectors_synchronous_load_may_still_fail():
    half, _ = make(can_store=True, can_load=False, batches_in_flight=2)
    seen(half, request(64))
    first = output(new=[("r", [1, 2, 3, 4], 32, 16)])
    first.has_sync_kv_loads = True
    steps = [half.step(first)] + [half.step(output(cached=[("r", None, 48, 16)])) for _ in range(3)]
    assert [len(step.stores) for step in steps] == [0, 0, 0, 1]


@pytest.mark.parametrize("resumed", [False, True])
def test_a_synchronous_load_that_vllm_does_not_announce_is_seen_by_its_tokens(resumed):
    half, _ = make(can_store=True, can_load=False, batches_in_flight=2, siblings_are_silent=True)
    asked = request(64)
    half.matched_tokens(asked, 16)  # vLLM itself has one block
    allocate(half, asked, [], 0)
    first = output(new=[("r", [1, 2, 3, 4], 16, 16)])
    assert len(half.step(first).stores) == 1
    if resumed:
        later = output(cached=[("r", [5, 6, 7, 8], 48, 16, True)])
    else:
        half.matched_tokens(request(64, "s"), 0)
        later = output(new=[("s", [5, 6, 7, 8], 48, 16)])
    assert half.step(later).stores == []


@pytest.mark.parametrize("resumed", [False, True])
def test_stores_go_on_beside_another_connectors_asynchronous_loads(resumed):
    half, _ = make(can_store=True, can_load=False, batches_in_flight=2, siblings_are_silent=True)
    asked = request(64)
    if resumed:
        half.matched_tokens(asked, 0)
        allocate(half, asked, [], 0)
        half.step(output(new=[("r", [1], 0, 8)]))
        half.step(output(preempted=["r"]))
    half.matched_tokens(asked, 0)
    allocate(half, asked, [], 0)
    half.step(output())  # it waits for its load
    started = ("r", [5, 6, 7, 8], 48, 16)
    step = half.step(output(cached=[(*started, True)]) if resumed else output(new=[started]))
    assert [len(job.block_ids) for job in step.stores] == [4]


def test_a_start_counts_as_asynchronous_only_if_its_own_question_is_from_an_earlier_step():
    """Asked in vain first, or asked before an earlier start: the load behind this start may still fail."""
    half, _ = make(can_store=True, can_load=False, batches_in_flight=2, siblings_are_silent=True)
    asked = request(64)
    half.matched_tokens(asked, 0)  # there were no free blocks
    half.step(output())
    half.matched_tokens(asked, 0)
    allocate(half, asked, [], 0)
    assert half.step(output(new=[("r", [5, 6, 7, 8], 48, 16)])).stores == []
    for _ in range(4):
        half.step(output(preempted=["r"]))
    assert half.step(output(cached=[("r", [5, 6, 7, 8], 48, 16, True)])).stores == []


def test_steps_that_store_nothing_for_now_promise_nothing():
    half, _ = make(can_store=True, can_load=False, batches_in_flight=2)
    seen(half, request(64))
    first = output(new=[("r", [1, 2, 3, 4], 32, 16)])
    first.has_sync_kv_loads = True
    steps = [half.step(first)] + [half.step(output(cached=[("r", None, 48, 16)])) for _ in range(3)]
    assert [len(step.reservations) for step in steps] == [0, 0, 0, 1]


def test_own_loads_and_local_blocks_are_nobody_elses():
    half, _ = make(Folder(ready=4), can_store=True, siblings_are_silent=True)
    asked = request(100)
    found, _ = half.matched_tokens(asked, 16)
    allocate(half, asked, [1, 2, 3, 4, 5, 6], found)
    half.step(output())
    half.workers_answered(["r"], [], set())
    assert len(half.step(output(new=[("r", [1, 2, 3, 4, 5, 6, 7], 64, 36)])).stores) == 1


def test_a_reset_stops_running_prompts_from_being_stored():
    half, _ = make(can_store=True, can_load=False)
    seen(half, request(64))
    half.step(output(new=[("r", [1], 0, 16)]))
    half.reset()
    step = half.step(output(cached=[("r", [2, 3, 4], 16, 48)]))
    assert step.stores == []
    assert len(step.withdrawals) == 1


def test_a_reset_before_the_reader_is_there_is_made_up_for_before_the_first_lookup():
    asked = []
    folder = Folder(ready=4)
    half, _ = make(can_store=True)
    half.on_reader_missing = lambda: asked.append(True)
    assert half.reset() is False
    assert asked
    seen(half, request(64))
    assert half.step(output(new=[("r", [1], 0, 16)])).stores == [], "would outlive the reset"
    half.open(folder)
    assert folder.epoch() == 8
    assert [job.first_depth for job in half.step(output(cached=[("r", [2], 16, 16)])).stores] == [0]
    half.open(folder)
    assert folder.epoch() == 8, "a reset counts once"


def test_a_reset_that_the_folder_did_not_take_is_repeated_on_its_reader():
    folder, reader = Folder(), Folder()
    folder.reset = lambda: False
    half, _ = make(can_store=True)
    half.open_folder(folder)
    assert half.reset() is False
    half.open(reader)
    assert reader.epoch() == 8


def test_a_server_without_namespaces_resets_the_folder_and_stores_for_its_epoch():
    folder = Folder(ready=4)
    half, _ = make(can_store=True)
    half.open_folder(folder)
    asked = request(64)
    assert half.matched_tokens(asked, 0) == (0, False)
    seen(half, asked)
    planned = half.step(output(new=[("r", [1], 0, 16)]))
    assert half.reset() is True
    assert (planned.epoch, folder.epoch()) == (7, 8)


def test_a_server_that_only_stores_looks_for_its_workers_descriptors_too():
    asked = []
    half, _ = make(can_store=True, can_load=False)
    half.on_reader_missing = lambda: asked.append(True)
    half.matched_tokens(request(64), 0)
    assert asked


def test_stores_name_the_epoch_for_which_they_were_planned():
    folder = Folder()
    half, _ = make(folder, can_store=True)
    seen(half, request(64))
    planned = half.step(output(new=[("r", [1], 0, 16)]))
    assert half.reset() is True
    assert (planned.epoch, folder.epoch()) == (7, 8)


def test_what_was_loaded_before_a_reset_is_not_stored_after_it():
    half, _ = make(Folder(ready=4), can_store=True)
    asked = request(100)
    allocate(half, asked, [1, 2, 3, 4, 5, 6], half.matched_tokens(asked, 0)[0])
    half.step(output())
    half.reset()
    half.workers_answered(["r"], [], set())
    assert half.step(output(new=[("r", [1, 2, 3, 4, 5, 6, 7], 64, 36)])).is_idle


def test_a_reset_without_a_folder_does_not_claim_to_have_worked():
    half, _ = make(can_store=True, can_load=False)
    begun = []
    half.on_reader_missing = lambda: begun.append(1)
    assert half.reset() is False
    assert begun


def test_hits_and_misses_are_counted_once_per_request():
    half, _ = make(Folder(ready=4))
    asked = loading(half)
    allocate(half, asked, [1, 2, 3, 4, 5, 6], 0)
    assert half.take_counters() == {"hit_blocks": 4, "miss_blocks_absent": 2}
    assert half.take_counters() == {}


# ---- room for somebody to compute (vLLM versions that do not see to it)


def test_loads_start_only_while_all_holders_of_blocks_fit_together():
    half, clock = make(Folder(ready=9), {"load_timeout_ms": 1000}, parking_blocks=18)
    loading(half, "a")  # 100 tokens: 8 blocks with its next ones
    loading(half, "b")
    third = request(request_id="c")
    assert half.matched_tokens(third, 0) == (None, False)
    half.finished("b")
    assert half.matched_tokens(third, 0) == (96, True)
    loading(half, "c")
    half.matched_tokens(request(request_id="d"), 0)
    clock.now_s += 2
    assert half.matched_tokens(request(request_id="d"), 0) == (0, False)


def test_a_single_load_always_fits():
    half, _ = make(Folder(ready=9), parking_blocks=4)
    assert half.matched_tokens(request(), 0) == (96, True)


def test_running_requests_count_as_long_as_they_hold_blocks():
    half, _ = make(Folder(ready=9), parking_blocks=12)
    loading(half, "a")
    half.workers_answered(["a"], [], set())
    half.step(output(new=[("a", [1, 2, 3, 4, 5, 6, 7], 96, 4)]))
    assert half.matched_tokens(request(request_id="b"), 0) == (None, False)
    half.step(output(preempted=["a"]))
    assert half.matched_tokens(request(request_id="b"), 0) == (96, True)


def test_nobody_passes_a_loaded_request_that_waits_to_start():
    half, _ = make(Folder(ready=9), parking_blocks=1000)
    loading(half, "a")
    half.workers_answered(["a"], [], set())
    plain = request(request_id="b", prompt_token_ids=None)
    assert half.matched_tokens(plain, 0) == (None, False)
    half.step(output(new=[("a", [1, 2, 3, 4, 5, 6, 7], 96, 4)]))
    assert half.matched_tokens(plain, 0) == (0, False)


def test_a_failed_load_that_lost_its_blocks_waits_for_nobody():
    half, _ = make(Folder(ready=9), parking_blocks=1000)
    asked = loading(half, "a")
    half.workers_answered(["a"], [], {1})
    assert half.matched_tokens(asked, 0) == (0, False)
    assert half.matched_tokens(request(request_id="b"), 0) == (96, True)


# ---- synchronous loads that turn out bad when their request is gone


class Pool:
    """A stand-in for vLLM's block pool."""

    def __init__(self):
        self.blocks = [None] * 20
        self.evicted = set()

    def evict_blocks(self, block_ids):
        self.evicted |= block_ids


def loading_synchronously():
    half, _ = make(Folder(ready=4), {"sync_load": True}, batches_in_flight=2)
    pool = Pool()
    half.find_prefix_cache(lambda: pool)
    asked = request(80)
    found, _ = half.matched_tokens(asked, 0)
    allocate(half, asked, [1, 2, 3, 4, 5], found)
    half.step(output(new=[("r", [1, 2, 3, 4, 5], 64, 16)]))
    return half, pool, asked


def test_what_was_computed_from_a_bad_block_is_evicted_with_it():
    half, pool, _ = loading_synchronously()
    half.finished("r", [1, 2, 3, 4, 5])
    half.finished("another's prefix hit it", [1, 2, 3, 9])
    half.finished("unconcerned", [1, 2, 8])
    half.workers_answered([], [], {3})
    assert pool.evicted == {3, 4, 5, 9}


def test_a_preemption_before_the_outcome_costs_the_whole_prefix_cache():
    half, pool, asked = loading_synchronously()
    asked.num_stale_output_tokens, asked.drop_stale_output = 1, False
    half.step(output(preempted=["r"]))
    assert asked.drop_stale_output
    half.workers_answered([], [], {3})
    assert pool.evicted == set(range(20))
    assert half.matched_tokens(asked, 0) == (0, False)


def test_nothing_is_evicted_while_vllm_still_sees_the_request():
    half, pool, _ = loading_synchronously()
    half.workers_answered([], [], {3})
    assert pool.evicted == set()


def test_bad_blocks_of_others_do_not_count_once_the_outcome_is_known():
    """The request goes on for a long time; its blocks may then be another's, and the other's load may fail."""
    half, pool, asked = loading_synchronously()
    for _ in range(3):
        half.step(output(cached=[("r", None, 80, 1)]))
    half.finished("somebody", [3])
    half.workers_answered([], [], {3})
    assert pool.evicted == set()
    assert half.matched_tokens(asked, 0) == (64, False)


@pytest.mark.parametrize(
    ("folder", "parking_blocks", "reason"),
    [
        (Folder(), None, "absent"),
        (Folder(pending=6), None, "timeout"),
        (None, None, "not_open"),
        (Folder(ready=6), 9, "no_room"),
    ],
)
def test_misses_are_counted_by_reason(folder, parking_blocks, reason):
    half, clock = make(folder, {"load_timeout_ms": 1000}, parking_blocks=parking_blocks)
    if parking_blocks is not None:
        loading(half, "holds the blocks")
        half.take_counters()
    asked = request()
    half.matched_tokens(asked, 0)
    clock.now_s += 2
    assert half.matched_tokens(asked, 0) == (0, False)
    allocate(half, asked, [], 0)
    assert half.take_counters() == {f"miss_blocks_{reason}": 6}
