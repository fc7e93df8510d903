"""Two real vLLM servers on this machine's CPUs hand KV over, behind kvlane's proxy: through a folder (`--backend fs`),
or from server to server (`--backend p2p`), once over each lane.

The same requests then go to one server without kvlane. Printed for each: prompt tokens, tokens whose KV was handed over
(vLLM's own count), time to first token, and whether text and log-probabilities are equal. Ends non-zero if they differ
or if not all was handed over that can be. Started by `make demo` and `make demo BACKEND=p2p`.

All servers run without prefix caching, so a token that was not computed can only have come from the other server. The
single server starts when the pair is gone and gets as many CPUs as decode had.
"""

import argparse
import contextlib
import json
import pathlib
import shutil
import signal
import statistics
import sys
import time
from typing import NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests" / "python"))

from support import cpus
from support.client import Completion, complete
from support.connector import p2p_config, transfer_config, transfer_id
from support.metrics import external_hits, pulled_bytes
from support.outcome import LOGPROB_TOLERANCE, full_blocks_tokens, logprob_difference, whole_prompt_tokens
from support.places import ROOT, TARGET, make_store, remove_store
from support.prompts import Prompts
from support.servers import free_ports, kvlane_proxy, vllm_server
from support.tiny_model import tiny_model, token_bytes, vocabulary_size

LANES = ["shm", "tcp"]
# The first is shorter than a block, so nothing can come over the folder for it. From server to server all can come.
PROMPT_TOKENS = [20, 128, 500, 1000, 2000, 4000]
# Different prompts of each length; times are the medians of them, the rest must hold for all.
PROMPTS_PER_LENGTH = 3
OUTPUT_TOKENS = 16
BLOCK_TOKENS = 32
MODEL_LEN_TOKENS = 4096
SEED = 20260101
SERVER_ARGUMENTS = [
    *("--dtype", "float32", "--block-size", str(BLOCK_TOKENS), "--max-model-len", str(MODEL_LEN_TOKENS)),
    "--no-enable-prefix-caching",
]
# What a run of this program puts on the disk: logs, the model, and the store if /dev/shm has no room for it.
DISK_BYTES_WANTED = 2 << 30
PROGRESS_EVERY_S = 10
REPORTS = 10
FLUSH_PROMPT = [5, 6, 7]


class Pair(NamedTuple):
    """What prefill and decode made of one prompt."""

    # The answer through the proxy.
    handed_over: Completion
    # Of that answer: tokens that decode took from the connector.
    external_tokens: int
    # Decode's own part, when prefill has computed the prompt.
    decode_alone: Completion
    # Of the answer through the proxy: bytes that arrived at decode over the lane. None through a folder, where every
    # token that is counted lies there already.
    pulled_bytes: int | None = None


def main(arguments=None):
    parser = argparse.ArgumentParser(description="Two real vLLM servers hand KV over.")
    parser.add_argument("--backend", choices=["fs", "p2p"], default="fs", help="through a folder, or directly")
    parser.add_argument("--lane", choices=LANES, action="append", help="of p2p; all of them unless given")
    given = parser.parse_args(arguments)
    if given.lane and given.backend == "fs":
        parser.error("--lane belongs to --backend p2p")
    lanes = [None] if given.backend == "fs" else given.lane or LANES
    # Lets the context managers stop the servers and remove the folder.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if given.backend == "fs":
        say("demo of the hand-over of KV through a folder, on real vLLM, about 3 minutes from here on two cores.")
    else:
        over = " and ".join(lanes)
        say(f"demo of the hand-over of KV from server to server over {over}, on real vLLM,")
        say(f"about {3 + len(lanes)} minutes from here on two cores.")
    say("Memory: about 5 GB. Disk: about 8 GB with the environment that was built before, below 1 GB now.")
    free = shutil.disk_usage(ROOT).free
    if free < DISK_BYTES_WANTED:
        say(f"only {free >> 20} MiB are free on this disk, {DISK_BYTES_WANTED >> 20} MiB are needed")
        return 2
    say("building the tiny model (random weights, answers that depend on the whole prompt), if it is not there yet")
    model = tiny_model("float32")
    prompts = Prompts(vocabulary_size(model), SEED)
    warm_up = prompts.tokens(700)
    requests = [prompts.tokens(count) for count in PROMPT_TOKENS for _ in range(PROMPTS_PER_LENGTH)]
    if given.backend == "fs":
        pairs = {None: run_folder(model, warm_up, requests)}
    else:
        pairs = run_lanes(model, warm_up, requests, lanes)
    single = run_single(model, warm_up, requests)
    rows = make_rows(requests, pairs, single)
    print_table(rows)
    result = TARGET / "demo" / f"{given.backend}.json"
    result.parent.mkdir(parents=True, exist_ok=True)
    public = [{name: value for name, value in row.items() if not name.startswith("_")} for row in rows]
    result.write_text(json.dumps({"rows": public}, indent=2) + "\n")
    say(f"written: {result.relative_to(ROOT)}")
    return verdict(rows)


