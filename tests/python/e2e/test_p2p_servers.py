"""Risk: what works between engines in a test fails behind `vllm serve`: request ids with suffixes, engines in processes
of their own, streams, clients that hang up, both calls at once. Two servers and the proxy, with each order of the
calls, against one server without kvlane.

Prefill loads the connector by the plugin under the name that manifests use, decode by kv_connector_module_path.
"""

import concurrent.futures
import contextlib
import random
import time

import pytest

from p2p_pair import LANES, PATIENT, expected_cached
from settings import BLOCK_TOKENS, CHUNKED_SERVER_ARGUMENTS, SERVER_ARGUMENTS
from support import cpus
from support.client import complete
from support.connector import OWN_P2P_NAME, p2p_config
from support.metrics import external_hits, pulled_bytes, scrape
from support.outcome import assert_same, whole_prompt_tokens
from support.prompts import Prompts
from support.servers import free_ports, kvlane_proxy, vllm_server
from support.tiny_model import token_bytes, vocabulary_size
from support.vllm_environment import TAKES_BACK_WITH_A_REQUEST

pytestmark = pytest.mark.timeout(600)

OUTPUT_TOKENS = 16
DISPATCHES = ["sequential", "concurrent"]


class Servers:
    """All that runs for one lane."""

    def __init__(self, lane, prefill, decode, single, proxies):
        self.lane, self.prefill, self.decode, self.single, self.proxies = lane, prefill, decode, single, proxies

    def handed_over(self):
        """External tokens by vLLM's own count and bytes over the lane by kvlane's."""
        return external_hits(self.decode.url), pulled_bytes(self.decode.url, self.lane)

    def assert_handed_over(self, before, tokens):
        assert external_hits(self.decode.url) - before[0] == tokens
        wanted = before[1] + tokens * token_bytes()
        # A worker tells its figures about once a second, with the steps of later requests.
        deadline = time.monotonic() + 15
        while pulled_bytes(self.decode.url, self.lane) < wanted and time.monotonic() < deadline:
            complete(self.decode.url, [5, 6, 7], 2)
            time.sleep(0.3)
        assert pulled_bytes(self.decode.url, self.lane) >= wanted

    def assert_like_single(self, answer, *arguments, **named):
        """Claims that the single server answers the same call in the same way; called twice as its own control."""
        first, second = (complete(self.single.url, *arguments, **named).choices() for _ in range(2))
        assert_same(answer.choices(), first, second)

    def assert_idle(self):
        """Claims that both servers come to rest, with no lease left."""
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if TAKES_BACK_WITH_A_REQUEST:
                for server in (self.prefill, self.decode):
                    complete(server.url, [5, 6, 7], 1)
            figures = [scrape(server.url) for server in (self.prefill, self.decode)]
            # A lease keeps blocks of the cache.
            names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
            if not any(figure[name] for figure in figures for name in names):
                return
            time.sleep(0.2)
        pytest.fail(f"still busy after 60 s: {figures}")


@pytest.fixture(scope="module")
def servers_by_lane(model):
    """A decode server for each lane beside one prefill and one single server: most of the time goes into starts."""
    first, second = cpus.halves()
    offer_port, *pull_ports = free_ports(1 + len(LANES))
    options = {**PATIENT, "host": "127.0.0.1"}
    with contextlib.ExitStack() as stack:
        offers = p2p_config("producer", offer_port, **options)
        prefill = vllm_server("p2p-prefill", model, first, transfer=offers, arguments=CHUNKED_SERVER_ARGUMENTS)
        single = vllm_server("p2p-single", model, first, arguments=SERVER_ARGUMENTS)
        decodes = {}
        for lane, port in zip(LANES, pull_ports, strict=True):
            pulls = p2p_config("consumer", port, name=OWN_P2P_NAME, by_module_path=True, lane=lane, **options)
            # Decode must not need the plugin: it is switched off there.
            decodes[lane] = vllm_server(
                f"p2p-decode-{lane}",
                model,
                second,
                transfer=pulls,
                arguments=SERVER_ARGUMENTS,
                environment={"KVLANE_PLUGIN": "0"},
            )
        started = [prefill, single, *decodes.values()]
        for server in started:
            stack.enter_context(server)
        for server in started:
            server.wait_until_ready()
        by_lane = {}
        for lane, port in zip(LANES, pull_ports, strict=True):
            proxies = {
                dispatch: stack.enter_context(
                    kvlane_proxy(prefill.url, decodes[lane].url, kv_ports=(offer_port, port), dispatch=dispatch)
                )
                for dispatch in DISPATCHES
            }
            for proxy in proxies.values():
                proxy.wait_until_ready()
            by_lane[lane] = Servers(lane, prefill, decodes[lane], single, proxies)
        yield by_lane


