"""A prefill and a decode engine that hand KV over directly, beside a single engine."""

import vllm

from settings import engine_settings
from support.connector import p2p_config, transfer_id
from support.metrics import EXTERNAL_HITS
from support.outcome import assert_same, whole_prompt_tokens
from support.servers import free_port

LANES = ["shm", "tcp"]
# Far above what the slowest machine needs, and above what a test waits for blocks to come back: a deadline that fires
# here is a failure and not a slow machine.
PATIENT = {
    "ask_timeout_ms": 300_000,
    "transfer_timeout_ms": 300_000,
    "lease_ms": 600_000,
    "peer_timeout_ms": 300_000,
}


class P2pPair:
    """Three engines. Every request of a hand-over gets the id that vLLM makes of a proxy's header; answers come back
    under the test's own ids."""

    def __init__(self, prefill, decode, single, model):
        self.prefill, self.decode, self.single, self.model = prefill, decode, single, model
        self.kv_port = free_port()

    def open(self, lane, prefill=None, decode=None, single=None, options=None):
        """Opens all three at once. Each argument changes engine_settings; the single engine gets decode's."""
        decode = decode or {}
        self.dtype = decode.get("dtype", "float32")
        options = {**PATIENT, "host": "127.0.0.1", "lane": lane, **(options or {})}
        self.single.begin_open(engine_settings(self.model, **(single or decode)))
        self.prefill.begin_open(
            engine_settings(self.model, **(prefill or {})), p2p_config("producer", self.kv_port, **options)
        )
        # It listens nowhere, so its port is a formality.
        self.decode.begin_open(engine_settings(self.model, **decode), p2p_config("consumer", self.kv_port, **options))
        for engine in (self.single, self.prefill, self.decode):
            engine.finish_open()

    def hand_over(self, requests, at_once=False, on_prefill=None):
        """Runs requests on prefill for one token each, and on decode after it or at the same time. `on_prefill` changes
        prefill's requests. Returns decode's answers and the external tokens by vLLM's own counter."""
        named = [{**request, "id": proxys_id(self.kv_port)} for request in requests]
        for_prefill = [{**request, "max_tokens": 1, **(on_prefill or {})} for request in named]
        if not at_once:
            self.prefill.run(for_prefill)
            return self._run_on_decode(requests, named)
        self.prefill.begin_run(for_prefill)
        answers = self._run_on_decode(requests, named)
        self.prefill.finish_run()
        return answers

    def ask_for_what_is_not_coming(self, requests):
        """Requests that name the prefill server, which never gets them."""
        return self._run_on_decode(requests, [{**request, "id": proxys_id(self.kv_port)} for request in requests])

    def decode_alone(self, requests):
        """Requests that name no prefill server."""
        return self._run_on_decode(requests, requests)

    def assert_like_single(self, requests, answers):
        """Claims that decode answered what the single engine answers to the same load."""
        first, second = self.single.run(requests), self.single.run(requests)
        for request in requests:
            name = request["id"]
            assert_same(answers[name], first[name], second[name], self.dtype, what=f"request {name}")

    def assert_nothing_is_held(self):
        """Claims that every block and every lease of both sides has come back."""
        assert self.decode.settled_free_blocks() == self.decode.free_blocks_at_start
        assert self.prefill.settled_free_blocks() == self.prefill.free_blocks_at_start

    def _run_on_decode(self, requests, named):
        before = self.decode.counters().get(EXTERNAL_HITS, 0)
        answers = self.decode.run(named)
        external_tokens = self.decode.counters()[EXTERNAL_HITS] - before
        own = {request["id"]: answers[other["id"]] for request, other in zip(requests, named, strict=True)}
        return own, external_tokens


def proxys_id(kv_port):
    """The id that vLLM makes of a proxy's header, for a prefill server on this machine."""
    return f"cmpl-{transfer_id(f'127.0.0.1:{kv_port}', '127.0.0.1:1')}-0"


def expected_whole(requests):
    """External tokens of requests with nothing cached on decode; each of `n` children takes the prompt over."""
    return sum(request.get("n", 1) * whole_prompt_tokens(len(request["prompt"])) for request in requests)


def expected_cached(prompt_tokens):
    """What vLLM reports as cached of a prompt that came whole; 0.15 leaves out the token that it computes again."""
    return prompt_tokens - 1 if vllm.__version__.startswith("0.15.") else prompt_tokens
