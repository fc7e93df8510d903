"""The P2P worker half: says what the cache holds to the native module, and has it fill blocks.

All hooks run on the worker's main thread and none of them waits, but for a moment when a load is aborted on vLLM 0.15.
Bytes move on the native module's own threads.
"""

import dataclasses
import logging
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from kvlane._native import Layout
from kvlane.vllm.p2p_options import P2pOptions
from kvlane.vllm.p2p_ranks import Source, sources
from kvlane.vllm.p2p_steps import IDLE, Abort, Extend, Finish, Offer, Order, P2pStep, Progress, Pull, Release, Revoke
from kvlane.vllm.worker import ABORT_WAIT_MS, log_once, no_stream

logger = logging.getLogger("vllm.kvlane")

#: How often the native module is asked for its figures.
STATS_INTERVAL_S = 0.5


class Transfer(Protocol):
    """What the worker half needs of `kvlane._native.P2pWorker`."""

    def offer(self, key: str, tokens: int, digest: bytes, block_ids: list[int]) -> None: ...
    def extend(self, key: str, block_ids: list[int]) -> None: ...
    def progress(self, progressed: list[tuple[str, int, int, int]], stream: int | None = None) -> None: ...
    def finish(self, key: str) -> None: ...
    def revoke(self, key: str) -> None: ...
    def released(self) -> list[str]: ...
    def pull(
        self,
        key: str,
        host: str,
        port: int,
        tokens: int,
        digest: bytes,
        first_block: int,
        block_ids: list[int],
        timeout_ms: int,
        stream: int | None = None,
        *,
        readers: int = 1,
    ) -> int: ...
    def release(self, key: str, host: str, port: int, digest: bytes, *, readers: int = 1) -> None: ...
    def cancel(self, job: int) -> None: ...
    def poll(self) -> list[tuple[int, list[int], str]]: ...
    def wait(self, job: int, timeout_ms: int) -> tuple[list[int], str] | None: ...
    def stats(self) -> dict[str, float]: ...
    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class P2pWorkerSettings:
    """Facts about the engine that the worker half depends on."""

    #: This worker's pipeline stage. The same stage of the other server has its layers.
    pp_rank: int = 0
    #: Its rank in its stage, of how many, and the model's KV heads that those share out (None: MLA).
    tp_rank: int = 0
    tp_size: int = 1
    kv_heads: int | None = None
    #: Layer hooks run once per layer and step, with all of the step's tokens.
    whole_layers: bool = True
    #: vLLM keeps the blocks of a request that is aborted while it loads (0.16 and newer).
    holds_aborted_loads: bool = True


@dataclasses.dataclass
class _Running:
    """A request that is being pulled, from one rank of prefill or from several."""

    request_id: str
    block_ids: list[int]
    aborted: bool = False
    #: Pulls that have not ended.
    jobs: set[int] = dataclasses.field(default_factory=set)
    #: Positions that are bad in one of them, and why in the first.
    bad: set[int] = dataclasses.field(default_factory=set)
    reason: str = "done"


