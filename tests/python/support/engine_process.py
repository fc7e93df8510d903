"""The inside of an engine process: opens vLLM engines one after another and answers jobs, one JSON object per line.

Started by engine.py with the descriptor for answers as its argument; vLLM's own output stays on stdout. Jobs:
open, run, counters, counters_by_label, free_blocks, lowest_free_blocks, settle, reset_prefix_cache, close.
"""

import faulthandler
import gc
import json
import os
import signal
import sys
import time
import traceback


class EngineHost:
    """At most one open engine; a process is reused because the first engine costs its imports."""

    def __init__(self):
        self._engine = None

    def open(self, settings, transfer, environment):
        os.environ.update(environment)
        from vllm import envs
        from vllm.config import KVTransferConfig
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        self.close()
        if hasattr(envs, "disable_envs_cache"):
            envs.disable_envs_cache()
        if transfer is not None:
            settings = {**settings, "kv_transfer_config": KVTransferConfig(**transfer)}
        for attempts_left in (2, 1, 0):
            try:
                self._engine = LLMEngine.from_engine_args(EngineArgs(**settings))
                break
            except Exception as error:
                # vLLM chooses a free port, lets go of it and listens there later: another engine may have it by then.
                if "EADDRINUSE" not in str(error) or not attempts_left:
                    raise
                print("another engine took the port that vLLM had chosen; once more", file=sys.stderr, flush=True)
        self._lowest_free_blocks = self.free_blocks()
        return {"free_blocks": self._lowest_free_blocks}

    def close(self):
        if self._engine is None:
            return
        from vllm.distributed import kv_transfer

        self._engine.engine_core.shutdown()
        # With the worker in this process nobody else drops its connector, and the next engine would inherit it.
        kv_transfer.ensure_kv_transfer_shutdown()
        self._engine = None
        gc.collect()

    def run(self, requests, deadline_s):
        """Adds all requests at once and steps until every one has ended."""
        started = time.perf_counter()
        progress = {request["id"]: _Progress(request) for request in requests}
        for request in requests:
            prompt = {"prompt_token_ids": request["prompt"]}
            if request.get("cache_salt") is not None:
                prompt["cache_salt"] = request["cache_salt"]
            self._engine.add_request(request["id"], prompt, _sampling(request))
        steps = 0
        while self._engine.has_unfinished_requests():
            outputs = self._engine.step()
            for output in outputs:
                progress[output.request_id].take(output, time.perf_counter() - started)
            if not outputs:
                # As vLLM's own loop does it. Without it a loop that waits for KV starves everything else: beside two
                # ranks, whose workers answer each step, all other processes of two cores stood still for 30 s.
                time.sleep(0.001)
            steps += 1
            self._lowest_free_blocks = min(self._lowest_free_blocks, self.free_blocks())
            ending = [p.id for p in progress.values() if p.wants_abort(steps)]
            if ending:
                for request_id in ending:
                    progress[request_id].state_at_abort = self._state(request_id)
                self._engine.abort_request(ending)
            if time.perf_counter() - started > deadline_s:
                stuck = [p.id for p in progress.values() if not p.finished]
                self._engine.abort_request(stuck)
                raise TimeoutError(f"{len(stuck)} requests did not end within {deadline_s} s: {stuck}")
        return {request_id: p.result() for request_id, p in progress.items()}

    def counters(self):
        """vLLM's Prometheus counters and gauges of this engine, summed over their labels."""
        from vllm.v1.metrics.reader import get_metrics_snapshot

        values = {}
        for metric in get_metrics_snapshot():
            if hasattr(metric, "value"):
                values[metric.name] = values.get(metric.name, 0) + metric.value
        return values

    def counters_by_label(self, name, label):
        """The samples of one of them by the value of one label, summed over the others."""
        from vllm.v1.metrics.reader import get_metrics_snapshot

        values = {}
        for metric in get_metrics_snapshot():
            if metric.name == name and hasattr(metric, "value"):
                key = metric.labels.get(label, "")
                values[key] = values.get(key, 0) + metric.value
        return values

    def lowest_free_blocks(self):
        """The fewest free blocks behind any step since the engine was opened."""
        return self._lowest_free_blocks

    def free_blocks(self):
        return self._scheduler().kv_cache_manager.block_pool.get_num_free_blocks()

    def settle(self, free_blocks, deadline_s, with_requests):
        """Steps without work until so many blocks are free again: an aborted load may hold its blocks for a while.

        `with_requests`: a step is made for a request only, so now and then there is a short one of no prefill server.
        """
        started, lowest_free_blocks = time.perf_counter(), self._lowest_free_blocks
        next_request_s, count = 1, 0
        while self.free_blocks() != free_blocks and (waited_s := time.perf_counter() - started) < deadline_s:
            if with_requests and waited_s >= next_request_s:
                next_request_s, count = waited_s + 1, count + 1
                self.run([{"id": f"settle-{count}", "prompt": [5, 6, 7], "max_tokens": 1}], deadline_s - waited_s)
            self._engine.step()
            time.sleep(0.002)
        self._lowest_free_blocks = lowest_free_blocks
        return self.free_blocks()

    def reset_prefix_cache(self):
        return self._engine.reset_prefix_cache()

    def _state(self, request_id):
        """The name of vLLM's state of a request, None if the scheduler does not have it. Newer versions add to ids."""
        for known_id, request in self._scheduler().requests.items():
            if known_id == request_id or known_id.startswith(f"{request_id}-"):
                return request.status.name
        return None

    def _scheduler(self):
        return self._engine.engine_core.engine_core.scheduler