def run_folder(model, warm_up, requests):
    """A `Pair` per request, of two servers that share a folder."""
    prefill_cpus, decode_cpus = cpus.halves()
    with contextlib.ExitStack() as stack:
        store = make_store("demo")
        stack.callback(remove_store, store)
        say(f"shared folder: {store}")
        servers = [
            stack.enter_context(
                vllm_server(name, model, on, transfer=transfer_config(role, store), arguments=SERVER_ARGUMENTS)
            )
            for name, role, on in (("prefill", "producer", prefill_cpus), ("decode", "consumer", decode_cpus))
        ]
        for server, on in zip(servers, (prefill_cpus, decode_cpus), strict=True):
            wait(server, on)
        prefill, decode = servers
        proxy = stack.enter_context(kvlane_proxy(prefill.url, decode.url))
        proxy.wait_until_ready()
        say(f"proxy ready: {proxy.url} in front of both")
        complete(proxy.url, warm_up, OUTPUT_TOKENS)
        answers = []
        for prompt in requests:
            before = external_hits(decode.url)
            handed_over = complete(proxy.url, prompt, OUTPUT_TOKENS)
            external_tokens = external_hits(decode.url) - before
            # The same prompt to decode alone: its KV is in the folder by now.
            answers.append(Pair(handed_over, external_tokens, complete(decode.url, prompt, OUTPUT_TOKENS)))
            show_progress(answers, prompt)
        return answers


def run_lanes(model, warm_up, requests, lanes):
    """By lane, a `Pair` per request. The prefill server stays, each lane gets a decode server of its own."""
    prefill_cpus, decode_cpus = cpus.halves()
    kv_ports = free_ports(2)
    pairs = {}
    with vllm_server(
        "prefill",
        model,
        prefill_cpus,
        transfer=p2p_config("producer", kv_ports[0], host="127.0.0.1"),
        arguments=SERVER_ARGUMENTS,
    ) as prefill:
        for lane in lanes:
            with contextlib.ExitStack() as stack:
                decode = stack.enter_context(
                    vllm_server(
                        f"decode-{lane}",
                        model,
                        decode_cpus,
                        transfer=p2p_config("consumer", kv_ports[1], host="127.0.0.1", lane=lane),
                        arguments=SERVER_ARGUMENTS,
                    )
                )
                if not pairs:
                    wait(prefill, prefill_cpus)
                wait(decode, decode_cpus)
                proxy = stack.enter_context(kvlane_proxy(prefill.url, decode.url, kv_ports=kv_ports))
                proxy.wait_until_ready()
                say(f"proxy ready: {proxy.url} in front of both, KV goes over {lane}")
                pairs[lane] = ask_over_lane(lane, prefill, decode, proxy, kv_ports, warm_up, requests)
    return pairs


def ask_over_lane(lane, prefill, decode, proxy, kv_ports, warm_up, requests):
    complete(proxy.url, warm_up, OUTPUT_TOKENS)
    answers = []
    for prompt in requests:
        before = external_hits(decode.url), pulled_bytes(decode.url, lane)
        handed_over = complete(proxy.url, prompt, OUTPUT_TOKENS)
        after = external_hits(decode.url), settled_bytes(decode, lane, before[1] + len(prompt) * token_bytes("float32"))
        # Another hand-over of the same prompt, of which only decode's part is timed.
        request_id = transfer_id(*(f"127.0.0.1:{port}" for port in kv_ports))
        complete(prefill.url, prompt, 1, request_id=request_id)
        decode_alone = complete(decode.url, prompt, OUTPUT_TOKENS, request_id=request_id)
        answers.append(Pair(handed_over, after[0] - before[0], decode_alone, after[1] - before[1]))
        show_progress(answers, prompt)
    return answers


def settled_bytes(decode, lane, expected):
    """The bytes that arrived, once they are as many as expected or a few reports have come: a worker tells its figures
    with the steps of later requests."""
    for _ in range(REPORTS):
        if pulled_bytes(decode.url, lane) >= expected:
            break
        complete(decode.url, FLUSH_PROMPT, 2)
        time.sleep(0.3)
    return pulled_bytes(decode.url, lane)


def show_progress(answers, prompt):
    if len(answers) % PROMPTS_PER_LENGTH == 0:
        say(f"{PROMPTS_PER_LENGTH} prompts of {len(prompt)} tokens went through the proxy")


def run_single(model, warm_up, requests):
    on = cpus.halves()[1]
    with vllm_server("single", model, on, arguments=SERVER_ARGUMENTS) as server:
        wait(server, on)
        complete(server.url, warm_up, OUTPUT_TOKENS)
        return [complete(server.url, prompt, OUTPUT_TOKENS) for prompt in requests]


def wait(server, on):
    shown_s = [0.0]

    def show(waited_s):
        if waited_s - shown_s[0] >= PROGRESS_EVERY_S:
            shown_s[0] = waited_s
            say(f"waiting for the {server.name} server, {waited_s:.0f} s (log: {server.log_path.relative_to(ROOT)})")

    say(f"{server.name} server ready after {server.wait_until_ready(show):.0f} s on CPUs {on}")


