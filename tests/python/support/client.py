"""A streaming completions client that keeps what the tests and the demo compare: times, tokens, log-probabilities."""

import contextlib
import json
import time
from dataclasses import dataclass, field

import httpx

MODEL_NAME = "tiny"
REQUEST_LIMIT_S = 120


@dataclass
class Completion:
    """One answer. Lists are indexed by choice; a call with several prompts or n > 1 has several choices."""

    ttft_s: float | None = None
    tokens: list = field(default_factory=list)
    logprobs: list = field(default_factory=list)
    texts: list = field(default_factory=list)
    finish_reasons: list = field(default_factory=list)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def choices(self):
        """In the form of support.outcome: one dict per choice."""
        return {
            "choices": [
                {"tokens": tokens, "logprobs": logprobs, "finish_reason": reason}
                for tokens, logprobs, reason in zip(self.tokens, self.logprobs, self.finish_reasons, strict=True)
            ]
        }


def complete(
    url,
    prompt,
    max_tokens,
    *,
    request_id=None,
    abort_after_chunks=None,
    abort_after_silence_s=None,
    limit_s=REQUEST_LIMIT_S,
    **sampling,
):
    """Streams one greedy completion from `url` (no path). `prompt`: token ids, or a list of such lists.
    `abort_after_chunks` hangs up after that many events that carry text, as a client does that went away;
    `abort_after_silence_s` when so long nothing came. The answer then is what came until there."""
    body = {
        "model": MODEL_NAME,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "logprobs": 1,
        "return_tokens_as_token_ids": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **sampling,
    }
    prompts = len(prompt) if isinstance(prompt[0], list) else 1
    count = prompts * body.get("n", 1)
    answer = Completion(
        tokens=[[] for _ in range(count)],
        logprobs=[[] for _ in range(count)],
        texts=[""] * count,
        finish_reasons=[None] * count,
    )
    headers = {"X-Request-Id": request_id} if request_id else {}
    chunks = 0
    started = time.perf_counter()
    hang_ups = [] if abort_after_silence_s is None else [httpx.ReadTimeout]
    timeout = httpx.Timeout(limit_s, read=abort_after_silence_s or limit_s)
    with (
        contextlib.suppress(*hang_ups),
        httpx.stream("POST", f"{url}/v1/completions", json=body, headers=headers, timeout=timeout) as response,
    ):
        if response.status_code != 200:
            response.read()
            raise RuntimeError(f"{url}: {response.status_code} {response.text[:500]}")
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "choices" not in event:
                raise RuntimeError(f"{url}: error inside the stream: {line[:500]}")
            for choice in event["choices"]:
                if answer.ttft_s is None:
                    answer.ttft_s = time.perf_counter() - started
                _take(answer, choice)
                chunks += 1
            if event.get("usage"):
                _take_usage(answer, event["usage"])
            if abort_after_chunks is not None and chunks >= abort_after_chunks:
                break
    return answer


def _take(answer, choice):
    index = choice["index"]
    answer.texts[index] += choice["text"]
    if choice.get("logprobs"):
        answer.tokens[index] += choice["logprobs"]["tokens"]
        answer.logprobs[index] += choice["logprobs"]["token_logprobs"]
    answer.finish_reasons[index] = choice.get("finish_reason") or answer.finish_reasons[index]


def _take_usage(answer, usage):
    answer.prompt_tokens = usage["prompt_tokens"]
    answer.completion_tokens = usage.get("completion_tokens", 0)
    answer.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
