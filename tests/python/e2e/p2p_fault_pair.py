"""A prefill and a decode server that may be killed, stopped and started again, and clients that keep asking both.

What the two have to answer comes from a server without kvlane, which is asked before them and is gone then.
"""

import concurrent.futures
import random
import threading
import time
from dataclasses import dataclass

import httpx

from p2p_pair import expected_cached
from settings import CHUNKED_SERVER_ARGUMENTS, SERVER_ARGUMENTS
from support import cpus
from support.client import complete
from support.connector import p2p_config, transfer_id
from support.metrics import pulled_bytes
from support.outcome import assert_same
from support.prompts import Prompts
from support.resources import session_pids
from support.servers import free_port, vllm_server
from support.tiny_model import token_bytes, vocabulary_size

PREFILL, DECODE = "prefill", "decode"

ASK_TIMEOUT_MS, TRANSFER_TIMEOUT_MS, LEASE_MS = 3_000, 4_000, 5_000
#: Every deadline of one request, one after the other: it asks, waits for room, pulls, and each may take its whole time.
DEADLINES_S = (2 * ASK_TIMEOUT_MS + 2 * TRANSFER_TIMEOUT_MS) / 1000
#: What computing may take beside that on a machine with other work. A request that hangs takes longer than any number.
COMPUTE_LIMIT_S = 60
ANSWER_LIMIT_S = DEADLINES_S + COMPUTE_LIMIT_S
RECOVERY_LIMIT_S = 60
# A server starts beside two that answer requests.
READY_LIMIT_S = 900

OUTPUT_TOKENS = 16
SHORT_TOKENS = [20, 33, 50, 64, 65, 97, 128, 130]
LONG_TOKENS = [300, 700, 1100, 1500]
#: Small, so that leases of a decode server that is gone fill it, and every block was in use after a few requests.
CACHE_BLOCKS = 256


class FaultPair:
    """Two servers. One of them at a time may be taken away."""

    def __init__(self, model, seed):
        self._model = model
        self._cpus = dict(zip((PREFILL, DECODE), cpus.halves(), strict=True))
        self._starts = 0
        self.kv_port = free_port()
        self.lane = random.Random(seed).choice(["shm", "tcp"])
        self.servers = {}
        draw = Prompts(vocabulary_size(model), seed)
        self.prompts = [draw.tokens(count) for count in SHORT_TOKENS + LONG_TOKENS]

    def start(self):
        """Starts everything, and learns what is right."""
        single = vllm_server("faults-single", self._model, self._cpus[PREFILL], arguments=SERVER_ARGUMENTS)
        with single:
            self.servers = {side: self._begin(side) for side in (PREFILL, DECODE)}
            single.wait_until_ready()
            self._right = {
                tuple(prompt): [complete(single.url, prompt, OUTPUT_TOKENS).choices() for _ in range(2)]
                for prompt in self.prompts
            }
        for server in self.servers.values():
            server.wait_until_ready()

    def stop(self):
        for server in self.servers.values():
            server.stop()

    def restart(self, side, while_waiting):
        """Starts a server that was killed, decode with the other lane."""
        self.servers[side].stop()
        if side == DECODE:
            self.lane = "tcp" if self.lane == "shm" else "shm"
        self.servers[side] = self._begin(side)
        self.servers[side].wait_until_ready(while_waiting)

    def restart_what_is_gone(self):
        for side, server in self.servers.items():
            if not server.is_running():
                self.restart(side, lambda waited_s: None)

    def pids(self, side):
        """The processes of a server."""
        return session_pids(self.servers[side].pid)

    def new_id(self):
        """The request id of a hand-over between the two, as a proxy makes it."""
        return transfer_id(f"127.0.0.1:{self.kv_port}", "127.0.0.1:1")

    def ask(self, side, prompt, request_id, tokens=OUTPUT_TOKENS, **more):
        """One of the two calls of a hand-over; decode answers with so many tokens."""
        tokens = 1 if side == PREFILL else tokens
        return complete(self.servers[side].url, prompt, tokens, request_id=request_id, limit_s=ANSWER_LIMIT_S, **more)

    def assert_right(self, side, prompt, answer, tokens=OUTPUT_TOKENS):
        """Claims that a server said what a single server says."""
        first, second = (_beginning(right, 1 if side == PREFILL else tokens) for right in self._right[tuple(prompt)])
        assert_same(answer.choices(), first, second, what=f"{side}, {len(prompt)} tokens")

    def wait_until_kv_moves(self, draw):
        """Claims that soon a whole prompt is handed over again. What is answered until then must be right too."""
        deadline = time.monotonic() + RECOVERY_LIMIT_S
        tries = 0
        while time.monotonic() < deadline:
            tries += 1
            prompt, request_id = draw.choice(self.prompts), self.new_id()
            before = pulled_bytes(self.servers[DECODE].url, self.lane)
            for side in (PREFILL, DECODE):
                answer = self.ask(side, prompt, request_id)
                self.assert_right(side, prompt, answer)
            if answer.cached_tokens == expected_cached(len(prompt)) and self._arrived(before, len(prompt)):
                return tries
        raise AssertionError(f"no KV over lane {self.lane} {RECOVERY_LIMIT_S} s after the fault, {tries} requests")

    def _arrived(self, before_bytes, tokens):
        """Whether so much more was pulled. A worker tells its figures about once a second, with later steps."""
        url, wanted = self.servers[DECODE].url, before_bytes + tokens * token_bytes()
        deadline = time.monotonic() + 5
        while pulled_bytes(url, self.lane) < wanted:
            if time.monotonic() > deadline:
                return False
            complete(url, [5, 6, 7], 2)
            time.sleep(0.3)
        return True

    def _begin(self, side):
        self._starts += 1
        options = {
            "host": "127.0.0.1",
            "ask_timeout_ms": ASK_TIMEOUT_MS,
            "transfer_timeout_ms": TRANSFER_TIMEOUT_MS,
            "lease_ms": LEASE_MS,
        }
        if side == DECODE:
            options["lane"] = self.lane
        role = {PREFILL: "producer", DECODE: "consumer"}[side]
        arguments = {PREFILL: CHUNKED_SERVER_ARGUMENTS, DECODE: SERVER_ARGUMENTS}[side]
        return vllm_server(
            f"faults-{side}-{self._starts}",
            self._model,
            self._cpus[side],
            transfer=p2p_config(role, self.kv_port, **options),
            arguments=[*arguments, "--num-gpu-blocks-override", str(CACHE_BLOCKS)],
            ready_limit_s=READY_LIMIT_S,
        )


