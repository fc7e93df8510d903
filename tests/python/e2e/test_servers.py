"""Risk: what works inside one process fails behind `vllm serve`: request ids with suffixes, engines in processes of
their own, streams, clients that hang up. Two servers and the proxy against one server without kvlane.

Prefill loads the connector by the plugin under the name that manifests use, decode by kv_connector_module_path.
"""

import concurrent.futures
import contextlib
import random
import time

import pytest

from settings import BLOCK_TOKENS, CHUNKED_SERVER_ARGUMENTS, SERVER_ARGUMENTS
from support import cpus
from support.client import complete
from support.connector import OWN_NAME, transfer_config, transfer_id
from support.metrics import by_label, external_hits, scrape
from support.outcome import assert_same, full_blocks_tokens
from support.places import make_store, remove_store
from support.prompts import Prompts
from support.servers import kvlane_proxy, vllm_server
from support.tiny_model import vocabulary_size

pytestmark = pytest.mark.timeout(600)

OUTPUT_TOKENS = 16
LOAD_TIMEOUT_MS = 8_000
ANSWER_S = 120
# A test stops the prefill server, and where that falls into the save of a step, the step shall still store its blocks:
# it is stopped for as long as decode takes to answer, at most.
STORE_TIMEOUT_MS = (ANSWER_S + 60) * 1_000
STOPS = 12


