"""The scheduler half: which blocks a request can get from the folder, and which it brings there.

`SchedulerHalf` is driven by vLLM's hooks (see connector.py) and talks to the folder through a reader that looks at
memory. Two of its calls may wait, for a bounded time: a lookup for the listing of segments that have come or gone (a
quarter of a second, then not again before a listing has ended), and a reset for the file system to take it (half a
second).
"""

import contextlib
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from kvlane._native import Chain
from kvlane.vllm.doubt import DoubtfulSteps
from kvlane.vllm.identity import AdapterIdentities, request_chain
from kvlane.vllm.metadata import IDLE, LoadJob, Reservation, StepMetadata, StoreJob
from kvlane.vllm.options import Options
from kvlane.vllm.room import Room
from kvlane.vllm.unproven import BlockPool, UnprovenBlocks

logger = logging.getLogger("vllm.kvlane")

#: A promise to store lasts this long; a chunked prefill renews it when a third has passed.
RESERVATION_MS = 60_000

#: A load that starts after a wait gets at least this share of `load_timeout_ms`, so that it is not begun for nothing.
SHORTEST_LOAD_SHARE = 0.1

#: An engine that was told to ask again does so in its next step. If it takes longer, it kept the request in its queue.
LONGEST_STEP_MS = 250.0

#: Mark of a request id that a prefill/decode proxy made: the prompt is being computed elsewhere.
PREFILL_MARK = "___prefill_addr_"

#: vLLM's null block: a place holder in block tables that holds nobody's KV.
NULL_BLOCK = 0


class Reader(Protocol):
    """What the scheduler half needs of `kvlane._native.FsReader`."""

    def lookup(self, chain: Chain, limit_blocks: int) -> tuple[int, int]: ...
    def reset(self) -> bool: ...
    def epoch(self) -> int | None: ...
    def stats(self) -> dict[str, int]: ...
    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class SchedulerSettings:
    """Facts about the engine that the scheduler half depends on."""

    #: Tokens per block of vLLM's block manager.
    block_tokens: int
    can_store: bool
    can_load: bool
    #: Whether multimodal identifiers name content (`identity.images_are_named`).
    images_are_named: bool = True
    #: Steps that may be running when the next is planned, the next one included.
    batches_in_flight: int = 1
    #: vLLM keeps the blocks of a request that is aborted while it loads (0.16 and newer).
    holds_aborted_loads: bool = True
    #: Other connectors may load synchronously (MultiConnector) without a word from vLLM about it.
    siblings_are_silent: bool = False
    #: Blocks of the cache, where vLLM itself does not see to it that loads leave room for somebody to compute.
    parking_blocks: int | None = None


@dataclasses.dataclass
class _Request:
    """What is known of one request."""

    #: vLLM's own record; its `num_tokens` grows.
    request: Any
    chain: Chain | None
    prompt_blocks: int
    block_ids: list[int] = dataclasses.field(default_factory=list)
    stored_blocks: int = 0
    reserved_s: float | None = None
    #: When its KV was first asked for.
    asked_s: float | None = None
    #: Whether the last answer was to ask again, and how long it did so before its load.
    is_waiting: bool = False
    waited_ms: float = 0.0
    #: When it was last asked for.
    asked_again_s: float = 0.0
    #: Blocks that vLLM had itself when it last asked, and blocks that it lets us load.
    local_blocks: int = 0
    own_blocks: int = 0
    missing_blocks: int = 0
    miss_reason: str = "absent"
    counted: bool = False
    load_failed: bool = False
    loading: set[int] = dataclasses.field(default_factory=set)


