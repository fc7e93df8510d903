"""Risk: servers wait for each other's blocks in a circle. Prefill keeps blocks until decode has pulled them, decode
keeps blocks for what it will pull, and with small caches all of them are taken.

Two prefill and two decode engines, every decode pulling from both prefills, with caches for two or three prompts each.
All deadlines are longer than the test: what only a deadline could resolve does not end.
"""

import os
import random
import statistics

import pytest

from conftest import ask
from p2p_pair import LANES
from settings import BLOCK_TOKENS, engine_settings
from support import cpus
from support.connector import p2p_config, transfer_id
from support.engine import Engine
from support.outcome import assert_same
from support.servers import free_ports

pytestmark = pytest.mark.timeout(1800)

RUN_LIMIT_S = 500
DEADLINE_MS = 600_000
# A prompt takes 3 to 9 blocks, and the cache of a server has 23 for all of them.
LEAST_BLOCKS, MOST_BLOCKS = 3, 9
CACHE_BLOCKS = 24
MODEL_LEN_TOKENS = 14 * BLOCK_TOKENS
REQUESTS_PER_PAIR = 6
# Many, so that decode is busy with one while prefill computes the next: else decode never fills, and prefill neither.
OUTPUT_TOKENS = 64
# (metric, label, value) of what only a deadline counts.
OF_DEADLINES = [
    ("vllm:kvlane_p2p_leases", "end", "expired"),
    ("vllm:kvlane_p2p_failed_pulls", "reason", "timeout"),
    ("vllm:kvlane_p2p_requests", "outcome", "timeout"),
    ("vllm:kvlane_p2p_requests", "outcome", "no_room"),
]


@pytest.fixture(scope="module")
def more_processes():
    """A second prefill and a second decode process beside those of all tests."""
    first, second = cpus.halves()
    with Engine("prefill-2", first) as prefill, Engine("decode-2", second) as decode:
        yield prefill, decode


class Crosswise:
    """Prefill and decode engines of which every two are a pair."""

    def __init__(self, prefills, decodes, single, model):
        self.prefills, self.decodes, self.single, self._model = prefills, decodes, single, model
        self._ports = free_ports(len(prefills))

    @property
    def all(self):
        return [*self.prefills, *self.decodes]

    def open(self, lane):
        options = dict.fromkeys(("ask_timeout_ms", "transfer_timeout_ms", "lease_ms", "peer_timeout_ms"), DEADLINE_MS)
        options |= {"host": "127.0.0.1", "lane": lane}
        small = {"num_gpu_blocks_override": CACHE_BLOCKS, "max_model_len": MODEL_LEN_TOKENS, "chunked": True}
        for prefill, port in zip(self.prefills, self._ports, strict=True):
            prefill.begin_open(engine_settings(self._model, **small), p2p_config("producer", port, **options))
        for decode in self.decodes:
            # It listens nowhere, so its port is a formality.
            consumer = p2p_config("consumer", self._ports[0], **options)
            decode.begin_open(engine_settings(self._model, **small), consumer)
        self.single.begin_open(engine_settings(self._model))
        for engine in (*self.all, self.single):
            engine.finish_open()

    def run(self, pairs, draw):
        """Runs (prefill, decode, request)s all at once, with another order on every engine. Returns the answers by the
        requests' ids."""
        of_engine = {engine.name: [] for engine in self.all}
        names = {}
        for prefill, decode, request in pairs:
            name = f"cmpl-{transfer_id(f'127.0.0.1:{self._ports[prefill]}', '127.0.0.1:1')}-0"
            names[name] = request["id"]
            of_engine[self.prefills[prefill].name].append({**request, "id": name, "max_tokens": 1})
            of_engine[self.decodes[decode].name].append({**request, "id": name})
        # Decodes first: what prefill has done before it is asked for need not be kept.
        for engine in (*self.decodes, *self.prefills):
            requests = of_engine[engine.name]
            engine.begin_run(draw.sample(requests, len(requests)), RUN_LIMIT_S)
        answers = {}
        for engine in self.all:
            ended = engine.finish_run()
            if engine in self.decodes:
                answers |= {names[name]: answer for name, answer in ended.items()}
        return answers

    def pulled(self):
        """Pulls of the decodes that have arrived."""
        begun = self.count(self.decodes, "vllm:kvlane_p2p_requests", "outcome", "pulled")
        failed = [engine.counters_by_label("vllm:kvlane_p2p_failed_pulls", "reason") for engine in self.decodes]
        return begun - sum(sum(by_reason.values()) for by_reason in failed)

    def count(self, engines, metric, label, value):
        return sum(engine.counters_by_label(metric, label).get(value, 0) for engine in engines)


@pytest.mark.parametrize("lane", LANES if os.environ.get("KVLANE_SOAK") else LANES[:1])
def test_two_and_two_with_full_caches_make_progress_without_a_deadline(processes, more_processes, model, prompts, lane):
    prefill, decode, single = processes
    crosswise = Crosswise([prefill, more_processes[0]], [decode, more_processes[1]], single, model)
    crosswise.open(lane)
    draw = random.Random(prompts.seed)
    pairs = [
        (from_prefill, to_decode, ask(f"{from_prefill} to {to_decode}, {number}", prompt, max_tokens=OUTPUT_TOKENS))
        for from_prefill in range(2)
        for to_decode in range(2)
        for number in range(REQUESTS_PER_PAIR)
        for prompt in [prompts.tokens(draw.randint((LEAST_BLOCKS - 1) * BLOCK_TOKENS + 1, MOST_BLOCKS * BLOCK_TOKENS))]
    ]
    before = [crosswise.count(crosswise.all, *counter) for counter in OF_DEADLINES]
    pulled = crosswise.pulled()
    preemptions = [engine.counters().get("vllm:num_preemptions", 0) for engine in crosswise.all]

    answers = crosswise.run(pairs, draw)

    requests = [request for _, _, request in pairs]
    first, second = single.run(requests, RUN_LIMIT_S), single.run(requests, RUN_LIMIT_S)
    for request in requests:
        name = request["id"]
        assert_same(answers[name], first[name], second[name], what=f"request {name}")
    for engine in crosswise.all:
        assert engine.settled_free_blocks() == engine.free_blocks_at_start, f"{engine.name} still holds blocks"
    # After settling: the last figures are told with the steps that take blocks back.
    after = [crosswise.count(crosswise.all, *counter) for counter in OF_DEADLINES]
    assert after == before, f"deadlines fired: {OF_DEADLINES}"
    pulled = crosswise.pulled() - pulled
    lowest = {engine.name: engine.lowest_free_blocks() for engine in crosswise.all}
    preempted = {
        engine.name: engine.counters().get("vllm:num_preemptions", 0) - count
        for engine, count in zip(crosswise.all, preemptions, strict=True)
    }
    print(f"{pulled} of {len(pairs)} pulled, fewest free blocks {lowest}, preemptions {preempted}")
    assert pulled >= len(pairs) / 4
    # Where the last free blocks are too few for what waits, nobody takes them.
    usual_blocks = statistics.median(-(-len(request["prompt"]) // BLOCK_TOKENS) for request in requests)
    full = {engine.name for engine in crosswise.all if lowest[engine.name] < usual_blocks}
    assert full >= {engine.name for engine in crosswise.decodes}, f"decode always had room: {lowest}"
    assert full & {engine.name for engine in crosswise.prefills}, f"prefill always had room: {lowest}"