@pytest.fixture(scope="module")
def servers(model):
    """(prefill, decode, single, proxy), all ready."""
    first, second = cpus.halves()
    with contextlib.ExitStack() as stack:
        store = make_store("servers")
        stack.callback(remove_store, store)
        # Decode must not need the plugin: it is switched off there.
        by_path = transfer_config(
            "consumer", store, name=OWN_NAME, by_module_path=True, load_timeout_ms=LOAD_TIMEOUT_MS
        )
        patient = transfer_config("producer", store, store_timeout_ms=STORE_TIMEOUT_MS)
        started = [
            vllm_server(
                "e2e-prefill",
                model,
                first,
                transfer=patient,
                arguments=CHUNKED_SERVER_ARGUMENTS,
            ),
            vllm_server(
                "e2e-decode",
                model,
                second,
                transfer=by_path,
                arguments=SERVER_ARGUMENTS,
                environment={"KVLANE_PLUGIN": "0"},
            ),
            vllm_server("e2e-single", model, first, arguments=SERVER_ARGUMENTS),
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


# 8 layers, keys and values, 2 heads of 64, 4 bytes each.
BLOCK_BYTES = BLOCK_TOKENS * 8 * 2 * 2 * 64 * 4


def kvlane_figures(url):
    """kvlane's counters of a server, by metric and label."""
    labels = {"transfer_bytes": "direction", "transfer_seconds": "direction", "lookup_blocks": "outcome"}
    return {
        (name, value): amount
        for name, label in labels.items()
        for value, amount in by_label(url, f"vllm:kvlane_{name}", label).items()
    }


def changes(before, after):
    """What was counted in between, without what stayed."""
    return {key: value - before.get(key, 0) for key, value in after.items() if value != before.get(key, 0)}


def test_kvlanes_own_counters_tell_hits_from_misses_and_stores_from_loads(servers, prompts):
    prefill, decode, _, proxy = servers
    before = kvlane_figures(prefill.url), kvlane_figures(decode.url)
    # Never stored, and asked for by nobody who says that a prefill is on its way. Comes first, because vLLM before 0.24
    # takes such a count only along with one of a worker.
    complete(decode.url, prompts.tokens(3 * BLOCK_TOKENS + 1), OUTPUT_TOKENS)
    complete(proxy.url, prompts.tokens(6 * BLOCK_TOKENS + 1), OUTPUT_TOKENS)
    stored, loaded = changes(before[0], kvlane_figures(prefill.url)), changes(before[1], kvlane_figures(decode.url))
    assert stored.pop(("transfer_seconds", "store")) > 0
    assert loaded.pop(("transfer_seconds", "load")) > 0
    # Each server counts its own direction only, and prefill, which only stores, looks nothing up.
    assert stored == {("transfer_bytes", "store"): 6 * BLOCK_BYTES}
    assert loaded == {
        ("transfer_bytes", "load"): 6 * BLOCK_BYTES,
        ("lookup_blocks", "hit"): 6,
        ("lookup_blocks", "absent"): 3,
    }


def test_both_servers_show_what_the_folder_takes_and_may_take(servers, prompts):
    complete(servers[3].url, prompts.tokens(2 * BLOCK_TOKENS + 1), OUTPUT_TOKENS)
    for server in servers[:2]:
        figures = scrape(server.url)
        assert figures["vllm:kvlane_limit_bytes"] == 512 << 20
        assert 2 * BLOCK_BYTES < figures["vllm:kvlane_used_bytes"] <= figures["vllm:kvlane_limit_bytes"]
        assert figures["vllm:kvlane_segments"] >= 1


def test_a_prefill_that_stops_in_the_middle_costs_a_recompute_within_the_load_timeout(servers, prompts):
    """All processes of the prefill server stand still while it has promised blocks that it has not written."""
    prefill, decode, _, proxy = servers
    count = 2003
    # What is measured while the machine is held up is too long, and each stop would come too late.
    filling_s = min(timed(prefill.url, prompts.tokens(count), 1)[1] for _ in range(3))
    recompute_s = timed(decode.url, prompts.tokens(count))[1]
    blocks = full_blocks_tokens(count, BLOCK_TOKENS) // BLOCK_TOKENS
    # Where the stop falls is a matter of time, so it is tried again; what must hold is claimed for every try.
    for _ in range(STOPS):
        prompt = prompts.tokens(count)
        before = kvlane_figures(decode.url)
        answer, took_s = answer_of_decode_while_prefill_stands_still(servers, prompts, prompt, filling_s)
        assert took_s < LOAD_TIMEOUT_MS / 1e3 + 3 * recompute_s + 6, f"recomputing alone takes {recompute_s:.1f} s"
        assert_like_single(servers, answer, prompt, OUTPUT_TOKENS)
        # It has gone on where it stood: the rest of that prompt is there now.
        assert complete(decode.url, prompt, OUTPUT_TOKENS).cached_tokens == blocks * BLOCK_TOKENS
        counted = changes(before, kvlane_figures(decode.url))
        timed_out = counted.get(("lookup_blocks", "timeout"), 0)
        if timed_out and answer.cached_tokens == (blocks - timed_out) * BLOCK_TOKENS > 0:
            break
    else:
        pytest.fail(f"none of {STOPS} stops fell between blocks that were there and blocks that were promised")
    prompt = prompts.tokens(5 * BLOCK_TOKENS + 1)
    answer = complete(proxy.url, prompt, OUTPUT_TOKENS)
    assert answer.cached_tokens == 5 * BLOCK_TOKENS, "the prefill server serves again"
    assert_like_single(servers, answer, prompt, OUTPUT_TOKENS)


def answer_of_decode_while_prefill_stands_still(servers, prompts, prompt, filling_s):
    """Decode's answer to a prompt that prefill, which needs `filling_s` for it, was stopped in, and the seconds."""
    prefill, decode = servers[:2]
    request_id = transfer_id(*(server.url.removeprefix("http://") for server in (prefill, decode)))
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        filling = pool.submit(complete, prefill.url, prompt, 1, request_id=request_id)
        # Early enough to see what is promised, as the blocks in the making are not to be seen after the stop.
        time.sleep(0.3 * filling_s)
        waits_since_s = time.monotonic()
        waiting = pool.submit(timed, decode.url, prompt, request_id=request_id)
        time.sleep(0.2 * filling_s)
        with prefill.suspended():
            # Others are served while that request waits.
            complete(decode.url, prompts.tokens(3 * BLOCK_TOKENS), 4)
            other_s = time.monotonic() - waits_since_s
            answer, took_s = waiting.result(ANSWER_S)
        filling.result(ANSWER_S)
    assert other_s < LOAD_TIMEOUT_MS / 1e3
    return answer, took_s


def timed(url, prompt, max_tokens=OUTPUT_TOKENS, **more):
    """The answer, and the seconds that the whole of it took."""
    started = time.monotonic()
    return complete(url, prompt, max_tokens, **more), time.monotonic() - started
