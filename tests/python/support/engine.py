"""Handles to processes that run vLLM engines in place (no HTTP), so that one test run can try many configurations."""

import json
import os
import pathlib
import queue
import signal
import subprocess
import sys
import threading
import time

from support.cpus import omp_binding
from support.places import log_path, make_temporary, remove_temporary
from support.processes import end_session
from support.vllm_environment import TAKES_BACK_WITH_A_REQUEST, vllm_environment

HERE = pathlib.Path(__file__).resolve().parent
OPEN_LIMIT_S = 180
RUN_LIMIT_S = 90
# On top of the engine's own deadline: what a loaded machine may add before the answer is read.
ANSWER_SLACK_S = 30
# vLLM 0.15 keeps the KV cache of every engine that was closed (210 MB here), with and without a connector. Beyond this
# a process is replaced before it opens the next one, so that three of them never fill the machine.
RESIDENT_LIMIT_BYTES = 3 << 30


class EngineError(RuntimeError):
    """The engine process answered with an error, or did not answer."""


class Engine:
    """One process, at most one open engine at a time. Use as a context manager: leaving it ends the process."""

    def __init__(self, name, cpus):
        self.name = name
        self._log_path = log_path(f"engine-{name}")
        self._cpus = cpus
        self._temporary = make_temporary(name)
        self._start()

    def _start(self):
        self._configuration = None
        self._started_s = time.time()
        environment = vllm_environment(self._cpus)
        # The engine loop must be ours: aborts and preemptions are placed by step, not by luck.
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        environment["PYTHONPATH"] = os.pathsep.join(map(str, (HERE.parent, HERE / "startup")))
        environment["TMPDIR"] = str(self._temporary)
        read_end, write_end = os.pipe()
        with open(self._log_path, "a") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(HERE / "engine_process.py"), str(write_end)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=[write_end],
                env=environment,
                start_new_session=True,
                text=True,
            )
        os.close(write_end)
        self._answers = queue.SimpleQueue()
        self._jobs_sent = 0
        threading.Thread(target=self._read_answers, args=(read_end, self._answers), daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()
        remove_temporary(self._temporary)

    @property
    def pid(self):
        """The engine process; its session holds the worker processes too."""
        return self._process.pid

    def open(self, settings, transfer=None, cpus=None):
        """Opens an engine with these EngineArgs; does nothing if exactly this one is already open. `cpus`: other ones
        than the process started with, split between the ranks."""
        self.begin_open(settings, transfer, cpus)
        self.finish_open()

    def begin_open(self, settings, transfer=None, cpus=None):
        """The first half of `open`, so that two processes can start their engines at once. A process that died in an
        earlier test is replaced."""
        self._opening = None
        if self._process.poll() is not None:
            self._start()
        binding = omp_binding(cpus or self._cpus, settings.get("tensor_parallel_size", 1))
        if self._configuration != (settings, transfer, binding):
            if self._resident_bytes() > RESIDENT_LIMIT_BYTES or self._is_older_than(settings["model"]):
                self.stop()
                self._start()
            self._configuration = None
            self._opening = (settings, transfer, binding)
            environment = {"VLLM_CPU_OMP_THREADS_BIND": binding}
            self._send("open", settings=settings, transfer=transfer, environment=environment)

    def finish_open(self):
        if self._opening is not None:
            self.free_blocks_at_start = self._receive(OPEN_LIMIT_S)["free_blocks"]
            self._configuration = self._opening

    def close(self):
        """Closes the engine; the process stays."""
        self._configuration = None
        if self._process.poll() is None:
            self._call("close")

    def run(self, requests, limit_s=RUN_LIMIT_S):
        """Runs requests together; returns per id: choices (tokens, logprobs, finish_reason), cached_tokens, ttft_s."""
        self.begin_run(requests, limit_s)
        return self.finish_run()

    def begin_run(self, requests, limit_s=RUN_LIMIT_S):
        self._run_limit_s = limit_s
        self._send("run", requests=requests, deadline_s=limit_s)

    def finish_run(self):
        return self._receive(self._run_limit_s + ANSWER_SLACK_S)

    def counters(self):
        """vLLM's counters and gauges, by Prometheus name."""
        return self._call("counters")

    def counters_by_label(self, name, label):
        """One counter, by the value of one of its labels."""
        return self._call("counters_by_label", name=name, label=label)

    def free_blocks(self):
        return self._call("free_blocks")

    def lowest_free_blocks(self):
        """The fewest that were free behind any step since the engine was opened."""
        return self._call("lowest_free_blocks")

    def settled_free_blocks(self, limit_s=60):
        """Free blocks once every block of ended requests has come back, or after the limit."""
        with_requests = TAKES_BACK_WITH_A_REQUEST
        self._send("settle", free_blocks=self.free_blocks_at_start, deadline_s=limit_s, with_requests=with_requests)
        return self._receive(limit_s + ANSWER_SLACK_S)

    def reset_prefix_cache(self):
        return self._call("reset_prefix_cache")

    def stop(self):
        """Ends the process and everything in its session."""
        try:
            self._process.stdin.close()
            self._process.wait(20)
        except (OSError, subprocess.TimeoutExpired):
            pass
        end_session(self._process)

    def _call(self, job, **arguments):
        self._send(job, **arguments)
        return self._receive(ANSWER_SLACK_S)

    def _send(self, job, **arguments):
        self._jobs_sent += 1
        try:
            line = json.dumps({"number": self._jobs_sent, "job": job, **arguments})
            print(line, file=self._process.stdin, flush=True)
        except (BrokenPipeError, ValueError) as error:
            raise EngineError(f"engine process '{self.name}' is gone; its log: {self._log_path}") from error

    def _receive(self, limit_s):
        """The answer to the job sent last. An older one belongs to a test that failed before it took it."""
        answer = {"number": 0}
        while answer["number"] != self._jobs_sent:
            try:
                line = self._answers.get(timeout=limit_s)
            except queue.Empty:
                self._dump_stacks()
                self.stop()
                raise EngineError(
                    f"engine process '{self.name}' did not answer within {limit_s} s and was killed; "
                    f"its log: {self._log_path}"
                ) from None
            if line is None:
                self._answers.put(None)
                raise EngineError(f"engine process '{self.name}' {self._how_it_ended()}; its log: {self._log_path}")
            answer = json.loads(line)
        if "error" in answer:
            raise EngineError(f"engine process '{self.name}': {answer['error']}; its log: {self._log_path}")
        return answer["ok"]

    def _dump_stacks(self):
        """Lets the process write the stacks of its threads into its log."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGUSR1)
            time.sleep(1)

    def _resident_bytes(self):
        pages = int(pathlib.Path(f"/proc/{self._process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    def _is_older_than(self, model):
        """Weights that were made while a process ran are shared with nobody."""
        # A margin for clocks that differ: the file system's is behind by some milliseconds.
        folder = pathlib.Path(model)
        return any(file.stat().st_ctime > self._started_s - 0.1 for file in [folder, *folder.glob("*.safetensors")])

    def _how_it_ended(self):
        try:
            status = self._process.wait(5)
        except subprocess.TimeoutExpired:
            return "closed its answers and still runs"
        return f"died of {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"

    @staticmethod
    def _read_answers(read_end, queue_of_answers):
        with os.fdopen(read_end) as answers:
            for line in answers:
                queue_of_answers.put(line)
        queue_of_answers.put(None)
