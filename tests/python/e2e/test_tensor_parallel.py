"""Risk: ranks read each other's KV. Each holds other heads of the same tokens, so the text would be wrong."""

import os

import pytest
import vllm

from conftest import ask, expected_external
from p2p_pair import PATIENT, expected_whole, proxys_id
from settings import BLOCK_TOKENS, PATIENT_FS, engine_settings
from support.connector import p2p_config, transfer_config
from support.metrics import EXTERNAL_HITS
from support.outcome import assert_same
from support.servers import free_port_row

TWO_RANKS = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
# Three times two ranks on two cores.
pytestmark = pytest.mark.timeout(900)

newest_only = pytest.mark.skipif(
    vllm.__version__.startswith("0.15."), reason="two ranks on the CPU are tested with the newest vLLM only"
)


@newest_only
def test_two_tensor_parallel_ranks_each_find_their_own_heads(processes, store, model, prompts):
    prefill, decode, single = processes
    every_cpu = sorted(os.sched_getaffinity(0))
    settings = engine_settings(model, chunked=True, **TWO_RANKS)
    requests = [ask(f"{count}", prompts.tokens(count)) for count in (20, 4 * BLOCK_TOKENS + 1, 1003)]

    # One after the other: two engines of two ranks on the same CPUs would slow each other down many times.
    prefill.open(settings, transfer_config("producer", store, **PATIENT_FS), every_cpu)
    prefill.run([{**request, "max_tokens": 1} for request in requests])
    prefill.close()
    single.open(settings, None, every_cpu)
    first, second = single.run(requests), single.run(requests)
    single.close()
    decode.open(settings, transfer_config("consumer", store, **PATIENT_FS), every_cpu)
    answers = decode.run(requests)
    external_tokens = decode.counters()[EXTERNAL_HITS]
    decode.close()

    assert external_tokens == sum(expected_external(request["prompt"]) for request in requests)
    for request_id, answer in answers.items():
        assert_same(answer, first[request_id], second[request_id], what=request_id)


@newest_only
@pytest.mark.parametrize(("prefill_ranks", "decode_ranks", "lane"), [(2, 2, "auto"), (2, 1, "shm"), (1, 2, "tcp")])
def test_every_rank_pulls_its_heads_from_the_prefill_ranks_that_have_them(
    processes, model, prompts, prefill_ranks, decode_ranks, lane
):
    prefill, decode, single = processes
    every_cpu = sorted(os.sched_getaffinity(0))
    requests = [ask(f"{count}", prompts.tokens(count)) for count in (20, 4 * BLOCK_TOKENS + 1, 1003)]
    kv_port = free_port_row(2)
    named = [{**request, "id": proxys_id(kv_port)} for request in requests]

    def settings(ranks):
        return engine_settings(model, chunked=True, **(TWO_RANKS if ranks == 2 else {}))

    single.open(settings(decode_ranks), None, every_cpu)
    first, second = single.run(requests), single.run(requests)
    single.close()
    # Both are open at once, and one of them works at a time: prefill only keeps its blocks while decode runs.
    options = {**PATIENT, "host": "127.0.0.1", "lane": lane}
    prefill.open(settings(prefill_ranks), p2p_config("producer", kv_port, **options), every_cpu)
    decode.open(settings(decode_ranks), p2p_config("consumer", kv_port, **options), every_cpu)
    try:
        prefill.run([{**request, "max_tokens": 1} for request in named])
        answers = decode.run(named)
        external_tokens = decode.counters()[EXTERNAL_HITS]
        # Every rank of prefill has heard that all is done: nothing waits for the end of a lease.
        assert prefill.settled_free_blocks() == prefill.free_blocks_at_start
    finally:
        decode.close()
        prefill.close()

    assert external_tokens == expected_whole(requests)
    for request, other in zip(requests, named, strict=True):
        assert_same(answers[other["id"]], first[request["id"]], second[request["id"]], what=request["id"])
