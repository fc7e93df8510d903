"""Prompts that decode finds in prefill's memory. Risk: blocks that prefill has taken back are used, a prefill server
that does not run keeps decode waiting, or what nobody asked for is never given back."""

import time

import pytest

from p2p_worker_process import BLOCK_TOKENS, PrefillProcess, WorkerOfCache, content_of
from support.processes import stopped

#: Keys of what `connected` pulls.
FIRST = ["first", "second"]
#: For pulls that end in time, and for those that cannot.
PATIENT_MS, TIMEOUT_MS = 60_000, 1500
#: Within this the latter end, whatever the machine does: far from the former's deadline.
SOON_S = 15


@pytest.fixture
def prefill():
    with PrefillProcess() as process:
        yield process


def pull(decode, prefill, key, blocks, targets, first_block=0, timeout_ms=PATIENT_MS):
    return decode.worker.pull(
        key, "127.0.0.1", prefill.port, blocks * BLOCK_TOKENS, bytes(32), first_block, targets, timeout_ms
    )


def outcome(decode, job, limit_s=PATIENT_MS / 1000):
    started_s = time.monotonic()
    ended = decode.worker.wait(job, PATIENT_MS)
    assert ended is not None, "a pull without an end"
    assert time.monotonic() - started_s <= limit_s
    return ended[1]


def connected(prefill, lane="auto"):
    """A decode worker that has pulled twice, so that it knows prefill, and over tcp has asked for the data connection
    over which small prompts are taken."""
    decode = WorkerOfCache(can_offer=False, lane=lane)
    for key in FIRST:
        assert prefill.tell("offer", key, 1) == "ok"
        assert outcome(decode, pull(decode, prefill, key, 1, [0])) == "done"
    time.sleep(0.2)  # for that connection; without it the tests hold as well
    return decode


def released(prefill, keys):
    deadline, found = time.monotonic() + 10, []
    while sorted(found) != sorted(keys):
        assert time.monotonic() < deadline, found
        found += prefill.tell("released", "-").split()
        time.sleep(0.005)


def test_a_posted_prompt_arrives_while_prefill_does_not_run_and_is_given_back_when_it_does(prefill):
    decode = connected(prefill)
    prefill.tell("offer", "whole", 3, 4, 5)
    prefill.tell("offer", "tail", 6, 7, 8)
    prefill.tell("begin", "begun", 9)
    with stopped(prefill.process.pid):
        assert outcome(decode, pull(decode, prefill, "whole", 3, [10, 11, 12])) == "done"
        assert outcome(decode, pull(decode, prefill, "tail", 3, [13], first_block=2)) == "done"
        assert outcome(decode, pull(decode, prefill, "begun", 1, [14], timeout_ms=TIMEOUT_MS), SOON_S) == "timeout"
    assert [decode.block(target) for target in (10, 11, 12, 13)] == [content_of(block) for block in (3, 4, 5, 8)]
    released(prefill, [*FIRST, "whole", "tail"])
    decode.worker.close()


def test_over_tcp_a_stopped_prefill_costs_the_deadline_and_its_late_answer_is_written_nowhere(prefill):
    decode = connected(prefill, lane="tcp")
    for target in (10, 11):  # the first one ends it
        prefill.tell("offer", f"whole-{target}", 3)
        nothing = decode.block(target)
        with stopped(prefill.process.pid):
            job = pull(decode, prefill, f"whole-{target}", 1, [target], timeout_ms=TIMEOUT_MS)
            assert outcome(decode, job, SOON_S) == "timeout"
        time.sleep(0.1)
        assert decode.block(target) == nothing
    prefill.tell("offer", "next", 4)
    assert outcome(decode, pull(decode, prefill, "next", 1, [12])) == "done"
    assert decode.block(12) == content_of(4)
    decode.worker.close()


@pytest.mark.parametrize("lane", ["auto", "tcp"])
def test_blocks_that_prefill_took_back_are_never_used(prefill, lane):
    decode = connected(prefill, lane)
    prefill.tell("offer", "whole", 3)
    prefill.tell("revoke", "whole")
    assert outcome(decode, pull(decode, prefill, "whole", 1, [10], timeout_ms=TIMEOUT_MS), SOON_S) != "done"
    # The place of the lease is taken again, by a prompt in other blocks.
    prefill.tell("offer", "next", 4)
    assert outcome(decode, pull(decode, prefill, "whole", 1, [10], timeout_ms=TIMEOUT_MS), SOON_S) != "done"
    assert outcome(decode, pull(decode, prefill, "next", 1, [11])) == "done"
    assert decode.block(11) == content_of(4)
    decode.worker.close()


@pytest.mark.parametrize("lane", ["auto", "tcp"])
def test_a_key_that_is_offered_again_gives_the_new_blocks(prefill, lane):
    decode = connected(prefill, lane)
    for block in (3, 4, 5):
        prefill.tell("offer", "again", block)
        assert outcome(decode, pull(decode, prefill, "again", 1, [10])) == "done"
        assert decode.block(10) == content_of(block)
    decode.worker.close()