class _Progress:
    def __init__(self, request):
        self.id = request["id"]
        self.finished = False
        self.state_at_abort = None
        self._abort_after_tokens = request.get("abort_after_tokens")
        self._abort_after_steps = request.get("abort_after_steps")
        self._aborted = False
        self._cached_tokens = None
        self._choices = {}
        self._ttft_s = None

    def take(self, output, now_s):
        self._cached_tokens = output.num_cached_tokens
        # With n > 1 an output carries only the choices that changed.
        self._choices.update((choice.index, choice) for choice in output.outputs)
        self.finished = output.finished
        if self._ttft_s is None and any(choice.token_ids for choice in output.outputs):
            self._ttft_s = now_s

    def wants_abort(self, steps):
        if self._aborted or self.finished:
            return False
        tokens = max((len(choice.token_ids) for choice in self._choices.values()), default=0)
        self._aborted = (self._abort_after_tokens is not None and tokens >= self._abort_after_tokens) or (
            self._abort_after_steps is not None and steps >= self._abort_after_steps
        )
        return self._aborted

    def result(self):
        return {
            "choices": [_choice(self._choices[index]) for index in sorted(self._choices)],
            "cached_tokens": self._cached_tokens,
            "ttft_s": self._ttft_s,
            "aborted": self._aborted,
            "state_at_abort": self.state_at_abort,
        }


def _choice(choice):
    tokens = list(choice.token_ids)
    logprobs = [entry[token].logprob for token, entry in zip(tokens, choice.logprobs or [], strict=True)]
    return {"tokens": tokens, "logprobs": logprobs, "finish_reason": choice.finish_reason}


def _sampling(request):
    from vllm import SamplingParams

    return SamplingParams(
        max_tokens=request["max_tokens"],
        temperature=request.get("temperature", 0.0),
        seed=request.get("seed"),
        n=request.get("n", 1),
        logprobs=1,
        ignore_eos=True,
        extra_args=request.get("extra_args"),
    )


def main():
    # Asked for by the parent before it kills a process that does not answer: the log then says where it stood.
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    faulthandler.enable()
    answers = os.fdopen(int(sys.argv[1]), "w")
    host = EngineHost()
    for line in sys.stdin:
        job = json.loads(line)
        number = job.pop("number")
        try:
            answer = {"ok": getattr(host, job.pop("job"))(**job)}
        except BaseException as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps({"number": number, **answer}), file=answers, flush=True)
    host.close()


if __name__ == "__main__":
    main()