class SchedulerHalf:
    """Plans stores and loads, step by step."""

    def __init__(
        self, options: Options, settings: SchedulerSettings, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._options = options
        self._settings = settings
        self._clock = clock
        self._adapters = AdapterIdentities()
        #: For lookups, and for the folder's epoch: known earlier, because no namespaces are needed for it.
        self._reader: Reader | None = None
        self._folder: Reader | None = None
        #: A reset that the folder has not taken. It and the opening may come from two threads.
        self._reset_waits = False
        self._opening = threading.Lock()
        #: Called when a request asks while there is no reader yet.
        self.on_reader_missing: Callable[[], None] = lambda: None
        self._requests: dict[str, _Request] = {}
        #: Requests whose prompt is not stored up to its last full block.
        self._storing: dict[str, _Request] = {}
        #: Requests that wait for an asynchronous load.
        self._loading: dict[str, _Request] = {}
        self._room = None if settings.parking_blocks is None else Room(settings.parking_blocks, settings.block_tokens)
        self._loads: list[LoadJob] = []
        self._withdrawals: list[bytes] = []
        self._aborted_loads: list[str] = []
        self._planning_failed = False
        self._doubt = DoubtfulSteps(settings.block_tokens, settings.batches_in_flight, settings.siblings_are_silent)
        self._unproven = UnprovenBlocks(self._doubt.until_known)
        self._counters: dict[str, float] = {}

    def open_folder(self, folder: Reader) -> None:
        """From now on the folder can be reset, and stores name its epoch. No request can hit yet."""
        self._folder = folder

    def open(self, reader: Reader) -> None:
        """From now on requests can hit."""
        with self._opening:
            if self._reset_waits:
                # What is in the folder may be from before it.
                self._reset_waits = not reader.reset()
            # One that was there only for the epoch ends with its last user: the hooks may be using it.
            self._folder = self._reader = reader

    @property
    def is_open(self) -> bool:
        return self._reader is not None

    def find_prefix_cache(self, block_pool: Callable[[], BlockPool | None]) -> None:
        """How to get at vLLM's block pool, from which bad blocks of synchronous loads are evicted."""
        self._unproven.block_pool = block_pool

    # ---- what a request can get

    def matched_tokens(self, request: Any, computed_tokens: int) -> tuple[int | None, bool]:
        """Tokens behind `computed_tokens` that the folder has, and whether they load between steps.

        (None, False) asks vLLM to come back: a prefill is still writing. Repeated calls change nothing but the clock.
        """
        if self._folder is None:
            self.on_reader_missing()
        self._doubt.asked(request.request_id, computed_tokens)
        if not self._settings.can_load:
            return 0, False
        state = self._request(request)
        if self._room is not None and self._room.somebody_waits_to_start(request.request_id):
            return None, False
        if state.chain is None or state.load_failed or must_compute(request):
            return 0, False
        block_tokens = self._settings.block_tokens
        local = state.local_blocks = computed_tokens // block_tokens
        # vLLM needs at least one token to compute, the last one.
        limit = min(state.prompt_blocks, (request.num_tokens - 1) // block_tokens)
        state.missing_blocks = max(limit - local, 0)
        if limit <= local:
            return 0, False
        if self._reader is None:
            self.on_reader_missing()
            state.miss_reason = "not_open"
            return 0, False
        now_s = self._clock()
        if state.asked_s is None:
            state.asked_s = now_s
        waited_ms = (now_s - state.asked_s) * 1000
        if state.is_waiting:
            # vLLM was told to come back, and does so in its next step unless it keeps the request in its queue: that
            # time is not ours.
            since_ms = (now_s - state.asked_again_s) * 1000
            state.waited_ms, state.is_waiting = state.waited_ms + min(since_ms, LONGEST_STEP_MS), False
        state.asked_again_s = now_s
        ready, pending = self._reader.lookup(state.chain, limit)
        if pending and ready + pending > local:
            if waited_ms < self._options.load_timeout_ms:
                state.is_waiting = True
                return None, False
            state.miss_reason = "timeout"
        elif ready < limit and waited_ms < self._options.prefill_grace_ms and self._expects_prefill(request):
            state.is_waiting = True
            return None, False
        found = ready - local
        if found <= 0:
            return 0, False
        if self._room is not None and not self._options.sync_load and not self._room.has_room_for(request):
            if waited_ms < self._options.load_timeout_ms:
                state.is_waiting = True
                return None, False
            state.miss_reason = "no_room"
            return 0, False
        return found * block_tokens, not self._options.sync_load

    def blocks_allocated(self, request: Any, block_ids: Callable[[], list[int]], external_tokens: int) -> None:
        """vLLM took up the last answer for `external_tokens` (0: not at all) and gave the request blocks."""
        state = self._request(request)
        self._doubt.loads(request.request_id, external_tokens)
        loaded = state.own_blocks = external_tokens // self._settings.block_tokens
        if not state.counted and self._settings.can_load:
            state.counted = True
            self._count("hit_blocks", loaded)
            self._count(f"miss_blocks_{state.miss_reason}", max(state.missing_blocks - loaded, 0))
        if loaded <= 0:
            return
        first = state.local_blocks
        # The blocks in front are shared with other requests: they are never written.
        targets = list(block_ids()[first : first + loaded])
        try:
            assert state.chain is not None
            keys = state.chain.keys(first, loaded)
        except Exception:
            logger.exception("kvlane: internal error, request %s recomputes its prompt", request.request_id)
            keys = b""  # the worker reports such a load as failed, which releases the request
        # The wait and the load share one deadline.
        whole_ms = self._options.load_timeout_ms
        timeout_ms = max(int(whole_ms - state.waited_ms), int(whole_ms * SHORTEST_LOAD_SHARE), 1)
        state.waited_ms = 0.0  # a load after a preemption begins anew
        self._loads.append(LoadJob(request.request_id, keys, targets, timeout_ms))
        state.loading = set(targets)
        if self._options.sync_load:
            self._doubt.begin()
            self._unproven.add(state.loading)
        else:
            self._loading[request.request_id] = state
            if self._room is not None:
                self._room.park(request)

    # ---- one step

    def step(self, output: Any) -> StepMetadata:
        """What the workers have to do in the step that `output` (vLLM's SchedulerOutput) describes."""
        reservations: list[Reservation] = []
        stores: list[StoreJob] = []
        epoch = None
        try:
            self._plan(output, reservations, stores)
            folder = self._folder
            if stores and folder is not None:
                epoch = folder.epoch()
        except Exception:
            # Loads go out in any case: vLLM waits for them. What was being stored is given up, and nothing is stored
            # before it is clear again whose KV is right.
            self._doubt.begin()
            if not self._planning_failed:
                self._planning_failed = True
                logger.exception("kvlane: internal error in planning a step; it costs recomputes and is logged once")
            given_up, self._storing = self._storing, {}
            for state in given_up.values():
                with contextlib.suppress(Exception):
                    self._withdraw(state)
        if not (reservations or stores or self._loads or self._withdrawals or self._aborted_loads):
            return IDLE
        step = StepMetadata(reservations, self._withdrawals, stores, self._loads, self._aborted_loads, epoch)
        self._withdrawals, self._loads, self._aborted_loads = [], [], []
        return step

    def _plan(self, output: Any, reservations: list[Reservation], stores: list[StoreJob]) -> None:
        # The KV of a step that loads synchronously, we or another connector, may turn out wrong, in this step and in
        # those planned before its result is known. Blocks left out here are stored by a later step of their request.
        quiet = self._doubt.next_step(output)
        if self._reset_waits and self._folder is None:
            quiet = True  # it would be void as soon as the folder is there
        self._unproven.next_step()
        for request_id in output.preempted_req_ids or ():
            state = self._requests.get(request_id)
            self._unproven.preempted(state.request if state is not None else None)
        if self._room is not None:
            self._room.scheduled(output, self._requests)
        if self._settings.can_store and (output.scheduled_new_reqs or self._storing):
            self._plan_stores(output, quiet, reservations, stores)

    def _plan_stores(self, output: Any, quiet: bool, reservations: list[Reservation], stores: list[StoreJob]) -> None:
        for request_id in output.preempted_req_ids or ():
            state = self._storing.get(request_id)
            if state is not None:
                self._withdraw(state)
        scheduled = output.num_scheduled_tokens
        for new in output.scheduled_new_reqs:
            state = self._requests.get(new.req_id)
            if state is None or state.chain is None or state.stored_blocks == state.prompt_blocks:
                continue
            self._storing[new.req_id] = state
            state.block_ids = list(new.block_ids[0])
            self._plan_request(
                new.req_id, state, new.num_computed_tokens + scheduled[new.req_id], quiet, reservations, stores
            )
        cached = output.scheduled_cached_reqs
        for index, request_id in enumerate(cached.req_ids):
            state = self._storing.get(request_id)
            if state is None:
                continue
            new_ids = cached.new_block_ids[index]
            if request_id in cached.resumed_req_ids:
                state.block_ids = list(new_ids[0]) if new_ids is not None else []
            elif new_ids is not None:
                state.block_ids.extend(new_ids[0])
            computed = cached.num_computed_tokens[index] + scheduled[request_id]
            self._plan_request(request_id, state, computed, quiet, reservations, stores)

    def _plan_request(
        self,
        request_id: str,
        state: _Request,
        computed_tokens: int,
        quiet: bool,
        reservations: list[Reservation],
        stores: list[StoreJob],
    ) -> None:
        if quiet:
            return  # nobody shall wait for what may not be stored in the end
        assert state.chain is not None
        first = state.stored_blocks
        end = min(computed_tokens // self._settings.block_tokens, state.prompt_blocks, len(state.block_ids))
        now_s = self._clock()
        if state.reserved_s is None or (now_s - state.reserved_s) * 3000 > RESERVATION_MS:
            state.reserved_s = now_s
            keys = state.chain.keys(first, state.prompt_blocks - first)
            reservations.append(Reservation(keys, first, RESERVATION_MS))
        if end <= first:
            return
        block_ids = state.block_ids[first:end]
        if NULL_BLOCK in block_ids:
            # These tokens fell out of an attention window before they were stored; later blocks cannot be found
            # without them.
            self._storing.pop(request_id, None)
            self._withdraw(state)
            return
        stores.append(StoreJob(request_id, state.chain.keys(first, end - first), block_ids, first))
        state.stored_blocks = end
        if end == state.prompt_blocks:
            self._storing.pop(request_id, None)

    # ---- outcomes

    def workers_answered(self, finished: Iterable[str], failed: Iterable[str], bad_blocks: set[int]) -> None:
        """Takes up what the workers reported: ended loads, failed requests, blocks that hold no valid KV."""
        for request_id in failed:
            self._load_failed(self._requests.get(request_id))
        if bad_blocks:
            self._unproven.evict(bad_blocks)
            for state in self._requests.values():
                if not state.loading.isdisjoint(bad_blocks):
                    self._load_failed(state)
        for request_id in finished:
            ended = self._loading.pop(request_id, None)
            if ended is not None:
                ended.loading = set()
                if self._room is not None:
                    self._room.loaded(request_id)

    def finished(self, request_id: str, block_ids: Sequence[int] = ()) -> bool:
        """A request ended. True: vLLM must keep its blocks until the workers report the request as sent."""
        self._unproven.freed(block_ids)
        state = self._requests.pop(request_id, None)
        self._doubt.gone(request_id)
        if self._room is not None:
            self._room.gone(request_id)
        if state is None:
            return False
        if self._storing.pop(request_id, None) is not None:
            self._withdraw(state)
        if self._loading.pop(request_id, None) is not None:
            self._aborted_loads.append(request_id)
            return not self._settings.holds_aborted_loads
        return False

    def reset(self) -> bool:
        """Forgets everything stored so far, for all who share the folder. What requests computed or loaded before is
        not stored any more. False: the folder does not take it now. It does once it can be written; in a folder that
        this server may only read, the next reset of another server does. Until then nothing from it is loaded here."""
        for state in self._storing.values():
            self._withdraw(state)
        for state in self._requests.values():
            if state.own_blocks or state.request.request_id in self._storing:
                state.stored_blocks = state.prompt_blocks
        self._storing.clear()
        with self._opening:
            folder = self._folder
            done = folder is not None and folder.reset()
            self._reset_waits = not done
        if folder is None:
            self.on_reader_missing()
        if not done:
            logger.warning(
                "kvlane: the folder did not take a reset yet; until it can be written, or a server that can write it "
                "is reset, too, this server loads nothing from it"
            )
        return done

    def take_counters(self) -> dict[str, float]:
        """Counts since the last call, empty if nothing happened."""
        counters, self._counters = self._counters, {}
        return counters

    def close(self) -> None:
        folder, self._folder, self._reader = self._folder, None, None
        if folder is not None:
            folder.close()

    # ---- helpers

    def _request(self, request: Any) -> _Request:
        state = self._requests.get(request.request_id)
        if state is None:
            try:
                chain = request_chain(
                    request, self._settings.block_tokens, self._adapters, self._settings.images_are_named
                )
            except Exception:
                logger.exception("kvlane: request %s cannot be named, so it is not transferred", request.request_id)
                chain = None
            state = _Request(request, chain, chain.block_count if chain is not None else 0)
            self._requests[request.request_id] = state
        return state

    def _expects_prefill(self, request: Any) -> bool:
        parameters = getattr(request, "kv_transfer_params", None) or {}
        if PREFILL_MARK not in request.request_id and not parameters.get("do_remote_prefill"):
            return False
        # A server with both roles sees the id twice; the call that asks for one token is the prefill itself.
        return not (self._settings.can_store and getattr(request, "max_tokens", None) == 1)

    def _withdraw(self, state: _Request) -> None:
        if state.reserved_s is not None and state.chain is not None:
            state.reserved_s = None
            first = state.stored_blocks
            if first < state.prompt_blocks:
                self._withdrawals.append(state.chain.keys(first, state.prompt_blocks - first))

    def _load_failed(self, state: _Request | None) -> None:
        if state is not None and not state.load_failed:
            state.load_failed = True
            self._count("recomputed_requests", 1)

    def _count(self, name: str, amount: float) -> None:
        if amount:
            self._counters[name] = self._counters.get(name, 0) + amount


def must_compute(request: Any) -> bool:
    """Whether the request needs the prompt's own logits, which loaded KV does not bring."""
    if getattr(request, "skip_reading_prefix_cache", False):
        return True
    sampling = getattr(request, "sampling_params", None)
    return sampling is not None and getattr(sampling, "prompt_logprobs", None) is not None
