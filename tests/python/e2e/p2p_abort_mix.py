"""Short requests through a prefill and a decode server, of which every fifth loses its client on the way, and what the
two servers hold and take afterwards."""

import concurrent.futures
import time
from dataclasses import dataclass

from p2p_fault_pair import ANSWER_LIMIT_S, DECODE, LEASE_MS, PREFILL, SHORT_TOKENS
from support.client import complete
from support.metrics import scrape
from support.resources import resources_of_session
from support.vllm_environment import TAKES_BACK_WITH_A_REQUEST

CLIENTS = 8
ABORTED_OF_FIVE = 1
OUTPUT_TOKENS = 4
IDLE_LIMIT_S = 60


@dataclass(frozen=True)
class Plan:
    """One hand-over: both calls, at once or one behind the other, and which of them is left alone."""

    prompt: list
    at_once: bool
    #: The sides whose clients hang up; a call that has not been made by then is never made.
    aborted: tuple = ()
    #: They hang up when so long nothing came, and behind so many tokens.
    silence_s: float = 0.0
    chunks: int = 0


def plans(prompts, draw, count):
    """So many hand-overs. One fifth is aborted: by prefill's client, decode's, both, or between the calls."""
    aborted = set(draw.sample(range(count), count * ABORTED_OF_FIVE // 5))
    short = [prompt for prompt in prompts if len(prompt) in SHORT_TOKENS]
    made = []
    for number in range(count):
        plan = {"prompt": draw.choice(short), "at_once": draw.random() < 0.5}
        if number in aborted:
            plan["aborted"] = draw.choice([(PREFILL,), (DECODE,), (PREFILL, DECODE), ("between",)])
            plan["silence_s"], plan["chunks"] = draw.uniform(0.002, 0.1), draw.choice([1, 3])
        made.append(Plan(**plan))
    return made


def carry_out(pair, all_plans):
    """Carries them out, a few at a time. What is not aborted must be answered, and rightly."""
    with (
        concurrent.futures.ThreadPoolExecutor(CLIENTS) as clients,
        concurrent.futures.ThreadPoolExecutor(CLIENTS) as second_calls,
    ):
        for future in [clients.submit(_hand_over, pair, second_calls, plan) for plan in all_plans]:
            future.result()


def _hand_over(pair, second_calls, plan):
    request_id = pair.new_id()
    first = second_calls.submit(_call, pair, PREFILL, plan, request_id)
    if not plan.at_once:
        first.result(ANSWER_LIMIT_S)
    if "between" not in plan.aborted:
        _call(pair, DECODE, plan, request_id)
    first.result(ANSWER_LIMIT_S)


def _call(pair, side, plan, request_id):
    if side in plan.aborted:
        ends = {"abort_after_silence_s": plan.silence_s, "abort_after_chunks": plan.chunks}
        pair.ask(side, plan.prompt, request_id, OUTPUT_TOKENS, **ends)
    else:
        answer = pair.ask(side, plan.prompt, request_id, OUTPUT_TOKENS)
        pair.assert_right(side, plan.prompt, answer, OUTPUT_TOKENS)


def wait_until_nothing_is_held(pair):
    """Claims that soon both servers have no requests, and every block of their caches is free: no lease is left."""
    urls = {side: server.url for side, server in pair.servers.items()}
    _wait_for(urls, "requests", "vllm:num_requests_running", "vllm:num_requests_waiting")
    if TAKES_BACK_WITH_A_REQUEST:
        # A lease that nobody claims has its whole time, and who ends it may be held up. What is late by a request is
        # not late by two.
        time.sleep(LEASE_MS / 1000 + 10)
        for url in urls.values():
            complete(url, [5, 6, 7], 4)
    _wait_for(urls, "used part of the cache", "vllm:kv_cache_usage_perc")


def _wait_for(urls, what, *names):
    deadline = time.monotonic() + IDLE_LIMIT_S
    while True:
        left = {side: sum(scrape(url)[name] for name in names) for side, url in urls.items()}
        if not any(left.values()):
            return
        assert time.monotonic() < deadline, f"{what} after {IDLE_LIMIT_S} s without requests: {left}"
        time.sleep(0.2)


def settled_resources(pair, limit_s=20):
    """What each server takes once two looks a second apart see the same threads and descriptors."""
    looks = [_look(pair)]
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        time.sleep(1)
        looks.append(_look(pair))
        if all(_counts(looks[-1][side]) == _counts(looks[-2][side]) for side in looks[-1]):
            break
    return looks[-1]


def more_than(before, after):
    """By server the threads, descriptors and processes that were not there before, as text; empty if there are none."""
    grown = {}
    for side, resources in before.items():
        was, now = _counts(resources), _counts(after[side])
        more = [f"{now[name] - was[name]} {name}" for name in was if now[name] > was[name]]
        if more:
            grown[side] = ", ".join(more)
    return grown


def _look(pair):
    return {side: resources_of_session(server.pid) for side, server in pair.servers.items()}


def _counts(resources):
    return {name: getattr(resources, name) for name in ("processes", "threads", "sockets", "files")}
