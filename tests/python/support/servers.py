"""Real processes behind HTTP: `vllm serve` and `kvlane proxy`, each in a session of its own, ended on exit."""

import contextlib
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import time

import httpx

from support.client import MODEL_NAME
from support.places import log_path, make_temporary, remove_temporary
from support.processes import end_session, kill_session, stopped
from support.vllm_environment import vllm_environment

VLLM_READY_LIMIT_S = 300
PROXY_READY_LIMIT_S = 120
FIRST_PORT = 10_000
#: What torch.distributed says where the port that vLLM chose is taken, and how often a server is started.
LOST_PORT, STARTS_MAX = "code: -98, name: EADDRINUSE", 3
STOP_LIMIT_S = 20


def free_port():
    """A free port that the system gives to nobody: not to outgoing connections, nor to the dozen listeners of every
    vLLM engine. So it is still free when a server has started, and when one that was killed comes back."""
    return free_port_row(1)


def free_ports(count):
    """As many different ones."""
    ports = set()
    while len(ports) < count:
        ports.add(free_port())
    return sorted(ports)


def free_port_row(count):
    """The first of so many free ports that follow each other."""
    with open("/proc/sys/net/ipv4/ip_local_port_range") as file:
        end = int(file.read().split()[0])
    if end < FIRST_PORT + 1000:  # a machine that gives out nearly all: then there is no better way than to try
        end = 1 << 16
    # Drawn from the system's own randomness: runs beside each other must not meet.
    draw = random.SystemRandom()
    for _ in range(1000):
        first = draw.randrange(FIRST_PORT, end - count)
        with contextlib.ExitStack() as probes, contextlib.suppress(OSError):
            for port in range(first, first + count):
                probes.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise RuntimeError(f"no {count} free ports in a row from {FIRST_PORT} to {end - 1}")


class Server:
    """A process that listens on a port of this machine. Use as a context manager, or call stop()."""

    def __init__(self, name, command, port, environment, ready_limit_s, health_path="/health"):
        self.name = name
        self.url = f"http://127.0.0.1:{port}"
        self.log_path = log_path(f"server-{name}")
        self._health_url = self.url + health_path
        self._ready_limit_s = ready_limit_s
        self._temporary = make_temporary(name)
        self._command, self._environment = command, {**environment, "TMPDIR": str(self._temporary)}
        self._starts = 0
        self._start()

    def _start(self):
        self._starts += 1
        self._started = time.monotonic()
        with open(self.log_path, "w") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=subprocess.STDOUT, env=self._environment, start_new_session=True
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()

    @property
    def pid(self):
        return self._process.pid

    def is_running(self):
        return self._process.poll() is None

    def wait_until_ready(self, while_waiting=lambda waited_s: None):
        """Returns the seconds since the start. `while_waiting` is called about twice a second.

        A server that ended because another one took a port that vLLM had chosen for itself is started again, twice at
        most: vLLM looks for a free port, lets go of it, and listens there seconds later.
        """
        while (waited_s := time.monotonic() - self._started) < self._ready_limit_s and self.is_running():
            try:
                if httpx.get(self._health_url, timeout=2).status_code == 200:
                    return waited_s
            except httpx.HTTPError:
                pass
            while_waiting(waited_s)
            time.sleep(0.5)
        log = self.log_path.read_text(errors="replace")
        if not self.is_running() and LOST_PORT in log and self._starts < STARTS_MAX:
            print(f"server '{self.name}': another one took the port that vLLM had chosen; started again")
            end_session(self._process)
            self._start()
            return self.wait_until_ready(while_waiting)
        tail = "\n".join(log.splitlines()[-30:])
        state = "did not become ready in time" if self.is_running() else f"ended with {self._process.returncode}"
        raise RuntimeError(f"server '{self.name}' {state}; end of {self.log_path}:\n{tail}")

    @contextlib.contextmanager
    def suspended(self):
        """Inside the block no process of the server runs, as if its machine had been taken away (SIGSTOP)."""
        with stopped(self._process.pid, is_group=True):
            yield

    def kill(self):
        """Kills all processes of the server at once (SIGKILL), as when its machine loses power. stop() is still due."""
        kill_session(self._process)

    def stop(self):
        """Asks the server to end, then kills what is left in its session. Nothing outside the session is touched."""
        if self.is_running():
            self._process.send_signal(signal.SIGINT)
            try:
                self._process.wait(STOP_LIMIT_S)
            except subprocess.TimeoutExpired:
                pass
        end_session(self._process)
        remove_temporary(self._temporary)


def vllm_server(name, model, cpus, *, transfer=None, arguments=(), environment=None, ready_limit_s=VLLM_READY_LIMIT_S):
    """Starts `vllm serve` on these CPUs; call wait_until_ready() next."""
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", str(model)]
    command += ["--served-model-name", MODEL_NAME, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--enforce-eager", "--enable-prompt-tokens-details", *arguments]
    if transfer is not None:
        command += ["--kv-transfer-config", json.dumps(transfer)]
    full_environment = {**vllm_environment(cpus), **(environment or {})}
    return Server(name, command, port, full_environment, ready_limit_s)


def kvlane_proxy(prefill_url, decode_url, *, kv_ports=None, dispatch=None):
    """Starts kvlane's proxy in front of the two servers. KV goes through a folder, or, given the `kv_ports` of prefill
    and decode, from server to server. `dispatch`: sequential (the default) or concurrent."""
    port = free_port()
    urls = [prefill_url, decode_url]
    if kv_ports:
        urls = [f"{url}={kv_port}" for url, kv_port in zip(urls, kv_ports, strict=True)]
    command = [str(pathlib.Path(sys.executable).with_name("kvlane")), "proxy"]
    command += ["--prefill", urls[0], "--decode", urls[1], "--kv-backend", "p2p" if kv_ports else "fs"]
    command += ["--port", str(port)]
    if dispatch:
        command += ["--dispatch", dispatch]
    return Server("proxy", command, port, dict(os.environ), PROXY_READY_LIMIT_S)
