"""Three engine processes for the whole session: prefill, decode, and a single one without a connector to compare with.

Prefill and decode are always separate processes. Each opens many engines, one after another.
"""

import random

import pytest

from p2p_pair import P2pPair
from settings import BLOCK_TOKENS, PATIENT_FS, engine_settings
from support import cpus
from support.connector import transfer_config
from support.engine import Engine
from support.metrics import EXTERNAL_HITS
from support.outcome import assert_same, full_blocks_tokens
from support.places import make_store, remove_store
from support.prompts import Prompts
from support.tiny_model import tiny_model, vocabulary_size

OUTPUT_TOKENS = 16


@pytest.fixture(scope="session")
def model():
    return tiny_model("float32")


@pytest.fixture
def prompts(model, request):
    """Fresh prompts for every test, the same in every run."""
    return Prompts(vocabulary_size(model), seed=random.Random(request.node.name).randrange(1 << 32))


@pytest.fixture(scope="session")
def shared_store():
    """The store of most tests: prompts differ, so they do not meet, and engines stay open from test to test."""
    folder = make_store("e2e")
    yield folder
    remove_store(folder)


@pytest.fixture
def store():
    """A store of one test's own."""
    folder = make_store("e2e-own")
    yield folder
    remove_store(folder)


@pytest.fixture(scope="session")
def processes():
    first, second = cpus.halves()
    with Engine("prefill", first) as prefill, Engine("decode", second) as decode, Engine("single", first) as single:
        yield prefill, decode, single


@pytest.fixture
def pair(processes, shared_store, model):
    return Pair(*processes, shared_store, model)


@pytest.fixture
def pair_alone(processes, store, model):
    """A pair with a store of its own."""
    pair = Pair(*processes, store, model)
    yield pair
    # Before the store goes away under open engines.
    pair.close()


@pytest.fixture(scope="session")
def shared_p2p_pair(processes, model):
    """One for all tests: a pair has a port of its own, so that engines stay open from test to test."""
    return P2pPair(*processes, model)


@pytest.fixture
def p2p_pair(shared_p2p_pair, model):
    shared_p2p_pair.model = model
    return shared_p2p_pair


class Pair:
    """A prefill and a decode engine that share a store, beside a single engine."""

    def __init__(self, prefill, decode, single, store, model):
        self.prefill, self.decode, self.single = prefill, decode, single
        self.store, self.model = store, model

    def open(self, prefill=None, decode=None, single=None, options=None):
        """Opens all three at once. Each argument changes engine_settings; the single engine gets decode's."""
        decode = decode or {}
        self.dtype = decode.get("dtype", "float32")
        self.single.begin_open(engine_settings(self.model, **(single or decode)))
        self.prefill.begin_open(
            engine_settings(self.model, **(prefill or {})), transfer_config("producer", self.store, **PATIENT_FS)
        )
        options = {**PATIENT_FS, **(options or {})}
        self.decode.begin_open(
            engine_settings(self.model, **decode), transfer_config("consumer", self.store, **options)
        )
        for engine in (self.single, self.prefill, self.decode):
            engine.finish_open()

    def close(self):
        self.decode.close()
        self.prefill.close()

    def hand_over(self, requests):
        """Runs requests on prefill for one token each, then on decode. Returns decode's answers and the tokens that
        came over the store by vLLM's own counter."""
        self.prefill.run([{**request, "max_tokens": 1} for request in requests])
        return self.decode_only(requests)

    def decode_only(self, requests):
        before = self.decode.counters().get(EXTERNAL_HITS, 0)
        answers = self.decode.run(requests)
        return answers, self.decode.counters()[EXTERNAL_HITS] - before

    def assert_like_single(self, requests, answers):
        """Claims that decode answered what the single engine answers to the same load."""
        first, second = self.single.run(requests), self.single.run(requests)
        for request in requests:
            request_id = request["id"]
            assert_same(
                answers[request_id], first[request_id], second[request_id], self.dtype, what=f"request {request_id}"
            )


def ask(request_id, prompt, **more):
    """A greedy request of an engine process."""
    return {"id": request_id, "prompt": prompt, "max_tokens": OUTPUT_TOKENS, **more}


def expected_external(prompt):
    """Tokens that must come over a store that holds the whole prompt, with nothing cached locally."""
    return full_blocks_tokens(len(prompt), BLOCK_TOKENS)