@dataclass
class Call:
    """One call and what came of it: an answer, or an error."""

    side: str
    prompt: list
    started_s: float
    ended_s: float = 0.0
    answer: object = None
    error: Exception | None = None

    @property
    def took_s(self):
        return self.ended_s - self.started_s

    def ran_between(self, begin_s, end_s):
        """Whether some of it lies in this time."""
        return self.started_s < end_s and self.ended_s > begin_s


class Load:
    """Clients that send both calls of one hand-over after the other, one behind the other or at once, until they are
    told to stop. A server that does not answer has a few calls waiting and gets no more, while the other one does."""

    CLIENTS = 4
    #: Calls that one server has at a time: fewer than it takes up together.
    OPEN_CALLS = 12
    #: Then a client goes on with its next hand-over, and a proxy to decode.
    PATIENCE_S = 2

    def __init__(self, pair, seed):
        self._pair = pair
        self._stopping = threading.Event()
        self._room = {side: threading.Semaphore(self.OPEN_CALLS) for side in (PREFILL, DECODE)}
        self._calls = []
        self._lock = threading.Lock()
        self._pool = concurrent.futures.ThreadPoolExecutor(2 * self.OPEN_CALLS + self.CLIENTS)
        self._clients = [self._pool.submit(self._client, random.Random(f"{seed} {i}")) for i in range(self.CLIENTS)]

    def wait_for_answers(self, side, count, limit_s):
        """Until so many calls more were answered by this server; the time limit is no claim."""
        wanted = self.answered(side) + count
        deadline = time.monotonic() + limit_s
        while self.answered(side) < wanted and time.monotonic() < deadline:
            time.sleep(0.05)

    def wait_until_asked(self, side, since_s, limit_s):
        """Until this server has had a call since then; the time limit is no claim."""
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            with self._lock:
                if any(call.side == side and (call.ended_s or deadline) > since_s for call, _ in self._calls):
                    return
            time.sleep(0.05)

    def answered(self, side):
        with self._lock:
            return sum(call.side == side and call.answer is not None for call, _ in self._calls)

    def finish(self):
        """No more calls; returns all of them. A call that does not end is an error."""
        self._stopping.set()
        for client in self._clients:
            client.result(ANSWER_LIMIT_S)
        deadline = time.monotonic() + ANSWER_LIMIT_S
        for _, future in self._calls:
            future.result(max(deadline - time.monotonic(), 0))
        self._pool.shutdown()
        return [call for call, _ in self._calls]

    def _client(self, draw):
        while not self._stopping.is_set():
            prompt, request_id = draw.choice(self._pair.prompts), self._pair.new_id()
            calls = [self._send(PREFILL, prompt, request_id)]
            if draw.random() < 0.5:
                concurrent.futures.wait([call for call in calls if call], self.PATIENCE_S)
            calls.append(self._send(DECODE, prompt, request_id))
            open_calls = [call for call in calls if call]
            if open_calls:
                concurrent.futures.wait(open_calls, self.PATIENCE_S)
            else:
                self._stopping.wait(0.1)

    def _send(self, side, prompt, request_id):
        """The running call, None if the server has enough of them."""
        if not self._room[side].acquire(blocking=False):
            return None
        call = Call(side, prompt, time.monotonic())
        future = self._pool.submit(self._carry_out, call, request_id)
        with self._lock:
            self._calls.append((call, future))
        return future

    def _carry_out(self, call, request_id):
        try:
            call.answer = self._pair.ask(call.side, call.prompt, request_id)
        except (httpx.HTTPError, RuntimeError) as error:
            call.error = error
        finally:
            call.ended_s = time.monotonic()
            if call.error is not None:
                self._stopping.wait(0.2)  # not a thousand calls a second to a server that is gone
            self._room[call.side].release()


def _beginning(result, tokens):
    return {
        "choices": [
            {"tokens": choice["tokens"][:tokens], "logprobs": choice["logprobs"][:tokens], "finish_reason": "length"}
            for choice in result["choices"]
        ]
    }
