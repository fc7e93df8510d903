"""Risk: blocks are said to be complete too early, held blocks are never given back, or a request is reported twice."""

import contextlib
import dataclasses

import pytest

from kvlane.vllm.p2p_options import P2pOptions
from kvlane.vllm.p2p_steps import IDLE, Abort, Extend, Finish, Offer, P2pStep, Progress, Pull, Release, Revoke
from kvlane.vllm.p2p_worker import P2pWorkerHalf, P2pWorkerSettings

DIGEST = bytes(32)
LAYERS = ["a.0", "a.1", "a.2"]


class Native:
    """Notes every call; what it returns is set by the test."""

    port = 14579

    def __init__(self):
        self.calls, self.ended, self.free, self.figures = [], [], [], {}
        self.refuses = set()
        self.waited = None

    def __getattr__(self, name):
        def call(*arguments, readers=1):
            self.calls.append((name, *arguments, *([f"{readers} readers"] if readers > 1 else [])))
            if name in self.refuses:
                raise OSError(name)
            if name == "pull":
                return len(self.calls)
            if name == "released":
                free, self.free = self.free, []
                return free
            if name == "poll":
                ended, self.ended = self.ended, []
                return ended
            return {"wait": self.waited, "stats": self.figures}.get(name)

        return call

    def progress(self, progressed, *stream):
        """One call for all of a step is noted as one for each."""
        self.calls += [("progress", *one, *stream) for one in progressed]
        if "progress" in self.refuses:
            raise OSError("progress")

    def named(self, *names):
        return [call for call in self.calls if call[0] in names]


class Layout:
    layer_count = len(LAYERS)

    def layer_index(self, name):
        return LAYERS.index(name) if name in LAYERS else None


class Clock:
    now_s = 100.0

    def __call__(self):
        return self.now_s


def make(**settings):
    half = P2pWorkerHalf(P2pOptions(transfer_timeout_ms=7000), P2pWorkerSettings(**settings), Clock())
    native = Native()
    half.open(native, Layout())
    return half, native


def run(half, step, layers=LAYERS, save=True):
    half.carry_out(step)
    half.begin_step(step)
    half.start_loads()
    for name in layers:
        half.layer_saved(name)
    if save:
        half.finish_step()
    found = half.finished()
    bad = half.bad_blocks()
    half.end_step()
    return found, bad


def pull(request_id="r", blocks=(4, 5, 6)):
    return Pull(request_id, "k", "10.0.0.1", 14579, 40, DIGEST, 1, list(blocks))


# ---- prefill


def test_orders_are_carried_out_once_in_their_order_before_the_step():
    half, native = make(tp_rank=2, tp_size=4)
    orders = [
        Revoke("old"), Offer("k", 40, DIGEST, [1, 2]), Extend("k", [3]), Finish("done", "r"),
        Release("x", "10.0.0.1", 14579, DIGEST),
    ]  # fmt: skip
    run(half, P2pStep(orders))
    assert native.named("revoke", "offer", "extend", "finish", "release") == [
        ("revoke", "old"), ("offer", "k", 40, DIGEST, [1, 2]), ("extend", "k", [3]), ("finish", "done"),
        ("release", "x", "10.0.0.1", 14581, DIGEST),
    ]  # fmt: skip


def test_layers_are_said_one_by_one_and_blocks_when_all_are_there():
    half, native = make()
    run(half, P2pStep(progress=[Progress("k", 1, 3)]))
    assert native.named("progress") == [
        ("progress", "k", 1, 3, 1), ("progress", "k", 1, 3, 2), ("progress", "k", 3, 3, 0),
    ]  # fmt: skip


def test_a_layer_counts_only_with_those_before_it_and_once():
    half, native = make()
    half.begin_step(P2pStep(progress=[Progress("k", 0, 1)]))
    for name in ("a.1", "a.1", "unknown"):
        half.layer_saved(name)
    assert native.calls == []
    half.layer_saved("a.0")
    assert native.calls == [("progress", "k", 0, 1, 2)]


@pytest.mark.parametrize("save", [True, False])
def test_without_layer_hooks_blocks_are_said_at_the_end_of_the_step(save):
    half, native = make(whole_layers=not save)
    run(half, P2pStep(progress=[Progress("k", 0, 2)]), layers=LAYERS if save else (), save=save)
    assert native.named("progress") == [("progress", "k", 2, 2, 0)]


def test_a_forward_pass_that_failed_completes_nothing():
    """vLLM calls the hooks behind a forward pass also when it raised."""
    half, native = make()
    half.begin_step(P2pStep(progress=[Progress("k", 0, 2)]))
    with contextlib.suppress(ZeroDivisionError):
        try:
            _ = 1 / 0
        finally:
            half.finish_step()
            half.end_step()
    assert native.calls == []