def make_rows(requests, pairs, single):
    """The table: per lane, one row for the prompts of each length."""
    rows = []
    for lane, answers_of_lane in pairs.items():
        answers = list(zip(requests, answers_of_lane, single, strict=True))
        for start in range(0, len(answers), PROMPTS_PER_LENGTH):
            rows.append(make_row(answers[start : start + PROMPTS_PER_LENGTH], lane))
    return rows


def make_row(answers, lane=None):
    """One row of the table from the answers to prompts of one length; without a lane they came through a folder."""
    handed_over = [pair.handed_over for _, pair, _ in answers]
    single = [alone for _, _, alone in answers]
    choices = [(a.choices()["choices"][0], b.choices()["choices"][0]) for a, b in zip(handed_over, single, strict=True)]
    texts_equal = all(a.texts == b.texts for a, b in zip(handed_over, single, strict=True))
    prompt_tokens = len(answers[0][0])
    if lane is None:
        expected_tokens = full_blocks_tokens(prompt_tokens, BLOCK_TOKENS)
    else:
        expected_tokens = whole_prompt_tokens(prompt_tokens)
    row = {
        "prompt_tokens": prompt_tokens,
        # The one that is furthest off: a prompt whose KV did not come over must not hide behind others.
        "external_tokens": max(
            (pair.external_tokens for _, pair, _ in answers), key=lambda tokens: abs(tokens - expected_tokens)
        ),
        "ttft_ms": median_ms(answer.ttft_s for answer in handed_over),
        "single_ttft_ms": median_ms(answer.ttft_s for answer in single),
        "text_equal": texts_equal and all(got["tokens"] == wanted["tokens"] for got, wanted in choices),
        "max_logprob_diff": max(logprob_difference(got, wanted) for got, wanted in choices),
        "_decode_ttft_ms": median_ms(pair.decode_alone.ttft_s for _, pair, _ in answers),
        "_expected_tokens": expected_tokens,
    }
    if lane is None:
        return row
    return {
        **row,
        "lane": lane,
        "_pulled_bytes": min(pair.pulled_bytes for _, pair, _ in answers),
        "_prompt_bytes": prompt_tokens * token_bytes("float32"),
    }


def median_ms(seconds):
    return round(statistics.median(seconds) * 1e3, 2)


def print_table(rows):
    lanes = "lane" in rows[0]
    head, over = ("lane ", "lane") if lanes else ("", "folder")
    print()
    print(f"{' ' * len(head)}  prompt    over the     time to first token, ms            equal to the single server")
    print(f"{head}  tokens  {over:>10s}    proxy  decode alone   single      text    log-prob. difference")
    for row in rows:
        lane = f"{row['lane']:<5s}" if lanes else ""
        print(
            f"{lane}{row['prompt_tokens']:8d} {row['external_tokens']:11d} {row['ttft_ms']:8.0f}"
            f" {row['_decode_ttft_ms']:13.0f} {row['single_ttft_ms']:8.0f}"
            f" {'yes' if row['text_equal'] else 'NO':>9s} {row['max_logprob_diff']:23.2g}"
        )
    print()
    print(f"Times are medians of {PROMPTS_PER_LENGTH} prompts.")
    print("proxy: from the client's call to its first token, with the prefill on the other server and the hand-over.")
    if lanes:
        print("decode alone: the decode server's part when prefill has computed the prompt: the lane and what is left.")
    else:
        print("decode alone: the decode server's part when the KV is in the folder: what a hand-over leaves to do.")
    print("single: one server without kvlane computes the whole prompt, on as many CPUs as decode has.")
    print()


def verdict(rows):
    problems = []
    for row in rows:
        lane = row.get("lane")
        what = f"{row['prompt_tokens']} tokens over {lane}" if lane else f"{row['prompt_tokens']} tokens"
        over = "lane" if lane else "folder"
        if not row["text_equal"]:
            problems.append(f"{what}: the text differs from the single server's")
        if row["max_logprob_diff"] > LOGPROB_TOLERANCE["float32"]:
            problems.append(f"{what}: log-probabilities differ by {row['max_logprob_diff']:.3g}")
        if row["external_tokens"] != row["_expected_tokens"]:
            expected = row["_expected_tokens"]
            problems.append(f"{what}: KV of {row['external_tokens']} tokens came over the {over}, {expected} expected")
        # vLLM counts what was planned. What was lost on the way shows in the bytes only.
        if lane and row["_pulled_bytes"] < row["_prompt_bytes"]:
            least = row["_prompt_bytes"]
            problems.append(f"{what}: {row['_pulled_bytes']} bytes came over the lane, at least {least} expected")
    for problem in problems:
        say(f"FAILED: {problem}")
    if not problems and "lane" in rows[0]:
        say("passed: every answer equals the single server's, and the KV of all prompts came over the lanes")
    elif not problems:
        say("passed: every answer equals the single server's, and all whole blocks came over the folder")
    return 1 if problems else 0


def say(line):
    print(f"kvlane: {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
