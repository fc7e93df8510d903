"""A prefill and a decode engine on paper, joined by the native P2P backend or by a stand-in for it."""

import time

from paper_engine import RUN_LIMIT_S, PaperEngine
from support.fake_p2p import Hub
from support.servers import free_port

PREFILL_PORT, DECODE_PORT = free_port(), 14600
_ADDRESSES = f"___prefill_addr_127.0.0.1:{PREFILL_PORT}___decode_addr_127.0.0.1:{DECODE_PORT}_"


def request_id(name, *, side, index=0, child=None):
    """What vLLM makes of the header that a proxy sends to both sides; the random end is each engine's own."""
    suffix = {"prefill": "0a1b2c3d", "decode": "99999999"}[side]
    return f"{'' if child is None else f'{child}_'}cmpl-{_ADDRESSES}{name}-{index}-{suffix}"


class PaperPair:
    """`prefill` and `decode`, and the `hub` between them; without `monkeypatch` the native backend is between them."""

    def __init__(self, monkeypatch, *, asynchronous=False, prefill=None, decode=None, **options):
        self.hub = None
        if monkeypatch is not None:
            self.hub = Hub()
            self.hub.install(monkeypatch)

        def engine(role, port, settings):
            transfer = {
                "kv_connector": "P2pNcclConnector",
                "kv_connector_module_path": "kvlane.vllm",
                "kv_role": f"kv_{role}",
                "kv_port": port,
                "kv_connector_extra_config": dict(options),
            }
            if role == "producer":
                del transfer["kv_connector_module_path"]  # the plugin's way, which old manifests go
            return PaperEngine(role, None, asynchronous=asynchronous, transfer=transfer, **(settings or {}))

        self.prefill = engine("producer", PREFILL_PORT, prefill)
        self.decode = engine("consumer", DECODE_PORT, decode)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.prefill.__exit__()
        self.decode.__exit__()

    def ask_prefill(self, name, prompt, **named):
        """The proxy's first call."""
        self.prefill.add(request_id(name, side="prefill"), prompt, max_tokens=1, **named)

    def ask_decode(self, name, prompt, max_tokens=8, **named):
        """The proxy's second call. Returns the id under which the answer is found."""
        own_id = request_id(name, side="decode")
        self.decode.add(own_id, prompt, max_tokens, **named)
        return own_id

    def answer(self, name, prompt, max_tokens=8):
        """Prefill, then decode, each run to its end."""
        self.ask_prefill(name, prompt)
        self.prefill.run()
        own_id = self.ask_decode(name, prompt, max_tokens)
        self.decode.run()
        return self.decode.answers[own_id]

    def run(self, steps=400):
        """Steps both engines in turn until neither has a request."""
        for _ in range(steps):
            busy = False
            for engine in (self.prefill, self.decode):
                if engine.scheduler.has_unfinished_requests() or engine._in_flight:
                    busy = True
                # vLLM also runs a step for requests that have ended, so that the workers hear of it.
                if engine.scheduler.has_requests():
                    engine.step()
                elif engine._in_flight:
                    engine._deliver()
            if not busy:
                return
            if self.hub is None:
                time.sleep(0.0005)  # the native threads run beside this one
        raise TimeoutError(f"{self.prefill.scheduler.requests} {self.decode.scheduler.requests}")

    def settle(self):
        """Whether every block, lease and pull is given back."""
        free = [
            engine.settle(limit_s=RUN_LIMIT_S) == engine.free_blocks_at_start for engine in (self.decode, self.prefill)
        ]
        return all(free) and not (self.hub and self.hub.jobs())