def test_held_blocks_are_given_back_once():
    half, native = make()
    run(half, P2pStep([Finish("k", "r")]))
    assert half.finished() == (None, None)
    native.free = ["k", "unknown"]
    assert half.finished() == ({"r"}, None)
    assert half.finished() == (None, None)


def test_a_revoked_key_gives_its_ended_request_back():
    half, _ = make()
    run(half, P2pStep([Finish("k", "r")]))
    found, _ = run(half, P2pStep([Revoke("k"), Offer("k", 40, DIGEST, [1])]))
    assert found == ({"r"}, None)


def test_a_request_that_cannot_be_held_is_given_back_at_once():
    half, native = make()
    native.refuses = {"finish", "offer"}
    found, _ = run(half, P2pStep([Offer("k", 40, DIGEST, [1]), Finish("k", "r")]))
    assert found == ({"r"}, None)
    unopened = P2pWorkerHalf(P2pOptions(), P2pWorkerSettings())
    unopened.begin_step(P2pStep([Finish("k", "r")]))
    assert unopened.finished() == ({"r"}, None)


def test_an_idle_step_costs_no_call():
    half, native = make()
    run(half, IDLE)
    assert native.calls == []


# ---- decode


def test_a_pull_goes_to_the_worker_of_the_same_rank_and_starts_once():
    half, native = make(tp_rank=1, tp_size=2)
    step = P2pStep(pulls=[pull()])
    half.begin_step(step)
    half.start_loads()
    half.start_loads()
    half.end_step()
    assert native.named("pull") == [("pull", "k", "10.0.0.1", 14580, 40, DIGEST, 1, [4, 5, 6], 7000)]


def test_a_pull_starts_also_if_no_hook_asked_for_it():
    half, native = make()
    half.begin_step(P2pStep(pulls=[pull()]))
    half.end_step()
    assert len(native.named("pull")) == 1


def test_an_ended_pull_is_reported_once_with_its_bad_blocks():
    half, native = make()
    run(half, P2pStep(pulls=[pull()]))
    native.ended = [(1, [0, 2], "timeout"), (99, [0], "whose?")]
    assert half.finished() == (None, {"r"})
    assert half.bad_blocks() == {4, 6}
    assert half.finished() == (None, None)
    assert half.bad_blocks() == set()
    counters = half.take_counters()
    assert (counters["failed_pulls"], counters["failed_timeout"]) == (1, 1)


@pytest.mark.parametrize("opened", [True, False])
def test_a_pull_that_cannot_start_ends_as_failed(opened):
    half, native = make()
    native.refuses = {"pull"}
    if not opened:
        half = P2pWorkerHalf(P2pOptions(), P2pWorkerSettings())
    found, bad = run(half, P2pStep(pulls=[pull()]))
    assert found == (None, {"r"})
    assert bad == {4, 5, 6}


def test_an_aborted_pull_is_cancelled_and_reported_as_received_when_it_ended():
    half, native = make()
    run(half, P2pStep(pulls=[pull()]))
    found, _ = run(half, P2pStep([Abort("r")]))
    assert native.named("cancel", "wait") == [("cancel", 1)]
    assert found == (None, None)
    native.ended = [(1, [0, 1, 2], "cancelled")]
    assert half.finished() == (None, {"r"})
    assert half.bad_blocks() == set()
    run(half, P2pStep([Abort("r")]))
    assert half.finished() == (None, None)


def test_pulls_that_are_aborted_together_are_all_cancelled_before_any_is_waited_for():
    half, native = make(holds_aborted_loads=False)
    run(half, P2pStep(pulls=[pull("r"), pull("s")]))
    run(half, P2pStep([Abort("r"), Abort("s")]))
    calls = [call[:2] for call in native.named("cancel", "wait")]
    assert calls == [("cancel", 1), ("cancel", 2), ("wait", 1), ("wait", 2)]


@pytest.mark.parametrize("ends_at_once", [True, False])
def test_vllm_015_hears_of_an_aborted_pull_as_sent(ends_at_once):
    half, native = make(holds_aborted_loads=False)
    run(half, P2pStep(pulls=[pull()]))
    native.waited = ([0, 1, 2], "cancelled") if ends_at_once else None
    found, _ = run(half, P2pStep([Abort("r")]))
    assert found == (({"r"}, None) if ends_at_once else (None, None))
    if not ends_at_once:
        native.ended = [(1, [0, 1, 2], "cancelled")]
        assert half.finished() == ({"r"}, None)
    found, _ = run(half, P2pStep([Abort("reported before")]))
    assert found == ({"reported before"}, None)


