"""Risk: ranks read each other's KV. Each holds other heads of the same tokens, so the text would be wrong."""

import os

import pytest
import vllm

from conftest import ask, expected_external
from settings import BLOCK_TOKENS, engine_settings
from support.connector import transfer_config
from support.metrics import EXTERNAL_HITS
from support.outcome import assert_same

TWO_RANKS = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}


@pytest.mark.skipif(
    vllm.__version__.startswith("0.15."), reason="two ranks on the CPU are tested with the newest vLLM only"
)
def test_two_tensor_parallel_ranks_each_find_their_own_heads(processes, store, model, prompts):
    prefill, decode, single = processes
    every_cpu = sorted(os.sched_getaffinity(0))
    settings = engine_settings(model, chunked=True, **TWO_RANKS)
    requests = [ask(f"{count}", prompts.tokens(count)) for count in (20, 4 * BLOCK_TOKENS + 1, 1003)]

    # One after the other: two engines of two ranks on the same CPUs would slow each other down many times.
    prefill.open(settings, transfer_config("producer", store), every_cpu)
    prefill.run([{**request, "max_tokens": 1} for request in requests])
    prefill.close()
    single.open(settings, None, every_cpu)
    first, second = single.run(requests), single.run(requests)
    single.close()
    decode.open(settings, transfer_config("consumer", store), every_cpu)
    answers = decode.run(requests)
    external_tokens = decode.counters()[EXTERNAL_HITS]
    decode.close()

    assert external_tokens == sum(expected_external(request["prompt"]) for request in requests)
    for request_id, answer in answers.items():
        assert_same(answer, first[request_id], second[request_id], what=request_id)
