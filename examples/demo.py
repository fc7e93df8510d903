"""Two real vLLM servers on this machine's CPUs hand KV over through a folder, behind kvlane's proxy.

The same requests then go to one server without kvlane. Printed for each: prompt tokens, tokens whose KV came over the
folder (vLLM's own count), time to first token, and whether text and log-probabilities are equal. Ends non-zero if they
differ or if nothing came over the folder. Started by `make demo`.

All servers run without prefix caching, so a token that was not computed can only have come over the folder. The single
server starts when the pair is gone and gets as many CPUs as decode had.
"""

import contextlib
import json
import pathlib
import shutil
import signal
import statistics
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "tests" / "python"))

from support import cpus
from support.client import complete
from support.connector import transfer_config
from support.metrics import external_hits
from support.outcome import LOGPROB_TOLERANCE, full_blocks_tokens, logprob_difference
from support.places import ROOT, TARGET, make_store, remove_store
from support.prompts import Prompts
from support.servers import kvlane_proxy, vllm_server
from support.tiny_model import tiny_model, vocabulary_size

RESULT = TARGET / "demo" / "fs.json"
# The first is shorter than a block, so nothing can come over the folder for it.
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


def main():
    # Lets the context managers stop the servers and remove the folder.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    say("demo of the hand-over of KV through a folder, on real vLLM, about 3 minutes from here on two cores.")
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
    pair = run_pair(model, warm_up, requests)
    single = run_single(model, warm_up, requests)
    answers = list(zip(requests, pair, single, strict=True))
    rows = [make_row(answers[i : i + PROMPTS_PER_LENGTH]) for i in range(0, len(answers), PROMPTS_PER_LENGTH)]
    print_table(rows)
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    public = [{name: value for name, value in row.items() if not name.startswith("_")} for row in rows]
    RESULT.write_text(json.dumps({"rows": public}, indent=2) + "\n")
    say(f"written: {RESULT.relative_to(ROOT)}")
    return verdict(rows)


def run_pair(model, warm_up, requests):
    """Per request: the answer through the proxy, tokens that came over the folder, the answer of decode alone."""
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
            answers.append((handed_over, external_tokens, complete(decode.url, prompt, OUTPUT_TOKENS)))
            if len(answers) % PROMPTS_PER_LENGTH == 0:
                say(f"{PROMPTS_PER_LENGTH} prompts of {len(prompt)} tokens went through the proxy")
        return answers


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


def make_row(answers):
    """One row of the table from the answers to prompts of one length."""
    handed_over = [pair[0] for _, pair, _ in answers]
    single = [alone for _, _, alone in answers]
    choices = [(a.choices()["choices"][0], b.choices()["choices"][0]) for a, b in zip(handed_over, single, strict=True)]
    texts_equal = all(a.texts == b.texts for a, b in zip(handed_over, single, strict=True))
    prompt_tokens = len(answers[0][0])
    expected_tokens = full_blocks_tokens(prompt_tokens, BLOCK_TOKENS)
    return {
        "prompt_tokens": prompt_tokens,
        # The one that is furthest off: a prompt whose KV did not come over must not hide behind others.
        "external_tokens": max((pair[1] for _, pair, _ in answers), key=lambda tokens: abs(tokens - expected_tokens)),
        "ttft_ms": median_ms(answer.ttft_s for answer in handed_over),
        "single_ttft_ms": median_ms(answer.ttft_s for answer in single),
        "text_equal": texts_equal and all(got["tokens"] == wanted["tokens"] for got, wanted in choices),
        "max_logprob_diff": max(logprob_difference(got, wanted) for got, wanted in choices),
        "_decode_ttft_ms": median_ms(pair[2].ttft_s for _, pair, _ in answers),
        "_expected_tokens": expected_tokens,
    }


def median_ms(seconds):
    return round(statistics.median(seconds) * 1e3, 2)


def print_table(rows):
    print()
    print("  prompt    over the     time to first token, ms            equal to the single server")
    print("  tokens      folder    proxy  decode alone   single      text    log-prob. difference")
    for row in rows:
        print(
            f"{row['prompt_tokens']:8d} {row['external_tokens']:11d} {row['ttft_ms']:8.0f}"
            f" {row['_decode_ttft_ms']:13.0f} {row['single_ttft_ms']:8.0f}"
            f" {'yes' if row['text_equal'] else 'NO':>9s} {row['max_logprob_diff']:23.2g}"
        )
    print()
    print(f"Times are medians of {PROMPTS_PER_LENGTH} prompts.")
    print("proxy: from the client's call to its first token, with the prefill on the other server and the hand-over.")
    print("decode alone: the decode server's part when the KV is in the folder: what a hand-over leaves to do.")
    print("single: one server without kvlane computes the whole prompt, on as many CPUs as decode has.")
    print()


def verdict(rows):
    problems = []
    for row in rows:
        what = f"{row['prompt_tokens']} tokens"
        if not row["text_equal"]:
            problems.append(f"{what}: the text differs from the single server's")
        if row["max_logprob_diff"] > LOGPROB_TOLERANCE["float32"]:
            problems.append(f"{what}: log-probabilities differ by {row['max_logprob_diff']:.3g}")
        if row["external_tokens"] != row["_expected_tokens"]:
            expected = row["_expected_tokens"]
            problems.append(f"{what}: KV of {row['external_tokens']} tokens came over the folder, {expected} expected")
    for problem in problems:
        say(f"FAILED: {problem}")
    if not problems:
        say("passed: every answer equals the single server's, and all whole blocks came over the folder")
    return 1 if problems else 0


def say(line):
    print(f"kvlane: {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