class P2pWorkerHalf:
    """Carries out what the scheduler half planned."""

    def __init__(
        self, options: P2pOptions, settings: P2pWorkerSettings, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._options = options
        self._settings = settings
        self._clock = clock
        self._native: Transfer | None = None
        self._layout: Layout | None = None
        self._stream: Callable[[], tuple[int, ...]] = no_stream
        self._step: P2pStep = IDLE
        #: The step whose orders were carried out: two hooks bring it.
        self._ordered: P2pStep = IDLE
        #: What the step completes, until it was said.
        self.step_progress: list[Progress] = []
        self._saved_layers: set[int] = set()
        self._whole_layers = 0
        #: Ended requests whose blocks are held, by key.
        self._held: dict[str, str] = {}
        self._running: dict[int, _Running] = {}
        self._of_request: dict[str, _Running] = {}
        self._received: set[str] = set()
        self._sent: set[str] = set()
        self._bad_blocks: set[int] = set()
        self._counters: dict[str, float] = {}
        self._next_stats_s = 0.0
        #: When aborted pulls of this step are waited for no longer.
        self._abort_end_s = 0.0

    def open(self, native: Transfer, layout: Layout, stream: Callable[[], tuple[int, ...]] | None = None) -> None:
        """From now on orders are carried out. ``stream`` is what `compute_stream` returned for the tensors."""
        self._native, self._layout = native, layout
        self._stream = stream or no_stream

    # ---- the hooks of a step, in their order

    def carry_out(self, step: P2pStep) -> None:
        """The step's orders, before anything of it may write to the cache. The second call in a step does nothing."""
        if step is self._ordered:
            return
        self._ordered = step
        self._cancel_all(step.orders)
        for order in step.orders:
            try:
                self._carry_out(order)
            except Exception as error:
                log_once(f"order {type(order).__name__}", error)
                if isinstance(order, Finish):  # vLLM waits for a word about it
                    self._held.pop(order.key, None)
                    self._sent.add(order.request_id)

    def begin_step(self, step: P2pStep) -> None:
        """Before the forward pass."""
        self._step = step
        if step.is_idle:
            return
        self.carry_out(step)
        self.step_progress = list(step.progress) if self._native is not None else []
        self._saved_layers.clear()
        self._whole_layers = 0

    def start_loads(self) -> None:
        """Starts the step's pulls."""
        pulls = self._step.pulls
        if not pulls:
            return
        self._step = dataclasses.replace(self._step, pulls=[])  # a second call in a step starts nothing
        for pull in pulls:
            running = self._of_request[pull.request_id] = _Running(pull.request_id, pull.block_ids)
            try:
                self._pull(pull, running)
            except Exception as error:
                # vLLM waits for every load, so this one must end.
                log_once("start of a pull", error)
                self._fail(running, range(len(pull.block_ids)), "refused")
            if not running.jobs:
                self._ended(running)

    def layer_saved(self, name: str) -> None:
        """A layer's KV of this step is complete, so it can leave while the next layers compute."""
        if self._native is None or self._layout is None or not self._settings.whole_layers:
            return
        layer = self._layout.layer_index(name)
        if layer is None or layer in self._saved_layers:
            return
        self._saved_layers.add(layer)
        before = self._whole_layers
        while self._whole_layers in self._saved_layers:
            self._whole_layers += 1
        # The last layer is said with the end of the step.
        if before == self._whole_layers or self._whole_layers >= self._layout.layer_count:
            return
        layers = self._whole_layers
        self._tell_progress([(one.key, one.done_blocks, one.wave_blocks, layers) for one in self.step_progress])

    def finish_step(self) -> None:
        """After the forward pass: the step's blocks are complete in all layers."""
        progress, self.step_progress = self.step_progress, []
        if self._native is None or not progress:
            return
        if sys.exc_info()[0] is not None:
            return  # vLLM calls this also for a forward pass that failed half-way
        self._tell_progress([(one.key, one.wave_blocks, one.wave_blocks, 0) for one in progress])

    def finished(self) -> tuple[set[str] | None, set[str] | None]:
        """Requests whose blocks are not held any more, and requests whose pull ended. Each is reported once."""
        native = self._native
        if native is not None:
            if self._held:
                for key in self._try("released", native.released) or ():
                    request_id = self._held.pop(key, None)
                    if request_id is not None:
                        self._sent.add(request_id)
            if self._running:
                for job, positions, reason in self._try("poll", native.poll) or ():
                    self._job_ended(job, positions, reason)
        if not (self._sent or self._received):
            return None, None
        sent, self._sent = self._sent, set()
        received, self._received = self._received, set()
        return sent or None, received or None

    def bad_blocks(self) -> set[int]:
        """Blocks whose pull failed since the last call."""
        if not self._bad_blocks:
            return set()
        bad, self._bad_blocks = self._bad_blocks, set()
        return bad

    def end_step(self) -> None:
        """The step is over."""
        if self.step_progress:
            self.finish_step()
        if self._step.pulls:
            self.start_loads()  # vLLM waits for them, whether it called their hook or not
        self._step = IDLE

    def take_counters(self) -> dict[str, float]:
        """Counts since the last call, empty if nothing happened."""
        if self._native is None:
            return {}
        now_s = self._clock()
        if now_s < self._next_stats_s:
            return {}
        self._next_stats_s = now_s + STATS_INTERVAL_S
        counters = dict(self._try("stats", self._native.stats) or {})
        own, self._counters = self._counters, {}
        for name, amount in own.items():
            counters[name] = counters.get(name, 0) + amount
        return counters

    def close(self) -> None:
        native, self._native = self._native, None
        if native is None:
            return
        native.close()
        # Nobody hears of its jobs and leases any more.
        self._running.clear()
        for running in list(self._of_request.values()):
            running.jobs.clear()
            self._fail(running, range(len(running.block_ids)), "closed")
            self._ended(running)
        self._sent.update(self._held.values())
        self._held.clear()
        self.step_progress = []

    # ---- orders and pulls

    def _carry_out(self, order: Order) -> None:
        native = self._native
        if isinstance(order, Abort):
            self._abort(order.request_id)
        elif native is None:
            if isinstance(order, Finish):
                self._sent.add(order.request_id)
        elif isinstance(order, Offer):
            native.offer(order.key, order.tokens, order.digest, order.block_ids)
        elif isinstance(order, Extend):
            native.extend(order.key, order.block_ids)
        elif isinstance(order, Finish):
            self._held[order.key] = order.request_id
            native.finish(order.key)
        elif isinstance(order, Revoke):
            held = self._held.pop(order.key, None)
            if held is not None:
                self._sent.add(held)
            native.revoke(order.key)
        elif isinstance(order, Release):
            for source, port in self._sources(order):
                native.release(order.key, order.host, port, order.digest, readers=source.readers)

    def _sources(self, order: Pull | Release) -> list[tuple[Source, int]]:
        """The ranks of prefill that this one talks to, and their ports: those of a server follow each other."""
        settings = self._settings
        peer_size = order.tensor_ranks or settings.tp_size
        first_port = order.port + settings.pp_rank * peer_size
        found = sources(settings.kv_heads, settings.tp_rank, settings.tp_size, peer_size)
        return [(source, first_port + source.rank) for source in found]

    def _pull(self, pull: Pull, running: _Running) -> None:
        native = self._native
        if native is None:
            raise RuntimeError("the KV caches are not registered")
        refusal: Exception | None = None
        for source, port in self._sources(pull):
            if refusal is not None or not source.is_read:
                # Also behind a refusal: what nobody is going to read need not be held.
                native.release(pull.key, pull.host, port, pull.digest, readers=source.readers)
                continue
            try:
                job = native.pull(
                    pull.key,
                    pull.host,
                    port,
                    pull.tokens,
                    pull.digest,
                    pull.first_block,
                    pull.block_ids,
                    self._options.transfer_timeout_ms,
                    *self._stream(),
                    readers=source.readers,
                )
            except Exception as error:
                refusal = error
                continue
            running.jobs.add(job)
            self._running[job] = running
        if refusal is not None:
            raise refusal

    def _job_ended(self, job: int, positions: Sequence[int], reason: str) -> None:
        running = self._running.pop(job, None)
        if running is None:
            return
        running.jobs.discard(job)
        self._fail(running, positions, reason)
        if not running.jobs:
            self._ended(running)

    def _fail(self, running: _Running, positions: Sequence[int], reason: str) -> None:
        """Some blocks are bad: what is still coming for the request is of no use."""
        if not positions:
            return
        if not running.bad:
            running.reason = reason
        running.bad.update(positions)
        self._cancel(running)

    def _cancel(self, running: _Running) -> None:
        for job in running.jobs:
            if self._native is not None:
                self._try("cancel", self._native.cancel, job)

    def _cancel_all(self, orders: Sequence[Order]) -> None:
        """Cancels what a step aborts, before any of it is waited for: all of them have one wait together."""
        aborts = [order for order in orders if isinstance(order, Abort)]
        if not aborts:
            return
        self._abort_end_s = self._clock() + ABORT_WAIT_MS / 1000
        for abort in aborts:
            running = self._of_request.get(abort.request_id)
            if running is not None:
                self._cancel(running)

    def _tell_progress(self, progressed: list[tuple[str, int, int, int]]) -> None:
        assert self._native is not None
        if progressed:
            self._try("progress", self._native.progress, progressed, *self._stream())

    def _abort(self, request_id: str) -> None:
        running = self._of_request.get(request_id)
        if running is None or self._native is None:
            # It was reported already. vLLM 0.15 waits for a word that the blocks are free; newer versions must not
            # hear of the request again.
            if not self._settings.holds_aborted_loads:
                self._sent.add(request_id)
            return
        running.aborted = True
        if not self._settings.holds_aborted_loads:
            for job in sorted(running.jobs):
                remaining_ms = max(int((self._abort_end_s - self._clock()) * 1000), 0)
                ended = self._try("wait", self._native.wait, job, remaining_ms)
                if ended is not None:
                    self._job_ended(job, *ended)

    def _ended(self, running: _Running) -> None:
        """All pulls of a request have ended."""
        if self._of_request.get(running.request_id) is running:
            del self._of_request[running.request_id]
        positions, reason = sorted(running.bad), running.reason
        self._next_stats_s = 0.0  # an engine without requests makes no steps, so its last figures must be told now
        if positions and not running.aborted:
            self._bad_blocks.update(running.block_ids[position] for position in positions)
            self._counters["failed_pulls"] = self._counters.get("failed_pulls", 0) + 1
            by_reason = f"failed_{reason}"
            self._counters[by_reason] = self._counters.get(by_reason, 0) + 1
            logger.warning(
                "kvlane: %d of %d blocks of request %s did not arrive (%s)",
                len(positions),
                len(running.block_ids),
                running.request_id,
                reason,
            )
        if running.aborted and not self._settings.holds_aborted_loads:
            self._sent.add(running.request_id)
        else:
            self._received.add(running.request_id)

    def _try(self, what: str, call: Callable[..., Any], *arguments: Any) -> Any:
        """Calls into the native module; an error there costs a recompute, never a dead engine."""
        try:
            return call(*arguments)
        except Exception as error:
            log_once(what, error)
            return None
