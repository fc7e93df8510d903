"""Risk: what works inside one process fails behind `vllm serve`: request ids with suffixes, engines in processes of
their own, streams, clients that hang up. Two servers and the proxy against one server without kvlane.

Prefill loads the connector by the plugin under the name that manifests use, decode by kv_connector_module_path.
"""

import concurrent.futures
import contextlib
import random
import time

import pytest

from settings import BLOCK_TOKENS, MODEL_LEN_TOKENS
from support import cpus
from support.client import complete
from support.connector import OWN_NAME, transfer_config
from support.metrics import external_hits, scrape
from support.outcome import assert_same, full_blocks_tokens
from support.places import make_store, remove_store
from support.prompts import Prompts
from support.servers import kvlane_proxy, vllm_server
from support.tiny_model import vocabulary_size

pytestmark = pytest.mark.timeout(600)

OUTPUT_TOKENS = 16
ARGUMENTS = [
    *("--dtype", "float32", "--block-size", str(BLOCK_TOKENS), "--max-model-len", str(MODEL_LEN_TOKENS)),
    *("--max-num-seqs", "16", "--no-enable-prefix-caching"),
]


@pytest.fixture(scope="module")
def servers(model):
    """(prefill, decode, single, proxy), all ready."""
    first, second = cpus.halves()
    with contextlib.ExitStack() as stack:
        store = make_store("servers")
        stack.callback(remove_store, store)
        # Decode must not need the plugin: it is switched off there.
        by_path = transfer_config("consumer", store, name=OWN_NAME, by_module_path=True)
        started = [
            vllm_server("e2e-prefill", model, first, transfer=transfer_config("producer", store), arguments=ARGUMENTS),
            vllm_server(
                "e2e-decode", model, second, transfer=by_path, arguments=ARGUMENTS, environment={"KVLANE_PLUGIN": "0"}
            ),
            vllm_server("e2e-single", model, first, arguments=ARGUMENTS),
        ]
        for server in started:
            stack.enter_context(server)
        for server in started:
            server.wait_until_ready()
        proxy = stack.enter_context(kvlane_proxy(started[0].url, started[1].url))
        proxy.wait_until_ready()
        yield (*started, proxy)


@pytest.fixture
def prompts(model, request):
    return Prompts(vocabulary_size(model), seed=random.Random(request.node.name).randrange(1 << 32))


def assert_like_single(servers, answer, *arguments, **named):
    """Claims that the single server answers the same call in the same way; called twice as its own control."""
    single = servers[2]
    first, second = (complete(single.url, *arguments, **named).choices() for _ in range(2))
    assert_same(answer.choices(), first, second)


@pytest.mark.parametrize("count", [20, 4 * BLOCK_TOKENS, 4 * BLOCK_TOKENS + 1, 2003])
def test_a_stream_through_the_proxy(servers, prompts, count):
    prompt = prompts.tokens(count)
    decode, proxy = servers[1], servers[3]
    before = external_hits(decode.url)
    answer = complete(proxy.url, prompt, OUTPUT_TOKENS)
    wanted = full_blocks_tokens(count, BLOCK_TOKENS)
    assert external_hits(decode.url) - before == wanted
    assert answer.cached_tokens == wanted
    assert (answer.prompt_tokens, answer.completion_tokens) == (count, OUTPUT_TOKENS)
    assert_like_single(servers, answer, prompt, OUTPUT_TOKENS)


def test_two_choices_with_temperature_and_seed(servers, prompts):
    prompt = prompts.tokens(5 * BLOCK_TOKENS + 3)
    sampling = {"n": 2, "temperature": 0.8, "seed": 4711}
    before = external_hits(servers[1].url)
    answer = complete(servers[3].url, prompt, OUTPUT_TOKENS, **sampling)
    assert external_hits(servers[1].url) - before == 2 * 5 * BLOCK_TOKENS
    assert answer.tokens[0] != answer.tokens[1]
    assert_like_single(servers, answer, prompt, OUTPUT_TOKENS, **sampling)


def test_two_prompts_in_one_call(servers, prompts):
    both = [prompts.tokens(5 * BLOCK_TOKENS + 3), prompts.tokens(7 * BLOCK_TOKENS)]
    before = external_hits(servers[1].url)
    answer = complete(servers[3].url, both, OUTPUT_TOKENS)
    assert external_hits(servers[1].url) - before == (5 + 6) * BLOCK_TOKENS
    assert_like_single(servers, answer, both, OUTPUT_TOKENS)


def test_eight_clients_at_once(servers, prompts):
    texts = [prompts.tokens(150 + 97 * i) for i in range(8)]
    before = external_hits(servers[1].url)
    with concurrent.futures.ThreadPoolExecutor(len(texts)) as pool:
        answers = list(pool.map(lambda prompt: complete(servers[3].url, prompt, OUTPUT_TOKENS), texts))
    wanted = sum(full_blocks_tokens(len(prompt), BLOCK_TOKENS) for prompt in texts)
    assert external_hits(servers[1].url) - before == wanted
    for prompt, answer in zip(texts, answers, strict=True):
        assert_like_single(servers, answer, prompt, OUTPUT_TOKENS)


@pytest.mark.parametrize("chunks", [1, 5])
def test_a_client_that_hangs_up_leaves_nothing_behind(servers, prompts, chunks):
    prompt = prompts.tokens(2003)
    complete(servers[3].url, prompt, 200, abort_after_chunks=chunks)
    deadline = time.monotonic() + 30
    while scrape(servers[1].url)["vllm:num_requests_running"] and time.monotonic() < deadline:
        time.sleep(0.2)
    counts = scrape(servers[1].url)
    assert counts["vllm:num_requests_running"] == counts["vllm:num_requests_waiting"] == 0
    assert_like_single(servers, complete(servers[3].url, prompt, OUTPUT_TOKENS), prompt, OUTPUT_TOKENS)


def test_kvlanes_own_counters_are_exported(servers, prompts):
    """Decode only loads, so what it moved is what it took from the store."""
    decode = servers[1]
    before = scrape(decode.url).get("vllm:kvlane_transfer_bytes", 0)
    complete(servers[3].url, prompts.tokens(6 * BLOCK_TOKENS + 1), OUTPUT_TOKENS)
    # 8 layers, keys and values, 2 heads of 64, 4 bytes each.
    assert scrape(decode.url)["vllm:kvlane_transfer_bytes"] - before == 6 * BLOCK_TOKENS * 8 * 2 * 2 * 64 * 4