@pytest.fixture(params=LANES)
def servers(request, servers_by_lane):
    return servers_by_lane[request.param]


@pytest.fixture(params=DISPATCHES)
def proxy_url(request, servers):
    return servers.proxies[request.param].url


@pytest.fixture
def prompts(model, request):
    return Prompts(vocabulary_size(model), seed=random.Random(request.node.name).randrange(1 << 32))


@pytest.mark.parametrize("count", [20, 4 * BLOCK_TOKENS, 4 * BLOCK_TOKENS + 1, 2003])
def test_a_stream_through_the_proxy(servers, proxy_url, prompts, count):
    prompt = prompts.tokens(count)
    before = servers.handed_over()
    answer = complete(proxy_url, prompt, OUTPUT_TOKENS)
    servers.assert_handed_over(before, whole_prompt_tokens(count))
    assert answer.cached_tokens == expected_cached(count)
    assert (answer.prompt_tokens, answer.completion_tokens) == (count, OUTPUT_TOKENS)
    servers.assert_like_single(answer, prompt, OUTPUT_TOKENS)


def test_two_choices_with_temperature_and_seed(servers, proxy_url, prompts):
    prompt = prompts.tokens(5 * BLOCK_TOKENS + 3)
    sampling = {"n": 2, "temperature": 0.8, "seed": 4711}
    before = servers.handed_over()
    answer = complete(proxy_url, prompt, OUTPUT_TOKENS, **sampling)
    servers.assert_handed_over(before, 2 * len(prompt))
    assert answer.tokens[0] != answer.tokens[1]
    servers.assert_like_single(answer, prompt, OUTPUT_TOKENS, **sampling)


def test_two_prompts_in_one_call(servers, proxy_url, prompts):
    both = [prompts.tokens(5 * BLOCK_TOKENS + 3), prompts.tokens(7 * BLOCK_TOKENS)]
    before = servers.handed_over()
    answer = complete(proxy_url, both, OUTPUT_TOKENS)
    servers.assert_handed_over(before, sum(map(len, both)))
    servers.assert_like_single(answer, both, OUTPUT_TOKENS)


def test_eight_clients_at_once(servers, proxy_url, prompts):
    texts = [prompts.tokens(150 + 97 * i) for i in range(8)]
    before = servers.handed_over()
    with concurrent.futures.ThreadPoolExecutor(len(texts)) as pool:
        answers = list(pool.map(lambda prompt: complete(proxy_url, prompt, OUTPUT_TOKENS), texts))
    servers.assert_handed_over(before, sum(map(len, texts)))
    for prompt, answer in zip(texts, answers, strict=True):
        servers.assert_like_single(answer, prompt, OUTPUT_TOKENS)


def test_a_request_that_names_no_prefill_server_is_served_at_once(servers, prompts):
    prompt = prompts.tokens(4 * BLOCK_TOKENS + 5)
    before = servers.handed_over()
    answer = complete(servers.decode.url, prompt, OUTPUT_TOKENS)
    servers.assert_handed_over(before, 0)
    servers.assert_like_single(answer, prompt, OUTPUT_TOKENS)


@pytest.mark.parametrize("chunks", [1, 5])
def test_a_client_that_hangs_up_leaves_nothing_behind(servers, proxy_url, prompts, chunks):
    prompt = prompts.tokens(2003)
    complete(proxy_url, prompt, 200, abort_after_chunks=chunks)
    servers.assert_idle()
    servers.assert_like_single(complete(proxy_url, prompt, OUTPUT_TOKENS), prompt, OUTPUT_TOKENS)