def test_closing_ends_everything_that_vllm_waits_for():
    half, native = make()
    run(half, P2pStep([Finish("k", "held")], pulls=[pull()]))
    half.close()
    half.close()
    assert native.named("close") == [("close",)]
    assert half.finished() == ({"held"}, {"r"})
    assert half.bad_blocks() == {4, 5, 6}


def test_figures_are_asked_for_now_and_then():
    half, native = make()
    native.figures = {"received_bytes": 5}
    assert half.take_counters() == {"received_bytes": 5}
    assert half.take_counters() == {}
    half._clock.now_s += 1
    assert half.take_counters() == {"received_bytes": 5}


# ---- servers of another tensor-parallel size


def spread(ranks, request_id="r", blocks=(4, 5, 6)):
    return dataclasses.replace(pull(request_id, blocks), tensor_ranks=ranks)


def test_one_rank_pulls_from_all_ranks_of_prefill_that_have_its_heads_and_is_done_when_all_are():
    half, native = make(kv_heads=4)
    run(half, P2pStep(pulls=[spread(2)]))
    assert [call[3] for call in native.named("pull")] == [14579, 14580]
    first, second = (native.calls.index(call) + 1 for call in native.named("pull"))
    native.ended = [(second, [], "done")]
    assert half.finished() == (None, None)
    native.ended = [(first, [], "done")]
    assert half.finished() == (None, {"r"})
    assert half.bad_blocks() == set()


def test_two_ranks_tell_the_one_rank_of_prefill_that_there_are_two_of_them():
    for rank in (0, 1):
        half, native = make(tp_rank=rank, tp_size=2, kv_heads=4)
        run(half, P2pStep([Release("x", "10.0.0.1", 14579, DIGEST, 1)], pulls=[spread(1)]))
        assert native.named("release") == [("release", "x", "10.0.0.1", 14579, DIGEST, "2 readers")]
        assert [(call[3], call[-1]) for call in native.named("pull")] == [(14579, "2 readers")]


def test_ranks_of_prefill_that_have_nothing_new_are_told_so():
    half, native = make(kv_heads=None)
    run(half, P2pStep(pulls=[spread(2)]))
    assert [call[3] for call in native.named("pull")] == [14579]
    assert [call[3] for call in native.named("release")] == [14580]


def test_pipeline_stages_find_the_ranks_of_their_stage():
    half, native = make(pp_rank=1, tp_rank=0, tp_size=1, kv_heads=4)
    run(half, P2pStep(pulls=[spread(2)]))
    assert [call[3] for call in native.named("pull")] == [14581, 14582]


def test_a_pull_of_which_one_part_fails_fails_whole_once_the_others_have_ended():
    half, native = make(kv_heads=4)
    run(half, P2pStep(pulls=[spread(2)]))
    first, second = (native.calls.index(call) + 1 for call in native.named("pull"))
    native.ended = [(first, [0, 1, 2], "lapsed")]
    assert half.finished() == (None, None), "the other part may still write the blocks"
    assert native.named("cancel") == [("cancel", second)]
    native.ended = [(second, [0, 1, 2], "cancelled")]
    assert half.finished() == (None, {"r"})
    assert half.bad_blocks() == {4, 5, 6}
    assert half.take_counters()["failed_lapsed"] == 1


def test_a_part_that_cannot_be_begun_ends_those_that_were():
    half, native = make(kv_heads=4)
    begin = native.pull

    def pull_from_the_first_only(*arguments, readers):
        if arguments[2] != 14579:
            raise OSError("no more threads")
        return begin(*arguments, readers=readers)

    native.pull = pull_from_the_first_only
    run(half, P2pStep(pulls=[spread(2)]))
    (cancelled,) = native.named("cancel")
    assert half.finished() == (None, None)
    native.ended = [(cancelled[1], [0, 1, 2], "cancelled")]
    assert half.finished() == (None, {"r"})
    assert half.bad_blocks() == {4, 5, 6}


def test_heads_that_cannot_be_shared_out_evenly_cost_a_recompute():
    half, native = make(kv_heads=6)
    found, bad = run(half, P2pStep(pulls=[spread(4)]))
    assert (found, bad) == ((None, {"r"}), {4, 5, 6})
    assert native.named("pull") == []


def test_an_abort_ends_all_parts():
    half, native = make(kv_heads=4)
    run(half, P2pStep(pulls=[spread(2)]))
    half.carry_out(P2pStep([Abort("r")]))
    assert len(native.named("cancel")) == 2
    half, native = make(kv_heads=4, holds_aborted_loads=False)
    run(half, P2pStep(pulls=[spread(2)]))
    native.waited = ([0, 1, 2], "cancelled")
    half.carry_out(P2pStep([Abort("r")]))
    assert len(native.named("wait")) == 2
    assert half.finished() == ({"r"}, None)
